//! The replica's log: entries in memory, every change durable in the [`Wal`] before it counts, and a snapshot for what
//! was compacted away. This is what raft-rs reads through its `Storage` trait.
//!
//! On disk, one record holds all that one `Ready` persists: entries (an entry replaces whatever the log held from its
//! index on) and then the hard state. The commit index alone is never worth a write; it rides along with the next.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use raft::eraftpb::{Entry, EntryType, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, StorageError};

use super::codec::{Reader, put_bytes, put_u64};
use super::members::{Members, Step};
use super::wal::{Identity, LogPoint, Recovered, Wal, corrupt, disk};
use super::{DiskError, LogLimits, RaftStartError, SNAPSHOT_BYTES_MAX, snapshot};

/// Records of a fresh segment are closed at about this size.
const RECORD_BYTES_AIM: usize = 8 << 20;

/// The log of one replica; see the module.
pub(super) struct Store {
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
    /// Held as long as the store lives: one process per directory.
    _lock: File,
}

impl Store {
    /// Opens the log in `dir`, or creates one that begins with `founders`, if there are any; also gives the snapshot's data, from
    /// which the state machine restarts.
    pub fn open(dir: &Path, mut owner: Identity, founders: &[u64]) -> Result<(Self, Option<Vec<u8>>), RaftStartError> {
        fs::create_dir_all(dir).map_err(disk("create", dir))?;
        let lock = lock(dir)?;
        let recovered = Wal::recover(dir, &owner)?;
        owner.log = recovered.as_ref().map_or(0, |recovered| recovered.log);
        let found = snapshot::load(dir, &owner)?;
        let Recovered { wal, base, bodies, .. } = match recovered {
            Some(recovered) => recovered,
            None if found.is_some() => return Err(corrupt(dir, 0, "there is a snapshot but no log")),
            None => create(dir, &mut owner, founders)?,
        };
        let (at, snapshot_members, data) = found.map_or_else(Default::default, |(at, members, data)| (at, members, Some(data)));
        let mut store = Self {
            dir: dir.to_path_buf(),
            owner,
            wal,
            hard: HardState::default(),
            base,
            entries: VecDeque::new(),
            snapshot: at,
            snapshot_members,
            snapshot_wanted: Cell::new(false),
            grown_bytes: 0,
            _lock: lock,
        };
        for body in bodies {
            store.grown_bytes += body.len() as u64;
            store.replay(&body).ok_or_else(|| corrupt(dir, 0, "a log record does not follow from those before it"))?;
        }
        store.reconcile()?;
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

    /// Makes entries and the hard state durable: on return they survive a crash.
    pub fn persist(&mut self, entries: Vec<Entry>, hard: Option<&HardState>) -> Result<(), DiskError> {
        if let Some(hard) = hard {
            self.hard = hard.clone();
        }
        let record = encode_record(&entries, &self.hard);
        self.wal.append(&record)?;
        self.grown_bytes += record.len() as u64;
        for entry in entries {
            self.put(entry);
        }
        Ok(())
    }

    /// Notes a new commit index, which needs no write of its own.
    pub fn note_commit(&mut self, commit: u64) {
        self.hard.commit = self.hard.commit.max(commit);
    }

    /// Takes over a snapshot that the leader sent: file first, then a log that begins behind it.
    pub fn install(&mut self, at: LogPoint, members: Members, data: &[u8], hard: Option<&HardState>) -> Result<(), DiskError> {
        snapshot::save(&self.dir, &self.owner, at, &members, data)?;
        (self.snapshot, self.snapshot_members) = (at, members);
        if let Some(hard) = hard {
            self.hard = hard.clone();
        }
        self.hard.commit = self.hard.commit.max(at.index);
        self.restart_at(at)
    }

    /// Whether `applied` is far enough ahead of the last snapshot to take another.
    pub fn wants_snapshot(&self, applied: u64, limits: &LogLimits) -> bool {
        let behind = applied.saturating_sub(self.snapshot.index);
        behind > 0 && (behind >= limits.entries_max || self.grown_bytes >= limits.bytes_max || self.snapshot_wanted.get())
    }

    /// Saves the state after entry `applied`, with the members then, and drops the log before it, all but the `kept` newest entries.
    pub fn compact(&mut self, applied: u64, members: Members, data: &[u8], kept: u64) -> Result<(), DiskError> {
        let term = self.term_at(applied).expect("an applied entry is in the log or ends the snapshot");
        let at = LogPoint { index: applied, term };
        snapshot::save(&self.dir, &self.owner, at, &members, data)?;
        (self.snapshot, self.snapshot_members) = (at, members);
        self.snapshot_wanted.set(false);
        let cut = applied.saturating_sub(kept).max(self.base.index);
        let base = LogPoint { index: cut, term: self.term_at(cut).expect("the cut lies within the log") };
        self.entries.drain(..(cut - self.base.index) as usize);
        self.base = base;
        self.rotate()
    }

    fn restart_at(&mut self, at: LogPoint) -> Result<(), DiskError> {
        self.base = at;
        self.entries.clear();
        self.rotate()
    }

    fn rotate(&mut self) -> Result<(), DiskError> {
        let mut records = Vec::new();
        let (mut batch, mut bytes) = (Vec::new(), 0);
        // The commit index may point behind the entries of the first records, so only the last one carries it.
        let early = HardState { commit: self.base.index, ..self.hard.clone() };
        for entry in &self.entries {
            bytes += entry.data.len();
            batch.push(entry.clone());
            if bytes >= RECORD_BYTES_AIM {
                records.push(encode_record(&batch, &early));
                (batch, bytes) = (Vec::new(), 0);
            }
        }
        records.push(encode_record(&batch, &self.hard));
        self.grown_bytes = 0;
        self.wal.rotate(&self.owner, self.base, &records)
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

    /// Read from its file each time: it is rarely asked for, and may be large.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let unavailable = || raft::Error::from(StorageError::SnapshotTemporarilyUnavailable);
        let loaded = snapshot::load(&self.dir, &self.owner);
        let loaded = loaded.inspect_err(|error| tracing::error!(%error, to, "the snapshot cannot be read"));
        let (at, members, data) = match loaded.ok().flatten() {
            // raft does not take a snapshot in which it is no member: the next one will do.
            Some((at, members, data)) if at.index >= request_index && members.contains(to) => (at, members, data),
            _ => {
                self.snapshot_wanted.set(true);
                return Err(unavailable());
            }
        };
        if data.len() > SNAPSHOT_BYTES_MAX {
            tracing::error!(to, bytes = data.len(), "the snapshot is too large to be sent");
            return Err(unavailable());
        }
        let mut snapshot = Snapshot { data: data.into(), ..Default::default() };
        let meta = snapshot.mut_metadata();
        meta.index = at.index;
        meta.term = at.term;
        meta.set_conf_state(members.conf_state());
        Ok(snapshot)
    }
}

/// A new log with an identity of its own. Founders begin with the same entry, which all of them take for committed.
fn create(dir: &Path, owner: &mut Identity, founders: &[u64]) -> Result<Recovered, DiskError> {
    owner.log = rand::random();
    let mut bodies = Vec::new();
    if !founders.is_empty() {
        let mut entry = Entry { index: 1, term: 1, ..Default::default() };
        entry.set_entry_type(EntryType::EntryConfChangeV2);
        entry.data = Step::Found(founders.to_vec()).encode(&[]).into();
        bodies.push(encode_record(&[entry], &HardState { term: 1, commit: 1, ..Default::default() }));
    }
    let wal = Wal::create(dir, 1, owner, LogPoint::default(), &bodies)?;
    Ok(Recovered { wal, log: owner.log, base: LogPoint::default(), bodies })
}

fn lock(dir: &Path) -> Result<File, RaftStartError> {
    let path = dir.join("lock");
    let file = File::create(&path).map_err(disk("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(RaftStartError::Locked { dir: dir.to_path_buf() }),
        Err(TryLockError::Error(source)) => Err(disk("lock", &path)(source).into()),
    }
}

fn encode_record(entries: &[Entry], hard: &HardState) -> Vec<u8> {
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
