//! The front of a local cluster: one HTTP address for clients, as a Kubernetes Service would be, before the gateways of all replicas.
//!
//! It decides which gateway takes a request (ready ones first, followers before the leader, which has the log to write, in turn among
//! equals), and hides the loss of one: what has no answer yet is sent again, and a stream goes on at another gateway where it stopped
//! (`stream`, from what `kept` remembers). `health` knows which gateways are not worth waiting for. What a request or an answer
//! means it does not know; `http::front` is all that it has in common with a gateway.

mod body;
mod health;
mod kept;
mod stream;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{self, HeaderMap};
use axum::http::{Method, StatusCode, Uri, Version};
use axum::response::{IntoResponse, Response};
use axum::serve::ListenerExt;
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

pub use self::body::DISCARD_BYTES_MAX;
use self::body::{keep_end_to_end, read};
use self::health::Health;
pub use self::kept::{EVENT_BYTES_MAX, KEPT_BYTES_MAX};
use self::kept::{Kept, Room};
use self::stream::Live;
use crate::http::error::ApiError;
use crate::http::front::{HEADER, NOTED, Order};

/// Time to connect to a gateway.
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(2);
/// Idle connections to one gateway.
const IDLE_MAX: usize = 64;
/// How long a request waits for a gateway when there are some and none can be reached.
pub const GATEWAY_WAIT_MAX: Duration = Duration::from_secs(5);
/// Pause before all gateways are tried again.
const PAUSE: Duration = Duration::from_millis(100);
/// Gateways that one answer may lose.
pub const MOVES_MAX: u32 = 16;
/// An answer of one piece that is longer is passed on as it comes, and breaks with its gateway.
pub const WHOLE_BYTES_MAX: u64 = 16 << 20;

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
struct Front(Arc<Inner>);

struct Inner {
    client: HttpClient,
    gateways: watch::Receiver<Vec<Gateway>>,
    health: Health,
    room: Room,
    turn: AtomicUsize,
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
    let client = http_client();
    let health = Health::watch(client.clone(), gateways.clone());
    let front = Front(Arc::new(Inner { client, gateways, health, room: Room::default(), turn: AtomicUsize::new(0) }));
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
    let arrived = Instant::now();
    let (parts, body) = request.into_parts();
    let body = match read(&parts.headers, body).await {
        Ok(body) => body,
        Err(error) => return error.into_response(),
    };
    let mut headers = parts.headers;
    keep_end_to_end(&mut headers);
    let created_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let order = Order { id: rand::random(), created_s, seed: rand::random(), resume_bytes: 0 };
    front.answer(Wanted { arrived, method: parts.method, uri: parts.uri, headers, body, order }).await
}

/// A request that can be sent again.
struct Wanted {
    arrived: Instant,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
    order: Order,
}

/// Why no gateway takes a request.
enum Refusal {
    /// All that answer say that they cannot now; one of these answers.
    Busy(Response<Incoming>),
    /// None answers; why, for each.
    Nobody(Vec<String>),
}

impl Front {
    async fn answer(&self, wanted: Wanted) -> Response {
        let until = Instant::now() + GATEWAY_WAIT_MAX;
        let mut moves = 0;
        loop {
            let (gateway, response) = match self.open(&wanted, None, None).await {
                Ok(opened) => opened,
                Err(Refusal::Busy(response)) => return pass(response),
                Err(Refusal::Nobody(failed)) if failed.is_empty() || Instant::now() >= until => {
                    return nobody(&failed).into_response();
                }
                Err(Refusal::Nobody(_)) => {
                    sleep(PAUSE).await;
                    continue;
                }
            };
            if is_stream(&response) {
                return self.stream(wanted, gateway, response);
            }
            if length(&response).is_none_or(|length| length > WHOLE_BYTES_MAX) {
                return pass(response);
            }
            moves += 1;
            match self.collect(gateway.address, response).await {
                Ok(response) => return response,
                Err(reason) if moves >= MOVES_MAX => return nobody(&[format!("{}: {reason}", gateway.name)]).into_response(),
                Err(_) => {}
            }
        }
    }

