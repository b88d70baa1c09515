//! The reference: prompts with the greedy answers of another implementation in f32, and when an answer equals them.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::repository;

/// A position whose first two log-probabilities in the reference are closer than this may differ.
pub const NEAR_TIE: f64 = 0.002;

/// A prompt and its answer.
#[derive(Clone, Debug, Deserialize)]
pub struct Row {
    /// Its name; may be empty.
    #[serde(default)]
    pub name: String,
    /// The prompt as text, for some.
    pub prompt: Option<String>,
    /// The prompt as a chat, for some.
    pub messages: Option<Value>,
    /// The prompt's tokens.
    pub prompt_ids: Vec<u32>,
    /// The answer's tokens, an end token included.
    pub output_ids: Vec<u32>,
    /// The answer's text, special tokens included; empty for a model without a tokenizer.
    #[serde(default)]
    pub text: String,
    /// For each token of the answer the likeliest tokens with their log-probabilities.
    pub top5: Vec<Vec<(u32, f64)>>,
}

/// All rows: of `MILLRACE_GOLDEN`, else of the folder that the project shares beside the repository, else the few in the repository.
///
/// # Panics
/// When the file is not what it should be.
#[must_use]
pub fn rows() -> Vec<Row> {
    let shared = repository().join("../shared/golden/smollm2-135m.jsonl");
    let few = repository().join("tests/data/smollm2-few.jsonl");
    let named = std::env::var_os("MILLRACE_GOLDEN").map(PathBuf::from);
    read(&named.unwrap_or(if shared.exists() { shared } else { few }))
}

/// The rows of a file.
///
/// # Panics
/// When the file is not what it should be.
#[must_use]
pub fn read(path: &Path) -> Vec<Row> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let row = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let rows: Vec<Row> = text.lines().map(row).collect();
    assert!(!rows.is_empty(), "{} is empty", path.display());
    rows
}

impl Row {
    /// Whether `ids` is the reference's answer, up to a near tie that went the other way.
    ///
    /// # Errors
    /// The first token that differs.
    pub fn check(&self, ids: &[u32]) -> Result<(), String> {
        let length = ids.len().max(self.output_ids.len());
        let differs = (0..length).find(|&i| ids.get(i) != self.output_ids.get(i));
        match differs {
            Some(i) if !self.near_tie(i) => {
                let (got, want) = (ids.get(i), self.top5.get(i));
                Err(format!("{}: token {i} of {} is {got:?}, the reference has {want:?}; got {ids:?}", self.name, ids.len()))
            }
            _ => Ok(()),
        }
    }

    /// Whether the reference's first two tokens at a position are so close that either may come out.
    #[must_use]
    pub fn near_tie(&self, position: usize) -> bool {
        self.top5.get(position).is_some_and(|top| top.len() > 1 && top[0].1 - top[1].1 < NEAR_TIE)
    }

    /// Tokens up to the first near tie: they must come out.
    #[must_use]
    pub fn certain(&self) -> &[u32] {
        let certain = (0..self.output_ids.len()).find(|&i| self.near_tie(i)).unwrap_or(self.output_ids.len());
        &self.output_ids[..certain]
    }

    /// The answer's text as a client sees it, without special tokens.
    #[must_use]
    pub fn plain_text(&self) -> &str {
        self.text.strip_suffix("<|im_end|>").unwrap_or(&self.text)
    }

    /// Tokens of the prompt that must be found cached when it is sent again: its full blocks, and never the last token.
    #[must_use]
    pub fn cacheable(&self, block_tokens: usize) -> usize {
        (self.prompt_ids.len() - 1) / block_tokens * block_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        let top5 = vec![vec![(1, -0.1), (9, -3.0)], vec![(2, -0.5000), (8, -0.5015)], vec![(3, -0.1), (7, -2.0)]];
        let text = "abc".into();
        Row { name: "r".into(), prompt: None, messages: None, prompt_ids: vec![0; 33], output_ids: vec![1, 2, 3], text, top5 }
    }

    #[test]
    fn only_a_near_tie_may_go_the_other_way() {
        assert_eq!(row().check(&[1, 2, 3]), Ok(()));
        assert_eq!(row().check(&[1, 8, 4]), Ok(()), "after the near tie everything may differ");
        assert!(row().check(&[9, 2, 3]).is_err());
        assert!(row().check(&[1, 2, 7]).is_err());
        assert!(row().check(&[1, 2]).is_err(), "too short");
        assert!(row().check(&[1, 2, 3, 4]).is_err(), "too long");
        assert_eq!((row().certain(), row().cacheable(16)), (&[1][..], 32));
    }
}
