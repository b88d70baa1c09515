//! Writes answers the way the OpenAI API shapes them: one JSON body, or server-sent events with one token in each chunk. For a front
//! each event is led by a note (`front`), which clients never see.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt};
use millrace_core::ids::TokenId;
use serde_json::{Value, json};

use super::answer::{Choice, Piece};
use super::error::ApiError;
use super::front::{HEADER, NOTED, Note, Order};
use super::limits::Permit;
use super::metrics::{TenantMeter, Watch};
use super::request::Shape;
use crate::dispatch::Usage;

/// What all chunks of one response share.
pub struct Envelope {
    /// `cmpl-…` or `chatcmpl-…`.
    pub id: String,
    /// The model's public name.
    pub model: String,
    /// Seconds since 1970.
    pub created: u64,
    /// How to write.
    pub shape: Shape,
    /// Where to count.
    pub meter: TenantMeter,
    /// A front carries the answer and reads notes.
    pub noted: bool,
    /// The place among the tenant's requests, for as long as the response lasts.
    _permit: Permit,
}

/// The choices of an answer.
#[derive(Default)]
pub struct Choices {
    /// Those on their way, by their index.
    pub open: Vec<(usize, Choice)>,
    /// What those took that the client has whole already.
    pub ended: Usage,
    /// The client has the beginning of the answer.
    pub resumed: bool,
}

impl Envelope {
    /// For a request that was just accepted.
    #[must_use]
    pub fn new(request: u128, model: &str, shape: Shape, meter: TenantMeter, permit: Permit) -> Self {
        let prefix = if shape.chat { "chatcmpl" } else { "cmpl" };
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self {
            id: format!("{prefix}-{request:032x}"),
            model: model.to_owned(),
            created,
            shape,
            meter,
            noted: false,
            _permit: permit,
        }
    }

    /// For an answer that a front carries.
    #[must_use]
    pub fn carried(order: &Order, model: &str, shape: Shape, meter: TenantMeter, permit: Permit) -> Self {
        Self { created: order.created_s, noted: true, ..Self::new(order.id, model, shape, meter, permit) }
    }

    fn object(&self) -> &'static str {
        match (self.shape.chat, self.shape.stream) {
            (true, true) => "chat.completion.chunk",
            (true, false) => "chat.completion",
            (false, _) => "text_completion",
        }
    }

    fn wrap(&self, choices: Value) -> Value {
        json!({"id": self.id, "object": self.object(), "created": self.created, "model": self.model, "choices": choices})
    }
}

/// One body with everything.
///
/// # Errors
/// The first choice that fails.
pub async fn whole(envelope: Envelope, choices: Choices) -> Result<Response, ApiError> {
    let collected = choices.open.into_iter().map(|(index, choice)| collect(&envelope, index, choice));
    let (mut written, mut total, mut last) = (Vec::new(), Usage::default(), None);
    for result in futures_util::future::join_all(collected).await {
        let (choice, usage) = result?;
        add(&mut total, &usage);
        written.push(choice);
        last = Some(usage);
    }
    let mut body = envelope.wrap(Value::Array(written));
    body["usage"] = usage_json(&total);
    if let (true, Some(usage)) = (envelope.shape.timings, last) {
        body["millrace"] = timings_json(&usage);
    }
    Ok(Json(body).into_response())
}

async fn collect(envelope: &Envelope, index: usize, mut choice: Choice) -> Result<(Value, Usage), ApiError> {
    let (mut content, mut ids): (String, Vec<TokenId>) = Default::default();
    let mut watch = Watch::start(&envelope.meter);
    while let Some(piece) = choice.next().await {
        match piece {
            Piece::Token { token, text } => {
                watch.token();
                content.push_str(&text);
                ids.push(token);
            }
            Piece::End { text, reason, usage } => {
                watch.end(&usage);
                content.push_str(&text);
                let mut value = json!({"index": index, "finish_reason": reason, "logprobs": null});
                match envelope.shape.chat {
                    true => value["message"] = json!({"role": "assistant", "content": content, "refusal": null}),
                    false => value["text"] = json!(content),
                }
                if envelope.shape.return_token_ids {
                    value["token_ids"] = json!(ids);
                }
                return Ok((value, *usage));
            }
            Piece::Failed(error) => {
                watch.failed(error.code);
                return Err(error);
            }
        }
    }
    Err(ApiError::failed(crate::dispatch::FailureKind::Stopping, "the request ended without a word"))
}

/// Server-sent events. Dropping the response cancels the requests behind it.
#[must_use]
pub fn streamed(envelope: Envelope, choices: Choices) -> Response {
    let noted = envelope.noted.then_some((HEADER, NOTED));
    let envelope = Arc::new(envelope);
    let opening = if choices.resumed { Vec::new() } else { opening(&envelope, choices.open.len()) };
    let each = choices.open.into_iter().map(|(index, choice)| chunks(envelope.clone(), index, choice).boxed());
    let tokens = stream::select_all(each);
    let state = (tokens, choices.ended, false, envelope);
    let body = stream::unfold(Some(state), |state| async move {
        let (mut tokens, mut total, mut failed, envelope) = state?;
        let Some(chunk) = tokens.next().await else { return Some((closing(&envelope, &total, failed), None)) };
        match chunk.end {
            Some(Ok(usage)) => add(&mut total, &usage),
            Some(Err(())) => failed = true,
            None => {}
        }
        let event = noted_event(chunk.note.filter(|_| envelope.noted), &chunk.value);
        Some((event, Some((tokens, total, failed, envelope))))
    });
    let body = stream::iter(opening).chain(body).map(Ok::<_, Infallible>);
    let headers = [(header::CONTENT_TYPE, "text/event-stream; charset=utf-8"), (header::CACHE_CONTROL, "no-cache")];
    let mut response = (headers, Body::from_stream(body)).into_response();
    response.headers_mut().extend(noted);
    response
}

