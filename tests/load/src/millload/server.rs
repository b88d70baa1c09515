//! A server whose every delay is known: for the generator's own ceiling (no delays at all) and for the truth that figures are held against.
//! It speaks as much of the OpenAI API as the generator hears. Answers depend on the prompt only.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::clock::until;
use super::rng::{mix, prf};

/// What the server calls its model.
pub const MODEL: &str = "scripted";
/// Bytes of a request.
const BODY_BYTES_MAX: usize = 64 << 20;

/// What the server does.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Script {
    /// Milliseconds from the start of computing to the first token
    #[arg(long, default_value_t = 0.0)]
    pub ttft_ms: f64,
    /// Microseconds more for each token of the prompt
    #[arg(long, default_value_t = 0.0)]
    pub per_token_us: f64,
    /// Milliseconds between tokens
    #[arg(long, default_value_t = 0.0)]
    pub itl_ms: f64,
    /// Requests that are computed at a time; others wait. Without a limit when absent
    #[arg(long)]
    pub slots: Option<usize>,
    /// Every so-manyth request is refused with 429
    #[arg(long, value_name = "N")]
    pub refuse_every: Option<u64>,
    /// Every so-manyth answer ends without its end after two tokens
    #[arg(long, value_name = "N")]
    pub cut_every: Option<u64>,
    /// Every so-manyth answer carries an error after two tokens
    #[arg(long, value_name = "N")]
    pub error_every: Option<u64>,
    /// The share of prompts that is said to be cached
    #[arg(long, default_value_t = 0.0)]
    pub cached_share: f64,
}

/// When the server did what, on its own clock.
#[derive(Clone, Copy, Debug)]
pub struct Served {
    /// The request was read.
    pub arrived: Instant,
    /// The first token was given away.
    pub first: Instant,
    /// The last token was given away.
    pub last: Instant,
}

/// A server that runs.
#[derive(Debug, Default)]
pub struct Server {
    script: Script,
    count: AtomicU64,
    slots: Option<Arc<Slots>>,
    served: Option<Mutex<HashMap<u64, Served>>>,
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// How a request came.
#[derive(Clone, Copy)]
struct Came {
    head: Instant,
    trace: u64,
    number: u64,
}

/// A request, as far as the server reads it.
struct Ask {
    came: Came,
    chat: bool,
    prompt_tokens: u32,
    seed: u64,
    out: u32,
}

impl Server {
    /// With this script; `keep` remembers when each request was served.
    #[must_use]
    pub fn new(script: Script, keep: bool) -> Arc<Self> {
        let slots = script.slots.map(|slots| Arc::new(Slots::new(slots)));
        Arc::new(Self { script, slots, served: keep.then(Mutex::default), ..Self::default() })
    }

    /// What was served, by the number in the request's trace id.
    #[must_use]
    pub fn served(&self) -> HashMap<u64, Served> {
        self.served.as_ref().map(|served| served.lock().unwrap_or_else(PoisonError::into_inner).clone()).unwrap_or_default()
    }

