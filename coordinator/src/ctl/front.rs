//! The front of a local cluster: one HTTP address for clients, as a Kubernetes Service would be, before the gateways of all replicas.
//!
//! It decides which gateway takes a request (ready ones first, followers before the leader, which has the log to write, in turn among
//! equals), and what a client sees when a gateway dies: before its first byte the next one is asked; in the middle of an event stream
//! the stream ends with one typed error event; else the connection breaks. It understands nothing of what it carries but the
//! boundaries of events, so that a client never sees half an event.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::{self, HeaderMap, HeaderName};
use axum::http::{Method, StatusCode, Uri, Version};
use axum::response::{IntoResponse, Response};
use axum::serve::ListenerExt;
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, Stream};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::http::error::ApiError;
use crate::http::{BODY_BYTES_MAX, BODY_WAIT_MAX};

/// Bytes of a body that is too large which are still read, so that the client hears why instead of a broken connection.
pub const DISCARD_BYTES_MAX: u64 = 256 << 20;
/// Bytes of one event that are held back until it is whole; a longer one is passed on in pieces.
pub const EVENT_BYTES_MAX: usize = 1 << 20;
/// Time to connect to a gateway.
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(2);
/// Idle connections to one gateway.
const IDLE_MAX: usize = 64;

/// A gateway that may take requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// The replica's name.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// It says that it can serve.
    pub ready: bool,
    /// It leads the others.
    pub leader: bool,
}

/// An HTTP client with whole bodies out and streamed bodies in.
pub type HttpClient = Client<HttpConnector, Full<Bytes>>;

/// A client that gives up connecting in time and sends small writes at once.
#[must_use]
pub fn http_client() -> HttpClient {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT_WAIT_MAX));
    Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).pool_max_idle_per_host(IDLE_MAX).build(connector)
}

#[derive(Clone)]
struct Front {
    client: HttpClient,
    gateways: watch::Receiver<Vec<Gateway>>,
    turn: Arc<AtomicUsize>,
}

/// Serves until `stop` ends, then finishes what runs. `gateways` are those whose process lives.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    gateways: watch::Receiver<Vec<Gateway>>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let front = Front { client: http_client(), gateways, turn: Arc::default() };
    let router = Router::new().fallback(carry).with_state(front);
    let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
    axum::serve(listener, router).with_graceful_shutdown(stop).await
}

/// In which order `gateways` are tried: ready before not, followers before the leader, in turn among equals.
#[must_use]
pub fn order(mut gateways: Vec<Gateway>, turn: usize) -> Vec<Gateway> {
    if !gateways.is_empty() {
        let followers = gateways.iter().filter(|g| g.ready && !g.leader).count();
        gateways.sort_by_key(|g| (!g.ready, g.leader));
        gateways[..followers].rotate_left(turn.checked_rem(followers).unwrap_or(0));
    }
    gateways
}

async fn carry(State(front): State<Front>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = match read(&parts.headers, body).await {
        Ok(body) => body,
        Err(error) => return error.into_response(),
    };
    let mut headers = parts.headers;
    keep_end_to_end(&mut headers);
    let gateways = order(front.gateways.borrow().clone(), front.turn.fetch_add(1, Relaxed));
    let (mut failed, mut refused) = (Vec::new(), None);
    for gateway in gateways {
        let wanted = Wanted { method: &parts.method, uri: &parts.uri, headers: &headers, body: &body };
        match wanted.ask(&front.client, &gateway).await {
            // It takes no requests now and has done nothing; another may.
            Ok(response) if response.status() == StatusCode::SERVICE_UNAVAILABLE => refused = Some((gateway.name, response)),
            Ok(response) => return pass(gateway.name, response),
            Err(reason) => failed.push(format!("{}: {reason}", gateway.name)),
        }
    }
    match refused {
        Some((name, response)) => pass(name, response),
        None => nobody(&failed).into_response(),
    }
}

fn nobody(failed: &[String]) -> ApiError {
    let message = match failed {
        [] => "no gateway of the cluster runs".into(),
        reasons => format!("no gateway of the cluster answers: {}", reasons.join("; ")),
    };
    ApiError { retry_after_s: Some(1), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_gateway", message) }
}

/// The whole body, at hand for another try, within the gateways' own bounds.
async fn read(headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
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
fn keep_end_to_end(headers: &mut HeaderMap) {
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

/// A request that can be sent again.
struct Wanted<'a> {
    method: &'a Method,
    uri: &'a Uri,
    headers: &'a HeaderMap,
    body: &'a Bytes,
}

impl Wanted<'_> {
    async fn ask(&self, client: &HttpClient, gateway: &Gateway) -> Result<Response<Incoming>, String> {
        let path = self.uri.path_and_query().map_or("/", |path| path.as_str());
        let mut request = hyper::Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = format!("http://{}{path}", gateway.address).parse().map_err(|e| format!("{e}"))?;
        *request.headers_mut() = self.headers.clone();
        // Its length may have been unknown; now it is not, and hyper writes it.
        request.headers_mut().remove(header::CONTENT_LENGTH);
        client.request(request).await.map_err(|error| chain(&error))
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// Passes an answer on as it comes. Dropping it drops the gateway's, which cancels the request.
fn pass(gateway: String, response: Response<Incoming>) -> Response {
    let (mut parts, body) = response.into_parts();
    keep_end_to_end(&mut parts.headers);
    parts.version = Version::HTTP_11;
    let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let body = if kind.starts_with("text/event-stream") { Body::from_stream(events(gateway, body)) } else { Body::new(body) };
    Response::from_parts(parts, body)
}

/// Whole events of `body`; one that says so in the place of the rest when the gateway is lost.
fn events(gateway: String, body: Incoming) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> + Send {
    let state = Some((body, Boundary::default(), gateway));
    stream::unfold(state, |state| async move {
        let (mut body, mut boundary, gateway) = state?;
        loop {
            match body.frame().await {
                Some(Ok(frame)) => {
                    let whole = boundary.push(&frame.into_data().unwrap_or_default());
                    if !whole.is_empty() {
                        return Some((Ok(whole), Some((body, boundary, gateway))));
                    }
                }
                Some(Err(_)) => return Some((Ok(lost(&gateway)), None)),
                None => return Some((Ok(boundary.rest()), None)),
            }
        }
    })
}

/// The event that ends a stream whose gateway is lost.
fn lost(gateway: &str) -> Bytes {
    let message = format!("{gateway}, which carried this answer, was lost; ask again");
    let error = json!({"message": message, "type": "server_error", "param": null, "code": "gateway_lost"});
    format!("data: {}\n\n", json!({ "error": error })).into()
}

/// Holds back the beginning of an event until its end (an empty line) has come.
#[derive(Debug, Default)]
struct Boundary(BytesMut);

impl Boundary {
    /// Takes bytes; gives all that is whole.
    fn push(&mut self, data: &[u8]) -> Bytes {
        // The empty line may begin with the last byte that is held already.
        let from = self.0.len().saturating_sub(1);
        self.0.extend_from_slice(data);
        match self.0[from..].windows(2).rposition(|pair| pair == b"\n\n") {
            Some(at) => self.0.split_to(from + at + 2).freeze(),
            None if self.0.len() > EVENT_BYTES_MAX => self.rest(),
            None => Bytes::new(),
        }
    }

    fn rest(&mut self) -> Bytes {
        self.0.split().freeze()
    }
}

#[cfg(test)]
mod tests;
