//! The Llama decoder: RMSNorm, rotary attention with grouped heads, SwiGLU. The shapes come from the checkpoint's configuration.
//!
//! All rows of a step are one `[tokens, hidden]` batch for the linear layers (no padding); attention goes row by row (`attend`).
//! Formulas: transformers `modeling_llama.py`. LibTorch does the matrix products in the type of the weights; what stands between them
//! (norms, rotary turn, SwiGLU, residual sums) is done in f32 by `millrace-kernels`, in one pass each.

use millrace_checkpoint::{Checkpoint, ModelConfig};
use millrace_core::engine::Step;
use millrace_core::layout::{KvDtype, KvLayout};
use millrace_kernels::{Isa, KvSlab, elementwise, rope};
use tch::{Device, Kind, Tensor};

use crate::ModelError;
use crate::attend::{Attention, Batch};
use crate::tensors::{self, from_f32, from_indices, to_f32};

/// One decoder layer. Linear weights are `[out, in]`.
struct Layer {
    input_norm: Vec<f32>,
    /// Queries, keys and values of all heads, one after the other: `[(heads + 2 kv_heads) head_dim, hidden]`.
    qkv: Tensor,
    output: Tensor,
    post_norm: Vec<f32>,
    /// Gate, then up: `[2 intermediate, hidden]`.
    gate_up: Tensor,
    down: Tensor,
}

/// The weights of a Llama model on one device.
pub(crate) struct Llama {
    /// `[vocab, hidden]`.
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// `[vocab, hidden]`; the embedding itself where they are tied.
    head: Tensor,
    kind: Kind,
    eps: f64,
    inverse_frequencies: Vec<f32>,
    attention: Attention,
    device: Device,
}

impl Llama {
    /// Converts the weights once to `layout.dtype`.
    pub(crate) fn load(checkpoint: &Checkpoint, layout: KvLayout, device: Device) -> Result<Self, ModelError> {
        let config = &checkpoint.config;
        let source = Source { checkpoint, dtype: layout.dtype, device };
        let embedding = source.tensor("model.embed_tokens.weight")?;
        let head = match config.tie_word_embeddings {
            true => embedding.shallow_clone(),
            false => source.tensor("lm_head.weight")?,
        };
        Ok(Self {
            layers: (0..config.layers).map(|layer| source.layer(layer)).collect::<Result<_, _>>()?,
            norm: source.norm("model.norm.weight")?,
            embedding,
            head,
            kind: tensors::kind(layout.dtype),
            eps: config.rms_norm_eps,
            inverse_frequencies: config.rope.inverse_frequencies(config.head_dim),
            attention: Attention::new(config, layout, device),
            device,
        })
    }

