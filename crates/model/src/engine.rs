//! The engine: checks a step, runs the decoder, draws the tokens.

use std::sync::Arc;

use millrace_checkpoint::Checkpoint;
use millrace_core::engine::{Engine, EngineError, Sampled, Step};
use millrace_core::layout::KvLayout;
use millrace_kernels::{KvSlab, heap};
use tch::Device;

use crate::check::{self, Limits};
use crate::compute::Compute;
use crate::decoder::{Decoder, layout};
use crate::{Dtype, ModelError, sampler};

/// A model with its KV memory.
pub struct ModelEngine {
    decoder: Decoder,
    slab: Arc<KvSlab>,
    layout: KvLayout,
    limits: Limits,
}

impl ModelEngine {
    /// Loads the weights for activations of `dtype`, and makes a KV memory of `slots` blocks of `block_tokens` tokens (a power of two).
    /// The threads of `compute` are for all of LibTorch in this process too. The slab is for the hand-over tasks.
    ///
    /// # Errors
    /// [`ModelError`] when the model file is unsound, the layout does not fit, or memory is over its limits.
    pub fn load(
        checkpoint: &Checkpoint,
        dtype: Dtype,
        slots: usize,
        block_tokens: u16,
        compute: Compute,
    ) -> Result<(Self, Arc<KvSlab>, KvLayout), ModelError> {
        let config = &checkpoint.config;
        let layout = layout(checkpoint, compute.cached_as(dtype), block_tokens)?;
        let slab = KvSlab::new(layout.cell_bytes(), layout.layers.into(), slots)?;
        heap::keep_freed();
        tch::set_num_threads(i32::try_from(compute.threads.max(1)).unwrap_or(i32::MAX));
        let decoder = Decoder::load(checkpoint, (dtype, layout), compute, Device::Cpu)?;
        let limits = Limits { vocab: config.vocab_size, positions: config.max_positions, slots };
        Ok((Self { decoder, slab: slab.clone(), layout, limits }, slab, layout))
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
        Ok(self.decoder.forward(step, &self.slab, on_layer)?)
    }

    /// Bytes of weights that a decode step of one row reads.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.decoder.weight_bytes()
    }

    /// How this engine keeps KV.
    #[must_use]
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Blocks of its KV memory.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.limits.slots
    }

    /// Token ids are below this.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.limits.vocab
    }
}

impl Engine for ModelEngine {
    fn step(&mut self, step: &Step, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<Sampled>, EngineError> {
        let logits = self.all_logits(step, on_layer)?;
        sampler::draw_rows(step, &logits, self.limits.vocab, self.decoder.team())
    }
}
