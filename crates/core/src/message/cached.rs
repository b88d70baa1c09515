//! What a node says about the blocks that it caches.

use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::ids::{BlockHash, Epoch, NodeId};

/// Block operations in one delta.
pub const DELTA_OPS_MAX: usize = 4096;
/// Blocks in one page of a node's snapshot.
pub const SNAPSHOT_PAGE_MAX: usize = 16_384;

/// Where a node keeps a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// In the memory that its engine computes in.
    Device,
    /// In the host's memory.
    Host,
    /// On its disk.
    Disk,
}

/// One change of what a node caches: where it has a block from now on. The variant order is the format of the wire and the log.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOp {
    /// The block is on the device and can be reused.
    Stored(BlockHash),
    /// It is nowhere any more.
    Evicted(BlockHash),
    /// It is in the host's memory.
    ToHost(BlockHash),
    /// It is on the node's disk.
    ToDisk(BlockHash),
}

impl BlockOp {
    /// Which block.
    #[must_use]
    pub const fn block(&self) -> &BlockHash {
        match self {
            Self::Stored(block) | Self::Evicted(block) | Self::ToHost(block) | Self::ToDisk(block) => block,
        }
    }

    /// Where it is now; `None` when it is nowhere.
    #[must_use]
    pub const fn tier(&self) -> Option<Tier> {
        match self {
            Self::Stored(_) => Some(Tier::Device),
            Self::Evicted(_) => None,
            Self::ToHost(_) => Some(Tier::Host),
            Self::ToDisk(_) => Some(Tier::Disk),
        }
    }
}

/// Changes of one node's cached blocks. Applies only if `epoch` is current and `base_seq` is the last applied.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    /// Whose blocks.
    pub node: NodeId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// The sequence number this builds on.
    pub base_seq: u64,
    /// The sequence number after it; greater than `base_seq`.
    pub seq: u64,
    /// At most [`DELTA_OPS_MAX`].
    pub ops: Vec<BlockOp>,
}

/// All cached blocks of one node, in any tier, in pages; replaces what the index knew of it when the last page applies.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct SnapshotPage {
    /// Whose blocks.
    pub node: NodeId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// The sequence number that the whole snapshot stands for.
    pub seq: u64,
    /// This page, from 0.
    pub page: u32,
    /// Pages in all; at least 1.
    pub pages: u32,
    /// At most [`SNAPSHOT_PAGE_MAX`].
    pub blocks: Vec<BlockHash>,
}
