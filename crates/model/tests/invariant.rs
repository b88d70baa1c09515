//! Batch-invariant mode: a row's logits are the same bits alone or among others, in any chunks, on any number of threads.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use millrace_checkpoint::Checkpoint;
use millrace_core::engine::{Engine, Row, Step};
use millrace_core::ids::{AttemptId, RequestId, Slot, TokenId};
use millrace_kernels::KvSlab;
use millrace_model::{Compute, Dtype, KvDtype, ModelEngine, Switch};
use support::{greedy, repository};

const SLOTS: usize = 512;
const BLOCKS: usize = 8;

fn smollm2() -> PathBuf {
    let default = PathBuf::from(std::env::var("HOME").unwrap()).join(".cache/millrace/models/smollm2-135m-instruct.gguf");
    std::env::var("MILLRACE_MODEL").map_or(default, PathBuf::from)
}

/// Types of activations and of KV.
type Types = (Dtype, KvDtype);

const F32: Types = (Dtype::F32, KvDtype::F32);
const BF16: Types = (Dtype::Bf16, KvDtype::Bf16);
const INT8: [Types; 2] = [(Dtype::F32, KvDtype::Int8), (Dtype::Bf16, KvDtype::Int8)];

fn engine(model: &Path, (dtype, kv_dtype): Types, threads: usize) -> (ModelEngine, Arc<KvSlab>) {
    let kv_dtype = Some(kv_dtype);
    let compute = Compute { threads, switch: Switch::Above(1), batch_invariant: true, kv_dtype, ..Compute::default() };
    let (engine, slab, _) = ModelEngine::load(&Checkpoint::open(model).unwrap(), dtype, SLOTS, 16, compute).unwrap();
    (engine, slab)
}

/// Row `index` of a step: `tokens` from position `start` on, in slots of its own.
fn row(index: usize, tokens: &[TokenId], start: usize) -> Row {
    Row {
        attempt: AttemptId { request: RequestId(index as u128), attempt: 0 },
        tokens: tokens.to_vec(),
        start: start as u32,
        table: (index * BLOCKS..(index + 1) * BLOCKS).map(|slot| Slot(slot as u32)).collect(),
        sample: Some(greedy()),
    }
}

fn prompt(index: usize, len: usize, vocab: usize) -> Vec<TokenId> {
    (0..len).map(|i| ((i * 7919 + index * 104_729 + 11) % vocab) as TokenId).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// Logits of the last prompt token and of one more token, alone and in one chunk.
fn alone(engine: &mut ModelEngine, index: usize, tokens: &[TokenId]) -> [Vec<u32>; 2] {
    let (last, before) = tokens.split_last().unwrap();
    let first = engine.logits(&Step { rows: vec![row(index, before, 0)] }, &mut |_| ()).unwrap();
    let second = engine.logits(&Step { rows: vec![row(index, &[*last], before.len())] }, &mut |_| ()).unwrap();
    [bits(&first[0]), bits(&second[0])]
}

/// The same with `neighbours` other sequences in each step, and the prompt in two chunks.
fn together(engine: &mut ModelEngine, tokens: &[TokenId], neighbours: usize, cut: usize) -> [Vec<u32>; 2] {
    let vocab = engine.vocab();
    let (last, before) = tokens.split_last().unwrap();
    let others = |start: usize, len: usize| {
        (1..=neighbours).map(move |i| row(i, &prompt(i, 100, vocab)[start..start + len * (1 + i % 2)], start))
    };
    engine.step(&Step { rows: others(0, 20).chain([row(0, &before[..cut], 0)]).collect() }, &mut |_| ()).unwrap();
    let rows: Vec<Row> = [row(0, &before[cut..], cut)].into_iter().chain(others(20, 10)).collect();
    let first = engine.logits(&Step { rows }, &mut |_| ()).unwrap();
    let rows: Vec<Row> = others(30, 1).chain([row(0, &[*last], before.len())]).collect();
    let second = engine.logits(&Step { rows }, &mut |_| ()).unwrap();
    [bits(&first[0]), bits(&second[neighbours])]
}

fn check(model: &Path, types: Types, lengths: &[usize], neighbours: &[usize]) {
    let (mut one, mut two) = (engine(model, types, 1).0, engine(model, types, 2).0);
    for &len in lengths {
        let tokens = prompt(0, len, one.vocab());
        let want = alone(&mut one, 0, &tokens);
        assert_eq!(alone(&mut two, 1, &tokens), want, "{} tokens on two threads", len);
        for &neighbours in neighbours {
            for cut in [1, len / 2] {
                let got = together(&mut two, &tokens, neighbours, cut);
                assert!(got == want, "{} {types:?}: {len} tokens among {neighbours}, cut at {cut}", model.display());
            }
        }
    }
}

/// A prompt whose first two blocks another sequence computed, in other chunks and with another continuation: the bits of its logits, and the bytes of
/// its cells, are those that it has alone, because a vector's bytes depend on its token and what is before it alone.
fn check_hits(model: &Path, types: Types) {
    let (mut engine, slab) = engine(model, types, 2);
    let (tokens, other) = (prompt(0, 70, engine.vocab()), prompt(1, 9, engine.vocab()));
    let want = engine.logits(&Step { rows: vec![row(0, &tokens, 0)] }, &mut |_| ()).unwrap();
    let first = [&tokens[..32], &other].concat();
    for (index, chunk) in first.chunks(7).enumerate() {
        engine.step(&Step { rows: vec![row(1, chunk, index * 7)] }, &mut |_| ()).unwrap();
    }
    let table = [&row(1, &[], 0).table[..2], &row(2, &[], 0).table[2..]].concat();
    let on_hits = |start: usize, tokens: &[TokenId]| Row { table: table.clone(), ..row(2, tokens, start) };
    engine.step(&Step { rows: vec![on_hits(32, &tokens[32..43])] }, &mut |_| ()).unwrap();
    let got = engine.logits(&Step { rows: vec![on_hits(43, &tokens[43..])] }, &mut |_| ()).unwrap();
    assert!(bits(&got[0]) == bits(&want[0]), "{} {types:?}: logits", model.display());
    for (block, slot) in table.iter().enumerate().take(4) {
        for layer in 0..slab.layers() {
            let (cold, hit) = (slab.read(block, layer), slab.read(slot.0 as usize, layer));
            assert!(*cold == *hit, "{} {types:?}: block {block}, layer {layer}", model.display());
        }
    }
}

#[test]
fn tiny_models() {
    let model = repository().join("tests/data/tiny-llama-gqa-tied");
    for types in [F32, BF16].into_iter().chain(INT8) {
        check(&model, types, &[3, 40, 77], &[1, 7, 31]);
        check_hits(&model, types);
    }
}

/// A window, learned positions, norms of heads, a latent with experts.
#[test]
fn other_kinds_of_layers() {
    let beside = repository().join("../shared/golden/tiny");
    for name in ["tiny-mistral", "tiny-gpt2", "tiny-qwen3", "tiny-deepseek-v3"].into_iter().filter(|_| beside.is_dir()) {
        check(&beside.join(name), F32, &[77], &[7]);
        check(&beside.join(name), BF16, &[40], &[3]);
        check(&beside.join(name), INT8[1], &[40], &[3]);
        check_hits(&beside.join(name), INT8[1]);
    }
}

#[test]
fn a_quantised_model() {
    check(&smollm2(), BF16, &[70], &[31]);
    check(&smollm2(), F32, &[5], &[3]);
    check_hits(&smollm2(), INT8[1]);
}
