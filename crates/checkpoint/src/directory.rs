//! A Hugging Face directory: safetensors shards, tokenizer.json and the chat template beside config.json.

use crate::directory_config;
use crate::json_file::JsonFile;
use crate::mapping::{MappedFile, read_small};
use crate::template::ChatTemplate;
use crate::text::{CONTRADICTION, guarded};
use crate::weights::Weights;
use crate::{CheckpointError, ModelConfig, Parts, TextCodec, names, safetensors};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};
use tokenizers::Tokenizer;

/// Largest tokenizer.json (the largest in use have 33 MB).
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
/// Largest shard index.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Largest chat template and tokenizer_config.json.
const TEMPLATE_BYTES_MAX: u64 = 16 << 20;
/// Most shards of one model.
const SHARDS_MAX: usize = 4096;

type Result<T> = std::result::Result<T, CheckpointError>;

/// Reads all but the weights' numbers.
pub(crate) fn open(directory: &Path) -> Result<Parts> {
    let config = directory_config::read(directory, crate::model_name(directory))?;
    let weights = open_weights(directory, &config)?;
    let mut hasher = blake3::Hasher::new_derive_key("millrace 2026 tokenizer v1");
    let text = open_text(directory, &config, &mut hasher)?;
    Ok(Parts { config, text, weights, tokenizer_digest: *hasher.finalize().as_bytes() })
}

fn open_weights(directory: &Path, config: &ModelConfig) -> Result<Weights> {
    let mut weights = Weights::default();
    let index_path = directory.join("model.safetensors.index.json");
    let Some(index) = JsonFile::open(index_path, INDEX_BYTES_MAX)? else {
        add_shard(&mut weights, config, &directory.join("model.safetensors"), None)?;
        return Ok(weights);
    };
    let Some(Value::Object(map)) = index.get("weight_map") else {
        return index.wrong("weight_map", "is not an object");
    };
    let mut shards: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (tensor, shard) in map {
        // The name comes from the file: it must not lead out of the directory.
        let plain = shard.as_str().filter(|s| Path::new(s).components().eq([Component::Normal(s.as_ref())]));
        let Some(shard) = plain else {
            return index.wrong(&format!("weight_map.{tensor}"), "is not the name of a file in the directory");
        };
        shards.entry(shard).or_default().insert(tensor);
    }
    if shards.len() > SHARDS_MAX {
        return Err(CheckpointError::limit(&index.path, "weight_map: shards", shards.len() as u64, SHARDS_MAX as u64));
    }
    for (shard, tensors) in shards {
        add_shard(&mut weights, config, &directory.join(shard), Some(tensors))?;
    }
    Ok(weights)
}

/// Adds the tensors of one file. The index, if there is one, must not promise tensors that are not in it.
fn add_shard(weights: &mut Weights, config: &ModelConfig, path: &Path, promised: Option<BTreeSet<&str>>) -> Result<()> {
    let file = MappedFile::open(path)?;
    let mut missing = promised.unwrap_or_default();
    for (name, slot) in safetensors::read_header(&file, weights.files.len())? {
        missing.remove(name.as_str());
        let (name, slot) = names::in_directory(config, name, slot);
        weights.insert(path, name, slot)?;
    }
    if let Some(tensor) = missing.first() {
        return Err(CheckpointError::malformed(path, format!("tensor {tensor}"), "is not in the file that the index names"));
    }
    weights.digested.push(0..file.bytes().len());
    weights.files.push(file);
    Ok(())
}

/// The codec, or why there is none. Every file that has a say goes into the digest.
fn open_text(
    directory: &Path,
    config: &ModelConfig,
    hasher: &mut blake3::Hasher,
) -> Result<std::result::Result<TextCodec, String>> {
    let path = directory.join("tokenizer.json");
    let Some(bytes) = read_small(&path, TOKENIZER_BYTES_MAX)? else {
        return Ok(Err("the directory has no tokenizer.json".into()));
    };
    let mut digest = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    digest(&bytes);
    let broken = |reason: String| CheckpointError::malformed(&path, "tokenizer", reason);
    let mut tokenizer = guarded(|| Tokenizer::from_bytes(&bytes)).map_err(broken)?;
    check_ids(&path, &tokenizer, config)?;
    // One that cannot do this can do nothing: better not to start.
    if let Err(reason) = guarded(|| tokenizer.encode_fast("a", true))
        && reason == CONTRADICTION
    {
        return Err(broken(reason));
    }
    // transformers clears both for a plain call.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|e| CheckpointError::malformed(&path, "truncation", e.to_string()))?;

    let settings = JsonFile::open(directory.join("tokenizer_config.json"), TEMPLATE_BYTES_MAX)?;
    let special = |field: &str, id: Option<u32>| {
        let named = settings.as_ref().and_then(|s| s.get(field)).and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str()));
        named.map(str::to_owned).or_else(|| tokenizer.id_to_token(id?))
    };
    let (bos, eos) = (special("bos_token", config.bos), special("eos_token", config.eos.first().copied()));
    let template = template_source(directory, settings.as_ref())?;
    for part in [template.as_ref(), bos.as_ref(), eos.as_ref()] {
        digest(part.map_or(b"", |text| text.as_bytes()));
    }
    let chat = match template {
        Some(source) => ChatTemplate::compile(&source, bos, eos),
        None => Err("the directory has no chat template".into()),
    };
    Ok(Ok(TextCodec::new(tokenizer, None, chat)))
}

fn check_ids(path: &Path, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<()> {
    let largest = tokenizer.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
    match largest {
        Some((token, id)) if id as usize >= config.vocab_size => {
            let reason = format!("token {token:?} has id {id}, not below vocab_size {}", config.vocab_size);
            Err(CheckpointError::malformed(path, "vocab", reason))
        }
        _ => Ok(()),
    }
}

/// `chat_template.jinja`, else `chat_template` of tokenizer_config.json: a string, or a list of which `default` is taken.
fn template_source(directory: &Path, settings: Option<&JsonFile>) -> Result<Option<String>> {
    let path = directory.join("chat_template.jinja");
    if let Some(bytes) = read_small(&path, TEMPLATE_BYTES_MAX)? {
        let text = String::from_utf8(bytes).map_err(|_| CheckpointError::malformed(&path, "template", "is not UTF-8"))?;
        return Ok(Some(text));
    }
    let Some(settings) = settings else { return Ok(None) };
    match settings.get("chat_template") {
        None => Ok(None),
        Some(Value::String(source)) => Ok(Some(source.clone())),
        Some(Value::Array(list)) => {
            let default = list.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
            Ok(default.and_then(|t| t.get("template")).and_then(Value::as_str).map(str::to_owned))
        }
        Some(_) => settings.wrong("chat_template", "is neither a string nor a list of templates"),
    }
}
