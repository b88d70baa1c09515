//! The end of a run: faults and clients stop, time goes on. Within ten seconds every request must have ended, and within a minute nothing
//! may be left of anything. This is where a leak, a hang or a drifted index shows.

use millrace_core::cluster::NodeState;
use millrace_core::ids::Time;
use millrace_log::Role;

use crate::plan::Faults;
use crate::process::{HostState, Process};
use crate::world::World;

/// After the last fault every request must have ended within this, microseconds.
const ENDS_MAX_US: u64 = 10_000_000;
/// After the last fault everything must be at rest within this, microseconds.
const REST_MAX_US: u64 = 60_000_000;
/// How often it is looked, microseconds.
const LOOK_US: u64 = 100_000;

impl World {
    /// Stops faults and clients, and runs until the world is at rest.
    ///
    /// # Panics
    /// When it does not come to rest in time.
    pub(crate) fn become_calm(&mut self) {
        self.heal();
        self.come_to_rest();
        self.probe();
        self.operators.check();
    }

    /// Runs until nothing is left to do.
    pub(crate) fn come_to_rest(&mut self) {
        let (ends, rest) = (self.now.after(ENDS_MAX_US), self.now.after(REST_MAX_US));
        let mut look = self.now;
        loop {
            self.step();
            if self.now < look {
                continue;
            }
            self.readmit();
            self.take_orders_back();
            let live = self.live_request();
            assert!(live.is_none() || self.now < ends, "I3: {live:?} after {} s", ENDS_MAX_US / 1_000_000);
            let Some(unrest) = live.or_else(|| self.unrest()) else { break };
            assert!(self.now < rest, "{unrest}, {} s after the last fault", REST_MAX_US / 1_000_000);
            look = self.now.after(LOOK_US);
        }
    }

    fn heal(&mut self) {
        self.calm = true;
        self.outages.clear();
        self.plan.faults = Faults::NONE;
        for host in &mut self.hosts {
            host.paused = Time(0);
            host.disk.free();
        }
    }

    /// Operators readmit whoever is drained.
    fn readmit(&mut self) {
        let Some(replica) = self.hosts[0].replica() else { return };
        let drained =
            |host: &HostState| replica.cluster().node_named(&host.name).is_some_and(|n| n.state.alive() && !n.state.usable());
        let drained: Vec<_> = (0..self.hosts.len()).filter(|host| drained(&self.hosts[*host])).collect();
        drained.into_iter().for_each(|host| self.set_state(host, NodeState::Up));
    }

    fn live_request(&self) -> Option<String> {
        let live = self.gateway.live.first();
        live.map(|id| format!("I3: request {id} has not ended: {:?}", self.gateway.requests[id]))
    }

    /// Why the world is not at rest; `None` when it is.
    fn unrest(&self) -> Option<String> {
        if !self.streams.is_empty() {
            return Some(format!("I1: {} KV streams are left", self.streams.len()));
        }
        if let Some(host) = self.hosts.iter().find(|host| host.process.is_none()) {
            return Some(format!("I3: {} has no process", host.name));
        }
        self.replicas_unrest().or_else(|| self.hosts.iter().find_map(|host| self.node_unrest(host)))
    }

    /// One leader, whom all follow, and the same state everywhere.
    fn replicas_unrest(&self) -> Option<String> {
        let replicas: Vec<_> = self.hosts.iter().filter_map(HostState::replica).collect();
        if let Some(unrest) = replicas.iter().find_map(|replica| replica.unrest()) {
            return Some(unrest);
        }
        let status: Vec<_> = replicas.iter().map(|replica| replica.status()).collect();
        let leaders = status.iter().filter(|status| status.role == Role::Leader).count();
        let alike =
            status.iter().all(|s| s.leader == status[0].leader && s.applied == s.last_index && s.applied == status[0].applied);
        if leaders != 1 || !alike {
            return Some(format!("I6: the replicas are not of one mind: {status:?}"));
        }
        let first = replicas[0].cluster().snapshot();
        assert!(replicas.iter().all(|replica| replica.cluster().snapshot() == first), "I6: replicas differ after the same entries");
        None
    }

    fn node_unrest(&self, host: &HostState) -> Option<String> {
        let Some(Process::Node(node)) = &host.process else { return None };
        let cluster = self.hosts[0].replica()?.cluster();
        let Some((number, epoch)) = node.joined() else { return Some(format!("I3: {} has not joined", host.name)) };
        if !cluster.current(number, epoch).is_some_and(|node| node.state.usable()) {
            return Some(format!("I6: epoch {epoch} of {} is not current, or drained", host.name));
        }
        let mut cached: Vec<_> = node.batch().cached_names().collect();
        cached.sort_unstable();
        let indexed = cluster.holders().blocks_of(number);
        let drift = cached != indexed;
        node.unrest()
            .or_else(|| drift.then(|| format!("I6: {} caches {} blocks, {} are indexed", host.name, cached.len(), indexed.len())))
    }
}
