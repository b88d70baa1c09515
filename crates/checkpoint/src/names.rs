//! How files call and lay the tensors of a model: canonical name and order for each name in a file.
//!
//! Conventions: transformers' `modeling_*.py`; llama.cpp's `gguf-py/gguf/constants.py` and `convert_hf_to_gguf.py`.

use crate::weights::{Order, Slot};
use crate::{Architecture, AttentionKind, ModelConfig};

/// Names outside of layers: in the file, canonical.
type Whole = [(&'static str, &'static str)];
/// Parts of a layer: in the file, canonical; `.weight` and `.bias` follow.
type Parts = [(&'static str, &'static str)];

const GPT2_WHOLE: &Whole = &[("wte", "model.embed_tokens"), ("wpe", "model.embed_positions"), ("ln_f", "model.norm")];
const GPT2_PARTS: &Parts = &[
    ("ln_1", "input_layernorm"),
    ("attn.c_attn", "self_attn.qkv_proj"),
    ("attn.c_proj", "self_attn.o_proj"),
    ("ln_2", "post_attention_layernorm"),
    ("mlp.c_fc", "mlp.up_proj"),
    ("mlp.c_proj", "mlp.down_proj"),
];
const GGUF_WHOLE: &Whole = &[
    ("token_embd", "model.embed_tokens"),
    ("position_embd", "model.embed_positions"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
];
const GGUF_PARTS: &Parts = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Canonical name and order of a tensor of a Hugging Face directory. Only GPT-2's are other than canonical already.
pub(crate) fn in_directory(config: &ModelConfig, name: String, slot: Slot) -> (String, Slot) {
    if config.architecture == Architecture::Gpt2 {
        let short = name.strip_prefix("transformer.").unwrap_or(&name);
        let Some(canonical) = translated(short, GPT2_WHOLE, "h.", GPT2_PARTS) else { return (name, slot) };
        let conv1d = short.ends_with(".weight") && short.contains(".c_");
        return (canonical, if conv1d { transposed(slot) } else { slot });
    }
    let order = match (&config.attention.kind, name.rsplit('.').nth(1)) {
        (AttentionKind::Latent(latent), Some("q_proj" | "q_b_proj")) if latent.pairs => {
            Order::Paired { heads: config.attention.heads, turned: latent.turned_dim }
        }
        (AttentionKind::Latent(latent), Some("kv_a_proj_with_mqa")) if latent.pairs => {
            Order::Paired { heads: 1, turned: latent.turned_dim }
        }
        _ => slot.order,
    };
    (name, Slot { order, ..slot })
}

/// Canonical name and order of a tensor of a GGUF file. Only Llama's queries and keys lie in another order.
pub(crate) fn in_gguf(config: &ModelConfig, name: &str, slot: Slot) -> (String, Slot) {
    let canonical = translated(name, GGUF_WHOLE, "blk.", GGUF_PARTS).unwrap_or_else(|| name.to_owned());
    let AttentionKind::Grouped(grouped) = &config.attention.kind else { return (canonical, slot) };
    let heads = match canonical.rsplit('.').nth(1) {
        Some("q_proj") => config.attention.heads,
        Some("k_proj") => grouped.kv_heads,
        _ => return (canonical, slot),
    };
    // A shape that is not whole heads fails the check against the configuration; until then it is not taken apart.
    let whole = slot.shape.len() == 2 && slot.shape[0] == heads * grouped.head_dim;
    match config.architecture == Architecture::Llama && whole {
        true => (canonical, Slot { order: Order::Paired { heads, turned: grouped.head_dim }, ..slot }),
        false => (canonical, slot),
    }
}

fn translated(name: &str, whole: &Whole, layers: &str, parts: &Parts) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    if let Some((_, canonical)) = whole.iter().find(|(own, _)| *own == stem) {
        return Some(format!("{canonical}.{kind}"));
    }
    let (layer, part) = stem.strip_prefix(layers)?.split_once('.')?;
    let layer: u16 = layer.parse().ok()?;
    let (_, canonical) = parts.iter().find(|(own, _)| *own == part)?;
    Some(format!("model.layers.{layer}.{canonical}.{kind}"))
}

fn transposed(mut slot: Slot) -> Slot {
    if let [rows, columns] = slot.shape.as_mut_slice() {
        std::mem::swap(rows, columns);
        slot.order = Order::Transposed;
    }
    slot
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_translated_whole_or_not_at_all() {
        let gpt2 = |name| translated(name, GPT2_WHOLE, "h.", GPT2_PARTS);
        assert_eq!(gpt2("h.11.attn.c_attn.bias").as_deref(), Some("model.layers.11.self_attn.qkv_proj.bias"));
        assert_eq!(gpt2("ln_f.weight").as_deref(), Some("model.norm.weight"));
        for other in
            ["h.0.attn.bias", "h.0.attn.masked_bias", "h.x.ln_1.weight", "h.0.ln_1", "lm_head.weight", "h.99999.ln_1.weight"]
        {
            assert_eq!(gpt2(other), None, "{other}");
        }
        let gguf = |name| translated(name, GGUF_WHOLE, "blk.", GGUF_PARTS);
        assert_eq!(gguf("blk.3.attn_q_norm.weight").as_deref(), Some("model.layers.3.self_attn.q_norm.weight"));
        assert_eq!(gguf("rope_freqs.weight"), None);
    }
}
