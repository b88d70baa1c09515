//! The last routing decisions of this gateway: why each was made, and what became of it. A ring; nothing here is replicated.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use millrace_core::ids::{AttemptId, RequestId};
use millrace_core::route::hot::Hot;
use millrace_core::route::{Decision, NoPlace};
use parking_lot::Mutex;

/// Decisions that are kept: some 4 MiB, since each holds at most [`millrace_core::route::ALTERNATIVES_MAX`] other plans. At the
/// bound the oldest is forgotten, whether or not its request has ended.
pub const DECISIONS_MAX: usize = 4096;

/// Names a decision of this process, ascending.
pub type DecisionNo = u64;

/// One decision.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its number.
    pub no: DecisionNo,
    /// When it was made, milliseconds since 1970.
    pub at_ms: u64,
    /// When something was last learned of it, milliseconds since 1970.
    pub changed_ms: u64,
    /// For which attempt.
    pub attempt: AttemptId,
    /// The id by which the client knows the answer.
    pub answer: u128,
    /// Tokens to compute: the prompt, and what earlier attempts delivered.
    pub tokens: u32,
    /// Tokens to be made, at most.
    pub max_new: u32,
    /// The hot prefix of the prompt.
    pub hot: Option<Hot>,
    /// Where it went, and why.
    pub placed: Result<Decision, NoPlace>,
    /// What became of it, as far as it is known.
    pub observed: Observed,
}

/// What became of an attempt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// How it ended; `None` while it runs.
    pub outcome: Option<Outcome>,
    /// Leading tokens that the node that computed the prompt found cached.
    pub cached_tokens: Option<u32>,
    /// From the ticket's arrival there to its first step, microseconds.
    pub queue_us: Option<u64>,
    /// From the first step to the first token, microseconds.
    pub compute_us: Option<u64>,
    /// From the decision to the first token as seen here, microseconds.
    pub ttft_us: Option<u64>,
    /// Blocks that the decode node had.
    pub had_blocks: Option<u32>,
    /// The part of the hand-over that compute did not hide, microseconds.
    pub exposed_us: Option<u64>,
    /// Mean time between the tokens after the second, microseconds.
    pub tpot_us: Option<u64>,
    /// Tokens that came.
    pub tokens: u32,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With its last token.
    Done,
    /// A node gave up on it.
    Failed,
    /// A node of it was lost or too slow: another attempt took over.
    Moved,
    /// The client left, or the gateway gave up.
    Dropped,
}

impl Outcome {
    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Moved => "moved",
            Self::Dropped => "dropped",
        }
    }
}

/// The ring.
#[derive(Debug, Default)]
pub struct Decisions(Mutex<Ring>);

#[derive(Debug, Default)]
struct Ring {
    records: VecDeque<Record>,
    made: DecisionNo,
}

/// What a decision was about.
pub(super) struct Question {
    pub attempt: AttemptId,
    pub answer: u128,
    pub tokens: u32,
    pub max_new: u32,
    pub hot: Option<Hot>,
}

impl Decisions {
    /// Keeps a decision. O(1).
    pub(super) fn add(&self, asked: &Question, placed: Result<Decision, NoPlace>) -> DecisionNo {
        let at_ms = unix_ms();
        let mut ring = self.0.lock();
        ring.made += 1;
        let no = ring.made;
        if ring.records.len() >= DECISIONS_MAX {
            ring.records.pop_front();
        }
        let &Question { attempt, answer, tokens, max_new, hot } = asked;
        let observed = Observed::default();
        ring.records.push_back(Record { no, at_ms, changed_ms: at_ms, attempt, answer, tokens, max_new, hot, placed, observed });
        no
    }

    /// Something was learned of a decision; without effect when it is forgotten. O(1).
    pub(super) fn learned(&self, no: DecisionNo, observed: Observed) {
        let mut ring = self.0.lock();
        let Some(first) = ring.records.front().map(|record| record.no) else { return };
        let at = no.checked_sub(first).and_then(|at| usize::try_from(at).ok());
        if let Some(record) = at.and_then(|at| ring.records.get_mut(at)) {
            (record.observed, record.changed_ms) = (observed, unix_ms());
        }
    }

    /// The newest `limit` of those that changed after `since_ms` and are of `request`, if one is named, or of the answer with its id; oldest first.
    #[must_use]
    pub fn list(&self, since_ms: u64, limit: usize, request: Option<RequestId>) -> Vec<Record> {
        let ring = self.0.lock();
        let wanted = |record: &&Record| {
            record.changed_ms > since_ms && request.is_none_or(|id| record.attempt.request == id || record.answer == id.0)
        };
        let mut newest: Vec<_> = ring.records.iter().rev().filter(wanted).take(limit).cloned().collect();
        newest.reverse();
        newest
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(request: u128) -> Question {
        Question { attempt: AttemptId { request: RequestId(request), attempt: 0 }, answer: 99, tokens: 1, max_new: 1, hot: None }
    }

    #[test]
    fn the_ring_forgets_the_oldest_and_learns_of_the_rest() {
        let decisions = Decisions::default();
        for request in 0..DECISIONS_MAX as u128 + 5 {
            decisions.add(&asked(request), Err(NoPlace::NoNodes));
        }
        let all = decisions.list(0, usize::MAX, None);
        assert_eq!((all.len(), all[0].no), (DECISIONS_MAX, 6));
        let done = Observed { outcome: Some(Outcome::Done), ..Observed::default() };
        decisions.learned(3, done); // forgotten already
        decisions.learned(9, done);
        decisions.learned(u64::MAX, done); // never made
        let ended: Vec<_> = decisions.list(0, usize::MAX, None).iter().filter(|r| r.observed == done).map(|r| r.no).collect();
        assert_eq!(ended, [9]);
    }

    #[test]
    fn what_is_listed_can_be_narrowed() {
        let decisions = Decisions::default();
        for request in 0..10 {
            decisions.add(&asked(request % 2), Err(NoPlace::NoNodes));
        }
        assert_eq!(decisions.list(0, 3, None).iter().map(|r| r.no).collect::<Vec<_>>(), [8, 9, 10]);
        assert_eq!(decisions.list(0, 2, Some(RequestId(0))).iter().map(|r| r.no).collect::<Vec<_>>(), [7, 9]);
        assert_eq!(decisions.list(0, 99, Some(RequestId(99))).len(), 10);
        assert_eq!(decisions.list(u64::MAX, 9, None).len(), 0);
    }

    #[test]
    fn a_record_has_the_size_that_the_bound_assumes() {
        use millrace_core::route::{ALTERNATIVES_MAX, Alternative};
        let bytes = size_of::<Record>() + ALTERNATIVES_MAX * size_of::<Alternative>();
        assert!(bytes * DECISIONS_MAX <= 4 << 20, "{bytes} bytes a record");
    }
}
