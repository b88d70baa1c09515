//! One model of every family through a whole cluster, in f32 and with the KV handed over from one node to the other: every id must be the
//! reference's, near ties aside, cold and on a cached prefix, one request after the other and all at once.
//!
//! Some models lie in the repository, others beside it.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use futures_util::future::join_all;
use millrace_e2e::cluster::{Cluster, Plan};
use millrace_e2e::golden::{Row, read};
use millrace_e2e::{http, repository};
use serde_json::{Value, json};

/// Blocks of a pool that keeps all prompts and answers of one model.
const POOL_BLOCKS: u32 = 256;

fn models() -> Vec<PathBuf> {
    let folders = [repository().join("tests/data"), repository().join("../shared/golden/tiny")];
    let entries = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten();
    let models = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let by_name: BTreeMap<_, _> = models.map(|model| (model.file_name().unwrap().to_owned(), model)).collect();
    assert!(by_name.len() >= 5, "the repository's own models are not there: {by_name:?}");
    by_name.into_values().collect()
}

/// Asks with token ids; gives how much of the prompt was found cached.
async fn ask(cluster: &Cluster, row: &Row) -> Result<u64, String> {
    let tokens = row.output_ids.len();
    let body = json!({"model": cluster.model, "prompt": row.prompt_ids, "temperature": 0, "max_tokens": tokens, "ignore_eos": true, "return_token_ids": true});
    let answer = http::send(cluster.http, "POST", "/v1/completions", body.to_string()).await?.ok();
    let ids: Vec<u32> = serde_json::from_value(answer["choices"][0]["token_ids"].clone()).map_err(|e| format!("{e}: {answer}"))?;
    row.check(&ids)?;
    let cached: &Value = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
    cached.as_u64().ok_or_else(|| format!("no cached_tokens: {answer}"))
}

/// Bytes of KV that went from node to node.
async fn bytes_moved(cluster: &Cluster) -> f64 {
    let metrics = http::send(cluster.http, "GET", "/metrics", "").await.unwrap().text;
    let lines = metrics.lines().filter(|line| line.starts_with("millrace_kv_bytes_moved"));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

async fn check(model: &Path) -> Result<(), String> {
    let rows = read(&model.join("golden.jsonl"));
    let plan = Plan { coordinators: 1, prefill: 1, decode: 1, kv_blocks: POOL_BLOCKS, route: "split", ..Plan::of(model.into()) };
    let cluster = Cluster::start(plan).await;
    for row in &rows {
        ask(&cluster, row).await?;
    }
    let moved = bytes_moved(&cluster).await;
    if moved == 0.0 {
        return Err("no KV was handed over".into());
    }
    cluster.rests().await;
    let warm = join_all(rows.iter().map(|row| ask(&cluster, row))).await;
    let cached = warm.into_iter().collect::<Result<Vec<u64>, String>>()?;
    let long = rows.iter().zip(&cached).filter(|(row, _)| row.prompt_ids.len() > 64);
    if long.clone().all(|(_, cached)| *cached == 0) {
        return Err(format!("nothing was cached: {cached:?}"));
    }
    cluster.rests().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_family_gives_the_reference_ids_through_a_hand_over() {
    let mut wrong = Vec::new();
    for model in models() {
        if let Err(reason) = check(&model).await {
            wrong.push(format!("{}: {reason}", model.display()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
