//! What clients send: bodies, stop strings, headers. Parsed as the gateway does, without a gateway; `gateway` has one.

use std::fs;

use coordinator::http::auth::authenticate;
use coordinator::http::front::{Note, Order, Resume};
use coordinator::http::request::{ChatBody, CompletionBody, Rules, Wanted};
use coordinator::http::stop::StopFilter;
use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};
use millrace_checkpoint::Checkpoint;
use serde_json::{Value, json};

use super::{Target, model, mutate, same, times};
use crate::{json, samples};

/// The name of the model that is served.
pub(super) const MODEL: &str = "fuzz";

pub(super) const CHAT: Target = Target {
    name: "chat",
    what: "a body of POST /v1/chat/completions",
    examples: || [chat(), long_chat()].map(|body| body.to_string().into_bytes()).to_vec(),
    spoil: json::document,
    open: || {
        let checkpoint = checkpoint();
        Box::new(move |bytes| match serde_json::from_slice::<ChatBody>(bytes) {
            Ok(body) => wanted(&checkpoint, body.check(&rules(&checkpoint)).ok()),
            Err(_) => Ok(false),
        })
    },
    // A value of JSON is 32 bytes in memory, two in the text, and there are two copies while it is read.
    memory_max: |len| (4 << 20) + 96 * len,
    caught: &[],
    short_runs: 12_000,
};

pub(super) const COMPLETION: Target = Target {
    name: "completion",
    what: "a body of POST /v1/completions",
    examples: || completions().map(|body| body.to_string().into_bytes()).to_vec(),
    spoil: json::document,
    open: || {
        let checkpoint = checkpoint();
        Box::new(move |bytes| match serde_json::from_slice::<CompletionBody>(bytes) {
            Ok(body) => wanted(&checkpoint, body.check(&rules(&checkpoint)).ok()),
            Err(_) => Ok(false),
        })
    },
    memory_max: |len| (4 << 20) + 96 * len,
    caught: &[],
    short_runs: 12_000,
};

pub(super) const STOPS: Target = Target {
    name: "stops",
    what: "stop strings, against text in any pieces",
    examples: || {
        let examples = [
            json!({"stops": ["\n\nQ:", "ab", "ba"], "pieces": ["answer\n", "\nQ", ": more", "abab"]}),
            json!({"stops": ["é!", "aab", "aaab"], "pieces": ["caf", "é", "?", "aa", "a", "aab"]}),
        ];
        examples.map(|example| example.to_string().into_bytes()).to_vec()
    },
    spoil: json::document,
    open: || Box::new(stops),
    memory_max: times::<64>,
    caught: &[],
    short_runs: 60_000,
};

pub(super) const HEADERS: Target = Target {
    name: "headers",
    what: "headers of a request: API keys, what a front carries; and a front's notes",
    examples: || HEADER_EXAMPLES.map(|lines| lines.as_bytes().to_vec()).to_vec(),
    spoil: mutate::bytes,
    open: || {
        let cluster = samples::cluster();
        Box::new(move |bytes| {
            let Some(headers) = header_map(bytes) else { return Ok(false) };
            let caller = authenticate(cluster.policy(), &headers);
            let order = Order::of(&headers);
            if let Ok(Some(order)) = &order {
                let again = HeaderMap::from_iter([(coordinator::http::front::HEADER, order.value())]);
                same("an order", &Order::of(&again).ok().flatten().as_ref(), &Some(order))?;
            }
            for line in String::from_utf8_lossy(bytes).lines() {
                if let Some(note) = Note::parse(line) {
                    same("a note", &Note::parse(&note.to_string()), &Some(note))?;
                    let _ = Resume::default().note(note, 64);
                }
            }
            Ok(caller.is_ok() && order.is_ok())
        })
    },
    memory_max: times::<64>,
    caught: &[],
    short_runs: 60_000,
};

const HEADER_EXAMPLES: [&str; 4] = [
    "authorization: Bearer sk-0123456789abcdef\naccept: */*",
    "x-millrace-front: id=00000000000000000000000000000007 created=3 seed=18446744073709551615 resume=12",
    "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\nx-millrace-ttft-ms: 500",
    ": t 0 17 16\n: e 0\n: c\n: elsewhere",
];

