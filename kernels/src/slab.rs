//! The paged KV memory of a node: `slots x layers` cells of equal size, shared by the engine thread and the hand-over tasks.
//!
//! Each cell has its own lock, so a cell in flight to another node cannot be overwritten, and a cell being received cannot be read
//! half. Which slot belongs to which sequence is decided by `core::pool`; the slab only refuses what would tear bytes.
//! Its memory is one piece, slot by slot, in huge pages where the system has them, so that a cell's place is known without its lock and may be called
//! for ahead. It is taken as it is first touched: a large pool costs nothing until it is used.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::lock_api::{ArcRwLockReadGuard, ArcRwLockWriteGuard};
use parking_lot::{RawRwLock, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::lanes::call_line;
use crate::piece::{Part, Piece};

/// Most cells of one slab.
pub const SLAB_CELLS_MAX: usize = 1 << 24;
/// Most bytes of one slab.
pub const SLAB_BYTES_MAX: usize = 1 << 42;
/// Every cell begins on such a boundary: a cache line, and the widest vector.
pub const CELL_ALIGN: usize = 64;

/// Why a slab cannot be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SlabError {
    /// A size is zero.
    #[error("a KV slab needs at least one byte, layer and slot (got {cell_bytes} bytes, {layers} layers, {slots} slots)")]
    Empty {
        /// Bytes of one cell.
        cell_bytes: usize,
        /// Layers.
        layers: usize,
        /// Slots.
        slots: usize,
    },
    /// More than [`SLAB_CELLS_MAX`] cells or [`SLAB_BYTES_MAX`] bytes.
    #[error("a KV slab of {layers} x {slots} cells of {cell_bytes} bytes is over the limit")]
    TooLarge {
        /// Bytes of one cell.
        cell_bytes: usize,
        /// Layers.
        layers: usize,
        /// Slots.
        slots: usize,
    },
    /// The system does not map so much.
    #[error("no room for a KV slab of {bytes} bytes: {error}")]
    NoMemory {
        /// Bytes of all cells.
        bytes: usize,
        /// What it says.
        error: String,
    },
}

/// The cells of a node. See the module text.
pub struct KvSlab {
    cells: Vec<Arc<RwLock<Part>>>,
    /// Of each slot how often one of its cells was borrowed for writing.
    writes: Vec<AtomicU64>,
    cell_bytes: usize,
    layers: usize,
    piece: Arc<Piece>,
}

impl KvSlab {
    /// A slab of `slots x layers` cells of `cell_bytes` bytes, all zero: the cell of `(slot, layer)` begins at
    /// `(slot * layers + layer) * cell_bytes`, where `cell_bytes` is rounded up to [`CELL_ALIGN`].
    ///
    /// # Errors
    /// [`SlabError`] when a size is zero, the whole is over the limits, or the system has no room for it.
    pub fn new(cell_bytes: usize, layers: usize, slots: usize) -> Result<Arc<Self>, SlabError> {
        check(cell_bytes, layers, slots)?;
        let (piece, parts) = Piece::zeroed(cell_bytes.next_multiple_of(CELL_ALIGN), layers * slots)
            .map_err(|error| SlabError::NoMemory { bytes: cell_bytes * layers * slots, error: error.to_string() })?;
        let cells = parts.map(|part| Arc::new(RwLock::new(part))).collect();
        let writes = (0..slots).map(|_| AtomicU64::new(0)).collect();
        Ok(Arc::new(Self { cells, writes, cell_bytes, layers, piece }))
    }

    /// Takes all of its memory now, so that nobody who writes a cell later waits for a page.
    ///
    /// # Errors
    /// [`SlabError::NoMemory`] when the system has not so much, or gives memory only as it is touched.
    pub fn populate(&self) -> Result<(), SlabError> {
        self.piece.populate().map_err(|error| SlabError::NoMemory { bytes: self.piece.bytes(), error: error.to_string() })
    }

    /// Its memory.
    pub(crate) fn piece(&self) -> &Arc<Piece> {
        &self.piece
    }

    /// Bytes of one cell.
    #[must_use]
    pub fn cell_bytes(&self) -> usize {
        self.cell_bytes
    }

