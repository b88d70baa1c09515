//! Keeps a link to one peer up: dials, hands the link over, waits for its end, waits a little, dials again.

use std::time::{Duration, Instant};

use millrace_core::message::Hello;
use rand::Rng;
use tokio::sync::{mpsc, watch};

use crate::endpoint::{Endpoint, Target};
use crate::link::{ClosedKind, Link, LinkError, LinkReceiver};
use crate::shutdown::Shutdown;

/// The first wait between two attempts.
pub const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// The longest wait between two attempts, and the life after which a link counts as good.
pub const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// Waits that double from [`BACKOFF_MIN`] to [`BACKOFF_MAX`], each shortened by up to half at random, so that many
/// dialers of one restarted peer do not come at once.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: BACKOFF_MIN }
    }
}

impl Backoff {
    /// The next wait.
    pub fn wait(&mut self) -> Duration {
        let wait = self.next.mul_f64(rand::rng().random_range(0.5..=1.0));
        self.next = (self.next * 2).min(BACKOFF_MAX);
        wait
    }

    /// Starts over.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

/// Runs until `shutdown` begins or the receiver of `up` is dropped. Each link made goes to `up`; the next is dialed
/// when it has ended. `hello` is read anew for every attempt: after a join it says more.
pub async fn keep_connected(
    endpoint: Endpoint,
    target: Target,
    hello: watch::Receiver<Hello>,
    up: mpsc::Sender<(Link, LinkReceiver)>,
    shutdown: Shutdown,
) {
    let mut backoff = Backoff::default();
    let mut last_error = String::new();
    let run = async {
        loop {
            let ours = hello.borrow().clone();
            match Link::dial(&endpoint, &target, &ours).await {
                Ok((link, receiver)) => {
                    tracing::info!(peer = %link.peer(), addr = %target.addr, "link up");
                    last_error.clear();
                    let since = Instant::now();
                    if up.send((link.clone(), receiver)).await.is_err() {
                        return;
                    }
                    let closed = link.closed().await;
                    tracing::info!(peer = %link.peer(), addr = %target.addr, %closed, "link down");
                    // One that ends as soon as it is made must not be dialed in a tight loop.
                    if since.elapsed() > BACKOFF_MAX {
                        backoff.reset();
                    }
                }
                Err(error) => report(&target, &error, &mut last_error),
            }
            tokio::time::sleep(backoff.wait()).await;
        }
    };
    tokio::select! {
        () = run => {}
        _ = shutdown.wait() => {}
        () = up.closed() => {}
    }
}

/// Logs an error once, until another takes its place: loud when only a person can mend it.
fn report(target: &Target, error: &LinkError, last: &mut String) {
    let text = error.to_string();
    if text == *last {
        return;
    }
    let waits = match error {
        LinkError::Connect(crate::endpoint::ConnectError::Timeout { .. }) => true,
        LinkError::Closed { closed, .. } => matches!(closed.kind, ClosedKind::Lost | ClosedKind::Peer),
        _ => false,
    };
    if waits {
        tracing::info!(addr = %target.addr, error = text, "no link yet");
    } else {
        tracing::warn!(addr = %target.addr, error = text, "no link");
    }
    *last = text;
}
