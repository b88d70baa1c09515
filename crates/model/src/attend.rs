//! Attention of a step over paged KV: stores the new keys and values, then attends row by row.
//!
//! A row of one token runs the paged kernel on the cells in place, its context cut into parts that threads share. A longer row goes through our own
//! kernel for chunks where the processor has dot products of bfloat16 and the activations are that. Elsewhere it gathers keys and
//! values of a KV head into one tensor and calls LibTorch's scaled dot product attention, heads shared by our threads: LibTorch's own spin long
//! after their work is done, on the processors that the next product needs. In batch-invariant mode it goes token by token through the paged
//! kernel, because the order of sums of both others depends on the chunk. All read only what stands in the cells, and of a layer with a window only
//! from where the window begins. A latent is one KV head whose values are the first numbers of its keys.

use std::ops::Range;
use std::sync::OnceLock;

use millrace_checkpoint::{AttentionKind, ModelConfig};
use millrace_core::engine::{Row, Step};
use millrace_core::layout::{KvDtype, KvLayout};
use millrace_kernels::{
    AttentionError, Chunk, ChunkAttention, DecodeShape, Element, Isa, KvSlab, RowPart, Team, merge_parts, paged_part,
};
use tch::{Device, Tensor};

use crate::{Dtype, ModelError, tensors};

/// Tokens of a step whose keys and values one thread stores alone.
const STORED_ALONE_MAX: usize = 16;
/// Tokens whose parts one thread merges alone.
const MERGED_ALONE_MAX: usize = 8;
/// Numbers of parts that are kept from step to step: what a chunk that goes token by token needs beyond it is not.
const PARTS_KEPT_MAX: usize = 1 << 20;

/// The attention of one model.
pub(crate) struct Attention {
    shape: DecodeShape,
    layout: KvLayout,
    /// Of each layer.
    windows: Vec<Option<usize>>,
    /// Of the activations; LibTorch attends in it.
    dtype: Dtype,
    device: Device,
    /// Chunks go token by token.
    batch_invariant: bool,
    /// LibTorch has threads of its own here, because it multiplies too.
    pub(crate) libtorch_threads: bool,
    /// Our own kernel for chunks; `None` where LibTorch attends for them.
    own: Option<ChunkAttention>,
    /// Room for the parts of a step's contexts.
    parts: Vec<f32>,
}

/// One layer of a step.
pub(crate) struct LayerStep<'a> {
    /// The rows.
    pub(crate) batch: &'a Batch<'a>,
    /// Queries, keys and values, `[tokens, qkv_heads, head_dim]`.
    pub(crate) qkv: &'a [f32],
    /// Where the KV is, and under which layer.
    pub(crate) slab: &'a KvSlab,
    pub(crate) layer: usize,
    pub(crate) team: &'a Team,
}

/// A step's rows, once for each window that layers have.
pub(crate) struct Batches<'a>(Vec<(Option<usize>, Batch<'a>)>);

impl<'a> Batches<'a> {
    pub(crate) fn new(step: &'a Step, attention: &Attention) -> Self {
        let mut windows = attention.windows.clone();
        windows.sort_unstable();
        windows.dedup();
        Self(windows.into_iter().map(|window| (window, Batch::new(step, attention, window))).collect())
    }

    /// For a layer.
    pub(crate) fn of(&self, layer: usize, attention: &Attention) -> &Batch<'a> {
        let (_, batch) = self.0.iter().find(|(window, _)| *window == attention.windows[layer]).expect("made for each window");
        batch
    }
}

/// A step's rows with what all layers of one window share.
pub(crate) struct Batch<'a> {
    rows: Vec<Placed<'a>>,
    /// Tokens that the paged kernel attends for, in the order of the batch.
    singles: Vec<Single<'a>>,
    /// Parts of their contexts: which single, and its first block.
    parts: Vec<(usize, usize)>,
    /// What the step writes of each cell: which row, and positions of one block.
    written: Vec<(usize, Range<usize>)>,
    tokens: usize,
    window: Option<usize>,
}

