//! An HTTP client with one connection for each request, so that dropping an answer is a client that goes away.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{HeaderMap, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::WAIT_MAX;

/// The part of an answer that comes first, and the rest to be read.
#[derive(Debug)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    body: Incoming,
    connection: JoinHandle<()>,
}

impl Drop for Response {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Response {
    /// The next piece of the body, `None` at its end.
    ///
    /// # Errors
    /// The connection broke before the end, or nothing came for too long.
    pub async fn piece(&mut self) -> Result<Option<Bytes>, String> {
        loop {
            let frame = tokio::time::timeout(WAIT_MAX, self.body.frame()).await;
            match frame.map_err(|_| format!("nothing came for {} s", WAIT_MAX.as_secs()))? {
                None => return Ok(None),
                Some(Err(error)) => return Err(format!("the connection broke: {error}")),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => return Ok(Some(data)),
                    Err(_trailers) => {}
                },
            }
        }
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub text: String,
}

impl Reply {
    /// The body as JSON; null when it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or(Value::Null)
    }

    /// The JSON of an answer that went well.
    ///
    /// # Panics
    /// When it did not.
    #[must_use]
    pub fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// The `error` object of an answer that has the shape of an OpenAI error.
    ///
    /// # Errors
    /// What it has instead.
    pub fn error(&self) -> Result<Value, String> {
        error_shape(&self.json()).map_err(|reason| format!("{reason}: {} {}", self.status, self.text))
    }
}

/// The `error` object of a body in the shape of an OpenAI error.
///
/// # Errors
/// What is missing.
pub fn error_shape(body: &Value) -> Result<Value, String> {
    let error = &body["error"];
    for field in ["message", "type", "code"] {
        if error[field].as_str().is_none_or(str::is_empty) {
            return Err(format!("no OpenAI error: {field} is missing"));
        }
    }
    match error.get("param") {
        Some(Value::Null | Value::String(_)) => Ok(error.clone()),
        _ => Err("no OpenAI error: param is neither null nor text".into()),
    }
}

/// Sends a request and waits for the beginning of its answer.
///
/// # Errors
/// Nobody answers.
pub async fn open(at: SocketAddr, method: &str, path: &str, body: impl Into<Bytes>) -> Result<Response, String> {
    open_as(at, method, path, body, None).await
}

/// [`open`], with an API key if there is one.
///
/// # Errors
/// Nobody answers.
pub async fn open_as(
    at: SocketAddr,
    method: &str,
    path: &str,
    body: impl Into<Bytes>,
    key: Option<&str>,
) -> Result<Response, String> {
    let wait = tokio::time::timeout(WAIT_MAX, begin(at, method, path, body.into(), key));
    wait.await.map_err(|_| format!("{method} {path}: no answer within {} s", WAIT_MAX.as_secs()))?
}

async fn begin(at: SocketAddr, method: &str, path: &str, body: Bytes, key: Option<&str>) -> Result<Response, String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| format!("{method} {path}: {what}: {error}");
    let stream = TcpStream::connect(at).await.map_err(|e| failed("connecting", &e))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| failed("connecting", &e))?;
    let connection = tokio::spawn(async move { drop(connection.await) });
    let mut request = Request::builder().method(method).uri(path).header("host", at.to_string());
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let request = request.header("content-type", "application/json").body(Full::new(body)).map_err(|e| failed("asking", &e))?;
    let response = sender.send_request(request).await.map_err(|e| failed("asking", &e))?;
    let (parts, body) = response.into_parts();
    Ok(Response { status: parts.status.as_u16(), headers: parts.headers, body, connection })
}

/// Sends a request and waits for its whole answer.
///
/// # Errors
/// There is no whole answer.
pub async fn send(at: SocketAddr, method: &str, path: &str, body: impl Into<Bytes>) -> Result<Reply, String> {
    send_as(at, method, path, body, None).await
}

/// [`send`], with an API key if there is one.
///
/// # Errors
/// There is no whole answer.
pub async fn send_as(at: SocketAddr, method: &str, path: &str, body: impl Into<Bytes>, key: Option<&str>) -> Result<Reply, String> {
    let mut response = open_as(at, method, path, body, key).await?;
    let mut whole = Vec::new();
    while let Some(piece) = response.piece().await? {
        whole.extend_from_slice(&piece);
    }
    let text = String::from_utf8(whole).map_err(|e| e.to_string())?;
    Ok(Reply { status: response.status, headers: response.headers.clone(), text })
}

/// How long a status line may take to come, for [`raw`].
const RAW_WAIT_MAX: Duration = Duration::from_secs(60);

/// Sends `head`, then `pieces` copies of `piece`, then `tail`, and gives what was answered: whatever came before the other side hung up.
/// The writing goes on while the answer comes, as with a client that does not look.
///
/// # Panics
/// When nobody listens, or nothing ends.
pub async fn raw(at: SocketAddr, head: &str, (piece, pieces): (&[u8], usize), tail: &'static str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let stream = TcpStream::connect(at).await.expect("the cluster listens");
    let (mut reader, mut writer) = stream.into_split();
    let (head, piece) = (head.to_owned(), piece.to_owned());
    let writing = tokio::spawn(async move {
        let mut open = writer.write_all(head.as_bytes()).await.is_ok();
        for _ in 0..pieces {
            open = open && writer.write_all(&piece).await.is_ok();
        }
        // Nobody may be listening any more, and the answer says why.
        let _ = writer.write_all(tail.as_bytes()).await;
        // The write half stays open until the answer is there.
        writer
    });
    let mut answer = Vec::new();
    let mut chunk = vec![0; 4096];
    let reading = async {
        while let Ok(count @ 1..) = reader.read(&mut chunk).await {
            answer.extend_from_slice(&chunk[..count]);
            if answer.windows(4).any(|window| window == b"\r\n\r\n") {
                break;
            }
        }
    };
    tokio::time::timeout(RAW_WAIT_MAX, reading).await.expect("an answer or an end");
    writing.abort();
    String::from_utf8_lossy(&answer).into_owned()
}
