//! What happens in a node beside its drive loop: the engine's thread computes, the tasks of arriving streams place cells.

use millrace_core::engine::{Row, Sampled};
use millrace_core::ids::{AttemptId, Generation};
use millrace_core::transfer::Span;
use millrace_core::transfer::gate::Place;

use super::Node;
use crate::event::{LinkNo, NodeEvent};
use crate::memory;

/// A cell on its way.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Its place.
    pub layer: u16,
    /// Its place.
    pub block: u32,
    /// What it holds.
    pub words: Vec<u64>,
    /// Digest of what it held when it left.
    pub digest: u64,
}

impl Node {
    /// The engine computes one layer of the step; the result after the last. Called by the engine, not by the drive loop.
    pub fn compute(&mut self, layer: u16) -> Option<Vec<Sampled>> {
        let (step, hashes, _) = self.step.as_mut().expect("the engine has a step");
        for (row, hashes) in step.rows.iter().zip(hashes.iter_mut()) {
            hashes.push(self.memory.compute(row, layer));
        }
        if layer + 1 < self.layers {
            return None;
        }
        let drawn = step.rows.iter().zip(&*hashes).filter(|(row, _)| row.sample.is_some());
        let sampled = |(row, hashes): (&Row, &Vec<u64>)| {
            let token = memory::token(hashes, self.vocab, row.sample.as_ref()?, row.draw_position());
            Some(Sampled { attempt: row.attempt, token, logprob: 0.0 })
        };
        Some(drawn.filter_map(sampled).collect())
    }

    /// Tokens of the step that the engine computes.
    #[must_use]
    pub fn step_tokens(&self) -> usize {
        self.step.iter().flat_map(|(step, ..)| &step.rows).map(|row| row.tokens.len()).sum()
    }

    /// A KV stream begins on a link; false when it may not write. Called by the stream, not by the drive loop.
    pub fn stream_opens(&mut self, link: LinkNo, attempt: AttemptId, generation: Generation, span: &Span) -> bool {
        let gate = self.gates.get_mut(&attempt).filter(|(asks, _)| *asks == link);
        let admitted = gate.is_some_and(|(_, gate)| gate.admit(generation, span));
        if !admitted {
            self.refused += 1;
            self.inbox.push_back(NodeEvent::Arrived(attempt));
        }
        admitted
    }

    /// A cell of a stream is there: copied to its place if it may be written; false when the stream is to be dropped.
    pub fn cell_arrives(&mut self, attempt: AttemptId, generation: Generation, cell: &Cell) -> bool {
        let Cell { layer, block, ref words, digest: expected } = *cell;
        let Some((_, gate)) = self.gates.get_mut(&attempt) else { return false };
        match gate.place(generation, layer, block) {
            Place::Write(slot, name) => {
                self.memory.place(slot, layer, words);
                gate.placed(layer, block, memory::digest(&name, layer, words), expected);
                gate.check();
                self.inbox.push_back(NodeEvent::Arrived(attempt));
                true
            }
            Place::Stands => true,
            Place::Closed => false,
        }
    }
}