    /// Serves until it is dropped.
    ///
    /// # Errors
    /// The listener fails.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) -> std::io::Result<()> {
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let server = self.clone();
            let service = service_fn(move |request| {
                let server = server.clone();
                async move { Ok::<_, Infallible>(server.answer(request).await) }
            });
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let (path, mut came) = (request.uri().path().to_owned(), Came { head: Instant::now(), trace: trace(&request), number: 0 });
        match path.as_str() {
            "/v1/models" => json(StatusCode::OK, format!(r#"{{"object":"list","data":[{{"id":"{MODEL}","object":"model"}}]}}"#)),
            "/health" => json(StatusCode::OK, "{}".into()),
            "/v1/completions" | "/v1/chat/completions" => {
                let Ok(body) = http_body_util::Limited::new(request.into_body(), BODY_BYTES_MAX).collect().await else {
                    return json(StatusCode::PAYLOAD_TOO_LARGE, "{}".into());
                };
                came.number = self.count.fetch_add(1, Relaxed) + 1;
                self.complete(ask(&body.to_bytes(), path.contains("chat"), came)).await
            }
            _ => json(StatusCode::NOT_FOUND, "{}".into()),
        }
    }

    async fn complete(self: Arc<Self>, ask: Ask) -> Response<Body> {
        let (arrived, script) = (Instant::now(), &self.script);
        let every = |n: Option<u64>| n.is_some_and(|n| n > 0 && ask.came.number.is_multiple_of(n));
        if every(script.refuse_every) {
            return json(StatusCode::TOO_MANY_REQUESTS, r#"{"error":{"message":"full","code":"capacity"}}"#.into());
        }
        let fault = if every(script.cut_every) {
            Fault::Cut
        } else if every(script.error_every) {
            Fault::Error
        } else {
            Fault::None
        };
        let compute = Duration::from_secs_f64((script.ttft_ms + script.per_token_us * f64::from(ask.prompt_tokens) / 1e3) / 1e3);
        let itl = Duration::from_secs_f64(script.itl_ms / 1e3);
        let immediate = compute.is_zero() && itl.is_zero() && self.slots.is_none();
        if immediate && fault == Fault::None && self.served.is_none() {
            let times = Times { arrived, began: arrived, compute, itl, first: Some(arrived) };
            let whole: Vec<u8> = (0..=ask.out).flat_map(|j| event(&ask, script, &times, j)).collect();
            return stream_of(Full::from(whole).boxed_unsync());
        }
        let mut slot = match self.slots.clone() {
            Some(slots) => slots.take().await,
            None => None,
        };
        let began = slot.as_ref().map_or_else(Instant::now, |slot| slot.free_at.max(arrived));
        let times = Times { arrived, began, compute, itl, first: None };
        if let Some(slot) = &mut slot {
            slot.free_at = began + compute + itl * ask.out.saturating_sub(1);
        }
        let state = Saying { server: self, ask, times, fault, next: 0, _slot: slot };
        let events = stream::unfold(state, |mut state| async move { Some((Ok(Frame::data(state.next().await?)), state)) });
        stream_of(BodyExt::boxed_unsync(StreamBody::new(events)))
    }

    fn note(&self, ask: &Ask, times: &Times, j: u32) {
        let Some(served) = &self.served else { return };
        let now = Instant::now();
        let mut served = served.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = served.entry(ask.came.trace).or_insert(Served { arrived: times.arrived, first: now, last: now });
        if j < ask.out {
            entry.last = now;
        }
    }
}

/// What computes, a request at a time each. A request that waited begins when the one before it was to end, not when this process
/// came to notice: over many hand-overs such delays would add up to a queue that the script does not know of.
#[derive(Debug)]
struct Slots {
    free: Arc<Semaphore>,
    /// Since when each free slot is free, or was to be.
    since: Mutex<Vec<Instant>>,
}

/// A slot in use.
struct Slot {
    slots: Arc<Slots>,
    /// When it was free before this use; during it, when it is to be free again.
    free_at: Instant,
    _permit: OwnedSemaphorePermit,
}

impl Slots {
    fn new(count: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(count)), since: Mutex::new(vec![Instant::now(); count]) }
    }

