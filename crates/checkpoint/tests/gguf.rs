//! GGUF files: what a sound one gives, and that every unsound one is refused by the name of what is wrong.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::{Gguf, Seeded, alphabet, array, mutate, open_bytes, q8_0, refused, rope, string, tiny, tiny_gguf, use_all};
use millrace_checkpoint::{Checkpoint, CheckpointError, TensorType};

#[test]
fn gives_the_tensors_of_the_directory_it_was_made_of() {
    let directory = Checkpoint::open(&tiny()).unwrap();
    let gguf = open_bytes(&tiny_gguf().build()).unwrap();
    assert_eq!(gguf.config.tensors(), directory.config.tensors());
    for (name, shape) in directory.config.tensors() {
        let (a, b) = (gguf.tensor(&name).unwrap(), directory.tensor(&name).unwrap());
        assert_eq!((a.dtype, &a.shape), (TensorType::F32, &shape));
        assert!(a.bytes == b.bytes, "{name}");
    }
    assert!((gguf.config.norm.eps - 1e-5).abs() < 1e-12);
    assert_eq!((gguf.config.bos, gguf.config.eos.as_slice()), (Some(259), [2, 260].as_slice()));
    assert!(gguf.tensor("lm_head.weight").is_err());
}

#[test]
fn puts_quantised_rows_in_order() {
    // Row r of the file holds the number r: two blocks of 32.
    let bytes = (0..64u8).flat_map(|r| [q8_0(1.0, r as i8), q8_0(1.0, r as i8)].concat()).collect();
    let change = |t: &mut common::Tensor| (t.kind, t.bytes) = (8, bytes);
    let model = open_bytes(&tiny_gguf().with("blk.1.attn_q.weight", change).build()).unwrap();
    let view = model.tensor("model.layers.1.self_attn.q_proj.weight").unwrap();
    assert_eq!((view.dtype, view.len()), (TensorType::Q8_0, 64 * 64));
    let rows: Vec<f32> = view.to_f32().chunks(64).map(|row| row[63]).collect();
    let head = [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15];
    let expected: Vec<f32> = (0..4).flat_map(|h| head.map(|r| (h * 16 + r) as f32)).collect();
    assert_eq!(rows, expected);
}

#[test]
fn untied_heads_and_scaled_rope() {
    let head = vec![0; 300 * 64 * 4];
    let factors = [1.0f32, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0, 8.0].iter().flat_map(|f| f.to_le_bytes()).collect();
    let gguf = tiny_gguf().tensor("output.weight", &[300, 64], 0, head).tensor("rope_freqs.weight", &[8], 0, factors);
    let model = open_bytes(&gguf.build()).unwrap();
    assert!(!model.config.tie_word_embeddings);
    assert_eq!(model.tensor("lm_head.weight").unwrap().shape, [300, 64]);
    let f = rope(&model.config).inverse_frequencies(16);
    assert_eq!((f[0], f[2], f[4]), (1.0, 0.05, 0.0025));
}

#[test]
fn fingerprint_names_what_differs() {
    let base = open_bytes(&tiny_gguf().build()).unwrap();
    let again = open_bytes(&tiny_gguf().build()).unwrap();
    assert_eq!(base.fingerprint(), again.fingerprint());
    let weight = open_bytes(&tiny_gguf().with("output_norm.weight", |t| t.bytes[3] ^= 1).build()).unwrap();
    assert_ne!(weight.weights_digest(), base.weights_digest());
    assert_eq!(weight.tokenizer_digest(), base.tokenizer_digest());
    let words = open_bytes(&tiny_gguf().text("tokenizer.chat_template", "{{ messages }}").build()).unwrap();
    assert_ne!(words.tokenizer_digest(), base.tokenizer_digest());
    assert_eq!((words.weights_digest(), words.config_digest()), (base.weights_digest(), base.config_digest()));
    let theta = open_bytes(&tiny_gguf().f32("llama.rope.freq_base", 5e5).build()).unwrap();
    assert_ne!(theta.config_digest(), base.config_digest());
    for other in [weight, words, theta] {
        assert_ne!(other.fingerprint(), base.fingerprint());
    }
}

