//! The task of one request: waits for what nodes say, for the client and for the time, and does what [`Request`] asks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_core::cluster::{Node, NodeState};
use millrace_core::message::{Message, Peer, Role};
use millrace_core::route::NoPlace;
use tokio::sync::mpsc;
use tracing::{debug, info};

use super::place::NotPlaced;
use super::registry::Input;
use super::request::{Effect, Request};
use super::types::{Event, FailureKind};
use super::{CLIENT_WAIT_MAX, Inner};

/// How often a request looks whether its nodes still live, when nothing wakes it.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// Takes the request out of the table however its task ends.
struct Closing(Arc<Inner>, millrace_core::ids::RequestId);

impl Drop for Closing {
    fn drop(&mut self) {
        let learned = self.0.registry.close(self.1);
        self.0.routing.learn(Instant::now(), learned);
    }
}

/// Drives a request to its end.
pub(super) async fn run(inner: Arc<Inner>, mut request: Request, mut inputs: mpsc::Receiver<Input>, events: mpsc::Sender<Event>) {
    let _closing = Closing(inner.clone(), request.id());
    let mut changed = inner.nodes.changed();
    let mut decoding = false;
    loop {
        inner.act(&mut request, &events).await;
        if request.ended() {
            break;
        }
        let wake = request.deadline().min(Instant::now() + LOOK_INTERVAL);
        tokio::select! {
            input = inputs.recv() => match input {
                Some(input) => take(&mut request, input),
                None if inner.registry.stopping() => request.cancel(FailureKind::Stopping, "the replica is stopping"),
                None => request.cancel(FailureKind::SlowClient, "the client does not read"),
            },
            () = events.closed() => request.cancel(FailureKind::SlowClient, "the client is gone"),
            _ = changed.changed() => {}
            () = tokio::time::sleep_until(wake.into()) => {}
        }
        let now = Instant::now();
        inner.look_after(now, &mut request);
        request.on_time(now);
        let decodes = request.running().is_some_and(|running| running.handed_over());
        if decodes && !decoding {
            inner.registry.decoding(request.id());
        }
        decoding = decodes;
    }
}

fn tenant_gone(name: &str) -> String {
    format!("the tenant {name:?} was deleted")
}

fn take(request: &mut Request, input: Input) {
    let now = Instant::now();
    match input {
        Input::Token(from, token) => request.token(now, from, token),
        Input::Failed(from, failed) => {
            info!(attempt = %failed.attempt, node = %from, kind = ?failed.kind, detail = failed.detail, "an attempt failed");
            request.failed(now, from, failed);
        }
        Input::Handover(from, stats) => request.handover(now, from, stats),
    }
}

impl Inner {
    /// Does all that the request wants done.
    async fn act(&self, request: &mut Request, events: &mpsc::Sender<Event>) {
        while let Some(effect) = request.poll() {
            match effect {
                Effect::Deliver(event) => self.deliver(request, events, event).await,
                Effect::Cancel(peer, attempt) => {
                    // Without a link the node has noticed by itself that this gateway is gone.
                    self.nodes.send(&peer.name, peer.epoch, Message::Cancel(attempt));
                }
                Effect::Place => self.place_again(request),
            }
        }
    }

    async fn deliver(&self, request: &mut Request, events: &mpsc::Sender<Event>, event: Event) {
        if let Event::Failed { kind, detail } = &event {
            debug!(request = %request.id(), ?kind, detail, "request failed");
        }
        if events.send_timeout(event, CLIENT_WAIT_MAX).await.is_err() {
            request.cancel(FailureKind::SlowClient, "the client does not read");
        }
    }

    fn place_again(&self, request: &mut Request) {
        let now = Instant::now();
        match self.place(now, request) {
            Ok(()) => {
                if let Some(running) = request.running().filter(|r| r.id.attempt > 0) {
                    let decode = running.decode.as_ref().map(|peer| peer.name.as_str());
                    info!(attempt = %running.id, prefill = running.prefill.name, decode, delivered = request.delivered(), "moved");
                }
            }
            Err(NotPlaced::NoTenant(name)) => request.cancel(FailureKind::TenantGone, &tenant_gone(&name)),
            Err(NotPlaced::NoPlace(NoPlace::Overloaded { .. })) => request.unplaced(now, true, "the cluster is full".into()),
            // A ticket that never left is no failed attempt: a replica that stood still finds all its links ended at once.
            Err(error @ (NotPlaced::NoPlace(_) | NotPlaced::Unsent)) => request.unplaced(now, false, error.to_string()),
        }
    }

    /// Tells the request which of its nodes is lost, or that its tenant is.
    fn look_after(&self, now: Instant, request: &mut Request) {
        let tenant = &request.prompt().tenant;
        if self.cluster.read().tenant(tenant).is_none() {
            let detail = tenant_gone(tenant);
            return request.cancel(FailureKind::TenantGone, &detail);
        }
        let Some(running) = request.running() else { return };
        let lost = {
            let cluster = self.cluster.read();
            let lost = |peer: &&Peer| {
                let placed = now.saturating_duration_since(running.placed());
                let silent = self.nodes.seen(now, &peer.name, peer.epoch).is_none_or(|seen| seen.lost_since(placed));
                silent || cluster.current(peer.node, peer.epoch).is_none()
            };
            running.needs().find(lost).cloned()
        };
        if let Some(peer) = lost {
            info!(attempt = %running.id, node = peer.name, "the node of an attempt is lost");
            request.lost(now, peer.node);
        } else if let Some(peer) = request.decoding().filter(|peer| self.to_be_emptied(now, peer)) {
            tracing::debug!(attempt = %running.id, node = peer.name, "decodes on a node that is drained");
            request.drained(now);
        }
    }

    /// Whether what decodes there is to go on elsewhere: the node is drained, and another can decode.
    fn to_be_emptied(&self, now: Instant, peer: &Peer) -> bool {
        let cluster = self.cluster.read();
        if cluster.current(peer.node, peer.epoch).is_none_or(|node| node.state != NodeState::Draining) {
            return false;
        }
        let seen = |node: &Node| self.nodes.seen(now, &node.name, node.epoch).is_some_and(|seen| seen.usable());
        cluster.nodes().any(|node| node.role == Role::Decode && node.state.usable() && seen(node))
    }
}
