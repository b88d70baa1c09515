//! What an operator does to the caches of nodes while they work: pins, drops, looks. It changes what is cached, never an answer.

use millrace_core::identity::{Chain, block_names};
use millrace_core::ids::{BlockHash, NodeId};
use millrace_core::message::{CacheOrder, CacheTask, Evict, Message};

use crate::callers::{Caller, tenant_key};
use crate::event::Event;
use crate::plan::NODES_PER_ROLE;
use crate::process::HostState;
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
        let node = NodeId(self.random.between((1, 2 * NODES_PER_ROLE as u64)) as u16);
        let names = self.names_of_some_prompt();
        self.orders += 1;
        let (version, dry_run) = (self.orders, self.random.chance(200));
        let task = match self.random.below(10) {
            0..=3 => CacheTask::Pin { version, names },
            4 => CacheTask::Pin { version, names: Vec::new() },
            5..=6 => CacheTask::Evict { what: Evict::Prompt(names), dry_run },
            7 => CacheTask::Evict { what: Evict::All, dry_run },
            _ => CacheTask::Verify,
        };
        self.give(node, task);
    }

    /// Gives an order to a node, if there is a link to it.
    fn give(&mut self, node: NodeId, task: CacheTask) {
        let link = |host: &HostState| {
            let replica = host.replica()?;
            let epoch = replica.cluster().node(node)?.epoch;
            Some((replica.link_of(node, epoch)?.0, epoch))
        };
        let Some((link, epoch)) = self.hosts.iter().find_map(link) else { return };
        self.send(link, false, Message::CacheOrder(CacheOrder { id: self.orders, epoch, task }));
    }

    fn names_of_some_prompt(&mut self) -> Vec<BlockHash> {
        let earlier = self.gateway.requests.len() as u64;
        if earlier == 0 {
            return Vec::new();
        }
        let id = self.random.below(earlier) + 1;
        let (caller, block_tokens) = (Caller::of_client(id), usize::from(self.plan.model.layout.block_tokens));
        let chain = Chain::new(tenant_key(caller.tenant), &self.plan.model.fingerprint(), caller.salt);
        let prompt = self.gateway.requests[&id].prompt();
        block_names(&chain, &prompt[..prompt.len() / block_tokens * block_tokens], block_tokens)
    }

    /// Takes all orders back.
    pub(crate) fn take_orders_back(&mut self) {
        let pins = |host: &HostState| host.node().filter(|node| node.batch().pool_stats().pinned > 0)?.joined();
        let pinned: Vec<_> = self.hosts.iter().filter_map(pins).collect();
        for (node, _) in pinned {
            self.orders += 1;
            self.give(node, CacheTask::Pin { version: self.orders, names: Vec::new() });
        }
    }
}
