//! Lanes: QUIC connections that carry KV beside a link, on a UDP port of their own, so that no control frame waits behind KV: not in a
//! window, not in a socket's buffer, not in a connection's task.
//!
//! Whoever accepted a link says on it where its lanes are taken ([`Message::Lanes`](millrace_core::message::Message::Lanes)). Whoever dialed
//! it opens them, and proves on each that it belongs to the link, by a secret that only the two ends of the link's TLS session can derive.
//! A link between nodes is up when its lanes are, and ends with the first of them that is lost: so there is one way to go on after a loss,
//! a new link, and a closed port reads as a node that cannot be reached (decision 47). What goes over a lane is [`crate::cells`]'s.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use quinn::{ConnectionError, RecvStream, VarInt};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use crate::endpoint::{BindError, CloseCode, Connection, EndpointConfig, NetCounters, explain, open, who};
use crate::pki::{Identity, PeerIdentity, PkiError, TLS_NAME};
use crate::threads::{LaneThread, LaneThreads};
use crate::transport::{Both, Traffic};

/// Lanes of one link; a further one is refused.
pub const LANES_MAX: usize = 8;
/// Lanes of all links of an endpoint; a further one is refused.
pub const LANES_OF_ALL_MAX: usize = 4096;
/// Time for a lane that a peer opens to prove whose it is.
pub const LANE_TIMEOUT: Duration = Duration::from_secs(5);
/// KV streams that wait to be read, of one link; at more its lanes take no further one, so that QUIC's own bound holds the peer.
const STREAMS_MAX: usize = 64;
/// What the secret of a link is derived for.
const LABEL: &[u8] = b"millrace lane";
/// Closed, not refused: nothing left to say.
const DONE: VarInt = VarInt::from_u32(CloseCode::Done as u32);

/// Lanes that suit a machine: one core fills one.
#[must_use]
pub const fn lanes_for(cores: usize) -> usize {
    match cores / 4 {
        0 | 1 => 1,
        2 => 2,
        3 => 3,
        _ => 4,
    }
}

/// What only the two ends of one link know.
type Secret = [u8; 32];

/// A link's lanes did not come up.
#[derive(Debug, thiserror::Error)]
#[error("no connection for KV at UDP {addr} ({reason}); is that port open between the nodes?")]
pub struct LaneError {
    /// Where the peer says that it takes them.
    pub addr: SocketAddr,
    /// Why not.
    pub reason: String,
}

/// Where a process's lanes come and go: one UDP port, apart from the links'.
pub(crate) struct LanePort {
    quic: quinn::Endpoint,
    /// What peers are told to dial.
    told: u16,
    lanes: usize,
    threads: LaneThreads,
    settings: RwLock<Both>,
    config: EndpointConfig,
    counters: Arc<NetCounters>,
    /// Links that we accepted, by what their lanes must know.
    accepted: Mutex<HashMap<Secret, Weak<Lanes>>>,
}

impl fmt::Debug for LanePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LanePort({})", self.told)
    }
}

impl LanePort {
    /// Binds `addr` (port 0 takes any free one) and takes lanes there from now on, on threads of its own: as many as a link has lanes.
    pub(crate) fn bind(
        addr: SocketAddr,
        identity: &Identity,
        config: &EndpointConfig,
        counters: &Arc<NetCounters>,
    ) -> Result<Arc<Self>, BindError> {
        let both = Both::new(identity, config, Traffic::Kv)?;
        let lanes = config.lanes.clamp(1, LANES_MAX);
        let threads = LaneThreads::start(lanes).map_err(|source| BindError::Io { addr, source })?;
        let on = threads.first();
        let (quic, _) = {
            let _there = on.handle().enter();
            open(addr, &both, config)?
        };
        let port = quic.local_addr().map_err(|source| BindError::Io { addr, source })?.port();
        let this = Arc::new(Self {
            quic: quic.clone(),
            told: config.lanes_advertise.unwrap_or(port),
            lanes,
            threads,
            settings: RwLock::new(both),
            config: config.clone(),
            counters: Arc::clone(counters),
            accepted: Mutex::default(),
        });
        on.spawn(take_lanes(quic, Arc::downgrade(&this)));
        Ok(this)
    }

    pub(crate) fn renew(&self, identity: &Identity) -> Result<(), PkiError> {
        let both = Both::new(identity, &self.config, Traffic::Kv)?;
        self.quic.set_server_config(Some(both.server()));
        *self.settings.write() = both;
        Ok(())
    }

    pub(crate) fn close(&self) {
        self.quic.close(DONE, b"the endpoint closes");
    }

