//! What stands between the matrix products of a decoder layer, one pass each: RMS norm, SwiGLU, residual sum. All in f32.
//!
//! Each token is computed by itself and in a fixed order, so its bits do not depend on what else is in the batch.

use crate::isa::Isa;
use crate::lanes::{Kernel, LANES, Simd, run, silu};
use crate::rows::inverse_rms;

/// `out = x / sqrt(mean(x^2) + eps) * weight`, token by token.
///
/// `x`, `out`: `[tokens, hidden]`; `weight`: `[hidden]`.
///
/// # Panics
/// When the lengths do not fit.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f64, out: &mut [f32]) {
    assert!(!weight.is_empty() && x.len() == out.len() && x.len().is_multiple_of(weight.len()));
    run(isa, RmsNorm { x, weight, eps, out });
}

/// `out = silu(gate) * up`, token by token.
///
/// `gate_up`: `[tokens, 2 (gate, up), width]`; `out`: `[tokens, width]`.
///
/// # Panics
/// When the lengths do not fit.
pub fn swiglu(isa: Isa, gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert!(width > 0 && out.len().is_multiple_of(width) && gate_up.len() == 2 * out.len());
    run(isa, SwiGlu { gate_up, width, out });
}

/// `sum += x`.
///
/// # Panics
/// When the lengths differ.
pub fn add(sum: &mut [f32], x: &[f32]) {
    assert_eq!(sum.len(), x.len());
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f64,
    out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let hidden = self.weight.len();
        for (x, out) in self.x.chunks_exact(hidden).zip(self.out.chunks_exact_mut(hidden)) {
            let scale = inverse_rms(s, x, self.eps);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(self.weight) {
                *out = x * scale * weight;
            }
        }
    }
}

struct SwiGlu<'a> {
    gate_up: &'a [f32],
    width: usize,
    out: &'a mut [f32],
}

impl Kernel for SwiGlu<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (gate_up, out) in self.gate_up.chunks_exact(2 * self.width).zip(self.out.chunks_exact_mut(self.width)) {
            let (gate, up) = gate_up.split_at(self.width);
            for ((gate, up), out) in gate.chunks(LANES).zip(up.chunks(LANES)).zip(out.chunks_mut(LANES)) {
                let mut lanes = [[0.0; LANES]; 3];
                lanes[0][..gate.len()].copy_from_slice(gate);
                lanes[1][..up.len()].copy_from_slice(up);
                let value = s.mul(silu(s, s.load(&lanes[0])), s.load(&lanes[1]));
                s.store(value, &mut lanes[2]);
                out.copy_from_slice(&lanes[2][..out.len()]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.7).sin() * scale).collect()
    }

    #[test]
    fn rms_norm_is_the_formula() {
        for hidden in [5, 16, 64, 70] {
            let (x, weight) = (wave(3 * hidden, 4.0), wave(hidden, 2.0));
            for isa in Isa::available() {
                let mut out = vec![0.0; x.len()];
                rms_norm(isa, &x, &weight, 1e-5, &mut out);
                for (i, out) in out.iter().enumerate() {
                    let token = &x[i / hidden * hidden..][..hidden];
                    let mean = token.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / hidden as f64;
                    let want = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i % hidden]);
                    assert!((f64::from(*out) - want).abs() < 1e-5, "{isa:?} {hidden} [{i}]: {out} {want}");
                }
            }
        }
    }

    #[test]
    fn swiglu_is_the_formula() {
        for width in [3, 16, 37] {
            let gate_up = wave(2 * 2 * width, 30.0);
            for isa in Isa::available() {
                let mut out = vec![0.0; 2 * width];
                swiglu(isa, &gate_up, width, &mut out);
                for (i, out) in out.iter().enumerate() {
                    let at = i / width * 2 * width + i % width;
                    let (gate, up) = (f64::from(gate_up[at]), f64::from(gate_up[at + width]));
                    let want = gate / (1.0 + (-gate).exp()) * up;
                    assert!((f64::from(*out) - want).abs() <= 1e-6 * want.abs() + 1e-9, "{isa:?} {width} [{i}]: {out} {want}");
                }
            }
        }
        let (mut far, mut wrong) = ([1.0; 2], [0.0; 1]);
        swiglu(Isa::best(), &[1e30, -1e30, 1.0, 1.0], 2, &mut far);
        assert_eq!((far[0], far[1].abs() < 1e-6), (1e30, true));
        swiglu(Isa::best(), &[f32::NAN, 1.0], 1, &mut wrong);
        assert!(wrong[0].is_nan());
    }
}
