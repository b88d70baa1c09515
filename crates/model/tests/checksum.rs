//! The checksum engine: chunks and company change nothing; one wrong cell changes the answer.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use millrace_core::engine::{Engine, Row, Step};
use millrace_core::ids::{AttemptId, RequestId, Slot, TokenId};
use millrace_core::layout::{KvDtype, KvLayout, KvParts};
use millrace_core::sampling::Sampling;
use millrace_kernels::KvSlab;
use millrace_model::checksum::{ChecksumConfig, ChecksumEngine, RESERVED_TOKENS};

const LAYOUT: KvLayout =
    KvLayout { layers: 3, parts: KvParts::KeysValues, kv_heads: 2, head_dim: 6, block_tokens: 4, dtype: KvDtype::Bf16 };

fn engine() -> (ChecksumEngine, Arc<KvSlab>) {
    engine_of(LAYOUT, 50_000)
}

fn engine_of(layout: KvLayout, vocab: u32) -> (ChecksumEngine, Arc<KvSlab>) {
    let config = ChecksumConfig { layout, vocab, max_positions: 100, token_delay: Duration::ZERO };
    let (engine, slab, _) = ChecksumEngine::new(config, 40).unwrap();
    (engine, slab)
}

fn row(tokens: &[TokenId], start: usize, table: &[u32]) -> Row {
    let sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, max_new: 1, eos: vec![], ignore_eos: true };
    Row {
        attempt: AttemptId { request: RequestId(tokens.len() as u128), attempt: 0 },
        tokens: tokens.to_vec(),
        start: start as u32,
        table: table.iter().map(|&slot| Slot(slot)).collect(),
        sample: Some(sampling),
    }
}

/// Computes `prompt` in chunks, then `count` tokens.
fn answer(engine: &mut ChecksumEngine, prompt: &[TokenId], chunk: usize, count: usize, table: &[u32]) -> Vec<TokenId> {
    let mut drawn = Vec::new();
    for (index, tokens) in prompt.chunks(chunk).enumerate() {
        drawn = engine.step(&Step { rows: vec![row(tokens, index * chunk, table)] }, &mut |_| ()).unwrap();
    }
    let mut tokens = vec![drawn[0].token];
    while tokens.len() < count {
        let step = Step { rows: vec![row(&tokens[tokens.len() - 1..], prompt.len() + tokens.len() - 1, table)] };
        tokens.push(engine.step(&step, &mut |_| ()).unwrap()[0].token);
    }
    tokens
}

const PROMPT: [TokenId; 11] = [9, 8, 7, 100, 3, 3, 3, 49_999, 0, 1, 2];

#[test]
fn chunks_slots_and_company_change_nothing() {
    let (mut engine, _) = engine();
    let want = answer(&mut engine, &PROMPT, 11, 8, &[0, 1, 2, 3, 4]);
    assert!(want.iter().all(|&token| (RESERVED_TOKENS..50_000).contains(&token)));
    for chunk in [1, 3, 4, 7] {
        assert_eq!(answer(&mut engine, &PROMPT, chunk, 8, &[9, 30, 17, 5, 39]), want);
    }
    let rows = vec![row(&[5, 6], 0, &[20]), row(&PROMPT, 0, &[21, 22, 23])];
    let mut layers = Vec::new();
    let both = engine.step(&Step { rows }, &mut |layer| layers.push(layer)).unwrap();
    assert_eq!((both[1].token, layers), (want[0], vec![0, 1, 2]));
}

#[test]
fn every_byte_of_every_cell_counts() {
    [KvDtype::Bf16, KvDtype::Int8].into_iter().for_each(every_byte_counts);
}

fn every_byte_counts(dtype: KvDtype) {
    let table = [0, 1, 2, 3];
    // So many tokens that two hashes hardly ever give the same.
    let (mut engine, slab) = engine_of(KvLayout { dtype, ..LAYOUT }, u32::MAX);
    let want = answer(&mut engine, &PROMPT, 11, 1, &table)[0];
    let next = row(&[want], 11, &table);
    let good = engine.step(&Step { rows: vec![next.clone()] }, &mut |_| ()).unwrap()[0].token;
    for block in 0..2 {
        for layer in 0..3 {
            for byte in 0..slab.cell_bytes() {
                slab.write(block, layer)[byte] ^= 1;
                let bad = engine.step(&Step { rows: vec![next.clone()] }, &mut |_| ()).unwrap()[0].token;
                assert_ne!(bad, good, "block {block}, layer {layer}, byte {byte}");
                slab.write(block, layer)[byte] ^= 1;
            }
        }
    }
    let swapped = row(&[want], 11, &[1, 0, 2, 3]);
    assert_ne!(engine.step(&Step { rows: vec![swapped] }, &mut |_| ()).unwrap()[0].token, good);
    assert_eq!(engine.step(&Step { rows: vec![next] }, &mut |_| ()).unwrap()[0].token, good);
}

#[test]
fn a_moved_block_goes_on_with_the_same_tokens() {
    let (mut here, from) = engine();
    let (mut there, to) = engine();
    let want = answer(&mut here, &PROMPT, 4, 6, &[0, 1, 2, 3, 4]);
    let first = answer(&mut here, &PROMPT, 4, 1, &[5, 6, 7]);
    for (index, slot) in [5, 6, 7].into_iter().enumerate() {
        for layer in 0..3 {
            to.write(30 + index, layer).copy_from_slice(&from.read(slot, layer));
        }
    }
    let mut tokens = first;
    while tokens.len() < want.len() {
        let at = PROMPT.len() + tokens.len() - 1;
        let step = Step { rows: vec![row(&tokens[tokens.len() - 1..], at, &[30, 31, 32, 8, 9])] };
        tokens.push(there.step(&step, &mut |_| ()).unwrap()[0].token);
    }
    assert_eq!(tokens, want);
}

#[test]
fn a_wrong_row_is_an_error() {
    let (mut engine, _) = engine();
    assert!(engine.step(&Step { rows: vec![row(&[1], 4, &[0])] }, &mut |_| ()).is_err());
    assert!(engine.step(&Step { rows: vec![row(&[50_000], 0, &[0])] }, &mut |_| ()).is_err());
    assert!(engine.step(&Step { rows: vec![row(&[1], 100, &[0; 30])] }, &mut |_| ()).is_err());
}
