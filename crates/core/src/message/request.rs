//! One attempt at one request: its ticket, its tokens, its hand-over, its end.

use alloc::string::String;
use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::identity::TenantKey;
use crate::ids::{AttemptId, Epoch, Generation, NodeId, ReplicaId, TokenId};
use crate::sampling::Sampling;

/// Tokens that one ticket may carry: prompt and answer.
pub const TOKENS_MAX: usize = 1 << 20;
/// Cells in one KV stream.
pub const STREAM_CELLS_MAX: usize = 1 << 16;

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

/// What decode holds of a hand-over whose link was lost; what it does not hold is to be sent again.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// Which attempt.
    pub attempt: AttemptId,
    /// The reservation, as before.
    pub generation: Generation,
    /// Bytes that may have been sent in all, of what stands and what follows.
    pub credit_bytes: u64,
    /// One bit for each cell that moves, layer by layer, of the blocks that decode did not have: set when it stands, verified.
    pub stands: Vec<u64>,
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
