//! How a node tells the coordinator what its pool caches: deltas in order, one on the way at a time, each repeated until the
//! log has applied it; a snapshot when the log and the node disagree about where they are. Each second, between two deltas, it says
//! what the whole cache comes to, computed from the pool itself and not from what was said, so that a defect anywhere on the way shows.
//!
//! Stop and wait is enough: a delta carries up to [`DELTA_OPS_MAX`] operations and the log takes milliseconds.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::holders::toggle;
use crate::ids::{BlockHash, Epoch, NodeId, Time};
use crate::message::{BlockOp, CacheDigest, DELTA_OPS_MAX, Delta, SNAPSHOT_PAGE_MAX, SnapshotPage};
use crate::planted::{Bug, planted};

/// Operations gather this long before they leave.
pub const FLUSH_US: u64 = 10_000;
/// An unanswered delta or snapshot is sent again after this.
pub const RESEND_US: u64 = 1_000_000;
/// A snapshot gets so much longer for each of its pages: it is megabytes through the log, and to begin anew would not make it faster.
pub const RESEND_PAGE_US: u64 = 200_000;
/// How often the digest of the cache is told.
pub const DIGEST_US: u64 = 1_000_000;
/// Operations that may wait; more are dropped and a snapshot replaces them.
pub const PENDING_MAX: usize = 1 << 18;

/// What to send to a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Changes.
    Delta(Delta),
    /// The publisher needs the names of all cached blocks: answer with [`Publisher::snapshot`].
    NeedSnapshot,
    /// The same, to be answered with [`Publisher::digest`].
    NeedDigest,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Flight {
    /// Nothing on the way.
    Idle,
    /// A delta, since when.
    Delta(Delta, Time),
    /// A snapshot that stands for this sequence number, and when it is given up.
    Snapshot(u64, Time),
    /// A snapshot was asked for and not yet made.
    Wanted,
}

/// The publisher of one incarnation of one node.
#[derive(Debug)]
pub struct Publisher {
    node: NodeId,
    epoch: Epoch,
    /// Last sequence number that the log is known to have applied.
    applied: u64,
    /// Last sequence number given to a delta or snapshot; never given twice, so that a late answer is not taken for another's.
    issued: u64,
    pending: VecDeque<BlockOp>,
    oldest: Option<Time>,
    flight: Flight,
    next_digest: Time,
}

impl Publisher {
    /// A publisher for an incarnation that has just joined. A pool that survived its link starts with a snapshot.
    #[must_use]
    pub fn new(node: NodeId, epoch: Epoch, pool_is_empty: bool) -> Self {
        let flight = if pool_is_empty { Flight::Idle } else { Flight::Wanted };
        Self { node, epoch, applied: 0, issued: 0, pending: VecDeque::new(), oldest: None, flight, next_digest: Time(0) }
    }

    /// A change of the pool.
    pub fn push(&mut self, now: Time, op: BlockOp) {
        if self.pending.len() >= PENDING_MAX {
            self.want_snapshot(self.epoch);
        }
        if self.flight != Flight::Wanted {
            self.pending.push_back(op);
            self.oldest.get_or_insert(now);
        }
    }

    /// The log has applied everything up to `seq`.
    pub fn applied(&mut self, epoch: Epoch, seq: u64) {
        if epoch != self.epoch {
            return;
        }
        let awaited = match &self.flight {
            Flight::Delta(delta, _) => delta.seq,
            Flight::Snapshot(awaited, _) => *awaited,
            Flight::Idle | Flight::Wanted => return,
        };
        if seq == awaited || planted(Bug::AckOfAnother) {
            self.applied = seq;
            self.flight = Flight::Idle;
        }
    }

    /// The last sequence number that the log is known to have applied, when nothing is on the way to it: then the index and
    /// the pool must be equal.
    #[must_use]
    pub fn settled(&self) -> Option<u64> {
        (self.flight == Flight::Idle && self.pending.is_empty()).then_some(self.applied)
    }

    /// The log and the node disagree: everything waiting is replaced by a snapshot.
    pub fn want_snapshot(&mut self, epoch: Epoch) {
        if epoch == self.epoch && !matches!(self.flight, Flight::Snapshot(..)) {
            self.pending.clear();
            self.oldest = None;
            self.flight = Flight::Wanted;
        }
    }

