//! What each family of Hugging Face models is made of. Defaults are those of transformers' `configuration_*.py`.

use crate::directory_config::{rope, rope_object};
use crate::json_file::JsonFile;
use crate::rope::Yarn;
use crate::{
    Architecture, Attention, AttentionKind, CheckpointError, Experts, Grouped, Groups, LAYERS_MAX, Latent, Mlp, MlpKind, Norm,
    NormKind, Positions, Router, Score,
};
use serde_json::Value;

type Result<T> = std::result::Result<T, CheckpointError>;

/// The part of a description that depends on the family.
pub(crate) struct Parts {
    pub(crate) hidden_size: usize,
    pub(crate) layers: usize,
    pub(crate) max_positions: usize,
    pub(crate) norm: Norm,
    pub(crate) positions: Positions,
    pub(crate) attention: Attention,
    pub(crate) mlp: Mlp,
    pub(crate) experts: Option<Experts>,
}

/// What the file says of it.
pub(crate) fn parts(json: &JsonFile, architecture: Architecture) -> Result<Parts> {
    match architecture {
        Architecture::Gpt2 => gpt2(json),
        Architecture::DeepseekV2 | Architecture::DeepseekV3 => deepseek(json, architecture),
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 | Architecture::Qwen3 => grouped(json, architecture),
    }
}

/// Llama and those that differ from it by a bias, a norm, or a window.
fn grouped(json: &JsonFile, architecture: Architecture) -> Result<Parts> {
    let (heads, hidden_size) = (json.needed("num_attention_heads")?, json.needed("hidden_size")?);
    let head_dim = match json.count("head_dim")? {
        Some(head_dim) => head_dim,
        None if architecture == Architecture::Qwen3 => 128,
        None if heads > 0 && hidden_size % heads == 0 => hidden_size / heads,
        None => return json.wrong("num_attention_heads", "does not divide hidden_size, and there is no head_dim"),
    };
    let kv_heads = json.count("num_key_value_heads")?.unwrap_or(heads);
    let bias = json.is_true("attention_bias")?;
    let norms = architecture == Architecture::Qwen3;
    let layers = layers(json, "num_hidden_layers")?;
    let attention = Attention {
        heads,
        kind: AttentionKind::Grouped(Grouped { kv_heads, head_dim, joined: false, norms }),
        qkv_bias: bias || architecture == Architecture::Qwen2,
        output_bias: bias,
        scale: (head_dim as f64).powf(-0.5),
        windows: windows(json, architecture, layers)?,
    };
    turned(json, hidden_size, layers, attention)
}

/// What the families with RMS norms, turned heads and SwiGLU share.
fn turned(json: &JsonFile, hidden_size: usize, layers: usize, attention: Attention) -> Result<Parts> {
    if json.is_true("mlp_bias")? {
        return Err(CheckpointError::unsupported(&json.path, "mlp_bias", true));
    }
    json.only("hidden_act", &["silu"])?;
    let max_positions = json.count("max_position_embeddings")?.unwrap_or(2048); // LlamaConfig's default, the smallest
    Ok(Parts {
        hidden_size,
        layers,
        max_positions,
        norm: Norm { kind: NormKind::Rms, eps: json.number("rms_norm_eps")?.unwrap_or(1e-6) },
        positions: Positions::Rotary(rope(json, max_positions)?),
        attention,
        mlp: Mlp { width: json.needed("intermediate_size")?, kind: MlpKind::SwiGlu },
        experts: None,
    })
}

/// A number of layers that a list may have as its length.
fn layers(json: &JsonFile, field: &str) -> Result<usize> {
    let layers = json.needed(field)?;
    crate::parts::count(&json.path, field, layers, LAYERS_MAX)?;
    Ok(layers)
}

/// How far the tokens of each layer see.
fn windows(json: &JsonFile, architecture: Architecture, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = match json.count("sliding_window")? {
        None if architecture == Architecture::Mistral && !json.has("sliding_window") => Some(4096), // MistralConfig's default
        window => window,
    };
    match architecture {
        Architecture::Mistral => Ok(vec![window; layers]),
        Architecture::Qwen2 | Architecture::Qwen3 if json.is_true("use_sliding_window")? => {
            let window = json.need("sliding_window", window)?;
            if let Some(Value::Array(types)) = json.get("layer_types") {
                return windows_by_type(json, types, layers, window);
            }
            let first = json.needed("max_window_layers")?;
            Ok((0..layers).map(|layer| (layer >= first).then_some(window)).collect())
        }
        Architecture::Llama if window.is_some() => {
            Err(CheckpointError::unsupported(&json.path, "sliding_window", window.unwrap_or_default()))
        }
        _ => Ok(vec![None; layers]),
    }
}

fn windows_by_type(json: &JsonFile, types: &[Value], layers: usize, window: usize) -> Result<Vec<Option<usize>>> {
    if types.len() != layers {
        return json.wrong("layer_types", "is not a type for each layer");
    }
    let window_of = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => Ok(Some(window)),
        _ => Err(CheckpointError::unsupported(&json.path, "layer_types", kind)),
    };
    types.iter().map(window_of).collect()
}

