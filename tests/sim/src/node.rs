//! A node's drive loop, call for call as in `millrace-node` (`serve/drive.rs`), without tasks: events go in, acts come out. It holds
//! no policy; what may be sent, written, computed or freed is decided in `millrace-core`.

mod beside;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use millrace_core::batch::{Batch, Input, Output};
use millrace_core::engine::{EngineError, Step};
use millrace_core::ids::{AttemptId, BlockHash, Epoch, Generation, ReplicaId, SlotRef, Time};
use millrace_core::message::{AttemptFailed, FailKind, Granted, Join, Message, Peer, Ticket, TokenOut};
use millrace_core::transfer::Grid;
use millrace_core::transfer::recv::{self, Receiver};
use millrace_core::transfer::send::{self, Sender};

pub use beside::Cell;

use crate::event::{Act, LinkNo, NodeEvent};
use crate::handover::{Effect, Reception, Sendings};
use crate::memory::Memory;
use crate::plan::Plan;
use crate::uplink::Uplink;

/// Events handled before outputs are looked at again.
const EVENTS_PER_TURN: usize = 256;
/// A stopping node finishes what it has for at most this long.
const DRAIN_MAX_US: u64 = 20_000_000;

/// A process of a node.
pub struct Node {
    name: String,
    layout: millrace_core::layout::KvLayout,
    vocab: u32,
    /// The node's own time: no two nodes' clocks agree.
    now: Time,
    /// Its batch.
    pub batch: Batch,
    /// Its KV.
    pub memory: Memory,
    /// Its standing.
    pub uplink: Uplink,
    /// Links to other nodes, with their incarnation.
    peers: BTreeMap<LinkNo, (String, Epoch)>,
    dialed: BTreeMap<String, LinkNo>,
    dialing: BTreeSet<String>,
    sendings: Sendings,
    receptions: BTreeMap<AttemptId, Reception>,
    /// Rows of the step in flight: attempt, tokens known after it, tokens in all.
    in_flight: Option<Vec<(AttemptId, u32, u32)>>,
    /// The step that the engine computes, and the hashes of its rows' layers so far.
    step: Option<(Step, Vec<Vec<u64>>)>,
    gateways: BTreeMap<AttemptId, ReplicaId>,
    asking: BTreeMap<AttemptId, (LinkNo, Ticket)>,
    leaving: BTreeMap<AttemptId, Ticket>,
    cancelled: BTreeSet<AttemptId>,
    generation: u32,
    stopping_since: Option<Time>,
    inbox: VecDeque<NodeEvent>,
    acts: Vec<Act>,
}

impl Node {
    /// A process that has just started.
    #[must_use]
    pub fn new(plan: &Plan, join: Join) -> Self {
        Self {
            name: join.name.clone(),
            layout: plan.model.layout,
            vocab: plan.vocab,
            now: Time(0),
            batch: Batch::new(plan.batch.clone()),
            memory: Memory::new(plan.model.layout.block_tokens),
            uplink: Uplink::new(join),
            peers: BTreeMap::new(),
            dialed: BTreeMap::new(),
            dialing: BTreeSet::new(),
            sendings: Sendings::default(),
            receptions: BTreeMap::new(),
            in_flight: None,
            step: None,
            gateways: BTreeMap::new(),
            asking: BTreeMap::new(),
            leaving: BTreeMap::new(),
            cancelled: BTreeSet::new(),
            generation: 0,
            stopping_since: None,
            inbox: VecDeque::new(),
            acts: Vec::new(),
        }
    }

    /// Puts an event in the queue of the drive loop.
    pub fn push(&mut self, event: NodeEvent) {
        self.inbox.push_back(event);
    }

    /// One turn of the drive loop: some events, time, then everything that is due. Gives what is to be done.
    pub fn turn(&mut self, now: Time) -> Vec<Act> {
        self.now = now;
        for _ in 0..EVENTS_PER_TURN {
            let Some(event) = self.inbox.pop_front() else { break };
            self.on_event(event);
        }
        self.on_tick();
        self.drain_batch();
        self.begin_step();
        self.drain_batch();
        let (load, batch) = (self.batch.load(), &self.batch);
        self.uplink.advance(now, load, || batch.cached_names().collect(), &mut self.acts);
        if self.stopped() {
            self.acts.push(Act::Exit);
        }
        self.check();
        std::mem::take(&mut self.acts)
    }

