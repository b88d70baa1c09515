//! Links between replicas: whom to dial as the members change, and what comes over such a link.
//!
//! The first message on it says which log the peer has; only then is a raft frame of it heard. A peer that is no member, or has
//! another log than the one that is enrolled, is told so and cut off: its vote must not count.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use millrace_core::ids::ReplicaId;
use millrace_core::message::{Message, Role};
use millrace_node::dial::keep_connected;
use millrace_node::endpoint::{Endpoint, Target};
use millrace_node::link::{HELLO_TIMEOUT, Link, LinkReceiver};
use millrace_node::shutdown::Shutdown;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tracing::{debug, info, warn};

use super::{Links, outbox};
use crate::replicas::Replicas;
use crate::roster::Place;

/// How often links are compared with the members.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Looks without a leader after which all others are dialed: a replica with a low number that was taken out is dialed by nobody.
const ALONE_LOOKS: u32 = 10;
/// Time for a last word to arrive.
const LAST_WORD_WAIT_MAX: Duration = Duration::from_secs(1);

/// A replica that is being dialed; not any more when dropped.
struct Dialed {
    place: Place,
    task: JoinHandle<()>,
}

impl Drop for Dialed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A link that counts until this is dropped, be it because the task that serves it is.
struct Attached(u64, ReplicaId, Arc<Replicas>);

impl Drop for Attached {
    fn drop(&mut self) {
        self.2.detach(self.1, self.0);
    }
}

impl Links {
    /// Keeps links to the replicas that are ours to dial, tells removed ones that they are, and nodes where the replicas are; until
    /// shutdown.
    pub async fn keep(self: Arc<Self>, endpoint: Endpoint, shutdown: Shutdown) {
        let (mut dialed, mut told, mut alone) = (BTreeMap::new(), None, 0);
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = look.tick() => {}
                _ = shutdown.wait() => return,
            }
            alone = if self.proposer.raft.status().leader.is_some() { 0 } else { alone + 1 };
            let mut others = self.proposer.roster.others();
            others.retain(|id, _| *id < self.config.me || alone >= ALONE_LOOKS);
            self.redial(&mut dialed, others, &endpoint, &shutdown);
            self.expel_removed();
            let now = self.proposer.roster.told();
            if let Some(list) = now.as_ref().filter(|_| now != told) {
                self.proposer.nodes.send_to_all(&Message::Replicas(list.clone()));
            }
            told = now;
        }
    }

    fn redial(
        self: &Arc<Self>,
        dialed: &mut BTreeMap<ReplicaId, Dialed>,
        wanted: BTreeMap<ReplicaId, Place>,
        endpoint: &Endpoint,
        shutdown: &Shutdown,
    ) {
        dialed.retain(|id, old| wanted.get(id) == Some(&old.place));
        for (id, place) in wanted {
            if let (Some(addr), false) = (place.addr, dialed.contains_key(&id)) {
                let target = Target { addr, role: Role::Coordinator, name: Some(place.name.clone()) };
                let task = tokio::spawn(self.clone().dial(endpoint.clone(), target, shutdown.clone()));
                dialed.insert(id, Dialed { place, task });
            }
        }
    }

    async fn dial(self: Arc<Self>, endpoint: Endpoint, target: Target, shutdown: Shutdown) {
        // Our words do not change: a closed channel keeps its last value.
        let (_, hello) = watch::channel(self.hello(Role::Coordinator));
        let (up, mut links) = mpsc::channel(1);
        tokio::spawn(keep_connected(endpoint, target, hello, up, shutdown));
        while let Some((link, receiver)) = links.recv().await {
            self.clone().serve(link, receiver).await;
        }
    }

    fn expel_removed(&self) {
        let replicas = &self.proposer.replicas;
        for id in replicas.linked_ids().into_iter().filter(|id| self.proposer.roster.was_removed(*id)) {
            if let Err(why) = self.proposer.roster.judge(id, 0) {
                info!(replica = %id, "a removed replica is told so");
                replicas.send(id, Message::NoMember(why));
            }
            replicas.forget(id);
        }
    }

    pub(super) async fn serve_replica(self: Arc<Self>, link: Link, mut receiver: LinkReceiver) {
        let Some(id) = self.proposer.roster.id_of(&link.peer().name).filter(|id| *id != self.config.me) else {
            return link.close("no other replica of this cluster has that name");
        };
        let Some(log) = self.meet(&link, &mut receiver).await else {
            return link.close("the first message must say which log you have");
        };
        if let Err(why) = self.proposer.roster.judge(id, log) {
            warn!(replica = %id, why, "a replica is not spoken to");
            // If the link has ended, it will be told when it comes again.
            let _ = link.send(&Message::NoMember(why.clone()));
            return link.drain(LAST_WORD_WAIT_MAX, &why).await;
        }
        let replicas = self.proposer.replicas.clone();
        let attached = Attached(replicas.attach(id, outbox(&link)), id, replicas.clone());
        info!(replica = %id, "replica linked");
        while let Some(message) = receiver.recv().await {
            // An expelled replica is not heard, whatever it goes on saying.
            if !replicas.holds(id, attached.0) {
                link.drain(LAST_WORD_WAIT_MAX, "the replica is no member").await;
                break;
            }
            self.on_replica_message(id, &link, message);
        }
        drop(attached);
        info!(replica = %id, closed = ?link.is_closed(), "replica link ended");
    }

    /// Says which log is ours and hears which is the peer's.
    async fn meet(&self, link: &Link, receiver: &mut LinkReceiver) -> Option<u128> {
        link.send(&Message::Log(self.proposer.raft.status().log)).ok()?;
        match tokio::time::timeout(HELLO_TIMEOUT, receiver.recv()).await {
            Ok(Some(Message::Log(log))) => Some(log),
            _ => None,
        }
    }

    fn on_replica_message(self: &Arc<Self>, from: ReplicaId, link: &Link, message: Message) {
        let replicas = &self.proposer.replicas;
        match message {
            Message::Raft(frame) => self.proposer.raft.step(from.0, &frame),
            Message::Forward { id, command } => self.answer_forward(from, link, id, command),
            Message::Forwarded { id, result } => replicas.answered(from, id, result),
            Message::Query { id, json } => self.answer_query(link, id, json),
            Message::Answer { id, result } => replicas.answered(from, id, result.map(String::into_bytes)),
            Message::NoMember(why) => self.proposer.raft.told_removed(from.0, why),
            _ => debug!(replica = %from, "a message without meaning between replicas"),
        }
    }
}
