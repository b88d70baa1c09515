//! Hand-overs in a running cluster: bytes moved, how fast, the share that compute hid, and the time to the first token.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::cluster::{Answer, Cluster};
use crate::report::Row;

/// Tokens of prompts.
const PROMPTS: [usize; 2] = [1024, 2048];
/// Tokens of an answer: more than one, so that there is a reason to hand over.
const ANSWER_TOKENS: u32 = 4;
/// Requests for each hand-over that is wanted: on an idle cluster the router computes some prompts where they decode.
const TRIES_PER_RUN: usize = 12;

/// Measures hand-overs between one prefill and one decode node under three replicas, weights and KV of `dtype`;
/// gives each row to `out` when it is known.
///
/// # Errors
/// The cluster does not come up, a request fails, or nothing is handed over.
pub async fn measure(model: &Path, dtype: &str, runs: usize, out: &dyn Fn(Row)) -> Result<()> {
    let cluster = Cluster::start(model, dtype, 3).await?;
    for tokens in PROMPTS {
        let mut answers = Vec::new();
        for _ in 0..TRIES_PER_RUN * (runs + 1) {
            let answer = cluster.complete(tokens, ANSWER_TOKENS).await?;
            if answer.number("/handover/bytes") > 0.0 {
                answers.push(answer);
            }
            if answers.len() > runs {
                break;
            }
        }
        ensure!(answers.len() > 1, "{} of the prompts of {tokens} tokens were handed over", answers.len());
        rows_of(tokens, dtype, &answers[1..]).into_iter().for_each(out); // the first opens the link
    }
    cluster.stop().await
}

fn rows_of(tokens: usize, dtype: &str, answers: &[Answer]) -> Vec<Row> {
    let row = |what: &str, value: &dyn Fn(&Answer) -> f64| {
        Row::new(format!("hand-over, {tokens} tokens, {dtype}, {what}"), answers.iter().map(value).collect())
    };
    let at = |answer: &Answer, path: &str| answer.number(path);
    vec![
        row("MB moved", &|a| at(a, "/handover/bytes") / 1e6),
        row("MB/s while it lasts", &|a| at(a, "/handover/bytes") / at(a, "/handover/transfer_us")),
        row("hidden share", &|a| 1.0 - at(a, "/handover/exposed_us") / at(a, "/handover/transfer_us")),
        row("exposed, ms", &|a| at(a, "/handover/exposed_us") / 1e3),
        row("TTFT, ms", &|a| at(a, "/ttft_us") / 1e3),
        row("prefill compute, ms", &|a| at(a, "/prefill/compute_us") / 1e3),
    ]
}
