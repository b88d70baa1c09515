//! The lanes as plain arrays, for every machine.

use half::f16;

use super::{LANES, Simd};
use crate::convert::round;

/// Plain arrays, for every machine.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// `f` of each lane.
#[inline(always)]
pub(super) fn each(f: impl FnMut(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

/// The lanes folded in halves.
#[inline(always)]
pub(super) fn halve(mut x: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            x[i] = f(x[i], x[i + width]);
        }
        width /= 2;
    }
    x[0]
}

impl Simd for Portable {
    type V = [f32; LANES];
    type I = [u32; LANES];
    const ROWS: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::V {
        *from
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::V {
        from.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    fn load_bytes(self, from: &[u8; LANES]) -> Self::V {
        from.map(|byte| f32::from(byte as i8))
    }

    #[inline(always)]
    fn store(self, x: Self::V, to: &mut [f32; LANES]) {
        *to = x;
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn largest(self, x: Self::V) -> f32 {
        halve(x, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn sum(self, x: Self::V) -> f32 {
        halve(x, |a, b| a + b)
    }

    #[inline(always)]
    fn power_of_two(self, x: Self::V) -> Self::V {
        x.map(|x| f32::from_bits((x.to_bits() << 23).wrapping_add(127 << 23)))
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::V {
        from.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn words(self, from: &[u32; LANES]) -> Self::I {
        *from
    }

    #[inline(always)]
    fn no_words(self) -> Self::I {
        [0; LANES]
    }

    #[inline(always)]
    fn low_nibbles(self, x: Self::I) -> Self::I {
        x.map(|x| x & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn high_nibbles(self, x: Self::I) -> Self::I {
        x.map(|x| (x >> 4) & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn byte<const J: i32>(self, x: Self::I) -> Self::V {
        x.map(|x| ((x >> (8 * J)) & 0xff) as f32)
    }

    #[inline(always)]
    fn dot_bytes(self, sum: Self::I, w: Self::I, x: u32) -> Self::I {
        let x = x.to_le_bytes().map(|x| i32::from(x as i8));
        std::array::from_fn(|i| {
            let w = w[i].to_le_bytes().map(i32::from);
            sum[i].wrapping_add((w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3]) as u32)
        })
    }

    #[inline(always)]
    fn floats(self, x: Self::I) -> Self::V {
        x.map(|x| x as i32 as f32)
    }

    #[inline(always)]
    fn low_halves(self, x: Self::I) -> Self::V {
        x.map(|x| f32::from_bits(x << 16))
    }

    #[inline(always)]
    fn high_halves(self, x: Self::I) -> Self::V {
        x.map(|x| f32::from_bits(x & 0xffff_0000))
    }

    #[inline(always)]
    fn halves(self, low: Self::V, high: Self::V) -> Self::I {
        std::array::from_fn(|i| u32::from(round(low[i]).to_bits()) | u32::from(round(high[i]).to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(self, first: Self::V, second: Self::V) -> Self::I {
        std::array::from_fn(|i| {
            let from = if i < LANES / 2 { &first } else { &second };
            let [low, high] = [from[2 * i % LANES], from[(2 * i + 1) % LANES]];
            u32::from(round(low).to_bits()) | u32::from(round(high).to_bits()) << 16
        })
    }

    #[inline(always)]
    fn store_words(self, x: Self::I, to: &mut [u32; LANES]) {
        *to = x;
    }
}
