//! Batch-invariant mode: a row's logits are the same bits alone or among others, in any chunks, on any number of threads.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};

use millrace_checkpoint::Checkpoint;
use millrace_core::engine::{Engine, Row, Step};
use millrace_core::ids::{AttemptId, RequestId, Slot, TokenId};
use millrace_model::{Compute, Dtype, ModelEngine, Switch};
use support::{greedy, repository};

const SLOTS: usize = 512;
const BLOCKS: usize = 8;

fn smollm2() -> PathBuf {
    let default = PathBuf::from(std::env::var("HOME").unwrap()).join(".cache/millrace/models/smollm2-135m-instruct.gguf");
    std::env::var("MILLRACE_MODEL").map_or(default, PathBuf::from)
}

fn engine(model: &Path, dtype: Dtype, threads: usize) -> ModelEngine {
    let compute = Compute { threads, switch: Switch::Above(1), batch_invariant: true, ..Compute::default() };
    ModelEngine::load(&Checkpoint::open(model).unwrap(), dtype, SLOTS, 16, compute).unwrap().0
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

fn check(model: &Path, dtype: Dtype, lengths: &[usize], neighbours: &[usize]) {
    let (mut one, mut two) = (engine(model, dtype, 1), engine(model, dtype, 2));
    for &len in lengths {
        let tokens = prompt(0, len, one.vocab());
        let want = alone(&mut one, 0, &tokens);
        assert_eq!(alone(&mut two, 1, &tokens), want, "{} tokens on two threads", len);
        for &neighbours in neighbours {
            for cut in [1, len / 2] {
                let got = together(&mut two, &tokens, neighbours, cut);
                assert!(got == want, "{} {dtype:?}: {len} tokens among {neighbours}, cut at {cut}", model.display());
            }
        }
    }
}

#[test]
fn tiny_models() {
    let model = repository().join("tests/data/tiny-llama-gqa-tied");
    for dtype in [Dtype::F32, Dtype::Bf16] {
        check(&model, dtype, &[3, 40, 77], &[1, 7, 31]);
    }
}

/// A window, learned positions, norms of heads, a latent with experts.
#[test]
fn other_kinds_of_layers() {
    let beside = repository().join("../shared/golden/tiny");
    for name in ["tiny-mistral", "tiny-gpt2", "tiny-qwen3", "tiny-deepseek-v3"].into_iter().filter(|_| beside.is_dir()) {
        check(&beside.join(name), Dtype::F32, &[77], &[7]);
        check(&beside.join(name), Dtype::Bf16, &[40], &[3]);
    }
}

#[test]
fn a_quantised_model() {
    check(&smollm2(), Dtype::Bf16, &[70], &[31]);
    check(&smollm2(), Dtype::F32, &[5], &[3]);
}
