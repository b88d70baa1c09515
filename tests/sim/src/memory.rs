//! KV memory and the arithmetic of the `checksum` engine (`millrace-model`), a word for each token of a cell in place of its bytes.
//!
//! The word of a token is a hash over the token, its position, the layer, and all earlier words of that layer as they stand in the
//! cells, and begins with the caller's taint; the next token is a hash over the words of all layers and, for a sampled answer, the draw. A slot keeps its old words when it is given out again, so
//! whoever reads a cell that was never written for it gets another answer.

use std::collections::BTreeMap;

use millrace_core::engine::Row;
use millrace_core::identity::cell_digest;
use millrace_core::ids::{AttemptId, BlockHash, RequestId, Slot, TokenId};
use millrace_core::pool::Resident;
use millrace_core::sampling::{Sampling, mix, uniform};

use crate::callers::Caller;

/// Ids below this are never drawn.
pub const RESERVED_TOKENS: u32 = 3;

#[derive(Clone, Debug)]
struct Cell {
    words: Vec<u64>,
    /// Streams that read it now.
    lent: u32,
}

/// The cells of one node; all zero at first.
#[derive(Clone, Debug)]
pub struct Memory {
    block_tokens: usize,
    cells: BTreeMap<(Slot, u16), Cell>,
    /// Writes to a cell that a stream was reading. The locks of the real memory make such a writer wait; here they are counted.
    pub writes_while_lent: u64,
}

impl Memory {
    /// Cells of `block_tokens` words.
    #[must_use]
    pub fn new(block_tokens: u16) -> Self {
        Self { block_tokens: block_tokens.into(), cells: BTreeMap::new(), writes_while_lent: 0 }
    }

    fn cell(&mut self, slot: Slot, layer: u16) -> &mut Cell {
        let block_tokens = self.block_tokens;
        self.cells.entry((slot, layer)).or_insert_with(|| Cell { words: vec![0; block_tokens], lent: 0 })
    }

    fn cell_to_write(&mut self, slot: Slot, layer: u16) -> &mut Cell {
        self.writes_while_lent += u64::from(self.cells.get(&(slot, layer)).is_some_and(|cell| cell.lent > 0));
        self.cell(slot, layer)
    }

    /// Gives a cell's words to a stream, which reads them until [`Self::give_back`].
    pub fn lend(&mut self, slot: Slot, layer: u16) -> Vec<u64> {
        let cell = self.cell(slot, layer);
        cell.lent += 1;
        cell.words.clone()
    }

    /// A stream reads the cell no more.
    pub fn give_back(&mut self, slot: Slot, layer: u16) {
        self.cell(slot, layer).lent -= 1;
    }

    /// Cells that streams read now.
    #[must_use]
    pub fn lent(&self) -> usize {
        self.cells.values().filter(|cell| cell.lent > 0).count()
    }

    /// Puts what arrived in its place.
    pub fn place(&mut self, slot: Slot, layer: u16, words: &[u64]) {
        self.cell_to_write(slot, layer).words.copy_from_slice(words);
    }

    /// The wrapping sum of the digests of a block's cells.
    pub fn digest_block(&mut self, block: &Resident, layers: u16) -> u64 {
        (0..layers).map(|layer| digest(&block.name, layer, &self.cell(block.at.slot, layer).words)).fold(0, u64::wrapping_add)
    }

    /// Computes one layer of a row: reads what is earlier, writes what is new, and gives the hash of all of it.
    pub fn compute(&mut self, row: &Row, layer: u16) -> u64 {
        let mut hash = mix(u64::from(layer) + 1 + (Caller::of(row.attempt.request).taint() << 16));
        for position in 0..row.end() {
            let slot = row.table[position as usize / self.block_tokens];
            let offset = position as usize % self.block_tokens;
            if position >= row.start {
                let token = row.tokens[(position - row.start) as usize];
                let word = mix(hash ^ mix(u64::from(token) << 32 | u64::from(position)));
                self.cell_to_write(slot, layer).words[offset] = word;
            }
            hash = mix(hash.wrapping_mul(31) ^ self.cell(slot, layer).words[offset]);
        }
        hash
    }
}

/// The token that the hashes of a row's layers draw for a position.
#[must_use]
pub fn token(layers: &[u64], vocab: u32, sampling: &Sampling, position: u32) -> TokenId {
    let draw = if sampling.temperature > 0.0 { uniform(sampling.seed, position.into()).to_bits() } else { 0 };
    let hash = layers.iter().fold(draw, |all, layer| mix(all ^ layer));
    RESERVED_TOKENS + (hash % u64::from(vocab - RESERVED_TOKENS)) as TokenId
}

/// Digest of a cell, as `millrace-core` names it.
#[must_use]
pub fn digest(name: &BlockHash, layer: u16, words: &[u64]) -> u64 {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    cell_digest(name, layer, &bytes)
}

/// The answer of request `id` to `prompt` where nothing goes wrong and nobody else computes.
#[must_use]
pub fn undisturbed(id: RequestId, prompt: &[TokenId], sampling: &Sampling, (layers, vocab): (u16, u32)) -> Vec<TokenId> {
    let length = prompt.len() + sampling.max_new as usize;
    let mut memory = Memory::new(length as u16);
    let (mut answer, mut start, mut tokens) = (Vec::new(), 0, prompt.to_vec());
    while answer.len() < sampling.max_new as usize {
        let attempt = AttemptId { request: id, attempt: 0 };
        let row = Row { attempt, tokens, start, table: vec![Slot(0)], sample: None };
        let hashes: Vec<u64> = (0..layers).map(|layer| memory.compute(&row, layer)).collect();
        let next = token(&hashes, vocab, sampling, row.end());
        (start, tokens) = (row.end(), vec![next]);
        answer.push(next);
        if sampling.is_end(next) {
            break;
        }
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(tokens: &[TokenId], start: u32, table: &[u32]) -> Row {
        let table = table.iter().map(|slot| Slot(*slot)).collect();
        Row { attempt: AttemptId::default(), tokens: tokens.to_vec(), start, table, sample: None }
    }

    #[test]
    fn places_and_chunks_do_not_matter_and_a_stale_word_does() {
        let (mut one, mut other) = (Memory::new(2), Memory::new(2));
        let whole = one.compute(&row(&[5, 6, 7], 0, &[0, 1]), 0);
        other.compute(&row(&[5, 6], 0, &[9]), 0);
        assert_eq!(other.compute(&row(&[7], 2, &[9, 4]), 0), whole);
        let words = other.lend(Slot(9), 0);
        other.place(Slot(9), 0, &[words[0], words[1] ^ 1]);
        assert_eq!(other.writes_while_lent, 1);
        assert_ne!(other.compute(&row(&[7], 2, &[9, 4]), 0), whole);
    }
}
