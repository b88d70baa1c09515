//! Paged attention of many tokens of one sequence, the prefill half of attention, in bfloat16. Decides the order of the sums, nothing else.
//!
//! Scores are computed transposed, `K Q^T`: keys are rows already, as the left side of a tile product wants them; each lane of a vector is one query,
//! so the softmax needs no sum across lanes; and what it gives is, pair by pair of tokens, the right side of `V^T P^T`. Online softmax over [`SPAN`] tokens
//! at a time (FlashAttention, Dao et al. 2022), for the query heads that share a KV head while their keys and values are in the cache. Queries and
//! weights are rounded to bfloat16, as LibTorch does, and so are 8-bit keys and values times their scales.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::f32::consts::LOG2_E;
use std::ops::{Deref, Range};

use crate::attention::{AttentionError, DecodeShape};
use crate::buffer::Line;
use crate::element::{Element, int8_halves};
use crate::isa::Isa;
use crate::lanes::{Kernel, LANES, Simd, exp2_rough, run};
use crate::multiply::{Block, Fetch, Multiply, NO_BLOCK, load};
use crate::product::put;
use crate::team::{Parts, Team};

/// Tokens of context between two steps of the softmax.
const SPAN: usize = 96;
/// Query tokens of one item of work: two tiles.
const QUERIES: usize = 2 * LANES;
/// By how much, in powers of two, a score may exceed what weights are relative to, before all sums are made relative to it: most spans change no sum, and a
/// weight of 256 is as good as one of 1.
const SLACK: f32 = 8.0;
/// Lines of queries and sums of one item: half of a second-level cache of 512 KiB. All ordinary heads of a group share an item; those of a latent, which are large, are spread over several.
const ITEM_LINES: usize = 4096;
/// What weights are relative to before there is a score: so small that nothing is left of it later, and not minus infinity, from which nothing can be taken
/// where a window hides all of a span.
const NO_SCORE: f32 = -1e30;
/// Tokens of one step of a tile product.
const STEP: usize = 2 * LANES;
const NOTHING: Line = Line([0; LANES]);

/// Consecutive tokens of a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// The first token's queries `[heads, head_dim]`, and so on every `stride` numbers.
    pub queries: &'a [f32],
    /// Numbers from one token's queries to the next's.
    pub stride: usize,
    /// Tokens of the sequence before the chunk.
    pub start: usize,
    /// Its tokens.
    pub tokens: usize,
    /// How many tokens each sees, its own included; all where there is none.
    pub window: Option<usize>,
}

impl Chunk<'_> {
    /// What its tokens see of the sequence.
    fn context(&self) -> Range<usize> {
        self.first_seen(self.start)..self.start + self.tokens
    }

    /// The first position that the token at `position` sees.
    fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Room for the keys and values of a chunk's context, kept from chunk to chunk.
#[derive(Default)]
pub struct ChunkAttention {
    /// `[kv_heads, spans]` of [`Packed`].
    packed: Vec<Line>,
}

/// Where things are in the lines of one span of one KV head.
#[derive(Clone, Copy)]
struct Packed {
    /// Steps of a product over a head's elements.
    dim_steps: usize,
    /// Tiles of the elements of a head of V.
    dim_tiles: usize,
}

impl Packed {
    fn new(shape: &DecodeShape) -> Self {
        Self { dim_steps: shape.head_dim.div_ceil(STEP), dim_tiles: shape.value_dim().div_ceil(LANES) }
    }

    /// Lines of the keys: `[SPAN / 16 tiles, dim_steps, 16 tokens]` of 32 elements.
    fn keys(self) -> usize {
        SPAN * self.dim_steps
    }

    /// Lines of keys, then of values: `[dim_tiles, SPAN / 32 steps, 16 elements]` of 32 tokens.
    fn lines(self) -> usize {
        self.keys() + self.dim_tiles * SPAN / STEP * LANES
    }

    /// Query heads of one item, of `group` that share a KV head.
    fn heads(self, group: usize) -> usize {
        let lines = 2 * LANES * (self.dim_steps + self.dim_tiles);
        (ITEM_LINES / lines).clamp(1, group)
    }
}

