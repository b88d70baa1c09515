//! Files as bytes: large ones mapped, small ones read up to a limit.
//!
//! The one place outside `kernels` that needs `unsafe`, because every way to map a file does.

use crate::CheckpointError;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// A regular file, mapped read-only for as long as this value lives.
pub(crate) struct MappedFile {
    path: PathBuf,
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps `path`. Nothing is read until it is touched.
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = open_regular(path)?;
        // SAFETY: the map is read-only and private to this value. Its bytes can change only if somebody writes the file in
        // place while it is served; the operator guarantees that they do not (docs: replace a model's files, never edit them).
        // Every reader here treats the bytes as untrusted, so a change can spoil results but breaks no invariant.
        #[allow(unsafe_code)]
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| CheckpointError::io(path, e))?;
        Ok(Self { path: path.into(), map })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }
}

/// The bytes of a small file, or `None` if there is no such file. Refuses more than `bytes_max`.
pub(crate) fn read_small(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
    if !path.try_exists().map_err(|e| CheckpointError::io(path, e))? {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    open_regular(path)?.take(bytes_max + 1).read_to_end(&mut bytes).map_err(|e| CheckpointError::io(path, e))?;
    if bytes.len() as u64 > bytes_max {
        return Err(CheckpointError::limit(path, "file size in bytes", bytes.len() as u64, bytes_max));
    }
    Ok(Some(bytes))
}

/// Opening a pipe or a device would hang or never end: only regular files are models.
fn open_regular(path: &Path) -> Result<File, CheckpointError> {
    let metadata = std::fs::metadata(path).map_err(|e| CheckpointError::io(path, e))?;
    if !metadata.is_file() {
        return Err(CheckpointError::NotAModel { file: path.into(), reason: "not a regular file".into() });
    }
    File::open(path).map_err(|e| CheckpointError::io(path, e))
}
