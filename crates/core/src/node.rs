//! A node as one machine: everything that happens to its process goes in, everything that it wants done comes out. It joins the machines of one
//! sequence and one hand-over ([`crate::batch`], [`crate::transfer`]) with the links, the coordinator's word and time, and so fixes the one order of
//! calls for every shell: processes and the simulator.
//!
//! It decides what is sent, written, computed, freed and told. It holds no KV byte, no socket and no clock: streams ask the
//! [`Gate`] of their hand-over, which the shell keeps for them, and digests of bytes are the shell's to take.
//!
//! Effects are to be carried out in the order in which they are polled, since they lean on it: a gate is closed before a step or another gate
//! may use its slots.

mod arriving;
mod asked;
mod batching;
mod doubts;
mod leaving;
mod note;
mod peers;
mod rates;
mod upkeep;
mod uplinks;

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::string::String;
use alloc::vec::Vec;

pub use note::Note;

use crate::batch::{self, Batch, BatchConfig};
use crate::engine::{EngineError, Sampled, Step};
use crate::ids::{AttemptId, BlockHash, Epoch, Generation, NodeId, ReplicaId, SlotRef, Time};
use crate::layout::KvLayout;
use crate::message::{Join, Message, Peer, ReplicaAddress, Ticket};
use crate::pool::Resident;
use crate::transfer::gate::{Gate, Standing};
use crate::transfer::pace::Pace;
use crate::transfer::{Cells, Span, recv, send};
use arriving::{Arriving, Asking, Received};
use leaving::Leaving;
use peers::Peers;
use rates::Rates;
use upkeep::Upkeep;
use uplinks::Uplinks;

/// A stopping node hands over or finishes what it has for at most this long.
pub const DRAIN_MAX_US: u64 = 20_000_000;
/// A stopping node that had work leaves when it has had none for so long: a gateway that moves a sequence cancels it here before it asks for
/// its KV.
const DRAINED_QUIET_US: u64 = 300_000;

/// Tells two links to the same peer apart; never given twice in a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkNo(pub u64);

