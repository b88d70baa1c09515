//! What a replica does when its disk is full: it refuses writes and lives.
//!
//! A reserve file holds some room. When the log cannot grow, the reserve is given up, so that what raft is about to persist (and the votes
//! and terms after it) still fits; from then on the replica takes no entries: it refuses proposals with
//! [`ProposeError::DiskFull`], drops appended entries, which it so does not acknowledge, takes no snapshots, and hands leadership
//! over if it has it. It still votes, follows, and answers for what it has applied. Once the reserve can be made again, all is as before.
//!
//! If even the reserve's room is gone (something else took it), raft stands still in the middle of its `Ready` until the write succeeds: to the
//! others the replica is then as good as dead, and it has promised nothing. A sync that fails is never tried again, whatever the reason.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use raft::StateRole;
use raft::eraftpb::{Message, MessageType};

use super::disk::{self, Disk, failed};
use super::driver::{Driver, Stop, disk_failure};
use super::handle::Input;
use super::{DiskError, ProposeError, StateMachine};

/// Between two looks whether there is room again. A look writes as much of the reserve as fits: rare enough to cost a disk nothing,
/// often enough that an operator who has made room sees writes taken at once.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Pause between two attempts to write what raft waits for.
pub(super) const FULL_PAUSE: Duration = Duration::from_millis(100);
/// The reserve is written in steps of this many bytes.
const STEP_BYTES: usize = 1 << 20;

/// The reserve, and whether the disk is full.
pub(super) struct Room {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    bytes: u64,
    /// The reserve file exists.
    held: bool,
    /// When it was last looked whether there is room again.
    looked: Option<Instant>,
    /// No entries are taken.
    pub full: bool,
}

impl Room {
    /// Makes the reserve in `dir`, or takes over the one that is there. A disk that has no room for it is full.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, bytes: u64) -> Result<Self, DiskError> {
        let mut room = Self { disk, path: dir.join("reserve"), bytes, held: false, looked: None, full: true };
        room.refill()?;
        Ok(room)
    }

    /// Gives the room up. False: it was given up before.
    fn release(&mut self) -> bool {
        self.full = true;
        let released = self.held && self.disk.remove(&self.path).is_ok();
        self.held = false;
        released
    }

    /// Makes the reserve again if there is room; the disk is then not full any more.
    fn refill(&mut self) -> Result<(), DiskError> {
        match self.write() {
            Ok(()) => (self.held, self.full) = (true, false),
            Err(error) if error.full() => disk::discard(self.disk.as_ref(), &self.path),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn write(&self) -> Result<(), DiskError> {
        if self.disk.open(&self.path).and_then(|file| file.size()).is_ok_and(|len| len == self.bytes) {
            return Ok(());
        }
        let file = self.disk.create(&self.path).map_err(failed("create", &self.path))?;
        let zeros = vec![0; STEP_BYTES.min(self.bytes as usize)];
        let mut at = 0;
        while at < self.bytes {
            let step = zeros.len().min((self.bytes - at) as usize);
            file.write_at(&zeros[..step], at).map_err(failed("reserve room in", &self.path))?;
            at += step as u64;
        }
        Ok(())
    }
}

impl<M: StateMachine> Driver<M> {
    /// After this, a write that failed may be tried again; an error if that would be wrong.
    pub fn make_room(&mut self, error: DiskError) -> Result<(), Stop> {
        if !error.full() {
            return Err(disk_failure(error).into());
        }
        if !self.room.full {
            tracing::error!(id = self.config.id, %error, "the disk is full: no writes are taken");
        }
        if self.room.release() {
            self.shared.full.store(true, Ordering::Relaxed);
            return Ok(());
        }
        self.stand_still()
    }

    /// Nothing can be done with raft now, so everybody who asks is told, for a moment.
    fn stand_still(&mut self) -> Result<(), Stop> {
        self.shared.full.store(true, Ordering::Relaxed);
        self.publish();
        // The others will elect a leader who may commit what waits here, or not.
        self.clients.lose_proposals();
        self.clients.answer();
        let until = Instant::now() + self.full_pause;
        loop {
            match self.inputs.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Input::Propose { reply, .. }) => self.clients.refuse(reply, ProposeError::DiskFull),
                Ok(Input::Read { reply }) => self.clients.wait_for_read(reply),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Ok(()),
                Err(RecvTimeoutError::Disconnected) => return Err(Stop::Asked),
            }
            self.clients.refuse_reads(&ProposeError::DiskFull);
            self.clients.answer();
            if self.halted() {
                return Err(Stop::Asked);
            }
        }
    }

    /// While the disk is full: gives leadership away, and looks whether there is room again.
    pub fn watch_room(&mut self) -> Result<(), Stop> {
        let looked = self.room.looked.is_some_and(|then| self.now.saturating_duration_since(then) < LOOK_INTERVAL);
        if !self.room.full || looked {
            return Ok(());
        }
        self.room.looked = Some(self.now);
        self.room.refill().map_err(disk_failure)?;
        self.shared.full.store(self.room.full, Ordering::Relaxed);
        if !self.room.full {
            tracing::info!(id = self.config.id, "there is room on the disk again: writes are taken");
        } else if let (StateRole::Leader, Some(heir)) = (self.node.raft.state, self.heir()) {
            self.node.transfer_leader(heir);
        }
        Ok(())
    }

    /// The other voter that is alive and has most of the log.
    fn heir(&self) -> Option<u64> {
        let prs = self.node.raft.prs();
        let voters = prs.conf().voters();
        let others = prs.iter().filter(|(id, p)| **id != self.config.id && p.recent_active && voters.contains(**id));
        others.max_by_key(|(id, p)| (p.matched, **id)).map(|(id, _)| *id)
    }

    /// Whether a peer's message would have to be persisted as more than a vote or a term, for which there is no room.
    pub fn has_no_room_for(&self, message: &Message) -> bool {
        self.room.full && message.get_msg_type() == MessageType::MsgAppend && !message.entries.is_empty()
    }
}
