//! What can happen to a node: everything the drive loop waits for, in one queue.

use millrace_core::ids::{AttemptId, ReplicaId};
use millrace_core::message::Message;
use millrace_core::node::{Input, LinkNo};

use crate::link::Link;

/// Events that may wait for the drive loop; links stop reading when it is full.
pub(super) const EVENTS_MAX: usize = 4096;

/// Something happened.
pub(super) enum Event {
    /// On a link to a coordinator replica.
    Uplink(ReplicaId, LinkNo, LinkEvent),
    /// On a link to another node, whoever dialled.
    Peer(LinkNo, LinkEvent),
    /// A stream has written behind the gate of this attempt, or was refused there.
    Arrived(AttemptId),
    /// Anything else, as the machine wants to hear it.
    Node(Input),
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
