//! The replica's log: entries in memory, every change durable in the [`Wal`] before it counts, and a snapshot for what
//! was compacted away. This is what raft-rs reads through its `Storage` trait.
//!
//! On disk, one record holds all that one `Ready` persists: entries (an entry replaces whatever the log held from its
//! index on) and then the hard state. The commit index alone is never worth a write; it rides along with the next.
//!
//! Compaction has two long parts, which `background` does while the log goes on: the snapshot is written under a temporary
//! name ([`Store::adopt_snapshot`] gives it its own), then the entries behind it into a fresh segment ([`Store::begin_rotation`]), which takes over
//! together with the records that were appended meanwhile ([`Store::finish_rotation`]).

use std::cell::Cell;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use raft::eraftpb::{Entry, EntryType, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, StorageError};

use super::codec::{Reader, put_bytes, put_u64};
use super::disk::{self, Disk, Lock, failed};
use super::members::{Members, Step};
use super::snapshot::{self, Meta, Saved};
use super::wal::{Identity, LogPoint, Recovered, Wal, corrupt};
use super::{DiskError, LogLimits, RaftStartError, SNAPSHOT_BYTES_MAX};

/// Records of a fresh segment are closed at about this size.
const RECORD_BYTES_AIM: usize = 8 << 20;
/// Bytes of entries kept behind a snapshot at most, however many entries [`LogLimits`] would keep.
const KEPT_BYTES_MAX: usize = 64 << 20;

/// The log of one replica; see the module.
pub(super) struct Store {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    owner: Identity,
    wal: Wal,
    hard: HardState,
    /// The entry before `entries[0]`.
    base: LogPoint,
    entries: VecDeque<Entry>,
    /// The last entry inside the snapshot file; index 0 without one.
    snapshot: LogPoint,
    /// The members then; nobody without a snapshot, when all changes are in the log.
    snapshot_members: Members,
    /// A replica that is no member in our snapshot needs one.
    snapshot_wanted: Cell<bool>,
    /// Bytes appended since the last compaction.
    grown_bytes: u64,
    /// The segment that is being made, and what has been appended since it was begun.
    rotation: Option<(u64, Vec<Vec<u8>>)>,
    /// Number of the next segment.
    next_seq: u64,
    /// Held as long as the store lives: one process per directory.
    _lock: Lock,
}

/// All that a fresh segment is made of; see [`Store::begin_rotation`].
pub(super) struct Rotation {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    owner: Identity,
    seq: u64,
    base: LogPoint,
    entries: Vec<Entry>,
    hard: HardState,
}

impl Rotation {
    /// Writes the segment under a temporary name. Takes as long as its bytes do: not for the replica's thread, unless they are few.
    pub fn write(self) -> Result<Wal, DiskError> {
        let records = records_of(&self.entries, self.base, &self.hard);
        Wal::draft(&self.disk, &self.dir, self.seq, &self.owner, self.base, &records)
    }
}

