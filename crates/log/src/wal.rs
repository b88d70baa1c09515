//! The log file: checksummed records that are durable when [`Wal::sync`] returns.
//!
//! A segment is `header | record*`, followed by zeros written ahead so that a sync does not have to change the file's
//! size. One record is everything one `Ready` has to persist, and each is synced before the next is written: after a crash
//! only the last record can be incomplete. So a bad record with a good one behind it is damage, and is refused;
//! a bad record at the end is a torn write that was never acknowledged, and is cut. Record heads are bound to their
//! segment and offset by a salted checksum, so bytes inside a command can never pass for a record.
//!
//! What the records mean is decided in `storage`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::codec::{Reader, put_bytes, put_u64};
use super::disk::{self, Disk, DiskFile, failed};
use super::{DiskError, RaftStartError};

/// Largest body of one record, in bytes; far above what one `Ready` can hold.
const RECORD_BYTES_MAX: usize = 1 << 30;
/// Zeros are written ahead in steps of this many bytes.
const CHUNK_BYTES: usize = 1 << 20;
const MAGIC: &[u8; 8] = b"MRRAFTWL";
const VERSION: u8 = 2;
/// `body length | checksum of the body | checksum of salt, offset and the two before`, four bytes each.
const HEAD_BYTES: usize = 12;

/// Whose data a file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub cluster_id: String,
    pub node: u64,
    /// Drawn when the log is created; 0: whatever the disk says.
    pub log: u128,
}

impl Identity {
    /// Appends the identity to a file header.
    pub fn put(&self, out: &mut Vec<u8>) {
        put_bytes(out, self.cluster_id.as_bytes());
        put_u64(out, self.node);
        put_u64(out, self.log as u64);
        put_u64(out, (self.log >> 64) as u64);
    }

    /// Reads what [`Identity::put`] wrote.
    pub fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let cluster_id = String::from_utf8(reader.bytes()?.to_vec()).ok()?;
        let node = reader.u64()?;
        let log = u128::from(reader.u64()?) | u128::from(reader.u64()?) << 64;
        Some(Self { cluster_id, node, log })
    }

    /// Refuses data of another cluster, another replica, or another log of the same.
    pub fn expect(&self, found: Self) -> Result<(), RaftStartError> {
        if found.cluster_id != self.cluster_id {
            return Err(RaftStartError::OtherCluster { found: found.cluster_id, expected: self.cluster_id.clone() });
        }
        if found.node != self.node {
            return Err(RaftStartError::OtherNode { found: found.node, expected: self.node });
        }
        if self.log != 0 && found.log != self.log {
            return Err(RaftStartError::OtherLog);
        }
        Ok(())
    }
}

/// Place of an entry in the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LogPoint {
    pub index: u64,
    pub term: u64,
}

/// One open segment, written at its end.
pub(super) struct Wal {
    disk: Arc<dyn Disk>,
    file: Box<dyn DiskFile>,
    path: PathBuf,
    seq: u64,
    salt: u64,
    /// Where the next record goes.
    end: u64,
    /// Zeros reach to here.
    zeroed: u64,
    buffer: Vec<u8>,
    /// A write failed in a way that leaves unknown what is on disk.
    broken: bool,
}

/// What a directory's newest segment held.
pub(super) struct Recovered {
    pub wal: Wal,
    /// The log's identity.
    pub log: u128,
    /// The entry before the segment's first.
    pub base: LogPoint,
    /// Record bodies, oldest first.
    pub bodies: Vec<Vec<u8>>,
}

impl Wal {
    /// Makes segment `seq` with the given records, durably and all at once: a crash leaves all of it or nothing.
    pub fn create(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        seq: u64,
        owner: &Identity,
        base: LogPoint,
        bodies: &[Vec<u8>],
    ) -> Result<Self, DiskError> {
        let mut wal = Self::draft(disk, dir, seq, owner, base, bodies)?;
        wal.publish()?;
        Ok(wal)
    }

