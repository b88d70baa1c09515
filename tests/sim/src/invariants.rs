//! What must hold in the world as a whole, watched from outside the machines: by what nodes say, send, compute and hold. The machines' own
//! `check()` runs beside it. A message begins with the invariant's name: I1 blocks come back, I2 only the undisturbed answer, I3 each
//! request and each half of a hand-over ends, I4 each token once and in order, I5 nothing of an old generation or incarnation has an
//! effect, I6 the index follows from the reports, I7 bounds, I8 nothing crosses tenants (callers taint their KV, so I2 shows it).

use std::collections::{BTreeMap, BTreeSet};

use millrace_core::cluster::{Answer, Cluster, Command, DeltaVerdict};
use millrace_core::engine::Step;
use millrace_core::ids::{AttemptId, BlockHash, Epoch, Generation, NodeId, SlotRef, Time};
use millrace_core::message::{CacheReport, CacheResult, Delta, Message, PrefillStats, Ticket, TokenOut, Verified};

use crate::event::{Host, Life, LinkNo, SpanJob};
use crate::world::World;

/// Half a hand-over whose other half is gone, or an attempt at a process that is gone, may stay for so long, microseconds.
const ALONE_MAX_US: u64 = 10_000_000;
/// A gateway waits for a process that is gone at most for so long: its link's silence, a pause of its own, a renewal.
const GONE_MAX_US: u64 = 20_000_000;

/// A process on a host.
type Process = (Host, Life);

/// What is known of an attempt from its ticket and from what was seen of it.
#[derive(Debug)]
struct Seen {
    /// Index of its first token.
    first: u32,
    tokens: u32,
    prefill: NodeId,
    decode: Option<(NodeId, Epoch)>,
    /// Indices said, and the last that each process said.
    said: BTreeSet<u32>,
    last: BTreeMap<Process, u32>,
    /// Tokens of the prompt that steps have computed, by process.
    computed: BTreeMap<Process, u32>,
    granted: Option<Generation>,
    credit_bytes: u64,
    sent_bytes: u64,
    cancelled: BTreeSet<Process>,
}

/// The watcher.
#[derive(Debug, Default)]
pub struct Watch {
    attempts: BTreeMap<AttemptId, Seen>,
    /// Which block stands in a slot under a generation.
    blocks: BTreeMap<(Process, SlotRef), BlockHash>,
    alone: BTreeMap<(LinkNo, AttemptId, Process), Time>,
    gone: BTreeMap<(AttemptId, NodeId), Time>,
    /// Reports that the coordinator forgot after it had said that they are applied.
    pub forgotten: u64,
}

impl Watch {
    /// A ticket leaves the gateway.
    pub fn assigned(&mut self, prefill: NodeId, ticket: &Ticket) {
        let seen = Seen {
            first: ticket.delivered(),
            tokens: ticket.tokens.len() as u32,
            prefill,
            decode: ticket.decode.as_ref().map(|peer| (peer.node, peer.epoch)),
            said: BTreeSet::new(),
            last: BTreeMap::new(),
            computed: BTreeMap::new(),
            granted: None,
            credit_bytes: 0,
            sent_bytes: 0,
            cancelled: BTreeSet::new(),
        };
        self.attempts.insert(ticket.attempt, seen);
    }

    /// A process, which is `node` in its incarnation, says something.
    pub fn says(&mut self, process: Process, node: Option<(NodeId, Epoch)>, preempts: bool, message: &Message) {
        match message {
            Message::Token(token) => self.token(process, node, preempts, token),
            Message::Granted(granted) => {
                let Some(seen) = self.attempts.get_mut(&granted.attempt) else { return };
                assert_eq!(seen.decode, node, "I5: {} is granted by another incarnation than its ticket's", granted.attempt);
                (seen.granted, seen.credit_bytes) = (Some(granted.generation), granted.credit_bytes);
            }
            Message::Credit { attempt, bytes } => {
                self.attempts.get_mut(attempt).into_iter().for_each(|seen| seen.credit_bytes = seen.credit_bytes.max(*bytes));
            }
            // What stands is not sent again; how much of it counts as sent, only the sender knows.
            Message::Resumed(resumed) => {
                let seen = self.attempts.get_mut(&resumed.attempt).into_iter();
                seen.for_each(|seen| (seen.credit_bytes, seen.sent_bytes) = (resumed.credit_bytes, 0));
            }
            _ => {}
        }
    }

