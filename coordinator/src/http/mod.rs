//! The OpenAI gateway: HTTP in, checked requests to the dispatcher, answers out.
//!
//! `auth` says who asks, `limits` how much they may have at a time, `request` what may be asked, `answer` turns tokens to text, `stop`
//! finds stop strings, `respond` writes JSON and events, `front` is what a front adds to a request and reads beside its answer, `begin`
//! starts or resumes the choices of a request, `error` shapes errors, `metrics` counts. Where a request goes is the dispatcher's business.

pub mod answer;
pub mod auth;
mod begin;
pub mod error;
pub mod front;
pub mod limits;
pub mod metrics;
pub mod request;
pub mod respond;
pub mod stop;

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use self::auth::{Caller, authenticate};
use self::begin::{Begin, Context};
use self::error::ApiError;
use self::front::Order;
use self::limits::Limiter;
use self::metrics::Metrics;
use self::request::{ChatBody, CompletionBody, REQUEST_BUDGET, Rules, Wanted};
use crate::App;

/// Bytes of a request body.
pub const BODY_BYTES_MAX: usize = 8 << 20;
/// A client's own objective for the time to the first token, milliseconds: 429 when it is predicted to be missed.
pub const TTFT_HEADER: &str = "x-millrace-ttft-ms";
/// Time in which a body must have come.
pub const BODY_WAIT_MAX: Duration = Duration::from_secs(30);

/// What handlers share.
#[derive(Clone)]
struct Gateway {
    app: Arc<App>,
    metrics: Arc<Metrics>,
    limiter: Arc<Limiter>,
}

/// Serves until `app.shutdown` begins, then ends the open connections.
///
/// # Errors
/// When the listener fails.
pub async fn serve(app: Arc<App>, listener: TcpListener) -> std::io::Result<()> {
    let shutdown = app.shutdown.clone();
    let metrics = Metrics::new(&app).map_err(std::io::Error::other)?;
    let router = router(Gateway { app, metrics, limiter: Arc::default() });
    axum::serve(listener, router).with_graceful_shutdown(async move { drop(shutdown.wait().await) }).await
}

fn router(gateway: Gateway) -> Router {
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .route("/livez", get(|| async { "ok" }))
        .route("/health", get(ready))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics_text))
        .method_not_allowed_fallback(|| async {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path takes another method")
        })
        .fallback(|request: Request| async move {
            let message = format!("Unknown request URL: {} {}", request.method(), request.uri().path());
            ApiError::new(StatusCode::NOT_FOUND, "unknown_url", message)
        })
        .with_state(gateway)
}

async fn completions(State(gateway): State<Gateway>, headers: HeaderMap, body: Body) -> Response {
    let check = |rules: &Rules, body: CompletionBody| body.check(rules);
    gateway.answer(headers, body, check).await
}

async fn chat(State(gateway): State<Gateway>, headers: HeaderMap, body: Body) -> Response {
    let check = |rules: &Rules, body: ChatBody| body.check(rules);
    gateway.answer(headers, body, check).await
}

impl Gateway {
    fn caller(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        authenticate(self.app.cluster.read().policy(), headers)
    }

    async fn answer<T: DeserializeOwned + Send + 'static>(
        &self,
        headers: HeaderMap,
        body: Body,
        check: impl FnOnce(&Rules, T) -> Result<Wanted, ApiError> + Send + 'static,
    ) -> Response {
        match self.run(&headers, body, check).await {
            Ok(response) => response,
            Err(error) => {
                self.metrics.refused(error.code);
                error.into_response()
            }
        }
    }

    async fn run<T: DeserializeOwned + Send + 'static>(
        &self,
        headers: &HeaderMap,
        body: Body,
        check: impl FnOnce(&Rules, T) -> Result<Wanted, ApiError> + Send + 'static,
    ) -> Result<Response, ApiError> {
        let (caller, order) = (self.caller(headers)?, Order::of(headers)?);
        let mut bytes = read(headers, body, order.map_or(0, |order| order.resume_bytes)).await?;
        let app = self.app.clone();
        // Parsing and tokenizing megabytes takes tens of milliseconds: not on a thread that carries everybody's tokens.
        let answer_max = caller.limits.answer_tokens_max;
        let parse = move || {
            let resume = begin::resume(order, &mut bytes)?;
            let rules = Rules { checkpoint: &app.checkpoint, model: &app.model.name, answer_max };
            let wanted = check(&rules, serde_json::from_slice(&bytes).map_err(|e| broken_json(&e))?)?;
            Begin::new(&app.checkpoint, wanted, order, resume)
        };
        let begin = tokio::task::spawn_blocking(parse).await.map_err(|_| crashed())??;
        self.submit(caller, begin, ttft_max(headers)?, trace(headers)).await
    }

    async fn submit(
        &self,
        caller: Caller,
        begin: Begin,
        ttft_max: Option<Duration>,
        trace: [u8; 25],
    ) -> Result<Response, ApiError> {
        // What is resumed counts like anything else: a front's word is anybody's.
        let (requests, prompt_tokens) = begin.size();
        let permit = self.limiter.admit(&caller, requests, prompt_tokens)?;
        let tokens_left = permit.tokens;
        let meter = self.metrics.of_tenant(&caller.tenant);
        let context = Context { tenant: &caller.tenant, ttft_max, trace, meter, permit };
        let (envelope, choices) = begin.start(&self.app, context)?;
        let mut response =
            if envelope.shape.stream { respond::streamed(envelope, choices) } else { respond::whole(envelope, choices).await? };
        if let Some(left) = tokens_left {
            left.write(response.headers_mut());
        }
        Ok(response)
    }
}

