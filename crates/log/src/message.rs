//! Frames between replicas: raft messages as rkyv archives.
//!
//! Protobuf types are only in-memory structs here; no byte of a frame reaches its parser. [`decode`] checks everything
//! that can be told from the frame alone; whether the message is possible *now* is decided in `admit`.
//! `preamble u64 | archive`, the archive 8-byte aligned behind it.

use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use rkyv::util::AlignedVec;
use rkyv::with::InlineAsBox;
use rkyv::{Archive, Serialize, rancor};

use super::members::{Members, Step};
use super::{COMMAND_BYTES_MAX, FRAME_BYTES_MAX, LEARNERS_MAX, VOTERS_MAX};

/// Magic and version of the frame's layout.
const PREAMBLE: [u8; 8] = *b"MRRAFT\0\x02";
/// An append message with more entry bytes is sent as several; raft-rs batches without a bound of its own.
const APPEND_BYTES_MAX: usize = 1 << 20;
/// Entries of one frame, however small.
const FRAME_ENTRIES_MAX: usize = 1 << 16;
/// Terms and indexes stay far from overflow.
const COUNTER_MAX: u64 = 1 << 62;
/// Length of the context of an entry or a read: `(replica, incarnation, sequence)`.
pub(super) const CONTEXT_BYTES: usize = 24;

#[derive(Archive, Serialize)]
struct WireEntry<'a> {
    index: u64,
    term: u64,
    /// The entry changes the members; its data is a `Step`.
    step: bool,
    #[rkyv(with = InlineAsBox)]
    context: &'a [u8],
    #[rkyv(with = InlineAsBox)]
    data: &'a [u8],
}

#[derive(Archive, Serialize)]
struct WireSnapshot {
    index: u64,
    term: u64,
    voters: Vec<u64>,
    outgoing: Vec<u64>,
    learners: Vec<u64>,
}

#[derive(Archive, Serialize)]
struct WireMessage<'a> {
    kind: u8,
    reject: bool,
    to: u64,
    from: u64,
    term: u64,
    log_term: u64,
    index: u64,
    commit: u64,
    commit_term: u64,
    reject_hint: u64,
    #[rkyv(with = InlineAsBox)]
    context: &'a [u8],
    entries: Vec<WireEntry<'a>>,
    snapshot: Option<WireSnapshot>,
}

/// Why a frame is no raft message. All are the peer's fault: the frame is dropped and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    #[error("the frame's length or preamble is wrong")]
    Preamble,
    #[error("the archive is malformed")]
    Archive,
    #[error("the message type is not one that replicas send")]
    Kind,
    #[error("a field is out of its range")]
    Field,
    #[error("the entries do not form a run of the log")]
    Entries,
    #[error("the snapshot is malformed")]
    Snapshot,
}

/// Breaks an append message into several that each fit a frame; any other message stays whole.
pub(super) fn split(mut message: Message) -> Vec<Message> {
    let bytes: usize = message.entries.iter().map(|e| e.data.len()).sum();
    let whole = bytes <= APPEND_BYTES_MAX && message.entries.len() <= FRAME_ENTRIES_MAX;
    if message.get_msg_type() != MessageType::MsgAppend || whole {
        return vec![message];
    }
    let entries: Vec<Entry> = message.take_entries().into();
    let (mut parts, mut part, mut bytes) = (Vec::new(), Vec::new(), 0);
    for entry in entries {
        if !part.is_empty() && (bytes + entry.data.len() > APPEND_BYTES_MAX || part.len() == FRAME_ENTRIES_MAX) {
            parts.push(std::mem::take(&mut part));
            bytes = 0;
        }
        bytes += entry.data.len();
        part.push(entry);
    }
    parts.push(part);
    let mut before = (message.index, message.log_term);
    let piece = |part: Vec<Entry>| {
        let mut piece = message.clone();
        (piece.index, piece.log_term) = before;
        before = part.last().map_or(before, |e| (e.index, e.term));
        piece.set_entries(part.into());
        piece
    };
    parts.into_iter().map(piece).collect()
}

/// The frame of a message. A snapshot's data is not in it: `ship` sends that.
pub(super) fn encode(message: &Message) -> Vec<u8> {
    let snapshot = (message.get_msg_type() == MessageType::MsgSnapshot).then(|| {
        let meta = message.get_snapshot().get_metadata();
        let Members { voters, outgoing, learners } = Members::of(meta.get_conf_state());
        WireSnapshot { index: meta.index, term: meta.term, voters, outgoing, learners }
    });
    let wire = WireMessage {
        kind: message.get_msg_type() as u8,
        reject: message.reject,
        to: message.to,
        from: message.from,
        term: message.term,
        log_term: message.log_term,
        index: message.index,
        commit: message.commit,
        commit_term: message.commit_term,
        reject_hint: message.reject_hint,
        context: &message.context,
        entries: message.entries.iter().map(wire_entry).collect(),
        snapshot,
    };
    let frame = PREAMBLE.to_vec();
    rkyv::api::high::to_bytes_in::<_, rancor::Error>(&wire, frame).expect("writing to memory below 2 GiB cannot fail")
}

