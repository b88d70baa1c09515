//! KV streams: one frame with a [`CellsHeader`], then cells, raw, to the end of a unidirectional stream.
//!
//! The sender hands over reference-counted buffers: no copy until packets are made. The receiver gives out each cell as the
//! pieces it came in, to be copied once, straight to its place. Digests travel in the header and are compared by the caller, who
//! knows the block's name; places, generations and credit are `millrace-core`'s.

use std::collections::VecDeque;

use bytes::Bytes;
use millrace_core::message::{CellsHeader, STREAM_CELLS_MAX};
use quinn::{RecvStream, SendStream, VarInt};

use crate::frame::{Assembler, FrameError, FrameKind, encode_cells_header};

/// Cells given to QUIC at a time: each is held (and its lock with it) until the peer has acknowledged it.
const BATCH_CELLS: usize = 64;
/// Bytes given to QUIC at a time, unless one cell is larger.
const BATCH_BYTES: usize = 1 << 20;
/// Pieces taken from QUIC at a time.
const BATCH_PIECES: usize = 32;
/// Code of a stream that its sender gave up.
const RESET: VarInt = VarInt::from_u32(1);

/// A KV stream failed.
#[derive(Debug, thiserror::Error)]
pub enum CellsError {
    /// The header is no frame.
    #[error("header: {0}")]
    Frame(#[from] FrameError),
    /// Layers times blocks is nothing, too much, or beyond the numbers' range.
    #[error("{layers} layers x {blocks} blocks: 1 to {STREAM_CELLS_MAX} cells")]
    Shape {
        /// As the header says.
        layers: u16,
        /// As the header says.
        blocks: u32,
    },
    /// Not one digest for each cell.
    #[error("{got} digests for {want} cells")]
    Digests {
        /// Digests.
        got: usize,
        /// Cells.
        want: usize,
    },
    /// The payload has another number of cells than the header says.
    #[error("{got} cells, the header says {want}")]
    Count {
        /// Cells seen.
        got: usize,
        /// Cells promised.
        want: usize,
    },
    /// Bytes follow the last cell.
    #[error("bytes after the last cell")]
    Trailing,
    /// The stream or its connection failed while reading.
    #[error("reading: {0}")]
    Read(#[from] quinn::ReadError),
    /// The stream or its connection failed while writing; `Stopped` when the receiver gave up.
    #[error("writing: {0}")]
    Write(#[from] quinn::WriteError),
    /// The connection failed before there was a stream.
    #[error("opening a stream: {0}")]
    Open(#[from] quinn::ConnectionError),
}

/// Cells that a header announces, once its numbers make sense.
fn checked_count(header: &CellsHeader) -> Result<usize, CellsError> {
    let (layers, blocks) = (header.layers, header.blocks);
    let count = u64::from(layers) * u64::from(blocks);
    let fits = header.layer.checked_add(layers).is_some() && header.block.checked_add(blocks).is_some();
    if count == 0 || count > STREAM_CELLS_MAX as u64 || !fits {
        return Err(CellsError::Shape { layers, blocks });
    }
    let (got, want) = (header.digests.len(), count as usize);
    if got == want { Ok(want) } else { Err(CellsError::Digests { got, want }) }
}

/// A stream that is reset, not finished, when it is dropped before its end: the peer must not take half for a whole.
struct Unfinished(Option<SendStream>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(stream) = &mut self.0 {
            let _ = stream.reset(RESET);
        }
    }
}

/// Sends cells on a stream of their own: one buffer for each cell, in payload order (layer by layer). Higher `priority` goes first
/// among the streams of the connection. The iterator is drawn from as QUIC takes the bytes, so it may lock cells late.
/// Gives the payload bytes; they are queued then, not yet received. Dropping the future resets the stream.
///
/// # Errors
/// [`CellsError`]; the stream is reset.
pub async fn send_cells(
    connection: &quinn::Connection,
    header: &CellsHeader,
    payload: impl Iterator<Item = Bytes>,
    priority: i32,
) -> Result<u64, CellsError> {
    let want = checked_count(header)?;
    let frame = encode_cells_header(header)?;
    let mut guard = Unfinished(Some(connection.open_uni().await?));
    let stream = guard.0.as_mut().expect("put there by the line above");
    let _ = stream.set_priority(priority);
    let (mut got, mut sent_bytes, mut batch, mut batch_bytes) = (0, 0, vec![frame], 0);
    for cell in payload {
        got += 1;
        sent_bytes += cell.len() as u64;
        batch_bytes += cell.len();
        batch.push(cell);
        if batch.len() >= BATCH_CELLS || batch_bytes >= BATCH_BYTES {
            stream.write_all_chunks(&mut batch).await?;
            batch.clear();
            batch_bytes = 0;
        }
    }
    if got != want {
        return Err(CellsError::Count { got, want });
    }
    stream.write_all_chunks(&mut batch).await?;
    let _ = stream.finish();
    guard.0 = None;
    Ok(sent_bytes)
}

/// One received cell, still in the pieces it came in.
pub struct Cell<'a> {
    /// Its layer.
    pub layer: u16,
    /// Its block in the sequence.
    pub block: u32,
    /// What [`millrace_core::identity::cell_digest`] must give for its bytes.
    pub digest: u64,
    pieces: &'a [Bytes],
}

impl Cell<'_> {
    /// Copies the cell to its place; `place` is as long as the reader's `cell_bytes`.
    ///
    /// # Panics
    /// When `place` has another length.
    pub fn copy_to(&self, place: &mut [u8]) {
        let mut rest = place;
        for piece in self.pieces {
            let (here, later) = rest.split_at_mut(piece.len());
            here.copy_from_slice(piece);
            rest = later;
        }
        assert!(rest.is_empty(), "place longer than the cell by {} bytes", rest.len());
    }
}

/// Reads one KV stream. Dropping it stops the sender.
pub struct CellsReader {
    stream: RecvStream,
    header: CellsHeader,
    cell_bytes: usize,
    count: usize,
    next: usize,
    arrived: VecDeque<Bytes>,
    arrived_bytes: usize,
    pieces: Vec<Bytes>,
}

impl CellsReader {
    /// Reads the header of a stream. `cell_bytes` is the layout's, agreed on by `Hello`.
    ///
    /// # Errors
    /// [`CellsError`] for a header that is none, or whose numbers do not fit.
    pub async fn open(mut stream: RecvStream, cell_bytes: usize) -> Result<Self, CellsError> {
        assert!(cell_bytes > 0, "a cell has bytes");
        let mut assembler = Assembler::new(FrameKind::Cells);
        let mut rest = Bytes::new();
        while !assembler.feed(&mut rest)? {
            rest = stream.read_chunk(usize::MAX, true).await?.ok_or(FrameError::Truncated)?.bytes;
        }
        let header = assembler.take_cells_header()?;
        let count = checked_count(&header)?;
        let (arrived_bytes, arrived, pieces) = (rest.len(), VecDeque::from([rest]), Vec::new());
        Ok(Self { stream, header, cell_bytes, count, next: 0, arrived, arrived_bytes, pieces })
    }

