//! Which node holds which block: the index that routing reads. It decides whether a delta applies and what a prompt's leading
//! blocks are worth on each node; whether the sender may speak for a node at all (epochs, leases) is [`crate::cluster`]'s.
//!
//! Locations are hints: a stale one costs time, never correctness. They are replicated all the same, so a new leader is warm.
//! Hash tables are used for speed; nothing that leaves this module depends on their iteration order.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use hashbrown::hash_map::Entry;
use hashbrown::{HashMap, HashSet};

use crate::cluster::DeltaVerdict;
use crate::ids::{BlockHash, NodeId};
use crate::message::{BlockOp, Delta};

/// Locations, that is pairs of a block and a node that holds it, in the whole index: some 100 bytes each.
/// At the bound a further `Stored` is refused and counted in [`Tally::refused`]; evictions make room again.
pub const BLOCKS_MAX: usize = 1 << 23;

/// Holders of one block that need no allocation.
const INLINE: usize = 6;

/// A sorted set of nodes; small sets live in place.
#[derive(Clone, Debug)]
enum Nodes {
    Few { len: u8, nodes: [NodeId; INLINE] },
    Many(Vec<NodeId>),
}

impl Nodes {
    const fn new() -> Self {
        Self::Few { len: 0, nodes: [NodeId(0); INLINE] }
    }

    fn as_slice(&self) -> &[NodeId] {
        match self {
            Self::Few { len, nodes } => &nodes[..usize::from(*len)],
            Self::Many(nodes) => nodes,
        }
    }

    /// Adds a node; false when it is there already.
    fn insert(&mut self, node: NodeId) -> bool {
        let Err(at) = self.as_slice().binary_search(&node) else { return false };
        match self {
            Self::Few { len, nodes } if usize::from(*len) < INLINE => {
                nodes.copy_within(at..usize::from(*len), at + 1);
                nodes[at] = node;
                *len += 1;
            }
            Self::Few { nodes, .. } => {
                let mut many = nodes.to_vec();
                many.insert(at, node);
                *self = Self::Many(many);
            }
            Self::Many(nodes) => nodes.insert(at, node),
        }
        true
    }

    /// Takes a node out; false when it is not there.
    fn remove(&mut self, node: NodeId) -> bool {
        let Ok(at) = self.as_slice().binary_search(&node) else { return false };
        match self {
            Self::Few { len, nodes } => {
                nodes.copy_within(at + 1..usize::from(*len), at);
                *len -= 1;
            }
            Self::Many(nodes) => {
                nodes.remove(at);
            }
        }
        true
    }
}

/// What the index knows of one node, in four numbers: two replicas, or a replica and the node, compare them to find drift.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Last applied sequence number of the node's deltas.
    pub seq: u64,
    /// Blocks held.
    pub blocks: u64,
    /// XOR of their names ([`toggle`]).
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

#[derive(Clone, Debug, Default)]
struct NodeBlocks {
    blocks: HashSet<BlockHash>,
    seq: u64,
    digest: u128,
    refused: u64,
}

