//! Which node holds which block, and in which tier: the index that routing reads. It decides whether a delta applies and what a prompt's
//! leading blocks are worth on each node; whether the sender may speak for a node at all (epochs, leases) is [`crate::cluster`]'s.
//!
//! Locations are hints: a stale one costs time, never correctness. They are replicated all the same, so a new leader is warm.
//! A block costs 24 bytes and its share of free places, whatever the number of its holders up to four. The tables are shared between
//! clones and copied shard by shard when one is written: a clone is a point in time and costs O(shards).
//! Hash tables are used for speed; nothing that leaves this module depends on their iteration order.

mod image;
mod incarnations;
mod place;
mod prefix;
mod shard;
#[cfg(test)]
mod tests;

pub(crate) use image::Held;
pub use image::HoldersError;
pub use prefix::Prefix;

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::cluster::{DeltaVerdict, DigestVerdict};
use crate::ids::{BlockHash, NodeId};
use crate::message::{CacheDigest, Delta, Tier};
use crate::planted::{Bug, planted};
use incarnations::Incarnations;
use place::{Incarnation, Location, Locations};
use shard::{SHARDS, Shard, shard_of};

/// Locations, that is pairs of a block and a node that holds it, in the whole index: 29 to 57 bytes each when each block has one holder.
/// At the bound a further `Stored` is refused and counted in [`Tally::refused`]; evictions and the end of a node make room again.
pub const BLOCKS_MAX: usize = 1 << 25;

/// Shards that [`Holders::sweep`] frees of dead locations at a time.
const SWEEP_SHARDS: usize = 4;

/// What the index knows of one node, in four numbers: two replicas, or a replica and the node, compare them to find drift.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Last applied sequence number of the node's deltas.
    pub seq: u64,
    /// Blocks held.
    pub blocks: u64,
    /// XOR of their names ([`toggle`]); tiers have no part in it.
    pub digest: u128,
    /// `Stored` operations refused at [`BLOCKS_MAX`] since the node's set was last replaced. While it is not 0 the index is
    /// known to lack blocks, and a digest that differs from the node's is no drift.
    pub refused: u64,
}

/// Adds a block to a digest or takes it out; the node and the index compute their digests with it.
#[must_use]
pub const fn toggle(digest: u128, block: &BlockHash) -> u128 {
    digest ^ u128::from_le_bytes(block.0)
}

#[derive(Clone, Copy, Debug)]
struct NodeBlocks {
    incarnation: Incarnation,
    blocks: u64,
    /// Those of them that are in another tier than the device's.
    off_device: u64,
    seq: u64,
    digest: u128,
    refused: u64,
    /// Its cache was found to differ, and no snapshot has come since.
    drifted: bool,
}

/// How often a node's cache and the index did not agree though they had applied the same, since the log began.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drift {
    /// Found by [`Holders::compare`].
    pub found: u64,
    /// Mended since by a snapshot of the node; the others ended with its incarnation, or wait.
    pub repaired: u64,
}

/// The index.
#[derive(Clone, Debug)]
pub struct Holders {
    shards: Vec<Arc<Shard>>,
    incarnations: Incarnations,
    nodes: BTreeMap<NodeId, NodeBlocks>,
    /// Of living incarnations, as the next two.
    locations: usize,
    off_device: u64,
    drift: Drift,
    locations_max: usize,
}

impl Default for Holders {
    fn default() -> Self {
        Self::with_max(BLOCKS_MAX)
    }
}

impl Holders {
    /// An empty index that takes `locations_max` locations. Replicas of one cluster must agree about it.
    #[must_use]
    pub fn with_max(locations_max: usize) -> Self {
        let empty = Arc::new(Shard::default()); // shared until something is stored
        let shards = vec![empty; SHARDS];
        let (incarnations, nodes) = (Incarnations::default(), BTreeMap::new());
        Self { shards, incarnations, nodes, locations: 0, off_device: 0, drift: Drift::default(), locations_max }
    }

    /// A new incarnation of `node`: known, at sequence number 0, holding nothing.
    ///
    /// # Panics
    /// With more nodes than [`crate::cluster::NODES_MAX`] several times over: the cluster's bound is broken.
    pub fn begin(&mut self, node: NodeId) {
        self.drop_node(node);
        let incarnation = match self.incarnations.begin(node) {
            Some(incarnation) => incarnation,
            None => {
                self.sweep_all();
                self.incarnations.begin(node).expect("the living are fewer than the numbers, and no dead are left")
            }
        };
        let fresh = NodeBlocks { incarnation, blocks: 0, off_device: 0, seq: 0, digest: 0, refused: 0, drifted: false };
        self.nodes.insert(node, fresh);
    }