impl ChunkAttention {
    /// Attention of each token of `chunk` over the tokens before it and itself. `cell(i)` is the sequence's block `i`; its own keys and values stand
    /// there already. `out`: `[tokens, heads * value_dim]`.
    ///
    /// # Errors
    /// [`AttentionError`] when the arguments do not fit.
    ///
    /// # Panics
    /// When a cell has another size than the shape's, or the shape's element is f32.
    pub fn attend<C: Deref<Target = [u8]>>(
        &mut self,
        (team, isa): (&Team, Isa),
        shape: &DecodeShape,
        chunk: &Chunk<'_>,
        cell: impl Fn(usize) -> C + Sync,
        out: &mut [f32],
    ) -> Result<(), AttentionError> {
        check(shape, chunk, out)?;
        let (packed, context) = (Packed::new(shape), chunk.context());
        let from = context.start / SPAN;
        let (lines, spans) = (packed.lines(), context.end.div_ceil(SPAN) - from);
        self.packed.resize(shape.kv_heads * spans * lines, NOTHING);
        team.chunks(&mut self.packed, lines, 1, |index, lines| {
            pack((shape, isa), packed, (index / spans, from + index % spans), &context, &cell, lines);
        });
        let group = shape.heads / shape.kv_heads;
        let own = packed.heads(group);
        let (blocks, shares) = (chunk.tokens.div_ceil(QUERIES), group.div_ceil(own));
        let (out, all) = (&Parts::new(out), &self.packed);
        team.each(blocks * shape.kv_heads * shares, 1, |index| {
            let first = index / (shape.kv_heads * shares) * QUERIES;
            let (kv_head, share) = (index / shares % shape.kv_heads, index % shares);
            let heads = kv_head * group + share * own..kv_head * group + group.min((share + 1) * own);
            let keys_values = &all[kv_head * spans * lines..(kv_head + 1) * spans * lines];
            SCRATCH.with_borrow_mut(|scratch| {
                run(isa, Item { isa, shape, chunk, packed, keys_values, from, heads, first, scratch, out });
            });
        });
        Ok(())
    }
}

fn check(shape: &DecodeShape, chunk: &Chunk<'_>, out: &[f32]) -> Result<(), AttentionError> {
    let DecodeShape { heads, kv_heads, head_dim, block_tokens, element, .. } = *shape;
    assert!(element != Element::F32, "chunks are attended in bfloat16");
    if kv_heads == 0
        || !(1..=head_dim).contains(&shape.value_dim())
        || block_tokens == 0
        || heads == 0
        || !heads.is_multiple_of(kv_heads)
    {
        return Err(AttentionError::Heads { heads, kv_heads });
    }
    let (width, tokens) = (heads * head_dim, chunk.tokens);
    let needed = tokens.saturating_sub(1) * chunk.stride + width;
    if tokens == 0 || chunk.window == Some(0) || chunk.stride < width || chunk.queries.len() < needed {
        return Err(AttentionError::Query { got: chunk.queries.len(), expected: needed });
    }
    let expected = tokens * heads * shape.value_dim();
    if out.len() != expected {
        return Err(AttentionError::Query { got: out.len(), expected });
    }
    Ok(())
}

/// Copies keys and values of one span of one KV head into order, rounded to bfloat16 where they are more; zeroes stand for what is outside of the context.
fn pack<C: Deref<Target = [u8]>>(
    (shape, isa): (&DecodeShape, Isa),
    packed: Packed,
    (kv_head, span): (usize, usize),
    context: &Range<usize>,
    cell: impl Fn(usize) -> C,
    lines: &mut [Line],
) {
    let (DecodeShape { head_dim: dim, block_tokens: block, .. }, value_dim) = (*shape, shape.value_dim());
    let mut halves = [Vec::new(), Vec::new()];
    let begin = span * SPAN;
    let (first, last) = (begin.max(context.start), context.end.min(begin + SPAN));
    if last - first < SPAN || !dim.is_multiple_of(STEP) || !value_dim.is_multiple_of(LANES) {
        lines.fill(NOTHING);
    }
    let (keys, values) = lines.split_at_mut(packed.keys());
    let keys: &mut [[u16; STEP]] = bytemuck::cast_slice_mut(keys);
    let values: &mut [[u16; STEP]] = bytemuck::cast_slice_mut(values);
    for index in first / block..last.div_ceil(block) {
        let cell = cell(index);
        assert_eq!(cell.len(), shape.cell_bytes(), "a cell is as large as its shape says");
        let [cell_keys, cell_values] = halves_of((shape, isa), &cell, kv_head, &mut halves);
        for position in first.max(index * block)..last.min((index + 1) * block) {
            let (token, at) = (position - begin, position % block * dim);
            for (step, key) in cell_keys[at..at + dim].chunks(STEP).enumerate() {
                let place = &mut keys[(token / LANES * packed.dim_steps + step) * LANES + token % LANES];
                match key.as_array() {
                    Some(key) => *place = *key,
                    None => place[..key.len()].copy_from_slice(key),
                }
            }
            let place = token / STEP * LANES;
            for (tile, value) in cell_values[at..at + value_dim].chunks(LANES).enumerate() {
                let lines = &mut values[tile * (SPAN / STEP) * LANES + place..][..value.len()];
                lines.iter_mut().zip(value).for_each(|(line, value)| line[token % STEP] = *value);
            }
        }
    }
}

