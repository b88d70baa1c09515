//! Weights of linear layers, put in order for wide loads once. Decides the order, not how it is multiplied (`product`).
//!
//! Sixteen rows of weights make a *panel*; inside it the numbers of one column (or pair, or quad of columns) of all sixteen rows are neighbours, so one
//! load serves sixteen outputs. For bfloat16 this is also the order that AMX wants. Quantised weights stay quantised, bit for bit, and take the
//! bytes they take in a GGUF file; block formats: `ggml-common.h`.

use half::f16;

use crate::buffer::{Buffer, Line};
use crate::lanes::{LANES, Simd, call_near};

/// Numbers of one quantised block; every row is filled up to a multiple of it.
pub const BLOCK: usize = 32;

/// How the numbers of a matrix are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "the names that the formats have elsewhere")]
pub enum Format {
    /// Single precision.
    F32,
    /// The upper half of a single.
    Bf16,
    /// Blocks of 32: `d q`, q of 8 bits, signed.
    Q8_0,
    /// Blocks of 32: `d (q - 8)`, q of 4 bits.
    Q4_0,
    /// Blocks of 32: `d q + m`, q of 4 bits.
    Q4_1,
}

impl Format {
    /// Bytes of 32 numbers, in a file and here.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4 * BLOCK,
            Self::Bf16 => 2 * BLOCK,
            Self::Q8_0 => 2 + BLOCK,
            Self::Q4_0 => 2 + BLOCK / 2,
            Self::Q4_1 => 4 + BLOCK / 2,
        }
    }

    /// Whether numbers share scales, so that a row is whole blocks.
    #[must_use]
    pub const fn is_quantised(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4_0 | Self::Q4_1)
    }

    /// What stands for zero.
    pub(crate) const fn zero(self) -> f32 {
        match self {
            Self::Q8_0 => 128.0, // the sign bit is flipped when packed: dot products want unsigned weights
            Self::Q4_0 => 8.0,
            _ => 0.0,
        }
    }

    /// Lines of one block of a panel.
    const fn lines(self) -> usize {
        match self {
            Self::F32 => BLOCK,
            Self::Bf16 => BLOCK / 2,
            Self::Q8_0 => BLOCK / 4,
            Self::Q4_0 | Self::Q4_1 => BLOCK / 8,
        }
    }

    /// Sets of 16 halves that a block of a panel has beside its numbers: scales, minima.
    const fn scales(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 0,
            Self::Q8_0 | Self::Q4_0 => 1,
            Self::Q4_1 => 2,
        }
    }
}

/// Rows of weights as they stand in a file: row-major, little-endian, no alignment asked.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// How to read them.
    pub format: Format,
    /// Whole rows.
    pub bytes: &'a [u8],
}

/// Weights that cannot be a matrix.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// Rows of quantised numbers that are not whole blocks, or rows of none.
    #[error("rows of {columns} numbers in {format:?}")]
    Columns {
        /// Numbers of a row.
        columns: usize,
        /// Their format.
        format: Format,
    },
    /// Bytes that are not whole rows, or none.
    #[error("{got} bytes are not rows of {row} bytes")]
    Rows {
        /// Bytes given.
        got: usize,
        /// Bytes of a row.
        row: usize,
    },
}

/// A linear layer's weights `[rows, columns]`: one or several sources, rows after rows.
pub struct Matrix {
    pub(crate) parts: Vec<Part>,
    rows: usize,
    columns: usize,
}

/// The rows of one source.
pub(crate) struct Part {
    pub(crate) format: Format,
    /// Index of its first row in the matrix.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    /// Blocks of a row.
    pub(crate) steps: usize,
    /// `[panels, steps, Format::lines]`.
    lines: Buffer,
    /// `[panels, steps, Format::scales, 16]` halves.
    scales: Buffer,
}

impl Matrix {
    /// Copies `sources` into order.
    ///
    /// # Errors
    /// [`MatrixError`] when a source is not whole rows of `columns` numbers, or empty.
    pub fn new(columns: usize, sources: &[Source<'_>]) -> Result<Self, MatrixError> {
        let (mut parts, mut rows) = (Vec::new(), 0);
        for source in sources {
            let part = Part::new(columns, source, rows)?;
            rows += part.rows;
            parts.push(part);
        }
        if rows == 0 {
            return Err(MatrixError::Rows { got: 0, row: columns });
        }
        Ok(Self { parts, rows, columns })
    }

    /// Outputs.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes that a product reads at least.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| 64 * (part.lines.len() + part.scales.len())).sum()
    }

