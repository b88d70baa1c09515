//! Rotary position embedding: what a model file says about it, and the frequencies that follow.
//!
//! Does not rotate anything. Formulas: transformers `modeling_rope_utils.py` (`default`, `llama3`, `yarn`); ggml's `rope_freqs` tensor.

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
    /// What becomes of them for contexts longer than those of the pre-training.
    pub scaling: Scaling,
}

/// What becomes of frequencies for contexts longer than those of the pre-training.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaling {
    /// Nothing.
    Plain,
    /// Llama 3.1's rule.
    Llama3(Llama3Scaling),
    /// YaRN (arXiv 2309.00071).
    Yarn(Yarn),
    /// Each is divided by its number of these, `[head_dim / 2]`: how a GGUF file carries Llama 3.1's rule, worked out by its writer.
    Factors(Vec<f32>),
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

/// YaRN: frequencies that turn less than `slow` times in the context of the pre-training are divided by `factor`, those that turn more than
/// `fast` times kept, those between blended by their index.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// Divisor of the slow frequencies.
    pub factor: f64,
    /// Turns from which on a frequency is kept.
    pub fast: f64,
    /// Turns up to which it is divided.
    pub slow: f64,
    /// Context length of the pre-training, in tokens.
    pub original_max: f64,
    /// Cosines and sines are multiplied by this.
    pub turn_scale: f64,
}

impl Rope {
    /// Radians that each pair of a head turns for one position, `[head_dim / 2]`, fastest first.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let plain = (0..head_dim / 2).map(|i| self.theta.powf(-2.0 * i as f64 / head_dim as f64));
        match &self.scaling {
            Scaling::Plain => plain.map(|f| f as f32).collect(),
            Scaling::Llama3(scaling) => plain.map(|f| scaling.apply(f) as f32).collect(),
            Scaling::Yarn(yarn) => {
                let range = yarn.blended(head_dim, self.theta);
                plain.enumerate().map(|(index, f)| yarn.apply(f, index, range) as f32).collect()
            }
            Scaling::Factors(factors) => plain.zip(factors).map(|(f, &by)| (f / f64::from(by)) as f32).collect(),
        }
    }

    /// What cosines and sines are multiplied by.
    pub fn turn_scale(&self) -> f32 {
        match &self.scaling {
            Scaling::Yarn(yarn) => yarn.turn_scale as f32,
            _ => 1.0,
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
        let all_sound = |fields: &[(&str, f64)]| match fields.iter().find(|(_, value)| !sound(*value)) {
            Some((field, value)) => bad(&format!("rope_scaling.{field}"), *value),
            None => Ok(()),
        };
        let above = |[high, low]: [(&str, f64); 2]| match high.1 > low.1 {
            true => Ok(()),
            false => {
                let reason = format!("{} is not above {} {}", high.1, low.0, low.1);
                Err(CheckpointError::malformed(file, format!("rope_scaling.{}", high.0), reason))
            }
        };
        match &self.scaling {
            Scaling::Plain => Ok(()),
            Scaling::Llama3(s) => {
                let [low, high] = [("low_freq_factor", s.low), ("high_freq_factor", s.high)];
                all_sound(&[("factor", s.factor), low, high, ("original_max_position_embeddings", s.original_max)])?;
                above([high, low])
            }
            Scaling::Yarn(y) => {
                let [slow, fast] = [("beta_slow", y.slow), ("beta_fast", y.fast)];
                all_sound(&[("factor", y.factor), slow, fast, ("original_max_position_embeddings", y.original_max)])?;
                all_sound(&[("attention_factor", y.turn_scale)])?;
                above([("rope_theta", self.theta), ("1", 1.0)])?; // its logarithm is a divisor
                above([fast, slow])
            }
            Scaling::Factors(factors) if factors.len() != head_dim / 2 => {
                let reason = format!("{} numbers, expected {}", factors.len(), head_dim / 2);
                Err(CheckpointError::malformed(file, "tensor rope_freqs.weight", reason))
            }
            Scaling::Factors(factors) => match factors.iter().find(|&&f| !sound(f64::from(f))) {
                Some(&factor) => bad("tensor rope_freqs.weight", f64::from(factor)),
                None => Ok(()),
            },
        }
    }
}

