//! Links between nodes: the ones this node dialled to hand over KV, and the ones on which others hand over to it.

use std::collections::{HashMap, HashSet};

use millrace_core::ids::{Epoch, NodeId};
use millrace_core::message::{Hello, Message, Peer, Role};
use tokio::sync::{mpsc, watch};

use super::event::{Event, LinkEvent, LinkNo};
use super::links::{Links, read_link};
use crate::endpoint::{ConnectError, Endpoint, Target};
use crate::link::{Link, LinkError};

/// All links to other nodes.
pub(super) struct Peers {
    endpoint: Endpoint,
    hello: watch::Sender<Hello>,
    links: Links,
    events: mpsc::Sender<Event>,
    by_no: HashMap<LinkNo, Link>,
    dialed: HashMap<String, LinkNo>,
    dialing: HashSet<String>,
}

impl Peers {
    pub(super) fn new(endpoint: Endpoint, hello: watch::Sender<Hello>, links: Links, events: mpsc::Sender<Event>) -> Self {
        let (by_no, dialed, dialing) = (HashMap::new(), HashMap::new(), HashSet::new());
        Self { endpoint, hello, links, events, by_no, dialed, dialing }
    }

    /// This node has a new incarnation: it greets with it from now on. Links made under the old one end.
    pub(super) fn set_membership(&mut self, node: NodeId, epoch: Epoch) {
        self.hello.send_modify(|hello| (hello.node, hello.epoch) = (node, epoch));
        for link in self.by_no.values() {
            link.close("this node has joined anew");
        }
    }

    pub(super) fn up(&mut self, no: LinkNo, link: Link) {
        let name = link.peer().name.clone();
        if self.dialing.remove(&name) {
            self.dialed.insert(name, no);
        }
        self.by_no.insert(no, link);
    }

    pub(super) fn down(&mut self, no: LinkNo) {
        self.by_no.remove(&no);
        self.dialed.retain(|_, dialed| *dialed != no);
    }

    pub(super) fn dial_failed(&mut self, name: &str) {
        self.dialing.remove(name);
    }

    /// Sends on a link. A lost link is reported by its own event, so the result is not needed.
    pub(super) fn send(&self, no: LinkNo, message: Message) {
        if let Some(link) = self.by_no.get(&no) {
            let _ = link.send(&message);
        }
    }

    /// The link to a node; dials when there is none, and the answer is an event then. A link to an older incarnation
    /// of the node is closed and dialled anew.
    pub(super) fn to(&mut self, peer: &Peer) -> Option<(LinkNo, Link)> {
        if let Some(no) = self.dialed.get(&peer.name).copied() {
            let link = self.by_no.get(&no)?;
            if link.hello().epoch >= peer.epoch && link.is_closed().is_none() {
                return Some((no, link.clone()));
            }
            link.close("a newer incarnation is meant");
            self.dialed.remove(&peer.name);
        }
        if self.dialing.insert(peer.name.clone()) {
            self.dial(peer);
        }
        None
    }

    fn dial(&self, peer: &Peer) {
        let (name, address) = (peer.name.clone(), peer.address.clone());
        let (endpoint, hello, events) = (self.endpoint.clone(), self.hello.borrow().clone(), self.events.clone());
        let links = self.links.clone();
        tokio::spawn(async move {
            match dial(&endpoint, &hello, &name, &address).await {
                Ok((link, receiver)) => {
                    let no = links.next_no();
                    links.read_cells(no, link.clone());
                    read_link(link, receiver, events, move |event: LinkEvent| Event::Peer(no, event)).await;
                }
                Err(reason) => {
                    let _ = events.send(Event::DialFailed { name, reason }).await;
                }
            }
        });
    }
}

async fn dial(endpoint: &Endpoint, hello: &Hello, name: &str, address: &str) -> Result<(Link, crate::link::LinkReceiver), String> {
    let addr = address.parse().map_err(|e| format!("{address} is not ip:port: {e}"))?;
    // A ticket names a node; both kinds may decode, so its certificate may say either.
    let target = |role| Target { addr, role, name: Some(name.to_owned()) };
    match Link::dial(endpoint, &target(Role::Decode), hello).await {
        Ok(dialed) => Ok(dialed),
        Err(LinkError::Connect(ConnectError::WrongPeer { field: "role", .. })) => {
            Link::dial(endpoint, &target(Role::Prefill), hello).await.map_err(|error| error.to_string())
        }
        // Nobody there: a second try would only take as long again.
        Err(error) => Err(error.to_string()),
    }
}
