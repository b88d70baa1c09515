//! A model's description, checked once: its counts, and the parts that its layers are made of (`parts`).
//!
//! Both readers (Hugging Face and GGUF) end here, so a limit or a rule is written down once. Says nothing of how a file spells a field.

use crate::parts::count;
use crate::{Attention, CheckpointError, Experts, Mlp, Norm, Positions};
use std::fmt;
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

/// The family that a model's files name. For readers and for display: what the layers are is in the other fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the names say it")]
pub enum Architecture {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gpt2,
    DeepseekV2,
    DeepseekV3,
}

impl Architecture {
    /// Every one that is served.
    pub const ALL: [Self; 7] =
        [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::Gpt2, Self::DeepseekV2, Self::DeepseekV3];

    /// `model_type` in a Hugging Face configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gpt2 => "gpt2",
            Self::DeepseekV2 => "deepseek_v2",
            Self::DeepseekV3 => "deepseek_v3",
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A model's description. Valid by construction: every count is at least 1 and at most its limit, heads divide evenly.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The name of the file or directory, without its ending. Not part of the fingerprint.
    pub name: String,
    /// The family. Not part of the fingerprint, and nothing that computes asks for it.
    pub architecture: Architecture,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Width of the hidden state.
    pub hidden_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// The norms.
    pub norm: Norm,
    /// How a token's position gets in.
    pub positions: Positions,
    /// How the layers attend.
    pub attention: Attention,
    /// The feed-forward layers.
    pub mlp: Mlp,
    /// What stands in for them in some layers.
    pub experts: Option<Experts>,
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
        count(file, "vocab_size", self.vocab_size, VOCAB_MAX)?;
        count(file, "hidden_size", self.hidden_size, HIDDEN_MAX)?;
        count(file, "intermediate_size", self.mlp.width, INTERMEDIATE_MAX)?;
        count(file, "num_hidden_layers", self.layers, LAYERS_MAX)?;
        count(file, "max_position_embeddings", self.max_positions, POSITIONS_MAX)?;
        if !(self.norm.eps > 0.0 && self.norm.eps < 1.0) {
            let reason = format!("{} is not between 0 and 1", self.norm.eps);
            return Err(CheckpointError::malformed(file, "rms_norm_eps", reason));
        }
        self.attention.validate(file, self.layers, self.positions != Positions::Learned)?;
        if let Positions::Rotary(rope) = &self.positions {
            rope.validate(file, self.attention.turned_dim())?;
        }
        self.experts.as_ref().map_or(Ok(()), |experts| experts.validate(file, self.layers))?;
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionKind, Grouped, Groups, Latent, MlpKind, NormKind, Rope, Router, Scaling, Score};

    fn sound() -> ModelConfig {
        let grouped = Grouped { kv_heads: 2, head_dim: 4, joined: false, norms: false };
        ModelConfig {
            name: "t".into(),
            architecture: Architecture::Llama,
            vocab_size: 32,
            hidden_size: 16,
            layers: 2,
            norm: Norm { kind: NormKind::Rms, eps: 1e-5 },
            positions: Positions::Rotary(Rope { theta: 1e4, scaling: Scaling::Plain }),
            attention: Attention {
                heads: 4,
                kind: AttentionKind::Grouped(grouped),
                qkv_bias: false,
                output_bias: false,
                scale: 0.5,
                windows: vec![None; 2],
            },
            mlp: Mlp { width: 24, kind: MlpKind::SwiGlu },
            experts: None,
            max_positions: 64,
            tie_word_embeddings: true,
            bos: Some(1),
            eos: vec![2],
        }
    }

    /// Multi-head latent attention and a mixture of experts.
    fn latent() -> ModelConfig {
        let latent = Latent { query_rank: Some(12), rank: 8, plain_dim: 4, turned_dim: 2, value_dim: 4, pairs: true };
        let groups = Some(Groups { count: 4, chosen: 2, best: 2 });
        let router = Router { score: Score::Sigmoid, bias: true, groups, normalised: true, scale: 1.5 };
        let attention = Attention { kind: AttentionKind::Latent(latent), ..sound().attention };
        let experts = Some(Experts { count: 8, chosen: 3, width: 8, shared_width: 8, first_layer: 1, router });
        ModelConfig { attention, experts, ..sound() }
    }

    fn grouped(config: &mut ModelConfig) -> &mut Grouped {
        let AttentionKind::Grouped(grouped) = &mut config.attention.kind else { panic!("it is grouped") };
        grouped
    }

    fn of_latent(config: &mut ModelConfig) -> &mut Latent {
        let AttentionKind::Latent(latent) = &mut config.attention.kind else { panic!("it has a latent") };
        latent
    }

    fn experts(config: &mut ModelConfig) -> &mut Experts {
        config.experts.as_mut().expect("it has experts")
    }

    fn refuse(sound: ModelConfig, field: &str, change: impl FnOnce(&mut ModelConfig)) {
        let mut config = sound;
        change(&mut config);
        let message = config.validate(Path::new("dir/config.json")).unwrap_err().to_string();
        assert!(message.contains(field) && message.contains("config.json"), "{message}");
    }

    #[test]
    fn each_bad_number_is_named() {
        refuse(sound(), "num_attention_heads", |c| c.attention.heads = 0);
        refuse(sound(), "num_key_value_heads", |c| grouped(c).kv_heads = 0);
        refuse(sound(), "num_key_value_heads", |c| grouped(c).kv_heads = 3);
        refuse(sound(), "num_hidden_layers", |c| c.layers = LAYERS_MAX + 1);
        refuse(sound(), "vocab_size", |c| c.vocab_size = usize::MAX);
        refuse(sound(), "head_dim", |c| grouped(c).head_dim = 5);
        refuse(sound(), "sliding_window", |c| c.attention.windows[1] = Some(0));
        refuse(sound(), "rms_norm_eps", |c| c.norm.eps = f64::NAN);
        refuse(sound(), "rope_theta", |c| c.positions = Positions::Rotary(Rope { theta: f64::NAN, scaling: Scaling::Plain }));
        refuse(sound(), "bos_token_id", |c| c.bos = Some(32));
        refuse(sound(), "eos_token_id", |c| c.eos = vec![2, 32]);
        refuse(sound(), "eos_token_id count", |c| c.eos = vec![2; EOS_MAX + 1]);
        assert!(sound().validate(Path::new("x")).is_ok());
    }

    #[test]
    fn each_bad_number_of_latents_and_experts_is_named() {
        refuse(latent(), "q_lora_rank", |c| of_latent(c).query_rank = Some(0));
        refuse(latent(), "kv_lora_rank", |c| of_latent(c).rank = crate::LATENT_MAX + 1);
        refuse(latent(), "qk_nope_head_dim", |c| of_latent(c).plain_dim = 0);
        refuse(latent(), "qk_rope_head_dim", |c| of_latent(c).turned_dim = 3);
        refuse(latent(), "v_head_dim", |c| of_latent(c).value_dim = usize::MAX);
        refuse(latent(), "n_routed_experts", |c| experts(c).count = usize::MAX);
        refuse(latent(), "num_experts_per_tok", |c| experts(c).chosen = 0);
        refuse(latent(), "num_experts_per_tok is 5, the limit is 4", |c| experts(c).chosen = 5);
        refuse(latent(), "moe_intermediate_size", |c| experts(c).width = 0);
        refuse(latent(), "n_shared_experts", |c| experts(c).shared_width = usize::MAX);
        refuse(latent(), "routed_scaling_factor", |c| experts(c).router.scale = f64::INFINITY);
        refuse(latent(), "n_group", |c| experts(c).router.groups = Some(Groups { count: 3, chosen: 1, best: 2 }));
        refuse(latent(), "n_group", |c| experts(c).router.groups = Some(Groups { count: 0, chosen: 1, best: 2 }));
        refuse(latent(), "n_group", |c| experts(c).router.groups = Some(Groups { count: 8, chosen: 8, best: 2 }));
        refuse(latent(), "topk_group", |c| experts(c).router.groups = Some(Groups { count: 4, chosen: 5, best: 2 }));
        assert!(latent().validate(Path::new("x")).is_ok());
    }

    #[test]
    fn digest_covers_shape_and_not_the_name() {
        let base = sound().digest();
        assert_eq!(ModelConfig { name: "other".into(), ..sound() }.digest(), base);
        assert_ne!(ModelConfig { layers: 3, ..sound() }.digest(), base);
        assert_ne!(ModelConfig { eos: vec![2, 3], ..sound() }.digest(), base);
        let changed = |sound: fn() -> ModelConfig, change: fn(&mut ModelConfig)| {
            let mut config = sound();
            change(&mut config);
            assert_ne!(config.digest(), sound().digest());
        };
        changed(sound, |c| c.positions = Positions::Rotary(Rope { theta: 1e5, scaling: Scaling::Plain }));
        changed(sound, |c| c.positions = Positions::Learned);
        changed(sound, |c| c.norm.kind = NormKind::Layer);
        changed(sound, |c| c.attention.windows[1] = Some(32));
        changed(sound, |c| grouped(c).norms = true);
        changed(latent, |c| of_latent(c).query_rank = None);
        changed(latent, |c| experts(c).router.groups = None);
        changed(latent, |c| experts(c).router.score = Score::Softmax);
    }
}
