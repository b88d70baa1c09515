//! What a GGUF file means: its configuration and its tensors under canonical names.
//!
//! The converter's conventions come from llama.cpp (`convert_hf_to_gguf.py`, `gguf-py/gguf/constants.py`).

use crate::gguf::Gguf;
use crate::weights::{Order, Slot, Weights};
use crate::{
    Architecture, Attention, AttentionKind, CheckpointError, Grouped, LAYERS_MAX, Mlp, MlpKind, ModelConfig, Norm, NormKind,
    Positions, Rope, Scaling, TensorType, TensorView, names,
};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;

/// Control tokens that end a turn whatever the file's `eos_token_id` says; some converters left them out.
const END_OF_TURN: [&str; 4] = ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"];
/// `tokenizer.ggml.token_type` of a control token.
pub(crate) const TOKEN_CONTROL: i64 = 3;

/// Reads the configuration. `bytes` are the whole file.
pub(crate) fn config(gguf: &Gguf<'_>, bytes: &[u8], name: String) -> Result<ModelConfig, CheckpointError> {
    let file = gguf.file;
    let architecture = gguf.text("general.architecture")?;
    let architecture = match architecture.ok_or_else(|| missing(file, "general.architecture"))? {
        "llama" => Architecture::Llama, // Mistral too
        "qwen2" => Architecture::Qwen2,
        "qwen3" => Architecture::Qwen3,
        "gpt2" => Architecture::Gpt2,
        other => return Err(CheckpointError::Architecture { file: file.into(), architecture: other.into() }),
    };
    let keys = Keys { gguf, prefix: architecture.name() };
    keys.refuse_variants()?;
    let hidden_size = keys.needed("embedding_length")?;
    let layers = keys.needed("block_count")?;
    crate::parts::count(file, "num_hidden_layers", layers, LAYERS_MAX)?;
    let vocab_size = match keys.count("vocab_size")? {
        Some(size) => size,
        None => gguf.texts("tokenizer.ggml.tokens")?.ok_or_else(|| missing(file, &keys.name("vocab_size")))?.len(),
    };
    let learned = architecture == Architecture::Gpt2;
    let kind = if learned { MlpKind::Gelu } else { MlpKind::SwiGlu };
    let config = ModelConfig {
        name,
        architecture,
        vocab_size,
        hidden_size,
        layers,
        norm: keys.norm(learned)?,
        positions: if learned { Positions::Learned } else { Positions::Rotary(keys.rope(bytes)?) },
        attention: keys.attention(architecture, hidden_size, layers)?,
        mlp: Mlp { width: keys.needed("feed_forward_length")?, kind },
        experts: None,
        max_positions: keys.needed("context_length")?,
        tie_word_embeddings: !gguf.tensors.iter().any(|t| t.name == "output.weight"),
        bos: gguf.token("tokenizer.ggml.bos_token_id")?,
        eos: eos(gguf)?,
    };
    config.validate(file)
}

fn missing(file: &Path, key: &str) -> CheckpointError {
    CheckpointError::malformed(file, key, "is missing")
}

