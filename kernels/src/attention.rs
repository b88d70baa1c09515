//! Paged attention for one query token: the decode half of attention. Decides the order of the sums, nothing else.
//!
//! Online softmax (Milakov, Gimelshein 2018) over tiles of 16 tokens, block by block, the way of FlashAttention (Dao et al. 2022):
//! each byte of K and V is read from memory once for all query heads that share it. A row is computed by itself and in a fixed
//! order, so its bits do not depend on what else is in the batch. A long context is cut into parts of a fixed length, whoever computes
//! them, and the parts are merged in order.

use std::marker::PhantomData;
use std::ops::{Deref, Range};

use bytemuck::Pod;

use crate::element::{Element, GROUP as INT8_GROUP, int8_scale};
use crate::isa::Isa;
use crate::lanes::{Kernel, LANES, Simd, call_for, exp, run};

/// Query heads computed together, so that their sums stay in registers.
const GROUP: usize = 4;
/// Tokens of one part of a context: short enough that two threads share a short one, long enough that merging costs little.
pub const PART_TOKENS: usize = 64;

/// The shape of a model's decode attention. A cell is `[2 (K, V), kv_heads, block_tokens]` of vectors of `head_dim` numbers, or
/// `[kv_heads, block_tokens]` of them with a latent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeShape {
    /// Query heads: a multiple of `kv_heads`; head `h` reads KV head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// For a latent: cells hold one vector for K and V, and V is its first so many elements.
    pub latent: Option<usize>,
    /// Tokens of one cell.
    pub block_tokens: usize,
    /// Element type of the cells.
    pub element: Element,
    /// Scores are multiplied by this before the softmax: `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl DecodeShape {
    /// Elements of one head of V.
    #[must_use]
    pub const fn value_dim(&self) -> usize {
        match self.latent {
            Some(elements) => elements,
            None => self.head_dim,
        }
    }

    /// Bytes of one vector.
    #[must_use]
    pub const fn vector_bytes(&self) -> usize {
        self.element.vector_bytes(self.head_dim)
    }

    /// Numbers of one part of a context: weighted sums of V `[heads, value_dim]`, then largest score and sum of exponentials of each head.
    #[must_use]
    pub const fn part_numbers(&self) -> usize {
        self.heads * (self.value_dim() + 2)
    }

    /// Blocks of one part of a context: [`PART_TOKENS`] tokens, or one block where that is longer.
    #[must_use]
    pub const fn part_blocks(&self) -> usize {
        if self.block_tokens >= PART_TOKENS { 1 } else { PART_TOKENS.div_ceil(self.block_tokens) }
    }

    /// Bytes of one cell.
    #[must_use]
    pub const fn cell_bytes(&self) -> usize {
        let parts = if self.latent.is_some() { 1 } else { 2 };
        parts * self.kv_heads * self.block_tokens * self.vector_bytes()
    }
}

/// Arguments that do not fit one another.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttentionError {
    /// A dimension is zero, a value longer than its latent, or the query heads are not a multiple of the KV heads.
    #[error("attention of {heads} query heads over {kv_heads} KV heads")]
    Heads {
        /// Query heads.
        heads: usize,
        /// Key/value heads.
        kv_heads: usize,
    },
    /// The query is not `[heads, head_dim]`, or the output not `[heads, value_dim]`.
    #[error("query or output of {got} elements, expected {expected}")]
    Query {
        /// Its elements.
        got: usize,
        /// What they should be.
        expected: usize,
    },
    /// A context of 0 tokens, or more than the cells hold.
    #[error("a context of tokens {context:?} in {cells} cells")]
    Context {
        /// Tokens to read.
        context: Range<usize>,
        /// Cells given.
        cells: usize,
    },
    /// A cell of the wrong size or alignment.
    #[error("a cell of {got} bytes, expected {expected}, aligned to its element")]
    Cell {
        /// Its bytes.
        got: usize,
        /// [`DecodeShape::cell_bytes`].
        expected: usize,
    },
}

