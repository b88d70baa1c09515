//! A saved state as the beginning of another life of the cluster.
//!
//! What was granted after the state was saved is not known to it: nodes may run under epochs that it would grant a second time. So the new
//! life begins far ahead of anything that the old one can have reached.

use alloc::vec::Vec;

use super::{Cluster, NodeState};

/// Log entries, and so epochs, that lie between the two lives: more than any log appends between a save and the end.
pub const LIFE_ENTRIES: u64 = 1 << 40;

impl Cluster {
    /// Makes this state the first of a new log. Tenants, settings, pins, names, numbers and cordons stay. Every node is dead: those that run
    /// are told that their incarnation is over, join anew under epochs that were never granted, and say again what they cache.
    pub fn refound(&mut self) {
        let alive: Vec<_> = self.nodes.values().filter(|node| node.state.alive()).map(|node| node.node).collect();
        alive.into_iter().for_each(|node| self.bury(node, NodeState::Dead));
        self.forget_replicas();
        self.last_epoch.0 = self.last_epoch.0.saturating_add(LIFE_ENTRIES);
        self.applied = self.applied.saturating_add(LIFE_ENTRIES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Answer, Command};
    use crate::ids::{BlockHash, Epoch};
    use crate::layout::{KvDtype, KvLayout, KvParts};
    use crate::message::{BlockOp, Delta, Join, ModelIdentity, Role};
    use alloc::vec;

    #[test]
    fn nodes_join_anew_and_no_epoch_is_granted_twice() {
        let layout =
            KvLayout { layers: 1, parts: KvParts::KeysValues, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype: KvDtype::F32 };
        let model = ModelIdentity { name: "m".into(), weights: [0; 32], tokenizer: [0; 32], layout };
        let join =
            Command::Join(Join { name: "x".into(), role: Role::Decode, address: "a".into(), instance: 1, pid: 1, model, slots: 2 });
        let mut cluster = Cluster::new();
        let Answer::Joined { node, epoch } = cluster.apply(1, &join) else { panic!("joined") };
        let ops = vec![BlockOp::Stored(BlockHash([1; 16]))];
        cluster.apply(2, &Command::Deltas(vec![Delta { node, epoch, base_seq: 0, seq: 1, ops }]));
        let mut second = Cluster::restore(&cluster.snapshot()).unwrap();
        second.refound();
        second.check();
        assert!(second.current(node, epoch).is_none(), "the old incarnation is over");
        assert_eq!(second.holders().blocks_of(node), vec![]);
        assert_eq!(second.applied(), 2 + LIFE_ENTRIES);
        let again = second.apply(second.applied() + 1, &join);
        assert_eq!(again, Answer::Joined { node, epoch: Epoch(epoch.0 + LIFE_ENTRIES + 1) }, "the same number, a new epoch");
        second.check();
        assert_eq!(Cluster::restore(&second.snapshot()).unwrap().snapshot(), second.snapshot());
    }
}
