//! A link: one QUIC connection's control stream, both ways, after both ends have said `Hello` and agreed.
//!
//! Decides when a link must end: first words that do not fit, a message that the peer's role may not send, bytes that are no frame,
//! a peer that does not read, a [lane](crate::lane) that is lost. Each is counted and told to the peer. What messages mean is the caller's.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use millrace_core::message::{Hello, Message, Role};
use parking_lot::Mutex;
use quinn::{ConnectionError, RecvStream, SendStream};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::endpoint::{CloseCode, ConnectError, Connection, Endpoint, Target, explain};
use crate::frame::{FrameError, FrameReader, encode};
use crate::lane::{Arriving, Lane, LaneError, Lanes};
use crate::pki::{Leaf, PeerIdentity};

/// Messages that wait to be sent on one link; at more the peer is a slow reader and the link ends.
pub const LINK_QUEUE_MAX: usize = 1 << 16;
/// Bytes that wait to be sent on one link, likewise.
pub const LINK_QUEUE_BYTES_MAX: usize = 64 << 20;
/// Time for the first words, and for a refusal to arrive.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a link ended, for those who must decide what to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClosedKind {
    /// We closed it, on purpose.
    Local,
    /// The peer closed it, on purpose.
    Peer,
    /// The peer refused us: its reason names the field. Trying again does not help by itself.
    Refused,
    /// The peer fell silent or the network failed.
    Lost,
    /// One of us broke the protocol.
    Protocol,
    /// The reader was too slow.
    SlowReader,
}

/// A link has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("link closed ({kind:?}): {reason}")]
pub struct LinkClosed {
    /// Why, for decisions.
    pub kind: ClosedKind,
    /// Why, for the log.
    pub reason: String,
}

impl From<&ConnectionError> for LinkClosed {
    fn from(error: &ConnectionError) -> Self {
        let code = |code| move |close: &quinn::ApplicationClose| close.error_code.into_inner() == code as u64;
        let kind = match error {
            ConnectionError::ApplicationClosed(close) if code(CloseCode::Done)(close) => ClosedKind::Peer,
            ConnectionError::ApplicationClosed(close) if code(CloseCode::Refused)(close) => ClosedKind::Refused,
            ConnectionError::ApplicationClosed(close) if code(CloseCode::SlowReader)(close) => ClosedKind::SlowReader,
            ConnectionError::LocallyClosed => ClosedKind::Local,
            ConnectionError::TimedOut | ConnectionError::Reset => ClosedKind::Lost,
            _ => ClosedKind::Protocol,
        };
        Self { kind, reason: explain(error) }
    }
}

/// A link could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// We refuse the peer; the reason names the field.
    #[error("refusing {peer}: {reason}")]
    Refusing {
        /// Who.
        peer: PeerIdentity,
        /// Why.
        reason: String,
    },
    /// The peer refuses us; the reason names the field.
    #[error("refused by {peer}: {reason}")]
    Refused {
        /// By whom.
        peer: PeerIdentity,
        /// Why.
        reason: String,
    },
    /// The connection ended before the first words were exchanged.
    #[error("{peer}: {closed}")]
    Closed {
        /// With whom.
        peer: PeerIdentity,
        /// How.
        closed: LinkClosed,
    },
    /// The peer can be reached, but not where it takes KV.
    #[error("{peer}: {source}")]
    Lanes {
        /// With whom.
        peer: PeerIdentity,
        /// Where, and why not.
        source: LaneError,
    },
}

