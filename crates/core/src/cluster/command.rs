//! What the log may say, and what the state machine answers. The variant order is the log's format: append only, and raise the
//! codec's version for any other change.

use alloc::string::String;
use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use super::members::{Member, MemberChange};
use super::{Checksum, PolicyAnswer, PolicyCommand};
use crate::identity::TenantKey;
use crate::ids::{Epoch, NodeId, ReplicaId};
use crate::message::{CacheDigest, Delta, Join, ModelIdentity, Role, SnapshotPage};
use crate::planted::{Bug, planted};

/// One entry of the log.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub enum Command {
    /// A node asks to be a member. Answers [`Answer::Joined`] or [`Answer::Refused`].
    ///
    /// A live incarnation under the same name is replaced: the leader proposes this only when that one may be. The same
    /// instance, still alive, gets the epoch that it has (its answer was lost).
    Join(Join),
    /// A node leaves on purpose. Its blocks are dropped. Answers [`Answer::Done`], or `Refused` for another incarnation.
    Leave {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        epoch: Epoch,
    },
    /// The leader has heard from these nodes. Answers [`Answer::Renewed`].
    Renew {
        /// Microseconds on the leader's monotonic clock since its previous renewal; 0 for the first of its term.
        /// At most [`super::RENEW_STEP_MAX_US`] of it count.
        elapsed_us: u64,
        /// Heard since then, and so renewed before leases are compared.
        nodes: Vec<(NodeId, Epoch)>,
    },
    /// The leader knows that an incarnation is gone. Its blocks are dropped. Answers as [`Self::Leave`].
    MarkDead {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        epoch: Epoch,
    },
    /// An operator cordons, drains or readmits a live node. Answers [`Answer::Done`] or `Refused`.
    SetState {
        /// The node.
        node: NodeId,
        /// `Up`, `Cordoned` or `Draining`.
        state: NodeState,
    },
    /// What nodes cache now: all that came within a few milliseconds, in the order of arrival. Answers [`Answer::Deltas`].
    Deltas(Vec<Delta>),
    /// A page of everything that one node caches. Answers [`Answer::Snapshot`].
    Snapshot(SnapshotPage),
    /// A tenant and a fresh key. Answers [`Answer::Tenant`] with the key that counts, which is the first that was put.
    PutTenant {
        /// The tenant.
        name: String,
        /// 32 random bytes.
        key: TenantKey,
    },
    /// A replica says where it can be reached. Answers [`Answer::Done`] or `Refused`.
    Announce {
        /// The replica.
        replica: ReplicaId,
        /// Where.
        info: ReplicaInfo,
    },
    /// An operator changes settings, tenants or pins. Answers [`Answer::Policy`].
    Policy(PolicyCommand),
    /// What nodes say of their caches in short, in the order of arrival. Answers [`Answer::Digests`].
    Digests(Vec<CacheDigest>),
    /// A replica says what its state was after an entry, in short. Answers [`Answer::Done`].
    Checksum {
        /// The replica.
        replica: ReplicaId,
        /// What it says.
        checksum: Checksum,
    },
    /// The members change; goes with the change of the consensus layer in one entry. Answers [`Answer::Done`] or `Refused`.
    Members(MemberChange),
    /// A replica says what it is called, where it listens and which log is its own. Answers [`Answer::Done`], or `Refused` when
    /// it is no member or another log is enrolled under its number.
    Enroll {
        /// The replica.
        replica: ReplicaId,
        /// What it says; `log` is never `None`.
        member: Member,
    },
}

/// What an applied entry gives back to its proposer.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub enum Answer {
    /// It is so now.
    Done,
    /// Nothing was changed, and why.
    Refused(String),
    /// The node is a member.
    Joined {
        /// Its number.
        node: NodeId,
        /// Its incarnation.
        epoch: Epoch,
    },
    /// Leases were compared with log time.
    Renewed {
        /// Nodes that are dead from now on.
        expired: Vec<NodeId>,
        /// Nodes of the entry whose epoch is not current, or that are not alive: they must join again.
        stale: Vec<NodeId>,
    },
    /// For each delta, in order.
    Deltas(Vec<(NodeId, DeltaVerdict)>),
    /// For a snapshot's page.
    Snapshot(SnapshotVerdict),
    /// The tenant's key.
    Tenant(TenantKey),
    /// For a change of policy.
    Policy(PolicyAnswer),
    /// For each digest, in order.
    Digests(Vec<DigestVerdict>),
}

