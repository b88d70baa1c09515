//! What one gateway has served since it started, in counters that only grow: who wants rates asks twice and divides. The histograms for
//! monitoring are [`crate::http::metrics`]'s; these are the few figures that an operator watches live.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The counters.
#[derive(Debug, Default)]
pub struct Traffic {
    ended: AtomicU64,
    failed: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    output_tokens: AtomicU64,
    first_tokens: AtomicU64,
    first_token_us: AtomicU64,
}

/// Their values at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// Answers that reached their end.
    pub ended: u64,
    /// Requests that were refused or whose answer failed.
    pub failed: u64,
    /// Tokens of the prompts of `ended`.
    pub prompt_tokens: u64,
    /// Those of them that were cached.
    pub cached_tokens: u64,
    /// Tokens written.
    pub output_tokens: u64,
    /// First tokens among them.
    pub first_tokens: u64,
    /// Time until them, from the arrival of the request, microseconds, summed.
    pub first_token_us: u64,
}

impl Traffic {
    /// An answer reached its end.
    pub fn ended(&self, prompt_tokens: u32, cached_tokens: u32) {
        self.ended.fetch_add(1, Relaxed);
        self.prompt_tokens.fetch_add(prompt_tokens.into(), Relaxed);
        self.cached_tokens.fetch_add(cached_tokens.into(), Relaxed);
    }

    /// A request was refused, or its answer failed.
    pub fn failed(&self) {
        self.failed.fetch_add(1, Relaxed);
    }

    /// A token was written.
    pub fn token(&self) {
        self.output_tokens.fetch_add(1, Relaxed);
    }

    /// It was the first of its answer.
    pub fn first_token(&self, after: Duration) {
        self.first_tokens.fetch_add(1, Relaxed);
        self.first_token_us.fetch_add(after.as_micros() as u64, Relaxed);
    }

    /// The values now. Not of one instant, which rates do not need.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        Figures {
            ended: read(&self.ended),
            failed: read(&self.failed),
            prompt_tokens: read(&self.prompt_tokens),
            cached_tokens: read(&self.cached_tokens),
            output_tokens: read(&self.output_tokens),
            first_tokens: read(&self.first_tokens),
            first_token_us: read(&self.first_token_us),
        }
    }
}

impl Figures {
    /// The sum of two gateways' figures.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        self.each(other, u64::saturating_add)
    }

    /// What happened between `before` and these. A gateway that started anew in between counts from 0.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        self.each(before, |now, before| now.checked_sub(before).unwrap_or(now))
    }

    fn each(self, other: Self, op: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            ended: op(self.ended, other.ended),
            failed: op(self.failed, other.failed),
            prompt_tokens: op(self.prompt_tokens, other.prompt_tokens),
            cached_tokens: op(self.cached_tokens, other.cached_tokens),
            output_tokens: op(self.output_tokens, other.output_tokens),
            first_tokens: op(self.first_tokens, other.first_tokens),
            first_token_us: op(self.first_token_us, other.first_token_us),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_grow_add_up_and_are_compared_over_a_restart() {
        let traffic = Traffic::default();
        traffic.token();
        traffic.first_token(Duration::from_millis(2));
        let before = traffic.figures();
        traffic.token();
        traffic.ended(40, 16);
        traffic.failed();
        let now = traffic.figures();
        let between = now.since(before);
        assert_eq!((between.output_tokens, between.ended, between.cached_tokens, between.first_token_us), (1, 1, 16, 0));
        assert_eq!(now.plus(now).prompt_tokens, 80);
        assert_eq!(before.since(now).ended, 0);
        assert_eq!(before.since(now).output_tokens, 1, "it started anew");
    }
}
