//! Orders about cached blocks, from a replica on an operator's behalf or on the log's: pin, drop, look at the bytes.
//!
//! A look has every idle cached block digested, a little in each turn. Slots are given away by the machine alone, so a block that is idle and
//! cached at the end of a turn is written by nobody until its digest is taken. Digests are kept for each slot and generation from the
//! first look on: taking them when a block is cached would cost every block that is never looked at.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use super::{Effect, Node, Note};
use crate::batch::Batch;
use crate::holders::toggle;
use crate::ids::{Generation, ReplicaId, Slot, Time};
use crate::message::{CacheOrder, CacheReport, CacheResult, CacheTask, DAMAGED_MAX, Evict, Message, ORDER_NAMES_MAX, Verified};
use crate::pool::Resident;

/// Bytes that are digested in one turn, a fraction of a millisecond; one block at least.
const LOOK_BYTES_PER_TURN: usize = 4 << 20;
/// How long a report waits until the log has applied all that the pool did.
const SETTLE_WAIT_MAX_US: u64 = 2_000_000;

/// What a node keeps for orders about its cache.
#[derive(Debug, Default)]
pub(super) struct Upkeep {
    pins_version: u64,
    /// What a block's bytes were when they were first looked at.
    digests: BTreeMap<Slot, (Generation, u64)>,
    look: Option<Look>,
}

/// A look that is under way.
#[derive(Debug)]
struct Look {
    from: ReplicaId,
    id: u64,
    left: Vec<Resident>,
    found: Verified,
    /// All blocks are read; the report leaves at this time at the latest.
    read: Option<Time>,
}

impl Upkeep {
    /// When a look goes on, if there is one.
    pub(super) fn deadline(&self, now: Time) -> Option<Time> {
        self.look.as_ref().map(|look| look.read.unwrap_or(now))
    }

    /// Some of the blocks that are left, idle ones only, to be digested.
    fn next_blocks(&mut self, now: Time, batch: &Batch, block_bytes: usize) -> Vec<Resident> {
        let mut blocks = Vec::new();
        let Some(look) = &mut self.look else { return blocks };
        for _ in 0..(LOOK_BYTES_PER_TURN / block_bytes).max(1) {
            let Some(block) = look.left.pop() else { break };
            match batch.resident(&block.name).filter(|there| there.at == block.at) {
                Some(there) if there.idle => blocks.push(there),
                Some(_) => look.found.busy += 1,
                None => {} // gone meanwhile
            }
        }
        if look.left.is_empty() && look.read.is_none() {
            look.read = Some(now.after(SETTLE_WAIT_MAX_US));
        }
        blocks
    }

    /// Compares a digest with the first that was taken; true when the bytes have changed. The first time is recorded.
    fn changed(&mut self, block: &Resident, digest: u64) -> bool {
        let recorded = self.digests.insert(block.at.slot, (block.at.generation, digest));
        let recorded = recorded.filter(|(generation, _)| *generation == block.at.generation).map(|(_, digest)| digest);
        let Some(look) = &mut self.look else { return false };
        match recorded {
            None => look.found.recorded += 1,
            Some(recorded) if recorded == digest => look.found.sound += 1,
            Some(_) => {
                look.found.damaged += 1;
                if look.found.damaged_names.len() < DAMAGED_MAX {
                    look.found.damaged_names.push(block.name);
                }
                self.digests.remove(&block.at.slot);
                return true;
            }
        }
        false
    }
}

impl Node {
    /// Obeys a replica, if it means this incarnation.
    pub(super) fn on_order(&mut self, from: ReplicaId, order: CacheOrder) {
        let CacheOrder { id, epoch, task } = order;
        if self.joined().is_none_or(|(_, current)| current != epoch) {
            return self.report(from, id, CacheResult::Refused);
        }
        let result = match task {
            CacheTask::Pin { version, names } if version >= self.upkeep.pins_version && names.len() <= ORDER_NAMES_MAX => {
                self.upkeep.pins_version = version;
                let pins = self.batch.set_pins(&names);
                self.note(Note::Pins(version, pins));
                CacheResult::Pinned { version, pins }
            }
            CacheTask::Evict { what, dry_run } if names(&what) <= ORDER_NAMES_MAX => {
                let count = self.batch.drop_cached(&what, dry_run);
                self.note(Note::Evicted(count, dry_run));
                CacheResult::Evicted(count)
            }
            CacheTask::Verify if self.upkeep.look.is_none() => {
                let left: Vec<_> = self.batch.residents().collect();
                self.upkeep.look = Some(Look { from, id, left, found: Verified::default(), read: None });
                return;
            }
            _ => CacheResult::Refused,
        };
        self.report(from, id, result);
    }

    fn report(&mut self, to: ReplicaId, id: u64, result: CacheResult) {
        let (node, epoch) = self.joined().unwrap_or_default();
        self.tell(to, Message::CacheReport(CacheReport { id, node, epoch, result }));
    }

    /// Goes on with a look, and reports when it is through and the log has all that the pool did.
    pub(super) fn look_on(&mut self) {
        let blocks = self.upkeep.next_blocks(self.now, &self.batch, self.layout.block_bytes());
        if !blocks.is_empty() {
            return self.effects.push_back(Effect::Digest(blocks));
        }
        let (now, settled) = (self.now, self.uplinks.settled());
        let through = |look: &mut Look| look.read.is_some_and(|until| settled.is_some() || now >= until);
        let Some(mut look) = self.upkeep.look.take_if(through) else { return };
        for block in self.batch.residents() {
            look.found.blocks += 1;
            look.found.names_digest = toggle(look.found.names_digest, &block.name);
        }
        look.found.settled_seq = settled;
        self.report(look.from, look.id, CacheResult::Verified(look.found));
    }

