//! Every message of the cluster, as data. Framing and transport are `millrace-node`'s; who may send which is [`Message::may_send`].
//!
//! Three links exist. *node to coordinator*: each node keeps one to every replica (join, heartbeats, deltas up; tickets down; tokens up).
//! *coordinator to coordinator*: raft and forwarded commands. *prefill to decode*: one hand-over at a time is a few messages here,
//! while its KV travels beside them on unidirectional streams, each led by a [`CellsHeader`].

#![allow(missing_docs, reason = "rkyv's derive makes undocumented fields for the larger enum; every item here has its text")]

use alloc::string::String;
use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::identity::{Fingerprint, TenantKey};
use crate::ids::{AttemptId, BlockHash, Epoch, Generation, NodeId, ReplicaId, TokenId};
use crate::layout::KvLayout;
use crate::sampling::Sampling;

/// Tokens that one ticket may carry: prompt and answer.
pub const TOKENS_MAX: usize = 1 << 20;
/// Block operations in one delta.
pub const DELTA_OPS_MAX: usize = 4096;
/// Blocks in one page of a node's snapshot.
pub const SNAPSHOT_PAGE_MAX: usize = 16_384;
/// Cells in one KV stream.
pub const STREAM_CELLS_MAX: usize = 1 << 16;

/// What a process is. Its certificate says so.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[rkyv(derive(PartialEq))]
pub enum Role {
    /// A replica of the coordinator; also a gateway.
    Coordinator,
    /// Computes prompts.
    Prefill,
    /// Computes answers, token by token; may also compute prompts.
    Decode,
    /// An operator's tool.
    Admin,
}

impl Role {
    /// The word for it in certificates, logs and output.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Admin => "admin",
        }
    }

    /// The role that a word names.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Coordinator, Self::Prefill, Self::Decode, Self::Admin].into_iter().find(|r| r.as_str() == word)
    }
}

/// What a process says first on a link, both ways. Compared before anything else is read.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Hello {
    /// The cluster's name.
    pub cluster: String,
    /// The process's name, equal to the one in its certificate.
    pub name: String,
    /// A random number of this process's life.
    pub instance: u128,
    /// The node's number and epoch; zeros before it joined, and for coordinators.
    pub node: NodeId,
    /// See `node`.
    pub epoch: Epoch,
    /// What the process serves; `None` for an operator's tool.
    pub model: Option<ModelIdentity>,
}

/// What must be equal between two processes that exchange KV or tokens.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct ModelIdentity {
    /// The model's public name.
    pub name: String,
    /// Digest of the weight files.
    pub weights: [u8; 32],
    /// Digest of the tokenizer.
    pub tokenizer: [u8; 32],
    /// Shape and dtype of cached KV.
    pub layout: KvLayout,
}

impl ModelIdentity {
    /// The first field in which two differ, by name; `None` when KV may be exchanged.
    #[must_use]
    pub fn differs(&self, other: &Self) -> Option<&'static str> {
        if self.weights != other.weights {
            return Some("weights");
        }
        if self.tokenizer != other.tokenizer {
            return Some("tokenizer");
        }
        self.layout.differs(&other.layout)
    }

    /// The root of every block's name under this model.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        let l = &self.layout;
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"millrace model v1").update(&self.weights).update(&self.tokenizer);
        for field in [l.layers, l.kv_heads, l.head_dim, l.block_tokens, l.dtype as u16] {
            hasher.update(&field.to_le_bytes());
        }
        Fingerprint(*hasher.finalize().as_bytes())
    }
}

/// A node asks to be a member. Sent to any replica; answered when the log has it.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Join {
    /// The node's name, unique in the cluster.
    pub name: String,
    /// Prefill or decode.
    pub role: Role,
    /// Where its QUIC endpoint listens, `ip:port`.
    pub address: String,
    /// A random number of this process's life: two processes under one name are told apart by it.
    pub instance: u128,
    /// The process id, for the operator.
    pub pid: u32,
    /// What it serves.
    pub model: ModelIdentity,
    /// Blocks that its pool can hold.
    pub slots: u32,
}

/// How busy a node is; sent with each heartbeat, kept by each replica in memory only.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Prompt tokens waiting or being computed.
    pub queued_tokens: u64,
    /// Sequences that are decoding.
    pub running: u32,
    /// Sequences that wait for a place.
    pub waiting: u32,
    /// Slots that nothing uses.
    pub free_blocks: u32,
    /// Slots that hold cached blocks nobody reads: free on demand.
    pub evictable_blocks: u32,
    /// All slots.
    pub total_blocks: u32,
    /// Measured: nanoseconds to compute one prompt token; 0 when not known yet.
    pub prefill_ns_per_token: u64,
    /// Measured: microseconds of one decode step at the present batch; 0 when not known yet.
    pub decode_step_us: u64,
    /// Measured: bytes a second that a hand-over from here reaches; 0 when not known yet.
    pub send_bytes_per_s: u64,
}

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

/// A node as a ticket names it.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its number.
    pub node: NodeId,
    /// The incarnation that the ticket is for.
    pub epoch: Epoch,
    /// Its name: the peer's certificate must say the same.
    pub name: String,
    /// Where its QUIC endpoint listens.
    pub address: String,
}

