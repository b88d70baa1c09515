//! Tokens a second of prefill and decode, as a running cluster reports and shows them.
//!
//! First the engine alone beside the limits of the machine, which `engine-bench` measures in a process of its own (it needs LibTorch); then
//! a cluster. Prefill is the prompt's tokens over the node's own `compute_us` (first step to first token). Decode is the sum, over the requests
//! that run together, of the tokens after the first over the time after the first, seen by the gateway.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::cluster::Cluster;
use crate::report::Row;

/// Tokens of prompts.
const PROMPTS: [usize; 3] = [128, 512, 2048];
/// Requests that decode together.
const BATCHES: [usize; 2] = [1, 8];
/// Tokens of a prompt whose answer is timed.
const DECODE_PROMPT: usize = 64;

/// Measures the engine alone beside the limits of the machine, everything once in each round.
///
/// # Errors
/// `engine-bench` is not there, or fails.
pub fn alone(model: &Path, (rounds, quick): (usize, bool), out: &dyn Fn(Row)) -> Result<()> {
    let bin = std::env::current_exe()?.with_file_name("engine-bench");
    let (rounds, steps) = (rounds.to_string(), if quick { "8" } else { "24" });
    let mut command = Command::new(&bin);
    command.arg("--model").arg(model).args(["--rounds", &rounds, "--steps", steps]).stderr(Stdio::inherit());
    let answer = command.output().with_context(|| format!("starting {}; build it: cargo build --release", bin.display()))?;
    ensure!(answer.status.success(), "{} failed", bin.display());
    let mut rows: Vec<Row> = Vec::new();
    for line in String::from_utf8(answer.stdout)?.lines() {
        let (what, value) = line.split_once('\t').with_context(|| format!("a line without a tab: {line}"))?;
        let value = value.parse().with_context(|| format!("not a number: {line}"))?;
        match rows.iter_mut().find(|row| row.what == what) {
            Some(row) => row.values.push(value),
            None => rows.push(Row::new(what, vec![value])),
        }
    }
    rows.into_iter().for_each(out);
    Ok(())
}

/// Measures prefill and decode with weights and KV of `dtype`; gives each row to `out` when it is known.
///
/// # Errors
/// The cluster does not come up, or a request fails.
pub async fn measure(model: &Path, dtype: &str, (runs, quick): (usize, bool), out: &dyn Fn(Row)) -> Result<()> {
    let cluster = Cluster::start(model, dtype, 1).await?;
    for tokens in PROMPTS {
        let mut rates = Vec::new();
        for run in 0..=runs {
            let compute_us = cluster.complete(tokens, 1).await?.number("/prefill/compute_us");
            if run > 0 {
                rates.push(tokens as f64 * 1e6 / compute_us);
            }
        }
        out(Row::new(format!("prefill, {tokens} tokens, {dtype}, tokens/s"), rates));
    }
    let answer_tokens = if quick { 24 } else { 96 };
    for batch in BATCHES {
        let mut rates = Vec::new();
        for _ in 0..runs {
            rates.push(decode_rate(&cluster, batch, answer_tokens).await?);
        }
        out(Row::new(format!("decode, batch {batch}, {dtype}, tokens/s"), rates));
    }
    cluster.stop().await
}

async fn decode_rate(cluster: &Cluster, batch: usize, answer_tokens: u32) -> Result<f64> {
    let together = (0..batch).map(|_| cluster.complete(DECODE_PROMPT, answer_tokens));
    let mut rate = 0.0;
    for answer in futures_util::future::try_join_all(together).await? {
        rate += (answer.tokens - 1.0) * 1e6 / (answer.number("/total_us") - answer.number("/ttft_us"));
    }
    Ok(rate)
}
