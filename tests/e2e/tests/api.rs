//! The OpenAI API as clients know it: the shape of streams, usage, stop strings, seeds, and what a client that goes away leaves behind.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Instant;

use millrace_e2e::cluster::{Cluster, Plan};
use millrace_e2e::stream::{Answer, End, Event, Events, complete};
use millrace_e2e::{WAIT_MAX, eventually, http, real_model, tiny_model};
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

async fn whole(cluster: &Cluster, path: &str, body: &Value) -> Value {
    http::send(cluster.http, "POST", path, body.to_string()).await.unwrap().ok()
}

async fn streamed(cluster: &Cluster, path: &str, body: &Value) -> Answer {
    let mut body = body.clone();
    body["stream"] = json!(true);
    let answer = complete(cluster.http, path, &body).await;
    assert_eq!(answer.end, End::Whole, "{body}");
    answer
}

/// Every chunk of a completion has one token, the last has the finish reason, and the usage comes by itself after it.
async fn chunks(cluster: &Cluster) {
    let body = json!({
        "model": cluster.model, "prompt": "The capital of France is", "max_tokens": 9, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true, "stream_options": {"include_usage": true},
    });
    let answer = streamed(cluster, COMPLETIONS, &body).await;
    let first = &answer.chunks[0];
    let same = |field: &str| answer.chunks.iter().all(|chunk| chunk[field] == first[field]);
    assert!(["id", "created", "model"].into_iter().all(same), "{:?}", answer.chunks);
    assert!(first["id"].as_str().unwrap().starts_with("cmpl-") && first["model"] == cluster.model);
    assert!(answer.chunks.iter().all(|chunk| chunk["object"] == "text_completion"));
    let (usage, rest) = answer.chunks.split_last().unwrap();
    assert_eq!((&usage["choices"], rest.iter().all(|chunk| chunk["usage"].is_null())), (&json!([]), true));
    assert_eq!(usage["usage"]["completion_tokens"], 9);
    assert_eq!(usage["usage"]["total_tokens"], usage["usage"]["prompt_tokens"].as_u64().unwrap() + 9);
    let tokens: Vec<usize> = rest.iter().map(|chunk| chunk["choices"][0]["token_ids"].as_array().map_or(0, Vec::len)).collect();
    assert!(tokens[..9].iter().all(|count| *count == 1) && tokens[9..].iter().sum::<usize>() == 0, "{tokens:?}");
    assert_eq!((answer.finish.as_deref(), answer.ids.len()), (Some("length"), 9));
    let body = json!({"model": cluster.model, "prompt": "The capital of France is", "max_tokens": 9, "temperature": 0, "ignore_eos": true});
    let plain = whole(cluster, COMPLETIONS, &body).await;
    assert_eq!(plain["choices"][0]["text"], answer.text, "streamed and whole are one text");
    assert!(plain["choices"][0].get("token_ids").is_none(), "ids come only when they are asked for");
    let silent = streamed(cluster, COMPLETIONS, &body).await;
    assert!(silent.usage.is_null() && silent.ids.is_empty());
}

