//! Sixteen floats at a time, in the registers of three instruction sets.
//!
//! A value of a type that implements [`Simd`] proves that this machine runs its instructions, so the methods are safe. They are
//! `inline(always)`: they must end up in a function that is compiled for the set ([`run`]), else they are slow calls.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use crate::buffer::Line;
use crate::isa::Isa;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
use portable::halve;

/// Numbers handled together: one AVX-512 register, two of AVX2.
pub(crate) const LANES: usize = 16;

/// An instruction set, as an empty value that proves its presence.
pub(crate) trait Simd: Copy {
    /// [`LANES`] floats in registers.
    type V: Copy;
    /// [`LANES`] words of 32 bits in registers.
    type I: Copy;
    /// Rows of activations that a product keeps sums for at a time, so that the sums stay in registers: a power of two, at most 8.
    const ROWS: usize;
    /// The same float in each lane.
    fn splat(self, x: f32) -> Self::V;
    /// Floats from memory.
    fn load(self, from: &[f32; LANES]) -> Self::V;
    /// Bits of bfloat16 from memory, widened.
    fn load_bf16(self, from: &[u16; LANES]) -> Self::V;
    /// Signed bytes from memory, as floats.
    fn load_bytes(self, from: &[u8; LANES]) -> Self::V;
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
    /// Begins the sums of the lanes of eight registers; [`Self::join`] ends them.
    #[inline(always)]
    fn fold(self, x: [Self::V; LANES / 2]) -> Self::V {
        let mut sums = [0.0; LANES];
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum = self.sum(x);
        }
        self.load(&sums)
    }
    /// The sums of the lanes of sixteen registers, each in its lane, from those of the first eight and the last; in an order that is fixed for each set.
    #[inline(always)]
    fn join(self, first: Self::V, last: Self::V) -> Self::V {
        let mut sums = [[0.0; LANES]; 2];
        self.store(first, &mut sums[0]);
        self.store(last, &mut sums[1]);
        let [mut first, last] = sums;
        first[LANES / 2..].copy_from_slice(&last[..LANES / 2]);
        self.load(&first)
    }
    /// `2^n`, where `x` is `n + 1.5 * 2^23` with a whole `n` in -126..=127.
    fn power_of_two(self, x: Self::V) -> Self::V;
    /// By how much `x`, which is not larger than 2^21, is more than the nearest whole number; and that number, for [`Self::scale`].
    #[inline(always)]
    fn split(self, x: Self::V) -> [Self::V; 2] {
        let round = self.splat(12_582_912.0); // as in `exp`
        let shifted = self.add(x, round);
        [self.sub(x, self.sub(shifted, round)), shifted]
    }
    /// `x 2^n` for an `n` in -126..=127 of [`Self::split`].
    #[inline(always)]
    fn scale(self, x: Self::V, n: Self::V) -> Self::V {
        self.mul(x, self.power_of_two(n))
    }
    /// `1 / x` for an `x` in 1..=2^126, relative error below 2e-7.
    #[inline(always)]
    fn inverse(self, x: Self::V) -> Self::V {
        self.div(self.splat(1.0), x)
    }
    /// IEEE half precision from memory, widened.
    fn load_f16(self, from: &[u16; LANES]) -> Self::V;
    /// Words from memory.
    fn words(self, from: &[u32; LANES]) -> Self::I;
    /// Words of zero.
    fn no_words(self) -> Self::I;
    /// The low four bits of each byte.
    fn low_nibbles(self, x: Self::I) -> Self::I;
    /// The high four bits of each byte.
    fn high_nibbles(self, x: Self::I) -> Self::I;
    /// Byte `J` of each word, unsigned, as a float.
    fn byte<const J: i32>(self, x: Self::I) -> Self::V;
    /// `sum + w . x` in each lane: four unsigned bytes of `w` with the four signed bytes of `x`. Exact.
    fn dot_bytes(self, sum: Self::I, w: Self::I, x: u32) -> Self::I;
    /// Signed words as floats.
    fn floats(self, x: Self::I) -> Self::V;
    /// The lower halves of the words as bfloat16, widened.
    fn low_halves(self, x: Self::I) -> Self::V;
    /// The upper halves of the words as bfloat16, widened.
    fn high_halves(self, x: Self::I) -> Self::V;
    /// Words whose halves are `low` and `high` rounded to bfloat16.
    fn halves(self, low: Self::V, high: Self::V) -> Self::I;
    /// What a byte stands beside in [`Self::scaled_bytes`], or a nibble.
    #[inline(always)]
    fn beside(self, _nibbles: bool) -> f32 {
        0.0
    }
    /// A number of each row, as [`Self::scaled_bytes`] takes it.
    #[inline(always)]
    fn spread(self, x: Self::V) -> [Self::V; 2] {
        [x, x]
    }
    /// The bytes of each word as numbers: `(beside + byte) scale + shift`, words whose halves are the first two rounded to bfloat16, then the last two. With
    /// `NIBBLES` no byte is above 15.
    #[inline(always)]
    fn scaled_bytes<const NIBBLES: bool>(self, x: Self::I, scale: [Self::V; 2], shift: [Self::V; 2]) -> [Self::I; 2] {
        let first = [self.fma(self.byte::<0>(x), scale[0], shift[0]), self.fma(self.byte::<1>(x), scale[0], shift[0])];
        let last = [self.fma(self.byte::<2>(x), scale[0], shift[0]), self.fma(self.byte::<3>(x), scale[0], shift[0])];
        [self.halves(first[0], first[1]), self.halves(last[0], last[1])]
    }
    /// `first`, then `second`, rounded to bfloat16, two to a word.
    fn narrow(self, first: Self::V, second: Self::V) -> Self::I;
    /// The lowest byte of each lane's bits: of `first`, then of `second`, to memory.
    #[inline(always)]
    fn store_bytes(self, first: Self::V, second: Self::V, to: &mut [u32; LANES / 2]) {
        let mut lanes = [[0.0; LANES]; 2];
        self.store(first, &mut lanes[0]);
        self.store(second, &mut lanes[1]);
        let bits: [u32; 2 * LANES] = bytemuck::cast(lanes);
        *to = bytemuck::cast(bits.map(|bits| bits as u8));
    }
    /// Words to memory.
    fn store_words(self, x: Self::I, to: &mut [u32; LANES]);
    /// `sum + w . x` in each lane: the two bfloat16 of a word of `w` with those of `x`.
    #[inline(always)]
    fn dot_halves(self, sum: Self::V, w: Self::I, x: u32) -> Self::V {
        let (low, high) = (f32::from_bits(x << 16), f32::from_bits(x & 0xffff_0000));
        let sum = self.fma(self.low_halves(w), self.splat(low), sum);
        self.fma(self.high_halves(w), self.splat(high), sum)
    }
    /// Bits of bfloat16 from memory, two to a word.
    #[inline(always)]
    fn pairs(self, from: &[u16; 2 * LANES]) -> Self::I {
        let mut words = [0; LANES];
        for (word, [low, high]) in words.iter_mut().zip(from.as_chunks().0) {
            *word = u32::from(*low) | u32::from(*high) << 16;
        }
        self.words(&words)
    }
    /// `sum + a . b` in each lane: the two bfloat16 of a word of `a` with those of `b`.
    #[inline(always)]
    fn dot_pairs(self, sum: Self::V, a: Self::I, b: Self::I) -> Self::V {
        let sum = self.fma(self.low_halves(a), self.low_halves(b), sum);
        self.fma(self.high_halves(a), self.high_halves(b), sum)
    }
    /// Words of a bfloat16 of `a` below that of `b` in the same place: of 32 places, in an order of the set's own, which [`Self::in_order`] undoes.
    #[inline(always)]
    fn interleave(self, a: Self::I, b: Self::I) -> [Self::I; 2] {
        [self.halves(self.low_halves(a), self.low_halves(b)), self.halves(self.high_halves(a), self.high_halves(b))]
    }
    /// Rows as columns.
    #[inline(always)]
    fn transpose(self, from: &[Line; LANES], to: &mut [Line; LANES]) {
        for (i, from) in from.iter().enumerate() {
            to.iter_mut().zip(from.0).for_each(|(to, word)| to.0[i] = word);
        }
    }
    /// What stands in [`Self::interleave`]'s order, in its own: 16 places, then 16 more.
    #[inline(always)]
    fn in_order(self, x: [Self::V; 2]) -> [Self::V; 2] {
        let mut from = [[0.0; LANES]; 2];
        self.store(x[0], &mut from[0]);
        self.store(x[1], &mut from[1]);
        let mut to = [[0.0; LANES]; 2];
        for (place, to) in to.as_flattened_mut().iter_mut().enumerate() {
            *to = from[place % 2][place / 2];
        }
        [self.load(&to[0]), self.load(&to[1])]
    }
}

