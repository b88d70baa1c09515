//! One run of memory cut into equal parts that are lent apart: what a slab stands on.
//!
//! It is mapped, not allocated: the system gives pages, all zero, as they are first touched, and huge ones where it has them.
//! A device may read and write the whole run by its address; whoever lets it holds the locks of the parts that are meant.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

#[cfg(target_os = "linux")]
use rustix::mm::{Advice, madvise};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::buffer::{HUGE_BYTES, advise_huge};

/// The run.
pub(crate) struct Piece {
    /// What is mapped: the run, and what is skipped before it so that it begins on a huge page.
    mapped: NonNull<c_void>,
    mapped_bytes: usize,
    start: NonNull<u8>,
    bytes: usize,
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
    /// # Errors
    /// When the system does not map so much.
    ///
    /// # Panics
    /// When there are none, or they are more than the address space.
    pub(crate) fn zeroed(bytes: usize, count: usize) -> io::Result<(Arc<Self>, impl Iterator<Item = Part>)> {
        let whole = bytes.checked_mul(count).filter(|&whole| whole > 0).expect("a slab's size is checked");
        let mapped_bytes = whole.checked_add(HUGE_BYTES).expect("a slab is smaller than the address space");
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at a place that the system picks touches nothing of ours.
        let mapped = unsafe { mmap_anonymous(null_mut(), mapped_bytes, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        let mapped = NonNull::new(mapped).expect("a mapping is nowhere near zero");
        let skipped = mapped.cast::<u8>().align_offset(HUGE_BYTES);
        // SAFETY: less than a huge page is skipped, and so much more than the run was mapped.
        let start = unsafe { mapped.cast::<u8>().add(skipped) };
        if whole >= HUGE_BYTES {
            advise_huge(start.as_ptr(), whole);
        }
        let piece = Arc::new(Self { mapped, mapped_bytes, start, bytes: whole });
        let parts = (0..count).scan(piece.clone(), move |piece, index| {
            // SAFETY: part `index` of `count` lies within the run.
            Some(Part { start: unsafe { piece.start.add(index * bytes) }, bytes, _piece: piece.clone() })
        });
        Ok((piece, parts))
    }

    /// Where it begins.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Its length.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Has the system give all its pages now. What stands in them stays.
    ///
    /// # Errors
    /// When it has not so much, or does not do this.
    pub(crate) fn populate(&self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        {
            // SAFETY: this advice has the system back a range of our own memory, as touching it would; it changes nothing that stands there.
            unsafe { madvise(self.start.as_ptr().cast(), self.bytes, Advice::LinuxPopulateWrite) }?;
            Ok(())
        }
        #[cfg(not(target_os = "linux"))]
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // SAFETY: this is what was mapped, and every part that pointed into it is gone.
        let unmapped = unsafe { munmap(self.mapped.as_ptr(), self.mapped_bytes) };
        debug_assert!(unmapped.is_ok(), "a mapping of our own: {unmapped:?}");
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
