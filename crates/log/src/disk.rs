//! The file layer under the log: the few operations that the replica needs of the system, behind a trait, so that tests can put
//! one beneath it that forgets what was not synced, runs full, or fails. Random numbers are among them: they name logs and salt files, and a
//! simulated system must give the same again.
//!
//! It decides what an error means: [`DiskError::full`] is a disk without room, after which the same bytes may be written again; anything else,
//! and any error of a sync, leaves unknown what is on disk. What is done about either is decided in `driver` and `room`.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::DiskError;

/// Held as long as the directory is in use.
pub type Lock = Box<dyn Send>;

/// A file system.
pub trait Disk: Send + Sync {
    /// Makes a directory and those above it.
    ///
    /// # Errors
    /// Those of the system, here and below.
    fn create_dir_all(&self, dir: &Path) -> io::Result<()>;
    /// The files of a directory, in any order.
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>>;
    /// An empty file to read and write, in place of what had the name.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// A file to read and write, as it is.
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Gives a file another name, in place of what had it. Durable after [`Disk::sync_dir`], as are creation and removal.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a name; files that are open stay readable.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// A random number.
    fn random(&self) -> u64;
    /// Keeps other processes out. `None`: one is in.
    fn lock(&self, path: &Path) -> io::Result<Option<Lock>>;
}

/// An open file. Shared references suffice, as for the system's own.
pub trait DiskFile: Send + Sync {
    /// Length in bytes.
    ///
    /// # Errors
    /// Those of the system, here and below.
    fn size(&self) -> io::Result<u64>;
    /// Fills `buffer` from `offset` on; an error if the file ends before.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `bytes`; on an error, any part of them may be there.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Cuts or extends with zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes contents and length durable.
    fn sync(&self) -> io::Result<()>;
}

/// The operating system's files.
pub struct OsDisk;

impl Disk for OsDisk {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        fs::read_dir(dir)?.map(|item| item.map(|item| item.path())).collect()
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(Box::new(file))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(OpenOptions::new().read(true).write(true).open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn random(&self) -> u64 {
        rand::random()
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Lock>> {
        let file = File::create(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

impl DiskFile for File {
    fn size(&self) -> io::Result<u64> {
        self.metadata().map(|data| data.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// The operation whose failure nobody may try again: what the page cache holds is unknown after it.
const SYNC: &str = "sync";

impl DiskError {
    /// Whether there is only no room: the write may be tried again. A sync that failed for want of room is not such.
    #[must_use]
    pub fn full(&self) -> bool {
        self.op != SYNC && matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// A random name for a log.
pub(super) fn random_name(disk: &dyn Disk) -> u128 {
    u128::from(disk.random()) << 64 | u128::from(disk.random())
}

/// Turns an I/O error into one that names the operation and the file.
pub(super) fn failed(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_path_buf();
    move |source| DiskError { op, path, source }
}

/// Syncs a file.
pub(super) fn sync(file: &dyn DiskFile, path: &Path) -> Result<(), DiskError> {
    file.sync().map_err(failed(SYNC, path))
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(disk: &dyn Disk, dir: &Path) -> Result<(), DiskError> {
    disk.sync_dir(dir).map_err(failed(SYNC, dir))
}

/// Gives a finished, synced file its name, durably.
pub(super) fn adopt(disk: &dyn Disk, from: &Path, to: &Path) -> Result<(), DiskError> {
    disk.rename(from, to).map_err(failed("rename", from))?;
    sync_dir(disk, to.parent().expect("files of the log lie in a directory"))
}

/// All bytes of a file.
pub(super) fn read_all(disk: &dyn Disk, path: &Path) -> io::Result<Vec<u8>> {
    let file = disk.open(path)?;
    let mut bytes = vec![0; usize::try_from(file.size()?).map_err(io::Error::other)?];
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Removes a file of which it does not matter whether it stays: the next start removes it too.
pub(super) fn discard(disk: &dyn Disk, path: &Path) {
    if let Err(error) = disk.remove(path) {
        tracing::debug!(%error, path = %path.display(), "a temporary file stays");
    }
}