/// Learned positions, LayerNorm, GELU, biases everywhere.
fn gpt2(json: &JsonFile) -> Result<Parts> {
    for (field, normal) in
        [("scale_attn_weights", true), ("scale_attn_by_inverse_layer_idx", false), ("add_cross_attention", false)]
    {
        if json.flag(field, normal)? != normal {
            return Err(CheckpointError::unsupported(&json.path, field, !normal));
        }
    }
    json.only("activation_function", &["gelu_new", "gelu_pytorch_tanh"])?;
    let (heads, hidden_size, layers) = (json.needed("n_head")?, json.needed("n_embd")?, layers(json, "n_layer")?);
    if heads == 0 || hidden_size % heads != 0 {
        return json.wrong("n_head", "does not divide n_embd");
    }
    let head_dim = hidden_size / heads;
    let attention = Attention {
        heads,
        kind: AttentionKind::Grouped(Grouped { kv_heads: heads, head_dim, joined: true, norms: false }),
        qkv_bias: true,
        output_bias: true,
        scale: (head_dim as f64).powf(-0.5),
        windows: vec![None; layers],
    };
    Ok(Parts {
        hidden_size,
        layers,
        max_positions: json.needed("n_positions")?,
        norm: Norm { kind: NormKind::Layer, eps: json.number("layer_norm_epsilon")?.unwrap_or(1e-5) },
        positions: Positions::Learned,
        attention,
        mlp: Mlp { width: json.count("n_inner")?.unwrap_or(hidden_size.saturating_mul(4)), kind: MlpKind::Gelu },
        experts: None,
    })
}

/// Multi-head latent attention and mixtures of experts.
fn deepseek(json: &JsonFile, architecture: Architecture) -> Result<Parts> {
    if json.is_true("attention_bias")? {
        return Err(CheckpointError::unsupported(&json.path, "attention_bias", true));
    }
    let latent = Latent {
        query_rank: json.count("q_lora_rank")?,
        rank: json.needed("kv_lora_rank")?,
        plain_dim: json.needed("qk_nope_head_dim")?,
        turned_dim: json.needed("qk_rope_head_dim")?,
        value_dim: json.needed("v_head_dim")?,
        pairs: architecture == Architecture::DeepseekV2 || json.flag("rope_interleave", true)?,
    };
    let (hidden_size, layers) = (json.needed("hidden_size")?, layers(json, "num_hidden_layers")?);
    let query_dim = latent.plain_dim.saturating_add(latent.turned_dim);
    let attention = Attention {
        heads: json.needed("num_attention_heads")?,
        kind: AttentionKind::Latent(latent),
        qkv_bias: false,
        output_bias: false,
        scale: (query_dim as f64).powf(-0.5) * sharpening(json)?.powi(2),
        windows: vec![None; layers],
    };
    let experts = match json.count("n_routed_experts")? {
        Some(count) => Some(experts(json, architecture, count)?),
        None => None,
    };
    Ok(Parts { experts, ..turned(json, hidden_size, layers, attention)? })
}

/// transformers' `yarn_apply_mscale`: scores are sharpened twice where the configuration says for all dimensions.
fn sharpening(json: &JsonFile) -> Result<f64> {
    let Some(scaling) = rope_object(json)? else { return Ok(1.0) };
    match (scaling.number("mscale_all_dim")?, scaling.number("factor")?) {
        (Some(all), Some(factor)) if all != 0.0 => Ok(Yarn::sharpening(factor, all)),
        _ => Ok(1.0),
    }
}

fn experts(json: &JsonFile, architecture: Architecture, count: usize) -> Result<Experts> {
    if let Some(every) = json.count("moe_layer_freq")?.filter(|&every| every != 1) {
        return Err(CheckpointError::unsupported(&json.path, "moe_layer_freq", every));
    }
    let (width, shared) = (json.needed("moe_intermediate_size")?, json.count("n_shared_experts")?.unwrap_or(0));
    let groups = |best: usize| -> Result<Option<Groups>> {
        Ok(Some(Groups { count: json.needed("n_group")?, chosen: json.needed("topk_group")?, best }))
    };
    let scale = json.number("routed_scaling_factor")?;
    let router = match architecture {
        Architecture::DeepseekV3 => {
            json.only("topk_method", &["noaux_tc"])?;
            json.only("scoring_func", &["sigmoid"])?;
            let normalised = json.flag("norm_topk_prob", true)?;
            Router { score: Score::Sigmoid, bias: true, groups: groups(2)?, normalised, scale: scale.unwrap_or(2.5) }
        }
        _ => {
            json.only("topk_method", &["greedy", "group_limited_greedy"])?;
            json.only("scoring_func", &["softmax"])?;
            if json.is_true("norm_topk_prob")? {
                return Err(CheckpointError::unsupported(&json.path, "norm_topk_prob", true));
            }
            let grouped = json.text("topk_method")? == Some("group_limited_greedy");
            let groups = if grouped { groups(1)? } else { None };
            Router { score: Score::Softmax, bias: false, groups, normalised: false, scale: scale.unwrap_or(1.0) }
        }
    };
    let first_layer = json.count("first_k_dense_replace")?.unwrap_or(0);
    let chosen = json.needed("num_experts_per_tok")?;
    Ok(Experts { count, chosen, width, shared_width: width.saturating_mul(shared), first_layer, router })
}
