//! Memory for weights and activations: zeroed, aligned to cache lines, in huge pages where it is large. Streaming weights through 4 KiB
//! pages costs a walk of the page table every 64 lines.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytemuck::{Pod, Zeroable};

/// Sixteen words of 32 bits: a cache line, the widest vector, one row of a tile.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line(pub [u32; 16]);

// SAFETY: `Line` is a `repr(C)` array of words of size 64 and alignment 64: no padding, any bit pattern valid, all zeroes included.
unsafe impl Zeroable for Line {}
// SAFETY: as above; it is `Copy` and holds no pointer.
unsafe impl Pod for Line {}

/// A huge page: from this size on memory begins on one.
pub(crate) const HUGE_BYTES: usize = 2 << 20;

/// Owned lines that do not move.
pub(crate) struct Buffer {
    start: NonNull<Line>,
    lines: usize,
}

// SAFETY: a buffer owns its memory alone, as a boxed slice does.
unsafe impl Send for Buffer {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `lines` lines of zero.
    pub(crate) fn zeroed(lines: usize) -> Self {
        if lines == 0 {
            return Self { start: NonNull::dangling(), lines };
        }
        let layout = Self::layout(lines);
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc(layout) };
        let Some(start) = NonNull::new(memory.cast::<Line>()) else { handle_alloc_error(layout) };
        if layout.align() == HUGE_BYTES {
            advise_huge(memory, layout.size());
        }
        // SAFETY: the memory is there, `lines` lines long, and nobody else knows of it.
        unsafe { start.write_bytes(0, lines) };
        Self { start, lines }
    }

    fn layout(lines: usize) -> Layout {
        let plain = Layout::array::<Line>(lines).expect("a buffer is smaller than the address space");
        match plain.size() >= HUGE_BYTES {
            true => plain.align_to(HUGE_BYTES).expect("the alignment is a power of two"),
            false => plain,
        }
    }
}

impl Deref for Buffer {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        // SAFETY: `start` is valid for `lines` initialised lines as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.lines) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [Line] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.lines) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.lines > 0 {
            // SAFETY: the memory came from `alloc` with this very layout.
            unsafe { dealloc(self.start.as_ptr().cast(), Self::layout(self.lines)) }
        }
    }
}

/// Asks the system for huge pages under a range of our own; a refusal changes nothing but speed.
pub(crate) fn advise_huge(memory: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: this advice changes how a range of our own memory is backed, never what stands in it.
        let _ = unsafe { rustix::mm::madvise(memory.cast(), bytes, rustix::mm::Advice::LinuxHugepage) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (memory, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_huge_are_zero_and_aligned() {
        for lines in [0, 1, 100, HUGE_BYTES / 64, HUGE_BYTES / 64 * 3 + 1] {
            let mut buffer = Buffer::zeroed(lines);
            assert!(buffer.len() == lines && buffer.iter().all(|line| line.0 == [0; 16]));
            let align = if lines * 64 >= HUGE_BYTES { HUGE_BYTES } else { 64 };
            assert_eq!(buffer.as_ptr() as usize % align, 0);
            buffer.iter_mut().enumerate().for_each(|(i, line)| line.0[15] = i as u32);
            assert!(buffer.iter().enumerate().all(|(i, line)| line.0[15] == i as u32));
        }
    }
}
