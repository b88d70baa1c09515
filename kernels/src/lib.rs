//! `millrace-kernels` is the hand-written compute and the memory it runs on: the paged KV slab, attention over it, and
//! what stands between the matrix products of a layer.
//! No LibTorch here and no policy: which slot belongs to whom is decided by `millrace-core`.
//!
//! This is the only crate that may use `unsafe`; each place says on what fact it rests. Every kernel has one body, compiled for the portable target,
//! for AVX2+FMA and for AVX-512, and picked at run time ([`isa::Isa`]). Kernels for CUDA devices are text, compiled when a device is opened ([`cuda`]).

pub mod attention;
mod buffer;
pub mod chunk;
pub mod convert;
pub mod cuda;
pub mod element;
pub mod elementwise;
mod gated;
pub mod heap;
pub mod isa;
mod lanes;
pub mod logits;
pub mod matrix;
mod multiply;
mod piece;
pub mod product;
pub mod rope;
mod rows;
pub mod slab;
pub mod team;
#[cfg(target_arch = "x86_64")]
mod tiles;

pub use attention::{AttentionError, DecodeShape, RowPart, merge_parts, paged_decode, paged_part};
pub use chunk::{Chunk, ChunkAttention};
pub use element::Element;
pub use isa::Isa;
pub use matrix::{Format, Matrix, MatrixError, Source};
pub use product::{Into, Precision, Products};
pub use rows::Norm;
pub use slab::{KvSlab, Place, SlabError};
pub use team::Team;
