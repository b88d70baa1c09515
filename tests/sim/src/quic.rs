//! QUIC between simulated hosts: real quinn-proto with real mutual TLS, over a network that loses, repeats, delays, overtakes and cuts
//! datagrams. A link is one connection: control messages on its first stream, each KV span on a stream of its own, both under flow control.
//!
//! What is decided here is only where bytes and timers go. Key material differs between two runs of a seed; no size and no time does: the
//! certificate has one key, and whatever else would be random in a size is switched off.

mod cells;
mod link;
mod tls;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use millrace_core::ids::Time;
use quinn_proto::{ClientConfig, ConnectionHandle, DatagramEvent, Endpoint, EndpointConfig, ServerConfig, VarInt};

pub use link::Conn;
use tls::Tls;

use crate::event::{Event, Host, Life, LinkNo};
use crate::world::World;

/// The port of every host.
const PORT: u16 = 4433;
/// Largest datagram, bytes.
const DATAGRAM_MAX: usize = 1452;
/// The name in the certificate.
const NAME: &str = "millrace";

/// A datagram, whose bytes are no part of the history: only how many they are.
pub struct Datagram(Bytes);

impl fmt::Debug for Datagram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// Something happens to the network of a host.
#[derive(Debug)]
pub enum QuicEvent {
    /// A datagram is there, from a host.
    Datagram(Host, Datagram),
    /// A timer of a connection may be due.
    Timer(usize),
}

/// The network's end in one process.
struct End {
    life: Life,
    endpoint: Endpoint,
    conns: BTreeMap<usize, Conn>,
}

/// All of it.
pub struct Quic {
    client: ClientConfig,
    server: Arc<ServerConfig>,
    /// By host.
    ends: Vec<Option<End>>,
    /// Where a link is.
    links: BTreeMap<LinkNo, (Host, usize)>,
    /// Datagrams sent, and those that never arrived.
    pub sent: u64,
    /// See `sent`.
    pub lost: u64,
}

impl Quic {
    /// A network without hosts; `window` bounds what a stream may have unread, bytes.
    #[must_use]
    pub fn new(hosts: usize, window: u32) -> Self {
        let Tls { client, server } = tls::configs(window);
        let ends = (0..hosts).map(|_| None).collect();
        Self { client, server, ends, links: BTreeMap::new(), sent: 0, lost: 0 }
    }

    fn conn(&mut self, host: Host, no: usize) -> Option<&mut Conn> {
        self.ends[host].as_mut()?.conns.get_mut(&no)
    }
}

fn address(host: Host) -> SocketAddr {
    (Ipv4Addr::new(10, 0, 0, host as u8 + 1), PORT).into()
}

fn host_at(address: SocketAddr) -> Host {
    match address.ip() {
        std::net::IpAddr::V4(ip) => usize::from(ip.octets()[3]) - 1,
        std::net::IpAddr::V6(_) => unreachable!("all addresses here are made by `address`"),
    }
}

impl World {
    fn quic(&mut self) -> &mut Quic {
        self.quic.as_mut().expect("asked only where QUIC is the network")
    }

    /// What the clock of a host shows, as QUIC wants it.
    fn instant(&self, host: Host) -> Instant {
        self.base + Duration::from_micros(self.hosts[host].local(self.now).0)
    }

    /// Opens the end of a process that has just started.
    pub(crate) fn quic_start(&mut self, host: Host, life: Life) {
        let seed = std::array::from_fn(|_| self.random.below(256) as u8);
        let mut config = EndpointConfig::default();
        config.rng_seed(Some(seed)).grease_quic_bit(false);
        let quic = self.quic();
        let endpoint = Endpoint::new(Arc::new(config), Some(Arc::clone(&quic.server)), false, None);
        quic.ends[host] = Some(End { life, endpoint, conns: BTreeMap::new() });
    }

    /// A process is gone: nobody is told.
    pub(crate) fn quic_lose(&mut self, host: Host) {
        let quic = self.quic();
        quic.ends[host] = None;
        quic.links.retain(|_, (at, _)| *at != host);
    }

    /// Begins a connection to another host; its link is up when both have said who they are.
    pub(crate) fn quic_dial(&mut self, host: Host, to: Host) {
        let (now, link) = (self.instant(host), self.next_no());
        let quic = self.quic();
        let Some(end) = &mut quic.ends[host] else { return };
        let dialled = end.endpoint.connect(now, quic.client.clone(), address(to), NAME);
        let (handle, connection) = dialled.expect("the address is one, and ids do not run out");
        end.conns.insert(handle.0, Conn::new(link, Some(to), connection));
        quic.links.insert(link, (host, handle.0));
        self.quic_drive(host, handle.0);
    }

