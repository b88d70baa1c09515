//! What cells hold, as decode attention reads it: scores of a tile of keys, weighted sums of values.

use bytemuck::Pod;

use super::DecodeShape;
use super::row::{LINE_BYTES, SPAN_TILES, Tile};
use crate::element::{Element, GROUP as INT8_GROUP, int8_scale};
use crate::lanes::{Kernel, LANES, Simd, exp, exp2_rough};
use crate::slab::Place;

/// Halves of a register.
const HALVES: usize = 2 * LANES;

/// How numbers stand in cells, and in what they are multiplied.
pub(super) trait Numbers {
    /// What vectors in cells are made of.
    type Number: Pod;
    /// What queries are made of.
    type Query: Pod;
    /// How many numbers of a cell a vector of `dim` takes.
    fn len(dim: usize) -> usize;
    /// How many numbers a query of `dim` takes.
    fn query_len(dim: usize) -> usize;
    /// `q . k` for each of `G` heads and each token of a tile; anything for the tokens that a short tile lacks. Each line that is read calls for the one
    /// at the same place of `ahead`.
    fn scores<S: Simd, const G: usize>(s: S, dim: usize, query: &[Self::Query], keys: &[Self::Number], ahead: Place) -> [S::V; G];
    /// `e^x`, as exact as weights are used.
    fn exponential<S: Simd>(s: S, x: S::V) -> S::V;
    /// `out = out * shrink + sum over tokens of weight * v`, for each head. Each line of a tile calls for the one at the same place of its `ahead`.
    fn weigh<S: Simd, const G: usize>(
        s: S,
        shape: &DecodeShape,
        weights: &[[S::V; SPAN_TILES]; G],
        shrink: &[f32; LANES],
        tiles: &[Tile<'_, Self::Number>],
        ahead: [Place; SPAN_TILES],
        out: &mut [f32],
    );
}

/// Numbers that are widened to f32 as they are read; nothing is rounded.
trait Widened: Pod {
    /// See [`Numbers::len`].
    fn len(dim: usize) -> usize {
        dim
    }
    /// Numbers `LANES * c` and on of a vector, in registers.
    fn lanes<S: Simd>(s: S, vector: &[Self], dim: usize, c: usize) -> S::V;
    /// Number `at` of a vector.
    fn widen(vector: &[Self], dim: usize, at: usize) -> f32;
}

impl Widened for f32 {
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
impl Widened for u16 {
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
impl Widened for u8 {
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

impl<T: Widened> Numbers for T {
    type Number = T;
    type Query = f32;

    fn len(dim: usize) -> usize {
        <T as Widened>::len(dim)
    }

    fn query_len(dim: usize) -> usize {
        dim
    }

