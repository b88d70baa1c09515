//! Paged attention for one query token: the decode half of attention. Decides the order of the sums, nothing else.
//!
//! Online softmax (Milakov, Gimelshein 2018) over tiles of 16 tokens, block by block, the way of FlashAttention (Dao et al. 2022):
//! each byte of K and V is read from memory once for all query heads that share it. A row is computed by itself and in a fixed
//! order, so its bits do not depend on what else is in the batch.

use std::ops::Deref;

use bytemuck::Pod;

use crate::isa::Isa;
use crate::lanes::{LANES, Lanes, exp, fma, sum};

/// Query heads computed together, so that their sums stay in registers.
const GROUP: usize = 4;

/// Element type of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
}

impl Element {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// The shape of a model's decode attention. A cell is `[2 (K, V), kv_heads, block_tokens, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeShape {
    /// Query heads: a multiple of `kv_heads`; head `h` reads KV head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Tokens of one cell.
    pub block_tokens: usize,
    /// Element type of the cells.
    pub element: Element,
    /// Scores are multiplied by this before the softmax: `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl DecodeShape {
    /// Bytes of one cell.
    #[must_use]
    pub const fn cell_bytes(&self) -> usize {
        2 * self.kv_heads * self.block_tokens * self.head_dim * self.element.bytes()
    }
}

/// Arguments that do not fit one another.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttentionError {
    /// A dimension is zero, or the query heads are not a multiple of the KV heads.
    #[error("attention of {heads} query heads over {kv_heads} KV heads")]
    Heads {
        /// Query heads.
        heads: usize,
        /// Key/value heads.
        kv_heads: usize,
    },
    /// The query or the output is not `[heads, head_dim]`.
    #[error("query or output of {got} elements, expected {expected}")]
    Query {
        /// Its elements.
        got: usize,
        /// `heads * head_dim`.
        expected: usize,
    },
    /// A context of 0 tokens, or more than the cells hold.
    #[error("a context of {context} tokens in {cells} cells")]
    Context {
        /// Tokens to read.
        context: usize,
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
/// `query`, `out`: `[heads, head_dim]`; `cells`: the sequence's blocks in order, longer than needed is fine.
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
    check(shape, query, cells, context, out)?;
    match shape.element {
        Element::F32 => dispatch::<f32, C>(isa, shape, query, cells, context, out),
        Element::Bf16 => dispatch::<u16, C>(isa, shape, query, cells, context, out),
    }
    Ok(())
}

/// Everything that the kernel relies on.
fn check<C: Deref<Target = [u8]>>(
    shape: &DecodeShape,
    query: &[f32],
    cells: &[C],
    context: usize,
    out: &[f32],
) -> Result<(), AttentionError> {
    let DecodeShape { heads, kv_heads, head_dim, block_tokens, .. } = *shape;
    if kv_heads == 0 || head_dim == 0 || block_tokens == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(AttentionError::Heads { heads, kv_heads });
    }
    for got in [query.len(), out.len()] {
        if got != heads * head_dim {
            return Err(AttentionError::Query { got, expected: heads * head_dim });
        }
    }
    if context == 0 || context.div_ceil(block_tokens) > cells.len() {
        return Err(AttentionError::Context { context, cells: cells.len() });
    }
    let expected = shape.cell_bytes();
    match cells.iter().find(|cell| cell.len() != expected || cell.as_ptr().align_offset(shape.element.bytes()) != 0) {
        Some(cell) => Err(AttentionError::Cell { got: cell.len(), expected }),
        None => Ok(()),
    }
}

/// An element that widens to f32.
trait Load: Pod {
    /// Its value.
    fn widen(self) -> f32;
}

impl Load for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

/// The bits of a bfloat16.
impl Load for u16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
}