/// The checkpoint of a gateway over the small model with a tokenizer.
pub(super) fn checkpoint() -> Checkpoint {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let path = dir.path().join("fuzz.gguf");
    fs::write(&path, model::mini_gguf(1).build()).expect("a scratch file");
    // The file may go: it is mapped.
    Checkpoint::open(&path).expect("the small model opens")
}

fn rules(checkpoint: &Checkpoint) -> Rules<'_> {
    Rules { checkpoint, model: MODEL, answer_max: 0 }
}

pub(super) fn chat() -> Value {
    json!({
        "model": MODEL, "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello the 12"}],
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 7, "max_tokens": 5, "stop": ["\n\n", "END"], "stream": true,
        "stream_options": {"include_usage": true}, "n": 1, "logprobs": false, "return_token_ids": true, "cache_salt": "s",
    })
}

fn long_chat() -> Value {
    json!({
        "model": MODEL, "max_completion_tokens": 3, "tools": [], "response_format": {"type": "text"}, "stop": "x",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "the é 😀"}, {"type": "text", "text": "<|im_end|>"}]},
            {"role": "assistant", "content": null}, {"role": "user", "content": "x".repeat(300), "name": "n"}],
        "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "ignore_eos": true, "millrace_timings": true,
    })
}

pub(super) fn completions() -> [Value; 4] {
    [
        json!({"model": MODEL, "prompt": "the cat", "max_tokens": 4, "temperature": 0, "stream": false}),
        json!({"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 4, "echo": false, "best_of": 1, "suffix": ""}),
        json!({"model": MODEL, "prompt": ["a", "b the"], "stop": ["q"], "top_k": -1}),
        json!({"model": MODEL, "prompt": [[1, 2], [3]], "seed": -5, "logprobs": null, "stream": true}),
    ]
}

/// What the code behind relies on.
fn wanted(checkpoint: &Checkpoint, wanted: Option<Wanted>) -> Result<bool, String> {
    let Some(Wanted { prompts, sampling, shape, cache_salt, .. }) = wanted else { return Ok(false) };
    let config = &checkpoint.config;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let sound = !prompts.is_empty()
        && prompts.iter().all(|prompt| !prompt.is_empty())
        && prompts.iter().flatten().all(|token| (*token as usize) < config.vocab_size)
        && sampling.max_new >= 1
        && longest + sampling.max_new as usize <= config.max_positions
        && (0.0..=2.0).contains(&sampling.temperature)
        && (0.0..=1.0).contains(&sampling.top_p)
        && shape.stops.iter().all(|stop| !stop.is_empty())
        && cache_salt.len() <= coordinator::dispatch::CACHE_SALT_BYTES_MAX;
    if sound { Ok(true) } else { Err(format!("taken though it is out of bounds: {sampling:?}, {longest} tokens, {shape:?}")) }
}

/// The filter against the plain meaning: of all text so far, what is before the first stop string that is in it.
fn stops(bytes: &[u8]) -> Result<bool, String> {
    let Ok(example) = serde_json::from_slice::<Value>(bytes) else { return Ok(false) };
    let texts = |field: &str| -> Vec<String> {
        let list = example[field].as_array().into_iter().flatten();
        list.filter_map(|text| text.as_str().map(str::to_owned)).collect()
    };
    let (stops, pieces) = (texts("stops"), texts("pieces"));
    if stops.is_empty() || stops.iter().any(String::is_empty) {
        return Ok(false);
    }
    let (mut filter, mut out, mut all) = (StopFilter::new(stops.clone()), String::new(), String::new());
    for piece in &pieces {
        all.push_str(piece);
        let passed = filter.push(piece);
        out.push_str(&passed.text);
        let found = stops.iter().filter_map(|stop| all.find(stop.as_str())).min();
        if passed.stopped != found.is_some() {
            return Err(format!("stopped: {}, found at {found:?}", passed.stopped));
        }
        if let Some(at) = found {
            same("the text before a stop string", &out.as_str(), &&all[..at])?;
            return Ok(true);
        }
        if !all.starts_with(&out) {
            return Err("text that was not said".into());
        }
    }
    out.push_str(&filter.flush());
    same("text without a stop string", &out, &all)?;
    Ok(true)
}

fn header_map(bytes: &[u8]) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        let at = line.iter().position(|byte| *byte == b':')?;
        let (name, value) = (HeaderName::from_bytes(&line[..at]), HeaderValue::from_bytes(line[at + 1..].trim_ascii()));
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.insert(name, value);
        }
    }
    Some(headers)
}
