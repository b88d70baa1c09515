//! Tasks that turn links into events: one reader for each link, one acceptor for the endpoint.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use millrace_core::ids::ReplicaId;
use millrace_core::message::{Hello, REPLICAS_TOLD_MAX, ReplicaAddress, Role};
use millrace_core::node::LinkNo;
use tokio::sync::{mpsc, watch};

use super::event::{Event, LinkEvent};
use super::receiving::{StreamContext, receive_stream};
use crate::dial::keep_connected;
use crate::endpoint::{Endpoint, Target};
use crate::link::{Link, LinkReceiver};
use crate::shutdown::Shutdown;

/// Lists of replicas that wait; a further one is dropped, and comes again with the next link.
pub(super) const LISTS_MAX: usize = 4;

/// Numbers links and reads the KV streams beside them.
#[derive(Clone)]
pub(super) struct Links {
    next: Arc<AtomicU64>,
    streams: StreamContext,
}

impl Links {
    pub(super) fn new(streams: StreamContext) -> Self {
        Self { next: Arc::new(AtomicU64::new(1)), streams }
    }

    /// A number that no other link has.
    pub(super) fn next_no(&self) -> LinkNo {
        LinkNo(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Reads the KV streams of a link until it ends. QUIC bounds how many run at once.
    pub(super) fn read_cells(&self, no: LinkNo, link: Link) {
        let streams = self.streams.clone();
        tokio::spawn(async move {
            while let Some(stream) = link.accept_cells().await {
                tokio::spawn(receive_stream(streams.clone(), no, stream));
            }
        });
    }
}

/// Turns everything that happens on a link into events, its end included.
pub(super) async fn read_link(
    link: Link,
    mut receiver: LinkReceiver,
    events: mpsc::Sender<Event>,
    event: impl Fn(LinkEvent) -> Event,
) {
    if events.send(event(LinkEvent::Up(link.clone()))).await.is_err() {
        return;
    }
    while let Some(message) = receiver.recv().await {
        if events.send(event(LinkEvent::Message(Box::new(message)))).await.is_err() {
            return;
        }
    }
    let _ = events.send(event(LinkEvent::Down(link.closed().await.to_string()))).await;
}

/// Keeps links to the coordinator's replicas: those of the command line, and those of which a replica tells later.
pub(super) async fn keep_uplinks(
    endpoint: Endpoint,
    replicas: Vec<(ReplicaId, SocketAddr)>,
    mut told: mpsc::Receiver<Vec<ReplicaAddress>>,
    hello: watch::Receiver<Hello>,
    context: (Links, mpsc::Sender<Event>),
    shutdown: Shutdown,
) {
    let mut known = BTreeSet::new();
    let mut found = replicas;
    loop {
        for (replica, addr) in found {
            // One that went is dialed in vain, now and then; at the bound further ones are not dialed.
            if known.len() < REPLICAS_TOLD_MAX && known.insert(replica) {
                let target = Target { addr, role: Role::Coordinator, name: None };
                let uplink = keep_uplink(endpoint.clone(), replica, target, hello.clone(), context.clone(), shutdown.clone());
                tokio::spawn(uplink);
            }
        }
        let Some(list) = told.recv().await else { return };
        found = list.into_iter().filter_map(|one| Some((one.replica, one.address.parse().ok()?))).collect();
    }
}

/// Keeps a link to one coordinator replica up, and reads it.
async fn keep_uplink(
    endpoint: Endpoint,
    replica: ReplicaId,
    target: Target,
    hello: watch::Receiver<Hello>,
    context: (Links, mpsc::Sender<Event>),
    shutdown: Shutdown,
) {
    let (links, events) = context;
    let (up, mut ups) = mpsc::channel(1);
    tokio::spawn(keep_connected(endpoint, target, hello, up, shutdown));
    while let Some((link, receiver)) = ups.recv().await {
        let no = links.next_no();
        read_link(link, receiver, events.clone(), |event| Event::Uplink(replica, no, event)).await;
    }
}

/// Accepts links from other nodes until the endpoint closes.
pub(super) async fn accept_links(endpoint: Endpoint, hello: watch::Receiver<Hello>, links: Links, events: mpsc::Sender<Event>) {
    while let Some(accepting) = endpoint.accept().await {
        let (hello, links, events) = (hello.borrow().clone(), links.clone(), events.clone());
        tokio::spawn(async move {
            let connection = match accepting.finish().await {
                Ok(connection) => connection,
                Err(error) => return tracing::warn!(%error, "connection refused"),
            };
            match Link::accept(connection, &hello).await {
                Ok((link, receiver)) if matches!(link.peer().role, Role::Prefill | Role::Decode) => {
                    let no = links.next_no();
                    links.read_cells(no, link.clone());
                    read_link(link, receiver, events, |event| Event::Peer(no, event)).await;
                }
                Ok((link, _)) => link.close("a node takes links from nodes only"),
                Err(error) => tracing::warn!(%error, "link refused"),
            }
        });
    }
}
