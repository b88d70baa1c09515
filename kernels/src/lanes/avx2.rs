//! The lanes in two registers of AVX2. Every `unsafe` block below calls an intrinsic whose features the token proves; `load` and
//! `store` touch exactly the array behind their reference, unaligned.

use super::{LANES, Simd};
use crate::isa::Isa;
use std::arch::x86_64::*;

/// AVX2, FMA and F16C are there; with `DOT` AVX-VNNI too. Made only by [`Avx2::new`].
#[derive(Clone, Copy)]
pub(crate) struct Avx2<const DOT: bool>(());

impl<const DOT: bool> Avx2<DOT> {
    pub(crate) fn new() -> Option<Self> {
        let isa = if DOT { Isa::Avx2Dot } else { Isa::Avx2 };
        isa.is_available().then_some(Self(()))
    }
}

/// `$f` of both of two registers, each by the name of the pair. A macro and not `map`: a closure that is not inlined is not compiled for the
/// instruction set, and makes each of its instructions a call.
macro_rules! both {
    ($pair:ident => $f:expr) => {{
        let [first, second] = $pair;
        let $pair = first;
        let first = $f;
        let $pair = second;
        [first, $f]
    }};
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

/// Rounded to the nearest bfloat16, which stands in the upper halves of the words.
#[inline]
#[target_feature(enable = "avx2")]
fn rounded(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
    _mm256_blendv_epi8(nearest, quiet, nan)
}

/// Words whose halves are `low` and `high` rounded.
#[inline]
#[target_feature(enable = "avx2")]
fn joined(low: __m256, high: __m256) -> __m256i {
    _mm256_blend_epi16::<0b1010_1010>(_mm256_srli_epi32::<16>(rounded(low)), rounded(high))
}

/// Sixteen lanes as halves, in order.
#[inline]
#[target_feature(enable = "avx2")]
fn packed(x: [__m256; 2]) -> __m256i {
    let low = _mm256_srli_epi32::<16>(rounded(x[0]));
    let high = _mm256_srli_epi32::<16>(rounded(x[1]));
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high))
}

/// The lanes folded in halves by `f`.
#[inline(always)]
fn fold<const DOT: bool>(s: Avx2<DOT>, x: [__m256; 2], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(x, &mut lanes);
    super::halve(lanes, f)
}

impl<const DOT: bool> Simd for Avx2<DOT> {
    type V = [__m256; 2];
    type I = [__m256i; 2];
    const ROWS: usize = 2;

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
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high))]
        }
    }

    #[inline(always)]
    fn load_bytes(self, from: &[u8; LANES]) -> Self::V {
        // SAFETY: `self` proves AVX2; twice 8 bytes are read from an array of 16.
        unsafe {
            let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.as_ptr().cast()));
            let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from[8..].as_ptr().cast()));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
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
        fold(self, x, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn sum(self, x: Self::V) -> f32 {
        fold(self, x, |a, b| a + b)
    }

    #[inline(always)]
    fn power_of_two(self, x: Self::V) -> Self::V {
        // SAFETY: `self` proves AVX2.
        unsafe {
            both!(x => {
                let bits = _mm256_slli_epi32::<23>(_mm256_castps_si256(x));
                _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(127 << 23)))
            })
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::V {
        // SAFETY: `self` proves AVX2 and F16C; twice 16 bytes are read from an array of 16 halves.
        unsafe {
            let (low, high) = (_mm_loadu_si128(from.as_ptr().cast()), _mm_loadu_si128(from[8..].as_ptr().cast()));
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }

    #[inline(always)]
    fn words(self, from: &[u32; LANES]) -> Self::I {
        // SAFETY: `self` proves AVX2; twice 32 bytes are read from an array of 16 words.
        unsafe { [_mm256_loadu_si256(from.as_ptr().cast()), _mm256_loadu_si256(from[8..].as_ptr().cast())] }
    }

    #[inline(always)]
    fn no_words(self) -> Self::I {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    fn low_nibbles(self, x: Self::I) -> Self::I {
        // SAFETY: `self` proves AVX2.
        unsafe { both!(x => _mm256_and_si256(x, _mm256_set1_epi8(15))) }
    }

    #[inline(always)]
    fn high_nibbles(self, x: Self::I) -> Self::I {
        // SAFETY: `self` proves AVX2.
        unsafe { both!(x => _mm256_and_si256(_mm256_srli_epi16::<4>(x), _mm256_set1_epi8(15))) }
    }

    #[inline(always)]
    fn byte<const J: i32>(self, x: Self::I) -> Self::V {
        // SAFETY: `self` proves AVX2.
        unsafe {
            both!(x => {
                let shifted = _mm256_srlv_epi32(x, _mm256_set1_epi32(8 * J));
                _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(0xff)))
            })
        }
    }

    #[inline(always)]
    fn dot_bytes(self, sum: Self::I, w: Self::I, x: u32) -> Self::I {
        // SAFETY: `self` proves AVX2, and AVX-VNNI where `DOT` is set.
        unsafe {
            let x = _mm256_set1_epi32(x as i32);
            if DOT {
                return [_mm256_dpbusd_avx_epi32(sum[0], w[0], x), _mm256_dpbusd_avx_epi32(sum[1], w[1], x)];
            }
            // As in `Avx512`.
            let (x_even, x_odd) = (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)), _mm256_srai_epi16::<8>(x));
            let dots = both!(w => {
                let even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xff)), x_even);
                _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srli_epi16::<8>(w), x_odd))
            });
            [_mm256_add_epi32(sum[0], dots[0]), _mm256_add_epi32(sum[1], dots[1])]
        }
    }

    #[inline(always)]
    fn floats(self, x: Self::I) -> Self::V {
        // SAFETY: `self` proves AVX2.
        unsafe { both!(x => _mm256_cvtepi32_ps(x)) }
    }

    #[inline(always)]
    fn low_halves(self, x: Self::I) -> Self::V {
        // SAFETY: `self` proves AVX2.
        unsafe { both!(x => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x))) }
    }

    #[inline(always)]
    fn high_halves(self, x: Self::I) -> Self::V {
        // SAFETY: `self` proves AVX2.
        unsafe { both!(x => _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff_0000u32 as i32)))) }
    }

    #[inline(always)]
    fn halves(self, low: Self::V, high: Self::V) -> Self::I {
        // SAFETY: `self` proves AVX2.
        unsafe { [joined(low[0], high[0]), joined(low[1], high[1])] }
    }

    #[inline(always)]
    fn narrow(self, first: Self::V, second: Self::V) -> Self::I {
        // SAFETY: `self` proves AVX2.
        unsafe { [packed(first), packed(second)] }
    }

    #[inline(always)]
    fn store_words(self, x: Self::I, to: &mut [u32; LANES]) {
        // SAFETY: `self` proves AVX2; twice 32 bytes are written to an array of 16 words.
        unsafe {
            _mm256_storeu_si256(to.as_mut_ptr().cast(), x[0]);
            _mm256_storeu_si256(to[8..].as_mut_ptr().cast(), x[1]);
        }
    }
}
