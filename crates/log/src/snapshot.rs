//! The snapshot file: the state machine's bytes, the members, and the log entry they reach to, replaced atomically.
//!
//! `magic | version | head | checksum of all before | data | checksum of the data`; the head holds the owner, the point in the log, the
//! members at that point, and the length of the data. There is one file; the old one lives until the new one is durable, because the rename is
//! what replaces it. The data's checksum stands alone so that the same data has the same one on every replica.

use std::path::{Path, PathBuf};

use super::codec::{Reader, put_bytes, put_u64};
use super::disk::{self, Disk, DiskFile, failed};
use super::members::Members;
use super::wal::{Identity, LogPoint, corrupt};
use super::{DiskError, RaftStartError};

const MAGIC: &[u8; 8] = b"MRRAFTSN";
const VERSION: u8 = 3;
/// Bytes before the head: magic, version, length of the head.
const LEAD_BYTES: usize = 13;
/// A head is far smaller: an owner and lists of members.
const HEAD_BYTES_MAX: usize = 64 << 10;
const CRC_BYTES: u64 = 4;

/// Where in the log a snapshot stands, and who were members there.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Meta {
    pub at: LogPoint,
    pub members: Members,
}

/// A snapshot file that is being written.
pub(super) struct Draft {
    file: Box<dyn DiskFile>,
    /// Its temporary name.
    pub path: PathBuf,
    /// Where the data begins, how much there is so far, and how much there will be.
    begin: u64,
    pub written: u64,
    pub total: u64,
    crc: crc32fast::Hasher,
}

impl Draft {
    /// Begins a file under the temporary name `name`, for `total` bytes of data.
    pub fn create(disk: &dyn Disk, path: PathBuf, owner: &Identity, meta: &Meta, total: u64) -> Result<Self, DiskError> {
        let head = encode_head(owner, meta, total);
        let file = disk.create(&path).map_err(failed("create", &path))?;
        file.write_at(&head, 0).map_err(failed("write", &path))?;
        let begin = head.len() as u64;
        Ok(Self { file, path, begin, written: 0, total, crc: crc32fast::Hasher::new() })
    }

    /// Adds data at the end.
    pub fn push(&mut self, data: &[u8]) -> Result<(), DiskError> {
        assert!(self.written + data.len() as u64 <= self.total, "no more data than was announced");
        self.file.write_at(data, self.begin + self.written).map_err(failed("write", &self.path))?;
        self.crc.update(data);
        self.written += data.len() as u64;
        Ok(())
    }

    /// Adds the checksum, which it gives, and syncs.
    pub fn finish(&mut self) -> Result<u32, DiskError> {
        assert_eq!(self.written, self.total, "all data that was announced is there");
        let crc = self.crc.clone().finalize();
        self.file.write_at(&crc.to_le_bytes(), self.begin + self.total).map_err(failed("write", &self.path))?;
        disk::sync(self.file.as_ref(), &self.path)?;
        Ok(crc)
    }

    /// The data, for whoever must look at all of it.
    pub fn data(&self) -> Result<Vec<u8>, DiskError> {
        let mut data = vec![0; usize::try_from(self.written).expect("bounded by SNAPSHOT_BYTES_MAX")];
        self.file.read_at(&mut data, self.begin).map_err(failed("read", &self.path))?;
        Ok(data)
    }
}

/// Writes and syncs a whole snapshot under a temporary name; nothing stays of it after an error.
pub(super) fn write(disk: &dyn Disk, path: PathBuf, owner: &Identity, meta: &Meta, data: &[u8]) -> Result<(), DiskError> {
    let write = |path: PathBuf| {
        let mut draft = Draft::create(disk, path, owner, meta, data.len() as u64)?;
        draft.push(data)?;
        draft.finish().map(drop)
    };
    write(path.clone()).inspect_err(|_| disk::discard(disk, &path))
}

/// Makes a finished file the directory's snapshot.
pub(super) fn adopt(disk: &dyn Disk, dir: &Path, path: &Path) -> Result<(), DiskError> {
    disk::adopt(disk, path, &path_in(dir))
}

/// A snapshot file that is open for reading; it stays readable when another takes its name.
pub(super) struct Saved {
    file: Box<dyn DiskFile>,
    path: PathBuf,
    begin: u64,
    pub meta: Meta,
    /// Bytes of data.
    pub total: u64,
    /// Checksum of the data, as the file says.
    pub crc: u32,
}

