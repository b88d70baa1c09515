//! One row of decode attention: KV heads, spans of the context, query heads, in this order.

use std::ops::{Deref, Range};

use super::numbers::Numbers;
use super::{DecodeShape, RowPart};
use crate::lanes::{Kernel, LANES, Simd, exp};
use crate::slab::Place;

/// Query heads computed together, so that their sums stay in registers.
const GROUP: usize = 4;
/// Bytes that memory gives at a time.
const LINE_BYTES: usize = 64;
/// Tiles between two steps of the softmax: enough that their exponentials do not wait for one another.
pub(super) const SPAN_TILES: usize = 4;

/// The running softmax of one query head: largest score so far, sum of the exponentials relative to it.
type Running = [f32; 2];

/// One part of a row, checked.
pub(super) struct Row<'a, T: Numbers, C> {
    shape: &'a DecodeShape,
    part: &'a RowPart<'a, C>,
    query: &'a [T::Query],
    /// Weighted sums of V.
    out: &'a mut [f32],
    running: &'a mut [Running],
}

impl<'a, T: Numbers, C> Row<'a, T, C> {
    pub(super) fn new(shape: &'a DecodeShape, part: &'a RowPart<'a, C>, query: &'a [T::Query], sums: &'a mut [f32]) -> Self {
        let (out, running) = sums.split_at_mut(shape.heads * shape.value_dim());
        Self { shape, part, query, out, running: running.as_chunks_mut().0 }
    }
}

impl<T: Numbers, C: Deref<Target = [u8]>> Kernel for Row<'_, T, C> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Row { shape, part: RowPart { cells, context, ahead, .. }, query, out, running } = self;
        let (group, tokens) = (shape.heads / shape.kv_heads, context.len());
        out.fill(0.0);
        running.fill([f32::NEG_INFINITY, 0.0]);
        let kv = KeysValues { shape, cells, context: context.clone() };
        let mut ahead = Ahead::new(ahead, shape, shape.kv_heads * tokens.div_ceil(LANES));
        let heads = query.chunks_exact(group * T::query_len(shape.head_dim)).zip(running.chunks_exact_mut(group));
        for (kv_head, ((query, running), out)) in heads.zip(out.chunks_exact_mut(group * shape.value_dim())).enumerate() {
            let mut from = context.start;
            while from < context.end {
                let span = kv.span(kv_head, from);
                group_span::<T, S>(s, shape, query, span.tiles(), &mut ahead, running, out);
                from = span.end;
            }
        }
    }
}

/// What is attended next, called for bit by bit while this is: memory is busy all the time, and not in turns with the arithmetic. Cells lie
/// anywhere, so the processor does not see by itself what comes next.
struct Ahead<'a> {
    places: &'a [Place],
    cell_bytes: usize,
    /// Bytes that one tile calls for.
    share: usize,
    /// Bytes called for.
    done: usize,
}

impl<'a> Ahead<'a> {
    #[inline(always)]
    fn new(places: &'a [Place], shape: &DecodeShape, tiles: usize) -> Self {
        let cell_bytes = shape.cell_bytes();
        let share = (places.len() * cell_bytes).div_ceil(tiles).next_multiple_of(LINE_BYTES);
        Self { places, cell_bytes, share, done: 0 }
    }

    #[inline(always)]
    fn call(&mut self) {
        let end = (self.done + self.share).min(self.places.len() * self.cell_bytes);
        while self.done < end {
            let (cell, first) = (self.done / self.cell_bytes, self.done % self.cell_bytes);
            let last = self.cell_bytes.min(first + end - self.done);
            (first..last).step_by(LINE_BYTES).for_each(|at| self.places[cell].call_for(at));
            self.done += last - first;
        }
    }
}

/// Keys and values of at most `LANES` tokens of one KV head.
pub(super) type Tile<'a, N> = [&'a [N]; 2];

/// Up to [`SPAN_TILES`] tiles of one KV head.
struct Span<'a, N> {
    tiles: [Tile<'a, N>; SPAN_TILES],
    count: usize,
    /// The first token behind it.
    end: usize,
}

impl<'a, N> Span<'a, N> {
    #[inline(always)]
    fn tiles(&self) -> &[Tile<'a, N>] {
        &self.tiles[..self.count]
    }
}

