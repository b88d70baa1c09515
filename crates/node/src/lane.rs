//! Lanes: QUIC connections that carry KV beside a link, on a UDP port of their own, so that no control frame waits behind KV: not in a
//! window, not in a socket's buffer, not in a connection's task.
//!
//! Whoever accepted a link says on it where its lanes are taken ([`Message::Lanes`](millrace_core::message::Message::Lanes)). Whoever dialed
//! it opens some, and proves on each that it belongs to the link, by a secret that only the two ends of the link's TLS session can derive.
//! A lane that dies is dialed again while its link lives; a link's end is its lanes' end. What goes over a lane is [`crate::cells`]'s.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use quinn::{RecvStream, VarInt};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

use crate::dial::Backoff;
use crate::endpoint::{BindError, CloseCode, Connection, EndpointConfig, NetCounters, open, who};
use crate::pki::{Identity, PeerIdentity, PkiError, TLS_NAME};
use crate::transport::{Both, Traffic};

/// Lanes of one link; a further one is refused.
pub const LANES_MAX: usize = 8;
/// Lanes of all links of an endpoint; a further one is refused.
pub const LANES_OF_ALL_MAX: usize = 4096;
/// Time for a lane's handshake and its proof.
pub const LANE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long KV waits for the first lane, or for one to come back.
pub const LANE_WAIT: Duration = Duration::from_secs(5);
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

/// There is no lane to send on.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The link has ended, and its lanes with it.
    #[error("the link has ended")]
    Ended,
    /// None came up.
    #[error("no lane within {LANE_WAIT:?}")]
    Timeout,
}

/// Where a process's lanes come and go: one UDP port, apart from the links'.
pub(crate) struct LanePort {
    quic: quinn::Endpoint,
    port: u16,
    lanes: usize,
    settings: RwLock<Both>,
    config: EndpointConfig,
    counters: Arc<NetCounters>,
    /// Links that we accepted, by what their lanes must know.
    accepted: Mutex<HashMap<Secret, Weak<Lanes>>>,
}

impl fmt::Debug for LanePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LanePort({})", self.port)
    }
}

impl LanePort {
    /// Binds any free port of `ip` and takes lanes there from now on. Must be called on a tokio runtime.
    pub(crate) fn bind(
        ip: IpAddr,
        identity: &Identity,
        config: &EndpointConfig,
        counters: &Arc<NetCounters>,
    ) -> Result<Arc<Self>, BindError> {
        let addr = SocketAddr::new(ip, 0);
        let both = Both::new(identity, config, Traffic::Kv)?;
        let (quic, _) = open(addr, &both, config)?;
        let port = quic.local_addr().map_err(|source| BindError::Io { addr, source })?.port();
        let this = Arc::new(Self {
            quic: quic.clone(),
            port,
            lanes: config.lanes.clamp(1, LANES_MAX),
            settings: RwLock::new(both),
            config: config.clone(),
            counters: Arc::clone(counters),
            accepted: Mutex::default(),
        });
        tokio::spawn(take_lanes(quic, Arc::downgrade(&this)));
        Ok(this)
    }

