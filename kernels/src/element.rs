//! How a cached vector stands in a cell, in each element type: its bytes, how it is written, how it is read. Decides the rounding of 8-bit numbers,
//! nothing else.
//!
//! An 8-bit vector is its numbers as signed bytes, then a bfloat16 for each [`GROUP`] of them by which they are multiplied, as in llama.cpp's Q8_0.
//! The scale comes of the largest number of its group, so the bytes of a vector depend on that vector alone. They are one run, scales
//! included: whoever moves, digests or counts cells needs to know no more than its length.

use half::bf16;

use crate::convert::{round, to_bf16};
use crate::isa::Isa;
use crate::lanes::{Kernel, Simd, run};

/// Numbers of an 8-bit vector that share a scale.
pub const GROUP: usize = 32;
/// The largest 8-bit number; its negative is the smallest.
const LARGEST: f32 = 127.0;
/// Added to a number of at most 22 bits it leaves the nearest integer, ties to even, in the low bits.
const ROUND: f32 = 12_582_912.0;
/// Bits of the smallest magnitude that is no number.
const INFINITE: u32 = 0x7f80_0000;

/// Element type of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// Signed bytes with scales.
    Int8,
}

impl Element {
    /// Bytes of a vector of so many numbers.
    #[must_use]
    pub const fn vector_bytes(self, numbers: usize) -> usize {
        match self {
            Self::F32 => 4 * numbers,
            Self::Bf16 => 2 * numbers,
            Self::Int8 => numbers + 2 * numbers.div_ceil(GROUP),
        }
    }

    /// What the addresses of cells are multiples of, bytes.
    #[must_use]
    pub const fn align(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }

    /// Writes a vector to its place. A group of 8-bit numbers of which one is not finite is read as NaN.
    ///
    /// # Panics
    /// When the place is not [`Self::vector_bytes`] long, or not aligned.
    pub fn write(self, numbers: &[f32], place: &mut [u8]) {
        assert_eq!(place.len(), self.vector_bytes(numbers.len()));
        match self {
            Self::F32 => bytemuck::cast_slice_mut(place).copy_from_slice(numbers),
            Self::Bf16 => to_bf16(numbers, bytemuck::cast_slice_mut(place)),
            Self::Int8 => run(Isa::best(), Quantise { numbers, place }),
        }
    }

    /// Vectors of `dim` numbers, one after the other, in single precision, exactly.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn read(self, vectors: &[u8], dim: usize, out: &mut [f32]) {
        assert_eq!((vectors.len() / self.vector_bytes(dim) * dim, vectors.len() % self.vector_bytes(dim)), (out.len(), 0));
        match self {
            Self::F32 => out.iter_mut().zip(vectors.as_chunks().0).for_each(|(out, x)| *out = f32::from_le_bytes(*x)),
            Self::Bf16 => out.iter_mut().zip(vectors.as_chunks().0).for_each(|(out, x)| *out = bf16::from_le_bytes(*x).to_f32()),
            Self::Int8 => run(Isa::best(), Dequantise { vectors, dim, out }),
        }
    }
}

/// 8-bit vectors of `dim` numbers, rounded to bfloat16.
pub(crate) fn int8_halves(isa: Isa, vectors: &[u8], dim: usize, out: &mut [u16]) {
    run(isa, Dequantise { vectors, dim, out });
}

/// The scale of group `index` of an 8-bit vector of `dim` numbers.
#[inline(always)]
pub(crate) fn int8_scale(vector: &[u8], dim: usize, index: usize) -> f32 {
    let at = dim + 2 * index;
    f32::from_bits(u32::from(u16::from_le_bytes([vector[at], vector[at + 1]])) << 16)
}

/// The smallest bfloat16 that is at least a group's largest magnitude over [`LARGEST`], in the upper half; zero where numbers are too small to be divided
/// by it.
#[inline(always)]
fn scale_of(group: &[f32]) -> f32 {
    let largest = group.iter().fold(0, |largest, x| (x.to_bits() & !(1 << 31)).max(largest));
    if largest >= INFINITE {
        return f32::NAN;
    }
    let scale = f32::from_bits((f32::from_bits(largest) / LARGEST).to_bits().wrapping_add(0xffff) & 0xffff_0000);
    if scale < f32::MIN_POSITIVE { 0.0 } else { scale }
}

/// Plain code: all that is wanted of the instruction set is the width of its vectors. Each number is divided and rounded by itself, so every
/// instruction set gives the same bytes.
struct Quantise<'a> {
    numbers: &'a [f32],
    place: &'a mut [u8],
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (bytes, scales) = self.place.split_at_mut(self.numbers.len());
        let groups = self.numbers.chunks(GROUP).zip(bytes.chunks_mut(GROUP));
        for ((numbers, bytes), place) in groups.zip(scales.as_chunks_mut().0) {
            let scale = scale_of(numbers);
            *place = bf16::from_f32(scale).to_le_bytes();
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            for (byte, number) in bytes.iter_mut().zip(numbers) {
                *byte = (number * inverse + ROUND).to_bits() as u8;
            }
        }
    }
}