#[test]
fn tokenizer_and_template() {
    let model = open_bytes(&tiny_gguf().build()).unwrap();
    let text = model.text.as_ref().unwrap();
    let id = |letter: char| letter as u32; // printable ASCII stands for itself
    assert_eq!(text.encode("a the12<|im_end|>[TOOL]").unwrap(), [id('a'), 258, id('1'), id('2'), 260, 261]);
    assert_eq!(text.encode("").unwrap(), Vec::<u32>::new());
    assert_eq!(text.decode(&[id('a'), 258, 260, 9999], true).unwrap(), "a the");
    assert_eq!(text.decode(&[260, 258], false).unwrap(), "<|im_end|> the");
    let (prompt, ids) = text.encode_chat(&serde_json::json!([{"role": "u", "content": "the"}])).unwrap();
    assert_eq!(prompt, format!("u: the{}", alphabet()[2]));
    assert_eq!(ids, text.encode_bare(&prompt).unwrap());
    let opened = open_bytes(&tiny_gguf().flag("tokenizer.ggml.add_bos_token", true).build()).unwrap();
    assert_eq!(opened.text.as_ref().unwrap().encode("a").unwrap(), [259, id('a')]);
    assert_eq!(opened.text.as_ref().unwrap().encode_bare("a").unwrap(), [id('a')]);
    // Llama 3 opens by default, keeps up to three digits together for BPE, and takes whole words that are tokens.
    let llama3 = open_bytes(&tiny_gguf().text("tokenizer.ggml.pre", "llama-bpe").build()).unwrap();
    assert_eq!(llama3.text.unwrap().encode(" the").unwrap(), [259, 258]);
    for pre in ["gpt-2", "default", "qwen2"] {
        let model = open_bytes(&tiny_gguf().text("tokenizer.ggml.pre", pre).build()).unwrap();
        assert_eq!(model.text.unwrap().encode("it's the é\n").unwrap().len(), 9, "{pre}");
    }
}

#[test]
fn pieces_of_a_stream_add_up() {
    let text = open_bytes(&tiny_gguf().build()).unwrap().text.unwrap();
    let mut random = Seeded(7);
    for _ in 0..300 {
        let ids: Vec<u32> = (0..40).map(|_| random.below(320) as u32).collect();
        let mut stream = text.decode_stream();
        let pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id)).collect();
        assert!(pieces.iter().all(|piece| !piece.is_empty()));
        assert_eq!(pieces.concat() + &stream.flush().unwrap_or_default(), text.decode(&ids, true).unwrap());
        assert_eq!(stream.flush(), None);
    }
    let mut stream = text.decode_stream();
    let given: Vec<_> = "é!".bytes().map(|b| stream.push(u32::from(b))).collect();
    assert_eq!(given, [None, Some("é".into()), Some("!".into())]);
}

#[test]
fn a_tokenizer_that_is_not_known_leaves_the_model_usable() {
    for (key, value) in [("tokenizer.ggml.model", "llama"), ("tokenizer.ggml.pre", "tekken")] {
        let model = open_bytes(&tiny_gguf().text(key, value).build()).unwrap();
        assert!(model.text.is_none());
        assert!(model.text_absent().unwrap().contains(value));
        use_all(&model);
    }
    let broken = open_bytes(&tiny_gguf().text("tokenizer.chat_template", "{% for %}").build()).unwrap();
    let text = broken.text.unwrap();
    assert!(text.chat_problem().unwrap().contains("line 1"));
    assert!(text.encode_chat(&serde_json::json!([{"role": "u", "content": ""}])).is_err());
    let none = open_bytes(&tiny_gguf().without("tokenizer.chat_template").build()).unwrap();
    assert!(none.text.unwrap().chat_problem().is_some());
}