    fn token(&mut self, process: Process, node: Option<(NodeId, Epoch)>, preempts: bool, token: &TokenOut) {
        let (attempt, index) = (token.attempt, token.index);
        let Some(seen) = self.attempts.get_mut(&attempt) else { return };
        // Work may come before a process has heard which node it is; only one that has heard is handed KV.
        let prefills = node.is_none_or(|(node, _)| node == seen.prefill);
        let next = seen.last.get(&process).map_or(seen.first + u32::from(!prefills), |last| last + 1);
        assert!(seen.said.insert(index), "I4: {attempt}: token {index} is said twice");
        // What is drawn while no link to the gateway is there is said to nobody.
        assert!(index >= next, "I4: {attempt}: token {index} of this process comes after {next}");
        seen.last.insert(process, index);
        if let Some(stats) = &token.prefill {
            seen.check_usage(attempt, seen.computed.get(&process).copied().unwrap_or(0), preempts, stats);
        }
    }

    /// A step begins.
    pub fn computes(&mut self, process: Process, step: &Step) {
        for row in &step.rows {
            let Some(seen) = self.attempts.get_mut(&row.attempt) else { continue };
            assert!(!seen.cancelled.contains(&process), "I3: {} is cancelled and computes on", row.attempt);
            *seen.computed.entry(process).or_default() += row.tokens.len() as u32;
        }
    }

    /// A process that knows the attempt has heard that it is cancelled.
    pub fn cancelled(&mut self, process: Process, attempt: AttemptId) {
        self.attempts.get_mut(&attempt).into_iter().for_each(|seen| _ = seen.cancelled.insert(process));
    }

    /// Cells leave.
    pub fn sends(&mut self, process: Process, job: &SpanJob, (block_tokens, cell_bytes): (u16, usize)) {
        let Some(seen) = self.attempts.get_mut(&job.attempt) else { return };
        seen.sent_bytes += job.span.cells() * cell_bytes as u64;
        assert!(seen.sent_bytes <= seen.credit_bytes, "I7: {} sends more than its credit", job.attempt);
        assert_eq!(Some(job.generation), seen.granted, "I5: {} sends to another reservation than the one granted", job.attempt);
        for (_, block, slot, name) in &job.cells {
            if (block + 1) * u32::from(block_tokens) <= job.tokens {
                let stands = *self.blocks.entry((process, *slot)).or_insert(*name);
                assert_eq!(stands, *name, "I5: {slot:?} has held another block under this generation");
            }
        }
    }
}

impl Seen {
    /// What was not found cached was computed.
    fn check_usage(&self, attempt: AttemptId, computed: u32, preempts: bool, stats: &PrefillStats) {
        let all = computed + stats.cached_tokens;
        assert!(stats.cached_tokens < self.tokens && all >= self.tokens, "I4: {attempt}: usage: {stats:?} of {}", self.tokens);
        assert!(all == self.tokens || preempts, "I4: {attempt}: usage: {computed} computed, {stats:?} of {}", self.tokens);
    }
}

/// What a node says of an order. Bytes of a block that nobody used do not change.
pub fn check_report(report: &CacheReport) {
    if let CacheResult::Verified(Verified { damaged, damaged_names, .. }) = &report.result {
        assert_eq!(*damaged, 0, "I5: bytes of cached blocks changed: {damaged_names:?}");
    }
}

