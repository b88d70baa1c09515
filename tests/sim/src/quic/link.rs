//! A connection as a link: first words both ways, then control messages in order on one stream. As `millrace-node` keeps it.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use millrace_core::ids::Time;
use millrace_core::message::{Hello, Message};
use quinn_proto::{Connection, Dir, Event as Told, ReadError, StreamEvent, StreamId, WriteError};
use rkyv::rancor;
use rkyv::util::AlignedVec;

use super::CODE;
use super::cells::{Incoming, Outgoing};
use crate::event::{Event, Host, Life, LinkNo, NodeEvent, Said, StreamNo};
use crate::plan::REPLICAS;
use crate::world::World;

/// Bytes before a frame's archive: its length.
const HEAD_BYTES: usize = 4;
/// Control goes before any KV stream of the same connection.
const CONTROL_PRIORITY: i32 = i32::MAX;

/// One end of a connection.
pub struct Conn {
    pub(super) link: LinkNo,
    /// Whom this end dialled.
    dialled: Option<Host>,
    pub(super) quic: Connection,
    pub(super) timer: Option<Time>,
    control: Option<StreamId>,
    out: VecDeque<Bytes>,
    input: Vec<u8>,
    /// Whose first words have come.
    greeted: Option<Host>,
    over: bool,
    /// KV spans that wait for a stream, and those that have one.
    pub(super) waiting: VecDeque<StreamNo>,
    pub(super) sending: BTreeMap<StreamId, Outgoing>,
    pub(super) receiving: BTreeMap<StreamId, Incoming>,
}

/// A value as a frame.
pub(super) fn frame(archive: &[u8]) -> Bytes {
    [&(archive.len() as u32).to_le_bytes()[..], archive].concat().into()
}

/// The first whole frame of some bytes, taken off them; its archive is aligned.
pub(super) fn take_frame(input: &mut Vec<u8>) -> Option<AlignedVec<16>> {
    let len = u32::from_le_bytes(input.get(..HEAD_BYTES)?.try_into().ok()?) as usize;
    let archive = input.get(HEAD_BYTES..HEAD_BYTES + len)?;
    let mut aligned = AlignedVec::with_capacity(len);
    aligned.extend_from_slice(archive);
    input.drain(..HEAD_BYTES + len);
    Some(aligned)
}

impl Conn {
    pub(super) fn new(link: LinkNo, dialled: Option<Host>, quic: Connection) -> Self {
        Self {
            link,
            dialled,
            quic,
            timer: None,
            control: None,
            out: VecDeque::new(),
            input: Vec::new(),
            greeted: None,
            over: false,
            waiting: VecDeque::new(),
            sending: BTreeMap::new(),
            receiving: BTreeMap::new(),
        }
    }

    fn say(&mut self, message: &Message) {
        let archive = rkyv::to_bytes::<rancor::Error>(message).expect("writing to memory below 2 GiB cannot fail");
        self.out.push_back(frame(&archive));
        self.write_control();
    }

    /// Gives QUIC as much as it takes.
    fn write_control(&mut self) {
        let Some(id) = self.control else { return };
        let mut stream = self.quic.send_stream(id);
        while let Some(bytes) = self.out.front_mut() {
            match stream.write(bytes) {
                Ok(written) if written == bytes.len() => drop(self.out.pop_front()),
                Ok(written) => drop(bytes.split_to(written)),
                // It goes on when QUIC says so, or the connection ends.
                Err(_) => return,
            }
        }
    }

    /// All that has come on a stream so far.
    pub(super) fn read(&mut self, id: StreamId) -> (Vec<u8>, bool) {
        let (mut bytes, mut ended) = (Vec::new(), false);
        let mut stream = self.quic.recv_stream(id);
        let Ok(mut chunks) = stream.read(true) else { return (bytes, true) };
        loop {
            match chunks.next(usize::MAX) {
                Ok(Some(chunk)) => bytes.extend_from_slice(&chunk.bytes),
                Ok(None) | Err(ReadError::Reset(_)) => {
                    ended = true;
                    break;
                }
                Err(ReadError::Blocked) => break,
            }
        }
        // The connection is driven after every event, which sends the credit too.
        let _ = chunks.finalize();
        (bytes, ended)
    }

