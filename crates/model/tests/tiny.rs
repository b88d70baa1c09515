//! The tiny models of every family against transformers: every chunk size, alone and batched, cold and on cached prefixes.
#![allow(clippy::unwrap_used)]

mod support;

use millrace_checkpoint::Checkpoint;
use millrace_core::engine::{Engine, Step};
use millrace_core::ids::Slot;
use millrace_model::{Compute, Dtype, ModelEngine, Switch};
use support::{Golden, Sequence, Slots, bf16_room, check, each, error_squared, models, read_golden, repository, run};

const SLOTS: usize = 256;
const CHUNKS: [usize; 4] = [1, 7, 16, 64];

fn load(model: &std::path::Path, dtype: Dtype) -> (ModelEngine, Vec<Golden>) {
    load_with(model, dtype, Compute::fixed(2))
}

fn load_with(model: &std::path::Path, dtype: Dtype, compute: Compute) -> (ModelEngine, Vec<Golden>) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let (engine, slab, layout) = ModelEngine::load(&checkpoint, dtype, SLOTS, 16, compute).unwrap();
    assert_eq!((slab.cell_bytes(), slab.slots()), (layout.cell_bytes(), SLOTS));
    (engine, read_golden(&model.join("golden.jsonl")))
}

#[test]
fn batched_and_alone_in_any_chunks() {
    let own = Compute { switch: Switch::Never, ..Compute::fixed(2) };
    each(models(), |model| {
        for compute in [Compute::fixed(2), own] {
            let (mut engine, goldens) = load_with(model, Dtype::F32, compute);
            for chunk in CHUNKS {
                let mut slots = Slots::new(SLOTS);
                let mut together: Vec<_> = goldens.iter().map(|g| Sequence::new(g, &engine, &mut slots, &[])).collect();
                run(&mut engine, &mut together, chunk);
                together.iter().for_each(|s| check(s, &format!("{} batched, chunks of {chunk}", model.display())));
                for golden in &goldens {
                    let mut alone = [Sequence::new(golden, &engine, &mut Slots::new(SLOTS), &[])];
                    run(&mut engine, &mut alone, chunk);
                    check(&alone[0], &format!("{} alone, chunks of {chunk}", model.display()));
                }
            }
        }
    });
}

#[test]
fn cached_prefixes_give_the_same() {
    each(models(), |model| {
        let (mut engine, goldens) = load(model, Dtype::F32);
        for golden in goldens.iter().filter(|g| g.prompt.len() > 16) {
            for cached in 1..=(golden.prompt.len() - 1) / 16 {
                let mut slots = Slots::new(SLOTS);
                let mut first = [Sequence::new(golden, &engine, &mut slots, &[])];
                run(&mut engine, &mut first, 64);
                let prefix: Vec<Slot> = first[0].table[..cached].to_vec();
                let mut second =
                    [Sequence::new(golden, &engine, &mut slots, &prefix), Sequence::new(&goldens[0], &engine, &mut slots, &[])];
                run(&mut engine, &mut second, CHUNKS[cached % CHUNKS.len()]);
                second.iter().for_each(|s| check(s, &format!("{} on {cached} cached blocks", model.display())));
            }
        }
    });
}

#[test]
fn bf16_stays_near() {
    each(models(), |model| {
        let (mut engine, goldens) = load(model, Dtype::Bf16);
        for chunk in [1, 16, 64] {
            let mut slots = Slots::new(SLOTS);
            let mut together: Vec<_> = goldens.iter().map(|g| Sequence::new(g, &engine, &mut slots, &[])).collect();
            run(&mut engine, &mut together, chunk);
            for sequence in &together {
                let error = error_squared(sequence);
                assert!(error < bf16_room(model), "{} in chunks of {chunk}: relative error {}", model.display(), error.sqrt());
            }
        }
    });
}

#[test]
fn wrong_steps_are_errors_and_the_engine_lives_on() {
    let model = repository().join("tests/data/tiny-llama-gqa-tied");
    let (mut engine, goldens) = load(&model, Dtype::F32);
    let mut slots = Slots::new(SLOTS);
    let mut good = Sequence::new(&goldens[1], &engine, &mut slots, &[]);
    assert_eq!(engine.step(&Step::default(), &mut |_| ()).unwrap(), []);
    let row = millrace_core::engine::Row {
        attempt: Default::default(),
        tokens: vec![300],
        start: 0,
        table: vec![Slot(0)],
        sample: Some(support::greedy()),
    };
    let mut refuse = |row: &millrace_core::engine::Row, word: &str| {
        let error = engine.step(&Step { rows: vec![row.clone()] }, &mut |_| panic!("nothing is computed")).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    refuse(&row, "token 300");
    refuse(&millrace_core::engine::Row { tokens: vec![], ..row.clone() }, "no tokens");
    refuse(&millrace_core::engine::Row { tokens: vec![1; 17], ..row.clone() }, "table of 1");
    refuse(&millrace_core::engine::Row { tokens: vec![1], table: vec![Slot(SLOTS as u32)], ..row.clone() }, "slot 256");
    refuse(&millrace_core::engine::Row { tokens: vec![1], start: 512, ..row.clone() }, "position 513");
    run(&mut engine, std::slice::from_mut(&mut good), 64);
    check(&good, "after wrong steps");
}

#[test]
fn settings_that_do_not_fit_are_refused() {
    let checkpoint = Checkpoint::open(&models()[0]).unwrap();
    assert!(ModelEngine::load(&checkpoint, Dtype::F32, 0, 16, Compute::fixed(1)).is_err());
    assert!(ModelEngine::load(&checkpoint, Dtype::F32, 4, 24, Compute::fixed(1)).is_err());
    assert!(ModelEngine::load(&checkpoint, Dtype::F32, usize::MAX, 16, Compute::fixed(1)).is_err());
}