/// Where keys and values are.
struct KeysValues<'a, C> {
    shape: &'a DecodeShape,
    cells: &'a [C],
    context: Range<usize>,
}

impl<C: Deref<Target = [u8]>> KeysValues<'_, C> {
    /// Tiles of a KV head from a token on. A tile ends with its block.
    #[inline(always)]
    fn span<N: bytemuck::Pod>(&self, kv_head: usize, from: usize) -> Span<'_, N> {
        let DecodeShape { kv_heads, block_tokens: block, .. } = *self.shape;
        let vector = self.shape.vector_bytes() / size_of::<N>();
        let mut span = Span { tiles: [[&[][..]; 2]; SPAN_TILES], count: 0, end: from };
        while span.count < SPAN_TILES && span.end < self.context.end {
            let (index, first) = (span.end / block, span.end % block);
            let tokens = (block - first).min(self.context.end - span.end).min(LANES);
            let cell = bytemuck::cast_slice::<u8, N>(&self.cells[index]);
            let values = if self.shape.latent.is_some() { cell } else { &cell[kv_heads * block * vector..] };
            let place = (kv_head * block + first) * vector..(kv_head * block + first + tokens) * vector;
            span.tiles[span.count] = [&cell[place.clone()], &values[place]];
            span.count += 1;
            span.end += tokens;
        }
        span
    }
}

/// One span of one KV head for all its query heads, `GROUP` at a time.
#[inline(always)]
fn group_span<T: Numbers, S: Simd>(
    s: S,
    shape: &DecodeShape,
    query: &[T::Query],
    tiles: &[Tile<'_, T::Number>],
    ahead: &mut Ahead<'_>,
    running: &mut [Running],
    out: &mut [f32],
) {
    let (query_len, value_dim) = (T::query_len(shape.head_dim), shape.value_dim());
    let parts = query.chunks(GROUP * query_len).zip(running.chunks_mut(GROUP)).zip(out.chunks_mut(GROUP * value_dim));
    for ((query, running), out) in parts {
        match running.len() {
            1 => step::<T, S, 1>(s, shape, query, tiles, ahead, running, out),
            2 => step::<T, S, 2>(s, shape, query, tiles, ahead, running, out),
            3 => step::<T, S, 3>(s, shape, query, tiles, ahead, running, out),
            _ => step::<T, S, GROUP>(s, shape, query, tiles, ahead, running, out),
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

/// For `G` query heads: scores, softmax step, weighted sum.
#[allow(clippy::needless_range_loop, reason = "it counts in several slices")]
#[inline(always)]
fn step<T: Numbers, S: Simd, const G: usize>(
    s: S,
    shape: &DecodeShape,
    query: &[T::Query],
    tiles: &[Tile<'_, T::Number>],
    ahead: &mut Ahead<'_>,
    running: &mut [Running],
    out: &mut [f32],
) {
    let mut scores = [[s.splat(f32::NEG_INFINITY); SPAN_TILES]; G];
    for at in 0..tiles.len() {
        ahead.call();
        let keys = tiles[at][0];
        let lacking = LANES - keys.len() / T::len(shape.head_dim);
        let mask = s.load(LACKING[lacking..].first_chunk().expect("no tile lacks more than it has"));
        let sums = T::scores::<S, G>(s, shape.head_dim, query, keys);
        for g in 0..G {
            scores[g][at] = s.fma(sums[g], s.splat(shape.scale), mask);
        }
    }
    let mut shrink = [0.0; LANES];
    for g in 0..G {
        let mut largest = scores[g][0];
        for at in 1..SPAN_TILES {
            largest = s.max(scores[g][at], largest);
        }
        let (before, largest) = (running[g][0], s.largest(largest));
        running[g][0] = if largest > before { largest } else { before };
        shrink[g] = before - running[g][0];
    }
    s.store(exp(s, s.load(&shrink)), &mut shrink);
    let mut weights = [[s.splat(0.0); SPAN_TILES]; G];
    for g in 0..G {
        let (base, mut total) = (s.splat(running[g][0]), s.splat(0.0));
        for at in 0..tiles.len() {
            weights[g][at] = T::exponential(s, s.sub(scores[g][at], base));
            total = s.add(total, weights[g][at]);
        }
        running[g][1] = running[g][1] * shrink[g] + s.sum(total);
    }
    T::weigh::<S, G>(s, shape, &weights, &shrink, tiles, out);
}