/// A row and its place in the batch.
struct Placed<'a> {
    row: &'a Row,
    /// Index of its first token in the batch.
    first: usize,
    /// The first position that any of its tokens sees, down to a whole block.
    from: usize,
    /// `[tokens, context from there on]` in the type of the activations, minus infinity where a token does not see; only for a chunk that is not at the start
    /// of its sequence, or longer than its window.
    mask: Option<Vec<u8>>,
    /// Whether its tokens are singles.
    single: bool,
}

/// One token that attends alone.
struct Single<'a> {
    row: &'a Row,
    /// Index in the batch.
    token: usize,
    /// Positions it sees, its own included.
    context: Range<usize>,
    /// Its parts.
    parts: Range<usize>,
}

impl<'a> Batch<'a> {
    /// Places the rows one after the other, cuts contexts into parts and makes the masks.
    fn new(step: &'a Step, attention: &Attention, window: Option<usize>) -> Self {
        let rows = Vec::with_capacity(step.rows.len());
        let mut batch = Self { rows, singles: Vec::new(), parts: Vec::new(), written: Vec::new(), tokens: 0, window };
        for row in &step.rows {
            let (first, single) = (batch.tokens, row.tokens.len() == 1 || attention.batch_invariant);
            let from = batch.context(row, 0).start / attention.shape.block_tokens * attention.shape.block_tokens;
            let masked = attention.own.is_none() && (row.start > 0 || window.is_some_and(|window| row.tokens.len() > window));
            let mask = (!single && masked).then(|| batch.mask(row, from, attention.dtype));
            if single {
                (0..row.tokens.len()).for_each(|index| batch.add_single(row, index, attention));
            }
            batch.add_written(row, attention.shape.block_tokens);
            batch.rows.push(Placed { row, first, from, mask, single });
            batch.tokens += row.tokens.len();
        }
        batch
    }

    /// The blocks that `row`, the batch's next, writes.
    fn add_written(&mut self, row: &Row, block: usize) {
        let (mut position, end) = (row.start as usize, row.end() as usize);
        while position < end {
            let stop = ((position / block + 1) * block).min(end);
            self.written.push((self.rows.len(), position..stop));
            position = stop;
        }
    }

    /// The singles, each with its numbers of `out`, which has `width` for each token.
    fn singles_of<'o>(&self, out: &'o mut [f32], width: usize) -> impl Iterator<Item = (&Single<'a>, &'o mut [f32])> {
        let (mut rows, mut next) = (out.chunks_exact_mut(width), 0);
        self.singles.iter().map(move |single| {
            let out = rows.nth(single.token - next).expect("singles are in the batch's order");
            next = single.token + 1;
            (single, out)
        })
    }

    /// Tokens of the step.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// What token `index` of a row sees.
    fn context(&self, row: &Row, index: usize) -> Range<usize> {
        let end = row.start as usize + index + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// The token `index` of `row`, whose first token is the batch's next. Parts lie where they lie without a window.
    fn add_single(&mut self, row: &'a Row, index: usize, attention: &Attention) {
        let (context, begin) = (self.context(row, index), self.parts.len());
        let (single, blocks) = (self.singles.len(), attention.shape.part_blocks());
        let first = context.start / (blocks * attention.shape.block_tokens) * blocks;
        self.parts.extend((first..attention.layout.blocks(context.end)).step_by(blocks).map(|block| (single, block)));
        self.singles.push(Single { row, token: self.tokens + index, context, parts: begin..self.parts.len() });
    }

    /// The scores of what the tokens of a chunk see and do not see.
    fn mask(&self, row: &Row, from: usize, dtype: Dtype) -> Vec<u8> {
        let score = |seen: bool| if seen { 0.0 } else { f32::NEG_INFINITY };
        let seen = |token: usize| {
            let context = self.context(row, token);
            (from..row.end() as usize).map(move |at| score(context.contains(&at)))
        };
        let scores = (0..row.tokens.len()).flat_map(seen);
        match dtype {
            Dtype::F32 => scores.flat_map(f32::to_le_bytes).collect(),
            Dtype::Bf16 => scores.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        }
    }
}

