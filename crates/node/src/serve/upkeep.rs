//! Orders about cached blocks, from a replica on an operator's behalf or on the log's: pin, drop, look at the bytes.
//!
//! A look reads every idle cached block, a little in each turn of the drive loop. Only that loop gives slots away, so a block that is
//! idle and cached at the beginning of a turn is written by nobody during it. Digests are kept for each slot and generation from
//! the first look on: taking them when a block is cached would cost every block that is never looked at.

use std::collections::HashMap;
use std::sync::Arc;

use millrace_core::batch::Batch;
use millrace_core::holders::toggle;
use millrace_core::identity::cell_digest;
use millrace_core::ids::{Generation, ReplicaId, Slot, Time};
use millrace_core::message::{
    CacheOrder, CacheReport, CacheResult, CacheTask, DAMAGED_MAX, Evict, Message, ORDER_NAMES_MAX, Verified,
};
use millrace_core::pool::Resident;
use millrace_kernels::slab::KvSlab;

use super::drive::Drive;

/// Bytes that one turn of the drive loop digests, a fraction of a millisecond; one block at least.
const LOOK_BYTES_PER_TURN: usize = 4 << 20;
/// How long a report waits until the log has applied all that the pool did.
const SETTLE_WAIT_MAX_US: u64 = 2_000_000;

/// What a node keeps for orders about its cache.
pub(super) struct Upkeep {
    slab: Arc<KvSlab>,
    pins_version: u64,
    /// What a block's bytes were when they were first looked at.
    digests: HashMap<Slot, (Generation, u64)>,
    look: Option<Look>,
}

/// A look that is under way.
struct Look {
    from: ReplicaId,
    id: u64,
    left: Vec<Resident>,
    found: Verified,
    /// All blocks are read; the report leaves at this time at the latest.
    read: Option<Time>,
}

impl Upkeep {
    pub(super) fn new(slab: Arc<KvSlab>) -> Self {
        Self { slab, pins_version: 0, digests: HashMap::new(), look: None }
    }

    /// Whether blocks are left to read.
    pub(super) fn reads(&self) -> bool {
        self.look.as_ref().is_some_and(|look| !look.left.is_empty())
    }

    /// The digest of all cells of a block.
    fn digest(&self, block: &Resident) -> u64 {
        let cell = |layer: usize| cell_digest(&block.name, layer as u16, &self.slab.read(block.at.slot.0 as usize, layer));
        (0..self.slab.layers()).map(cell).fold(0, u64::wrapping_add)
    }

    /// Reads some of the blocks that are left.
    fn read_on(&mut self, now: Time, batch: &mut Batch) {
        let Some(mut look) = self.look.take() else { return };
        let block_bytes = self.slab.cell_bytes() * self.slab.layers();
        for _ in 0..(LOOK_BYTES_PER_TURN / block_bytes).max(1) {
            let Some(block) = look.left.pop() else { break };
            match batch.resident(&block.name).filter(|there| there.at == block.at) {
                Some(Resident { idle: true, .. }) => self.compare(&block, batch, &mut look.found),
                Some(_) => look.found.busy += 1,
                None => {} // gone meanwhile
            }
        }
        if look.left.is_empty() && look.read.is_none() {
            look.read = Some(now.after(SETTLE_WAIT_MAX_US));
        }
        self.look = Some(look);
    }

    fn compare(&mut self, block: &Resident, batch: &mut Batch, found: &mut Verified) {
        let digest = self.digest(block);
        match self.digests.insert(block.at.slot, (block.at.generation, digest)) {
            Some((generation, recorded)) if generation == block.at.generation => {
                if recorded == digest {
                    found.sound += 1;
                    return;
                }
                found.damaged += 1;
                if found.damaged_names.len() < DAMAGED_MAX {
                    found.damaged_names.push(block.name);
                }
                self.digests.remove(&block.at.slot);
                let dropped = batch.drop_damaged(&block.name).dropped;
                tracing::error!(block = %block.name, slot = block.at.slot.0, dropped, "a cached block's bytes changed; it is dropped");
            }
            _ => found.recorded += 1,
        }
    }
}