impl Store {
    /// Opens the log in `dir`, or creates one that begins with `founders`, if there are any; also gives the snapshot's data, from
    /// which the state machine restarts.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        mut owner: Identity,
        founders: &[u64],
    ) -> Result<(Self, Option<Vec<u8>>), RaftStartError> {
        disk.create_dir_all(dir).map_err(failed("create", dir))?;
        let lock = lock(disk.as_ref(), dir)?;
        let recovered = Wal::recover(&disk, dir, &owner)?;
        owner.log = recovered.as_ref().map_or(0, |recovered| recovered.log);
        let saved = Saved::open(disk.as_ref(), dir, &owner)?;
        let Recovered { wal, base, bodies, .. } = match recovered {
            Some(recovered) => recovered,
            None if saved.is_some() => return Err(corrupt(dir, 0, "there is a snapshot but no log")),
            None => create(&disk, dir, &mut owner, founders)?,
        };
        let Meta { at, members: snapshot_members } = saved.as_ref().map(|saved| saved.meta.clone()).unwrap_or_default();
        let mut store = Self {
            disk,
            dir: dir.to_path_buf(),
            owner,
            next_seq: wal.seq() + 1,
            wal,
            hard: HardState::default(),
            base,
            entries: VecDeque::new(),
            snapshot: at,
            snapshot_members,
            snapshot_wanted: Cell::new(false),
            grown_bytes: 0,
            rotation: None,
            _lock: lock,
        };
        for body in bodies {
            store.grown_bytes += body.len() as u64;
            store.replay(&body).ok_or_else(|| corrupt(dir, 0, "a log record does not follow from those before it"))?;
        }
        store.reconcile()?;
        let data = saved.map(|saved| saved.data()).transpose()?;
        Ok((store, data))
    }

    /// Takes one record back in. `None`: it is impossible after what came before.
    fn replay(&mut self, body: &[u8]) -> Option<()> {
        let (entries, hard) = decode_record(body)?;
        for entry in entries {
            if entry.index <= self.base.index || entry.index > self.last().index + 1 {
                return None;
            }
            self.put(entry);
        }
        self.hard = hard;
        (self.hard.commit <= self.last().index).then_some(())
    }

    /// Brings log and snapshot together: a crash can fall between the two files' updates.
    fn reconcile(&mut self) -> Result<(), RaftStartError> {
        let at = self.snapshot;
        if at.index < self.base.index {
            return Err(corrupt(&self.dir, 0, "the log begins after the snapshot's end"));
        }
        if at.index == 0 {
            return Ok(());
        }
        if self.term_at(at.index) != Some(at.term) {
            if self.hard.commit > at.index {
                return Err(corrupt(&self.dir, 0, "the snapshot is not of this log, which has committed entries behind it"));
            }
            // The snapshot came from the leader and the log it replaces was not dropped yet.
            self.restart_at(at)?;
        }
        self.hard.commit = self.hard.commit.max(at.index);
        if self.hard.term < at.term {
            self.hard.term = at.term;
            self.hard.vote = 0;
        }
        Ok(())
    }

    /// Writes entries and the hard state to the file; they survive a crash after [`Store::sync`]. When the disk is full it may be tried
    /// again with the same.
    pub fn write(&mut self, entries: &[Entry], hard: Option<&HardState>) -> Result<(), DiskError> {
        let record = encode_record(entries, hard.unwrap_or(&self.hard));
        self.wal.write(&record)?;
        self.hard = hard.unwrap_or(&self.hard).clone();
        self.grown_bytes += record.len() as u64;
        if let Some((_, since)) = &mut self.rotation {
            since.push(record);
        }
        for entry in entries {
            self.put(entry.clone());
        }
        Ok(())
    }

    /// Makes durable what was written.
    pub fn sync(&mut self) -> Result<(), DiskError> {
        self.wal.sync()
    }

    /// Notes a new commit index, which needs no write of its own.
    pub fn note_commit(&mut self, commit: u64) {
        self.hard.commit = self.hard.commit.max(commit);
    }

    /// Takes over a snapshot that the leader sent and that lies under a temporary name: file first, then a log that begins behind it.
    /// When the disk is full it may be tried again.
    pub fn install(&mut self, meta: &Meta, file: &Path, hard: Option<&HardState>) -> Result<(), DiskError> {
        let at = meta.at;
        if self.snapshot != at {
            snapshot::adopt(self.disk.as_ref(), &self.dir, file)?;
            (self.snapshot, self.snapshot_members) = (at, meta.members.clone());
        }
        if let Some(hard) = hard {
            self.hard = hard.clone();
        }
        self.hard.commit = self.hard.commit.max(at.index);
        self.restart_at(at)
    }

    /// Whether `applied` is far enough ahead of the last snapshot to take another.
    pub fn wants_snapshot(&self, applied: u64, limits: &LogLimits) -> bool {
        let behind = applied.saturating_sub(self.snapshot.index);
        let grown = behind >= limits.entries_max || self.grown_bytes >= limits.bytes_max || self.snapshot_wanted.get();
        self.rotation.is_none() && behind > 0 && grown
    }

    /// What a snapshot of the state after entry `applied`, with the members then, says of itself, and whose it is.
    pub fn describe(&self, applied: u64, members: Members) -> (Identity, Meta) {
        let term = self.term_at(applied).expect("an applied entry is in the log or ends the snapshot");
        (self.owner.clone(), Meta { at: LogPoint { index: applied, term }, members })
    }

    /// Makes a finished file the snapshot and drops the log before it, all but the `kept` newest entries. False: there is a newer one.
    pub fn adopt_snapshot(&mut self, meta: &Meta, file: &Path, kept: u64) -> Result<bool, DiskError> {
        let at = meta.at;
        if at.index <= self.snapshot.index {
            disk::discard(self.disk.as_ref(), file);
            return Ok(false);
        }
        snapshot::adopt(self.disk.as_ref(), &self.dir, file)?;
        (self.snapshot, self.snapshot_members) = (at, meta.members.clone());
        self.snapshot_wanted.set(false);
        let mut bytes = 0;
        let count = (at.index - self.base.index) as usize;
        let fits = |entry: &&Entry| {
            bytes += entry.data.len();
            bytes <= KEPT_BYTES_MAX
        };
        let kept = self.entries.range(..count).rev().take(kept as usize).take_while(fits).count();
        let cut = at.index - kept as u64;
        let base = LogPoint { index: cut, term: self.term_at(cut).expect("the cut lies within the log") };
        self.entries.drain(..(cut - self.base.index) as usize);
        self.base = base;
        Ok(true)
    }

    /// What a fresh segment of the log as it is now is made of. Until [`Store::finish_rotation`] the old one goes on.
    pub fn begin_rotation(&mut self) -> Rotation {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.grown_bytes = 0;
        self.rotation = Some((seq, Vec::new()));
        let (disk, dir, owner) = (self.disk.clone(), self.dir.clone(), self.owner.clone());
        let entries = self.entries.iter().cloned().collect();
        Rotation { disk, dir, owner, seq, base: self.base, entries, hard: self.hard.clone() }
    }

    /// The fresh segment is written: it gets what was appended meanwhile, and takes over. One that is not awaited any more is removed.
    pub fn finish_rotation(&mut self, mut fresh: Wal) -> Result<(), DiskError> {
        match self.rotation.take() {
            Some((seq, since)) if seq == fresh.seq() => {
                let written = since.iter().try_for_each(|record| fresh.write(record));
                if let Err(error) = written {
                    fresh.remove()?;
                    return Err(error);
                }
                fresh.sync()?;
                fresh.publish()?;
                std::mem::replace(&mut self.wal, fresh).remove()
            }
            other => {
                self.rotation = other;
                fresh.remove()
            }
        }
    }

    /// The fresh segment could not be written: the old one stays.
    pub fn abandon_rotation(&mut self) {
        self.rotation = None;
    }

    /// Drops the whole log. What is not written yet of a rotation has no use any more.
    fn restart_at(&mut self, at: LogPoint) -> Result<(), DiskError> {
        self.rotation = None;
        self.base = at;
        self.entries.clear();
        let fresh = self.begin_rotation().write()?;
        self.finish_rotation(fresh)
    }

    /// Puts an entry at its index, dropping what was there and behind it.
    fn put(&mut self, entry: Entry) {
        let at = entry.index.checked_sub(self.base.index + 1).expect("raft never rewrites compacted entries") as usize;
        assert!(at <= self.entries.len(), "raft persists entries without gaps");
        self.entries.truncate(at);
        self.entries.push_back(entry);
    }

    fn term_at(&self, index: u64) -> Option<u64> {
        match index.checked_sub(self.base.index)? {
            0 => Some(self.base.term),
            n => self.entries.get(n as usize - 1).map(|e| e.term),
        }
    }

    /// The last entry of the log.
    pub fn last(&self) -> LogPoint {
        self.entries.back().map_or(self.base, |e| LogPoint { index: e.index, term: e.term })
    }

    /// Index of the first entry in the log.
    pub fn first_index(&self) -> u64 {
        self.base.index + 1
    }

    /// Last entry inside the snapshot file; 0 without one.
    pub fn snapshot_index(&self) -> u64 {
        self.snapshot.index
    }

    /// The log's identity.
    pub fn log(&self) -> u128 {
        self.owner.log
    }
}

