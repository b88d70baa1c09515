//! What a replica asks of a node's cache on an operator's behalf, and what the node says.

use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::identity::Owner;
use crate::ids::{BlockHash, Epoch, NodeId};

/// Names in one order; a longer list is refused by the node.
pub const ORDER_NAMES_MAX: usize = 1 << 15;
/// Damaged blocks that a report names; more are only counted.
pub const DAMAGED_MAX: usize = 64;

/// An order to one incarnation of a node.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct CacheOrder {
    /// Correlates the report.
    pub id: u64,
    /// The incarnation that is meant; another one does not obey.
    pub epoch: Epoch,
    /// What to do.
    pub task: CacheTask,
}

/// What to do with cached blocks.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub enum CacheTask {
    /// These blocks, and no others, are pinned from now on; each after the one before it in its chain. Reported as [`CacheResult::Pinned`].
    Pin {
        /// The log's count of changes; an older one than the node has has no effect.
        version: u64,
        /// At most [`ORDER_NAMES_MAX`].
        names: Vec<BlockHash>,
    },
    /// Drop cached blocks that nobody uses. Reported as [`CacheResult::Evicted`].
    Evict {
        /// Which.
        what: Evict,
        /// Only count.
        dry_run: bool,
    },
    /// Say what is cached and compare its bytes with their digests. Reported as [`CacheResult::Verified`].
    Verify,
}

/// Which blocks go.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum Evict {
    /// All.
    All,
    /// The blocks of one prompt, from its first on, and what continues the last of them; a block that other prompts continue stays.
    Prompt(Vec<BlockHash>),
    /// All of one tenant.
    Owner(Owner),
}

/// A node's report.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct CacheReport {
    /// As ordered.
    pub id: u64,
    /// The node.
    pub node: NodeId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// What came of it.
    pub result: CacheResult,
}

/// What came of an order.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub enum CacheResult {
    /// Pins are as ordered.
    Pinned {
        /// The version that counts now.
        version: u64,
        /// How it stands.
        pins: PinCount,
    },
    /// Blocks are dropped, or were only counted.
    Evicted(EvictCount),
    /// The cache was looked through.
    Verified(Verified),
    /// Another look is under way, or the order makes no sense here.
    Refused,
}

/// How a pool's pins stand, in blocks.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PinCount {
    /// Cached, and not evicted.
    pub held: u32,
    /// Not cached here; pinned when they come.
    pub absent: u32,
    /// Cached, and not pinned because the share for pins is used up.
    pub over: u32,
}

/// What an eviction found, in blocks.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EvictCount {
    /// Dropped, or to be dropped.
    pub dropped: u32,
    /// Kept because a sequence uses them, or something that stays continues them.
    pub kept: u32,
    /// Kept because they are pinned.
    pub pinned: u32,
}

/// What a look through the cache found.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// The last delta that the log has applied, when nothing is under way to it: what the index must equal.
    pub settled_seq: Option<u64>,
    /// Cached blocks.
    pub blocks: u64,
    /// XOR of their names ([`crate::holders::toggle`]).
    pub names_digest: u128,
    /// Idle blocks whose bytes equal what an earlier look recorded.
    pub sound: u32,
    /// Idle blocks seen for the first time: their digest is recorded now.
    pub recorded: u32,
    /// Blocks in use: not read.
    pub busy: u32,
    /// Blocks whose bytes changed while nobody used them: dropped at once.
    pub damaged: u32,
    /// The first of those, at most [`DAMAGED_MAX`].
    pub damaged_names: Vec<BlockHash>,
}