/// Work that is compiled once for each instruction set.
pub(crate) trait Kernel {
    /// Does it. Implementations are `inline(always)`.
    fn run<S: Simd>(self, s: S);
}

/// Runs `kernel` on `isa`, or on the portable target where the machine lacks it.
#[cfg(target_arch = "x86_64")]
pub(crate) fn run<K: Kernel>(isa: Isa, kernel: K) {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx512vbmi")]
    fn avx512_dot<K: Kernel>(s: Avx512<true>, kernel: K) {
        kernel.run(s);
    }
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn avx512<K: Kernel>(s: Avx512<false>, kernel: K) {
        kernel.run(s);
    }
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    fn avx2_dot<K: Kernel>(s: Avx2<true>, kernel: K) {
        kernel.run(s);
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2<K: Kernel>(s: Avx2<false>, kernel: K) {
        kernel.run(s);
    }
    match isa {
        Isa::Amx | Isa::Avx512Dot => {
            if let Some(s) = Avx512::<true>::new() {
                // SAFETY: the token proves all of the features that the function is compiled for; it has no other demand.
                return unsafe { avx512_dot(s, kernel) };
            }
        }
        Isa::Avx512 => {
            if let Some(s) = Avx512::<false>::new() {
                // SAFETY: as above.
                return unsafe { avx512(s, kernel) };
            }
        }
        Isa::Avx2Dot => {
            if let Some(s) = Avx2::<true>::new() {
                // SAFETY: as above.
                return unsafe { avx2_dot(s, kernel) };
            }
        }
        Isa::Avx2 => {
            if let Some(s) = Avx2::<false>::new() {
                // SAFETY: as above.
                return unsafe { avx2(s, kernel) };
            }
        }
        Isa::Portable => {}
    }
    kernel.run(Portable);
}

/// Runs `kernel`.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn run<K: Kernel>(_isa: Isa, kernel: K) {
    kernel.run(Portable);
}

