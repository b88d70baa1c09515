//! The turning of queries and keys by their positions: angles of a step, computed once and used in each layer.

use millrace_checkpoint::Rope;
use millrace_core::engine::Step;
use millrace_kernels::{Isa, rope};

/// How much a position turns.
pub(crate) struct Turn {
    inverse_frequencies: Vec<f32>,
    /// Cosines and sines are multiplied by this.
    scale: f32,
}

/// Cosines and sines of every token of a step, `[tokens, turned / 2]` each.
pub(crate) struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Turn {
    /// For heads of which `turned_dim` numbers are turned.
    pub(crate) fn new(rope: &Rope, turned_dim: usize) -> Self {
        Self { inverse_frequencies: rope.inverse_frequencies(turned_dim), scale: rope.turn_scale() }
    }

    /// The angles of a step's tokens.
    pub(crate) fn angles(&self, step: &Step) -> Angles {
        let frequencies = &self.inverse_frequencies;
        let positions = step.rows.iter().flat_map(|row| row.start..row.end());
        // The product is rounded to f32 before the cosine, as transformers does.
        let angles = positions.flat_map(|p| frequencies.iter().map(move |f| p as f32 * f));
        let turned = |angle: f32| {
            let (sin, cos) = angle.sin_cos();
            (sin * self.scale, cos * self.scale)
        };
        let (sin, cos) = angles.map(turned).unzip();
        Angles { cos, sin, half: frequencies.len() }
    }
}

impl Angles {
    /// Turns whole heads of token `token` in place.
    pub(crate) fn turn(&self, token: usize, heads: &mut [f32]) {
        let at = token * self.half..(token + 1) * self.half;
        rope::rotate(Isa::best(), heads, &self.cos[at.clone()], &self.sin[at]);
    }
}
