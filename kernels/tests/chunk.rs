//! Attention of chunks of every instruction set against that of single tokens.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::ops::Range;

use half::bf16;
use millrace_kernels::{
    AttentionError, Chunk, ChunkAttention, DecodeShape, Element, Isa, KvSlab, RowPart, Team, merge_parts, paged_part,
};

/// Numbers in [-1, 1) from a counter.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }

    fn vector(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| bf16::from_f32(self.next() * scale).to_f32()).collect()
    }
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize, block_tokens: usize, element: Element) -> DecodeShape {
    DecodeShape { heads, kv_heads, head_dim, latent: None, block_tokens, element, scale: 1.0 / (head_dim as f32).sqrt() }
}

/// Cells of a context; what is outside of it is poison.
fn slab(shape: &DecodeShape, context: Range<usize>, noise: &mut Noise) -> std::sync::Arc<KvSlab> {
    let blocks = context.end.div_ceil(shape.block_tokens);
    let slab = KvSlab::new(shape.cell_bytes(), 1, blocks).unwrap();
    for slot in 0..blocks {
        for (index, place) in slab.write(slot, 0).chunks_exact_mut(shape.vector_bytes()).enumerate() {
            let seen = context.contains(&(slot * shape.block_tokens + index % shape.block_tokens));
            let numbers = if seen { noise.vector(shape.head_dim, 2.0) } else { vec![f32::NAN; shape.head_dim] };
            shape.element.write(&numbers, place);
        }
    }
    slab
}

/// Which tokens are attended for: those before, those of the chunk, how many each sees.
type Tokens = (usize, usize, Option<usize>);

/// The largest difference between the attention of a chunk and that of its tokens one by one.
fn difference(isa: Isa, shape: &DecodeShape, (start, tokens, window): Tokens, noise: &mut Noise) -> f32 {
    let seen = |position: usize| window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1;
    let slab = slab(shape, seen(start).start..start + tokens, noise);
    let (width, out_width) = (shape.heads * shape.head_dim, shape.heads * shape.value_dim());
    let stride = width + 5;
    let queries = noise.vector(tokens * stride, 3.0);
    let chunk = Chunk { queries: &queries, stride, start, tokens, window };
    let mut out = vec![f32::NAN; tokens * out_width];
    let mut attention = ChunkAttention::default();
    for _ in 0..2 {
        attention.attend((&Team::new(2), isa), shape, &chunk, |block| slab.read(block, 0), &mut out).unwrap();
    }
    let cells: Vec<_> = (0..slab.slots()).map(|slot| slab.read(slot, 0)).collect();
    let (mut part, mut want) = (vec![0.0; shape.part_numbers()], vec![0.0; out_width]);
    let mut largest = 0.0;
    for token in 0..tokens {
        let row = RowPart { query: &queries[token * stride..][..width], cells: &cells, context: seen(start + token), ahead: &[] };
        paged_part(Isa::Portable, shape, &row, &mut part).unwrap();
        merge_parts(Isa::Portable, shape, &part, &mut want).unwrap();
        for (got, want) in out[token * out_width..].iter().zip(&want) {
            let difference = (got - want).abs();
            assert!(difference.is_finite(), "{isa:?} {shape:?} {start} {token} {window:?}: {got} {want}");
            largest = f32::max(largest, difference);
        }
    }
    largest
}

/// The weights of the softmax are rounded to 8 bits; what is weighed is below 2, and is rounded to 8 bits too where it has a scale.
fn agree(shape: &DecodeShape, tokens: Tokens, noise: &mut Noise) {
    for isa in Isa::available() {
        let largest = difference(isa, shape, tokens, noise);
        let most = if shape.element == Element::Int8 { 2.5e-2 } else { 1.5e-2 };
        assert!(largest < most, "{isa:?} {shape:?} {tokens:?}: {largest}");
    }
}