/// Whether two processes may talk: same cluster, the name of the certificate, and no field in which their models differ
/// when both serve one. The error names the field.
///
/// # Errors
/// The reason, for the peer and the log.
pub fn judge(ours: &Hello, theirs: &Hello, peer: &PeerIdentity) -> Result<(), String> {
    if theirs.cluster != ours.cluster {
        return Err(format!("cluster: yours is {:?}, ours is {:?}", theirs.cluster, ours.cluster));
    }
    if theirs.name != peer.name {
        return Err(format!("name: you say {:?}, your certificate says {:?}", theirs.name, peer.name));
    }
    let (Some(our_model), Some(their_model)) = (&ours.model, &theirs.model) else { return Ok(()) };
    match our_model.differs(their_model) {
        Some(field) => Err(format!("model: {field} differs (yours is {:?}, ours is {:?})", their_model.name, our_model.name)),
        None => Ok(()),
    }
}

#[derive(Default)]
struct Queue {
    frames: Vec<Bytes>,
    /// Messages and bytes not yet taken by QUIC: those in `frames` and those that the writer holds.
    messages: usize,
    bytes: usize,
    /// Send what waits, take no more, then close for this reason.
    draining: Option<String>,
}

struct Inner {
    connection: Connection,
    hello: Hello,
    lanes: Arc<Lanes>,
    queue: Mutex<Queue>,
    wake: Notify,
    closed: OnceLock<LinkClosed>,
}

/// The sending half, and the link's state. Clones share it.
#[derive(Clone)]
pub struct Link(Arc<Inner>);

/// The receiving half. Dropping it closes the link: a link that nobody reads is of no use.
pub struct LinkReceiver {
    frames: FrameReader,
    link: Link,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({})", self.0.connection.peer)
    }
}

impl fmt::Debug for LinkReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LinkReceiver({})", self.link.peer())
    }
}

