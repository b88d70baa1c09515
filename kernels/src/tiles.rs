//! AMX: whether this process may use its tiles, and one block of a bfloat16 product in them.
//!
//! Rust has no stable intrinsics for AMX, so the block is assembly: loads, dot products and stores of tiles, whose registers the compiler
//! never uses by itself. Instructions: Intel SDM, volume 2, TDPBF16PS.

#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code)]

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};

use crate::buffer::Line;
use crate::multiply::{Block, Fetch};

/// Rows of a tile, and columns of a block of results.
pub(crate) const TILE: usize = 16;

/// Whether processor and system let this process use bfloat16 tiles. Asks the system for permission, once.
pub(crate) fn permitted() -> bool {
    static PERMITTED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *PERMITTED.get_or_init(|| in_processor() && in_system() && granted())
}

/// CPUID leaf 7: AMX-BF16 and AMX-TILE.
fn in_processor() -> bool {
    if !is_x86_feature_detected!("xsave") || __cpuid_count(0, 0).eax < 7 {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    features & (1 << 22) != 0 && features & (1 << 24) != 0
}

/// The system saves tile configuration and tile data.
fn in_system() -> bool {
    #[target_feature(enable = "xsave")]
    fn saved() -> u64 {
        // SAFETY: the processor has XSAVE, and the register 0 exists with it.
        unsafe { _xgetbv(0) }
    }
    // OSXSAVE: the system has switched XGETBV on.
    if __cpuid_count(1, 0).ecx & (1 << 27) == 0 {
        return false;
    }
    // SAFETY: `in_processor` has looked for XSAVE.
    let saved = unsafe { saved() };
    saved & (0b11 << 17) == 0b11 << 17
}

/// Linux gives tile data only to those who ask: `ARCH_REQ_XCOMP_PERM` for component 18.
#[cfg(target_os = "linux")]
fn granted() -> bool {
    const ARCH_PRCTL: usize = 158;
    const REQUEST: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let answer: isize;
    // SAFETY: arch_prctl(2) with this request takes two plain numbers and changes only what this process may use; a system call overwrites
    // rcx and r11 alone.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL as isize => answer, in("rdi") REQUEST, in("rsi") TILE_DATA,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    answer == 0
}

/// Elsewhere the way to ask is not known.
#[cfg(not(target_os = "linux"))]
fn granted() -> bool {
    false
}

/// What stands between the instructions of a step. On a processor whose other hyperthread is busy, tiles that are loaded one right after another
/// take four times as long as they do apart; a few instructions that do nothing keep them apart. Alone on its core a step takes as long with
/// them as without. Twice as many, or half, gain less, and so does calling for lines that are to come.
macro_rules! apart {
    ($($instruction:literal),+ $(,)?) => { concat!($($instruction, "\n.rept 8\nnop\n.endr\n"),+) };
}

/// Calls for two panels four steps ahead: they come from memory, and the processor does not see so far.
macro_rules! OWN {
    () => {
        ".irp at, 0,64,128,192,256,320,384,448,512,576,640,704,768,832,896,960\n\
         prefetcht0 [{b0} + 3072 + \\at]\n\
         prefetcht0 [{b1} + 3072 + \\at]\n\
         .endr"
    };
}

/// As [`crate::multiply::LATER_LINES`] says.
macro_rules! LATER {
    () => {
        "prefetcht1 [{l0}]\nprefetcht1 [{l0} + 64]\nadd {l0}, 128\n\
         prefetcht1 [{l1}]\nprefetcht1 [{l1} + 64]\nadd {l1}, 128"
    };
}

/// Sums begin at nothing.
macro_rules! ZERO {
    () => {
        "tilezero tmm0\ntilezero tmm1\ntilezero tmm2\ntilezero tmm3"
    };
}

/// Sums begin at what stands there.
macro_rules! LOAD {
    () => {
        "tileloadd tmm0, [{c} + {stride}*1]\ntileloadd tmm1, [{c} + {stride}*1 + 1024]\n\
         tileloadd tmm2, [{c} + {stride}*1 + 2048]\ntileloadd tmm3, [{c} + {stride}*1 + 3072]"
    };
}

/// Two tiles of rows by two panels; what sums begin at, what is called for after a step. The comment at its end names what only some of those
/// name: each operand must be named. Safety: as in [`Tiles::product`].
macro_rules! four {
    ($steps:expr, $a:expr, $b:expr, $later:expr, $c:expr, $begin:expr, $fetch:expr) => {
        asm!(
            $begin,
            "2:",
            apart!(
                "tileloadd tmm6, [{b0} + {stride}*1]",
                "tileloadd tmm4, [{a0} + {stride}*1]",
                "tileloadd tmm7, [{b1} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a1} + {stride}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
            ),
            "add {a0}, 1024", "add {a1}, 1024", "add {b0}, 1024", "add {b1}, 1024",
            $fetch,
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c} + {stride}*1], tmm0",
            "tilestored [{c} + {stride}*1 + 1024], tmm1",
            "tilestored [{c} + {stride}*1 + 2048], tmm2",
            "tilestored [{c} + {stride}*1 + 3072], tmm3",
            "/* {l0} {l1} */",
            a0 = inout(reg) $a[0].as_ptr() => _, a1 = inout(reg) $a[1].as_ptr() => _,
            b0 = inout(reg) $b[0].as_ptr() => _, b1 = inout(reg) $b[1].as_ptr() => _,
            l0 = inout(reg) $later[0].as_ptr() => _, l1 = inout(reg) $later[1].as_ptr() => _,
            c = in(reg) $c.as_mut_ptr(), stride = in(reg) 64usize, steps = inout(reg) $steps => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// One tile of rows by two panels (or twice the same); what sums begin at. Safety: as in [`Tiles::product`].
macro_rules! wide {
    ($steps:expr, $a:expr, $b:expr, $c:expr, $begin:expr) => {
        asm!(
            $begin,
            "2:",
            apart!(
                "tileloadd tmm4, [{a0} + {stride}*1]",
                "tileloadd tmm6, [{b0} + {stride}*1]",
                "tileloadd tmm7, [{b1} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
            ),
            "add {a0}, 1024", "add {b0}, 1024", "add {b1}, 1024",
            OWN!(),
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c} + {stride}*1], tmm0",
            "tilestored [{c} + {stride}*1 + 1024], tmm1",
            a0 = inout(reg) $a.as_ptr() => _, b0 = inout(reg) $b[0].as_ptr() => _, b1 = inout(reg) $b[1].as_ptr() => _,
            c = in(reg) $c.as_mut_ptr(), stride = in(reg) 64usize, steps = inout(reg) $steps => _,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// The tiles of this thread are set up: all eight of 16 rows of 64 bytes. Given back when dropped.
pub(crate) struct Tiles(());

impl Tiles {
    /// `None` where this process may not use them.
    pub(crate) fn take() -> Option<Self> {
        #[repr(C, align(64))]
        struct Config([u8; 64]);
        if !permitted() {
            return None;
        }
        let mut config = Config([0; 64]);
        config.0[0] = 1; // palette
        for tile in 0..8 {
            config.0[16 + 2 * tile] = 64; // bytes of a row, 16 bits each
            config.0[48 + tile] = TILE as u8;
        }
        // SAFETY: AMX is permitted; 64 bytes are read.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Some(Self(()))
    }

    /// `c[i][j] = a[i] b[j]`, for up to two tiles of 16 rows of activations and two panels of 16 columns of weights.
    ///
    /// `a[i]`: `[steps, 16 rows, 32 bf16]`; `b[j]`: `[steps, 16 pairs, 16 columns, 2 bf16]`; `c[i][j]`: `[16 rows, 16 columns]` in f32.
    /// Where the second of `a` or `b` is the first again its results are left as they are.
    ///
    /// # Panics
    /// When the lengths differ or are not whole steps.
    #[inline]
    pub(crate) fn product(&self, a: [&[Line]; 2], b: [&[Line]; 2], fetch: Fetch<'_>, c: &mut Block) {
        let lines = a[0].len();
        assert!(lines.is_multiple_of(TILE) && lines > 0 && [a[1], b[0], b[1]].iter().all(|x| x.len() == lines));
        let twice = [!std::ptr::eq(a[0], a[1]), !std::ptr::eq(b[0], b[1])];
        let steps = lines / TILE;
        // SAFETY: `self` proves that the tiles are set up; each loop reads `lines` lines from each operand, all of which are that long, and
        // each `tilestored` writes the 16 lines of one block of `c`. A prefetch reads nothing: what it calls for need not be there.
        unsafe {
            match (twice, fetch) {
                ([true, true], Fetch::Nothing) => four!(steps, a, b, b, c, ZERO!(), ""),
                ([true, true], Fetch::Own) => four!(steps, a, b, b, c, ZERO!(), OWN!()),
                ([true, true], Fetch::Later(later)) => four!(steps, a, b, later, c, ZERO!(), LATER!()),
                ([true, false], _) => tall(steps, a, b[0], c),
                ([false, _], _) => wide!(steps, a[0], b, c, "tilezero tmm0\ntilezero tmm1"),
            }
        }
    }

    /// `c[i][j] += a[i] b[j]`, for one tile or two of `a` and two of `b`; else as [`Self::product`].
    ///
    /// # Panics
    /// When the lengths differ or are not whole steps.
    #[inline]
    pub(crate) fn add_product(&self, a: [&[Line]; 2], b: [&[Line]; 2], c: &mut Block) {
        let lines = a[0].len();
        assert!(lines.is_multiple_of(TILE) && lines > 0 && [a[1], b[0], b[1]].iter().all(|x| x.len() == lines));
        let steps = lines / TILE;
        // SAFETY: as in `product`; each `tileloadd` of results reads the 16 lines of one block of `c`.
        unsafe {
            match std::ptr::eq(a[0], a[1]) {
                false => four!(steps, a, b, b, c, LOAD!(), ""),
                true => wide!(steps, a[0], b, c, "tileloadd tmm0, [{c} + {stride}*1]\ntileloadd tmm1, [{c} + {stride}*1 + 1024]"),
            }
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the tiles were taken by this value; nothing stands in them that is used later.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Two tiles of rows by one panel. Safety: as in [`Tiles::product`].
#[inline(always)]
unsafe fn tall(steps: usize, a: [&[Line]; 2], b: &[Line], c: &mut Block) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm2",
            "2:",
            apart!(
                "tileloadd tmm6, [{b0} + {stride}*1]",
                "tileloadd tmm4, [{a0} + {stride}*1]",
                "tileloadd tmm5, [{a1} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm2, tmm5, tmm6",
            ),
            "add {a0}, 1024", "add {a1}, 1024", "add {b0}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c} + {stride}*1], tmm0",
            "tilestored [{c} + {stride}*1 + 2048], tmm2",
            a0 = inout(reg) a[0].as_ptr() => _, a1 = inout(reg) a[1].as_ptr() => _, b0 = inout(reg) b.as_ptr() => _,
            c = in(reg) c.as_mut_ptr(), stride = in(reg) 64usize, steps = inout(reg) steps => _,
            out("tmm0") _, out("tmm2") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
            options(nostack),
        );
    }
}
