//! What becomes of one attempt, seen from the gateway: compares what nodes and tokens say with what was predicted.
//! It judges only; what follows from it is [`millrace_core::route::correct`]'s, and what is kept `decisions`'.

use std::time::Instant;

use millrace_core::ids::{AttemptId, Epoch, NodeId};
use millrace_core::message::{AttemptFailed, HandoverStats, TokenOut};
use millrace_core::route::Decision;
use millrace_core::route::correct::{Observation, Predicted};

use super::decisions::{DecisionNo, Observed, Outcome};

/// Tokens after which the time between them says something.
const STEP_TOKENS: u32 = 16;

/// A node and its incarnation.
pub(super) type Who = (NodeId, Epoch);

/// Blocks that were believed to be cached where an attempt went, and that were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Believed {
    pub role: Side,
    pub belief: u64,
    pub found: u64,
}

/// In which part of an attempt blocks are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Side {
    /// Where the prompt is computed.
    #[default]
    Prefill,
    /// Where it is decoded.
    Decode,
}

/// What one message taught.
#[derive(Debug, Default)]
pub(super) struct Learned {
    pub seen: Option<Observation>,
    pub believed: Option<Believed>,
    pub observed: Option<(DecisionNo, Observed)>,
}

/// What is known of a decision when it is made.
#[derive(Debug)]
pub(super) struct Plan {
    pub no: DecisionNo,
    pub attempt: AttemptId,
    pub decision: Box<Decision>,
    pub prefill: Who,
    /// Where it is decoded; `prefill` when that does it whole.
    pub decode: Who,
    pub tokens: u32,
    pub block_tokens: u32,
    pub layers: u16,
}

/// One running attempt.
#[derive(Debug)]
pub(super) struct Watch {
    plan: Plan,
    placed: Instant,
    observed: Observed,
    /// Index and time of the token that the time between tokens counts from, and of the newest.
    steady: Option<(u32, Instant)>,
    newest: Option<(u32, Instant)>,
    /// As of `steady`, but of the observation before.
    told: Option<(u32, Instant)>,
}

impl Watch {
    pub(super) fn new(placed: Instant, plan: Plan) -> Self {
        Self { plan, placed, observed: Observed::default(), steady: None, newest: None, told: None }
    }

    /// A token.
    pub(super) fn token(&mut self, now: Instant, token: &TokenOut) -> Learned {
        let mut learned = Learned::default();
        if token.attempt != self.plan.attempt || self.newest.is_some_and(|(index, _)| token.index <= index) {
            return learned;
        }
        self.observed.tokens += 1;
        if self.newest.is_none() {
            self.observed.ttft_us = Some(us(self.placed, now));
            learned = self.first(token);
        } else if self.steady.is_none() {
            // The time before the second token is the hand-over's.
            (self.steady, self.told) = (Some((token.index, now)), Some((token.index, now)));
        } else {
            learned.seen = self.step(token.index, now);
        }
        self.newest = Some((token.index, now));
        if token.finish.is_some() {
            learned.observed = Some(self.end(Outcome::Done));
        }
        learned
    }

    /// The first token of the attempt brings what its prompt took.
    fn first(&mut self, token: &TokenOut) -> Learned {
        let Some(stats) = &token.prefill else { return Learned::default() };
        let Plan { decision, prefill, tokens, block_tokens, .. } = &self.plan;
        let cached = stats.cached_tokens.min(*tokens);
        self.observed.cached_tokens = Some(cached);
        (self.observed.queue_us, self.observed.compute_us) = (Some(stats.queue_us), Some(stats.compute_us));
        let seen = Observation {
            node: prefill.0,
            epoch: prefill.1,
            what: Predicted::Prefill,
            // For what was computed in truth: that less was cached than believed says nothing about the speed.
            predicted_us: decision.prefill_speed.prompt_us(cached.into(), (*tokens).into()),
            applied: decision.prefill_speed.correction.prefill,
            observed_us: stats.compute_us,
        };
        let (belief, found) = (decision.prefill_cached_blocks.into(), (cached / block_tokens.max(&1)).into());
        let observed = Some((self.plan.no, self.observed));
        Learned { seen: Some(seen), believed: Some(Believed { role: Side::Prefill, belief, found }), observed }
    }

    fn step(&mut self, index: u32, now: Instant) -> Option<Observation> {
        let (from, since) = self.told?;
        let count = index - from;
        if count < STEP_TOKENS {
            return None;
        }
        self.told = Some((index, now));
        Some(Observation {
            node: self.plan.decode.0,
            epoch: self.plan.decode.1,
            what: Predicted::Step,
            predicted_us: self.plan.decision.cost.tpot_us,
            applied: self.plan.decision.decode_speed.correction.step,
            observed_us: us(since, now) / u64::from(count),
        })
    }

    /// A hand-over ended well.
    pub(super) fn handover(&mut self, stats: &HandoverStats) -> Learned {
        if stats.attempt != self.plan.attempt || self.observed.exposed_us.is_some() {
            return Learned::default();
        }
        (self.observed.had_blocks, self.observed.exposed_us) = (Some(stats.blocks_had), Some(stats.exposed_us));
        let Plan { no, decision, prefill, layers, .. } = &self.plan;
        let speed = &decision.prefill_speed;
        let computing_us = self.observed.compute_us.unwrap_or(decision.cost.prefill_us);
        let seen = Observation {
            node: prefill.0,
            epoch: prefill.1,
            what: Predicted::Handover,
            predicted_us: speed.tail_us(speed.transfer_us(stats.bytes), computing_us, *layers),
            applied: speed.correction.handover,
            observed_us: stats.exposed_us,
        };
        let (belief, found) = (decision.decode_cached_blocks.into(), stats.blocks_had.into());
        let believed = Some(Believed { role: Side::Decode, belief, found });
        Learned { seen: Some(seen), believed, observed: Some((*no, self.observed)) }
    }

