//! `config.json` and `generation_config.json` of a Hugging Face directory, in the forms of transformers 4 and 5.

use crate::mapping::read_small;
use crate::{Architecture, CheckpointError, Llama3Scaling, ModelConfig, Rope};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Largest configuration file, in bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

type Result<T> = std::result::Result<T, CheckpointError>;

/// An object of a JSON file, with getters whose errors name file and field. `null` is the same as absent, as it is for transformers.
pub(crate) struct JsonFile {
    pub(crate) path: PathBuf,
    value: Value,
    /// Put before the field's name in errors.
    prefix: String,
}

impl JsonFile {
    /// Reads a JSON object, or `None` if there is no such file.
    pub(crate) fn open(path: PathBuf, bytes_max: u64) -> Result<Option<Self>> {
        let Some(bytes) = read_small(&path, bytes_max)? else { return Ok(None) };
        match serde_json::from_slice(&bytes) {
            Ok(value @ Value::Object(_)) => Ok(Some(Self { path, value, prefix: String::new() })),
            Ok(_) => Err(CheckpointError::malformed(&path, "JSON", "is not an object")),
            Err(e) => Err(CheckpointError::malformed(&path, "JSON", e.to_string())),
        }
    }

    pub(crate) fn get(&self, field: &str) -> Option<&Value> {
        self.value.get(field).filter(|v| !v.is_null())
    }

    pub(crate) fn wrong<T>(&self, field: &str, reason: &str) -> Result<T> {
        Err(CheckpointError::malformed(&self.path, format!("{}{field}", self.prefix), reason))
    }

    fn object(&self, field: &str) -> Result<Option<Self>> {
        match self.get(field) {
            None => Ok(None),
            Some(value @ Value::Object(_)) => {
                Ok(Some(Self { path: self.path.clone(), value: value.clone(), prefix: format!("{field}.") }))
            }
            Some(_) => self.wrong(field, "is not an object"),
        }
    }

    fn text(&self, field: &str) -> Result<Option<&str>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => self.wrong(field, "is not a string"),
        }
    }

    fn count(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(count) => Ok(Some(count)),
            None => self.wrong(field, "is not a whole number of at least 0"),
        }
    }

    fn number(&self, field: &str) -> Result<Option<f64>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => value.as_f64().map_or_else(|| self.wrong(field, "is not a number"), |x| Ok(Some(x))),
        }
    }

    fn need<T>(&self, field: &str, found: Option<T>) -> Result<T> {
        found.map_or_else(|| self.wrong(field, "is missing"), Ok)
    }

    fn is_true(&self, field: &str) -> Result<bool> {
        match self.get(field) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(_) => self.wrong(field, "is not true or false"),
        }
    }

    /// One token id, a list of them, or nothing.
    fn tokens(&self, field: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let ids: Option<Vec<u32>> = list.iter().map(|v| u32::try_from(v.as_u64()?).ok()).collect();
        ids.map_or_else(|| self.wrong(field, "is not a token id or a list of them"), |ids| Ok(Some(ids)))
    }
}

/// The configuration of the model in `directory`, checked.
pub(crate) fn read(directory: &Path, name: String) -> Result<ModelConfig> {
    let path = directory.join("config.json");
    let Some(json) = JsonFile::open(path.clone(), CONFIG_BYTES_MAX)? else {
        return Err(CheckpointError::NotAModel { file: directory.into(), reason: "there is no config.json".into() });
    };
    refuse_other_models(&json)?;
    let count = |field: &str| json.count(field).and_then(|found| json.need(field, found));
    let (heads, hidden_size) = (count("num_attention_heads")?, count("hidden_size")?);
    let head_dim = match json.count("head_dim")? {
        Some(head_dim) => head_dim,
        None if heads > 0 && hidden_size % heads == 0 => hidden_size / heads,
        None => return json.wrong("num_attention_heads", "does not divide hidden_size, and there is no head_dim"),
    };
    let bos = json.tokens("bos_token_id")?.unwrap_or_default();
    let config = ModelConfig {
        name,
        architecture: Architecture::Llama,
        vocab_size: count("vocab_size")?,
        hidden_size,
        intermediate_size: count("intermediate_size")?,
        layers: count("num_hidden_layers")?,
        heads,
        kv_heads: json.count("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        rms_norm_eps: json.number("rms_norm_eps")?.unwrap_or(1e-6), // LlamaConfig's default
        rope: rope(&json)?,
        max_positions: json.count("max_position_embeddings")?.unwrap_or(2048), // LlamaConfig's default
        tie_word_embeddings: json.is_true("tie_word_embeddings")?,
        bos: bos.first().copied(),
        eos: eos(directory, &json)?,
    };
    config.validate(&path)
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

fn refuse_other_models(json: &JsonFile) -> Result<()> {
    let named = json.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let architecture = named.map_or_else(|| json.text("model_type"), |name| Ok(Some(name)))?;
    match json.need("architectures", architecture)? {
        "LlamaForCausalLM" | "llama" => {}
        other => return Err(CheckpointError::Architecture { file: json.path.clone(), architecture: other.into() }),
    }
    for field in ["attention_bias", "mlp_bias"] {
        if json.is_true(field)? {
            return Err(CheckpointError::unsupported(&json.path, field, true));
        }
    }
    for field in ["quantization_config", "sliding_window"] {
        if let Some(value) = json.get(field) {
            let shown = value.get("quant_method").unwrap_or(value);
            return Err(CheckpointError::unsupported(&json.path, field, shown));
        }
    }
    match json.text("hidden_act")? {
        None | Some("silu") => Ok(()),
        Some(other) => Err(CheckpointError::unsupported(&json.path, "hidden_act", other)),
    }
}

/// `rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling` (4).
fn rope(json: &JsonFile) -> Result<Rope> {
    let scaling = match json.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => json.object("rope_scaling")?,
    };
    let own = scaling.as_ref().map_or(Ok(None), |s| s.number("rope_theta"))?;
    let theta = own.map_or_else(|| json.number("rope_theta"), |theta| Ok(Some(theta)))?.unwrap_or(10_000.0);
    for (file, field) in [(Some(json), "partial_rotary_factor"), (scaling.as_ref(), "partial_rotary_factor")] {
        if let Some(factor) = file.map_or(Ok(None), |f| f.number(field))?.filter(|&f| f != 1.0) {
            return Err(CheckpointError::unsupported(&json.path, field, factor));
        }
    }
    let Some(scaling) = scaling else { return Ok(Rope { theta, scaling: None, factors: None }) };
    let kind = scaling.text("rope_type")?.map_or_else(|| scaling.text("type"), |kind| Ok(Some(kind)))?;
    let number = |field: &str| scaling.number(field).and_then(|found| scaling.need(field, found));
    match kind.unwrap_or("default") {
        "default" => Ok(Rope { theta, scaling: None, factors: None }),
        "llama3" => {
            let llama3 = Llama3Scaling {
                factor: number("factor")?,
                low: number("low_freq_factor")?,
                high: number("high_freq_factor")?,
                original_max: number("original_max_position_embeddings")?,
            };
            Ok(Rope { theta, scaling: Some(llama3), factors: None })
        }
        other => Err(CheckpointError::unsupported(&json.path, format!("{}rope_type", scaling.prefix), other)),
    }
}
