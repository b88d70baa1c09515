//! Bad requests: each gets the right status and an error in OpenAI's shape that says what is wrong, and no process minds.
//! What is refused at start is in `refusals.rs`.
#![allow(clippy::unwrap_used)]

use millrace_e2e::cluster::{Cluster, Plan, Status};
use millrace_e2e::http;
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
/// The tiny model's context.
const CONTEXT: usize = 512;

/// A request and what must be answered.
struct Case {
    path: &'static str,
    body: String,
    status: u16,
    /// Words that the message must have.
    words: &'static [&'static str],
    /// `param`, where a field is to blame.
    param: Option<&'static str>,
}

/// A good request with some fields changed; null takes a field away.
fn spoiled(
    model: &str,
    path: &'static str,
    change: Value,
    status: u16,
    param: Option<&'static str>,
    words: &'static [&'static str],
) -> Case {
    let mut body = json!({"model": model, "max_tokens": 4, "temperature": 0});
    match path {
        CHAT => body["messages"] = json!([{"role": "user", "content": "hello"}]),
        _ => body["prompt"] = json!([5, 6, 7]),
    }
    for (field, value) in change.as_object().unwrap() {
        body[field] = value.clone();
    }
    body.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    Case { path, body: body.to_string(), status, words, param }
}

#[rustfmt::skip]
fn cases(model: &str) -> Vec<Case> {
    let long: Vec<u32> = (0..CONTEXT as u32 + 88).map(|i| 3 + i % 200).collect();
    let many: Vec<[u32; 1]> = vec![[5]; 33];
    let case = |change, status, param, words| spoiled(model, COMPLETIONS, change, status, param, words);
    vec![
        case(json!({"model": "gpt-9"}), 404, Some("model"), &["gpt-9"]),
        case(json!({"model": null}), 400, Some("model"), &["model"]),
        case(json!({"model": 5}), 400, None, &["string"]),
        case(json!({"prompt": null}), 400, Some("prompt"), &["required"]),
        case(json!({"prompt": []}), 400, Some("prompt"), &["empty"]),
        case(json!({"prompt": [[]]}), 400, Some("prompt"), &["empty"]),
        case(json!({"prompt": long}), 400, Some("prompt"), &["512", "600"]),
        case(json!({"prompt": [5, 300]}), 400, Some("prompt"), &["300"]),
        case(json!({"prompt": [-1]}), 400, Some("prompt"), &["-1"]),
        case(json!({"prompt": [5.5]}), 400, Some("prompt"), &["5.5"]),
        case(json!({"prompt": {"a": 1}}), 400, Some("prompt"), &["list of token ids"]),
        case(json!({"prompt": true}), 400, Some("prompt"), &["list of token ids"]),
        case(json!({"prompt": many}), 400, Some("prompt"), &["32"]),
        case(json!({"prompt": "text"}), 400, Some("prompt"), &["no tokenizer", "token ids"]),
        case(json!({"prompt": ["text"]}), 400, Some("prompt"), &["no tokenizer", "token ids"]),
        case(json!({"max_tokens": -1}), 400, Some("max_tokens"), &["-1"]),
        case(json!({"max_tokens": 0}), 400, Some("max_tokens"), &["at least 1"]),
        case(json!({"max_tokens": 1_000_000}), 400, Some("max_tokens"), &["512", "1000000"]),
        case(json!({"max_tokens": i64::MAX}), 400, Some("max_tokens"), &["512"]),
        case(json!({"max_tokens": 1e300}), 400, None, &["body"]),
        case(json!({"max_tokens": "many"}), 400, None, &["body"]),
        case(json!({"temperature": -0.5}), 400, Some("temperature"), &["0", "2"]),
        case(json!({"temperature": 1e9}), 400, Some("temperature"), &["0", "2"]),
        case(json!({"temperature": "hot"}), 400, None, &["body"]),
        case(json!({"top_p": 1.5}), 400, Some("top_p"), &["1.5"]),
        case(json!({"top_p": -0.1}), 400, Some("top_p"), &["-0.1"]),
        case(json!({"top_k": -2}), 400, Some("top_k"), &["top_k"]),
        case(json!({"top_k": 99_999_999}), 400, Some("top_k"), &["top_k"]),
        case(json!({"seed": "x"}), 400, None, &["body"]),
        case(json!({"stop": ["a", "b", "c", "d", "e"]}), 400, Some("stop"), &["4"]),
        case(json!({"stop": [""]}), 400, Some("stop"), &["stop"]),
        case(json!({"stop": "x".repeat(4096)}), 400, Some("stop"), &["512"]),
        case(json!({"stop": 7}), 400, None, &["body"]),
        case(json!({"stream": "yes"}), 400, None, &["body"]),
        case(json!({"stream_options": {"include_usage": true}}), 400, Some("stream_options"), &["stream"]),
        case(json!({"n": 2}), 400, Some("n"), &["not supported"]),
        case(json!({"best_of": 3}), 400, Some("best_of"), &["not supported"]),
        case(json!({"echo": true}), 400, Some("echo"), &["not supported"]),
        case(json!({"logprobs": 5}), 400, Some("logprobs"), &["not supported"]),
        case(json!({"logit_bias": {"5": 1}}), 400, Some("logit_bias"), &["not supported"]),
        case(json!({"presence_penalty": 1}), 400, Some("presence_penalty"), &["not supported"]),
        case(json!({"cache_salt": "s".repeat(300)}), 400, Some("cache_salt"), &["256"]),
        spoiled(model, CHAT, json!({}), 400, Some("messages"), &["no tokenizer", "token ids"]),
        spoiled(model, CHAT, json!({"messages": null}), 400, Some("messages"), &["required"]),
        spoiled(model, CHAT, json!({"tools": [{}]}), 400, Some("tools"), &["not supported"]),
        spoiled(model, CHAT, json!({"model": "gpt-9"}), 404, Some("model"), &["gpt-9"]),
        Case { path: COMPLETIONS, body: r#"{"model": "x", "prompt": ["#.into(), status: 400, words: &["not valid JSON"], param: None },
        Case { path: COMPLETIONS, body: String::new(), status: 400, words: &["not valid JSON"], param: None },
        Case { path: COMPLETIONS, body: "[1, 2]".into(), status: 400, words: &["body"], param: None },
        Case { path: COMPLETIONS, body: "\u{0}\u{fffd}".into(), status: 400, words: &["not valid JSON"], param: None },
        Case { path: COMPLETIONS, body: format!("{{\"prompt\": {}", "[".repeat(100_000)), status: 400, words: &["recursion"], param: None },
        Case { path: "/v1/nothing", body: "{}".into(), status: 404, words: &["/v1/nothing"], param: None },
    ]
}

fn check(case: &Case, reply: &http::Reply) -> Result<(), String> {
    let error = reply.error()?;
    let message = error["message"].as_str().unwrap_or_default();
    let words = case.words.iter().all(|word| message.contains(word));
    let kind = error["type"] == "invalid_request_error";
    let right = reply.status == case.status && words && kind && error["param"].as_str() == case.param;
    if right {
        Ok(())
    } else {
        Err(format!("expected {} {:?} {:?}, got {} {error}", case.status, case.param, case.words, reply.status))
    }
}

/// Processes by name: none may have been replaced.
fn pids(status: &Status) -> Vec<(String, Option<u32>)> {
    let nodes = status.nodes.iter().map(|node| (node.name.clone(), Some(node.pid)));
    status.members.iter().map(|member| (member.name.clone(), member.pid)).chain(nodes).collect()
}

async fn too_large(cluster: &Cluster) {
    const BODY_BYTES: usize = 100 << 20;
    let piece = vec![b' '; 1 << 20];
    let replica = cluster.status().await.unwrap().members[0].http.unwrap();
    for at in [cluster.http, replica] {
        let head = |how: &str| format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{how}\r\n\r\n");
        let sized = http::raw(at, &head(&format!("content-length: {BODY_BYTES}")), (&piece, BODY_BYTES / piece.len()), "").await;
        assert!(sized.starts_with("HTTP/1.1 413 "), "{at}: {sized:?}");
        let chunk = [format!("{:x}\r\n", piece.len()).as_bytes(), &piece, b"\r\n"].concat();
        let chunked = http::raw(at, &head("transfer-encoding: chunked"), (&chunk, BODY_BYTES / piece.len()), "0\r\n\r\n").await;
        assert!(chunked.starts_with("HTTP/1.1 413 "), "{at}: {chunked:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_request_gets_a_clear_error_and_no_process_minds() {
    let cluster = Cluster::start(Plan { prefill: 1, decode: 1, ..Plan::checksum(100) }).await;
    let before = pids(&cluster.rests().await);
    let mut wrong = Vec::new();
    for case in cases(&cluster.model) {
        let reply = http::send(cluster.http, "POST", case.path, case.body.clone()).await;
        let checked = reply.and_then(|reply| check(&case, &reply));
        wrong.extend(checked.err().map(|reason| format!("{} {:.200}: {reason}", case.path, case.body)));
    }
    for (method, path) in
        [("GET", COMPLETIONS), ("GET", CHAT), ("DELETE", "/v1/models"), ("POST", "/metrics"), ("PUT", COMPLETIONS)]
    {
        let reply = http::send(cluster.http, method, path, "").await.unwrap();
        if reply.status != 405 || reply.error().is_err() {
            wrong.push(format!("{method} {path}: {} {}", reply.status, reply.text));
        }
    }
    let unknown = http::send(cluster.http, "GET", "/v1/models/gpt-9", "").await.unwrap();
    assert_eq!((unknown.status, unknown.error().unwrap()["code"].as_str()), (404, Some("model_not_found")));
    assert!(wrong.is_empty(), "{} are wrong: {wrong:#?}", wrong.len());
    too_large(&cluster).await;
    let good = json!({"model": cluster.model, "prompt": [5, 6, 7], "max_tokens": 4, "return_token_ids": true});
    let answer = http::send(cluster.http, "POST", COMPLETIONS, good.to_string()).await.unwrap().ok();
    assert_eq!(answer["choices"][0]["token_ids"].as_array().unwrap().len(), 4);
    assert_eq!(pids(&cluster.rests().await), before, "the same processes serve");
}
