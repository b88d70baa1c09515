//! Measures engines beside the limits of the machine: tokens a second of prefill and of decode, bytes a second that memory gives to the same
//! threads, operations a second of LibTorch's products at the same shapes. Says nothing of a cluster.
//!
//! Every round measures everything, so that figures of one round saw the same neighbours; ratios are taken within a round. Machines of many
//! guests change their speed within a second, so a prompt and its limit take turns, and each figure is the best of its turns.

use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use millrace_checkpoint::{Checkpoint, ModelConfig};
use millrace_core::engine::{Engine, EngineError, Row, Step};
use millrace_core::ids::{AttemptId, RequestId, Slot, TokenId};
use millrace_core::sampling::Sampling;
use millrace_kernels::Team;
use tch::{Device, Kind, Tensor};

use crate::compute::Weights;
use crate::{Compute, Dtype, ModelEngine, ModelError, Switch};

/// Context of each sequence when decoding begins, in tokens.
const DECODE_CONTEXT: usize = 128;
/// Sequences that decode together.
const BATCHES: [usize; 3] = [1, 8, 32];
/// Sequences of long contexts that decode together, and how long each is at the start, in tokens: most of what is read is KV.
const LONG: (usize, usize) = (4, 1_792);
/// Tokens of prompts.
const PROMPTS: [usize; 2] = [512, 2048];
/// Tokens of one block.
const BLOCK_TOKENS: u16 = 16;
/// Slots: [`BATCHES`]' largest, [`LONG`]'s, or the longest of [`PROMPTS`].
const SLOTS: usize = 512;
/// Turns that prompts and LibTorch's products of as many tokens take in a round.
const TURNS: usize = 4;
/// Bytes that the streaming limit is measured on: more than any cache of today's machines.
const STREAM_BYTES: usize = 512 << 20;
/// Bytes that one thread takes at a time there.
const STREAM_PART: usize = 4 << 20;

/// Takes one value of a named figure.
pub type Out<'a> = dyn FnMut(&str, f64) + 'a;

/// The engines that are compared: what they are called, their weights, whether they are batch-invariant, and who multiplies.
const ENGINES: [(&str, Weights, bool, Switch); 5] = [
    ("bf16, LibTorch's products", Weights::Bf16, false, Switch::Above(0)),
    ("bf16", Weights::Bf16, false, Switch::Measured),
    ("Q8_0", Weights::Q8_0, false, Switch::Measured),
    ("as in the file", Weights::Kept, false, Switch::Measured),
    ("as in the file, batch-invariant", Weights::Kept, true, Switch::Measured),
];

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How often everything is measured.
    pub rounds: usize,
    /// Timed decode steps.
    pub steps: usize,
    /// Threads.
    pub threads: usize,
    /// Only figures whose names contain one of these; all where there is none.
    pub only: Vec<String>,
}

impl Plan {
    fn wants(&self, figure: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| figure.contains(part))
    }
}

fn decode_figure(batch: usize, engine: &str) -> String {
    format!("decode, batch {batch}, weights {engine}, tokens/s")
}

fn long_figure(engine: &str) -> String {
    format!("decode, batch {} of {} tokens, weights {engine}, tokens/s", LONG.0, LONG.1)
}

fn prefill_figure(tokens: usize, engine: &str) -> String {
    format!("prefill, {tokens} tokens, weights {engine}, tokens/s")
}

fn products_figure(tokens: usize) -> String {
    format!("limit: LibTorch's bf16 products of {tokens} tokens, tokens/s")
}

/// Measures what `plan` says.
///
/// # Errors
/// [`ModelError`] when the model cannot be opened or computed.
pub fn measure(model: &Path, plan: &Plan, out: &mut Out<'_>) -> Result<(), ModelError> {
    let checkpoint = Checkpoint::open(model)?;
    let mut engines = Vec::new();
    for (name, weights, batch_invariant, switch) in ENGINES {
        let decodes = BATCHES.map(|batch| decode_figure(batch, name)).into_iter().chain([long_figure(name)]);
        let mut figures = decodes.chain(PROMPTS.map(|p| prefill_figure(p, name)));
        if figures.any(|figure| plan.wants(&figure)) {
            let compute = Compute { threads: plan.threads, switch, batch_invariant, weights, kv_dtype: None };
            engines.push((name, ModelEngine::load(&checkpoint, Dtype::Bf16, SLOTS, BLOCK_TOKENS, compute)?.0));
        }
    }
    tch::set_num_threads(i32::try_from(plan.threads).unwrap_or(i32::MAX));
    let limits = Limits::new(&checkpoint.config, plan.threads);
    for _ in 0..plan.rounds {
        round(&limits, &mut engines, plan, out).map_err(|error| ModelError::Bench(error.to_string()))?;
    }
    Ok(())
}

