//! What the golden tests and `gpu-check` share: the reference rows, a small scheduler that drives an engine through them, and hand-overs between
//! two engines.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use millrace_core::engine::{EngineError, Row, Step};
use millrace_core::ids::{AttemptId, RequestId, Slot, TokenId};
use millrace_core::layout::KvLayout;
use millrace_core::sampling::Sampling;
use millrace_kernels::KvSlab;
use millrace_model::{ModelEngine, TensorEngine, sampler};
use serde_json::Value;

/// A position whose first two reference log-probabilities are closer than this may differ.
pub const NEAR_TIE: f32 = 0.002;

/// Largest difference of a logit to the reference's, in f32.
pub const LOGITS_TOLERANCE: f32 = 2e-3;

/// An engine whose logits can be seen.
pub trait Computes {
    fn logits(&mut self, step: &Step, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<Vec<f32>>, EngineError>;
    fn layout(&self) -> KvLayout;
}

impl Computes for ModelEngine {
    fn logits(&mut self, step: &Step, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<Vec<f32>>, EngineError> {
        Self::logits(self, step, on_layer)
    }

    fn layout(&self) -> KvLayout {
        Self::layout(self)
    }
}

impl Computes for TensorEngine {
    fn logits(&mut self, step: &Step, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<Vec<f32>>, EngineError> {
        Self::logits(self, step, on_layer)
    }

    fn layout(&self) -> KvLayout {
        Self::layout(self)
    }
}

/// One prompt and what transformers answered, greedily, in f32.
#[derive(Clone, Debug)]
pub struct Golden {
    pub name: String,
    pub prompt: Vec<TokenId>,
    pub output: Vec<TokenId>,
    /// For each output position the likeliest tokens with their log-probabilities.
    pub top: Vec<Vec<(TokenId, f32)>>,
    /// Logits of the first output position; empty where the file has none.
    pub logits_first: Vec<f32>,
}

pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub fn read_golden(file: &Path) -> Vec<Golden> {
    let text = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let rows: Vec<Golden> = text.lines().map(|line| golden(&serde_json::from_str(line).unwrap())).collect();
    assert!(!rows.is_empty(), "{} is empty", file.display());
    rows
}

fn golden(row: &Value) -> Golden {
    let ids = |key: &str| row[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as TokenId).collect();
    let pair = |pair: &Value| (pair[0].as_u64().unwrap() as TokenId, pair[1].as_f64().unwrap() as f32);
    let top = |position: &Value| position.as_array().unwrap().iter().map(pair).collect();
    let floats = |value: &Value| value.as_array().map(|xs| xs.iter().map(|x| x.as_f64().unwrap() as f32).collect());
    Golden {
        name: row["name"].as_str().unwrap_or("unnamed").into(),
        prompt: ids("prompt_ids"),
        output: ids("output_ids"),
        top: row["top5"].as_array().unwrap().iter().map(top).collect(),
        logits_first: floats(&row["logits_first"]).unwrap_or_default(),
    }
}

impl Golden {
    /// Whether the reference itself could have gone two ways at this output position.
    pub fn near_tie(&self, position: usize) -> bool {
        self.top[position][0].1 - self.top[position][1].1 < NEAR_TIE
    }

    /// Tokens up to which `got` must equal the reference: all, or up to a near tie that went the other way.
    pub fn assert_same(&self, got: &[TokenId], note: &str) {
        assert_eq!(got.len(), self.output.len());
        let differs = (0..got.len()).find(|&i| got[i] != self.output[i]);
        if let Some(i) = differs {
            assert!(self.near_tie(i), "{} {note}: token {i} is {}, the reference has {:?}", self.name, got[i], self.top[i]);
        }
    }
}

/// A sequence on its way.
pub struct Sequence {
    pub golden: Golden,
    pub table: Vec<Slot>,
    /// Tokens whose KV stands in the cells.
    pub done: usize,
    /// Drawn tokens.
    pub output: Vec<TokenId>,
    pub logits_first: Vec<f32>,
    /// Feed the reference's tokens, whatever was drawn.
    pub forced: bool,
}

/// Hands out slots in an order that is not the order of positions.
pub struct Slots {
    next: usize,
    count: usize,
}

impl Slots {
    pub fn new(count: usize) -> Self {
        Self { next: 0, count }
    }

