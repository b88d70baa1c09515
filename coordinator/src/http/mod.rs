//! The OpenAI gateway: HTTP in, checked requests to the dispatcher, answers out.
//!
//! `request` says what may be asked, `answer` turns tokens to text, `stop` finds stop strings, `respond` writes JSON and events,
//! `front` is what a front adds to a request and reads beside its answer, `begin` starts or resumes the choices of a request,
//! `error` shapes errors, `metrics` counts. Where a request goes is the dispatcher's business.

pub mod answer;
mod begin;
pub mod error;
pub mod front;
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

use self::begin::Begin;
use self::error::ApiError;
use self::front::Order;
use self::metrics::Metrics;
use self::request::{ChatBody, CompletionBody, Wanted};
use crate::App;

/// Bytes of a request body.
pub const BODY_BYTES_MAX: usize = 8 << 20;
/// Time in which a body must have come.
pub const BODY_WAIT_MAX: Duration = Duration::from_secs(30);

/// What handlers share.
#[derive(Clone)]
struct Gateway {
    app: Arc<App>,
    metrics: Arc<Metrics>,
}

/// Serves until `app.shutdown` begins, then ends the open connections.
///
/// # Errors
/// When the listener fails.
pub async fn serve(app: Arc<App>, listener: TcpListener) -> std::io::Result<()> {
    let shutdown = app.shutdown.clone();
    let metrics = Metrics::new(&app).map_err(std::io::Error::other)?;
    let router = router(Gateway { app, metrics });
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
    let check = |app: &App, body: CompletionBody| body.check(&app.checkpoint, &app.model.name);
    gateway.answer(headers, body, check).await
}

async fn chat(State(gateway): State<Gateway>, headers: HeaderMap, body: Body) -> Response {
    let check = |app: &App, body: ChatBody| body.check(&app.checkpoint, &app.model.name);
    gateway.answer(headers, body, check).await
}

impl Gateway {
    async fn answer<T: DeserializeOwned + Send + 'static>(
        &self,
        headers: HeaderMap,
        body: Body,
        check: impl FnOnce(&App, T) -> Result<Wanted, ApiError> + Send + 'static,
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
        check: impl FnOnce(&App, T) -> Result<Wanted, ApiError> + Send + 'static,
    ) -> Result<Response, ApiError> {
        let order = Order::of(headers)?;
        let mut bytes = read(headers, body, order.map_or(0, |order| order.resume_bytes)).await?;
        let app = self.app.clone();
        // Parsing and tokenizing megabytes takes tens of milliseconds: not on a thread that carries everybody's tokens.
        let parse = move || {
            let resume = begin::resume(order, &mut bytes)?;
            let wanted = check(&app, serde_json::from_slice(&bytes).map_err(|e| broken_json(&e))?)?;
            Begin::new(&app, wanted, order, resume)
        };
        let begin = tokio::task::spawn_blocking(parse).await.map_err(|_| crashed())??;
        self.submit(begin, trace(headers)).await
    }

    async fn submit(&self, begin: Begin, trace: [u8; 25]) -> Result<Response, ApiError> {
        let stream = begin.streams();
        let (envelope, choices) = begin.start(&self.app, &self.metrics, trace)?;
        if stream { Ok(respond::streamed(envelope, choices)) } else { respond::whole(envelope, choices).await }
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

async fn models(State(gateway): State<Gateway>) -> Json<Value> {
    Json(json!({"object": "list", "data": [gateway.model_json()]}))
}

async fn model(State(gateway): State<Gateway>, Path(id): Path<String>) -> Response {
    let served = &gateway.app.model.name;
    if id == *served { Json(gateway.model_json()).into_response() } else { ApiError::no_model(&id, served).into_response() }
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
