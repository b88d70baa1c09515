//! Builds a tokenizer from a GGUF file's `tokenizer.*` keys.
//!
//! Only byte-level BPE (`tokenizer.ggml.model` = `gpt2`), and only pre-tokenizers that are known to the letter: a guessed one gives wrong tokens
//! silently. Everything else yields a reason, and the model then serves token ids. The expressions are those of the models' own
//! tokenizer.json files; which name means which is llama.cpp's (`src/llama-vocab.cpp`).

use crate::gguf::Gguf;
use crate::gguf_model::TOKEN_CONTROL;
use crate::template::ChatTemplate;
use crate::{CheckpointError, ModelConfig, TextCodec};
use serde_json::{Value, json};
use std::collections::HashMap;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

const TOKENS: &str = "tokenizer.ggml.tokens";
const MERGES: &str = "tokenizer.ggml.merges";
/// `tokenizer.ggml.token_type` of a token that is matched as plain text before anything else.
const TOKEN_USER_DEFINED: i64 = 4;

const LLAMA3_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// llama.cpp's rule for files that do not say: applied one after the other.
const DEFAULT_WORDS: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

/// How text is cut into words before BPE.
struct Scheme {
    pre_tokenizer: Value,
    nfc: bool,
    /// A word that is a token is taken whole, whatever the merges say.
    whole_words: bool,
    /// Whether the opening token is put first when the file does not say.
    add_bos: bool,
}

fn scheme(pre: &str) -> Option<Scheme> {
    let byte_level =
        |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let sequence = |steps: Vec<Value>| json!({"type": "Sequence", "pretokenizers": steps});
    let plain = |pre_tokenizer| Scheme { pre_tokenizer, nfc: false, whole_words: false, add_bos: false };
    Some(match pre {
        "smollm" | "starcoder" | "refact" | "command-r" => {
            plain(sequence(vec![json!({"type": "Digits", "individual_digits": true}), byte_level(true)]))
        }
        "gpt-2" => plain(byte_level(true)),
        "default" => plain(sequence(DEFAULT_WORDS.map(split).into_iter().chain([byte_level(false)]).collect())),
        "llama-bpe" | "llama3" | "llama-v3" => {
            let pre_tokenizer = sequence(vec![split(LLAMA3_WORDS), byte_level(false)]);
            Scheme { pre_tokenizer, nfc: false, whole_words: true, add_bos: true }
        }
        "qwen2" => Scheme { nfc: true, ..plain(sequence(vec![split(QWEN2_WORDS), byte_level(false)])) },
        _ => return None,
    })
}

/// The codec, or the reason why there is none; an error if the keys contradict each other.
pub(crate) fn codec(gguf: &Gguf<'_>, config: &ModelConfig) -> Result<Result<TextCodec, String>, CheckpointError> {
    let Some(model) = gguf.text("tokenizer.ggml.model")? else {
        return Ok(Err("the file has no tokenizer.ggml.model".into()));
    };
    if model != "gpt2" {
        return Ok(Err(format!("tokenizer.ggml.model {model:?} is not supported (supported: gpt2)")));
    }
    let pre = gguf.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let Some(scheme) = scheme(pre) else {
        return Ok(Err(format!("tokenizer.ggml.pre {pre:?} is not supported")));
    };
    let tokens = gguf.texts(TOKENS)?.ok_or_else(|| CheckpointError::malformed(gguf.file, TOKENS, "is missing"))?;
    let tokenizer = build(gguf, config, &tokens, &scheme)?;
    let name_of = |id: Option<u32>| id.and_then(|id| tokens.get(id as usize)).map(|t| (*t).to_owned());
    let (bos, eos) = (name_of(config.bos), name_of(gguf.token("tokenizer.ggml.eos_token_id")?));
    let chat = match gguf.text("tokenizer.chat_template")? {
        Some(source) => ChatTemplate::compile(source, bos, eos),
        None => Err("the file has no tokenizer.chat_template".into()),
    };
    let opening = gguf.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(scheme.add_bos).then_some(config.bos).flatten();
    Ok(Ok(TextCodec::new(tokenizer, opening, chat)))
}