/// Attention of one token over the `context` tokens in `cells` (its own included), with the instruction set `isa`
/// (the portable one where the machine lacks it).
///
/// `query`: `[heads, head_dim]`; `out`: `[heads, value_dim]`; `cells`: the sequence's blocks in order, longer than needed is fine.
///
/// # Errors
/// [`AttentionError`] when the arguments do not fit; `out` is then untouched.
pub fn paged_decode<C: Deref<Target = [u8]>>(
    isa: Isa,
    shape: &DecodeShape,
    query: &[f32],
    cells: &[C],
    context: usize,
    out: &mut [f32],
) -> Result<(), AttentionError> {
    if out.len() != shape.heads * shape.value_dim() {
        return Err(AttentionError::Query { got: out.len(), expected: shape.heads * shape.value_dim() });
    }
    let mut part = vec![0.0; shape.part_numbers()];
    paged_part(isa, shape, query, cells, 0..context, &mut part)?;
    merge_parts(isa, shape, &part, out)
}

/// As [`paged_decode`], for the part of a context that lies in `cells`: their tokens `context`, the first of which may lie within a cell where
/// a window begins there. `part` is [`DecodeShape::part_numbers`] long.
///
/// # Errors
/// [`AttentionError`] when the arguments do not fit; `part` is then untouched.
pub fn paged_part<C: Deref<Target = [u8]>>(
    isa: Isa,
    shape: &DecodeShape,
    query: &[f32],
    cells: &[C],
    context: Range<usize>,
    part: &mut [f32],
) -> Result<(), AttentionError> {
    check(shape, query, cells, &context)?;
    if part.len() != shape.part_numbers() {
        return Err(AttentionError::Query { got: part.len(), expected: shape.part_numbers() });
    }
    let (out, running) = part.split_at_mut(shape.heads * shape.value_dim());
    let running = running.as_chunks_mut().0;
    match shape.element {
        Element::F32 => run(isa, Row { shape, query, cells, context, out, running, element: PhantomData::<f32> }),
        Element::Bf16 => run(isa, Row { shape, query, cells, context, out, running, element: PhantomData::<u16> }),
        Element::Int8 => run(isa, Row { shape, query, cells, context, out, running, element: PhantomData::<u8> }),
    }
    Ok(())
}

/// The attention of one token from the parts of its context, one after the other. `out`: `[heads, value_dim]`.
///
/// # Errors
/// [`AttentionError`] when there is no part, or the lengths do not fit.
pub fn merge_parts(isa: Isa, shape: &DecodeShape, parts: &[f32], out: &mut [f32]) -> Result<(), AttentionError> {
    let expected = shape.heads * shape.value_dim();
    if out.len() != expected {
        return Err(AttentionError::Query { got: out.len(), expected });
    }
    if parts.is_empty() || !parts.len().is_multiple_of(shape.part_numbers()) {
        return Err(AttentionError::Query { got: parts.len(), expected: shape.part_numbers() });
    }
    run(isa, Merge { shape, parts, out });
    Ok(())
}

struct Merge<'a> {
    shape: &'a DecodeShape,
    parts: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Merge<'_> {
    /// Plain code: all that is wanted of the instruction set is the width of its vectors.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (heads, value_dim) = (self.shape.heads, self.shape.value_dim());
        let parts = self.parts.chunks_exact(self.shape.part_numbers());
        for (head, out) in self.out.chunks_exact_mut(value_dim).enumerate() {
            let of = |part: &[f32]| [part[heads * value_dim + 2 * head], part[heads * value_dim + 2 * head + 1]];
            let largest = parts.clone().map(|part| of(part)[0]).fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
            let total: f32 = parts.clone().map(|part| (of(part)[0] - largest).exp() * of(part)[1]).sum();
            out.fill(0.0);
            for part in parts.clone() {
                let weight = (of(part)[0] - largest).exp() / total;
                out.iter_mut().zip(&part[head * value_dim..]).for_each(|(out, x)| *out += x * weight);
            }
        }
    }
}

