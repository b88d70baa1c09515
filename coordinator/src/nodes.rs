//! What this replica hears of the nodes itself: their links, heartbeats and load. In memory only; never in the log.
//!
//! The log says who is a member and in which incarnation; this table says who is there. A node is *usable* when the link
//! of its current incarnation is up, was heard from within [`FRESH`], and has acknowledged within that time that it hears us (a link may
//! be cut in one direction only); it is *lost* for the attempts that run there when
//! the link is gone or silent for [`SILENT_MAX`]. Several processes may claim one name; they are told apart by `instance`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_core::ids::{Epoch, NodeId};
use millrace_core::message::{Load, Message};
use parking_lot::RwLock;
use tokio::sync::watch;

use crate::orders::Orders;

/// A node that was not heard from for longer gets no new work.
pub const FRESH: Duration = Duration::from_secs(1);
/// A node that was not heard from for longer has lost its attempts.
pub const SILENT_MAX: Duration = Duration::from_secs(5);
/// Processes under one name that this replica remembers; the longest silent one is forgotten.
pub const INSTANCES_MAX: usize = 4;
/// A process that is gone is forgotten after this time.
pub const FORGET_AFTER: Duration = Duration::from_secs(600);

/// Hands a message to a link without waiting; `false` when the link is gone or its queue is full.
pub type Outbox = Arc<dyn Fn(Message) -> bool + Send + Sync>;

/// One link of one process. A later link of the same process replaces it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinkId(u64);

/// What is known of a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// Its last load.
    pub load: Load,
    /// Since the load came.
    pub load_age: Duration,
    /// Since it was last heard from.
    pub silent: Duration,
    /// Since it last acknowledged anything.
    pub deaf: Duration,
    /// Since its link came up.
    pub link_age: Duration,
    /// Whether its link is up.
    pub linked: bool,
}

impl Seen {
    /// Whether new work may go there.
    #[must_use]
    pub fn usable(&self) -> bool {
        self.linked && self.silent <= FRESH && self.deaf <= FRESH
    }

    /// Whether the attempts that run there are lost.
    #[must_use]
    pub fn lost(&self) -> bool {
        !self.linked || self.silent > SILENT_MAX
    }

    /// Whether an attempt that was placed so long ago is lost. A node whose link ended has cancelled what came over it, or never got
    /// it, and may be back before this end has noticed: a link that is younger than the attempt knows nothing of it.
    #[must_use]
    pub fn lost_since(&self, placed: Duration) -> bool {
        self.lost() || self.link_age < placed
    }
}

/// Another live process under a name that somebody wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its instance.
    pub instance: u128,
    /// Since it was last heard from.
    pub silent: Duration,
}

struct Process {
    instance: u128,
    node: NodeId,
    /// 0 until the process says that it joined.
    epoch: Epoch,
    link: Option<(LinkId, Outbox)>,
    linked: Instant,
    load: Load,
    loaded: Instant,
    heard: Instant,
    answered: Instant,
}

#[derive(Default)]
struct Table {
    by_name: HashMap<String, Vec<Process>>,
    links_made: u64,
}

/// The table. Cheap to read; written at each heartbeat.
pub struct Nodes {
    table: RwLock<Table>,
    changed: watch::Sender<u64>,
    /// Orders to their caches.
    pub orders: Orders,
}

impl Default for Nodes {
    fn default() -> Self {
        Self { table: RwLock::default(), changed: watch::Sender::new(0), orders: Orders::default() }
    }
}

impl Nodes {
    /// Counts the links that came and went: wakes those whose nodes may be lost.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// A process's link is up. Replaces its former link.
    pub fn attach(&self, now: Instant, name: &str, instance: u128, outbox: Outbox) -> LinkId {
        let mut table = self.table.write();
        table.links_made += 1;
        let id = LinkId(table.links_made);
        let processes = table.by_name.entry(name.to_owned()).or_default();
        processes.retain(|p| p.link.is_some() || now.saturating_duration_since(p.heard) < FORGET_AFTER);
        match processes.iter_mut().find(|p| p.instance == instance) {
            Some(process) => {
                (process.link, process.linked, process.heard, process.answered) = (Some((id, outbox)), now, now, now);
            }
            None => {
                if processes.len() >= INSTANCES_MAX {
                    let oldest = (0..processes.len()).min_by_key(|&i| processes[i].heard);
                    oldest.map(|i| processes.swap_remove(i));
                }
                let (node, epoch, load) = (NodeId(0), Epoch(0), Load::default());
                let (link, linked, loaded, heard, answered) = (Some((id, outbox)), now, now, now, now);
                processes.push(Process { instance, node, epoch, link, linked, load, loaded, heard, answered });
            }
        }
        drop(table);
        self.changed.send_modify(|n| *n += 1);
        id
    }

