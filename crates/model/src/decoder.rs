//! The decoder: follows a model's description, layer by layer, over paged KV. Which kinds of norm, position, attention and feed-forward layer there
//! are is said in `millrace_checkpoint`; nothing here asks for a family's name.
//!
//! All rows of a step are one `[tokens, hidden]` batch for the linear layers (no padding); attention goes row by row (`attend`). Queries, keys and
//! values come from `heads` or `latent`, what follows attention is `feed`. Who multiplies is decided in `compute`; norms, SwiGLU and residual
//! sums happen on the way into and out of the products, in f32.

use millrace_checkpoint::{AttentionKind, Checkpoint, Positions};
use millrace_core::engine::Step;
use millrace_core::layout::{KvDtype, KvLayout};
use millrace_kernels::{Into, KvSlab, Matrix, Team, elementwise};
use tch::Device;

use crate::angles::{Angles, Turn};
use crate::attend::{Attention, Batches, LayerStep};
use crate::compute::{Compute, Multiplier};
use crate::feed::Feed;
use crate::heads::Heads;
use crate::latent::Latent;
use crate::linear::{Linear, Loader, NormWeights};
use crate::tail::Tail;
use crate::{Dtype, ModelError};

/// Elements of a step that are not worth waking a second thread for.
pub(crate) const ALONE_MAX: usize = 8192;

/// One decoder layer.
struct Layer {
    input_norm: NormWeights,
    source: Source,
    output: Linear,
    post_norm: NormWeights,
    feed: Feed,
}

/// Where queries, keys and values come from.
enum Source {
    Heads(Box<Heads>),
    Latent(Box<Latent>),
}

/// Activations of a step, kept from step to step.
#[derive(Default)]
struct Scratch {
    hidden: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    gated: Vec<f32>,
}

/// The weights of a model on one device.
pub(crate) struct Decoder {
    /// `[vocab, hidden]`.
    embedding: Linear,
    /// `[positions, hidden]`, where positions are learned.
    positions: Option<Vec<f32>>,
    turn: Option<Turn>,
    layers: Vec<Layer>,
    norm: NormWeights,
    /// `[vocab, hidden]`; `None` where it is the embedding.
    head: Option<Linear>,
    attention: Attention,
    multiplier: Multiplier,
    scratch: Scratch,
}

impl Decoder {
    /// Packs the weights once, and decides who multiplies.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        (dtype, layout): (Dtype, KvLayout),
        compute: Compute,
        device: Device,
    ) -> Result<Self, ModelError> {
        let config = &checkpoint.config;
        let loader = Loader { checkpoint, dtype, device, weights: compute.weights };
        let plain = |name: &str| loader.linear(&[name.to_owned()], false);
        let (positions, turn) = match &config.positions {
            Positions::Learned => (Some(loader.numbers("model.embed_positions.weight")?), None),
            Positions::Rotary(rope) => (None, Some(Turn::new(rope, config.attention.turned_dim()))),
        };
        let mut decoder = Self {
            layers: (0..config.layers).map(|layer| Layer::load(&loader, layer)).collect::<Result<_, _>>()?,
            norm: loader.norm("model.norm")?,
            embedding: plain("model.embed_tokens")?,
            positions,
            turn,
            head: if config.tie_word_embeddings { None } else { Some(plain("lm_head")?) },
            attention: Attention::new(config, (dtype, layout), device, compute.batch_invariant),
            multiplier: Multiplier::new(compute, dtype, device),
            scratch: Scratch::default(),
        };
        decoder.choose(&loader, compute)?;
        Ok(decoder)
    }

    /// Decides who multiplies, and makes LibTorch's copy of the weights where it does.
    fn choose(&mut self, loader: &Loader<'_>, compute: Compute) -> Result<(), ModelError> {
        let bytes = self.weight_bytes();
        let Self { layers, head, embedding, multiplier, attention, .. } = self;
        let alike = layers.iter_mut().map(Layer::linears).collect();
        attention.libtorch_threads = multiplier.choose(loader, compute, alike, head.as_mut().unwrap_or(embedding))?;
        if !attention.libtorch_threads {
            tch::set_num_threads(1);
        }
        let (isa, threads) = (multiplier.products.isa(), multiplier.products.team().threads());
        tracing::info!(?isa, threads, weight_bytes = bytes, compute.batch_invariant, "linear layers ready");
        Ok(())
    }

    /// Computes a step that has been checked. Logits of the last token of each row with `sample`, `[rows, vocab]` in f32, row order.
    pub(crate) fn forward(&mut self, step: &Step, slab: &KvSlab, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<f32>, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let tail = Tail::of(step);
        let batches = Batches::new(step, &self.attention);
        let tail = tail.as_ref().map(|tail| (tail, Batches::new(&tail.step, &self.attention)));
        let angles = self.turn.as_ref().map(|turn| turn.angles(step));
        self.embed(step);
        let Self { layers, multiplier, attention, scratch, .. } = self;
        let Scratch { hidden, qkv, attended, gated } = scratch;
        for (index, layer) in layers.iter().enumerate() {
            let mut batch = batches.of(index, attention);
            layer.project(hidden, multiplier, angles.as_ref(), qkv)?;
            let team = multiplier.products.team();
            attention.store(&LayerStep { batch, qkv, slab, layer: index, team });
            on_layer(index as u16);
            if index + 1 == layers.len()
                && let Some((tail, batches)) = &tail
            {
                let tokens = batch.tokens();
                batch = batches.of(index, attention);
                [&mut *hidden, &mut *qkv].into_iter().for_each(|numbers| tail.keep(numbers, numbers.len() / tokens));
                if tail.tokens.is_empty() {
                    return Ok(Vec::new());
                }
            }
            attended.resize(batch.tokens() * attention.out_width(), 0.0);
            attention.attend(&LayerStep { batch, qkv, slab, layer: index, team }, attended)?;
            match &layer.source {
                Source::Heads(_) => multiplier.multiply(attended, None, &layer.output, Into::Add(hidden))?,
                Source::Latent(latent) => {
                    let values = latent.values(attended, multiplier)?;
                    multiplier.multiply(&values, None, &layer.output, Into::Add(hidden))?;
                }
            }
            layer.feed.add(hidden, layer.post_norm.get(), multiplier, gated)?;
        }
        self.logits()
    }

    /// The embeddings of a step's tokens, `[tokens, hidden]`.
    fn embed(&mut self, step: &Step) {
        let places = step.rows.iter().flat_map(|row| row.tokens.iter().copied().zip(row.start..));
        let places: Vec<(usize, usize)> = places.map(|(token, position)| (token as usize, position as usize)).collect();
        let matrix: &Matrix = &self.embedding.matrix;
        let (width, hidden) = (matrix.columns(), &mut self.scratch.hidden);
        hidden.resize(places.len() * width, 0.0);
        let positions = self.positions.as_deref();
        self.multiplier.products.team().chunks(hidden, width, ALONE_MAX / width, |index, out| {
            let (token, position) = places[index];
            matrix.row(token, out);
            if let Some(positions) = positions {
                elementwise::add(out, &positions[position * width..][..width]);
            }
        });
    }

    /// The head, for what the last layer has left: `[tokens, vocab]`.
    fn logits(&mut self) -> Result<Vec<f32>, ModelError> {
        let Self { scratch, multiplier, norm, head, embedding, .. } = self;
        let head = head.as_ref().unwrap_or(embedding);
        let mut logits = vec![0.0; scratch.hidden.len() / head.matrix.columns() * head.matrix.rows()];
        multiplier.multiply(&scratch.hidden, Some(norm.get()), head, Into::Set(&mut logits))?;
        Ok(logits)
    }

    /// Bytes of weights that a decode step of one row reads.
    pub(crate) fn weight_bytes(&self) -> usize {
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        self.layers.iter().map(Layer::bytes).sum::<usize>() + head.matrix.bytes()
    }

    /// The threads.
    pub(crate) fn team(&self) -> &Team {
        self.multiplier.products.team()
    }
}

