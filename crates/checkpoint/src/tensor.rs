//! One tensor: its type, its shape, its bytes, and how they become numbers.
//!
//! The block formats are those of ggml (`ggml-common.h`, `dequantize_row_q*` in `ggml-quants.c`): 32 numbers of a row share a
//! scale, and a row is a whole number of blocks. All bytes are little-endian; none is assumed to be aligned.

use half::{bf16, f16};
use std::borrow::Cow;

/// Numbers in one block of a quantised type.
pub const QUANT_BLOCK: usize = 32;

/// How the numbers of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum TensorType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    BF16,
    /// 8-bit signed, `x = d * q`.
    Q8_0,
    /// 4-bit, `x = d * (q - 8)`.
    Q4_0,
    /// 4-bit, `x = d * q + m`.
    Q4_1,
}

impl TensorType {
    /// (numbers, bytes) of the smallest unit that can be read.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q8_0 => (QUANT_BLOCK, 2 + 32),
            Self::Q4_0 => (QUANT_BLOCK, 2 + 16),
            Self::Q4_1 => (QUANT_BLOCK, 2 + 2 + 16),
        }
    }

    /// Bytes of a tensor of `shape` (rows last), or `None` if that overflows or a row is not whole blocks.
    pub fn bytes_for(self, shape: &[usize]) -> Option<usize> {
        let (numbers, bytes) = self.block();
        let row = shape.last().copied().unwrap_or(1);
        if row % numbers != 0 {
            return None;
        }
        let total = shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side))?;
        (total / numbers).checked_mul(bytes)
    }
}

/// A tensor in the order of its canonical Hugging Face name: row-major, the last side of `shape` contiguous.
#[derive(Debug, Clone)]
pub struct TensorView<'a> {
    /// How `bytes` are to be read.
    pub dtype: TensorType,
    /// Sides, outermost first: a projection is `[out, in]`.
    pub shape: Vec<usize>,
    /// Exactly `dtype.bytes_for(&shape)` bytes. Borrowed from the mapped file, or owned where rows had to be put in order.
    pub bytes: Cow<'a, [u8]>,
}

impl TensorView<'_> {
    /// How many numbers the tensor holds.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether a side is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers in single precision, exact for every type but the rounding of `d * q + m` to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        decode(self.dtype, &self.bytes, &mut out);
        out
    }

    /// The numbers in bfloat16: those of [`Self::to_f32`] rounded to nearest, ties to even.
    pub fn to_bf16(&self) -> Vec<bf16> {
        // By pieces that stay in the cache: a whole embedding in f32 would be written to memory only to be read once.
        let piece_bytes = PIECE_BLOCKS * self.dtype.block().1;
        let mut numbers = vec![0.0; PIECE_BLOCKS * self.dtype.block().0];
        let mut out = Vec::with_capacity(self.len());
        for piece in self.bytes.chunks(piece_bytes) {
            let count = piece.len() / self.dtype.block().1 * self.dtype.block().0;
            decode(self.dtype, piece, &mut numbers[..count]);
            out.extend(numbers[..count].iter().map(|&x| rounded(x)));
        }
        out
    }
}

/// Blocks that [`TensorView::to_bf16`] decodes at a time.
const PIECE_BLOCKS: usize = 256;