    /// One row in f32: what `d (q - zero) + m` rounds to.
    ///
    /// # Panics
    /// When there is no such row, or `out` is not `columns` long.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.columns);
        let part = self.parts.iter().rfind(|part| part.first <= row).expect("the first part begins at row 0");
        let (panel, lane) = ((row - part.first) / LANES, (row - part.first) % LANES);
        for (step, out) in out.chunks_mut(BLOCK).enumerate() {
            part.block(panel, step, lane, out);
        }
    }
}

impl Part {
    fn new(columns: usize, source: &Source<'_>, first: usize) -> Result<Self, MatrixError> {
        let Source { format, bytes } = *source;
        if columns == 0 || (format.is_quantised() && !columns.is_multiple_of(BLOCK)) {
            return Err(MatrixError::Columns { columns, format });
        }
        let row =
            if format.is_quantised() { columns / BLOCK * format.block_bytes() } else { columns * format.block_bytes() / BLOCK };
        if bytes.is_empty() || !bytes.len().is_multiple_of(row) {
            return Err(MatrixError::Rows { got: bytes.len(), row });
        }
        let (rows, steps) = (bytes.len() / row, columns.div_ceil(BLOCK));
        let blocks = rows.div_ceil(LANES) * steps;
        let (lines, scales) = (Buffer::zeroed(blocks * format.lines()), Buffer::zeroed((blocks * format.scales()).div_ceil(2)));
        let mut part = Self { format, first, rows, steps, lines, scales };
        bytes.chunks_exact(row).enumerate().for_each(|(row, bytes)| part.pack(row / LANES, row % LANES, bytes));
        Ok(part)
    }

    /// Puts one row in its lane.
    fn pack(&mut self, panel: usize, lane: usize, row: &[u8]) {
        let (format, steps) = (self.format, self.steps);
        let lines = &mut self.lines[panel * steps * format.lines()..][..steps * format.lines()];
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0u32, |word, &byte| word << 8 | u32::from(byte));
        match format {
            Format::F32 | Format::Bf16 => {
                row.chunks(4).zip(lines).for_each(|(bytes, line)| line.0[lane] = word(bytes));
            }
            Format::Q8_0 | Format::Q4_0 | Format::Q4_1 => {
                let sets = format.scales();
                let scales = bytemuck::cast_slice_mut::<Line, [u16; LANES]>(&mut self.scales);
                let scales = &mut scales[panel * steps * sets..][..steps * sets];
                let blocks = row.chunks_exact(format.block_bytes()).zip(lines.chunks_exact_mut(format.lines()));
                for ((block, lines), scales) in blocks.zip(scales.chunks_exact_mut(sets)) {
                    let (halves, numbers) = block.split_at(2 * sets);
                    scales.iter_mut().zip(halves.chunks_exact(2)).for_each(|(set, half)| set[lane] = word(half) as u16);
                    let flip = if format == Format::Q8_0 { 0x8080_8080 } else { 0 };
                    lines.iter_mut().zip(numbers.chunks_exact(4)).for_each(|(line, bytes)| line.0[lane] = word(bytes) ^ flip);
                }
            }
        }
    }

    /// Panels of 16 rows; the last may hold fewer, with zeroes behind them.
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// The numbers of one panel.
    #[inline(always)]
    pub(crate) fn panel(&self, panel: usize) -> &[Line] {
        let lines = self.steps * self.format.lines();
        &self.lines[panel * lines..][..lines]
    }

    /// Scales (and minima) of one panel.
    #[inline(always)]
    pub(crate) fn panel_scales(&self, panel: usize) -> &[[u16; LANES]] {
        let sets = self.steps * self.format.scales();
        &bytemuck::cast_slice::<Line, [u16; LANES]>(&self.scales)[panel * sets..][..sets]
    }

    /// Up to 32 numbers of one row.
    fn block(&self, panel: usize, step: usize, lane: usize, out: &mut [f32]) {
        let lines = &self.panel(panel)[step * self.format.lines()..][..self.format.lines()];
        let bytes = |i: usize| lines[i / 4].0[lane].to_le_bytes()[i % 4];
        let set = |i: usize| f16::from_bits(self.panel_scales(panel)[step * self.format.scales() + i][lane]).to_f32();
        let zero = self.format.zero();
        for (i, out) in out.iter_mut().enumerate() {
            let nibble = |i: usize| if i < BLOCK / 2 { bytes(i) & 15 } else { bytes(i - BLOCK / 2) >> 4 };
            *out = match self.format {
                Format::F32 => f32::from_bits(lines[i].0[lane]),
                Format::Bf16 if i % 2 == 0 => f32::from_bits(lines[i / 2].0[lane] << 16),
                Format::Bf16 => f32::from_bits(lines[i / 2].0[lane] & 0xffff_0000),
                Format::Q8_0 => (f32::from(bytes(i)) - zero) * set(0),
                Format::Q4_0 => (f32::from(nibble(i)) - zero) * set(0),
                Format::Q4_1 => f32::from(nibble(i)) * set(0) + set(1),
            };
        }
    }

    /// One panel as `out` takes it, column pair by column pair; those of the later half of a block come between those of the first.
    #[inline(always)]
    pub(crate) fn unpack<S: Simd>(&self, s: S, panel: usize, out: &mut impl Unpacked) {
        let lines = self.panel(panel);
        match self.format {
            Format::F32 => {
                for (pair, lines) in lines.as_chunks::<2>().0.iter().enumerate() {
                    out.put(s, pair, s.load(bytemuck::cast_ref(&lines[0].0)), s.load(bytemuck::cast_ref(&lines[1].0)));
                }
            }
            Format::Bf16 => {
                for (pair, line) in lines.iter().enumerate() {
                    let words = s.words(&line.0);
                    out.put(s, pair, s.low_halves(words), s.high_halves(words));
                }
            }
            Format::Q8_0 => self.unpack_blocks::<S, 8>(s, panel, out),
            Format::Q4_0 | Format::Q4_1 => self.unpack_blocks::<S, 4>(s, panel, out),
        }
    }

    /// As [`Self::unpack`], of blocks of `LINES` lines.
    #[inline(always)]
    fn unpack_blocks<S: Simd, const LINES: usize>(&self, s: S, panel: usize, out: &mut impl Unpacked) {
        let (sets, scales) = (self.format.scales(), self.panel_scales(panel));
        // Who multiplies goes through pairs of panels: this one's place in the next pair.
        let next = if panel + 2 < self.panels() { panel + 2 } else { panel };
        let (next, next_scales) = (self.panel(next).as_chunks::<LINES>().0, self.panel_scales(next));
        for (step, lines) in self.panel(panel).as_chunks::<LINES>().0.iter().enumerate() {
            let scale = s.load_f16(&scales[step * sets]);
            let min = if sets == 2 { s.load_f16(&scales[step * sets + 1]) } else { s.splat(0.0) };
            let block = Scaled { scale, min, zero: self.format.zero() };
            call_near(&next[step]);
            call_near(&next_scales[step * sets..][..1]);
            for (index, line) in lines.iter().enumerate() {
                let (words, pair) = (s.words(&line.0), step * BLOCK / 2 + 2 * index);
                if LINES == 8 {
                    out.quad::<S, false>(s, pair, words, &block);
                } else {
                    out.quad::<S, true>(s, pair, s.low_nibbles(words), &block);
                    out.quad::<S, true>(s, pair + BLOCK / 4, s.high_nibbles(words), &block);
                }
            }
        }
    }
}

