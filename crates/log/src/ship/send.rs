//! The sending side: reads the snapshot's file and keeps the window full, until the follower has taken it or there is no hope.

use std::time::{Duration, Instant};

use raft::SnapshotStatus;
use raft::eraftpb::Message;

use super::super::snapshot::Saved;
use super::super::{Role, message};
use super::frame::{Frame, Verdict};
use super::{CHUNK_BYTES, Dock, Ship, WINDOW_CHUNKS};

/// What was sent counts as lost when nothing was heard for so long.
const REPEAT_AFTER: Duration = Duration::from_millis(500);
/// A follower that says nothing for so long does not get this snapshot.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How long a follower may look at a snapshot that is there whole.
const CHECK_WAIT_MAX: Duration = Duration::from_secs(120);

/// A snapshot on its way to one follower.
pub(super) struct Outbound {
    id: u64,
    /// What raft wants it told.
    message: Message,
    saved: Saved,
    /// The follower has agreed to take it.
    begun: bool,
    /// Bytes that are there, and bytes that are sent.
    acked: u64,
    sent: u64,
    heard: Instant,
    /// When something was last heard or repeated.
    stirred: Instant,
}

impl Outbound {
    fn pump<S>(&mut self, dock: &Dock<S>) -> Result<(), super::super::DiskError> {
        let to = self.message.to;
        if !self.begun {
            let (total, crc, message) = (self.saved.total, self.saved.crc, message::encode(&self.message));
            dock.send(to, &Frame::Begin { id: self.id, total, crc, message: &message });
            return Ok(());
        }
        let window = self.saved.total.min(self.acked + WINDOW_CHUNKS * CHUNK_BYTES as u64);
        while self.sent < window {
            let data = self.saved.read(self.sent, CHUNK_BYTES)?;
            if !dock.send(to, &Frame::Chunk { id: self.id, offset: self.sent, data: &data }) {
                break;
            }
            self.sent += data.len() as u64;
        }
        Ok(())
    }

    fn silence_max(&self) -> Duration {
        if self.acked > 0 && self.acked == self.saved.total { CHECK_WAIT_MAX } else { SILENCE_MAX }
    }

    /// Back to what is known to be there. Once all is there, the question is whether it was taken.
    fn rewind(&mut self) {
        self.begun &= self.acked < self.saved.total;
        self.sent = self.acked;
    }
}

impl<S> Ship<S> {
    /// Begins to send the snapshot that the directory has now, which is the one that raft was shown or a newer one.
    pub(super) fn begin(&mut self, now: Instant, mut message: Message) {
        let peer = message.to;
        let saved = Saved::open(self.dock.disk.as_ref(), &self.dock.dir, &self.dock.owner);
        let Ok(Some(saved)) = saved.inspect_err(|error| tracing::error!(%error, peer, "the snapshot cannot be read")) else {
            return self.report(peer, SnapshotStatus::Failure);
        };
        let meta = message.mut_snapshot().mut_metadata();
        (meta.index, meta.term) = (saved.meta.at.index, saved.meta.at.term);
        meta.set_conf_state(saved.meta.members.conf_state());
        tracing::info!(peer, index = meta.index, bytes = saved.total, "a snapshot is sent");
        let id = self.dock.disk.random();
        let outbound = Outbound { id, message, saved, begun: false, acked: 0, sent: 0, heard: now, stirred: now };
        self.outbound.insert(peer, outbound);
        self.pump(peer);
    }

    pub(super) fn on_ack(&mut self, now: Instant, peer: u64, id: u64, verdict: Verdict) {
        let Some(outbound) = self.outbound.get_mut(&peer).filter(|outbound| outbound.id == id) else { return };
        (outbound.heard, outbound.stirred) = (now, now);
        match verdict {
            Verdict::Here(offset) => {
                outbound.begun = true;
                if (outbound.acked..=outbound.saved.total).contains(&offset) {
                    outbound.acked = offset;
                    outbound.sent = outbound.sent.max(offset);
                }
                self.pump(peer);
            }
            Verdict::Unknown => {
                (outbound.begun, outbound.acked, outbound.sent) = (false, 0, 0);
                self.pump(peer);
            }
            Verdict::Taken => self.end(peer, SnapshotStatus::Finish),
            Verdict::Refused => self.end(peer, SnapshotStatus::Failure),
        }
    }

    fn pump(&mut self, peer: u64) {
        let Some(outbound) = self.outbound.get_mut(&peer) else { return };
        if let Err(error) = outbound.pump(&self.dock) {
            tracing::error!(%error, peer, "the snapshot cannot be read");
            self.end(peer, SnapshotStatus::Failure);
        }
    }

    fn end(&mut self, peer: u64, status: SnapshotStatus) {
        self.outbound.remove(&peer);
        tracing::info!(peer, ?status, "the sending of a snapshot ends");
        self.report(peer, status);
    }

    pub(super) fn look_outbound(&mut self, now: Instant) {
        let (role, term) = {
            let status = self.dock.status.borrow();
            (status.role, status.term)
        };
        let silent = |o: &Outbound| now.saturating_duration_since(o.heard) >= o.silence_max();
        // The status may lag behind a message of a term that has just begun.
        let over = |o: &Outbound| term > o.message.term || term == o.message.term && role != Role::Leader;
        let lost: Vec<u64> = self.outbound.iter().filter(|(_, o)| silent(o) || over(o)).map(|(peer, _)| *peer).collect();
        lost.into_iter().for_each(|peer| self.end(peer, SnapshotStatus::Failure));
        let late = |o: &Outbound| now.saturating_duration_since(o.stirred) >= REPEAT_AFTER;
        let quiet: Vec<u64> = self.outbound.iter().filter(|(_, o)| late(o)).map(|(peer, _)| *peer).collect();
        for peer in quiet {
            if let Some(outbound) = self.outbound.get_mut(&peer) {
                outbound.rewind();
                outbound.stirred = now;
            }
            self.pump(peer);
        }
    }
}
