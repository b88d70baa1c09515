//! What a node says to whoever reads its log: facts, which the shell turns into fields.

use alloc::boxed::Box;
use alloc::string::String;

use crate::ids::{AttemptId, BlockHash, Epoch, NodeId, Slot};
use crate::message::{EvictCount, FailKind, Message, PinCount};

/// Something worth a line.
#[derive(Debug)]
pub enum Note {
    /// The node is a member, under this incarnation.
    Joined(NodeId, Epoch),
    /// Not yet, and why.
    NotYet(String),
    /// A sequence whose answer is decoded elsewhere has its slots; so many leading blocks were cached.
    Admitted(AttemptId, u32),
    /// An attempt ended without its last token, and its gateway was told.
    Failed(AttemptId, FailKind, String),
    /// A message that means nothing on the link that it came on.
    Meaningless(Box<Message>),
    /// Pins are set: version, and how they stand.
    Pins(u64, PinCount),
    /// An order dropped blocks, or only counted them (`true`).
    Evicted(EvictCount, bool),
    /// A cached block's bytes changed while nobody used it; so many blocks were dropped.
    Damaged(BlockHash, Slot, u32),
}