    pub fn take(&mut self) -> Slot {
        let step = (1..).step_by(2).find(|step| step * 2 > self.count && gcd(*step, self.count) == 1).unwrap();
        self.next += 1;
        assert!(self.next <= self.count, "out of slots");
        Slot((self.next * step % self.count) as u32)
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Sequence {
    /// A cold sequence, or one whose first blocks are those of `prefix`.
    pub fn new(golden: &Golden, engine: &dyn Computes, slots: &mut Slots, prefix: &[Slot]) -> Self {
        let blocks = engine.layout().blocks(golden.prompt.len() + golden.output.len());
        let mut table = prefix.to_vec();
        table.resize_with(blocks, || slots.take());
        let done = prefix.len() * usize::from(engine.layout().block_tokens);
        assert!(done < golden.prompt.len());
        Self { golden: golden.clone(), table, done, output: vec![], logits_first: vec![], forced: false }
    }

    fn finished(&self) -> bool {
        self.output.len() == self.golden.output.len()
    }

    fn row(&self, index: usize, chunk: usize) -> Row {
        let tokens = match self.output.len() {
            0 => self.golden.prompt[self.done..].iter().copied().take(chunk).collect(),
            n if self.forced => vec![self.golden.output[n - 1]],
            n => vec![self.output[n - 1]],
        };
        let last = self.done + tokens.len() >= self.golden.prompt.len();
        Row {
            attempt: AttemptId { request: RequestId(index as u128), attempt: 0 },
            tokens,
            start: self.done as u32,
            table: self.table.clone(),
            sample: last.then(greedy),
        }
    }
}

pub fn greedy() -> Sampling {
    Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, max_new: 1, eos: vec![], ignore_eos: true }
}

/// Runs all sequences together to their ends: each step has one row of each, a chunk or one token.
pub fn run(engine: &mut dyn Computes, sequences: &mut [Sequence], chunk: usize) {
    while sequences.iter().any(|s| !s.finished()) {
        advance(engine, sequences, chunk);
    }
}

/// One step of [`run`].
pub fn advance(engine: &mut dyn Computes, sequences: &mut [Sequence], chunk: usize) {
    let live: Vec<usize> = (0..sequences.len()).filter(|&i| !sequences[i].finished()).collect();
    let step = Step { rows: live.iter().map(|&i| sequences[i].row(i, chunk)).collect() };
    let mut layers = Vec::new();
    let logits = engine.logits(&step, &mut |layer| layers.push(layer)).unwrap();
    assert!(layers.iter().copied().eq(0..engine.layout().layers), "each layer is told once, in order: {layers:?}");
    let mut logits = logits.into_iter();
    for (&i, row) in live.iter().zip(&step.rows) {
        sequences[i].done = row.end() as usize;
        if row.sample.is_some() {
            take(&mut sequences[i], logits.next().unwrap());
        }
    }
    assert_eq!(logits.next(), None);
}

/// Copies what a sequence has cached from one node's memory to slots of another's, as a hand-over does.
pub fn hand_over(layout: &KvLayout, done: usize, from: (&KvSlab, &[Slot]), to: (&KvSlab, &[Slot])) {
    for (old, new) in from.1.iter().zip(to.1).take(layout.blocks(done)) {
        for layer in 0..layout.layers.into() {
            let cell = from.0.share(old.0 as usize, layer);
            to.0.write(new.0 as usize, layer).copy_from_slice(cell.as_ref());
        }
    }
}

/// An engine with its memory and the slots that a sequence has there.
pub struct Side<'a> {
    pub engine: &'a mut dyn Computes,
    pub slab: &'a KvSlab,
    pub table: Vec<Slot>,
}

/// Computes the prompt on the first side and each token after it on the other than the one before: the sequence is handed over all the
/// time, to slots of which the other side has an older copy.
pub fn there_and_back<'a>(golden: &Golden, first: Side<'a>, second: Side<'a>, chunk: usize) -> Sequence {
    let layout = first.engine.layout();
    let (mut here, mut there) = (first, second);
    let table = here.table.clone();
    let (done, output, logits_first) = (0, vec![], vec![]);
    let mut sequence = [Sequence { golden: golden.clone(), table, done, output, logits_first, forced: false }];
    while !sequence[0].finished() {
        advance(here.engine, &mut sequence, chunk);
        if !sequence[0].output.is_empty() {
            hand_over(&layout, sequence[0].done, (here.slab, &here.table), (there.slab, &there.table));
            sequence[0].table = there.table.clone();
            std::mem::swap(&mut here, &mut there);
        }
    }
    let [sequence] = sequence;
    sequence
}

/// What a finished sequence must be in f32: the reference's tokens, and its first logits.
pub fn check(sequence: &Sequence, note: &str) {
    let golden = &sequence.golden;
    golden.assert_same(&sequence.output, note);
    assert_eq!(sequence.logits_first.len(), golden.logits_first.len());
    for (i, (got, want)) in sequence.logits_first.iter().zip(&golden.logits_first).enumerate() {
        assert!((got - want).abs() <= LOGITS_TOLERANCE, "{note}, prompt of {}: logit {i} {got} {want}", golden.prompt.len());
    }
}

/// How far the first logits are from the reference's: the square of the relative error.
pub fn error_squared(sequence: &Sequence) -> f32 {
    let pairs = sequence.logits_first.iter().zip(&sequence.golden.logits_first);
    let (error, size) = pairs.fold((0.0f32, 0.0f32), |(e, s), (a, b)| (e + (a - b).powi(2), s + b.powi(2)));
    error / size
}

/// Largest [`error_squared`] in bf16. A rounded score may choose another expert, which is another answer and no error: mixtures have twice the room.
pub fn bf16_room(model: &Path) -> f32 {
    if model.to_string_lossy().contains("deepseek") { 0.02 } else { 0.01 }
}

/// The tiny models beside the repository, and those inside it.
pub fn models() -> Vec<PathBuf> {
    let folders = [repository().join("tests/data"), repository().join("../shared/golden/tiny")];
    let entries = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten();
    let models = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let found: BTreeMap<_, _> = models.map(|model| (model.file_name().unwrap().to_owned(), model)).collect();
    for model in found.values() {
        assert!(model.join("model.safetensors").is_file(), "{} is not there", model.display());
    }
    assert!(found.len() == 5 || found.len() >= 14, "{found:?}");
    found.into_values().collect()
}

/// One model's name and what went wrong with it, so that a failure of one does not hide the others.
pub fn each(models: Vec<PathBuf>, check: impl Fn(&Path) + std::panic::RefUnwindSafe) {
    let wrong: Vec<String> = models
        .iter()
        .filter(|model| std::panic::catch_unwind(|| check(model)).is_err())
        .map(|model| model.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    assert!(wrong.is_empty(), "wrong: {wrong:?}");
}

fn take(sequence: &mut Sequence, logits: Vec<f32>) {
    let position = sequence.output.len();
    let draw = sampler::draw(&logits, &greedy(), sequence.done as u32).unwrap();
    sequence.output.push(draw.token);
    if position == 0 {
        sequence.logits_first = logits;
    }
}
