//! A stream on its way through the front. When its gateway is lost it goes on at another one, and the client sees no seam; when none
//! can go on with it, it ends with one typed error. A client that leaves drops it, at whatever point it is, and with it the request.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::StatusCode;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::{self, Stream};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::kept::{Boundary, EVENT_BYTES_MAX, Kept, Stage, Taken};
use super::{Front, Gateway, MOVES_MAX, PAUSE, Wanted, chain, end_to_end, is_stream};
use crate::http::front::{HEADER, NOTED};

/// How long a stream waits for a gateway that goes on with it: longer than gateways wait for nodes.
pub const MOVE_WAIT_MAX: Duration = Duration::from_secs(15);
const DONE: &[u8] = b"data: [DONE]\n\n";

/// A stream and where it comes from now.
pub(super) struct Live {
    front: Front,
    wanted: Wanted,
    /// `None` when it ends with its gateway.
    kept: Option<Kept>,
    gateway: Gateway,
    body: Incoming,
    boundary: Boundary,
    /// When its gateway last brought something.
    heard: Instant,
    /// Its gateway will bring nothing more, and why.
    lost: Option<String>,
    moves: u32,
}

/// What a client gets next.
enum Step {
    More(Bytes),
    Last(Bytes),
}

impl Live {
    pub(super) fn new(front: Front, wanted: Wanted, kept: Option<Kept>, (gateway, body): (Gateway, Incoming)) -> Self {
        let (boundary, heard) = (Boundary::default(), Instant::now());
        Self { front, wanted, kept, gateway, body, boundary, heard, lost: None, moves: 0 }
    }

    /// The events for the client, whole ones only.
    pub(super) fn events(self) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
        stream::unfold(Some(self), |live| async move {
            let mut live = live?;
            Some(match live.next().await {
                Step::More(bytes) => (Ok(bytes), Some(live)),
                Step::Last(bytes) => (Ok(bytes), None),
            })
        })
    }

    async fn next(&mut self) -> Step {
        loop {
            if let Some(why) = self.lost.take()
                && let Some(last) = self.move_on(&why).await
            {
                return Step::Last(last);
            }
            match self.piece().await {
                Ok(Some(data)) => {
                    let whole = self.boundary.push(&data);
                    let out = self.take(whole);
                    if !out.is_empty() {
                        return Step::More(out);
                    }
                }
                Ok(None) => return Step::Last(self.boundary.rest()),
                Err(why) => self.lost = Some(why),
            }
        }
    }

    /// What the gateway brings next; an error when it is lost. Cancel-safe.
    async fn piece(&mut self) -> Result<Option<Bytes>, String> {
        let frame = tokio::select! {
            frame = self.body.frame() => frame,
            why = self.front.0.health.forsaken(self.gateway.address, self.heard) => return Err(why.to_owned()),
        };
        self.heard = Instant::now();
        let frame = frame.transpose().map_err(|error| chain(&error))?;
        Ok(frame.map(|frame| frame.into_data().unwrap_or_default()))
    }

    fn take(&mut self, whole: Bytes) -> Bytes {
        let Some(kept) = &mut self.kept else { return whole };
        if whole.is_empty() {
            return whole;
        }
        match kept.take(&whole) {
            Taken::Pass(out) => out,
            Taken::PassAndForget(out) => {
                self.forget();
                out
            }
            Taken::Elsewhere(out) => {
                self.lost = Some("it can reach no nodes".into());
                out
            }
        }
    }

    fn forget(&mut self) {
        self.kept = None;
        self.wanted.body = Bytes::new();
    }

    /// Finds a gateway that goes on where this one stopped; the last event when there is none, or nothing is left to say.
    async fn move_on(&mut self, why: &str) -> Option<Bytes> {
        // Half an event is the next gateway's to write.
        self.boundary = Boundary::default();
        self.moves += 1;
        let kept = match &self.kept {
            Some(kept) if self.moves <= MOVES_MAX => kept,
            _ => return Some(lost(&self.gateway.name, why)),
        };
        let resume = match kept.stage() {
            Stage::Over => return Some(Bytes::new()),
            Stage::Closed => return Some(Bytes::from_static(DONE)),
            Stage::Nothing | Stage::Begun => kept.given().map(|given| json!(given).to_string()),
        };
        let until = Instant::now() + MOVE_WAIT_MAX;
        loop {
            let opened = self.front.open(&self.wanted, resume.as_ref().map(String::as_bytes), Some(self.gateway.address)).await;
            match opened {
                Ok((gateway, response)) if is_stream(&response) && response.headers().get(&HEADER) == Some(&NOTED) => {
                    (self.gateway, self.body, self.heard) = (gateway, end_to_end(response).1, Instant::now());
                    return None;
                }
                // There is room for it: it was there a moment ago.
                Ok((_, response)) if response.status() != StatusCode::TOO_MANY_REQUESTS => return Some(refused(response).await),
                _ if Instant::now() >= until => return Some(lost(&self.gateway.name, why)),
                _ => sleep(PAUSE).await,
            }
        }
    }
}

/// The event that ends a stream whose gateway is lost.
fn lost(gateway: &str, why: &str) -> Bytes {
    let message = format!("{gateway}, which carried this answer, was lost ({why}), and nobody goes on with it; ask again");
    let error = json!({"message": message, "type": "server_error", "param": null, "code": "gateway_lost"});
    event(&json!({ "error": error }))
}

/// The event that ends a stream which another gateway refuses, with that gateway's reason.
async fn refused(response: Response<Incoming>) -> Bytes {
    let body = Limited::new(response.into_body(), EVENT_BYTES_MAX).collect().await;
    let error = body.ok().and_then(|body| serde_json::from_slice::<Value>(&body.to_bytes()).ok());
    error
        .filter(|error| error["error"].is_object())
        .map_or_else(|| lost("the gateway", "the next one refuses"), |error| event(&error))
}

fn event(value: &Value) -> Bytes {
    format!("data: {value}\n\n").into()
}