    /// Forgets `node` and every location of it, at once for every reader; memory comes back with the next sweeps.
    pub fn drop_node(&mut self, node: NodeId) {
        if let Some(gone) = self.nodes.remove(&node) {
            self.locations -= gone.blocks as usize;
            self.off_device -= gone.off_device;
            if !planted(Bug::DeadKeepsBlocks) {
                self.incarnations.end(gone.incarnation, gone.blocks as usize);
            }
        }
    }

    /// Frees some of the memory that dead incarnations left. Changes nothing that can be read. O(blocks of a few shards).
    pub fn sweep(&mut self) {
        for _ in 0..SWEEP_SHARDS {
            if !self.sweep_one() {
                return;
            }
        }
    }

    fn sweep_one(&mut self) -> bool {
        let Some(next) = self.incarnations.next_shard() else { return false };
        if self.shards[next].len() > 0 {
            Arc::make_mut(&mut self.shards[next]).retain(|incarnation| self.incarnations.owner(incarnation).is_some());
        }
        true
    }

    /// O(blocks): a fraction of a second with tens of millions. Needed only when nodes die faster than the log moves on.
    fn sweep_all(&mut self) {
        while self.sweep_one() {}
    }

    /// Applies a delta of a known node whole, or not at all. The caller has compared the epoch.
    pub fn apply(&mut self, delta: &Delta) -> DeltaVerdict {
        let Some(mut node) = self.nodes.get(&delta.node).copied() else { return DeltaVerdict::StaleEpoch };
        let last_seq = node.seq;
        if delta.seq <= last_seq {
            return DeltaVerdict::AlreadyApplied { seq: last_seq };
        }
        if delta.base_seq != last_seq && !planted(Bug::DeltaGap) {
            return DeltaVerdict::Gap { last_seq };
        }
        for op in &delta.ops {
            self.change(&mut node, op.block(), op.tier());
        }
        node.seq = delta.seq;
        self.nodes.insert(delta.node, node);
        DeltaVerdict::Applied { seq: delta.seq }
    }

    /// Compares what a known node says of its cache with what the index has after the same deltas. The caller has compared the epoch.
    pub fn compare(&mut self, said: &CacheDigest) -> DigestVerdict {
        let Some(node) = self.nodes.get_mut(&said.node) else { return DigestVerdict::StaleEpoch };
        if said.seq < node.seq {
            return DigestVerdict::Skipped; // deltas overtook it
        }
        if (said.seq, said.blocks, said.digest) == (node.seq, node.blocks, node.digest) || planted(Bug::DigestAlwaysSame) {
            return DigestVerdict::Same;
        }
        if node.refused > 0 {
            let missing = said.blocks.saturating_sub(node.blocks) as usize;
            let room = self.locations_max - self.locations > missing.saturating_mul(2);
            return if room { DigestVerdict::Lacking } else { DigestVerdict::Skipped };
        }
        self.drift.found += u64::from(!node.drifted);
        node.drifted = true;
        DigestVerdict::Drifted
    }

    /// Replaces all that is known of `node`, as its snapshot says; all of it counts as on the device until a delta says otherwise.
    /// Repeated names count once. O(blocks after).
    pub fn replace_node(&mut self, node: NodeId, seq: u64, blocks: &[BlockHash]) {
        self.drift.repaired += u64::from(self.nodes.get(&node).is_some_and(|old| old.drifted));
        self.begin(node);
        let Some(mut fresh) = self.nodes.get(&node).copied() else { return };
        for block in blocks {
            self.change(&mut fresh, block, Some(Tier::Device));
        }
        fresh.seq = seq;
        self.nodes.insert(node, fresh);
    }

    /// `node` holds `block` on its device from now on. Nothing happens when it does already, or is unknown.
    pub fn store(&mut self, node: NodeId, block: &BlockHash) {
        self.set(node, block, Some(Tier::Device));
    }

    /// `node` does not hold `block` any more. Nothing happens when it did not.
    pub fn evict(&mut self, node: NodeId, block: &BlockHash) {
        self.set(node, block, None);
    }

    fn set(&mut self, node: NodeId, block: &BlockHash, tier: Option<Tier>) {
        if let Some(mut known) = self.nodes.get(&node).copied() {
            self.change(&mut known, block, tier);
            self.nodes.insert(node, known);
        }
    }