/// Keys and values of one KV head of a cell, `[block_tokens, head_dim]` of bfloat16, of a latent both times the same; `room` is for those that do not stand so.
fn halves_of<'a>((shape, isa): (&DecodeShape, Isa), cell: &'a [u8], kv_head: usize, room: &'a mut [Vec<u16>; 2]) -> [&'a [u16]; 2] {
    let bytes = shape.block_tokens * shape.vector_bytes();
    let parts = if shape.latent.is_some() { [0, 0] } else { [0, 1] };
    let vectors = parts.map(|part| &cell[(part * shape.kv_heads + kv_head) * bytes..][..bytes]);
    if shape.element == Element::Bf16 {
        return vectors.map(bytemuck::cast_slice);
    }
    for (room, vectors) in room.iter_mut().zip(vectors).take(1 + parts[1]) {
        room.resize(shape.block_tokens * shape.head_dim, 0);
        int8_halves(isa, vectors, shape.head_dim, room);
    }
    parts.map(|part| room[part].as_slice())
}

/// What one item of work keeps; each thread has its own.
struct Scratch {
    /// `[heads, 2 halves of the queries, dim_steps, 16 pairs of elements]` of 16 queries.
    queries: Vec<Line>,
    /// Weighted sums of V, `[heads, pairs of dim_tiles]`.
    sums: Vec<Block>,
    /// `[heads]`.
    running: Vec<Running>,
    /// Of one head and span, `K Q^T`.
    scores: Box<[Block; SPAN / STEP]>,
    /// The softmax of those, `[2 halves of the queries, SPAN / 2 pairs of tokens]` of 16 queries.
    weights: Box<[[Line; SPAN / 2]; 2]>,
}

/// The running softmax of one head, of each query: the score that weights are relative to, as a power of two, and the sum of weights.
#[derive(Clone, Copy)]
struct Running {
    base: [[f32; LANES]; 2],
    total: [[f32; LANES]; 2],
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        queries: Vec::new(),
        sums: Vec::new(),
        running: Vec::new(),
        scores: Box::new([NO_BLOCK; SPAN / STEP]),
        weights: Box::new([[NOTHING; SPAN / 2]; 2]),
    });
}

/// Up to [`QUERIES`] tokens for some of the query heads of one KV head.
struct Item<'a> {
    isa: Isa,
    shape: &'a DecodeShape,
    chunk: &'a Chunk<'a>,
    packed: Packed,
    /// The spans of the KV head.
    keys_values: &'a [Line],
    /// Which span is the first of those.
    from: usize,
    /// The query heads.
    heads: Range<usize>,
    /// The first token, counted in the chunk.
    first: usize,
    scratch: &'a mut Scratch,
    out: &'a Parts<'a, f32>,
}

/// The part of a span that an item looks at.
#[derive(Clone, Copy)]
struct Span {
    /// Its first token, counted in the sequence.
    first: usize,
    /// Steps of tokens of which any query of the item sees one.
    steps: usize,
    /// The item's first query token, counted in the sequence: no query is hidden from what stands before it, but by the window.
    begin: usize,
    window: Option<usize>,
}

impl Kernel for Item<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let heads = self.heads.len();
        let count = (self.chunk.tokens - self.first).min(QUERIES);
        self.place_queries(s, count);
        self.scratch.sums.clear();
        self.scratch.sums.resize(heads * self.packed.dim_tiles.div_ceil(2), NO_BLOCK);
        self.scratch.running.clear();
        self.scratch.running.resize(heads, Running { base: [[NO_SCORE; LANES]; 2], total: [[0.0; LANES]; 2] });
        let multiply = Multiply::new(self.isa);
        let begin = self.chunk.start + self.first;
        for first in (self.chunk.first_seen(begin) / SPAN * SPAN..begin + count).step_by(SPAN) {
            let steps = (begin + count - first).min(SPAN).div_ceil(STEP);
            for head in 0..heads {
                self.span(s, &multiply, head, Span { first, steps, begin, window: self.chunk.window });
            }
        }
        for head in 0..heads {
            self.finish(s, head, count);
        }
    }
}

