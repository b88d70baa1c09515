//! `config.json` and `generation_config.json` of a Hugging Face directory, in the forms of transformers 4 and 5: what all families share.
//! What is a family's own is in `directory_families`.

use crate::directory_families::{self, Parts};
use crate::json_file::JsonFile;
use crate::rope::Yarn;
use crate::{Architecture, CheckpointError, Llama3Scaling, ModelConfig, Rope, Scaling};
use serde_json::Value;
use std::path::Path;

/// Largest configuration file, in bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

type Result<T> = std::result::Result<T, CheckpointError>;

/// The configuration of the model in `directory`, checked.
pub(crate) fn read(directory: &Path, name: String) -> Result<ModelConfig> {
    let path = directory.join("config.json");
    let Some(json) = JsonFile::open(path.clone(), CONFIG_BYTES_MAX)? else {
        return Err(CheckpointError::NotAModel { file: directory.into(), reason: "there is no config.json".into() });
    };
    let architecture = architecture(&json)?;
    if let Some(value) = json.get("quantization_config") {
        let shown = value.get("quant_method").unwrap_or(value);
        return Err(CheckpointError::unsupported(&json.path, "quantization_config", shown));
    }
    let Parts { hidden_size, layers, max_positions, norm, positions, attention, mlp, experts } =
        directory_families::parts(&json, architecture)?;
    let bos = json.tokens("bos_token_id")?.unwrap_or_default();
    let config = ModelConfig {
        name,
        architecture,
        vocab_size: json.needed("vocab_size")?,
        hidden_size,
        layers,
        norm,
        positions,
        attention,
        mlp,
        experts,
        max_positions,
        // GPT2Config's default is another than that of all others.
        tie_word_embeddings: json.flag("tie_word_embeddings", architecture == Architecture::Gpt2)?,
        bos: bos.first().copied(),
        eos: eos(directory, &json)?,
    };
    config.validate(&path)
}

/// By `architectures`, else by `model_type`.
fn architecture(json: &JsonFile) -> Result<Architecture> {
    let named = json.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let name = json.need("architectures", named.map_or_else(|| json.text("model_type"), |name| Ok(Some(name)))?)?;
    match name {
        "LlamaForCausalLM" | "llama" => Ok(Architecture::Llama),
        "MistralForCausalLM" | "mistral" => Ok(Architecture::Mistral),
        "Qwen2ForCausalLM" | "qwen2" => Ok(Architecture::Qwen2),
        "Qwen3ForCausalLM" | "qwen3" => Ok(Architecture::Qwen3),
        "GPT2LMHeadModel" | "gpt2" => Ok(Architecture::Gpt2),
        "DeepseekV2ForCausalLM" | "deepseek_v2" => Ok(Architecture::DeepseekV2),
        "DeepseekV3ForCausalLM" | "deepseek_v3" => Ok(Architecture::DeepseekV3),
        other => Err(CheckpointError::Architecture { file: json.path.clone(), architecture: other.into() }),
    }
}

/// The generation settings win over the model's where they are there.
fn eos(directory: &Path, json: &JsonFile) -> Result<Vec<u32>> {
    let generation = JsonFile::open(directory.join("generation_config.json"), CONFIG_BYTES_MAX)?;
    let from_generation = generation.map_or(Ok(None), |g| g.tokens("eos_token_id"))?;
    let mut eos = from_generation.map_or_else(|| json.tokens("eos_token_id"), |ids| Ok(Some(ids)))?.unwrap_or_default();
    eos.sort_unstable();
    eos.dedup();
    Ok(eos)
}

/// The object that says how frequencies are scaled: `rope_parameters` (transformers 5) or `rope_scaling` (4).
pub(crate) fn rope_object(json: &JsonFile) -> Result<Option<JsonFile>> {
    json.object("rope_parameters")?.map_or_else(|| json.object("rope_scaling"), |object| Ok(Some(object)))
}

/// Rotary settings; `rope_theta` stands in the same object (transformers 5) or beside it (4).
pub(crate) fn rope(json: &JsonFile, max_positions: usize) -> Result<Rope> {
    let scaling = rope_object(json)?;
    let own = scaling.as_ref().map_or(Ok(None), |s| s.number("rope_theta"))?;
    let theta = own.map_or_else(|| json.number("rope_theta"), |theta| Ok(Some(theta)))?.unwrap_or(10_000.0);
    for (file, field) in [(Some(json), "partial_rotary_factor"), (scaling.as_ref(), "partial_rotary_factor")] {
        if let Some(factor) = file.map_or(Ok(None), |f| f.number(field))?.filter(|&f| f != 1.0) {
            return Err(CheckpointError::unsupported(&json.path, field, factor));
        }
    }
    let Some(scaling) = scaling else { return Ok(Rope { theta, scaling: Scaling::Plain }) };
    let kind = scaling.text("rope_type")?.map_or_else(|| scaling.text("type"), |kind| Ok(Some(kind)))?;
    let number = |field: &str| scaling.number(field).and_then(|found| scaling.need(field, found));
    let scaling = match kind.unwrap_or("default") {
        "default" => Scaling::Plain,
        "llama3" => Scaling::Llama3(Llama3Scaling {
            factor: number("factor")?,
            low: number("low_freq_factor")?,
            high: number("high_freq_factor")?,
            original_max: number("original_max_position_embeddings")?,
        }),
        "yarn" => Scaling::Yarn(yarn(&scaling, max_positions)?),
        other => return Err(CheckpointError::unsupported(&json.path, format!("{}rope_type", scaling.prefix), other)),
    };
    Ok(Rope { theta, scaling })
}

/// With the defaults of transformers' `_compute_yarn_parameters`.
fn yarn(scaling: &JsonFile, max_positions: usize) -> Result<Yarn> {
    let original = scaling.number("original_max_position_embeddings")?;
    let original_max = scaling.need("original_max_position_embeddings", original)?;
    let factor = scaling.number("factor")?.unwrap_or(max_positions as f64 / original_max);
    let set = |field: &str| scaling.number(field).map(|found| found.filter(|&x| x != 0.0));
    if !scaling.flag("truncate", true)? {
        return Err(CheckpointError::unsupported(&scaling.path, format!("{}truncate", scaling.prefix), false));
    }
    let turn_scale = match (scaling.number("attention_factor")?, set("mscale")?, set("mscale_all_dim")?) {
        (Some(given), _, _) => given,
        (None, Some(one), Some(all)) => Yarn::sharpening(factor, one) / Yarn::sharpening(factor, all),
        _ => Yarn::sharpening(factor, 1.0),
    };
    Ok(Yarn { factor, fast: set("beta_fast")?.unwrap_or(32.0), slow: set("beta_slow")?.unwrap_or(1.0), original_max, turn_scale })
}