/// Where the numbers of a panel go. A trait and not a closure: closures that are not inlined make vector instructions calls.
pub(crate) trait Unpacked {
    /// Takes columns `2 pair` and `2 pair + 1` of all 16 rows. Implementations are `inline(always)`.
    fn put<S: Simd>(&mut self, s: S, pair: usize, low: S::V, high: S::V);
    /// Takes the four columns from `2 pair` on, which are bytes of a block; with `NIBBLES` none is above 15.
    fn quad<S: Simd, const NIBBLES: bool>(&mut self, s: S, pair: usize, words: S::I, block: &Scaled<S::V>);
}

/// f32, `[columns, 16]`.
pub(crate) struct InF32<'a>(pub(crate) &'a mut [Line]);

impl Unpacked for InF32<'_> {
    #[inline(always)]
    fn put<S: Simd>(&mut self, s: S, pair: usize, low: S::V, high: S::V) {
        s.store(low, bytemuck::cast_mut(&mut self.0[2 * pair].0));
        s.store(high, bytemuck::cast_mut(&mut self.0[2 * pair + 1].0));
    }

    #[inline(always)]
    fn quad<S: Simd, const NIBBLES: bool>(&mut self, s: S, pair: usize, words: S::I, block: &Scaled<S::V>) {
        self.put(s, pair, block.number(s, s.byte::<0>(words)), block.number(s, s.byte::<1>(words)));
        self.put(s, pair + 1, block.number(s, s.byte::<2>(words)), block.number(s, s.byte::<3>(words)));
    }
}

/// bfloat16, `[columns / 2, 16, 2]`.
pub(crate) struct InHalves<'a>(pub(crate) &'a mut [Line]);