/// What can happen to a node.
#[derive(Debug)]
pub enum Input {
    /// The link to a replica of the coordinator is there.
    UplinkUp(ReplicaId, LinkNo),
    /// A link to another node is there, whoever dialled: its name, and the incarnation that it greeted with.
    PeerUp(LinkNo, String, Epoch),
    /// A link is gone. Nothing comes from it after this.
    Down(LinkNo),
    /// Somebody says something.
    Message(LinkNo, Box<Message>),
    /// A node that was dialled cannot be reached.
    DialFailed {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// The step in flight has this layer's KV in its cells. One that is not told only delays the hand-over of its layer.
    Layer(u16),
    /// The step in flight is over.
    Stepped {
        /// Tokens drawn, or why there are none.
        result: Result<Vec<Sampled>, EngineError>,
        /// How long it took.
        elapsed_us: u64,
    },
    /// A span is in the transport's hands.
    SpanSent {
        /// Of which attempt.
        attempt: AttemptId,
        /// The span.
        span: Span,
        /// Wrapping sum of its digests.
        digest_sum: u64,
    },
    /// Nothing reads the cells of a span any more: acknowledged, reset or lost.
    SpanDrained {
        /// Of which attempt.
        attempt: AttemptId,
        /// On which link.
        link: LinkNo,
        /// The span.
        span: Span,
        /// From the stream's opening to this moment.
        elapsed_us: u64,
        /// Why it did not arrive, if it did not.
        error: Option<String>,
    },
    /// What stands behind the gate of an attempt, after a stream has written there or was refused.
    Standing(AttemptId, Standing),
    /// The answer to [`Effect::ReadGate`]: [`Gate::stands`].
    Stands(AttemptId, Cells),
    /// A stream was refused: it named no open gate, or another generation than the gate's.
    StreamRefused,
    /// The answer to [`Effect::Digest`]: the wrapping sum of the digests of each block's cells.
    Digested(Vec<(Resident, u64)>),
    /// An operator stops the process.
    Stop,
    /// All that has happened is told, and time has passed: see to what is due, begin the next step. After each batch of other inputs,
    /// and at [`Node::deadline`].
    Turn,
}

/// What a node wants done.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a few live at a time")]
pub enum Effect {
    /// Say this on a link. One that is gone is told by its own input.
    Send(LinkNo, Message),
    /// Reach this node: [`Input::PeerUp`] or [`Input::DialFailed`] follows.
    Dial(Peer),
    /// Give a link up; [`Input::Down`] follows.
    Close(LinkNo, &'static str),
    /// Greet with this incarnation from now on.
    Greet(NodeId, Epoch),
    /// A replica tells where all of them are.
    Replicas(ReplicaId, Vec<ReplicaAddress>),
    /// Compute this step: layers and a result follow.
    Step(Step),
    /// Send these cells: [`Input::SpanSent`], unless it fails, and always [`Input::SpanDrained`] follow.
    Span(SpanJob),
    /// Give up the streams of an attempt that are not sent yet.
    StopSpans(AttemptId),
    /// Let the streams of this link write through the gate.
    OpenGate(AttemptId, LinkNo, Box<Gate>),
    /// Let the streams of this link write through the gate of an attempt, in place of those of an earlier one.
    MoveGate(AttemptId, LinkNo),
    /// Answer with [`Input::Stands`].
    ReadGate(AttemptId),
    /// Close the gate of an attempt, and forget it.
    CloseGate(AttemptId),
    /// Digest these blocks before anything else is done, and answer with [`Input::Digested`]: nobody writes them now.
    Digest(Vec<Resident>),
    /// For the log.
    Note(Note),
    /// The cluster does not want this process: end with this reason.
    Refused(String),
    /// Everything is finished: end.
    Exit,
}

/// A span to be sent on a stream of its own.
#[derive(Clone, Debug)]
pub struct SpanJob {
    /// For which attempt.
    pub attempt: AttemptId,
    /// Over which link.
    pub link: LinkNo,
    /// Which cells.
    pub span: Span,
    /// The reservation that they may be written to.
    pub generation: Generation,
    /// Among the streams of the link: greater goes first.
    pub priority: i32,
    /// Layer, block, slot and name of each cell, in payload order.
    pub cells: Vec<(u16, u32, SlotRef, BlockHash)>,
}

/// What a node has counted since its process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Messages and streams that named another generation or a hand-over that is over: none had an effect.
    pub stale_frames: u64,
    /// Hand-overs that went on after a lost link, each time.
    pub resumes: u64,
}

/// Rows of the step in flight.
#[derive(Clone, Copy, Debug)]
struct Flight {
    attempt: AttemptId,
    /// Tokens known after the step.
    end: u32,
    /// Tokens of the ticket of a sequence whose KV leaves, else 0.
    known: u32,
}

/// Everything that a node knows.
#[derive(Debug)]
pub struct Node {
    name: String,
    layout: KvLayout,
    now: Time,
    batch: Batch,
    uplinks: Uplinks,
    peers: Peers,
    leaving: BTreeMap<AttemptId, Leaving>,
    /// What waits for each link that KV leaves on.
    paces: BTreeMap<LinkNo, Pace>,
    arriving: BTreeMap<AttemptId, Arriving>,
    /// Hand-overs that arrived whole lately, in the order of their ends.
    received: VecDeque<Received>,
    upkeep: Upkeep,
    rates: Rates,
    in_flight: Option<Vec<Flight>>,
    /// Where the tokens of each live attempt go.
    gateways: BTreeMap<AttemptId, ReplicaId>,
    /// Tickets whose slots are asked for on behalf of a sender, and the link it speaks on.
    asking: BTreeMap<AttemptId, Asking>,
    /// Tickets that are computed here and decoded elsewhere, until their hand-over begins.
    splitting: BTreeMap<AttemptId, Ticket>,
    /// Attempts cancelled while a hand-over still reads their blocks.
    cancelled: BTreeSet<AttemptId>,
    /// Attempts whose gateway has cancelled them and of which something is still here.
    ending: BTreeSet<AttemptId>,
    counts: Counts,
    /// The last that a reservation was given.
    generation: Generation,
    stopping: Option<Stopping>,
    effects: VecDeque<Effect>,
}

/// An operator has stopped the process.
#[derive(Clone, Copy, Debug)]
struct Stopping {
    since: Time,
    /// The last moment at which something was here, if anything was.
    busy: Option<Time>,
}

impl Stopping {
    /// When the node leaves if nothing changes.
    fn deadline(&self, empty: bool) -> Time {
        let last = self.since.after(DRAIN_MAX_US);
        let quiet = self.busy.map_or(self.since, |busy| busy.after(DRAINED_QUIET_US));
        if empty { quiet.min(last) } else { last }
    }
}

impl Node {
    /// A node that is not a member yet and asks to be with `join`.
    #[must_use]
    pub fn new(join: Join, batch: BatchConfig) -> Self {
        Self {
            name: join.name.clone(),
            layout: join.model.layout,
            now: Time(0),
            batch: Batch::new(batch),
            uplinks: Uplinks::new(join),
            peers: Peers::default(),
            leaving: BTreeMap::new(),
            paces: BTreeMap::new(),
            arriving: BTreeMap::new(),
            received: VecDeque::new(),
            upkeep: Upkeep::default(),
            rates: Rates::default(),
            in_flight: None,
            gateways: BTreeMap::new(),
            asking: BTreeMap::new(),
            splitting: BTreeMap::new(),
            cancelled: BTreeSet::new(),
            ending: BTreeSet::new(),
            counts: Counts::default(),
            generation: Generation(0),
            stopping: None,
            effects: VecDeque::new(),
        }
    }