/// Everything that the kernel relies on.
fn check<C: Deref<Target = [u8]>>(
    shape: &DecodeShape,
    query: &[f32],
    cells: &[C],
    context: &Range<usize>,
) -> Result<(), AttentionError> {
    let DecodeShape { heads, kv_heads, head_dim, block_tokens, .. } = *shape;
    let values = 1..=head_dim;
    if kv_heads == 0 || !values.contains(&shape.value_dim()) || block_tokens == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(AttentionError::Heads { heads, kv_heads });
    }
    if query.len() != heads * head_dim {
        return Err(AttentionError::Query { got: query.len(), expected: heads * head_dim });
    }
    if context.is_empty() || context.end.div_ceil(block_tokens) > cells.len() {
        return Err(AttentionError::Context { context: context.clone(), cells: cells.len() });
    }
    let expected = shape.cell_bytes();
    match cells.iter().find(|cell| cell.len() != expected || cell.as_ptr().align_offset(shape.element.align()) != 0) {
        Some(cell) => Err(AttentionError::Cell { got: cell.len(), expected }),
        None => Ok(()),
    }
}

/// One row, checked.
struct Row<'a, C, T> {
    shape: &'a DecodeShape,
    query: &'a [f32],
    cells: &'a [C],
    context: Range<usize>,
    /// Weighted sums of V.
    out: &'a mut [f32],
    running: &'a mut [Running],
    element: PhantomData<T>,
}

/// What vectors are made of; numbers are read from them as f32.
trait Load: Pod {
    /// How many of it a vector of `dim` numbers takes.
    fn len(dim: usize) -> usize {
        dim
    }
    /// Numbers `LANES * c` and on of a vector, in registers.
    fn lanes<S: Simd>(s: S, vector: &[Self], dim: usize, c: usize) -> S::V;
    /// Number `at` of a vector.
    fn widen(vector: &[Self], dim: usize, at: usize) -> f32;
}

impl Load for f32 {
    #[inline(always)]
    fn lanes<S: Simd>(s: S, vector: &[Self], _dim: usize, c: usize) -> S::V {
        s.load(&vector.as_chunks().0[c])
    }

    #[inline(always)]
    fn widen(vector: &[Self], _dim: usize, at: usize) -> f32 {
        vector[at]
    }
}

/// The bits of a bfloat16.
impl Load for u16 {
    #[inline(always)]
    fn lanes<S: Simd>(s: S, vector: &[Self], _dim: usize, c: usize) -> S::V {
        s.load_bf16(&vector.as_chunks().0[c])
    }

    #[inline(always)]
    fn widen(vector: &[Self], _dim: usize, at: usize) -> f32 {
        f32::from_bits(u32::from(vector[at]) << 16)
    }
}

/// Signed bytes, then their scales.
impl Load for u8 {
    #[inline(always)]
    fn len(dim: usize) -> usize {
        Element::Int8.vector_bytes(dim)
    }

    #[inline(always)]
    fn lanes<S: Simd>(s: S, vector: &[Self], dim: usize, c: usize) -> S::V {
        s.mul(s.load_bytes(&vector.as_chunks().0[c]), s.splat(int8_scale(vector, dim, c * LANES / INT8_GROUP)))
    }

    #[inline(always)]
    fn widen(vector: &[Self], dim: usize, at: usize) -> f32 {
        f32::from(vector[at] as i8) * int8_scale(vector, dim, at / INT8_GROUP)
    }
}

/// The running softmax of one query head: largest score so far, sum of the exponentials relative to it.
type Running = [f32; 2];

