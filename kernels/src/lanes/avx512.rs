//! The lanes in a register of AVX-512. Every `unsafe` block below calls an intrinsic whose features the token proves; `load` and
//! `store` touch exactly the array behind their reference, unaligned.

use super::{LANES, Simd};
use crate::buffer::Line;
use crate::isa::Isa;
use std::arch::x86_64::*;

/// Quarters 0 and 2 of two registers, and 1 and 3.
const EVEN: i32 = 0b10_00_10_00;
const ODD: i32 = 0b11_01_11_01;
/// Lanes 0 and 1 of each quarter of two registers, and 2 and 3.
const LOW: i32 = 0b01_00_01_00;
const HIGH: i32 = 0b11_10_11_10;

/// The AVX-512 parts of [`Isa::Avx512`] are there; with `DOT` those of [`Isa::Avx512Dot`] too. Made only by [`Avx512::new`].
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const DOT: bool>(());

impl<const DOT: bool> Avx512<DOT> {
    pub(crate) fn new() -> Option<Self> {
        let isa = if DOT { Isa::Avx512Dot } else { Isa::Avx512 };
        isa.is_available().then_some(Self(()))
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

impl<const DOT: bool> Simd for Avx512<DOT> {
    type V = __m512;
    type I = __m512i;
    const ROWS: usize = 8;

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
    fn load_bytes(self, from: &[u8; LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512; 16 bytes are read from an array of 16.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast()))) }
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