#[test]
fn header_and_metadata_of_hostile_files() {
    let sound = tiny_gguf();
    let patched = |at: usize, value: &[u8]| {
        let mut bytes = sound.build();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    refused(b"", &["GGUF"]);
    refused(b"GGUF\x03\0", &["version", "truncated"]);
    refused(&patched(0, b"PK\x03\x04"), &["GGUF"]);
    refused(&patched(4, &[1]), &["GGUF version = 1"]);
    refused(&patched(4, &[0, 0, 0, 3]), &["GGUF version"]);
    refused(&patched(8, &u64::MAX.to_le_bytes()), &["tensor count"]);
    refused(&patched(8, &60_000u64.to_le_bytes()), &["tensor"]);
    refused(&patched(16, &u64::MAX.to_le_bytes()), &["metadata key count"]);
    refused(&patched(24, &u64::MAX.to_le_bytes()), &["metadata key 0"]);
    let key = |kind: u32, value: Vec<u8>| Gguf::default().key("x.bomb", kind, value).build();
    refused(&key(9, array(4, u64::MAX, &[])), &["x.bomb", "cannot fit"]);
    refused(&key(9, array(8, 1 << 40, &[])), &["x.bomb", "cannot fit"]);
    refused(&key(9, array(9, 1, &array(9, 1, &[]))), &["x.bomb", "array of arrays"]);
    refused(&key(9, array(77, 1, &[0; 8])), &["x.bomb", "element type 77"]);
    refused(&key(13, vec![0; 8]), &["x.bomb", "value type 13"]);
    refused(&key(7, vec![2; 8]), &["x.bomb", "truth value"]);
    refused(&key(8, [&3u64.to_le_bytes()[..], b"\xff\xfe\xfd"].concat()), &["x.bomb", "UTF-8"]);
    refused(&key(9, array(8, 1, &[&2u64.to_le_bytes()[..], b"\xc3\x28"].concat())), &["x.bomb", "UTF-8"]);
    let mut twice = tiny_gguf();
    twice.keys.push(("general.architecture".into(), 8, string("llama")));
    refused(&twice.build(), &["general.architecture", "twice"]);
    refused(&tiny_gguf().u32("general.alignment", 0).build(), &["general.alignment"]);
    refused(&tiny_gguf().u32("general.alignment", 48).build(), &["general.alignment"]);
    refused(&tiny_gguf().u32(&"k".repeat(5000), 0).build(), &["limit is 4096"]);
}

#[test]
fn tensors_of_hostile_files() {
    let norm = |change: fn(&mut common::Tensor)| tiny_gguf().with("output_norm.weight", change).build();
    let words = ["output_norm.weight"];
    refused(&norm(|t| t.offset = Some(u64::MAX - 31)), &words);
    refused(&norm(|t| t.offset = Some(1 << 40)), &["output_norm.weight", "do not lie"]);
    refused(&norm(|t| t.offset = Some(8)), &["output_norm.weight", "multiple of 32"]);
    refused(&norm(|t| t.offset = Some(32)), &["overlap", "token_embd.weight"]);
    refused(&norm(|t| t.shape = vec![u64::MAX, 2]), &["output_norm.weight", "overflows"]);
    refused(&norm(|t| t.shape = vec![1 << 33, 1 << 33, 1 << 33]), &["output_norm.weight", "overflows"]);
    refused(&norm(|t| t.shape = vec![1; 5]), &["output_norm.weight: sides", "limit is 4"]);
    refused(&norm(|t| t.kind = 12), &["output_norm.weight", "Q4_K"]);
    refused(&norm(|t| t.kind = 999), &["output_norm.weight", "number 999"]);
    refused(&norm(|t| (t.kind, t.shape) = (8, vec![33])), &["output_norm.weight", "broken blocks"]);
    refused(&tiny_gguf().with("blk.2.ffn_up.weight", |t| t.name = "blk.2.ffn_gate.weight".into()).build(), &["twice"]);
    // `blk.02` and `blk.2` would both become layer 2.
    let alias = tiny_gguf().tensor("blk.02.ffn_up.weight", &[160, 64], 0, vec![0; 160 * 64 * 4]);
    refused(&alias.build(), &["model.layers.2.mlp.up_proj.weight", "twice"]);
    refused(&Gguf { cut: 1, ..tiny_gguf() }.build(), &["do not lie"]);
    for part in ["blk.1.attn_k.weight", "blk.2.ffn_down.weight", "token_embd.weight"] {
        let error = open_bytes(&tiny_gguf().without(part).build()).err().unwrap();
        assert!(matches!(error, CheckpointError::MissingTensor { .. }), "{error}");
    }
    refused(&tiny_gguf().with("blk.0.attn_k.weight", |t| t.shape = vec![64, 32]).build(), &["k_proj", "[64, 32]", "[32, 64]"]);
    refused(&tiny_gguf().tensor("blk.0.attn_q.bias", &[64], 0, vec![0; 256]).build(), &["blk.0.attn_q.bias"]);
}

#[test]
fn configurations_that_do_not_add_up() {
    let cases: [(Gguf, &str); 15] = [
        (tiny_gguf().text("general.architecture", "deepseek2"), "deepseek2"),
        (tiny_gguf().without("general.architecture"), "general.architecture"),
        (tiny_gguf().u32("llama.block_count", 0), "num_hidden_layers"),
        (tiny_gguf().u32("llama.block_count", u32::MAX), "num_hidden_layers"),
        (tiny_gguf().u32("llama.attention.head_count", 0), "head_count"),
        (tiny_gguf().u32("llama.attention.head_count_kv", 3), "num_key_value_heads"),
        (tiny_gguf().u32("llama.attention.head_count_kv", 4), "k_proj"),
        (tiny_gguf().f32("llama.rope.freq_base", f32::NAN), "rope_theta"),
        (tiny_gguf().text("llama.rope.scaling.type", "yarn"), "yarn"),
        (tiny_gguf().u32("llama.rope.dimension_count", 8), "llama.rope.dimension_count"),
        (tiny_gguf().u32("llama.expert_count", 8), "llama.expert_count"),
        (tiny_gguf().u32("llama.vocab_size", 299), "tokenizer.ggml.tokens"),
        (tiny_gguf().u32("tokenizer.ggml.eos_token_id", 300), "eos_token_id"),
        (tiny_gguf().text("llama.context_length", "long"), "llama.context_length"),
        (tiny_gguf().without("llama.attention.layer_norm_rms_epsilon"), "layer_norm_rms_epsilon"),
    ];
    for (gguf, word) in cases {
        refused(&gguf.build(), &[word]);
    }
}

#[test]
fn tokenizers_that_contradict_themselves() {
    let merges = |lines: &[&str]| {
        let lines: Vec<String> = lines.iter().map(|l| (*l).to_owned()).collect();
        tiny_gguf().texts("tokenizer.ggml.merges", &lines).build()
    };
    refused(&merges(&["Ġt"]), &["tokenizer.ggml.merges", "two tokens"]);
    refused(&merges(&["q z"]), &["tokenizer.ggml.merges", "not a token"]);
    refused(&merges(&["[PAD262] [PAD263]"]), &["tokenizer.ggml.merges", "not a token"]);
    let doubled: Vec<String> = alphabet().into_iter().chain(["a".into()]).collect();
    refused(&tiny_gguf().texts("tokenizer.ggml.tokens", &doubled).build(), &["tokenizer.ggml.tokens", "\"a\"", "twice"]);
    refused(&tiny_gguf().without("tokenizer.ggml.merges").build(), &["tokenizer.ggml.merges", "missing"]);
    refused(&tiny_gguf().u32("tokenizer.ggml.tokens", 1).build(), &["tokenizer.ggml.tokens", "array of strings"]);
    refused(&tiny_gguf().texts("tokenizer.ggml.token_type", &["x".into()]).build(), &["tokenizer.ggml.token_type"]);
}

#[test]
fn no_bytes_stop_the_process() {
    let sound = tiny_gguf().build();
    let (span, mut random, mut opened) = (sound.len() - 590_000, Seeded(2026), 0);
    for _ in 0..1500 {
        let mut bytes = sound.clone();
        mutate(&mut bytes, span, &mut random);
        if let Ok(model) = open_bytes(&bytes) {
            use_all(&model);
            opened += 1;
        }
    }
    // Some changes hit a letter of a token and do no harm: if none did, the loop would not test what lies behind the parser.
    assert!((10..1490).contains(&opened), "{opened}");
}