    /// One lane to `addr`, where the peer takes those of the link.
    async fn dial(&self, addr: SocketAddr, lanes: &Lanes) -> Result<quinn::Connection, String> {
        let client = self.settings.read().of(addr).client.clone();
        let connecting = self.quic.connect_with(client, addr, TLS_NAME).map_err(|e| e.to_string())?;
        let dialed = async {
            let quic = connecting.await.map_err(|e| explain(&e))?;
            lanes.check(&quic)?;
            let mut proof = quic.open_uni().await.map_err(|e| e.to_string())?;
            proof.write_all(&lanes.secret).await.map_err(|e| e.to_string())?;
            Ok(quic)
        };
        timeout(self.config.connect_timeout, dialed)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {:?}", self.config.connect_timeout)))
    }

    /// Does the handshake of a lane, and finds its link.
    async fn accept(&self, incoming: quinn::Incoming) -> Result<(quinn::Connection, Arc<Lanes>), String> {
        let server = Arc::clone(&self.settings.read().of(incoming.remote_address()).server);
        let quic = incoming.accept_with(server).map_err(|e| e.to_string())?.await.map_err(|e| e.to_string())?;
        let mut secret = Secret::default();
        let mut proof = quic.accept_uni().await.map_err(|e| e.to_string())?;
        proof.read_exact(&mut secret).await.map_err(|e| e.to_string())?;
        let lanes = self.accepted.lock().get(&secret).and_then(Weak::upgrade);
        let Some(lanes) = lanes else { return Err(refuse(&quic, "no link of this secret".into())) };
        lanes.check(&quic)?;
        Ok((quic, lanes))
    }
}

/// Closes a connection that is no lane of ours; the reason, for the log too.
fn refuse(quic: &quinn::Connection, reason: String) -> String {
    quic.close(VarInt::from_u32(CloseCode::Refused as u32), reason.as_bytes());
    reason
}

/// Takes lanes until the port is gone. Each is proven in a task of its own.
async fn take_lanes(quic: quinn::Endpoint, port: Weak<LanePort>) {
    while let Some(incoming) = quic.accept().await {
        let Some(port) = port.upgrade() else { return };
        if quic.open_connections() >= LANES_OF_ALL_MAX {
            port.counters.refused.fetch_add(1, Relaxed);
            incoming.refuse();
            continue;
        }
        let thread = port.threads.next();
        thread.spawn(async move {
            let peer = incoming.remote_address();
            let proven = timeout(LANE_TIMEOUT, port.accept(incoming)).await;
            let result = match proven.unwrap_or_else(|_| Err("no proof in time".into())) {
                Ok((quic, lanes)) => lanes.add(&quic).map(|()| (quic, lanes)),
                Err(reason) => Err(reason),
            };
            match result {
                Ok((quic, lanes)) => lanes.take_streams(quic).await,
                Err(reason) => {
                    port.counters.refused.fetch_add(1, Relaxed);
                    tracing::warn!(%peer, reason, "lane refused");
                }
            }
        });
    }
}

/// One lane to send on.
#[derive(Clone, Debug)]
pub struct Lane {
    /// The connection.
    pub quic: quinn::Connection,
    thread: LaneThread,
}

impl Lane {
    /// Runs `task` on the thread that the lane lives on, where it writes without waking another. It must not block for long.
    pub fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.thread.spawn(task)
    }
}

/// A KV stream of the peer that nobody has read yet.
#[derive(Debug)]
pub struct Arriving {
    /// The stream.
    pub stream: RecvStream,
    thread: LaneThread,
}

impl Arriving {
    /// Reads it on the thread that its lane lives on, where its bytes are. It must not block for long.
    pub fn read_by<F>(self, read: impl FnOnce(RecvStream) -> F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.thread.spawn(read(self.stream))
    }
}

/// The lanes of one link, and the KV streams that arrived on them.
#[derive(Debug)]
pub(crate) struct Lanes {
    port: Option<Arc<LanePort>>,
    peer: PeerIdentity,
    control: quinn::Connection,
    secret: Secret,
    /// Whether we opened them: only then KV leaves on them.
    ours: bool,
    up: Mutex<Vec<Lane>>,
    /// Whose turn it is.
    next: AtomicUsize,
    /// Why the first of them was lost.
    lost: watch::Sender<Option<String>>,
    arriving: mpsc::Sender<Arriving>,
    arrived: tokio::sync::Mutex<mpsc::Receiver<Arriving>>,
}

impl Lanes {
    /// The lanes of a new link that we dialed, or did not: none yet.
    pub(crate) fn of(link: &Connection, dialed: bool) -> Arc<Self> {
        let mut secret = Secret::default();
        // Fails only for a length that the hash cannot give; all zeroes would match no other end's.
        let derived = link.quic.export_keying_material(&mut secret, LABEL, b"");
        let (arriving, arrived) = mpsc::channel(STREAMS_MAX);
        Arc::new(Self {
            port: link.lane_port.clone().filter(|_| derived.is_ok()),
            peer: link.peer.clone(),
            control: link.quic.clone(),
            secret,
            ours: dialed,
            up: Mutex::default(),
            next: AtomicUsize::new(0),
            lost: watch::Sender::default(),
            arriving,
            arrived: tokio::sync::Mutex::new(arrived),
        })
    }

