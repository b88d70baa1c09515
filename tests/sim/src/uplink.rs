//! A node's standing with the coordinator, as `millrace-node` keeps it: joining, heartbeats, block deltas.

use std::collections::BTreeMap;

use millrace_core::ids::{BlockHash, Epoch, NodeId, ReplicaId, Time};
use millrace_core::message::{BlockOp, Join, Load, Message};
use millrace_core::publish::{Output, Publisher};

use crate::event::{Act, LinkNo};

/// Microseconds between heartbeats.
const HEARTBEAT_US: u64 = 200_000;
/// Microseconds between attempts to join.
const JOIN_RETRY_US: u64 = 300_000;

/// The links to all replicas, and what was agreed over them.
#[derive(Debug)]
pub struct Uplink {
    links: BTreeMap<ReplicaId, LinkNo>,
    /// The replica that gets reports.
    home: Option<ReplicaId>,
    /// The replica that was asked last for membership.
    asked: Option<ReplicaId>,
    join: Join,
    joined: Option<(NodeId, Epoch)>,
    publisher: Option<Publisher>,
    next_join: Time,
    next_heartbeat: Time,
}

impl Uplink {
    /// Not a member yet.
    #[must_use]
    pub fn new(join: Join) -> Self {
        Self {
            links: BTreeMap::new(),
            home: None,
            asked: None,
            join,
            joined: None,
            publisher: None,
            next_join: Time(0),
            next_heartbeat: Time(0),
        }
    }

    /// The node's number and incarnation, once it has them.
    #[must_use]
    pub fn joined(&self) -> Option<(NodeId, Epoch)> {
        self.joined
    }

    /// The number of the process's life.
    #[must_use]
    pub fn instance(&self) -> u128 {
        self.join.instance
    }

    /// The replica at the end of a link, if there is one.
    #[must_use]
    pub fn replica(&self, link: LinkNo) -> Option<ReplicaId> {
        self.links.iter().find(|(_, no)| **no == link).map(|(id, _)| *id)
    }

    /// A link is there.
    pub fn up(&mut self, now: Time, replica: ReplicaId, link: LinkNo) {
        self.links.insert(replica, link);
        self.home.get_or_insert(replica);
        self.next_heartbeat = now;
    }

    /// The link to a replica is gone.
    pub fn down(&mut self, replica: ReplicaId) {
        self.links.remove(&replica);
        if self.home == Some(replica) {
            self.home = self.links.keys().next().copied();
        }
    }

    /// Says something to a replica, if there is a link.
    pub fn send(&self, replica: ReplicaId, message: Message, acts: &mut Vec<Act>) {
        acts.extend(self.links.get(&replica).map(|link| Act::Send(*link, message)));
    }

    /// The coordinator says that the node is a member; true when that is news.
    pub fn on_joined(&mut self, node: NodeId, epoch: Epoch, pool_is_empty: bool) -> bool {
        if self.joined == Some((node, epoch)) {
            return false;
        }
        self.joined = Some((node, epoch));
        self.publisher = Some(Publisher::new(node, epoch, pool_is_empty));
        true
    }

    /// This incarnation counts as dead there, or the node may not join yet.
    pub fn on_refused(&mut self, now: Time, acts: &mut Vec<Act>) {
        if self.joined.is_some() && self.next_join <= now {
            self.ask_to_join(now, acts);
        }
    }

    /// The log has applied deltas up to `seq`.
    pub fn on_applied(&mut self, epoch: Epoch, seq: u64) {
        self.publisher.iter_mut().for_each(|publisher| publisher.applied(epoch, seq));
    }

    /// The index lacks something.
    pub fn on_want_snapshot(&mut self, epoch: Epoch) {
        self.publisher.iter_mut().for_each(|publisher| publisher.want_snapshot(epoch));
    }

    /// A change of the pool.
    pub fn publish(&mut self, now: Time, op: BlockOp) {
        self.publisher.iter_mut().for_each(|publisher| publisher.push(now, op));
    }

    /// Sends whatever is due.
    pub fn advance(&mut self, now: Time, load: Load, cached: impl Fn() -> Vec<BlockHash>, acts: &mut Vec<Act>) {
        if self.joined.is_none() && now >= self.next_join {
            self.ask_to_join(now, acts);
        }
        let Some((node, epoch)) = self.joined else { return };
        if now >= self.next_heartbeat {
            self.next_heartbeat = now.after(HEARTBEAT_US);
            acts.extend(self.links.values().map(|link| Act::Send(*link, Message::Heartbeat { node, epoch, load })));
        }
        let link = self.home.and_then(|home| self.links.get(&home)).copied();
        let (Some(publisher), Some(link)) = (&mut self.publisher, link) else { return };
        while let Some(output) = publisher.poll(now) {
            match output {
                Output::Delta(delta) => acts.push(Act::Send(link, Message::Delta(delta))),
                Output::NeedDigest => acts.push(Act::Send(link, Message::CacheDigest(publisher.digest(&cached())))),
                Output::NeedSnapshot => {
                    let pages = publisher.snapshot(now, &cached());
                    acts.extend(pages.into_iter().map(|page| Act::Send(link, Message::Snapshot(page))));
                }
            }
        }
    }

    /// When something is due again.
    #[must_use]
    pub fn deadline(&self) -> Time {
        let own = if self.joined.is_some() { self.next_heartbeat } else { self.next_join };
        let publisher = self.publisher.as_ref().filter(|_| self.home.is_some()).and_then(Publisher::deadline);
        publisher.map_or(own, |deadline| deadline.min(own))
    }

    /// Says goodbye, so that nothing more is sent here.
    pub fn leave(&self, acts: &mut Vec<Act>) {
        if let (Some((node, epoch)), Some(home)) = (self.joined, self.home) {
            self.send(home, Message::Leave { node, epoch }, acts);
        }
    }

    fn ask_to_join(&mut self, now: Time, acts: &mut Vec<Act>) {
        self.next_join = now.after(JOIN_RETRY_US);
        let after = |asked: ReplicaId| self.links.range(asked..).map(|(id, _)| *id).find(|id| *id != asked);
        let next = self.asked.and_then(after).or_else(|| self.links.keys().next().copied());
        if let Some(replica) = next {
            self.asked = Some(replica);
            self.send(replica, Message::Join(self.join.clone()), acts);
        }
    }
}
