//! KV connections beside a link: their end, and what a peer that means ill, or does not read, can do with them.
#![allow(clippy::unwrap_used, reason = "a test may stop at what it did not expect")]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use common::{Nodes, World, hello, meet, pair};
use millrace_core::ids::{AttemptId, Generation, RequestId};
use millrace_core::message::{CellsHeader, Message, Role};
use millrace_node::cells::{CellsReader, send_cells};
use millrace_node::endpoint::EndpointConfig;
use millrace_node::lane::LANES_MAX;
use millrace_node::link::{ClosedKind, Link, LinkError};
use millrace_node::pki::{KV_ALPN, TLS_NAME};
use millrace_node::transport::{KV_SEND_WINDOW, KV_STREAMS_MAX};
use quinn::crypto::rustls::QuicClientConfig;

const CELL_BYTES: usize = 16 << 10;

fn header(blocks: u32) -> CellsHeader {
    let digests = vec![0; blocks as usize];
    CellsHeader { attempt: AttemptId::default(), generation: Generation(1), layer: 0, layers: 1, block: 0, blocks, digests }
}

fn abort(n: u16) -> Message {
    Message::Received { attempt: AttemptId { request: RequestId(1), attempt: n } }
}

/// Sends a stream of cells and reads it at the other end.
async fn move_cells(sender: &Link, receiver: &Link, blocks: u32) {
    let lane = sender.lane().unwrap().quic;
    let cells = std::iter::repeat_n(Bytes::from(vec![7; CELL_BYTES]), blocks as usize);
    let read = async {
        let mut reader = CellsReader::open(receiver.accept_cells().await.unwrap().stream, CELL_BYTES).await.unwrap();
        let mut count = 0;
        while reader.next_cell().await.unwrap().is_some() {
            count += 1;
        }
        count
    };
    let header = header(blocks);
    let (sent, read) = tokio::join!(send_cells(&lane, &header, cells, 0), read);
    assert_eq!((sent.unwrap(), read), (u64::from(blocks) * CELL_BYTES as u64, blocks));
}

#[tokio::test]
async fn a_lane_that_is_lost_ends_its_link_and_the_next_link_has_lanes_again() {
    let nodes = Nodes::new().await;
    move_cells(&nodes.sender, &nodes.receiver, 8).await;
    nodes.lane().close(9u32.into(), b"a fault");
    let (here, there) = tokio::join!(nodes.sender.closed(), nodes.receiver.closed());
    assert!([here.kind, there.kind].contains(&ClosedKind::Lost), "{here}, {there}");
    assert!(nodes.sender.lane().is_none());
    let ((sender, _sender_in), (receiver, _receiver_in)) = pair(&nodes.prefill, &nodes.decode).await;
    move_cells(&sender, &receiver, 8).await;
}

#[tokio::test]
async fn a_node_whose_port_for_kv_is_closed_cannot_be_reached_and_its_address_is_named() {
    let world = World::new();
    let wall = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = wall.local_addr().unwrap();
    let quick = EndpointConfig { connect_timeout: Duration::from_millis(500), ..EndpointConfig::default() };
    let behind = EndpointConfig { lanes_advertise: Some(at.port()), ..EndpointConfig::default() };
    let (prefill, decode) = (world.endpoint_with(Role::Prefill, "p1", quick), world.endpoint_with(Role::Decode, "d1", behind));
    let (dialed, accepted) = meet(&prefill, &decode, &hello(&prefill), &hello(&decode)).await;
    let error = dialed.unwrap_err();
    assert!(matches!(&error, LinkError::Lanes { source, .. } if source.addr == at), "{error}");
    assert_eq!(
        error.to_string(),
        format!("decode d1: no connection for KV at UDP {at} (no answer within 500ms); is that port open between the nodes?")
    );
    let closed = accepted.unwrap().0.closed().await;
    assert!(closed.kind == ClosedKind::Peer && closed.reason.contains(&at.to_string()), "{closed}");
}