    /// A node gave up.
    pub(super) fn failed(&mut self, failed: &AttemptFailed) -> Learned {
        let ours = failed.attempt == self.plan.attempt;
        Learned { observed: ours.then(|| self.end(Outcome::Failed)), ..Learned::default() }
    }

    /// It is over, if it was not already.
    pub(super) fn end(&mut self, outcome: Outcome) -> (DecisionNo, Observed) {
        self.observed.outcome.get_or_insert(outcome);
        if let (Some((from, since)), Some((to, until))) = (self.steady, self.newest)
            && to > from
        {
            self.observed.tpot_us = Some(us(since, until) / u64::from(to - from));
        }
        (self.plan.no, self.observed)
    }
}

fn us(from: Instant, to: Instant) -> u64 {
    to.saturating_duration_since(from).as_micros() as u64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use millrace_core::ids::RequestId;
    use millrace_core::message::{FailKind, Finish, PrefillStats};
    use millrace_core::route::{Breakdown, Speed};

    use super::*;

    const ATTEMPT: AttemptId = AttemptId { request: RequestId(4), attempt: 1 };

    fn watch(at: Instant) -> Watch {
        let speed = Speed { prefill_ns_per_token: 1_000_000, send_bytes_per_s: 1_000_000, handover_us: 2_000, ..Speed::default() };
        let decision = Decision {
            prefill: NodeId(1),
            decode: Some(NodeId(2)),
            prefill_cached_blocks: 3,
            decode_cached_blocks: 5,
            cost: Breakdown { tpot_us: 21_000, ..Breakdown::default() },
            prefill_speed: speed,
            decode_speed: speed,
            ties: 1,
            alternatives: vec![],
            exclusion_ignored: false,
        };
        let (prefill, decode, decision) = ((NodeId(1), Epoch(1)), (NodeId(2), Epoch(2)), Box::new(decision));
        Watch::new(at, Plan { no: 9, attempt: ATTEMPT, decision, prefill, decode, tokens: 100, block_tokens: 16, layers: 10 })
    }

    fn token(index: u32) -> TokenOut {
        TokenOut { attempt: ATTEMPT, index, token: 1, logprob: 0.0, prefill: None, finish: None }
    }

    #[test]
    fn the_first_token_tells_what_was_found_and_how_long_it_took() {
        let at = Instant::now();
        let mut watch = watch(at);
        let stats = PrefillStats { node: "p".into(), cached_tokens: 32, queue_us: 7, compute_us: 150_000 };
        let stranger = TokenOut { attempt: AttemptId::default(), ..token(0) };
        assert!(watch.token(at, &stranger).observed.is_none());
        let learned = watch.token(at + Duration::from_millis(200), &TokenOut { prefill: Some(stats), ..token(4) });
        let seen = learned.seen.unwrap();
        assert_eq!((seen.what, seen.predicted_us, seen.observed_us), (Predicted::Prefill, 68_000, 150_000));
        assert_eq!(learned.believed, Some(Believed { role: Side::Prefill, belief: 3, found: 2 }));
        let (no, observed) = learned.observed.unwrap();
        assert_eq!((no, observed.ttft_us, observed.cached_tokens, observed.outcome), (9, Some(200_000), Some(32), None));
    }

    #[test]
    fn steady_tokens_tell_the_step_and_the_last_ends_it() {
        let at = Instant::now();
        let mut watch = watch(at);
        let time = |index: u32| at + Duration::from_millis(if index == 0 { 100 } else { 900 + u64::from(index) * 30 });
        let seen: Vec<_> = (0..40).filter_map(|index| watch.token(time(index), &token(index)).seen).collect();
        assert_eq!(seen.len(), 2, "each 16 tokens after the second");
        assert!(
            seen.iter().all(|s| (s.what, s.node, s.predicted_us, s.observed_us) == (Predicted::Step, NodeId(2), 21_000, 30_000))
        );
        watch.token(time(41), &token(39)); // a repeat
        let last = watch.token(time(40), &TokenOut { finish: Some(Finish::Stop), ..token(40) });
        let (_, observed) = last.observed.unwrap();
        assert_eq!((observed.outcome, observed.tokens, observed.tpot_us), (Some(Outcome::Done), 41, Some(30_000)));
        assert_eq!(watch.end(Outcome::Dropped).1, observed, "an end is an end");
    }

    #[test]
    fn a_hand_over_counts_once_and_for_what_it_moved() {
        let mut watch = watch(Instant::now());
        let stats = HandoverStats {
            attempt: ATTEMPT,
            node: "d".into(),
            bytes: 100_000,
            blocks_sent: 2,
            blocks_had: 4,
            transfer_us: 1,
            exposed_us: 30_000,
        };
        let learned = watch.handover(&stats);
        let seen = learned.seen.unwrap();
        let tail_us = 100_000 / 10 + 100_000 * 9 / 10 + 2_000; // nothing was computed meanwhile
        assert_eq!((seen.node, seen.predicted_us, seen.observed_us), (NodeId(1), tail_us, 30_000));
        assert_eq!(learned.believed, Some(Believed { role: Side::Decode, belief: 5, found: 4 }));
        assert!(watch.handover(&stats).seen.is_none());
        let failed = AttemptFailed { attempt: ATTEMPT, kind: FailKind::Engine, detail: String::new() };
        assert_eq!(watch.failed(&failed).observed.unwrap().1.outcome, Some(Outcome::Failed));
    }
}