    /// Sends a request to the first gateway that takes it. `after` has just failed it, so it is asked last.
    async fn open(
        &self,
        wanted: &Wanted,
        resume: Option<&[u8]>,
        after: Option<SocketAddr>,
    ) -> Result<(Gateway, Response<Incoming>), Refusal> {
        let (mut failed, mut refused) = (Vec::new(), None);
        let mut gateways = order(self.gateways(), self.0.turn.fetch_add(1, Relaxed));
        gateways.sort_by_key(|gateway| Some(gateway.address) == after);
        for gateway in gateways {
            let asked = tokio::select! {
                asked = wanted.ask(&self.0.client, &gateway, resume) => asked,
                why = self.0.health.forsaken(gateway.address, Instant::now()) => Err(why.to_owned()),
            };
            match asked {
                // It takes no requests now and has done nothing; another may.
                Ok(response) if response.status() == StatusCode::SERVICE_UNAVAILABLE => refused = Some(response),
                Ok(response) => return Ok((gateway, response)),
                Err(reason) => failed.push(format!("{}: {reason}", gateway.name)),
            }
        }
        Err(refused.map_or(Refusal::Nobody(failed), Refusal::Busy))
    }

    /// The gateways, with what the front knows of them itself.
    fn gateways(&self) -> Vec<Gateway> {
        let mut gateways = self.0.gateways.borrow().clone();
        for gateway in &mut gateways {
            gateway.ready = self.0.health.of(gateway.address).map_or(gateway.ready, |state| state == health::State::Ready);
        }
        gateways
    }

    fn stream(&self, mut wanted: Wanted, gateway: Gateway, response: Response<Incoming>) -> Response {
        let noted = response.headers().get(&HEADER) == Some(&NOTED);
        let kept = noted.then(|| Kept::new(&self.0.room, wanted.body.len(), wanted.arrived)).flatten();
        if kept.is_none() {
            wanted.body = Bytes::new();
        }
        let (parts, body) = end_to_end(response);
        let live = Live::new(self.clone(), wanted, kept, (gateway, body));
        Response::from_parts(parts, Body::from_stream(live.events()))
    }

    /// The whole of an answer of one piece.
    async fn collect(&self, address: SocketAddr, response: Response<Incoming>) -> Result<Response, String> {
        let (parts, mut body) = end_to_end(response);
        let (mut whole, mut heard) = (BytesMut::new(), Instant::now());
        loop {
            let frame = tokio::select! {
                frame = body.frame() => frame,
                why = self.0.health.forsaken(address, heard) => return Err(why.to_owned()),
            };
            match frame.transpose().map_err(|error| chain(&error))? {
                Some(frame) => whole.extend_from_slice(&frame.into_data().unwrap_or_default()),
                None => return Ok(Response::from_parts(parts, Body::from(whole.freeze()))),
            }
            heard = Instant::now();
        }
    }
}

fn nobody(failed: &[String]) -> ApiError {
    let message = match failed {
        [] => "no gateway of the cluster runs".into(),
        reasons => format!("no gateway of the cluster answers: {}", reasons.join("; ")),
    };
    ApiError { retry_after_s: Some(1), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_gateway", message) }
}

impl Wanted {
    async fn ask(&self, client: &HttpClient, gateway: &Gateway, resume: Option<&[u8]>) -> Result<Response<Incoming>, String> {
        let path = self.uri.path_and_query().map_or("/", |path| path.as_str());
        let body = resume.map_or_else(|| self.body.clone(), |resume| [resume, &self.body].concat().into());
        let mut request = hyper::Request::new(Full::new(body));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = format!("http://{}{path}", gateway.address).parse().map_err(|e| format!("{e}"))?;
        *request.headers_mut() = self.headers.clone();
        // Its length may have been unknown; now it is not, and hyper writes it.
        request.headers_mut().remove(header::CONTENT_LENGTH);
        // In the place of a client's own: only a front may know what it keeps.
        let order = Order { resume_bytes: resume.map_or(0, <[u8]>::len), ..self.order };
        request.headers_mut().insert(HEADER, order.value());
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

fn is_stream(response: &Response<Incoming>) -> bool {
    let kind = response.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| kind.starts_with("text/event-stream"))
}

fn length(response: &Response<Incoming>) -> Option<u64> {
    response.headers().get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// An answer without what concerns this hop only.
fn end_to_end(response: Response<Incoming>) -> (axum::http::response::Parts, Incoming) {
    let (mut parts, body) = response.into_parts();
    keep_end_to_end(&mut parts.headers);
    parts.headers.remove(&HEADER);
    parts.version = Version::HTTP_11;
    (parts, body)
}

/// Passes an answer on as it comes. Dropping it drops the gateway's, which cancels the request.
fn pass(response: Response<Incoming>) -> Response {
    let (parts, body) = end_to_end(response);
    Response::from_parts(parts, Body::new(body))
}

#[cfg(test)]
mod tests;
