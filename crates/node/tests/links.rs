//! Endpoints and links over loopback: who may talk, what ends a link, and that nothing else does.
#![allow(clippy::unwrap_used, reason = "a test may stop at what it did not expect")]

mod common;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use common::{World, hello, meet, pair, target};
use millrace_core::ids::{AttemptId, Epoch, NodeId, RequestId};
use millrace_core::message::{Load, Message, Role};
use millrace_node::dial::keep_connected;
use millrace_node::endpoint::{BindError, ConnectError, Endpoint, EndpointConfig};
use millrace_node::link::{ClosedKind, LINK_QUEUE_BYTES_MAX, Link, LinkError};
use millrace_node::shutdown::Shutdown;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::{mpsc, watch};

fn heartbeat(n: u64) -> Message {
    Message::Heartbeat { node: NodeId(1), epoch: Epoch(n), load: Load::default() }
}

fn cancel(n: u16) -> Message {
    Message::Cancel(AttemptId { request: RequestId(1), attempt: n })
}

#[tokio::test]
async fn messages_arrive_both_ways_in_order() {
    let world = World::new();
    let (node, replica) = (world.endpoint(Role::Prefill, "p1"), world.endpoint(Role::Coordinator, "c1"));
    let ((up, mut up_in), (down, mut down_in)) = pair(&node, &replica).await;
    assert_eq!((up.peer().name.as_str(), up.peer().role), ("c1", Role::Coordinator));
    assert_eq!((down.hello().name.as_str(), down.hello().model.as_ref()), ("p1", Some(&common::model())));
    for n in 0..10_000 {
        up.send(&heartbeat(n)).unwrap();
        down.send(&cancel(n as u16)).unwrap();
    }
    for n in 0..10_000 {
        assert_eq!(down_in.recv().await, Some(heartbeat(n)));
        assert_eq!(up_in.recv().await, Some(cancel(n as u16)));
    }
    up.close("enough");
    assert_eq!(down_in.recv().await, None);
    assert_eq!(down.closed().await.kind, ClosedKind::Peer);
    assert_eq!(up.send(&heartbeat(0)).unwrap_err().kind, ClosedKind::Local);
}

#[tokio::test]
async fn draining_delivers_what_waits() {
    let world = World::new();
    let (node, replica) = (world.endpoint(Role::Prefill, "p1"), world.endpoint(Role::Coordinator, "c1"));
    let ((up, _up_in), (_down, mut down_in)) = pair(&node, &replica).await;
    let read_all = async {
        let mut count = 0;
        while down_in.recv().await.is_some() {
            count += 1;
        }
        count
    };
    (0..10_000).for_each(|n| up.send(&heartbeat(n)).unwrap());
    let (count, ()) = tokio::join!(read_all, up.drain(Duration::from_secs(60), "leaving"));
    assert_eq!(count, 10_000);
}

#[tokio::test]
async fn another_authority_is_refused() {
    let (world, stranger) = (World::new(), World::new());
    let (node, replica) = (stranger.endpoint(Role::Prefill, "p1"), world.endpoint(Role::Coordinator, "c1"));
    let (dialed, accepted) = meet(&node, &replica, &hello(&node), &hello(&replica)).await;
    let text = dialed.unwrap_err().to_string();
    assert!(text.contains("the peer's certificate is signed by another authority"), "{text}");
    let text = accepted.unwrap_err().to_string();
    assert!(text.contains("our certificate is signed by another authority"), "{text}");
    assert_eq!(replica.counters().refused.load(Relaxed), 1);
}

/// A client of our own making that believes our authority, with `leaf`'s certificate or none: past its own checks, not past ours.
async fn dial_with(world: &World, leaf: Option<PathBuf>, addr: SocketAddr) -> quinn::ConnectionError {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(world.dir("c1").join("ca.pem")).unwrap()).unwrap();
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut tls = match leaf {
        None => builder.with_no_client_auth(),
        Some(dir) => {
            let chain = vec![CertificateDer::from_pem_file(dir.join("cert.pem")).unwrap()];
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(dir.join("cert.key")).unwrap()).unwrap()
        }
    };
    tls.alpn_protocols = vec![millrace_node::pki::ALPN.to_vec()];
    let config = quinn::ClientConfig::new(Arc::new(quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap()));
    let client = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    match client.connect_with(config, addr, "millrace").unwrap().await {
        Ok(connection) => connection.closed().await,
        Err(error) => error,
    }
}

#[tokio::test]
async fn a_stranger_who_believes_our_authority_is_refused() {
    let (world, stranger) = (World::new(), World::new());
    let replica = world.endpoint(Role::Coordinator, "c1");
    stranger.identity(Role::Coordinator, "c2");
    for leaf in [None, Some(stranger.dir("c2"))] {
        let accept = async { replica.accept().await.unwrap().finish().await };
        let (ended, accepted) = tokio::join!(dial_with(&world, leaf, replica.local_addr().unwrap()), accept);
        assert!(matches!(ended, quinn::ConnectionError::ConnectionClosed(_)), "{ended}");
        assert!(matches!(accepted, Err(ConnectError::Handshake { .. })));
    }
    assert_eq!(replica.counters().accepted.load(Relaxed), 0);
}

