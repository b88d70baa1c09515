//! The settings of QUIC connections: windows, datagram sizes, congestion control, for control and for KV, near and far.
//!
//! Decides numbers only. Bounds of memory follow from them: a peer can make us keep a connection's window of unread bytes, and we keep
//! a send window of what it has not acknowledged.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{TransportConfig, VarInt};

use crate::endpoint::EndpointConfig;
use crate::pki::{ALPN, Identity, KV_ALPN, PkiError};

/// UDP payload of the largest datagram unless set otherwise: a 9,000-byte Ethernet frame less IPv6 and UDP headers.
pub const DATAGRAM_MAX: u16 = 8952;
/// Datagrams that a connection begins with, at most: quinn writes the length of a handshake's packet in 14 bits and stops the process
/// at more.
pub const FIRST_DATAGRAM_MAX: u16 = 16_000;
/// Unread bytes of one control stream that a peer may have on its way.
pub const STREAM_WINDOW: u32 = 16 << 20;
/// Bytes of a control connection that are unread, or not acknowledged.
pub const CONTROL_WINDOW: u32 = 64 << 20;
/// Unread bytes of one KV stream that a peer may have on its way: a whole span, so that a stream whose receiver has given up can always be
/// sent to its end.
pub const KV_STREAM_WINDOW: u32 = 16 << 20;
/// Unread bytes of one KV connection: 100 Gb/s at 1.3 ms. What waits longer than it must has left the processor's caches when it is copied.
pub const KV_RECEIVE_WINDOW: u32 = 16 << 20;
/// Unacknowledged bytes of one KV connection: 100 Gb/s at 0.6 ms, 10 Gb/s at 6 ms. quinn looks for a packet's bytes among all that are not
/// acknowledged, one cell after the other, so more is not faster.
pub const KV_SEND_WINDOW: u64 = 8 << 20;
/// KV streams that a peer may have open at once on one connection; a further one waits at the peer.
pub const KV_STREAMS_MAX: u32 = 256;
/// Two-way streams that a peer may have open at once; a link uses one.
pub const BIDI_STREAMS_MAX: u32 = 16;
/// What a connection may send before the first acknowledgement.
const FIRST_WINDOW: u64 = 2 << 20;

/// What a connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Traffic {
    /// Messages; no KV, so no one-way stream at all.
    Control,
    /// KV.
    Kv,
}

/// What new connections get; those that are open keep what they got. `near` is this machine, whose loopback carries
/// the largest datagram surely; elsewhere the path's MTU is searched.
pub(crate) struct Both {
    near: Settings,
    far: Settings,
}

/// Both directions of connecting.
pub(crate) struct Settings {
    pub(crate) client: quinn::ClientConfig,
    pub(crate) server: Arc<quinn::ServerConfig>,
}

impl Both {
    pub(crate) fn new(identity: &Identity, config: &EndpointConfig, traffic: Traffic) -> Result<Self, PkiError> {
        let settings = |near| Settings::new(identity, transport(config, traffic, near), traffic);
        Ok(Self { near: settings(true)?, far: settings(false)? })
    }

    pub(crate) fn of(&self, addr: SocketAddr) -> &Settings {
        if addr.ip().to_canonical().is_loopback() { &self.near } else { &self.far }
    }

    /// For connections whose address is not known yet.
    pub(crate) fn server(&self) -> quinn::ServerConfig {
        quinn::ServerConfig::clone(&self.far.server)
    }
}

impl Settings {
    fn new(identity: &Identity, transport: TransportConfig, traffic: Traffic) -> Result<Self, PkiError> {
        let transport = Arc::new(transport);
        let alpn = if traffic == Traffic::Kv { KV_ALPN } else { ALPN };
        let tls = |e: quinn::crypto::rustls::NoInitialCipherSuite| PkiError::Tls(e.to_string());
        let crypto = QuicServerConfig::try_from(identity.server_tls(alpn)?).map_err(tls)?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        server.transport_config(Arc::clone(&transport)).migration(false);
        let crypto = QuicClientConfig::try_from(identity.client_tls(alpn)?).map_err(tls)?;
        let mut client = quinn::ClientConfig::new(Arc::new(crypto));
        client.transport_config(transport);
        Ok(Self { client, server: Arc::new(server) })
    }
}

fn transport(config: &EndpointConfig, traffic: Traffic, near: bool) -> TransportConfig {
    let mut transport = TransportConfig::default();
    let mut cubic = quinn::congestion::CubicConfig::default();
    cubic.initial_window(FIRST_WINDOW);
    transport
        .send_fairness(false)
        .max_concurrent_bidi_streams(VarInt::from_u32(BIDI_STREAMS_MAX))
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(config.keep_alive))
        .max_idle_timeout(config.idle_timeout.try_into().ok())
        .initial_rtt(Duration::from_millis(5))
        .congestion_controller_factory(Arc::new(cubic));
    match traffic {
        Traffic::Control => transport
            .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
            .receive_window(VarInt::from_u32(CONTROL_WINDOW))
            .send_window(u64::from(CONTROL_WINDOW))
            .max_concurrent_uni_streams(VarInt::from_u32(0)),
        Traffic::Kv => transport
            .stream_receive_window(VarInt::from_u32(KV_STREAM_WINDOW))
            .receive_window(VarInt::from_u32(KV_RECEIVE_WINDOW))
            .send_window(KV_SEND_WINDOW)
            .max_concurrent_uni_streams(VarInt::from_u32(KV_STREAMS_MAX)),
    };
    let first = config.datagram_max.min(FIRST_DATAGRAM_MAX);
    if near {
        transport.initial_mtu(first).min_mtu(first);
    }
    let mut discovery = quinn::MtuDiscoveryConfig::default();
    discovery.upper_bound(config.datagram_max);
    let known = near && first == config.datagram_max;
    transport.mtu_discovery_config((!known).then_some(discovery));
    transport
}