impl Unpacked for InHalves<'_> {
    #[inline(always)]
    fn put<S: Simd>(&mut self, s: S, pair: usize, low: S::V, high: S::V) {
        s.store_words(s.halves(low, high), &mut self.0[pair].0);
    }

    /// A scale has 11 bits, a number 8 at most: products are exact, and all is rounded once. Only a minimum that is less than 1/64 of its scale may lose
    /// what is less than 2^-17 of the scale.
    #[inline(always)]
    fn quad<S: Simd, const NIBBLES: bool>(&mut self, s: S, pair: usize, words: S::I, block: &Scaled<S::V>) {
        let zero = s.splat(-(s.beside(NIBBLES) + block.zero));
        let (scale, shift) = (s.spread(block.scale), s.spread(s.fma(block.scale, zero, block.min)));
        let pairs = s.scaled_bytes::<NIBBLES>(words, scale, shift);
        s.store_words(pairs[0], &mut self.0[pair].0);
        s.store_words(pairs[1], &mut self.0[pair + 1].0);
    }
}

/// What the numbers of a block are: `(byte - zero) scale + min`.
pub(crate) struct Scaled<V> {
    scale: V,
    min: V,
    zero: f32,
}

impl<V: Copy> Scaled<V> {
    #[inline(always)]
    fn number<S: Simd<V = V>>(&self, s: S, byte: V) -> V {
        s.add(s.mul(s.sub(byte, s.splat(self.zero)), self.scale), self.min)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::isa::Isa;
    use crate::lanes::{Kernel, run};

    #[test]
    fn what_is_not_rows_is_refused() {
        let new = |columns, format, bytes: &[u8]| Matrix::new(columns, &[Source { format, bytes }]).map(|m| m.rows());
        assert_eq!(new(3, Format::F32, &[0; 24]), Ok(2));
        assert_eq!(new(32, Format::Q4_1, &[0; 60]), Ok(3));
        assert_eq!(new(33, Format::Q4_1, &[0; 60]), Err(MatrixError::Columns { columns: 33, format: Format::Q4_1 }));
        assert_eq!(new(0, Format::F32, &[0; 4]), Err(MatrixError::Columns { columns: 0, format: Format::F32 }));
        assert_eq!(new(3, Format::Bf16, &[0; 7]), Err(MatrixError::Rows { got: 7, row: 6 }));
        assert_eq!(new(3, Format::Bf16, &[]), Err(MatrixError::Rows { got: 0, row: 6 }));
        assert!(matches!(Matrix::new(4, &[]), Err(MatrixError::Rows { .. })));
    }

    /// A panel of a part in bfloat16.
    struct Halved<'a>(&'a Part, &'a mut [Line]);

    impl Kernel for Halved<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            self.0.unpack(s, 0, &mut InHalves(self.1));
        }
    }

    #[test]
    fn panels_in_bfloat16_are_their_rows_rounded_once() {
        const COLUMNS: usize = 3 * BLOCK;
        for format in [Format::Q8_0, Format::Q4_0, Format::Q4_1] {
            let mut bytes: Vec<u8> = (0..LANES * 3 * format.block_bytes()).map(|i| (i * 151 + i / 7) as u8).collect();
            for (index, block) in bytes.chunks_exact_mut(format.block_bytes()).enumerate() {
                let scale = f16::from_f32(0.01 + index as f32 * 0.003);
                block[..2].copy_from_slice(&scale.to_le_bytes());
                if format == Format::Q4_1 {
                    let min = f16::from_f32(if index % 3 == 0 { 0.0 } else { -7.7 * scale.to_f32() });
                    block[2..4].copy_from_slice(&min.to_le_bytes());
                }
            }
            let matrix = Matrix::new(COLUMNS, &[Source { format, bytes: &bytes }]).unwrap();
            for isa in Isa::available() {
                let mut lines = vec![Line([0; LANES]); COLUMNS / 2];
                run(isa, Halved(&matrix.parts[0], &mut lines));
                let halves: &[u16] = bytemuck::cast_slice(&lines);
                let mut row = vec![0.0; COLUMNS];
                for lane in 0..LANES {
                    matrix.row(lane, &mut row);
                    for (column, x) in row.iter().enumerate() {
                        let got = halves[column / 2 * 2 * LANES + 2 * lane + column % 2];
                        assert_eq!(bf16::from_bits(got), bf16::from_f32(*x), "{format:?} {isa:?}: row {lane}, column {column}");
                    }
                }
            }
        }
    }

    #[test]
    fn quantised_weights_take_the_bytes_they_take_in_a_file() {
        for format in [Format::Q8_0, Format::Q4_0, Format::Q4_1] {
            let bytes = vec![0; 64 * 576 / BLOCK * format.block_bytes()];
            assert_eq!(Matrix::new(576, &[Source { format, bytes: &bytes }]).unwrap().bytes(), bytes.len());
        }
    }
}