/// Asks the processor to bring the line of an address into its second cache, where it can be asked. Changes nothing else, whatever stands there.
#[inline(always)]
pub(crate) fn call_line(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: SSE is in every x86-64; a prefetch reads nothing, and one of an address without memory does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// [`call_line`] for all of `what`.
#[inline(always)]
pub(crate) fn call_near<T>(what: &[T]) {
    for at in (0..size_of_val(what)).step_by(64) {
        call_line(what.as_ptr().cast::<u8>().wrapping_add(at));
    }
}

/// Asks the processor to bring `what` into its first cache, where it can be asked. Changes nothing else.
#[inline(always)]
pub(crate) fn call_for<T>(what: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..size_of_val(what)).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is in every x86-64; a prefetch reads nothing, and the address is inside of `what`.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(what.as_ptr().cast::<i8>().add(at)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = what;
}

/// Asks the processor to bring `what` near for writing, where it can be asked: what another has read or written last is taken from it. Changes nothing else.
#[inline(always)]
#[allow(clippy::pointers_in_nomem_asm_block, reason = "nothing is read or written through the pointer")]
pub(crate) fn claim<T>(what: &mut [T]) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..size_of_val(what)).step_by(64) {
        // SAFETY: the address is inside of `what`, which nobody else uses; the instruction changes neither memory nor flags, and x86-64 processors that
        // lack it do nothing (the first ones of 2004 aside, which LibTorch does not run on). No intrinsic emits it without a feature that is not stable.
        unsafe {
            std::arch::asm!("prefetchw byte ptr [{}]", in(reg) what.as_mut_ptr().cast::<u8>().add(at), options(nomem, nostack, preserves_flags));
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = what;
}

/// `e^x` for `x <= 87`, relative error below 3e-7; `e^-87`, about 1.6e-38, for all that is smaller. NaN stays NaN.
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

/// `2^x` for `x <= 127`, relative error below 8e-5, for what is rounded to bfloat16; `2^-125` for all that is smaller, which stays a normal
/// number whatever the polynomial gives: one that is not costs hundreds of cycles where processors need help with it. NaN stays NaN.
/// A polynomial of the third degree whose largest relative error over [-1/2, 1/2] is as small as can be (Remez).
#[inline(always)]
pub(crate) fn exp2_rough<S: Simd>(s: S, x: S::V) -> S::V {
    let [rest, whole] = s.split(s.max(s.splat(-125.0), x));
    let mut poly = s.splat(0.055_171_67);
    for coefficient in [0.242_611_13, 0.693_260_97, 0.999_928_06] {
        poly = s.fma(poly, rest, s.splat(coefficient));
    }
    s.scale(poly, whole)
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    s.mul(x, sigmoid(s, x))
}

/// `1 / (1 + e^-x)`; below -87 what it is there, 1.6e-38.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let minus = s.sub(s.splat(0.0), s.max(s.splat(-87.0), x));
    s.inverse(s.add(s.splat(1.0), exp(s, minus)))
}