impl Yarn {
    /// `1 + 0.1 mscale ln(factor)`: how much sharper attention gets by the paper's rule.
    pub(crate) fn sharpening(factor: f64, mscale: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
    }

    /// The indices between which frequencies are blended.
    fn blended(&self, head_dim: usize, theta: f64) -> [f64; 2] {
        let index = |turns: f64| head_dim as f64 * (self.original_max / (turns * TAU)).ln() / (2.0 * theta.ln());
        let (first, last) = (index(self.fast).floor().max(0.0), index(self.slow).ceil().min(head_dim as f64 - 1.0));
        [first, if first == last { last + 0.001 } else { last }]
    }

    fn apply(&self, frequency: f64, index: usize, [first, last]: [f64; 2]) -> f64 {
        let divided_share = ((index as f64 - first) / (last - first)).clamp(0.0, 1.0);
        frequency / self.factor * divided_share + frequency * (1.0 - divided_share)
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
        let rope = Rope { theta: 10_000.0, scaling: Scaling::Plain };
        let f = rope.inverse_frequencies(8);
        assert_eq!(f, [1.0, 0.1, 0.01, 0.001]);
        let halved = Rope { scaling: Scaling::Factors(vec![1.0, 2.0, 4.0, 8.0]), ..rope };
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
        let at = |theta: f64, scaling: Scaling| Rope { theta, scaling };
        named(at(f64::NAN, Scaling::Plain), "rope_theta");
        named(at(0.0, Scaling::Plain), "rope_theta");
        named(at(1e4, Scaling::Llama3(scaling)), "high_freq_factor");
        named(at(1e4, Scaling::Llama3(Llama3Scaling { factor: 0.0, ..scaling })), "rope_scaling.factor");
        named(at(1e4, Scaling::Factors(vec![1.0; 3])), "rope_freqs");
        named(at(1e4, Scaling::Factors(vec![1.0, f32::NAN, 1.0, 1.0])), "rope_freqs");
        let yarn = Yarn { factor: 40.0, fast: 32.0, slow: 1.0, original_max: 4096.0, turn_scale: 1.0 };
        named(at(1e4, Scaling::Yarn(Yarn { factor: -1.0, ..yarn })), "rope_scaling.factor");
        named(at(1e4, Scaling::Yarn(Yarn { slow: 32.0, ..yarn })), "beta_fast");
        named(at(1.0, Scaling::Yarn(yarn)), "rope_theta");
    }

    /// DeepSeek-V2's settings; the indices by hand.
    #[test]
    fn yarn_keeps_fast_divides_slow_blends_between() {
        let yarn = Yarn { factor: 40.0, fast: 32.0, slow: 1.0, original_max: 4096.0, turn_scale: 1.0 };
        assert_eq!(yarn.blended(64, 1e4), [10.0, 23.0]);
        let frequencies = Rope { theta: 1e4, scaling: Scaling::Yarn(yarn) }.inverse_frequencies(64);
        let plain = Rope { theta: 1e4, scaling: Scaling::Plain }.inverse_frequencies(64);
        assert_eq!(frequencies[..11], plain[..11]);
        assert!(frequencies[23..].iter().zip(&plain[23..]).all(|(f, p)| (f * 40.0 / p - 1.0).abs() < 1e-6));
        let share = 5.0 / 13.0;
        assert!((frequencies[15] / plain[15] - (share / 40.0 + 1.0 - share)).abs() < 1e-6);
        assert!((Yarn::sharpening(40.0, 0.707) - 1.260_804).abs() < 1e-6);
    }
}
