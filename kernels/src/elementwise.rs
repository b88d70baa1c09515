//! What stands between the matrix products of a decoder layer, one pass each: norms, SwiGLU, GELU, residual sum. All in f32.
//!
//! Each token is computed by itself and in a fixed order, so its bits do not depend on what else is in the batch.

use crate::isa::Isa;
use crate::lanes::{Kernel, LANES, Simd, run, sigmoid, silu};
use crate::rows::{Norm, apply_norm};

/// `x = norm(x)`, token by token: `x / sqrt(mean(x^2) + eps) * weight`, and around it the mean and the bias where there is one.
///
/// `x`: `[tokens, hidden]`; `weight`, `bias`: `[hidden]`.
///
/// # Panics
/// When the lengths do not fit.
pub fn norm(isa: Isa, norm: Norm<'_>, x: &mut [f32]) {
    assert!(!norm.weight.is_empty() && norm.fits(norm.weight.len()) && x.len().is_multiple_of(norm.weight.len()));
    run(isa, Normed { norm, x });
}

/// `x = gelu(x)` by its tanh formula (Hendrycks, Gimpel 2016): `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
pub fn gelu(isa: Isa, x: &mut [f32]) {
    run(isa, Gelu { x });
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

struct Normed<'a> {
    norm: Norm<'a>,
    x: &'a mut [f32],
}

impl Kernel for Normed<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.x.chunks_exact_mut(self.norm.weight.len()) {
            apply_norm(s, self.norm, x);
        }
    }
}

struct Gelu<'a> {
    x: &'a mut [f32],
}

impl Kernel for Gelu<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let twice = 2.0 * (2.0 / std::f32::consts::PI).sqrt();
        for x in self.x.chunks_mut(LANES) {
            let mut lanes = [0.0; LANES];
            lanes[..x.len()].copy_from_slice(x);
            let value = s.load(&lanes);
            let cube = s.mul(s.mul(value, value), value);
            let inner = s.fma(cube, s.splat(0.044715), value);
            // (1 + tanh(u)) / 2 is the sigmoid of 2 u.
            s.store(s.mul(value, sigmoid(s, s.mul(inner, s.splat(twice)))), &mut lanes);
            x.copy_from_slice(&lanes[..x.len()]);
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
    fn norms_are_their_formulas() {
        for (hidden, layer) in [5, 16, 64, 70].into_iter().flat_map(|hidden| [(hidden, false), (hidden, true)]) {
            let x: Vec<f32> = wave(3 * hidden, 4.0).iter().map(|x| x + 1.5).collect();
            let (weight, bias) = (wave(hidden, 2.0), wave(hidden, 0.5));
            for isa in Isa::available() {
                let mut out = x.clone();
                norm(isa, Norm { weight: &weight, bias: layer.then_some(&bias), eps: 1e-5 }, &mut out);
                for (i, out) in out.iter().enumerate() {
                    let token = &x[i / hidden * hidden..][..hidden];
                    let mean = token.iter().map(|x| f64::from(*x)).sum::<f64>() / hidden as f64 * f64::from(u8::from(layer));
                    let square = token.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / hidden as f64;
                    let normed = (f64::from(x[i]) - mean) / (square + 1e-5).sqrt() * f64::from(weight[i % hidden]);
                    let want = normed + f64::from(bias[i % hidden]) * f64::from(u8::from(layer));
                    assert!((f64::from(*out) - want).abs() < 1e-5, "{isa:?} {hidden} [{i}]: {out} {want}");
                }
            }
        }
    }

    #[test]
    fn gelu_is_the_formula() {
        for isa in Isa::available() {
            let x: Vec<f32> = (-300..301).map(|i| i as f32 * 0.05).chain([1e30, -1e30, 0.0]).collect();
            let mut out = x.clone();
            gelu(isa, &mut out);
            for (x, out) in x.iter().zip(out) {
                let x = f64::from(*x);
                let want = 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh());
                assert!((f64::from(out) - want).abs() <= 2e-6 * want.abs().max(0.5), "{isa:?} {x}: {out} {want}");
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
