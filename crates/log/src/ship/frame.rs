//! The frames of a shipment: `preamble u64 | kind u8 | id u64 | fields`, little-endian, told from raft's own by the preamble. Only the form
//! is decided here.

use super::super::codec::{Reader, put_bytes, put_u64};
use super::CHUNK_BYTES;

/// Magic and version.
const PREAMBLE: [u8; 8] = *b"MRSHIP\0\x01";
/// A frame is a chunk and a little; a longer one is not looked at.
const FRAME_BYTES_MAX: usize = CHUNK_BYTES + 1024;

/// What the receiver says of a shipment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// So many bytes are here; go on behind them.
    Here(u64),
    /// It is whole, checked, and given to raft.
    Taken,
    /// It is not wanted: begin no more with this one.
    Refused,
    /// Nothing is known of it: begin it again.
    Unknown,
}

/// A frame that is well formed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame<'a> {
    /// `message`: the frame of a `MsgSnapshot` without data.
    Begin {
        id: u64,
        total: u64,
        crc: u32,
        message: &'a [u8],
    },
    Chunk {
        id: u64,
        offset: u64,
        data: &'a [u8],
    },
    Ack {
        id: u64,
        verdict: Verdict,
    },
}

/// Whether bytes claim to be a frame of a shipment.
pub(in super::super) fn is_shipment(frame: &[u8]) -> bool {
    frame.starts_with(&PREAMBLE) && frame.len() <= FRAME_BYTES_MAX
}

/// The bytes of a frame.
pub(super) fn encode(frame: &Frame<'_>) -> Vec<u8> {
    let mut out = PREAMBLE.to_vec();
    match *frame {
        Frame::Begin { id, total, crc, message } => {
            out.push(1);
            [id, total, u64::from(crc)].into_iter().for_each(|value| put_u64(&mut out, value));
            put_bytes(&mut out, message);
        }
        Frame::Chunk { id, offset, data } => {
            out.push(2);
            [id, offset].into_iter().for_each(|value| put_u64(&mut out, value));
            put_bytes(&mut out, data);
        }
        Frame::Ack { id, verdict } => {
            let (what, offset) = match verdict {
                Verdict::Here(offset) => (0, offset),
                Verdict::Taken => (1, 0),
                Verdict::Refused => (2, 0),
                Verdict::Unknown => (3, 0),
            };
            out.push(3);
            [id, what, offset].into_iter().for_each(|value| put_u64(&mut out, value));
        }
    }
    out
}

/// The frame of some bytes, if they are one, to the last byte.
pub(super) fn decode(bytes: &[u8]) -> Option<Frame<'_>> {
    let mut reader = Reader(bytes.strip_prefix(&PREAMBLE)?);
    let (kind, id) = (reader.u8()?, reader.u64()?);
    let frame = match kind {
        1 => {
            let (total, crc) = (reader.u64()?, u32::try_from(reader.u64()?).ok()?);
            Frame::Begin { id, total, crc, message: reader.bytes()? }
        }
        2 => {
            let offset = reader.u64()?;
            let data = reader.bytes().filter(|data| (1..=CHUNK_BYTES).contains(&data.len()))?;
            Frame::Chunk { id, offset, data }
        }
        3 => {
            let (what, offset) = (reader.u64()?, reader.u64()?);
            let verdict = match what {
                0 => Verdict::Here(offset),
                1 => Verdict::Taken,
                2 => Verdict::Refused,
                3 => Verdict::Unknown,
                _ => return None,
            };
            Frame::Ack { id, verdict }
        }
        _ => return None,
    };
    reader.0.is_empty().then_some(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_and_no_cut_or_longer_one_passes() {
        let frames = [
            Frame::Begin { id: 7, total: 900, crc: 5, message: b"message" },
            Frame::Chunk { id: 7, offset: 3, data: b"data" },
            Frame::Ack { id: 7, verdict: Verdict::Here(12) },
            Frame::Ack { id: 7, verdict: Verdict::Taken },
            Frame::Ack { id: 7, verdict: Verdict::Refused },
            Frame::Ack { id: 7, verdict: Verdict::Unknown },
        ];
        for frame in frames {
            let bytes = encode(&frame);
            assert!(is_shipment(&bytes));
            assert_eq!(decode(&bytes), Some(frame));
            (0..bytes.len()).for_each(|cut| assert_eq!(decode(&bytes[..cut]), None));
            assert_eq!(decode(&[&bytes[..], &[0]].concat()), None);
        }
        assert_eq!(decode(&encode(&Frame::Chunk { id: 1, offset: 0, data: &[] })), None);
        let long = vec![0; CHUNK_BYTES + 1];
        assert_eq!(decode(&encode(&Frame::Chunk { id: 1, offset: 0, data: &long })), None);
    }
}
