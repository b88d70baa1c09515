//! What a node has measured of itself, for the router: smoothed, in the units that [`Load`](millrace_core::message::Load) names.

use millrace_core::engine::Step;

/// Weight of a new sample: the last ten or so count.
const WEIGHT: f64 = 0.2;
/// Prompt tokens that a step must have for its time to say something about prefill.
const PREFILL_SAMPLE_TOKENS: usize = 32;
/// Bytes that a stream must carry for its time to say something about the wire.
const SEND_SAMPLE_BYTES: u64 = 256 << 10;

#[derive(Default)]
struct Smoothed(Option<f64>);

impl Smoothed {
    fn add(&mut self, sample: f64) {
        self.0 = Some(self.0.map_or(sample, |old| old + WEIGHT * (sample - old)));
    }

    fn rounded(&self) -> u64 {
        self.0.unwrap_or(0.0) as u64
    }
}

/// Smoothed measurements.
#[derive(Default)]
pub(super) struct Rates {
    prefill_ns: Smoothed,
    decode_us: Smoothed,
    send_bytes: Smoothed,
    /// Prompt tokens and decoding rows of the step in flight.
    step: (usize, usize),
}

impl Rates {
    pub(super) fn begun(&mut self, step: &Step) {
        let prompt = step.rows.iter().map(|row| row.tokens.len()).filter(|tokens| *tokens > 1).sum();
        let decoding = step.rows.iter().filter(|row| row.tokens.len() == 1).count();
        self.step = (prompt, decoding);
    }

    pub(super) fn stepped(&mut self, elapsed_us: u64) {
        let (prompt, decoding) = self.step;
        if prompt >= PREFILL_SAMPLE_TOKENS {
            self.prefill_ns.add(elapsed_us as f64 * 1e3 / prompt as f64);
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

    pub(super) fn prefill_ns_per_token(&self) -> u64 {
        self.prefill_ns.rounded()
    }

    pub(super) fn decode_step_us(&self) -> u64 {
        self.decode_us.rounded()
    }

    pub(super) fn send_bytes_per_s(&self) -> u64 {
        self.send_bytes.rounded()
    }
}
