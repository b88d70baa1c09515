//! A node's standing with the coordinator, as `millrace-node` keeps it with one replica: joining, heartbeats, block deltas.

use millrace_core::ids::{BlockHash, Epoch, NodeId, Time};
use millrace_core::message::{BlockOp, Join, Load, Message};
use millrace_core::publish::{Output, Publisher};

use crate::event::{Act, LinkNo};

/// Microseconds between heartbeats.
const HEARTBEAT_US: u64 = 200_000;
/// Microseconds between attempts to join.
const JOIN_RETRY_US: u64 = 300_000;

/// The link to the coordinator, and what was agreed over it.
#[derive(Debug)]
pub struct Uplink {
    link: Option<LinkNo>,
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
        Self { link: None, join, joined: None, publisher: None, next_join: Time(0), next_heartbeat: Time(0) }
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

    /// Whether this link is the one to the coordinator.
    #[must_use]
    pub fn is(&self, link: LinkNo) -> bool {
        self.link == Some(link)
    }

    /// The link is there.
    pub fn up(&mut self, now: Time, link: LinkNo) {
        self.link = Some(link);
        self.next_heartbeat = now;
    }

    /// The link is gone.
    pub fn down(&mut self) {
        self.link = None;
    }

    /// Says something to the coordinator, if there is a link.
    pub fn send(&self, message: Message, acts: &mut Vec<Act>) {
        acts.extend(self.link.map(|link| Act::Send(link, message)));
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
            self.send(Message::Heartbeat { node, epoch, load }, acts);
        }
        let (Some(publisher), Some(link)) = (&mut self.publisher, self.link) else { return };
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
        let publisher = self.publisher.as_ref().filter(|_| self.link.is_some()).and_then(Publisher::deadline);
        publisher.map_or(own, |deadline| deadline.min(own))
    }

    /// Says goodbye, so that nothing more is sent here.
    pub fn leave(&self, acts: &mut Vec<Act>) {
        if let Some((node, epoch)) = self.joined {
            self.send(Message::Leave { node, epoch }, acts);
        }
    }

    fn ask_to_join(&mut self, now: Time, acts: &mut Vec<Act>) {
        self.next_join = now.after(JOIN_RETRY_US);
        self.send(Message::Join(self.join.clone()), acts);
    }
}