impl Link {
    /// Connects to `target` and agrees on a link with it; between nodes, with its lanes.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn dial(endpoint: &Endpoint, target: &Target, hello: &Hello) -> Result<(Self, LinkReceiver), LinkError> {
        let connection = endpoint.connect(target).await?;
        let greet = async {
            let (mut send, recv) = connection.quic.open_bi().await.map_err(|e| lost(&connection, &e))?;
            say(&connection, &mut send, &Message::Hello(hello.clone())).await?;
            let (frames, theirs) = hear(&connection, recv).await?;
            agree(&connection, hello, &theirs, &mut send).await?;
            Ok((send, frames, theirs))
        };
        let done = timeout(HELLO_TIMEOUT, greet).await;
        let lanes = Lanes::of(&connection, true);
        let (link, mut receiver) = Self::start(connection, lanes, done)?;
        if link.0.lanes.carry() && matches!(link.peer().role, Role::Prefill | Role::Decode) {
            receiver.open_lanes().await.inspect_err(|error| link.close(&error.to_string()))?;
        }
        Ok((link, receiver))
    }

    /// Agrees on a link with a peer that dialed us.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn accept(connection: Connection, hello: &Hello) -> Result<(Self, LinkReceiver), LinkError> {
        let greet = async {
            let (mut send, recv) = connection.quic.accept_bi().await.map_err(|e| lost(&connection, &e))?;
            let (frames, theirs) = hear(&connection, recv).await?;
            agree(&connection, hello, &theirs, &mut send).await?;
            say(&connection, &mut send, &Message::Hello(hello.clone())).await?;
            Ok((send, frames, theirs))
        };
        let done = timeout(HELLO_TIMEOUT, greet).await;
        let lanes = Lanes::of(&connection, false);
        let (link, receiver) = Self::start(connection, lanes, done)?;
        // One that cannot be told of lanes is ending, and says so itself.
        let _ = link.0.lanes.offer().map(|port| link.send(&Message::Lanes { port }));
        Ok((link, receiver))
    }

    fn start(
        connection: Connection,
        lanes: Arc<Lanes>,
        done: Result<Result<(SendStream, FrameReader, Hello), LinkError>, tokio::time::error::Elapsed>,
    ) -> Result<(Self, LinkReceiver), LinkError> {
        let failed = match done {
            Ok(Ok((send, frames, hello))) => {
                let (queue, wake, closed) = (Mutex::default(), Notify::new(), OnceLock::new());
                let link = Self(Arc::new(Inner { connection, hello, lanes, queue, wake, closed }));
                tokio::spawn(write_loop(link.clone(), send));
                tokio::spawn(end_together(link.clone()));
                return Ok((link.clone(), LinkReceiver { frames, link }));
            }
            Ok(Err(error)) => error,
            Err(_) => protocol(&connection, "no Hello in time"),
        };
        connection.counters.refused.fetch_add(1, Relaxed);
        // Where the reason was told already, this changes nothing.
        connection.close(CloseCode::Refused, &failed.to_string());
        Err(failed)
    }

    /// Queues a message; never waits. A message that breaks the protocol's bounds, or a queue that is full, ends the link.
    ///
    /// # Errors
    /// [`LinkClosed`] when the link has ended, or ends by this.
    pub fn send(&self, message: &Message) -> Result<(), LinkClosed> {
        if let Some(closed) = self.is_closed() {
            return Err(closed);
        }
        let frame = match encode(message) {
            Ok(frame) => frame,
            Err(e) => return Err(self.end(ClosedKind::Protocol, CloseCode::BadFrame, None, format!("cannot send: {e}"))),
        };
        let mut queue = self.0.queue.lock();
        if let Some(reason) = &queue.draining {
            return Err(LinkClosed { kind: ClosedKind::Local, reason: reason.clone() });
        }
        queue.messages += 1;
        queue.bytes += frame.len();
        if queue.messages > LINK_QUEUE_MAX || queue.bytes > LINK_QUEUE_BYTES_MAX {
            let reason = format!("slow reader: {} messages, {} bytes wait", queue.messages, queue.bytes);
            drop(queue);
            let counter = &self.0.connection.counters.slow_readers;
            return Err(self.end(ClosedKind::SlowReader, CloseCode::SlowReader, Some(counter), reason));
        }
        queue.frames.push(frame);
        drop(queue);
        self.0.wake.notify_one();
        Ok(())
    }

    /// Who is at the other end, by its certificate.
    #[must_use]
    pub fn peer(&self) -> &PeerIdentity {
        &self.0.connection.peer
    }

    /// The certificate that the peer showed.
    #[must_use]
    pub fn leaf(&self) -> Option<Leaf> {
        self.0.connection.leaf()
    }

    /// What the peer said first.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.0.hello
    }

    /// The QUIC connection under its messages, for figures.
    #[must_use]
    pub fn quic(&self) -> &quinn::Connection {
        &self.0.connection.quic
    }

    /// Why it has ended, if it has.
    #[must_use]
    pub fn is_closed(&self) -> Option<LinkClosed> {
        self.quic().close_reason().map(|error| self.reason(&error))
    }

    /// Acknowledgements that have come from the peer: while it grows, the peer hears us.
    #[must_use]
    pub fn acknowledgements(&self) -> u64 {
        self.quic().stats().frame_rx.acks
    }

    /// Waits for the end and says why.
    pub async fn closed(&self) -> LinkClosed {
        let error = self.quic().closed().await;
        self.reason(&error)
    }

    /// Closes it now; what waits to be sent is lost.
    pub fn close(&self, reason: &str) {
        self.end(ClosedKind::Local, CloseCode::Done, None, reason.to_owned());
    }

    /// Takes no more messages, sends those that wait, then closes; gives up after `patience`.
    pub async fn drain(&self, patience: Duration, reason: &str) {
        self.0.queue.lock().draining = Some(reason.to_owned());
        self.0.wake.notify_one();
        let _ = timeout(patience, self.closed()).await;
        self.close(reason);
    }

    /// A connection beside the link for [`crate::cells::send_cells`], of those that there are by turns. `None` when the link has ended, when
    /// the peer dialed it, and when the two are not both nodes. Drop it before waiting for the cells to come back.
    #[must_use]
    pub fn lane(&self) -> Option<Lane> {
        self.0.lanes.lane()
    }

    /// The next KV stream of the peer, to be read by a [`crate::cells::CellsReader`] in its own task; `None` when the link has ended.
    /// Cancel-safe.
    pub async fn accept_cells(&self) -> Option<Arriving> {
        self.0.lanes.stream().await
    }

    /// The reason given by whoever closed first on this side, else what QUIC says.
    fn reason(&self, error: &ConnectionError) -> LinkClosed {
        let closed = self.0.closed.get_or_init(|| {
            let closed = LinkClosed::from(error);
            if closed.kind == ClosedKind::Lost {
                self.0.connection.counters.lost.fetch_add(1, Relaxed);
            }
            closed
        });
        closed.clone()
    }

    /// Ends the link for a reason of ours; the first reason stands.
    fn end(&self, kind: ClosedKind, code: CloseCode, counter: Option<&AtomicU64>, reason: String) -> LinkClosed {
        if let Some(error) = self.quic().close_reason() {
            return self.reason(&error);
        }
        let closed = self.0.closed.get_or_init(|| {
            counter.map(|c| c.fetch_add(1, Relaxed));
            LinkClosed { kind, reason }
        });
        self.0.connection.close(code, &closed.reason);
        tracing::debug!(peer = %self.peer(), kind = ?closed.kind, reason = closed.reason, "link closed");
        closed.clone()
    }
}

