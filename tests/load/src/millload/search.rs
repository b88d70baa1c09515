//! Finds the highest rate at which enough requests meet their objective: doubling until a rate fails, then halving the bracket. Decides which
//! rate is next; measuring it is the caller's.

use serde::{Deserialize, Serialize};

use super::summary::{Summary, Validity};

/// What one rate gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Requests a second that were due.
    pub rate: f64,
    /// Requests that count.
    pub n: u64,
    /// Share of them that met their objective.
    pub share: f64,
    /// Its 95 % interval.
    pub interval: (f64, f64),
    /// Good requests a second.
    pub goodput_per_s: f64,
    /// Tokens of answers a second.
    pub output_tokens_per_s: f64,
    /// Median (of few: mean) time to the first token, milliseconds.
    pub ttft_ms: f64,
    /// Median (of few: mean) time per token, milliseconds.
    pub tpot_ms: f64,
    /// The generator kept its times.
    pub valid: bool,
}

impl Point {
    /// From the figures of a run at `rate`.
    #[must_use]
    pub fn of(rate: f64, summary: &Summary) -> Self {
        let (good, n) = summary.goodput.iter().fold((0, 0), |(good, n), g| (good + g.good, n + g.n));
        let time = |name: &str| summary.times.get(name).map_or(f64::NAN, |dist| dist.p50().unwrap_or(dist.mean));
        Self {
            rate,
            n,
            share: if n == 0 { 0.0 } else { good as f64 / n as f64 },
            interval: super::figures::wilson(good, n),
            goodput_per_s: summary.goodput.iter().map(|g| g.per_s).sum(),
            output_tokens_per_s: summary.output_tokens_per_s,
            ttft_ms: time("ttft"),
            tpot_ms: time("tpot"),
            valid: summary.validity == Validity::Valid,
        }
    }
}

/// A search under way.
#[derive(Clone, Debug)]
pub struct Search {
    target: f64,
    rate_max: f64,
    steps_left: u32,
    passed: f64,
    failed: Option<f64>,
    next: Option<f64>,
}

impl Search {
    /// From a rate, for an attainment, up to a rate, with so many measurements at most.
    #[must_use]
    pub fn new(from: f64, target: f64, rate_max: f64, steps: u32) -> Self {
        Self { target, rate_max, steps_left: steps, passed: 0.0, failed: None, next: (steps > 0).then_some(from.min(rate_max)) }
    }

    /// The rate to measure next; `None` when the search is over.
    #[must_use]
    pub fn next(&self) -> Option<f64> {
        self.next
    }

    /// Takes what the rate gave.
    pub fn found(&mut self, point: &Point) {
        self.steps_left = self.steps_left.saturating_sub(1);
        if point.share >= self.target {
            self.passed = self.passed.max(point.rate);
        } else {
            self.failed = Some(self.failed.map_or(point.rate, |failed| failed.min(point.rate)));
        }
        let close = self.failed.is_some_and(|failed| failed - self.passed < 0.03 * failed);
        let next = match self.failed {
            None if self.passed >= self.rate_max => None,
            None => Some((self.passed * 2.0).min(self.rate_max)),
            Some(failed) => Some((self.passed + failed) / 2.0),
        };
        self.next = next.filter(|_| self.steps_left > 0 && !close);
    }

    /// The highest rate that passed, and the lowest that failed.
    #[must_use]
    pub fn bracket(&self) -> (f64, Option<f64>) {
        (self.passed, self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(rate: f64, share: f64) -> Point {
        let interval = (share, share);
        Point {
            rate,
            n: 100,
            share,
            interval,
            goodput_per_s: 0.0,
            output_tokens_per_s: 0.0,
            ttft_ms: 1.0,
            tpot_ms: 1.0,
            valid: true,
        }
    }

    fn search(limit: f64, from: f64, steps: u32) -> (f64, Option<f64>, u32) {
        let (mut search, mut measured) = (Search::new(from, 0.9, 1000.0, steps), 0);
        while let Some(rate) = search.next() {
            measured += 1;
            search.found(&point(rate, if rate <= limit { 0.97 } else { 0.5 }));
        }
        let (passed, failed) = search.bracket();
        (passed, failed, measured)
    }

    #[test]
    fn the_limit_is_bracketed() {
        for limit in [0.3, 1.0, 7.3, 63.0, 900.0] {
            let (passed, failed, measured) = search(limit, 2.0, 20);
            let failed = failed.unwrap();
            assert!(passed <= limit && limit < failed && failed - passed < 0.03 * failed, "{limit}: {passed}..{failed}");
            assert!(measured <= 16, "{limit}: {measured} measurements");
        }
    }

    #[test]
    fn a_search_ends() {
        assert_eq!(search(1e9, 600.0, 20), (1000.0, None, 2));
        assert_eq!(search(5.0, 2.0, 2), (4.0, None, 2));
        assert_eq!(search(5.0, 2.0, 0), (0.0, None, 0));
        let (passed, _, measured) = search(0.0, 2.0, 8);
        assert_eq!((passed, measured), (0.0, 8));
    }
}
