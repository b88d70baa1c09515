//! Errors as the OpenAI API shapes them: a status, and `{"error": {message, type, param, code}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use millrace_checkpoint::TextError;
use serde_json::{Value, json};

use crate::dispatch::{FailureKind, SubmitError};

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// What is wrong, for the developer.
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    /// A stable word for programs.
    pub code: &'static str,
    /// Seconds after which trying again may help.
    pub retry_after_s: Option<u32>,
}

impl ApiError {
    /// The request is wrong (400).
    pub fn invalid(param: impl Into<Option<&'static str>>, message: impl Into<String>) -> Self {
        let param = param.into().map(str::to_owned);
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, "invalid_value", message) }
    }

    /// Any other error.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code, retry_after_s: None }
    }

    /// A parameter of the OpenAI API that this server does not offer (400). Better refused than ignored.
    pub fn unsupported(param: &'static str) -> Self {
        Self { code: "unsupported_parameter", ..Self::invalid(param, format!("{param} is not supported by this server")) }
    }

    /// No such model here (404).
    pub fn no_model(asked: &str, served: &str) -> Self {
        let message = format!("The model `{asked}` does not exist; this cluster serves `{served}`");
        Self { param: Some("model".into()), ..Self::new(StatusCode::NOT_FOUND, "model_not_found", message) }
    }

    /// A request that was accepted and has no whole answer.
    pub fn failed(kind: FailureKind, detail: &str) -> Self {
        let (status, code) = match kind {
            FailureKind::Deadline => (StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded"),
            FailureKind::NoNodes => (StatusCode::SERVICE_UNAVAILABLE, "no_nodes"),
            FailureKind::NoCapacity => (StatusCode::TOO_MANY_REQUESTS, "capacity"),
            FailureKind::Attempts => (StatusCode::BAD_GATEWAY, "attempts_failed"),
            FailureKind::Rejected => (StatusCode::BAD_REQUEST, "rejected"),
            FailureKind::TooLarge => (StatusCode::BAD_REQUEST, "context_length_exceeded"),
            FailureKind::SlowClient => (StatusCode::REQUEST_TIMEOUT, "slow_client"),
            FailureKind::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
            FailureKind::TenantGone => (StatusCode::UNAUTHORIZED, "tenant_deleted"),
        };
        let retry_after_s = matches!(kind, FailureKind::NoCapacity | FailureKind::NoNodes | FailureKind::Stopping).then_some(1);
        Self { retry_after_s, ..Self::new(status, code, detail) }
    }

    /// The JSON body.
    #[must_use]
    pub fn body(&self) -> Value {
        let kind = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::NoCapacity { retry_after_s } => {
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "capacity", message);
                Self { retry_after_s: Some(retry_after_s), ..error }
            }
            SubmitError::TooLate { retry_after_s, .. } => {
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "objective", message);
                Self { retry_after_s: Some(retry_after_s), ..error }
            }
            SubmitError::NoNodes { .. } => Self::failed(FailureKind::NoNodes, &message),
            SubmitError::NotReady(_) => {
                let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message);
                Self { retry_after_s: Some(1), ..error }
            }
            SubmitError::TooLong { .. } => Self { code: "context_length_exceeded", ..Self::invalid(None, message) },
            SubmitError::Invalid(_) => Self::invalid(None, message),
        }
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        let param = match &error {
            TextError::TooLong { .. } => Some("prompt"),
            TextError::Messages { .. } | TextError::NoTemplate { .. } | TextError::Template { .. } => Some("messages"),
            _ => None,
        };
        Self::invalid(param, error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
