//! One prefill and one decode node for the time of a measurement, reached through their HTTP door.

use std::ffi::OsString;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

use crate::local::Local;

/// Token ids of prompts: in the middle of any real vocabulary, where no id is special.
const IDS: (u32, u32) = (1_000, 30_000);

/// A running cluster.
pub struct Cluster {
    local: Local,
    client: Client<HttpConnector, Full<Bytes>>,
    model: String,
}

/// What one request took.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The `millrace` object of the response.
    pub timings: Value,
    /// Tokens of the answer.
    pub tokens: f64,
}

impl Answer {
    /// A number of the `millrace` object, by its path; 0 when there is none.
    #[must_use]
    pub fn number(&self, path: &str) -> f64 {
        self.timings.pointer(path).and_then(Value::as_f64).unwrap_or(0.0)
    }
}

/// Tokens of an answer, one by one.
pub struct Tokens {
    body: Incoming,
    /// What has come of an event that has not come whole.
    text: String,
    /// Tokens that came and were not given out.
    waiting: usize,
}

impl Tokens {
    /// Waits for the next token.
    ///
    /// # Errors
    /// The answer ends or fails before.
    pub async fn next(&mut self) -> Result<()> {
        while self.waiting == 0 {
            let frame = self.body.frame().await.context("the answer ended early")??;
            self.text.push_str(&String::from_utf8_lossy(frame.data_ref().map_or(&[][..], |data| data)));
            while let Some((event, rest)) = self.text.split_once("\n\n") {
                let event: Value =
                    event.strip_prefix("data: ").and_then(|data| serde_json::from_str(data).ok()).unwrap_or_default();
                ensure!(event["error"].is_null(), "{event}");
                self.waiting += event.pointer("/choices/0/token_ids").and_then(Value::as_array).map_or(0, Vec::len);
                self.text = rest.to_owned();
            }
        }
        self.waiting -= 1;
        Ok(())
    }
}

impl Cluster {
    /// One prefill node, one decode node and `coordinators` replicas of `model`.
    ///
    /// # Errors
    /// It does not come up; what it said is in the error.
    pub async fn start(model: &Path, dtype: &str, coordinators: u16) -> Result<Self> {
        Self::start_with(model, dtype, coordinators, &[]).await
    }

    /// [`Self::start`] with further arguments.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_with(model: &Path, dtype: &str, coordinators: u16, further: &[&str]) -> Result<Self> {
        let replicas = coordinators.to_string();
        let mut arguments: Vec<OsString> =
            ["--coordinators", &replicas, "--prefill", "1", "--decode", "1", "--dtype", dtype, "--model"].map(Into::into).into();
        arguments.push(model.into());
        arguments.extend(further.iter().map(Into::into));
        let local = Local::start(arguments).await?;
        let client = Client::builder(TokioExecutor::new()).build_http();
        let mut cluster = Self { local, client, model: String::new() };
        let models = cluster.request(Request::get(format!("{}/v1/models", cluster.local.url())), String::new()).await?;
        cluster.model = models["data"][0]["id"].as_str().context("a model")?.to_owned();
        Ok(cluster)
    }

    async fn request(&self, request: hyper::http::request::Builder, body: String) -> Result<Value> {
        let request = request.header("content-type", "application/json").body(Full::from(body))?;
        let response = self.client.request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        ensure!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body));
        Ok(serde_json::from_slice(&body)?)
    }

    /// Answers a prompt of `tokens` tokens that nobody sent before, with exactly `max_tokens` tokens.
    ///
    /// # Errors
    /// The request failed.
    pub async fn complete(&self, tokens: usize, max_tokens: u32) -> Result<Answer> {
        let prompt = unique_prompt(tokens);
        let body = json!({
            "model": self.model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "temperature": 0,
            "millrace_timings": true,
        });
        let answer = self.request(Request::post(format!("{}/v1/completions", self.local.url())), body.to_string()).await?;
        let tokens = answer["usage"]["completion_tokens"].as_f64().unwrap_or(0.0);
        Ok(Answer { timings: answer["millrace"].clone(), tokens })
    }

    /// Asks for `max_tokens` tokens after a prompt; gives them as they come to the client.
    ///
    /// # Errors
    /// The request is refused.
    pub async fn ask(&self, prompt: &[u32], max_tokens: u32) -> Result<Tokens> {
        let body = json!({
            "model": self.model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "temperature": 0,
            "return_token_ids": true, "stream": true,
        });
        let request = Request::post(format!("{}/v1/completions", self.local.url())).header("content-type", "application/json");
        let answer = self.client.request(request.body(Full::from(body.to_string()))?).await?;
        ensure!(answer.status().is_success(), "{}", answer.status());
        Ok(Tokens { body: answer.into_body(), text: String::new(), waiting: 0 })
    }

    /// Stops it and waits until nothing of it is left.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub async fn stop(self) -> Result<()> {
        self.local.stop().await
    }
}

/// A prompt whose first block is like no other's.
#[must_use]
pub fn unique_prompt(tokens: usize) -> Vec<u32> {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let seed = NEXT.fetch_add(1, Ordering::Relaxed);
    (0..tokens as u32).map(|i| IDS.0 + (i.wrapping_mul(7919) ^ seed.wrapping_mul(104_729)) % (IDS.1 - IDS.0)).collect()
}
