//! Clients that stream answers without a pause, from a few prompts with beginnings in common, and look at every token: the checksum
//! engine's answers depend on every byte of KV, so they are known from a quiet moment.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Beginnings, and prompts that share each.
const GROUPS: u32 = 4;
const TAILS: u32 = 4;
/// Tokens of a beginning, and of the rest.
const SHARED: u32 = 288;
const REST: u32 = 24;
/// Clients with short and with long answers, and their tokens.
const CLIENTS: [(usize, usize); 2] = [(5, 24), (2, 160)];
/// A request that takes longer hangs.
const REQUEST_WAIT_MAX: Duration = Duration::from_secs(40);

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// With every token as it must be.
    Right,
    /// With an error.
    Failed(String),
    /// With a token that it must not have.
    Wrong(String),
    /// Not in time.
    Hung,
}

/// A request that ended.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub begun: Instant,
    pub took: Duration,
    /// Between two pieces of the answer.
    pub longest_pause: Duration,
    pub outcome: Outcome,
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
}

struct Shared {
    url: String,
    model: String,
    client: Client<HttpConnector, Full<Bytes>>,
    answers: Vec<Vec<u32>>,
    /// Names the round: other rounds' blocks are not found.
    salt: AtomicU64,
    done: std::sync::Mutex<Vec<Request>>,
}

/// Running clients.
pub(super) struct Traffic {
    shared: Arc<Shared>,
    clients: JoinSet<()>,
    stop: watch::Sender<bool>,
}

fn prompt(number: usize) -> Vec<u32> {
    let (group, tail) = (number as u32 % GROUPS, number as u32 / GROUPS);
    let shared = (0..SHARED).map(|i| 3 + (i * 7 + group * 31) % 290);
    shared.chain((0..REST).map(|i| 3 + (i * 11 + tail * 17 + group) % 290)).collect()
}

impl Traffic {
    /// Learns the answers, and starts the clients.
    pub(super) async fn start(http: SocketAddr) -> Result<Self> {
        let (client, url) = (Client::builder(TokioExecutor::new()).build_http(), format!("http://{http}"));
        let (salt, done) = (AtomicU64::new(0), std::sync::Mutex::default());
        let mut shared = Shared { url, model: String::new(), client, answers: Vec::new(), salt, done };
        let models = shared.client.get(format!("{}/v1/models", shared.url).parse()?).await?.into_body().collect().await?;
        let models: Value = serde_json::from_slice(&models.to_bytes())?;
        shared.model = models["data"][0]["id"].as_str().context("a model")?.to_owned();
        let longest = CLIENTS.iter().map(|(_, tokens)| *tokens).max().unwrap_or_default();
        for number in 0..(GROUPS * TAILS) as usize {
            let mut answer = Answer::default();
            let came = shared.stream(number, longest, &mut answer).await;
            ensure!(came.is_ok() && answer.ids.len() == longest, "no answer in a quiet moment: {came:?}");
            shared.answers.push(answer.ids);
        }
        let (shared, stop, mut clients) = (Arc::new(shared), watch::Sender::new(false), JoinSet::new());
        let kinds = CLIENTS.into_iter().flat_map(|(count, tokens)| std::iter::repeat_n(tokens, count));
        for (number, tokens) in kinds.enumerate() {
            clients.spawn(run(shared.clone(), number, tokens, stop.subscribe()));
        }
        Ok(Self { shared, clients, stop })
    }

    /// Begins a round: every prompt is asked for once, so that it is cached somewhere.
    pub(super) async fn warm(&self, round: u64) -> Result<()> {
        self.shared.salt.store(round, Relaxed);
        for number in 0..(GROUPS * TAILS) as usize {
            let outcome = self.shared.request(number, 1).await.outcome;
            ensure!(outcome == Outcome::Right, "before any fault: {outcome:?}");
        }
        Ok(())
    }