/// Who does what for one attempt at one request.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Ticket {
    /// The attempt.
    pub attempt: AttemptId,
    /// The replica that talks to the client; tokens go there.
    pub gateway: ReplicaId,
    /// Where the answer is decoded, when not by the node that gets this ticket.
    pub decode: Option<Peer>,
    /// Everything known so far: the prompt, then tokens already delivered by earlier attempts.
    pub tokens: Vec<TokenId>,
    /// How many of `tokens` are the prompt.
    pub prompt_tokens: u32,
    /// How to draw.
    pub sampling: Sampling,
    /// The key of the caller's tenant: names the blocks.
    pub tenant_key: TenantKey,
    /// Narrows sharing further; at most 256 bytes.
    pub cache_salt: Vec<u8>,
    /// Time left for the whole request, in microseconds, from arrival of this message.
    pub budget_us: u64,
    /// W3C trace context: 16 bytes trace id, 8 bytes span id, flags.
    pub trace: [u8; 25],
}

impl Ticket {
    /// Tokens already delivered by earlier attempts; the next token's index.
    #[must_use]
    pub fn delivered(&self) -> u32 {
        (self.tokens.len() as u32).saturating_sub(self.prompt_tokens)
    }
}

/// One token of an answer, on its way to the gateway. `index` counts from 0 over all attempts, so a repeat is harmless.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct TokenOut {
    /// Of which attempt.
    pub attempt: AttemptId,
    /// Its place in the answer.
    pub index: u32,
    /// The token.
    pub token: TokenId,
    /// Natural log of its probability.
    pub logprob: f32,
    /// With the first token of an attempt: what the prompt cost.
    pub prefill: Option<PrefillStats>,
    /// With the last: why it ends.
    pub finish: Option<Finish>,
}

/// What computing a prompt took.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
pub struct PrefillStats {
    /// The node that computed it.
    pub node: String,
    /// Tokens of the prompt whose KV was reused there.
    pub cached_tokens: u32,
    /// From arrival of the ticket to the first step, microseconds.
    pub queue_us: u64,
    /// From the first step to the first token, microseconds.
    pub compute_us: u64,
}

/// Why an answer ends.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-text token (not delivered as text).
    Stop,
    /// `max_new` or the context is used up.
    Length,
}

/// What a hand-over took; sent by prefill when decode has verified all of it.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct HandoverStats {
    /// Of which attempt.
    pub attempt: AttemptId,
    /// The node that decodes.
    pub node: String,
    /// KV bytes sent.
    pub bytes: u64,
    /// Blocks sent.
    pub blocks_sent: u32,
    /// Blocks that decode had already.
    pub blocks_had: u32,
    /// From the first KV byte sent to the receipt of all, microseconds.
    pub transfer_us: u64,
    /// The part of it after the first token was drawn: what compute did not hide, microseconds.
    pub exposed_us: u64,
}

/// Why a node gives up on an attempt. The gateway makes a new ticket for the kinds that another node may do better.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailKind {
    /// The pool has no room, now or ever.
    NoRoom,
    /// The other node of the ticket is lost or not the one that the ticket means.
    PeerLost,
    /// Bytes did not match their digest, or the manifest.
    Integrity,
    /// The deadline passed.
    Deadline,
    /// The engine failed.
    Engine,
    /// The ticket makes no sense to this node (other model, other epoch, limits).
    BadTicket,
    /// The node is draining or stopping.
    Stopping,
}

/// An attempt that ended without its last token.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct AttemptFailed {
    /// Which attempt.
    pub attempt: AttemptId,
    /// Why.
    pub kind: FailKind,
    /// For the log and the error message.
    pub detail: String,
}

/// Prefill asks decode to take a sequence.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Open {
    /// The ticket, as prefill got it; its `decode` names the receiver.
    pub ticket: Ticket,
}

/// Decode has reserved every slot.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granted {
    /// Which attempt.
    pub attempt: AttemptId,
    /// Leading full blocks that decode holds already: not to be sent.
    pub have_blocks: u32,
    /// Names this reservation; every stream carries it.
    pub generation: Generation,
    /// Bytes that may be sent before further [`Message::Credit`].
    pub credit_bytes: u64,
}

/// The end of a hand-over: what decode must hold now.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
pub struct Fin {
    /// Which attempt.
    pub attempt: AttemptId,
    /// The reservation.
    pub generation: Generation,
    /// Cells sent: layers x blocks.
    pub cells: u64,
    /// Wrapping sum of the digests of all cells sent.
    pub digest_sum: u64,
    /// The first token, already delivered to the gateway.
    pub first_token: TokenId,
    /// Whether the answer ended with it: keep the blocks, decode nothing.
    pub finished: bool,
}

/// Leads each unidirectional KV stream: `layers` x `blocks` cells, layer by layer, follow it raw, each `cell_bytes` long.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct CellsHeader {
    /// Which attempt.
    pub attempt: AttemptId,
    /// The reservation that may be written to.
    pub generation: Generation,
    /// First layer.
    pub layer: u16,
    /// Layers.
    pub layers: u16,
    /// First block of the sequence.
    pub block: u32,
    /// Blocks.
    pub blocks: u32,
    /// A digest for each cell, in payload order ([`crate::identity::cell_digest`]).
    pub digests: Vec<u64>,
}

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
            | Self::Answer { .. } => matches!(role, Role::Coordinator),
            Self::Join(_)
            | Self::Heartbeat { .. }
            | Self::Delta(_)
            | Self::Snapshot(_)
            | Self::Token(_)
            | Self::Failed(_)
            | Self::Handover(_)
            | Self::Leave { .. }
            | Self::Abort { .. } => matches!(role, Role::Prefill | Role::Decode),
            Self::Open(_) | Self::Fin(_) => matches!(role, Role::Prefill | Role::Decode),
            Self::Granted(_) | Self::Declined { .. } | Self::Credit { .. } | Self::Received { .. } => {
                matches!(role, Role::Prefill | Role::Decode)
            }
            Self::Query { .. } => matches!(role, Role::Admin | Role::Coordinator),
        }
    }
}
