//! Model files: whoever can write the model store can write anything into them.

use std::fs;
use std::path::{Path, PathBuf};

use millrace_checkpoint::Checkpoint;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Parser, Target, mutate};
use crate::json;
use crate::mutate::Random;

/// The GGUF writer and the small tokenizer of the readers' own tests.
#[path = "../../../../crates/checkpoint/tests/common/mod.rs"]
mod common;

use common::{Gguf, alphabet, tiny_gguf, use_all};

/// Bytes at the front of an example that are spoiled mostly: behind them are numbers, of which any is as good as another.
const HEAD_BYTES: usize = 12 << 10;
/// A library's panic that is caught where its file is read.
const TOKENIZERS: &[&str] = &["/tokenizers-"];

pub(super) const GGUF: Target = Target {
    name: "gguf",
    what: "a GGUF file",
    examples: || vec![mini_gguf(1).build(), mini_gguf(8).build()],
    spoil: head,
    open: || {
        let dir = scratch();
        Box::new(move |bytes| open(bytes, dir.path().join("model.gguf"), None))
    },
    // Each token of the vocabulary becomes several strings and entries of tables.
    memory_max: |len| (8 << 20) + 64 * len,
    caught: TOKENIZERS,
    short_runs: 1_500,
};

pub(super) const SAFETENSORS: Target = Target {
    name: "safetensors",
    what: "model.safetensors of a directory",
    examples: || vec![mini_safetensors()],
    spoil: safetensors,
    open: || in_directory("model.safetensors"),
    memory_max: |len| (8 << 20) + 64 * len,
    caught: TOKENIZERS,
    short_runs: 3_000,
};

pub(super) const CONFIG: Target = Target {
    name: "config",
    what: "config.json of a directory",
    examples: || vec![config().to_string().into_bytes(), llama3_config().to_string().into_bytes()],
    spoil: json::document,
    open: || in_directory("config.json"),
    memory_max: |len| (8 << 20) + 64 * len,
    caught: TOKENIZERS,
    short_runs: 3_000,
};

pub(super) const TOKENIZER: Target = Target {
    name: "tokenizer",
    what: "tokenizer.json of a directory",
    examples: || vec![tokenizer().to_string().into_bytes()],
    spoil: json::document,
    open: || in_directory("tokenizer.json"),
    memory_max: |len| (16 << 20) + 256 * len,
    caught: TOKENIZERS,
    short_runs: 1_500,
};

pub(super) const TEMPLATE: Target = Target {
    name: "template",
    what: "chat_template.jinja of a directory",
    examples: || TEMPLATES.map(|source| source.as_bytes().to_vec()).to_vec(),
    spoil: mutate::bytes,
    open: || in_directory("chat_template.jinja"),
    // What a template may build in memory has no bound (`checkpoint::template` says so); this is what none here should come near.
    memory_max: |_| 256 << 20,
    caught: TOKENIZERS,
    short_runs: 2_000,
};

/// Width of the hidden state, and tokens of the vocabulary.
const HIDDEN: u64 = 32;
const VOCAB: u64 = 300;

/// Names and shapes of the tensors of a model of one layer, outermost side first.
fn tensors() -> [(&'static str, &'static str, Vec<u64>); 11] {
    let square = || vec![HIDDEN, HIDDEN];
    [
        ("token_embd.weight", "model.embed_tokens.weight", vec![VOCAB, HIDDEN]),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight", vec![HIDDEN]),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", square()),
        ("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight", vec![HIDDEN / 2, HIDDEN]),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight", vec![HIDDEN / 2, HIDDEN]),
        ("blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight", square()),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight", vec![HIDDEN]),
        ("blk.0.ffn_gate.weight", "model.layers.0.mlp.gate_proj.weight", square()),
        ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight", square()),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", square()),
        ("output_norm.weight", "model.norm.weight", vec![HIDDEN]),
    ]
}

/// A model of one layer with the readers' tokenizer; `kind` is the type of its tensors: 1 F16, 8 Q8_0.
pub(super) fn mini_gguf(kind: u32) -> Gguf {
    let sizes = [("block_count", 1), ("embedding_length", HIDDEN), ("feed_forward_length", HIDDEN), ("attention.head_count", 4)];
    let mut gguf = Gguf { tensors: Vec::new(), ..tiny_gguf() };
    for (key, value) in sizes {
        gguf = gguf.u32(&format!("llama.{key}"), value as u32);
    }
    let (numbers, bytes) = if kind == 8 { (32, 34) } else { (1, 2) };
    tensors().into_iter().fold(gguf, |gguf, (name, _, shape)| {
        let len = shape.iter().product::<u64>() / numbers * bytes;
        gguf.tensor(name, &shape, kind, (0..len).map(|at| (at % 50) as u8).collect())
    })
}