/// The shape of a model's attention.
pub(crate) fn shape(config: &ModelConfig, layout: KvLayout) -> DecodeShape {
    DecodeShape {
        heads: config.attention.heads,
        kv_heads: layout.kv_heads.into(),
        head_dim: layout.head_dim.into(),
        latent: match &config.attention.kind {
            AttentionKind::Grouped(_) => None,
            AttentionKind::Latent(latent) => Some(latent.rank),
        },
        block_tokens: layout.block_tokens.into(),
        element: match layout.dtype {
            KvDtype::F32 => Element::F32,
            KvDtype::Bf16 => Element::Bf16,
            KvDtype::Int8 => Element::Int8,
        },
        scale: config.attention.scale as f32,
    }
}

impl Attention {
    pub(crate) fn new(config: &ModelConfig, (dtype, layout): (Dtype, KvLayout), device: Device, batch_invariant: bool) -> Self {
        let shape = shape(config, layout);
        assert_eq!(shape.cell_bytes(), layout.cell_bytes(), "kernels and layout mean the same cell");
        let windows = config.attention.windows.clone();
        let halves = dtype == Dtype::Bf16 && shape.element != Element::F32;
        let owned = halves && Isa::best().has_bf16() && device == Device::Cpu;
        let own = owned.then(ChunkAttention::default);
        Self { shape, layout, windows, dtype, device, batch_invariant, libtorch_threads: true, own, parts: Vec::new() }
    }

    /// Vectors of one token together: queries and what is cached.
    fn qkv_heads(&self) -> usize {
        self.shape.heads + self.layout.parts.count() * self.shape.kv_heads
    }

    /// Numbers that attention gives for a token.
    pub(crate) fn out_width(&self) -> usize {
        self.shape.heads * self.shape.value_dim()
    }

    /// Numbers of one token in [`LayerStep::qkv`].
    fn qkv_width(&self) -> usize {
        self.qkv_heads() * self.shape.head_dim
    }

    /// Writes keys and values of the step's tokens to their cells.
    pub(crate) fn store(&self, step: &LayerStep<'_>) {
        let LayerStep { batch, qkv, slab, layer, team } = *step;
        let (block, width, cached) = (self.shape.block_tokens, self.qkv_width(), self.shape.heads * self.shape.head_dim);
        let alone = if batch.tokens > STORED_ALONE_MAX { 1 } else { batch.written.len() };
        team.each(batch.written.len(), alone, |index| {
            let (row, positions) = &batch.written[index];
            let placed = &batch.rows[*row];
            let first = placed.first + positions.start - placed.row.start as usize;
            let mut cell = slab.write(placed.row.table[positions.start / block].0 as usize, layer);
            for (position, token) in positions.clone().zip(qkv[first * width..].chunks_exact(width)) {
                self.store_token(&mut cell, position % block, &token[cached..]);
            }
        });
    }

    /// `kv`: keys then values of one token, `[2 kv_heads, head_dim]`, or its latent, which is the order of the cell's outer sides.
    fn store_token(&self, cell: &mut [u8], offset: usize, kv: &[f32]) {
        let (block, bytes) = (self.shape.block_tokens, self.shape.vector_bytes());
        for (head, numbers) in kv.chunks_exact(self.shape.head_dim).enumerate() {
            self.shape.element.write(numbers, &mut cell[(head * block + offset) * bytes..][..bytes]);
        }
    }

    /// Attention of every row over its cells; `out`: `[tokens, heads, value_dim]`.
    pub(crate) fn attend(&mut self, step: &LayerStep<'_>, out: &mut [f32]) -> Result<(), ModelError> {
        let tokens = step.batch.tokens;
        assert_eq!((step.qkv.len(), out.len()), (tokens * self.qkv_width(), tokens * self.out_width()));
        match self.own.take() {
            Some(mut own) => {
                let attended = self.own_chunks(&mut own, step, out);
                self.own = Some(own);
                attended?;
            }
            None => self.chunks(step, out)?,
        }
        let mut parts = std::mem::take(&mut self.parts);
        let attended = self.singles(step, &mut parts, out);
        parts.truncate(PARTS_KEPT_MAX);
        parts.shrink_to(PARTS_KEPT_MAX);
        self.parts = parts;
        attended
    }

