//! More sequences at once than the pools can hold: they wait for room, or lose theirs and are computed again, and every answer is what
//! it is without pressure.
#![allow(clippy::unwrap_used)]

use futures_util::future::join_all;
use millrace_e2e::cluster::{Cluster, Plan};
use millrace_e2e::http;
use millrace_e2e::stream::{Answer, End, complete};
use serde_json::{Value, json};

const STREAMS: usize = 32;
const BLOCK_TOKENS: usize = 16;
/// What a pool has of the blocks that all streams need at their ends.
const POOL_PERCENT: usize = 60;

/// Tokens of a stream's prompt and of its answer: short and long ones of both, in all pairs. Answers are long beside prompts, so that
/// all begin and then grow into each other's room.
fn lengths(stream: usize) -> (usize, usize) {
    (10 + 25 * (stream % 6), 120 + 15 * (stream / 6))
}

fn body(model: &str, stream: usize, salt: &str) -> Value {
    let (prompt, answer) = lengths(stream);
    let prompt: Vec<usize> = (0..prompt).map(|i| 3 + (i * 7 + stream * 11) % 290).collect();
    json!({
        "model": model, "prompt": prompt, "max_tokens": answer, "ignore_eos": true, "temperature": 0, "return_token_ids": true,
        "stream": true, "cache_salt": salt, "stream_options": {"include_usage": true},
    })
}

/// Asks for the answer of a stream.
async fn ask(cluster: &Cluster, stream: usize, salt: &str) -> Answer {
    complete(cluster.http, "/v1/completions", &body(&cluster.model, stream, salt)).await
}

fn blocks(stream: usize) -> usize {
    let (prompt, answer) = lengths(stream);
    (prompt + answer).div_ceil(BLOCK_TOKENS)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_of_three_fifths_of_what_is_needed_changes_no_answer() {
    let needed: usize = (0..STREAMS).map(blocks).sum();
    let kv_blocks = (needed * POOL_PERCENT / 100) as u32;
    let plan = Plan { coordinators: 1, prefill: 1, decode: 1, kv_blocks, ..Plan::checksum(200) };
    let cluster = Cluster::start(plan).await;
    let together = join_all((0..STREAMS).map(|stream| ask(&cluster, stream, "together"))).await;
    for (stream, answer) in together.into_iter().enumerate() {
        let alone = ask(&cluster, stream, "alone").await;
        let (prompt, tokens) = lengths(stream);
        assert_eq!((&answer.end, &alone.end), (&End::Whole, &End::Whole), "stream {stream}");
        assert_eq!(answer.ids, alone.ids, "stream {stream}");
        assert_eq!((&answer.usage["prompt_tokens"], &answer.usage["completion_tokens"]), (&json!(prompt), &json!(tokens)));
    }
    let status = cluster.rests().await;
    let preempted: u64 = status.nodes.iter().map(|node| node.preemptions).sum();
    println!("{STREAMS} streams over {kv_blocks} of {needed} blocks: {preempted} preemptions");
    assert!(preempted > 0, "there was no pressure: {status:?}");
    assert!(status.nodes.iter().all(|node| node.resident_bytes_max > 1 << 20), "{status:?}");
}

/// The model itself, with 8-bit KV that is handed over, loses its room and is computed again: in batch-invariant mode every answer has the same tokens
/// as alone, because what a cell holds depends on its tokens only.
#[tokio::test(flavor = "multi_thread")]
async fn int8_kv_gives_the_same_tokens_handed_over_and_under_pressure() {
    const SOME: usize = 24;
    // The model is so fast that those who came first may be over before the last come: then they are asked again.
    const ROUNDS_MAX: usize = 16;
    let kv_blocks = ((0..SOME).map(blocks).sum::<usize>() / 8) as u32;
    let env = vec![("MILLRACE_BATCH_INVARIANT".to_owned(), "true".to_owned())];
    let of_model = Plan::of(millrace_e2e::tiny_model());
    let small = Plan { coordinators: 1, prefill: 1, decode: 1, kv_blocks, route: "split", ..of_model };
    let cluster = Cluster::start(Plan { kv_dtype: Some("int8"), env, ..small }).await;
    let mut alone = Vec::new();
    for stream in 0..SOME {
        alone.push(ask(&cluster, stream, "alone").await);
    }
    let (mut preempted, mut rounds) = (0, 0);
    while preempted == 0 && rounds < ROUNDS_MAX {
        let salt = format!("together {rounds}");
        let together = join_all((0..SOME).map(|stream| ask(&cluster, stream, &salt))).await;
        for (stream, (answer, alone)) in together.into_iter().zip(&alone).enumerate() {
            assert_eq!((&answer.end, &alone.end), (&End::Whole, &End::Whole), "stream {stream}");
            assert_eq!(answer.ids, alone.ids, "stream {stream}");
        }
        preempted = cluster.rests().await.nodes.iter().map(|node| node.preemptions).sum::<u64>();
        rounds += 1;
    }
    let metrics = http::send(cluster.http, "GET", "/metrics", "").await.unwrap().text;
    let moved = metrics.lines().filter(|line| line.starts_with("millrace_kv_bytes_moved"));
    let moved: f64 = moved.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum();
    println!("{SOME} streams over {kv_blocks} blocks: {preempted} preemptions after {rounds} rounds, {moved} bytes moved");
    assert!(preempted > 0 && moved > 0.0, "{preempted} preemptions after {rounds} rounds, {moved} bytes moved");
    // A cell of the tiny model: keys and values, 2 heads, 16 tokens, 16 bytes and their scale.
    assert_eq!(moved % f64::from(2 * 2 * 16 * 18), 0.0, "whole cells of int8 moved");
}