impl raft::Storage for Store {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard.clone(), self.snapshot_members.conf_state()))
    }

    fn entries(&self, low: u64, high: u64, max_size: impl Into<Option<u64>>, _: GetEntriesContext) -> raft::Result<Vec<Entry>> {
        if low <= self.base.index {
            return Err(StorageError::Compacted.into());
        }
        if high > self.last().index + 1 {
            return Err(StorageError::Unavailable.into());
        }
        let max_bytes = max_size.into().unwrap_or(u64::MAX);
        let mut bytes = 0;
        let range = (low - self.base.index - 1) as usize..(high - self.base.index - 1) as usize;
        let fits = |entry: &&Entry| {
            let first = bytes == 0;
            bytes += (entry.data.len() + entry.context.len() + 32) as u64;
            first || bytes <= max_bytes
        };
        Ok(self.entries.range(range).take_while(fits).cloned().collect())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        let missing = if index < self.base.index { StorageError::Compacted } else { StorageError::Unavailable };
        self.term_at(index).ok_or_else(|| missing.into())
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.base.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last().index)
    }

    /// Only says which snapshot there is: `ship` sends the file.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let unavailable = || raft::Error::from(StorageError::SnapshotTemporarilyUnavailable);
        let saved = Saved::open(self.disk.as_ref(), &self.dir, &self.owner);
        let saved = saved.inspect_err(|error| tracing::error!(%error, to, "the snapshot cannot be read"));
        // raft does not take a snapshot in which it is no member: the next one will do.
        let fits = |saved: &Saved| saved.meta.at.index >= request_index && saved.meta.members.contains(to);
        let Some(saved) = saved.ok().flatten().filter(fits) else {
            self.snapshot_wanted.set(true);
            return Err(unavailable());
        };
        if saved.total > SNAPSHOT_BYTES_MAX {
            tracing::error!(to, bytes = saved.total, "the snapshot is too large to be sent");
            return Err(unavailable());
        }
        let mut snapshot = Snapshot::default();
        let meta = snapshot.mut_metadata();
        meta.index = saved.meta.at.index;
        meta.term = saved.meta.at.term;
        meta.set_conf_state(saved.meta.members.conf_state());
        Ok(snapshot)
    }
}

