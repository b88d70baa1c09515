//! Request bodies at the front: read whole, because a request may have to be sent again, and within the gateways' own bounds.

use axum::body::{Body, to_bytes};
use axum::http::StatusCode;
use axum::http::header::{self, HeaderMap, HeaderName};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;

use crate::http::error::ApiError;
use crate::http::{BODY_BYTES_MAX, BODY_WAIT_MAX};

/// Bytes of a body that is too large which are still read, so that the client hears why instead of a broken connection.
pub const DISCARD_BYTES_MAX: u64 = 256 << 20;

/// The whole body, at hand for another try, within the gateways' own bounds.
pub(super) async fn read(headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    let slow = |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "slow_body", "the body did not come in time");
    if declared.is_some_and(|bytes| bytes > BODY_BYTES_MAX as u64) {
        // A client that asks first has not sent anything.
        if !headers.contains_key(header::EXPECT) {
            tokio::time::timeout(BODY_WAIT_MAX, discard(body)).await.map_err(slow)?;
        }
        return Err(too_large());
    }
    let read = async {
        if declared.is_some() {
            return to_bytes(body, BODY_BYTES_MAX).await.map_err(|e| broken(&e));
        }
        collect(body).await
    };
    tokio::time::timeout(BODY_WAIT_MAX, read).await.map_err(slow)?
}

/// A body of unknown length.
async fn collect(mut body: Body) -> Result<Bytes, ApiError> {
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| broken(&e))?;
        whole.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
        if whole.len() > BODY_BYTES_MAX {
            discard(body).await;
            return Err(too_large());
        }
    }
    Ok(whole.freeze())
}

async fn discard(mut body: Body) {
    let mut seen = 0;
    while let Some(Ok(frame)) = body.frame().await {
        seen += frame.data_ref().map_or(0, Bytes::len) as u64;
        if seen > DISCARD_BYTES_MAX {
            return;
        }
    }
}

fn too_large() -> ApiError {
    let message = format!("the body is over the limit of {BODY_BYTES_MAX} bytes");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}

fn broken(error: &axum::Error) -> ApiError {
    ApiError { code: "broken_body", ..ApiError::invalid(None, format!("the body broke off: {error}")) }
}

/// Removes what is between two ends of one connection only (RFC 9110, 7.6.1).
pub(super) fn keep_end_to_end(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let fixed = [header::CONNECTION, header::TE, header::TRAILER, header::TRANSFER_ENCODING, header::UPGRADE, header::EXPECT];
    for name in named.iter().chain(&fixed) {
        headers.remove(name);
    }
    headers.remove("keep-alive");
}
