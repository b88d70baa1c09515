//! Whose turn it is on a link, and how much may be on its way on it.
//!
//! Spans that may leave wait here, one queue for each hand-over, and not in the transport, where nothing could overtake them any more: of one link
//! at most [`ON_THE_WAY_MAX`] bytes are on their way at a time, and whenever there is room again the span goes that is [`due`] first. Within
//! a hand-over the order stays the sender's: lower layers first.
//!
//! A hand-over is due when it has waited, since its last turn, as long as it has patience: longer if more of it is left, and if it still hides
//! behind compute. So a short hand-over passes a long one, and one for which a client waits passes one for which nobody does yet. A due
//! time does not move away while one waits, and patience ends ([`PATIENCE_MAX_US`]): from then on each other hand-over can go before it once, so
//! nothing starves, and long ones among themselves take turns. (Mooncake's TENT raises a waiting request by a class each 10 ms to
//! the same end; priorities of QUIC streams are strict in quinn, and alone would starve.)

use alloc::collections::{BTreeMap, VecDeque};

use super::Span;
use crate::ids::{AttemptId, Generation, Time};
use crate::planted::{Bug, planted};

/// Bytes on their way over one link at a time, unless one span is larger: given to the transport and not known to have arrived. 100 Gb/s at
/// 0.6 ms, 10 Gb/s at 6 ms; and what waits for a link of 1 Gb/s at most 70 ms, within which the transport still goes by [`priority`].
pub const ON_THE_WAY_MAX: u64 = 8 << 20;

/// Bytes left that are worth a microsecond of patience, and the most that bytes are worth: 50 MB.
const BYTES_PER_US: u64 = 1_000;
const BYTES_MAX_US: u64 = 50_000;
/// What it is worth that the prompt is still being computed.
const COMPUTING_US: u64 = 50_000;
/// The longest patience.
pub const PATIENCE_MAX_US: u64 = BYTES_MAX_US + COMPUTING_US;

/// What a hand-over has to say for itself when it is chosen whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Its prompt is computed and its first token is out: somebody waits for the second.
    pub awaited: bool,
    /// Bytes that are still to be issued.
    pub unissued_bytes: u64,
    /// When it is given up.
    pub deadline: Time,
}

/// When a hand-over is due that waits for its turn since `since` and of which `left_bytes` are left.
#[must_use]
pub fn due(since: Time, left_bytes: u64, claim: &Claim) -> Time {
    let bytes_us = (left_bytes / BYTES_PER_US).min(BYTES_MAX_US);
    let computing_us = if claim.awaited { 0 } else { COMPUTING_US };
    since.after(bytes_us + computing_us).min(claim.deadline)
}

/// A due time as a transport's priority: greater goes first. In steps of 16 ms, so that two years of them fit.
#[must_use]
pub fn priority(due: Time) -> i32 {
    -i32::try_from(due.0 >> 14).unwrap_or(i32::MAX)
}

/// A span that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Which cells.
    pub span: Span,
    /// The reservation that they may be written to.
    pub generation: Generation,
    /// Bytes of the cells.
    pub bytes: u64,
    /// Since when it could go.
    pub since: Time,
}

/// What waits of one hand-over, in its own order.
#[derive(Debug, Default)]
struct Line {
    spans: VecDeque<Waiting>,
    bytes: u64,
    /// When one of them went last.
    turn: Time,
}

/// All that waits for one link, and how much is on its way there.
#[derive(Debug, Default)]
pub struct Pace {
    lines: BTreeMap<AttemptId, Line>,
    on_the_way_bytes: u64,
    on_the_way_spans: u64,
}

impl Pace {
    /// A span of a hand-over waits from now on, behind those that it has here.
    pub fn wait(&mut self, attempt: AttemptId, waiting: Waiting) {
        let line = self.lines.entry(attempt).or_default();
        line.bytes += waiting.bytes;
        line.spans.push_back(waiting);
    }

    /// The next span to go, and when it is due; `None` when none waits or enough is on its way. O(hand-overs that wait).
    pub fn next(&mut self, now: Time, claim: impl Fn(AttemptId) -> Claim) -> Option<(AttemptId, Waiting, Time)> {
        let first = |(attempt, line): (&AttemptId, &Line)| {
            let (claim, head) = (claim(*attempt), line.spans.front().expect("a line without spans is taken away"));
            (due(head.since.max(line.turn), claim.unissued_bytes + line.bytes, &claim), *attempt)
        };
        let (due, attempt) = self.lines.iter().map(first).min()?;
        let line = self.lines.get_mut(&attempt)?;
        let waiting = *line.spans.front()?;
        let room = self.on_the_way_bytes == 0 || self.on_the_way_bytes + waiting.bytes <= ON_THE_WAY_MAX;
        if !room && !planted(Bug::TurnAlways) {
            return None;
        }
        line.spans.pop_front();
        line.bytes -= waiting.bytes;
        line.turn = now;
        if line.spans.is_empty() {
            self.lines.remove(&attempt);
        }
        self.on_the_way_bytes += waiting.bytes;
        self.on_the_way_spans += 1;
        Some((attempt, waiting, due))
    }

    /// A span of so many bytes is on its way no more: arrived, or given up.
    pub fn drained(&mut self, bytes: u64) {
        if planted(Bug::TurnKept) {
            return;
        }
        self.on_the_way_spans -= 1;
        self.on_the_way_bytes = self.on_the_way_bytes.checked_sub(bytes).expect("only what went is drained");
    }

    /// A hand-over is over: nothing of it waits any more.
    pub fn forget(&mut self, attempt: AttemptId) {
        self.lines.remove(&attempt);
    }

    /// Whether anything waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Asserts what must always hold: something is on its way whenever something waits, and no more than may be.
    pub fn check(&self) {
        let bounded = self.on_the_way_bytes <= ON_THE_WAY_MAX || self.on_the_way_spans == 1;
        assert!(bounded, "{} bytes are on their way in {} spans", self.on_the_way_bytes, self.on_the_way_spans);
        assert!(self.lines.is_empty() || self.on_the_way_bytes > 0, "spans wait for a link on which nothing is on its way");
        for line in self.lines.values() {
            assert_eq!(
                line.spans.iter().map(|waiting| waiting.bytes).sum::<u64>(),
                line.bytes,
                "every waiting span is counted once"
            );
        }
    }
}
