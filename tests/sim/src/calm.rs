//! The end of a run: faults and clients stop, time goes on, and within a minute nothing may be left of anything. This is where a
//! leak, a hang or a drifted index shows.

use crate::plan::Faults;
use crate::world::World;

/// After the last fault everything must have ended within this, microseconds.
const REST_MAX_US: u64 = 60_000_000;
/// How often it is looked, microseconds.
const LOOK_US: u64 = 500_000;

impl World {
    /// Stops faults and clients, and runs until the world is at rest.
    ///
    /// # Panics
    /// When it does not come to rest in time.
    pub(crate) fn become_calm(&mut self) {
        self.calm = true;
        self.outages.clear();
        self.plan.faults = Faults { gap_us: 0, client_leaves: 0, repeated: 0, damaged: 0, engine: 0, report_lost: 0, drift: 0 };
        let end = self.now.after(REST_MAX_US);
        let mut look = self.now;
        loop {
            self.step();
            if self.now < look {
                continue;
            }
            let Some(unrest) = self.unrest() else { return };
            assert!(self.now < end, "no rest after {} s: {unrest}", REST_MAX_US / 1_000_000);
            look = self.now.after(LOOK_US);
        }
    }

    /// Why the world is not at rest; `None` when it is.
    fn unrest(&self) -> Option<String> {
        if let Some((id, request)) = self.gateway.requests.iter().find(|(_, request)| request.end.is_none()) {
            return Some(format!("request {id} has not ended: {request:?}"));
        }
        if !self.streams.is_empty() {
            return Some(format!("{} KV streams are left", self.streams.len()));
        }
        if self.coordinator.has_proposals() {
            return Some("the log is not empty".into());
        }
        let alive = self.coordinator.cluster.nodes().filter(|n| n.state.alive()).count();
        if alive != self.hosts.len() {
            return Some(format!("{alive} members, {} nodes", self.hosts.len()));
        }
        self.hosts.iter().find_map(|host| self.node_unrest(host))
    }

    fn node_unrest(&self, host: &crate::world::HostState) -> Option<String> {
        let Some(node) = &host.node else { return Some(format!("{} has no process", host.name)) };
        let Some((number, epoch)) = node.joined() else { return Some(format!("{} has not joined", host.name)) };
        if self.coordinator.cluster.current(number, epoch).is_none() {
            return Some(format!("epoch {epoch} of {} is not current", host.name));
        }
        let mut cached: Vec<_> = node.batch().cached_names().collect();
        cached.sort_unstable();
        let indexed = self.coordinator.cluster.holders().blocks_of(number);
        let drift = cached != indexed;
        node.unrest()
            .or_else(|| drift.then(|| format!("{} caches {} blocks, {} are indexed", host.name, cached.len(), indexed.len())))
    }
}