    /// A link is gone.
    pub fn detach(&self, name: &str, link: LinkId) {
        self.with_link(name, link, |process| process.link = None);
        self.changed.send_modify(|n| *n += 1);
    }

    /// Something came over a link.
    pub fn heard(&self, now: Instant, name: &str, link: LinkId) {
        self.with_link(name, link, |process| process.heard = now);
    }

    /// The process on a link has acknowledged something since it was last asked.
    pub fn answered(&self, now: Instant, name: &str, link: LinkId) {
        self.with_link(name, link, |process| process.answered = now);
    }

    /// A heartbeat came over a link.
    pub fn heartbeat(&self, now: Instant, name: &str, link: LinkId, who: (NodeId, Epoch), load: Load) {
        self.with_link(name, link, |process| {
            (process.node, process.epoch) = who;
            (process.load, process.loaded, process.heard) = (load, now, now);
        });
    }

    /// The process on this link is a member from now on.
    pub fn joined(&self, name: &str, link: LinkId, who: (NodeId, Epoch)) {
        self.with_link(name, link, |process| (process.node, process.epoch) = who);
    }

    fn with_link(&self, name: &str, link: LinkId, change: impl FnOnce(&mut Process)) {
        let mut table = self.table.write();
        let processes = table.by_name.get_mut(name).into_iter().flatten();
        if let Some(process) = processes.into_iter().find(|p| p.link.as_ref().is_some_and(|(id, _)| *id == link)) {
            change(process);
        }
    }

    /// What is known of incarnation `epoch` of `name`; `None` when it was never heard here.
    #[must_use]
    pub fn seen(&self, now: Instant, name: &str, epoch: Epoch) -> Option<Seen> {
        let table = self.table.read();
        let process = table.by_name.get(name)?.iter().find(|p| p.epoch == epoch)?;
        let since = |then| now.saturating_duration_since(then);
        let (load_age, silent, deaf) = (since(process.loaded), since(process.heard), since(process.answered));
        let link_age = since(process.linked);
        Some(Seen { load: process.load, load_age, silent, deaf, link_age, linked: process.link.is_some() })
    }

    /// Sends to incarnation `epoch` of `name`; `false` when it has no link here or takes no more. A link that takes no more has ended,
    /// though what it brought before may still wait to be read: from now on it is none.
    pub fn send(&self, name: &str, epoch: Epoch, message: Message) -> bool {
        let link = {
            let table = self.table.read();
            let mut processes = table.by_name.get(name).into_iter().flatten();
            processes.find(|p| p.epoch == epoch).and_then(|p| p.link.clone())
        };
        let Some((id, outbox)) = link else { return false };
        let sent = outbox(message);
        if !sent {
            self.detach(name, id);
        }
        sent
    }

    /// Who is on this link, once it joined.
    #[must_use]
    pub fn who(&self, name: &str, link: LinkId) -> Option<(NodeId, Epoch)> {
        let table = self.table.read();
        let mut processes = table.by_name.get(name)?.iter();
        let process = processes.find(|p| p.link.as_ref().is_some_and(|(id, _)| *id == link))?;
        (process.epoch != Epoch(0)).then_some((process.node, process.epoch))
    }

    /// As [`Nodes::send`], to an incarnation of a node by its number.
    pub fn send_to(&self, who: (NodeId, Epoch), message: Message) -> bool {
        let name = {
            let table = self.table.read();
            let mut names = table.by_name.iter();
            names.find(|(_, processes)| processes.iter().any(|p| (p.node, p.epoch) == who)).map(|(name, _)| name.clone())
        };
        name.is_some_and(|name| self.send(&name, who.1, message))
    }

    /// Sends to every process that has a link here.
    pub fn send_to_all(&self, message: &Message) {
        let outboxes: Vec<Outbox> = {
            let table = self.table.read();
            table.by_name.values().flatten().filter_map(|p| p.link.as_ref()).map(|(_, outbox)| outbox.clone()).collect()
        };
        for outbox in outboxes {
            // A link that does not take it ends, and is told when it comes again.
            outbox(message.clone());
        }
    }

    /// A member other than `instance` that lives under `name`.
    #[must_use]
    pub fn live_other(&self, now: Instant, name: &str, instance: u128) -> Option<Holder> {
        let table = self.table.read();
        let processes = table.by_name.get(name).into_iter().flatten();
        processes
            .filter(|p| p.instance != instance && p.epoch != Epoch(0) && p.link.is_some())
            .map(|p| Holder { instance: p.instance, silent: now.saturating_duration_since(p.heard) })
            .find(|holder| holder.silent <= FRESH)
    }

