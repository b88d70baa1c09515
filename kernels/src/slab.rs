//! The paged KV memory of a node: `slots x layers` cells of equal size, shared by the engine thread and the hand-over tasks.
//!
//! Each cell has its own lock, so a cell in flight to another node cannot be overwritten, and a cell being received cannot be read
//! half. Which slot belongs to which sequence is decided by `core::pool`; the slab only refuses what would tear bytes.
//! Memory is taken at a cell's first write: a large pool costs nothing until it is used.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use parking_lot::lock_api::ArcRwLockReadGuard;
use parking_lot::{RawRwLock, RwLock, RwLockReadGuard, RwLockWriteGuard};

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
}

/// One aligned run of bytes: the unit of allocation.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; CELL_ALIGN]);

// SAFETY: `Line` is a `repr(C)` array of bytes of size 64 and alignment 64: no padding, any bit pattern valid, all zeroes included.
#[allow(unsafe_code)]
unsafe impl Zeroable for Line {}
// SAFETY: as above; it is `Copy` and holds no pointer.
#[allow(unsafe_code)]
unsafe impl Pod for Line {}

/// The bytes of a cell; empty until the cell is first touched.
type Store = Box<[Line]>;

/// The cells of a node. See the module text.
pub struct KvSlab {
    cells: Vec<Arc<RwLock<Store>>>,
    cell_bytes: usize,
    layers: usize,
}

impl KvSlab {
    /// A slab of `slots x layers` cells of `cell_bytes` bytes, all zero. The memory is not taken yet.
    ///
    /// # Errors
    /// [`SlabError`] when a size is zero or the whole is over the limits.
    pub fn new(cell_bytes: usize, layers: usize, slots: usize) -> Result<Arc<Self>, SlabError> {
        if cell_bytes == 0 || layers == 0 || slots == 0 {
            return Err(SlabError::Empty { cell_bytes, layers, slots });
        }
        let too_large = SlabError::TooLarge { cell_bytes, layers, slots };
        let Some(count) = layers.checked_mul(slots).filter(|&count| count <= SLAB_CELLS_MAX) else { return Err(too_large) };
        if count.checked_mul(cell_bytes).is_none_or(|bytes| bytes > SLAB_BYTES_MAX) {
            return Err(too_large);
        }
        let cells = (0..count).map(|_| Arc::new(RwLock::new(Store::default()))).collect();
        Ok(Arc::new(Self { cells, cell_bytes, layers }))
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
        let cell = self.cell(slot, layer);
        let guard = cell.read_recursive();
        if !guard.is_empty() {
            return CellRef { guard, bytes: self.cell_bytes };
        }
        drop(guard);
        self.touch(&mut cell.write());
        CellRef { guard: cell.read_recursive(), bytes: self.cell_bytes }
    }

    /// Borrows a cell for writing; waits until no reader and no share is left.
    ///
    /// # Panics
    /// When `slot` or `layer` is out of range.
    #[must_use]
    pub fn write(&self, slot: usize, layer: usize) -> CellMut<'_> {
        let mut guard = self.cell(slot, layer).write();
        self.touch(&mut guard);
        CellMut { guard, bytes: self.cell_bytes }
    }

    /// As [`KvSlab::write`], but `None` instead of waiting.
    ///
    /// # Panics
    /// When `slot` or `layer` is out of range.
    #[must_use]
    pub fn try_write(&self, slot: usize, layer: usize) -> Option<CellMut<'_>> {
        let mut guard = self.cell(slot, layer).try_write()?;
        self.touch(&mut guard);
        Some(CellMut { guard, bytes: self.cell_bytes })
    }

    /// An owned read guard: whoever holds it sees these bytes unchanged, on any thread, without a copy.
    ///
    /// # Panics
    /// When `slot` or `layer` is out of range.
    #[must_use]
    pub fn share(&self, slot: usize, layer: usize) -> SharedCell {
        let cell = self.cell(slot, layer);
        let guard = cell.read_arc_recursive();
        if !guard.is_empty() {
            return SharedCell { guard, bytes: self.cell_bytes };
        }
        drop(guard);
        self.touch(&mut cell.write());
        SharedCell { guard: cell.read_arc_recursive(), bytes: self.cell_bytes }
    }

    /// The cell's lock.
    fn cell(&self, slot: usize, layer: usize) -> &Arc<RwLock<Store>> {
        assert!(layer < self.layers && slot < self.slots(), "cell ({slot}, {layer}) of {} x {}", self.slots(), self.layers);
        &self.cells[slot * self.layers + layer]
    }

    /// Takes the memory of a cell that has none yet.
    fn touch(&self, store: &mut Store) {
        if store.is_empty() {
            *store = vec![Line::zeroed(); self.cell_bytes.div_ceil(CELL_ALIGN)].into_boxed_slice();
        }
    }
}

/// A cell borrowed for reading.
pub struct CellRef<'a> {
    guard: RwLockReadGuard<'a, Store>,
    bytes: usize,
}

impl Deref for CellRef<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.guard)[..self.bytes]
    }
}

/// A cell borrowed for writing.
pub struct CellMut<'a> {
    guard: RwLockWriteGuard<'a, Store>,
    bytes: usize,
}

impl Deref for CellMut<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.guard)[..self.bytes]
    }
}

impl DerefMut for CellMut<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.guard)[..self.bytes]
    }
}

/// A cell that stays readable and unwritten until this is dropped, on whichever thread.
pub struct SharedCell {
    guard: ArcRwLockReadGuard<RawRwLock, Store>,
    bytes: usize,
}

impl AsRef<[u8]> for SharedCell {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.guard)[..self.bytes]
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
    #[should_panic(expected = "cell (2, 0) of 2 x 1")]
    fn a_slot_out_of_range_stops() {
        let _ = KvSlab::new(64, 1, 2).unwrap().read(2, 0);
    }
}