impl Item<'_> {
    /// Rounds the queries and puts them in order; missing ones are zero.
    #[inline(always)]
    fn place_queries<S: Simd>(&mut self, s: S, count: usize) {
        let (dim, steps) = (self.shape.head_dim, self.packed.dim_steps);
        self.scratch.queries.resize(self.heads.len() * 2 * steps * LANES, NOTHING);
        let places = self.heads.clone().flat_map(|head| (0..2).map(move |half| (head, half)));
        for ((head, half), lines) in places.zip(self.scratch.queries.chunks_mut(steps * LANES)) {
            let first = self.first + half * LANES;
            for (step, lines) in lines.as_chunks_mut().0.iter_mut().enumerate() {
                let elements = step * STEP..dim.min((step + 1) * STEP);
                let mut by_query = [NOTHING; LANES];
                for (lane, line) in by_query.iter_mut().enumerate().take(count.saturating_sub(half * LANES)) {
                    let query = &self.chunk.queries[(first + lane) * self.chunk.stride + head * dim..];
                    round(s, &query[elements.clone()], line);
                }
                s.transpose(&by_query, lines);
            }
        }
    }

    /// One head over one span.
    #[inline(always)]
    fn span<S: Simd>(&mut self, s: S, multiply: &Multiply, head: usize, span: Span) {
        let Span { first, steps, .. } = span;
        let Packed { dim_steps, dim_tiles } = self.packed;
        let lines = &self.keys_values[(first / SPAN - self.from) * self.packed.lines()..][..self.packed.lines()];
        let (keys, values) = lines.split_at(self.packed.keys());
        let Scratch { queries, sums, running, scores, weights } = &mut *self.scratch;
        let panel = |half: usize| &queries[(2 * head + half) * dim_steps * LANES..][..dim_steps * LANES];
        let tile = |tile: usize| &keys[tile * dim_steps * LANES..][..dim_steps * LANES];
        for (step, scores) in scores.iter_mut().enumerate().take(steps) {
            multiply.product(s, [tile(2 * step), tile(2 * step + 1)], [panel(0), panel(1)], Fetch::Nothing, scores);
        }
        let (scale, running, scores) = (self.shape.scale * LOG2_E, &mut running[head], &mut scores[..steps]);
        let sums = &mut sums[head * dim_tiles.div_ceil(2)..][..dim_tiles.div_ceil(2)];
        for (half, weights) in weights.iter_mut().enumerate() {
            if let Some(shrink) = softmax(s, (scale, half), scores, span, running, weights) {
                for tile in sums.as_flattened_mut() {
                    for line in &mut tile[half] {
                        s.store(s.mul(load(s, line), shrink), bytemuck::cast_mut(&mut line.0));
                    }
                }
            }
        }
        let weights = [&weights[0][..steps * LANES], &weights[1][..steps * LANES]];
        let tile = |tile: usize| &values[tile * (SPAN / STEP) * LANES..][..steps * LANES];
        for (pair, sums) in sums.iter_mut().enumerate() {
            multiply.add_product(s, [tile(2 * pair), tile((2 * pair + 1).min(dim_tiles - 1))], weights, sums);
        }
    }

    /// Divides by the sums of exponentials.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, head: usize, count: usize) {
        let (heads, value_dim) = (self.shape.heads, self.shape.value_dim());
        let (tiles, totals) = (self.packed.dim_tiles, &self.scratch.running[head].total);
        let mut inverse = [[0.0; LANES]; 2];
        for half in 0..2 {
            s.store(s.div(s.splat(1.0), s.load(&totals[half])), &mut inverse[half]);
        }
        let sums = self.scratch.sums[head * tiles.div_ceil(2)..][..tiles.div_ceil(2)].as_flattened();
        let mut by_query = [NOTHING; LANES];
        for half in 0..count.div_ceil(LANES) {
            for (tile, sums) in sums.iter().enumerate().take(tiles) {
                s.transpose(&sums[half], &mut by_query);
                let (first, numbers) = (half * LANES, LANES.min(value_dim - tile * LANES));
                for lane in 0..LANES.min(count - first) {
                    let token = self.first + first + lane;
                    let at = (token * heads + self.heads.start + head) * value_dim + tile * LANES;
                    // SAFETY: some of one head of one token, which belongs to this item alone, and each item comes once.
                    let out = unsafe { self.out.part(at..at + numbers) };
                    let values = s.mul(load(s, &by_query[lane]), s.splat(inverse[half][lane]));
                    put(s, false, values, out);
                }
            }
        }
    }
}

/// Up to [`STEP`] numbers in bfloat16; missing ones are zero.
#[inline(always)]
fn round<S: Simd>(s: S, numbers: &[f32], line: &mut Line) {
    let mut padded = [[0.0; LANES]; 2];
    let [low, high] = if let [low, high] = numbers.as_chunks().0 {
        [low, high]
    } else {
        padded.as_flattened_mut()[..numbers.len()].copy_from_slice(numbers);
        padded.each_ref()
    };
    s.store_words(s.narrow(s.load(low), s.load(high)), &mut line.0);
}