/// A chat says first who speaks; both names of the limit are understood.
async fn chat(cluster: &Cluster) {
    let messages = json!([{"role": "user", "content": "Count from one to twenty in words."}]);
    let body = json!({"model": cluster.model, "messages": messages, "max_completion_tokens": 6, "temperature": 0, "return_token_ids": true});
    let answer = streamed(cluster, CHAT, &body).await;
    let first = &answer.chunks[0];
    assert_eq!((&first["object"], &first["choices"][0]["delta"]["role"]), (&json!("chat.completion.chunk"), &json!("assistant")));
    assert!(answer.chunks[1..].iter().all(|chunk| chunk["choices"][0]["delta"].get("role").is_none()));
    assert_eq!((answer.ids.len(), answer.finish.as_deref()), (6, Some("length")));
    let plain = whole(cluster, CHAT, &body).await;
    assert_eq!(plain["object"], "chat.completion");
    assert_eq!(plain["choices"][0]["message"], json!({"role": "assistant", "content": answer.text, "refusal": null}));
    assert!(plain["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let body = json!({"model": cluster.model, "messages": messages, "max_tokens": 3, "temperature": 0, "return_token_ids": true});
    assert_eq!(streamed(cluster, CHAT, &body).await.ids, answer.ids[..3]);
}

/// A stop string ends the answer before it, also where it lies over several tokens, and the answer ends early.
async fn stops(cluster: &Cluster) {
    let base =
        json!({"model": cluster.model, "prompt": "1, 2, 3, 4, 5,", "max_tokens": 40, "temperature": 0, "return_token_ids": true});
    let free = streamed(cluster, COMPLETIONS, &base).await;
    let pieces: Vec<&str> = free.chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert!(pieces.len() > 10, "{pieces:?}");
    // From the middle of one token's text to the middle of another's.
    let letters: Vec<char> = free.text.chars().collect();
    let stop: String = letters[letters.len() / 2..letters.len() / 2 + 4].iter().collect();
    assert!(!pieces.iter().any(|piece| piece.contains(&stop)), "{stop:?} must lie over chunk borders: {pieces:?}");
    let before = &free.text[..free.text.find(&stop).unwrap()];
    for stop in [json!(stop), json!(["\u{1}never", stop])] {
        let mut body = base.clone();
        body["stop"] = stop;
        let stopped = streamed(cluster, COMPLETIONS, &body).await;
        assert_eq!((stopped.text.as_str(), stopped.finish.as_deref()), (before, Some("stop")));
        assert!(stopped.ids.len() < free.ids.len());
        let plain = whole(cluster, COMPLETIONS, &body).await;
        assert_eq!((&plain["choices"][0]["text"], &plain["choices"][0]["finish_reason"]), (&json!(before), &json!("stop")));
    }
}

/// The end token ends an answer, unless it is to be ignored.
async fn end_token(cluster: &Cluster) {
    let messages = json!([{"role": "user", "content": "Hello! Who are you?"}]);
    let mut body =
        json!({"model": cluster.model, "messages": messages, "max_tokens": 60, "temperature": 0, "return_token_ids": true});
    let ended = streamed(cluster, CHAT, &body).await;
    assert!(ended.ids.len() < 60 && ended.finish.as_deref() == Some("stop"), "{ended:?}");
    assert!(!ended.text.contains("<|im_end|>"), "special tokens are no text: {}", ended.text);
    body["ignore_eos"] = json!(true);
    let on = streamed(cluster, CHAT, &body).await;
    assert_eq!((on.ids.len(), on.finish.as_deref()), (60, Some("length")));
    assert_eq!(on.ids[..ended.ids.len()], ended.ids);
}

async fn prompts_and_special_tokens(cluster: &Cluster) {
    let body = json!({"model": cluster.model, "prompt": ["One", "Two and three"], "max_tokens": 2, "temperature": 0, "return_token_ids": true});
    let answer = whole(cluster, COMPLETIONS, &body).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!((choices.len(), &choices[0]["index"], &choices[1]["index"]), (2, &json!(0), &json!(1)));
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    let body = json!({"model": cluster.model, "prompt": "<|im_start|>", "max_tokens": 1});
    assert_eq!(whole(cluster, COMPLETIONS, &body).await["usage"]["prompt_tokens"], 1, "a special token is one token");
}

async fn pages(cluster: &Cluster) {
    let models = http::send(cluster.http, "GET", "/v1/models", "").await.unwrap().ok();
    assert_eq!((&models["object"], &models["data"][0]["object"]), (&json!("list"), &json!("model")));
    let one = http::send(cluster.http, "GET", &format!("/v1/models/{}", cluster.model), "").await.unwrap().ok();
    assert_eq!(one, models["data"][0]);
    for path in ["/health", "/livez", "/readyz"] {
        assert_eq!(http::send(cluster.http, "GET", path, "").await.unwrap().status, 200, "{path}");
    }
    let mut seen = String::new();
    for member in cluster.status().await.unwrap().members {
        seen += &http::send(member.http.unwrap(), "GET", "/metrics", "").await.unwrap().text;
    }
    for name in [
        "gen_ai_server_time_to_first_token",
        "gen_ai_server_request_duration",
        "millrace_tokens",
        "millrace_raft_applied",
        "millrace_node_blocks",
    ] {
        assert!(seen.contains(name), "no metric {name}: {seen}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_chats_stops_limits_and_pages_are_as_clients_expect() {
    let cluster = Cluster::start(Plan { prefill: 1, decode: 1, ..Plan::of(real_model()) }).await;
    chunks(&cluster).await;
    chat(&cluster).await;
    stops(&cluster).await;
    end_token(&cluster).await;
    prompts_and_special_tokens(&cluster).await;
    pages(&cluster).await;
    cluster.rests().await;
}

/// A sampled answer of the tiny model, and which nodes gave it.
async fn drawn(cluster: &Cluster, seed: i64, salt: &str) -> (Vec<u64>, String) {
    let prompt: Vec<u32> = (0..40).map(|i| 5 + i * 7 % 290).collect();
    let body = json!({
        "model": cluster.model, "prompt": prompt, "max_tokens": 60, "temperature": 1.0, "top_p": 0.99, "seed": seed,
        "cache_salt": salt, "ignore_eos": true, "return_token_ids": true, "millrace_timings": true,
    });
    let answer = whole(cluster, COMPLETIONS, &body).await;
    let ids = answer["choices"][0]["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    let timings = &answer["millrace"];
    (ids, format!("{} {}", timings["prefill"]["node"], timings["decode_node"]))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_draws_the_same_tokens_on_whichever_nodes() {
    let cluster = Cluster::start(Plan::of(tiny_model())).await;
    let (first, _) = drawn(&cluster, 7, "").await;
    assert_eq!(first.len(), 60);
    assert_ne!(drawn(&cluster, 8, "").await.0, first, "another seed draws other tokens");
    let mut ways = BTreeSet::new();
    for n in 0..40 {
        let (again, nodes) = drawn(&cluster, 7, &format!("salt {n}")).await;
        assert_eq!(again, first, "by {nodes}");
        ways.insert(nodes);
    }
    assert!(ways.len() > 1, "all went one way: {ways:?}");
    cluster.rests().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_leaves_no_block_in_use() {
    let cluster = Cluster::start(Plan::checksum(10_000)).await;
    let prompt: Vec<u32> = (0..100).map(|i| 3 + i % 290).collect();
    let body = json!({"model": cluster.model, "prompt": prompt, "max_tokens": 400, "ignore_eos": true, "stream": true});
    let mut open = Vec::new();
    for n in 0..6 {
        let mut body = body.clone();
        body["cache_salt"] = json!(n.to_string());
        let mut events = Events::open(cluster.http, COMPLETIONS, &body).await.unwrap();
        if n % 2 == 0 {
            events.next().await.unwrap().unwrap();
            events.next().await.unwrap().unwrap();
        }
        open.push(events);
    }
    eventually("blocks are in use", WAIT_MAX, async || {
        let status = cluster.status().await?;
        let used: u32 = status.nodes.iter().filter_map(|node| node.blocks.in_use).sum();
        if used > 0 { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    drop(open);
    cluster.rests().await;
    eventually("every request counts as cancelled", WAIT_MAX, async || {
        let mut cancelled = 0.0;
        for member in cluster.status().await?.members {
            let text = http::send(member.http.ok_or("no gateway")?, "GET", "/metrics", "").await?.text;
            let lines = text.lines().filter(|line| line.starts_with("millrace_requests") && line.contains("\"cancelled\""));
            cancelled += lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>();
        }
        if cancelled == 6.0 { Ok(()) } else { Err(format!("{cancelled} of 6")) }
    })
    .await;
}

/// A streamed answer, asked for at `at`: its chunk with the times, and what the client measured until its first token.
async fn timed(cluster: &Cluster, at: SocketAddr, first: usize) -> (Value, u64) {
    let prompt: Vec<usize> = (0..12).map(|i| 3 + (first * 31 + i * 7) % 290).collect();
    let body = json!({
        "model": cluster.model, "prompt": prompt, "max_tokens": 4, "ignore_eos": true, "stream": true, "millrace_timings": true,
    });
    let asked = Instant::now();
    let mut events = Events::open(at, COMPLETIONS, &body).await.unwrap();
    let Some(Event::Chunk(token)) = events.next().await.unwrap() else { panic!("no token") };
    let first_us = asked.elapsed().as_micros() as u64;
    assert!(token.get("millrace").is_none() && token.get("millrace_front").is_none(), "{token}");
    let answer = events.collect(Answer::default()).await;
    assert_eq!(answer.end, End::Whole);
    let mut said = answer.chunks.into_iter().filter(|chunk| chunk.get("millrace").is_some());
    let chunk = said.next().expect("a chunk says it");
    assert!(said.next().is_none() && chunk["choices"][0]["finish_reason"] == "length", "{chunk}");
    (chunk, first_us)
}

/// Each clock measures a part of what the next one around it measures: node, gateway, front, client.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_says_where_the_time_to_its_first_token_went() {
    let cluster = Cluster::start(Plan::checksum(500)).await;
    let gateway = cluster.status().await.unwrap().members[0].http.unwrap();
    for n in 0..20 {
        let through_front = n % 2 == 0;
        let (chunk, client_us) = timed(&cluster, if through_front { cluster.http } else { gateway }, n).await;
        let us = |path: &str| chunk.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path}: {chunk}"));
        let node = us("/millrace/prefill/queue_us") + us("/millrace/prefill/compute_us");
        let submitted = us("/millrace/ttft_us");
        assert!(us("/millrace/gateway/route_us") + node <= submitted, "{chunk}");
        let own = us("/millrace/gateway/read_us") + us("/millrace/gateway/parse_us") + us("/millrace/gateway/write_us");
        let gateway_us = us("/millrace/gateway/ttft_us");
        // Each part is cut to whole microseconds.
        assert!(own + submitted <= gateway_us && gateway_us <= own + submitted + 5, "{chunk}");
        let known = if through_front { us("/millrace_front/ttft_us") } else { gateway_us };
        assert!(gateway_us <= known && known <= client_us, "client {client_us}: {chunk}");
        assert_eq!(chunk.get("millrace_front").is_some(), through_front);
    }
    cluster.rests().await;
}