    /// Something happens to the network of a host.
    pub(crate) fn quic_event(&mut self, host: Host, life: Life, event: QuicEvent) {
        if self.quic().ends[host].as_ref().is_none_or(|end| end.life != life) {
            return;
        }
        match event {
            QuicEvent::Datagram(from, Datagram(bytes)) => self.quic_receive(host, from, &bytes),
            QuicEvent::Timer(no) => {
                let (now, instant) = (self.now, self.instant(host));
                let Some(conn) = self.quic().conn(host, no).filter(|conn| conn.timer.is_some_and(|due| due <= now)) else {
                    return;
                };
                conn.timer = None;
                conn.quic.handle_timeout(instant);
                self.quic_drive(host, no);
            }
        }
    }

    fn quic_receive(&mut self, host: Host, from: Host, bytes: &[u8]) {
        let (now, mut reply) = (self.instant(host), Vec::new());
        let Some(end) = &mut self.quic().ends[host] else { return };
        match end.endpoint.handle(now, address(from), None, None, BytesMut::from(bytes), &mut reply) {
            Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                if let Some(conn) = end.conns.get_mut(&handle.0) {
                    conn.quic.handle_event(event);
                    self.quic_drive(host, handle.0);
                }
            }
            Some(DatagramEvent::NewConnection(incoming)) => match end.endpoint.accept(incoming, now, &mut reply, None) {
                Ok((handle, connection)) => self.quic_accepted(host, handle, connection),
                Err(error) => {
                    if let Some(transmit) = error.response {
                        self.quic_send_datagram(host, host_at(transmit.destination), &reply[..transmit.size]);
                    }
                }
            },
            Some(DatagramEvent::Response(transmit)) => {
                self.quic_send_datagram(host, host_at(transmit.destination), &reply[..transmit.size]);
            }
            None => {}
        }
    }

    fn quic_accepted(&mut self, host: Host, handle: ConnectionHandle, connection: quinn_proto::Connection) {
        let link = self.next_no();
        let quic = self.quic();
        if let Some(end) = &mut quic.ends[host] {
            end.conns.insert(handle.0, Conn::new(link, None, connection));
            quic.links.insert(link, (host, handle.0));
            self.quic_drive(host, handle.0);
        }
    }

    /// Sends what a connection wants sent, tells what it has to tell, and sets its timer.
    fn quic_drive(&mut self, host: Host, no: usize) {
        let now = self.instant(host);
        loop {
            let Some(end) = &mut self.quic().ends[host] else { return };
            let Some(conn) = end.conns.get_mut(&no) else { return };
            while let Some(event) = conn.quic.poll_endpoint_events() {
                if let Some(answer) = end.endpoint.handle_event(ConnectionHandle(no), event) {
                    conn.quic.handle_event(answer);
                }
            }
            let mut buffer = Vec::with_capacity(DATAGRAM_MAX);
            if let Some(transmit) = conn.quic.poll_transmit(now, 1, &mut buffer) {
                self.quic_send_datagram(host, host_at(transmit.destination), &buffer[..transmit.size]);
                continue;
            }
            let Some(event) = conn.quic.poll() else { break };
            self.quic_told(host, no, event);
        }
        self.quic_set_timer(host, no);
    }

    fn quic_set_timer(&mut self, host: Host, no: usize) {
        let base = self.base;
        let quic = self.quic.as_mut().expect("asked only where QUIC is the network");
        let Some(end) = &mut quic.ends[host] else { return };
        let life = end.life;
        let Some(conn) = end.conns.get_mut(&no) else { return };
        if conn.quic.is_drained() {
            let link = conn.link;
            end.conns.remove(&no);
            quic.links.remove(&link);
            return;
        }
        let Some(due) = conn.quic.poll_timeout() else { return };
        let local = Time(due.saturating_duration_since(base).as_micros() as u64 + 1);
        let after_us = self.hosts[host].until(self.now, local).max(1);
        let at = self.now.after(after_us);
        if conn.timer.is_none_or(|set| at < set || set <= self.now) {
            conn.timer = Some(at);
            self.schedule(after_us, Event::Quic(host, life, QuicEvent::Timer(no)));
        }
    }

    /// Puts a datagram on its way, once, twice or never.
    fn quic_send_datagram(&mut self, from: Host, to: Host, bytes: &[u8]) {
        self.quic().sent += 1;
        let cut = self.outages.get(&(from, to)).is_some_and(|until| self.now < *until);
        let copies = match self.plan.faults {
            _ if cut => 0,
            ref faults if self.random.chance(faults.lost) => 0,
            ref faults if self.random.chance(faults.twice) => 2,
            _ => 1,
        };
        self.quic().lost += u64::from(copies == 0);
        for _ in 0..copies {
            let slow = self.random.chance(self.plan.faults.late);
            let after_us = self.random.between(self.plan.delay_us) * if slow { 10 } else { 1 };
            let life = self.hosts[to].life;
            let datagram = Datagram(Bytes::copy_from_slice(bytes));
            self.schedule(after_us, Event::Quic(to, life, QuicEvent::Datagram(from, datagram)));
        }
    }
}

/// Error codes mean nothing here.
const CODE: VarInt = VarInt::from_u32(0);
