//! What the tests share: where material lies, a GGUF writer, and a small deterministic source of numbers.
#![allow(dead_code)] // each test program uses a part of it

use half::f16;
use millrace_checkpoint::{AttentionKind, Checkpoint, Grouped, ModelConfig, Positions, Rope, TensorView};
use millrace_core::layout::KvDtype;
use std::path::{Path, PathBuf};

/// The repository's own tiny model.
pub fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/tiny-llama-gqa-tied")
}

/// Reference material beside the repository, if this machine has it.
pub fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(path);
    path.exists().then_some(path)
}

/// A GGUF file in the making. Values go in as they are told, sound or not.
#[derive(Clone, Default)]
pub struct Gguf {
    pub keys: Vec<(String, u32, Vec<u8>)>,
    pub tensors: Vec<Tensor>,
    pub cut: usize,
}

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    /// Outermost first, as Hugging Face has it.
    pub shape: Vec<u64>,
    pub kind: u32,
    pub bytes: Vec<u8>,
    /// Overrides the place that the writer would give it.
    pub offset: Option<u64>,
}

pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

pub fn array(kind: u32, count: u64, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &count.to_le_bytes(), bytes].concat()
}

impl Gguf {
    /// Sets or replaces a key.
    pub fn key(mut self, key: &str, kind: u32, value: Vec<u8>) -> Self {
        self.keys.retain(|(k, _, _)| k != key);
        self.keys.push((key.into(), kind, value));
        self
    }

    pub fn without(mut self, key: &str) -> Self {
        self.keys.retain(|(k, _, _)| k != key);
        self.tensors.retain(|t| t.name != key);
        self
    }

    pub fn text(self, key: &str, value: &str) -> Self {
        self.key(key, 8, string(value))
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.key(key, 4, value.to_le_bytes().into())
    }

    pub fn f32(self, key: &str, value: f32) -> Self {
        self.key(key, 6, value.to_le_bytes().into())
    }

    pub fn flag(self, key: &str, value: bool) -> Self {
        self.key(key, 7, vec![value.into()])
    }

    pub fn texts(self, key: &str, values: &[String]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|v| string(v)).collect();
        self.key(key, 9, array(8, values.len() as u64, &bytes))
    }

    pub fn i32s(self, key: &str, values: &[i32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.key(key, 9, array(5, values.len() as u64, &bytes))
    }

    pub fn tensor(mut self, name: &str, shape: &[u64], kind: u32, bytes: Vec<u8>) -> Self {
        self.tensors.push(Tensor { name: name.into(), shape: shape.into(), kind, bytes, offset: None });
        self
    }

    /// Changes the tensor of that name.
    pub fn with(mut self, name: &str, change: impl FnOnce(&mut Tensor)) -> Self {
        change(self.tensors.iter_mut().find(|t| t.name == name).expect("the tensor is there"));
        self
    }

    pub fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.keys {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut data: Vec<u8> = Vec::new();
        for t in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0);
            out.extend(string(&t.name));
            out.extend((t.shape.len() as u32).to_le_bytes());
            t.shape.iter().rev().for_each(|side| out.extend(side.to_le_bytes()));
            out.extend(t.kind.to_le_bytes());
            out.extend(t.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&t.bytes);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out.truncate(out.len() - self.cut);
        out
    }
}

/// The other direction of what the crate undoes: llama.cpp's `permute`, rotary halves to pairs.
pub fn rows_in_pairs(raw: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (row, half) = (raw.len() / rows, rows / heads / 2);
    let from = |r: usize| {
        let (head, place) = (r / (2 * half), r % (2 * half));
        head * 2 * half + place / 2 + place % 2 * half
    };
    (0..rows).flat_map(|r| raw[from(r) * row..][..row].to_vec()).collect()
}

/// GPT-2's byte alphabet in the order of the bytes.
pub fn alphabet() -> Vec<String> {
    let mut next = 0xff;
    let letter = |b: u8| match b {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(b),
        _ => {
            next += 1;
            char::from_u32(next).expect("a Latin letter")
        }
    };
    (0..=255u8).map(letter).map(String::from).collect()
}