impl Layer {
    fn load(loader: &Loader<'_>, layer: usize) -> Result<Self, ModelError> {
        let prefix = format!("model.layers.{layer}.");
        let attention = &loader.config().attention;
        let source = match &attention.kind {
            AttentionKind::Grouped(grouped) => Source::Heads(Box::new(Heads::load(loader, &prefix, grouped)?)),
            AttentionKind::Latent(latent) => Source::Latent(Box::new(Latent::load(loader, &prefix, latent)?)),
        };
        Ok(Self {
            input_norm: loader.norm(&format!("{prefix}input_layernorm"))?,
            source,
            output: loader.linear(&[format!("{prefix}self_attn.o_proj")], attention.output_bias)?,
            post_norm: loader.norm(&format!("{prefix}post_attention_layernorm"))?,
            feed: Feed::load(loader, &prefix, layer)?,
        })
    }

    /// Queries, keys and values of the step's tokens as attention takes them.
    fn project(
        &self,
        hidden: &[f32],
        multiplier: &mut Multiplier,
        angles: Option<&Angles>,
        qkv: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        match &self.source {
            Source::Heads(heads) => heads.project(hidden, self.input_norm.get(), multiplier, angles, qkv),
            Source::Latent(latent) => latent.project(hidden, self.input_norm.get(), multiplier, angles, qkv),
        }
    }

    /// The linear layers that LibTorch may multiply.
    fn linears(&mut self) -> Vec<&mut Linear> {
        let mut all = match &mut self.source {
            Source::Heads(heads) => heads.linears(),
            Source::Latent(latent) => latent.linears(),
        };
        all.push(&mut self.output);
        all.extend(self.feed.linears());
        all
    }

    fn bytes(&self) -> usize {
        let source = match &self.source {
            Source::Heads(heads) => heads.bytes(),
            Source::Latent(latent) => latent.bytes(),
        };
        source + self.output.matrix.bytes() + self.feed.bytes()
    }
}

/// The KV layout that a model has at a block size and type.
pub(crate) fn layout(checkpoint: &Checkpoint, dtype: KvDtype, block_tokens: u16) -> Result<KvLayout, ModelError> {
    match block_tokens.is_power_of_two() {
        true => Ok(checkpoint.kv_layout(dtype, block_tokens)),
        false => Err(ModelError::Layout { field: "block_tokens", value: block_tokens.into() }),
    }
}