/// What became of a delta.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaVerdict {
    /// It is in the index.
    Applied {
        /// The last applied sequence number now.
        seq: u64,
    },
    /// It builds on something else than the index has: the node must send a snapshot.
    Gap {
        /// The last applied sequence number.
        last_seq: u64,
    },
    /// Its incarnation is not current or not alive: the node must join again.
    StaleEpoch,
    /// It was in the index before (its answer was lost).
    AlreadyApplied {
        /// The last applied sequence number.
        seq: u64,
    },
}

/// How a node's cache compares with the index.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum DigestVerdict {
    /// They agree.
    Same,
    /// They do not, after the same deltas: the node must send a snapshot.
    Drifted,
    /// The index lacks blocks that it had no room for, and has room now: the node must send a snapshot.
    Lacking,
    /// It says nothing: it is of the past, or the index lacks blocks and has no room.
    Skipped,
    /// Its incarnation is not current or not alive: the node must join again.
    StaleEpoch,
}

/// What became of a snapshot's page.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotVerdict {
    /// It is kept; this page is next.
    Wanted {
        /// The next page.
        page: u32,
    },
    /// It was the last: the index has the snapshot, or something newer than it.
    Applied {
        /// The last applied sequence number now.
        seq: u64,
    },
    /// It is not the page that was next, or there is no room to keep it. What was assembled is dropped: send all again.
    Restart,
    /// Its incarnation is not current or not alive: the node must join again.
    StaleEpoch,
}

/// Where a node is in its life.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// Takes requests.
    Up,
    /// Gets no new requests, by an operator's will, until readmitted. Survives the process.
    Cordoned,
    /// Gets no new requests and is about to leave.
    Draining,
    /// Its lease ended, or the leader saw it die.
    Dead,
    /// It left on purpose.
    Left,
}

impl NodeState {
    /// Whether the incarnation counts: it has a lease and its blocks are indexed.
    #[must_use]
    pub const fn alive(self) -> bool {
        matches!(self, Self::Up | Self::Cordoned | Self::Draining)
    }

    /// Whether new requests may go there.
    #[must_use]
    pub fn usable(self) -> bool {
        matches!(self, Self::Up) || planted(Bug::CordonIgnored) && self.alive()
    }

    /// The word for it in logs and output.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Cordoned => "cordoned",
            Self::Draining => "draining",
            Self::Dead => "dead",
            Self::Left => "left",
        }
    }
}

/// A node that joined once. Kept for ever, so that its number is never given to another name.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Node {
    /// Its number.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Prefill or decode.
    pub role: Role,
    /// Where its QUIC endpoint listens, `ip:port`.
    pub address: String,
    /// A random number of its process's life.
    pub instance: u128,
    /// Its process id, for the operator.
    pub pid: u32,
    /// What it serves.
    pub model: ModelIdentity,
    /// Blocks that its pool can hold.
    pub slots: u32,
    /// Its latest incarnation.
    pub epoch: Epoch,
    /// Where it is in its life.
    pub state: NodeState,
    /// An operator cordoned it: the next incarnation starts cordoned too.
    pub cordoned: bool,
    /// Log time at which it is dead if not renewed, microseconds.
    pub lease_until_us: u64,
}

/// Where a replica of the coordinator can be reached.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct ReplicaInfo {
    /// Its HTTP gateway, `ip:port`.
    pub http_address: String,
    /// Its QUIC endpoint, `ip:port`.
    pub quic_address: String,
    /// Its process id, for the operator.
    pub pid: u32,
    /// A random number of its process's life.
    pub instance: u128,
}