/// What is added to scores: minus infinity for 32 queries, nothing for 32 more, minus infinity for the last 32. Of a token that the first `n` queries of an
/// item do not see yet, it is what stands from `32 - n` on; of one that only the first `n` see still, what stands from `64 - n` on.
static MASK: [f32; 3 * QUERIES] = {
    let mut mask = [f32::NEG_INFINITY; 3 * QUERIES];
    let mut i = QUERIES;
    while i < 2 * QUERIES {
        mask[i] = 0.0;
        i += 1;
    }
    mask
};

/// One step of the softmax of one head for one half of the queries: fills `weights`, and gives by what the sums so far shrink, if they do. `scale` makes
/// scores powers of two.
#[inline(always)]
fn softmax<S: Simd>(
    s: S,
    (scale, half): (f32, usize),
    scores: &mut [Block],
    span: Span,
    running: &mut Running,
    weights: &mut [Line; SPAN / 2],
) -> Option<S::V> {
    let scores = scores.as_flattened_mut();
    if span.first + scores.len() * LANES > span.begin {
        hide_later(s, half, scores, span);
    }
    if let Some(window) = span.window.filter(|window| span.first + window < span.begin + QUERIES) {
        hide_earlier(s, half, scores, span, window);
    }
    let mut largest = [s.splat(f32::NEG_INFINITY); 4];
    for scores in scores.iter() {
        for rows in scores[half].as_chunks::<4>().0 {
            for (largest, row) in largest.iter_mut().zip(rows) {
                *largest = s.max(*largest, load(s, row));
            }
        }
    }
    let [a, b, c, d] = largest;
    let scale = s.splat(scale);
    let (largest, mut base) = (s.mul(s.max(s.max(a, b), s.max(c, d)), scale), s.load(&running.base[half]));
    let (mut total, mut shrink) = (s.load(&running.total[half]), None);
    if s.largest(s.sub(largest, base)) > SLACK {
        let now = s.max(base, largest);
        let by = exp2_rough(s, s.sub(base, now));
        (base, total, shrink) = (now, s.mul(total, by), Some(by));
        s.store(base, &mut running.base[half]);
    }
    let less = s.sub(s.splat(0.0), base);
    for (scores, weights) in scores.iter().zip(weights.as_chunks_mut::<{ LANES / 2 }>().0) {
        for ([low, high], weights) in scores[half].as_chunks().0.iter().zip(weights) {
            let low = exp2_rough(s, s.fma(load(s, low), scale, less));
            let high = exp2_rough(s, s.fma(load(s, high), scale, less));
            total = s.add(total, s.add(low, high));
            s.store_words(s.halves(low, high), &mut weights.0);
        }
    }
    s.store(total, &mut running.total[half]);
    shrink
}

/// Makes scores of tokens that come after a query minus infinity.
#[inline(always)]
fn hide_later<S: Simd>(s: S, half: usize, scores: &mut [[[Line; LANES]; 2]], span: Span) {
    let seen_by_all = span.begin.saturating_sub(span.first) / LANES;
    for (tile, scores) in scores.iter_mut().enumerate().skip(seen_by_all) {
        for (row, line) in scores[half].iter_mut().enumerate() {
            let hidden = (span.first + tile * LANES + row).saturating_sub(span.begin).min(QUERIES);
            mask(s, half, QUERIES - hidden, line);
        }
    }
}

/// Makes scores of tokens that have left a query's window minus infinity.
#[inline(always)]
fn hide_earlier<S: Simd>(s: S, half: usize, scores: &mut [[[Line; LANES]; 2]], span: Span, window: usize) {
    for (tile, scores) in scores.iter_mut().enumerate() {
        for (row, line) in scores[half].iter_mut().enumerate() {
            let seen = (span.first + tile * LANES + row + window).saturating_sub(span.begin).min(QUERIES);
            mask(s, half, 2 * QUERIES - seen, line);
        }
    }
}

/// Adds what stands in [`MASK`] from `from` on to the scores of one token.
#[inline(always)]
fn mask<S: Simd>(s: S, half: usize, from: usize, line: &mut Line) {
    if from != QUERIES {
        let mask = MASK[from + half * LANES..].first_chunk().expect("the mask is 96 long, and `from` 64 at most");
        s.store(s.add(load(s, line), s.load(mask)), bytemuck::cast_mut(&mut line.0));
    }
}
