//! How the gateways are, as the front itself sees it: each is asked a few times a second whether it is ready.
//!
//! A process that is killed breaks its connections, and whoever waits on one of them knows at once. One that stands still, or is cut
//! off from its cluster, breaks nothing: that is what this is for.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{Gateway, HttpClient};

/// Time between two questions to one gateway.
pub const PROBE_INTERVAL: Duration = Duration::from_millis(200);
/// A gateway that does not answer in this time is lost.
pub const PROBE_WAIT_MAX: Duration = Duration::from_secs(1);
/// A gateway that says for so long that it is not ready keeps no answer that stands still.
pub const UNREADY_MAX: Duration = Duration::from_millis(500);
/// An answer that brought nothing for so long stands still.
pub const STILL_MAX: Duration = Duration::from_secs(1);

/// How a gateway is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It serves.
    Ready,
    /// It answers, and says that it cannot serve, since then.
    Unready(Instant),
    /// It does not answer.
    Lost,
}

/// What is known of all gateways.
#[derive(Clone, Debug)]
pub struct Health(watch::Receiver<Arc<HashMap<SocketAddr, State>>>);

type Sender = watch::Sender<Arc<HashMap<SocketAddr, State>>>;

impl Health {
    /// Asks the gateways of the list, as it changes, until the list's owner is gone. Must be called on a tokio runtime.
    #[must_use]
    pub fn watch(client: HttpClient, gateways: watch::Receiver<Vec<Gateway>>) -> Self {
        let (states, health) = watch::channel(Arc::default());
        tokio::spawn(follow(client, gateways, states));
        Self(health)
    }

    /// How the gateway at `address` is; `None` before its first answer.
    #[must_use]
    pub fn of(&self, address: SocketAddr) -> Option<State> {
        self.0.borrow().get(&address).copied()
    }

    /// Waits until the gateway at `address` must not be waited for any longer, and says why. `heard` is when it last brought
    /// something. Cancel-safe.
    pub async fn forsaken(&self, address: SocketAddr, heard: Instant) -> &'static str {
        let mut states = self.0.clone();
        loop {
            let due = match judge(&states.borrow_and_update(), address, heard) {
                Verdict::Wait => None,
                Verdict::Until(due) if due > Instant::now() => Some(due),
                Verdict::Until(_) => return "it is not ready, and nothing comes",
                Verdict::Lost => return "it does not answer",
            };
            let due_or_never = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = states.changed() => if changed.is_err() { std::future::pending::<()>().await },
                () = due_or_never => {}
            }
        }
    }
}

/// What is to be thought of a gateway that an answer waits for.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Wait,
    /// It is forsaken then, if nothing changes.
    Until(Instant),
    Lost,
}

fn judge(states: &HashMap<SocketAddr, State>, address: SocketAddr, heard: Instant) -> Verdict {
    let other = states.iter().any(|(at, state)| *at != address && *state == State::Ready);
    match states.get(&address) {
        Some(State::Lost) => Verdict::Lost,
        // Where nobody else can do better, it stays.
        Some(State::Unready(since)) if other => Verdict::Until((*since + UNREADY_MAX).max(heard + STILL_MAX)),
        _ => Verdict::Wait,
    }
}

/// Keeps one asking task for each gateway of the list.
async fn follow(client: HttpClient, mut gateways: watch::Receiver<Vec<Gateway>>, states: Sender) {
    let mut asking: HashMap<SocketAddr, JoinSet<()>> = HashMap::new();
    loop {
        let listed: Vec<SocketAddr> = gateways.borrow_and_update().iter().map(|gateway| gateway.address).collect();
        asking.retain(|address, _| listed.contains(address));
        // One that is not listed any more has no process: whoever still waits for it need not.
        states.send_modify(|states| {
            let states = Arc::make_mut(states);
            states.retain(|_, state| *state != State::Lost);
            states.iter_mut().filter(|(address, _)| !listed.contains(address)).for_each(|(_, state)| *state = State::Lost);
        });
        for address in listed {
            let (client, states) = (client.clone(), states.clone());
            asking.entry(address).or_insert_with(|| {
                let mut set = JoinSet::new();
                set.spawn(ask(client, address, states));
                set
            });
        }
        if gateways.changed().await.is_err() {
            return;
        }
    }
}

async fn ask(client: HttpClient, address: SocketAddr, states: Sender) {
    loop {
        let ready = timeout(PROBE_WAIT_MAX, is_ready(&client, address)).await.ok().flatten();
        states.send_if_modified(|states| {
            let former = states.get(&address).copied();
            let state = match (ready, former) {
                (Some(true), _) => State::Ready,
                (Some(false), Some(State::Unready(since))) => State::Unready(since),
                (Some(false), _) => State::Unready(Instant::now()),
                (None, _) => State::Lost,
            };
            let changed = former != Some(state);
            if changed {
                Arc::make_mut(states).insert(address, state);
            }
            changed
        });
        sleep(PROBE_INTERVAL).await;
    }
}

/// `None` when there is no answer.
async fn is_ready(client: &HttpClient, address: SocketAddr) -> Option<bool> {
    let request = hyper::Request::get(format!("http://{address}/readyz")).body(Full::<Bytes>::default()).ok()?;
    Some(client.request(request).await.ok()?.status().is_success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_lost_is_forsaken_at_once_and_who_is_not_ready_when_others_are_and_nothing_comes() {
        let (here, there) = (SocketAddr::from(([127, 0, 0, 1], 1)), SocketAddr::from(([127, 0, 0, 1], 2)));
        let now = Instant::now();
        let judged = |own, other| {
            let states = [(here, own), (there, other)].into_iter().filter_map(|(at, state)| Some((at, state?)));
            judge(&states.collect(), here, now)
        };
        let unready = Some(State::Unready(now));
        assert_eq!(judged(None, Some(State::Ready)), Verdict::Wait, "nothing is known of it yet");
        assert_eq!(judged(Some(State::Ready), Some(State::Ready)), Verdict::Wait);
        assert_eq!(judged(Some(State::Lost), None), Verdict::Lost);
        assert_eq!(judged(unready, unready), Verdict::Wait, "nobody could do better");
        assert_eq!(judged(unready, Some(State::Ready)), Verdict::Until(now + STILL_MAX));
        let long_ago = Some(State::Unready(now - UNREADY_MAX * 3));
        assert_eq!(judged(long_ago, Some(State::Ready)), Verdict::Until(now + STILL_MAX), "while something comes it stays");
    }
}
