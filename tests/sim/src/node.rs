//! The simulated shell of a node: events go in, acts come out, and between them is the machine that processes run too
//! (`millrace_core::node`). It keeps what the machine leaves to its shell: KV memory, the engine's step, the gates that streams ask.

mod beside;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use millrace_core::batch::Batch;
use millrace_core::engine::{EngineError, Step};
use millrace_core::ids::{AttemptId, Epoch, NodeId, Time};
use millrace_core::message::{Join, Message};
use millrace_core::node::{self, Effect, Input, Note};
use millrace_core::transfer::gate::Gate;

pub use beside::Cell;

use crate::event::{Act, LinkNo, NodeEvent, SpanJob};
use crate::memory::Memory;
use crate::plan::Plan;

/// Events told before the machine has its turn.
const EVENTS_PER_TURN: usize = 256;

/// A process of a node.
pub struct Node {
    name: String,
    instance: u128,
    layers: u16,
    vocab: u32,
    /// The node's own time: no two nodes' clocks agree.
    now: Time,
    machine: node::Node,
    /// Its KV.
    pub memory: Memory,
    /// Gates of the hand-overs that arrive, and the link whose streams may ask.
    gates: BTreeMap<AttemptId, (LinkNo, Gate)>,
    /// Streams that were refused and of which the machine has not been told.
    refused: u32,
    /// The step that the engine computes, the hashes of its rows' layers so far, and when it began.
    step: Option<(Step, Vec<Vec<u64>>, Time)>,
    /// Tokens of each ticket that was assigned.
    tokens: BTreeMap<AttemptId, u32>,
    inbox: VecDeque<NodeEvent>,
    acts: Vec<Act>,
    /// An operator has stopped the process: it ends by itself.
    stops: bool,
    /// Links that were told to be gone.
    downs: BTreeSet<LinkNo>,
    /// Hand-overs whose gate was closed in this turn, and those that their sender gave up in it, with the link.
    closed: Vec<(LinkNo, AttemptId)>,
    /// See `closed`.
    aborted: BTreeSet<(LinkNo, AttemptId)>,
    /// Attempts that were cancelled in this turn while they were known, for the watcher.
    pub ended: Vec<AttemptId>,
}

impl Node {
    /// A process that has just started.
    #[must_use]
    pub fn new(plan: &Plan, join: Join) -> Self {
        Self {
            name: join.name.clone(),
            instance: join.instance,
            layers: plan.model.layout.layers,
            vocab: plan.vocab,
            now: Time(0),
            machine: node::Node::new(join, plan.batch.clone()),
            memory: Memory::new(plan.model.layout.block_tokens),
            gates: BTreeMap::new(),
            refused: 0,
            step: None,
            tokens: BTreeMap::new(),
            inbox: VecDeque::new(),
            acts: Vec::new(),
            stops: false,
            downs: BTreeSet::new(),
            closed: Vec::new(),
            aborted: BTreeSet::new(),
            ended: Vec::new(),
        }
    }

    /// The number of the process's life.
    #[must_use]
    pub fn instance(&self) -> u128 {
        self.instance
    }

    /// The node's number and incarnation, once it has them.
    #[must_use]
    pub fn joined(&self) -> Option<(NodeId, Epoch)> {
        self.machine.joined()
    }

    /// Its sequences and its pool.
    #[must_use]
    pub fn batch(&self) -> &Batch {
        self.machine.batch()
    }

    /// Puts an event in the queue of the drive loop.
    pub fn push(&mut self, event: NodeEvent) {
        self.inbox.push_back(event);
    }

