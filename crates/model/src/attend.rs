//! Attention of a step over paged KV: stores the new keys and values, then attends row by row.
//!
//! A row of one token runs the paged kernel on the cells in place, its context cut into parts that threads share. A longer row gathers its keys and
//! values into one tensor and calls LibTorch's scaled dot product attention; in batch-invariant mode it goes token by token through the paged
//! kernel too, because LibTorch's order of sums depends on the chunk. Both read only what stands in the cells.

use std::ops::Range;
use std::sync::OnceLock;

use millrace_checkpoint::ModelConfig;
use millrace_core::engine::{Row, Step};
use millrace_core::layout::{KvDtype, KvLayout};
use millrace_kernels::{AttentionError, DecodeShape, Element, Isa, KvSlab, Team, convert, merge_parts, paged_part};
use tch::{Device, Kind, Tensor};

use crate::ModelError;
use crate::tensors;

/// The attention of one model.
pub(crate) struct Attention {
    shape: DecodeShape,
    layout: KvLayout,
    kind: Kind,
    device: Device,
    /// Chunks go token by token.
    batch_invariant: bool,
}

/// A step's rows with what all layers share.
pub(crate) struct Batch<'a> {
    rows: Vec<Placed<'a>>,
    /// Tokens that the paged kernel attends for, in the order of the batch.
    singles: Vec<Single<'a>>,
    /// Parts of their contexts: which single, and its first block.
    parts: Vec<(usize, usize)>,
    tokens: usize,
}

/// A row and its place in the batch.
struct Placed<'a> {
    row: &'a Row,
    /// Index of its first token in the batch.
    first: usize,
    /// `[tokens, context]`, minus infinity above the diagonal; only for a chunk that is not at the start of its sequence.
    mask: Option<Tensor>,
    /// Whether its tokens are singles.
    single: bool,
}

/// One token that attends alone.
struct Single<'a> {
    row: &'a Row,
    /// Index in the batch.
    token: usize,
    /// Tokens it sees, itself included.
    context: usize,
    /// Its parts.
    parts: Range<usize>,
}

impl<'a> Batch<'a> {
    /// Places the rows one after the other, cuts contexts into parts and makes the masks.
    pub(crate) fn new(step: &'a Step, attention: &Attention) -> Result<Self, ModelError> {
        let mut batch = Self { rows: Vec::with_capacity(step.rows.len()), singles: Vec::new(), parts: Vec::new(), tokens: 0 };
        for row in &step.rows {
            let (first, single) = (batch.tokens, row.tokens.len() == 1 || attention.batch_invariant);
            let mask = if !single && row.start > 0 { Some(attention.mask(row)?) } else { None };
            if single {
                (0..row.tokens.len()).for_each(|index| batch.add_single(row, index, attention));
            }
            batch.rows.push(Placed { row, first, mask, single });
            batch.tokens += row.tokens.len();
        }
        Ok(batch)
    }

    /// The token `index` of `row`, whose first token is the batch's next.
    fn add_single(&mut self, row: &'a Row, index: usize, attention: &Attention) {
        let (context, begin) = (row.start as usize + index + 1, self.parts.len());
        let (single, blocks) = (self.singles.len(), attention.layout.blocks(context));
        self.parts.extend((0..blocks).step_by(attention.shape.part_blocks()).map(|block| (single, block)));
        self.singles.push(Single { row, token: self.tokens + index, context, parts: begin..self.parts.len() });
    }
}

impl Attention {
    pub(crate) fn new(config: &ModelConfig, layout: KvLayout, device: Device, batch_invariant: bool) -> Self {
        let shape = DecodeShape {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            block_tokens: layout.block_tokens.into(),
            element: match layout.dtype {
                KvDtype::F32 => Element::F32,
                KvDtype::Bf16 => Element::Bf16,
            },
            scale: 1.0 / (config.head_dim as f32).sqrt(),
        };
        Self { shape, layout, kind: tensors::kind(layout.dtype), device, batch_invariant }
    }

    /// Heads of one token's queries, keys and values together.
    pub(crate) fn qkv_heads(&self) -> usize {
        self.shape.heads + 2 * self.shape.kv_heads
    }

    /// Heads that the rotary turn is for: queries and keys.
    pub(crate) fn turned_heads(&self) -> usize {
        self.shape.heads + self.shape.kv_heads
    }

    /// Writes keys and values of the step's tokens to their cells. `qkv`: `[tokens, qkv_heads, head_dim]`.
    pub(crate) fn store(&self, batch: &Batch<'_>, qkv: &[f32], slab: &KvSlab, layer: usize) {
        let (block, dim) = (self.shape.block_tokens, self.shape.head_dim);
        let width = self.qkv_heads() * dim;
        for placed in &batch.rows {
            let (mut position, end) = (placed.row.start as usize, placed.row.end() as usize);
            while position < end {
                let stop = ((position / block + 1) * block).min(end);
                let first = placed.first + position - placed.row.start as usize;
                let mut cell = slab.write(placed.row.table[position / block].0 as usize, layer);
                for (offset, token) in qkv[first * width..].chunks_exact(width).take(stop - position).enumerate() {
                    self.store_token(&mut cell, position % block + offset, &token[self.shape.heads * dim..]);
                }
                position = stop;
            }
        }
    }

    /// `kv`: keys then values of one token, `[2 kv_heads, head_dim]`, which is the order of the cell's outer sides.
    fn store_token(&self, cell: &mut [u8], offset: usize, kv: &[f32]) {
        let (block, dim) = (self.shape.block_tokens, self.shape.head_dim);
        for (head, values) in kv.chunks_exact(dim).enumerate() {
            let at = (head * block + offset) * dim..(head * block + offset + 1) * dim;
            match self.layout.dtype {
                KvDtype::F32 => bytemuck::cast_slice_mut(cell)[at].copy_from_slice(values),
                KvDtype::Bf16 => convert::to_bf16(values, &mut bytemuck::cast_slice_mut(cell)[at]),
            }
        }
    }