#[test]
fn every_instruction_set_agrees_with_single_tokens() {
    let mut noise = Noise(1);
    let shapes = [(9, 3, 64, 16), (4, 4, 16, 8), (4, 1, 128, 128), (2, 2, 80, 32), (3, 1, 10, 4)];
    let shapes = shapes.into_iter().flat_map(|sides| [(sides, Element::Bf16), (sides, Element::Int8)]);
    for ((heads, kv_heads, head_dim, block_tokens), element) in shapes {
        let shape = shape(heads, kv_heads, head_dim, block_tokens, element);
        for (start, tokens) in [(0, 1), (0, 2), (0, 33), (5, 40), (96, 70), (112, 32), (127, 2), (128, 1), (0, 150), (300, 17)] {
            agree(&shape, (start, tokens, None), &mut noise);
        }
    }
}

#[test]
fn what_has_left_the_window_is_not_seen_or_read() {
    let mut noise = Noise(4);
    let shape = shape(4, 2, 32, 16, Element::Bf16);
    for window in [1, 2, 31, 32, 33, 100, 128, 200] {
        for (start, tokens) in [(0, 1), (0, 150), (5, 40), (127, 2), (300, 17), (261, 140)] {
            agree(&shape, (start, tokens, Some(window)), &mut noise);
        }
    }
}

#[test]
fn a_latent_is_its_own_values() {
    let mut noise = Noise(5);
    for (heads, head_dim, rank) in [(4, 24, 16), (3, 40, 40), (16, 576, 512), (7, 33, 17)] {
        for element in [Element::Bf16, Element::Int8] {
            let shape = DecodeShape { latent: Some(rank), ..shape(heads, 1, head_dim, 16, element) };
            for (start, tokens) in [(0, 33), (96, 70), (150, 9)] {
                agree(&shape, (start, tokens, None), &mut noise);
            }
            agree(&shape, (40, 100, Some(50)), &mut noise);
        }
    }
}

#[test]
fn a_new_chunk_sees_nothing_of_the_last() {
    let mut noise = Noise(2);
    let shape = shape(3, 1, 48, 16, Element::Int8);
    let (long, short) = (slab(&shape, 0..200, &mut noise), slab(&shape, 0..37, &mut noise));
    let queries = noise.vector(200 * 144, 2.0);
    let chunk = |tokens: usize| Chunk { queries: &queries, stride: 144, start: 0, tokens, window: None };
    let team = Team::new(1);
    for isa in Isa::available() {
        let [mut fresh, mut used] = [vec![0.0; 37 * 144], vec![0.0; 37 * 144]];
        let mut attention = ChunkAttention::default();
        attention.attend((&team, isa), &shape, &chunk(37), |block| short.read(block, 0), &mut fresh).unwrap();
        let mut all = vec![0.0; 200 * 144];
        attention.attend((&team, isa), &shape, &chunk(200), |block| long.read(block, 0), &mut all).unwrap();
        attention.attend((&team, isa), &shape, &chunk(37), |block| short.read(block, 0), &mut used).unwrap();
        assert!(fresh.iter().zip(&used).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa:?}");
    }
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let good = shape(4, 2, 16, 16, Element::Bf16);
    let slab = slab(&good, 0..16, &mut Noise(3));
    let queries = vec![0.0; 128];
    let ask = |shape: DecodeShape, chunk: Chunk<'_>, out: usize| {
        let cell = |block| slab.read(block, 0);
        ChunkAttention::default().attend((&Team::new(1), Isa::best()), &shape, &chunk, cell, &mut vec![0.0; out])
    };
    let chunk = Chunk { queries: &queries, stride: 64, start: 0, tokens: 2, window: None };
    assert_eq!(ask(good, chunk, 128), Ok(()));
    assert!(matches!(ask(DecodeShape { kv_heads: 3, ..good }, chunk, 128), Err(AttentionError::Heads { .. })));
    assert!(matches!(ask(good, Chunk { tokens: 3, ..chunk }, 192), Err(AttentionError::Query { .. })));
    assert!(matches!(ask(good, Chunk { tokens: 0, ..chunk }, 0), Err(AttentionError::Query { .. })));
    assert!(matches!(ask(good, Chunk { stride: 63, ..chunk }, 128), Err(AttentionError::Query { .. })));
    assert!(matches!(ask(good, Chunk { window: Some(0), ..chunk }, 128), Err(AttentionError::Query { .. })));
    assert!(matches!(ask(DecodeShape { latent: Some(17), ..good }, chunk, 136), Err(AttentionError::Heads { .. })));
    assert!(matches!(ask(good, chunk, 127), Err(AttentionError::Query { .. })));
}