impl<T: Load, C: Deref<Target = [u8]>> Kernel for Row<'_, C, T> {
    /// KV heads, then blocks, then the query heads of the group.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Row { shape, query, cells, context, out, running, .. } = self;
        let (dim, block, vector) = (shape.head_dim, shape.block_tokens, T::len(shape.head_dim));
        let group = shape.heads / shape.kv_heads;
        out.fill(0.0);
        running.fill([f32::NEG_INFINITY, 0.0]);
        let heads = query.chunks_exact(group * dim).zip(out.chunks_exact_mut(group * shape.value_dim()));
        let (first_cell, cells) = (context.start / block, &cells[..context.end.div_ceil(block)]);
        // Keys and values of what a block holds of the context.
        let of_block = |kv_head: usize, index: usize| {
            let (first, last) = (context.start.saturating_sub(index * block), (context.end - index * block).min(block));
            let cell = bytemuck::cast_slice::<u8, T>(&cells[index]);
            let values = if shape.latent.is_some() { cell } else { &cell[shape.kv_heads * block * vector..] };
            let span = (kv_head * block + first) * vector..(kv_head * block + last) * vector;
            [&cell[span.clone()], &values[span]]
        };
        for (kv_head, ((query, out), running)) in heads.zip(running.chunks_exact_mut(group)).enumerate() {
            for index in first_cell..cells.len() {
                // Blocks lie anywhere: the processor does not see what comes next.
                if index + 1 < cells.len() {
                    of_block(kv_head, index + 1).into_iter().for_each(call_for);
                } else if kv_head + 1 < shape.kv_heads {
                    of_block(kv_head + 1, first_cell).into_iter().for_each(call_for);
                }
                let [keys, values] = of_block(kv_head, index);
                group_block::<T, S>(s, shape, query, keys, values, running, out);
            }
        }
    }
}

/// One block of one KV head for all its query heads, `GROUP` at a time, in tiles of `LANES` tokens.
#[inline(always)]
fn group_block<T: Load, S: Simd>(
    s: S,
    shape: &DecodeShape,
    query: &[f32],
    keys: &[T],
    values: &[T],
    running: &mut [Running],
    out: &mut [f32],
) {
    let (dim, value_dim, span) = (shape.head_dim, shape.value_dim(), LANES * T::len(shape.head_dim));
    for (keys, values) in keys.chunks(span).zip(values.chunks(span)) {
        let tile = Tile { dim, value_dim, scale: shape.scale, keys, values };
        let parts = query.chunks(GROUP * dim).zip(running.chunks_mut(GROUP)).zip(out.chunks_mut(GROUP * value_dim));
        for ((query, running), out) in parts {
            match running.len() {
                1 => tile.step::<S, 1>(s, query, running, out),
                2 => tile.step::<S, 2>(s, query, running, out),
                3 => tile.step::<S, 3>(s, query, running, out),
                _ => tile.step::<S, GROUP>(s, query, running, out),
            }
        }
    }
}

/// What is added to the scores of a tile: from `n` on, of one that lacks its last `n` tokens.
static LACKING: [f32; 2 * LANES] = {
    let mut mask = [0.0; 2 * LANES];
    let mut i = LANES;
    while i < 2 * LANES {
        mask[i] = f32::NEG_INFINITY;
        i += 1;
    }
    mask
};

/// At most `LANES` tokens of one KV head: a key and a value each.
struct Tile<'a, T> {
    dim: usize,
    /// Numbers of each value that count.
    value_dim: usize,
    scale: f32,
    keys: &'a [T],
    values: &'a [T],
}