    /// The rows of several tokens, one after the other, each by all threads.
    fn own_chunks(&self, own: &mut ChunkAttention, step: &LayerStep<'_>, out: &mut [f32]) -> Result<(), ModelError> {
        let LayerStep { batch, qkv, slab, layer, team } = *step;
        let (stride, width) = (self.qkv_width(), self.out_width());
        for placed in batch.rows.iter().filter(|placed| !placed.single) {
            let (start, tokens) = (placed.row.start as usize, placed.row.tokens.len());
            let chunk = Chunk { queries: &qkv[placed.first * stride..], stride, start, tokens, window: batch.window };
            let out = &mut out[placed.first * width..][..tokens * width];
            let cell = |block: usize| slab.read(placed.row.table[block].0 as usize, layer);
            own.attend((team, Isa::best()), &self.shape, &chunk, cell, out)?;
        }
        Ok(())
    }

    /// The rows of several tokens with LibTorch: each KV head of each by whoever is free, and where these are few, some of the query heads of each.
    fn chunks(&self, step: &LayerStep<'_>, out: &mut [f32]) -> Result<(), ModelError> {
        let (DecodeShape { heads, kv_heads, .. }, value_dim) = (self.shape, self.shape.value_dim());
        let chunks: Vec<_> = step.batch.rows.iter().filter(|placed| !placed.single).collect();
        let threads = if self.libtorch_threads { 1 } else { step.team.threads() };
        let share = (heads / kv_heads).div_ceil(threads.div_ceil((chunks.len() * kv_heads).max(1)));
        let shares = |kv_head: usize| {
            let group = kv_head * (heads / kv_heads)..(kv_head + 1) * (heads / kv_heads);
            group.clone().step_by(share).map(move |first| first..group.end.min(first + share))
        };
        let items: Vec<_> =
            chunks.iter().flat_map(|placed| (0..kv_heads).flat_map(shares).map(move |heads| (*placed, heads))).collect();
        let mut attended: Vec<Result<Vec<f32>, ModelError>> = Vec::new();
        attended.resize_with(items.len(), || Ok(Vec::new()));
        let alone = if self.libtorch_threads { items.len() } else { 1 };
        step.team.chunks(&mut attended, 1, alone, |index, attended| {
            let (placed, heads) = &items[index];
            attended[0] = self.chunk(step, placed, heads.clone());
        });
        for ((placed, own), attended) in items.iter().zip(attended) {
            let (attended, tokens) = (attended?, placed.row.tokens.len());
            for (index, values) in attended.chunks_exact(value_dim).enumerate() {
                let (head, token) = (own.start + index / tokens, placed.first + index % tokens);
                out[(token * heads + head) * value_dim..][..value_dim].copy_from_slice(values);
            }
        }
        Ok(())
    }

    /// The tokens that attend alone: the parts of their contexts, then each token's parts merged in order. `parts` is room, whatever stands there.
    fn singles(&self, step: &LayerStep<'_>, parts: &mut Vec<f32>, out: &mut [f32]) -> Result<(), ModelError> {
        let LayerStep { batch, qkv, slab, layer, team } = *step;
        let (shape, isa) = (&self.shape, Isa::best());
        let (width, query_width) = (self.qkv_width(), shape.heads * shape.head_dim);
        let (numbers, blocks) = (shape.part_numbers(), shape.part_blocks());
        let failed: OnceLock<AttentionError> = OnceLock::new();
        let note = |result: Result<(), AttentionError>| result.unwrap_or_else(|error| drop(failed.set(error)));
        let slots = |index: usize| {
            let (single, first) = batch.parts[index];
            let single = &batch.singles[single];
            let last = self.layout.blocks(single.context.end).min(first + blocks);
            (single, first, single.row.table[first..last].iter().map(|slot| slot.0 as usize))
        };
        parts.resize(parts.len().max(batch.parts.len() * numbers), 0.0);
        team.chunks(&mut parts[..batch.parts.len() * numbers], numbers, 1, |index, part| {
            let (single, first, own) = slots(index);
            let cells: Vec<_> = own.map(|slot| slab.read(slot, layer)).collect();
            // This thread's next, but for the last of its share.
            let more = (index + 1 < batch.parts.len()).then(|| slots(index + 1).2);
            let ahead: Vec<_> = more.into_iter().flatten().map(|slot| slab.place(slot, layer)).collect();
            let of_part =
                |position: usize| position.saturating_sub(first * shape.block_tokens).min(cells.len() * shape.block_tokens);
            let context = of_part(single.context.start)..of_part(single.context.end);
            let query = &qkv[single.token * width..][..query_width];
            note(paged_part(isa, shape, &RowPart { query, cells: &cells, context, ahead: &ahead }, part));
        });
        let mut merged: Vec<_> = batch.singles_of(out, self.out_width()).collect();
        team.chunks(&mut merged, 1, MERGED_ALONE_MAX, |_, merged| {
            let (single, out) = &mut merged[0];
            note(merge_parts(isa, shape, &parts[single.parts.start * numbers..single.parts.end * numbers], out));
        });
        failed.into_inner().map_or(Ok(()), |error| Err(error.into()))
    }

