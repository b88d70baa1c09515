//! What a node has measured of itself, for the router: smoothed, in the units that [`Load`] names.

use super::Counts;
use crate::batch::Batch;
use crate::engine::Step;
use crate::message::Load;
use crate::route::pairs;

/// Weight of a new sample: the last ten or so count.
const WEIGHT: f64 = 0.2;
/// Weight of a new step in the prompt's curve, which needs steps of different lengths to be seen: the last thirty or so count.
const CURVE_WEIGHT: f64 = 0.06;
/// Steps whose attended contexts differ by less than this, in tokens (one standard deviation), say nothing about attention's share.
const CURVE_SPREAD_MIN: f64 = 32.0;
/// Prompt tokens that a step must have for its time to say something about prefill.
const PREFILL_SAMPLE_TOKENS: usize = 32;
/// Bytes that a stream must carry for its time to say something about the wire.
const SEND_SAMPLE_BYTES: u64 = 256 << 10;

#[derive(Debug, Default)]
struct Smoothed(Option<f64>);

impl Smoothed {
    fn add(&mut self, sample: f64) {
        self.0 = Some(self.0.map_or(sample, |old| old + WEIGHT * (sample - old)));
    }

    fn rounded(&self) -> u64 {
        self.0.unwrap_or(0.0) as u64
    }
}

/// The time of one prompt token as a line over the tokens before it: what is left at none, and what each adds. A weighted least squares
/// fit that forgets, neither part below 0.
#[derive(Debug, Default)]
struct Curve {
    steps: f64,
    mean_context: f64,
    mean_ns: f64,
    variance: f64,
    covariance: f64,
    /// The last slope that was well founded.
    ns_per_context: f64,
}

impl Curve {
    /// A step of `tokens` prompt tokens with `pairs` pairs.
    fn add(&mut self, tokens: f64, pairs: f64, elapsed_ns: f64) {
        let (context, ns) = (pairs / tokens, elapsed_ns / tokens);
        self.steps += 1.0;
        let weight = (1.0 / self.steps).max(CURVE_WEIGHT);
        let (off_context, off_ns) = (context - self.mean_context, ns - self.mean_ns);
        self.mean_context += weight * off_context;
        self.mean_ns += weight * off_ns;
        self.variance = (1.0 - weight) * (self.variance + weight * off_context * off_context);
        self.covariance = (1.0 - weight) * (self.covariance + weight * off_context * off_ns);
        if self.variance >= CURVE_SPREAD_MIN * CURVE_SPREAD_MIN {
            self.ns_per_context = (self.covariance / self.variance).max(0.0);
        }
        // never more than the whole: a token costs something by itself
        self.ns_per_context = self.ns_per_context.min(self.mean_ns / self.mean_context.max(1.0));
    }

    /// Nanoseconds a token; 0 only when nothing was measured.
    fn ns_per_token(&self) -> u64 {
        let alone = self.mean_ns - self.ns_per_context * self.mean_context;
        if self.steps == 0.0 { 0 } else { (alone as u64).max(1) }
    }

    fn ps_per_pair(&self) -> u64 {
        (self.ns_per_context * 1e3) as u64
    }
}

/// Smoothed measurements.
#[derive(Debug, Default)]
pub(super) struct Rates {
    prompts: Curve,
    decode_us: Smoothed,
    send_bytes: Smoothed,
    /// Prompt tokens, their pairs and decoding rows of the step in flight.
    step: (usize, u64, usize),
}

impl Rates {
    pub(super) fn begun(&mut self, step: &Step) {
        let prompts = || step.rows.iter().filter(|row| row.tokens.len() > 1);
        let tokens = prompts().map(|row| row.tokens.len()).sum();
        let pairs = prompts().map(|row| pairs(row.start.into(), row.end().into())).fold(0, u64::saturating_add);
        let decoding = step.rows.iter().filter(|row| row.tokens.len() == 1).count();
        self.step = (tokens, pairs, decoding);
    }