fn mini_safetensors() -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (_, name, shape) in tensors() {
        let (start, len) = (data.len(), shape.iter().product::<u64>() as usize * 2);
        data.resize(start + len, 1u8);
        header.insert(name.into(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, start + len]}));
    }
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": HIDDEN,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "tie_word_embeddings": true, "bos_token_id": 256, "eos_token_id": [257, 2],
        "rope_theta": 10000.0, "hidden_act": "silu", "head_dim": 8,
    })
}

fn llama3_config() -> Value {
    let mut config = config();
    config["rope_scaling"] = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    });
    config
}

fn tokenizer() -> Value {
    let tokens = alphabet().into_iter().chain(["<s>", "</s>", "Ġt", "he"].map(String::from));
    let vocab: serde_json::Map<String, Value> = tokens.zip(0..).map(|(token, id)| (token, json!(id))).collect();
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(256, "<s>"), special(257, "</s>")],
        "normalizer": {"type": "NFC"}, "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [["Ġ", "t"], ["h", "e"]]},
    })
}

/// In the manner of the templates that models come with.
const TEMPLATES: [&str; 4] = [
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}\
     {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}\
     {%- else %}{%- set system = '' %}{%- endif %}{{ system }} {{ strftime_now('%d %b %Y') }}\
     {%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
     {{ m.content | tojson(indent=4) }}{% endfor %}",
    "{% macro line(m) %}{{ m.role.upper() }}: {{ m.content.strip().split(' ') | join('_') }}{% endmacro %}\
     {% for m in messages %}{{ line(m) }}{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}{% generation %}x{% endgeneration %}",
    "{% set ns = namespace(n=0) %}{% for i in range(20) %}{% set ns.n = ns.n + i * 2 %}{% endfor %}{{ ns.n }}{{ messages | length }}\
     {{ messages | selectattr('role', 'equalto', 'user') | list | tojson }}{{ 'a' * 3 }}{{ messages[-1].content[:5] }}",
];

/// Spoils the front, mostly.
fn head(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let tail = if random.once_in(8) { Vec::new() } else { bytes.split_off(HEAD_BYTES.min(bytes.len())) };
    mutate::bytes(bytes, other, random);
    bytes.extend(tail);
}

/// Spoils the header as JSON, mostly, and makes its length right.
fn safetensors(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let length = bytes.first_chunk().map_or(0, |length| u64::from_le_bytes(*length) as usize);
    if random.once_in(8) || bytes.len() < 8 + length {
        return head(bytes, other, random);
    }
    let data = bytes.split_off(8 + length);
    let mut header = bytes.split_off(8);
    let others = other.get(8..8 + length).unwrap_or_default();
    json::document(&mut header, others, random);
    *bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
}

fn scratch() -> TempDir {
    tempfile::tempdir().expect("a scratch directory")
}

/// A model of which one file is the input.
fn in_directory(name: &'static str) -> Parser {
    let dir = scratch();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).expect("a scratch file");
    write("config.json", config().to_string().as_bytes());
    write("model.safetensors", &mini_safetensors());
    write("tokenizer.json", tokenizer().to_string().as_bytes());
    write("tokenizer_config.json", json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}}).to_string().as_bytes());
    write("chat_template.jinja", TEMPLATES[0].as_bytes());
    Box::new(move |bytes| open(bytes, dir.path().join(name), Some(dir.path())))
}

/// Writes the input to `path`, opens the model and touches all that a process would touch.
fn open(bytes: &[u8], path: PathBuf, directory: Option<&Path>) -> Result<bool, String> {
    fs::write(&path, bytes).map_err(|error| error.to_string())?;
    let Ok(model) = Checkpoint::open(directory.unwrap_or(&path)) else { return Ok(false) };
    use_all(&model);
    let Some(text) = &model.text else { return Ok(false) };
    let prompt = "the cat, the é\u{0}<|im_end|> 12\n\n\t😀";
    if let Ok(ids) = text.encode(prompt) {
        let mut stream = text.decode_stream();
        let pieces: String = ids.iter().filter_map(|id| stream.push(*id)).collect();
        drop((pieces, stream.flush()));
    }
    let messages =
        json!([{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi there"}]}]);
    Ok(text.encode_chat(&messages).is_ok())
}