    /// Some query heads of one KV head for one row of several tokens: `[own, tokens, value_dim]`.
    fn chunk(&self, step: &LayerStep<'_>, placed: &Placed<'_>, own: Range<usize>) -> Result<Vec<f32>, ModelError> {
        let _no_grad = tch::no_grad_guard(); // of this thread
        let DecodeShape { heads, kv_heads, head_dim, .. } = self.shape;
        let (width, tokens, group, kind) = (self.qkv_width(), placed.row.tokens.len(), own.len(), tensors::kind(self.dtype));
        let kv_head = own.start / (heads / kv_heads);
        let rows = &step.qkv[placed.first * width..][..tokens * width];
        let of_head = |head: usize| rows.chunks_exact(width).flat_map(move |token| &token[head * head_dim..][..head_dim]);
        let query: Vec<f32> = own.flat_map(of_head).copied().collect();
        let query = tensors::from_f32(&query, &[1, group as i64, tokens as i64, head_dim as i64], kind, self.device)?;
        let kv = self.gather(step, placed, kv_head)?;
        let (keys, values) = match self.shape.latent {
            None => (kv.f_narrow(0, 0, 1)?, kv.f_narrow(0, 1, 1)?),
            Some(rank) => (kv.f_narrow(0, 0, 1)?, kv.f_narrow(3, 0, rank as i64)?),
        };
        let sides = [tokens as i64, (placed.row.end() as usize - placed.from) as i64];
        let mask = placed.mask.as_ref().map(|mask| tensors::from_bytes(mask, &sides, kind, self.device)).transpose()?;
        let (causal, grouped, scale) = (mask.is_none(), group > 1, f64::from(self.shape.scale));
        tensors::to_f32(&Tensor::f_scaled_dot_product_attention(&query, &keys, &values, mask, 0.0, causal, scale, grouped)?)
    }

    /// Keys and values of one KV head over what a row sees, in the type of the activations: `[parts, 1, context, head_dim]`.
    fn gather(&self, step: &LayerStep<'_>, placed: &Placed<'_>, kv_head: usize) -> Result<Tensor, ModelError> {
        let DecodeShape { kv_heads, head_dim, block_tokens, element, .. } = self.shape;
        let (end, vector, parts) = (placed.row.end() as usize, self.shape.vector_bytes(), self.layout.parts.count());
        let context = end - placed.from;
        let mut bytes = vec![0u8; parts * context * vector];
        let table = &placed.row.table[placed.from / block_tokens..self.layout.blocks(end)];
        for (index, slot) in table.iter().enumerate() {
            let cell = step.slab.read(slot.0 as usize, step.layer);
            let first = index * block_tokens;
            let span = (context - first).min(block_tokens) * vector;
            for (part, to) in bytes.chunks_exact_mut(context * vector).enumerate() {
                let from = (part * kv_heads + kv_head) * block_tokens * vector;
                to[first * vector..][..span].copy_from_slice(&cell[from..from + span]);
            }
        }
        let (sides, kind) = ([parts as i64, 1, context as i64, head_dim as i64], tensors::kind(self.dtype));
        if self.layout.dtype == self.dtype.into() {
            return tensors::from_bytes(&bytes, &sides, kind, self.device);
        }
        let mut numbers = vec![0.0; parts * context * head_dim];
        element.read(&bytes, head_dim, &mut numbers);
        tensors::from_f32(&numbers, &sides, kind, self.device)
    }
}