#[tokio::test]
async fn another_role_or_name_than_meant_is_refused() {
    let world = World::new();
    let (node, replica) = (world.endpoint(Role::Prefill, "p1"), world.endpoint(Role::Coordinator, "c1"));
    for (role, name, field_meant) in [(Role::Decode, "c1", "role"), (Role::Coordinator, "c2", "name")] {
        let mut whom = target(&replica);
        (whom.role, whom.name) = (role, Some(name.into()));
        let accept = async { replica.accept().await.unwrap().finish().await };
        let (dialed, _accepted) = tokio::join!(node.connect(&whom), accept);
        assert!(matches!(dialed, Err(ConnectError::WrongPeer { field, .. }) if field == field_meant), "{field_meant}");
    }
}

#[tokio::test]
async fn differing_first_words_are_refused_by_field() {
    let world = World::new();
    let (node, replica) = (world.endpoint(Role::Prefill, "p1"), world.endpoint(Role::Coordinator, "c1"));
    let ours = hello(&replica);
    for field in ["block_tokens", "weights", "cluster", "name"] {
        let mut theirs = hello(&node);
        let model = theirs.model.as_mut().unwrap();
        match field {
            "block_tokens" => model.layout.block_tokens = 32,
            "weights" => model.weights = [9; 32],
            "cluster" => theirs.cluster = "other".into(),
            _ => theirs.name = "p2".into(),
        }
        let (dialed, accepted) = meet(&node, &replica, &theirs, &ours).await;
        let (Err(LinkError::Refused { reason, .. }), Err(LinkError::Refusing { .. })) = (dialed, accepted) else {
            panic!("{field}: not refused")
        };
        assert!(reason.contains(field), "{field}: {reason}");
    }
    let mut tool = hello(&node);
    tool.model = None;
    let (dialed, accepted) = meet(&node, &replica, &tool, &ours).await;
    assert!(dialed.is_ok() && accepted.is_ok());
}

