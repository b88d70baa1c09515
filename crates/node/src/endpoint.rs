//! One QUIC endpoint for each process: it accepts and dials on one UDP port, mutual TLS 1.3 always.
//!
//! Decides that a peer is who its certificate says: of our cluster, and of the role and name that the dialer wants. Settings are
//! [`crate::transport`]'s, what is said on a connection is [`crate::link`]'s. A node has a second port for KV, [`crate::lane`]'s.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use millrace_core::message::Role;
use parking_lot::RwLock;
use quinn::VarInt;
use rustls::pki_types::CertificateDer;

use crate::lane::LanePort;
use crate::pki::{ALPN, Identity, Leaf, PeerIdentity, PkiError, TLS_NAME};
use crate::socket::CappedSocket;
use crate::transport::{Both, DATAGRAM_MAX, Traffic};

/// Connections of one endpoint; more are refused.
pub const CONNECTIONS_MAX: usize = 4096;
/// Time for the last packets of a closing endpoint.
const GOODBYE: Duration = Duration::from_secs(1);

/// What may be set about an endpoint.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// A peer that is silent this long is lost: six keep-alives, since the processors are busy computing. Whoever waits for a killed
    /// process waits for this.
    pub idle_timeout: Duration,
    /// Each side says something at least this often.
    pub keep_alive: Duration,
    /// Time for a handshake.
    pub connect_timeout: Duration,
    /// UDP payload of the largest datagram sent or taken. The path's own limit is searched for below it.
    pub datagram_max: u16,
    /// Connections for KV beside each link that this side dials; one is as fast as one core.
    pub lanes: usize,
    /// UDP port for KV, at a node; 0 takes any free one.
    pub lanes_port: u16,
    /// The port that peers dial for KV, of the address that they dial us at, when it is another than the one we listen at.
    pub lanes_advertise: Option<u16>,
}

impl Default for EndpointConfig {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_millis(1500),
            keep_alive: Duration::from_millis(250),
            connect_timeout: Duration::from_secs(3),
            datagram_max: DATAGRAM_MAX,
            lanes: crate::lane::lanes_for(std::thread::available_parallelism().map_or(1, usize::from)),
            lanes_port: 0,
            lanes_advertise: None,
        }
    }
}

/// What happened on an endpoint since it was bound.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Connections made by us.
    pub dialed: AtomicU64,
    /// Connections made by peers.
    pub accepted: AtomicU64,
    /// Handshakes and first words that failed: certificate, role, name, cluster, model.
    pub refused: AtomicU64,
    /// Links closed because the peer did not read.
    pub slow_readers: AtomicU64,
    /// Links closed because the peer sent what its role may not.
    pub violations: AtomicU64,
    /// Links closed because of bytes that are no frame.
    pub bad_frames: AtomicU64,
    /// Links whose peer fell silent.
    pub lost: AtomicU64,
}

/// An endpoint could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The port belongs to another process.
    #[error("{addr}: the UDP port is in use by another process")]
    InUse {
        /// The address asked for.
        addr: SocketAddr,
    },
    /// Another reason of the system's.
    #[error("{addr}: {source}")]
    Io {
        /// The address asked for.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The certificates do not serve.
    #[error(transparent)]
    Pki(#[from] PkiError),
}

/// A connection could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// It could not be tried.
    #[error("{addr}: {source}")]
    Start {
        /// Where to.
        addr: SocketAddr,
        /// Why not.
        source: quinn::ConnectError,
    },
    /// No answer in time.
    #[error("{addr}: no answer within {waited:?}")]
    Timeout {
        /// Where to.
        addr: SocketAddr,
        /// How long.
        waited: Duration,
    },
    /// The handshake failed: certificates, protocol, or the peer closed.
    #[error("{addr}: {}", explain(source))]
    Handshake {
        /// Where to or from.
        addr: SocketAddr,
        /// What QUIC said.
        source: quinn::ConnectionError,
    },
    /// The peer has a certificate of our authority, but not the right one.
    #[error("{addr}: {field} is {got:?}, not {want:?}")]
    WrongPeer {
        /// Where to or from.
        addr: SocketAddr,
        /// `cluster`, `role` or `name`.
        field: &'static str,
        /// What the certificate says.
        got: String,
        /// What was expected.
        want: String,
    },
    /// The peer's certificate does not say who it is.
    #[error("{addr}: {source}")]
    Certificate {
        /// Where to or from.
        addr: SocketAddr,
        /// What is wrong with it.
        source: PkiError,
    },
}

/// Whom to dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Where its endpoint listens.
    pub addr: SocketAddr,
    /// The role its certificate must give.
    pub role: Role,
    /// The name its certificate must give; `None` takes any.
    pub name: Option<String>,
}

/// Why we close a connection, as the number that goes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseCode {
    /// Nothing left to say.
    Done = 0,
    /// The first words did not fit.
    Refused = 1,
    /// The peer sent what its role may not.
    Violation = 2,
    /// The peer sent what is no frame.
    BadFrame = 3,
    /// The peer does not read.
    SlowReader = 4,
}