/// Numbers of whole blocks; `out` has room for exactly them. Plain loops over fixed lengths, so that they become vector code.
fn decode(dtype: TensorType, bytes: &[u8], out: &mut [f32]) {
    let (numbers, size) = dtype.block();
    let blocks = bytes.chunks_exact(size).zip(out.chunks_exact_mut(numbers));
    match dtype {
        TensorType::F32 => blocks.for_each(|(b, o)| o[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        TensorType::F16 => blocks.for_each(|(b, o)| o[0] = half_at(b, 0)),
        TensorType::BF16 => blocks.for_each(|(b, o)| o[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
        TensorType::Q8_0 => blocks.for_each(|(b, o)| {
            let scale = half_at(b, 0);
            b[2..].iter().zip(o).for_each(|(&q, x)| *x = f32::from(q as i8) * scale);
        }),
        TensorType::Q4_0 => blocks.for_each(|(b, o)| decode_q4(half_at(b, 0), 8.0, 0.0, &b[2..], o)),
        TensorType::Q4_1 => blocks.for_each(|(b, o)| decode_q4(half_at(b, 0), 0.0, half_at(b, 2), &b[4..], o)),
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Low nibbles are the first 16 numbers of the block, high nibbles the last 16. `q - zero` is exact.
fn decode_q4(scale: f32, zero: f32, min: f32, nibbles: &[u8], out: &mut [f32]) {
    let number = |q: u8| (f32::from(q) - zero) * scale + min;
    let (first, last) = out.split_at_mut(QUANT_BLOCK / 2);
    for ((&pair, low), high) in nibbles.iter().zip(first).zip(last) {
        *low = number(pair & 0x0f);
        *high = number(pair >> 4);
    }
}

/// `bf16::from_f32` without a branch, which keeps the loop around it from becoming vector code.
fn rounded(x: f32) -> bf16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { quiet_nan } else { nearest } as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(dtype: TensorType, bytes: Vec<u8>) -> TensorView<'static> {
        let (numbers, size) = dtype.block();
        let shape = vec![bytes.len() / size * numbers];
        TensorView { dtype, shape, bytes: Cow::Owned(bytes) }
    }

    fn half(x: f32) -> [u8; 2] {
        f16::from_f32(x).to_le_bytes()
    }

    #[test]
    fn q8_0_by_hand() {
        let mut bytes = half(0.5).to_vec();
        bytes.extend((0..32).map(|i| (i as i8 - 16) as u8));
        bytes.extend(half(-2.0));
        bytes.extend([0x80; 32]);
        let x = view(TensorType::Q8_0, bytes).to_f32();
        assert_eq!(x.len(), 64);
        assert_eq!((x[0], x[16], x[31]), (-8.0, 0.0, 7.5));
        assert!(x[32..].iter().all(|&v| v == 256.0));
    }

    #[test]
    fn q4_0_by_hand() {
        let mut bytes = half(0.25).to_vec();
        bytes.push(0xf0); // first number 0 - 8, seventeenth 15 - 8
        bytes.extend([0x88; 14]);
        bytes.push(0x1a); // sixteenth 10 - 8, last 1 - 8
        let x = view(TensorType::Q4_0, bytes).to_f32();
        assert_eq!((x[0], x[1], x[15], x[16], x[17], x[31]), (-2.0, 0.0, 0.5, 1.75, 0.0, -1.75));
    }

    #[test]
    fn q4_1_by_hand() {
        let mut bytes = half(0.5).to_vec();
        bytes.extend(half(-3.0));
        bytes.extend((0..16u8).map(|i| i | ((15 - i) << 4)));
        let x = view(TensorType::Q4_1, bytes).to_f32();
        for i in 0..16 {
            assert_eq!(x[i], i as f32 * 0.5 - 3.0);
            assert_eq!(x[16 + i], (15 - i) as f32 * 0.5 - 3.0);
        }
    }

    #[test]
    fn floats_and_rounding() {
        let f32s = view(TensorType::F32, [1.5f32, -0.0, 1.003_906_3].iter().flat_map(|x| x.to_le_bytes()).collect());
        assert_eq!(f32s.to_f32(), [1.5, 0.0, 1.003_906_3]);
        // 1 + 2^-8 is half way between two bfloat16: ties go to even.
        assert_eq!(f32s.to_bf16()[2].to_f32(), 1.0);
        assert_eq!(view(TensorType::F16, half(0.1).to_vec()).to_f32(), [f16::from_f32(0.1).to_f32()]);
        let bytes = bf16::from_f32(-7.25).to_le_bytes().to_vec();
        assert_eq!(view(TensorType::BF16, bytes.clone()).to_f32(), [-7.25]);
        assert_eq!(view(TensorType::BF16, bytes).to_bf16(), [bf16::from_f32(-7.25)]);
    }

    #[test]
    fn rounding_is_that_of_half() {
        let mut bits = 0u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            for x in [f32::from_bits(bits), f32::from_bits(bits & 0xffff_8000), f32::from_bits(bits | 0x7f80_0000)] {
                assert_eq!(rounded(x).to_bits(), bf16::from_f32(x).to_bits(), "{x}");
            }
        }
    }

    #[test]
    fn pieces_of_a_long_tensor_join() {
        let blocks = 2 * PIECE_BLOCKS + 3;
        let bytes: Vec<u8> = (0..blocks).flat_map(|i| [half(i as f32).as_slice(), &[1; 32]].concat()).collect();
        let long = view(TensorType::Q8_0, bytes);
        let expected: Vec<bf16> = long.to_f32().into_iter().map(bf16::from_f32).collect();
        assert_eq!(expected[32 * (blocks - 1)].to_f32(), bf16::from_f32((blocks - 1) as f32).to_f32());
        assert!(long.to_bf16() == expected);
    }

    #[test]
    fn sizes_refuse_overflow_and_broken_rows() {
        assert_eq!(TensorType::Q4_1.bytes_for(&[3, 64]), Some(3 * 2 * 20));
        assert_eq!(TensorType::Q4_1.bytes_for(&[64, 33]), None);
        assert_eq!(TensorType::F32.bytes_for(&[usize::MAX, 2]), None);
        assert_eq!(TensorType::F32.bytes_for(&[usize::MAX / 2]), None);
        assert_eq!(TensorType::F32.bytes_for(&[]), Some(4));
    }
}