/// The index.
#[derive(Clone, Debug)]
pub struct Holders {
    holders: HashMap<BlockHash, Nodes>,
    nodes: BTreeMap<NodeId, NodeBlocks>,
    locations: usize,
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
        Self { holders: HashMap::new(), nodes: BTreeMap::new(), locations: 0, locations_max }
    }

    /// A new incarnation of `node`: known, at sequence number 0, holding nothing. O(blocks it had).
    pub fn begin(&mut self, node: NodeId) {
        self.drop_node(node);
        self.nodes.insert(node, NodeBlocks::default());
    }

    /// Forgets `node` and every location of it. O(blocks it had).
    pub fn drop_node(&mut self, node: NodeId) {
        let Some(gone) = self.nodes.remove(&node) else { return };
        self.locations -= gone.blocks.len();
        for block in &gone.blocks {
            self.unlink(node, block);
        }
    }

    /// Applies a delta of a known node whole, or not at all. The caller has compared the epoch.
    pub fn apply(&mut self, delta: &Delta) -> DeltaVerdict {
        let Some(node) = self.nodes.get(&delta.node) else { return DeltaVerdict::StaleEpoch };
        let last_seq = node.seq;
        if delta.seq <= last_seq {
            return DeltaVerdict::AlreadyApplied { seq: last_seq };
        }
        if delta.base_seq != last_seq {
            return DeltaVerdict::Gap { last_seq };
        }
        for op in &delta.ops {
            match op {
                BlockOp::Stored(block) => self.store(delta.node, block),
                BlockOp::Evicted(block) => self.evict(delta.node, block),
            }
        }
        if let Some(node) = self.nodes.get_mut(&delta.node) {
            node.seq = delta.seq;
        }
        DeltaVerdict::Applied { seq: delta.seq }
    }

    /// Replaces all that is known of `node`, as its snapshot says. Repeated names count once. O(blocks before and after).
    pub fn replace_node(&mut self, node: NodeId, seq: u64, blocks: &[BlockHash]) {
        self.begin(node);
        for block in blocks {
            self.store(node, block);
        }
        if let Some(node) = self.nodes.get_mut(&node) {
            node.seq = seq;
        }
    }

    /// `node` holds `block` from now on. Nothing happens when it does already, or is unknown.
    pub fn store(&mut self, node: NodeId, block: &BlockHash) {
        let Some(of_node) = self.nodes.get_mut(&node) else { return };
        if self.locations >= self.locations_max {
            of_node.refused = of_node.refused.saturating_add(u64::from(!of_node.blocks.contains(block)));
            return;
        }
        if of_node.blocks.insert(*block) {
            of_node.digest = toggle(of_node.digest, block);
            self.locations += 1;
            self.holders.entry(*block).or_insert_with(Nodes::new).insert(node);
        }
    }

    /// `node` does not hold `block` any more. Nothing happens when it did not.
    pub fn evict(&mut self, node: NodeId, block: &BlockHash) {
        let Some(of_node) = self.nodes.get_mut(&node) else { return };
        if of_node.blocks.remove(block) {
            of_node.digest = toggle(of_node.digest, block);
            self.locations -= 1;
            self.unlink(node, block);
        }
    }

    fn unlink(&mut self, node: NodeId, block: &BlockHash) {
        let Entry::Occupied(mut entry) = self.holders.entry(*block) else { return };
        entry.get_mut().remove(node);
        if entry.get().as_slice().is_empty() {
            entry.remove();
        }
    }

    /// The nodes that hold `block`, sorted.
    #[must_use]
    pub fn of(&self, block: &BlockHash) -> &[NodeId] {
        self.holders.get(block).map_or(&[], Nodes::as_slice)
    }

    /// For each node that holds the first of `blocks`: how many leading ones it holds without a gap. Sorted by node.
    /// Stops at the first block that no such node holds: O(longest run x its holders).
    #[must_use]
    pub fn prefix_lengths(&self, blocks: &[BlockHash]) -> Vec<(NodeId, u32)> {
        let Some(first) = blocks.first() else { return Vec::new() };
        let mut alive = self.of(first).to_vec();
        let mut lengths = Vec::with_capacity(alive.len());
        for (length, block) in (1_u32..).zip(&blocks[1..]) {
            let here = self.of(block);
            if here != alive {
                alive.retain(|node| {
                    let holds = here.binary_search(node).is_ok();
                    if !holds {
                        lengths.push((*node, length));
                    }
                    holds
                });
            }
            if alive.is_empty() {
                break;
            }
        }
        lengths.extend(alive.into_iter().map(|node| (node, blocks.len() as u32)));
        lengths.sort_unstable();
        lengths
    }

    /// What is known of a node in short; `None` when it is not known.
    #[must_use]
    pub fn tally(&self, node: NodeId) -> Option<Tally> {
        let node = self.nodes.get(&node)?;
        Some(Tally { seq: node.seq, blocks: node.blocks.len() as u64, digest: node.digest, refused: node.refused })
    }

    /// The blocks that a node holds, sorted. O(n log n).
    #[must_use]
    pub fn blocks_of(&self, node: NodeId) -> Vec<BlockHash> {
        let mut blocks: Vec<_> = self.nodes.get(&node).into_iter().flat_map(|n| n.blocks.iter().copied()).collect();
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

    /// Different blocks in the index.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.holders.len()
    }

    /// Puts back the counters of a node that was restored with [`Self::replace_node`].
    pub(crate) fn restore_refused(&mut self, node: NodeId, refused: u64) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.refused = refused;
        }
    }

    /// Names the first invariant that does not hold. O(locations).
    ///
    /// # Errors
    /// The invariant, in words.
    pub fn validate(&self) -> Result<(), &'static str> {
        let mut locations = 0;
        for (id, node) in &self.nodes {
            locations += node.blocks.len();
            if node.blocks.iter().any(|block| self.of(block).binary_search(id).is_err()) {
                return Err("a block of a node does not list it as holder");
            }
            if node.blocks.iter().fold(0, toggle) != node.digest {
                return Err("a node's digest is not that of its blocks");
            }
        }
        let listed: usize = self.holders.values().map(|nodes| nodes.as_slice().len()).sum();
        if locations != self.locations || listed != locations || locations > self.locations_max {
            return Err("the count of locations is wrong");
        }
        if self.holders.values().any(|nodes| nodes.as_slice().is_empty() || !nodes.as_slice().is_sorted()) {
            return Err("a list of holders is empty or not sorted");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Epoch;
    use alloc::vec;

    fn block(i: u32) -> BlockHash {
        let mut name = [0; 16];
        name[..4].copy_from_slice(&i.to_le_bytes());
        BlockHash(name)
    }

    fn stored(holders: &mut Holders, node: u16, blocks: core::ops::Range<u32>) {
        blocks.for_each(|i| holders.store(NodeId(node), &block(i)));
        holders.validate().unwrap();
    }

    fn with_nodes(n: u16) -> Holders {
        let mut holders = Holders::with_max(1000);
        (1..=n).for_each(|node| holders.begin(NodeId(node)));
        holders
    }

    #[test]
    fn prefix_runs_end_at_each_nodes_first_gap() {
        let mut holders = with_nodes(9);
        stored(&mut holders, 1, 0..4);
        stored(&mut holders, 2, 0..7);
        stored(&mut holders, 3, 1..9); // lacks the first: worth nothing
        (4..=9).for_each(|node| stored(&mut holders, node, 0..2)); // eight holders of block 0: a list on the heap
        holders.evict(NodeId(2), &block(5));
        let chain: Vec<_> = (0..20).map(block).collect();
        let expected: Vec<_> = [(1, 4), (2, 5)].into_iter().chain((4..=9).map(|n| (n, 2))).map(|(n, k)| (NodeId(n), k)).collect();
        assert_eq!(holders.prefix_lengths(&chain), expected);
        assert_eq!(holders.prefix_lengths(&chain[..1]).len(), 8);
        assert_eq!(holders.prefix_lengths(&[]), vec![]);
        assert_eq!(holders.prefix_lengths(&[block(99)]), vec![]);
    }

    #[test]
    fn a_delta_applies_once_and_only_on_what_it_builds_on() {
        let mut holders = with_nodes(1);
        let delta = |base_seq, seq, ops| Delta { node: NodeId(1), epoch: Epoch(1), base_seq, seq, ops };
        let first = delta(0, 2, vec![BlockOp::Stored(block(1)), BlockOp::Stored(block(2)), BlockOp::Evicted(block(1))]);
        assert_eq!(holders.apply(&first), DeltaVerdict::Applied { seq: 2 });
        assert_eq!(holders.apply(&first), DeltaVerdict::AlreadyApplied { seq: 2 });
        assert_eq!(holders.apply(&delta(3, 4, vec![BlockOp::Stored(block(3))])), DeltaVerdict::Gap { last_seq: 2 });
        assert_eq!(holders.apply(&delta(1, 4, vec![BlockOp::Stored(block(3))])), DeltaVerdict::Gap { last_seq: 2 });
        assert_eq!(holders.blocks_of(NodeId(1)), vec![block(2)]);
        assert_eq!(holders.tally(NodeId(1)).unwrap().digest, toggle(0, &block(2)));
        holders.validate().unwrap();
    }

    #[test]
    fn at_the_bound_blocks_are_refused_and_counted_until_there_is_room() {
        let mut holders = Holders::with_max(3);
        holders.begin(NodeId(1));
        holders.begin(NodeId(2));
        stored(&mut holders, 1, 0..2);
        stored(&mut holders, 2, 0..5);
        assert_eq!(holders.tally(NodeId(2)).unwrap(), Tally { seq: 0, blocks: 1, digest: toggle(0, &block(0)), refused: 4 });
        stored(&mut holders, 2, 0..1); // held already: not refused
        assert_eq!(holders.tally(NodeId(2)).unwrap().refused, 4);
        holders.drop_node(NodeId(1));
        stored(&mut holders, 2, 1..3);
        assert_eq!((holders.locations(), holders.blocks()), (3, 3));
    }

    #[test]
    fn a_snapshot_replaces_everything() {
        let mut holders = with_nodes(2);
        stored(&mut holders, 1, 0..5);
        stored(&mut holders, 2, 3..6);
        holders.replace_node(NodeId(1), 9, &[block(7), block(3), block(7)]);
        holders.validate().unwrap();
        assert_eq!(holders.blocks_of(NodeId(1)), vec![block(3), block(7)]);
        assert_eq!(holders.tally(NodeId(1)).unwrap().seq, 9);
        assert_eq!(holders.of(&block(3)), &[NodeId(1), NodeId(2)]);
        assert_eq!(holders.of(&block(0)), &[]);
    }
}