    /// When the next turn is due, if nothing happens before; at once when events wait.
    #[must_use]
    pub fn deadline(&self) -> Time {
        if !self.inbox.is_empty() {
            return self.now;
        }
        let receptions = self.receptions.values().filter_map(|r| r.machine.deadline()).min();
        let stop = self.stopping_since.map(|since| since.after(DRAIN_MAX_US));
        let all = [Some(self.uplink.deadline()), self.batch.deadline(), self.sendings.deadline(), receptions, stop];
        all.into_iter().flatten().min().unwrap_or(self.now)
    }

    fn check(&self) {
        self.batch.check();
        self.receptions.values().for_each(|reception| reception.machine.check());
    }

    /// What is still there when everything should be over; `None` when the node is at rest.
    #[must_use]
    pub fn unrest(&self) -> Option<String> {
        let kept = [
            ("sequences", usize::from(!self.batch.is_idle())),
            ("blocks in use", self.batch.pool_stats().in_use as usize),
            ("hand-overs that leave", usize::from(!self.sendings.is_empty())),
            ("hand-overs that arrive", self.receptions.len()),
            ("tickets that ask", self.asking.len()),
            ("tickets that leave", self.leaving.len()),
            ("attempts with a gateway", self.gateways.len()),
            ("cancelled attempts", self.cancelled.len()),
            ("lent cells", self.memory.lent()),
        ];
        kept.iter().find(|(_, count)| *count > 0).map(|(what, count)| format!("{}: {count} {what} are left", self.name))
    }

    fn on_event(&mut self, event: NodeEvent) {
        match event {
            NodeEvent::UplinkUp(replica, link) => self.uplink.up(self.now, replica, link),
            NodeEvent::PeerUp(link, name, epoch) => self.on_peer_up(link, name, epoch),
            NodeEvent::Down(link) => match self.uplink.replica(link) {
                Some(replica) => {
                    self.uplink.down(replica);
                    let mine = self.gateways.iter().filter(|(_, gateway)| **gateway == replica);
                    let attempts: Vec<_> = mine.map(|(attempt, _)| *attempt).collect();
                    attempts.into_iter().for_each(|attempt| self.cancel(attempt));
                }
                None => self.on_peer_down(link),
            },
            NodeEvent::Message(link, message) => match self.uplink.replica(link) {
                Some(replica) => self.on_coordinator(replica, *message),
                None => self.on_peer_message(link, *message),
            },
            NodeEvent::DialFailed(name) => {
                self.dialing.remove(&name);
                for attempt in self.sendings.waiting_for(&name) {
                    self.send_input(attempt, send::Input::PeerLost(format!("{name} cannot be reached")));
                }
            }
            NodeEvent::Layer(layer) => self.on_layer(layer),
            NodeEvent::Stepped(result) => {
                self.in_flight = None;
                self.batch.handle(self.now, Input::Stepped(result.map_err(EngineError)));
            }
            NodeEvent::SpanSent(attempt, span, digest_sum) => self.send_input(attempt, send::Input::Sent { span, digest_sum }),
            NodeEvent::SpanDrained(attempt, error) => {
                let effects = self.sendings.drained(self.now, attempt, error, &mut self.acts);
                self.apply(attempt, effects);
            }
            NodeEvent::Arrived(attempt) => {
                let outputs = self.poll_reception(attempt);
                self.on_reception(attempt, outputs);
            }
            NodeEvent::Stop => {
                self.uplink.leave(&mut self.acts);
                self.stopping_since.get_or_insert(self.now);
            }
        }
    }

    // --- coordinator -----------------------------------------------------------------------------------------------

    fn on_coordinator(&mut self, replica: ReplicaId, message: Message) {
        match message {
            Message::Assign(ticket) => self.on_assign(replica, ticket),
            Message::Cancel(attempt) => self.cancel(attempt),
            Message::Joined { node, epoch } => {
                let empty = self.batch.cached_names().next().is_none();
                if self.uplink.on_joined(node, epoch, empty) {
                    // Links made under the old incarnation end.
                    self.acts.extend(self.peers.keys().map(|link| Act::Close(*link)));
                }
            }
            Message::JoinRefused { .. } => self.uplink.on_refused(self.now, &mut self.acts),
            Message::DeltaApplied { epoch, seq } => self.uplink.on_applied(epoch, seq),
            Message::WantSnapshot { epoch } => self.uplink.on_want_snapshot(epoch),
            other => panic!("{} got {other:?} from the coordinator", self.name),
        }
    }

