//! The numbers that fix a model's shape, checked once, and the tensors that follow from them.
//!
//! Both readers (Hugging Face and GGUF) end here, so a limit or a rule is written down once. Says nothing of how a file spells a field.

use crate::{CheckpointError, Rope};
use std::path::Path;

/// Most decoder layers (the largest models in use have 126).
pub const LAYERS_MAX: usize = 1024;
/// Most attention heads in a layer.
pub const HEADS_MAX: usize = 1024;
/// Widest head.
pub const HEAD_DIM_MAX: usize = 1024;
/// Widest hidden state.
pub const HIDDEN_MAX: usize = 1 << 17;
/// Widest feed-forward state.
pub const INTERMEDIATE_MAX: usize = 1 << 20;
/// Most token ids.
pub const VOCAB_MAX: usize = 1 << 22;
/// Longest context, in tokens.
pub const POSITIONS_MAX: usize = 1 << 24;
/// Most token ids that end an answer.
pub const EOS_MAX: usize = 64;

/// The family of decoder layers a model is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Architecture {
    /// RMSNorm, rotary attention with grouped heads and no biases, SwiGLU.
    Llama,
}

/// A model's shape. Valid by construction: every count is at least 1 and at most its limit, heads divide evenly.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The name of the file or directory, without its ending. Not part of the fingerprint.
    pub name: String,
    /// What the layers are.
    pub architecture: Architecture,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Width of the hidden state.
    pub hidden_size: usize,
    /// Width of the feed-forward state.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads of a layer.
    pub heads: usize,
    /// Key and value heads of a layer; divides `heads`.
    pub kv_heads: usize,
    /// Numbers in one head; even. `heads * head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Added to the mean square before its root.
    pub rms_norm_eps: f64,
    /// Rotary settings.
    pub rope: Rope,
    /// Context length, in tokens.
    pub max_positions: usize,
    /// The output head is the embedding matrix; there is no `lm_head.weight`.
    pub tie_word_embeddings: bool,
    /// Token that opens a text, if the model has one.
    pub bos: Option<u32>,
    /// Tokens that end an answer; may be empty.
    pub eos: Vec<u32>,
}

