//! Hugging Face directories: forms of config.json, shards, tokenizer files, and hostile versions of each.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::{Seeded, alphabet, grouped, mutate, rope, tiny, use_all};
use millrace_checkpoint::{Checkpoint, CheckpointError, Grouped, Llama3Scaling, Scaling, TensorType};
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;

/// A copy of the tiny model with a changed config.json.
fn copy(change: impl FnOnce(&mut Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(tiny().join("config.json")).unwrap()).unwrap();
    change(&mut config);
    write(&dir, "config.json", config.to_string());
    std::fs::copy(tiny().join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    dir
}

fn write(dir: &TempDir, name: &str, content: impl AsRef<[u8]>) {
    std::fs::write(dir.path().join(name), content).unwrap();
}

fn refused(dir: &TempDir, words: &[&str]) {
    let message = Checkpoint::open(dir.path()).err().expect("refused").to_string();
    words.iter().for_each(|word| assert!(message.contains(word), "{word:?} not in: {message}"));
}

/// Splits the tiny file into header and data.
fn parts() -> (Value, Vec<u8>) {
    let bytes = std::fs::read(tiny().join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), bytes[8 + length..].to_vec())
}

fn joined(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

#[test]
fn the_tiny_model() {
    let model = Checkpoint::open(&tiny()).unwrap();
    let c = &model.config;
    assert_eq!((c.name.as_str(), c.vocab_size, c.hidden_size, c.mlp.width), ("tiny-llama-gqa-tied", 300, 64, 160));
    assert_eq!((c.layers, c.attention.heads, c.max_positions), (3, 4, 512));
    assert_eq!(grouped(c), &Grouped { kv_heads: 2, head_dim: 16, joined: false, norms: false });
    assert_eq!((c.norm.eps, rope(c).theta, c.tie_word_embeddings), (1e-5, 1e4, true));
    assert_eq!((c.bos, c.eos.as_slice()), (Some(1), [2].as_slice()));
    assert!(model.text.is_none() && model.text_absent().unwrap().contains("tokenizer.json"));
    let view = model.tensor("model.layers.2.mlp.down_proj.weight").unwrap();
    assert_eq!((view.dtype, view.shape.as_slice(), view.to_f32().len()), (TensorType::F32, [64, 160].as_slice(), 64 * 160));
    use_all(&model);
}

#[test]
fn older_and_newer_forms_of_the_configuration() {
    let older = copy(|c| {
        c.as_object_mut().unwrap().remove("rope_parameters");
        c["rope_theta"] = json!(500000);
        c["rope_scaling"] = json!({"type": "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128});
        c["eos_token_id"] = json!([7, 5]);
    });
    let config = Checkpoint::open(older.path()).unwrap().config;
    assert_eq!(rope(&config).theta, 5e5);
    assert_eq!(rope(&config).scaling, Scaling::Llama3(Llama3Scaling { factor: 8.0, low: 1.0, high: 4.0, original_max: 128.0 }));
    assert_eq!(config.eos, [5, 7]);
    let generation = copy(|_| {});
    write(&generation, "generation_config.json", r#"{"eos_token_id": [9, 2, 9]}"#);
    assert_eq!(Checkpoint::open(generation.path()).unwrap().config.eos, [2, 9]);
    let short = copy(|c| {
        let c = c.as_object_mut().unwrap();
        c.retain(|field, _| {
            !(field.starts_with("rope") || field.ends_with("_bias") || field.ends_with("os_token_id") || field == "head_dim")
        });
        c.insert("rope_scaling".into(), Value::Null);
    });
    let config = Checkpoint::open(short.path()).unwrap().config;
    assert_eq!((grouped(&config).head_dim, rope(&config).theta, config.bos, config.eos.len()), (16, 1e4, None, 0));
}

#[test]
fn configurations_are_refused_by_field() {
    let cases = [
        ("architectures", json!(["MambaForCausalLM"]), "\"MambaForCausalLM\" is not supported (supported: llama, mistral"),
        ("hidden_size", json!(-64), "hidden_size"),
        ("hidden_size", json!("64"), "hidden_size"),
        ("hidden_size", Value::Null, "hidden_size: is missing"),
        ("hidden_size", json!(1u64 << 60), "the limit is 131072"),
        ("num_attention_heads", json!(0), "num_attention_heads: is zero"),
        ("num_key_value_heads", json!(3), "num_key_value_heads: 3"),
        ("num_hidden_layers", json!(4), "model.layers.3.input_layernorm.weight is missing"),
        ("intermediate_size", json!(161), "shape [160, 64], expected [161, 64]"),
        ("vocab_size", json!(301), "model.embed_tokens.weight"),
        ("tie_word_embeddings", json!(false), "lm_head.weight is missing"),
        ("tie_word_embeddings", json!(1), "tie_word_embeddings"),
        ("attention_bias", json!(true), "q_proj.bias is missing"),
        ("mlp_bias", json!(true), "mlp_bias = true"),
        ("hidden_act", json!("gelu"), "gelu"),
        ("sliding_window", json!(4096), "sliding_window = 4096"),
        ("quantization_config", json!({"quant_method": "gptq"}), "gptq"),
        ("rms_norm_eps", json!(0), "rms_norm_eps"),
        ("eos_token_id", json!([2, 300]), "eos_token_id: 300"),
        ("eos_token_id", json!(-2), "eos_token_id"),
        ("rope_parameters", json!({"rope_type": "longrope"}), "rope_parameters.rope_type = longrope"),
        ("rope_parameters", json!({"rope_type": "yarn"}), "rope_parameters.original_max_position_embeddings: is missing"),
        ("rope_parameters", json!({"rope_type": "yarn", "original_max_position_embeddings": 0}), "rope_scaling."),
        ("rope_parameters", json!({"rope_type": "llama3"}), "rope_parameters.factor: is missing"),
        ("rope_parameters", json!({"rope_theta": 0}), "rope_theta"),
        ("rope_parameters", json!([1]), "rope_parameters: is not an object"),
        ("rope_parameters", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5"),
    ];
    for (field, value, word) in cases {
        refused(&copy(|c| c[field] = value), &[word]);
    }
    let dir = copy(|_| {});
    write(&dir, "config.json", "{\"a\": ");
    refused(&dir, &["config.json", "JSON"]);
    write(&dir, "config.json", "[".repeat(100_000));
    refused(&dir, &["config.json", "recursion"]);
    write(&dir, "config.json", " ".repeat(2 << 20));
    refused(&dir, &["config.json", "limit is 1048576"]);
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    refused(&dir, &["no config.json"]);
    assert!(matches!(Checkpoint::open(Path::new("/nowhere/m.gguf")), Err(CheckpointError::Io { .. })));
}

#[test]
fn hostile_safetensors() {
    let dir = copy(|_| {});
    let file = |bytes: &[u8], words: &[&str]| {
        write(&dir, "model.safetensors", bytes);
        refused(&dir, &[&["model.safetensors"], words].concat());
    };
    let (header, data) = parts();
    let sound = joined(&header.to_string(), &data);
    file(b"abc", &["shorter than 8"]);
    file(&u64::MAX.to_le_bytes(), &["header length", "limit"]);
    file(&5000u64.to_le_bytes(), &["header length", "5000 bytes"]);
    file(&sound[..sound.len() - 1], &["do not lie in"]);
    file(&[sound.as_slice(), b"x"].concat(), &["fill"]);
    file(&joined("{\"a\":", &[]), &["header"]);
    file(&joined(&format!("{{\"a\":{}", "[".repeat(1 << 20)), &[]), &["header"]);
    file(&joined("\u{1}", &[]), &["header"]);
    file(&[&3u64.to_le_bytes()[..], b"{\"\xff"].concat(), &["header"]);
    let changed = |field: &str, value: Value, words: &[&str]| {
        let mut header = header.clone();
        header["model.norm.weight"][field] = value;
        file(&joined(&header.to_string(), &data), words);
    };
    changed("dtype", json!("I64"), &["model.norm.weight", "I64"]);
    changed("shape", json!([65]), &["model.norm.weight", "does not take 256 bytes"]);
    changed("shape", json!([1u64 << 40, 1u64 << 40]), &["model.norm.weight", "does not take"]);
    changed("shape", json!([-1]), &["model.norm.weight"]);
    changed("shape", json!([1, 1, 1, 1, 1, 1, 1, 1, 64]), &["model.norm.weight"]);
    changed("data_offsets", json!([0, 256]), &["hole or an overlap"]);
    changed("data_offsets", json!([256, 0]), &["model.norm.weight", "do not lie"]);
    changed("data_offsets", json!([u64::MAX, u64::MAX]), &["model.norm.weight", "do not lie"]);
    let twice = header.to_string().replacen("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", 1);
    file(&joined(&twice, &data), &["model.layers.1.self_attn.k_proj.weight", "twice"]);
}

#[test]
fn shards() {
    let dir = copy(|_| {});
    let (header, data) = parts();
    // One shard for each half of the data, cut between two tensors.
    let cut = header["model.layers.1.input_layernorm.weight"]["data_offsets"][0].as_u64().unwrap();
    let (mut first, mut second, mut map) = (json!({}), json!({}), json!({}));
    for (name, info) in header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__") {
        let [start, end] = [0, 1].map(|i| info["data_offsets"][i].as_u64().unwrap());
        let (shard, base, file) = if start < cut { (&mut first, 0, "a.safetensors") } else { (&mut second, cut, "b.safetensors") };
        shard[name] = info.clone();
        shard[name]["data_offsets"] = json!([start - base, end - base]);
        map[name] = json!(file);
    }
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    write(&dir, "a.safetensors", joined(&first.to_string(), &data[..cut as usize]));
    write(&dir, "b.safetensors", joined(&second.to_string(), &data[cut as usize..]));
    let index = |map: &Value| write(&dir, "model.safetensors.index.json", json!({"weight_map": map}).to_string());
    index(&map);
    let (whole, sharded) = (Checkpoint::open(&tiny()).unwrap(), Checkpoint::open(dir.path()).unwrap());
    for (name, _) in whole.config.tensors() {
        assert!(whole.tensor(&name).unwrap().bytes == sharded.tensor(&name).unwrap().bytes, "{name}");
    }
    for bad in ["../a.safetensors", "/etc/passwd", "", ".", "a/b"] {
        let mut map = map.clone();
        map["model.norm.weight"] = json!(bad);
        index(&map);
        refused(&dir, &["weight_map.model.norm.weight"]);
    }
    let mut moved = map.clone();
    moved["model.norm.weight"] = json!("a.safetensors");
    index(&moved);
    refused(&dir, &["a.safetensors", "model.norm.weight"]);
    moved["model.norm.weight"] = json!("c.safetensors");
    index(&moved);
    refused(&dir, &["c.safetensors"]);
}

/// A byte-level tokenizer.json with two special tokens, in the manner of transformers.
fn tokenizer_json() -> Value {
    let vocab: serde_json::Map<String, Value> = alphabet().into_iter().zip(0..).map(|(t, id)| (t, json!(id))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({"version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": [special(256, "<s>"), special(257, "</s>")], "normalizer": null,
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}})
}

#[test]
fn tokenizer_files() {
    let dir = copy(|_| {});
    write(&dir, "tokenizer.json", tokenizer_json().to_string());
    let plain = Checkpoint::open(dir.path()).unwrap();
    let text = plain.text.as_ref().unwrap();
    assert_eq!(text.encode("abc</s>").unwrap(), [256, 97, 98, 99, 257]); // truncation is cleared, the opening token added
    assert_eq!(text.encode_bare("a").unwrap(), [97]);
    assert!(text.chat_problem().is_some());
    let chat = json!([{"role": "user", "content": "x"}]);
    let source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}";
    write(
        &dir,
        "tokenizer_config.json",
        json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": source}).to_string(),
    );
    let templated = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(templated.text.as_ref().unwrap().encode_chat(&chat).unwrap(), ("<s>x</s>".into(), vec![256, 120, 257]));
    assert_ne!(templated.tokenizer_digest(), plain.tokenizer_digest());
    let list = json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d{{ eos_token }}"}]);
    write(&dir, "tokenizer_config.json", json!({"chat_template": list}).to_string());
    let listed = Checkpoint::open(dir.path()).unwrap().text.unwrap();
    assert_eq!(listed.encode_chat(&chat).unwrap().0, format!("d{}", alphabet()[2])); // config.json's token 2
    write(&dir, "chat_template.jinja", "file");
    assert_eq!(Checkpoint::open(dir.path()).unwrap().text.unwrap().encode_chat(&chat).unwrap().0, "file");
    write(&dir, "chat_template.jinja", b"\xff");
    refused(&dir, &["chat_template.jinja", "UTF-8"]);
}

#[test]
fn hostile_tokenizers() {
    let dir = copy(|_| {});
    let mut bad = tokenizer_json();
    bad["model"]["vocab"]["ab"] = json!(300);
    write(&dir, "tokenizer.json", bad.to_string());
    refused(&dir, &["tokenizer.json", "\"ab\"", "vocab_size 300"]);
    let mut bad = tokenizer_json();
    bad["model"]["merges"] = json!([["a", "b"]]);
    write(&dir, "tokenizer.json", bad.to_string());
    refused(&dir, &["tokenizer.json"]);
    // The library copies both halves into a buffer as long as the longest token.
    bad["model"]["merges"] = json!([["Ġ", "Ġ"]]);
    write(&dir, "tokenizer.json", bad.to_string());
    refused(&dir, &["tokenizer.json", "contradicts itself"]);
    // It reads a template whose special tokens it does not have, and stops when it is to put them in.
    let mut bad = tokenizer_json();
    bad["post_processor"]["special_tokens"] = json!({});
    write(&dir, "tokenizer.json", bad.to_string());
    refused(&dir, &["tokenizer.json", "tokenizer"]);
    write(&dir, "tokenizer.json", "{}");
    refused(&dir, &["tokenizer.json", "tokenizer"]);
    write(&dir, "tokenizer.json", "{\"version\"");
    refused(&dir, &["tokenizer.json"]);
}

/// A decoder that joins bytes and strips a leading space: the way of Llama 2's tokenizer.json.
#[test]
fn streams_of_a_tokenizer_with_byte_fallback() {
    let dir = copy(|_| {});
    let mut json = tokenizer_json();
    json["decoder"] = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    let words = ["▁a", "b", "▁", "<0xE4>", "<0xBD>", "<0xA0>", "<0x0A>"];
    json["model"]["vocab"] =
        words.iter().zip(0..).map(|(w, id)| ((*w).to_owned(), json!(id))).collect::<serde_json::Map<_, _>>().into();
    json["added_tokens"][0]["id"] = json!(7);
    json["added_tokens"][1]["id"] = json!(8);
    json["post_processor"] = Value::Null;
    write(&dir, "tokenizer.json", json.to_string());
    let text = Checkpoint::open(dir.path()).unwrap().text.unwrap();
    for ids in [&[0, 1, 0, 3, 4, 5, 0, 6, 2, 0, 8][..], &[7, 0, 3, 4][..], &[2, 0][..], &[3, 4, 5, 3, 4, 5, 1][..]] {
        let mut stream = text.decode_stream();
        let pieces: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
        assert_eq!(pieces + &stream.flush().unwrap_or_default(), text.decode(ids, true).unwrap(), "{ids:?}");
    }
    let mut stream = text.decode_stream();
    assert_eq!([3, 4, 5].map(|id| stream.push(id)), [None, None, Some("你".into())]);
}

#[test]
fn no_bytes_stop_the_process() {
    let dir = copy(|_| {});
    write(&dir, "tokenizer.json", tokenizer_json().to_string());
    let mut random = Seeded(11);
    for (name, rounds) in [("model.safetensors", 800), ("config.json", 500), ("tokenizer.json", 500)] {
        let sound = std::fs::read(dir.path().join(name)).unwrap();
        for _ in 0..rounds {
            let mut bytes = sound.clone();
            mutate(&mut bytes, 3000, &mut random);
            write(&dir, name, &bytes);
            if let Ok(model) = Checkpoint::open(dir.path()) {
                use_all(&model);
            }
        }
        write(&dir, name, &sound);
        use_all(&Checkpoint::open(dir.path()).unwrap());
    }
}
