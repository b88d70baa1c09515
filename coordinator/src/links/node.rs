//! What nodes say on their links. A node speaks for itself only: what names another node ends the link.

use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_core::cluster::{Command, NodeState};
use millrace_core::ids::{Epoch, NodeId};
use millrace_core::message::{Join, Load, Message};
use millrace_node::link::{Link, LinkReceiver};
use tokio::time::MissedTickBehavior;
use tracing::{debug, info, warn};

use super::{Links, outbox};
use crate::deltas::{Report, Reported};
use crate::join::{self, Identity, Outcome};
use crate::nodes::{LinkId, Outbox};

/// How often a node is sent a ping, and looked whether it acknowledged what it was sent before.
const PING_INTERVAL: Duration = Duration::from_millis(200);

/// A node's link, while it is served.
struct Served {
    who: Identity,
    link: Link,
    id: LinkId,
    outbox: Outbox,
}

impl Links {
    pub(super) async fn serve_node(self: Arc<Self>, link: Link, mut receiver: LinkReceiver) {
        let (peer, hello) = (link.peer(), link.hello());
        let who = Identity { name: peer.name.clone(), role: peer.role, instance: hello.instance };
        let outbox = outbox(&link);
        let nodes = &self.proposer.nodes;
        let id = nodes.attach(Instant::now(), &who.name, who.instance, outbox.clone());
        let (number, epoch) = (hello.node, hello.epoch);
        if let Some(replicas) = self.proposer.roster.told() {
            outbox(Message::Replicas(replicas));
        }
        let served = Served { who, link, id, outbox };
        if epoch != Epoch(0) && self.speaks_for_itself(&served, number) {
            nodes.joined(&served.who.name, id, (number, epoch));
        }
        info!(node = served.who.name, "node linked");
        let (mut ping, mut acknowledged) = (tokio::time::interval(PING_INTERVAL), 0);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                message = receiver.recv() => match message {
                    Some(message) => self.on_node_message(&served, message),
                    None => break,
                },
                _ = ping.tick() => self.ping(&served, &mut acknowledged),
            }
        }
        nodes.detach(&served.who.name, id);
        info!(node = served.who.name, closed = ?served.link.is_closed(), "node link ended");
    }

    /// A node that speaks may still not hear us: a network can fail in one direction only.
    fn ping(&self, served: &Served, acknowledged: &mut u64) {
        let now = served.link.acknowledgements();
        if now > std::mem::replace(acknowledged, now) {
            self.proposer.nodes.answered(Instant::now(), &served.who.name, served.id);
        }
        (served.outbox)(Message::Ping);
    }

    fn on_node_message(&self, served: &Served, message: Message) {
        if let Message::Heartbeat { node, epoch, load } = message {
            return self.on_heartbeat(served, (node, epoch), load);
        }
        self.proposer.nodes.heard(Instant::now(), &served.who.name, served.id);
        match message {
            Message::Token(token) => self.with_number(served, |node| self.dispatcher.token(node, token)),
            Message::Failed(failed) => self.with_number(served, |node| self.dispatcher.failed(node, failed)),
            Message::Handover(stats) => self.with_number(served, |node| self.dispatcher.handover(node, stats)),
            Message::Delta(delta) => self.on_report(served, delta.node, Report::Delta(delta)),
            Message::Snapshot(page) => self.on_report(served, page.node, Report::Page(page)),
            Message::CacheReport(report) => self.with_number(served, |node| {
                if report.node == node {
                    self.proposer.nodes.orders.reported(report);
                }
            }),
            Message::CacheDigest(digest) => self.on_report(served, digest.node, Report::Digest(digest)),
            Message::Join(join) => self.on_join(served, join),
            Message::Leave { node, epoch } => self.on_goodbye(served, node, Command::Leave { node, epoch }),
            Message::Drain { node, epoch } if self.is_current(node, epoch) => {
                self.on_goodbye(served, node, Command::SetState { node, state: NodeState::Draining });
            }
            _ => debug!(node = served.who.name, "a message without meaning from a node"),
        }
    }

    fn with_number(&self, served: &Served, act: impl FnOnce(NodeId)) {
        if let Some((node, _)) = self.proposer.nodes.who(&served.who.name, served.id) {
            act(node);
        }
    }

    /// Whether this link's node may be number `node`, as far as is applied here; ends the link if not.
    fn speaks_for_itself(&self, served: &Served, node: NodeId) -> bool {
        let owner = self.proposer.cluster.read().node(node).map(|n| n.name.clone());
        let own = owner.as_ref().is_none_or(|name| *name == served.who.name);
        if !own {
            warn!(node = served.who.name, claimed = ?owner, "a node speaks for another");
            served.link.close("you speak for another node");
        }
        own
    }

    fn on_heartbeat(&self, served: &Served, who: (NodeId, Epoch), load: Load) {
        if self.speaks_for_itself(served, who.0) {
            self.proposer.nodes.heartbeat(Instant::now(), &served.who.name, served.id, who, load);
        }
    }

    fn on_report(&self, served: &Served, node: NodeId, report: Report) {
        if !self.speaks_for_itself(served, node) {
            return;
        }
        let reported = Reported { report, reply: served.outbox.clone() };
        if self.reports.try_send(reported).is_err() {
            debug!(node = served.who.name, "cache changes are dropped: too many wait");
        }
    }

    fn on_join(&self, served: &Served, join: Join) {
        let Ok(permit) = self.joins.clone().try_acquire_owned() else {
            let reason = "too many joins at a time".into();
            (served.outbox)(Outcome::NotNow(reason).message());
            return;
        };
        let (proposer, model) = (self.proposer.clone(), self.model.clone());
        let (who, id, outbox) = (served.who.clone(), served.id, served.outbox.clone());
        let admin = self.admin.clone();
        tokio::spawn(async move {
            let outcome = join::join(&proposer, &who, join, &model).await;
            match &outcome {
                Outcome::Joined(node, epoch) => {
                    proposer.nodes.joined(&who.name, id, (*node, *epoch));
                    info!(node = who.name, number = %node, %epoch, "node joined");
                }
                Outcome::Refused { reason, retry } => {
                    info!(node = who.name, reason, retry, "node refused");
                    admin.refused(&who.name, reason);
                }
                // Not for the doctor: what keeps the cluster from answering it finds by itself.
                Outcome::NotNow(reason) => info!(node = who.name, reason, "node told to come again"),
            }
            outbox(outcome.message());
            drop(permit);
        });
    }

    fn is_current(&self, node: NodeId, epoch: Epoch) -> bool {
        self.proposer.cluster.read().current(node, epoch).is_some()
    }

    /// A node that is being stopped asks to be drained, or leaves.
    fn on_goodbye(&self, served: &Served, node: NodeId, command: Command) {
        let Ok(permit) = self.answering.clone().try_acquire_owned() else { return };
        if !self.speaks_for_itself(served, node) {
            return;
        }
        let (proposer, name) = (self.proposer.clone(), served.who.name.clone());
        tokio::spawn(async move {
            // If this fails, the node finishes what it has, and its lease ends by itself.
            match proposer.propose(&command).await {
                Ok(_) => info!(node = name, ?command, "a node is being stopped"),
                Err(error) => warn!(node = name, ?command, %error, "a node's goodbye is not in the log"),
            }
            drop(permit);
        });
    }
}
