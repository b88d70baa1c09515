//! What can happen to a node: everything the drive loop waits for, in one queue.

use millrace_core::engine::{EngineError, Sampled};
use millrace_core::ids::{AttemptId, ReplicaId};
use millrace_core::message::Message;
use millrace_core::transfer::Span;

use crate::link::Link;

/// Events that may wait for the drive loop; links stop reading when it is full.
pub(super) const EVENTS_MAX: usize = 4096;

/// Tells two links to the same peer apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct LinkNo(pub(super) u64);

/// Something happened.
pub(super) enum Event {
    /// On a link to a coordinator replica.
    Uplink(ReplicaId, LinkNo, LinkEvent),
    /// On a link to another node, whoever dialled.
    Peer(LinkNo, LinkEvent),
    /// A node that was dialled cannot be reached.
    DialFailed {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// The step in flight has this layer's KV in its cells.
    Layer(u16),
    /// The step in flight is over.
    Stepped {
        /// Tokens drawn, or why there are none.
        result: Result<Vec<Sampled>, EngineError>,
        /// How long it took.
        elapsed_us: u64,
    },
    /// A span is in the transport's hands.
    SpanSent {
        /// Of which attempt.
        attempt: AttemptId,
        /// The span.
        span: Span,
        /// Wrapping sum of its digests.
        digest_sum: u64,
    },
    /// Nothing reads the cells of this span any more: acknowledged, reset or lost.
    SpanDrained {
        /// Of which attempt.
        attempt: AttemptId,
        /// Bytes of the span.
        bytes: u64,
        /// From the stream's opening to this moment.
        elapsed_us: u64,
        /// Why it did not arrive, if it did not.
        error: Option<String>,
    },
    /// The receiver of this attempt has something to say.
    Arrived(AttemptId),
}

/// What happens on a link.
pub(super) enum LinkEvent {
    /// It is there, greetings exchanged.
    Up(Link),
    /// The peer says something.
    Message(Box<Message>),
    /// It is gone, and why.
    Down(String),
}
