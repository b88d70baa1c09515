//! Rotary position embedding: what a model file says about it, and the frequencies that follow.
//!
//! Does not rotate anything. Formulas: transformers `modeling_rope_utils.py` (`default` and `llama3`); ggml's `rope_freqs` tensor.

use crate::CheckpointError;
use std::f64::consts::TAU;
use std::path::Path;

/// Most that theta may be: the largest in use is 1e7 to 1e8.
pub const ROPE_THETA_MAX: f64 = 1e12;

/// Rotary settings. Call [`Rope::inverse_frequencies`]; the fields are for the fingerprint and for display.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Llama 3.1 scaling, from config.json.
    pub scaling: Option<Llama3Scaling>,
    /// Divisors of the frequencies, `[head_dim / 2]`: how a GGUF file carries the same scaling, worked out by its writer.
    pub factors: Option<Vec<f32>>,
}

/// Llama 3.1: slow frequencies are divided by `factor`, fast ones kept, those between blended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// Divisor of the slow frequencies.
    pub factor: f64,
    /// `original_max / low` is the wavelength, in positions, above which a frequency counts as slow.
    pub low: f64,
    /// `original_max / high` is the wavelength below which it counts as fast.
    pub high: f64,
    /// Context length of the pre-training, in tokens.
    pub original_max: f64,
}

impl Rope {
    /// Radians that each pair of a head turns for one position, `[head_dim / 2]`, fastest first.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let plain = (0..head_dim / 2).map(|i| self.theta.powf(-2.0 * i as f64 / head_dim as f64));
        match (&self.scaling, &self.factors) {
            (Some(scaling), _) => plain.map(|f| scaling.apply(f) as f32).collect(),
            (None, Some(factors)) => plain.zip(factors).map(|(f, &by)| (f / f64::from(by)) as f32).collect(),
            (None, None) => plain.map(|f| f as f32).collect(),
        }
    }

    /// Refuses numbers that would turn every position into NaN.
    pub(crate) fn validate(&self, file: &Path, head_dim: usize) -> Result<(), CheckpointError> {
        let bad = |field: &str, value: f64| {
            let reason = format!("{value} is not a number above 0 and at most {ROPE_THETA_MAX}");
            Err(CheckpointError::malformed(file, field, reason))
        };
        let sound = |x: f64| x.is_finite() && x > 0.0 && x <= ROPE_THETA_MAX;
        if !sound(self.theta) {
            return bad("rope_theta", self.theta);
        }
        if let Some(s) = self.scaling {
            let fields = [("factor", s.factor), ("low_freq_factor", s.low), ("high_freq_factor", s.high)];
            for (field, value) in fields.into_iter().chain([("original_max_position_embeddings", s.original_max)]) {
                if !sound(value) {
                    return bad(&format!("rope_scaling.{field}"), value);
                }
            }
            if s.high <= s.low {
                let reason = format!("{} is not above low_freq_factor {}", s.high, s.low);
                return Err(CheckpointError::malformed(file, "rope_scaling.high_freq_factor", reason));
            }
        }
        let Some(factors) = &self.factors else { return Ok(()) };
        if factors.len() != head_dim / 2 {
            let reason = format!("{} numbers, expected {}", factors.len(), head_dim / 2);
            return Err(CheckpointError::malformed(file, "tensor rope_freqs.weight", reason));
        }
        factors.iter().find(|&&f| !sound(f64::from(f))).map_or(Ok(()), |&f| bad("tensor rope_freqs.weight", f64::from(f)))
    }
}

impl Llama3Scaling {
    fn apply(&self, frequency: f64) -> f64 {
        let wavelength = TAU / frequency;
        if wavelength > self.original_max / self.low {
            frequency / self.factor
        } else if wavelength < self.original_max / self.high {
            frequency
        } else {
            let fast_share = (self.original_max / wavelength - self.low) / (self.high - self.low);
            (1.0 - fast_share) * frequency / self.factor + fast_share * frequency
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_frequencies() {
        let rope = Rope { theta: 10_000.0, scaling: None, factors: None };
        let f = rope.inverse_frequencies(8);
        assert_eq!(f, [1.0, 0.1, 0.01, 0.001]);
        let halved = Rope { factors: Some(vec![1.0, 2.0, 4.0, 8.0]), ..rope };
        assert_eq!(halved.inverse_frequencies(8), [1.0, 0.05, 0.0025, 0.000125]);
    }

    #[test]
    fn llama3_keeps_fast_divides_slow_blends_between() {
        let s = Llama3Scaling { factor: 8.0, low: 1.0, high: 4.0, original_max: 128.0 };
        assert_eq!(s.apply(1.0), 1.0); // wavelength 6.3 < 32
        assert_eq!(s.apply(0.01), 0.00125); // wavelength 628 > 128
        let between = TAU / 64.0; // share (128 / 64 - 1) / 3 = 1/3
        let expected = between * (2.0 / 3.0 / 8.0 + 1.0 / 3.0);
        assert!((s.apply(between) - expected).abs() < 1e-12);
    }

    #[test]
    fn absurd_numbers_are_named() {
        let file = Path::new("m/config.json");
        let scaling = Llama3Scaling { factor: 8.0, low: 4.0, high: 1.0, original_max: 128.0 };
        let named = |rope: Rope, field: &str| {
            let message = rope.validate(file, 8).unwrap_err().to_string();
            assert!(message.contains(field) && message.contains("m/config.json"), "{message}");
        };
        named(Rope { theta: f64::NAN, scaling: None, factors: None }, "rope_theta");
        named(Rope { theta: 0.0, scaling: None, factors: None }, "rope_theta");
        named(Rope { theta: 1e4, scaling: Some(scaling), factors: None }, "high_freq_factor");
        let zero = Llama3Scaling { factor: 0.0, ..scaling };
        named(Rope { theta: 1e4, scaling: Some(zero), factors: None }, "rope_scaling.factor");
        named(Rope { theta: 1e4, scaling: None, factors: Some(vec![1.0; 3]) }, "rope_freqs");
        named(Rope { theta: 1e4, scaling: None, factors: Some(vec![1.0, f32::NAN, 1.0, 1.0]) }, "rope_freqs");
    }
}
