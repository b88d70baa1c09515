//! What the coordinator asks of a node: tickets, their end, membership, orders.

use alloc::string::String;
use alloc::vec::Vec;

use super::{Effect, Node, Note};
use crate::batch;
use crate::ids::{AttemptId, Epoch, NodeId, ReplicaId};
use crate::message::{AttemptFailed, FailKind, Message, Ticket};
use crate::planted::{Bug, planted};
use crate::transfer::{recv, send};

impl Node {
    pub(super) fn on_coordinator(&mut self, replica: ReplicaId, message: Message) {
        match message {
            Message::Assign(ticket) => self.on_assign(replica, ticket),
            Message::Cancel(attempt) => self.cancel(attempt),
            Message::CacheOrder(order) => self.on_order(replica, order),
            Message::Joined { node, epoch } => self.on_joined(node, epoch),
            Message::JoinRefused { reason, retry } => self.on_refused(reason, retry),
            Message::DeltaApplied { epoch, seq } => self.uplinks.on_applied(epoch, seq),
            Message::WantSnapshot { epoch } => self.uplinks.on_want_snapshot(epoch),
            Message::Ping => {}
            Message::Replicas(list) => self.effects.push_back(Effect::Replicas(replica, list)),
            other => self.note(Note::Meaningless(other.into())),
        }
    }

    /// A new incarnation greets with itself; links made under the old one end.
    fn on_joined(&mut self, node: NodeId, epoch: Epoch) {
        let pool_is_empty = self.batch.cached_names().next().is_none();
        if !self.uplinks.on_joined(node, epoch, pool_is_empty) {
            return;
        }
        self.note(Note::Joined(node, epoch));
        self.effects.push_back(Effect::Greet(node, epoch));
        self.effects.extend(self.peers.links().map(|link| Effect::Close(link, "this node has joined anew")));
    }

    fn on_refused(&mut self, reason: String, retry: bool) {
        if self.uplinks.on_refused(self.now, retry, &mut self.effects) {
            self.effects.push_back(Effect::Refused(reason));
        } else {
            self.note(Note::NotYet(reason));
        }
    }

    fn on_assign(&mut self, replica: ReplicaId, ticket: Ticket) {
        let attempt = ticket.attempt;
        // Of a node that is drained gateways ask the KV of what they move.
        if self.stopping.is_some() && ticket.decode.is_none() {
            let detail = "the node is stopping".into();
            return self.tell(replica, Message::Failed(AttemptFailed { attempt, kind: FailKind::Stopping, detail }));
        }
        if self.gateways.contains_key(&attempt) {
            return;
        }
        self.gateways.insert(attempt, replica);
        if ticket.decode.is_some() {
            self.splitting.insert(attempt, ticket.clone());
        }
        self.batch.handle(self.now, batch::Input::Add(ticket));
    }

    /// The gateway's process or the way to it is gone: its clients are too, or it has made new tickets.
    pub(super) fn cancel_all_of(&mut self, replica: ReplicaId) {
        let attempts: Vec<_> = self.gateways.iter().filter(|(_, r)| **r == replica).map(|(a, _)| *a).collect();
        attempts.into_iter().for_each(|attempt| self.cancel(attempt));
        let asking: Vec<_> = self.asking.iter().filter(|(_, asking)| asking.gateway == replica).map(|(a, _)| *a).collect();
        for attempt in asking {
            self.batch.handle(self.now, batch::Input::Cancel(attempt));
            let Some(asking) = self.asking.remove(&attempt) else { continue };
            let detail = "the link to the gateway of the ticket is lost".into();
            self.send(asking.link, Message::Declined { attempt, kind: FailKind::PeerLost, detail });
        }
    }

    /// Ends an attempt on this node, whatever it is doing.
    pub(super) fn cancel(&mut self, attempt: AttemptId) {
        self.gateways.remove(&attempt);
        self.splitting.remove(&attempt);
        if self.batch.knows(attempt) || self.leaving.contains_key(&attempt) {
            self.ending.insert(attempt);
        }
        if !planted(Bug::AskKept) {
            self.asking.remove(&attempt);
        }
        self.end(attempt, FailKind::Stopping, "cancelled by the gateway");
    }

    /// Ends the hand-overs of an attempt and frees its slots, at once or when nothing reads them any more.
    pub(super) fn end(&mut self, attempt: AttemptId, kind: FailKind, detail: &str) {
        self.recv_input(attempt, recv::Input::Cancel(kind, detail.into()));
        if self.leaving.contains_key(&attempt) {
            self.cancelled.insert(attempt);
            self.send_input(attempt, send::Input::Cancel(kind, detail.into()));
        } else {
            self.batch.handle(self.now, batch::Input::Cancel(attempt));
        }
    }

    /// Tells the gateway that the attempt is lost here, once.
    pub(super) fn fail(&mut self, attempt: AttemptId, kind: FailKind, detail: String) {
        if let Some(replica) = self.gateways.remove(&attempt) {
            self.note(Note::Failed(attempt, kind, detail.clone()));
            self.tell(replica, Message::Failed(AttemptFailed { attempt, kind, detail }));
        }
        self.splitting.remove(&attempt);
    }
}
