//! Sixteen floats at a time, in the registers of three instruction sets.
//!
//! A value of a type that implements [`Simd`] proves that this machine runs its instructions, so the methods are safe. They are
//! `inline(always)`: they must end up in a function that is compiled for the set ([`run`]), else they are slow calls.
#![allow(unsafe_code)]

use crate::isa::Isa;

/// Floats handled together: one AVX-512 register, two of AVX2.
pub(crate) const LANES: usize = 16;

/// An instruction set, as an empty value that proves its presence.
pub(crate) trait Simd: Copy {
    /// [`LANES`] floats in registers.
    type V: Copy;
    /// The same float in each lane.
    fn splat(self, x: f32) -> Self::V;
    /// Floats from memory.
    fn load(self, from: &[f32; LANES]) -> Self::V;
    /// Bits of bfloat16 from memory, widened.
    fn load_bf16(self, from: &[u16; LANES]) -> Self::V;
    /// Floats to memory.
    fn store(self, x: Self::V, to: &mut [f32; LANES]);
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`; rounded once where the set can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The largest lane.
    fn largest(self, x: Self::V) -> f32;
    /// The sum of the lanes, in an order that is fixed for each set.
    fn sum(self, x: Self::V) -> f32;
    /// `2^n`, where `x` is `n + 1.5 * 2^23` with a whole `n` in -126..=127.
    fn power_of_two(self, x: Self::V) -> Self::V;
}

/// Work that is compiled once for each instruction set.
pub(crate) trait Kernel {
    /// Does it. Implementations are `inline(always)`.
    fn run<S: Simd>(self, s: S);
}

/// Runs `kernel` on `isa`, or on the portable target where the machine lacks it.
#[cfg(target_arch = "x86_64")]
pub(crate) fn run<K: Kernel>(isa: Isa, kernel: K) {
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    fn avx512<K: Kernel>(s: Avx512, kernel: K) {
        kernel.run(s);
    }
    #[target_feature(enable = "avx2,fma")]
    fn avx2<K: Kernel>(s: Avx2, kernel: K) {
        kernel.run(s);
    }
    match (isa, Avx512::new(), Avx2::new()) {
        // SAFETY: the token proves all of the features that the function is compiled for; it has no other demand.
        (Isa::Avx512, Some(s), _) => unsafe { avx512(s, kernel) },
        // SAFETY: as above.
        (Isa::Avx2, _, Some(s)) => unsafe { avx2(s, kernel) },
        _ => kernel.run(Portable),
    }
}

/// Runs `kernel`.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn run<K: Kernel>(_isa: Isa, kernel: K) {
    kernel.run(Portable);
}

/// `e^x` for `x <= 0`, relative error below 3e-7; `e^-87`, about 1.6e-38, for all that is smaller. NaN stays NaN.
/// Cody and Waite's reduction by ln 2 in two parts, then the polynomial of Cephes `expf`.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let round = s.splat(12_582_912.0); // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    let clamped = s.max(s.splat(-87.0), x);
    let shifted = s.fma(clamped, s.splat(std::f32::consts::LOG2_E), round);
    let whole = s.sub(shifted, round);
    let rest = s.fma(whole, s.splat(2.121_944_4e-4), s.fma(whole, s.splat(-0.693_359_4), clamped));
    let mut poly = s.splat(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        poly = s.fma(poly, rest, s.splat(coefficient));
    }
    let value = s.fma(poly, s.mul(rest, rest), s.add(rest, s.splat(1.0)));
    s.mul(value, s.power_of_two(shifted))
}

/// Plain arrays, for every machine.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// `f` of each lane.
#[inline(always)]
fn each(f: impl FnMut(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

/// The lanes folded in halves.
#[inline(always)]
fn halve(mut x: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
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
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

/// The vector types. Every `unsafe` block below calls an intrinsic whose features the token proves; `load` and `store` touch exactly
/// the array behind their reference, unaligned.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Simd};
    use crate::isa::Isa;
    use std::arch::x86_64::*;

    /// AVX2 and FMA are there. Made only by [`Avx2::new`].
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(());

    /// The AVX-512 parts of [`Isa::Avx512`] are there. Made only by [`Avx512::new`].
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(());

    impl Avx2 {
        pub(crate) fn new() -> Option<Self> {
            Isa::Avx2.is_available().then_some(Self(()))
        }
    }

    impl Avx512 {
        pub(crate) fn new() -> Option<Self> {
            Isa::Avx512.is_available().then_some(Self(()))
        }
    }

    /// Implements the lane-wise methods: each is one intrinsic, named by the last pattern.
    macro_rules! avx512 {
        ($($name:ident($($arg:ident),+) = $intrinsic:ident;)+) => {$(
            #[inline(always)]
            fn $name(self, $($arg: Self::V),+) -> Self::V {
                // SAFETY: `self` proves AVX-512.
                unsafe { $intrinsic($($arg),+) }
            }
        )+};
    }

    impl Simd for Avx512 {
        type V = __m512;

        avx512! {
            add(a, b) = _mm512_add_ps;
            sub(a, b) = _mm512_sub_ps;
            mul(a, b) = _mm512_mul_ps;
            div(a, b) = _mm512_div_ps;
            fma(a, b, c) = _mm512_fmadd_ps;
            max(a, b) = _mm512_max_ps;
        }

        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_set1_ps(x) }
        }

        #[inline(always)]
        fn load(self, from: &[f32; LANES]) -> __m512 {
            // SAFETY: `self` proves AVX-512; 64 bytes are read from an array of 16 floats.
            unsafe { _mm512_loadu_ps(from.as_ptr()) }
        }

        #[inline(always)]
        fn load_bf16(self, from: &[u16; LANES]) -> __m512 {
            // SAFETY: `self` proves AVX-512; 32 bytes are read from an array of 16 halves.
            unsafe {
                let bits = _mm256_loadu_si256(from.as_ptr().cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
            }
        }

        #[inline(always)]
        fn store(self, x: __m512, to: &mut [f32; LANES]) {
            // SAFETY: `self` proves AVX-512; 64 bytes are written to an array of 16 floats.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
        }

        #[inline(always)]
        fn largest(self, x: __m512) -> f32 {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_reduce_max_ps(x) }
        }

        #[inline(always)]
        fn sum(self, x: __m512) -> f32 {
            // SAFETY: `self` proves AVX-512.
            unsafe { _mm512_reduce_add_ps(x) }
        }

        #[inline(always)]
        fn power_of_two(self, x: __m512) -> __m512 {
            // SAFETY: `self` proves AVX-512.
            unsafe {
                let bits = _mm512_slli_epi32::<23>(_mm512_castps_si512(x));
                _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(127 << 23)))
            }
        }
    }

    /// As `avx512!`, on two registers of eight lanes.
    macro_rules! avx2 {
        ($($name:ident($($arg:ident),+) = $intrinsic:ident;)+) => {$(
            #[inline(always)]
            fn $name(self, $($arg: Self::V),+) -> Self::V {
                // SAFETY: `self` proves AVX2 and FMA.
                unsafe { [$intrinsic($($arg[0]),+), $intrinsic($($arg[1]),+)] }
            }
        )+};
    }

    /// The four lanes of each half and pair folded by `f`.
    #[inline(always)]
    fn fold(x: [__m256; 2], f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut lanes = [0.0; LANES];
        Simd::store(Avx2(()), x, &mut lanes);
        super::halve(lanes, f)
    }

    impl Simd for Avx2 {
        type V = [__m256; 2];

        avx2! {
            add(a, b) = _mm256_add_ps;
            sub(a, b) = _mm256_sub_ps;
            mul(a, b) = _mm256_mul_ps;
            div(a, b) = _mm256_div_ps;
            fma(a, b, c) = _mm256_fmadd_ps;
            max(a, b) = _mm256_max_ps;
        }

        #[inline(always)]
        fn splat(self, x: f32) -> Self::V {
            // SAFETY: `self` proves AVX2.
            unsafe { [_mm256_set1_ps(x); 2] }
        }

        #[inline(always)]
        fn load(self, from: &[f32; LANES]) -> Self::V {
            // SAFETY: `self` proves AVX2; twice 32 bytes are read from an array of 16 floats.
            unsafe { [_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from[8..].as_ptr())] }
        }

        #[inline(always)]
        fn load_bf16(self, from: &[u16; LANES]) -> Self::V {
            // SAFETY: `self` proves AVX2; twice 16 bytes are read from an array of 16 halves.
            unsafe {
                let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast()));
                let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from[8..].as_ptr().cast()));
                [low, high].map(|bits| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)))
            }
        }

        #[inline(always)]
        fn store(self, x: Self::V, to: &mut [f32; LANES]) {
            // SAFETY: `self` proves AVX2; twice 32 bytes are written to an array of 16 floats.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), x[0]);
                _mm256_storeu_ps(to[8..].as_mut_ptr(), x[1]);
            }
        }

        #[inline(always)]
        fn largest(self, x: Self::V) -> f32 {
            fold(x, |a, b| if a > b { a } else { b })
        }

        #[inline(always)]
        fn sum(self, x: Self::V) -> f32 {
            fold(x, |a, b| a + b)
        }

        #[inline(always)]
        fn power_of_two(self, x: Self::V) -> Self::V {
            // SAFETY: `self` proves AVX2.
            x.map(|x| unsafe {
                let bits = _mm256_slli_epi32::<23>(_mm256_castps_si256(x));
                _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(127 << 23)))
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exp_is_close<S: Simd>(s: S) {
        for i in 0..12_000u16 {
            let x: [f32; LANES] = each(|lane| -f32::from(i) * 0.007 - lane as f32 * 4e-4);
            let mut got = [0.0; LANES];
            s.store(exp(s, s.load(&x)), &mut got);
            for (got, x) in got.iter().zip(x) {
                let want = f64::from(x).exp();
                assert!((f64::from(*got) - want).abs() <= 3e-7 * want, "exp({x}) = {got}, not {want}");
            }
        }
        for (x, low, high) in [(0.0, 1.0, 1.0), (f32::NEG_INFINITY, 0.0, 2e-38), (-1e9, 0.0, 2e-38)] {
            let got = s.largest(exp(s, s.splat(x)));
            assert!((low..=high).contains(&got), "exp({x}) = {got}");
        }
        assert!(s.sum(exp(s, s.splat(f32::NAN))).is_nan());
    }

    fn lanes_are_all_there<S: Simd>(s: S) {
        let powers = s.load(&each(|i| (1u32 << i) as f32));
        assert_eq!((s.sum(powers), s.largest(powers)), (65_535.0, 32_768.0));
        let halves: [u16; LANES] = std::array::from_fn(|i| (((1u32 << i) as f32).to_bits() >> 16) as u16);
        assert_eq!(s.sum(s.sub(s.load_bf16(&halves), powers)), 0.0);
    }

    #[test]
    fn every_instruction_set() {
        exp_is_close(Portable);
        lanes_are_all_there(Portable);
        #[cfg(target_arch = "x86_64")]
        {
            Avx2::new().into_iter().for_each(|s| (exp_is_close(s), lanes_are_all_there(s)).1);
            Avx512::new().into_iter().for_each(|s| (exp_is_close(s), lanes_are_all_there(s)).1);
        }
    }
}