/// Everything once.
fn round(limits: &Limits, engines: &mut [(&str, ModelEngine)], plan: &Plan, out: &mut Out<'_>) -> Result<(), EngineError> {
    let decodes = |(name, _): &&mut (&str, ModelEngine)| {
        plan.wants(&long_figure(name)) || BATCHES.iter().any(|batch| plan.wants(&decode_figure(*batch, name)))
    };
    let stream = engines.iter_mut().any(|engine| decodes(&engine)).then(|| limits.stream_bytes_per_s());
    stream.iter().for_each(|stream| out("limit: memory read, GB/s", stream / 1e9));
    for batch in BATCHES {
        for (name, engine) in engines.iter_mut().filter(|(name, _)| plan.wants(&decode_figure(batch, name))) {
            let rate = decode_tokens_per_s(engine, (batch, DECODE_CONTEXT), plan.steps)?;
            out(&decode_figure(batch, name), rate);
            if let (1, Some(stream)) = (batch, stream) {
                let share = rate * engine.weight_bytes() as f64 / stream;
                out(&format!("decode, batch 1, weights {name}, of the streaming limit"), share);
            }
        }
    }
    for (name, engine) in engines.iter_mut().filter(|(name, _)| plan.wants(&long_figure(name))) {
        let rate = decode_tokens_per_s(engine, LONG, plan.steps)?;
        out(&long_figure(name), rate);
        if let Some(stream) = stream {
            let kv = LONG.0 * (LONG.1 + plan.steps / 2) * engine.layout().block_bytes() / usize::from(BLOCK_TOKENS);
            let share = rate / LONG.0 as f64 * (engine.weight_bytes() + kv) as f64 / stream;
            out(&format!("decode, batch {} of {} tokens, weights {name}, of the streaming limit", LONG.0, LONG.1), share);
        }
    }
    for batch in &BATCHES[1..] {
        let figure = products_figure(*batch);
        if plan.wants(&figure) {
            let rates = (0..TURNS).map(|_| limits.gemm_tokens_per_s(*batch)).collect::<Result<Vec<_>, _>>()?;
            out(&figure, rates.into_iter().fold(0.0, f64::max));
        }
    }
    PROMPTS.into_iter().try_for_each(|tokens| prefill(limits, engines, tokens, plan, out))
}

/// Prompts of `tokens` tokens by turns with LibTorch's products of as many.
fn prefill(
    limits: &Limits,
    engines: &mut [(&str, ModelEngine)],
    tokens: usize,
    plan: &Plan,
    out: &mut Out<'_>,
) -> Result<(), EngineError> {
    let mut engines: Vec<_> = engines.iter_mut().filter(|(name, _)| plan.wants(&prefill_figure(tokens, name))).collect();
    if engines.is_empty() && !plan.wants(&products_figure(tokens)) {
        return Ok(());
    }
    let (mut limit, mut best) = (0.0f64, vec![0.0f64; engines.len()]);
    for _ in 0..TURNS {
        limit = limit.max(limits.gemm_tokens_per_s(tokens)?);
        for ((_, engine), best) in engines.iter_mut().zip(&mut best) {
            *best = best.max(prefill_tokens_per_s(engine, tokens)?);
        }
    }
    out(&products_figure(tokens), limit);
    for ((name, _), best) in engines.iter().zip(best) {
        out(&prefill_figure(tokens, name), best);
        out(&format!("prefill, {tokens} tokens, weights {name}, of LibTorch's products"), best / limit);
    }
    Ok(())
}

/// What the machine gives without an engine around it.
struct Limits {
    team: Team,
    memory: Vec<u64>,
    /// bf16 weights of every linear layer, `[out, in]`.
    weights: Vec<Tensor>,
}

