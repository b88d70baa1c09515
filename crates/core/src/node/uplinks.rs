//! A node's standing with the coordinator: joining, heartbeats, block deltas, and the way of tokens to their gateway.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use super::{Effect, LinkNo};
use crate::ids::{BlockHash, Epoch, NodeId, ReplicaId, Time};
use crate::message::{BlockOp, Join, Load, Message};
use crate::publish::{Output, Publisher};

/// Microseconds between heartbeats.
const HEARTBEAT_US: u64 = 200_000;
/// Microseconds between attempts to join.
const JOIN_RETRY_US: u64 = 300_000;
/// A node that is refused for so long, again and again, gives up and says why.
const JOIN_REFUSED_MAX_US: u64 = 15_000_000;
/// Refusals further apart than this have nothing to do with one another.
const JOIN_REFUSED_GAP_US: u64 = 5_000_000;

/// Links to all replicas, and what was agreed over them.
#[derive(Debug)]
pub(super) struct Uplinks {
    links: BTreeMap<ReplicaId, LinkNo>,
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

    pub(super) fn up(&mut self, now: Time, replica: ReplicaId, link: LinkNo) {
        self.links.insert(replica, link);
        self.home.get_or_insert(replica);
        self.next_heartbeat = now;
    }

    pub(super) fn down(&mut self, replica: ReplicaId) {
        self.links.remove(&replica);
        if self.home == Some(replica) {
            self.home = self.links.keys().next().copied();
        }
    }

    /// The replica at the other end of a link. O(replicas), which are few.
    pub(super) fn replica(&self, link: LinkNo) -> Option<ReplicaId> {
        self.links.iter().find(|(_, l)| **l == link).map(|(replica, _)| *replica)
    }

    pub(super) fn link(&self, replica: ReplicaId) -> Option<LinkNo> {
        self.links.get(&replica).copied()
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

    /// A refusal; true when the node should give up. One that comes after joining means that this incarnation counts as dead there, so
    /// the node joins again.
    pub(super) fn on_refused(&mut self, now: Time, retry: bool, effects: &mut VecDeque<Effect>) -> bool {
        let since = self.refused.filter(|(_, last)| now.since(*last) <= JOIN_REFUSED_GAP_US).map_or(now, |(first, _)| first);
        self.refused = Some((since, now));
        if !retry || now.since(since) > JOIN_REFUSED_MAX_US {
            return true;
        }
        if self.joined.is_some() && self.next_join <= now {
            self.ask_to_join(now, effects);
        }
        false
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
    pub(super) fn advance(
        &mut self,
        now: Time,
        load: impl FnOnce() -> Load,
        cached: impl Fn() -> Vec<BlockHash>,
        effects: &mut VecDeque<Effect>,
    ) {
        if self.joined.is_none() && now >= self.next_join {
            self.ask_to_join(now, effects);
        }
        let Some((node, epoch)) = self.joined else { return };
        if now >= self.next_heartbeat {
            self.next_heartbeat = now.after(HEARTBEAT_US);
            let load = load();
            effects.extend(self.links.values().map(|link| Effect::Send(*link, Message::Heartbeat { node, epoch, load })));
        }
        self.publish_due(now, cached, effects);
    }

    pub(super) fn deadline(&self) -> Time {
        let own = if self.joined.is_some() { self.next_heartbeat } else { self.next_join };
        let publisher = self.publisher.as_ref().filter(|_| self.home.is_some()).and_then(Publisher::deadline);
        publisher.map_or(own, |deadline| deadline.min(own))
    }

    /// Says goodbye, so that nothing more is sent here.
    pub(super) fn leave(&self, effects: &mut VecDeque<Effect>) {
        let home = self.home.and_then(|home| self.link(home));
        if let (Some((node, epoch)), Some(link)) = (self.joined, home) {
            effects.push_back(Effect::Send(link, Message::Leave { node, epoch }));
        }
    }

    fn ask_to_join(&mut self, now: Time, effects: &mut VecDeque<Effect>) {
        self.next_join = now.after(JOIN_RETRY_US);
        let after = |asked: ReplicaId| self.links.range(asked..).map(|(id, _)| *id).find(|id| *id != asked);
        let next = self.asked.and_then(after).or_else(|| self.links.keys().next().copied());
        let Some(replica) = next else { return };
        self.asked = Some(replica);
        effects.extend(self.link(replica).map(|link| Effect::Send(link, Message::Join(self.join.clone()))));
    }

    fn publish_due(&mut self, now: Time, cached: impl Fn() -> Vec<BlockHash>, effects: &mut VecDeque<Effect>) {
        let (Some(publisher), Some(link)) = (&mut self.publisher, self.home.and_then(|home| self.links.get(&home))) else { return };
        let mut send = |message| effects.push_back(Effect::Send(*link, message));
        while let Some(output) = publisher.poll(now) {
            match output {
                Output::Delta(delta) => send(Message::Delta(delta)),
                Output::NeedDigest => send(Message::CacheDigest(publisher.digest(&cached()))),
                Output::NeedSnapshot => {
                    publisher.snapshot(now, &cached()).into_iter().for_each(|page| send(Message::Snapshot(page)))
                }
            }
        }
    }
}
