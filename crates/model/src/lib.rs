//! `millrace-model` computes: it turns a step of rows into KV cells and sampled tokens. The only crate that reaches LibTorch.
//!
//! Which rows make a step and which slots they own is decided by `millrace-core`; how a model file is read by `millrace-checkpoint`.
//! Three engines stand behind `core::engine::Engine`: [`ModelEngine`] for processors, [`TensorEngine`] for CUDA devices, and
//! [`checksum::ChecksumEngine`] for tests.

mod angles;
pub mod args;
mod attend;
pub mod bench;
mod check;
pub mod checksum;
pub mod compute;
mod decoder;
pub mod device;
mod engine;
mod error;
mod experts;
mod feed;
mod heads;
mod latent;
mod linear;
pub mod open;
pub mod sampler;
mod tail;
pub mod tensor;
mod tensors;

pub use compute::{Compute, Switch};
pub use device::DeviceChoice;
pub use engine::ModelEngine;
pub use error::ModelError;
pub use millrace_core::layout::{Dtype, KvDtype};
pub use tensor::TensorEngine;
