//! The receiving side: writes chunks to a temporary file, in order, and lets raft know of the snapshot once all of it is there and reads as
//! a state.
//!
//! A peer with a valid certificate can at most fill one file of [`SNAPSHOT_BYTES_MAX`], and only while it leads this replica's term.

use std::time::{Duration, Instant};

use raft::eraftpb::{Message, MessageType};

use super::super::background::{Done, Received};
use super::super::members::Members;
use super::super::snapshot::{Draft, Meta};
use super::super::wal::LogPoint;
use super::super::{SNAPSHOT_BYTES_MAX, disk, message};
use super::frame::Verdict;
use super::{Dock, Ship};
use std::sync::atomic::Ordering;

/// A shipment that nobody continues for so long is dropped.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// A snapshot that is coming in.
pub(super) struct Inbound {
    peer: u64,
    id: u64,
    message: Message,
    crc: u32,
    draft: Draft,
    heard: Instant,
}

impl<S> Ship<S> {
    pub(super) fn on_begin(&mut self, now: Instant, peer: u64, (id, total, crc): (u64, u64, u32), frame: &[u8]) {
        if self.taken == Some((peer, id)) {
            return self.dock.answer(peer, id, Verdict::Taken);
        }
        if let Some(inbound) = self.inbound.as_mut().filter(|inbound| (inbound.peer, inbound.id) == (peer, id)) {
            inbound.heard = now;
            return self.dock.answer(peer, id, Verdict::Here(inbound.draft.written));
        }
        let message = message::decode(frame).ok().filter(|m| m.get_msg_type() == MessageType::MsgSnapshot);
        let Some(message) = message.filter(|m| m.from == peer && m.to == self.dock.me && total <= SNAPSHOT_BYTES_MAX) else {
            self.dock.refuse();
            return self.dock.answer(peer, id, Verdict::Refused);
        };
        let (term, leader) = {
            let status = self.dock.status.borrow();
            (status.term, status.leader)
        };
        match message.term {
            // Its heartbeat will tell; it repeats the beginning until then.
            ahead if ahead > term || ahead == term && leader.is_none() => return,
            same if same == term && leader == Some(peer) => {}
            _ => return self.dock.answer(peer, id, Verdict::Refused),
        }
        self.drop_inbound();
        if self.dock.shared.full.load(Ordering::Relaxed) {
            return self.dock.answer(peer, id, Verdict::Refused);
        }
        let meta = message.get_snapshot().get_metadata();
        let at = LogPoint { index: meta.index, term: meta.term };
        let meta = Meta { at, members: Members::of(meta.get_conf_state()) };
        let path = self.dock.dir.join(format!("inbound-{id:016x}.tmp"));
        match Draft::create(self.dock.disk.as_ref(), path, &self.dock.owner, &meta, total) {
            Ok(draft) => {
                self.inbound = Some(Inbound { peer, id, message, crc, draft, heard: now });
                self.go_on();
            }
            Err(error) => {
                tracing::warn!(%error, peer, "a snapshot cannot be taken in");
                self.dock.answer(peer, id, Verdict::Refused);
            }
        }
    }

    pub(super) fn on_chunk(&mut self, now: Instant, (peer, id): (u64, u64), offset: u64, data: &[u8]) {
        let term = self.dock.status.borrow().term;
        let known = self.inbound.as_mut().filter(|inbound| (inbound.peer, inbound.id) == (peer, id));
        let Some(inbound) = known else {
            let verdict = if self.taken == Some((peer, id)) { Verdict::Taken } else { Verdict::Unknown };
            return self.dock.answer(peer, id, verdict);
        };
        inbound.heard = now;
        let draft = &mut inbound.draft;
        if offset != draft.written {
            return self.dock.answer(peer, id, Verdict::Here(draft.written));
        }
        let fits = inbound.message.term == term && data.len() as u64 <= draft.total - draft.written;
        let written = if fits { draft.push(data).map_err(|error| error.to_string()) } else { Err("it does not belong".into()) };
        match written {
            Ok(()) => self.go_on(),
            Err(reason) => self.refuse_inbound(&reason),
        }
    }

    /// Asks for more, or finishes when all is there.
    fn go_on(&mut self) {
        let Some(inbound) = self.inbound.take_if(|inbound| inbound.draft.written == inbound.draft.total) else {
            let Some(Inbound { peer, id, draft, .. }) = &self.inbound else { return };
            return self.dock.answer(*peer, *id, Verdict::Here(draft.written));
        };
        let (peer, id) = (inbound.peer, inbound.id);
        let file = inbound.draft.path.clone();
        match receive(&self.dock, inbound) {
            Ok(received) => {
                self.taken = Some((peer, id));
                // Told before it is acknowledged: whatever the leader sends next finds it here.
                let _ = self.dock.tell.send(Done::Received(received));
                self.dock.answer(peer, id, Verdict::Taken);
            }
            Err(reason) => {
                tracing::warn!(reason, peer, "a snapshot is refused");
                disk::discard(self.dock.disk.as_ref(), &file);
                self.dock.refuse();
                self.dock.answer(peer, id, Verdict::Refused);
            }
        }
    }

    fn refuse_inbound(&mut self, reason: &str) {
        let Some(Inbound { peer, id, .. }) = self.inbound else { return };
        tracing::warn!(reason, peer, "a snapshot is refused");
        self.drop_inbound();
        self.dock.answer(peer, id, Verdict::Refused);
    }

    fn drop_inbound(&mut self) {
        if let Some(inbound) = self.inbound.take() {
            disk::discard(self.dock.disk.as_ref(), &inbound.draft.path);
        }
    }

    pub(super) fn look_inbound(&mut self, now: Instant) {
        if self.inbound.as_ref().is_some_and(|inbound| now.saturating_duration_since(inbound.heard) >= SILENCE_MAX) {
            self.drop_inbound();
        }
    }
}

/// Syncs and checks a snapshot that is whole: bytes, then meaning.
fn receive<S>(dock: &Dock<S>, mut inbound: Inbound) -> Result<Received<S>, String> {
    let crc = inbound.draft.finish().map_err(|error| error.to_string())?;
    if crc != inbound.crc {
        return Err("its checksum is wrong".into());
    }
    let data = inbound.draft.data().map_err(|error| error.to_string())?;
    let state = (dock.decode)(&data).map_err(|error| error.to_string())?;
    Ok(Received { peer: inbound.peer, message: inbound.message, state, file: inbound.draft.path })
}
