//! What a node says about the blocks that it caches.

use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::ids::{BlockHash, Epoch, NodeId};

/// Block operations in one delta.
pub const DELTA_OPS_MAX: usize = 4096;
/// Blocks in one page of a node's snapshot.
pub const SNAPSHOT_PAGE_MAX: usize = 16_384;

/// One change of what a node's pool caches.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOp {
    /// The block can be reused from now on.
    Stored(BlockHash),
    /// It cannot any more.
    Evicted(BlockHash),
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

/// All cached blocks of one node, in pages; replaces what the index knew of it when the last page applies.
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
