//! One row of decode attention: KV heads, spans of the context, query heads, in this order.

use std::ops::{Deref, Range};

use super::numbers::Numbers;
use super::{DecodeShape, RowPart};
use crate::lanes::{Kernel, LANES, Simd, exp};
use crate::slab::Place;

/// Query heads computed together, so that their sums stay in registers.
const GROUP: usize = 4;
/// Bytes that memory gives at a time.
pub(super) const LINE_BYTES: usize = 64;
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
        let mut ahead = Ahead::new(ahead, shape, 2 * shape.kv_heads * tokens.div_ceil(LANES));
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

/// What is attended next, called for line by line while this is: each line that is read calls for one. Many at a time would wait for one another, and the
/// arithmetic with them. Cells lie anywhere, so the processor does not see by itself what comes next.
struct Ahead<'a> {
    /// Cells that have pieces left.
    places: &'a [Place],
    /// Where in the first of them.
    at: usize,
    cell_bytes: usize,
    /// What one tile has of keys, or of values.
    piece: usize,
}

impl<'a> Ahead<'a> {
    /// For a part whose tiles call for so many pieces; what is more is called for at once.
    #[inline(always)]
    fn new(places: &'a [Place], shape: &DecodeShape, pieces: usize) -> Self {
        let (cell_bytes, piece) = (shape.cell_bytes(), LANES.min(shape.block_tokens) * shape.vector_bytes());
        let mut ahead = Self { places, at: 0, cell_bytes, piece };
        for _ in pieces..places.len() * cell_bytes.div_ceil(piece) {
            let Some(place) = ahead.next() else { break };
            for at in (0..piece).step_by(LINE_BYTES) {
                place.behind(at).call_for();
            }
        }
        ahead
    }

    /// The next piece.
    #[inline(always)]
    fn next(&mut self) -> Option<Place> {
        let (first, rest) = self.places.split_first()?;
        let place = first.behind(self.at);
        self.at += self.piece;
        if self.at >= self.cell_bytes {
            (self.places, self.at) = (rest, 0);
        }
        Some(place)
    }

    /// The next piece, or what is near already.
    #[inline(always)]
    fn next_or<N>(&mut self, near: &[N]) -> Place {
        self.next().unwrap_or(Place::of(near))
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
        let keys = tiles[at][0];
        let place = ahead.next_or(keys);
        let lacking = LANES - keys.len() / T::len(shape.head_dim);
        let mask = s.load(LACKING[lacking..].first_chunk().expect("no tile lacks more than it has"));
        let sums = T::scores::<S, G>(s, shape.head_dim, query, keys, place);
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
    let mut places = [Place::of(tiles[0][1]); SPAN_TILES];
    for at in 0..tiles.len() {
        places[at] = ahead.next_or(tiles[at][1]);
    }
    T::weigh::<S, G>(s, shape, &weights, &shrink, tiles, places, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::Element;

    /// The pieces of a part that has fewer than what comes next: the difference at its start, the others one by one, then what is near.
    #[test]
    fn every_piece_is_called_for_once() {
        let shape =
            DecodeShape { heads: 4, kv_heads: 2, head_dim: 32, latent: None, block_tokens: 16, element: Element::Bf16, scale: 1.0 };
        let cells = vec![0u8; 3 * shape.cell_bytes()];
        let places: Vec<_> = cells.chunks(shape.cell_bytes()).map(Place::of).collect();
        let pieces: Vec<_> = cells.chunks(LANES * shape.vector_bytes()).map(Place::of).collect();
        assert_eq!(pieces.len(), 12);
        for own in [0, 4, 12, 20] {
            let mut ahead = Ahead::new(&places, &shape, own);
            let called: Vec<_> = std::iter::from_fn(|| ahead.next()).collect();
            assert_eq!(called, pieces[12usize.saturating_sub(own)..], "{own} pieces of its own");
            assert_eq!(ahead.next_or(&cells[..1]), places[0]);
        }
    }
}
