//! The demo's model against the reference: tokens, texts and chats of transformers. Runs where both are on the machine.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::{shared, use_all};
use millrace_checkpoint::{Checkpoint, TensorType};
use serde_json::Value;
use std::path::PathBuf;

/// The fetched model, or none on a machine that has not fetched it.
fn model() -> Option<Checkpoint> {
    let path = match std::env::var_os("MILLRACE_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".cache/millrace/models/smollm2-135m-instruct.gguf"),
    };
    path.exists().then(|| Checkpoint::open(&path).expect("the fetched model opens"))
}

fn ids(row: &Value, field: &str) -> Vec<u32> {
    row[field].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The reference was made from the GGUF file by transformers, which leaves out the first step of this model's own tokenizer.json (digits
/// apart). The two differ only where several white-space characters stand before a digit: there the step hides the digit from the rule
/// that gives the last space to the next word.
fn reference_cuts_otherwise(text: &str) -> bool {
    let chars: Vec<char> = text.chars().collect();
    chars.windows(3).any(|w| w[0].is_whitespace() && w[1].is_whitespace() && w[2].is_numeric())
}

#[test]
fn agrees_with_every_reference_row() {
    let (Some(model), Some(golden)) = (model(), shared("golden/smollm2-135m.jsonl")) else { return };
    let text = model.text.as_ref().expect("it has a tokenizer");
    let (mut prompts, mut chats) = (0, 0);
    for line in std::fs::read_to_string(golden).unwrap().lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        let name = &row["name"];
        if let Some(prompt) = row["prompt"].as_str() {
            assert_eq!(text.encode(prompt).unwrap(), ids(&row, "prompt_ids"), "{name}");
            prompts += 1;
        }
        if row["messages"].is_array() {
            assert_eq!(text.encode_chat(&row["messages"]).unwrap().1, ids(&row, "prompt_ids"), "{name}");
            chats += 1;
        }
        let prompt = text.decode(&ids(&row, "prompt_ids"), false).unwrap();
        let again = text.encode_bare(&prompt).unwrap();
        assert_eq!(text.decode(&again, false).unwrap(), prompt, "{name}");
        assert!(again == ids(&row, "prompt_ids") || reference_cuts_otherwise(&prompt), "{name}");
        let output = ids(&row, "output_ids");
        assert_eq!(text.decode(&output, false).unwrap(), row["text"].as_str().unwrap(), "{name}");
        let mut stream = text.decode_stream();
        let streamed: String = output.iter().filter_map(|&id| stream.push(id)).collect();
        assert_eq!(streamed + &stream.flush().unwrap_or_default(), text.decode(&output, true).unwrap(), "{name}");
    }
    assert!(prompts >= 7 && chats >= 5);
}

#[test]
fn shape_and_numbers() {
    let Some(model) = model() else { return };
    let c = &model.config;
    assert_eq!((c.vocab_size, c.hidden_size, c.layers, c.attention.heads, c.attention.letters()), (49152, 576, 30, 9, "GQA"));
    assert_eq!((c.eos.as_slice(), c.tie_word_embeddings, c.max_positions), ([2].as_slice(), true, 8192));
    assert_eq!(model.tensor("model.layers.7.self_attn.q_proj.weight").unwrap().dtype, TensorType::Q4_1);
    let norm = model.tensor("model.norm.weight").unwrap().to_f32();
    assert!(norm.iter().all(|x| x.is_finite()) && norm.iter().any(|&x| x != 0.0));
    use_all(&model);
}
