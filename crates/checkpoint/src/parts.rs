//! What a decoder is made of, as data: the kinds of norm, position, attention and feed-forward layer that checkpoints have, with their numbers.
//!
//! An engine follows this description and never asks for a family's name. Which family has which parts is said in `directory_config`,
//! `directory_families` and `gguf_model`; what is not said here is not built and refused there.

use std::path::Path;

use millrace_core::layout::KvParts;

use crate::{CheckpointError, HEAD_DIM_MAX, HEADS_MAX, HIDDEN_MAX, INTERMEDIATE_MAX, Rope};

/// Widest latent of multi-head latent attention.
pub const LATENT_MAX: usize = 8192;
/// Most experts of a layer (the largest models in use have 512).
pub const EXPERTS_MAX: usize = 4096;
/// Most experts of all layers together.
pub const EXPERTS_TOTAL_MAX: usize = 1 << 17;

/// What hidden states go through before attention, before the feed-forward layer, and at the end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// Which formula.
    pub kind: NormKind,
    /// Added to the mean square before its root.
    pub eps: f64,
}

/// The formula of a norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `x / rms(x) * weight`.
    Rms,
    /// `(x - mean) / deviation * weight + bias`.
    Layer,
}

/// How a token's position gets in.
#[derive(Debug, Clone, PartialEq)]
pub enum Positions {
    /// Queries and keys are turned by it.
    Rotary(Rope),
    /// A learned vector for each position is added to the embedding.
    Learned,
}

/// How the layers attend.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Where keys and values come from.
    pub kind: AttentionKind,
    /// Queries, keys and values have biases.
    pub qkv_bias: bool,
    /// The output has a bias.
    pub output_bias: bool,
    /// Scores are multiplied by this before the softmax.
    pub scale: f64,
    /// For each layer how many positions a token sees, its own included; `None`: all.
    pub windows: Vec<Option<usize>>,
}

/// Where keys and values come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttentionKind {
    /// Each KV head has its own, for `heads / kv_heads` query heads.
    Grouped(Grouped),
    /// All heads' come from one latent (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    Latent(Latent),
}

/// Multi-head, grouped-query or multi-query attention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grouped {
    /// Key and value heads; divides the query heads.
    pub kv_heads: usize,
    /// Numbers in one head; even where it is turned.
    pub head_dim: usize,
    /// Queries, keys and values of all heads are one weight, in this order.
    pub joined: bool,
    /// Each query and key head goes through an RMS norm of its own before it is turned.
    pub norms: bool,
}

/// Multi-head latent attention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Latent {
    /// Width of the queries' own latent; `None`: they come straight from the hidden state.
    pub query_rank: Option<usize>,
    /// Width of the latent that is cached.
    pub rank: usize,
    /// Numbers of a query or key head that are not turned.
    pub plain_dim: usize,
    /// Numbers of a query head that are turned, and of the one turned key that all heads share; even.
    pub turned_dim: usize,
    /// Numbers of a value head.
    pub value_dim: usize,
    /// In the file the numbers that are turned together are neighbours, and not half a head apart.
    pub pairs: bool,
}

/// The RMS norms inside of multi-head latent attention have this, whatever the configuration says of the others (transformers
/// `modeling_deepseek_v2.py`, `modeling_deepseek_v3.py`).
pub const LATENT_NORM_EPS: f64 = 1e-6;

/// The feed-forward layers that are not a mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mlp {
    /// Width of their state.
    pub width: usize,
    /// Which formula.
    pub kind: MlpKind,
}

/// The formula of a feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpKind {
    /// `down(silu(gate(x)) * up(x))`, no biases.
    SwiGlu,
    /// `down(gelu(up(x)))`, GELU by its tanh formula, with biases.
    Gelu,
}

/// A mixture of SwiGLU experts in place of the feed-forward layer, in the layers from `first_layer` on.
#[derive(Debug, Clone, PartialEq)]
pub struct Experts {
    /// Experts of a layer.
    pub count: usize,
    /// Experts that compute a token.
    pub chosen: usize,
    /// Width of an expert's state.
    pub width: usize,
    /// Width of the state of what all tokens go through beside their experts; 0: nothing.
    pub shared_width: usize,
    /// Layers before this one have a plain feed-forward layer.
    pub first_layer: usize,
    /// How a token's experts are chosen and weighed.
    pub router: Router,
}

/// How a token's experts are chosen and weighed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Router {
    /// What makes scores of the gate's numbers.
    pub score: Score,
    /// For the choice, and not for the weights, a learned number is added to each score.
    pub bias: bool,
    /// Experts are chosen from the best groups only.
    pub groups: Option<Groups>,
    /// The weights of the chosen are divided by their sum.
    pub normalised: bool,
    /// The weights are multiplied by this.
    pub scale: f64,
}

/// What makes scores of a gate's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// Over all experts.
    Softmax,
    /// Each by itself.
    Sigmoid,
}

/// Experts in groups of equal size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// How many groups.
    pub count: usize,
    /// From so many of them experts are chosen.
    pub chosen: usize,
    /// A group is as good as the sum of so many of its best scores.
    pub best: usize,
}

impl Attention {
    /// Numbers of one query head, as the scores see it.
    pub fn query_dim(&self) -> usize {
        match &self.kind {
            AttentionKind::Grouped(grouped) => grouped.head_dim,
            AttentionKind::Latent(latent) => latent.plain_dim + latent.turned_dim,
        }
    }