    /// Blocks that were found idle have been digested. What changed while nobody used it is dropped.
    pub(super) fn on_digested(&mut self, blocks: Vec<(Resident, u64)>) {
        for (block, digest) in blocks {
            let there = self.batch.resident(&block.name).filter(|there| there.at == block.at && there.idle);
            if there.is_some() && self.upkeep.changed(&block, digest) {
                let dropped = self.batch.drop_damaged(&block.name).dropped;
                self.note(Note::Damaged(block.name, block.at.slot, dropped));
            }
        }
    }
}

fn names(what: &Evict) -> usize {
    match what {
        Evict::Prompt(names) => names.len(),
        Evict::All | Evict::Owner(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::batch::{BatchConfig, Input};
    use crate::engine::Sampled;
    use crate::identity::TenantKey;
    use crate::ids::{AttemptId, Epoch, NodeId, RequestId};
    use crate::layout::{KvDtype, KvLayout, KvParts};
    use crate::message::{Join, ModelIdentity, Role, Ticket};
    use crate::node;
    use crate::sampling::Sampling;

    /// A member of eight slots that has cached two blocks.
    fn cached() -> Node {
        let layout =
            KvLayout { layers: 2, parts: KvParts::KeysValues, kv_heads: 1, head_dim: 8, block_tokens: 4, dtype: KvDtype::F32 };
        let model = ModelIdentity { name: "m".into(), weights: [1; 32], tokenizer: [2; 32], layout };
        let config = BatchConfig {
            block_tokens: 4,
            slots: 8,
            step_tokens_max: 64,
            prompt_step_us: 0,
            rows_max: 4,
            context_max: 64,
            headroom_blocks: 1,
            waiting_max: 4,
            fingerprint: model.fingerprint(),
        };
        let join =
            Join { name: "d".into(), role: Role::Decode, address: "a".into(), instance: 1, pid: 1, model, slots: config.slots };
        let mut node = Node::new(join, config);
        node.handle(Time(0), node::Input::UplinkUp(ReplicaId(1), node::LinkNo(1)));
        let joined = Message::Joined { node: NodeId(1), epoch: Epoch(1) };
        node.handle(Time(0), node::Input::Message(node::LinkNo(1), joined.into()));
        let attempt = AttemptId { request: RequestId(1), attempt: 0 };
        let sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 1, max_new: 1, eos: vec![], ignore_eos: false };
        let ticket = Ticket {
            attempt,
            gateway: ReplicaId(1),
            decode: None,
            tokens: (0..9).collect(),
            prompt_tokens: 9,
            sampling,
            tenant_key: TenantKey([1; 32]),
            cache_salt: vec![],
            budget_us: 1_000_000,
            trace: [0; 25],
        };
        node.batch.handle(Time(0), Input::Add(ticket));
        node.batch.next_step(Time(0)).unwrap();
        node.batch.handle(Time(0), Input::Stepped(Ok(vec![Sampled { attempt, token: 5, logprob: 0.0 }])));
        node.drain_batch();
        node
    }

    /// A whole look at blocks whose digests are what `digest` says.
    fn look(node: &mut Node, digest: impl Fn(&Resident) -> u64) -> Verified {
        let order = CacheOrder { id: 1, epoch: Epoch(1), task: CacheTask::Verify };
        node.handle(Time(0), node::Input::Message(node::LinkNo(1), Message::CacheOrder(order).into()));
        for turn in 0..10 {
            let now = Time(turn * SETTLE_WAIT_MAX_US);
            node.handle(now, node::Input::Turn);
            while let Some(effect) = node.poll() {
                match effect {
                    Effect::Digest(blocks) => {
                        let digested = blocks.into_iter().map(|block| (block, digest(&block))).collect();
                        node.handle(now, node::Input::Digested(digested));
                    }
                    Effect::Send(_, Message::CacheReport(CacheReport { result: CacheResult::Verified(mut found), .. })) => {
                        (found.settled_seq, found.blocks, found.names_digest) = (None, 0, 0);
                        return found;
                    }
                    _ => {}
                }
            }
        }
        panic!("no report")
    }

    #[test]
    fn bytes_that_change_while_nobody_uses_them_are_found_and_dropped() {
        let mut node = cached();
        let blocks: Vec<Resident> = node.batch.residents().collect();
        assert!(blocks.len() == 2 && blocks.iter().all(|block| block.idle));
        let bytes = |block: &Resident| u64::from(block.at.slot.0) + 7;
        assert_eq!(look(&mut node, bytes), Verified { recorded: 2, ..Verified::default() });
        assert_eq!(look(&mut node, bytes), Verified { sound: 2, ..Verified::default() });
        let second = blocks[1].name;
        let found = look(&mut node, |block| bytes(block) + u64::from(block.name == second));
        assert_eq!((found.damaged, found.damaged_names), (1, vec![second]));
        assert!(node.batch.resident(&second).is_none(), "it cannot be found any more");
        node.check();
    }

    #[test]
    fn a_slot_that_was_given_out_again_is_another_block() {
        let mut node = cached();
        look(&mut node, |_| 1);
        node.upkeep.digests.values_mut().for_each(|(generation, _)| generation.0 += 1);
        assert_eq!(look(&mut node, |_| 2), Verified { recorded: 2, ..Verified::default() });
    }
}