impl Drive {
    /// Obeys a replica, if it means this incarnation.
    pub(super) fn on_order(&mut self, from: ReplicaId, order: CacheOrder) {
        let CacheOrder { id, epoch, task } = order;
        if self.uplinks.joined().is_none_or(|(_, current)| current != epoch) {
            return self.report(from, id, CacheResult::Refused);
        }
        let result = match task {
            CacheTask::Pin { version, names } if version >= self.upkeep.pins_version && names.len() <= ORDER_NAMES_MAX => {
                self.upkeep.pins_version = version;
                let pins = self.batch.set_pins(&names);
                tracing::info!(version, held = pins.held, absent = pins.absent, over = pins.over, "pins");
                CacheResult::Pinned { version, pins }
            }
            CacheTask::Evict { what, dry_run } if names(&what) <= ORDER_NAMES_MAX => {
                let count = self.batch.drop_cached(&what, dry_run);
                tracing::info!(dropped = count.dropped, kept = count.kept, pinned = count.pinned, dry_run, "evicted by order");
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

    fn report(&self, to: ReplicaId, id: u64, result: CacheResult) {
        let (node, epoch) = self.uplinks.joined().unwrap_or_default();
        self.uplinks.send(to, Message::CacheReport(CacheReport { id, node, epoch, result }));
    }

    /// Goes on with a look, and reports when it is through and the log has all that the pool did.
    pub(super) fn look_on(&mut self) {
        let now = self.clock.now();
        self.upkeep.read_on(now, &mut self.batch);
        let settled = self.uplinks.settled();
        let through = |look: &Look| look.read.is_some_and(|until| settled.is_some() || now >= until);
        if !self.upkeep.look.as_ref().is_some_and(through) {
            return;
        }
        let Some(mut look) = self.upkeep.look.take() else { return };
        for block in self.batch.residents() {
            look.found.blocks += 1;
            look.found.names_digest = toggle(look.found.names_digest, &block.name);
        }
        look.found.settled_seq = settled;
        self.report(look.from, look.id, CacheResult::Verified(look.found));
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
    use millrace_core::batch::{BatchConfig, Input};
    use millrace_core::engine::Sampled;
    use millrace_core::identity::{Fingerprint, TenantKey};
    use millrace_core::ids::{AttemptId, RequestId};
    use millrace_core::message::Ticket;
    use millrace_core::sampling::Sampling;

    use super::*;

    /// A batch of eight slots of two layers that has cached two blocks, and its memory.
    fn cached() -> (Batch, Upkeep) {
        let slab = KvSlab::new(64, 2, 8).unwrap();
        let config = BatchConfig {
            block_tokens: 4,
            slots: 8,
            step_tokens_max: 64,
            rows_max: 4,
            context_max: 64,
            headroom_blocks: 1,
            waiting_max: 4,
            fingerprint: Fingerprint::default(),
        };
        let mut batch = Batch::new(config);
        let attempt = AttemptId { request: RequestId(1), attempt: 0 };
        let sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 1, max_new: 1, eos: vec![], ignore_eos: false };
        let (tokens, tenant_key) = ((0..9).collect(), TenantKey([1; 32]));
        let ticket = Ticket {
            attempt,
            gateway: ReplicaId(1),
            decode: None,
            tokens,
            prompt_tokens: 9,
            sampling,
            tenant_key,
            cache_salt: vec![],
            budget_us: 1_000_000,
            trace: [0; 25],
        };
        batch.handle(Time(0), Input::Add(ticket));
        let step = batch.next_step(Time(0)).unwrap();
        for (i, slot) in step.rows[0].table.iter().enumerate() {
            (0..2).for_each(|layer| slab.write(slot.0 as usize, layer).fill(i as u8 + 1));
        }
        batch.handle(Time(0), Input::Stepped(Ok(vec![Sampled { attempt, token: 5, logprob: 0.0 }])));
        (batch, Upkeep::new(slab))
    }

    fn look(batch: &mut Batch, upkeep: &mut Upkeep) -> Verified {
        let left = batch.residents().collect();
        upkeep.look = Some(Look { from: ReplicaId(1), id: 1, left, found: Verified::default(), read: None });
        while upkeep.reads() {
            upkeep.read_on(Time(0), batch);
        }
        upkeep.look.take().unwrap().found
    }

    #[test]
    fn bytes_that_change_while_nobody_uses_them_are_found_and_dropped() {
        let (mut batch, mut upkeep) = cached();
        let blocks: Vec<Resident> = batch.residents().collect();
        assert!(blocks.len() == 2 && blocks.iter().all(|block| block.idle));
        assert_eq!(look(&mut batch, &mut upkeep), Verified { recorded: 2, ..Verified::default() });
        assert_eq!(look(&mut batch, &mut upkeep), Verified { sound: 2, ..Verified::default() });
        upkeep.slab.write(blocks[1].at.slot.0 as usize, 1)[3] ^= 1;
        let found = look(&mut batch, &mut upkeep);
        let second = blocks.iter().find(|b| **b == blocks[1]).unwrap().name;
        assert_eq!((found.damaged, found.damaged_names), (1, vec![second]));
        assert!(batch.resident(&second).is_none(), "it cannot be found any more");
        batch.check();
    }

    #[test]
    fn a_slot_that_was_given_out_again_is_another_block() {
        let (mut batch, mut upkeep) = cached();
        look(&mut batch, &mut upkeep);
        let slots: Vec<Slot> = batch.residents().map(|block| block.at.slot).collect();
        upkeep.digests.values_mut().for_each(|(generation, _)| generation.0 += 1);
        assert_eq!(look(&mut batch, &mut upkeep), Verified { recorded: slots.len() as u32, ..Verified::default() });
    }
}