    /// Whether this process has any KV.
    pub(crate) fn carry(&self) -> bool {
        self.port.is_some()
    }

    /// Takes lanes for a link that we accepted; the port to tell the peer. `None` when this process has no KV.
    pub(crate) fn offer(self: &Arc<Self>) -> Option<u16> {
        let port = self.port.as_ref()?;
        port.accepted.lock().insert(self.secret, Arc::downgrade(self));
        Some(port.told)
    }

    /// Opens all lanes where the peer takes them.
    pub(crate) async fn dial(self: &Arc<Self>, at: u16) -> Result<(), LaneError> {
        let addr = SocketAddr::new(self.control.remote_address().ip(), at);
        let Some(port) = &self.port else { return Ok(()) };
        let mut dialing = JoinSet::new();
        for _ in 0..port.lanes {
            let (lanes, port) = (Arc::clone(self), Arc::clone(port));
            let thread = port.threads.next();
            let dial = async move { lanes.add(&port.dial(addr, &lanes).await?) };
            dialing.spawn_on(dial, thread.handle());
        }
        while let Some(dialed) = dialing.join_next().await {
            let added = dialed.map_err(|e| e.to_string()).flatten();
            added.map_err(|reason| LaneError { addr, reason })?;
        }
        // A dialer that sends no KV back is sent none: nobody takes streams here.
        for lane in self.up.lock().iter().cloned() {
            let lanes = Arc::clone(self);
            tokio::spawn(async move { lanes.watch(&lane.quic).await });
        }
        Ok(())
    }

    /// The lane whose turn it is; `None` when there is none to send on.
    pub(crate) fn lane(&self) -> Option<Lane> {
        let up = self.up.lock();
        let turn = self.next.fetch_add(1, Relaxed) % up.len().max(1);
        up.get(turn).filter(|_| self.ours).cloned()
    }

    /// The next KV stream of the peer; `None` when the link has ended. Cancel-safe.
    pub(crate) async fn stream(&self) -> Option<Arriving> {
        let mut arrived = self.arrived.lock().await;
        tokio::select! {
            stream = arrived.recv() => stream,
            _ = self.control.closed() => None,
        }
    }

    /// Waits until a lane is lost while its link lives, and says why.
    pub(crate) async fn lost(&self) -> String {
        let mut lost = self.lost.subscribe();
        let reason = lost.wait_for(Option::is_some).await.expect("we hold the sender").clone();
        reason.expect("waited for")
    }

    /// The link has ended: so do its lanes, and no further one is taken.
    pub(crate) fn end(&self) {
        if let Some(port) = &self.port {
            port.accepted.lock().remove(&self.secret);
        }
        self.up.lock().drain(..).for_each(|lane| lane.quic.close(DONE, b"the link has ended"));
    }

    /// Whether a connection is with the link's own peer; closes it when not.
    fn check(&self, quic: &quinn::Connection) -> Result<(), String> {
        let peer = who(quic).map_err(|e| e.to_string())?;
        if peer == self.peer { Ok(()) } else { Err(refuse(quic, format!("a lane of {peer} to a link of {}", self.peer))) }
    }

    /// Adds a lane that lives on the thread that this is called on.
    fn add(&self, quic: &quinn::Connection) -> Result<(), String> {
        let mut up = self.up.lock();
        if up.len() >= LANES_MAX {
            return Err(refuse(quic, format!("more than {LANES_MAX} lanes")));
        }
        up.push(Lane { quic: quic.clone(), thread: LaneThread::current() });
        drop(up);
        // The link may have ended since it was looked up, and its lanes with it.
        if self.control.close_reason().is_some() {
            quic.close(DONE, b"the link has ended");
        }
        Ok(())
    }

    /// Passes a lane's streams on until it ends.
    async fn take_streams(&self, quic: quinn::Connection) {
        while let Ok(stream) = quic.accept_uni().await {
            tokio::select! {
                sent = self.arriving.send(Arriving { stream, thread: LaneThread::current() }) => assert!(sent.is_ok(), "we hold the receiver"),
                _ = quic.closed() => {}
            }
        }
        self.watch(&quic).await;
    }

    /// Waits for a lane's end. One that the peer closes as done ends with its link, of which the link itself will say more.
    async fn watch(&self, quic: &quinn::Connection) {
        match quic.closed().await {
            ConnectionError::ApplicationClosed(close) if close.error_code == DONE => {}
            error => drop(self.lost.send_replace(Some(explain(&error)))),
        }
    }
}