/// A new log with an identity of its own. Founders begin with the same entry, which all of them take for committed.
fn create(disk: &Arc<dyn Disk>, dir: &Path, owner: &mut Identity, founders: &[u64]) -> Result<Recovered, DiskError> {
    owner.log = disk::random_name(disk.as_ref());
    let mut bodies = Vec::new();
    if !founders.is_empty() {
        let mut entry = Entry { index: 1, term: 1, ..Default::default() };
        entry.set_entry_type(EntryType::EntryConfChangeV2);
        entry.data = Step::Found(founders.to_vec()).encode(&[]).into();
        bodies.push(encode_record(&[entry], &HardState { term: 1, commit: 1, ..Default::default() }));
    }
    let wal = Wal::create(disk, dir, 1, owner, LogPoint::default(), &bodies)?;
    Ok(Recovered { wal, log: owner.log, base: LogPoint::default(), bodies })
}

fn lock(disk: &dyn Disk, dir: &Path) -> Result<Lock, RaftStartError> {
    let path = dir.join("lock");
    let lock = disk.lock(&path).map_err(failed("lock", &path))?;
    lock.ok_or_else(|| RaftStartError::Locked { dir: dir.to_path_buf() })
}

/// The records of a segment that begins behind `base`.
fn records_of(entries: &[Entry], base: LogPoint, hard: &HardState) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    let (mut from, mut bytes) = (0, 0);
    // The commit index may point behind the entries of the first records, so only the last one carries it.
    let early = HardState { commit: base.index, ..hard.clone() };
    for (at, entry) in entries.iter().enumerate() {
        bytes += entry.data.len();
        if bytes >= RECORD_BYTES_AIM {
            records.push(encode_record(&entries[from..=at], &early));
            (from, bytes) = (at + 1, 0);
        }
    }
    records.push(encode_record(&entries[from..], hard));
    records
}

pub(super) fn encode_record(entries: &[Entry], hard: &HardState) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + entries.iter().map(|e| e.data.len() + 64).sum::<usize>());
    for value in [hard.term, hard.vote, hard.commit, entries.len() as u64] {
        put_u64(&mut out, value);
    }
    for entry in entries {
        put_u64(&mut out, entry.index);
        put_u64(&mut out, entry.term);
        out.push(u8::from(entry.get_entry_type() == EntryType::EntryConfChangeV2));
        put_bytes(&mut out, &entry.context);
        put_bytes(&mut out, &entry.data);
    }
    out
}

fn decode_record(body: &[u8]) -> Option<(Vec<Entry>, HardState)> {
    let mut reader = Reader(body);
    let hard = HardState { term: reader.u64()?, vote: reader.u64()?, commit: reader.u64()?, ..Default::default() };
    let mut entries = Vec::new();
    for _ in 0..reader.u64()? {
        let mut entry = Entry { index: reader.u64()?, term: reader.u64()?, ..Default::default() };
        entry.set_entry_type([EntryType::EntryNormal, EntryType::EntryConfChangeV2].get(usize::from(reader.u8()?)).copied()?);
        entry.context = reader.bytes()?.to_vec().into();
        entry.data = reader.bytes()?.to_vec().into();
        entries.push(entry);
    }
    reader.0.is_empty().then_some((entries, hard))
}
