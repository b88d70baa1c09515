//! Bytes of commands, answers and snapshots: one version byte, then an rkyv archive, always validated. Equal states give equal bytes.
//! A snapshot's archive has its length before it and the blocks of the index after it, in pieces ([`Cluster::snapshot_pieces`]).

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::Error;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use super::policy::PolicyImage;
use super::{Answer, Assembly, Audit, Cluster, Command, Member, NODES_MAX, Node, Policy, ReplicaInfo};
use crate::holders::{Drift, Held, Holders, HoldersError};
use crate::ids::{Epoch, ReplicaId};
use crate::message::{DELTA_OPS_MAX, ModelIdentity, SNAPSHOT_PAGE_MAX};

/// Version of the formats of commands and answers. A reader refuses any other.
const VERSION: u8 = 3;
/// Version of the format of snapshots.
const SNAPSHOT_VERSION: u8 = 4;
/// Bytes of one encoded command; a longer one is refused unread.
pub const COMMAND_BYTES_MAX: usize = 4 << 20;
/// Block operations in all deltas of one command: what a leader may fold into one entry.
pub const DELTAS_OPS_MAX: usize = 1 << 16;

/// Why bytes are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The first byte names another format.
    #[error("format version {got:?}, this program reads {VERSION}, and {SNAPSHOT_VERSION} for snapshots")]
    Version {
        /// The byte; `None` when there are no bytes.
        got: Option<u8>,
    },
    /// The blocks of a snapshot are no index.
    #[error("the index of a snapshot: {0}")]
    Index(#[from] HoldersError),
    /// Not a valid archive.
    #[error("malformed bytes")]
    Malformed,
    /// Valid, and over a bound.
    #[error("{got} {what}, at most {max} are allowed")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there are.
        got: usize,
        /// How many there may be.
        max: usize,
    },
    /// Valid, and not a state that any log leads to.
    #[error("the state is inconsistent: {0}")]
    Inconsistent(&'static str),
}

/// The bytes of a command.
#[must_use]
pub fn encode(command: &Command) -> Vec<u8> {
    to_bytes(command)
}

/// A command from bytes that anyone may have sent.
///
/// # Errors
/// When the bytes are not a command, or it exceeds a bound.
pub fn decode(bytes: &[u8]) -> Result<Command, CodecError> {
    within("bytes", bytes.len(), COMMAND_BYTES_MAX)?;
    let command = from_bytes(bytes)?;
    match &command {
        Command::Renew { nodes, .. } => within("nodes", nodes.len(), NODES_MAX)?,
        Command::Deltas(deltas) => {
            deltas.iter().try_for_each(|delta| within("operations in a delta", delta.ops.len(), DELTA_OPS_MAX))?;
            within("operations", deltas.iter().map(|delta| delta.ops.len()).sum(), DELTAS_OPS_MAX)?;
        }
        Command::Snapshot(page) => within("blocks in a page", page.blocks.len(), SNAPSHOT_PAGE_MAX)?,
        Command::Digests(digests) => within("digests", digests.len(), NODES_MAX)?,
        _ => {}
    }
    Ok(command)
}

/// The bytes of an answer, for the replica that forwarded the command.
#[must_use]
pub fn encode_answer(answer: &Answer) -> Vec<u8> {
    to_bytes(answer)
}

/// An answer from a peer's bytes.
///
/// # Errors
/// When the bytes are not an answer.
pub fn decode_answer(bytes: &[u8]) -> Result<Answer, CodecError> {
    within("bytes", bytes.len(), COMMAND_BYTES_MAX)?;
    from_bytes(bytes)
}

fn within(what: &'static str, got: usize, max: usize) -> Result<(), CodecError> {
    if got > max { Err(CodecError::TooMany { what, got, max }) } else { Ok(()) }
}

fn to_bytes<T>(value: &T) -> Vec<u8>
where
    T: for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, Error>>,
{
    let archive = archive(value);
    let mut bytes = Vec::with_capacity(1 + archive.len());
    bytes.push(VERSION);
    bytes.extend_from_slice(&archive);
    bytes
}

