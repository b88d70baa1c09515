//! Bytes to messages and back. Every frame is a fixed preamble and one rkyv archive.
//!
//! ```text
//! 0  magic u32   4  version u8   5  kind u8   6  zero u16   8  archive_len u32   12  zero u32   16  archive ...
//! ```
//! All little-endian; 16 bytes, so that an archive written behind it stays aligned. The decoder is pure, believes nothing
//! (checked access only) and keeps at most what has arrived, up to a named bound. QUIC's encryption guards the bytes on the wire,
//! so there is no checksum. What a message means, and who may send it, is not decided here.

use bytes::{Buf, Bytes};
use millrace_core::message::{CellsHeader, DELTA_OPS_MAX, Message, REPLICAS_TOLD_MAX, SNAPSHOT_PAGE_MAX, TOKENS_MAX, Ticket};
use quinn::RecvStream;
use rkyv::rancor;
use rkyv::util::AlignedVec;

/// `MLRC`, first on every frame.
pub const MAGIC: u32 = u32::from_le_bytes(*b"MLRC");
/// The format of preamble and archives; raised with every change that is not an appended message.
pub const VERSION: u8 = 1;
/// Bytes before the archive.
pub const PREAMBLE_BYTES: usize = 16;
/// Archive bytes of one message.
pub const FRAME_MAX: usize = 16 << 20;
/// Archive bytes of one [`CellsHeader`]: 65,536 digests and a little.
pub const CELLS_HEADER_MAX: usize = (8 << 16) + 1024;
/// Bytes of a ticket's cache salt.
pub const CACHE_SALT_MAX: usize = 256;
/// A decoder gives its buffer back after a frame larger than this.
const BUFFER_KEEP: usize = 1 << 20;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// A [`Message`], on a link's control stream.
    Message = 1,
    /// A [`CellsHeader`]; raw cells follow it to the end of the stream.
    Cells = 2,
}

impl FrameKind {
    const fn archive_max(self) -> usize {
        match self {
            Self::Message => FRAME_MAX,
            Self::Cells => CELLS_HEADER_MAX,
        }
    }
}

/// Bytes that are no frame, or a value that cannot be one.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Not a frame of ours at all.
    #[error("bad magic {0:#010x}")]
    BadMagic(u32),
    /// Another version of the format.
    #[error("frame version {got}, not {want}")]
    Version {
        /// The peer's.
        got: u8,
        /// Ours.
        want: u8,
    },
    /// A kind that does not belong on this stream.
    #[error("frame kind {got}, not {want:?}")]
    Kind {
        /// The peer's.
        got: u8,
        /// What this stream carries.
        want: FrameKind,
    },
    /// Bytes that must be zero are not.
    #[error("reserved bytes are not zero")]
    Reserved,
    /// Longer than a frame may be.
    #[error("archive of {len} bytes, at most {max}")]
    TooLong {
        /// Claimed or made.
        len: usize,
        /// The bound.
        max: usize,
    },
    /// The archive does not check, or could not be made.
    #[error("archive: {0}")]
    Archive(String),
    /// A list in a message is longer than the protocol allows.
    #[error("{field} has {got} entries, at most {max}")]
    Bound {
        /// The list.
        field: &'static str,
        /// Its length.
        got: usize,
        /// The bound.
        max: usize,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// The stream or its connection failed.
    #[error("reading: {0}")]
    Read(#[from] quinn::ReadError),
}

/// One message as a frame.
///
/// # Errors
/// [`FrameError::TooLong`] or [`FrameError::Bound`] when the message breaks the protocol's bounds: the peer would close the link.
pub fn encode(message: &Message) -> Result<Bytes, FrameError> {
    check_bounds(message)?;
    let frame = rkyv::api::high::to_bytes_in::<_, rancor::Error>(message, blank()).map_err(archive)?;
    sealed(frame, FrameKind::Message)
}

/// A stream's leading frame.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn encode_cells_header(header: &CellsHeader) -> Result<Bytes, FrameError> {
    let frame = rkyv::api::high::to_bytes_in::<_, rancor::Error>(header, blank()).map_err(archive)?;
    sealed(frame, FrameKind::Cells)
}

fn blank() -> AlignedVec<16> {
    let mut frame = AlignedVec::with_capacity(256);
    frame.resize(PREAMBLE_BYTES, 0);
    frame
}