    /// Computes a step that has been checked. Logits of the last token of each row with `sample`, `[rows, vocab]` in f32, row order.
    pub(crate) fn forward(&self, step: &Step, slab: &KvSlab, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<f32>, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let batch = Batch::new(step, &self.attention)?;
        let angles = Angles::new(step, &self.inverse_frequencies);
        let ids: Vec<i64> = step.rows.iter().flat_map(|row| &row.tokens).map(|&token| i64::from(token)).collect();
        let mut hidden = to_f32(&self.embedding.f_index_select(0, &from_indices(&ids, self.device)?)?)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let mut qkv = to_f32(&self.normed(&hidden, &layer.input_norm)?.f_linear(&layer.qkv, NO_BIAS)?)?;
            angles.turn(&mut qkv, self.attention.qkv_heads(), self.attention.turned_heads());
            self.attention.store(&batch, &qkv, slab, index);
            on_layer(index as u16);
            let attended = self.attention.attend(&batch, &qkv, slab, index)?;
            elementwise::add(&mut hidden, &to_f32(&attended.f_linear(&layer.output, NO_BIAS)?)?);
            let fed = self.feed_forward(&hidden, layer)?;
            elementwise::add(&mut hidden, &fed);
        }
        self.logits(&hidden, step)
    }

    /// The head, for the last token of each row that samples.
    fn logits(&self, hidden: &[f32], step: &Step) -> Result<Vec<f32>, ModelError> {
        let (mut end, width) = (0, self.norm.len());
        let mut last = Vec::new();
        for row in &step.rows {
            end += row.tokens.len();
            if row.sample.is_some() {
                last.extend_from_slice(&hidden[(end - 1) * width..end * width]);
            }
        }
        if last.is_empty() {
            return Ok(Vec::new());
        }
        to_f32(&self.normed(&last, &self.norm)?.f_linear(&self.head, NO_BIAS)?)
    }

    /// RMS norm of `[tokens, hidden]`, as a tensor in the type of the weights.
    fn normed(&self, x: &[f32], weight: &[f32]) -> Result<Tensor, ModelError> {
        let mut out = vec![0.0; x.len()];
        elementwise::rms_norm(Isa::best(), x, weight, self.eps, &mut out);
        let shape = [(x.len() / weight.len()) as i64, weight.len() as i64];
        from_f32(&out, &shape, self.kind, self.device)
    }

    /// Norm and SwiGLU: what the second half of a layer adds to the hidden state.
    fn feed_forward(&self, hidden: &[f32], layer: &Layer) -> Result<Vec<f32>, ModelError> {
        let gate_up = to_f32(&self.normed(hidden, &layer.post_norm)?.f_linear(&layer.gate_up, NO_BIAS)?)?;
        let tokens = hidden.len() / layer.post_norm.len();
        let width = gate_up.len() / tokens / 2;
        let mut gated = vec![0.0; tokens * width];
        elementwise::swiglu(Isa::best(), &gate_up, width, &mut gated);
        let gated = from_f32(&gated, &[tokens as i64, width as i64], self.kind, self.device)?;
        to_f32(&gated.f_linear(&layer.down, NO_BIAS)?)
    }
}

/// Llama's linear layers have none.
const NO_BIAS: Option<&Tensor> = None;

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

    /// Turns the first `turned` of the `heads` heads of each token.
    fn turn(&self, qkv: &mut [f32], heads: usize, turned: usize) {
        let dim = 2 * self.half;
        let angles = self.cos.chunks_exact(self.half).zip(self.sin.chunks_exact(self.half));
        for (token, (cos, sin)) in qkv.chunks_exact_mut(heads * dim).zip(angles) {
            rope::rotate(&mut token[..turned * dim], cos, sin);
        }
    }
}

/// Where weights come from and what they become.
struct Source<'a> {
    checkpoint: &'a Checkpoint,
    dtype: KvDtype,
    device: Device,
}

impl Source<'_> {
    fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        let view = self.checkpoint.tensor(name)?;
        let shape: Vec<i64> = view.shape.iter().map(|&side| side as i64).collect();
        match self.dtype {
            KvDtype::F32 => tensors::from_f32(&view.to_f32(), &shape, Kind::Float, self.device),
            KvDtype::Bf16 => tensors::from_bytes(bytemuck::cast_slice(&view.to_bf16()), &shape, Kind::BFloat16, self.device),
        }
    }

    /// The weight of a norm, in f32.
    fn norm(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        Ok(self.checkpoint.tensor(name)?.to_f32())
    }

    /// Several weights of one layer as one, rows after rows.
    fn stacked(&self, layer: usize, parts: &[&str]) -> Result<Tensor, ModelError> {
        let name = |part: &&str| format!("model.layers.{layer}.{part}.weight");
        let parts = parts.iter().map(|part| self.tensor(&name(part))).collect::<Result<Vec<_>, _>>()?;
        Ok(Tensor::f_cat(&parts, 0)?)
    }

    fn layer(&self, layer: usize) -> Result<Layer, ModelError> {
        Ok(Layer {
            input_norm: self.norm(&format!("model.layers.{layer}.input_layernorm.weight"))?,
            qkv: self.stacked(layer, &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])?,
            output: self.stacked(layer, &["self_attn.o_proj"])?,
            post_norm: self.norm(&format!("model.layers.{layer}.post_attention_layernorm.weight"))?,
            gate_up: self.stacked(layer, &["mlp.gate_proj", "mlp.up_proj"])?,
            down: self.stacked(layer, &["mlp.down_proj"])?,
        })
    }
}

/// The KV layout that a model has at a block size and type.
pub(crate) fn layout(config: &ModelConfig, dtype: KvDtype, block_tokens: u16) -> Result<KvLayout, ModelError> {
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