fn wire_entry(entry: &Entry) -> WireEntry<'_> {
    let step = entry.get_entry_type() == EntryType::EntryConfChangeV2;
    WireEntry { index: entry.index, term: entry.term, step, context: &entry.context, data: &entry.data }
}

/// The message of a frame, if the frame is well formed and every field is within its bounds.
pub(super) fn decode(frame: &[u8]) -> Result<Message, FrameError> {
    if frame.len() > FRAME_BYTES_MAX {
        return Err(FrameError::Preamble);
    }
    let archive = frame.strip_prefix(&PREAMBLE).ok_or(FrameError::Preamble)?;
    let mut aligned: AlignedVec<16> = AlignedVec::with_capacity(archive.len());
    aligned.extend_from_slice(archive);
    let wire = rkyv::access::<ArchivedWireMessage<'_>, rancor::Error>(&aligned).map_err(|_| FrameError::Archive)?;
    let mut message = Message::default();
    message.set_msg_type(kind(wire.kind).ok_or(FrameError::Kind)?);
    message.reject = wire.reject;
    message.to = counter(wire.to)?;
    message.from = counter(wire.from)?;
    message.term = counter(wire.term)?;
    message.log_term = counter(wire.log_term)?;
    message.index = counter(wire.index)?;
    message.commit = counter(wire.commit)?;
    message.commit_term = counter(wire.commit_term)?;
    message.reject_hint = counter(wire.reject_hint)?;
    if wire.context.len() > CONTEXT_BYTES {
        return Err(FrameError::Field);
    }
    message.context = wire.context.to_vec().into();
    decode_entries(wire, &mut message)?;
    decode_snapshot(wire, &mut message)?;
    Ok(message)
}

/// Entries of an append must be the run that follows `(index, log_term)`; a read carries its context as its one entry.
fn decode_entries(wire: &ArchivedWireMessage<'_>, message: &mut Message) -> Result<(), FrameError> {
    let kind = message.get_msg_type();
    let read = matches!(kind, MessageType::MsgReadIndex | MessageType::MsgReadIndexResp);
    // raft-rs takes term 0 as a match for any index beyond the log, and panics when it then commits there.
    let anchored = (message.index == 0) == (message.log_term == 0);
    let count_is_right = match kind {
        MessageType::MsgAppend => anchored && wire.entries.len() <= FRAME_ENTRIES_MAX,
        _ => wire.entries.len() == usize::from(read),
    };
    if !count_is_right || (message.term == 0) != (kind == MessageType::MsgReadIndex) {
        return Err(FrameError::Entries);
    }
    let mut before = (message.index, message.log_term);
    let mut entries = Vec::with_capacity(wire.entries.len());
    for found in wire.entries.iter() {
        let mut entry = Entry { index: found.index.to_native(), term: found.term.to_native(), ..Default::default() };
        entry.set_entry_type(if found.step { EntryType::EntryConfChangeV2 } else { EntryType::EntryNormal });
        entry.context = found.context.to_vec().into();
        entry.data = found.data.to_vec().into();
        let follows = entry.index == before.0 + 1 && entry.term >= before.1.max(1) && entry.term <= message.term;
        let sized = entry.data.len() <= COMMAND_BYTES_MAX && [0, CONTEXT_BYTES].contains(&entry.context.len());
        let names_a_read = entry.data.len() == CONTEXT_BYTES && entry.context.is_empty() && !found.step;
        let means_a_step = !found.step || Step::decode(&entry.data).is_some();
        if !(if read { names_a_read } else { follows && sized && means_a_step }) {
            return Err(FrameError::Entries);
        }
        before = (entry.index, entry.term);
        entries.push(entry);
    }
    message.set_entries(entries.into());
    Ok(())
}

fn decode_snapshot(wire: &ArchivedWireMessage<'_>, message: &mut Message) -> Result<(), FrameError> {
    let expected = message.get_msg_type() == MessageType::MsgSnapshot;
    let found = match wire.snapshot.as_ref() {
        Some(found) if expected => found,
        None if !expected => return Ok(()),
        _ => return Err(FrameError::Snapshot),
    };
    let (index, term) = (counter(found.index)?, counter(found.term)?);
    let point_is_right = index > 0 && term > 0 && term <= message.term;
    let lists = [(&found.voters, VOTERS_MAX), (&found.outgoing, VOTERS_MAX), (&found.learners, LEARNERS_MAX)];
    if !point_is_right || lists.iter().any(|(ids, most)| ids.len() > *most) {
        return Err(FrameError::Snapshot);
    }
    let [voters, outgoing, learners] = lists.map(|(ids, _)| ids.iter().map(|id| id.to_native()).collect());
    let members = Members { voters, outgoing, learners };
    if members.voters.is_empty() || members.check().is_err() {
        return Err(FrameError::Snapshot);
    }
    let meta = message.mut_snapshot().mut_metadata();
    meta.index = index;
    meta.term = term;
    meta.set_conf_state(members.conf_state());
    Ok(())
}

