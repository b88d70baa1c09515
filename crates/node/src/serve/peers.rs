//! Dials other nodes, and greets them with the node's present incarnation.

use millrace_core::ids::{Epoch, NodeId};
use millrace_core::message::{Hello, Peer, Role};
use millrace_core::node::Input;
use tokio::sync::{mpsc, watch};

use super::event::{Event, LinkEvent};
use super::links::{Links, read_link};
use crate::endpoint::{ConnectError, Endpoint, Target};
use crate::link::{Link, LinkError, LinkReceiver};

/// What it takes to dial.
pub(super) struct Dialer {
    pub(super) endpoint: Endpoint,
    pub(super) hello: watch::Sender<Hello>,
    pub(super) links: Links,
    pub(super) events: mpsc::Sender<Event>,
}

impl Dialer {
    /// Greets with this incarnation from now on.
    pub(super) fn greet(&self, node: NodeId, epoch: Epoch) {
        self.hello.send_modify(|hello| (hello.node, hello.epoch) = (node, epoch));
    }

    /// Makes a link to a node and reads it; the result is an event.
    pub(super) fn dial(&self, peer: Peer) {
        let (endpoint, hello, events) = (self.endpoint.clone(), self.hello.borrow().clone(), self.events.clone());
        let links = self.links.clone();
        tokio::spawn(async move {
            match dial(&endpoint, &hello, &peer).await {
                Ok((link, receiver)) => {
                    let no = links.next_no();
                    links.read_cells(no, link.clone());
                    read_link(link, receiver, events, move |event: LinkEvent| Event::Peer(no, event)).await;
                }
                Err(reason) => {
                    let _ = events.send(Event::Node(Input::DialFailed { name: peer.name, reason })).await;
                }
            }
        });
    }
}

async fn dial(endpoint: &Endpoint, hello: &Hello, peer: &Peer) -> Result<(Link, LinkReceiver), String> {
    let addr = peer.address.parse().map_err(|e| format!("{} is not ip:port: {e}", peer.address))?;
    // A ticket names a node; both kinds may decode, so its certificate may say either.
    let target = |role| Target { addr, role, name: Some(peer.name.clone()) };
    match Link::dial(endpoint, &target(Role::Decode), hello).await {
        Ok(dialed) => Ok(dialed),
        Err(LinkError::Connect(ConnectError::WrongPeer { field: "role", .. })) => {
            Link::dial(endpoint, &target(Role::Prefill), hello).await.map_err(|error| error.to_string())
        }
        // Nobody there: a second try would only take as long again.
        Err(error) => Err(error.to_string()),
    }
}