pub(super) fn archive<T>(value: &T) -> AlignedVec
where
    T: for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, Error>>,
{
    rkyv::to_bytes::<Error>(value).expect("bounded far below rkyv's 2 GiB, and memory is all it needs")
}

fn from_bytes<T>(bytes: &[u8]) -> Result<T, CodecError>
where
    T: Archive,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, Error>> + Deserialize<T, HighDeserializer<Error>>,
{
    let Some((&VERSION, archive)) = bytes.split_first() else {
        return Err(CodecError::Version { got: bytes.first().copied() });
    };
    from_archive(archive)
}

fn from_archive<T>(archive: &[u8]) -> Result<T, CodecError>
where
    T: Archive,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, Error>> + Deserialize<T, HighDeserializer<Error>>,
{
    let mut aligned = AlignedVec::<16>::with_capacity(archive.len());
    aligned.extend_from_slice(archive);
    rkyv::from_bytes::<T, Error>(&aligned).map_err(|_| CodecError::Malformed)
}

/// The state as it is written: sorted lists, nothing that can be derived.
#[derive(Archive, Serialize, Deserialize)]
struct Image {
    applied: u64,
    now_us: u64,
    last_epoch: Epoch,
    model: Option<ModelIdentity>,
    nodes: Vec<Node>,
    policy: PolicyImage,
    replicas: Vec<(ReplicaId, ReplicaInfo)>,
    members: Vec<(ReplicaId, Member)>,
    removed: Vec<ReplicaId>,
    assemblies: Vec<Assembly>,
    holders: Vec<Held>,
    drift: Drift,
}

impl Cluster {
    /// The whole state, for a replica that lags behind the log. O(locations, sorted).
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.snapshot_pieces().for_each(|piece| bytes.extend_from_slice(&piece));
        bytes
    }

    /// The same in pieces, each made when it is asked for: the state without the index first, then the index, a thousandth at a time.
    /// A clone is a point in time and cheap, so a copy can be written while the state goes on.
    pub fn snapshot_pieces(&self) -> impl Iterator<Item = Vec<u8>> {
        let head = archive(&self.image());
        let mut first = Vec::with_capacity(5 + head.len());
        first.push(SNAPSHOT_VERSION);
        first.extend_from_slice(&(head.len() as u32).to_le_bytes());
        first.extend_from_slice(&head);
        core::iter::once(first).chain(self.holders.pieces())
    }

    fn image(&self) -> Image {
        Image {
            applied: self.applied,
            now_us: self.now_us,
            last_epoch: self.last_epoch,
            model: self.model.clone(),
            nodes: self.nodes.values().cloned().collect(),
            policy: self.policy.image(),
            replicas: self.replicas.iter().map(|(id, info)| (*id, info.clone())).collect(),
            members: self.members.iter().map(|(id, member)| (*id, member.clone())).collect(),
            removed: self.removed.iter().copied().collect(),
            assemblies: self.assemblies.values().cloned().collect(),
            holders: self.holders.held(),
            drift: self.holders.drift(),
        }
    }

    /// The state that [`Self::snapshot`] wrote.
    ///
    /// # Errors
    /// When the bytes are not a snapshot, or of a state that no log leads to.
    pub fn restore(bytes: &[u8]) -> Result<Self, CodecError> {
        let (head, blocks) = split_snapshot(bytes)?;
        let image: Image = from_archive(head)?;
        let listed = [image.nodes.len(), image.replicas.len(), image.assemblies.len()];
        let listed_members = (image.members.len(), image.removed.len());
        let mut holders = Holders::default();
        holders.read((image.drift, &image.holders), blocks)?;
        let cluster = Self {
            applied: image.applied,
            now_us: image.now_us,
            last_epoch: image.last_epoch,
            model: image.model,
            names: image.nodes.iter().map(|node| (node.name.clone(), node.node)).collect(),
            nodes: image.nodes.into_iter().map(|node| (node.node, node)).collect(),
            policy: Policy::restore(image.policy).map_err(CodecError::Inconsistent)?,
            replicas: image.replicas.into_iter().collect(),
            members: image.members.into_iter().collect(),
            removed: image.removed.into_iter().collect(),
            assemblies: image.assemblies.into_iter().map(|a| (a.node, a)).collect::<BTreeMap<_, _>>(),
            holders,
            audit: Audit::default(),
        };
        let kept = [cluster.nodes.len(), cluster.replicas.len(), cluster.assemblies.len()];
        if listed != kept || listed_members != (cluster.members.len(), cluster.removed.len()) {
            return Err(CodecError::Inconsistent("something is listed twice"));
        }
        // The index was compared with its digests as it was read; to count it again would take as long.
        cluster.validate_members().map_err(CodecError::Inconsistent)?;
        Ok(cluster)
    }
}