fn counter(value: rkyv::rend::u64_le) -> Result<u64, FrameError> {
    let value = value.to_native();
    if value < COUNTER_MAX { Ok(value) } else { Err(FrameError::Field) }
}

/// The types that one replica sends another. The rest are local to raft-rs, or are forwarding that we do not do.
fn kind(byte: u8) -> Option<MessageType> {
    use MessageType::*;
    let known = [
        MsgAppend,
        MsgAppendResponse,
        MsgRequestVote,
        MsgRequestVoteResponse,
        MsgSnapshot,
        MsgHeartbeat,
        MsgHeartbeatResponse,
        MsgTimeoutNow,
        MsgReadIndex,
        MsgReadIndexResp,
        MsgRequestPreVote,
        MsgRequestPreVoteResponse,
    ];
    known.into_iter().find(|kind| *kind as u8 == byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Change;

    fn append(count: u64, bytes: usize) -> Message {
        let mut message = Message { to: 2, from: 1, term: 7, log_term: 3, index: 40, commit: 40, ..Default::default() };
        message.set_msg_type(MessageType::MsgAppend);
        let entry = |i| Entry { index: 41 + i, term: 7, data: vec![i as u8; bytes].into(), ..Default::default() };
        message.set_entries((0..count).map(entry).collect::<Vec<_>>().into());
        message
    }

    #[test]
    fn messages_survive_the_frame() {
        for message in [append(0, 0), append(5, 100)] {
            assert_eq!(decode(&encode(&message)), Ok(message));
        }
        let mut message = append(0, 0);
        message.set_msg_type(MessageType::MsgSnapshot);
        let meta = message.mut_snapshot().mut_metadata();
        (meta.index, meta.term) = (39, 7);
        let (voters, outgoing) = (vec![1, 2, 4], vec![1, 2, 3]);
        meta.set_conf_state(Members { voters, outgoing, learners: vec![7] }.conf_state());
        assert_eq!(decode(&encode(&message)), Ok(message));
        let mut message = append(3, 10);
        message.entries[1].set_entry_type(EntryType::EntryConfChangeV2);
        message.entries[1].data = Step::Change(Change::Promote(4)).encode(b"command").into();
        assert_eq!(decode(&encode(&message)), Ok(message));
    }

    #[test]
    fn long_appends_are_split_into_a_chain_of_the_same_entries() {
        let message = append(9, APPEND_BYTES_MAX / 3);
        let parts = split(message.clone());
        assert_eq!(parts.len(), 3);
        let entries: Vec<Entry> = parts.iter().flat_map(|p| p.entries.iter().cloned()).collect();
        assert_eq!(entries, message.entries.to_vec());
        for part in &parts {
            assert_eq!(part.entries[0].index, part.index + 1);
            assert!(decode(&encode(part)).is_ok());
        }
        assert_eq!((parts[1].index, parts[1].log_term), (43, 7));
    }

    #[test]
    fn impossible_messages_are_refused() {
        let refused = |change: fn(&mut Message)| {
            let mut message = append(3, 10);
            change(&mut message);
            decode(&encode(&message)).unwrap_err()
        };
        assert_eq!(refused(|m| m.entries[1].index = 50), FrameError::Entries);
        assert_eq!(refused(|m| m.entries[1].term = 8), FrameError::Entries);
        assert_eq!(refused(|m| m.entries[2].context = vec![0; 5].into()), FrameError::Entries);
        assert_eq!(refused(|m| m.entries[2].set_entry_type(EntryType::EntryConfChangeV2)), FrameError::Entries);
        assert_eq!(refused(|m| m.term = 0), FrameError::Entries);
        assert_eq!(refused(|m| m.log_term = 0), FrameError::Entries);
        assert_eq!(refused(|m| m.term = u64::MAX), FrameError::Field);
        assert_eq!(refused(|m| m.context = vec![0; 99].into()), FrameError::Field);
        assert_eq!(refused(|m| m.set_msg_type(MessageType::MsgHup)), FrameError::Kind);
        assert_eq!(refused(|m| m.set_msg_type(MessageType::MsgPropose)), FrameError::Kind);
        assert_eq!(refused(|m| m.set_msg_type(MessageType::MsgHeartbeat)), FrameError::Entries);
        assert_eq!(decode(&[]), Err(FrameError::Preamble));
        assert_eq!(decode(&PREAMBLE), Err(FrameError::Archive));
    }
}