    fn on_assign(&mut self, replica: ReplicaId, ticket: Ticket) {
        let attempt = ticket.attempt;
        if self.stopping_since.is_some() {
            let failed = AttemptFailed { attempt, kind: FailKind::Stopping, detail: "stopping".into() };
            return self.uplink.send(replica, Message::Failed(failed), &mut self.acts);
        }
        self.gateways.insert(attempt, replica);
        if ticket.decode.is_some() {
            self.leaving.insert(attempt, ticket.clone());
        }
        self.batch.handle(self.now, Input::Add(ticket));
    }

    /// Ends an attempt on this node, whatever it is doing.
    fn cancel(&mut self, attempt: AttemptId) {
        let reason = "cancelled by the gateway";
        self.gateways.remove(&attempt);
        self.leaving.remove(&attempt);
        self.asking.remove(&attempt);
        self.recv_input(attempt, recv::Input::Cancel(FailKind::Stopping, reason.into()));
        if self.sendings.contains(attempt) {
            self.cancelled.insert(attempt);
            self.send_input(attempt, send::Input::Cancel(FailKind::Stopping, reason.into()));
        } else {
            self.batch.handle(self.now, Input::Cancel(attempt));
        }
    }

    fn fail(&mut self, attempt: AttemptId, kind: FailKind, detail: String) {
        if let Some(replica) = self.gateways.remove(&attempt) {
            self.uplink.send(replica, Message::Failed(AttemptFailed { attempt, kind, detail }), &mut self.acts);
        }
        self.leaving.remove(&attempt);
    }

    // --- other nodes -----------------------------------------------------------------------------------------------

    fn on_peer_up(&mut self, link: LinkNo, name: String, epoch: Epoch) {
        if self.dialing.remove(&name) {
            self.dialed.insert(name.clone(), link);
        }
        self.peers.insert(link, (name.clone(), epoch));
        for attempt in self.sendings.waiting_for(&name) {
            let effects = self.sendings.ask(self.now, attempt, (link, epoch), &mut self.acts);
            self.apply(attempt, effects);
        }
    }

    fn on_peer_down(&mut self, link: LinkNo) {
        self.peers.remove(&link);
        self.dialed.retain(|_, dialed| *dialed != link);
        for attempt in self.sendings.on_link(link) {
            self.send_input(attempt, send::Input::PeerLost("the link is gone".into()));
        }
        let arriving: Vec<_> = self.receptions.iter().filter(|(_, r)| r.link == link).map(|(a, _)| *a).collect();
        for attempt in arriving {
            self.recv_input(attempt, recv::Input::PeerLost("the link is gone".into()));
        }
        let asking: Vec<_> = self.asking.iter().filter(|(_, (no, _))| *no == link).map(|(a, _)| *a).collect();
        asking.into_iter().for_each(|attempt| self.cancel(attempt));
    }

    fn on_peer_message(&mut self, link: LinkNo, message: Message) {
        match message {
            Message::Open(open) => self.on_open(link, open.ticket),
            Message::Granted(Granted { attempt, have_blocks, generation, credit_bytes }) => {
                self.answer(link, attempt, send::Input::Granted { have_blocks, generation, credit_bytes });
            }
            Message::Declined { attempt, kind, detail } => self.answer(link, attempt, send::Input::Declined(kind, detail)),
            Message::Credit { attempt, bytes } => self.answer(link, attempt, send::Input::Credit(bytes)),
            Message::Received { attempt } => self.answer(link, attempt, send::Input::Received),
            Message::Fin(fin) => {
                if self.receives_on(fin.attempt, link) {
                    let (generation, cells, digest_sum) = (fin.generation, fin.cells, fin.digest_sum);
                    let (first_token, finished) = (fin.first_token, fin.finished);
                    self.recv_input(fin.attempt, recv::Input::Fin { generation, cells, digest_sum, first_token, finished });
                }
            }
            Message::Abort { attempt, kind, detail } => {
                if self.receives_on(attempt, link) {
                    self.recv_input(attempt, recv::Input::Aborted(kind, detail));
                } else if self.asking.get(&attempt).is_some_and(|(no, _)| *no == link) {
                    self.cancel(attempt);
                } else {
                    self.answer(link, attempt, send::Input::Aborted(kind, detail));
                }
            }
            other => panic!("{} got {other:?} from a node", self.name),
        }
    }

    fn receives_on(&self, attempt: AttemptId, link: LinkNo) -> bool {
        self.receptions.get(&attempt).is_some_and(|reception| reception.link == link)
    }

