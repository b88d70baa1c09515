//! The links of this replica: who may come, who is dialed, and where each message goes.
//!
//! Every pair of replicas keeps one link, dialed by the one with the higher number (`replica`); nodes and operators dial us. A peer
//! is who its certificate says. Handlers do not wait: what takes time runs in a task of its own, and how many may run is bounded.

mod node;
mod replica;

use std::sync::Arc;

use millrace_core::ids::{Epoch, NodeId, ReplicaId};
use millrace_core::message::{Hello, Message, ModelIdentity, Role};
use millrace_node::endpoint::{Connection, Endpoint};
use millrace_node::frame::FRAME_MAX;
use millrace_node::link::{Link, LinkError, LinkReceiver};
use tokio::sync::{Semaphore, mpsc};
use tracing::{debug, info, warn};

use crate::admin::Admin;
use crate::config::Config;
use crate::deltas::Reported;
use crate::dispatch::Dispatcher;
use crate::join::JOINS_MAX;
use crate::nodes::Outbox;
use crate::propose::Proposer;

/// Commands and queries of peers that are being answered at a time; one more is refused.
pub const ANSWERING_MAX: usize = 256;
/// Raft frames that wait for the links; what does not fit is dropped, which raft takes as loss.
pub const RAFT_FRAMES_MAX: usize = 4096;
/// Largest raft frame that fits a link's frame with its preamble and archive.
const RAFT_FRAME_BYTES_MAX: usize = FRAME_MAX - 1024;

/// What the links lead to.
pub struct Links {
    /// Who we are.
    pub config: Config,
    /// What we serve.
    pub model: ModelIdentity,
    /// Our instance.
    pub instance: u128,
    /// Commands.
    pub proposer: Proposer,
    /// Tokens.
    pub dispatcher: Dispatcher,
    /// Operators' questions.
    pub admin: Arc<Admin>,
    /// Cache changes.
    pub reports: mpsc::Sender<Reported>,
    /// Joins that are being handled.
    pub joins: Arc<Semaphore>,
    /// Commands and queries that are being answered.
    pub answering: Arc<Semaphore>,
}

impl Links {
    /// Links that lead nowhere yet.
    #[must_use]
    pub fn new(
        (config, model, instance): (Config, ModelIdentity, u128),
        proposer: Proposer,
        dispatcher: Dispatcher,
        admin: Arc<Admin>,
        reports: mpsc::Sender<Reported>,
    ) -> Arc<Self> {
        let (joins, answering) = (Arc::new(Semaphore::new(JOINS_MAX)), Arc::new(Semaphore::new(ANSWERING_MAX)));
        Arc::new(Self { config, model, instance, proposer, dispatcher, admin, reports, joins, answering })
    }

    /// Our first words to a peer of `role`. Replicas compare models at once; a node's is compared when it joins, so that it gets a
    /// reason that it can act on.
    fn hello(&self, role: Role) -> Hello {
        Hello {
            cluster: self.config.args.cluster.clone(),
            name: self.config.args.name.clone(),
            instance: self.instance,
            node: NodeId(0),
            epoch: Epoch(0),
            model: (role == Role::Coordinator).then(|| self.model.clone()),
        }
    }

    /// Takes whoever dials us, until the endpoint closes.
    pub async fn accept(self: Arc<Self>, endpoint: Endpoint) {
        while let Some(accepting) = endpoint.accept().await {
            let links = self.clone();
            tokio::spawn(async move {
                match accepting.finish().await {
                    Ok(connection) => links.greet(connection).await,
                    Err(error) => debug!(%error, "a handshake failed"),
                }
            });
        }
    }

    async fn greet(self: Arc<Self>, connection: Connection) {
        let hello = self.hello(connection.peer.role);
        let peer = connection.peer.clone();
        match Link::accept(connection, &hello).await {
            Ok((link, receiver)) => self.serve(link, receiver).await,
            Err(LinkError::Refusing { reason, .. }) => {
                info!(%peer, reason, "a peer is refused");
                self.admin.refused(&peer.name, &reason);
            }
            Err(error) => debug!(%error, "a peer did not say its first words"),
        }
    }

    async fn serve(self: Arc<Self>, link: Link, receiver: LinkReceiver) {
        match link.peer().role {
            Role::Coordinator => self.serve_replica(link, receiver).await,
            Role::Prefill | Role::Decode => self.serve_node(link, receiver).await,
            Role::Admin => self.serve_admin(link, receiver).await,
        }
    }

    async fn serve_admin(self: Arc<Self>, link: Link, mut receiver: LinkReceiver) {
        while let Some(message) = receiver.recv().await {
            if let Message::Query { id, json } = message {
                self.answer_query(&link, id, json);
            }
        }
    }

    fn answer_forward(&self, from: ReplicaId, link: &Link, id: u64, command: Vec<u8>) {
        let (proposer, link) = (self.proposer.clone(), link.clone());
        let Ok(permit) = self.answering.clone().try_acquire_owned() else {
            let _ = link.send(&Message::Forwarded { id, result: Err("too many commands are in flight".into()) });
            return;
        };
        tokio::spawn(async move {
            let result = proposer.forwarded(from, command).await;
            let _ = link.send(&Message::Forwarded { id, result });
            drop(permit);
        });
    }

    fn answer_query(&self, link: &Link, id: u64, json: String) {
        let (admin, link) = (self.admin.clone(), link.clone());
        let Ok(permit) = self.answering.clone().try_acquire_owned() else {
            let _ = link.send(&Message::Answer { id, result: Err("too many queries are in flight".into()) });
            return;
        };
        tokio::spawn(async move {
            let result = admin.query(&json).await;
            let _ = link.send(&Message::Answer { id, result });
            drop(permit);
        });
    }
}

/// Hands messages to a link; a link that does not take one has ended or ends by it.
fn outbox(link: &Link) -> Outbox {
    let link = link.clone();
    Arc::new(move |message| link.send(&message).is_ok())
}

/// Carries raft's frames to the links, until raft stops. A frame for a replica without a link is dropped: raft sends again.
pub async fn carry_raft(proposer: Proposer, mut frames: mpsc::Receiver<(u64, Vec<u8>)>) {
    while let Some((to, frame)) = frames.recv().await {
        if frame.len() > RAFT_FRAME_BYTES_MAX {
            warn!(to, bytes = frame.len(), "a raft frame is too large for a link and is dropped");
            continue;
        }
        proposer.replicas.send(ReplicaId(to), Message::Raft(frame));
    }
}
