//! The tensor engine on LibTorch's processor device, with the reference set of kernels: against the golden rows of the tiny models, and against
//! the engine for processors, with hand-overs between the two. `gpu-check` does the same on a CUDA device.
#![allow(clippy::unwrap_used)]

#[path = "support/correct.rs"]
mod correct;
mod support;

use millrace_checkpoint::Checkpoint;
use millrace_core::engine::{Engine, Row, Step};
use millrace_core::ids::{AttemptId, Slot};
use millrace_model::compute::Weights;
use millrace_model::tensor::Settings;
use millrace_model::{Compute, Dtype, TensorEngine};
use support::{Sequence, Slots, check, each, greedy, models, repository, run};
use tch::Device;

#[test]
fn batched_and_alone_in_any_chunks() {
    each(models(), |model| correct::golden_rows(model, Device::Cpu));
}

#[test]
fn cached_prefixes_give_the_same() {
    each(models(), |model| correct::cached_prefixes(model, Device::Cpu));
}

#[test]
fn bf16_stays_near() {
    each(models(), |model| correct::bf16_near(model, Device::Cpu));
}

/// Prompts computed by one engine, tokens by the other and back again, each time through the cells that nodes hand over.
#[test]
fn sequences_go_between_the_two_engines() {
    each(models(), |model| correct::handed_over(model, Device::Cpu));
}

/// An engine of the small model that is in the repository.
fn small() -> TensorEngine {
    correct::engine(&repository().join("tests/data/tiny-llama-gqa-tied"), Device::Cpu, Dtype::F32)
}

fn one_row(tokens: Vec<u32>, start: u32, table: &[Slot]) -> Step {
    let row = Row { attempt: AttemptId::default(), tokens, start, table: table.to_vec(), sample: Some(greedy()) };
    Step { rows: vec![row] }
}

#[test]
fn a_layer_is_reported_when_its_cells_stand_and_nothing_else_of_them_changed() {
    let mut engine = small();
    let slab = engine.slab().clone();
    let table = [Slot(9), Slot(4)];
    engine.logits(&one_row((1..21).collect(), 0, &table), &mut |_| ()).unwrap();
    let layers = usize::from(engine.layout().layers);
    let cell = |slot: usize, layer: usize| slab.share(slot, layer).as_ref().to_vec();
    let before: Vec<Vec<u8>> = (0..layers).map(|layer| cell(4, layer)).collect();
    let full: Vec<Vec<u8>> = (0..layers).map(|layer| cell(9, layer)).collect();
    let mut seen = Vec::new();
    engine.logits(&one_row(vec![30], 20, &table), &mut |layer| seen.push(cell(4, layer.into()))).unwrap();
    let token = engine.layout().vector_bytes();
    for layer in 0..layers {
        assert!(seen[layer] == cell(4, layer), "layer {layer} was reported before it stood");
        assert!(full[layer] == cell(9, layer), "a full block of layer {layer} changed");
        for (at, (old, new)) in before[layer].chunks(token).zip(seen[layer].chunks(token)).enumerate() {
            // Token 20 is the fifth of its block.
            assert_eq!(old != new, at % 16 == 4, "vector {at} of layer {layer}");
        }
    }
    assert_eq!([slab.writes(9), slab.writes(4)], [0, 0]);
}

/// The copy on the device is old when somebody else wrote the cell, whatever it held.
#[test]
fn what_others_write_is_read() {
    let mut engine = small();
    let slab = engine.slab().clone();
    let table = [Slot(2), Slot(3)];
    engine.logits(&one_row((1..17).collect(), 0, &table), &mut |_| ()).unwrap();
    let ask = |engine: &mut TensorEngine| engine.logits(&one_row(vec![5], 16, &table), &mut |_| ()).unwrap().remove(0);
    let first = ask(&mut engine);
    let last = usize::from(engine.layout().layers) - 1;
    let kept = slab.read(2, last).to_vec();
    slab.write(2, last).fill(0);
    let changed = ask(&mut engine);
    assert_ne!(first, changed);
    slab.write(2, last).copy_from_slice(&kept);
    assert_eq!(first, ask(&mut engine));
}

/// A stream holds a cell that the engine is to write: the engine waits, and the rest goes its way.
#[test]
fn a_cell_that_is_lent_is_waited_for() {
    let mut engine = small();
    let slab = engine.slab().clone();
    let lent = slab.share(7, 1);
    let (told, layers) = std::sync::mpsc::channel();
    let returns = std::thread::spawn(move || {
        assert_eq!(layers.recv(), Ok(0));
        drop(lent);
    });
    let mut reported = Vec::new();
    let mut on_layer = |layer| {
        reported.push(layer);
        let _ = told.send(layer);
    };
    engine.logits(&one_row((1..9).collect(), 0, &[Slot(7)]), &mut on_layer).unwrap();
    returns.join().unwrap();
    assert!(reported.iter().copied().eq(0..engine.layout().layers));
}

#[test]
fn wrong_steps_are_errors_and_the_engine_lives_on() {
    let mut engine = small();
    let goldens = correct::goldens(&repository().join("tests/data/tiny-llama-gqa-tied"));
    assert_eq!(engine.step(&Step::default(), &mut |_| ()).unwrap(), []);
    for (step, word) in
        [(one_row(vec![300], 0, &[Slot(0)]), "token 300"), (one_row(vec![1], 0, &[Slot(correct::SLOTS as u32)]), "slot 256")]
    {
        let error = engine.step(&step, &mut |_| panic!("nothing is computed")).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
    let mut good = [Sequence::new(&goldens[1], &engine, &mut Slots::new(correct::SLOTS), &[])];
    run(&mut engine, &mut good, 64);
    check(&good[0], "after wrong steps");
}

#[test]
fn what_a_device_does_not_do_is_refused() {
    let checkpoint = Checkpoint::open(&repository().join("tests/data/tiny-llama-gqa-tied")).unwrap();
    let load = |settings| TensorEngine::load(&checkpoint, settings).map(|_| ()).unwrap_err().to_string();
    let of = |compute| load(Settings { compute, ..correct::settings(Device::Cpu, Dtype::Bf16) });
    assert!(of(Compute { batch_invariant: true, ..Compute::fixed(1) }).contains("batch-invariant"));
    assert!(of(Compute { weights: Weights::Q8_0, ..Compute::fixed(1) }).contains("q8_0"));
    assert!(load(Settings { block_tokens: 24, ..correct::settings(Device::Cpu, Dtype::F32) }).contains("block_tokens"));
    assert!(load(Settings { slots: 0, ..correct::settings(Device::Cpu, Dtype::F32) }).contains("0 slots"));
}
