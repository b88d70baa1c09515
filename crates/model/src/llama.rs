//! The Llama decoder: RMSNorm, rotary attention with grouped heads, SwiGLU. The shapes come from the checkpoint's configuration.
//!
//! All rows of a step are one `[tokens, hidden]` batch for the linear layers (no padding); attention goes row by row (`attend`).
//! Formulas: transformers `modeling_llama.py`. Who multiplies is decided in `compute`; norms, SwiGLU and residual sums happen on
//! the way into and out of the products, in f32.

use millrace_checkpoint::{Checkpoint, ModelConfig};
use millrace_core::engine::Step;
use millrace_core::layout::KvLayout;
use millrace_kernels::{Into, KvSlab, Matrix, Norm, Team, rope};
use tch::Device;

use crate::attend::{Attention, Batch};
use crate::compute::{Compute, Multiplier, Named};
use crate::linear::{Linear, Loader};
use crate::{Dtype, ModelError};

/// Elements of a step that are not worth waking a second thread for.
const ALONE_MAX: usize = 8192;

/// One decoder layer.
struct Layer {
    input_norm: Vec<f32>,
    /// Queries, keys and values of all heads, one after the other: `[(heads + 2 kv_heads) head_dim, hidden]`.
    qkv: Linear,
    output: Linear,
    post_norm: Vec<f32>,
    /// Gate, then up: `[2 intermediate, hidden]`.
    gate_up: Linear,
    down: Linear,
}

/// The linear weights of a layer, in the order of [`Layer::linears`].
const PARTS: [&[&str]; 4] = [
    &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    &["self_attn.o_proj"],
    &["mlp.gate_proj", "mlp.up_proj"],
    &["mlp.down_proj"],
];

/// Activations of a step, kept from step to step.
#[derive(Default)]
struct Scratch {
    hidden: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    gated: Vec<f32>,
}

/// The weights of a Llama model on one device.
pub(crate) struct Llama {
    /// `[vocab, hidden]`.
    embedding: Linear,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// `[vocab, hidden]`; `None` where it is the embedding.
    head: Option<Linear>,
    eps: f64,
    inverse_frequencies: Vec<f32>,
    attention: Attention,
    multiplier: Multiplier,
    scratch: Scratch,
}

impl Llama {
    /// Packs the weights once, and decides who multiplies.
    pub(crate) fn load(checkpoint: &Checkpoint, layout: KvLayout, compute: Compute, device: Device) -> Result<Self, ModelError> {
        let config = &checkpoint.config;
        let loader = Loader { checkpoint, dtype: layout.dtype, device, weights: compute.weights };
        let plain = |name: &str| loader.linear(&[name.to_owned()]);
        let mut llama = Self {
            layers: (0..config.layers).map(|layer| Layer::load(&loader, layer)).collect::<Result<_, _>>()?,
            norm: loader.norm("model.norm.weight")?,
            embedding: plain("model.embed_tokens.weight")?,
            head: if config.tie_word_embeddings { None } else { Some(plain("lm_head.weight")?) },
            eps: config.rms_norm_eps,
            inverse_frequencies: config.rope.inverse_frequencies(config.head_dim),
            attention: Attention::new(config, layout, device, compute.batch_invariant),
            multiplier: Multiplier::new(compute, layout.dtype, device),
            scratch: Scratch::default(),
        };
        llama.choose(&loader, compute)?;
        Ok(llama)
    }

    /// Decides who multiplies, and makes LibTorch's copy of the weights where it does.
    fn choose(&mut self, loader: &Loader<'_>, compute: Compute) -> Result<(), ModelError> {
        let bytes = self.weight_bytes();
        let Self { layers, head, embedding, multiplier, attention, .. } = self;
        let mut alike: Vec<Vec<Named<'_>>> = Vec::new();
        for (index, layer) in layers.iter_mut().enumerate() {
            alike.push(layer.linears().into_iter().zip(PARTS.map(|parts| names(index, parts))).collect());
        }
        let head = match head {
            Some(head) => (head, vec!["lm_head.weight".to_owned()]),
            None => (embedding, vec!["model.embed_tokens.weight".to_owned()]),
        };
        attention.libtorch_threads = multiplier.choose(loader, compute, alike, head)?;
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
        let batch = Batch::new(step, &self.attention);
        let angles = Angles::new(step, &self.inverse_frequencies);
        let Self { layers, multiplier, attention, scratch, eps, .. } = self;
        let Scratch { hidden, qkv, attended, gated } = scratch;
        embed(&self.embedding.matrix, step, multiplier.products.team(), hidden);
        let tokens = hidden.len() / self.norm.len();
        for (index, layer) in layers.iter().enumerate() {
            let norm = |weight| Some(Norm { weight, eps: *eps });
            qkv.resize(tokens * layer.qkv.matrix.rows(), 0.0);
            multiplier.multiply(hidden, norm(&layer.input_norm), &layer.qkv, Into::Set(qkv))?;
            angles.turn(qkv, attention, multiplier.products.team());
            attention.store(&batch, qkv, (slab, index), multiplier.products.team());
            on_layer(index as u16);
            attended.resize(tokens * layer.output.matrix.columns(), 0.0);
            attention.attend(&batch, qkv, (slab, index), multiplier.products.team(), attended)?;
            multiplier.multiply(attended, None, &layer.output, Into::Add(hidden))?;
            gated.resize(tokens * layer.down.matrix.columns(), 0.0);
            multiplier.multiply(hidden, norm(&layer.post_norm), &layer.gate_up, Into::SwiGlu(gated))?;
            multiplier.multiply(gated, None, &layer.down, Into::Add(hidden))?;
        }
        self.logits(step)
    }

