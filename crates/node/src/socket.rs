//! The UDP socket under QUIC: big kernel buffers, and a cap on segmentation offload.
//!
//! quinn hands the kernel up to ten datagrams as one super-packet, and UDP refuses those of 64 KiB and more. quinn-udp takes
//! that refusal for a lost MTU probe, so above an MTU of some 6,500 bytes most packets would be lost in silence.
//! Capping the segments avoids it (quinn issue 2189). So much is taken from the kernel at a time as stays in a cache. Nothing else is decided
//! here.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};

/// Bytes that one super-packet may have; the kernel's limit is 65,535 with headers.
pub const SUPER_PACKET_MAX: usize = 65_000;
/// Kernel buffer asked for, each way, in bytes; the kernel may grant less (`net.core.rmem_max`).
pub const SOCKET_BUFFER: usize = 4 << 20;
/// Super-packets that are taken from the kernel at a time. quinn asks for 32, 2 MiB: the first have left a core's cache by the time the last is
/// copied out (decision 74).
const RECEIVE_BATCH: usize = 4;

/// What went through a socket since it was bound.
#[derive(Debug, Default)]
pub struct SocketCounters {
    /// Calls that sent something.
    pub sends: AtomicU64,
    /// UDP payload bytes sent.
    pub sent_bytes: AtomicU64,
    /// UDP payload bytes received.
    pub received_bytes: AtomicU64,
}

/// A UDP socket of the tokio runtime with at most `segments_max` datagrams in one super-packet.
#[derive(Debug)]
pub struct CappedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    segments_max: usize,
    /// What went through.
    pub counters: SocketCounters,
}

impl CappedSocket {
    /// Binds `addr` for datagrams of at most `mtu_max` payload bytes. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// What the system says; `AddrInUse` when the port is taken.
    pub fn bind(addr: SocketAddr, mtu_max: u16) -> io::Result<Arc<Self>> {
        let socket = socket2::Socket::new(socket2::Domain::for_address(addr), socket2::Type::DGRAM, None)?;
        socket.set_recv_buffer_size(SOCKET_BUFFER)?;
        socket.set_send_buffer_size(SOCKET_BUFFER)?;
        let granted = socket.recv_buffer_size()?;
        if granted < SOCKET_BUFFER {
            tracing::warn!(granted_bytes = granted, asked_bytes = SOCKET_BUFFER, "small UDP buffer: raise net.core.rmem_max");
        }
        socket.bind(&addr.into())?;
        let inner = TokioRuntime.wrap_udp_socket(UdpSocket::from(socket))?;
        let segments_max = (SUPER_PACKET_MAX / usize::from(mtu_max)).max(1);
        tracing::debug!(segments = inner.max_transmit_segments().min(segments_max), "UDP segmentation offload");
        Ok(Arc::new(Self { inner, segments_max, counters: SocketCounters::default() }))
    }
}

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit) -> io::Result<()> {
        self.inner.try_send(transmit)?;
        self.counters.sends.fetch_add(1, Relaxed);
        self.counters.sent_bytes.fetch_add(transmit.contents.len() as u64, Relaxed);
        Ok(())
    }

    fn poll_recv(&self, cx: &mut Context, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        let batch = bufs.len().min(RECEIVE_BATCH);
        let polled = self.inner.poll_recv(cx, &mut bufs[..batch], &mut meta[..batch]);
        if let Poll::Ready(Ok(count)) = &polled {
            let bytes: usize = meta.iter().take(*count).map(|m| m.len).sum();
            self.counters.received_bytes.fetch_add(bytes as u64, Relaxed);
        }
        polled
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(self.segments_max)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn super_packets_stay_below_the_kernels_limit() {
        for mtu in [1200u16, 1452, 6500, 8952, 65_000] {
            let socket = CappedSocket::bind(([127, 0, 0, 1], 0).into(), mtu).unwrap();
            let segments = socket.max_transmit_segments();
            assert!(segments >= 1 && segments * usize::from(mtu) <= SUPER_PACKET_MAX, "{segments} of {mtu}");
        }
    }
}