/// A connection to a proven peer.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The QUIC connection.
    pub quic: quinn::Connection,
    /// Who is at the other end.
    pub peer: PeerIdentity,
    /// The endpoint's counters.
    pub counters: Arc<NetCounters>,
    /// Where the KV beside it goes; `None` for those who have none.
    pub(crate) lane_port: Option<Arc<LanePort>>,
}

impl Connection {
    /// The certificate that the peer showed; `None` when the connection has forgotten it.
    #[must_use]
    pub fn leaf(&self) -> Option<Leaf> {
        let chain = self.quic.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
        Leaf::of(chain.first()?).ok()
    }

    /// Closes it at once; what is not sent yet is lost.
    pub fn close(&self, code: CloseCode, reason: &str) {
        let reason = &reason.as_bytes()[..reason.len().min(512)];
        self.quic.close(VarInt::from_u32(code as u32), reason);
    }
}

/// The endpoint. Clones share it.
#[derive(Clone)]
pub struct Endpoint {
    quic: quinn::Endpoint,
    socket: Arc<CappedSocket>,
    me: Arc<PeerIdentity>,
    settings: Arc<RwLock<Both>>,
    config: EndpointConfig,
    counters: Arc<NetCounters>,
    lane_port: Option<Arc<LanePort>>,
}

impl Endpoint {
    /// Binds `addr` (port 0 takes any free one) for accepting and dialing. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// [`BindError`], naming the address.
    pub fn bind(addr: SocketAddr, identity: Identity, config: EndpointConfig) -> Result<Self, BindError> {
        let both = Both::new(&identity, &config, Traffic::Control)?;
        let (quic, socket) = open(addr, &both, &config)?;
        let (me, settings, counters) = (Arc::new(identity.me.clone()), Arc::new(RwLock::new(both)), Arc::default());
        let lane_port = match me.role {
            Role::Prefill | Role::Decode => {
                Some(LanePort::bind(SocketAddr::new(addr.ip(), config.lanes_port), &identity, &config, &counters)?)
            }
            _ => None,
        };
        Ok(Self { quic, socket, me, settings, config, counters, lane_port })
    }

    /// Uses another certificate of the same process for every connection from now on. Those that are open stay.
    ///
    /// # Errors
    /// [`PkiError::Another`] when it is another process's; it does not serve. Nothing has changed then.
    pub fn renew(&self, identity: &Identity) -> Result<(), PkiError> {
        if identity.me != *self.me {
            return Err(PkiError::Another(format!("is for {}, this process is {}", identity.me, self.me)));
        }
        let both = Both::new(identity, &self.config, Traffic::Control)?;
        self.lane_port.as_ref().map_or(Ok(()), |port| port.renew(identity))?;
        self.quic.set_server_config(Some(both.server()));
        *self.settings.write() = both;
        Ok(())
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.quic.local_addr()
    }