    /// The requests that ended since the last call.
    pub(super) fn take(&self) -> Vec<Request> {
        std::mem::take(&mut *self.shared.done.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    pub(super) async fn stop(mut self) {
        self.stop.send_replace(true);
        while self.clients.join_next().await.is_some() {}
    }
}

async fn run(shared: Arc<Shared>, number: usize, tokens: usize, stop: watch::Receiver<bool>) {
    let prompts = (GROUPS * TAILS) as usize;
    let mut turn = number * 5;
    while !*stop.borrow() {
        turn += 1 + number;
        let request = shared.request(turn % prompts, tokens).await;
        shared.done.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(request);
    }
}

/// What has come of an answer.
#[derive(Debug, Default)]
struct Answer {
    ids: Vec<u32>,
    usage: Value,
    longest_pause: Duration,
    whole: bool,
}

impl Shared {
    async fn request(&self, number: usize, tokens: usize) -> Request {
        let (begun, mut answer) = (Instant::now(), Answer::default());
        let came = timeout(REQUEST_WAIT_MAX, self.stream(number, tokens, &mut answer)).await;
        let want = &self.answers[number][..tokens];
        let outcome = match came {
            Err(_) => Outcome::Hung,
            _ if !want.starts_with(&answer.ids) => Outcome::Wrong(format!("{:?} instead of {want:?}", answer.ids)),
            Ok(Err(error)) => Outcome::Failed(format!("{error:#} after {} tokens", answer.ids.len())),
            Ok(Ok(())) if answer.ids.len() < tokens || !answer.whole => {
                Outcome::Wrong(format!("it ends after {}", answer.ids.len()))
            }
            Ok(Ok(())) => Outcome::Right,
        };
        let count = |pointer: &str| answer.usage.pointer(pointer).and_then(Value::as_u64).unwrap_or_default() as u32;
        let (prompt_tokens, cached_tokens) = (count("/prompt_tokens"), count("/prompt_tokens_details/cached_tokens"));
        let (took, longest_pause) = (begun.elapsed(), answer.longest_pause);
        Request { begun, took, longest_pause, outcome, prompt_tokens, cached_tokens }
    }

    async fn stream(&self, number: usize, tokens: usize, answer: &mut Answer) -> Result<()> {
        let body = json!({
            "model": self.model, "prompt": prompt(number), "max_tokens": tokens, "ignore_eos": true, "return_token_ids": true,
            "temperature": 0, "stream": true, "stream_options": {"include_usage": true},
            "cache_salt": format!("round {}", self.salt.load(Relaxed)),
        });
        let request = hyper::Request::post(format!("{}/v1/completions", self.url)).header("content-type", "application/json");
        let mut last = Instant::now();
        let response = self.client.request(request.body(Full::from(body.to_string()))?).await?;
        let (status, mut body, mut text) = (response.status(), response.into_body(), String::new());
        while let Some(frame) = body.frame().await {
            answer.longest_pause = answer.longest_pause.max(last.elapsed());
            last = Instant::now();
            text.push_str(std::str::from_utf8(&frame?.into_data().unwrap_or_default())?);
            while let Some((event, rest)) = text.split_once("\n\n") {
                answer.event(event)?;
                text = rest.to_owned();
            }
        }
        ensure!(status.is_success(), "{status}: {text}");
        Ok(())
    }
}

impl Answer {
    fn event(&mut self, event: &str) -> Result<()> {
        let data = event.strip_prefix("data: ").with_context(|| format!("no event: {event:?}"))?;
        if data == "[DONE]" {
            self.whole = true;
            return Ok(());
        }
        let chunk: Value = serde_json::from_str(data)?;
        ensure!(chunk.get("error").is_none(), "{chunk}");
        let ids = chunk.pointer("/choices/0/token_ids").and_then(Value::as_array).into_iter().flatten();
        self.ids.extend(ids.filter_map(Value::as_u64).map(|id| id as u32));
        if !chunk["usage"].is_null() {
            self.usage = chunk["usage"].clone();
        }
        Ok(())
    }
}
