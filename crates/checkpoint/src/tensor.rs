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
        let mut out = Vec::with_capacity(self.len());
        let blocks = self.bytes.chunks_exact(self.dtype.block().1);
        match self.dtype {
            TensorType::F32 => out.extend(blocks.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
            TensorType::F16 => out.extend(blocks.map(|b| half_at(b, 0))),
            TensorType::BF16 => out.extend(blocks.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
            TensorType::Q8_0 => blocks.for_each(|b| push_q8_0(b, &mut out)),
            TensorType::Q4_0 => blocks.for_each(|b| push_q4(half_at(b, 0), -8, 0.0, &b[2..], &mut out)),
            TensorType::Q4_1 => blocks.for_each(|b| push_q4(half_at(b, 0), 0, half_at(b, 2), &b[4..], &mut out)),
        }
        out
    }

    /// The numbers in bfloat16: those of [`Self::to_f32`] rounded to nearest, ties to even.
    pub fn to_bf16(&self) -> Vec<bf16> {
        if self.dtype == TensorType::BF16 {
            return self.bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])).collect();
        }
        self.to_f32().into_iter().map(bf16::from_f32).collect()
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn push_q8_0(block: &[u8], out: &mut Vec<f32>) {
    let scale = half_at(block, 0);
    out.extend(block[2..].iter().map(|&q| f32::from(q as i8) * scale));
}

/// Low nibbles are the first 16 numbers of the block, high nibbles the last 16.
fn push_q4(scale: f32, bias: i8, min: f32, nibbles: &[u8], out: &mut Vec<f32>) {
    let number = |q: u8| f32::from(q as i8 + bias) * scale + min;
    out.extend(nibbles.iter().map(|&pair| number(pair & 0x0f)));
    out.extend(nibbles.iter().map(|&pair| number(pair >> 4)));
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
        let f32s = view(TensorType::F32, [1.5f32, -0.0, 1.00390625].iter().flat_map(|x| x.to_le_bytes()).collect());
        assert_eq!(f32s.to_f32(), [1.5, 0.0, 1.00390625]);
        // 1 + 2^-8 is half way between two bfloat16: ties go to even.
        assert_eq!(f32s.to_bf16()[2].to_f32(), 1.0);
        assert_eq!(view(TensorType::F16, half(0.1).to_vec()).to_f32(), [f16::from_f32(0.1).to_f32()]);
        let bytes = bf16::from_f32(-7.25).to_le_bytes().to_vec();
        assert_eq!(view(TensorType::BF16, bytes.clone()).to_f32(), [-7.25]);
        assert_eq!(view(TensorType::BF16, bytes).to_bf16(), [bf16::from_f32(-7.25)]);
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