/// The keys of one architecture.
struct Keys<'a> {
    gguf: &'a Gguf<'a>,
    prefix: &'static str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn count(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        self.gguf.count(&self.name(key))
    }

    fn needed(&self, key: &str) -> Result<usize, CheckpointError> {
        self.count(key)?.ok_or_else(|| missing(self.gguf.file, &self.name(key)))
    }

    /// Models that call themselves so and are something else.
    fn refuse_variants(&self) -> Result<(), CheckpointError> {
        if let Some(experts) = self.count("expert_count")?.filter(|&n| n > 0) {
            return Err(CheckpointError::unsupported(self.gguf.file, self.name("expert_count"), experts));
        }
        let scaling = self.name("rope.scaling.type");
        match self.gguf.text(&scaling)?.filter(|&s| s != "none") {
            Some(other) => Err(CheckpointError::unsupported(self.gguf.file, scaling, other)),
            None => Ok(()),
        }
    }

    fn norm(&self, learned: bool) -> Result<Norm, CheckpointError> {
        let (kind, key) = match learned {
            true => (NormKind::Layer, "attention.layer_norm_epsilon"),
            false => (NormKind::Rms, "attention.layer_norm_rms_epsilon"),
        };
        let eps = self.gguf.float(&self.name(key))?.ok_or_else(|| missing(self.gguf.file, &self.name(key)))?;
        Ok(Norm { kind, eps })
    }

    fn attention(&self, architecture: Architecture, hidden_size: usize, layers: usize) -> Result<Attention, CheckpointError> {
        let heads = self.needed("attention.head_count")?;
        let head_dim = match self.count("attention.key_length")? {
            Some(length) => length,
            None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                let key = self.name("attention.head_count");
                return Err(CheckpointError::malformed(self.gguf.file, key, "does not divide embedding_length"));
            }
        };
        for key in ["rope.dimension_count", "attention.value_length"] {
            if let Some(found) = self.count(key)?.filter(|&found| found != head_dim) {
                return Err(CheckpointError::unsupported(
                    self.gguf.file,
                    self.name(key),
                    format!("{found} (with heads of {head_dim})"),
                ));
            }
        }
        let learned = architecture == Architecture::Gpt2;
        let kv_heads = self.count("attention.head_count_kv")?.unwrap_or(heads);
        let norms = architecture == Architecture::Qwen3;
        Ok(Attention {
            heads,
            kind: AttentionKind::Grouped(Grouped { kv_heads, head_dim, joined: learned, norms }),
            qkv_bias: learned || architecture == Architecture::Qwen2,
            output_bias: learned,
            scale: (head_dim as f64).powf(-0.5),
            windows: vec![self.count("attention.sliding_window")?.filter(|&window| window > 0); layers],
        })
    }

    fn rope(&self, bytes: &[u8]) -> Result<Rope, CheckpointError> {
        let theta = self.gguf.float(&self.name("rope.freq_base"))?.unwrap_or(10_000.0);
        let Some(info) = self.gguf.tensors.iter().find(|t| t.name == "rope_freqs.weight") else {
            return Ok(Rope { theta, scaling: Scaling::Plain });
        };
        if info.dtype != TensorType::F32 || info.shape.len() != 1 || info.shape[0] > crate::HEAD_DIM_MAX {
            return Err(CheckpointError::malformed(self.gguf.file, "tensor rope_freqs.weight", "is not a short row of F32"));
        }
        let raw = Cow::Borrowed(&bytes[info.range.clone()]);
        let factors = TensorView { dtype: info.dtype, shape: info.shape.clone(), bytes: raw }.to_f32();
        Ok(Rope { theta, scaling: Scaling::Factors(factors) })
    }
}

fn eos(gguf: &Gguf<'_>) -> Result<Vec<u32>, CheckpointError> {
    let mut eos = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        eos.extend(gguf.token(&format!("tokenizer.ggml.{key}"))?);
    }
    let tokens = gguf.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
    let kinds = gguf.integers("tokenizer.ggml.token_type")?.unwrap_or_default();
    let ends = tokens.iter().zip(kinds).enumerate().filter(|(_, (t, kind))| *kind == TOKEN_CONTROL && END_OF_TURN.contains(t));
    eos.extend(ends.map(|(id, _)| id as u32));
    eos.sort_unstable();
    eos.dedup();
    Ok(eos)
}

/// Fills the table of weights from the file, which must be the only one in `weights`. A bias that the description does not have means that
/// the model is something else.
pub(crate) fn fill(gguf: &Gguf<'_>, config: &ModelConfig, weights: &mut Weights) -> Result<(), CheckpointError> {
    let described: BTreeSet<String> = config.tensors().into_iter().map(|(name, _)| name).collect();
    for info in &gguf.tensors {
        let slot =
            Slot { file: 0, range: info.range.clone(), dtype: info.dtype, shape: info.shape.clone(), order: Order::Canonical };
        let (name, slot) = names::in_gguf(config, &info.name, slot);
        if info.name.ends_with(".bias") && !described.contains(&name) {
            return Err(CheckpointError::unsupported(gguf.file, format!("tensor {}", info.name), "a bias"));
        }
        weights.insert(gguf.file, name, slot)?;
    }
    Ok(())
}
