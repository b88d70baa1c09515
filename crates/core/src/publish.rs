//! How a node tells the coordinator what its pool caches: deltas in order, one on the way at a time, each repeated until the
//! log has applied it; a snapshot when the log and the node disagree about where they are.
//!
//! Stop and wait is enough: a delta carries up to [`DELTA_OPS_MAX`] operations and the log takes milliseconds.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::ids::{BlockHash, Epoch, NodeId, Time};
use crate::message::{BlockOp, DELTA_OPS_MAX, Delta, SNAPSHOT_PAGE_MAX, SnapshotPage};

/// Operations gather this long before they leave.
pub const FLUSH_US: u64 = 10_000;
/// An unanswered delta or snapshot is sent again after this.
pub const RESEND_US: u64 = 1_000_000;
/// Operations that may wait; more are dropped and a snapshot replaces them.
pub const PENDING_MAX: usize = 1 << 18;

/// What to send to a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Changes.
    Delta(Delta),
    /// The publisher needs the names of all cached blocks: answer with [`Publisher::snapshot`].
    NeedSnapshot,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Flight {
    /// Nothing on the way.
    Idle,
    /// A delta, since when.
    Delta(Delta, Time),
    /// A snapshot that stands for this sequence number, since when.
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
}

impl Publisher {
    /// A publisher for an incarnation that has just joined. A pool that survived its link starts with a snapshot.
    #[must_use]
    pub fn new(node: NodeId, epoch: Epoch, pool_is_empty: bool) -> Self {
        let flight = if pool_is_empty { Flight::Idle } else { Flight::Wanted };
        Self { node, epoch, applied: 0, issued: 0, pending: VecDeque::new(), oldest: None, flight }
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
        if seq == awaited {
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
            Flight::Snapshot(_, since) if now.since(*since) >= RESEND_US => {
                self.pending.clear();
                self.oldest = None;
                self.flight = Flight::Wanted;
                Some(Output::NeedSnapshot)
            }
            Flight::Idle if self.oldest.is_some_and(|at| now.since(at) >= FLUSH_US) => Some(Output::Delta(self.depart(now))),
            _ => None,
        }
    }

    /// When to poll again.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        match &self.flight {
            Flight::Delta(_, since) | Flight::Snapshot(_, since) => Some(since.after(RESEND_US)),
            Flight::Idle => self.oldest.map(|at| at.after(FLUSH_US)),
            Flight::Wanted => None,
        }
    }

    /// The pages of a snapshot of `blocks`, all that the pool caches at this moment.
    pub fn snapshot(&mut self, now: Time, blocks: &[BlockHash]) -> Vec<SnapshotPage> {
        self.pending.clear();
        self.oldest = None;
        self.issued += 1;
        let seq = self.issued;
        self.flight = Flight::Snapshot(seq, now);
        let pages = blocks.len().div_ceil(SNAPSHOT_PAGE_MAX).max(1);
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

    fn publisher() -> Publisher {
        Publisher::new(NodeId(1), Epoch(5), true)
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
}