/// What an 8-bit number is read as.
trait Readable {
    fn of(number: f32) -> Self;
}

impl Readable for f32 {
    #[inline(always)]
    fn of(number: f32) -> Self {
        number
    }
}

/// The bits of a bfloat16.
impl Readable for u16 {
    #[inline(always)]
    fn of(number: f32) -> Self {
        round(number).to_bits()
    }
}

/// Plain code, as [`Quantise`].
struct Dequantise<'a, T> {
    vectors: &'a [u8],
    dim: usize,
    out: &'a mut [T],
}

impl<T: Readable> Kernel for Dequantise<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let vectors = self.vectors.chunks_exact(Element::Int8.vector_bytes(self.dim));
        for (vector, out) in vectors.zip(self.out.chunks_exact_mut(self.dim)) {
            for (index, (bytes, out)) in vector[..self.dim].chunks(GROUP).zip(out.chunks_mut(GROUP)).enumerate() {
                let scale = int8_scale(vector, self.dim, index);
                out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = T::of(f32::from(*byte as i8) * scale));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A vector of 80 numbers: two groups and a half.
    fn numbers(seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..80).map(|i| next() * if i < GROUP { 30.0 } else { 0.01 }).collect()
    }

    fn written(numbers: &[f32]) -> Vec<u8> {
        let mut place = vec![0xaa; Element::Int8.vector_bytes(numbers.len())];
        Element::Int8.write(numbers, &mut place);
        place
    }

    #[test]
    fn eight_bits_are_near_and_each_group_has_its_own_scale() {
        for seed in 0..100 {
            let numbers = numbers(seed);
            let (vector, mut back) = (written(&numbers), vec![0.0; 80]);
            Element::Int8.read(&vector, 80, &mut back);
            for (group, (want, got)) in numbers.chunks(GROUP).zip(back.chunks(GROUP)).enumerate() {
                let largest = want.iter().fold(0.0f32, |a, x| a.max(x.abs()));
                let scale = int8_scale(&vector, 80, group);
                assert!(scale >= largest / 127.0 && scale <= largest / 127.0 * 1.008, "{scale} for {largest}");
                assert!(want.iter().zip(got).all(|(a, b)| (a - b).abs() <= scale * 0.500_01), "{want:?} {got:?}");
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bytes_and_numbers() {
        let numbers = numbers(7);
        let want = written(&numbers);
        let (mut floats, mut halves) = (vec![0.0f32; 80], vec![0u16; 80]);
        run(Isa::Portable, Dequantise { vectors: &want, dim: 80, out: &mut floats });
        for isa in Isa::available() {
            let mut got = vec![0; want.len()];
            run(isa, Quantise { numbers: &numbers, place: &mut got });
            assert_eq!(got, want, "{isa:?}");
            let mut back = vec![0.0f32; 80];
            run(isa, Dequantise { vectors: &want, dim: 80, out: &mut back });
            assert_eq!(back, floats, "{isa:?}");
            int8_halves(isa, &want, 80, &mut halves);
            assert!(halves.iter().zip(&floats).all(|(half, x)| bf16::from_bits(*half) == bf16::from_f32(*x)), "{isa:?}");
        }
    }

    #[test]
    fn extremes_are_told_apart_from_numbers() {
        let read = |numbers: &[f32]| {
            let mut back = vec![1.0; numbers.len()];
            Element::Int8.read(&written(numbers), numbers.len(), &mut back);
            back
        };
        assert_eq!(read(&[0.0, -0.0]), [0.0, 0.0]);
        assert_eq!(read(&[1e-44, -1e-40]), [0.0, 0.0], "too small for a scale");
        assert_eq!(read(&[127.0, -127.0, 63.0]), [127.0, -127.0, 63.0]);
        let huge = read(&[f32::MAX, -f32::MAX]);
        assert!(huge.iter().all(|x| x.abs() > f32::MAX * 0.99), "{huge:?}");
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(read(&[1.0, wrong, 2.0]).iter().all(|x| x.is_nan()));
        }
    }

    #[test]
    fn other_types_stand_as_they_are() {
        let numbers = numbers(3);
        for element in [Element::F32, Element::Bf16] {
            let mut words = vec![0u32; element.vector_bytes(80) / 4];
            element.write(&numbers, bytemuck::cast_slice_mut(&mut words));
            let mut back = vec![0.0; 80];
            element.read(bytemuck::cast_slice(&words), 80, &mut back);
            let want = numbers.iter().map(|x| if element == Element::F32 { *x } else { bf16::from_f32(*x).to_f32() });
            assert!(back.iter().copied().eq(want), "{element:?}");
        }
    }
}