#[tokio::test]
async fn lanes_are_dialed_where_the_peer_says_and_one_that_is_lost_in_silence_ends_its_link() {
    let world = World::new();
    let free = || std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let (door, out, home) = (free(), free(), free().local_addr().unwrap());
    let told = door.local_addr().unwrap().port();
    let quick = EndpointConfig {
        idle_timeout: Duration::from_millis(500),
        keep_alive: Duration::from_millis(50),
        ..EndpointConfig::default()
    };
    let behind = EndpointConfig { lanes_port: home.port(), lanes_advertise: Some(told), ..quick.clone() };
    let (prefill, decode) = (world.endpoint_with(Role::Prefill, "p1", quick), world.endpoint_with(Role::Decode, "d1", behind));
    out.connect(home).unwrap();
    let path = translate(door, out);
    let ((sender, _sender_in), (receiver, _receiver_in)) = pair(&prefill, &decode).await;
    move_cells(&sender, &receiver, 8).await;
    assert_eq!(sender.lane().unwrap().quic.remote_address().port(), told);
    path.abort();
    let (here, there) = tokio::join!(sender.closed(), receiver.closed());
    assert!([here.kind, there.kind].contains(&ClosedKind::Lost), "{here}, {there}");
    assert!(
        here.reason.contains("a connection for KV is lost") || there.reason.contains("a connection for KV is lost"),
        "{here}, {there}"
    );
}

/// What comes to `door` goes out of `out` and back, as behind a translated address, for one dialer.
fn translate(door: std::net::UdpSocket, out: std::net::UdpSocket) -> tokio::task::AbortHandle {
    let tokio_socket = |socket: std::net::UdpSocket| {
        socket.set_nonblocking(true).unwrap();
        tokio::net::UdpSocket::from_std(socket).unwrap()
    };
    let (door, out) = (tokio_socket(door), tokio_socket(out));
    tokio::spawn(async move {
        let (mut there, mut back, mut dialer) = (vec![0; 65_536], vec![0; 65_536], None);
        loop {
            tokio::select! {
                come = door.recv_from(&mut there) => {
                    let (bytes, source) = come.unwrap();
                    dialer = Some(source);
                    out.send(&there[..bytes]).await.unwrap();
                }
                come = out.recv(&mut back) => {
                    let bytes = come.unwrap();
                    door.send_to(&back[..bytes], dialer.expect("it answers")).await.unwrap();
                }
            }
        }
    })
    .abort_handle()
}

#[tokio::test]
async fn a_links_end_is_the_end_of_its_lanes() {
    let nodes = Nodes::new().await;
    move_cells(&nodes.sender, &nodes.receiver, 8).await;
    let lane = nodes.lane();
    let mut open = lane.open_uni().await.unwrap();
    open.write_all(b"half a frame").await.unwrap();
    nodes.receiver.close("a fault");
    lane.closed().await;
    assert!(open.write_all(b"more").await.is_err());
    nodes.sender.closed().await;
    assert!(nodes.sender.lane().is_none());
    assert!(nodes.receiver.accept_cells().await.is_none());
}