    /// Makes segment `seq` under a temporary name, synced: [`Wal::publish`] makes it the newest of its directory.
    pub fn draft(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        seq: u64,
        owner: &Identity,
        base: LogPoint,
        bodies: &[Vec<u8>],
    ) -> Result<Self, DiskError> {
        let path = segment_path(dir, seq).with_extension(TEMPORARY);
        let salt = disk.random();
        let mut bytes = encode_header(seq, salt, owner, base);
        for body in bodies {
            let at = bytes.len() as u64;
            push_record(&mut bytes, at, salt, body);
        }
        let file = disk.create(&path).map_err(failed("create", &path))?;
        let end = bytes.len() as u64;
        let written = file.write_at(&bytes, 0).map_err(failed("write", &path)).and_then(|()| disk::sync(file.as_ref(), &path));
        written.inspect_err(|_| disk::discard(disk.as_ref(), &path))?;
        Ok(Self { disk: disk.clone(), file, path, seq, salt, end, zeroed: end, buffer: Vec::new(), broken: false })
    }

    /// Gives a drafted segment its name.
    pub fn publish(&mut self) -> Result<(), DiskError> {
        let path = self.path.with_extension(EXTENSION);
        disk::adopt(self.disk.as_ref(), &self.path, &path)?;
        self.path = path;
        Ok(())
    }

    /// Removes the segment: another has taken its place, or it was never published.
    pub fn remove(self) -> Result<(), DiskError> {
        self.disk.remove(&self.path).map_err(failed("remove", &self.path))
    }

    /// Opens the newest segment, cuts a torn last record, and removes what a crash left over. `None` if there is none.
    pub fn recover(disk: &Arc<dyn Disk>, dir: &Path, owner: &Identity) -> Result<Option<Recovered>, RaftStartError> {
        let mut segments = list_segments(disk.as_ref(), dir)?;
        let Some((seq, path)) = segments.pop() else { return Ok(None) };
        let bytes = disk::read_all(disk.as_ref(), &path).map_err(failed("read", &path))?;
        let header = decode_header(&path, &bytes)?;
        let log = header.owner.log;
        owner.expect(header.owner)?;
        if header.seq != seq {
            return Err(corrupt(&path, 0, "the file name and the header name different segments"));
        }
        let (bodies, end) = scan(&path, &bytes, header.len, header.salt)?;
        let file = disk.open(&path).map_err(failed("open", &path))?;
        file.set_len(end as u64).map_err(failed("truncate", &path))?;
        disk::sync(file.as_ref(), &path)?;
        for (_, old) in segments {
            disk.remove(&old).map_err(failed("remove", &old))?;
        }
        let (disk, end) = (disk.clone(), end as u64);
        let wal = Self { disk, file, path, seq, salt: header.salt, end, zeroed: end, buffer: Vec::new(), broken: false };
        Ok(Some(Recovered { wal, log, base: header.base, bodies }))
    }

    /// Number of the segment.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Appends one record; it counts after [`Wal::sync`], and each is synced before the next is written. When the disk is full the record
    /// may be written again; after any other error the segment refuses every later one.
    pub fn write(&mut self, body: &[u8]) -> Result<(), DiskError> {
        assert!(!body.is_empty() && body.len() <= RECORD_BYTES_MAX, "a record holds 1 byte to 1 GiB");
        if self.broken {
            let source = std::io::Error::other("an earlier write failed");
            return Err(failed("append to", &self.path)(source));
        }
        let written = self.put(body);
        self.broken = written.as_ref().is_err_and(|error| !error.full());
        written
    }

    fn put(&mut self, body: &[u8]) -> Result<(), DiskError> {
        self.buffer.clear();
        push_record(&mut self.buffer, self.end, self.salt, body);
        let end = self.end + self.buffer.len() as u64;
        self.extend(end)?;
        self.file.write_at(&self.buffer, self.end).map_err(failed("append to", &self.path))?;
        self.end = end;
        self.zeroed = self.zeroed.max(end);
        Ok(())
    }

