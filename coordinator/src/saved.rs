//! A state of the cluster as a file of its own: what `millctl snapshot` saves, shows and restores.
//!
//! `magic | version | length of the head u32 | head, JSON | state | CRC-32 of all before`, little-endian. The state is what
//! [`Cluster::snapshot`] writes, tenants' keys among it: the file is for nobody but its owner.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use millrace_core::cluster::Cluster;
use serde::{Deserialize, Serialize};

use millrace_log::SNAPSHOT_BYTES_MAX;

const MAGIC: &[u8; 8] = b"MRSTATE\0";
const VERSION: u8 = 1;
/// Bytes before the head.
const LEAD_BYTES: usize = 13;
/// Bytes of the head at most.
const HEAD_BYTES_MAX: usize = 64 << 10;
const CRC_BYTES: usize = 4;

/// What a file says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The cluster's name.
    pub cluster: String,
    /// The replica that gave the state.
    pub replica: String,
    /// The last log entry in it.
    pub applied: u64,
    /// Whether a quorum vouched for it: everything acknowledged before the save is in it.
    pub fresh: bool,
    /// Bytes of the state.
    pub bytes: u64,
}

/// A file that is being written; it gets its name when it is whole.
pub struct Writer {
    file: File,
    path: PathBuf,
    part: PathBuf,
    crc: crc32fast::Hasher,
    left: u64,
}

impl Writer {
    /// Begins the file `path`, which must not exist.
    ///
    /// # Errors
    /// It exists, or cannot be written.
    pub fn create(path: &Path, head: &Head) -> Result<Self> {
        ensure!(!path.exists(), "{} exists already", path.display());
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(&part).with_context(|| part.display().to_string())?;
        let mut writer = Self { file, path: path.to_owned(), part, crc: crc32fast::Hasher::new(), left: head.bytes };
        let text = serde_json::to_vec(head)?;
        let mut lead = MAGIC.to_vec();
        lead.push(VERSION);
        lead.extend_from_slice(&(text.len() as u32).to_le_bytes());
        writer.put(&lead)?;
        writer.put(&text)?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.crc.update(bytes);
        self.file.write_all(bytes).with_context(|| self.part.display().to_string())
    }

    /// Adds a piece of the state.
    ///
    /// # Errors
    /// It is more than was announced, or cannot be written.
    pub fn push(&mut self, piece: &[u8]) -> Result<()> {
        self.left = self.left.checked_sub(piece.len() as u64).context("more bytes came than were announced")?;
        self.put(piece)
    }

    /// Closes the file durably and gives it its name.
    ///
    /// # Errors
    /// Less came than was announced, or the file cannot be written.
    pub fn finish(mut self) -> Result<()> {
        ensure!(self.left == 0, "{} bytes did not come", self.left);
        let crc = self.crc.clone().finalize();
        self.file.write_all(&crc.to_le_bytes()).and_then(|()| self.file.sync_all()).context("writing the last bytes")?;
        fs::rename(&self.part, &self.path).with_context(|| self.path.display().to_string())
    }
}

/// Reads a whole file.
///
/// # Errors
/// It is no such file, or damaged.
pub fn read(path: &Path) -> Result<(Head, Cluster)> {
    let named = || path.display().to_string();
    let file = File::open(path).with_context(named)?;
    let mut bytes = Vec::new();
    let bytes_max = SNAPSHOT_BYTES_MAX + HEAD_BYTES_MAX as u64;
    file.take(bytes_max + 1).read_to_end(&mut bytes).with_context(named)?;
    ensure!(bytes.len() as u64 <= bytes_max, "{} has more than {bytes_max} bytes", named());
    parse(&bytes).with_context(named)
}

fn parse(bytes: &[u8]) -> Result<(Head, Cluster)> {
    let Some((checked, crc)) = bytes.split_last_chunk::<CRC_BYTES>() else { bail!("not a saved state") };
    ensure!(checked.len() >= LEAD_BYTES && checked.starts_with(MAGIC), "not a saved state");
    ensure!(checked[MAGIC.len()] == VERSION, "of a version that this program does not know");
    ensure!(crc32fast::hash(checked) == u32::from_le_bytes(*crc), "damaged: the checksum is wrong");
    let (lead, rest) = checked.split_at(LEAD_BYTES);
    let head_len = u32::from_le_bytes([lead[9], lead[10], lead[11], lead[12]]) as usize;
    let (head, state) = rest.split_at_checked(head_len).context("damaged: the head is cut off")?;
    let head: Head = serde_json::from_slice(head).context("the head")?;
    ensure!(head.bytes == state.len() as u64, "damaged: {} bytes where {} are announced", state.len(), head.bytes);
    let cluster = Cluster::restore(state).context("the state")?;
    ensure!(cluster.applied() == head.applied, "the head tells of another state");
    Ok((head, cluster))
}

#[cfg(test)]
mod tests {
    use millrace_core::cluster::Command;
    use millrace_core::identity::TenantKey;

    use super::*;

    #[test]
    fn a_file_reads_as_it_was_written_and_no_flipped_bit_passes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let mut cluster = Cluster::new();
        cluster.apply(7, &Command::PutTenant { name: "t".into(), key: TenantKey([3; 32]) });
        let state = cluster.snapshot();
        let head = Head { cluster: "c".into(), replica: "c-1".into(), applied: 7, fresh: true, bytes: state.len() as u64 };
        let mut writer = Writer::create(&path, &head).unwrap();
        assert!(Writer::create(&path, &head).is_ok(), "an unfinished file is in nobody's way");
        let (one, two) = state.split_at(state.len() / 2);
        writer.push(one).unwrap();
        writer.push(two).unwrap();
        assert!(writer.push(b"more").is_err());
        let mut writer = Writer::create(&path, &head).unwrap();
        writer.push(&state).unwrap();
        writer.finish().unwrap();
        assert!(Writer::create(&path, &head).is_err(), "a saved state is not overwritten");
        let (found, restored) = read(&path).unwrap();
        assert_eq!((found, restored.snapshot()), (head, state));
        let bytes = fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            assert!(parse(&flipped).is_err(), "flip at {at}");
            assert!(parse(&bytes[..at]).is_err(), "cut at {at}");
        }
    }
}
