//! What a hand-over adds to the time between the first token and the second, over links of a given speed.
//!
//! All processes are in a network namespace of their own, whose loopback a token bucket slows down: tokens and messages go through it too. A
//! gap is the client's time from the first token to the second. *Exposed* is a gap less the one of the same round in which the prompt was computed
//! where it was decoded. Three clusters stand side by side, of which one works at a time, so that what else the machine does meets all of them:
//! computed where it is decoded, handed over layer by layer, and, for comparison, only when the prompt is computed.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::cluster::{Cluster, Tokens, unique_prompt};
use crate::millload::network;
use crate::report::Row;

/// Speeds of the link.
const GBITS: [u32; 3] = [1, 10, 25];
/// Tokens of prompts.
const PROMPTS: [usize; 3] = [256, 1024, 2048];
/// Tokens of the prompt that tells how many bytes of KV a token has.
const PROBE_TOKENS: usize = 64;

/// Measures `runs` hand-overs for each speed and length, with weights and KV in bf16. Call it inside a namespace ([`network::inside`]).
///
/// # Errors
/// No namespace, no shaping, or a cluster fails.
pub async fn measure(model: &Path, (runs, quick): (usize, bool), out: &dyn Fn(Row)) -> Result<()> {
    ensure!(network::inside(), "no network namespace can be had here: links cannot be shaped");
    let prompts = if quick { &PROMPTS[..2] } else { &PROMPTS[..] };
    let whole = start(model, &["--route", "whole"]).await?;
    let after = start(model, &["--route", "split", "--hand-over-after-prefill"]).await?;
    let by_layer = start(model, &["--route", "split"]).await?;
    let ways = [&whole, &after, &by_layer];
    let token_bytes = by_layer.complete(PROBE_TOKENS, 2).await?.number("/handover/bytes") / PROBE_TOKENS as f64;
    for gbit in GBITS {
        network::shape(gbit).await?;
        for &tokens in prompts {
            let gaps = rounds(ways, tokens, runs).await.with_context(|| format!("{tokens} tokens at {gbit} Gb/s"))?;
            rows_of(&format!("{gbit} Gb/s, {tokens} tokens"), tokens as f64 * token_bytes, &gaps).into_iter().for_each(out);
        }
    }
    for cluster in [whole, after, by_layer] {
        cluster.stop().await?;
    }
    Ok(())
}

async fn start(model: &Path, further: &[&str]) -> Result<Cluster> {
    Cluster::start_with(model, "bf16", 1, further).await
}

/// Milliseconds from the first token to the second for each of `ways`, round by round; the first round, which opens links, is left out.
async fn rounds(ways: [&Cluster; 3], tokens: usize, runs: usize) -> Result<Vec<[f64; 3]>> {
    let mut gaps = Vec::new();
    for _ in 0..=runs {
        let mut round = [0.0; 3];
        for (cluster, gap) in ways.into_iter().zip(&mut round) {
            *gap = gap_ms(cluster, tokens).await?;
        }
        gaps.push(round);
    }
    Ok(gaps.split_off(1))
}

/// Milliseconds from the first token to the second after a prompt that nobody sent before.
pub(crate) async fn gap_ms(cluster: &Cluster, tokens: usize) -> Result<f64> {
    let mut answer = cluster.ask(&unique_prompt(tokens), 2).await?;
    answer.next().await?;
    next_ms(&mut answer).await
}

/// Milliseconds from now to the next token.
pub(crate) async fn next_ms(answer: &mut Tokens) -> Result<f64> {
    let begin = Instant::now();
    answer.next().await?;
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

/// `gaps` are of a prompt computed in place, handed over after it was computed, and layer by layer.
fn rows_of(case: &str, bytes: f64, gaps: &[[f64; 3]]) -> Vec<Row> {
    let row = |what: &str, value: &dyn Fn(&[f64; 3]) -> f64| Row::new(format!("{case}, {what}"), gaps.iter().map(value).collect());
    let exposed = |[whole, _, by_layer]: &[f64; 3]| by_layer - whole;
    let late = |[whole, after, _]: &[f64; 3]| after - whole;
    vec![
        row("first to second token without a hand-over, ms", &|gaps| gaps[0]),
        row("exposed, sent after prefill, ms", &late),
        row("the same as a speed, Gb/s", &|gaps| bytes * 8e-6 / late(gaps)),
        row("exposed, sent layer by layer, ms", &exposed),
        row("hidden share of what is exposed after prefill", &|gaps| 1.0 - exposed(gaps) / late(gaps)),
    ]
}
