//! One run of memory cut into equal parts that are lent apart: what a slab in one piece stands on.
//!
//! A device may read and write the whole run by its address; whoever lets it holds the locks of the parts that are meant.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Page-locking works on whole pages: the run begins on one of its own.
const PAGE_BYTES: usize = 4096;

/// The run.
pub(crate) struct Piece {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the piece itself gives no access to its bytes; parts do, each to its own.
unsafe impl Send for Piece {}
// SAFETY: as above.
unsafe impl Sync for Piece {}

/// One part of a piece, owned: nobody else has it.
pub(crate) struct Part {
    start: NonNull<u8>,
    bytes: usize,
    /// Keeps the memory.
    _piece: Arc<Piece>,
}

// SAFETY: a part owns its bytes alone, as a boxed slice does.
unsafe impl Send for Part {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Part {}

impl Piece {
    /// `count` parts of `bytes` bytes each, all zero, one after the other.
    ///
    /// # Panics
    /// When there are none, or they are more than the address space.
    pub(crate) fn zeroed(bytes: usize, count: usize) -> (Arc<Self>, impl Iterator<Item = Part>) {
        let whole = bytes.checked_mul(count).filter(|&whole| whole > 0).expect("a slab's size is checked");
        let layout = Layout::from_size_align(whole, PAGE_BYTES).expect("a slab is smaller than the address space");
        // SAFETY: the layout is not empty.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        let piece = Arc::new(Self { start, layout });
        let parts = (0..count).scan(piece.clone(), move |piece, index| {
            // SAFETY: part `index` of `count` lies within the allocation.
            Some(Part { start: unsafe { piece.start.add(index * bytes) }, bytes, _piece: piece.clone() })
        });
        (piece, parts)
    }

    /// Where it begins.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Its length.
    pub(crate) fn bytes(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // SAFETY: the memory came from `alloc_zeroed` with this very layout, and every part that pointed into it is gone.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl Deref for Part {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `zeroed` gave these bytes to this part only, and they live as long as the piece.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
}

impl DerefMut for Part {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}
