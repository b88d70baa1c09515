//! Measures an engine: tokens a second of prefill and of decode. Says nothing of a cluster.
//!
//! The figures overwrite the engine's KV memory from slot 0 on.

use std::time::Instant;

use millrace_core::engine::{Engine, EngineError, Row, Step};
use millrace_core::ids::{AttemptId, RequestId, Slot, TokenId};
use millrace_core::sampling::Sampling;

use crate::LlamaEngine;

/// Context of each sequence when decoding begins, in tokens.
pub const DECODE_CONTEXT: usize = 128;
/// Timed decode steps.
pub const DECODE_STEPS: usize = 32;

/// Tokens a second of one prompt of `tokens` tokens, computed as one chunk on an idle engine; the better of two runs after a warm-up.
///
/// # Errors
/// When the engine has too few slots or positions, or fails.
pub fn prefill_tokens_per_s(engine: &mut LlamaEngine, tokens: usize) -> Result<f64, EngineError> {
    let step = Step { rows: vec![prompt(engine, 0, tokens)] };
    let mut best = 0.0f64;
    for _ in 0..3 {
        let begin = Instant::now();
        engine.step(&step, &mut |_| ())?;
        best = best.max(tokens as f64 / begin.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Tokens a second of `batch` sequences together, each [`DECODE_CONTEXT`] tokens long at the start, over [`DECODE_STEPS`] steps.
///
/// # Errors
/// When the engine has too few slots or positions, or fails.
pub fn decode_tokens_per_s(engine: &mut LlamaEngine, batch: usize) -> Result<f64, EngineError> {
    let mut rows: Vec<Row> = (0..batch).map(|index| prompt(engine, index, DECODE_CONTEXT)).collect();
    let mut begin = Instant::now();
    for count in 0..=DECODE_STEPS {
        let sampled = engine.step(&Step { rows: rows.clone() }, &mut |_| ())?;
        for (row, sampled) in rows.iter_mut().zip(sampled) {
            *row = Row { start: row.end(), tokens: vec![sampled.token], ..row.clone() };
        }
        if count == 0 {
            begin = Instant::now();
        }
    }
    Ok((batch * DECODE_STEPS) as f64 / begin.elapsed().as_secs_f64())
}

/// Sequence `index` with a prompt of `tokens` tokens and slots of its own, long enough for the decode steps.
fn prompt(engine: &LlamaEngine, index: usize, tokens: usize) -> Row {
    let blocks = engine.layout().blocks(tokens + DECODE_STEPS + 1);
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