/// Runs the row on `isa`, or on the portable target where the machine lacks it.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn dispatch<T: Load, C: Deref<Target = [u8]>>(
    isa: Isa,
    shape: &DecodeShape,
    query: &[f32],
    cells: &[C],
    context: usize,
    out: &mut [f32],
) {
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    fn avx512<T: Load, C: Deref<Target = [u8]>>(shape: &DecodeShape, q: &[f32], cells: &[C], context: usize, out: &mut [f32]) {
        row::<T, C, true>(shape, q, cells, context, out);
    }
    #[target_feature(enable = "avx2,fma")]
    fn avx2<T: Load, C: Deref<Target = [u8]>>(shape: &DecodeShape, q: &[f32], cells: &[C], context: usize, out: &mut [f32]) {
        row::<T, C, true>(shape, q, cells, context, out);
    }
    match isa {
        // SAFETY: `is_available` has just found all of the features that the function is compiled for; it has no other demand.
        Isa::Avx512 if isa.is_available() => unsafe { avx512::<T, C>(shape, query, cells, context, out) },
        // SAFETY: as above.
        Isa::Avx2 if isa.is_available() => unsafe { avx2::<T, C>(shape, query, cells, context, out) },
        _ => row::<T, C, false>(shape, query, cells, context, out),
    }
}

/// Runs the row.
#[cfg(not(target_arch = "x86_64"))]
fn dispatch<T: Load, C: Deref<Target = [u8]>>(
    _isa: Isa,
    shape: &DecodeShape,
    query: &[f32],
    cells: &[C],
    context: usize,
    out: &mut [f32],
) {
    row::<T, C, false>(shape, query, cells, context, out);
}

/// The running softmax of one query head: largest score so far, sum of the exponentials relative to it.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
}

/// The whole row: KV heads, then blocks, then the query heads of the group. `out` holds the weighted sums of V on the way.
#[inline(always)]
fn row<T: Load, C: Deref<Target = [u8]>, const FUSED: bool>(
    shape: &DecodeShape,
    query: &[f32],
    cells: &[C],
    context: usize,
    out: &mut [f32],
) {
    let (dim, block) = (shape.head_dim, shape.block_tokens);
    let group = shape.heads / shape.kv_heads;
    out.fill(0.0);
    let heads = query.chunks_exact(group * dim).zip(out.chunks_exact_mut(group * dim));
    for (kv_head, (query, out)) in heads.enumerate() {
        let mut running = vec![Running { max: f32::NEG_INFINITY, sum: 0.0 }; group];
        for (index, cell) in cells.iter().take(context.div_ceil(block)).enumerate() {
            let tokens = (context - index * block).min(block);
            let (keys, values) = bytemuck::cast_slice::<u8, T>(cell).split_at(shape.kv_heads * block * dim);
            let span = kv_head * block * dim..(kv_head * block + tokens) * dim;
            group_block::<T, FUSED>(shape, query, &keys[span.clone()], &values[span], &mut running, out);
        }
        for (running, out) in running.iter().zip(out.chunks_exact_mut(dim)) {
            out.iter_mut().for_each(|x| *x /= running.sum);
        }
    }
}

/// One block of one KV head for all its query heads, `GROUP` at a time, in tiles of `LANES` tokens.
#[inline(always)]
fn group_block<T: Load, const FUSED: bool>(
    shape: &DecodeShape,
    query: &[f32],
    keys: &[T],
    values: &[T],
    running: &mut [Running],
    out: &mut [f32],
) {
    let (dim, scale) = (shape.head_dim, shape.scale);
    for (keys, values) in keys.chunks(LANES * dim).zip(values.chunks(LANES * dim)) {
        let parts = query.chunks(GROUP * dim).zip(running.chunks_mut(GROUP)).zip(out.chunks_mut(GROUP * dim));
        for ((query, running), out) in parts {
            match running.len() {
                1 => tile::<T, FUSED, 1>(dim, scale, query, keys, values, running, out),
                2 => tile::<T, FUSED, 2>(dim, scale, query, keys, values, running, out),
                3 => tile::<T, FUSED, 3>(dim, scale, query, keys, values, running, out),
                _ => tile::<T, FUSED, GROUP>(dim, scale, query, keys, values, running, out),
            }
        }
    }
}