    /// Members heard from within `window`.
    #[must_use]
    pub fn live(&self, now: Instant, window: Duration) -> Vec<(NodeId, Epoch)> {
        let table = self.table.read();
        let processes = table.by_name.values().flatten();
        let heard = processes.filter(|p| p.epoch != Epoch(0) && now.saturating_duration_since(p.heard) <= window);
        let mut live: Vec<_> = heard.map(|p| (p.node, p.epoch)).collect();
        live.sort_unstable();
        live
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMBER: (NodeId, Epoch) = (NodeId(1), Epoch(7));

    fn quiet() -> Outbox {
        Arc::new(|_| true)
    }

    #[test]
    fn a_node_is_usable_while_its_link_is_up_and_fresh() {
        let (nodes, t) = (Nodes::default(), Instant::now());
        let link = nodes.attach(t, "p", 1, quiet());
        assert_eq!(nodes.seen(t, "p", MEMBER.1), None, "it has not joined");
        nodes.heartbeat(t, "p", link, MEMBER, Load::default());
        let seen = |after| nodes.seen(t + after, "p", MEMBER.1).unwrap();
        assert!(seen(FRESH).usable());
        nodes.heard(t + FRESH * 2, "p", link);
        assert!(!seen(FRESH * 2).usable(), "it speaks and does not hear");
        nodes.answered(t + FRESH * 2, "p", link);
        assert!(seen(FRESH * 2).usable());
        assert!(!seen(FRESH * 4).usable() && !seen(FRESH * 4).lost());
        assert!(seen(SILENT_MAX * 2).lost());
        nodes.detach("p", link);
        assert!(seen(Duration::ZERO).lost() && !seen(Duration::ZERO).usable());
        assert!(!nodes.send("p", MEMBER.1, Message::WantSnapshot { epoch: MEMBER.1 }));
    }

    #[test]
    fn a_link_that_is_younger_than_an_attempt_knows_nothing_of_it() {
        let (nodes, t) = (Nodes::default(), Instant::now());
        let link = nodes.attach(t, "p", 1, quiet());
        nodes.heartbeat(t, "p", link, MEMBER, Load::default());
        let lost = |now: Instant, placed: Instant| nodes.seen(now, "p", MEMBER.1).unwrap().lost_since(now - placed);
        assert!(!lost(t + FRESH, t) && !lost(t + FRESH, t + FRESH));
        nodes.attach(t + FRESH, "p", 1, quiet());
        assert!(lost(t + FRESH, t), "the process is back over another link");
        assert!(!lost(t + FRESH, t + FRESH));
    }

    #[test]
    fn a_live_member_holds_its_name_against_others() {
        let (nodes, t) = (Nodes::default(), Instant::now());
        let link = nodes.attach(t, "p", 1, quiet());
        assert_eq!(nodes.live_other(t, "p", 2), None, "a process that never joined holds nothing");
        nodes.joined("p", link, MEMBER);
        assert_eq!(nodes.live_other(t, "p", 2).map(|h| h.instance), Some(1));
        assert_eq!(nodes.live_other(t, "p", 1), None, "it may join again itself");
        assert_eq!(nodes.live_other(t + FRESH * 2, "p", 2), None, "a silent one is not alive");
        nodes.detach("p", link);
        assert_eq!(nodes.live_other(t, "p", 2), None);
    }

    #[test]
    fn a_new_link_replaces_the_old_of_the_same_process_only() {
        let (nodes, t) = (Nodes::default(), Instant::now());
        let old = nodes.attach(t, "p", 1, quiet());
        nodes.heartbeat(t, "p", old, MEMBER, Load::default());
        let new = nodes.attach(t, "p", 1, quiet());
        nodes.detach("p", old);
        assert!(nodes.seen(t, "p", MEMBER.1).unwrap().linked, "the old link's end is no news");
        nodes.attach(t, "p", 2, quiet());
        assert!(nodes.send("p", MEMBER.1, Message::WantSnapshot { epoch: MEMBER.1 }));
        nodes.detach("p", new);
        assert!(!nodes.send("p", MEMBER.1, Message::WantSnapshot { epoch: MEMBER.1 }));
    }

    #[test]
    fn a_link_that_takes_no_more_is_none_whatever_it_still_brings() {
        let (nodes, t) = (Nodes::default(), Instant::now());
        let link = nodes.attach(t, "p", 1, Arc::new(|_| false));
        nodes.heartbeat(t, "p", link, MEMBER, Load::default());
        assert!(nodes.seen(t, "p", MEMBER.1).unwrap().usable());
        assert!(!nodes.send("p", MEMBER.1, Message::Ping));
        nodes.heartbeat(t, "p", link, MEMBER, Load::default());
        assert!(!nodes.seen(t, "p", MEMBER.1).unwrap().usable(), "a heartbeat that came before the end");
    }

    #[test]
    fn processes_under_one_name_are_bounded() {
        let (nodes, t) = (Nodes::default(), Instant::now());
        for instance in 0..20 {
            nodes.attach(t + Duration::from_secs(instance as u64), "p", instance, quiet());
        }
        assert_eq!(nodes.table.read().by_name["p"].len(), INSTANCES_MAX);
    }
}