impl Limits {
    fn new(config: &ModelConfig, threads: usize) -> Self {
        // Matrices that are multiplied with the same activations count as one.
        let tensors: Vec<_> = config.tensors().into_iter().filter(|(name, _)| name.starts_with("model.layers.")).collect();
        let together = |a: &(String, Vec<usize>), b: &(String, Vec<usize>)| a.1.get(1) == b.1.get(1) && !b.0.contains("o_proj");
        let joined = tensors.chunk_by(together).filter(|parts| parts[0].1.len() == 2);
        let joined = joined.map(|parts| [parts.iter().map(|(_, shape)| shape[0] as i64).sum(), parts[0].1[1] as i64]);
        let shapes = joined.chain([[config.vocab_size as i64, config.hidden_size as i64]]);
        let weights = shapes.map(|shape| Tensor::ones(shape, (Kind::BFloat16, Device::Cpu))).collect();
        Self { team: Team::new(threads), memory: (0..STREAM_BYTES as u64 / 8).collect(), weights }
    }

    /// The best of three passes over memory that no cache holds.
    fn stream_bytes_per_s(&self) -> f64 {
        let parts: Vec<&[u64]> = self.memory.chunks(STREAM_PART / 8).collect();
        let pass = || {
            let (begin, total) = (Instant::now(), AtomicU64::new(0));
            self.team.each(parts.len(), 1, |index| {
                let sums = parts[index].chunks_exact(64).fold([0u64; 64], |mut sums, words| {
                    sums.iter_mut().zip(words).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
                    sums
                });
                total.fetch_add(sums.iter().fold(0, |a, b| a ^ b), Ordering::Relaxed);
            });
            black_box(total.into_inner());
            STREAM_BYTES as f64 / begin.elapsed().as_secs_f64()
        };
        (0..3).map(|_| pass()).fold(0.0, f64::max)
    }

    /// Tokens a second if a step of `tokens` tokens were LibTorch's products alone; the head is for one token of a prompt, for all of a batch.
    fn gemm_tokens_per_s(&self, tokens: usize) -> Result<f64, EngineError> {
        let failed = |error: tch::TchError| EngineError(error.to_string());
        let _no_grad = tch::no_grad_guard();
        let begin = Instant::now();
        for (index, weights) in self.weights.iter().enumerate() {
            let head = index + 1 == self.weights.len() && tokens >= PROMPTS[0];
            let rows = if head { 1 } else { tokens as i64 };
            let x = Tensor::ones([rows, weights.size()[1]], (Kind::BFloat16, Device::Cpu));
            drop(black_box(x.f_linear(weights, None::<&Tensor>).map_err(failed)?));
        }
        Ok(tokens as f64 / begin.elapsed().as_secs_f64())
    }
}

/// Tokens a second of one prompt of `tokens` tokens, computed as one chunk.
fn prefill_tokens_per_s(engine: &mut ModelEngine, tokens: usize) -> Result<f64, EngineError> {
    let step = Step { rows: vec![prompt(engine, 0, tokens, 0)] };
    let begin = Instant::now();
    engine.step(&step, &mut |_| ())?;
    Ok(tokens as f64 / begin.elapsed().as_secs_f64())
}

/// Tokens a second of `batch` sequences together, each `context` tokens long at the start, over `steps` steps.
fn decode_tokens_per_s(engine: &mut ModelEngine, (batch, context): (usize, usize), steps: usize) -> Result<f64, EngineError> {
    let mut rows: Vec<Row> = (0..batch).map(|index| prompt(engine, index, context, steps)).collect();
    let mut begin = Instant::now();
    for count in 0..=steps {
        let sampled = engine.step(&Step { rows: rows.clone() }, &mut |_| ())?;
        for (row, sampled) in rows.iter_mut().zip(sampled) {
            *row = Row { start: row.end(), tokens: vec![sampled.token], ..row.clone() };
        }
        if count == 0 {
            begin = Instant::now();
        }
    }
    Ok((batch * steps) as f64 / begin.elapsed().as_secs_f64())
}

/// Sequence `index` with a prompt of `tokens` tokens and slots of its own, with room for `more`.
fn prompt(engine: &ModelEngine, index: usize, tokens: usize, more: usize) -> Row {
    let blocks = engine.layout().blocks(tokens + more + 1);
    let token = |i: usize| ((i * 7919 + index * 104_729 + 11) % engine.vocab()) as TokenId;
    let sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, max_new: 1, eos: vec![], ignore_eos: true };
    Row {
        attempt: AttemptId { request: RequestId(index as u128), attempt: 0 },
        tokens: (0..tokens).map(token).collect(),
        start: 0,
        table: (index * blocks..(index + 1) * blocks).map(|slot| Slot(slot as u32)).collect(),
        sample: Some(sampling),
    }
}