    /// Writes zeros ahead. If there is no room for a whole step of them, there may still be for the record.
    fn extend(&mut self, end: u64) -> Result<(), DiskError> {
        while self.zeroed < end {
            match self.file.write_at(&[0; CHUNK_BYTES], self.zeroed).map_err(failed("extend", &self.path)) {
                Ok(()) => self.zeroed += CHUNK_BYTES as u64,
                Err(error) if error.full() => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes what was written durable.
    pub fn sync(&mut self) -> Result<(), DiskError> {
        let synced = disk::sync(self.file.as_ref(), &self.path);
        self.broken |= synced.is_err();
        synced
    }
}

/// Ending of a segment's name, and of one that is not finished.
const EXTENSION: &str = "log";
const TEMPORARY: &str = "tmp";

fn segment_path(dir: &Path, seq: u64) -> PathBuf {
    dir.join(format!("wal-{seq:016x}.{EXTENSION}"))
}

/// A refusal to start on damaged data.
pub(super) fn corrupt(file: &Path, offset: usize, what: &'static str) -> RaftStartError {
    RaftStartError::Corrupt { file: file.to_path_buf(), offset: offset as u64, what }
}

struct Header {
    seq: u64,
    salt: u64,
    owner: Identity,
    base: LogPoint,
    len: usize,
}

fn encode_header(seq: u64, salt: u64, owner: &Identity, base: LogPoint) -> Vec<u8> {
    let mut body = Vec::new();
    for value in [seq, salt, base.index, base.term] {
        put_u64(&mut body, value);
    }
    owner.put(&mut body);
    let mut out = MAGIC.to_vec();
    out.push(VERSION);
    put_bytes(&mut out, &body);
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

fn decode_header(path: &Path, bytes: &[u8]) -> Result<Header, RaftStartError> {
    let damaged = || corrupt(path, 0, "the segment header is damaged");
    let mut reader = Reader(bytes);
    if reader.take(MAGIC.len()) != Some(MAGIC) {
        return Err(corrupt(path, 0, "not a raft log segment"));
    }
    if reader.u8() != Some(VERSION) {
        return Err(corrupt(path, MAGIC.len(), "a format version this program does not know"));
    }
    let mut body = Reader(reader.bytes().ok_or_else(damaged)?);
    let checked = bytes.len() - reader.0.len();
    if reader.u32() != Some(crc32fast::hash(&bytes[..checked])) {
        return Err(damaged());
    }
    let mut next = || body.u64().ok_or_else(damaged);
    let (seq, salt, index, term) = (next()?, next()?, next()?, next()?);
    let owner = Identity::read(&mut body).ok_or_else(damaged)?;
    Ok(Header { seq, salt, owner, base: LogPoint { index, term }, len: checked + 4 })
}

fn push_record(out: &mut Vec<u8>, offset: u64, salt: u64, body: &[u8]) {
    let len = u32::try_from(body.len()).expect("records are bounded below 4 GiB");
    let body_crc = crc32fast::hash(body);
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&body_crc.to_le_bytes());
    out.extend_from_slice(&head_crc(salt, offset, len, body_crc).to_le_bytes());
    out.extend_from_slice(body);
}

fn head_crc(salt: u64, offset: u64, len: u32, body_crc: u32) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&salt.to_le_bytes());
    hasher.update(&offset.to_le_bytes());
    hasher.update(&len.to_le_bytes());
    hasher.update(&body_crc.to_le_bytes());
    hasher.finalize()
}

/// Whether the head at `offset` was written there, and then the body it promises (`None` inside: damaged or cut off).
fn record_at(bytes: &[u8], offset: usize, salt: u64) -> Option<Option<&[u8]>> {
    let mut reader = Reader(bytes.get(offset..)?);
    let len = reader.u32().filter(|len| *len != 0 && *len as usize <= RECORD_BYTES_MAX)?;
    let (body_crc, head) = (reader.u32()?, reader.u32()?);
    if head != head_crc(salt, offset as u64, len, body_crc) {
        return None;
    }
    Some(reader.take(len as usize).filter(|body| crc32fast::hash(body) == body_crc))
}

/// All records from `start`, and where the good ones end. A bad record that any head follows is damage: the head
/// behind it was written only after the bad record had been synced.
fn scan(path: &Path, bytes: &[u8], start: usize, salt: u64) -> Result<(Vec<Vec<u8>>, usize), RaftStartError> {
    let (mut bodies, mut at) = (Vec::new(), start);
    while let Some(Some(body)) = record_at(bytes, at, salt) {
        bodies.push(body.to_vec());
        at += HEAD_BYTES + body.len();
    }
    let behind = at + 1..bytes.len().saturating_sub(HEAD_BYTES);
    if behind.into_iter().any(|offset| record_at(bytes, offset, salt).is_some()) {
        return Err(corrupt(path, at, "a damaged record with intact records behind it"));
    }
    Ok((bodies, at))
}

/// Segments by number, oldest first; unfinished temporary files are removed.
fn list_segments(disk: &dyn Disk, dir: &Path) -> Result<Vec<(u64, PathBuf)>, RaftStartError> {
    let mut segments = Vec::new();
    for path in disk.list(dir).map_err(failed("list", dir))? {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name.ends_with(".tmp") {
            disk.remove(&path).map_err(failed("remove", &path))?;
        } else if let Some(seq) = name.strip_prefix("wal-").and_then(|n| n.strip_suffix(".log")) {
            let seq = u64::from_str_radix(seq, 16).map_err(|_| corrupt(&path, 0, "not the name of a log segment"))?;
            segments.push((seq, path));
        }
    }
    segments.sort_unstable();
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::disk::OsDisk;
    use super::*;
    use crate::testing::simdisk::SimDisk;

    fn os() -> Arc<dyn Disk> {
        Arc::new(OsDisk)
    }

    fn owner() -> Identity {
        Identity { cluster_id: "c".into(), node: 1, log: 77 }
    }

    fn append(wal: &mut Wal, body: &[u8]) -> Result<(), DiskError> {
        wal.write(body)?;
        wal.sync()
    }

    fn wal_with(dir: &Path, bodies: &[Vec<u8>]) -> Wal {
        let mut wal = Wal::create(&os(), dir, 1, &owner(), LogPoint::default(), &[]).unwrap();
        for body in bodies {
            append(&mut wal, body).unwrap();
        }
        wal
    }

    fn reopen(bytes: &[u8]) -> Result<Vec<Vec<u8>>, RaftStartError> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("wal-0000000000000001.log"), bytes).unwrap();
        Ok(Wal::recover(&os(), dir.path(), &owner())?.unwrap().bodies)
    }

    fn sample() -> Vec<Vec<u8>> {
        (1..=6u8).map(|i| vec![i; usize::from(i) * 37]).collect()
    }

    #[test]
    fn every_prefix_opens_to_a_prefix_of_the_records() {
        let dir = tempfile::tempdir().unwrap();
        let wal = wal_with(dir.path(), &sample());
        let bytes = fs::read(&wal.path).unwrap()[..wal.end as usize].to_vec();
        let header_bytes = encode_header(1, wal.salt, &owner(), LogPoint::default()).len();
        for cut in 0..=bytes.len() {
            let mut zero_tail = bytes[..cut].to_vec();
            zero_tail.resize(bytes.len() + 100, 0);
            let Ok(found) = reopen(&bytes[..cut]) else {
                assert!(cut < header_bytes, "a torn tail at {cut} was refused");
                continue;
            };
            let mut end = header_bytes;
            let mut whole = sample();
            whole.retain(|b| {
                end += HEAD_BYTES + b.len();
                end <= cut
            });
            assert_eq!(found, whole, "cut at {cut}");
            assert_eq!(reopen(&zero_tail).unwrap(), found, "zeros after {cut}");
        }
    }

    #[test]
    fn a_flipped_bit_is_refused_in_the_middle_and_cut_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let wal = wal_with(dir.path(), &sample());
        let bytes = fs::read(&wal.path).unwrap()[..wal.end as usize].to_vec();
        let last = bytes.len() - sample()[5].len() - HEAD_BYTES;
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            match reopen(&flipped) {
                Err(RaftStartError::Corrupt { .. }) => assert!(at < last, "flip at {at}"),
                Ok(found) => assert!(at >= last && found == sample()[..5], "flip at {at}"),
                Err(other) => panic!("flip at {at}: {other}"),
            }
        }
    }

    #[test]
    fn a_torn_record_is_cut_for_good_and_records_inside_commands_are_not_records() {
        let dir = tempfile::tempdir().unwrap();
        let mut wal = wal_with(dir.path(), &sample());
        let mut forged = Vec::new();
        push_record(&mut forged, wal.end, wal.salt ^ 1, b"forged");
        append(&mut wal, &forged.repeat(40)).unwrap();
        let mut torn = fs::read(&wal.path).unwrap();
        torn[wal.end as usize - 1] ^= 1;
        fs::write(&wal.path, &torn).unwrap();
        let mut recovered = Wal::recover(&os(), dir.path(), &owner()).unwrap().unwrap();
        assert_eq!(recovered.bodies, sample());
        append(&mut recovered.wal, b"after").unwrap();
        let bodies = Wal::recover(&os(), dir.path(), &owner()).unwrap().unwrap().bodies;
        assert_eq!(bodies.last().unwrap(), b"after");
        assert_eq!(bodies.len(), 7);
    }

    #[test]
    fn a_draft_counts_only_when_published_and_the_newest_segment_wins() {
        let dir = tempfile::tempdir().unwrap();
        let old = wal_with(dir.path(), &sample());
        let base = LogPoint { index: 9, term: 2 };
        let draft = || Wal::draft(&os(), dir.path(), 2, &owner(), base, &[vec![1], vec![2]]).unwrap();
        drop(draft());
        assert_eq!(Wal::recover(&os(), dir.path(), &owner()).unwrap().unwrap().bodies, sample());
        let mut new = draft();
        append(&mut new, &[3]).unwrap();
        new.publish().unwrap();
        let found = Wal::recover(&os(), dir.path(), &owner()).unwrap().unwrap();
        assert_eq!((found.base, found.bodies), (base, vec![vec![1], vec![2], vec![3]]));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(old.remove().is_err(), "recovery has removed it");
    }

    #[test]
    fn a_full_disk_may_be_tried_again_and_a_failed_sync_may_not() {
        let disk = SimDisk::default();
        let (any, dir): (Arc<dyn Disk>, _) = (Arc::new(disk.clone()), Path::new("/d"));
        let mut wal = Wal::create(&any, dir, 1, &owner(), LogPoint::default(), &[]).unwrap();
        disk.fill(100);
        append(&mut wal, &[1; 60]).unwrap();
        let error = append(&mut wal, &[2; 300]).unwrap_err();
        assert!(error.full(), "{error}");
        disk.free();
        append(&mut wal, &[3; 20]).unwrap();
        disk.crash(&mut |n| n);
        assert_eq!(Wal::recover(&any, dir, &owner()).unwrap().unwrap().bodies, [vec![1; 60], vec![3; 20]]);
        let mut wal = Wal::recover(&any, dir, &owner()).unwrap().unwrap().wal;
        disk.fail_next_sync();
        assert!(!append(&mut wal, b"unknown").unwrap_err().full());
        assert!(append(&mut wal, b"never after that").is_err());
    }

    #[test]
    fn what_a_crash_leaves_of_a_record_that_was_not_synced_is_cut() {
        for keep in 0..60 {
            let disk = SimDisk::default();
            let (any, dir): (Arc<dyn Disk>, _) = (Arc::new(disk.clone()), Path::new("/d"));
            let mut wal = Wal::create(&any, dir, 1, &owner(), LogPoint::default(), &[]).unwrap();
            append(&mut wal, b"kept").unwrap();
            wal.write(&[7; 40]).unwrap();
            disk.crash(&mut |_| keep);
            let bodies = Wal::recover(&any, dir, &owner()).unwrap().unwrap().bodies;
            let whole = keep >= 40 + HEAD_BYTES;
            assert_eq!(
                bodies,
                if whole { vec![b"kept".to_vec(), vec![7; 40]] } else { vec![b"kept".to_vec()] },
                "{keep} bytes kept"
            );
        }
    }
}
