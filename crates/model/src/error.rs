//! What can go wrong in the computing of a model.

use millrace_checkpoint::CheckpointError;
use millrace_core::engine::EngineError;
use millrace_kernels::cuda::GpuError;
use millrace_kernels::{AttentionError, MatrixError, SlabError};

use crate::device::DeviceError;

/// Why a model could not be loaded or a step not be computed.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The model file lacks a tensor or is unsound.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The KV memory cannot be made.
    #[error(transparent)]
    Slab(#[from] SlabError),
    /// A number of the model or of the settings does not fit the KV layout.
    #[error("{field} {value} does not fit the KV layout")]
    Layout {
        /// Its name.
        field: &'static str,
        /// What it was.
        value: usize,
    },
    /// LibTorch refused.
    #[error("LibTorch: {0}")]
    Torch(#[from] tch::TchError),
    /// Weights that are not a matrix.
    #[error(transparent)]
    Matrix(#[from] MatrixError),
    /// The attention kernel refused.
    #[error(transparent)]
    Attention(#[from] AttentionError),
    /// A buffer and a tensor shape do not belong together.
    #[error("{got} numbers for a tensor of {shape:?}")]
    Numbers {
        /// Numbers given.
        got: usize,
        /// Sides of the tensor.
        shape: Vec<i64>,
    },
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A device refused.
    #[error("CUDA: {0}")]
    Gpu(#[from] GpuError),
    /// Something that only processors do.
    #[error("a CUDA device does not do {0}; --device cpu does")]
    OnlyOnProcessors(&'static str),
    /// A measured engine failed.
    #[error("{0}")]
    Bench(String),
    /// A row of the step cannot be computed as asked.
    #[error("row {row}: {what}")]
    Row {
        /// Its index in the step.
        row: usize,
        /// What is wrong.
        what: String,
    },
}

impl From<ModelError> for EngineError {
    fn from(error: ModelError) -> Self {
        Self(error.to_string())
    }
}