    /// Who we are.
    #[must_use]
    pub fn me(&self) -> &PeerIdentity {
        &self.me
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> &Arc<NetCounters> {
        &self.counters
    }

    /// What went through the socket so far.
    #[must_use]
    pub fn socket(&self) -> &CappedSocket {
        &self.socket
    }

    /// Dials, and proves that the peer is the one meant.
    ///
    /// # Errors
    /// [`ConnectError`]; the connection is closed with the reason when the peer is another than `target` says.
    pub async fn connect(&self, target: &Target) -> Result<Connection, ConnectError> {
        let addr = target.addr;
        let client = self.settings.read().of(addr).client.clone();
        let connecting = self.quic.connect_with(client, addr, TLS_NAME).map_err(|source| ConnectError::Start { addr, source })?;
        let quic = match tokio::time::timeout(self.config.connect_timeout, connecting).await {
            Err(_) => return Err(ConnectError::Timeout { addr, waited: self.config.connect_timeout }),
            Ok(done) => done.map_err(|source| self.refused(ConnectError::Handshake { addr, source }))?,
        };
        let connection = self.identify(quic)?;
        let name = target.name.as_ref().unwrap_or(&connection.peer.name);
        self.expect(&connection, "role", connection.peer.role.as_str(), target.role.as_str())?;
        self.expect(&connection, "name", &connection.peer.name, name)?;
        self.counters.dialed.fetch_add(1, Relaxed);
        Ok(connection)
    }

    /// The next peer that dials us, its handshake not done yet: run [`Accepting::finish`] in its own task.
    /// `None` when the endpoint is closed. Refuses by itself above [`CONNECTIONS_MAX`].
    pub async fn accept(&self) -> Option<Accepting> {
        loop {
            let incoming = self.quic.accept().await?;
            if self.quic.open_connections() < CONNECTIONS_MAX {
                return Some(Accepting { incoming, endpoint: self.clone() });
            }
            tracing::warn!(peer = %incoming.remote_address(), max = CONNECTIONS_MAX, "too many connections");
            self.counters.refused.fetch_add(1, Relaxed);
            incoming.refuse();
        }
    }

    /// Closes every connection with `reason` and waits a little until the peers know.
    pub async fn close(&self, reason: &str) {
        self.lane_port.iter().for_each(|port| port.close());
        self.quic.close(VarInt::from_u32(CloseCode::Done as u32), reason.as_bytes());
        let _ = tokio::time::timeout(GOODBYE, self.quic.wait_idle()).await;
    }

    fn refused(&self, error: ConnectError) -> ConnectError {
        self.counters.refused.fetch_add(1, Relaxed);
        error
    }

    /// Who a finished handshake was with; of our cluster, or an error.
    fn identify(&self, quic: quinn::Connection) -> Result<Connection, ConnectError> {
        let addr = quic.remote_address();
        let peer = who(&quic).map_err(|source| self.refused(ConnectError::Certificate { addr, source }))?;
        let connection = Connection { quic, peer, counters: Arc::clone(&self.counters), lane_port: self.lane_port.clone() };
        self.expect(&connection, "cluster", &connection.peer.cluster, &self.me.cluster)?;
        Ok(connection)
    }

    fn expect(&self, connection: &Connection, field: &'static str, got: &str, want: &str) -> Result<(), ConnectError> {
        if got == want {
            return Ok(());
        }
        connection.close(CloseCode::Refused, &format!("{field} of your certificate is {got}, expected {want}"));
        let (addr, got, want) = (connection.quic.remote_address(), got.to_owned(), want.to_owned());
        Err(self.refused(ConnectError::WrongPeer { addr, field, got, want }))
    }
}

/// A QUIC endpoint of ours on a socket of its own.
pub(crate) fn open(
    addr: SocketAddr,
    both: &Both,
    config: &EndpointConfig,
) -> Result<(quinn::Endpoint, Arc<CappedSocket>), BindError> {
    let socket = CappedSocket::bind(addr, config.datagram_max).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => BindError::InUse { addr },
        _ => BindError::Io { addr, source },
    })?;
    let mut udp = quinn::EndpointConfig::default();
    udp.max_udp_payload_size(config.datagram_max).map_err(|e| PkiError::Tls(e.to_string()))?;
    let runtime = Arc::new(quinn::TokioRuntime);
    let quic = quinn::Endpoint::new_with_abstract_socket(udp, Some(both.server()), Arc::clone(&socket) as _, runtime)
        .map_err(|source| BindError::Io { addr, source })?;
    Ok((quic, socket))
}

/// Who a finished handshake was with; closes the connection when the certificate does not say.
pub(crate) fn who(quic: &quinn::Connection) -> Result<PeerIdentity, PkiError> {
    let chain = quic.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let leaf = chain.as_ref().and_then(|chain| chain.first());
    let peer = leaf.map_or_else(|| Err(PkiError::Peer("is missing".into())), |leaf| PeerIdentity::from_certificate(leaf));
    peer.inspect_err(|source| quic.close(VarInt::from_u32(CloseCode::Refused as u32), source.to_string().as_bytes()))
}

/// A peer that dials us, before its handshake.
pub struct Accepting {
    incoming: quinn::Incoming,
    endpoint: Endpoint,
}

impl Accepting {
    /// Does the handshake.
    ///
    /// # Errors
    /// [`ConnectError`]: no certificate of our authority, another cluster, or no answer in time.
    pub async fn finish(self) -> Result<Connection, ConnectError> {
        let (addr, endpoint) = (self.incoming.remote_address(), self.endpoint);
        let handshake = |source| ConnectError::Handshake { addr, source };
        let server = Arc::clone(&endpoint.settings.read().of(addr).server);
        let connecting = self.incoming.accept_with(server).map_err(|e| endpoint.refused(handshake(e)))?;
        let quic = match tokio::time::timeout(endpoint.config.connect_timeout, connecting).await {
            Err(_) => return Err(ConnectError::Timeout { addr, waited: endpoint.config.connect_timeout }),
            Ok(done) => done.map_err(|e| endpoint.refused(handshake(e)))?,
        };
        let connection = endpoint.identify(quic)?;
        endpoint.counters.accepted.fetch_add(1, Relaxed);
        Ok(connection)
    }
}

/// A connection's end in words, with what the TLS alerts of a foreign authority mean.
pub(crate) fn explain(error: &quinn::ConnectionError) -> String {
    // RFC 9001 4.8: alerts are 0x100 + code; 48 is unknown_ca, 51 decrypt_error (an authority of the same name, another key).
    // 120 is no_application_protocol.
    let foreign = |code: u64| matches!(code, 0x130 | 0x133);
    let speaks = String::from_utf8_lossy(ALPN);
    match error {
        quinn::ConnectionError::TransportError(e) if foreign(e.code.into()) => {
            format!("the peer's certificate is signed by another authority than our ca.pem ({error})")
        }
        quinn::ConnectionError::ConnectionClosed(e) if foreign(e.error_code.into()) => {
            format!("our certificate is signed by another authority than the peer's ca.pem ({error})")
        }
        quinn::ConnectionError::ConnectionClosed(e) if u64::from(e.error_code) == 0x178 => {
            format!("the peer speaks another protocol than our {speaks} ({error})")
        }
        other => other.to_string(),
    }
}
