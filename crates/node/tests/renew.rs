//! New certificates for a running process: new connections use them, open ones stay, and wrong ones change nothing.
#![allow(clippy::unwrap_used, reason = "a test may stop at what it did not expect")]

mod common;

use std::time::Duration;

use common::{World, pair, target};
use millrace_core::ids::{Epoch, NodeId};
use millrace_core::message::{Load, Message, Role};
use millrace_node::endpoint::{Connection, Endpoint};
use millrace_node::pki::{Identity, Leaf, PkiError};
use millrace_node::renew::keep_renewed;
use millrace_node::shutdown::Shutdown;

/// One handshake from `a` to `b`, both ends.
async fn handshake(a: &Endpoint, b: &Endpoint) -> (Connection, Connection) {
    let whom = target(b);
    let accept = async { b.accept().await.unwrap().finish().await.unwrap() };
    let (dialed, accepted) = tokio::join!(a.connect(&whom), accept);
    (dialed.unwrap(), accepted)
}

async fn serials(a: &Endpoint, b: &Endpoint) -> [String; 2] {
    let (dialed, accepted) = handshake(a, b).await;
    [dialed.leaf().unwrap().serial, accepted.leaf().unwrap().serial]
}

#[tokio::test]
async fn new_files_are_taken_and_open_links_stay() {
    let world = World::new();
    let (node, replica) = (world.endpoint(Role::Decode, "d1"), world.endpoint(Role::Coordinator, "c1"));
    let ((up, _up_in), (_down, mut down_in)) = pair(&node, &replica).await;
    let before = serials(&node, &replica).await;
    let stop = Shutdown::new();
    for (endpoint, name) in [(&node, "d1"), (&replica, "c1")] {
        tokio::spawn(keep_renewed(endpoint.clone(), world.dir(name), Duration::from_millis(5), stop.clone()));
    }
    for (role, name) in [(Role::Decode, "d1"), (Role::Coordinator, "c1")] {
        world.renew(role, name);
    }
    let wanted = ["c1", "d1"].map(|name| Leaf::load(&world.dir(name)).unwrap().1.serial);
    assert_ne!(wanted, before);
    tokio::time::timeout(Duration::from_secs(30), async {
        while serials(&node, &replica).await != wanted {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("both sides show their new certificates");
    // Only what a role may say passes, so this goes from the node.
    let beat = Message::Heartbeat { node: NodeId(1), epoch: Epoch(1), load: Load::default() };
    up.send(&beat).unwrap();
    assert_eq!(down_in.recv().await, Some(beat), "the old link is as it was");
    stop.begin("enough");
}

#[tokio::test]
async fn a_certificate_of_somebody_else_or_a_broken_one_changes_nothing() {
    let world = World::new();
    let (node, replica) = (world.endpoint(Role::Decode, "d1"), world.endpoint(Role::Coordinator, "c1"));
    let before = serials(&node, &replica).await;
    let other = world.identity(Role::Decode, "d2");
    assert!(matches!(node.renew(&other), Err(PkiError::Another(_))));
    std::fs::write(world.dir("d1").join("cert.pem"), "half a certifi").unwrap();
    assert!(Identity::load(&world.dir("d1")).is_err());
    assert_eq!(serials(&node, &replica).await, before);
}
