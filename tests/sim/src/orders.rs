//! What an operator does to the caches of nodes while they work: pins, drops, cordons. It changes what is cached, never an answer.

use millrace_core::cluster::NodeState;
use millrace_core::identity::{Chain, block_names};
use millrace_core::ids::{BlockHash, NodeId, RequestId};
use millrace_core::message::Evict;

use crate::callers::{Caller, tenant_key};
use crate::event::{Event, Host};
use crate::world::World;

impl World {
    /// One order, and the time of the next.
    pub(crate) fn order(&mut self) {
        let gap_us = self.plan.orders_us;
        if gap_us == 0 || self.calm {
            return;
        }
        let after_us = self.random.below(2 * gap_us);
        self.schedule(after_us, Event::Order);
        let host = self.random.below(self.hosts.len() as u64) as Host;
        let names = self.names_of_some_prompt();
        let (what, dry_run) = (self.random.below(8), self.random.chance(200));
        let Some(node) = &mut self.hosts[host].node else { return };
        match what {
            0..=3 => _ = node.batch.set_pins(&names),
            4 => _ = node.batch.set_pins(&[]),
            5..=6 => _ = node.batch.drop_cached(&Evict::Prompt(names), dry_run),
            _ => _ = node.batch.drop_cached(&Evict::All, dry_run),
        }
        self.wake(host, 0);
    }

    fn names_of_some_prompt(&mut self) -> Vec<BlockHash> {
        let earlier = self.gateway.requests.len() as u64;
        if earlier == 0 {
            return Vec::new();
        }
        let id = RequestId(u128::from(self.random.below(earlier) + 1));
        let (caller, block_tokens) = (Caller::of(id), usize::from(self.plan.model.layout.block_tokens));
        let chain = Chain::new(tenant_key(caller.tenant), &self.plan.model.fingerprint(), caller.salt);
        let prompt = self.gateway.requests[&id].prompt();
        block_names(&chain, &prompt[..prompt.len() / block_tokens * block_tokens], block_tokens)
    }

    /// An operator cordons a node, or admits it again.
    pub(crate) fn cordon(&mut self) {
        let node = NodeId(self.random.between((1, self.hosts.len() as u64)) as u16);
        let state = if self.random.chance(400) { NodeState::Cordoned } else { NodeState::Up };
        self.coordinator.set_state(node, state);
    }

    /// Takes all orders back.
    pub(crate) fn take_orders_back(&mut self) {
        let cordoned: Vec<_> = self.coordinator.cluster.nodes().filter(|n| n.cordoned).map(|n| n.node).collect();
        cordoned.into_iter().for_each(|node| self.coordinator.set_state(node, NodeState::Up));
        for host in 0..self.hosts.len() {
            if let Some(node) = &mut self.hosts[host].node {
                node.batch.set_pins(&[]);
                self.wake(host, 0);
            }
        }
    }
}