impl LinkReceiver {
    /// The link of which this is the receiving half.
    #[must_use]
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Opens the lanes of a link that we dialed, where the peer says.
    async fn open_lanes(&mut self) -> Result<(), LinkError> {
        let peer = self.link.peer().clone();
        let port = match timeout(HELLO_TIMEOUT, self.recv()).await {
            Ok(Some(Message::Lanes { port })) => port,
            Ok(None) => return Err(LinkError::Closed { peer, closed: self.link.closed().await }),
            Ok(Some(_)) | Err(_) => return Err(protocol(&self.link.0.connection, "it does not say where it takes KV")),
        };
        self.link.0.lanes.dial(port).await.map_err(|source| LinkError::Lanes { peer, source })
    }

    /// The next message; `None` when the link has ended ([`Link::closed`] says why). What the peer's role may not send,
    /// a second `Hello`, and bytes that are no frame end it. Cancel-safe.
    pub async fn recv(&mut self) -> Option<Message> {
        let role = self.link.peer().role;
        let counters = &self.link.0.connection.counters;
        match self.frames.next().await {
            Ok(Some(Message::Refuse(reason))) => {
                self.link.end(ClosedKind::Refused, CloseCode::Done, Some(&counters.refused), reason);
            }
            Ok(Some(message)) if message.may_send(role) && !matches!(message, Message::Hello(_)) => return Some(message),
            Ok(Some(message)) => {
                let reason = format!("{} may not send {}", self.link.peer(), message_name(&message));
                self.link.end(ClosedKind::Protocol, CloseCode::Violation, Some(&counters.violations), reason);
            }
            Ok(None) => {
                self.link.end(ClosedKind::Peer, CloseCode::Done, None, "the peer has finished".into());
            }
            Err(FrameError::Read(quinn::ReadError::ConnectionLost(_))) => {}
            Err(error) => {
                self.link.end(ClosedKind::Protocol, CloseCode::BadFrame, Some(&counters.bad_frames), error.to_string());
            }
        }
        None
    }
}

impl Drop for LinkReceiver {
    fn drop(&mut self) {
        self.link.close("nobody reads this link any more");
    }
}

/// A link and its lanes end together.
async fn end_together(link: Link) {
    tokio::select! {
        reason = link.0.lanes.lost() => {
            let counter = &link.0.connection.counters.lost;
            link.end(ClosedKind::Lost, CloseCode::Done, Some(counter), format!("a connection for KV is lost: {reason}"));
        }
        _ = link.closed() => {}
    }
    link.0.lanes.end();
}

