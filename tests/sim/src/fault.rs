//! What goes wrong with processes, links and disks. Each fault heals: a host starts again, a way opens again, a disk gets room.

use millrace_core::cluster::NodeState;

use crate::event::{Event, Host, NodeEvent, ReplicaEvent};
use crate::plan::REPLICAS;
use crate::world::World;

/// Longest time that a way stays closed, microseconds: longer than a lease.
const OUTAGE_MAX_US: u64 = 9_000_000;
/// Longest time that a process stands still, microseconds: longer than an election and than the patience of links.
const PAUSE_MAX_US: u64 = 4_000_000;
/// Longest time that a node is drained, microseconds.
const DRAINED_MAX_US: u64 = 3_000_000;
/// Longest time that a disk stays full, microseconds.
const FULL_MAX_US: u64 = 2_000_000;
/// Writes that fail on a full disk before there is room again: nobody else runs meanwhile who could make some.
const FULL_WRITES_MAX: u32 = 12;

impl World {
    /// One fault, and the time of the next.
    pub(crate) fn fault(&mut self) {
        let gap_us = self.plan.faults.gap_us;
        if gap_us == 0 || self.calm {
            return;
        }
        let after_us = self.random.below(2 * gap_us);
        self.schedule(after_us, Event::Fault);
        let host = self.random.below(self.hosts.len() as u64) as Host;
        match self.random.below(20) {
            0..=4 => self.crash(host),
            5..=6 => self.stop(host),
            7..=12 => {
                let to = self.random.below(self.hosts.len() as u64) as Host;
                self.close_way(host, to);
            }
            13..=14 => self.isolate(host),
            15..=17 => self.pause(host),
            18 if host < REPLICAS => self.fill_disk(host),
            18 => self.drain(host),
            _ if host < REPLICAS => self.hosts[host].disk.fail_next_sync(),
            _ => (0..REPLICAS).for_each(|replica| self.crash(replica)),
        }
    }

    /// An operator stops a node; a replica has no other end than a crash.
    fn stop(&mut self, host: Host) {
        let life = self.hosts[host].life;
        match host < REPLICAS {
            true => self.crash(host),
            false => self.tell_node(host, life, NodeEvent::Stop),
        }
    }

    /// Closes the way from a host to another, in that direction only or in both, sometimes for a while.
    fn close_way(&mut self, host: Host, to: Host) {
        let until_us = if self.random.chance(500) { 0 } else { self.random.below(OUTAGE_MAX_US) };
        let both = self.random.chance(500);
        self.outages.insert((host, to), self.now.after(until_us));
        if both {
            self.outages.insert((to, host), self.now.after(until_us));
        }
        self.cut_between(host, to);
    }

    /// Nobody hears a host, nor does it hear anybody.
    fn isolate(&mut self, host: Host) {
        let until = self.now.after(self.random.below(OUTAGE_MAX_US));
        for other in (0..self.hosts.len()).filter(|other| *other != host) {
            self.outages.insert((host, other), until);
            self.outages.insert((other, host), until);
            self.cut_between(host, other);
        }
    }

    /// A process stands still: nothing in it runs, its disk and its peers go on.
    fn pause(&mut self, host: Host) {
        self.hosts[host].paused = self.now.after(self.random.below(PAUSE_MAX_US));
    }

    /// An operator drains a node, or cordons it, and readmits it after a while.
    fn drain(&mut self, host: Host) {
        let state = self.random.pick(&[NodeState::Draining, NodeState::Cordoned]);
        self.set_state(host, state);
        let after_us = self.random.below(DRAINED_MAX_US);
        self.schedule(after_us, Event::SetState(host, NodeState::Up));
    }

    /// An operator asks any replica to change the state of a node; nobody waits for the answer.
    pub(crate) fn set_state(&mut self, host: Host, state: NodeState) {
        let replica = self.random.below(REPLICAS as u64) as Host;
        let asked = self.hosts[replica].replica();
        let node = asked.and_then(|replica| replica.cluster().node_named(&self.hosts[host].name).map(|node| node.node));
        if let Some(node) = node {
            self.tell_replica(replica, ReplicaEvent::SetState(node, state));
        }
    }

    fn fill_disk(&mut self, host: Host) {
        self.hosts[host].disk.fill_for(FULL_WRITES_MAX);
        let after_us = self.random.below(FULL_MAX_US);
        self.schedule(after_us, Event::Room(host));
    }
}
