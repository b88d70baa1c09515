//! Paged decode attention of every instruction set against a naive one in f64, and its independence of neighbours.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use millrace_kernels::{AttentionError, DecodeShape, Element, Isa, KvSlab, RowPart, merge_parts, paged_decode, paged_part};

const ELEMENTS: [Element; 3] = [Element::F32, Element::Bf16, Element::Int8];

/// Numbers in [-1, 1) from a counter.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }

    fn vector(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.next() * scale).collect()
    }
}

/// A query and a slab of cells with random content; what is beyond the context is poison.
struct Case {
    shape: DecodeShape,
    context: usize,
    query: Vec<f32>,
    slab: std::sync::Arc<KvSlab>,
    /// What the cells hold: vectors, one after the other.
    numbers: Vec<f32>,
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize, block_tokens: usize, element: Element) -> DecodeShape {
    DecodeShape { heads, kv_heads, head_dim, latent: None, block_tokens, element, scale: 1.0 / (head_dim as f32).sqrt() }
}

fn case(shape: DecodeShape, context: usize, noise: &mut Noise) -> Case {
    let blocks = context.div_ceil(shape.block_tokens);
    let (slab, vector) = (KvSlab::new(shape.cell_bytes(), 1, blocks).unwrap(), shape.vector_bytes());
    let mut numbers = Vec::new();
    for slot in 0..blocks {
        for (index, place) in slab.write(slot, 0).chunks_exact_mut(vector).enumerate() {
            let seen = slot * shape.block_tokens + index % shape.block_tokens < context;
            let written = if seen { noise.vector(shape.head_dim, 2.0) } else { vec![f32::NAN; shape.head_dim] };
            shape.element.write(&written, place);
        }
        let mut read = vec![0.0; shape.cell_bytes() / vector * shape.head_dim];
        shape.element.read(&slab.read(slot, 0), shape.head_dim, &mut read);
        numbers.extend(read);
    }
    Case { shape, context, query: noise.vector(shape.heads * shape.head_dim, 3.0), slab, numbers }
}

impl Case {
    fn run(&self, isa: Isa) -> Vec<f32> {
        let cells: Vec<_> = (0..self.slab.slots()).map(|slot| self.slab.read(slot, 0)).collect();
        let mut out = vec![0.0; self.shape.heads * self.shape.value_dim()];
        paged_decode(isa, &self.shape, &self.query, &cells, self.context, &mut out).unwrap();
        out
    }

    fn element(&self, part: usize, kv_head: usize, token: usize, i: usize) -> f64 {
        let s = &self.shape;
        let (parts, part) = if s.latent.is_some() { (1, 0) } else { (2, part) };
        let vector = (token / s.block_tokens * parts + part) * s.kv_heads + kv_head;
        f64::from(self.numbers[(vector * s.block_tokens + token % s.block_tokens) * s.head_dim + i])
    }

    /// Whether `isa` multiplies pairs of bfloat16.
    fn in_pairs(&self, isa: Isa) -> bool {
        let whole = |dim: usize| dim.is_multiple_of(32);
        isa.has_bf16() && self.shape.element == Element::Bf16 && whole(self.shape.head_dim) && whole(self.shape.value_dim())
    }

    /// What `isa` comes to is as good as what stands in the cells and how it multiplies allow. Queries and weights that are rounded to
    /// bfloat16 are off by a part in 512 at most, and values are below 2; the query's part is in what is expected.
    fn holds(&self, isa: Isa, first: usize, got: &[f32]) {
        let off = if self.in_pairs(isa) { 2.0 / 512.0 + 1e-3 } else { 2e-5 };
        let rounded = |x: &f32| f32::from_bits((x.to_bits() + 0x7fff + (x.to_bits() >> 16 & 1)) & 0xffff_0000);
        let query: Vec<f32> = if self.in_pairs(isa) { self.query.iter().map(rounded).collect() } else { self.query.clone() };
        let want = self.naive_from(&query, first);
        assert_eq!(got.len(), want.len());
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let (shape, context) = (self.shape, first..self.context);
            assert!((f64::from(*got) - want).abs() < off, "{isa:?} {shape:?} {context:?} [{i}]: {got} {want}");
        }
    }

    /// Over the tokens from `first` on.
    fn naive_from(&self, query: &[f32], first: usize) -> Vec<f64> {
        let s = &self.shape;
        let mut out = Vec::new();
        for head in 0..s.heads {
            let kv_head = head / (s.heads / s.kv_heads);
            let q = |i: usize| f64::from(query[head * s.head_dim + i]);
            let dot = |t| (0..s.head_dim).map(|i| q(i) * self.element(0, kv_head, t, i)).sum::<f64>();
            let scores: Vec<f64> = (first..self.context).map(|t| dot(t) * f64::from(s.scale)).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|x| (x - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            out.extend(
                (0..s.value_dim()).map(|i| {
                    weights.iter().enumerate().map(|(t, w)| w * self.element(1, kv_head, first + t, i)).sum::<f64>() / total
                }),
            );
        }
        out
    }
}

#[test]
fn every_instruction_set_agrees_with_the_naive_one() {
    let mut noise = Noise(1);
    let shapes = [(4, 4, 16, 16), (9, 3, 64, 16), (4, 1, 16, 4), (14, 2, 24, 32), (6, 2, 10, 8), (8, 1, 128, 128)];
    for (heads, kv_heads, head_dim, block) in shapes {
        for element in ELEMENTS {
            for context in [1, 2, 15, 16, 17, 63, 300] {
                let case = case(shape(heads, kv_heads, head_dim, block, element), context, &mut noise);
                Isa::available().into_iter().for_each(|isa| case.holds(isa, 0, &case.run(isa)));
            }
        }
    }
}