impl<T: Load> Tile<'_, T> {
    /// For `G` query heads: scores, softmax step, weighted sum.
    #[inline(always)]
    fn step<S: Simd, const G: usize>(&self, s: S, query: &[f32], running: &mut [Running], out: &mut [f32]) {
        let scores = self.scores::<S, G>(s, query);
        let (mut weights, mut shrink) = ([[0.0; LANES]; G], [0.0; LANES]);
        for g in 0..G {
            let ([before, _], largest) = (running[g], s.largest(scores[g]));
            running[g][0] = if largest > before { largest } else { before };
            shrink[g] = before - running[g][0];
        }
        s.store(exp(s, s.load(&shrink)), &mut shrink);
        for g in 0..G {
            let exponentials = exp(s, s.sub(scores[g], s.splat(running[g][0])));
            s.store(exponentials, &mut weights[g]);
            running[g][1] = running[g][1] * shrink[g] + s.sum(exponentials);
        }
        self.weigh::<S, G>(s, &weights, &shrink, out);
    }

    /// `scale * q . k` for each head and token; minus infinity for the tokens that a short tile lacks.
    #[inline(always)]
    fn scores<S: Simd, const G: usize>(&self, s: S, query: &[f32]) -> [S::V; G] {
        let (dim, size) = (self.dim, T::len(self.dim));
        let queries: [&[[f32; LANES]]; G] = std::array::from_fn(|g| query[g * dim..][..dim].as_chunks().0);
        let mut folded = [[s.splat(0.0); 2]; G];
        for (half, keys) in self.keys.chunks(LANES / 2 * size).enumerate().take(2) {
            let mut sums = [[s.splat(0.0); LANES / 2]; G];
            // A short half repeats its last token; what comes of that is not read.
            let last = keys.len() / size - 1;
            let keys: [&[T]; LANES / 2] = std::array::from_fn(|token| &keys[token.min(last) * size..][..size]);
            #[allow(clippy::needless_range_loop, reason = "it counts in several slices")]
            for c in 0..dim / LANES {
                for token in 0..LANES / 2 {
                    let key = T::lanes(s, keys[token], dim, c);
                    for g in 0..G {
                        sums[g][token] = s.fma(s.load(&queries[g][c]), key, sums[g][token]);
                    }
                }
            }
            for g in 0..G {
                folded[g][half] = s.fold(sums[g]);
            }
        }
        let lacking = LANES - (self.keys.len() / size).min(LANES);
        let mask = s.load(LACKING[lacking..].first_chunk().expect("no tile lacks more than it has"));
        let mut scores = [mask; G];
        for g in 0..G {
            let mut sums = s.join(folded[g][0], folded[g][1]);
            if !dim.is_multiple_of(LANES) {
                sums = s.add(sums, self.rest(s, &query[g * dim..][..dim]));
            }
            scores[g] = s.fma(sums, s.splat(self.scale), mask);
        }
        scores
    }

    /// What the elements of a head beyond whole registers add to the scores.
    #[inline(always)]
    fn rest<S: Simd>(&self, s: S, query: &[f32]) -> S::V {
        let whole = self.dim / LANES * LANES;
        let mut sums = [0.0; LANES];
        for (sum, key) in sums.iter_mut().zip(self.keys.chunks_exact(T::len(self.dim))) {
            *sum = query[whole..].iter().zip(whole..).fold(0.0, |sum, (q, at)| sum + q * T::widen(key, self.dim, at));
        }
        s.load(&sums)
    }

    /// `out = out * shrink + sum over tokens of weight * v`, for each head.
    #[inline(always)]
    fn weigh<S: Simd, const G: usize>(&self, s: S, weights: &[[f32; LANES]; G], shrink: &[f32; LANES], out: &mut [f32]) {
        let (dim, value_dim) = (self.dim, self.value_dim);
        let mut outs = out.chunks_exact_mut(value_dim);
        let outs: [&mut [[f32; LANES]]; G] = std::array::from_fn(|_| outs.next().unwrap_or_default().as_chunks_mut().0);
        #[allow(clippy::needless_range_loop, reason = "it counts in several slices")]
        for c in 0..value_dim / LANES {
            let mut sums = [s.splat(0.0); G];
            for g in 0..G {
                sums[g] = s.mul(s.load(&outs[g][c]), s.splat(shrink[g]));
            }
            for (token, value) in self.values.chunks_exact(T::len(dim)).enumerate().take(LANES) {
                let value = T::lanes(s, value, dim, c);
                for g in 0..G {
                    sums[g] = s.fma(s.splat(weights[g][token]), value, sums[g]);
                }
            }
            for g in 0..G {
                s.store(sums[g], &mut outs[g][c]);
            }
        }
        for g in 0..G {
            for c in value_dim - value_dim % LANES..value_dim {
                let products = self.values.chunks_exact(T::len(dim)).zip(&weights[g]);
                let start = out[g * value_dim + c] * shrink[g];
                out[g * value_dim + c] = products.fold(start, |sum, (value, weight)| sum + weight * T::widen(value, dim, c));
            }
        }
    }
}
