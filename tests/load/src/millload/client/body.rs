//! Writes requests: completions with token ids, or chats with words that stand for the plan's tokens.

use std::fmt::Write;

use anyhow::Result;
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, header};
use serde_json::json;

use super::Answer;
use super::pool::Target;
use crate::millload::plan::{Answers, Plan, Planned, Role};
use crate::millload::rng::{mix, prf};

/// Which API is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Api {
    /// `/v1/completions` with token ids: lengths and sharing are exact
    Completions,
    /// `/v1/chat/completions` with words: lengths are near the plan's, sharing is as far as the template allows
    Chat,
}

/// Words that most tokenizers take as one token with the blank before them.
const WORDS: [&str; 64] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
];

/// What all requests of a run have in common.
#[derive(Clone, Debug)]
pub struct Writer {
    /// Where they go.
    pub target: Target,
    /// Which API.
    pub api: Api,
    /// The model's name.
    pub model: String,
    /// For the `authorization` header.
    pub key: Option<String>,
    /// More headers.
    pub headers: Vec<(String, String)>,
    /// Fields that OpenAI's API does not have: exact lengths, token ids, times. Off for servers that refuse them.
    pub extensions: bool,
}

impl Writer {
    /// The body of a request. O(tokens).
    #[must_use]
    pub fn body(&self, plan: &Plan, request: &Planned, answers: &[Answer]) -> Bytes {
        let mut out = match self.api {
            Api::Completions => self.completion(plan, request, answers),
            Api::Chat => self.chat(plan, request, answers),
        };
        out.push_str(r#","temperature":0,"stream":true,"stream_options":{"include_usage":true}"#);
        if self.extensions {
            out.push_str(r#","ignore_eos":true,"return_token_ids":true,"millrace_timings":true"#);
        }
        out.push('}');
        out.into()
    }

    fn completion(&self, plan: &Plan, request: &Planned, answers: &[Answer]) -> String {
        let real: Vec<Vec<u32>> = answers.iter().map(|answer| answer.tokens.clone()).collect();
        let tokens = plan.prompt(request, &real);
        let mut out = String::with_capacity(tokens.len() * 6 + 256);
        let _ = write!(out, r#"{{"model":{},"max_tokens":{},"prompt":["#, json!(self.model), request.out);
        for (at, token) in tokens.iter().enumerate() {
            let _ = write!(out, "{}{token}", if at == 0 { "" } else { "," });
        }
        out.push(']');
        out
    }

    fn chat(&self, plan: &Plan, request: &Planned, answers: &[Answer]) -> String {
        let mut messages: Vec<(&str, String)> = Vec::new();
        let mut answers = answers.iter().filter(|_| plan.header.answers == Answers::Real);
        for piece in &request.prompt {
            let role = match piece.role {
                Role::User => "user",
                Role::System => "system",
                Role::Answer => "assistant",
            };
            let real = (piece.role == Role::Answer).then(|| answers.next()).flatten();
            let text = real.map_or_else(|| words(plan.header.seed, piece.key, piece.tokens), |answer| answer.text.clone());
            match messages.last_mut() {
                Some((last, said)) if *last == role => said.push_str(&text),
                _ => messages.push((role, text)),
            }
        }
        let messages: Vec<_> = messages.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
        format!(r#"{{"model":{},"max_tokens":{},"messages":{}"#, json!(self.model), request.out, json!(messages))
    }

    /// The request with its headers. `trace` is the W3C trace id's second half.
    ///
    /// # Errors
    /// A header of the user's that is none.
    pub fn request(&self, body: Bytes, digest: &str, trace: u64) -> Result<Request<Full<Bytes>>> {
        let path = match self.api {
            Api::Completions => "/v1/completions",
            Api::Chat => "/v1/chat/completions",
        };
        let mut request = Request::post(format!("{}{path}", self.target.prefix))
            .header(header::HOST, &self.target.authority)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "text/event-stream")
            .header("traceparent", format!("00-{digest:0>16}{trace:016x}-{:016x}-01", mix(trace) | 1));
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        Ok(request.body(Full::from(body))?)
    }
}

fn words(seed: u64, key: u64, count: u32) -> String {
    let base = prf(seed, key, 0);
    let word = |j: u32| WORDS[(mix(base.wrapping_add(u64::from(j).wrapping_mul(0x9e37_79b9_7f4a_7c15))) % 64) as usize];
    (0..count).fold(String::new(), |out, j| out + " " + word(j))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::millload::plan::tests::{header, planned};
    use serde_json::Value;

    fn writer(api: Api) -> Writer {
        let target = Target::parse("http://127.0.0.1:1").unwrap();
        Writer { target, api, model: "m\"x".into(), key: Some("k".into()), headers: vec![], extensions: true }
    }

    fn turn() -> (Plan, Planned) {
        let mut request = planned(0, 0, &[(1, 3), (2, 2), (3, 2), (4, 1)], 5);
        request.prompt[0].role = Role::System;
        request.prompt[2].role = Role::Answer;
        (Plan::new(header(), vec![request.clone()]).unwrap(), request)
    }

    #[test]
    fn completions_carry_the_plans_tokens() {
        let (plan, request) = turn();
        let body: Value = serde_json::from_slice(&writer(Api::Completions).body(&plan, &request, &[])).unwrap();
        let tokens: Vec<u32> = body["prompt"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect();
        assert_eq!((tokens, &body["model"], &body["max_tokens"]), (plan.prompt(&request, &[]), &json!("m\"x"), &json!(5)));
        assert_eq!((&body["ignore_eos"], &body["stream_options"]["include_usage"]), (&json!(true), &json!(true)));
    }

    #[test]
    fn chats_carry_what_was_said() {
        let (plan, request) = turn();
        let answers = [Answer { tokens: vec![], text: "so \"it\" is".into() }];
        let body: Value = serde_json::from_slice(&writer(Api::Chat).body(&plan, &request, &answers)).unwrap();
        let roles: Vec<&str> = body["messages"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "user"]);
        assert_eq!(body["messages"][2]["content"], "so \"it\" is");
        assert_eq!(body["messages"][0]["content"].as_str().unwrap().split_whitespace().count(), 3);
    }

    #[test]
    fn requests_carry_a_trace_and_a_key() {
        let request = writer(Api::Chat).request(Bytes::new(), "0123456789abcdef", 7).unwrap();
        assert_eq!(request.uri(), "/v1/chat/completions");
        assert_eq!(request.headers()["authorization"], "Bearer k");
        let trace = request.headers()["traceparent"].to_str().unwrap();
        assert_eq!((trace.len(), trace.matches('-').count()), (55, 3));
    }
}