/// One tile of at most `LANES` tokens for `G` query heads: scores, softmax step, weighted sum.
#[inline(always)]
fn tile<T: Load, const FUSED: bool, const G: usize>(
    dim: usize,
    scale: f32,
    query: &[f32],
    keys: &[T],
    values: &[T],
    running: &mut [Running],
    out: &mut [f32],
) {
    let mut weights = scores::<T, FUSED, G>(dim, scale, query, keys);
    let mut shrink = [0.0; G];
    for g in 0..G {
        let max = weights[g].iter().fold(running[g].max, |max, &score| if score > max { score } else { max });
        for weight in &mut weights[g] {
            *weight = exp::<FUSED>(*weight - max);
        }
        shrink[g] = exp::<FUSED>(running[g].max - max);
        running[g] = Running { max, sum: fma::<FUSED>(running[g].sum, shrink[g], sum(&weights[g])) };
    }
    weigh::<T, FUSED, G>(dim, &weights, &shrink, values, out);
}

/// `scale * q . k` for each head and token of a tile; minus infinity for the tokens that a short tile lacks.
#[inline(always)]
fn scores<T: Load, const FUSED: bool, const G: usize>(dim: usize, scale: f32, query: &[f32], keys: &[T]) -> [Lanes; G] {
    let mut scores = [[f32::NEG_INFINITY; LANES]; G];
    let queries: [(&[Lanes], &[f32]); G] = std::array::from_fn(|g| query[g * dim..(g + 1) * dim].as_chunks::<LANES>());
    for (token, key) in keys.chunks_exact(dim).enumerate().take(LANES) {
        let (key, key_tail) = key.as_chunks::<LANES>();
        let mut sums = [[0.0f32; LANES]; G];
        for (c, key) in key.iter().enumerate() {
            for g in 0..G {
                let query = &queries[g].0[c];
                for i in 0..LANES {
                    sums[g][i] = fma::<FUSED>(query[i], key[i].widen(), sums[g][i]);
                }
            }
        }
        for g in 0..G {
            let mut score = sum(&sums[g]);
            for (query, key) in queries[g].1.iter().zip(key_tail) {
                score = fma::<FUSED>(*query, key.widen(), score);
            }
            scores[g][token] = score * scale;
        }
    }
    scores
}

/// `out = out * shrink + sum over tokens of weight * v`, for each head of a tile.
#[inline(always)]
fn weigh<T: Load, const FUSED: bool, const G: usize>(
    dim: usize,
    weights: &[Lanes; G],
    shrink: &[f32; G],
    values: &[T],
    out: &mut [f32],
) {
    let whole = dim - dim % LANES;
    for c in (0..whole).step_by(LANES) {
        let mut sums = [[0.0f32; LANES]; G];
        for g in 0..G {
            for i in 0..LANES {
                sums[g][i] = out[g * dim + c + i] * shrink[g];
            }
        }
        for (token, value) in values.chunks_exact(dim).enumerate().take(LANES) {
            let value = &value[c..c + LANES];
            for g in 0..G {
                for i in 0..LANES {
                    sums[g][i] = fma::<FUSED>(weights[g][token], value[i].widen(), sums[g][i]);
                }
            }
        }
        for g in 0..G {
            out[g * dim + c..][..LANES].copy_from_slice(&sums[g]);
        }
    }
    for g in 0..G {
        for c in whole..dim {
            let products = values.chunks_exact(dim).zip(&weights[g]);
            let start = out[g * dim + c] * shrink[g];
            out[g * dim + c] = products.fold(start, |sum, (value, weight)| fma::<FUSED>(*weight, value[c].widen(), sum));
        }
    }
}