    pub(super) fn write(&mut self, id: StreamId, bytes: &mut Bytes) -> Result<bool, WriteError> {
        while !bytes.is_empty() {
            match self.quic.send_stream(id).write(bytes) {
                Ok(written) => drop(bytes.split_to(written)),
                Err(WriteError::Blocked) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

impl World {
    /// Puts a message on a link, if it is there.
    pub(crate) fn quic_say(&mut self, link: LinkNo, message: &Message) {
        let Some(&(host, no)) = self.quic().links.get(&link) else { return };
        if let Some(conn) = self.quic().conn(host, no).filter(|conn| !conn.over) {
            conn.say(message);
            self.quic_drive(host, no);
        }
    }

    /// A process gives a link up.
    pub(crate) fn quic_close(&mut self, link: LinkNo) {
        let Some(&(host, no)) = self.quic().links.get(&link) else { return };
        let now = self.instant(host);
        if let Some(conn) = self.quic().conn(host, no) {
            conn.quic.close(now, CODE, Bytes::new());
            self.quic_over(host, no);
            self.quic_drive(host, no);
        }
    }

    /// A connection has something to tell.
    pub(super) fn quic_told(&mut self, host: Host, no: usize, event: Told) {
        match event {
            Told::Connected => self.quic_connected(host, no),
            Told::ConnectionLost { .. } => self.quic_over(host, no),
            Told::Stream(StreamEvent::Opened { dir: Dir::Bi }) => {
                let Some(conn) = self.quic().conn(host, no) else { return };
                if let Some(id) = conn.quic.streams().accept(Dir::Bi) {
                    conn.control = Some(id);
                    self.quic_heard(host, no);
                }
            }
            Told::Stream(StreamEvent::Opened { dir: Dir::Uni }) => self.quic_cells_open(host, no),
            Told::Stream(StreamEvent::Readable { id }) if id.dir() == Dir::Bi => self.quic_heard(host, no),
            Told::Stream(StreamEvent::Readable { id }) => self.quic_cells_come(host, no, id),
            Told::Stream(StreamEvent::Writable { id }) if id.dir() == Dir::Bi => {
                self.quic().conn(host, no).into_iter().for_each(Conn::write_control);
            }
            Told::Stream(StreamEvent::Writable { id }) => self.quic_cells_go(host, no, id),
            Told::Stream(StreamEvent::Available { dir: Dir::Uni }) => self.quic_cells_begin(host, no),
            Told::Stream(StreamEvent::Finished { id }) => self.quic_cells_gone(host, no, id, None),
            Told::Stream(StreamEvent::Stopped { id, .. }) => {
                self.quic_cells_gone(host, no, id, Some("the receiver refused the stream"));
            }
            Told::Stream(StreamEvent::Available { .. }) | Told::HandshakeDataReady => {}
            Told::DatagramReceived | Told::DatagramsUnblocked => {}
        }
    }

    /// The dialler opens the control stream and speaks first.
    fn quic_connected(&mut self, host: Host, no: usize) {
        let hello = self.hosts[host].hello(&self.plan.model);
        let Some(conn) = self.quic().conn(host, no).filter(|conn| conn.dialled.is_some()) else { return };
        let id = conn.quic.streams().open(Dir::Bi).expect("the peer allows one two-way stream");
        let _ = conn.quic.send_stream(id).set_priority(CONTROL_PRIORITY);
        conn.control = Some(id);
        conn.say(&Message::Hello(hello));
    }

    /// Bytes have come on the control stream.
    fn quic_heard(&mut self, host: Host, no: usize) {
        let Some(conn) = self.quic().conn(host, no) else { return };
        let Some(id) = conn.control else { return };
        let (bytes, _) = conn.read(id);
        conn.input.extend_from_slice(&bytes);
        while let Some(archive) = self.quic().conn(host, no).and_then(|conn| take_frame(&mut conn.input)) {
            let message = rkyv::from_bytes::<Message, rancor::Error>(&archive).expect("what a peer wrote can be read");
            self.quic_message(host, no, message);
        }
    }

    fn quic_message(&mut self, host: Host, no: usize, message: Message) {
        let end = (host, self.hosts[host].life);
        let Some(conn) = self.quic().conn(host, no) else { return };
        let (link, first) = (conn.link, conn.greeted.is_none());
        match message {
            Message::Hello(hello) if first => self.quic_greeted(end, no, hello),
            message => {
                let said = Said(Box::new(message));
                self.note(&(link, &said));
                self.end_message(end, link, said.0);
            }
        }
    }

    fn quic_greeted(&mut self, (host, life): (Host, Life), no: usize, theirs: Hello) {
        let ours = self.hosts[host].hello(&self.plan.model);
        let peer = self.host_named(&theirs.name);
        let Some(conn) = self.quic().conn(host, no) else { return };
        conn.greeted = Some(peer);
        let link = conn.link;
        if conn.dialled.is_none() {
            conn.say(&Message::Hello(ours));
        }
        self.end_up((host, life), link, theirs);
    }

    /// A connection is over for this end: whoever waits for it learns that.
    fn quic_over(&mut self, host: Host, no: usize) {
        let life = self.hosts[host].life;
        let Some(conn) = self.quic().conn(host, no).filter(|conn| !conn.over) else { return };
        conn.over = true;
        let (link, dialled, greeted) = (conn.link, conn.dialled, conn.greeted.is_some());
        conn.receiving.clear();
        let waiting = std::mem::take(&mut conn.waiting);
        let sending = std::mem::take(&mut conn.sending);
        self.quic().links.remove(&link);
        for stream in waiting.into_iter().chain(sending.into_values().map(|outgoing| outgoing.stream)) {
            self.end_stream(stream, Some("the connection is lost"));
        }
        if greeted {
            self.end_down((host, life), link);
        }
        match dialled {
            Some(to) if to < REPLICAS => self.dial_again(host, life, to),
            Some(to) if !greeted => {
                let name = self.hosts[to].name.clone();
                self.schedule(0, Event::Node(host, life, NodeEvent::DialFailed(name)));
            }
            _ => {}
        }
    }
}