    /// Where peers dial lanes.
    pub(crate) fn port(&self) -> u16 {
        self.port
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

    /// One lane to `addr`, where `lanes` are taken.
    async fn dial(&self, addr: SocketAddr, lanes: &Lanes) -> Result<quinn::Connection, String> {
        let client = self.settings.read().of(addr).client.clone();
        let connecting = self.quic.connect_with(client, addr, TLS_NAME).map_err(|e| e.to_string())?;
        let dialed = async {
            let quic = connecting.await.map_err(|e| e.to_string())?;
            lanes.check(&quic)?;
            let mut proof = quic.open_uni().await.map_err(|e| e.to_string())?;
            proof.write_all(&lanes.secret).await.map_err(|e| e.to_string())?;
            Ok(quic)
        };
        timeout(self.config.connect_timeout, dialed).await.unwrap_or_else(|_| Err("no answer in time".into()))
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
        tokio::spawn(async move {
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

/// The lanes of one link, and the KV streams that arrived on them.
#[derive(Debug)]
pub(crate) struct Lanes {
    port: Option<Arc<LanePort>>,
    peer: PeerIdentity,
    control: quinn::Connection,
    secret: Secret,
    up: Mutex<Vec<quinn::Connection>>,
    /// A lane came up.
    came: Notify,
    dialing: AtomicBool,
    /// Whose turn it is.
    next: AtomicUsize,
    arriving: mpsc::Sender<RecvStream>,
    arrived: tokio::sync::Mutex<mpsc::Receiver<RecvStream>>,
}

impl Lanes {
    /// The lanes of a new link, none yet. They end with it.
    pub(crate) fn of(link: &Connection) -> Arc<Self> {
        let mut secret = Secret::default();
        // Fails only for a length that the hash cannot give; all zeroes would match no other end's.
        let derived = link.quic.export_keying_material(&mut secret, LABEL, b"");
        let (arriving, arrived) = mpsc::channel(STREAMS_MAX);
        let lanes = Arc::new(Self {
            port: link.lane_port.clone().filter(|_| derived.is_ok()),
            peer: link.peer.clone(),
            control: link.quic.clone(),
            secret,
            up: Mutex::default(),
            came: Notify::new(),
            dialing: AtomicBool::new(false),
            next: AtomicUsize::new(0),
            arriving,
            arrived: tokio::sync::Mutex::new(arrived),
        });
        tokio::spawn(end_with_link(Arc::clone(&lanes)));
        lanes
    }

    /// Takes lanes for a link that we accepted; the port to tell the peer. `None` when this process has no KV.
    pub(crate) fn offer(self: &Arc<Self>) -> Option<u16> {
        let port = self.port.as_ref()?;
        port.accepted.lock().insert(self.secret, Arc::downgrade(self));
        Some(port.port())
    }

    /// Opens lanes where the peer takes them, and keeps them up. A second offer changes nothing.
    pub(crate) fn dial(self: &Arc<Self>, at: u16) {
        let Some(port) = &self.port else { return };
        if self.dialing.swap(true, Relaxed) {
            return;
        }
        let addr = SocketAddr::new(self.control.remote_address().ip(), at);
        (0..port.lanes).for_each(|_| drop(tokio::spawn(keep_lane(Arc::clone(self), Arc::clone(port), addr))));
    }

    /// The lane whose turn it is; waits for the first one.
    pub(crate) async fn lane(&self) -> Result<quinn::Connection, LaneError> {
        let pick = async {
            loop {
                let came = self.came.notified();
                tokio::pin!(came);
                came.as_mut().enable();
                if self.control.close_reason().is_some() {
                    return Err(LaneError::Ended);
                }
                if let Some(lane) = self.turn() {
                    return Ok(lane);
                }
                tokio::select! {
                    () = came => {}
                    _ = self.control.closed() => {}
                }
            }
        };
        timeout(LANE_WAIT, pick).await.unwrap_or(Err(LaneError::Timeout))
    }

    /// The lane whose turn it is, if there is any.
    fn turn(&self) -> Option<quinn::Connection> {
        let up = self.up.lock();
        up.get(self.next.fetch_add(1, Relaxed) % up.len().max(1)).cloned()
    }

    /// The next KV stream of the peer; `None` when the link has ended. Cancel-safe.
    pub(crate) async fn stream(&self) -> Option<RecvStream> {
        let mut arrived = self.arrived.lock().await;
        tokio::select! {
            stream = arrived.recv() => stream,
            _ = self.control.closed() => None,
        }
    }

    /// Whether a connection is with the link's own peer; closes it when not.
    fn check(&self, quic: &quinn::Connection) -> Result<(), String> {
        let peer = who(quic).map_err(|e| e.to_string())?;
        if peer == self.peer { Ok(()) } else { Err(refuse(quic, format!("a lane of {peer} to a link of {}", self.peer))) }
    }

    fn add(&self, quic: &quinn::Connection) -> Result<(), String> {
        let mut up = self.up.lock();
        if up.len() >= LANES_MAX {
            return Err(refuse(quic, format!("more than {LANES_MAX} lanes")));
        }
        up.push(quic.clone());
        drop(up);
        self.came.notify_waiters();
        // The link may have ended since it was looked up, and its lanes with it.
        if self.control.close_reason().is_some() {
            quic.close(DONE, b"the link has ended");
        }
        Ok(())
    }

    fn remove(&self, quic: &quinn::Connection) {
        self.up.lock().retain(|lane| lane.stable_id() != quic.stable_id());
    }

    /// Passes a lane's streams on until it ends.
    async fn take_streams(&self, quic: quinn::Connection) {
        while let Ok(stream) = quic.accept_uni().await {
            tokio::select! {
                sent = self.arriving.send(stream) => assert!(sent.is_ok(), "we hold the receiver"),
                _ = quic.closed() => {}
            }
        }
        self.remove(&quic);
    }
}

/// Closes what is left of a link: its lanes, and the streams that nobody took.
async fn end_with_link(lanes: Arc<Lanes>) {
    lanes.control.closed().await;
    if let Some(port) = &lanes.port {
        port.accepted.lock().remove(&lanes.secret);
    }
    for lane in lanes.up.lock().drain(..) {
        lane.close(DONE, b"the link has ended");
    }
    lanes.came.notify_waiters();
}

/// Keeps one lane up while its link lives.
async fn keep_lane(lanes: Arc<Lanes>, port: Arc<LanePort>, addr: SocketAddr) {
    let mut backoff = Backoff::default();
    let keep = async {
        loop {
            match port.dial(addr, &lanes).await.and_then(|quic| lanes.add(&quic).map(|()| quic)) {
                Ok(quic) => {
                    let reason = quic.closed().await;
                    lanes.remove(&quic);
                    tracing::debug!(peer = %lanes.peer, %reason, "lane down");
                }
                Err(reason) => tracing::debug!(peer = %lanes.peer, reason, "no lane yet"),
            }
            tokio::time::sleep(backoff.wait()).await;
        }
    };
    tokio::select! {
        () = keep => {}
        _ = lanes.control.closed() => {}
    }
}