fn sealed(mut frame: AlignedVec<16>, kind: FrameKind) -> Result<Bytes, FrameError> {
    let len = frame.len() - PREAMBLE_BYTES;
    if len > kind.archive_max() {
        return Err(FrameError::TooLong { len, max: kind.archive_max() });
    }
    frame[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    frame[4] = VERSION;
    frame[5] = kind as u8;
    frame[8..12].copy_from_slice(&(len as u32).to_le_bytes());
    Ok(Bytes::from_owner(frame))
}

fn archive(error: rancor::Error) -> FrameError {
    FrameError::Archive(error.to_string())
}

/// The archive length that a preamble claims, once it is believed.
fn parse_preamble(head: &[u8; PREAMBLE_BYTES], kind: FrameKind) -> Result<usize, FrameError> {
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (len, max) = (word(8) as usize, kind.archive_max());
    if word(0) != MAGIC {
        return Err(FrameError::BadMagic(word(0)));
    }
    if head[4] != VERSION {
        return Err(FrameError::Version { got: head[4], want: VERSION });
    }
    if head[5] != kind as u8 {
        return Err(FrameError::Kind { got: head[5], want: kind });
    }
    if head[6..8] != [0; 2] || word(12) != 0 {
        return Err(FrameError::Reserved);
    }
    if len > max { Err(FrameError::TooLong { len, max }) } else { Ok(len) }
}

/// Puts one frame together out of pieces of any size. Pure: no socket, no clock.
pub struct Assembler {
    kind: FrameKind,
    head: [u8; PREAMBLE_BYTES],
    head_len: usize,
    archive_len: usize,
    archive: AlignedVec<16>,
}

impl Assembler {
    /// Waits for frames of `kind`.
    #[must_use]
    pub fn new(kind: FrameKind) -> Self {
        Self { kind, head: [0; PREAMBLE_BYTES], head_len: 0, archive_len: 0, archive: AlignedVec::new() }
    }

    /// Takes from `input` what the present frame lacks; `true` once it is whole: take it before feeding on.
    ///
    /// # Errors
    /// A preamble that is not ours. The assembler is of no use afterwards.
    pub fn feed(&mut self, input: &mut Bytes) -> Result<bool, FrameError> {
        if self.head_len < PREAMBLE_BYTES {
            let take = input.len().min(PREAMBLE_BYTES - self.head_len);
            input.copy_to_slice(&mut self.head[self.head_len..self.head_len + take]);
            self.head_len += take;
            if self.head_len < PREAMBLE_BYTES {
                return Ok(false);
            }
            self.archive_len = parse_preamble(&self.head, self.kind)?;
        }
        // The buffer grows by what has arrived, never by what is claimed.
        let take = input.len().min(self.archive_len - self.archive.len());
        self.archive.extend_from_slice(&input.split_to(take));
        Ok(self.archive.len() == self.archive_len)
    }

    /// Whether a frame has begun and is not whole.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.head_len > 0
    }

    /// Bytes that the buffer holds room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.archive.capacity()
    }

    /// The whole frame as a message; readies the assembler for the next.
    ///
    /// # Errors
    /// [`FrameError::Archive`] and [`FrameError::Bound`].
    pub fn take_message(&mut self) -> Result<Message, FrameError> {
        let message = rkyv::from_bytes::<Message, rancor::Error>(&self.archive).map_err(archive);
        self.reset();
        message.and_then(|m| check_bounds(&m).map(|()| m))
    }

    /// The whole frame as the header of a KV stream; readies the assembler for the next.
    ///
    /// # Errors
    /// [`FrameError::Archive`].
    pub fn take_cells_header(&mut self) -> Result<CellsHeader, FrameError> {
        let header = rkyv::from_bytes::<CellsHeader, rancor::Error>(&self.archive).map_err(archive);
        self.reset();
        header
    }

    fn reset(&mut self) {
        self.head_len = 0;
        self.archive.clear();
        if self.archive.capacity() > BUFFER_KEEP {
            self.archive = AlignedVec::new();
        }
    }
}

/// The bounds that the protocol gives to the lists of a message.
fn check_bounds(message: &Message) -> Result<(), FrameError> {
    let bound = |field, got, max| if got > max { Err(FrameError::Bound { field, got, max }) } else { Ok(()) };
    let ticket = |ticket: &Ticket| {
        bound("tokens", ticket.tokens.len(), TOKENS_MAX)?;
        bound("cache_salt", ticket.cache_salt.len(), CACHE_SALT_MAX)
    };
    match message {
        Message::Assign(t) => ticket(t),
        Message::Open(open) => ticket(&open.ticket),
        Message::Delta(delta) => bound("ops", delta.ops.len(), DELTA_OPS_MAX),
        Message::Snapshot(page) => bound("blocks", page.blocks.len(), SNAPSHOT_PAGE_MAX),
        Message::Replicas(replicas) => bound("replicas", replicas.len(), REPLICAS_TOLD_MAX),
        _ => Ok(()),
    }
}

/// Messages out of one stream.
pub struct FrameReader {
    stream: RecvStream,
    assembler: Assembler,
    rest: Bytes,
}

impl FrameReader {
    /// Reads `stream` from here on.
    #[must_use]
    pub fn new(stream: RecvStream) -> Self {
        Self { stream, assembler: Assembler::new(FrameKind::Message), rest: Bytes::new() }
    }

    /// The next message; `None` at the end of the stream. Cancel-safe: what has arrived stays.
    ///
    /// # Errors
    /// [`FrameError`]; nothing can be read after one.
    pub async fn next(&mut self) -> Result<Option<Message>, FrameError> {
        loop {
            if self.assembler.feed(&mut self.rest)? {
                return self.assembler.take_message().map(Some);
            }
            match self.stream.read_chunk(usize::MAX, true).await? {
                Some(chunk) => self.rest = chunk.bytes,
                None if self.assembler.is_partial() => return Err(FrameError::Truncated),
                None => return Ok(None),
            }
        }
    }
}