#[tokio::test]
async fn kv_that_nobody_reads_holds_up_no_message_and_bounded_memory() {
    let mut nodes = Nodes::new().await;
    let lane = nodes.lane();
    let lent = Arc::new(());
    struct Lent(Vec<u8>, #[allow(dead_code, reason = "counted")] Arc<()>);
    impl AsRef<[u8]> for Lent {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    let streams: Vec<_> = (0..16)
        .map(|_| {
            let (lane, held) = (lane.clone(), Arc::clone(&lent));
            tokio::spawn(async move {
                let cells = (0..1024).map(|_| Bytes::from_owner(Lent(vec![1; CELL_BYTES], Arc::clone(&held))));
                send_cells(&lane, &header(1024), cells, 0).await
            })
        })
        .collect();
    for n in 0..2000 {
        nodes.sender.send(&abort(n)).unwrap();
        assert_eq!(nodes.messages.recv().await, Some(abort(n)));
    }
    // Each stream holds one batch more than the window has taken.
    let held = (Arc::strong_count(&lent) - 1) * CELL_BYTES;
    assert!(held <= KV_SEND_WINDOW as usize + 16 * (2 << 20), "{held} bytes are held for a peer that does not read");
    assert!(streams.iter().all(|stream| !stream.is_finished()));
    streams.iter().for_each(|stream| stream.abort());
    nodes.receiver.close("the test is over");
    nodes.sender.closed().await;
    drop(lane);
    for stream in streams {
        assert!(stream.await.is_err());
    }
    // A lost lane gives back what it never sent.
    while Arc::strong_count(&lent) > 1 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn streams_without_end_wait_at_their_sender() {
    let nodes = Nodes::new().await;
    let lane = nodes.lane();
    let mut open = Vec::new();
    // One more has carried the proof; that it has ended is told when more have.
    for _ in 1..KV_STREAMS_MAX {
        let mut stream = lane.open_uni().await.unwrap();
        stream.write_all(b"M").await.unwrap();
        open.push(stream);
    }
    let further = tokio::time::timeout(Duration::from_millis(300), lane.open_uni()).await;
    assert!(further.is_err(), "more than {KV_STREAMS_MAX} streams");
    // Those that are given up make room.
    for stream in &mut open {
        drop(nodes.receiver.accept_cells().await.unwrap());
        stream.reset(1u32.into()).unwrap();
    }
    lane.open_uni().await.unwrap();
}

/// Dials the lanes of `nodes.receiver` as the certificate of `name` with `proof`.
async fn raw_lane(world: &World, name: &str, at: SocketAddr, proof: &[u8]) -> quinn::Connection {
    let tls = world.identity(Role::Prefill, name).client_tls(KV_ALPN).unwrap();
    let mut endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap())));
    let quic = endpoint.connect(at, TLS_NAME).unwrap().await.unwrap();
    let mut stream = quic.open_uni().await.unwrap();
    stream.write_all(proof).await.unwrap();
    quic
}

#[tokio::test]
async fn a_lane_must_prove_whose_it_is_and_too_many_are_refused() {
    let world = World::new();
    let (prefill, decode) = (world.endpoint(Role::Prefill, "p1"), world.endpoint(Role::Decode, "d1"));
    let (dialed, accepted) = meet(&prefill, &decode, &hello(&prefill), &hello(&decode)).await;
    let ((sender, mut sender_in), (receiver, _receiver_in)) = (dialed.unwrap(), accepted.unwrap());
    tokio::spawn(async move { while sender_in.recv().await.is_some() {} });
    let first = sender.lane().unwrap().quic;
    let mut secret = [0; 32];
    sender.quic().export_keying_material(&mut secret, b"millrace lane", b"").unwrap();
    let at = first.remote_address();
    let refused = |error: quinn::ConnectionError| matches!(error, quinn::ConnectionError::ApplicationClosed(close) if close.error_code == 1u32.into());
    // No link has this secret; another node has a certificate, but not the link.
    assert!(refused(raw_lane(&world, "p1", at, &[0; 32]).await.closed().await));
    assert!(refused(raw_lane(&world, "p2", at, &secret).await.closed().await));
    assert_eq!(decode.counters().refused.load(Relaxed), 2);
    let mut more = Vec::new();
    for _ in 1..LANES_MAX {
        more.push(raw_lane(&world, "p1", at, &secret).await);
        move_cells(&sender, &receiver, 1).await;
    }
    let last = raw_lane(&world, "p1", at, &secret).await;
    assert!(refused(last.closed().await), "more than {LANES_MAX} lanes");
    assert!(sender.is_closed().is_none() && more.iter().all(|lane| lane.close_reason().is_none()));
}