#[cfg(test)]
mod tests {
    use super::portable::each;
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
        for (x, low, high) in [(0.0, 1.0, 1.0), (87.0, 6.07e37, 6.08e37), (f32::NEG_INFINITY, 0.0, 2e-38), (-1e9, 0.0, 2e-38)] {
            let got = s.largest(exp(s, s.splat(x)));
            assert!((low..=high).contains(&got), "exp({x}) = {got}");
        }
        assert!(s.sum(exp(s, s.splat(f32::NAN))).is_nan());
    }

    fn exp2_is_close<S: Simd>(s: S) {
        for i in 0..20_000u16 {
            let x: [f32; LANES] = each(|lane| 20.0 - f32::from(i) * 0.007 - lane as f32 * 4e-4);
            let mut got = [0.0; LANES];
            s.store(exp2_rough(s, s.load(&x)), &mut got);
            for (got, x) in got.iter().zip(x) {
                let want = f64::from(x).exp2();
                assert!((f64::from(*got) - want).abs() <= 8e-5 * want, "2^{x} = {got}, not {want}");
            }
        }
        for (x, low, high) in [(127.0, 1.7e38, 1.71e38), (f32::NEG_INFINITY, 1.2e-38, 2.4e-38), (-1e9, 1.2e-38, 2.4e-38)] {
            let got = s.largest(exp2_rough(s, s.splat(x)));
            assert!((low..=high).contains(&got), "2^{x} = {got}");
        }
        assert!(s.sum(exp2_rough(s, s.splat(f32::NAN))).is_nan());
    }

    fn inverse_is_close<S: Simd>(s: S) {
        for i in 0..=1_260u16 {
            let x: [f32; LANES] = each(|lane| (f32::from(i) / 10.0).exp2() * (if i == 0 { 1.0 } else { 1.0 - lane as f32 * 1e-3 }));
            let mut got = [0.0; LANES];
            s.store(s.inverse(s.load(&x)), &mut got);
            for (got, x) in got.iter().zip(x) {
                let want = 1.0 / f64::from(x);
                assert!((f64::from(*got) - want).abs() <= 2e-7 * want, "1 / {x} = {got}, not {want}");
            }
        }
        assert!(s.sum(s.inverse(s.splat(f32::NAN))).is_nan());
    }

    fn lanes_are_all_there<S: Simd>(s: S) {
        let powers = s.load(&each(|i| (1u32 << i) as f32));
        assert_eq!((s.sum(powers), s.largest(powers)), (65_535.0, 32_768.0));
        let ramp = |from: f32| s.load(&each(|i| from * 100.0 + i as f32));
        let eight = |from: u8| s.fold(std::array::from_fn(|i| ramp(f32::from(from) + i as f32)));
        let mut sums = [0.0; LANES];
        s.store(s.join(eight(0), eight(8)), &mut sums);
        assert_eq!(sums, each(|i| 1600.0 * i as f32 + 120.0));
        let halves: [u16; LANES] = std::array::from_fn(|i| (((1u32 << i) as f32).to_bits() >> 16) as u16);
        assert_eq!(s.sum(s.sub(s.load_bf16(&halves), powers)), 0.0);
        let mut floats = [0.0; LANES];
        s.store(s.load_bytes(&std::array::from_fn(|i| (i as i8 * 8).wrapping_sub(60) as u8)), &mut floats);
        assert_eq!(floats, each(|i| f32::from((i as i8 * 8).wrapping_sub(60))));
    }

    /// Every operation on words against plain code.
    fn words_are_what_they_say<S: Simd>(s: S) {
        let words: [u32; LANES] = std::array::from_fn(|i| (i as u32 + 1).wrapping_mul(0x9e37_79b9));
        let bytes = words.map(u32::to_le_bytes);
        let w = s.words(&words);
        let x = [-127i8, 3, -1, 127];
        let sum = s.dot_bytes(s.dot_bytes(s.no_words(), w, u32::from_le_bytes(x.map(|x| x as u8))), w, 1);
        let nibbles = s.dot_bytes(s.no_words(), s.low_nibbles(w), 0x0101_0101);
        let high = s.dot_bytes(s.no_words(), s.high_nibbles(w), 0x0100_0000);
        let (mut got, mut low) = ([0.0; LANES], [0.0; LANES]);
        for i in 0..LANES {
            let plain: i32 =
                bytes[i].iter().zip(x).map(|(w, x)| i32::from(*w) * i32::from(x)).sum::<i32>() + i32::from(bytes[i][0]);
            let lane = |v, out: &mut [f32; LANES]| {
                s.store(v, out);
                out[i]
            };
            assert_eq!(lane(s.floats(sum), &mut got), plain as f32);
            assert_eq!(lane(s.floats(nibbles), &mut got), bytes[i].iter().map(|b| f32::from(b & 15)).sum::<f32>());
            assert_eq!(lane(s.floats(high), &mut got), f32::from(bytes[i][3] >> 4));
            assert_eq!(lane(s.byte::<0>(w), &mut got), f32::from(bytes[i][0]));
            assert_eq!(lane(s.byte::<3>(w), &mut got), f32::from(bytes[i][3]));
            assert_eq!(lane(s.low_halves(w), &mut low).to_bits(), words[i] << 16);
            assert_eq!(lane(s.high_halves(w), &mut low).to_bits(), words[i] & 0xffff_0000);
        }
        let mut stored = [0; LANES / 2];
        s.store_bytes(s.load(&words.map(f32::from_bits)), s.load(&each(|i| f32::from_bits(256 + i as u32))), &mut stored);
        let stored: [u8; 2 * LANES] = bytemuck::cast(stored);
        assert!((0..LANES).all(|i| stored[i] == bytes[i][0] && usize::from(stored[LANES + i]) == i));
        let f16: [u16; LANES] = std::array::from_fn(|i| half::f16::from_f32(i as f32 * 0.37 - 2.0).to_bits());
        s.store(s.load_f16(&f16), &mut got);
        assert_eq!(got, f16.map(|bits| half::f16::from_bits(bits).to_f32()));
        let (a, b) = (each(|i| 1.0 + i as f32 / 300.0), each(|i| -3.0e-5 * i as f32));
        let mut joined = [0; LANES];
        s.store_words(s.halves(s.load(&a), s.load(&b)), &mut joined);
        let round = |x: f32| u32::from(half::bf16::from_f32(x).to_bits());
        let mut narrowed = [0; LANES];
        s.store_words(s.narrow(s.load(&a), s.load(&b)), &mut narrowed);
        let both = [a, b].concat();
        assert_eq!(narrowed, std::array::from_fn(|i| round(both[2 * i]) | round(both[2 * i + 1]) << 16));
        assert_eq!(joined, std::array::from_fn(|i| round(a[i]) | round(b[i]) << 16));
        s.store(s.dot_halves(s.splat(1.0), s.words(&joined), 0x3f80_4000), &mut got);
        for i in 0..LANES {
            let want = 1.0 + 2.0 * f32::from_bits(joined[i] << 16) + f32::from_bits(joined[i] & 0xffff_0000);
            assert!((got[i] - want).abs() < 1e-6, "{} {want}", got[i]);
        }
    }

    /// Pairs from two places at a time, multiplied, and back in order.
    fn pairs_come_back_in_order<S: Simd>(s: S) {
        let half = |x: u32| (x as f32).to_bits() >> 16; // whole numbers below 256 are exact
        let halves = |from: u32| std::array::from_fn(|i| half(from + i as u32) as u16);
        let (a, b) = (s.pairs(&halves(1)), s.pairs(&halves(100)));
        let [first, second] = s.interleave(a, b);
        let weights = half(2) | half(3) << 16;
        let sums = s.in_order([s.dot_halves(s.splat(1.0), first, weights), s.dot_halves(s.splat(1.0), second, weights)]);
        let mut got = [[0.0; LANES]; 2];
        got.iter_mut().zip(sums).for_each(|(got, sums)| s.store(sums, got));
        let want = |i: usize| 1.0 + 2.0 * (1.0 + i as f32) + 3.0 * (100.0 + i as f32);
        assert_eq!(got, [each(want), each(|i| want(LANES + i))]);
        s.store(s.dot_pairs(s.splat(5.0), a, b), &mut got[0]);
        assert_eq!(got[0], each(|i| (0..2).fold(5.0, |sum, j| sum + (1 + 2 * i + j) as f32 * (100 + 2 * i + j) as f32)));
    }

    fn rows_become_columns<S: Simd>(s: S) {
        let from: [Line; LANES] = std::array::from_fn(|row| Line(std::array::from_fn(|column| (100 * row + column) as u32)));
        let mut to = [Line([0; LANES]); LANES];
        s.transpose(&from, &mut to);
        for (column, line) in to.iter().enumerate() {
            assert_eq!(line.0, std::array::from_fn(|row| (100 * row + column) as u32));
        }
    }

    fn all<S: Simd>(s: S) {
        rows_become_columns(s);
        pairs_come_back_in_order(s);
        exp_is_close(s);
        exp2_is_close(s);
        inverse_is_close(s);
        lanes_are_all_there(s);
        words_are_what_they_say(s);
    }

    #[test]
    fn every_instruction_set() {
        all(Portable);
        #[cfg(target_arch = "x86_64")]
        {
            Avx2::<false>::new().into_iter().for_each(all);
            Avx2::<true>::new().into_iter().for_each(all);
            Avx512::<false>::new().into_iter().for_each(all);
            Avx512::<true>::new().into_iter().for_each(all);
        }
    }
}