    fn answer(&mut self, link: LinkNo, attempt: AttemptId, input: send::Input) {
        if self.sendings.speaks(attempt, link) {
            self.send_input(attempt, input);
        }
    }

    fn on_open(&mut self, link: LinkNo, ticket: Ticket) {
        let attempt = ticket.attempt;
        let meant = ticket.decode.as_ref().map(|peer| (peer.node, peer.epoch));
        if meant.is_none() || meant != self.uplink.joined() || self.stopping_since.is_some() {
            let detail = "not the incarnation that is meant, or stopping".into();
            self.acts.push(Act::Send(link, Message::Declined { attempt, kind: FailKind::PeerLost, detail }));
            return;
        }
        self.asking.insert(attempt, (link, ticket.clone()));
        self.batch.handle(self.now, Input::Reserve(ticket));
    }

    // --- hand-over -------------------------------------------------------------------------------------------------

    fn grid(&self, tokens: usize) -> Grid {
        let layout = &self.layout;
        Grid { layers: layout.layers, blocks: layout.blocks(tokens) as u32, cell_bytes: layout.cell_bytes() as u64 }
    }

    fn send_input(&mut self, attempt: AttemptId, input: send::Input) {
        let effects = self.sendings.handle(self.now, attempt, input, &mut self.acts);
        self.apply(attempt, effects);
    }