    /// Attention of every row over the cells of `(slab, layer)`; `out`: `[tokens, heads * head_dim]`.
    pub(crate) fn attend(
        &self,
        batch: &Batch<'_>,
        qkv: &[f32],
        (slab, layer): (&KvSlab, usize),
        team: &Team,
        out: &mut [f32],
    ) -> Result<(), ModelError> {
        let width = self.shape.heads * self.shape.head_dim;
        assert_eq!((qkv.len(), out.len()), (batch.tokens * self.qkv_heads() * self.shape.head_dim, batch.tokens * width));
        for placed in batch.rows.iter().filter(|placed| !placed.single) {
            let attended = tensors::to_f32(&self.chunk(placed, qkv, slab, layer)?)?;
            out[placed.first * width..][..attended.len()].copy_from_slice(&attended);
        }
        self.singles(batch, qkv, (slab, layer), team, out)
    }

    /// The tokens that attend alone: each part of a context by whoever is free, then each token's parts merged in order.
    fn singles(
        &self,
        batch: &Batch<'_>,
        qkv: &[f32],
        (slab, layer): (&KvSlab, usize),
        team: &Team,
        out: &mut [f32],
    ) -> Result<(), ModelError> {
        let (shape, isa) = (&self.shape, Isa::best());
        let (width, out_width) = (self.qkv_heads() * shape.head_dim, shape.heads * shape.head_dim);
        let (numbers, blocks) = (shape.part_numbers(), shape.part_blocks());
        let failed: OnceLock<AttentionError> = OnceLock::new();
        let note = |result: Result<(), AttentionError>| result.unwrap_or_else(|error| drop(failed.set(error)));
        // The batch as a whole holds tensors, which stay on one thread.
        let (places, singles) = (&batch.parts, &batch.singles);
        let mut parts = vec![0.0; places.len() * numbers];
        team.chunks(&mut parts, numbers, 1, |index, part| {
            let (single, first) = places[index];
            let single = &singles[single];
            let last = self.layout.blocks(single.context).min(first + blocks);
            let cells: Vec<_> = single.row.table[first..last].iter().map(|slot| slab.read(slot.0 as usize, layer)).collect();
            let context = (single.context - first * shape.block_tokens).min(cells.len() * shape.block_tokens);
            note(paged_part(isa, shape, &qkv[single.token * width..][..out_width], &cells, context, part));
        });
        for single in singles {
            let out = &mut out[single.token * out_width..][..out_width];
            note(merge_parts(isa, shape, &parts[single.parts.start * numbers..single.parts.end * numbers], out));
        }
        failed.into_inner().map_or(Ok(()), |error| Err(error.into()))
    }

    /// One row of several tokens: `[tokens, heads * head_dim]`.
    fn chunk(&self, placed: &Placed<'_>, qkv: &[f32], slab: &KvSlab, layer: usize) -> Result<Tensor, ModelError> {
        let DecodeShape { heads, kv_heads, head_dim, .. } = self.shape;
        let (width, tokens) = (self.qkv_heads() * head_dim, placed.row.tokens.len());
        let shape = [tokens as i64, self.qkv_heads() as i64, head_dim as i64];
        let qkv = &qkv[placed.first * width..][..tokens * width];
        let query = tensors::from_f32(qkv, &shape, self.kind, self.device)?.f_narrow(1, 0, heads as i64)?;
        let query = query.f_transpose(0, 1)?.f_unsqueeze(0)?;
        let kv = self.gather(placed.row, slab, layer)?;
        let (keys, values) = (kv.f_narrow(0, 0, 1)?, kv.f_narrow(0, 1, 1)?);
        let (mask, grouped) = (placed.mask.as_ref(), heads != kv_heads);
        let out = Tensor::f_scaled_dot_product_attention(&query, &keys, &values, mask, 0.0, mask.is_none(), None, grouped)?;
        Ok(out.f_squeeze_dim(0)?.f_transpose(0, 1)?.f_reshape([tokens as i64, (heads * head_dim) as i64])?)
    }

    /// Keys and values of a row's whole context as it stands in the cells: `[2, kv_heads, context, head_dim]`.
    fn gather(&self, row: &Row, slab: &KvSlab, layer: usize) -> Result<Tensor, ModelError> {
        let DecodeShape { kv_heads, head_dim, block_tokens, .. } = self.shape;
        let (context, token) = (row.end() as usize, head_dim * self.layout.dtype.bytes());
        let mut bytes = vec![0u8; 2 * kv_heads * context * token];
        for (index, slot) in row.table[..self.layout.blocks(context)].iter().enumerate() {
            let cell = slab.read(slot.0 as usize, layer);
            let first = index * block_tokens;
            let span = (context - first).min(block_tokens) * token;
            let heads = bytes.chunks_exact_mut(context * token).zip(cell.chunks_exact(block_tokens * token));
            for (to, from) in heads {
                to[first * token..][..span].copy_from_slice(&from[..span]);
            }
        }
        let shape = [2, kv_heads as i64, context as i64, head_dim as i64];
        tensors::from_bytes(&bytes, &shape, self.kind, self.device)
    }

    /// What token `i` of a chunk may not see: every position after `start + i`.
    fn mask(&self, row: &Row) -> Result<Tensor, ModelError> {
        let size = [row.tokens.len() as i64, i64::from(row.end())];
        Ok(Tensor::f_full(size, f64::NEG_INFINITY, (self.kind, self.device))?.f_triu(i64::from(row.start) + 1)?)
    }
}
