//! The LibTorch engine: checks a step, runs the decoder, draws the tokens.

use std::sync::Arc;

use millrace_checkpoint::Checkpoint;
use millrace_core::engine::{Engine, EngineError, Sampled, Step};
use millrace_core::layout::KvLayout;
use millrace_kernels::{KvSlab, heap};
use tch::Device;

use crate::check::{self, Limits};
use crate::llama::{Llama, layout};
use crate::{Dtype, ModelError, sampler};

/// A Llama model with its KV memory.
pub struct LlamaEngine {
    llama: Llama,
    slab: Arc<KvSlab>,
    layout: KvLayout,
    limits: Limits,
}

impl LlamaEngine {
    /// Loads the weights, converted to `dtype`, and makes a KV memory of `slots` blocks of `block_tokens` tokens (a power of two).
    /// `threads` is for all of LibTorch in this process. The slab is for the hand-over tasks.
    ///
    /// # Errors
    /// [`ModelError`] when the model file is unsound, the layout does not fit, or memory is over its limits.
    pub fn load(
        checkpoint: &Checkpoint,
        dtype: Dtype,
        slots: usize,
        block_tokens: u16,
        threads: usize,
    ) -> Result<(Self, Arc<KvSlab>, KvLayout), ModelError> {
        let config = &checkpoint.config;
        let layout = layout(config, dtype, block_tokens)?;
        let slab = KvSlab::new(layout.cell_bytes(), layout.layers.into(), slots)?;
        heap::keep_freed();
        tch::set_num_threads(i32::try_from(threads.max(1)).unwrap_or(i32::MAX));
        let llama = Llama::load(checkpoint, layout, Device::Cpu)?;
        let limits = Limits { vocab: config.vocab_size, positions: config.max_positions, slots };
        Ok((Self { llama, slab: slab.clone(), layout, limits }, slab, layout))
    }

    /// Computes a step and gives the logits themselves: one vector of the vocabulary's length for each row that has `sample`.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn logits(&mut self, step: &Step, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<Vec<f32>>, EngineError> {
        check::step(step, &self.layout, self.limits)?;
        if step.rows.is_empty() {
            return Ok(Vec::new());
        }
        let logits = self.llama.forward(step, &self.slab, on_layer)?;
        Ok(logits.chunks_exact(self.limits.vocab).map(<[f32]>::to_vec).collect())
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

impl Engine for LlamaEngine {
    fn step(&mut self, step: &Step, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<Sampled>, EngineError> {
        let logits = self.logits(step, on_layer)?;
        let rows = step.rows.iter().filter_map(|row| Some((row, row.sample.as_ref()?)));
        let draw = |((row, sampling), logits): ((&millrace_core::engine::Row, _), &Vec<f32>)| {
            let draw = sampler::draw(logits, sampling, row.draw_position())
                .ok_or_else(|| EngineError("a row's logits are not numbers".into()))?;
            Ok(Sampled { attempt: row.attempt, token: draw.token, logprob: draw.logprob })
        };
        rows.zip(&logits).map(draw).collect()
    }
}