    /// Takes one input. What comes late, twice, or from nobody known has no effect.
    pub fn handle(&mut self, now: Time, input: Input) {
        self.now = now;
        match input {
            Input::UplinkUp(replica, link) => self.uplinks.up(now, replica, link),
            Input::PeerUp(link, name, epoch) => self.on_peer_up(link, name, epoch),
            Input::Down(link) => self.on_down(link),
            Input::Message(link, message) => self.on_message(link, *message),
            Input::DialFailed { name, reason } => self.on_dial_failed(&name, &reason),
            Input::Layer(layer) => self.on_layer(layer),
            Input::Stepped { result, elapsed_us } => self.on_stepped(result, elapsed_us),
            Input::SpanSent { attempt, span, digest_sum } => self.send_input(attempt, send::Input::Sent { span, digest_sum }),
            Input::SpanDrained { attempt, link, span, elapsed_us, error } => {
                self.on_drained(attempt, link, span, elapsed_us, error);
            }
            Input::Standing(attempt, standing) => self.recv_input(attempt, recv::Input::Standing(standing)),
            Input::Stands(attempt, stands) => self.on_stands(attempt, &stands),
            Input::StreamRefused => self.counts.stale_frames += 1,
            Input::Digested(blocks) => self.on_digested(blocks),
            Input::Stop => self.stop(),
            Input::Turn => self.turn(),
        }
    }