    /// What to send now, if anything. Call after every input and at [`Self::deadline`].
    pub fn poll(&mut self, now: Time) -> Option<Output> {
        match &mut self.flight {
            Flight::Wanted => Some(Output::NeedSnapshot),
            Flight::Delta(delta, since) if now.since(*since) >= RESEND_US => {
                *since = now;
                Some(Output::Delta(delta.clone()))
            }
            Flight::Snapshot(_, until) if now >= *until => {
                self.pending.clear();
                self.oldest = None;
                self.flight = Flight::Wanted;
                Some(Output::NeedSnapshot)
            }
            Flight::Idle if now >= self.next_digest => {
                self.next_digest = now.after(DIGEST_US);
                Some(Output::NeedDigest)
            }
            Flight::Idle if self.oldest.is_some_and(|at| now.since(at) >= FLUSH_US) => Some(Output::Delta(self.depart(now))),
            _ => None,
        }
    }

    /// When to poll again.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        match &self.flight {
            Flight::Delta(_, since) => Some(since.after(RESEND_US)),
            Flight::Snapshot(_, until) => Some(*until),
            Flight::Idle => Some(self.oldest.map_or(self.next_digest, |at| at.after(FLUSH_US).min(self.next_digest))),
            Flight::Wanted => None,
        }
    }

    /// The pages of a snapshot of `blocks`, all that the pool caches at this moment.
    pub fn snapshot(&mut self, now: Time, blocks: &[BlockHash]) -> Vec<SnapshotPage> {
        self.pending.clear();
        self.oldest = None;
        self.issued += 1;
        let seq = self.issued;
        let pages = blocks.len().div_ceil(SNAPSHOT_PAGE_MAX).max(1);
        self.flight = Flight::Snapshot(seq, now.after(RESEND_US + pages as u64 * RESEND_PAGE_US));
        (0..pages)
            .map(|page| SnapshotPage {
                node: self.node,
                epoch: self.epoch,
                seq,
                page: page as u32,
                pages: pages as u32,
                blocks: blocks.iter().skip(page * SNAPSHOT_PAGE_MAX).take(SNAPSHOT_PAGE_MAX).copied().collect(),
            })
            .collect()
    }

    /// What the cache comes to at the last sequence number that the log has applied, when the pool caches `blocks` at this moment:
    /// what waits to be told is taken back.
    #[must_use]
    pub fn digest(&self, blocks: &[BlockHash]) -> CacheDigest {
        let (mut digest, mut count) = (blocks.iter().fold(0, toggle), blocks.len() as u64);
        let in_flight = match &self.flight {
            Flight::Delta(delta, _) => delta.ops.as_slice(),
            _ => &[],
        };
        for op in in_flight.iter().chain(&self.pending) {
            match op {
                BlockOp::Stored(block) => (digest, count) = (toggle(digest, block), count.wrapping_sub(1)),
                BlockOp::Evicted(block) => (digest, count) = (toggle(digest, block), count.wrapping_add(1)),
                BlockOp::ToHost(_) | BlockOp::ToDisk(_) => {} // a move: what is cached stays the same
            }
        }
        CacheDigest { node: self.node, epoch: self.epoch, seq: self.applied, blocks: count, digest }
    }

    fn depart(&mut self, now: Time) -> Delta {
        let count = self.pending.len().min(DELTA_OPS_MAX);
        let ops: Vec<_> = self.pending.drain(..count).collect();
        self.oldest = if self.pending.is_empty() { None } else { Some(now) };
        self.issued += 1;
        let delta = Delta { node: self.node, epoch: self.epoch, base_seq: self.applied, seq: self.issued, ops };
        self.flight = Flight::Delta(delta.clone(), now);
        delta
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(n: u8) -> BlockOp {
        BlockOp::Stored(BlockHash([n; 16]))
    }

    /// Of which the first digest was told.
    fn publisher() -> Publisher {
        let mut p = Publisher::new(NodeId(1), Epoch(5), true);
        assert_eq!(p.poll(Time(0)), Some(Output::NeedDigest));
        p
    }

    #[test]
    fn one_delta_at_a_time_in_order() {
        let mut p = publisher();
        p.push(Time(0), op(1));
        assert_eq!(p.poll(Time(1)), None, "operations gather first");
        let Some(Output::Delta(first)) = p.poll(Time(FLUSH_US)) else { panic!("a delta is due") };
        p.push(Time(FLUSH_US), op(2));
        assert_eq!(p.poll(Time(3 * FLUSH_US)), None, "the second waits for the first");
        p.applied(Epoch(5), first.seq);
        let Some(Output::Delta(second)) = p.poll(Time(3 * FLUSH_US)) else { panic!("the second is due") };
        assert_eq!((second.base_seq, second.ops), (first.seq, alloc::vec![op(2)]));
    }

    #[test]
    fn unanswered_is_repeated_unchanged() {
        let mut p = publisher();
        p.push(Time(0), op(1));
        let first = p.poll(Time(FLUSH_US));
        assert_eq!(p.poll(Time(FLUSH_US + RESEND_US)), first);
    }

    #[test]
    fn snapshot_replaces_everything_waiting() {
        let mut p = publisher();
        p.push(Time(0), op(1));
        p.poll(Time(FLUSH_US));
        p.push(Time(FLUSH_US), op(2));
        p.want_snapshot(Epoch(4));
        assert!(matches!(p.flight, Flight::Delta(..)), "an older incarnation's wish has no effect");
        p.want_snapshot(Epoch(5));
        assert_eq!(p.poll(Time(FLUSH_US)), Some(Output::NeedSnapshot));
        let pages = p.snapshot(Time(FLUSH_US), &[BlockHash([1; 16]), BlockHash([2; 16])]);
        assert_eq!((pages.len(), pages[0].seq, pages[0].blocks.len()), (1, 2, 2));
        p.push(Time(FLUSH_US), op(3));
        p.applied(Epoch(5), 1);
        assert!(matches!(p.flight, Flight::Snapshot(..)), "a late answer to the delta is not the snapshot's");
        p.applied(Epoch(5), 2);
        let Some(Output::Delta(next)) = p.poll(Time(3 * FLUSH_US)) else { panic!("changes after the snapshot follow it") };
        assert_eq!((next.base_seq, next.ops), (2, alloc::vec![op(3)]));
    }

    #[test]
    fn a_second_gap_while_a_snapshot_is_under_way_asks_for_no_other() {
        let mut p = publisher();
        p.want_snapshot(Epoch(5));
        p.want_snapshot(Epoch(5));
        assert_eq!(p.poll(Time(1)), Some(Output::NeedSnapshot));
        let blocks: Vec<_> = (0..3 * SNAPSHOT_PAGE_MAX as u32).map(|i| BlockHash(u128::from(i).to_le_bytes())).collect();
        let pages = p.snapshot(Time(1), &blocks);
        p.want_snapshot(Epoch(5));
        assert_eq!(p.poll(Time(2)), None);
        let patience = RESEND_US + 3 * RESEND_PAGE_US;
        assert_eq!((p.deadline(), p.poll(Time(patience))), (Some(Time(1 + patience)), None), "a large one has more time");
        p.applied(Epoch(5), pages[0].seq);
        assert_eq!(p.poll(Time(DIGEST_US)), Some(Output::NeedDigest), "it is over");
    }

    #[test]
    fn the_digest_is_of_what_the_log_has_applied() {
        let (a, b, c) = (BlockHash([1; 16]), BlockHash([2; 16]), BlockHash([3; 16]));
        let of = |blocks: &[BlockHash]| (blocks.len() as u64, blocks.iter().fold(0, toggle));
        let told = |p: &Publisher, cached: &[BlockHash]| {
            let said = p.digest(cached);
            (said.seq, (said.blocks, said.digest))
        };
        let mut p = publisher();
        p.push(Time(0), BlockOp::Stored(a));
        p.push(Time(0), BlockOp::Stored(b));
        assert_eq!(told(&p, &[a, b]), (0, of(&[])));
        let Some(Output::Delta(first)) = p.poll(Time(FLUSH_US)) else { panic!("a delta is due") };
        p.push(Time(FLUSH_US), BlockOp::Evicted(a));
        p.push(Time(FLUSH_US), BlockOp::Stored(c));
        p.push(Time(FLUSH_US), BlockOp::ToHost(b));
        assert_eq!(told(&p, &[b, c]), (0, of(&[])), "neither what is on the way counts nor what waits");
        p.applied(Epoch(5), first.seq);
        assert_eq!(told(&p, &[c, b]), (first.seq, of(&[a, b])));
        assert_ne!(told(&p, &[b]).1, of(&[a, b]), "a pool that lost a block without a word");
    }

    #[test]
    fn digests_are_told_between_deltas() {
        let mut p = publisher();
        p.push(Time(DIGEST_US), op(1));
        let late = Time(DIGEST_US + FLUSH_US);
        assert_eq!(p.poll(late), Some(Output::NeedDigest), "before the delta goes");
        assert!(matches!(p.poll(late), Some(Output::Delta(_))));
        assert_eq!(p.poll(Time(DIGEST_US * 2 + FLUSH_US - 1)), None, "not while one is on the way");
    }
}
