//! Who a process is and how it is: greetings, joins, load.

use alloc::string::String;
use rkyv::{Archive, Deserialize, Serialize};

use crate::identity::Fingerprint;
use crate::ids::{Epoch, NodeId, ReplicaId};
use crate::layout::KvLayout;

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
        hasher.update(b"millrace model v2").update(&self.weights).update(&self.tokenizer);
        for field in [l.layers, l.parts as u16, l.kv_heads, l.head_dim, l.block_tokens, l.dtype as u16] {
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
    /// Slots that hold pinned blocks nobody reads: kept.
    pub pinned_blocks: u32,
    /// All slots.
    pub total_blocks: u32,
    /// Measured: nanoseconds to compute one prompt token; 0 when not known yet.
    pub prefill_ns_per_token: u64,
    /// Measured: microseconds of one decode step at the present batch; 0 when not known yet.
    pub decode_step_us: u64,
    /// Measured: bytes a second that a hand-over from here reaches; 0 when not known yet.
    pub send_bytes_per_s: u64,
    /// Pairs of the tokens in `queued_tokens`, each with every token before it in its sequence: what attention adds.
    pub queued_pairs: u64,
    /// Measured with `prefill_ns_per_token`: picoseconds more for each pair of a prompt token and a token before it.
    pub prefill_ps_per_pair: u64,
    /// Counted since the process began: messages and streams of hand-overs that named an old generation, or one that is over.
    pub stale_frames: u64,
    /// Counted since the process began: hand-overs that went on after a lost link.
    pub resumes: u64,
    /// Counted since the process began: sequences that lost their room to others and were computed again.
    pub preemptions: u64,
    /// Memory that the process had resident at most, weights and pool included, bytes; 0 where the system does not tell.
    pub resident_bytes_max: u64,
}

/// Replicas of which a node is told.
pub const REPLICAS_TOLD_MAX: usize = 64;

/// Where a replica of the coordinator can be reached.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct ReplicaAddress {
    /// Its number.
    pub replica: ReplicaId,
    /// Where its QUIC endpoint listens, `ip:port`.
    pub address: String,
}