    /// The next effect; to be drained after each [`Self::handle`].
    pub fn poll(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When the next [`Input::Turn`] is due, if nothing happens before. O(hand-overs).
    #[must_use]
    pub fn deadline(&self) -> Time {
        let leaving = self.leaving.values().filter_map(|leaving| leaving.machine.deadline()).min();
        let arriving = self.arriving.values().filter_map(|arriving| arriving.machine.deadline()).min();
        let stop = self.stopping.as_ref().map(|stopping| stopping.deadline(self.is_empty()));
        let parts = [self.batch.deadline(), self.peers.deadline(), self.upkeep.deadline(self.now)];
        let all = [Some(self.uplinks.deadline()), leaving, arriving, stop].into_iter().chain(parts);
        all.flatten().min().unwrap_or(self.now)
    }

    /// Asserts every invariant of the node and of the machines in it. O(sequences + slots), for tests and the simulator.
    pub fn check(&self) {
        self.batch.check();
        for (attempt, leaving) in &self.leaving {
            leaving.machine.check();
            assert!(!self.arriving.contains_key(attempt), "{attempt} leaves and arrives");
            assert!(!self.splitting.contains_key(attempt), "{attempt} leaves before it is admitted");
            assert!(self.batch.keeps(*attempt), "{attempt} leaves, and its slots are given away");
        }
        self.arriving.values().for_each(|arriving| arriving.machine.check());
        self.paces.values().for_each(Pace::check);
        let unknown = self.asking.keys().find(|attempt| !self.batch.knows(**attempt));
        assert!(unknown.is_none(), "nobody will answer whoever asks for slots for {unknown:?}");
        assert!(self.cancelled.iter().all(|attempt| self.leaving.contains_key(attempt)), "only what leaves is cancelled late");
        assert!(self.splitting.keys().all(|attempt| self.gateways.contains_key(attempt)), "a ticket without a gateway");
    }

    /// The sequences and the pool.
    #[must_use]
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// The node's number and incarnation, once it has them.
    #[must_use]
    pub fn joined(&self) -> Option<(NodeId, Epoch)> {
        self.uplinks.joined()
    }

    /// What was counted.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// What is kept for attempts, by kind: all 0 when none is left.
    #[must_use]
    pub fn kept(&self) -> [(&'static str, usize); 9] {
        [
            ("sequences", usize::from(!self.batch.is_idle())),
            ("blocks in use", self.batch.pool_stats().in_use as usize),
            ("hand-overs that leave", self.leaving.len()),
            ("hand-overs that arrive", self.arriving.len()),
            ("tickets that ask", self.asking.len()),
            ("tickets that leave", self.splitting.len()),
            ("attempts with a gateway", self.gateways.len()),
            ("cancelled attempts", self.cancelled.len()),
            ("attempts that end", self.ending.len()),
        ]
    }

    /// Nodes that did not answer when they were dialed last: hand-overs to them are refused until they do.
    #[must_use]
    pub fn doubted(&self) -> usize {
        self.peers.doubted()
    }

    /// Hand-overs that leave over a link and are not over.
    pub fn sends(&self) -> impl Iterator<Item = (LinkNo, AttemptId)> {
        let under_way = self.leaving.iter().filter(|(_, leaving)| !leaving.machine.is_over());
        under_way.filter_map(|(attempt, leaving)| Some((leaving.link()?, *attempt)))
    }

    /// Whether an attempt keeps slots for its hand-over or for streams that still read them.
    #[must_use]
    pub fn is_leaving(&self, attempt: AttemptId) -> bool {
        self.leaving.contains_key(&attempt)
    }

    /// Hand-overs that were asked for over a link and are not over.
    pub fn awaits(&self) -> impl Iterator<Item = (LinkNo, AttemptId)> {
        let asking = self.asking.iter().map(|(attempt, asking)| (asking.link, *attempt));
        asking.chain(self.arriving.iter().map(|(attempt, arriving)| (arriving.link(), *attempt)))
    }

    // --- links -----------------------------------------------------------------------------------------------------

    fn on_down(&mut self, link: LinkNo) {
        match self.uplinks.replica(link) {
            Some(replica) => {
                self.uplinks.down(replica);
                self.cancel_all_of(replica);
            }
            None => self.on_peer_down(link),
        }
    }

    fn on_message(&mut self, link: LinkNo, message: Message) {
        if let Some(replica) = self.uplinks.replica(link) {
            self.on_coordinator(replica, message);
        } else if self.peers.contains(link) {
            self.on_peer_message(link, message);
        }
    }

    fn send(&mut self, link: LinkNo, message: Message) {
        self.effects.push_back(Effect::Send(link, message));
    }

    /// To a replica, if there is a link to it.
    fn tell(&mut self, replica: ReplicaId, message: Message) {
        self.effects.extend(self.uplinks.link(replica).map(|link| Effect::Send(link, message)));
    }

    fn note(&mut self, note: Note) {
        self.effects.push_back(Effect::Note(note));
    }

    // --- time and the end ------------------------------------------------------------------------------------------

    fn turn(&mut self) {
        self.tick();
        self.dial_again();
        self.drain_batch();
        self.begin_step();
        self.look_on();
        self.drain_batch();
        let (batch, rates, counts) = (&self.batch, &self.rates, self.counts);
        self.uplinks.advance(self.now, || rates.load(batch, counts), || batch.cached_names().collect(), &mut self.effects);
        self.note_freed();
        if self.stopped() {
            self.uplinks.leave(&mut self.effects);
            self.effects.push_back(Effect::Exit);
        }
    }

    /// Says which of the cancelled attempts are over.
    fn note_freed(&mut self) {
        let kept = |attempt: &AttemptId| {
            self.batch.knows(*attempt) || self.leaving.contains_key(attempt) || self.arriving.contains_key(attempt)
        };
        let freed: Vec<_> = self.ending.iter().filter(|attempt| !kept(attempt)).copied().collect();
        for attempt in freed {
            self.ending.remove(&attempt);
            self.note(Note::Freed(attempt));
        }
    }

    /// Tells every machine whose time has come.
    fn tick(&mut self) {
        let now = self.now;
        self.forget_received();
        let due = |deadline: Option<Time>| deadline.is_some_and(|deadline| deadline <= now);
        if due(self.batch.deadline()) {
            self.batch.handle(now, batch::Input::Tick);
        }
        let leaving: Vec<_> = self.leaving.iter().filter(|(_, l)| due(l.machine.deadline())).map(|(a, _)| *a).collect();
        leaving.into_iter().for_each(|attempt| self.send_input(attempt, send::Input::Tick));
        let arriving: Vec<_> = self.arriving.iter().filter(|(_, a)| due(a.machine.deadline())).map(|(a, _)| *a).collect();
        arriving.into_iter().for_each(|attempt| self.recv_input(attempt, recv::Input::Tick));
    }

    /// One that has nothing to do leaves at once; else it asks to be drained, hands over and finishes what it has.
    fn stop(&mut self) {
        if self.stopping.is_none() {
            self.stopping = Some(Stopping { since: self.now, busy: None });
            if !self.is_empty() {
                self.uplinks.ask_to_be_drained(&mut self.effects);
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.batch.is_idle() && self.leaving.is_empty()
    }

    fn stopped(&mut self) -> bool {
        let (now, empty) = (self.now, self.is_empty());
        let Some(stopping) = &mut self.stopping else { return false };
        if !empty {
            stopping.busy = Some(now);
        }
        now >= stopping.deadline(empty)
    }
}
