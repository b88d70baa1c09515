//! The snapshot file: the state machine's bytes, the members, and the log entry they reach to, replaced atomically.
//!
//! `magic | version | identity | index | term | members | length of data | data | checksum of all before`. There is one file; the old one
//! lives until the new one is durable, because the rename is what replaces it.

use std::fs;
use std::path::{Path, PathBuf};

use super::codec::{Reader, put_bytes, put_u64};
use super::members::Members;
use super::wal::{Identity, LogPoint, corrupt, disk, write_durably};
use super::{DiskError, RaftStartError};

const MAGIC: &[u8; 8] = b"MRRAFTSN";
const VERSION: u8 = 2;

/// Makes `data`, the state after entry `at` with the members then, the directory's snapshot.
pub(super) fn save(dir: &Path, owner: &Identity, at: LogPoint, members: &Members, data: &[u8]) -> Result<(), DiskError> {
    let mut head = MAGIC.to_vec();
    head.push(VERSION);
    let mut identity = Vec::new();
    owner.put(&mut identity);
    put_bytes(&mut head, &identity);
    put_u64(&mut head, at.index);
    put_u64(&mut head, at.term);
    members.put(&mut head);
    put_u64(&mut head, data.len() as u64);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&head);
    crc.update(data);
    write_durably(dir, &path_in(dir), &[&head, data, &crc.finalize().to_le_bytes()])
}

/// The directory's snapshot, if it has one.
pub(super) fn load(dir: &Path, owner: &Identity) -> Result<Option<(LogPoint, Members, Vec<u8>)>, RaftStartError> {
    let path = path_in(dir);
    let bytes = match fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(disk("read", &path))?,
    };
    let damaged = || corrupt(&path, 0, "the snapshot is damaged");
    let (checked, crc) = bytes.split_at(bytes.len().saturating_sub(4));
    if crc != crc32fast::hash(checked).to_le_bytes() {
        return Err(damaged());
    }
    let mut reader = Reader(checked);
    if reader.take(MAGIC.len()) != Some(MAGIC) || reader.u8() != Some(VERSION) {
        return Err(corrupt(&path, 0, "not a snapshot of a format this program knows"));
    }
    let identity = reader.bytes().and_then(|b| Identity::read(&mut Reader(b))).ok_or_else(damaged)?;
    owner.expect(identity)?;
    let (index, term, members, len) = (reader.u64(), reader.u64(), Members::read(&mut reader), reader.u64());
    let (Some(index), Some(term), Some(members), true) = (index, term, members, len == Some(reader.0.len() as u64)) else {
        return Err(damaged());
    };
    Ok(Some((LogPoint { index, term }, members, reader.0.to_vec())))
}

fn path_in(dir: &Path) -> PathBuf {
    dir.join("snapshot.bin")
}