/// The archive of a snapshot and the blocks after it.
fn split_snapshot(bytes: &[u8]) -> Result<(&[u8], &[u8]), CodecError> {
    let Some((&SNAPSHOT_VERSION, rest)) = bytes.split_first() else {
        return Err(CodecError::Version { got: bytes.first().copied() });
    };
    let (len, rest) = rest.split_first_chunk().ok_or(CodecError::Malformed)?;
    rest.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or(CodecError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{LEASE_US, NodeState};
    use crate::ids::NodeId;
    use crate::layout::{KvDtype, KvLayout, KvParts};
    use crate::message::Role;
    use alloc::vec;

    #[test]
    fn refused_blocks_are_remembered_and_duplicates_are_not_a_state() {
        let layout =
            KvLayout { layers: 1, parts: KvParts::KeysValues, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype: KvDtype::F32 };
        let model = ModelIdentity { name: "m".into(), weights: [0; 32], tokenizer: [0; 32], layout };
        let (id, epoch, state) = (NodeId(1), Epoch(1), NodeState::Up);
        let node = |name: &str| Node {
            node: id,
            name: name.into(),
            role: Role::Decode,
            address: "a".into(),
            instance: 1,
            pid: 1,
            model: model.clone(),
            slots: 2,
            epoch,
            state,
            cordoned: false,
            lease_until_us: LEASE_US,
        };
        let block = [1; 16];
        let held = || Held { node: id, seq: 4, refused: 3, blocks: 1, digest: u128::from_le_bytes(block), drifted: true };
        let image = |nodes, holders| {
            let (policy, replicas, assemblies) = (Policy::default().image(), Vec::new(), Vec::new());
            let (members, removed) = (Vec::new(), Vec::new());
            Image {
                applied: 9,
                now_us: 0,
                last_epoch: epoch,
                model: Some(model.clone()),
                nodes,
                policy,
                replicas,
                members,
                removed,
                assemblies,
                holders,
                drift: Drift { found: 2, repaired: 1 },
            }
        };
        let bytes = |image: &Image| {
            let head = archive(image);
            let head_len = (head.len() as u32).to_le_bytes();
            [&[SNAPSHOT_VERSION][..], &head_len, &head, &block, &[1, 0], &[1, 0]].concat()
        };
        let whole = bytes(&image(vec![node("x")], vec![held()]));
        let cluster = Cluster::restore(&whole).unwrap();
        assert_eq!(cluster.holders().tally(id).unwrap().refused, 3);
        assert_eq!(cluster.holders().drift(), Drift { found: 2, repaired: 1 });
        assert_eq!(cluster.snapshot(), whole);
        let restored = |image: &Image| Cluster::restore(&bytes(image)).unwrap_err();
        let twice = restored(&image(vec![node("x"), node("y")], vec![held()]));
        assert_eq!(twice, CodecError::Inconsistent("something is listed twice"));
        assert_eq!(restored(&image(vec![node("x")], vec![held(), held()])), CodecError::Index(HoldersError::Twice));
        let lost = Held { blocks: 2, ..held() };
        assert_eq!(restored(&image(vec![node("x")], vec![lost])), CodecError::Index(HoldersError::Digest(id)));
        assert_eq!(Cluster::restore(&whole[..whole.len() - 1]).unwrap_err(), CodecError::Index(HoldersError::Truncated));
    }
}