    pub(super) fn stepped(&mut self, elapsed_us: u64) {
        let (prompt, pairs, decoding) = self.step;
        if prompt >= PREFILL_SAMPLE_TOKENS {
            self.prompts.add(prompt as f64, pairs as f64, elapsed_us as f64 * 1e3);
        } else if prompt == 0 && decoding > 0 {
            self.decode_us.add(elapsed_us as f64);
        }
    }

    /// One stream of KV, from its opening until all was acknowledged.
    pub(super) fn sent(&mut self, bytes: u64, elapsed_us: u64) {
        if bytes >= SEND_SAMPLE_BYTES && elapsed_us > 0 {
            self.send_bytes.add(bytes as f64 * 1e6 / elapsed_us as f64);
        }
    }

    /// The load of a batch, with what was measured.
    pub(super) fn load(&self, batch: &Batch, counts: Counts) -> Load {
        Load {
            stale_frames: counts.stale_frames,
            resumes: counts.resumes,
            prefill_ns_per_token: self.prompts.ns_per_token(),
            prefill_ps_per_pair: self.prompts.ps_per_pair(),
            decode_step_us: self.decode_us.rounded(),
            send_bytes_per_s: self.send_bytes.rounded(),
            ..batch.load()
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::engine::Row;
    use crate::ids::{AttemptId, RequestId};

    fn step(start: u32, tokens: usize) -> Step {
        let attempt = AttemptId { request: RequestId(1), attempt: 0 };
        Step { rows: vec![Row { attempt, tokens: vec![1; tokens], start, table: vec![], sample: None }] }
    }

    /// Chunks of prompts that take 700 us a token and 1.2 us a pair, give or take a tenth.
    fn measured(steps: impl IntoIterator<Item = (u32, usize)>) -> Rates {
        let mut rates = Rates::default();
        for (i, (start, tokens)) in steps.into_iter().enumerate() {
            let pairs = pairs(start.into(), u64::from(start) + tokens as u64);
            let us = tokens as f64 * 700.0 + pairs as f64 * 1.2;
            rates.begun(&step(start, tokens));
            rates.stepped((us * if i % 2 == 0 { 0.95 } else { 1.05 }) as u64);
        }
        rates
    }

    #[test]
    fn the_curve_finds_both_parts() {
        let rates = measured((0..60).map(|i| (i % 7 * 256, 256)));
        let (ns, ps) = (rates.prompts.ns_per_token() as f64, rates.prompts.ps_per_pair() as f64);
        assert!((500e3..900e3).contains(&ns) && (0.9e6..1.5e6).contains(&ps), "{ns} {ps}");
        let whole_us = (2048.0 * ns + 2048.0 * 1024.0 * ps / 1e3) / 1e3;
        let true_us = 2048.0 * 700.0 + 2048.0 * 1024.0 * 1.2;
        assert!((whole_us / true_us - 1.0).abs() < 0.1, "{whole_us} for {true_us}");
    }

    #[test]
    fn prompts_of_one_length_say_nothing_about_attention() {
        let rates = measured([(0, 256); 20]);
        assert_eq!(rates.prompts.ps_per_pair(), 0);
        assert!((750_000..950_000).contains(&rates.prompts.ns_per_token()), "{}", rates.prompts.ns_per_token());
    }

    #[test]
    fn nothing_measured_is_nothing_known_and_a_decode_step_is_no_prompt() {
        let mut rates = Rates::default();
        assert_eq!((rates.prompts.ns_per_token(), rates.prompts.ps_per_pair()), (0, 0));
        rates.begun(&step(100, 1));
        rates.stepped(5_000);
        assert_eq!((rates.prompts.ns_per_token(), rates.decode_us.rounded()), (0, 5_000));
    }

    #[test]
    fn time_that_falls_with_the_context_is_not_extrapolated() {
        let mut rates = Rates::default();
        for start in 0..8 {
            rates.begun(&step(start * 256, 256));
            rates.stepped(500_000 - u64::from(start) * 50_000);
        }
        assert_eq!(rates.prompts.ps_per_pair(), 0);
        assert!(rates.prompts.ns_per_token() > 0);
    }
}
