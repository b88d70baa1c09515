//! One QUIC endpoint for each process: it accepts and dials on one UDP port, mutual TLS 1.3 always.
//!
//! Decides the transport settings, and that a peer is who its certificate says: of our cluster, and of the role and name
//! that the dialer wants. What is said on a connection is [`crate::link`]'s and [`crate::cells`]'s.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use millrace_core::message::Role;
use parking_lot::RwLock;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{TransportConfig, VarInt};
use rustls::pki_types::CertificateDer;

use crate::pki::{ALPN, Identity, Leaf, PeerIdentity, PkiError, TLS_NAME};
use crate::socket::CappedSocket;

/// UDP payload of the largest datagram sent or taken: a 9,000-byte Ethernet frame less IPv6 and UDP headers.
pub const DATAGRAM_MAX: u16 = 8952;
/// Unread bytes of one stream that a peer may have on its way.
pub const STREAM_WINDOW: u32 = 16 << 20;
/// Unread bytes of one connection that a peer may have on its way.
pub const RECEIVE_WINDOW: u32 = 256 << 20;
/// Unacknowledged bytes that one connection keeps for sending again.
pub const SEND_WINDOW: u64 = 64 << 20;
/// KV streams that a peer may have open at once.
pub const UNI_STREAMS_MAX: u32 = 1024;
/// Two-way streams that a peer may have open at once; a link uses one.
pub const BIDI_STREAMS_MAX: u32 = 16;
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
}

impl Default for EndpointConfig {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_millis(1500),
            keep_alive: Duration::from_millis(250),
            connect_timeout: Duration::from_secs(3),
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
}

/// What new connections get; those that are open keep what they got.
struct Both {
    near: Arc<Settings>,
    far: Arc<Settings>,
}

struct Settings {
    client: quinn::ClientConfig,
    server: Arc<quinn::ServerConfig>,
}

impl Endpoint {
    /// Binds `addr` (port 0 takes any free one) for accepting and dialing. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// [`BindError`], naming the address.
    pub fn bind(addr: SocketAddr, identity: Identity, config: EndpointConfig) -> Result<Self, BindError> {
        let socket = CappedSocket::bind(addr, DATAGRAM_MAX).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse { addr },
            _ => BindError::Io { addr, source },
        })?;
        let both = Both::new(&identity, &config)?;
        let mut udp = quinn::EndpointConfig::default();
        udp.max_udp_payload_size(DATAGRAM_MAX).map_err(|e| PkiError::Tls(e.to_string()))?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let server = quinn::ServerConfig::clone(&both.far.server);
        let quic = quinn::Endpoint::new_with_abstract_socket(udp, Some(server), Arc::clone(&socket) as _, runtime)
            .map_err(|source| BindError::Io { addr, source })?;
        let (me, settings, counters) = (Arc::new(identity.me), Arc::new(RwLock::new(both)), Arc::default());
        Ok(Self { quic, socket, me, settings, config, counters })
    }

    /// Uses another certificate of the same process for every connection from now on. Those that are open stay.
    ///
    /// # Errors
    /// [`PkiError::Another`] when it is another process's; it does not serve. Nothing has changed then.
    pub fn renew(&self, identity: &Identity) -> Result<(), PkiError> {
        if identity.me != *self.me {
            return Err(PkiError::Another(format!("is for {}, this process is {}", identity.me, self.me)));
        }
        let both = Both::new(identity, &self.config)?;
        self.quic.set_server_config(Some(quinn::ServerConfig::clone(&both.far.server)));
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
        let client = self.settings(addr).client.clone();
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
        self.quic.close(VarInt::from_u32(CloseCode::Done as u32), reason.as_bytes());
        let _ = tokio::time::timeout(GOODBYE, self.quic.wait_idle()).await;
    }

    fn settings(&self, addr: SocketAddr) -> Arc<Settings> {
        let both = self.settings.read();
        Arc::clone(if addr.ip().to_canonical().is_loopback() { &both.near } else { &both.far })
    }

    fn refused(&self, error: ConnectError) -> ConnectError {
        self.counters.refused.fetch_add(1, Relaxed);
        error
    }

    /// Who a finished handshake was with; of our cluster, or an error.
    fn identify(&self, quic: quinn::Connection) -> Result<Connection, ConnectError> {
        let addr = quic.remote_address();
        let chain = quic.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        let peer = chain
            .and_then(|chain| chain.first().map(|leaf| PeerIdentity::from_certificate(leaf)))
            .unwrap_or_else(|| Err(PkiError::Peer("is missing".into())))
            .map_err(|source| {
                quic.close(VarInt::from_u32(CloseCode::Refused as u32), source.to_string().as_bytes());
                self.refused(ConnectError::Certificate { addr, source })
            })?;
        let connection = Connection { quic, peer, counters: Arc::clone(&self.counters) };
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
        let server = Arc::clone(&endpoint.settings(addr).server);
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

impl Both {
    fn new(identity: &Identity, config: &EndpointConfig) -> Result<Self, PkiError> {
        let near = Arc::new(Settings::new(identity, transport(config, true))?);
        Ok(Self { near, far: Arc::new(Settings::new(identity, transport(config, false))?) })
    }
}

impl Settings {
    fn new(identity: &Identity, transport: TransportConfig) -> Result<Self, PkiError> {
        let transport = Arc::new(transport);
        let tls = |e: quinn::crypto::rustls::NoInitialCipherSuite| PkiError::Tls(e.to_string());
        let crypto = QuicServerConfig::try_from(identity.server_tls()?).map_err(tls)?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        server.transport_config(Arc::clone(&transport)).migration(false);
        let crypto = QuicClientConfig::try_from(identity.client_tls()?).map_err(tls)?;
        let mut client = quinn::ClientConfig::new(Arc::new(crypto));
        client.transport_config(transport);
        Ok(Self { client, server: Arc::new(server) })
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

/// Windows for a data centre: 16 MiB a stream is 10 Gb/s at 13 ms. `near` is this machine, whose loopback carries
/// the largest datagram surely; elsewhere the path's MTU is searched.
fn transport(config: &EndpointConfig, near: bool) -> TransportConfig {
    let mut transport = TransportConfig::default();
    let mut cubic = quinn::congestion::CubicConfig::default();
    cubic.initial_window(2 << 20);
    transport
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .send_window(SEND_WINDOW)
        .send_fairness(false)
        .max_concurrent_uni_streams(VarInt::from_u32(UNI_STREAMS_MAX))
        .max_concurrent_bidi_streams(VarInt::from_u32(BIDI_STREAMS_MAX))
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(config.keep_alive))
        .max_idle_timeout(config.idle_timeout.try_into().ok())
        .initial_rtt(Duration::from_millis(5))
        .congestion_controller_factory(Arc::new(cubic));
    if near {
        transport.initial_mtu(DATAGRAM_MAX).min_mtu(DATAGRAM_MAX).mtu_discovery_config(None);
    } else {
        let mut discovery = quinn::MtuDiscoveryConfig::default();
        discovery.upper_bound(DATAGRAM_MAX);
        transport.mtu_discovery_config(Some(discovery));
    }
    transport
}
