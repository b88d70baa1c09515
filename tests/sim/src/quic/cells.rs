//! KV spans on streams of their own: a header, then the cells, under QUIC's flow control. The receiver checks each cell as it comes.

use bytes::Bytes;
use millrace_core::message::CellsHeader;
use millrace_core::transfer::Span;
use quinn_proto::{Dir, StreamId, WriteError};
use rkyv::rancor;

use super::CODE;
use super::link::{frame, take_frame};
use crate::event::{Host, LinkNo, StreamNo};
use crate::node::Cell;
use crate::world::World;

/// A span that is being written.
pub(super) struct Outgoing {
    pub stream: StreamNo,
    rest: Bytes,
    finished: bool,
}

/// A span that is being read.
#[derive(Default)]
pub(super) struct Incoming {
    input: Vec<u8>,
    /// The header, and the place of each cell that has not come.
    header: Option<(CellsHeader, Vec<(u16, u32)>)>,
    cells: usize,
}

impl World {
    /// Cells are lent: their span goes as soon as there is a stream for it.
    pub(crate) fn quic_cells(&mut self, link: LinkNo, stream: StreamNo) {
        let Some(&(host, no)) = self.quic().links.get(&link) else {
            return self.end_stream(stream, Some("the connection is lost"));
        };
        if let Some(conn) = self.quic().conn(host, no) {
            conn.waiting.push_back(stream);
            self.quic_cells_begin(host, no);
            self.quic_drive(host, no);
        }
    }

    /// Opens streams for spans that wait.
    pub(super) fn quic_cells_begin(&mut self, host: Host, no: usize) {
        loop {
            let Some(conn) = self.quic().conn(host, no).filter(|conn| !conn.waiting.is_empty()) else { return };
            let Some(id) = conn.quic.streams().open(Dir::Uni) else { return };
            let Some(stream) = conn.waiting.pop_front() else { return };
            let rest = self.payload(stream);
            if let Some(conn) = self.quic().conn(host, no) {
                conn.sending.insert(id, Outgoing { stream, rest, finished: false });
            }
            self.quic_cells_go(host, no, id);
        }
    }

    fn payload(&self, no: StreamNo) -> Bytes {
        let Some(stream) = self.streams.get(&no) else { return Bytes::new() };
        let (job, cells) = (stream.job(), stream.cells());
        let Span { layer, layers, block, blocks } = job.span;
        let digests = cells.iter().map(|cell| cell.digest).collect();
        let header = CellsHeader { attempt: job.attempt, generation: job.generation, layer, layers, block, blocks, digests };
        let archive = rkyv::to_bytes::<rancor::Error>(&header).expect("writing to memory below 2 GiB cannot fail");
        let mut payload = frame(&archive).to_vec();
        payload.extend(cells.iter().flat_map(|cell| &cell.words).flat_map(|word| word.to_le_bytes()));
        payload.into()
    }

    /// Writes as much of a span as QUIC takes.
    pub(super) fn quic_cells_go(&mut self, host: Host, no: usize, id: StreamId) {
        let Some(conn) = self.quic().conn(host, no) else { return };
        let Some(mut outgoing) = conn.sending.remove(&id) else { return };
        let written = if outgoing.finished { Ok(false) } else { conn.write(id, &mut outgoing.rest) };
        let stream = outgoing.stream;
        match written {
            Ok(whole) => {
                if whole {
                    // Stopped meanwhile: that comes as an event of its own.
                    let _ = conn.quic.send_stream(id).finish();
                    outgoing.finished = true;
                }
                conn.sending.insert(id, outgoing);
                if whole {
                    self.sent(stream);
                }
            }
            Err(WriteError::Stopped(_)) => self.end_stream(stream, Some("the receiver refused the stream")),
            Err(_) => self.end_stream(stream, Some("the stream is closed")),
        }
    }

    /// QUIC has nothing more to do for a span.
    pub(super) fn quic_cells_gone(&mut self, host: Host, no: usize, id: StreamId, error: Option<&'static str>) {
        let outgoing = self.quic().conn(host, no).and_then(|conn| conn.sending.remove(&id));
        if let Some(outgoing) = outgoing {
            self.end_stream(outgoing.stream, error.filter(|_| !outgoing.finished));
        }
    }

