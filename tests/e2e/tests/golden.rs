//! Right tokens: the reference's prompts through the HTTP door of a running cluster in f32, greedily. Every id must be the
//! reference's, near ties aside, cold and warm, through one node of each kind and through two, as ids, as text and as chats.
//!
//! With two nodes of each kind the prompts of over 1,000 tokens are left out; `MILLRACE_E2E=full` takes them in.
#![allow(clippy::unwrap_used)]

use futures_util::StreamExt;
use millrace_e2e::cluster::{Cluster, Plan};
use millrace_e2e::golden::{Row, rows};
use millrace_e2e::stream::{End, complete};
use millrace_e2e::{full, http, real_model};
use serde_json::{Value, json};

const BLOCK_TOKENS: usize = 16;
/// Prompts with more tokens than this take seconds each.
const LONG: usize = 1000;
/// Requests at a time. That all at once give the same is shown in `load.rs`.
const AT_ONCE: usize = 4;
/// With so many cached tokens at stake no queue of this test is long enough to send a prompt elsewhere. A short one may rightly be computed
/// anew at an idle node, rather than wait for the busy one that has a block of it.
const WORTH_TOKENS: u64 = 100;
/// Blocks of a pool that keeps every prompt and answer of the reference: nothing is evicted between the cold pass and the warm.
const POOL_BLOCKS: u32 = 1024;

fn body(cluster: &Cluster, row: &Row, key: &str, prompt: Value) -> Value {
    json!({"model": cluster.model, key: prompt, "temperature": 0, "max_tokens": row.output_ids.len(), "return_token_ids": true})
}

fn ids(choice: &Value) -> Vec<u32> {
    choice["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Asks with token ids; gives how much of the prompt was found cached.
async fn by_ids(cluster: &Cluster, row: &Row) -> Result<u64, String> {
    let body = body(cluster, row, "prompt", json!(row.prompt_ids));
    let answer = http::send(cluster.http, "POST", "/v1/completions", body.to_string()).await?.ok();
    row.check(&ids(&answer["choices"][0]))?;
    assert_eq!(answer["usage"]["prompt_tokens"], row.prompt_ids.len(), "{}", row.name);
    let details = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
    details.as_u64().ok_or_else(|| format!("{}: no cached_tokens: {answer}", row.name))
}

/// The same tokens as text: they are the tokens that the reference's tokenizer gave.
async fn by_text(cluster: &Cluster, row: &Row) -> Result<(), String> {
    let Some(prompt) = &row.prompt else { return Ok(()) };
    let body = body(cluster, row, "prompt", json!(prompt));
    let answer = http::send(cluster.http, "POST", "/v1/completions", body.to_string()).await?.ok();
    assert_eq!(answer["usage"]["prompt_tokens"], row.prompt_ids.len(), "{}: {prompt:?}", row.name);
    same(row, &ids(&answer["choices"][0]), answer["choices"][0]["text"].as_str().unwrap())
}

/// A chat, whole and streamed.
async fn by_chat(cluster: &Cluster, row: &Row) -> Result<(), String> {
    let Some(messages) = &row.messages else { return Ok(()) };
    let mut body = body(cluster, row, "messages", messages.clone());
    let answer = http::send(cluster.http, "POST", "/v1/chat/completions", body.to_string()).await?.ok();
    assert_eq!(answer["usage"]["prompt_tokens"], row.prompt_ids.len(), "{}: {messages}", row.name);
    let choice = &answer["choices"][0];
    same(row, &ids(choice), choice["message"]["content"].as_str().unwrap())?;
    body["stream"] = json!(true);
    let answer = complete(cluster.http, "/v1/chat/completions", &body).await;
    assert_eq!(answer.end, End::Whole, "{}", row.name);
    same(row, &answer.ids, &answer.text)
}

fn same(row: &Row, ids: &[u32], text: &str) -> Result<(), String> {
    row.check(ids)?;
    if ids == row.output_ids && text != row.plain_text() {
        return Err(format!("{}: the ids are right, the text is {text:?} instead of {:?}", row.name, row.plain_text()));
    }
    Ok(())
}

/// Asks for all rows, a few at a time; gives each row's answer.
async fn all<T>(rows: &[Row], ask: impl AsyncFn(&Row) -> Result<T, String>) -> Vec<T> {
    let ask = &ask;
    let answers: Vec<_> = futures_util::stream::iter(rows).map(|row| ask(row)).buffered(AT_ONCE).collect().await;
    let wrong: Vec<&String> = answers.iter().filter_map(|answer| answer.as_ref().err()).collect();
    assert!(wrong.is_empty(), "{} of {} are wrong: {wrong:#?}", wrong.len(), rows.len());
    answers.into_iter().filter_map(Result::ok).collect()
}

/// Every prompt twice; gives each row's cacheable tokens, and those found cached the second time.
async fn cold_and_warm(cluster: &Cluster, rows: &[Row]) -> Vec<(u64, u64)> {
    all(rows, async |row| by_ids(cluster, row).await).await;
    cluster.rests().await;
    let cached = all(rows, async |row| by_ids(cluster, row).await).await;
    let pairs: Vec<_> = rows.iter().map(|row| row.cacheable(BLOCK_TOKENS) as u64).zip(cached).collect();
    for (row, (most, cached)) in rows.iter().zip(&pairs) {
        assert!(cached <= most, "{}: {cached} tokens cached of a prompt of {}", row.name, row.prompt_ids.len());
    }
    pairs
}

#[tokio::test(flavor = "multi_thread")]
async fn one_prefill_and_one_decode_node_give_the_reference_ids() {
    let rows = rows();
    let cluster =
        Cluster::start(Plan { coordinators: 1, prefill: 1, decode: 1, kv_blocks: POOL_BLOCKS, ..Plan::of(real_model()) }).await;
    let cached = cold_and_warm(&cluster, &rows).await;
    for (row, (most, cached)) in rows.iter().zip(cached) {
        assert!(most < WORTH_TOKENS || cached > 0, "{}: nothing was cached of {} tokens", row.name, row.prompt_ids.len());
    }
    cluster.rests().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_of_each_give_the_reference_ids_for_ids_texts_and_chats() {
    let rows: Vec<Row> = rows().into_iter().filter(|row| full() || row.prompt_ids.len() < LONG).collect();
    let cluster = Cluster::start(Plan { kv_blocks: POOL_BLOCKS, ..Plan::of(real_model()) }).await;
    // A busy holder may rightly be passed over for an idle node that has nothing: the rule holds on the whole only.
    let (most, cached) =
        cold_and_warm(&cluster, &rows).await.into_iter().fold((0, 0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1));
    assert!(cached * 2 >= most, "{cached} tokens were cached of {most}");
    all(&rows, async |row| by_text(&cluster, row).await).await;
    all(&rows, async |row| by_chat(&cluster, row).await).await;
    cluster.rests().await;
}
