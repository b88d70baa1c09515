//! How many tokens of a prompt a step may have in which nothing decodes: as many as have lately been computed in the time that such a step may take.

use crate::ids::Time;

/// Most tokens that it gives one row; a rest below [`super::BatchConfig::step_tokens_max`] may come on top. Memory for a step's activations grows with them.
const ROW_TOKENS_MAX: u64 = 2_048;

/// The speed of the last full step of prompts alone. Small steps are slower for each token, and decoding ones too.
#[derive(Debug, Default)]
pub(super) struct Speed {
    /// Tokens of the step in flight, where it is one that counts, and when it began.
    flight: Option<(u64, Time)>,
    /// Tokens, and microseconds that they took.
    last: Option<(u64, u64)>,
}

impl Speed {
    /// A step begins; `full` has its tokens if it is one that counts.
    pub(super) fn begin(&mut self, now: Time, full: Option<u64>) {
        self.flight = full.map(|tokens| (tokens, now));
    }

    /// It has ended well.
    pub(super) fn end(&mut self, now: Time) {
        self.last = self.flight.take().map(|(tokens, began)| (tokens, now.since(began).max(1))).or(self.last);
    }

    /// Tokens of one row that `us` microseconds suffice for; 0 as long as nothing is known.
    pub(super) fn tokens_in(&self, us: u64) -> usize {
        let tokens = self.last.map_or(0, |(tokens, took_us)| tokens.saturating_mul(us) / took_us);
        tokens.min(ROW_TOKENS_MAX) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_step_that_counts_decides() {
        let (mut speed, mut now) = (Speed::default(), Time(7));
        let mut step = |speed: &mut Speed, full, us| {
            speed.begin(now, full);
            now = now.after(us);
            speed.end(now);
        };
        assert_eq!(speed.tokens_in(1_000), 0);
        step(&mut speed, None, 5);
        assert_eq!(speed.tokens_in(1_000), 0);
        step(&mut speed, Some(256), 100);
        assert_eq!(speed.tokens_in(250), 640);
        step(&mut speed, None, 900);
        assert_eq!(speed.tokens_in(250), 640);
        step(&mut speed, Some(10), 0);
        assert_eq!(speed.tokens_in(50), 500, "no time counts as a microsecond");
        assert_eq!(speed.tokens_in(u64::MAX), ROW_TOKENS_MAX as usize);
    }
}
