//! Opens a model file as an engine with its KV memory: what a node's process does first.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use millrace_checkpoint::Checkpoint;
use millrace_core::engine::Engine;
use millrace_core::message::ModelIdentity;
use millrace_kernels::KvSlab;

use crate::checksum::{ChecksumConfig, ChecksumEngine};
use crate::tensor::{Settings, TensorEngine};
use crate::{Compute, DeviceChoice, Dtype, ModelEngine, ModelError};

/// Which engine computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// The model.
    #[default]
    Model,
    /// Arithmetic over the KV bytes actually read; for tests of everything around the engine.
    Checksum {
        /// Time spent on each computed token.
        token_delay: Duration,
    },
}

/// What to open and how.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// Model directory or GGUF file.
    pub path: &'a Path,
    /// The model's public name; from the path if absent.
    pub name: Option<&'a str>,
    /// Type of weights and activations, and of KV where `compute` does not say otherwise.
    pub dtype: Dtype,
    /// Tokens of one block.
    pub block_tokens: u16,
    /// Blocks of the KV memory.
    pub slots: usize,
    /// How it computes.
    pub compute: Compute,
    /// Which engine.
    pub engine: EngineKind,
    /// Where it computes.
    pub device: DeviceChoice,
}

/// An engine, ready.
pub struct Opened {
    /// The engine.
    pub engine: Box<dyn Engine>,
    /// Its KV memory, for the hand-over tasks.
    pub slab: Arc<KvSlab>,
    /// What the cluster compares.
    pub identity: ModelIdentity,
    /// Tokens of context.
    pub positions: usize,
}

/// Opens a model.
///
/// # Errors
/// [`ModelError`]: the file is unsound or unsupported, memory is over its limits, or the device cannot be used.
pub fn open(options: &Options<'_>) -> Result<Opened, ModelError> {
    let Options { dtype, block_tokens, slots, compute, .. } = *options;
    let device = options.device.open()?;
    let checkpoint = Checkpoint::open(options.path)?;
    let name = options.name.map_or_else(|| checkpoint.default_name(), str::to_owned);
    let identity = checkpoint.identity(&name, options.compute.cached_as(dtype), block_tokens);
    let positions = checkpoint.config.max_positions;
    let (engine, slab): (Box<dyn Engine>, _) = match options.engine {
        EngineKind::Model if device.is_cuda() => {
            let settings = Settings { device, dtype, slots, block_tokens, compute };
            let (engine, slab, _) = TensorEngine::load(&checkpoint, settings)?;
            (Box::new(engine), slab)
        }
        EngineKind::Model => {
            let (engine, slab, _) = ModelEngine::load(&checkpoint, dtype, slots, block_tokens, compute)?;
            (Box::new(engine), slab)
        }
        EngineKind::Checksum { token_delay } => {
            let vocab = checkpoint.config.vocab_size as u32;
            let config = ChecksumConfig { layout: identity.layout, vocab, max_positions: positions, token_delay };
            let (engine, slab, _) = ChecksumEngine::new(config, slots)?;
            (Box::new(engine), slab)
        }
    };
    Ok(Opened { engine, slab, identity, positions })
}