/// The tiny directory as a converter would write it, with a small tokenizer: 256 bytes, merges, two control tokens, padding.
pub fn tiny_gguf() -> Gguf {
    let model = Checkpoint::open(&tiny()).expect("the tiny model opens");
    let mut tokens = alphabet();
    tokens.extend(["Ġt", "he", "Ġthe", "<|im_start|>", "<|im_end|>", "[TOOL]"].map(String::from));
    let mut kinds = vec![1; 259];
    kinds.extend([3, 3, 4]);
    while tokens.len() < 300 {
        tokens.push(format!("[PAD{}]", tokens.len()));
        kinds.push(5);
    }
    let merges = ["Ġ t", "h e", "Ġt he"].map(String::from);
    let gguf = Gguf::default()
        .text("general.architecture", "llama")
        .u32("llama.block_count", 3)
        .u32("llama.context_length", 512)
        .u32("llama.embedding_length", 64)
        .u32("llama.feed_forward_length", 160)
        .u32("llama.attention.head_count", 4)
        .u32("llama.attention.head_count_kv", 2)
        .f32("llama.rope.freq_base", 10_000.0)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .u32("llama.vocab_size", 300)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "smollm")
        .texts("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &kinds)
        .texts("tokenizer.ggml.merges", &merges)
        .u32("tokenizer.ggml.bos_token_id", 259)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .text("tokenizer.chat_template", "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}");
    model.config.tensors().into_iter().fold(gguf, |gguf, (name, shape)| {
        let view = model.tensor(&name).expect("a tensor of the configuration");
        let bytes = match name.rsplit('.').nth(1) {
            Some("q_proj") => rows_in_pairs(&view.bytes, shape[0], 4),
            Some("k_proj") => rows_in_pairs(&view.bytes, shape[0], 2),
            _ => view.bytes.to_vec(),
        };
        let shape: Vec<u64> = shape.iter().map(|&s| s as u64).collect();
        gguf.tensor(&gguf_name(&name), &shape, 0, bytes)
    })
}

/// llama.cpp's name of a tensor.
pub fn gguf_name(name: &str) -> String {
    let pairs = [
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.embed_positions", "position_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("self_attn.qkv_proj", "attn_qkv"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    pairs.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// One Q8_0 block whose 32 numbers are all `scale * q`.
pub fn q8_0(scale: f32, q: i8) -> Vec<u8> {
    [&f16::from_f32(scale).to_le_bytes()[..], &[q as u8; 32]].concat()
}

/// Writes `bytes` as a model file and opens it.
pub fn open_bytes(bytes: &[u8]) -> Result<Checkpoint, millrace_checkpoint::CheckpointError> {
    let file = tempfile::Builder::new().suffix(".gguf").tempfile().expect("scratch file");
    std::fs::write(file.path(), bytes).expect("scratch file");
    Checkpoint::open(file.path())
}

/// The error of opening `bytes` must name the file and every one of `words`.
pub fn refused(bytes: &[u8], words: &[&str]) {
    let message = open_bytes(bytes).err().expect("refused").to_string();
    assert!(message.contains(".gguf"), "{message}");
    words.iter().for_each(|word| assert!(message.contains(word), "{word:?} not in: {message}"));
}

/// The rotary settings of a model that has some.
pub fn rope(config: &ModelConfig) -> &Rope {
    let Positions::Rotary(rope) = &config.positions else { panic!("positions are learned") };
    rope
}

/// The heads of a model without a latent.
pub fn grouped(config: &ModelConfig) -> &Grouped {
    let AttentionKind::Grouped(grouped) = &config.attention.kind else { panic!("there is a latent") };
    grouped
}

/// Touches everything a process would touch.
pub fn use_all(model: &Checkpoint) {
    for (name, _) in model.config.tensors() {
        let numbers = TensorView::to_f32(&model.tensor(&name).expect("checked at open"));
        assert!(!numbers.is_empty());
    }
    model.fingerprint();
    if let Positions::Rotary(rope) = &model.config.positions {
        rope.inverse_frequencies(model.config.attention.turned_dim());
    }
    assert!(model.kv_layout(KvDtype::Bf16, 16).cell_bytes() > 0);
    if let Some(text) = &model.text {
        let _ = text.encode("the cat, the é <|im_end|> 12").map(|ids| text.decode(&ids, true));
        let _ = text.encode_chat(&serde_json::json!([{"role": "user", "content": "the"}]));
    }
}

/// SplitMix64: the same numbers on every run.
pub struct Seeded(pub u64);

impl Seeded {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// Changes one to four places of the first `span` bytes, or cuts the end off.
pub fn mutate(bytes: &mut Vec<u8>, span: usize, random: &mut Seeded) {
    for _ in 0..=random.below(4) {
        if bytes.len() < 16 {
            return;
        }
        let at = random.below(span.min(bytes.len()));
        match random.below(6) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2 => bytes[at..].iter_mut().take(8).for_each(|b| *b = 0xff),
            3 => bytes[at..].iter_mut().take(8).for_each(|b| *b = 0),
            4 => bytes[at] = b"0123456789\"{}[],:-e"[random.below(19)],
            _ if random.below(8) == 0 => bytes.truncate(at.max(1)),
            _ => {
                bytes.remove(at);
            }
        }
    }
}