    /// A sender gives a span up that is not sent yet.
    pub(crate) fn quic_cells_stop(&mut self, link: LinkNo, stream: StreamNo) {
        let Some(&(host, no)) = self.quic().links.get(&link) else { return };
        let Some(conn) = self.quic().conn(host, no) else { return };
        conn.waiting.retain(|waiting| *waiting != stream);
        let id = conn.sending.iter().find(|(_, outgoing)| outgoing.stream == stream).map(|(id, _)| *id);
        if let Some(id) = id {
            conn.sending.remove(&id);
            let _ = conn.quic.send_stream(id).reset(CODE);
        }
        self.end_stream(stream, Some("the hand-over is over"));
        self.quic_drive(host, no);
    }

    /// A peer opens streams.
    pub(super) fn quic_cells_open(&mut self, host: Host, no: usize) {
        while let Some(id) = self.quic().conn(host, no).and_then(|conn| conn.quic.streams().accept(Dir::Uni)) {
            if let Some(conn) = self.quic().conn(host, no) {
                conn.receiving.insert(id, Incoming::default());
            }
            self.quic_cells_come(host, no, id);
        }
    }

    /// Bytes of a span have come.
    pub(super) fn quic_cells_come(&mut self, host: Host, no: usize, id: StreamId) {
        let Some(conn) = self.quic().conn(host, no) else { return };
        let Some(mut incoming) = conn.receiving.remove(&id) else { return };
        let link = conn.link;
        let (bytes, ended) = conn.read(id);
        incoming.input.extend_from_slice(&bytes);
        let welcome = self.take_cells(host, link, &mut incoming);
        let Some(conn) = self.quic().conn(host, no) else { return };
        match welcome {
            true if !ended => drop(conn.receiving.insert(id, incoming)),
            true => {}
            false => drop(conn.quic.recv_stream(id).stop(CODE)),
        }
    }

    /// Hands whole cells to the node; false when it wants no more of them.
    fn take_cells(&mut self, host: Host, link: LinkNo, incoming: &mut Incoming) -> bool {
        let life = self.hosts[host].life;
        if incoming.header.is_none() {
            let Some(archive) = take_frame(&mut incoming.input) else { return true };
            let header = rkyv::from_bytes::<CellsHeader, rancor::Error>(&archive).expect("what a peer wrote can be read");
            let CellsHeader { layer, layers, block, blocks, .. } = header;
            let span = Span { layer, layers, block, blocks };
            let admitted =
                self.node(host, life).is_some_and(|node| node.stream_opens(link, header.attempt, header.generation, &span));
            self.wake(host, 0);
            if !admitted {
                return false;
            }
            incoming.header = Some((header, span.iter().collect()));
        }
        let Some((header, places)) = &incoming.header else { return true };
        let (attempt, generation) = (header.attempt, header.generation);
        let cell_bytes = usize::from(self.plan.model.layout.block_tokens) * 8;
        while incoming.cells < places.len() && incoming.input.len() >= cell_bytes {
            let raw: Vec<u8> = incoming.input.drain(..cell_bytes).collect();
            let mut words: Vec<u64> =
                raw.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default())).collect();
            let damaged = self.random.chance(self.plan.faults.damaged);
            if damaged {
                words[0] ^= 1 << 7;
                self.gateway.damaged.insert(attempt);
            }
            let (layer, block) = places[incoming.cells];
            let cell = Cell { layer, block, words, digest: header.digests[incoming.cells] };
            incoming.cells += 1;
            let node = self.node(host, life);
            let taken = node.is_some_and(|node| {
                let taken = node.cell_arrives(attempt, generation, &cell);
                assert!(!damaged || !taken || !node.is_receiving(attempt), "I2: {attempt}: a damaged cell counts as arrived");
                taken
            });
            self.wake(host, 0);
            if !taken {
                return false;
            }
        }
        true
    }
}