    /// Layers of each slot.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Slots, numbered from 0.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.cells.len() / self.layers
    }

    /// Borrows a cell for reading. Waits only for a writer that holds it, never for one that waits, so one thread may hold
    /// several read guards.
    ///
    /// # Panics
    /// When `slot` or `layer` is out of range.
    #[must_use]
    pub fn read(&self, slot: usize, layer: usize) -> CellRef<'_> {
        CellRef { guard: self.cell(slot, layer).read_recursive(), bytes: self.cell_bytes }
    }

    /// Borrows a cell for writing; waits until no reader and no share is left.
    ///
    /// # Panics
    /// When `slot` or `layer` is out of range.
    #[must_use]
    pub fn write(&self, slot: usize, layer: usize) -> CellMut<'_> {
        let guard = self.cell(slot, layer).write();
        self.writes[slot].fetch_add(1, Ordering::Release);
        CellMut { guard, bytes: self.cell_bytes }
    }

    /// As [`KvSlab::write`], but `None` instead of waiting.
    ///
    /// # Panics
    /// When `slot` or `layer` is out of range.
    #[must_use]
    pub fn try_write(&self, slot: usize, layer: usize) -> Option<CellMut<'_>> {
        let guard = self.cell(slot, layer).try_write()?;
        self.writes[slot].fetch_add(1, Ordering::Release);
        Some(CellMut { guard, bytes: self.cell_bytes })
    }

    /// An owned read guard: whoever holds it sees these bytes unchanged, on any thread, without a copy.
    ///
    /// # Panics
    /// When `slot` or `layer` is out of range.
    #[must_use]
    pub fn share(&self, slot: usize, layer: usize) -> SharedCell {
        SharedCell { guard: self.cell(slot, layer).read_arc_recursive(), bytes: self.cell_bytes }
    }

    /// An owned write guard, for an engine that brings a cell up to what it holds itself: not counted by [`KvSlab::writes`].
    /// Waits as [`KvSlab::write`] does.
    ///
    /// # Panics
    /// When `slot` or `layer` is out of range.
    #[must_use]
    pub fn seize(&self, slot: usize, layer: usize) -> SeizedCell {
        SeizedCell { guard: self.cell(slot, layer).write_arc(), bytes: self.cell_bytes }
    }

    /// As [`KvSlab::seize`], but `None` instead of waiting.
    ///
    /// # Panics
    /// When `slot` or `layer` is out of range.
    #[must_use]
    pub fn try_seize(&self, slot: usize, layer: usize) -> Option<SeizedCell> {
        Some(SeizedCell { guard: self.cell(slot, layer).try_write_arc()?, bytes: self.cell_bytes })
    }

    /// How often a cell of this slot was borrowed by [`KvSlab::write`] and [`KvSlab::try_write`]. An engine that keeps a copy of its own reads this
    /// before it copies, and copies again when it has changed.
    ///
    /// # Panics
    /// When `slot` is out of range.
    #[must_use]
    pub fn writes(&self, slot: usize) -> u64 {
        self.writes[slot].load(Ordering::Acquire)
    }

    /// Where a cell stands, whoever holds it.
    ///
    /// # Panics
    /// When `slot` or `layer` is out of range.
    #[must_use]
    pub fn place(&self, slot: usize, layer: usize) -> Place {
        Place(self.piece.start().as_ptr().wrapping_add(self.index(slot, layer) * self.cell_bytes.next_multiple_of(CELL_ALIGN)))
    }

    /// The cell's lock.
    fn cell(&self, slot: usize, layer: usize) -> &Arc<RwLock<Part>> {
        &self.cells[self.index(slot, layer)]
    }

    fn index(&self, slot: usize, layer: usize) -> usize {
        assert!(layer < self.layers && slot < self.slots(), "cell ({slot}, {layer}) of {} x {}", self.slots(), self.layers);
        slot * self.layers + layer
    }
}

fn check(cell_bytes: usize, layers: usize, slots: usize) -> Result<(), SlabError> {
    if cell_bytes == 0 || layers == 0 || slots == 0 {
        return Err(SlabError::Empty { cell_bytes, layers, slots });
    }
    let too_large = SlabError::TooLarge { cell_bytes, layers, slots };
    let Some(count) = layers.checked_mul(slots).filter(|&count| count <= SLAB_CELLS_MAX) else { return Err(too_large) };
    if count.checked_mul(cell_bytes).is_none_or(|bytes| bytes > SLAB_BYTES_MAX) {
        return Err(too_large);
    }
    Ok(())
}

/// Where a cell stands: only to be called for, nobody's to read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(*const u8);

impl Place {
    /// Where `what` stands.
    #[inline(always)]
    pub(crate) fn of<T>(what: &[T]) -> Self {
        Self(what.as_ptr().cast())
    }

    /// What stands so many bytes behind it.
    #[inline(always)]
    pub(crate) fn behind(self, bytes: usize) -> Self {
        Self(self.0.wrapping_add(bytes))
    }

    /// Asks the processor to bring the line that stands here near, where it can be asked. Changes nothing else.
    #[inline(always)]
    pub(crate) fn call_for(self) -> Self {
        call_line(self.0);
        self
    }
}

/// A cell borrowed for reading.
pub struct CellRef<'a> {
    guard: RwLockReadGuard<'a, Part>,
    bytes: usize,
}

impl Deref for CellRef<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.guard[..self.bytes]
    }
}

/// A cell borrowed for writing.
pub struct CellMut<'a> {
    guard: RwLockWriteGuard<'a, Part>,
    bytes: usize,
}

impl Deref for CellMut<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.guard[..self.bytes]
    }
}

impl DerefMut for CellMut<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.guard[..self.bytes]
    }
}

/// A cell that stays readable and unwritten until this is dropped, on whichever thread.
pub struct SharedCell {
    guard: ArcRwLockReadGuard<RawRwLock, Part>,
    bytes: usize,
}

impl AsRef<[u8]> for SharedCell {
    fn as_ref(&self) -> &[u8] {
        &self.guard[..self.bytes]
    }
}

