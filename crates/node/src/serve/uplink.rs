//! A node's standing with the coordinator: joining, heartbeats, block deltas, and the way of tokens to their gateway.

use std::collections::BTreeMap;

use millrace_core::ids::{BlockHash, Epoch, NodeId, ReplicaId, Time};
use millrace_core::message::{BlockOp, Join, Load, Message};
use millrace_core::publish::{Output, Publisher};

use super::event::LinkNo;
use crate::link::Link;

/// Microseconds between heartbeats.
const HEARTBEAT_US: u64 = 200_000;
/// Microseconds between attempts to join.
const JOIN_RETRY_US: u64 = 300_000;
/// A node that is refused for so long, again and again, gives up and says why.
const JOIN_REFUSED_MAX_US: u64 = 15_000_000;
/// Refusals further apart than this have nothing to do with one another.
const JOIN_REFUSED_GAP_US: u64 = 5_000_000;

/// Links to all replicas, and what was agreed over them.
pub(super) struct Uplinks {
    links: BTreeMap<ReplicaId, (LinkNo, Link)>,
    join: Join,
    joined: Option<(NodeId, Epoch)>,
    publisher: Option<Publisher>,
    /// The replica that gets deltas; any will do, it passes them to the leader.
    home: Option<ReplicaId>,
    /// The replica asked last for membership, so that the next one is asked next.
    asked: Option<ReplicaId>,
    next_join: Time,
    next_heartbeat: Time,
    /// First and last of a run of refusals.
    refused: Option<(Time, Time)>,
}

impl Uplinks {
    pub(super) fn new(join: Join) -> Self {
        Self {
            links: BTreeMap::new(),
            join,
            joined: None,
            publisher: None,
            home: None,
            asked: None,
            next_join: Time(0),
            next_heartbeat: Time(0),
            refused: None,
        }
    }

    pub(super) fn joined(&self) -> Option<(NodeId, Epoch)> {
        self.joined
    }

    /// The last delta that the log has applied, when nothing is under way to it.
    pub(super) fn settled(&self) -> Option<u64> {
        self.publisher.as_ref().and_then(Publisher::settled)
    }

    pub(super) fn up(&mut self, now: Time, replica: ReplicaId, no: LinkNo, link: Link) {
        self.links.insert(replica, (no, link));
        self.home.get_or_insert(replica);
        self.next_heartbeat = now;
    }

    /// Forgets a link; false when a newer one has taken its place already.
    pub(super) fn down(&mut self, replica: ReplicaId, no: LinkNo) -> bool {
        if self.links.get(&replica).is_none_or(|(current, _)| *current != no) {
            return false;
        }
        self.links.remove(&replica);
        if self.home == Some(replica) {
            self.home = self.links.keys().next().copied();
        }
        true
    }

    /// Sends to one replica. A lost link is reported by its own event, so the result is not needed.
    pub(super) fn send(&self, replica: ReplicaId, message: Message) {
        if let Some((_, link)) = self.links.get(&replica) {
            let _ = link.send(&message);
        }
    }

    pub(super) fn on_joined(&mut self, node: NodeId, epoch: Epoch, pool_is_empty: bool) -> bool {
        self.refused = None;
        if self.joined == Some((node, epoch)) {
            return false;
        }
        self.joined = Some((node, epoch));
        self.publisher = Some(Publisher::new(node, epoch, pool_is_empty));
        true
    }

    /// A refusal; the reason when the node should give up. One that comes after joining means that this incarnation
    /// counts as dead there, so the node joins again.
    pub(super) fn on_refused(&mut self, now: Time, reason: String, retry: bool) -> Option<String> {
        let since = self.refused.filter(|(_, last)| now.since(*last) <= JOIN_REFUSED_GAP_US).map_or(now, |(first, _)| first);
        self.refused = Some((since, now));
        if !retry || now.since(since) > JOIN_REFUSED_MAX_US {
            return Some(reason);
        }
        tracing::info!(%reason, "not a member yet");
        if self.joined.is_some() && self.next_join <= now {
            self.ask_to_join(now);
        }
        None
    }

    pub(super) fn on_applied(&mut self, epoch: Epoch, seq: u64) {
        if let Some(publisher) = &mut self.publisher {
            publisher.applied(epoch, seq);
        }
    }

    pub(super) fn on_want_snapshot(&mut self, epoch: Epoch) {
        if let Some(publisher) = &mut self.publisher {
            publisher.want_snapshot(epoch);
        }
    }

    /// A change of the pool. Before joining there is nobody to tell: the first snapshot will hold it.
    pub(super) fn publish(&mut self, now: Time, op: BlockOp) {
        if let Some(publisher) = &mut self.publisher {
            publisher.push(now, op);
        }
    }

    /// Sends whatever is due.
    pub(super) fn advance(&mut self, now: Time, load: impl FnOnce() -> Load, cached: impl Fn() -> Vec<BlockHash>) {
        if self.joined.is_none() && now >= self.next_join {
            self.ask_to_join(now);
        }
        let Some((node, epoch)) = self.joined else { return };
        if now >= self.next_heartbeat {
            self.next_heartbeat = now.after(HEARTBEAT_US);
            let load = load();
            for (_, link) in self.links.values() {
                let _ = link.send(&Message::Heartbeat { node, epoch, load });
            }
        }
        self.publish_due(now, cached);
    }

    pub(super) fn deadline(&self) -> Time {
        let own = if self.joined.is_some() { self.next_heartbeat } else { self.next_join };
        let publisher = self.publisher.as_ref().and_then(Publisher::deadline);
        publisher.map_or(own, |deadline| deadline.min(own))
    }

    /// Says goodbye, so that nothing more is sent here.
    pub(super) fn leave(&self) {
        if let (Some((node, epoch)), Some(home)) = (self.joined, self.home) {
            self.send(home, Message::Leave { node, epoch });
        }
    }

    fn ask_to_join(&mut self, now: Time) {
        self.next_join = now.after(JOIN_RETRY_US);
        let after = |asked: ReplicaId| self.links.range(asked..).map(|(id, _)| *id).find(|id| *id != asked);
        let next = self.asked.and_then(after).or_else(|| self.links.keys().next().copied());
        if let Some(replica) = next {
            self.asked = Some(replica);
            self.send(replica, Message::Join(self.join.clone()));
        }
    }

    fn publish_due(&mut self, now: Time, cached: impl Fn() -> Vec<BlockHash>) {
        let (Some(publisher), Some(home)) = (&mut self.publisher, self.home) else { return };
        let Some((_, link)) = self.links.get(&home) else { return };
        while let Some(output) = publisher.poll(now) {
            match output {
                Output::Delta(delta) => {
                    let _ = link.send(&Message::Delta(delta));
                }
                Output::NeedDigest => {
                    let _ = link.send(&Message::CacheDigest(publisher.digest(&cached())));
                }
                Output::NeedSnapshot => {
                    for page in publisher.snapshot(now, &cached()) {
                        let _ = link.send(&Message::Snapshot(page));
                    }
                }
            }
        }
    }
}