impl World {
    /// Looks at the whole world, once in a while.
    pub(crate) fn look(&mut self) {
        let alone = self.halves_alone();
        let gone = self.processes_gone();
        since(&mut self.watch.alone, self.now, alone);
        since(&mut self.watch.gone, self.now, gone);
        for ((_, attempt, (host, _)), then) in &self.watch.alone {
            let host = &self.hosts[*host].name;
            assert!(self.now.since(*then) <= ALONE_MAX_US, "I1: {attempt}: {host} keeps half a hand-over, the other half is gone");
        }
        for ((attempt, node), then) in &self.watch.gone {
            assert!(self.now.since(*then) <= GONE_MAX_US, "I3: {attempt} waits for a process of node {node} that is gone");
        }
    }

    /// Halves of hand-overs whose other half does not exist.
    fn halves_alone(&self) -> Vec<(LinkNo, AttemptId, Process)> {
        let mut alone = Vec::new();
        if self.quic.is_some() {
            return alone; // each end numbers its links by itself
        }
        for (host, state) in self.hosts.iter().enumerate() {
            for (link, attempt, sends) in state.node().into_iter().flat_map(|node| node.halves()) {
                let other = self.other_end(link, (host, state.life)).and_then(|(host, _)| self.hosts[host].node());
                if !other.is_some_and(|other| if sends { other.is_asked(attempt) } else { other.is_sending(attempt) }) {
                    alone.push((link, attempt, (host, state.life)));
                }
            }
        }
        alone
    }

    /// Processes that the gateway waits for and that are no more.
    fn processes_gone(&self) -> Vec<(AttemptId, NodeId)> {
        let lives = |node, epoch| self.hosts.iter().any(|host| host.node().is_some_and(|n| n.joined() == Some((node, epoch))));
        let waits = self.gateway.waits_for();
        waits.filter(|(_, node, epoch)| !lives(*node, *epoch)).map(|(attempt, node, _)| (attempt, node)).collect()
    }
}

/// Keeps since when each of these is so; forgets those that are not any more.
fn since<K: Ord + Copy>(known: &mut BTreeMap<K, Time>, now: Time, are: Vec<K>) {
    let old = std::mem::take(known);
    known.extend(are.into_iter().map(|key| (key, old.get(&key).copied().unwrap_or(now))));
}

/// How far each node's reports are applied, before an entry.
pub fn applied(cluster: &Cluster) -> BTreeMap<(NodeId, Epoch), u64> {
    let tally = |n: &millrace_core::cluster::Node| Some(((n.node, n.epoch), cluster.holders().tally(n.node)?.seq));
    cluster.nodes().filter_map(tally).collect()
}

/// Compares what an entry did to the index with what the reports say of themselves. Gives how many reports did not fit.
pub fn follows(before: &BTreeMap<(NodeId, Epoch), u64>, cluster: &Cluster, command: &Command, answer: &Answer) -> u64 {
    for ((node, epoch), seq) in &applied(cluster) {
        let old = before.get(&(*node, *epoch)).copied().unwrap_or(0);
        assert!(old <= *seq, "I6: the index has less of node {node} than before: {seq} after {old}");
    }
    let (Command::Deltas(deltas), Answer::Deltas(verdicts)) = (command, answer) else { return 0 };
    let mut now = before.clone();
    let expected = deltas.iter().map(|delta| expect(&mut now, cluster, delta));
    let wrong = expected.zip(verdicts).find(|(expected, (_, verdict))| expected != verdict);
    assert!(wrong.is_none(), "I6: a report should be judged otherwise: {wrong:?}");
    verdicts.iter().filter(|(_, verdict)| matches!(verdict, DeltaVerdict::Gap { .. })).count() as u64
}

fn expect(now: &mut BTreeMap<(NodeId, Epoch), u64>, cluster: &Cluster, delta: &Delta) -> DeltaVerdict {
    let alive = cluster.node(delta.node).is_some_and(|n| n.epoch == delta.epoch && n.state.alive());
    let Some(last) = now.get_mut(&(delta.node, delta.epoch)).filter(|_| alive) else { return DeltaVerdict::StaleEpoch };
    if delta.seq <= *last {
        return DeltaVerdict::AlreadyApplied { seq: *last };
    }
    if delta.base_seq != *last {
        return DeltaVerdict::Gap { last_seq: *last };
    }
    *last = delta.seq;
    DeltaVerdict::Applied { seq: *last }
}
