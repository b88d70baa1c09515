//! Right under load: all prompts of the reference at once, mixed with sampled requests, give the same ids as alone; afterwards no
//! block is in use.
#![allow(clippy::unwrap_used)]

use futures_util::future::{join, join_all};
use millrace_e2e::cluster::{Cluster, Plan};
use millrace_e2e::golden::{Row, rows};
use millrace_e2e::http;
use millrace_e2e::real_model;
use millrace_e2e::stream::{End, complete};
use serde_json::json;

/// Sampled requests beside the reference's.
const OTHERS: usize = 20;

async fn greedy(cluster: &Cluster, row: &Row) -> Result<(), String> {
    let body = json!({
        "model": cluster.model, "prompt": row.prompt_ids, "temperature": 0, "max_tokens": row.output_ids.len(),
        "return_token_ids": true, "stream": true,
    });
    let answer = complete(cluster.http, "/v1/completions", &body).await;
    match answer.end {
        End::Whole => row.check(&answer.ids),
        end => Err(format!("{}: {end:?} after {} tokens", row.name, answer.ids.len())),
    }
}

/// A request of another kind: sampled, some streamed, over prompts that share beginnings with the reference's and with each other.
async fn sampled(cluster: &Cluster, rows: &[Row], n: usize) -> Result<(), String> {
    let row = &rows[n % rows.len()];
    let prompt: Vec<u32> = row.prompt_ids.iter().copied().take(40 + n).chain([100 + n as u32]).collect();
    let (length, want) = (prompt.len(), 8 + n);
    let mut body = json!({
        "model": cluster.model, "prompt": prompt, "temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": n, "max_tokens": want,
        "ignore_eos": true, "return_token_ids": true,
    });
    let (ids, usage) = if n.is_multiple_of(2) {
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let answer = complete(cluster.http, "/v1/completions", &body).await;
        (answer.ids.len(), answer.usage)
    } else {
        let answer = http::send(cluster.http, "POST", "/v1/completions", body.to_string()).await?.ok();
        (answer["choices"][0]["token_ids"].as_array().map_or(0, Vec::len), answer["usage"].clone())
    };
    let right = ids == want && usage["completion_tokens"] == want && usage["prompt_tokens"] == length;
    if right { Ok(()) } else { Err(format!("sampled {n}: {ids} of {want} tokens, usage {usage}")) }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_at_once_give_the_same_ids_and_leave_no_block_in_use() {
    let rows = rows();
    let cluster = Cluster::start(Plan { kv_blocks: 768, ..Plan::of(real_model()) }).await;
    let reference = join_all(rows.iter().map(|row| greedy(&cluster, row)));
    let others = join_all((0..OTHERS).map(|n| sampled(&cluster, &rows, n)));
    let (reference, others) = join(reference, others).await;
    let wrong: Vec<String> = reference.into_iter().chain(others).filter_map(Result::err).collect();
    assert!(wrong.is_empty(), "{} of {} are wrong: {wrong:#?}", wrong.len(), rows.len() + OTHERS);
    let status = cluster.rests().await;
    assert!(status.nodes.iter().all(|node| node.blocks.total == 768), "{status:?}");
}