/// A cell that nobody else reads or writes until this is dropped, on whichever thread.
pub struct SeizedCell {
    guard: ArcRwLockWriteGuard<RawRwLock, Part>,
    bytes: usize,
}

impl Deref for SeizedCell {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.guard[..self.bytes]
    }
}

impl DerefMut for SeizedCell {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.guard[..self.bytes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bounded() {
        assert!(matches!(KvSlab::new(0, 1, 1), Err(SlabError::Empty { .. })));
        assert!(matches!(KvSlab::new(64, 1 << 13, 1 << 13), Err(SlabError::TooLarge { .. })));
        assert!(matches!(KvSlab::new(usize::MAX, 2, 2), Err(SlabError::TooLarge { .. })));
        assert!(matches!(KvSlab::new(1, usize::MAX, 2), Err(SlabError::TooLarge { .. })));
    }

    #[test]
    fn cells_are_apart_aligned_and_zero_at_first() {
        let slab = KvSlab::new(100, 3, 5).unwrap();
        assert_eq!((slab.cell_bytes(), slab.layers(), slab.slots()), (100, 3, 5));
        for slot in 0..5 {
            for layer in 0..3 {
                assert!(slab.read(slot, layer).iter().all(|&b| b == 0));
                slab.write(slot, layer).fill((slot * 3 + layer + 1) as u8);
            }
        }
        for slot in 0..5 {
            for layer in 0..3 {
                let cell = slab.read(slot, layer);
                assert_eq!((cell.len(), cell.as_ptr() as usize % CELL_ALIGN), (100, 0));
                assert!(cell.iter().all(|&b| b == (slot * 3 + layer + 1) as u8));
            }
        }
    }

    #[test]
    fn a_shared_cell_cannot_be_written_and_travels_between_threads() {
        let slab = KvSlab::new(64, 1, 2).unwrap();
        slab.write(1, 0).fill(7);
        let shared = slab.share(1, 0);
        assert!(slab.try_write(1, 0).is_none());
        assert!(slab.try_write(0, 0).is_some());
        assert!(slab.read(1, 0).iter().all(|&b| b == 7));
        std::thread::spawn(move || assert!(shared.as_ref().iter().all(|&b| b == 7))).join().unwrap();
        assert!(slab.try_write(1, 0).is_some());
    }

    #[test]
    fn a_slab_lies_slot_by_slot() {
        let slab = KvSlab::new(100, 3, 5).unwrap();
        let start = slab.piece().start().as_ptr() as usize;
        for (slot, layer) in [(0, 0), (0, 2), (4, 1)] {
            assert_eq!(slab.read(slot, layer).as_ptr() as usize - start, (slot * 3 + layer) * 128);
        }
        let shared = slab.share(4, 2);
        drop(slab);
        assert!(shared.as_ref().iter().all(|&b| b == 0), "a cell keeps the piece that it is of");
    }

    #[test]
    fn a_slab_costs_nothing_until_it_is_used() {
        // More than the memory of most machines, and of every one that this is likely to be tested on.
        let slab = KvSlab::new(1 << 20, 1, 1 << 18).unwrap();
        slab.write((1 << 18) - 1, 0)[0] = 5;
        assert_eq!((slab.read((1 << 18) - 1, 0)[0], slab.read(7, 0)[0]), (5, 0));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_populated_slab_has_its_memory_and_what_stood_there() {
        let slab = KvSlab::new(1 << 20, 1, 64).unwrap();
        slab.write(63, 0)[5] = 7;
        let start = slab.piece().start().as_ptr() as usize;
        // Kilobytes of the slab's mapping that are there.
        let resident = || -> usize {
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let mut of_slab = maps.lines().skip_while(|line| {
                let range = line.split(' ').next().and_then(|range| range.split_once('-'));
                let ends = range.map(|(from, to)| (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16)));
                !matches!(ends, Some((Ok(from), Ok(to))) if (from..to).contains(&start))
            });
            let line = of_slab.find_map(|line| line.strip_prefix("Rss:")).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        assert!(resident() < 32 << 10);
        slab.populate().unwrap();
        assert!(resident() >= 64 << 10);
        assert_eq!((slab.read(63, 0)[5], slab.read(3, 0)[0]), (7, 0));
    }

    #[test]
    fn others_writes_are_counted_slot_by_slot() {
        let slab = KvSlab::new(64, 2, 2).unwrap();
        drop(slab.write(1, 0));
        drop(slab.try_write(1, 1));
        slab.seize(1, 0).fill(9);
        let _ = (slab.read(0, 0), slab.share(0, 1));
        assert_eq!([slab.writes(0), slab.writes(1)], [0, 2]);
        assert!(slab.read(1, 0).iter().all(|&b| b == 9));
        let held = slab.seize(0, 0);
        assert!(slab.try_write(0, 0).is_none() && slab.writes(0) == 0);
        drop(held);
    }

    #[test]
    #[should_panic(expected = "cell (2, 0) of 2 x 1")]
    fn a_slot_out_of_range_stops() {
        let _ = KvSlab::new(64, 1, 2).unwrap().read(2, 0);
    }
}
