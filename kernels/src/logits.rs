//! What sampling asks of a row of logits: the largest, and the sum of all exponentials. One pass each, no sort.

use crate::isa::Isa;
use crate::lanes::{Kernel, LANES, Simd, exp, run};

/// Logits whose exponentials are summed in f32 before they join the sum in f64.
const PIECE: usize = 1024;

/// Of a row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Index of the largest; of equal ones the lowest.
    pub best: usize,
    /// The largest.
    pub largest: f32,
    /// Sum of `e^(logit - largest)`, relative error below 1e-6.
    pub total: f64,
}

/// Looks at a row of logits. `None` when one is NaN or none is finite.
#[must_use]
pub fn summary(isa: Isa, logits: &[f32]) -> Option<Summary> {
    let mut out = None;
    run(isa, Look { logits, out: &mut out });
    out
}

struct Look<'a> {
    logits: &'a [f32],
    out: &'a mut Option<Summary>,
}

impl Kernel for Look<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (whole, tail) = self.logits.as_chunks::<LANES>();
        let mut lanes = s.splat(f32::NEG_INFINITY);
        for x in whole {
            lanes = s.max(lanes, s.load(x));
        }
        let largest = tail.iter().fold(s.largest(lanes), |max, &x| if x > max { x } else { max });
        if !largest.is_finite() {
            return;
        }
        let mut total = 0.0;
        for piece in self.logits.chunks(PIECE) {
            let (whole, tail) = piece.as_chunks::<LANES>();
            let (mut sum, mut last) = (s.splat(0.0), [f32::NEG_INFINITY; LANES]);
            last[..tail.len()].copy_from_slice(tail);
            let last = if tail.is_empty() { &[][..] } else { std::slice::from_ref(&last) };
            for x in whole.iter().chain(last) {
                sum = s.add(sum, exp(s, s.sub(s.load(x), s.splat(largest))));
            }
            total += f64::from(s.sum(sum));
        }
        // NaN was passed over by the search for the largest, not by the sum.
        if total.is_nan() {
            return;
        }
        let equal = |piece: &[f32]| piece.iter().fold(false, |found, &x| found | (x == largest));
        let piece = self.logits.chunks(PIECE).position(equal).unwrap_or(0) * PIECE;
        let within = self.logits[piece..].iter().position(|&x| x == largest).unwrap_or(0);
        *self.out = Some(Summary { best: piece + within, largest, total });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_and_the_sum() {
        for len in [1, 15, 16, 1023, 1024, 5000] {
            let mut logits: Vec<f32> = (0..len).map(|i| (i as f32 * 1.7).sin() * 9.0).collect();
            logits[len / 3] = 11.0;
            logits[len - 1] = 11.0;
            let want: f64 = logits.iter().map(|x| (f64::from(*x) - 11.0).exp()).sum();
            for isa in Isa::available() {
                let got = summary(isa, &logits).unwrap();
                assert_eq!((got.best, got.largest), (len / 3, 11.0), "{isa:?} {len}");
                assert!((got.total - want).abs() < 1e-6 * want, "{isa:?} {len}: {} {want}", got.total);
            }
        }
    }

    #[test]
    fn what_is_not_a_number_is_nothing() {
        for isa in Isa::available() {
            for len in [1, 16, 40] {
                assert_eq!(summary(isa, &vec![f32::NEG_INFINITY; len]), None);
                assert_eq!(summary(isa, &vec![f32::INFINITY; len]), None);
                for at in [0, len / 2, len - 1] {
                    let mut logits = vec![1.0; len];
                    logits[at] = f32::NAN;
                    assert_eq!(summary(isa, &logits), None, "{isa:?} {len} {at}");
                }
            }
            assert_eq!(summary(isa, &[]), None);
            assert_eq!(summary(isa, &[f32::NEG_INFINITY, 0.0]).map(|s| (s.best, s.total < 1.000_001)), Some((1, true)));
        }
    }
}
