//! The index as bytes, for snapshots of the state. Equal indexes give equal bytes, and no step needs the whole at once.
//!
//! First a line for each node ([`Held`]), which the caller keeps; then the blocks, sorted by name, shard after shard:
//! `name 16 bytes | holders u16 | holders x (node | tier << 14) u16`, little-endian, holders sorted by node.

use alloc::sync::Arc;
use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use super::place::Location;
use super::shard::{SHARDS, shard_of};
use super::{Drift, Holders, NodeBlocks, toggle};
use crate::cluster::NODES_MAX;
use crate::ids::{BlockHash, NodeId};
use crate::message::Tier;
use crate::planted::{Bug, planted};

/// Bits of a location in the bytes that name the node; its tier is above them.
const NODE_BITS: u32 = 14;

/// What a snapshot says of one node, beside its blocks.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub node: NodeId,
    pub seq: u64,
    pub refused: u64,
    /// How many blocks follow for it, and the XOR of their names: a reader that does not find the same has other bytes than were written.
    pub blocks: u64,
    pub digest: u128,
    pub drifted: bool,
}

/// Why bytes are no index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HoldersError {
    /// The bytes end within a block.
    #[error("the bytes end within a block")]
    Truncated,
    /// Names or holders are not strictly ascending.
    #[error("blocks or holders are not sorted")]
    Order,
    /// A holder is not among the nodes, or its tier is none.
    #[error("a holder is unknown")]
    Holder,
    /// A node is listed twice.
    #[error("a node is listed twice")]
    Twice,
    /// A node's blocks are not those that were written.
    #[error("the blocks of node {0} are not those that were written")]
    Digest(NodeId),
    /// More locations or nodes than the index takes.
    #[error("more locations or nodes than the index takes")]
    TooMany,
}

impl Holders {
    /// What a snapshot says of each node, sorted by node.
    pub(crate) fn held(&self) -> Vec<Held> {
        let held = |(id, n): (&NodeId, &NodeBlocks)| Held {
            node: *id,
            seq: n.seq,
            refused: n.refused,
            blocks: n.blocks,
            digest: n.digest,
            drifted: n.drifted,
        };
        self.nodes.iter().map(held).collect()
    }

    /// The blocks in pieces: at most one for each shard, to be read back in this order.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Vec<u8>> {
        let shards = self.shards.iter().filter(|shard| shard.len() > 0);
        shards.map(|shard| {
            let mut bytes = Vec::with_capacity(shard.len() * 20);
            for (block, locations) in shard.sorted() {
                let mut holders = self.alive(&locations);
                holders.sort_unstable();
                if !holders.is_empty() {
                    bytes.extend_from_slice(&block.0);
                    bytes.extend_from_slice(&(holders.len() as u16).to_le_bytes());
                    holders.iter().for_each(|(node, tier)| bytes.extend_from_slice(&pack(*node, *tier).to_le_bytes()));
                }
            }
            bytes
        })
    }

    /// The index that [`Self::held`] and [`Self::pieces`] wrote. O(locations).
    ///
    /// # Errors
    /// When it is not one that they write, to the byte.
    pub(crate) fn read(&mut self, (drift, held): (Drift, &[Held]), mut bytes: &[u8]) -> Result<(), HoldersError> {
        self.drift = drift;
        if held.len() > NODES_MAX {
            return Err(HoldersError::TooMany);
        }
        for line in held {
            if self.nodes.contains_key(&line.node) {
                return Err(HoldersError::Twice);
            }
            self.begin(line.node);
        }
        let per_shard = bytes.len() / 20 / SHARDS;
        let mut last = None;
        while !bytes.is_empty() {
            let block = BlockHash(take(&mut bytes)?);
            if last.is_some_and(|last| last >= block) {
                return Err(HoldersError::Order);
            }
            if last.is_none_or(|last| shard_of(&last) != shard_of(&block)) {
                Arc::make_mut(&mut self.shards[shard_of(&block)]).reserve(per_shard);
            }
            last = Some(block);
            self.read_locations(&block, &mut bytes)?;
        }
        held.iter().try_for_each(|line| self.seal(line))
    }

    fn read_locations(&mut self, block: &BlockHash, bytes: &mut &[u8]) -> Result<(), HoldersError> {
        let mut last = None;
        let holders = u16::from_le_bytes(take(bytes)?);
        for _ in 0..holders {
            let (id, tier) = unpack(u16::from_le_bytes(take(bytes)?)).ok_or(HoldersError::Holder)?;
            if last.replace(id).is_some_and(|last| last >= id) {
                return Err(HoldersError::Order);
            }
            if self.locations >= self.locations_max {
                return Err(HoldersError::TooMany);
            }
            let node = self.nodes.get_mut(&id).ok_or(HoldersError::Holder)?;
            Arc::make_mut(&mut self.shards[shard_of(block)]).insert(block, Location::new(node.incarnation, tier));
            node.blocks += 1;
            node.off_device += u64::from(tier != Tier::Device);
            self.off_device += u64::from(tier != Tier::Device);
            node.digest = toggle(node.digest, block);
            self.locations += 1;
        }
        if holders == 0 { Err(HoldersError::Holder) } else { Ok(()) }
    }

    fn seal(&mut self, line: &Held) -> Result<(), HoldersError> {
        let node = self.nodes.get_mut(&line.node).ok_or(HoldersError::Holder)?;
        if (node.blocks, node.digest) != (line.blocks, line.digest) {
            return Err(HoldersError::Digest(line.node));
        }
        let seq = if planted(Bug::SnapshotForgetsSeq) { 0 } else { line.seq };
        (node.seq, node.refused, node.drifted) = (seq, line.refused, line.drifted);
        Ok(())
    }
}

fn pack(node: NodeId, tier: Tier) -> u16 {
    node.0 | (tier as u16) << NODE_BITS
}

fn unpack(packed: u16) -> Option<(NodeId, Tier)> {
    let tier = [Tier::Device, Tier::Host, Tier::Disk].into_iter().find(|tier| *tier as u16 == packed >> NODE_BITS)?;
    Some((NodeId(packed & ((1 << NODE_BITS) - 1)), tier))
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], HoldersError> {
    let (taken, rest) = bytes.split_first_chunk::<N>().ok_or(HoldersError::Truncated)?;
    *bytes = rest;
    Ok(*taken)
}