    /// The slot that was free first, once one is free; requests get them in their order.
    async fn take(self: Arc<Self>) -> Option<Slot> {
        let permit = self.free.clone().acquire_owned().await.ok()?;
        let free_at = {
            let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
            let first = (0..since.len()).min_by_key(|&i| since[i])?;
            since.swap_remove(first)
        };
        Some(Slot { slots: self, free_at, _permit: permit })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // An answer that was cut ends early.
        self.slots.since.lock().unwrap_or_else(PoisonError::into_inner).push(self.free_at.min(Instant::now()));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    Cut,
    Error,
}

struct Times {
    arrived: Instant,
    began: Instant,
    compute: Duration,
    itl: Duration,
    first: Option<Instant>,
}

/// An answer being said, one token after the other, at instants that do not depend on how late the one before was.
struct Saying {
    server: Arc<Server>,
    ask: Ask,
    times: Times,
    fault: Fault,
    next: u32,
    _slot: Option<Slot>,
}

impl Saying {
    async fn next(&mut self) -> Option<Bytes> {
        let j = self.next;
        if j > self.ask.out {
            return None;
        }
        self.next += 1;
        if j == 2 && self.fault != Fault::None {
            self.next = self.ask.out + 1;
            let error = "data: {\"error\":{\"message\":\"planted\",\"code\":\"planted\"}}\n\n";
            return (self.fault == Fault::Error).then(|| Bytes::from_static(error.as_bytes()));
        }
        if j < self.ask.out {
            until(self.times.began + self.times.compute + self.times.itl * j).await;
        }
        self.times.first.get_or_insert_with(Instant::now);
        self.server.note(&self.ask, &self.times, j);
        Some(event(&self.ask, &self.server.script, &self.times, j).into())
    }
}

/// The j-th event: a token, or the end with the counts.
fn event(ask: &Ask, script: &Script, times: &Times, j: u32) -> Vec<u8> {
    let object = if ask.chat { "chat.completion.chunk" } else { "text_completion" };
    let head = format!(r#"data: {{"id":"scripted-{}","object":"{object}","created":0,"model":"{MODEL}","#, ask.came.number);
    if j < ask.out {
        let token = 1000 + mix(ask.seed.wrapping_add(u64::from(j))) % 29_000;
        let text = if ask.chat { r#""delta":{"content":" x"}"# } else { r#""text":" x""# };
        let choice = format!(r#""choices":[{{"index":0,{text},"token_ids":[{token}],"finish_reason":null}}]"#);
        return format!("{head}{choice}}}\n\n").into_bytes();
    }
    let queue_us = (times.began - times.arrived).as_micros();
    let (compute_us, ttft_us) = (times.compute.as_micros(), (times.began + times.compute - times.arrived).as_micros());
    let read_us = (times.arrived - ask.came.head).as_micros();
    let gateway_us = times.first.map_or(0, |first| (first - ask.came.head).as_micros());
    let total_us = ttft_us + times.itl.as_micros() * u128::from(ask.out.saturating_sub(1));
    let (prompt, out) = (ask.prompt_tokens, ask.out);
    let cached = (f64::from(prompt) * script.cached_share) as u32;
    let empty = if ask.chat { r#""delta":{}"# } else { r#""text":"""# };
    let end = format!(
        r#""choices":[{{"index":0,{empty},"finish_reason":"length"}}],"millrace":{{"prefill":{{"node":"scripted","cached_tokens":{cached},"queue_us":{queue_us},"compute_us":{compute_us}}},"handover":null,"gateway":{{"read_us":{read_us},"ttft_us":{gateway_us}}},"decode_node":"scripted","attempts":1,"ttft_us":{ttft_us},"total_us":{total_us}}}"#
    );
    let counts = format!(
        r#""choices":[],"usage":{{"prompt_tokens":{prompt},"completion_tokens":{out},"total_tokens":{},"prompt_tokens_details":{{"cached_tokens":{cached}}}}}"#,
        prompt + out
    );
    format!("{head}{end}}}\n\n{head}{counts}}}\n\ndata: [DONE]\n\n").into_bytes()
}

fn stream_of(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/event-stream"));
    response
}

fn json(status: StatusCode, text: String) -> Response<Body> {
    let mut response = Response::new(Full::from(text).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

/// The number that the generator put into the second half of the trace id; 0 without one.
fn trace(request: &Request<Incoming>) -> u64 {
    let value = request.headers().get("traceparent").and_then(|value| value.to_str().ok());
    value.and_then(|text| u64::from_str_radix(text.get(19..35)?, 16).ok()).unwrap_or(0)
}

/// Reads what matters without parsing all of the JSON: the null server must be cheaper than what it measures.
fn ask(body: &[u8], chat: bool, came: Came) -> Ask {
    let out = number_after(body, b"\"max_tokens\":").or_else(|| number_after(body, b"\"max_completion_tokens\":")).unwrap_or(16);
    let prompt = find(body, b"\"prompt\":[").map(|at| &body[at..]);
    let prompt = prompt.map(|rest| &rest[..find(rest, b"]").unwrap_or(rest.len())]);
    let prompt_tokens = match prompt {
        Some(ids) => ids.iter().filter(|byte| **byte == b',').count() as u32 + 1,
        None => body.split(|byte| *byte == b' ').count() as u32,
    };
    let text = prompt.unwrap_or(body);
    let seed = text.chunks(8).fold(7, |hash, chunk| prf(hash, chunk.iter().fold(0, |word, byte| word << 8 | u64::from(*byte)), 0));
    Ask { came, chat, prompt_tokens, seed, out }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what).map(|at| at + what.len())
}

fn number_after(body: &[u8], what: &[u8]) -> Option<u32> {
    let rest = body[find(body, what)?..].trim_ascii_start();
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}