    /// One turn of the drive loop: some events, then everything that is due. Gives what is to be done.
    pub fn turn(&mut self, now: Time) -> Vec<Act> {
        self.now = now;
        for _ in 0..EVENTS_PER_TURN {
            let Some(event) = self.inbox.pop_front() else { break };
            if let Some(input) = self.input(event) {
                self.tell(input);
            }
        }
        for _ in 0..std::mem::take(&mut self.refused) {
            self.tell(Input::StreamRefused);
        }
        self.tell(Input::Turn);
        self.machine.check();
        // What arrives waits a while for the sender to come back on another link.
        let over_gone = self.machine.sends().find(|(link, _)| self.downs.contains(&link.0));
        assert!(over_gone.is_none(), "I3: {over_gone:?} goes on over a link that is gone");
        self.check_last_words();
        std::mem::take(&mut self.acts)
    }

    /// Whoever receives no more says so to the sender, unless that one said so first or cannot be reached: else it waits in vain.
    fn check_last_words(&mut self) {
        let aborted = std::mem::take(&mut self.aborted);
        for (link, attempt) in std::mem::take(&mut self.closed) {
            let last = |act: &Act| {
                let of = |message: &Message| matches!(message, Message::Received { attempt: a } | Message::Abort { attempt: a, .. } if *a == attempt);
                matches!(act, Act::Send(to, message) if *to == link && of(message))
            };
            let said = self.downs.contains(&link) || aborted.contains(&(link, attempt)) || self.acts.iter().any(last);
            assert!(said, "I1: {attempt}: {} receives no more and does not say so", self.name);
        }
    }

