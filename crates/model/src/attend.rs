//! Attention of a step over paged KV: stores the new keys and values, then attends row by row.
//!
//! A row of one token runs the paged kernel on the cells in place. A longer row gathers its keys and values into one tensor
//! and calls LibTorch's scaled dot product attention. Both read only what stands in the cells.

use millrace_checkpoint::ModelConfig;
use millrace_core::engine::{Row, Step};
use millrace_core::layout::{KvDtype, KvLayout};
use millrace_kernels::{DecodeShape, Element, Isa, KvSlab, convert, paged_decode};
use tch::{Device, Kind, Tensor};

use crate::ModelError;
use crate::tensors;

/// The attention of one model.
pub(crate) struct Attention {
    shape: DecodeShape,
    layout: KvLayout,
    kind: Kind,
    device: Device,
}

/// A step's rows with what all layers share.
pub(crate) struct Batch<'a> {
    rows: Vec<Placed<'a>>,
    tokens: usize,
}

/// A row and its place in the batch.
struct Placed<'a> {
    row: &'a Row,
    /// Index of its first token in the batch.
    first: usize,
    /// `[tokens, context]`, minus infinity above the diagonal; only for a chunk that is not at the start of its sequence.
    mask: Option<Tensor>,
}

impl<'a> Batch<'a> {
    /// Places the rows one after the other and makes the masks.
    pub(crate) fn new(step: &'a Step, attention: &Attention) -> Result<Self, ModelError> {
        let mut tokens = 0;
        let mut rows = Vec::with_capacity(step.rows.len());
        for row in &step.rows {
            let mask = if row.tokens.len() > 1 && row.start > 0 { Some(attention.mask(row)?) } else { None };
            rows.push(Placed { row, first: tokens, mask });
            tokens += row.tokens.len();
        }
        Ok(Self { rows, tokens })
    }
}

impl Attention {
    pub(crate) fn new(config: &ModelConfig, layout: KvLayout, device: Device) -> Self {
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
        Self { shape, layout, kind: tensors::kind(layout.dtype), device }
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

    /// Attention of every row, `[tokens, heads * head_dim]`.
    pub(crate) fn attend(&self, batch: &Batch<'_>, qkv: &[f32], slab: &KvSlab, layer: usize) -> Result<Tensor, ModelError> {
        let DecodeShape { heads, head_dim, .. } = self.shape;
        let mut parts = Vec::new();
        let mut rest = &batch.rows[..];
        while let Some(placed) = rest.first() {
            let singles = rest.iter().take_while(|placed| placed.row.tokens.len() == 1).count();
            let part = match singles {
                0 => self.chunk(placed, qkv, slab, layer)?,
                _ => {
                    let out = self.decode(&rest[..singles], qkv, slab, layer)?;
                    tensors::from_f32(&out, &[singles as i64, (heads * head_dim) as i64], self.kind, self.device)?
                }
            };
            parts.push(part);
            rest = &rest[singles.max(1)..];
        }
        debug_assert_eq!(qkv.len(), batch.tokens * self.qkv_heads() * head_dim);
        if parts.len() > 1 { Ok(Tensor::f_cat(&parts, 0)?) } else { parts.pop().ok_or(self.nothing()) }
    }

    /// Rows of one token each: `[rows, heads * head_dim]`.
    fn decode(&self, rows: &[Placed<'_>], qkv: &[f32], slab: &KvSlab, layer: usize) -> Result<Vec<f32>, ModelError> {
        let dim = self.shape.head_dim;
        let (width, out_width) = (self.qkv_heads() * dim, self.shape.heads * dim);
        let mut out = vec![0.0; rows.len() * out_width];
        for (placed, out) in rows.iter().zip(out.chunks_exact_mut(out_width)) {
            let context = placed.row.end() as usize;
            let table = &placed.row.table[..self.layout.blocks(context)];
            let cells: Vec<_> = table.iter().map(|slot| slab.read(slot.0 as usize, layer)).collect();
            let query = &qkv[placed.first * width..][..out_width];
            paged_decode(Isa::best(), &self.shape, query, &cells, context, out)?;
        }
        Ok(out)
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

    fn nothing(&self) -> ModelError {
        ModelError::Row { row: 0, what: "a step without rows".into() }
    }
}
