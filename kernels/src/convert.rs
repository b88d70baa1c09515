//! Floats to bfloat16 and back, over slices. Rounds to nearest, ties to even, as LibTorch does.

use half::bf16;

use crate::isa::Isa;
use crate::lanes::{Kernel, Simd, run};

/// `out[i] = bf16(values[i])`.
///
/// # Panics
/// When the lengths differ.
pub fn to_bf16(values: &[f32], out: &mut [bf16]) {
    assert_eq!(values.len(), out.len());
    run(Isa::best(), Placed { values, out });
}

/// `values` rounded to bfloat16.
#[must_use]
pub fn rounded(values: &[f32]) -> Vec<bf16> {
    let mut out = Vec::new();
    run(Isa::best(), Rounded { values, out: &mut out });
    out
}

/// `values` in single precision, exactly.
#[must_use]
pub fn widened(values: &[bf16]) -> Vec<f32> {
    let mut out = Vec::new();
    run(Isa::best(), Widened { values, out: &mut out });
    out
}

struct Placed<'a> {
    values: &'a [f32],
    out: &'a mut [bf16],
}

struct Rounded<'a> {
    values: &'a [f32],
    out: &'a mut Vec<bf16>,
}

struct Widened<'a> {
    values: &'a [bf16],
    out: &'a mut Vec<f32>,
}

/// Plain code: all that is wanted of the instruction set is the width of its integer vectors.
impl Kernel for Placed<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        self.values.iter().zip(self.out).for_each(|(value, out)| *out = round(*value));
    }
}

/// As above.
impl Kernel for Rounded<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        self.out.extend(self.values.iter().map(|value| round(*value)));
    }
}

/// As above.
impl Kernel for Widened<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        self.out.extend(self.values.iter().map(|value| f32::from_bits(u32::from(value.to_bits()) << 16)));
    }
}

#[inline(always)]
pub(crate) fn round(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    bf16::from_bits(if value.is_nan() { quiet_nan } else { rounded } as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_as_half_does() {
        let values: Vec<f32> = (0..=u16::MAX)
            .flat_map(|high| [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(u32::from(high) << 16 | low)))
            .collect();
        let out = rounded(&values);
        for (value, out) in values.iter().zip(&out) {
            assert_eq!(out.to_bits(), bf16::from_f32(*value).to_bits(), "{:08x}", value.to_bits());
        }
        assert!(out.iter().zip(&widened(&out)).all(|(a, b)| a.to_f32().to_bits() == b.to_bits()));
        let mut again = vec![bf16::ZERO; values.len()];
        to_bf16(&values, &mut again);
        assert!(out.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}
