//! Tasks that turn links into events: one reader for each link, one acceptor for the endpoint.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use millrace_core::ids::ReplicaId;
use millrace_core::message::{Hello, ReplicaAddress, Role};
use millrace_core::node::LinkNo;
use tokio::sync::{mpsc, watch};

use super::event::{Event, LinkEvent};
use super::receiving::{StreamContext, receive_stream};
use super::replicas::Told;
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
            while let Some(arriving) = link.accept_cells().await {
                arriving.read_by(|stream| receive_stream(streams.clone(), no, stream));
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

/// A replica tells where all of them are.
pub(super) type ReplicasTold = (ReplicaId, Vec<ReplicaAddress>);

/// A replica that is being dialed, where, and how to stop.
type Dialed = BTreeMap<ReplicaId, (SocketAddr, Shutdown)>;

/// Keeps links to the coordinator's replicas: those of the command line, then those of which replicas tell ([`Told`]).
pub(super) async fn keep_uplinks(
    endpoint: Endpoint,
    first: Vec<(ReplicaId, SocketAddr)>,
    mut lists: mpsc::Receiver<ReplicasTold>,
    hello: watch::Receiver<Hello>,
    context: (Links, mpsc::Sender<Event>),
    shutdown: Shutdown,
) {
    let (mut told, mut dialed) = (Told::new(first), Dialed::new());
    loop {
        let wanted = told.wanted();
        dialed.retain(|replica, (addr, gone)| {
            let stays = wanted.get(replica).copied() == Some(*addr);
            if !stays {
                tracing::info!(%replica, %addr, "a replica is not dialed any more");
                gone.begin("the replica is none any more, or elsewhere");
            }
            stays
        });
        for (replica, addr) in wanted {
            dialed.entry(replica).or_insert_with(|| {
                let gone = Shutdown::new();
                let target = Target { addr, role: Role::Coordinator, name: None };
                let uplink = Uplink { replica, endpoint: endpoint.clone(), target, gone: gone.clone() };
                tokio::spawn(uplink.keep(hello.clone(), context.clone(), shutdown.clone()));
                (addr, gone)
            });
        }
        let Some((from, list)) = lists.recv().await else { return };
        told.hear(from, list);
    }
}

/// One coordinator replica that a node keeps a link to, until it is gone.
struct Uplink {
    replica: ReplicaId,
    endpoint: Endpoint,
    target: Target,
    gone: Shutdown,
}

impl Uplink {
    /// Keeps the link up, and reads it.
    async fn keep(self, hello: watch::Receiver<Hello>, context: (Links, mpsc::Sender<Event>), shutdown: Shutdown) {
        let Self { replica, endpoint, target, gone } = self;
        let (links, events) = context;
        let (up, mut ups) = mpsc::channel(1);
        tokio::spawn(keep_connected(endpoint, target, hello, up, shutdown));
        loop {
            let next = tokio::select! {
                next = ups.recv() => next,
                _ = gone.wait() => return,
            };
            let Some((link, receiver)) = next else { return };
            let no = links.next_no();
            let reading = read_link(link.clone(), receiver, events.clone(), |event| Event::Uplink(replica, no, event));
            tokio::pin!(reading);
            tokio::select! {
                () = &mut reading => {}
                reason = gone.wait() => {
                    // Its end is an event like any other, so it is waited for.
                    link.close(&reason);
                    return reading.await;
                }
            }
        }
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use millrace_core::ids::{Epoch, NodeId};
    use millrace_core::message::Message;
    use millrace_kernels::slab::KvSlab;

    use super::super::receiving::Gates;
    use super::*;
    use crate::endpoint::EndpointConfig;
    use crate::pki::{Authority, Identity};

    /// Far more than anything takes that is going to come.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn hello(name: &str) -> Hello {
        Hello { cluster: "demo".into(), name: name.into(), instance: 1, node: NodeId(0), epoch: Epoch(0), model: None }
    }

    fn endpoint(authority: &Authority, dir: &std::path::Path, role: Role, name: &str) -> Endpoint {
        let dir = dir.join(name);
        authority.issue(role, name, &dir).unwrap();
        Endpoint::bind("127.0.0.1:0".parse().unwrap(), Identity::load(&dir).unwrap(), EndpointConfig::default()).unwrap()
    }

    /// A replica that takes links and says nothing, for ever.
    fn replica(authority: &Authority, dir: &std::path::Path, id: u64) -> (ReplicaId, SocketAddr) {
        let name = format!("coordinator-{id}");
        let endpoint = endpoint(authority, dir, Role::Coordinator, &name);
        let addr = endpoint.local_addr().unwrap();
        tokio::spawn(async move {
            let mut links = Vec::new();
            while let Some(accepting) = endpoint.accept().await {
                links.push(Link::accept(accepting.finish().await.unwrap(), &hello(&name)).await.unwrap());
            }
        });
        (ReplicaId(id), addr)
    }

    async fn next(events: &mut mpsc::Receiver<Event>) -> (u64, bool) {
        loop {
            match tokio::time::timeout(PATIENCE, events.recv()).await.expect("in time").unwrap() {
                Event::Uplink(replica, _, LinkEvent::Up(_)) => return (replica.0, true),
                Event::Uplink(replica, _, LinkEvent::Down(_)) => return (replica.0, false),
                Event::Uplink(_, _, LinkEvent::Message(message)) => assert!(matches!(*message, Message::Ping)),
                _ => panic!("an event of something else"),
            }
        }
    }

    #[tokio::test]
    async fn a_node_dials_the_replicas_of_which_it_is_told_and_forgets_those_that_went() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(&dir.path().join("ca"), "demo").unwrap();
        let replicas: Vec<_> = (1..=3).map(|id| replica(&authority, dir.path(), id)).collect();
        let own = endpoint(&authority, dir.path(), Role::Prefill, "prefill-1");
        let (events_tx, mut events) = mpsc::channel(64);
        let (lists, told) = mpsc::channel(LISTS_MAX);
        let (_hello, hellos) = watch::channel(hello("prefill-1"));
        let slab = KvSlab::new(64, 1, 1).unwrap();
        let streams = StreamContext { gates: Gates::default(), slab, events: events_tx.clone() };
        let context = (Links::new(streams), events_tx);
        tokio::spawn(keep_uplinks(own, replicas[..1].to_vec(), told, hellos, context, Shutdown::new()));
        assert_eq!(next(&mut events).await, (1, true), "the one of the command line");
        let list = |of: &[usize]| -> Vec<ReplicaAddress> {
            let one = |at: &usize| ReplicaAddress { replica: replicas[*at].0, address: replicas[*at].1.to_string() };
            of.iter().map(one).collect()
        };
        lists.send((ReplicaId(1), list(&[0, 1, 2]))).await.unwrap();
        let mut up = [next(&mut events).await, next(&mut events).await];
        up.sort_unstable();
        assert_eq!(up, [(2, true), (3, true)]);
        lists.send((ReplicaId(3), list(&[0, 1, 2]))).await.unwrap();
        lists.send((ReplicaId(1), list(&[0, 1]))).await.unwrap();
        lists.send((ReplicaId(2), list(&[0, 1]))).await.unwrap();
        assert_eq!(next(&mut events).await, (3, false), "its link is dropped");
        // That it is not dialed again shows in what comes next: the others' links, when they move.
        lists.send((ReplicaId(2), list(&[0]))).await.unwrap();
        lists.send((ReplicaId(1), list(&[0]))).await.unwrap();
        assert_eq!(next(&mut events).await, (2, false));
        assert!(events.try_recv().is_err(), "nothing else happened");
    }
}