    /// The head, for the last token of each row that samples.
    fn logits(&mut self, step: &Step) -> Result<Vec<f32>, ModelError> {
        let (mut end, width) = (0, self.norm.len());
        let mut last = Vec::new();
        for row in &step.rows {
            end += row.tokens.len();
            if row.sample.is_some() {
                last.extend_from_slice(&self.scratch.hidden[(end - 1) * width..end * width]);
            }
        }
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let mut logits = vec![0.0; last.len() / width * head.matrix.rows()];
        if !last.is_empty() {
            self.multiplier.multiply(&last, Some(Norm { weight: &self.norm, eps: self.eps }), head, Into::Set(&mut logits))?;
        }
        Ok(logits)
    }

    /// Bytes of weights that a decode step reads.
    pub(crate) fn weight_bytes(&self) -> usize {
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let layers = self.layers.iter().flat_map(|layer| [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]);
        layers.chain([head]).map(|linear| linear.matrix.bytes()).sum()
    }

    /// The threads.
    pub(crate) fn team(&self) -> &Team {
        self.multiplier.products.team()
    }
}

impl Layer {
    fn load(loader: &Loader<'_>, layer: usize) -> Result<Self, ModelError> {
        let norm = |part: &str| loader.norm(&format!("model.layers.{layer}.{part}.weight"));
        let linear = |parts: &[&str]| loader.linear(&names(layer, parts));
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            qkv: linear(PARTS[0])?,
            output: linear(PARTS[1])?,
            post_norm: norm("post_attention_layernorm")?,
            gate_up: linear(PARTS[2])?,
            down: linear(PARTS[3])?,
        })
    }

    fn linears(&mut self) -> [&mut Linear; 4] {
        [&mut self.qkv, &mut self.output, &mut self.gate_up, &mut self.down]
    }
}

/// Full names of weights of a layer.
fn names(layer: usize, parts: &[&str]) -> Vec<String> {
    parts.iter().map(|part| format!("model.layers.{layer}.{part}.weight")).collect()
}

/// The embeddings of a step's tokens, `[tokens, hidden]`.
fn embed(embedding: &Matrix, step: &Step, team: &Team, hidden: &mut Vec<f32>) {
    let tokens: Vec<usize> = step.rows.iter().flat_map(|row| &row.tokens).map(|&token| token as usize).collect();
    let width = embedding.columns();
    hidden.resize(tokens.len() * width, 0.0);
    team.chunks(hidden, width, ALONE_MAX / width, |index, out| embedding.row(tokens[index], out));
}

/// Cosines and sines of every token of a step, `[tokens, head_dim / 2]` each.
struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Angles {
    fn new(step: &Step, inverse_frequencies: &[f32]) -> Self {
        let positions = step.rows.iter().flat_map(|row| row.start..row.end());
        // The product is rounded to f32 before the cosine, as transformers does.
        let angles: Vec<f32> = positions.flat_map(|p| inverse_frequencies.iter().map(move |f| p as f32 * f)).collect();
        let (sin, cos) = angles.iter().map(|angle| angle.sin_cos()).unzip();
        Self { cos, sin, half: inverse_frequencies.len() }
    }

    /// Turns queries and keys of each token.
    fn turn(&self, qkv: &mut [f32], attention: &Attention, team: &Team) {
        let dim = 2 * self.half;
        let width = attention.qkv_heads() * dim;
        team.chunks(qkv, width, ALONE_MAX / width, |token, heads| {
            let at = token * self.half..(token + 1) * self.half;
            rope::rotate(&mut heads[..attention.turned_heads() * dim], &self.cos[at.clone()], &self.sin[at]);
        });
    }
}

/// The KV layout that a model has at a block size and type.
pub(crate) fn layout(config: &ModelConfig, dtype: Dtype, block_tokens: u16) -> Result<KvLayout, ModelError> {
    let small = |field, value: usize| u16::try_from(value).map_err(|_| ModelError::Layout { field, value });
    if !block_tokens.is_power_of_two() {
        return Err(ModelError::Layout { field: "block_tokens", value: block_tokens.into() });
    }
    Ok(KvLayout {
        layers: small("layers", config.layers)?,
        kv_heads: small("kv_heads", config.kv_heads)?,
        head_dim: small("head_dim", config.head_dim)?,
        block_tokens,
        dtype,
    })
}
