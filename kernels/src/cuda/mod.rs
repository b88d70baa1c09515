//! Kernels for CUDA devices: their text, and what compiles and launches it. No toolkit is needed to build: the driver and NVRTC are
//! opened when a device is, and everything else in this crate works without either.
//!
//! The text (`kernels/cuda/*.cu`) is compiled by NVRTC for the shape of one model ([`text`]), launched by [`Gpu`]. LibTorch is not known here: its
//! tensors come as addresses ([`OnDevice`]). Which cells are read and written is decided by the engine.

mod gpu;
mod library;
mod text;

pub use gpu::{Gpu, GpuError, Landing, OnDevice, Pool, Singles, device_name};
pub use library::{LibraryError, open_library, open_nvrtc};
pub use text::{CONTEXT_NUMBERS, SPAN_NUMBERS, THREADS, attend_grid, can_attend, part_tokens, parts, text};
