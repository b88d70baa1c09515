//! Whether a tensor engine computes what it should on a device: golden rows, prefixes, batches, and hand-overs with the engine for processors.
//! `tests/tensor.rs` and `gpu-check` run the same checks.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use millrace_checkpoint::Checkpoint;
use millrace_core::ids::Slot;
use millrace_model::tensor::Settings;
use millrace_model::{Compute, Dtype, ModelEngine, TensorEngine};
use tch::Device;

use crate::support::{
    Golden, Sequence, Side, Slots, bf16_room, check as same, error_squared, models, read_golden, run, there_and_back,
};

pub const SLOTS: usize = 256;
const BLOCK_TOKENS: u16 = 16;
const CHUNKS: [usize; 4] = [1, 7, 16, 64];

/// One kind of check of one model.
type Check = fn(&Path, Device);

const CHECKS: [(&str, Check); 4] = [
    ("golden rows in f32, chunks of 1, 7, 16, 64, batched and alone", golden_rows),
    ("cached prefixes", cached_prefixes),
    ("bf16 near the golden logits", bf16_near),
    ("processor to device and back, token by token", handed_over),
];

/// Runs every check of every model, says what came out, and fails when one did.
pub fn check(device: Device, folder: Option<&Path>) -> Result<(), String> {
    let mut wrong = 0;
    for model in found(folder)? {
        for (what, check) in CHECKS {
            let right = catch_unwind(AssertUnwindSafe(|| check(&model, device))).is_ok();
            wrong += usize::from(!right);
            let name = model.file_name().unwrap_or_default().to_string_lossy();
            println!("{:5} {name}: {what}", if right { "ok" } else { "WRONG" });
        }
    }
    if wrong == 0 { Ok(()) } else { Err(format!("{wrong} checks went wrong")) }
}

fn found(folder: Option<&Path>) -> Result<Vec<PathBuf>, String> {
    let Some(folder) = folder else { return Ok(models()) };
    let entries = std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut found: Vec<PathBuf> =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.join("golden.jsonl").is_file()).collect();
    found.sort();
    if found.is_empty() { Err(format!("no model with golden.jsonl in {}", folder.display())) } else { Ok(found) }
}

pub fn settings(device: Device, dtype: Dtype) -> Settings {
    Settings { device, dtype, slots: SLOTS, block_tokens: BLOCK_TOKENS, compute: Compute::fixed(2) }
}

pub fn engine(model: &Path, device: Device, dtype: Dtype) -> TensorEngine {
    let settings = settings(device, dtype);
    let checkpoint = Checkpoint::open(model).expect("a golden model is sound");
    // Tensors of these models are too small to share, and checks run side by side.
    tch::set_num_threads(1);
    TensorEngine::load(&checkpoint, settings).unwrap_or_else(|error| panic!("{}: {error}", model.display())).0
}

pub fn goldens(model: &Path) -> Vec<Golden> {
    read_golden(&model.join("golden.jsonl"))
}

pub fn golden_rows(model: &Path, device: Device) {
    let mut engine = engine(model, device, Dtype::F32);
    let goldens = goldens(model);
    for chunk in CHUNKS {
        let mut slots = Slots::new(SLOTS);
        let mut together: Vec<_> = goldens.iter().map(|golden| Sequence::new(golden, &engine, &mut slots, &[])).collect();
        run(&mut engine, &mut together, chunk);
        together.iter().for_each(|sequence| same(sequence, &format!("batched, chunks of {chunk}")));
        for golden in &goldens {
            let mut alone = [Sequence::new(golden, &engine, &mut Slots::new(SLOTS), &[])];
            run(&mut engine, &mut alone, chunk);
            same(&alone[0], &format!("alone, chunks of {chunk}"));
        }
    }
}

pub fn cached_prefixes(model: &Path, device: Device) {
    let mut engine = engine(model, device, Dtype::F32);
    let goldens = goldens(model);
    for golden in goldens.iter().filter(|golden| golden.prompt.len() > usize::from(BLOCK_TOKENS)) {
        let most = (golden.prompt.len() - 1) / usize::from(BLOCK_TOKENS);
        for cached in BTreeSet::from([1, most.div_ceil(2), most]) {
            let mut slots = Slots::new(SLOTS);
            let mut first = [Sequence::new(golden, &engine, &mut slots, &[])];
            run(&mut engine, &mut first, 64);
            let prefix: Vec<Slot> = first[0].table[..cached].to_vec();
            let others = Sequence::new(&goldens[0], &engine, &mut slots, &[]);
            let mut second = [Sequence::new(golden, &engine, &mut slots, &prefix), others];
            run(&mut engine, &mut second, CHUNKS[cached % CHUNKS.len()]);
            second.iter().for_each(|sequence| same(sequence, &format!("on {cached} cached blocks")));
        }
    }
}

pub fn bf16_near(model: &Path, device: Device) {
    let mut engine = engine(model, device, Dtype::Bf16);
    for chunk in [1, 16, 64] {
        let mut slots = Slots::new(SLOTS);
        let mut all: Vec<_> = goldens(model).iter().map(|golden| Sequence::new(golden, &engine, &mut slots, &[])).collect();
        run(&mut engine, &mut all, chunk);
        for error in all.iter().map(error_squared) {
            assert!(error < bf16_room(model), "chunks of {chunk}: relative error {}", error.sqrt());
        }
    }
}

pub fn handed_over(model: &Path, device: Device) {
    let mut tensors = engine(model, device, Dtype::F32);
    let slab = tensors.slab().clone();
    let checkpoint = Checkpoint::open(model).expect("a golden model is sound");
    let own = ModelEngine::load(&checkpoint, Dtype::F32, SLOTS, BLOCK_TOKENS, Compute::fixed(2));
    let (mut own, own_slab, layout) = own.unwrap_or_else(|error| panic!("{}: {error}", model.display()));
    for (index, golden) in goldens(model).iter().enumerate() {
        let blocks = layout.blocks(golden.prompt.len() + golden.output.len());
        let table = |first: usize| (0..blocks).map(|i| Slot(((first + i) * 5 % SLOTS) as u32)).collect::<Vec<_>>();
        for device_first in [true, false] {
            let one = Side { engine: &mut tensors, slab: &slab, table: table(3) };
            let other = Side { engine: &mut own, slab: &own_slab, table: table(11) };
            let (first, second) = if device_first { (one, other) } else { (other, one) };
            same(&there_and_back(golden, first, second, CHUNKS[index % CHUNKS.len()]), "handed over");
        }
    }
}
