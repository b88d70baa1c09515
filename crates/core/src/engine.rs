//! What an engine is asked and what it answers. Two exist: the LibTorch one (`millrace-model`) and the `checksum` one for tests.

use alloc::string::String;
use alloc::vec::Vec;

use crate::ids::{AttemptId, Slot, TokenId};
use crate::planted::{Bug, planted};
use crate::sampling::Sampling;

/// One sequence's share of a step: compute `tokens` at positions `start..`, reading the KV of all earlier positions
/// through `table` and writing its own.
#[derive(Clone, Debug)]
pub struct Row {
    /// Whose row it is.
    pub attempt: AttemptId,
    /// The tokens to compute; not empty. One for a decoding sequence, a chunk for a prompt.
    pub tokens: Vec<TokenId>,
    /// Position of the first of them.
    pub start: u32,
    /// The block table: slot of block `i` of the sequence, long enough for `start + tokens.len()`.
    pub table: Vec<Slot>,
    /// Draw a token after the last row token; `None` while a prompt is unfinished.
    pub sample: Option<Sampling>,
}

impl Row {
    /// Position after the last token of this row: the position that a sampled token would take.
    #[must_use]
    pub fn end(&self) -> u32 {
        self.start + self.tokens.len() as u32
    }

    /// What counts a seeded draw ([`crate::sampling::uniform`]): the position that the token takes, however the sequence came to be here.
    #[must_use]
    pub fn draw_position(&self) -> u32 {
        if planted(Bug::DrawByStep) { self.tokens.len() as u32 } else { self.end() }
    }
}

/// One step over many sequences.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// The rows, in the order of the batch.
    pub rows: Vec<Row>,
}

/// A token that a step drew.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// For whom.
    pub attempt: AttemptId,
    /// The token, which takes position `Row::end`.
    pub token: TokenId,
    /// Natural log of its probability under the unmodified distribution.
    pub logprob: f32,
}

/// A step could not be computed. The sequences of the step are lost; the engine lives on.
#[derive(Debug, thiserror::Error)]
#[error("engine: {0}")]
pub struct EngineError(pub String);

/// Computes steps. `on_layer(l)` is called when the KV of layer `l` of every row stands in its cells, before layer `l + 1` begins,
/// so that the hand-over of one layer runs beside the computing of the next.
pub trait Engine: Send {
    /// Computes one step; one answer for each row that has `sample`, in row order.
    fn step(&mut self, step: &Step, on_layer: &mut dyn FnMut(u16)) -> Result<Vec<Sampled>, EngineError>;
}