    /// Pairs of lanes, then pairs of those, until each group of four holds the sums of four registers over a quarter of their lanes; then halves.
    #[inline(always)]
    fn fold(self, x: [__m512; 8]) -> __m512 {
        // SAFETY: `self` proves AVX-512.
        unsafe {
            let mut fours = [_mm512_setzero_ps(); 2];
            for (four, x) in fours.iter_mut().zip(x.as_chunks::<4>().0) {
                let one = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1])));
                let other = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3])));
                let (low, high) = (_mm512_unpacklo_pd(one, other), _mm512_unpackhi_pd(one, other));
                *four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
            }
            self.join(fours[0], fours[1])
        }
    }

    #[inline(always)]
    fn transpose(self, from: &[Line; LANES], to: &mut [Line; LANES]) {
        // SAFETY: `self` proves AVX-512; each line is 64 bytes.
        unsafe {
            let mut x = [_mm512_setzero_ps(); LANES];
            for i in 0..LANES {
                x[i] = _mm512_loadu_ps(from[i].0.as_ptr().cast());
            }
            for i in (0..LANES).step_by(2) {
                (x[i], x[i + 1]) = (_mm512_unpacklo_ps(x[i], x[i + 1]), _mm512_unpackhi_ps(x[i], x[i + 1]));
            }
            // Of rows i to i + 3: x[i + j] has column 4 q + j in its quarter q.
            for i in (0..LANES).step_by(4) {
                let [a, b, c, d] = [x[i], x[i + 1], x[i + 2], x[i + 3]];
                (x[i], x[i + 1]) = (_mm512_shuffle_ps::<LOW>(a, c), _mm512_shuffle_ps::<HIGH>(a, c));
                (x[i + 2], x[i + 3]) = (_mm512_shuffle_ps::<LOW>(b, d), _mm512_shuffle_ps::<HIGH>(b, d));
            }
            for j in 0..LANES / 4 {
                let [a, b, c, d] = [x[j], x[j + 4], x[j + 8], x[j + 12]];
                let even = [_mm512_shuffle_f32x4::<EVEN>(a, b), _mm512_shuffle_f32x4::<EVEN>(c, d)];
                let odd = [_mm512_shuffle_f32x4::<ODD>(a, b), _mm512_shuffle_f32x4::<ODD>(c, d)];
                let columns = [
                    _mm512_shuffle_f32x4::<EVEN>(even[0], even[1]),
                    _mm512_shuffle_f32x4::<EVEN>(odd[0], odd[1]),
                    _mm512_shuffle_f32x4::<ODD>(even[0], even[1]),
                    _mm512_shuffle_f32x4::<ODD>(odd[0], odd[1]),
                ];
                for q in 0..LANES / 4 {
                    _mm512_storeu_ps(to[4 * q + j].0.as_mut_ptr().cast(), columns[q]);
                }
            }
        }
    }

    #[inline(always)]
    fn join(self, first: __m512, last: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512.
        unsafe {
            let even = _mm512_shuffle_f32x4::<EVEN>(first, last);
            _mm512_add_ps(even, _mm512_shuffle_f32x4::<ODD>(first, last))
        }
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

    #[inline(always)]
    fn split(self, x: __m512) -> [__m512; 2] {
        // SAFETY: `self` proves AVX-512.
        unsafe {
            let rest = _mm512_reduce_ps::<0>(x);
            [rest, _mm512_sub_ps(x, rest)]
        }
    }

    #[inline(always)]
    fn scale(self, x: __m512, n: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_scalef_ps(x, n) }
    }

    /// An estimate of 14 bits and one step of Newton's: a quarter of a division's time.
    #[inline(always)]
    fn inverse(self, x: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512.
        unsafe {
            let rough = _mm512_rcp14_ps(x);
            let error = _mm512_fnmadd_ps(x, rough, _mm512_set1_ps(1.0));
            _mm512_fmadd_ps(rough, error, rough)
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512; 32 bytes are read from an array of 16 halves.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }

    #[inline(always)]
    fn words(self, from: &[u32; LANES]) -> __m512i {
        // SAFETY: `self` proves AVX-512; 64 bytes are read from an array of 16 words.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn no_words(self) -> __m512i {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn low_nibbles(self, x: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_and_si512(x, _mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    fn high_nibbles(self, x: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(x), _mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    fn byte<const J: i32>(self, x: __m512i) -> __m512 {
        // SAFETY: `self` proves AVX-512.
        unsafe {
            let shifted = _mm512_srlv_epi32(x, _mm512_set1_epi32(8 * J));
            _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(0xff)))
        }
    }

    #[inline(always)]
    fn dot_bytes(self, sum: __m512i, w: __m512i, x: u32) -> __m512i {
        // SAFETY: `self` proves AVX-512, and VNNI where `DOT` is set.
        unsafe {
            let x = _mm512_set1_epi32(x as i32);
            if DOT {
                return _mm512_dpbusd_epi32(sum, w, x);
            }
            // Bytes 0 and 2, then 1 and 3, as 16-bit numbers: no product or sum of two leaves 32 bits.
            let even =
                _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(0xff)), _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x)));
            let odd = _mm512_madd_epi16(_mm512_srli_epi16::<8>(w), _mm512_srai_epi16::<8>(x));
            _mm512_add_epi32(sum, _mm512_add_epi32(even, odd))
        }
    }

    #[inline(always)]
    fn floats(self, x: __m512i) -> __m512 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_cvtepi32_ps(x) }
    }

    #[inline(always)]
    fn low_halves(self, x: __m512i) -> __m512 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)) }
    }

    #[inline(always)]
    fn high_halves(self, x: __m512i) -> __m512 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff_0000u32 as i32))) }
    }

    #[inline(always)]
    fn halves(self, low: __m512, high: __m512) -> __m512i {
        // SAFETY: `self` proves AVX-512.
        unsafe {
            if DOT {
                return _mm512_permutexvar_epi16(_mm512_load_si512(INTERLEAVED.0.as_ptr().cast()), self.narrow(low, high));
            }
            _mm512_mask_mov_epi16(rounded_512(high), 0x5555_5555, _mm512_srli_epi32::<16>(rounded_512(low)))
        }
    }

    #[inline(always)]
    fn beside(self, nibbles: bool) -> f32 {
        match (DOT, nibbles) {
            (false, _) => 0.0,
            (true, false) => BESIDE_BYTES,
            (true, true) => BESIDE_NIBBLES,
        }
    }

    #[inline(always)]
    fn spread(self, x: __m512) -> [__m512; 2] {
        if !DOT {
            return [x, x];
        }
        // SAFETY: `self` proves AVX-512.
        unsafe {
            let twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
            [_mm512_permutexvar_ps(twice, x), _mm512_permutexvar_ps(_mm512_add_epi32(twice, _mm512_set1_epi32(8)), x)]
        }
    }

    /// With `DOT` a byte goes into the fraction of a float by itself, in the order in which halves stand at the end. Without closures, which would be calls.
    #[inline(always)]
    fn scaled_bytes<const NIBBLES: bool>(self, x: __m512i, scale: [__m512; 2], shift: [__m512; 2]) -> [__m512i; 2] {
        if !DOT {
            let first = [self.fma(self.byte::<0>(x), scale[0], shift[0]), self.fma(self.byte::<1>(x), scale[0], shift[0])];
            let last = [self.fma(self.byte::<2>(x), scale[0], shift[0]), self.fma(self.byte::<3>(x), scale[0], shift[0])];
            return [self.halves(first[0], first[1]), self.halves(last[0], last[1])];
        }
        let (beside, place) = if NIBBLES { (BESIDE_NIBBLES, 0x4444_4444_4444_4444) } else { (BESIDE_BYTES, 0x2222_2222_2222_2222) };
        let mut numbers = [self.splat(beside); 4];
        for (at, number) in numbers.iter_mut().enumerate() {
            // SAFETY: `self` proves AVX-512 and, with `DOT`, its VBMI part.
            let bytes = unsafe {
                let from = _mm512_load_si512(BYTES_OF_HALVES[at].0.as_ptr().cast());
                _mm512_castsi512_ps(_mm512_mask_permutexvar_epi8(_mm512_castps_si512(*number), place, from, x))
            };
            *number = self.fma(bytes, scale[at % 2], shift[at % 2]);
        }
        [self.narrow(numbers[0], numbers[1]), self.narrow(numbers[2], numbers[3])]
    }

    /// With `DOT` what is smaller than normal numbers becomes zero, as in every product of bfloat16.
    #[inline(always)]
    fn narrow(self, first: __m512, second: __m512) -> __m512i {
        // SAFETY: `self` proves AVX-512 and, with `DOT`, its BF16 part; both vector types are 64 plain bytes.
        unsafe {
            if DOT {
                return std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
            }
            let [first, second] = [_mm512_srli_epi32::<16>(rounded_512(first)), _mm512_srli_epi32::<16>(rounded_512(second))];
            let first = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(first));
            _mm512_inserti64x4::<1>(first, _mm512_cvtepi32_epi16(second))
        }
    }

    #[inline(always)]
    fn store_bytes(self, first: __m512, second: __m512, to: &mut [u32; LANES / 2]) {
        let to = to.as_mut_ptr().cast::<__m128i>();
        // SAFETY: `self` proves AVX-512; twice 16 bytes are written to an array of 8 words.
        unsafe {
            _mm_storeu_si128(to, _mm512_cvtepi32_epi8(_mm512_castps_si512(first)));
            _mm_storeu_si128(to.add(1), _mm512_cvtepi32_epi8(_mm512_castps_si512(second)));
        }
    }

    #[inline(always)]
    fn store_words(self, x: __m512i, to: &mut [u32; LANES]) {
        // SAFETY: `self` proves AVX-512; 64 bytes are written to an array of 16 words.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), x) }
    }

    #[inline(always)]
    fn dot_halves(self, sum: __m512, w: __m512i, x: u32) -> __m512 {
        if !DOT {
            let (low, high) = (f32::from_bits(x << 16), f32::from_bits(x & 0xffff_0000));
            let sum = self.fma(self.low_halves(w), self.splat(low), sum);
            return self.fma(self.high_halves(w), self.splat(high), sum);
        }
        // SAFETY: `self` proves AVX-512 and, with `DOT`, its BF16 part; both vector types are 64 plain bytes.
        unsafe {
            let x = _mm512_set1_epi32(x as i32);
            _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512i, __m512bh>(w), std::mem::transmute::<__m512i, __m512bh>(x))
        }
    }

    #[inline(always)]
    fn pairs(self, from: &[u16; 2 * LANES]) -> __m512i {
        // SAFETY: `self` proves AVX-512; 64 bytes are read from an array of 32 halves.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn dot_pairs(self, sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        if !DOT {
            let sum = self.fma(self.low_halves(a), self.low_halves(b), sum);
            return self.fma(self.high_halves(a), self.high_halves(b), sum);
        }
        // SAFETY: `self` proves AVX-512 and, with `DOT`, its BF16 part; both vector types are 64 plain bytes.
        unsafe { _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b)) }
    }

    /// Places 0 to 3 of each eight, then 4 to 7.
    #[inline(always)]
    fn interleave(self, a: __m512i, b: __m512i) -> [__m512i; 2] {
        // SAFETY: `self` proves AVX-512.
        unsafe { [_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)] }
    }

    #[inline(always)]
    fn in_order(self, x: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: `self` proves AVX-512.
        unsafe {
            let first = _mm512_shuffle_f32x4::<0b01_00_01_00>(x[0], x[1]); // low 0, low 1, high 0, high 1
            let last = _mm512_shuffle_f32x4::<0b11_10_11_10>(x[0], x[1]);
            [_mm512_shuffle_f32x4::<0b11_01_10_00>(first, first), _mm512_shuffle_f32x4::<0b11_01_10_00>(last, last)]
        }
    }
}

/// Aligned as a vector is.
#[repr(align(64))]
struct Order([u16; 32]);

/// Halves of one vector by turns with those of another.
static INTERLEAVED: Order = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    Order(order)
};

/// The power of two in whose fraction a whole number stands 8 bits from the end, and 16.
const BESIDE_BYTES: f32 = 32_768.0;
const BESIDE_NIBBLES: f32 = 128.0;

/// Aligned as a vector is.
#[repr(align(64))]
struct Bytes([u8; 64]);

/// Of words of four bytes: bytes 0 and 1 of words 0 to 7, of words 8 to 15, then bytes 2 and 3; each byte for all bytes of a word.
static BYTES_OF_HALVES: [Bytes; 4] = {
    let mut all = [const { Bytes([0; 64]) }; 4];
    let mut i = 0;
    while i < 4 * 64 {
        let (vector, lane) = (i / 64, i % 64 / 4);
        let (word, byte) = (vector % 2 * 8 + lane / 2, vector / 2 * 2 + lane % 2);
        all[vector].0[i % 64] = (4 * word + byte) as u8;
        i += 1;
    }
    all
};

/// As [`rounded`], of sixteen lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn rounded_512(x: __m512) -> __m512i {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
    _mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x), quiet)
}