/// One event, and what it means for the answer.
struct Chunk {
    value: Value,
    note: Option<Note>,
    /// With a choice's last event: what it took, or that it failed.
    end: Option<Result<Box<Usage>, ()>>,
}

fn chunks(envelope: Arc<Envelope>, index: usize, choice: Choice) -> impl Stream<Item = Chunk> + Send {
    let watch = Watch::start(&envelope.meter);
    stream::unfold((choice, watch, envelope), move |(mut choice, mut watch, envelope)| async move {
        let chunk = match choice.next().await? {
            Piece::Token { token, text } => {
                watch.token();
                let note = Note::Token { choice: index, token, cached_tokens: choice.cached_tokens() };
                Chunk { value: token_chunk(&envelope, index, token, &text), note: Some(note), end: None }
            }
            Piece::End { text, reason, usage } => {
                watch.end(&usage);
                let value = end_chunk(&envelope, index, &text, reason, &usage);
                Chunk { value, note: Some(Note::End { choice: index }), end: Some(Ok(usage)) }
            }
            Piece::Failed(error) => {
                watch.failed(error.code);
                // This gateway cannot go on; the cluster may.
                let elsewhere = (error.status == StatusCode::SERVICE_UNAVAILABLE).then_some(Note::Elsewhere);
                Chunk { value: error.body(), note: elsewhere, end: Some(Err(())) }
            }
        };
        Some((chunk, (choice, watch, envelope)))
    })
}

/// A chat says first who speaks.
fn opening(envelope: &Envelope, choices: usize) -> Vec<Bytes> {
    if !envelope.shape.chat {
        return Vec::new();
    }
    let delta =
        |index| json!({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null});
    (0..choices).map(|index| event(&with_usage_field(envelope, json!([delta(index)])))).collect()
}

fn token_chunk(envelope: &Envelope, index: usize, token: TokenId, text: &str) -> Value {
    let mut choice = json!({"index": index, "logprobs": null, "finish_reason": null});
    match envelope.shape.chat {
        true => choice["delta"] = json!({"content": text}),
        false => choice["text"] = json!(text),
    }
    if envelope.shape.return_token_ids {
        choice["token_ids"] = json!([token]);
    }
    with_usage_field(envelope, json!([choice]))
}

fn end_chunk(envelope: &Envelope, index: usize, text: &str, reason: &str, usage: &Usage) -> Value {
    let mut choice = json!({"index": index, "logprobs": null, "finish_reason": reason});
    match (envelope.shape.chat, text.is_empty()) {
        (true, true) => choice["delta"] = json!({}),
        (true, false) => choice["delta"] = json!({"content": text}),
        (false, _) => choice["text"] = json!(text),
    }
    let mut chunk = with_usage_field(envelope, json!([choice]));
    if envelope.shape.timings {
        chunk["millrace"] = timings_json(usage);
    }
    chunk
}

/// With `include_usage` every chunk but the last has `"usage": null`.
fn with_usage_field(envelope: &Envelope, choices: Value) -> Value {
    let mut chunk = envelope.wrap(choices);
    if envelope.shape.include_usage {
        chunk["usage"] = Value::Null;
    }
    chunk
}

/// The usage chunk, if asked for, and the end mark. After an error there is neither: the answer is not whole.
fn closing(envelope: &Envelope, total: &Usage, failed: bool) -> Bytes {
    if failed {
        return Bytes::new();
    }
    let mut out = Vec::new();
    if envelope.shape.include_usage {
        let mut chunk = envelope.wrap(json!([]));
        chunk["usage"] = usage_json(total);
        out.extend_from_slice(&noted_event(envelope.noted.then_some(Note::Close), &chunk));
    }
    out.extend_from_slice(b"data: [DONE]\n\n");
    out.into()
}

fn event(value: &Value) -> Bytes {
    noted_event(None, value)
}

fn noted_event(note: Option<Note>, value: &Value) -> Bytes {
    match note {
        Some(note) => format!("{note}\ndata: {value}\n\n").into(),
        None => format!("data: {value}\n\n").into(),
    }
}

/// Adds what one choice took.
pub fn add(total: &mut Usage, one: &Usage) {
    total.prompt_tokens += one.prompt_tokens;
    total.completion_tokens += one.completion_tokens;
    total.cached_tokens += one.cached_tokens;
}

fn usage_json(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}

/// Where the time of a request went; all times in microseconds.
fn timings_json(usage: &Usage) -> Value {
    let timings = &usage.timings;
    let prefill = timings
        .prefill
        .as_ref()
        .map(|p| json!({"node": p.node, "cached_tokens": p.cached_tokens, "queue_us": p.queue_us, "compute_us": p.compute_us}));
    let handover = timings.handover.as_ref().map(|h| {
        json!({
            "node": h.node, "bytes": h.bytes, "blocks_sent": h.blocks_sent, "blocks_had": h.blocks_had,
            "transfer_us": h.transfer_us, "exposed_us": h.exposed_us,
        })
    });
    json!({
        "prefill": prefill, "handover": handover, "decode_node": timings.decode_node, "attempts": timings.attempts,
        "recomputed_tokens": timings.recomputed_tokens,
        "ttft_us": timings.ttft_us, "total_us": timings.total_us,
    })
}
