//! The decoder in tensors: follows a model's description, layer by layer, over the device's pool.
//!
//! The processor only launches: it runs ahead of the device by as many layers as it can, and reports each layer when its cells stand in the
//! node's memory. What it waits for is the logits.

use std::sync::Arc;

use millrace_checkpoint::Positions;
use millrace_core::engine::Step;
use millrace_core::layout::KvLayout;
use millrace_kernels::KvSlab;
use millrace_kernels::cuda::can_attend;
use tch::{Device, Kind, Tensor};

use crate::tail::Tail;
use crate::tensor::attention::Attention;
use crate::tensor::layer::{Angles, Layer};
use crate::tensor::plan::{self, Ground, Plan};
use crate::tensor::pool::Pool;
use crate::tensor::spills::Spills;
use crate::tensor::weights::{Linear, Loader, Norm};
use crate::{ModelError, attend, tensors};

/// The weights of a model on a device, and its pool.
pub(super) struct Decoder {
    /// `[vocab, hidden]`.
    embedding: Linear,
    /// `[positions, hidden]` in f32, where positions are learned.
    positions: Option<Tensor>,
    turn: Option<Turn>,
    layers: Vec<Layer>,
    norm: Norm,
    /// `[vocab, hidden]`; `None` where it is the embedding.
    head: Option<Linear>,
    attention: Attention,
    pool: Pool,
    layout: KvLayout,
    /// Whether the paged kernel is for this model.
    pages: bool,
    device: Device,
}

/// How much a position turns.
struct Turn {
    /// `[turned / 2]`, in f32.
    inverse_frequencies: Tensor,
    scale: f64,
}

/// The tokens that the last layer is computed for, where they are fewer than the step's.
struct End {
    /// Their indices in the step: `[tokens]`.
    tokens: Tensor,
    plan: Plan,
}

impl Decoder {
    pub(super) fn load(loader: &Loader<'_>, layout: KvLayout, slab: &Arc<KvSlab>) -> Result<Self, ModelError> {
        let (config, device) = (loader.config, loader.device);
        let plain = |name: &str| loader.linear(&[name.to_owned()], false);
        let (positions, turn) = match &config.positions {
            Positions::Learned => (Some(loader.exact("model.embed_positions.weight")?), None),
            Positions::Rotary(rope) => {
                let frequencies = rope.inverse_frequencies(config.attention.turned_dim());
                let inverse_frequencies = Tensor::f_from_slice(&frequencies)?.f_to_device(device)?;
                (None, Some(Turn { inverse_frequencies, scale: rope.turn_scale().into() }))
            }
        };
        let shape = attend::shape(config, layout);
        Ok(Self {
            // The pool first: where a device is not for us, it says so before all weights are there.
            pool: Pool::new(shape, (layout, loader.kind()), slab, device)?,
            embedding: plain("model.embed_tokens")?,
            positions,
            turn,
            layers: (0..config.layers).map(|layer| Layer::load(loader, layer)).collect::<Result<_, _>>()?,
            norm: loader.norm("model.norm")?,
            head: if config.tie_word_embeddings { None } else { Some(plain("lm_head")?) },
            attention: Attention { windows: config.attention.windows.clone(), kind: loader.kind() },
            layout,
            pages: can_attend(&shape),
            device,
        })
    }

    /// Computes a step that has been checked. Logits of the last token of each row with `sample`, `[rows, vocab]` in f32, row order.
    pub(super) fn forward(&mut self, step: &Step, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<f32>, ModelError> {
        let mut arriving = self.pool.arrive(step)?;
        let ground = Ground { layout: &self.layout, windows: &self.attention.windows, pages: self.pages, device: self.device };
        let plan = Plan::new(step, ground)?;
        let draws = step.rows.iter().any(|row| row.sample.is_some());
        let end = Tail::of(step).filter(|_| draws).map(|tail| End::new(&tail, ground)).transpose()?;
        let angles = self.turn.as_ref().map(|turn| turn.angles(&plan.positions)).transpose()?;
        let mut hidden = self.embed(&plan)?;
        let mut spills = Spills::default();
        for (index, layer) in self.layers.iter().enumerate() {
            let projected = layer.project(&hidden, angles.as_ref())?;
            self.pool.store(index, &projected.cached, &plan)?;
            // Cells that arrive are locked until they are through, and a step may write into one that it reads.
            arriving.drain(..).try_for_each(|landing| landing.wait())?;
            self.pool.spill(index, &plan, &mut spills, on_layer)?;
            let (mut plan, mut queries) = (&plan, projected.queries);
            if index + 1 == self.layers.len() {
                if !draws {
                    break;
                }
                if let Some(End { tokens, plan: of_end }) = &end {
                    (plan, queries, hidden) = (of_end, queries.f_index_select(0, tokens)?, hidden.f_index_select(0, tokens)?);
                }
            }
            let attended = self.attention.attend(index, &queries, plan, &self.pool)?;
            layer.finish(&attended, &mut hidden)?;
            spills.report(on_layer);
        }
        let logits = draws.then(|| self.launch_logits(&hidden)).transpose()?;
        spills.wait(on_layer)?;
        logits.as_ref().map_or_else(|| Ok(Vec::new()), tensors::to_f32)
    }

    /// The embeddings of a step's tokens, `[tokens, hidden]` in f32.
    fn embed(&self, plan: &Plan) -> Result<Tensor, ModelError> {
        let hidden = self.embedding.weight.f_index_select(0, &plan.ids)?.f_to_kind(Kind::Float)?;
        match &self.positions {
            None => Ok(hidden),
            Some(positions) => Ok(hidden.f_add(&positions.f_index_select(0, &plan.positions)?)?),
        }
    }

    /// The head, for what the last layer has left: `[tokens, vocab]`.
    fn launch_logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        let last = self.norm.apply(hidden)?.f_to_kind(self.attention.kind)?;
        self.head.as_ref().unwrap_or(&self.embedding).apply(&last)
    }

    /// Bytes of weights that a decode step of one row reads.
    pub(super) fn weight_bytes(&self) -> usize {
        self.layers.iter().map(Layer::bytes).sum::<usize>() + self.head.as_ref().unwrap_or(&self.embedding).bytes()
    }
}

impl End {
    fn new(tail: &Tail, ground: Ground<'_>) -> Result<Self, ModelError> {
        let tokens: Vec<i64> = tail.tokens.iter().map(|token| *token as i64).collect();
        Ok(Self { tokens: plan::whole(&tokens, ground.device)?, plan: Plan::new(&tail.step, ground)? })
    }
}

impl Turn {
    /// The angles of tokens at `positions`, computed in f32 as on the processor.
    fn angles(&self, positions: &Tensor) -> Result<Angles, ModelError> {
        let angles = positions.f_to_kind(Kind::Float)?.f_outer(&self.inverse_frequencies)?.f_unsqueeze(1)?;
        Ok(Angles { cos: angles.f_cos()?.f_mul_scalar(self.scale)?, sin: angles.f_sin()?.f_mul_scalar(self.scale)? })
    }
}