    fn apply(&mut self, attempt: AttemptId, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Report(stats) => {
                    if let Some(replica) = self.gateways.get(&attempt) {
                        self.uplink.send(*replica, Message::Handover(stats), &mut self.acts);
                    }
                }
                Effect::Lost(kind, detail) => {
                    self.cancelled.insert(attempt);
                    self.fail(attempt, kind, detail);
                }
                Effect::Release => {
                    self.gateways.remove(&attempt);
                    let cancelled = self.cancelled.remove(&attempt);
                    let input = if cancelled { Input::Cancel(attempt) } else { Input::Release(attempt) };
                    self.batch.handle(self.now, input);
                }
            }
        }
    }

    fn poll_reception(&mut self, attempt: AttemptId) -> Vec<recv::Output> {
        let Some(reception) = self.receptions.get_mut(&attempt) else { return Vec::new() };
        std::iter::from_fn(|| reception.machine.poll()).collect()
    }

    fn recv_input(&mut self, attempt: AttemptId, input: recv::Input) {
        let Some(reception) = self.receptions.get_mut(&attempt) else { return };
        reception.machine.handle(self.now, input);
        let outputs = self.poll_reception(attempt);
        self.on_reception(attempt, outputs);
    }

    fn on_reception(&mut self, attempt: AttemptId, outputs: Vec<recv::Output>) {
        for output in outputs {
            let Some(link) = self.receptions.get(&attempt).map(|r| r.link) else { return };
            match output {
                recv::Output::Credit(bytes) => self.acts.push(Act::Send(link, Message::Credit { attempt, bytes })),
                recv::Output::Abort(kind, detail) => {
                    self.acts.push(Act::Send(link, Message::Abort { attempt, kind, detail }));
                }
                recv::Output::Complete { first_token, finished } => {
                    self.receptions.remove(&attempt);
                    self.acts.push(Act::Send(link, Message::Received { attempt }));
                    self.batch.handle(self.now, Input::Arrived { attempt, first_token, finished });
                    if finished {
                        self.gateways.remove(&attempt);
                    }
                }
                recv::Output::Failed(kind, detail) => {
                    self.receptions.remove(&attempt);
                    self.batch.handle(self.now, Input::Cancel(attempt));
                    self.fail(attempt, kind, detail);
                }
            }
        }
    }

    // --- computing -------------------------------------------------------------------------------------------------

    fn on_layer(&mut self, layer: u16) {
        let block_tokens = u32::from(self.layout.block_tokens);
        let Some(rows) = self.in_flight.take() else { return };
        for &(attempt, computed, known) in &rows {
            if self.sendings.contains(attempt) {
                let blocks = if computed == known { computed.div_ceil(block_tokens) } else { computed / block_tokens };
                self.send_input(attempt, send::Input::Ready { layer, blocks });
            }
        }
        self.in_flight = Some(rows);
    }

    fn begin_step(&mut self) {
        if self.in_flight.is_some() {
            return;
        }
        let Some(step) = self.batch.next_step(self.now) else { return };
        self.drain_batch();
        let known = |attempt| self.sendings.tokens(attempt).unwrap_or(0);
        self.in_flight = Some(step.rows.iter().map(|row| (row.attempt, row.end(), known(row.attempt))).collect());
        let hashes = vec![Vec::new(); step.rows.len()];
        self.step = Some((step, hashes));
        self.acts.push(Act::Step);
    }

    // --- what the batch wants done ---------------------------------------------------------------------------------

    fn drain_batch(&mut self) {
        while let Some(output) = self.batch.poll() {
            self.on_batch(output);
        }
    }

    fn on_batch(&mut self, output: Output) {
        match output {
            Output::Admitted { attempt, table, names, cached_blocks } => {
                let Some(ticket) = self.leaving.remove(&attempt) else { return };
                let grid = self.grid(ticket.tokens.len());
                let deadline = self.now.after(ticket.budget_us);
                let peer = ticket.decode.clone();
                self.sendings.insert(ticket, Sender::new(grid, cached_blocks, deadline), table, names);
                self.reach(attempt, peer);
            }
            Output::Reserved { attempt, table, names, have_blocks } => self.on_reserved(attempt, table, names, have_blocks),
            Output::Refused { attempt, kind, detail } => match self.asking.remove(&attempt) {
                Some((link, _)) => self.acts.push(Act::Send(link, Message::Declined { attempt, kind, detail })),
                None => self.fail(attempt, kind, detail),
            },
            Output::Token(token) => self.on_token(token),
            Output::Failed(AttemptFailed { attempt, kind, detail }) => {
                if self.sendings.contains(attempt) {
                    self.send_input(attempt, send::Input::Cancel(kind, detail.clone()));
                }
                self.recv_input(attempt, recv::Input::Cancel(kind, detail.clone()));
                self.fail(attempt, kind, detail);
            }
            Output::Block(op) => self.uplink.publish(self.now, op),
        }
    }

    fn reach(&mut self, attempt: AttemptId, peer: Option<Peer>) {
        let Some(peer) = peer else { return };
        if let Some(link) = self.dialed.get(&peer.name).copied() {
            let Some(&(_, epoch)) = self.peers.get(&link) else { return };
            if epoch >= peer.epoch {
                let effects = self.sendings.ask(self.now, attempt, (link, epoch), &mut self.acts);
                return self.apply(attempt, effects);
            }
            self.acts.push(Act::Close(link));
            self.dialed.remove(&peer.name);
        }
        if self.dialing.insert(peer.name.clone()) {
            self.acts.push(Act::Dial(peer));
        }
    }

    fn on_reserved(&mut self, attempt: AttemptId, table: Vec<SlotRef>, names: Vec<BlockHash>, have_blocks: u32) {
        let Some((link, ticket)) = self.asking.remove(&attempt) else { return };
        self.generation = self.generation.wrapping_add(1);
        let generation = Generation(self.generation);
        let deadline = self.now.after(ticket.budget_us);
        let machine = Receiver::new(self.grid(ticket.tokens.len()), have_blocks, generation, deadline);
        let credit_bytes = machine.credit_bytes();
        self.gateways.insert(attempt, ticket.gateway);
        self.receptions.insert(attempt, Reception { link, table, names, machine });
        self.acts.push(Act::Send(link, Message::Granted(Granted { attempt, have_blocks, generation, credit_bytes })));
    }

    fn on_token(&mut self, token: TokenOut) {
        let (attempt, first_token, finished) = (token.attempt, token.token, token.finish.is_some());
        if let Some(replica) = self.gateways.get(&attempt) {
            self.uplink.send(*replica, Message::Token(token), &mut self.acts);
        }
        if self.sendings.contains(attempt) {
            self.send_input(attempt, send::Input::Computed { first_token, finished });
        } else if finished {
            self.gateways.remove(&attempt);
        }
    }

    // --- time and the end ------------------------------------------------------------------------------------------

    fn on_tick(&mut self) {
        self.batch.handle(self.now, Input::Tick);
        for attempt in self.sendings.attempts() {
            self.send_input(attempt, send::Input::Tick);
        }
        let arriving: Vec<_> = self.receptions.keys().copied().collect();
        for attempt in arriving {
            self.recv_input(attempt, recv::Input::Tick);
        }
    }

    fn stopped(&self) -> bool {
        let Some(since) = self.stopping_since else { return false };
        let idle = self.batch.is_idle() && self.sendings.is_empty();
        idle || self.now.since(since) > DRAIN_MAX_US
    }
}
