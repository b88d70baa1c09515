//! SmolLM2-135M-Instruct, from its Q4_1 GGUF file, against transformers on the same weights.
//!
//! A few rows lie beside this file. `MILLRACE_GOLDEN=FILE` runs all rows of another file; the shares are printed (`--nocapture`).
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};

use millrace_checkpoint::Checkpoint;
use millrace_model::{Compute, Dtype, ModelEngine, Switch};
use support::{Golden, Sequence, Slots, read_golden, run};

const SLOTS: usize = 1024;

fn engine(dtype: Dtype) -> ModelEngine {
    let default = PathBuf::from(std::env::var("HOME").unwrap()).join(".cache/millrace/models/smollm2-135m-instruct.gguf");
    let model = std::env::var("MILLRACE_MODEL").map_or(default, PathBuf::from);
    assert!(model.is_file(), "{} is not there; `make setup` fetches it", model.display());
    let compute = Compute { threads: 2, switch: Switch::Never, ..Compute::default() };
    ModelEngine::load(&Checkpoint::open(&model).unwrap(), dtype, SLOTS, 16, compute).unwrap().0
}

fn goldens() -> Vec<Golden> {
    let few = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/smollm2-few.jsonl");
    read_golden(&std::env::var("MILLRACE_GOLDEN").map_or(few, PathBuf::from))
}

#[test]
fn f32_gives_the_reference_ids() {
    let mut engine = engine(Dtype::F32);
    let (mut equal, mut total) = (0, 0);
    for golden in goldens() {
        let mut one = [Sequence::new(&golden, &engine, &mut Slots::new(SLOTS), &[])];
        run(&mut engine, &mut one, 512);
        golden.assert_same(&one[0].output, "alone");
        equal += one[0].output.iter().zip(&golden.output).filter(|(a, b)| a == b).count();
        total += golden.output.len();
    }
    println!("f32: {equal} of {total} tokens equal");
}

#[test]
fn f32_batched_and_chunked_gives_the_reference_ids() {
    let mut engine = engine(Dtype::F32);
    let mut slots = Slots::new(SLOTS);
    let mut all: Vec<_> = goldens().iter().map(|g| Sequence::new(g, &engine, &mut slots, &[])).collect();
    run(&mut engine, &mut all, 48);
    all.iter().for_each(|s| s.golden.assert_same(&s.output, "batched"));
}

#[test]
fn bf16_mostly_gives_the_reference_ids() {
    let mut engine = engine(Dtype::Bf16);
    for forced in [true, false] {
        let (mut equal, mut total) = (0, 0);
        for golden in goldens() {
            let mut one = [Sequence::new(&golden, &engine, &mut Slots::new(SLOTS), &[])];
            one[0].forced = forced;
            run(&mut engine, &mut one, 512);
            equal += one[0].output.iter().zip(&golden.output).filter(|(a, b)| a == b).count();
            total += golden.output.len();
        }
        println!("bf16, reference tokens fed: {forced}: {equal} of {total} tokens equal");
        assert!(!forced || equal * 10 >= total * 9, "{equal} of {total}");
    }
}
