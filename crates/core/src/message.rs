//! Every message of the cluster, as data. Framing and transport are `millrace-node`'s; who may send which is [`Message::may_send`].
//!
//! Three links exist. *node to coordinator*: each node keeps one to every replica (join, heartbeats, deltas up; tickets down; tokens up).
//! *coordinator to coordinator*: raft and forwarded commands. *prefill to decode*: one hand-over at a time is a few messages here,
//! while its KV travels beside them on unidirectional streams of other connections, each led by a [`CellsHeader`].

#![allow(missing_docs, reason = "rkyv's derive makes undocumented fields for the larger enum; every item here has its text")]

mod cached;
mod member;
mod request;
mod upkeep;

pub use cached::*;
pub use member::*;
pub use request::*;
pub use upkeep::*;

use alloc::string::String;
use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::ids::{AttemptId, Epoch, Generation, NodeId};

/// A control frame. The variant order is the wire format: append only, and raise the protocol version for any other change.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub enum Message {
    /// First on every link, both ways.
    Hello(Hello),
    /// Instead of an answer: the link is refused and will be closed. Names the field or rule.
    Refuse(String),
    /// A raft message, encoded by the coordinator.
    Raft(Vec<u8>),
    /// A follower passes a command to the leader.
    Forward {
        /// Correlates the answer.
        id: u64,
        /// An encoded command.
        command: Vec<u8>,
    },
    /// The leader's answer to it.
    Forwarded {
        /// As asked.
        id: u64,
        /// The state machine's answer, or why there is none.
        result: Result<Vec<u8>, String>,
    },
    /// A node asks to be a member.
    Join(Join),
    /// It is one.
    Joined {
        /// Its number.
        node: NodeId,
        /// Its incarnation.
        epoch: Epoch,
    },
    /// It may not be one, and why.
    JoinRefused {
        /// For the operator.
        reason: String,
        /// Trying again may help (no leader yet, an older process under this name still alive).
        retry: bool,
    },
    /// Each 200 ms from every node to every replica.
    Heartbeat {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        epoch: Epoch,
        /// How busy it is.
        load: Load,
    },
    /// From a node to one replica, which passes it to the leader.
    Delta(Delta),
    /// What the log has applied of a node's deltas.
    DeltaApplied {
        /// The node's incarnation.
        epoch: Epoch,
        /// Last applied sequence number.
        seq: u64,
    },
    /// The index and the node disagree about `base_seq`: send all.
    WantSnapshot {
        /// The node's incarnation.
        epoch: Epoch,
    },
    /// One page of it.
    Snapshot(SnapshotPage),
    /// Do this attempt.
    Assign(Ticket),
    /// Stop it: the client is gone, or a newer attempt replaces it.
    Cancel(AttemptId),
    /// A token.
    Token(TokenOut),
    /// An attempt ended without its last token.
    Failed(AttemptFailed),
    /// A hand-over ended well.
    Handover(HandoverStats),
    /// Prefill asks decode to take a sequence.
    Open(Open),
    /// Decode does.
    Granted(Granted),
    /// Decode does not, and why.
    Declined {
        /// Which attempt.
        attempt: AttemptId,
        /// Why.
        kind: FailKind,
        /// For the log.
        detail: String,
    },
    /// Decode takes more bytes: cumulative.
    Credit {
        /// Which attempt.
        attempt: AttemptId,
        /// Bytes that may have been sent in all.
        bytes: u64,
    },
    /// Prefill has sent everything.
    Fin(Fin),
    /// Decode has verified everything.
    Received {
        /// Which attempt.
        attempt: AttemptId,
    },
    /// Either side gives up.
    Abort {
        /// Which attempt.
        attempt: AttemptId,
        /// Why.
        kind: FailKind,
        /// For the log.
        detail: String,
    },
    /// A node leaves on purpose: choose it no more.
    Leave {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        epoch: Epoch,
    },
    /// An operator's tool asks a replica something; JSON.
    Query {
        /// Correlates the answer.
        id: u64,
        /// A query of the coordinator's admin interface, JSON.
        json: String,
    },
    /// The answer, JSON.
    Answer {
        /// As asked.
        id: u64,
        /// The answer, or an error for the operator.
        result: Result<String, String>,
    },
    /// A replica asks a node to pin, drop or look at cached blocks.
    CacheOrder(CacheOrder),
    /// What came of it.
    CacheReport(CacheReport),
    /// What a node caches in short, each second to one replica, which passes it to the leader.
    CacheDigest(CacheDigest),
    /// From a replica to a node, some times a second. It says nothing; that the transport acknowledges it says that the node hears.
    Ping,
    /// First between two replicas, both ways, before any raft frame: the identity of the sender's log.
    Log(u128),
    /// From a replica to another that it does not take for a member, and what to do about it.
    NoMember(String),
    /// From a replica to a node: where the replicas are, for it to keep links to all. At most [`REPLICAS_TOLD_MAX`].
    Replicas(Vec<ReplicaAddress>),
    /// Prefill goes on with a hand-over whose link was lost, on a new one.
    Resume {
        /// Which attempt.
        attempt: AttemptId,
        /// The reservation, as it was granted.
        generation: Generation,
    },
    /// Decode goes on too.
    Resumed(Resumed),
    /// A node that is being stopped asks to be drained: what decodes there goes on elsewhere, with its KV. [`Self::Leave`] follows.
    Drain {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        epoch: Epoch,
    },
    /// From the side that accepted a link between nodes, once: where it takes connections for KV.
    Lanes {
        /// A UDP port of the address that was dialed.
        port: u16,
    },
}

impl Message {
    /// Whether a peer of `role` may send this message at all. Everything else closes the link.
    #[must_use]
    pub const fn may_send(&self, role: Role) -> bool {
        match self {
            Self::Hello(_) | Self::Refuse(_) => true,
            Self::Raft(_)
            | Self::Forward { .. }
            | Self::Forwarded { .. }
            | Self::Joined { .. }
            | Self::JoinRefused { .. }
            | Self::DeltaApplied { .. }
            | Self::WantSnapshot { .. }
            | Self::Assign(_)
            | Self::Cancel(_)
            | Self::CacheOrder(_)
            | Self::Answer { .. }
            | Self::Ping
            | Self::Log(_)
            | Self::NoMember(_)
            | Self::Replicas(_) => matches!(role, Role::Coordinator),
            Self::Join(_)
            | Self::Heartbeat { .. }
            | Self::Delta(_)
            | Self::Snapshot(_)
            | Self::CacheDigest(_)
            | Self::Token(_)
            | Self::Failed(_)
            | Self::Handover(_)
            | Self::Leave { .. }
            | Self::Drain { .. }
            | Self::CacheReport(_)
            | Self::Lanes { .. }
            | Self::Abort { .. } => matches!(role, Role::Prefill | Role::Decode),
            Self::Open(_) | Self::Fin(_) | Self::Resume { .. } => matches!(role, Role::Prefill | Role::Decode),
            Self::Granted(_) | Self::Declined { .. } | Self::Credit { .. } | Self::Received { .. } | Self::Resumed(_) => {
                matches!(role, Role::Prefill | Role::Decode)
            }
            Self::Query { .. } => matches!(role, Role::Admin | Role::Coordinator),
        }
    }
}