    #[inline(always)]
    fn scores<S: Simd, const G: usize>(s: S, dim: usize, query: &[f32], keys: &[T], ahead: Place) -> [S::V; G] {
        let size = <T as Widened>::len(dim);
        let vector = size * size_of::<T>();
        let queries: [&[[f32; LANES]]; G] = std::array::from_fn(|g| query[g * dim..][..dim].as_chunks().0);
        let mut folded = [[s.splat(0.0); 2]; G];
        for (half, keys) in keys.chunks(LANES / 2 * size).enumerate().take(2) {
            let mut sums = [[s.splat(0.0); LANES / 2]; G];
            let keys = eight(keys, size);
            #[allow(clippy::needless_range_loop, reason = "it counts in several slices")]
            for c in 0..dim / LANES {
                let begins = begins_line::<T>(c);
                let mut ahead = ahead.behind((half * LANES / 2 * size + c * LANES) * size_of::<T>());
                for token in 0..LANES / 2 {
                    if begins {
                        ahead = ahead.call_for().behind(vector);
                    }
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
        let mut scores = [s.splat(0.0); G];
        for g in 0..G {
            scores[g] = s.join(folded[g][0], folded[g][1]);
            if !dim.is_multiple_of(LANES) {
                scores[g] = s.add(scores[g], rest(s, &query[g * dim..][..dim], keys));
            }
        }
        scores
    }

    #[inline(always)]
    fn exponential<S: Simd>(s: S, x: S::V) -> S::V {
        exp(s, x)
    }

    #[inline(always)]
    fn weigh<S: Simd, const G: usize>(
        s: S,
        shape: &DecodeShape,
        weights: &[[S::V; SPAN_TILES]; G],
        shrink: &[f32; LANES],
        tiles: &[Tile<'_, T>],
        ahead: [Place; SPAN_TILES],
        out: &mut [f32],
    ) {
        let (dim, value_dim, size) = (shape.head_dim, shape.value_dim(), <T as Widened>::len(shape.head_dim));
        let vector = shape.vector_bytes();
        let mut stored = [[[0.0; LANES]; SPAN_TILES]; G];
        for g in 0..G {
            for at in 0..SPAN_TILES {
                s.store(weights[g][at], &mut stored[g][at]);
            }
        }
        #[allow(clippy::needless_range_loop, reason = "it counts in several slices")]
        for c in 0..value_dim / LANES {
            let begins = begins_line::<T>(c);
            let mut sums = [s.splat(0.0); G];
            for g in 0..G {
                sums[g] = s.mul(s.load(of_head(out, g, value_dim, c)), s.splat(shrink[g]));
            }
            for at in 0..tiles.len() {
                let mut ahead = ahead[at].behind(c * LANES * size_of::<T>());
                for (token, value) in tiles[at][1].chunks_exact(size).enumerate().take(LANES) {
                    if begins {
                        ahead = ahead.call_for().behind(vector);
                    }
                    let value = T::lanes(s, value, dim, c);
                    for g in 0..G {
                        sums[g] = s.fma(s.splat(stored[g][at][token]), value, sums[g]);
                    }
                }
            }
            for g in 0..G {
                s.store(sums[g], of_head(out, g, value_dim, c));
            }
        }
        for g in 0..G {
            for c in value_dim - value_dim % LANES..value_dim {
                let mut sum = out[g * value_dim + c] * shrink[g];
                for (tile, weights) in tiles.iter().zip(&stored[g]) {
                    let products = tile[1].chunks_exact(size).zip(weights);
                    sum = products.fold(sum, |sum, (value, weight)| sum + weight * T::widen(value, dim, c));
                }
                out[g * value_dim + c] = sum;
            }
        }
    }
}

/// The vectors of half a tile. A short half repeats its last token; what comes of that is not read.
#[inline(always)]
fn eight<N>(vectors: &[N], size: usize) -> [&[N]; LANES / 2] {
    let last = vectors.len() / size - 1;
    std::array::from_fn(|token| &vectors[token.min(last) * size..][..size])
}

/// Whether register `c` of a vector is the first of so many bytes as memory gives at a time.
#[inline(always)]
fn begins_line<T>(c: usize) -> bool {
    (c * LANES * size_of::<T>()).is_multiple_of(LINE_BYTES)
}

/// Numbers `LANES * c` and on of a head's sums.
#[inline(always)]
fn of_head(out: &mut [f32], head: usize, value_dim: usize, c: usize) -> &mut [f32; LANES] {
    out[head * value_dim + c * LANES..].first_chunk_mut().expect("a head has so many numbers")
}

/// What the elements of a head beyond whole registers add to the scores.
#[inline(always)]
fn rest<T: Widened, S: Simd>(s: S, query: &[f32], keys: &[T]) -> S::V {
    let (dim, whole) = (query.len(), query.len() / LANES * LANES);
    let mut sums = [0.0; LANES];
    for (sum, key) in sums.iter_mut().zip(keys.chunks_exact(<T as Widened>::len(dim))) {
        *sum = query[whole..].iter().zip(whole..).fold(0.0, |sum, (q, at)| sum + q * T::widen(key, dim, at));
    }
    s.load(&sums)
}

/// bfloat16 by pairs: of elements of a key, of tokens of a value. Queries and weights are rounded to bfloat16 for it, as in attention of
/// chunks and as LibTorch does; sums are f32. For processors that have such products as one instruction.
pub(super) struct Pairs;

impl Pairs {
    /// Whether vectors are made of whole registers.
    pub(super) const fn fit(shape: &DecodeShape) -> bool {
        shape.head_dim.is_multiple_of(HALVES) && shape.value_dim().is_multiple_of(HALVES)
    }
}

/// Rounds a query to pairs of bfloat16.
pub(super) struct Round<'a> {
    pub query: &'a [f32],
    pub rounded: &'a mut [u32],
}

impl Kernel for Round<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (pair, rounded) in self.query.as_chunks().0.chunks_exact(2).zip(self.rounded.as_chunks_mut().0) {
            s.store_words(s.narrow(s.load(&pair[0]), s.load(&pair[1])), rounded);
        }
    }
}

impl Numbers for Pairs {
    type Number = u16;
    type Query = u32;

