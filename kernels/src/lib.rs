//! `millrace-kernels` is the hand-written compute and the memory it runs on: the paged KV slab, attention over it, and
//! what stands between the matrix products of a layer.
//! No LibTorch here and no policy: which slot belongs to whom is decided by `millrace-core`.
//!
//! This is the only crate that may use `unsafe`; each place says on what fact it rests. Every kernel has one body, compiled for the portable target,
//! for AVX2+FMA and for AVX-512, and picked at run time ([`isa::Isa`]).

pub mod attention;
pub mod convert;
pub mod elementwise;
pub mod heap;
pub mod isa;
mod lanes;
pub mod rope;
pub mod slab;

pub use attention::{AttentionError, DecodeShape, Element, paged_decode};
pub use isa::Isa;
pub use slab::{KvSlab, SlabError};
