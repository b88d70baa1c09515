//! An engine for tests of everything around an engine: its next token is a hash of the KV bytes it actually read.
//!
//! The KV of a token is arithmetic over the token, its position, the layer, and the bytes of that layer's KV at all earlier positions
//! as they stand in the cells. So one lost, stale or misplaced cell changes every later token. How a prompt was cut into chunks
//! changes nothing. Never the default, never in the demo. Does not touch LibTorch.

use std::sync::Arc;
use std::time::Duration;

use millrace_core::engine::{Engine, EngineError, Row, Sampled, Step};
use millrace_core::ids::TokenId;
use millrace_core::layout::KvLayout;
use millrace_core::sampling::mix;
use millrace_kernels::{KvSlab, SlabError};

use crate::check::{self, Limits};

/// Ids below this are never drawn: models keep padding, start and end there.
pub const RESERVED_TOKENS: u32 = 3;

/// The shape of a checksum engine.
#[derive(Clone, Copy, Debug)]
pub struct ChecksumConfig {
    /// How it keeps KV; any small shape.
    pub layout: KvLayout,
    /// Token ids are below this; more than [`RESERVED_TOKENS`].
    pub vocab: u32,
    /// Positions are below this.
    pub max_positions: usize,
    /// Time spent on each computed token, to make load.
    pub token_delay: Duration,
}

/// The engine. See the module text.
pub struct ChecksumEngine {
    config: ChecksumConfig,
    slab: Arc<KvSlab>,
}

impl ChecksumEngine {
    /// An engine with a KV memory of `slots` blocks.
    ///
    /// # Errors
    /// [`SlabError`] when the memory cannot be made.
    ///
    /// # Panics
    /// When the vocabulary has no token to draw.
    pub fn new(config: ChecksumConfig, slots: usize) -> Result<(Self, Arc<KvSlab>, KvLayout), SlabError> {
        assert!(config.vocab > RESERVED_TOKENS, "a vocabulary of {} has no token to draw", config.vocab);
        let slab = KvSlab::new(config.layout.cell_bytes(), config.layout.layers.into(), slots)?;
        Ok((Self { config, slab: slab.clone() }, slab, config.layout))
    }

    /// Computes one layer of a row: reads what is earlier, writes what is new, and gives the hash of all of it.
    fn layer(&self, row: &Row, layer: usize) -> u64 {
        let block = usize::from(self.config.layout.block_tokens);
        let mut hash = mix(layer as u64 + 1);
        for position in 0..row.end() {
            let slot = row.table[position as usize / block].0 as usize;
            let offset = position as usize % block;
            if position >= row.start {
                let token = row.tokens[(position - row.start) as usize];
                let seed = mix(hash ^ mix(u64::from(token) << 32 | u64::from(position)));
                self.write(&mut self.slab.write(slot, layer), offset, seed);
            }
            hash = self.read(&self.slab.read(slot, layer), offset, hash);
        }
        hash
    }

    /// Where token `offset` of a cell lies: one range of bytes for each cached vector.
    fn ranges(&self, offset: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
        let layout = self.config.layout;
        let vector = layout.vector_bytes();
        (0..layout.parts.count() * usize::from(layout.kv_heads)).map(move |head| {
            let at = (head * usize::from(layout.block_tokens) + offset) * vector;
            at..at + vector
        })
    }

    fn write(&self, cell: &mut [u8], offset: usize, seed: u64) {
        let mut word = seed;
        for range in self.ranges(offset) {
            for bytes in cell[range].chunks_mut(8) {
                word = mix(word.wrapping_add(1));
                bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
            }
        }
    }

    fn read(&self, cell: &[u8], offset: usize, mut hash: u64) -> u64 {
        for range in self.ranges(offset) {
            for bytes in cell[range].chunks(8) {
                let mut word = [0; 8];
                word[..bytes.len()].copy_from_slice(bytes);
                hash = mix(hash.wrapping_mul(31) ^ u64::from_le_bytes(word));
            }
        }
        hash
    }
}

impl Engine for ChecksumEngine {
    fn step(&mut self, step: &Step, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<Sampled>, EngineError> {
        let ChecksumConfig { layout, vocab, max_positions, token_delay } = self.config;
        let limits = Limits { vocab: vocab as usize, positions: max_positions, slots: self.slab.slots() };
        check::step(step, &layout, limits)?;
        let mut hashes = vec![0u64; step.rows.len()];
        for layer in 0..layout.layers {
            for (hash, row) in hashes.iter_mut().zip(&step.rows) {
                *hash = mix(*hash ^ self.layer(row, layer.into()));
            }
            on_layer(layer);
        }
        let tokens: usize = step.rows.iter().map(|row| row.tokens.len()).sum();
        if !token_delay.is_zero() {
            std::thread::sleep(token_delay.saturating_mul(u32::try_from(tokens).unwrap_or(u32::MAX)));
        }
        let drawn = step.rows.iter().zip(hashes).filter(|(row, _)| row.sample.is_some());
        let token = |hash: u64| RESERVED_TOKENS + (hash % u64::from(vocab - RESERVED_TOKENS)) as TokenId;
        Ok(drawn.map(|(row, hash)| Sampled { attempt: row.attempt, token: token(hash), logprob: 0.0 }).collect())
    }
}
