//! What goes wrong with nodes and links. Each fault heals: a host starts again, a way opens again.

use crate::event::{Event, Host, NodeEvent};
use crate::world::World;

/// Longest time that a way stays closed, microseconds: longer than a lease.
const OUTAGE_MAX_US: u64 = 9_000_000;

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
        match self.random.below(11) {
            0..=2 => self.crash(host),
            3 => {
                let life = self.hosts[host].life;
                self.tell_node(host, life, NodeEvent::Stop);
            }
            4..=5 => self.close_way(host, None),
            6..=8 => {
                let to = self.random.below(self.hosts.len() as u64) as Host;
                self.close_way(host, Some(to));
            }
            9 => self.cordon(),
            _ => self.coordinator.restart(),
        }
    }

    /// Cuts the links from a host to another (or the coordinator), sometimes for a while.
    fn close_way(&mut self, host: Host, to: Option<Host>) {
        let until_us = if self.random.chance(500) { 0 } else { self.random.below(OUTAGE_MAX_US) };
        self.outages.insert((host, to), self.now.after(until_us));
        let joins = |l: &crate::net::Link| {
            let (a, b) = (l.dialler.0, l.acceptor.map(|(end, _)| end));
            (a == host && b == to) || (to == Some(a) && b == Some(host))
        };
        let links: Vec<_> = self.links.iter().filter(|(_, l)| joins(l)).map(|(no, _)| *no).collect();
        links.into_iter().for_each(|link| self.cut(link));
    }
}
