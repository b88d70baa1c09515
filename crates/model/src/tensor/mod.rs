//! The tensor engine: weights, activations and the KV pool are LibTorch's tensors on one device. What a CUDA device computes with.
//!
//! It follows the same description as `decoder` does for the processor, and keeps the same promise: the KV of a layer stands in the node's cells
//! before the layer is reported. `pool` keeps the two copies of a cell in step, `plan` says what a step reads and writes, `layer` and `attention`
//! compute, `weights` loads. All but the CUDA kernels also runs on LibTorch's processor device, with a reference set of kernels
//! (`reference`), which is how it is tested on a machine without a device.

mod attention;
mod decoder;
mod experts;
mod layer;
mod plan;
mod pool;
mod reference;
mod spills;
mod weights;

use std::sync::Arc;

use millrace_checkpoint::{Checkpoint, ModelConfig};
use millrace_core::engine::{Engine, EngineError, Sampled, Step};
use millrace_core::layout::KvLayout;
use millrace_kernels::{KvSlab, Team};
use tch::Device;

use crate::check::{self, Limits};
use crate::compute::Weights;
use crate::{Compute, Dtype, ModelError, sampler};
use decoder::Decoder;
use weights::{Loader, Source};

/// A model on a device. See the module text.
pub struct TensorEngine {
    decoder: Decoder,
    slab: Arc<KvSlab>,
    layout: KvLayout,
    limits: Limits,
    team: Team,
}

/// How a tensor engine is made.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Where it computes.
    pub device: Device,
    /// Type of weights, activations and KV; quantised weights are dequantised to it.
    pub dtype: Dtype,
    /// Blocks of the KV memory.
    pub slots: usize,
    /// Tokens of one block.
    pub block_tokens: u16,
    /// How it computes.
    pub compute: Compute,
}

impl TensorEngine {
    /// Loads the weights onto a device, and makes two KV memories of `slots` blocks: one there, one here. The slab is the one here, for the
    /// hand-over tasks.
    ///
    /// # Errors
    /// [`ModelError`] when the model file is unsound, a setting is not for a device, the layout does not fit, or memory is over its limits.
    pub fn load(checkpoint: &Checkpoint, settings: Settings) -> Result<(Self, Arc<KvSlab>, KvLayout), ModelError> {
        let layout = crate::decoder::layout(checkpoint, settings.compute.cached_as(settings.dtype), settings.block_tokens)?;
        Self::with(&checkpoint.config, Source::Checkpoint(checkpoint), layout, settings)
    }

    /// A model of random weights, made on the device: for measurements.
    ///
    /// # Errors
    /// As [`TensorEngine::load`].
    pub fn random(config: &ModelConfig, layout: KvLayout, settings: Settings) -> Result<(Self, Arc<KvSlab>, KvLayout), ModelError> {
        Self::with(config, Source::random(config), layout, settings)
    }

    fn with(
        config: &ModelConfig,
        source: Source<'_>,
        layout: KvLayout,
        settings: Settings,
    ) -> Result<(Self, Arc<KvSlab>, KvLayout), ModelError> {
        refuse(&settings)?;
        let _no_grad = tch::no_grad_guard();
        let slab = KvSlab::new(layout.cell_bytes(), layout.layers.into(), settings.slots)?;
        let loader = Loader { config, source, dtype: settings.dtype, device: settings.device };
        let decoder = Decoder::load(&loader, layout, &slab)?;
        let limits = Limits { vocab: config.vocab_size, positions: config.max_positions, slots: settings.slots };
        let team = Team::new(settings.compute.threads.max(1));
        Ok((Self { decoder, slab: slab.clone(), layout, limits, team }, slab, layout))
    }

    /// Computes a step and gives the logits themselves: one vector of the vocabulary's length for each row that has `sample`.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn logits(&mut self, step: &Step, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<Vec<f32>>, EngineError> {
        Ok(self.all_logits(step, on_layer)?.chunks_exact(self.limits.vocab).map(<[f32]>::to_vec).collect())
    }

    /// As [`Self::logits`], one after the other.
    fn all_logits(&mut self, step: &Step, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<f32>, EngineError> {
        check::step(step, &self.layout, self.limits)?;
        if step.rows.is_empty() {
            return Ok(Vec::new());
        }
        let _no_grad = tch::no_grad_guard();
        Ok(self.decoder.forward(step, on_layer)?)
    }

    /// How this engine keeps KV.
    #[must_use]
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Its KV memory on this side.
    #[must_use]
    pub fn slab(&self) -> &Arc<KvSlab> {
        &self.slab
    }

    /// Token ids are below this.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.limits.vocab
    }

    /// Bytes of weights that a decode step reads.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.decoder.weight_bytes()
    }
}

impl Engine for TensorEngine {
    fn step(&mut self, step: &Step, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<Sampled>, EngineError> {
        let logits = self.all_logits(step, on_layer)?;
        sampler::draw_rows(step, &logits, self.limits.vocab, &self.team)
    }
}

/// What a device does not do is refused, not ignored.
fn refuse(settings: &Settings) -> Result<(), ModelError> {
    let compute = &settings.compute;
    if compute.cached_as(settings.dtype) != settings.dtype.into() {
        return Err(ModelError::OnlyOnProcessors("KV of another type than the activations"));
    }
    if compute.batch_invariant {
        return Err(ModelError::OnlyOnProcessors("batch-invariant steps"));
    }
    match compute.weights {
        Weights::Kept | Weights::Bf16 => Ok(()),
        Weights::Q8_0 => Err(ModelError::OnlyOnProcessors("weights in q8_0")),
    }
}
