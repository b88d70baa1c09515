//! What happens in the world, as data. The text of an event (`Debug`) is the trace.

use std::fmt;

use millrace_core::cluster::NodeState;
use millrace_core::engine::Sampled;
use millrace_core::ids::{AttemptId, BlockHash, Epoch, Generation, NodeId, ReplicaId, SlotRef};
use millrace_core::message::{Hello, Message, Peer};
use millrace_core::transfer::Span;
use xxhash_rust::xxh3::xxh3_64;

use crate::quic::QuicEvent;
use crate::replica::{Asked, Outcome};

/// A place in the world, which outlives its processes. Replicas come first, then nodes.
pub type Host = usize;
/// Counts the processes that ran on a host.
pub type Life = u32;
/// Names a link; never used twice.
pub type LinkNo = u64;
/// Names a KV stream; never used twice.
pub type StreamNo = u64;
/// Counts clients' requests.
pub type Client = u64;

/// An event of the world.
#[derive(Debug)]
pub enum Event {
    /// Something for a node's drive loop, if that process still lives.
    Node(Host, Life, NodeEvent),
    /// The loop of a process wakes up.
    Turn(Host, Life),
    /// What a process wanted done is done: its disk was slow.
    Acts(Host, Life, Later),
    /// The engine of a node computes a layer of its step.
    Layer(Host, Life, u16),
    /// A control message at the end of its way.
    Arrives {
        /// The link.
        link: LinkNo,
        /// To the end that dialled it, or to the other.
        to_dialler: bool,
        /// What.
        message: Said,
    },
    /// An end of a link notices that it is gone.
    Notices {
        /// The link.
        link: LinkNo,
        /// The end that dialled it, or the other.
        dialler: bool,
    },
    /// A process tries to reach a replica, to which it keeps a link.
    Dial(Host, Life, Host),
    /// A node tries to reach another.
    DialPeer(Host, Life, Box<Peer>),
    /// A KV stream gets on.
    Stream(StreamNo, StreamEvent),
    /// Something happens to the network of a process.
    Quic(Host, Life, QuicEvent),
    /// A client sends a request.
    Client,
    /// Something about one request.
    Request(Client, RequestEvent),
    /// An operator asks a replica something.
    Operator,
    /// An operator does something to a cache.
    Order,
    /// Something goes wrong.
    Fault,
    /// There is room on the disk of a host again.
    Room(Host),
    /// An operator cordons, drains or readmits the node of a host.
    SetState(Host, NodeState),
    /// A process starts on a host that has none.
    Start(Host),
}

/// A message whose text is short.
pub struct Said(pub Box<Message>);

impl fmt::Debug for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            Message::Raft(frame) => write!(f, "Raft({} bytes, {:016x})", frame.len(), xxh3_64(frame)),
            message => message.fmt(f),
        }
    }
}

/// What is done later. Its text is that of what follows.
pub struct Later(pub Vec<Act>);

impl fmt::Debug for Later {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} acts", self.0.len())
    }
}

/// Something for a node's drive loop.
#[derive(Debug)]
pub enum NodeEvent {
    /// A link to a replica of the coordinator is up.
    UplinkUp(ReplicaId, LinkNo),
    /// A link to another node is up: its name and incarnation.
    PeerUp(LinkNo, String, Epoch),
    /// A link is gone.
    Down(LinkNo),
    /// A message on a link.
    Message(LinkNo, Box<Message>),
    /// A node cannot be reached.
    DialFailed(String),
    /// The KV of a layer stands in its cells.
    Layer(u16),
    /// The step in flight is over.
    Stepped(Result<Vec<Sampled>, String>),
    /// A span has been given to the transport.
    SpanSent(AttemptId, Span, u64),
    /// A span's cells are read no more.
    SpanDrained(AttemptId, LinkNo, Span, Option<&'static str>),
    /// The receiving machine of an attempt has something to say.
    Arrived(AttemptId),
    /// An operator stops the process.
    Stop,
}

/// Something for a replica.
#[derive(Debug)]
pub enum ReplicaEvent {
    /// A link to another replica is up.
    ReplicaUp(ReplicaId, LinkNo),
    /// A node's link is up, with its first words.
    NodeUp(LinkNo, Box<Hello>),
    /// A link is gone.
    Down(LinkNo),
    /// A message on a link.
    Message(LinkNo, Box<Message>),
    /// An operator's question and its number.
    Operator(u64, Asked),
    /// An operator cordons, drains or readmits a node.
    SetState(NodeId, NodeState),
}

/// How a KV stream gets on.
#[derive(Clone, Copy, Debug)]
pub enum StreamEvent {
    /// Its task begins: cells are lent and digested.
    Lend,
    /// The sender's transport has all of it.
    Sent,
    /// The sender gives it up.
    Stopped,
    /// Its header is at the receiver.
    Opens,
    /// Some of its cells are at the receiver.
    Piece,
    /// All of it is acknowledged.
    Drained,
}

/// Something about one request.
#[derive(Clone, Copy, Debug)]
pub enum RequestEvent {
    /// Look for a place.
    Place,
    /// The client is gone.
    ClientLeaves,
    /// Its time is used up.
    Deadline,
}

/// A KV stream that a node wants sent.
#[derive(Debug)]
pub struct SpanJob {
    /// For which attempt.
    pub attempt: AttemptId,
    /// Over which link.
    pub link: LinkNo,
    /// Which cells.
    pub span: Span,
    /// The reservation that they may be written to.
    pub generation: Generation,
    /// Layer, block, slot and name of each cell, in payload order.
    pub cells: Vec<(u16, u32, SlotRef, BlockHash)>,
    /// Tokens of the sequence: its last block may be unfinished.
    pub tokens: u32,
}

/// What a process wants done.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a few live at a time")]
pub enum Act {
    /// Say this on a link.
    Send(LinkNo, Message),
    /// Reach this node.
    Dial(Peer),
    /// Give a link up.
    Close(LinkNo),
    /// Send a span.
    Span(SpanJob),
    /// Give up the streams of an attempt that have not been sent.
    StopSpans(AttemptId),
    /// Compute the step that begins now.
    Step,
    /// The process is over.
    Exit,
    /// A node says something to the gateway of this replica.
    Gateway(NodeId, Message),
    /// The gateway of this replica looks after its requests.
    Look,
    /// What an operator gets.
    Operated(u64, Outcome),
}