#[tokio::test]
async fn what_a_role_may_not_send_ends_the_link() {
    let world = World::new();
    let (node, replica) = (world.endpoint(Role::Prefill, "p1"), world.endpoint(Role::Coordinator, "c1"));
    for forbidden in [cancel(0), Message::Hello(hello(&node))] {
        let ((up, _up_in), (down, mut down_in)) = pair(&node, &replica).await;
        up.send(&heartbeat(1)).unwrap();
        up.send(&forbidden).unwrap();
        up.send(&heartbeat(2)).unwrap();
        assert_eq!(down_in.recv().await, Some(heartbeat(1)));
        assert_eq!(down_in.recv().await, None);
        let closed = down.closed().await;
        assert!(closed.kind == ClosedKind::Protocol && closed.reason.contains("prefill p1 may not send"), "{closed}");
        assert_eq!(up.closed().await.kind, ClosedKind::Protocol);
    }
    assert_eq!(replica.counters().violations.load(Relaxed), 2);
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_dropped() {
    let world = World::new();
    let (node, replica) = (world.endpoint(Role::Prefill, "p1"), world.endpoint(Role::Coordinator, "c1"));
    let ((up, _up_in), (down, _down_in)) = pair(&node, &replica).await;
    let big = Message::Raft(vec![0; 4 << 20]);
    let mut sent_bytes = 0;
    let closed = loop {
        match down.send(&big) {
            Ok(()) => sent_bytes += 4 << 20,
            Err(closed) => break closed,
        }
        assert!(sent_bytes < 4 * LINK_QUEUE_BYTES_MAX, "never closed");
        tokio::task::yield_now().await;
    };
    assert_eq!(closed.kind, ClosedKind::SlowReader);
    assert_eq!(replica.counters().slow_readers.load(Relaxed), 1);
    assert_eq!(up.closed().await.kind, ClosedKind::SlowReader);
}

#[test]
fn a_killed_peer_is_noticed() {
    let world = World::new();
    let config = EndpointConfig { idle_timeout: Duration::from_millis(1500), ..Default::default() };
    let (ours, theirs) = (tokio::runtime::Runtime::new().unwrap(), tokio::runtime::Runtime::new().unwrap());
    let replica = ours.block_on(async { world.endpoint_with(Role::Coordinator, "c1", config) });
    let node = theirs.block_on(async { world.endpoint(Role::Decode, "d1") });
    let dial = theirs.spawn({
        let (node, whom) = (node.clone(), target(&replica));
        async move { Link::dial(&node, &whom, &hello(&node)).await.unwrap() }
    });
    let (down, mut down_in) = ours.block_on(async {
        let connection = replica.accept().await.unwrap().finish().await.unwrap();
        Link::accept(connection, &hello(&replica)).await.unwrap()
    });
    // Its tasks end without a word, as in a process that is killed; the handles outlive them, so nothing says good-bye.
    let _held = theirs.block_on(dial).unwrap();
    theirs.shutdown_background();
    ours.block_on(async {
        assert_eq!(down_in.recv().await, None);
        assert_eq!(down.closed().await.kind, ClosedKind::Lost);
    });
    assert_eq!(replica.counters().lost.load(Relaxed), 1);
    drop(node);
}

#[tokio::test]
async fn bytes_that_are_no_frame_end_only_their_connection() {
    let world = World::new();
    let (good, bad) = (world.endpoint(Role::Prefill, "p1"), world.endpoint(Role::Prefill, "p2"));
    let replica = world.endpoint(Role::Coordinator, "c1");
    let ((up, _up_in), (_down, mut down_in)) = pair(&good, &replica).await;

    // Before any Hello.
    let whom = target(&replica);
    let raw = async {
        let connection = bad.connect(&whom).await.unwrap();
        let (mut send, _recv) = connection.quic.open_bi().await.unwrap();
        send.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        connection.quic.closed().await
    };
    let accept = async { Link::accept(replica.accept().await.unwrap().finish().await.unwrap(), &hello(&replica)).await };
    let (_, accepted) = tokio::join!(raw, accept);
    assert!(accepted.unwrap_err().to_string().contains("bad magic"));

    // After it, from a peer that began well.
    let raw = async {
        let connection = bad.connect(&whom).await.unwrap();
        let (mut send, _recv) = connection.quic.open_bi().await.unwrap();
        let greeting = millrace_node::frame::encode(&Message::Hello(hello(&bad))).unwrap();
        send.write_chunk(greeting).await.unwrap();
        send.write_chunk(Bytes::from_static(&[0xff; 64])).await.unwrap();
        connection.quic.closed().await
    };
    let accept = async {
        let connection = replica.accept().await.unwrap().finish().await.unwrap();
        let (link, mut receiver) = Link::accept(connection, &hello(&replica)).await.unwrap();
        assert_eq!(receiver.recv().await, None);
        link.closed().await
    };
    let (_, closed) = tokio::join!(raw, accept);
    assert!(closed.kind == ClosedKind::Protocol && closed.reason.contains("bad magic"), "{closed}");
    assert_eq!(replica.counters().bad_frames.load(Relaxed), 2);

    up.send(&heartbeat(5)).unwrap();
    assert_eq!(down_in.recv().await, Some(heartbeat(5)));
}

#[tokio::test]
async fn an_offer_of_lanes_from_a_coordinator_ends_the_link() {
    let world = World::new();
    let (node, replica) = (world.endpoint(Role::Decode, "d1"), world.endpoint(Role::Coordinator, "c1"));
    let ((up, mut up_in), (down, _down_in)) = pair(&node, &replica).await;
    down.send(&Message::Lanes { port: 1 }).unwrap();
    assert_eq!(up_in.recv().await, None);
    assert_eq!(up.closed().await.kind, ClosedKind::Protocol);
    assert_eq!(node.counters().violations.load(Relaxed), 1);
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let world = World::new();
    let first = world.endpoint(Role::Decode, "d1");
    let addr = first.local_addr().unwrap();
    let error = Endpoint::bind(addr, world.identity(Role::Decode, "d2"), EndpointConfig::default()).err().unwrap();
    assert!(matches!(error, BindError::InUse { .. }) && error.to_string().contains(&addr.to_string()), "{error}");
}

#[tokio::test]
async fn a_kept_link_comes_back_until_shutdown() {
    let world = World::new();
    let (node, replica) = (world.endpoint(Role::Prefill, "p1"), world.endpoint(Role::Coordinator, "c1"));
    let (up, mut links) = mpsc::channel(1);
    let (first_words, shutdown) = (watch::Sender::new(hello(&node)), Shutdown::new());
    let kept = tokio::spawn(keep_connected(node, target(&replica), first_words.subscribe(), up, shutdown.clone()));
    for round in 0..3 {
        first_words.send_modify(|hello| hello.epoch = Epoch(round));
        let connection = replica.accept().await.unwrap().finish().await.unwrap();
        let (down, mut down_in) = Link::accept(connection, &hello(&replica)).await.unwrap();
        let (link, _receiver) = links.recv().await.unwrap();
        link.send(&heartbeat(round)).unwrap();
        assert_eq!(down_in.recv().await, Some(heartbeat(round)));
        // The words of the next round are in place before the link that they follow ends.
        first_words.send_modify(|hello| hello.epoch = Epoch(round + 1));
        assert_eq!(down.hello().epoch, Epoch(round));
        down.close("again");
    }
    shutdown.begin("test");
    kept.await.unwrap();
}