/// Digest of every `tokenizer.*` key as it is in the file.
pub(crate) fn digest(gguf: &Gguf<'_>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("millrace 2026 tokenizer v1");
    for (key, value) in gguf.raw("tokenizer.") {
        for part in [key.as_bytes(), value] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
    }
    *hasher.finalize().as_bytes()
}

fn build(gguf: &Gguf<'_>, config: &ModelConfig, tokens: &[&str], scheme: &Scheme) -> Result<Tokenizer, CheckpointError> {
    let broken = |field: &str, reason: String| CheckpointError::malformed(gguf.file, field, reason);
    let vocab = vocabulary(gguf, config, tokens)?;
    let merges = merges(gguf, &vocab)?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.iter().map(|(token, &id)| ((*token).to_owned(), id)).collect::<Vocab>(), merges)
        .ignore_merges(scheme.whole_words)
        .build()
        .map_err(|e| broken(MERGES, e.to_string()))?;
    let mut tokenizer = Tokenizer::new(bpe);
    let pre: PreTokenizerWrapper =
        serde_json::from_value(scheme.pre_tokenizer.clone()).map_err(|e| broken("tokenizer.ggml.pre", e.to_string()))?;
    tokenizer.with_pre_tokenizer(Some(pre));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    if scheme.nfc {
        let nfc = Some(tokenizers::normalizers::unicode::NFC);
        tokenizer.with_normalizer(nfc).map_err(|e| broken("tokenizer.ggml.pre", e.to_string()))?;
    }
    let kinds = gguf.integers("tokenizer.ggml.token_type")?.unwrap_or_default();
    let of_kind = |wanted: i64, special: bool| {
        let matching = tokens.iter().zip(&kinds).filter(move |(token, kind)| **kind == wanted && !token.is_empty());
        matching.map(move |(token, _)| AddedToken::from(*token, special).normalized(false)).collect::<Vec<_>>()
    };
    let added = tokenizer.add_special_tokens(of_kind(TOKEN_CONTROL, true));
    added.and_then(|_| tokenizer.add_tokens(of_kind(TOKEN_USER_DEFINED, false))).map_err(|e| broken(TOKENS, e.to_string()))?;
    Ok(tokenizer)
}

fn vocabulary<'t>(gguf: &Gguf<'_>, config: &ModelConfig, tokens: &[&'t str]) -> Result<HashMap<&'t str, u32>, CheckpointError> {
    if tokens.len() > config.vocab_size {
        let reason = format!("{} tokens, but vocab_size is {}", tokens.len(), config.vocab_size);
        return Err(CheckpointError::malformed(gguf.file, TOKENS, reason));
    }
    let mut vocab = HashMap::with_capacity(tokens.len());
    for (id, token) in (0u32..).zip(tokens) {
        if let Some(first) = vocab.insert(*token, id) {
            let reason = format!("token {token:?} is there twice, as {first} and {id}");
            return Err(CheckpointError::malformed(gguf.file, TOKENS, reason));
        }
    }
    Ok(vocab)
}

/// The merges as pairs. Their results are looked up here because the tokenizer library stops the process on one that is longer than
/// every token.
fn merges(gguf: &Gguf<'_>, vocab: &HashMap<&str, u32>) -> Result<Vec<(String, String)>, CheckpointError> {
    let lines = gguf.texts(MERGES)?.ok_or_else(|| CheckpointError::malformed(gguf.file, MERGES, "is missing"))?;
    let mut pairs = Vec::with_capacity(lines.len());
    for line in lines {
        let broken = |reason: &str| CheckpointError::malformed(gguf.file, MERGES, format!("{line:?}: {reason}"));
        let (left, right) = line.split_once(' ').ok_or_else(|| broken("is not two tokens"))?;
        let joined = format!("{left}{right}");
        if ![left, right, &joined].iter().all(|token| vocab.contains_key(token)) {
            return Err(broken("a part or the result is not a token"));
        }
        pairs.push((left.to_owned(), right.to_owned()));
    }
    Ok(pairs)
}