#[test]
fn parts_of_a_context_make_the_whole() {
    let mut noise = Noise(3);
    for (heads, kv_heads, head_dim, block) in [(9, 3, 64, 16), (4, 1, 16, 4), (6, 2, 10, 8)] {
        for context in [1, 16, 63, 64, 65, 300] {
            let element = ELEMENTS[context % 3];
            let case = case(shape(heads, kv_heads, head_dim, block, element), context, &mut noise);
            let (numbers, blocks) = (case.shape.part_numbers(), case.shape.part_blocks());
            let cells: Vec<_> = (0..case.slab.slots()).map(|slot| case.slab.read(slot, 0)).collect();
            for isa in Isa::available() {
                let (mut parts, mut out) = (vec![f32::NAN; cells.len().div_ceil(blocks) * numbers], vec![0.0; heads * head_dim]);
                for (index, (cells, part)) in cells.chunks(blocks).zip(parts.chunks_mut(numbers)).enumerate() {
                    let tokens = (context - index * blocks * block).min(cells.len() * block);
                    let ahead: Vec<_> = (0..index).map(|slot| case.slab.place(slot, 0)).collect();
                    let query = &case.query;
                    paged_part(isa, &case.shape, &RowPart { query, cells, context: 0..tokens, ahead: &ahead }, part).unwrap();
                }
                merge_parts(isa, &case.shape, &parts, &mut out).unwrap();
                case.holds(isa, 0, &out);
                assert!(merge_parts(isa, &case.shape, &parts[1..], &mut out).is_err());
                assert!(merge_parts(isa, &case.shape, &[], &mut out).is_err());
            }
        }
    }
}

#[test]
fn a_latent_is_keys_and_values() {
    let mut noise = Noise(4);
    for (heads, head_dim, values) in [(4, 40, 32), (5, 24, 16), (7, 23, 19), (5, 96, 64)] {
        for element in ELEMENTS {
            for context in [1, 17, 100] {
                let shape = DecodeShape { latent: Some(values), ..shape(heads, 1, head_dim, 16, element) };
                let case = case(shape, context, &mut noise);
                Isa::available().into_iter().for_each(|isa| case.holds(isa, 0, &case.run(isa)));
            }
        }
    }
}

#[test]
fn a_window_may_begin_anywhere() {
    let mut noise = Noise(6);
    let shapes = [(9, 3, 64, 16), (4, 1, 16, 4), (6, 2, 10, 32), (4, 2, 32, 32)];
    for ((heads, kv_heads, head_dim, block), element) in shapes.into_iter().zip(ELEMENTS.into_iter().cycle().skip(1)) {
        let case = case(shape(heads, kv_heads, head_dim, block, element), 60, &mut noise);
        let cells: Vec<_> = (0..case.slab.slots()).map(|slot| case.slab.read(slot, 0)).collect();
        for first in [1, 15, 16, 17, 47, 59] {
            for isa in Isa::available() {
                let (mut part, mut out) = (vec![0.0; case.shape.part_numbers()], vec![0.0; heads * head_dim]);
                let row = RowPart { query: &case.query, cells: &cells, context: first..60, ahead: &[] };
                paged_part(isa, &case.shape, &row, &mut part).unwrap();
                merge_parts(isa, &case.shape, &part, &mut out).unwrap();
                case.holds(isa, first, &out);
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company_and_with_spare_cells() {
    let mut noise = Noise(2);
    for element in ELEMENTS {
        let one = case(shape(9, 3, 64, 16, element), 100, &mut noise);
        for isa in Isa::available() {
            let alone = one.run(isa);
            let _other = case(shape(9, 3, 64, 16, element), 33, &mut noise).run(isa);
            let mut cells: Vec<_> = (0..one.slab.slots()).map(|slot| one.slab.read(slot, 0)).collect();
            cells.push(one.slab.read(0, 0));
            let mut again = vec![9.0; alone.len()];
            paged_decode(isa, &one.shape, &one.query, &cells, 100, &mut again).unwrap();
            assert!(alone.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let good = shape(4, 2, 8, 4, Element::F32);
    let (query, mut out) = (vec![0.0; 32], vec![0.0; 32]);
    let cell = vec![0.0f32; good.cell_bytes() / 4];
    let cells: Vec<&[u8]> = vec![bytemuck::cast_slice(&cell)];
    let mut ask = |shape: DecodeShape, query: &[f32], cells: &[&[u8]], context| {
        paged_decode(Isa::best(), &shape, query, cells, context, &mut out)
    };
    assert_eq!(ask(good, &query, &cells, 4), Ok(()));
    assert!(matches!(ask(DecodeShape { kv_heads: 3, ..good }, &query, &cells, 4), Err(AttentionError::Heads { .. })));
    assert!(matches!(ask(DecodeShape { kv_heads: 0, ..good }, &query, &cells, 4), Err(AttentionError::Heads { .. })));
    for latent in [0, 9] {
        assert!(matches!(ask(DecodeShape { latent: Some(latent), ..good }, &query, &cells, 4), Err(AttentionError::Query { .. })));
    }
    assert!(matches!(ask(good, &query[..31], &cells, 4), Err(AttentionError::Query { .. })));
    assert!(matches!(ask(good, &query, &cells, 0), Err(AttentionError::Context { .. })));
    assert!(matches!(ask(good, &query, &cells, 5), Err(AttentionError::Context { .. })));
    assert!(matches!(ask(good, &query, &[&cells[0][4..]], 4), Err(AttentionError::Cell { .. })));
}