impl ModelConfig {
    /// Refuses zero, absurd and contradicting numbers by the name of their field.
    pub(crate) fn validate(self, file: &Path) -> Result<Self, CheckpointError> {
        let counts = [
            ("vocab_size", self.vocab_size, VOCAB_MAX),
            ("hidden_size", self.hidden_size, HIDDEN_MAX),
            ("intermediate_size", self.intermediate_size, INTERMEDIATE_MAX),
            ("num_hidden_layers", self.layers, LAYERS_MAX),
            ("num_attention_heads", self.heads, HEADS_MAX),
            ("num_key_value_heads", self.kv_heads, HEADS_MAX),
            ("head_dim", self.head_dim, HEAD_DIM_MAX),
            ("max_position_embeddings", self.max_positions, POSITIONS_MAX),
        ];
        for (field, found, max) in counts {
            if found == 0 {
                return Err(CheckpointError::malformed(file, field, "is zero"));
            }
            if found > max {
                return Err(CheckpointError::limit(file, field, found as u64, max as u64));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let reason = format!("{} does not divide num_attention_heads {}", self.kv_heads, self.heads);
            return Err(CheckpointError::malformed(file, "num_key_value_heads", reason));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(CheckpointError::malformed(file, "head_dim", format!("{} is odd", self.head_dim)));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            let reason = format!("{} is not between 0 and 1", self.rms_norm_eps);
            return Err(CheckpointError::malformed(file, "rms_norm_eps", reason));
        }
        self.rope.validate(file, self.head_dim)?;
        self.validate_tokens(file)?;
        Ok(self)
    }

    fn validate_tokens(&self, file: &Path) -> Result<(), CheckpointError> {
        if self.eos.len() > EOS_MAX {
            return Err(CheckpointError::limit(file, "eos_token_id count", self.eos.len() as u64, EOS_MAX as u64));
        }
        let named = self.bos.iter().map(|id| ("bos_token_id", id)).chain(self.eos.iter().map(|id| ("eos_token_id", id)));
        for (field, &id) in named {
            if id as usize >= self.vocab_size {
                let reason = format!("{id} is not below vocab_size {}", self.vocab_size);
                return Err(CheckpointError::malformed(file, field, reason));
            }
        }
        Ok(())
    }

    /// Canonical name and shape of every tensor the architecture needs, in the order of computation.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, wide) = (self.hidden_size, self.intermediate_size);
        let (q_rows, kv_rows) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden])];
        for layer in 0..self.layers {
            let parts = [
                ("input_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![q_rows, hidden]),
                ("self_attn.k_proj", vec![kv_rows, hidden]),
                ("self_attn.v_proj", vec![kv_rows, hidden]),
                ("self_attn.o_proj", vec![hidden, q_rows]),
                ("post_attention_layernorm", vec![hidden]),
                ("mlp.gate_proj", vec![wide, hidden]),
                ("mlp.up_proj", vec![wide, hidden]),
                ("mlp.down_proj", vec![hidden, wide]),
            ];
            all.extend(parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape)));
        }
        all.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        all
    }

    /// Digest of the fields that change an answer or the layout of its KV. Two machines with the same files agree on it.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("millrace 2026 model config v1");
        let mut field = |value: u64| {
            hasher.update(&value.to_le_bytes());
        };
        field(match self.architecture {
            Architecture::Llama => 1,
        });
        for count in [self.vocab_size, self.hidden_size, self.intermediate_size, self.layers, self.heads, self.kv_heads] {
            field(count as u64);
        }
        field(self.head_dim as u64);
        field(self.rms_norm_eps.to_bits());
        field(self.max_positions as u64);
        field(u64::from(self.tie_word_embeddings));
        field(self.rope.theta.to_bits());
        let scaling = self.rope.scaling.map(|s| [s.factor, s.low, s.high, s.original_max]);
        scaling.unwrap_or_default().into_iter().for_each(|x| field(x.to_bits()));
        let factors = self.rope.factors.as_deref().unwrap_or_default();
        field(factors.len() as u64);
        factors.iter().for_each(|x| field(u64::from(x.to_bits())));
        field(self.bos.map_or(u64::MAX, u64::from));
        field(self.eos.len() as u64);
        self.eos.iter().for_each(|&id| field(u64::from(id)));
        *hasher.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> ModelConfig {
        ModelConfig {
            name: "t".into(),
            architecture: Architecture::Llama,
            vocab_size: 32,
            hidden_size: 16,
            intermediate_size: 24,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 4,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling: None, factors: None },
            max_positions: 64,
            tie_word_embeddings: true,
            bos: Some(1),
            eos: vec![2],
        }
    }

    #[test]
    fn each_bad_number_is_named() {
        let refuse = |field: &str, change: fn(&mut ModelConfig)| {
            let mut config = sound();
            change(&mut config);
            let message = config.validate(Path::new("dir/config.json")).unwrap_err().to_string();
            assert!(message.contains(field) && message.contains("config.json"), "{message}");
        };
        refuse("num_attention_heads", |c| c.heads = 0);
        refuse("num_key_value_heads", |c| c.kv_heads = 0);
        refuse("num_key_value_heads", |c| c.kv_heads = 3);
        refuse("num_hidden_layers", |c| c.layers = LAYERS_MAX + 1);
        refuse("vocab_size", |c| c.vocab_size = usize::MAX);
        refuse("head_dim", |c| c.head_dim = 5);
        refuse("rms_norm_eps", |c| c.rms_norm_eps = f64::NAN);
        refuse("rope_theta", |c| c.rope.theta = f64::NAN);
        refuse("bos_token_id", |c| c.bos = Some(32));
        refuse("eos_token_id", |c| c.eos = vec![2, 32]);
        refuse("eos_token_id count", |c| c.eos = vec![2; EOS_MAX + 1]);
        assert!(sound().validate(Path::new("x")).is_ok());
    }

    #[test]
    fn digest_covers_shape_and_not_the_name() {
        let base = sound().digest();
        assert_eq!(ModelConfig { name: "other".into(), ..sound() }.digest(), base);
        assert_ne!(ModelConfig { layers: 3, ..sound() }.digest(), base);
        assert_ne!(ModelConfig { eos: vec![2, 3], ..sound() }.digest(), base);
        let rope = Rope { theta: 1e5, scaling: None, factors: None };
        assert_ne!(ModelConfig { rope, ..sound() }.digest(), base);
    }
}