impl Saved {
    /// Opens the directory's snapshot, if it has one. The data is not looked at.
    pub fn open(disk: &dyn Disk, dir: &Path, owner: &Identity) -> Result<Option<Self>, RaftStartError> {
        let path = path_in(dir);
        let file = match disk.open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed("open", &path))?,
        };
        let len = file.size().map_err(failed("read", &path))?;
        let mut head = vec![0; len.min(HEAD_BYTES_MAX as u64) as usize];
        file.read_at(&mut head, 0).map_err(failed("read", &path))?;
        let (found, meta, total, begin) = decode_head(&path, &head)?;
        owner.expect(found)?;
        if begin.checked_add(total).and_then(|end| end.checked_add(CRC_BYTES)) != Some(len) {
            return Err(corrupt(&path, 0, "the snapshot is damaged"));
        }
        let mut crc = [0; 4];
        file.read_at(&mut crc, begin + total).map_err(failed("read", &path))?;
        Ok(Some(Self { file, path, begin, meta, total, crc: u32::from_le_bytes(crc) }))
    }

    /// Up to `bytes_max` bytes of data from `offset` on.
    pub fn read(&self, offset: u64, bytes_max: usize) -> Result<Vec<u8>, DiskError> {
        let len = self.total.saturating_sub(offset).min(bytes_max as u64);
        let mut data = vec![0; len as usize];
        self.file.read_at(&mut data, self.begin + offset).map_err(failed("read", &self.path))?;
        Ok(data)
    }

    /// All data, compared with its checksum.
    pub fn data(&self) -> Result<Vec<u8>, RaftStartError> {
        let data = self.read(0, usize::MAX)?;
        if crc32fast::hash(&data) != self.crc {
            return Err(corrupt(&self.path, self.begin as usize, "the snapshot is damaged"));
        }
        Ok(data)
    }
}

fn path_in(dir: &Path) -> PathBuf {
    dir.join("snapshot.bin")
}

fn encode_head(owner: &Identity, meta: &Meta, total: u64) -> Vec<u8> {
    let mut head = Vec::new();
    owner.put(&mut head);
    for value in [meta.at.index, meta.at.term, total] {
        put_u64(&mut head, value);
    }
    meta.members.put(&mut head);
    let mut out = MAGIC.to_vec();
    out.push(VERSION);
    put_bytes(&mut out, &head);
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

/// The owner, the point, the length of the data, and where it begins.
fn decode_head(path: &Path, bytes: &[u8]) -> Result<(Identity, Meta, u64, u64), RaftStartError> {
    let damaged = || corrupt(path, 0, "the snapshot is damaged");
    let mut reader = Reader(bytes);
    if reader.take(MAGIC.len()) != Some(MAGIC) || reader.u8() != Some(VERSION) {
        return Err(corrupt(path, 0, "not a snapshot of a format this program knows"));
    }
    let head = reader.bytes().ok_or_else(damaged)?;
    let checked = LEAD_BYTES + head.len();
    if reader.u32() != Some(crc32fast::hash(&bytes[..checked])) {
        return Err(damaged());
    }
    let begin = checked as u64 + CRC_BYTES;
    let fields = |mut head: Reader<'_>| {
        let owner = Identity::read(&mut head)?;
        let at = LogPoint { index: head.u64()?, term: head.u64()? };
        let total = head.u64()?;
        let members = Members::read(&mut head)?;
        Some((owner, Meta { at, members }, total, begin))
    };
    fields(Reader(head)).ok_or_else(damaged)
}

#[cfg(test)]
mod tests {
    use super::super::disk::OsDisk;
    use super::*;

    fn meta() -> Meta {
        let members = Members { voters: vec![1, 2], outgoing: vec![1, 3], learners: vec![5] };
        Meta { at: LogPoint { index: 70, term: 3 }, members }
    }

    #[test]
    fn a_snapshot_is_found_as_it_was_saved_and_no_flipped_bit_passes() {
        let dir = tempfile::tempdir().unwrap();
        let owner = Identity { cluster_id: "c".into(), node: 1, log: 7 };
        let data: Vec<u8> = (0..500u32).map(|i| (i % 251) as u8).collect();
        assert!(Saved::open(&OsDisk, dir.path(), &owner).unwrap().is_none());
        let temporary = dir.path().join("x.tmp");
        write(&OsDisk, temporary.clone(), &owner, &meta(), &data).unwrap();
        adopt(&OsDisk, dir.path(), &temporary).unwrap();
        let saved = Saved::open(&OsDisk, dir.path(), &owner).unwrap().unwrap();
        assert_eq!((saved.meta.clone(), saved.data().unwrap()), (meta(), data.clone()));
        assert_eq!(saved.read(490, 100).unwrap(), data[490..]);
        let path = path_in(dir.path());
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            std::fs::write(&path, &flipped).unwrap();
            let found = Saved::open(&OsDisk, dir.path(), &owner).and_then(|saved| saved.unwrap().data());
            assert!(matches!(found, Err(RaftStartError::Corrupt { .. })), "flip at {at}");
        }
    }
}
