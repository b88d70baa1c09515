//! A disk in memory that behaves as badly as disks do: a crash forgets what was not synced, or tears it; it runs full; a sync fails.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::{Disk, DiskFile, Lock};

#[derive(Clone)]
enum Change {
    Write(usize, Vec<u8>),
    SetLen(usize),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(at, data) => {
                bytes.resize(bytes.len().max(at + data.len()), 0);
                bytes[*at..at + data.len()].copy_from_slice(data);
            }
            Self::SetLen(len) => bytes.resize(*len, 0),
        }
    }
}

#[derive(Default)]
struct Node {
    /// What readers see.
    bytes: Vec<u8>,
    /// What a crash leaves for certain, and the changes since.
    durable: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Default)]
struct Inner {
    nodes: BTreeMap<u64, Node>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    made: u64,
    capacity: Option<u64>,
    /// Writes that may fail for want of room before there is room again.
    patience: Option<u32>,
    sync_fails: bool,
    syncs: u64,
    /// Random numbers so far; all that a number depends on.
    drawn: u64,
}

impl Inner {
    fn used(&self) -> u64 {
        self.names.values().map(|id| self.nodes[id].bytes.len() as u64).sum()
    }

    fn change(&mut self, id: u64, change: Change) {
        let node = self.nodes.get_mut(&id).expect("open files have a node");
        change.apply(&mut node.bytes);
        node.pending.push(change);
    }
}

/// The disk; clones are the same one.
#[derive(Clone, Default)]
pub struct SimDisk(Arc<Mutex<Inner>>);

impl SimDisk {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A replica that panicked has left nothing half done here: each change is one statement.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Syncs of files so far: whoever simulates a slow disk lets time pass for each.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.inner().syncs
    }

    /// From now on files may grow by `room` bytes together, and no more.
    pub fn fill(&self, room: u64) {
        let mut inner = self.inner();
        inner.capacity = Some(inner.used() + room);
    }

    /// As [`SimDisk::fill`], until so many writes have failed: nobody else runs who could make room while a replica on this thread waits.
    pub fn fill_for(&self, failures: u32) {
        self.fill(0);
        self.inner().patience = Some(failures);
    }

    /// There is room again.
    pub fn free(&self) {
        let mut inner = self.inner();
        (inner.capacity, inner.patience) = (None, None);
    }

    /// The next sync fails, and what it should have kept is gone.
    pub fn fail_next_sync(&self) {
        self.inner().sync_fails = true;
    }

    /// Names of the files.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let inner = self.inner();
        inner.names.keys().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect()
    }

    /// Power is lost. Of the last change to a file that was not synced, `tear` says how many of its bytes arrived.
    pub fn crash(&self, tear: &mut dyn FnMut(usize) -> usize) {
        let mut inner = self.inner();
        inner.names = inner.durable_names.clone();
        let named: Vec<u64> = inner.names.values().copied().collect();
        inner.nodes.retain(|id, _| named.contains(id));
        for id in named {
            let node = inner.nodes.get_mut(&id).expect("kept above");
            let mut pending = std::mem::take(&mut node.pending);
            let torn = pending.pop();
            pending.iter().for_each(|change| change.apply(&mut node.durable));
            match torn {
                Some(Change::Write(at, data)) => {
                    let arrived = tear(data.len()).min(data.len());
                    Change::Write(at, data[..arrived].to_vec()).apply(&mut node.durable);
                }
                Some(change) => change.apply(&mut node.durable),
                None => {}
            }
            node.bytes = node.durable.clone();
        }
    }
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Disk for SimDisk {
    fn create_dir_all(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(self.inner().names.keys().filter(|path| path.parent() == Some(dir)).cloned().collect())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut inner = self.inner();
        inner.made += 1;
        let id = inner.made;
        inner.nodes.insert(id, Node::default());
        inner.names.insert(path.to_owned(), id);
        Ok(Box::new(SimFile { disk: self.clone(), id }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let id = self.inner().names.get(path).copied().ok_or_else(not_found)?;
        Ok(Box::new(SimFile { disk: self.clone(), id }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut inner = self.inner();
        let id = inner.names.remove(from).ok_or_else(not_found)?;
        inner.names.insert(to.to_owned(), id);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.inner().names.remove(path).map(drop).ok_or_else(not_found)
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        let mut inner = self.inner();
        inner.durable_names = inner.names.clone();
        Ok(())
    }

    fn random(&self) -> u64 {
        let mut inner = self.inner();
        inner.drawn += 1;
        // The steps of SplitMix64.
        let z = inner.drawn.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn lock(&self, _: &Path) -> io::Result<Option<Lock>> {
        Ok(Some(Box::new(())))
    }
}

struct SimFile {
    disk: SimDisk,
    id: u64,
}

impl SimFile {
    fn with<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> io::Result<T> {
        let mut inner = self.disk.inner();
        // A file that was open when the power went is nobody's any more.
        if inner.nodes.contains_key(&self.id) { Ok(act(&mut inner)) } else { Err(io::Error::other("the power went")) }
    }
}

impl DiskFile for SimFile {
    fn size(&self) -> io::Result<u64> {
        self.with(|inner| inner.nodes[&self.id].bytes.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|inner| {
            let found = inner.nodes[&self.id].bytes.get(offset as usize..offset as usize + buffer.len());
            found.map(|found| buffer.copy_from_slice(found)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        })?
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.with(|inner| {
            let len = inner.nodes[&self.id].bytes.len() as u64;
            let grows = (offset + bytes.len() as u64).saturating_sub(len);
            let room = inner.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(inner.used()));
            let fits = if grows > room { bytes.len().saturating_sub((grows - room) as usize) } else { bytes.len() };
            inner.change(self.id, Change::Write(offset as usize, bytes[..fits].to_vec()));
            if fits < bytes.len()
                && let Some(patience) = &mut inner.patience
            {
                *patience -= 1;
                if *patience == 0 {
                    (inner.capacity, inner.patience) = (None, None);
                }
            }
            if fits < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        })?
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(|inner| inner.change(self.id, Change::SetLen(len as usize)))
    }

    fn sync(&self) -> io::Result<()> {
        self.with(|inner| {
            inner.syncs += 1;
            let fails = std::mem::take(&mut inner.sync_fails);
            let node = inner.nodes.get_mut(&self.id).expect("looked up by `with`");
            let pending = std::mem::take(&mut node.pending);
            if fails {
                return Err(io::Error::other("the device failed"));
            }
            pending.iter().for_each(|change| change.apply(&mut node.durable));
            Ok(())
        })?
    }
}