    fn len(dim: usize) -> usize {
        dim
    }

    fn query_len(dim: usize) -> usize {
        dim / 2
    }

    #[inline(always)]
    fn scores<S: Simd, const G: usize>(s: S, dim: usize, query: &[u32], keys: &[u16], ahead: Place) -> [S::V; G] {
        let vector = dim * size_of::<u16>();
        let queries: [&[[u32; LANES]]; G] = std::array::from_fn(|g| query[g * dim / 2..][..dim / 2].as_chunks().0);
        let mut folded = [[s.splat(0.0); 2]; G];
        for (half, keys) in keys.chunks(LANES / 2 * dim).enumerate().take(2) {
            let mut sums = [[s.splat(0.0); LANES / 2]; G];
            let keys = eight(keys, dim);
            #[allow(clippy::needless_range_loop, reason = "it counts in several slices")]
            for c in 0..dim / HALVES {
                let mut ahead = ahead.behind(half * LANES / 2 * vector + c * LINE_BYTES);
                for token in 0..LANES / 2 {
                    ahead = ahead.call_for().behind(vector);
                    let key = s.pairs(&keys[token].as_chunks().0[c]);
                    for g in 0..G {
                        sums[g][token] = s.dot_pairs(sums[g][token], key, s.words(&queries[g][c]));
                    }
                }
            }
            for g in 0..G {
                folded[g][half] = s.fold(sums[g]);
            }
        }
        let mut scores = [s.splat(0.0); G];
        for g in 0..G {
            scores[g] = s.join(folded[g][0], folded[g][1]);
        }
        scores
    }

    #[inline(always)]
    fn exponential<S: Simd>(s: S, x: S::V) -> S::V {
        exp2_rough(s, s.mul(x, s.splat(std::f32::consts::LOG2_E)))
    }

    #[inline(always)]
    fn weigh<S: Simd, const G: usize>(
        s: S,
        shape: &DecodeShape,
        weights: &[[S::V; SPAN_TILES]; G],
        shrink: &[f32; LANES],
        tiles: &[Tile<'_, u16>],
        ahead: [Place; SPAN_TILES],
        out: &mut [f32],
    ) {
        let (dim, value_dim, vector) = (shape.head_dim, shape.value_dim(), shape.vector_bytes());
        let mut stored = [[[0; LANES]; SPAN_TILES / 2]; G];
        for g in 0..G {
            for two in 0..SPAN_TILES / 2 {
                s.store_words(s.narrow(weights[g][2 * two], weights[g][2 * two + 1]), &mut stored[g][two]);
            }
        }
        #[allow(clippy::needless_range_loop, reason = "it counts in several slices")]
        for c in 0..value_dim / HALVES {
            let mut sums = [[s.splat(0.0); 2]; G];
            for at in 0..tiles.len() {
                let mut ahead = ahead[at].behind(c * LINE_BYTES);
                for (pair, two) in tiles[at][1].chunks(2 * dim).enumerate().take(LANES / 2) {
                    ahead = ahead.call_for().behind(vector).call_for().behind(vector);
                    let first = &two[..dim];
                    // A token without a neighbour is its own, whose weight is nothing.
                    let second = if two.len() == 2 * dim { &two[dim..] } else { first };
                    let (first, second) = (s.pairs(&first.as_chunks().0[c]), s.pairs(&second.as_chunks().0[c]));
                    let [low, high] = s.interleave(first, second);
                    for g in 0..G {
                        let weight = stored[g][at / 2][at % 2 * LANES / 2 + pair];
                        sums[g][0] = s.dot_halves(sums[g][0], low, weight);
                        sums[g][1] = s.dot_halves(sums[g][1], high, weight);
                    }
                }
            }
            for g in 0..G {
                let [low, high] = s.in_order(sums[g]);
                let before = s.load(of_head(out, g, value_dim, 2 * c));
                s.store(s.fma(before, s.splat(shrink[g]), low), of_head(out, g, value_dim, 2 * c));
                let before = s.load(of_head(out, g, value_dim, 2 * c + 1));
                s.store(s.fma(before, s.splat(shrink[g]), high), of_head(out, g, value_dim, 2 * c + 1));
            }
        }
    }
}