    /// What the stream carries.
    #[must_use]
    pub fn header(&self) -> &CellsHeader {
        &self.header
    }

    /// The next cell, in payload order; `None` after the last, when the stream has ended rightly. Cancel-safe.
    ///
    /// # Errors
    /// [`CellsError::Count`] when the stream ends early, [`CellsError::Trailing`] when it does not end, and the stream's own.
    pub async fn next_cell(&mut self) -> Result<Option<Cell<'_>>, CellsError> {
        if self.next == self.count {
            let at_end = self.arrived_bytes == 0 && self.stream.read_chunk(1, true).await?.is_none();
            return if at_end { Ok(None) } else { Err(CellsError::Trailing) };
        }
        while self.arrived_bytes < self.cell_bytes {
            let mut batch = [const { Bytes::new() }; BATCH_PIECES];
            let Some(n) = self.stream.read_chunks(&mut batch).await? else {
                return Err(CellsError::Count { got: self.next, want: self.count });
            };
            for piece in batch.into_iter().take(n) {
                self.arrived_bytes += piece.len();
                self.arrived.push_back(piece);
            }
        }
        self.cut();
        let blocks = self.header.blocks as usize;
        let (layer, block) = (self.next / blocks, self.next % blocks);
        let digest = self.header.digests[self.next];
        self.next += 1;
        let (layer, block) = (self.header.layer + layer as u16, self.header.block + block as u32);
        Ok(Some(Cell { layer, block, digest, pieces: &self.pieces }))
    }

    /// Moves one cell's worth of what has arrived to `pieces`.
    fn cut(&mut self) {
        self.pieces.clear();
        let mut need = self.cell_bytes;
        while need > 0 {
            let mut front = self.arrived.pop_front().expect("arrived_bytes counts what is there");
            let piece = front.split_to(need.min(front.len()));
            if !front.is_empty() {
                self.arrived.push_front(front);
            }
            need -= piece.len();
            self.pieces.push(piece);
        }
        self.arrived_bytes -= self.cell_bytes;
    }
}
