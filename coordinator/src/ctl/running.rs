//! Which local clusters run. Which cluster a command is about is [`super::context`]'s.
//!
//! Each running `local up` keeps one file in the user's state folder that names its folder; whether it still runs is told by the lock
//! that it holds in that folder, which the system lets go of whatever ends it. A second cluster does not hide the first for good.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};

use super::exit::Exit;

/// The lock's name in a cluster's folder.
pub const LOCK: &str = "lock";
/// Notes looked at; more than this many clusters at a time are not expected.
const NOTES_MAX: usize = 1024;

/// The note that a cluster runs; removed when dropped.
#[derive(Debug)]
pub struct Note(PathBuf);

impl Drop for Note {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Where notes are kept: `$XDG_STATE_HOME/millrace/clusters`, else below `~/.local/state`.
#[must_use]
pub fn state_dir() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    base.map(|base| base.join("millrace/clusters"))
}

/// Notes that the cluster in `dir` runs.
///
/// # Errors
/// What the system says.
pub fn note(state: &Path, dir: &Path) -> Result<Note> {
    fs::create_dir_all(state).with_context(|| state.display().to_string())?;
    let path = state.join(std::process::id().to_string());
    fs::write(&path, dir.as_os_str().as_encoded_bytes()).with_context(|| path.display().to_string())?;
    Ok(Note(path))
}

/// Takes the lock of a cluster's folder; it lasts as long as the file.
///
/// # Errors
/// [`Exit::Conflict`] when another process holds it.
pub fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path).with_context(|| path.display().to_string())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Exit::Conflict.error(format!("a cluster runs in {} already", dir.display()))),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// Whether a process runs the cluster in `dir`.
#[must_use]
pub fn runs(dir: &Path) -> bool {
    let file = File::options().write(true).open(dir.join(LOCK));
    file.is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
}

/// The folders of the clusters that run, newest first. Notes of clusters that do not are removed.
#[must_use]
pub fn all(state: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(state).into_iter().flatten();
    let mut found: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in entries.filter_map(|entry| entry.ok()).take(NOTES_MAX) {
        let (note, written) = (entry.path(), entry.metadata().and_then(|data| data.modified()));
        let (Ok(dir), Ok(written)) = (fs::read_to_string(&note).map(PathBuf::from), written) else { continue };
        if runs(&dir) {
            found.push((written, dir));
        } else {
            let _ = fs::remove_file(&note);
        }
    }
    found.sort();
    found.into_iter().rev().map(|(_, dir)| dir).collect()
}

/// The folder of the newest cluster that runs.
#[must_use]
pub fn newest() -> Option<PathBuf> {
    state_dir().and_then(|state| all(&state).into_iter().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_clusters_that_run_are_found_and_the_lock_is_exclusive() {
        let scratch = tempfile::tempdir().unwrap();
        let (state, dir) = (scratch.path().join("state"), scratch.path().join("c"));
        fs::create_dir(&dir).unwrap();
        assert!(all(&state).is_empty());
        let held = lock(&dir).unwrap();
        assert_eq!(Exit::of(&lock(&dir).unwrap_err()), Exit::Conflict);
        let noted = note(&state, &dir).unwrap();
        assert_eq!(all(&state), std::slice::from_ref(&dir));
        drop(held);
        assert!(all(&state).is_empty(), "it stopped without a word");
        assert!(!noted.0.exists(), "and its note is removed");
        lock(&dir).unwrap();
    }
}
