//! Every family's configuration: what it becomes, and hostile versions of it.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::{Gguf, Seeded, gguf_name, grouped, mutate, open_bytes, rope, shared, tiny, tiny_gguf, use_all};
use millrace_checkpoint::{
    Architecture, AttentionKind, Checkpoint, Groups, Latent, MlpKind, ModelConfig, NormKind, Positions, Scaling, Score,
};
use millrace_core::layout::{KvDtype, KvParts};
use serde_json::{Value, json};
use tempfile::TempDir;

fn llama_like(architecture: &str) -> Value {
    json!({"architectures": [architecture], "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": null})
}

fn gpt2() -> Value {
    json!({"model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 512,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5})
}

fn deepseek(architecture: &str) -> Value {
    let mut config = llama_like(architecture);
    let own = json!({"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "routed_scaling_factor": 1.5});
    config.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
    config
}

/// A directory with this configuration and weights of another model.
fn directory(config: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(tiny().join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    dir
}

fn refused(config: &Value, word: &str) {
    let message = Checkpoint::open(directory(config).path()).err().expect("refused").to_string();
    assert!(message.contains(word), "{word:?} not in: {message}");
}

fn refused_with(sound: &Value, cases: &[(&str, Value, &str)]) {
    for (field, value, word) in cases {
        let mut config = sound.clone();
        config[*field] = value.clone();
        refused(&config, word);
    }
}

#[test]
fn sound_configurations_ask_for_their_own_tensors() {
    refused(&llama_like("Qwen2ForCausalLM"), "q_proj.bias is missing");
    refused(&llama_like("Qwen3ForCausalLM"), "q_proj.weight has shape [64, 64], expected [512, 64]");
    refused(&gpt2(), "model.embed_positions.weight is missing (expected shape [512, 64])");
    refused(&deepseek("DeepseekV2ForCausalLM"), "self_attn.q_a_proj.weight is missing (expected shape [24, 64])");
    refused(&deepseek("DeepseekV3ForCausalLM"), "self_attn.q_a_proj.weight is missing");
}

#[test]
fn hostile_llama_likes() {
    refused_with(
        &llama_like("MistralForCausalLM"),
        &[
            ("sliding_window", json!(0), "sliding_window: is zero"),
            ("sliding_window", json!(-1), "sliding_window"),
            ("num_hidden_layers", json!(1u64 << 40), "num_hidden_layers is 1099511627776, the limit is 1024"),
        ],
    );
    let mut windowed = llama_like("Qwen2ForCausalLM");
    windowed["use_sliding_window"] = json!(true);
    refused(&windowed, "sliding_window: is missing");
    windowed["sliding_window"] = json!(32);
    refused(&windowed, "max_window_layers: is missing");
    windowed["layer_types"] = json!(["full_attention", "sliding_attention"]);
    refused(&windowed, "layer_types");
    windowed["layer_types"] = json!(["full_attention", "sliding_attention", "linear_attention"]);
    refused(&windowed, "linear_attention");
}

#[test]
fn hostile_gpt2() {
    refused_with(
        &gpt2(),
        &[
            ("n_head", json!(0), "n_head"),
            ("n_head", json!(5), "n_head"),
            ("n_embd", json!(0), "hidden_size: is zero"),
            ("n_embd", json!(1u64 << 60), "the limit is"),
            ("n_layer", json!(0), "n_layer: is zero"),
            ("n_positions", Value::Null, "n_positions: is missing"),
            ("n_inner", json!(u64::MAX), "intermediate_size"),
            ("activation_function", json!("relu"), "relu"),
            ("scale_attn_by_inverse_layer_idx", json!(true), "scale_attn_by_inverse_layer_idx = true"),
            ("scale_attn_weights", json!(false), "scale_attn_weights = false"),
            ("layer_norm_epsilon", json!(0), "eps"),
        ],
    );
}

#[test]
fn hostile_deepseek() {
    for architecture in ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"] {
        refused_with(
            &deepseek(architecture),
            &[
                ("kv_lora_rank", json!(0), "kv_lora_rank: is zero"),
                ("kv_lora_rank", json!(1u64 << 50), "the limit is 8192"),
                ("q_lora_rank", json!(0), "q_lora_rank: is zero"),
                ("qk_nope_head_dim", json!(u64::MAX), "qk_nope_head_dim"),
                ("qk_rope_head_dim", json!(7), "qk_rope_head_dim: 7 is odd"),
                ("v_head_dim", Value::Null, "v_head_dim: is missing"),
                ("num_attention_heads", json!(0), "num_attention_heads: is zero"),
                ("n_routed_experts", json!(0), "n_routed_experts: is zero"),
                ("n_routed_experts", json!(u64::MAX), "the limit is 4096"),
                ("num_experts_per_tok", json!(9), "num_experts_per_tok is 9"),
                ("num_experts_per_tok", Value::Null, "num_experts_per_tok: is missing"),
                ("moe_intermediate_size", json!(0), "moe_intermediate_size"),
                ("n_shared_experts", json!(u64::MAX), "n_shared_experts"),
                ("moe_layer_freq", json!(2), "moe_layer_freq = 2"),
                ("routed_scaling_factor", json!(0), "routed_scaling_factor"),
                ("topk_method", json!("sinkhorn"), "sinkhorn"),
                ("scoring_func", json!("relu"), "relu"),
                ("attention_bias", json!(true), "attention_bias = true"),
            ],
        );
    }
    refused_with(
        &deepseek("DeepseekV3ForCausalLM"),
        &[("n_group", json!(0), "n_group: is zero"), ("n_group", json!(8), "n_group"), ("topk_group", json!(3), "topk_group")],
    );
    let mut all = deepseek("DeepseekV2ForCausalLM");
    all["n_routed_experts"] = json!(4096);
    all["num_hidden_layers"] = json!(1024);
    refused(&all, "n_routed_experts in all layers");
}

#[test]
fn no_configuration_stops_the_process() {
    let mut random = Seeded(5);
    for config in [llama_like("Qwen3ForCausalLM"), gpt2(), deepseek("DeepseekV2ForCausalLM"), deepseek("DeepseekV3ForCausalLM")] {
        let dir = directory(&config);
        for _ in 0..400 {
            let mut bytes = config.to_string().into_bytes();
            mutate(&mut bytes, 3000, &mut random);
            std::fs::write(dir.path().join("config.json"), bytes).unwrap();
            if let Ok(model) = Checkpoint::open(dir.path()) {
                use_all(&model);
            }
        }
    }
}

/// The reference models, where this machine has them.
fn reference(name: &str) -> Option<ModelConfig> {
    let model = Checkpoint::open(&shared("golden/tiny")?.join(name)).unwrap();
    use_all(&model);
    Some(model.config)
}

#[test]
fn the_reference_models() {
    let Some(mistral) = reference("tiny-mistral") else { return };
    assert_eq!((mistral.architecture, &mistral.attention.windows), (Architecture::Mistral, &vec![Some(32); 3]));
    let qwen2 = reference("tiny-qwen2").unwrap();
    assert!(qwen2.attention.qkv_bias && !qwen2.attention.output_bias && !grouped(&qwen2).norms);
    let qwen3 = reference("tiny-qwen3").unwrap();
    assert_eq!((grouped(&qwen3).norms, grouped(&qwen3).head_dim), (true, 32));
    let gpt2 = reference("tiny-gpt2").unwrap();
    assert_eq!((gpt2.norm.kind, gpt2.positions == Positions::Learned, gpt2.mlp.kind), (NormKind::Layer, true, MlpKind::Gelu));
    assert_eq!((gpt2.mlp.width, gpt2.tie_word_embeddings, gpt2.attention.letters()), (256, true, "MHA"));
    for (name, query_rank) in [("tiny-deepseek-v2", None), ("tiny-deepseek-v3", Some(24))] {
        let config = reference(name).unwrap();
        let latent = Latent { query_rank, rank: 32, plain_dim: 16, turned_dim: 8, value_dim: 16, pairs: true };
        assert_eq!((&config.attention.kind, config.attention.letters()), (&AttentionKind::Latent(latent), "MLA"));
        assert_eq!(config.attention.cached(), (KvParts::Latent, 1, 40));
        let experts = config.experts_of(1).unwrap();
        assert_eq!((experts.count, experts.chosen, experts.shared_width), (8, 2, 48));
        assert!(config.experts_of(0).is_none());
        let v3 = query_rank.is_some();
        assert_eq!(experts.router.groups, v3.then_some(Groups { count: 2, chosen: 1, best: 2 }));
        assert_eq!(experts.router.score, if v3 { Score::Sigmoid } else { Score::Softmax });
    }
}

/// The directory as llama.cpp's converter would write it.
fn as_gguf(name: &str, architecture: &str) -> Option<(Checkpoint, Gguf)> {
    let model = Checkpoint::open(&shared("golden/tiny")?.join(name)).unwrap();
    let mut gguf = tiny_gguf();
    gguf.keys.retain(|(key, _, _)| !key.starts_with("llama."));
    gguf.tensors.clear();
    let c = &model.config;
    let key = |key: &str| format!("{architecture}.{key}");
    let eps = if c.norm.kind == NormKind::Layer { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" };
    let gguf = gguf
        .text("general.architecture", architecture)
        .u32(&key("block_count"), 3)
        .u32(&key("context_length"), 512)
        .u32(&key("embedding_length"), 64)
        .u32(&key("feed_forward_length"), c.mlp.width as u32)
        .u32(&key("attention.head_count"), 4)
        .u32(&key("attention.head_count_kv"), grouped(c).kv_heads as u32)
        .u32(&key("attention.key_length"), grouped(c).head_dim as u32)
        .f32(&key(eps), c.norm.eps as f32)
        .u32(&key("vocab_size"), 300);
    let gguf = c.tensors().into_iter().fold(gguf, |gguf, (name, shape)| {
        let shape: Vec<u64> = shape.iter().map(|&side| side as u64).collect();
        gguf.tensor(&gguf_name(&name), &shape, 0, model.tensor(&name).unwrap().bytes.into_owned())
    });
    Some((model, gguf))
}

#[test]
fn a_gguf_of_other_families_is_the_same_model() {
    for (name, architecture) in [("tiny-qwen2", "qwen2"), ("tiny-qwen3", "qwen3"), ("tiny-gpt2", "gpt2")] {
        let Some((directory, gguf)) = as_gguf(name, architecture) else { return };
        let model = open_bytes(&gguf.build()).unwrap();
        let eps = directory.config.norm.eps;
        assert!((model.config.norm.eps - eps).abs() < 1e-9);
        let want = ModelConfig {
            name: model.config.name.clone(),
            norm: model.config.norm,
            bos: model.config.bos,
            eos: model.config.eos.clone(),
            ..directory.config.clone()
        };
        assert_eq!(model.config, want, "{name}");
        for (tensor, _) in want.tensors() {
            assert!(model.tensor(&tensor).unwrap().bytes == directory.tensor(&tensor).unwrap().bytes, "{name}: {tensor}");
        }
        use_all(&model);
        let biased = gguf.clone().tensor("blk.0.ffn_gate.bias", &[160], 0, vec![0; 640]);
        common::refused(&biased.build(), &["blk.0.ffn_gate.bias", "a bias"]);
        common::refused(&gguf.u32(&format!("{architecture}.expert_count"), 4).build(), &["expert_count"]);
    }
}

/// A latent of `rank + turned` numbers is what a token costs, whatever the number of heads.
#[test]
fn a_latents_layout() {
    let Some(root) = shared("golden/tiny") else { return };
    let layout = |name: &str| Checkpoint::open(&root.join(name)).unwrap().kv_layout(KvDtype::Bf16, 16);
    assert_eq!(layout("tiny-deepseek-v2").token_bytes(), 40 * 2);
    assert_eq!(layout("tiny-llama-mha").token_bytes(), 2 * 4 * 16 * 2);
    assert_eq!(layout("tiny-llama-mha").differs(&layout("tiny-deepseek-v2")), Some("parts"));
}

#[test]
fn yarn_as_deepseek_writes_it() {
    let Some(root) = shared("golden/tiny") else { return };
    let dir = tempfile::tempdir().unwrap();
    let source = root.join("tiny-deepseek-v2");
    std::fs::copy(source.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("rope_parameters");
    config["rope_scaling"] = json!({"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn"});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let config = Checkpoint::open(dir.path()).unwrap().config;
    let Scaling::Yarn(yarn) = &rope(&config).scaling else { panic!("{:?}", rope(&config)) };
    assert_eq!((yarn.factor, yarn.turn_scale), (40.0, 1.0));
    let sharpening = 0.1 * 0.707 * 40f64.ln() + 1.0;
    assert!((config.attention.scale - 24f64.powf(-0.5) * sharpening * sharpening).abs() < 1e-12);
}