    /// Says where a node has a block now; `node` is written back by the caller.
    fn change(&mut self, node: &mut NodeBlocks, block: &BlockHash, tier: Option<Tier>) {
        if tier.is_some() && self.locations >= self.locations_max - self.incarnations.dead_locations().min(self.locations_max) {
            self.sweep_all();
            if self.locations >= self.locations_max && self.locations_of(block).tier(node.incarnation).is_none() {
                node.refused = node.refused.saturating_add(1);
                return;
            }
        }
        let shard = Arc::make_mut(&mut self.shards[shard_of(block)]);
        let old = match tier {
            Some(tier) => shard.insert(block, Location::new(node.incarnation, tier)),
            None => shard.remove(block, node.incarnation),
        };
        let off = |tier: Option<Tier>| u64::from(tier.is_some_and(|tier| tier != Tier::Device));
        node.off_device = node.off_device + off(tier) - off(old);
        self.off_device = self.off_device + off(tier) - off(old);
        if old.is_some() != tier.is_some() {
            node.digest = toggle(node.digest, block);
            (node.blocks, self.locations) = match tier {
                Some(_) => (node.blocks + 1, self.locations + 1),
                None => (node.blocks - 1, self.locations - 1),
            };
        }
    }

    fn locations_of(&self, block: &BlockHash) -> Locations<'_> {
        self.shards[shard_of(block)].locations(block)
    }

    /// The nodes that hold `block` and where, sorted by node.
    #[must_use]
    pub fn tiers_of(&self, block: &BlockHash) -> Vec<(NodeId, Tier)> {
        let mut nodes = self.alive(&self.locations_of(block));
        nodes.sort_unstable();
        nodes
    }

    /// The nodes that hold `block`, sorted.
    #[must_use]
    pub fn of(&self, block: &BlockHash) -> Vec<NodeId> {
        self.tiers_of(block).into_iter().map(|(node, _)| node).collect()
    }

    /// The living among the holders, in no order.
    fn alive(&self, locations: &Locations<'_>) -> Vec<(NodeId, Tier)> {
        let alive = |l: &Location| self.incarnations.owner(l.holder()).map(|node| (node, l.tier()));
        locations.as_slice().iter().filter_map(alive).collect()
    }

    /// What is known of a node in short; `None` when it is not known.
    #[must_use]
    pub fn tally(&self, node: NodeId) -> Option<Tally> {
        let node = self.nodes.get(&node)?;
        Some(Tally { seq: node.seq, blocks: node.blocks, digest: node.digest, refused: node.refused })
    }

    /// The blocks that a node holds, sorted. O(blocks of all nodes): for an operator and for tests.
    #[must_use]
    pub fn blocks_of(&self, node: NodeId) -> Vec<BlockHash> {
        let Some(of_node) = self.nodes.get(&node) else { return Vec::new() };
        let all = self.shards.iter().flat_map(|shard| shard.iter());
        let mut blocks: Vec<_> =
            all.filter(|(_, locations)| locations.tier(of_node.incarnation).is_some()).map(|(block, _)| *block).collect();
        blocks.sort_unstable();
        blocks
    }

    /// The nodes that are known, sorted.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.nodes.keys().copied()
    }

    /// Locations in the index.
    #[must_use]
    pub const fn locations(&self) -> usize {
        self.locations
    }

    /// How often nodes' caches did not agree with it.
    #[must_use]
    pub const fn drift(&self) -> Drift {
        self.drift
    }

    /// Different blocks in the tables, those of dead nodes included that no sweep has reached yet. O(shards). For an operator only:
    /// replicas may differ in it.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.shards.iter().map(|shard| shard.len()).sum()
    }

    /// Names the first invariant that does not hold. O(locations).
    ///
    /// # Errors
    /// The invariant, in words.
    pub fn validate(&self) -> Result<(), &'static str> {
        let mut counted: BTreeMap<NodeId, (u64, u64, u128)> = self.nodes.keys().map(|node| (*node, (0, 0, 0))).collect();
        for (number, shard) in self.shards.iter().enumerate().filter(|(_, shard)| shard.len() > 0) {
            for (block, locations) in shard.iter() {
                if shard_of(block) != number {
                    return Err("a block is in another shard than its name says");
                }
                if locations.as_slice().is_empty() || !locations.as_slice().is_sorted_by_key(|l| l.holder()) {
                    return Err("a block's locations are none or not sorted");
                }
                for (node, tier) in self.alive(&locations) {
                    let Some(count) = counted.get_mut(&node) else { return Err("a location's owner is not known") };
                    *count = (count.0 + 1, count.1 + u64::from(tier != Tier::Device), toggle(count.2, block));
                }
            }
            if !shard.lists_are_owned() {
                return Err("a list of locations belongs to no block, or to several");
            }
        }
        if self.nodes.iter().any(|(id, node)| counted.get(id) != Some(&(node.blocks, node.off_device, node.digest))) {
            return Err("a node's count or digest is not that of its blocks");
        }
        let all = |of: fn(&NodeBlocks) -> u64| self.nodes.values().map(of).sum::<u64>();
        if all(|node| node.off_device) != self.off_device {
            return Err("the count of blocks off the device is wrong");
        }
        if all(|node| node.blocks) != self.locations as u64 || self.locations > self.locations_max {
            return Err("the count of locations is wrong");
        }
        Ok(())
    }
}
