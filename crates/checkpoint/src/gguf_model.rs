//! What a GGUF file of architecture `llama` means: its configuration and its tensors under canonical names.
//!
//! The converter's conventions come from llama.cpp (`convert_hf_to_gguf.py`, `gguf-py/gguf/constants.py`).

use crate::gguf::Gguf;
use crate::weights::{Slot, Weights};
use crate::{Architecture, CheckpointError, ModelConfig, Rope, TensorType, TensorView};
use std::borrow::Cow;

/// Control tokens that end a turn whatever the file's `eos_token_id` says; some converters left them out.
const END_OF_TURN: [&str; 4] = ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"];
/// `tokenizer.ggml.token_type` of a control token.
pub(crate) const TOKEN_CONTROL: i64 = 3;

/// Reads the configuration. `bytes` are the whole file.
pub(crate) fn config(gguf: &Gguf<'_>, bytes: &[u8], name: String) -> Result<ModelConfig, CheckpointError> {
    let file = gguf.file;
    let architecture = gguf.text("general.architecture")?;
    let missing = |key: &str| CheckpointError::malformed(file, key, "is missing");
    match architecture.ok_or_else(|| missing("general.architecture"))? {
        "llama" => {}
        other => return Err(CheckpointError::Architecture { file: file.into(), architecture: other.into() }),
    }
    refuse_variants(gguf)?;
    let count = |key: &str| gguf.count(key)?.ok_or_else(|| missing(key));
    let heads = count("llama.attention.head_count")?;
    let hidden_size = count("llama.embedding_length")?;
    let head_dim = match gguf.count("llama.attention.key_length")? {
        Some(length) => length,
        None if heads > 0 && hidden_size % heads == 0 => hidden_size / heads,
        None => return Err(CheckpointError::malformed(file, "llama.attention.head_count", "does not divide embedding_length")),
    };
    for key in ["llama.rope.dimension_count", "llama.attention.value_length"] {
        if let Some(found) = gguf.count(key)?.filter(|&found| found != head_dim) {
            return Err(CheckpointError::unsupported(file, key, format!("{found} (with heads of {head_dim})")));
        }
    }
    let vocab_size = match gguf.count("llama.vocab_size")? {
        Some(size) => size,
        None => gguf.texts("tokenizer.ggml.tokens")?.ok_or_else(|| missing("llama.vocab_size"))?.len(),
    };
    let eps = "llama.attention.layer_norm_rms_epsilon";
    let config = ModelConfig {
        name,
        architecture: Architecture::Llama,
        vocab_size,
        hidden_size,
        intermediate_size: count("llama.feed_forward_length")?,
        layers: count("llama.block_count")?,
        heads,
        kv_heads: gguf.count("llama.attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        rms_norm_eps: gguf.float(eps)?.ok_or_else(|| missing(eps))?,
        rope: rope(gguf, bytes)?,
        max_positions: count("llama.context_length")?,
        tie_word_embeddings: !gguf.tensors.iter().any(|t| t.name == "output.weight"),
        bos: gguf.token("tokenizer.ggml.bos_token_id")?,
        eos: eos(gguf)?,
    };
    config.validate(file)
}

/// Models that call themselves llama and are something else.
fn refuse_variants(gguf: &Gguf<'_>) -> Result<(), CheckpointError> {
    if let Some(experts) = gguf.count("llama.expert_count")?.filter(|&n| n > 0) {
        return Err(CheckpointError::unsupported(gguf.file, "llama.expert_count", experts));
    }
    if let Some(scaling) = gguf.text("llama.rope.scaling.type")?.filter(|&s| s != "none") {
        return Err(CheckpointError::unsupported(gguf.file, "llama.rope.scaling.type", scaling));
    }
    if let Some(tensor) = gguf.tensors.iter().find(|t| t.name.ends_with(".bias")) {
        return Err(CheckpointError::unsupported(gguf.file, format!("tensor {}", tensor.name), "a bias"));
    }
    Ok(())
}

fn rope(gguf: &Gguf<'_>, bytes: &[u8]) -> Result<Rope, CheckpointError> {
    let theta = gguf.float("llama.rope.freq_base")?.unwrap_or(10_000.0);
    let Some(info) = gguf.tensors.iter().find(|t| t.name == "rope_freqs.weight") else {
        return Ok(Rope { theta, scaling: None, factors: None });
    };
    if info.dtype != TensorType::F32 || info.shape.len() != 1 || info.shape[0] > crate::HEAD_DIM_MAX {
        return Err(CheckpointError::malformed(gguf.file, "tensor rope_freqs.weight", "is not a short row of F32"));
    }
    let raw = Cow::Borrowed(&bytes[info.range.clone()]);
    let factors = TensorView { dtype: info.dtype, shape: info.shape.clone(), bytes: raw }.to_f32();
    Ok(Rope { theta, scaling: None, factors: Some(factors) })
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

/// Fills the table of weights from the file, which must be the only one in `weights`.
pub(crate) fn fill(gguf: &Gguf<'_>, config: &ModelConfig, weights: &mut Weights) -> Result<(), CheckpointError> {
    for info in &gguf.tensors {
        let name = canonical_name(&info.name).unwrap_or_else(|| info.name.clone());
        let heads = match name.rsplit('.').nth(1) {
            Some("q_proj") => Some(config.heads),
            Some("k_proj") => Some(config.kv_heads),
            _ => None,
        };
        // A shape that is not whole heads fails the check against the configuration; until then it is not taken apart.
        let paired_heads = heads.filter(|heads| info.shape.len() == 2 && info.shape[0] == heads * config.head_dim);
        let slot = Slot { file: 0, range: info.range.clone(), dtype: info.dtype, shape: info.shape.clone(), paired_heads };
        weights.insert(gguf.file, name, slot)?;
    }
    Ok(())
}

/// Hugging Face's name of a tensor that the llama architecture has.
fn canonical_name(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some("lm_head.weight".into()),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: u16 = layer.parse().ok()?;
    let part = match part.strip_suffix(".weight")? {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.weight"))
}