    /// Events that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.inbox.len()
    }

    /// When the next turn is due, if nothing happens before; at once when events wait.
    #[must_use]
    pub fn deadline(&self) -> Time {
        if self.inbox.is_empty() { self.machine.deadline() } else { self.now }
    }

    /// Whether events wait.
    #[must_use]
    pub fn has_events(&self) -> bool {
        !self.inbox.is_empty()
    }

    /// The step that the engine computes.
    #[must_use]
    pub fn step(&self) -> Option<&Step> {
        self.step.as_ref().map(|(step, ..)| step)
    }

    /// Hand-overs under way that were asked for, by link; whether this side sends.
    pub fn halves(&self) -> impl Iterator<Item = (LinkNo, AttemptId, bool)> {
        let sends = self.machine.sends().map(|(link, attempt)| (link.0, attempt, true));
        sends.chain(self.machine.awaits().map(|(link, attempt)| (link.0, attempt, false)))
    }

    /// Whether a hand-over of this attempt was asked for here.
    #[must_use]
    pub fn is_asked(&self, attempt: AttemptId) -> bool {
        self.machine.awaits().any(|(_, awaited)| awaited == attempt)
    }

    /// Whether this attempt is being sent from here.
    #[must_use]
    pub fn is_sending(&self, attempt: AttemptId) -> bool {
        self.machine.sends().any(|(_, sent)| sent == attempt)
    }

    /// Whether a cell of this attempt may still be written here.
    #[must_use]
    pub fn is_receiving(&self, attempt: AttemptId) -> bool {
        self.gates.get(&attempt).is_some_and(|(_, gate)| gate.standing().fault.is_none())
    }

    /// What is still there when everything should be over; `None` when the node is at rest.
    #[must_use]
    pub fn unrest(&self) -> Option<String> {
        let own = [
            ("lent cells", self.memory.lent()),
            ("open gates", self.gates.len()),
            ("stops under way", usize::from(self.stops)),
            ("nodes in doubt", self.machine.doubted()),
        ];
        let kept = self.machine.kept().into_iter().chain(own);
        kept.filter(|(_, count)| *count > 0).map(|(what, count)| format!("I1: {}: {count} {what} are left", self.name)).next()
    }

    fn input(&mut self, event: NodeEvent) -> Option<Input> {
        Some(match event {
            NodeEvent::UplinkUp(replica, link) => Input::UplinkUp(replica, node::LinkNo(link)),
            NodeEvent::PeerUp(link, name, epoch) => Input::PeerUp(node::LinkNo(link), name, epoch),
            NodeEvent::Down(link) => {
                self.downs.insert(link);
                Input::Down(node::LinkNo(link))
            }
            NodeEvent::Message(link, message) => {
                if let Message::Assign(ticket) = &*message {
                    self.tokens.insert(ticket.attempt, ticket.tokens.len() as u32);
                }
                if let Message::Abort { attempt, .. } = &*message {
                    self.aborted.insert((link, *attempt));
                }
                if let Message::Cancel(attempt) = &*message
                    && self.machine.batch().knows(*attempt)
                    && !self.machine.is_leaving(*attempt)
                {
                    self.ended.push(*attempt); // one that is being sent keeps its slots, and computes, until its streams are through
                }
                Input::Message(node::LinkNo(link), message)
            }
            NodeEvent::DialFailed(name) => Input::DialFailed { name, reason: "nobody answers".into() },
            NodeEvent::Layer(layer) => Input::Layer(layer),
            NodeEvent::Stepped(result) => {
                let elapsed_us = self.step.take().map_or(0, |(_, _, began)| self.now.since(began));
                Input::Stepped { result: result.map_err(EngineError), elapsed_us }
            }
            NodeEvent::SpanSent(attempt, span, digest_sum) => Input::SpanSent { attempt, span, digest_sum },
            NodeEvent::SpanDrained(attempt, link, span, error) => {
                Input::SpanDrained { attempt, link: node::LinkNo(link), span, elapsed_us: 0, error: error.map(Into::into) }
            }
            NodeEvent::Arrived(attempt) => Input::Standing(attempt, self.gates.get(&attempt)?.1.standing().clone()),
            NodeEvent::Stop => {
                self.stops = true;
                Input::Stop
            }
        })
    }

    fn tell(&mut self, input: Input) {
        self.machine.handle(self.now, input);
        while let Some(effect) = self.machine.poll() {
            self.act(effect);
        }
    }

    fn act(&mut self, effect: Effect) {
        match effect {
            Effect::Send(link, message) => self.acts.push(Act::Send(link.0, message)),
            Effect::Dial(peer) => self.acts.push(Act::Dial(peer)),
            Effect::Close(link, _) => self.acts.push(Act::Close(link.0)),
            Effect::Step(step) => {
                let hashes = vec![Vec::new(); step.rows.len()];
                self.step = Some((step, hashes, self.now));
                self.acts.push(Act::Step);
            }
            Effect::Span(job) => {
                let node::SpanJob { attempt, link: node::LinkNo(link), span, generation, cells, .. } = job;
                let tokens = self.tokens[&attempt];
                self.acts.push(Act::Span(SpanJob { attempt, link, span, generation, cells, tokens }));
            }
            Effect::StopSpans(attempt) => self.acts.push(Act::StopSpans(attempt)),
            Effect::OpenGate(attempt, link, gate) => drop(self.gates.insert(attempt, (link.0, *gate))),
            Effect::MoveGate(attempt, link) => self.gates.get_mut(&attempt).expect("an open gate is moved").0 = link.0,
            Effect::ReadGate(attempt) => {
                let stands = self.gates[&attempt].1.stands().clone();
                self.machine.handle(self.now, Input::Stands(attempt, stands));
            }
            Effect::CloseGate(attempt) => self.closed.extend(self.gates.remove(&attempt).map(|(link, _)| (link, attempt))),
            Effect::Digest(blocks) => {
                let layers = self.layers;
                let digested = blocks.into_iter().map(|block| (block, self.memory.digest_block(&block, layers))).collect();
                self.machine.handle(self.now, Input::Digested(digested));
            }
            Effect::Note(Note::Meaningless(message)) => panic!("{} got {message:?}, which means nothing there", self.name),
            Effect::Note(_) | Effect::Replicas(..) | Effect::Greet(..) => {}
            Effect::Refused(_) | Effect::Exit => self.acts.push(Act::Exit),
        }
    }
}