/// The whole body, within its bounds; a resumed request has `resume_bytes` before it.
async fn read(headers: &HeaderMap, body: Body, resume_bytes: usize) -> Result<bytes::Bytes, ApiError> {
    let bytes_max = BODY_BYTES_MAX + resume_bytes;
    let too_large = || {
        let message = format!("the body is over the limit of {BODY_BYTES_MAX} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    };
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    if declared.is_some_and(|bytes| bytes > bytes_max as u64) {
        return Err(too_large());
    }
    match tokio::time::timeout(BODY_WAIT_MAX, to_bytes(body, bytes_max)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(_)) => Err(too_large()),
        Err(_) => Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "slow_body", "the body did not come in time")),
    }
}

fn broken_json(error: &serde_json::Error) -> ApiError {
    let what = if error.is_data() { "the body does not fit the API" } else { "the body is not valid JSON" };
    ApiError { code: "invalid_json", ..ApiError::invalid(None, format!("{what}: {error}")) }
}

fn crashed() -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "the request could not be read")
}

/// What [`TTFT_HEADER`] says.
fn ttft_max(headers: &HeaderMap) -> Result<Option<Duration>, ApiError> {
    let Some(value) = headers.get(TTFT_HEADER) else { return Ok(None) };
    let ms = value.to_str().ok().and_then(|text| text.trim().parse().ok()).map(Duration::from_millis);
    let wrong =
        || ApiError::invalid(TTFT_HEADER, format!("{TTFT_HEADER} must be milliseconds, from 1 to {}", REQUEST_BUDGET.as_millis()));
    ms.filter(|ms| (Duration::from_millis(1)..=REQUEST_BUDGET).contains(ms)).map(Some).ok_or_else(wrong)
}

/// W3C `traceparent`: version, trace id, span id, flags; zeros when there is none or it is malformed.
fn trace(headers: &HeaderMap) -> [u8; 25] {
    let parse = || {
        let text = headers.get("traceparent")?.to_str().ok()?;
        let parts: Vec<&str> = text.split('-').collect();
        let [version, trace, span, flags] = parts[..] else { return None };
        let digits = format!("{trace}{span}{flags}");
        if version.len() != 2 || trace.len() != 32 || digits.len() != 50 || !digits.is_ascii() {
            return None;
        }
        let mut bytes = [0; 25];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).ok()?;
        }
        Some(bytes)
    };
    parse().unwrap_or_default()
}

async fn models(State(gateway): State<Gateway>, headers: HeaderMap) -> Result<Json<Value>, ApiError> {
    gateway.caller(&headers)?;
    Ok(Json(json!({"object": "list", "data": [gateway.model_json()]})))
}

async fn model(State(gateway): State<Gateway>, headers: HeaderMap, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    gateway.caller(&headers)?;
    let served = &gateway.app.model.name;
    if id == *served { Ok(Json(gateway.model_json())) } else { Err(ApiError::no_model(&id, served)) }
}

impl Gateway {
    fn model_json(&self) -> Value {
        let app = &self.app;
        json!({
            "id": app.model.name, "object": "model", "created": 0, "owned_by": "millrace",
            "max_model_len": app.checkpoint.config.max_positions,
        })
    }
}

async fn ready(State(gateway): State<Gateway>) -> (StatusCode, String) {
    match gateway.app.dispatcher.ready() {
        Ok(()) => (StatusCode::OK, "ready".into()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason),
    }
}

async fn metrics_text(State(gateway): State<Gateway>) -> Response {
    match gateway.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(reason) => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "metrics", reason).into_response(),
    }
}
