//! Paged attention for one query token: the decode half of attention. Decides the order of the sums, nothing else.
//!
//! Online softmax (Milakov, Gimelshein 2018) over spans of a few tiles of 16 tokens, block by block, the way of FlashAttention (Dao et
//! al. 2022): each byte of K and V is read from memory once for all query heads that share it (`row`). What stands in cells is widened to
//! f32, or taken in pairs where the processor has products of such (`numbers`). A row is computed by itself and in a fixed order, so its bits
//! do not depend on what else is in the batch. A long context is cut into parts of a fixed length, whoever computes them, and the
//! parts are merged in order.

mod numbers;
mod row;

use std::cell::RefCell;
use std::ops::{Deref, Range};

use self::numbers::{Pairs, Round};
use self::row::Row;
use crate::element::Element;
use crate::isa::Isa;
use crate::lanes::{Kernel, Simd, run};
use crate::slab::Place;

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
    let mut sums = vec![0.0; shape.part_numbers()];
    paged_part(isa, shape, &RowPart { query, cells, context: 0..context, ahead: &[] }, &mut sums)?;
    merge_parts(isa, shape, &sums, out)
}

/// A part of the context of one token.
#[derive(Clone, Debug)]
pub struct RowPart<'a, C> {
    /// `[heads, head_dim]`.
    pub query: &'a [f32],
    /// The blocks of the part in order; longer than needed is fine.
    pub cells: &'a [C],
    /// Tokens to read, counted from the first of `cells`, where a window may begin within.
    pub context: Range<usize>,
    /// The cells that this thread attends to next, called for meanwhile.
    pub ahead: &'a [Place],
}

/// As [`paged_decode`], for a part of a context. `sums` is [`DecodeShape::part_numbers`] long.
///
/// # Errors
/// [`AttentionError`] when the arguments do not fit; `sums` is then untouched.
pub fn paged_part<C: Deref<Target = [u8]>>(
    isa: Isa,
    shape: &DecodeShape,
    part: &RowPart<'_, C>,
    sums: &mut [f32],
) -> Result<(), AttentionError> {
    let query = part.query;
    check(shape, query, part.cells, &part.context)?;
    if sums.len() != shape.part_numbers() {
        return Err(AttentionError::Query { got: sums.len(), expected: shape.part_numbers() });
    }
    match shape.element {
        Element::F32 => run(isa, Row::<f32, C>::new(shape, part, query, sums)),
        Element::Bf16 if isa.has_bf16() && Pairs::fit(shape) => ROUNDED.with_borrow_mut(|rounded| {
            rounded.resize(query.len() / 2, 0);
            run(isa, Round { query, rounded });
            run(isa, Row::<Pairs, C>::new(shape, part, rounded, sums));
        }),
        Element::Bf16 => run(isa, Row::<u16, C>::new(shape, part, query, sums)),
        Element::Int8 => run(isa, Row::<u8, C>::new(shape, part, query, sums)),
    }
    Ok(())
}

thread_local! {
    /// A query in pairs of bfloat16.
    static ROUNDED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
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
            let mut total = 0.0;
            out.fill(0.0);
            for part in parts.clone() {
                let [score, sum] = of(part);
                let weight = (score - largest).exp();
                total += weight * sum;
                out.iter_mut().zip(&part[head * value_dim..]).for_each(|(out, x)| *out += x * weight);
            }
            out.iter_mut().for_each(|out| *out /= total);
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