    /// Numbers that one head gives to the output.
    pub fn value_dim(&self) -> usize {
        match &self.kind {
            AttentionKind::Grouped(grouped) => grouped.head_dim,
            AttentionKind::Latent(latent) => latent.value_dim,
        }
    }

    /// Numbers of a head that are turned.
    pub fn turned_dim(&self) -> usize {
        match &self.kind {
            AttentionKind::Grouped(grouped) => grouped.head_dim,
            AttentionKind::Latent(latent) => latent.turned_dim,
        }
    }

    /// What of a token is cached in a layer: kind, heads, numbers of each vector.
    pub fn cached(&self) -> (KvParts, usize, usize) {
        match &self.kind {
            AttentionKind::Grouped(grouped) => (KvParts::KeysValues, grouped.kv_heads, grouped.head_dim),
            AttentionKind::Latent(latent) => (KvParts::Latent, 1, latent.rank + latent.turned_dim),
        }
    }

    /// The kind in the field's letters.
    pub fn letters(&self) -> &'static str {
        match &self.kind {
            AttentionKind::Latent(_) => "MLA",
            AttentionKind::Grouped(grouped) if grouped.kv_heads == self.heads => "MHA",
            AttentionKind::Grouped(grouped) if grouped.kv_heads == 1 => "MQA",
            AttentionKind::Grouped(_) => "GQA",
        }
    }

    /// Refuses zero, absurd and contradicting numbers by the name of their field. `turned`: positions are rotary.
    pub(crate) fn validate(&self, file: &Path, layers: usize, turned: bool) -> Result<(), CheckpointError> {
        count(file, "num_attention_heads", self.heads, HEADS_MAX)?;
        assert_eq!(self.windows.len(), layers, "a reader gives each layer its window");
        for window in self.windows.iter().flatten() {
            count(file, "sliding_window", *window, usize::MAX)?;
        }
        let even = |field: &str, dim: usize| match turned && !dim.is_multiple_of(2) {
            true => Err(CheckpointError::malformed(file, field, format!("{dim} is odd"))),
            false => Ok(()),
        };
        match &self.kind {
            AttentionKind::Grouped(Grouped { kv_heads, head_dim, .. }) => {
                count(file, "num_key_value_heads", *kv_heads, HEADS_MAX)?;
                count(file, "head_dim", *head_dim, HEAD_DIM_MAX)?;
                if !self.heads.is_multiple_of(*kv_heads) {
                    let reason = format!("{kv_heads} does not divide num_attention_heads {}", self.heads);
                    return Err(CheckpointError::malformed(file, "num_key_value_heads", reason));
                }
                even("head_dim", *head_dim)
            }
            AttentionKind::Latent(latent) => {
                count(file, "q_lora_rank", latent.query_rank.unwrap_or(1), HIDDEN_MAX)?;
                count(file, "kv_lora_rank", latent.rank, LATENT_MAX)?;
                count(file, "qk_nope_head_dim", latent.plain_dim, HEAD_DIM_MAX)?;
                count(file, "qk_rope_head_dim", latent.turned_dim, HEAD_DIM_MAX)?;
                count(file, "v_head_dim", latent.value_dim, HEAD_DIM_MAX)?;
                even("qk_rope_head_dim", latent.turned_dim)
            }
        }
    }
}

impl Experts {
    /// Refuses zero, absurd and contradicting numbers by the name of their field.
    pub(crate) fn validate(&self, file: &Path, layers: usize) -> Result<(), CheckpointError> {
        count(file, "n_routed_experts", self.count, EXPERTS_MAX)?;
        count(file, "n_routed_experts in all layers", self.count * layers, EXPERTS_TOTAL_MAX)?;
        count(file, "num_experts_per_tok", self.chosen, self.count)?;
        count(file, "moe_intermediate_size", self.width, INTERMEDIATE_MAX)?;
        if self.shared_width > INTERMEDIATE_MAX {
            return Err(CheckpointError::limit(file, "n_shared_experts", self.shared_width as u64, INTERMEDIATE_MAX as u64));
        }
        if !(self.router.scale.is_finite() && self.router.scale > 0.0) {
            let reason = format!("{} is not a number above 0", self.router.scale);
            return Err(CheckpointError::malformed(file, "routed_scaling_factor", reason));
        }
        let Some(groups) = self.router.groups else { return Ok(()) };
        count(file, "n_group", groups.count, self.count)?;
        count(file, "topk_group", groups.chosen, groups.count)?;
        let size = self.count / groups.count;
        if !self.count.is_multiple_of(groups.count) || size < groups.best {
            let reason = format!("{} does not cut {} experts into groups of at least {}", groups.count, self.count, groups.best);
            return Err(CheckpointError::malformed(file, "n_group", reason));
        }
        count(file, "num_experts_per_tok", self.chosen, groups.chosen * size)
    }
}

/// Refuses zero and what is over a limit.
pub(crate) fn count(file: &Path, field: &str, found: usize, max: usize) -> Result<(), CheckpointError> {
    match found {
        0 => Err(CheckpointError::malformed(file, field, "is zero")),
        _ if found > max => Err(CheckpointError::limit(file, field, found as u64, max as u64)),
        _ => Ok(()),
    }
}
