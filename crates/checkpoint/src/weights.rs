//! The tensors of a model, wherever they lie: a table from canonical names to places in mapped files.
//!
//! Both readers fill the table; this module checks it against the configuration, hands out views, and digests the bytes.

use crate::mapping::MappedFile;
use crate::{CheckpointError, ModelConfig, TensorType, TensorView};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::path::Path;

/// Where one tensor lies.
pub(crate) struct Slot {
    /// Index into the files.
    pub(crate) file: usize,
    /// Its bytes in that file.
    pub(crate) range: Range<usize>,
    pub(crate) dtype: TensorType,
    pub(crate) shape: Vec<usize>,
    /// In which order its numbers lie.
    pub(crate) order: Order,
}

/// In which order a tensor's numbers lie in the file. `Slot::shape` is the canonical one in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// The canonical one.
    Canonical,
    /// `[in, out]` in place of `[out, in]`: GPT-2's Conv1D.
    Transposed,
    /// The last `turned` rows of each of `heads` heads lie as rotary pairs (GGUF's Llama, DeepSeek) and not as rotary halves.
    Paired { heads: usize, turned: usize },
}

/// The files of a model's weights and what is in them.
#[derive(Default)]
pub(crate) struct Weights {
    pub(crate) files: Vec<MappedFile>,
    slots: BTreeMap<String, Slot>,
    /// The part of each file that the digest covers.
    pub(crate) digested: Vec<Range<usize>>,
}

impl Weights {
    /// Adds a tensor; a name that is there already is an error.
    pub(crate) fn insert(&mut self, file: &Path, name: String, slot: Slot) -> Result<(), CheckpointError> {
        match self.slots.entry(name) {
            Entry::Occupied(taken) => Err(CheckpointError::malformed(file, format!("tensor {}", taken.key()), "is there twice")),
            Entry::Vacant(free) => {
                free.insert(slot);
                Ok(())
            }
        }
    }

    /// Whether every tensor of the configuration is there with its shape. Extra tensors are left alone.
    pub(crate) fn check(&self, file: &Path, config: &ModelConfig) -> Result<(), CheckpointError> {
        for (tensor, expected) in config.tensors() {
            let Some(slot) = self.slots.get(&tensor) else {
                return Err(CheckpointError::MissingTensor { file: file.into(), tensor, expected });
            };
            if slot.shape != expected {
                let (file, found) = (self.files[slot.file].path().into(), slot.shape.clone());
                return Err(CheckpointError::TensorShape { file, tensor, found, expected });
            }
        }
        Ok(())
    }

    /// The tensor of that canonical name.
    pub(crate) fn view(&self, name: &str) -> Option<TensorView<'_>> {
        let slot = self.slots.get(name)?;
        let raw = &self.files[slot.file].bytes()[slot.range.clone()];
        let bytes = match (slot.order, slot.shape.as_slice()) {
            (Order::Paired { heads, turned }, &[rows, _]) if heads > 0 && rows.is_multiple_of(heads) && rows / heads >= turned => {
                Cow::Owned(rows_in_halves(raw, rows, heads, turned))
            }
            (Order::Transposed, &[rows, columns]) => Cow::Owned(transposed(raw, rows, columns)),
            _ => Cow::Borrowed(raw),
        };
        Some(TensorView { dtype: slot.dtype, shape: slot.shape.clone(), bytes })
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.slots.keys().map(String::as_str)
    }

    /// Digest of all weight bytes and what says how to read them. Reads every byte.
    pub(crate) fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("millrace 2026 weights v1");
        for (file, range) in self.files.iter().zip(&self.digested) {
            hasher.update(&(range.len() as u64).to_le_bytes());
            hasher.update(&file.bytes()[range.clone()]);
        }
        *hasher.finalize().as_bytes()
    }
}

/// Undoes `LlamaModel.permute` of llama.cpp's converter, which turns a head's rotary halves into neighbouring pairs. Rows are moved
/// whole, so it works on quantised rows too.
fn rows_in_halves(raw: &[u8], rows: usize, heads: usize, turned: usize) -> Vec<u8> {
    let (row_bytes, head_rows) = (raw.len() / rows, rows / heads);
    let plain = head_rows - turned;
    let mut out = Vec::with_capacity(raw.len());
    for head in raw.chunks_exact(head_rows * row_bytes) {
        out.extend_from_slice(&head[..plain * row_bytes]);
        for half in 0..2 {
            for pair in 0..turned / 2 {
                let from = (plain + 2 * pair + half) * row_bytes;
                out.extend_from_slice(&head[from..from + row_bytes]);
            }
        }
    }
    out
}

/// `[columns, rows]` numbers of whole bytes as `[rows, columns]`.
fn transposed(raw: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let bytes = raw.len() / (rows * columns).max(1);
    let mut out = Vec::with_capacity(raw.len());
    for row in 0..rows {
        for column in 0..columns {
            let from = (column * rows + row) * bytes;
            out.extend_from_slice(&raw[from..from + bytes]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_become_halves_head_by_head() {
        // Two heads of four rows, two bytes a row; rows of a head lie as pair 0 (first, second half), pair 1.
        let raw: Vec<u8> = (0..8).flat_map(|row| [row, row + 100]).collect();
        let rows: Vec<u8> = rows_in_halves(&raw, 8, 2, 4).chunks(2).map(|r| r[0]).collect();
        assert_eq!(rows, [0, 2, 1, 3, 4, 6, 5, 7]);
    }

    #[test]
    fn only_the_last_rows_of_a_head_are_turned() {
        let raw: Vec<u8> = (0..12).collect();
        assert_eq!(rows_in_halves(&raw, 12, 2, 4), [0, 1, 2, 4, 3, 5, 6, 7, 8, 10, 9, 11]);
    }

    #[test]
    fn a_transposed_weight() {
        assert_eq!(transposed(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 3, 2), [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
    }
}