/// Sends what waits, all of it in one write, until the link ends.
async fn write_loop(link: Link, mut stream: SendStream) {
    let reason = loop {
        let (mut batch, draining) = {
            let mut queue = link.0.queue.lock();
            (std::mem::take(&mut queue.frames), queue.draining.clone())
        };
        if let (true, Some(reason)) = (batch.is_empty(), draining) {
            break reason;
        }
        if batch.is_empty() {
            tokio::select! {
                () = link.0.wake.notified() => continue,
                _ = link.closed() => return,
            }
        }
        let (messages, bytes) = (batch.len(), batch.iter().map(Bytes::len).sum::<usize>());
        if let Err(error) = stream.write_all_chunks(&mut batch).await {
            link.end(ClosedKind::Protocol, CloseCode::Done, None, format!("writing: {error}"));
            return;
        }
        let mut queue = link.0.queue.lock();
        queue.messages -= messages;
        queue.bytes -= bytes;
    };
    let _ = stream.finish();
    let _ = stream.stopped().await;
    link.close(&reason);
}

async fn say(connection: &Connection, stream: &mut SendStream, message: &Message) -> Result<(), LinkError> {
    let frame = encode(message).map_err(|e| protocol(connection, &e.to_string()))?;
    stream.write_chunk(frame).await.map_err(|e| match e {
        quinn::WriteError::ConnectionLost(error) => lost(connection, &error),
        other => protocol(connection, &other.to_string()),
    })
}

/// The peer's first words.
async fn hear(connection: &Connection, stream: RecvStream) -> Result<(FrameReader, Hello), LinkError> {
    let peer = connection.peer.clone();
    let mut frames = FrameReader::new(stream);
    match frames.next().await {
        Ok(Some(Message::Hello(hello))) => Ok((frames, hello)),
        Ok(Some(Message::Refuse(reason))) => Err(LinkError::Refused { peer, reason }),
        Ok(Some(other)) => Err(protocol(connection, &format!("{} before Hello", message_name(&other)))),
        Ok(None) => Err(protocol(connection, "no Hello")),
        Err(FrameError::Read(quinn::ReadError::ConnectionLost(error))) => Err(lost(connection, &error)),
        Err(error) => {
            connection.counters.bad_frames.fetch_add(1, Relaxed);
            Err(protocol(connection, &error.to_string()))
        }
    }
}

/// Judges the peer's first words; when they do not fit, says so and waits until that has arrived.
async fn agree(connection: &Connection, ours: &Hello, theirs: &Hello, stream: &mut SendStream) -> Result<(), LinkError> {
    let Err(reason) = judge(ours, theirs, &connection.peer) else { return Ok(()) };
    if say(connection, stream, &Message::Refuse(reason.clone())).await.is_ok() {
        let _ = stream.finish();
        let _ = timeout(Duration::from_secs(1), stream.stopped()).await;
    }
    connection.close(CloseCode::Refused, &reason);
    Err(LinkError::Refusing { peer: connection.peer.clone(), reason })
}

fn lost(connection: &Connection, error: &ConnectionError) -> LinkError {
    LinkError::Closed { peer: connection.peer.clone(), closed: error.into() }
}

fn protocol(connection: &Connection, reason: &str) -> LinkError {
    let closed = LinkClosed { kind: ClosedKind::Protocol, reason: reason.to_owned() };
    LinkError::Closed { peer: connection.peer.clone(), closed }
}

/// The variant's name, by stopping its `Debug` text at the first sign that is not a letter: a message may be megabytes long.
fn message_name(message: &Message) -> String {
    struct FirstWord(String);
    impl Write for FirstWord {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            let word = text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
            self.0.push_str(word);
            if word.len() == text.len() { Ok(()) } else { Err(fmt::Error) }
        }
    }
    let mut word = FirstWord(String::new());
    let _ = write!(word, "{message:?}");
    word.0
}
