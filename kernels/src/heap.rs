//! One setting of the C heap. A step's activations are a few megabytes that are freed and asked for again at once; glibc's defaults
//! give them back to the system each time, and a fifth of a prefill went into page faults.

/// Keeps freed memory in the process: blocks below 32 MiB come from the heap, and the heap shrinks only above 1 GiB of free memory at
/// its end. For the whole process; asking twice changes nothing. Does nothing where the C library is not glibc.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::keep_freed();
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
mod glibc {
    /// `M_TRIM_THRESHOLD` and `M_MMAP_THRESHOLD` of `malloc.h`.
    const TRIM_THRESHOLD: i32 = -1;
    const MMAP_THRESHOLD: i32 = -3;

    unsafe extern "C" {
        fn mallopt(parameter: i32, value: i32) -> i32;
    }

    pub(super) fn keep_freed() {
        // SAFETY: mallopt(3) takes two plain numbers, locks the arena itself, and refuses by returning 0 what it does not accept.
        unsafe {
            mallopt(MMAP_THRESHOLD, 32 << 20);
            mallopt(TRIM_THRESHOLD, 1 << 30);
        }
    }
}
