//! The rotary turn of queries and keys, half-split as Hugging Face stores Llama: element `i` turns with element `i + head_dim / 2`.
//! Which angles (base, scaling) is the model's business; they come in as cosines and sines.

use crate::isa::Isa;
use crate::lanes::{Kernel, Simd, run};

/// Turns each head of one token in place.
///
/// `heads`: `[n, head_dim]`; `cos`, `sin`: `[head_dim / 2]`, of that token's position.
///
/// # Panics
/// When the lengths do not fit.
pub fn rotate(isa: Isa, heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    assert_eq!(sin.len(), half);
    assert!(half > 0 && heads.len().is_multiple_of(2 * half));
    run(isa, Rotate { heads, cos, sin });
}

struct Rotate<'a> {
    heads: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for Rotate<'_> {
    /// Plain code: all that is wanted of the instruction set is the width of its vectors.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { heads, cos, sin } = self;
        for head in heads.chunks_exact_mut(2 * cos.len()) {
            let (low, high) = head.split_at_mut(cos.len());
            for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let (a, b) = (*low, *high);
                *low = a * cos - b * sin;
                *high = b * cos + a * sin;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_pairs_and_keeps_length() {
        let mut heads = vec![1.0, 2.0, 3.0, 4.0, -1.0, 0.0, 0.5, 0.0];
        let angles = [0.3f32, 1.1];
        rotate(Isa::best(), &mut heads, &angles.map(f32::cos), &angles.map(f32::sin));
        for (head, before) in heads.chunks(4).zip([[1.0f32, 2.0, 3.0, 4.0], [-1.0, 0.0, 0.5, 0.0]]) {
            for i in 0..2 {
                let turn = head[i + 2].atan2(head[i]) - before[i + 2].atan2(before[i]);
                let length = head[i].hypot(head[i + 2]) - before[i].hypot(before[i + 2]);
                assert!(length.abs() < 1e-6);
                assert!(before[i].hypot(before[i + 2]) == 0.0 || ((turn - angles[i]).sin().abs() < 1e-6));
            }
        }
    }
}
