//! The kept inputs: one folder for each target, one file for each input that once broke a promise. They run first, every time.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Bytes of one kept input at most: larger ones are made smaller by hand.
pub const INPUT_BYTES_MAX: u64 = 64 << 10;
/// Bytes of all of them at most.
pub const CORPUS_BYTES_MAX: u64 = 1 << 20;

/// Where the kept inputs lie.
#[must_use]
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

/// The kept inputs of a target, by name; none when it has no folder.
///
/// # Errors
/// What the system says of a folder that is there.
pub fn kept(target: &str) -> io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let folder = folder().join(target);
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut paths = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    paths.into_iter().map(|path| fs::read(&path).map(|bytes| (path, bytes))).collect()
}

/// Keeps an input; gives its path. The same bytes have the same name.
///
/// # Errors
/// What the system says.
pub fn keep(target: &str, bytes: &[u8]) -> io::Result<PathBuf> {
    let folder = folder().join(target);
    fs::create_dir_all(&folder)?;
    let path = folder.join(format!("found-{:08x}", crc32fast::hash(bytes)));
    fs::write(&path, bytes)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::targets::TARGETS;

    #[test]
    fn every_folder_is_a_targets_and_all_is_small() {
        let mut all = 0;
        for entry in fs::read_dir(folder()).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            if !entry.path().is_dir() {
                continue;
            }
            assert!(TARGETS.iter().any(|target| target.name == name), "{name} is no target");
            for (path, bytes) in kept(&name).unwrap() {
                assert!(bytes.len() as u64 <= INPUT_BYTES_MAX, "{}: {} bytes", path.display(), bytes.len());
                all += bytes.len() as u64;
            }
        }
        assert!(all <= CORPUS_BYTES_MAX, "{all} bytes in all");
    }
}
