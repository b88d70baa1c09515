//! The long parts of compaction, on threads of their own: the state machine's view to bytes to a file, and the log behind it to a fresh
//! segment. A replica of 10 million blocks takes seconds for either, and would lose its leadership while its thread did.
//!
//! Jobs only write under temporary names. What a job has made counts when the replica's thread takes it up ([`Done`]); one that is late finds
//! that nobody waits, and its file is removed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use raft::SnapshotStatus;
use raft::eraftpb::Message;

use super::disk::{self, Disk};
use super::driver::{Driver, Stop, disk_failure, panic_text};
use super::members::Members;
use super::snapshot::{self, Meta};
use super::storage::Rotation;
use super::wal::{Identity, Wal};
use super::{DiskError, RaftFailure, StateMachine};

/// Wait after a compaction for which the disk had no room: each try encodes the whole state.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// A piece of work.
pub(super) type Job = Box<dyn FnOnce() + Send>;
/// Runs a piece of work on another thread.
pub(super) type Spawn = Arc<dyn Fn(Job) + Send + Sync>;

/// What other threads have done for the replica's, which looks at the start of each round.
pub(super) enum Done<S> {
    /// The state that `meta` tells of is in a finished file.
    Saved { meta: Meta, file: PathBuf, result: Result<u64, DiskError> },
    /// A fresh segment is written.
    Rotated(Result<Wal, DiskError>),
    /// A peer's snapshot lies in a finished file and has been read.
    Received(Received<S>),
    /// A snapshot for `peer` has arrived there, or will not.
    Sent { peer: u64, status: SnapshotStatus },
    /// A job came to grief.
    Panicked(String),
}

/// A snapshot that came from a peer, checked whole.
pub(super) struct Received<S> {
    pub peer: u64,
    /// What raft is told: a `MsgSnapshot` without data.
    pub message: Message,
    pub state: S,
    pub file: PathBuf,
}

/// What the replica's thread knows of the jobs.
pub(super) struct Background<S> {
    pub spawn: Spawn,
    pub tell: Sender<Done<S>>,
    pub done: mpsc::Receiver<Done<S>>,
    /// A compaction is under way.
    busy: bool,
    /// Before then none is begun.
    not_before: Option<Instant>,
}

impl<S: Send + 'static> Background<S> {
    pub fn new(spawn: Spawn) -> Self {
        let (tell, done) = mpsc::channel();
        Self { spawn, tell, done, busy: false, not_before: None }
    }

    /// Runs `work` elsewhere and tells what it gives.
    fn start(&mut self, work: impl FnOnce() -> Done<S> + Send + 'static) {
        self.busy = true;
        let tell = self.tell.clone();
        (self.spawn)(Box::new(move || {
            let done = catch_unwind(AssertUnwindSafe(work));
            // If the replica has stopped, its next start removes the file.
            let _ = tell.send(done.unwrap_or_else(|panic| Done::Panicked(panic_text(panic.as_ref()))));
        }));
    }
}

impl<M: StateMachine> Driver<M> {
    /// Begins a compaction when the log has grown and nothing is in the way.
    pub fn compact_if_due(&mut self) {
        let waits = self.background.busy || self.room.full || self.background.not_before.is_some_and(|then| self.now < then);
        if waits || !self.node.store().wants_snapshot(self.applied, &self.config.log) {
            return;
        }
        let (owner, meta) = self.node.store().describe(self.applied, Members::clone(&self.members));
        let (view, disk) = (self.machine.view(), self.disk.clone());
        let file = self.config.dir.join(format!("snapshot-{:016x}.tmp", meta.at.index));
        self.background.start(move || save::<M>(&view, disk.as_ref(), file, (&owner, &meta)));
    }

    /// Takes up what other threads have done.
    pub fn collect_done(&mut self) -> Result<(), Stop> {
        while let Ok(done) = self.background.done.try_recv() {
            match done {
                Done::Saved { meta, file, result } => self.saved(&meta, &file, result)?,
                Done::Rotated(result) => self.rotated(result)?,
                Done::Received(received) => self.take_snapshot(received)?,
                Done::Sent { peer, status } => self.node.report_snapshot(peer, status),
                Done::Panicked(text) => return Err(RaftFailure::Invariant(text).into()),
            }
        }
        Ok(())
    }

    fn saved(&mut self, meta: &Meta, file: &Path, result: Result<u64, DiskError>) -> Result<(), Stop> {
        let kept = self.config.log.entries_kept;
        let adopted = result.and_then(|bytes| Ok((bytes, self.node.mut_store().adopt_snapshot(meta, file, kept)?)));
        match adopted {
            Ok((bytes, true)) => {
                tracing::info!(id = self.config.id, applied = meta.at.index, bytes, "raft log compacted");
                let rotation: Rotation = self.node.mut_store().begin_rotation();
                self.background.start(move || Done::Rotated(rotation.write()));
                Ok(())
            }
            Ok((_, false)) => {
                self.background.busy = false;
                Ok(())
            }
            Err(error) => self.compaction_failed(error),
        }
    }

    fn rotated(&mut self, result: Result<Wal, DiskError>) -> Result<(), Stop> {
        self.background.busy = false;
        let finished = match result {
            Ok(fresh) => self.node.mut_store().finish_rotation(fresh),
            Err(error) => {
                self.node.mut_store().abandon_rotation();
                Err(error)
            }
        };
        finished.or_else(|error| self.compaction_failed(error))
    }

    /// A full disk only means that the log stays longer; any other failure stops the replica, as a failed append does.
    fn compaction_failed(&mut self, error: DiskError) -> Result<(), Stop> {
        if !error.full() {
            return Err(disk_failure(error).into());
        }
        tracing::warn!(id = self.config.id, %error, "the log is not compacted: the disk is full");
        self.background.busy = false;
        self.background.not_before = Some(self.now + RETRY_PAUSE);
        Ok(())
    }

    /// Gives raft a snapshot that has come whole. If raft does not want it, because it is late, nothing stays of it.
    fn take_snapshot(&mut self, received: Received<M::State>) -> Result<(), Stop> {
        let (peer, message) = (received.peer, received.message.clone());
        let file = received.file.clone();
        self.received = Some(received);
        self.step(peer, message);
        self.handle_readies()?;
        if self.received.take().is_some() {
            disk::discard(self.disk.as_ref(), &file);
        }
        Ok(())
    }
}

fn save<M: StateMachine>(view: &M::State, disk: &dyn Disk, file: PathBuf, (owner, meta): (&Identity, &Meta)) -> Done<M::State> {
    let data = M::encode(view);
    let result = snapshot::write(disk, file.clone(), owner, meta, &data).map(|()| data.len() as u64);
    Done::Saved { meta: meta.clone(), file, result }
}
