//! Which instruction set the kernels of this process use. Decides nothing else.

use std::sync::OnceLock;

/// An instruction set that the kernels are compiled for, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the target guarantees; multiply and add round twice.
    Portable,
    /// AVX2 with fused multiply-add and conversion of half precision.
    Avx2,
    /// The same with AVX-VNNI: dot products of bytes.
    Avx2Dot,
    /// AVX-512 foundation, byte/word, doubleword/quadword and vector-length parts.
    Avx512,
    /// The same with BF16 and VNNI, dot products of bfloat16 and of bytes, and with VBMI.
    Avx512Dot,
    /// The same with AMX tiles for bfloat16, which the system lets this process use.
    Amx,
}

impl Isa {
    /// The best set of this machine, found once.
    #[must_use]
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().into_iter().max().unwrap_or(Self::Portable))
    }

    /// Whether it has dot products of bfloat16.
    #[must_use]
    pub fn has_bf16(self) -> bool {
        self >= Self::Avx512Dot
    }

    /// Every set this machine can run, weakest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        use Isa::{Amx, Avx2, Avx2Dot, Avx512, Avx512Dot, Portable};
        [Portable, Avx2, Avx2Dot, Avx512, Avx512Dot, Amx].into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this machine can run it.
    #[cfg(target_arch = "x86_64")]
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"),
            Self::Avx2Dot => Self::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            Self::Avx512Dot => {
                Self::Avx512.is_available()
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512vbmi")
            }
            Self::Amx => Self::Avx512Dot.is_available() && crate::tiles::permitted(),
        }
    }

    /// Whether this machine can run it.
    #[cfg(not(target_arch = "x86_64"))]
    #[must_use]
    pub fn is_available(self) -> bool {
        self == Self::Portable
    }
}
