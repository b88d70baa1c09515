//! A gated feed-forward layer as one: `hidden += down(silu(gate(norm(hidden))) * up(norm(hidden)))`.
//!
//! Where tiles multiply, what is between the products never stands in memory as f32: each item of work computes 32 outputs of the gate, rounds them
//! and puts them where the second product reads them. Some hundred rows go through both products before the next, so that what is between
//! stays in the caches. Elsewhere it is two products with f32 between. A row's bits are the same either way.

#[cfg(target_arch = "x86_64")]
use crate::isa::Isa;
use crate::matrix::Matrix;
use crate::product::{Into, Products};
#[cfg(target_arch = "x86_64")]
use crate::product::{Path, path};
use crate::rows::Norm;

/// Rows that go through both products at once: with more, what is between does not stay in the caches.
#[cfg(target_arch = "x86_64")]
const ROWS: usize = 512;

impl Products {
    /// `gate_up`: gate, then up, two sources of equal size; `hidden`: `[rows, columns]`; `gated` is room for what is between, where it is f32.
    ///
    /// # Panics
    /// When the sizes do not fit.
    pub fn add_gated(&mut self, hidden: &mut [f32], norm: Norm<'_>, gate_up: &Matrix, down: &Matrix, gated: &mut Vec<f32>) {
        let (columns, width) = (gate_up.columns(), down.columns());
        assert!(down.rows() == columns && gate_up.rows() == 2 * width && hidden.len().is_multiple_of(columns));
        let count = hidden.len() / columns;
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Amx && [gate_up, down].iter().all(|matrix| self.in_halves(matrix, count)) {
            for hidden in hidden.chunks_mut(ROWS * columns) {
                tiles::gate(self, hidden, norm, gate_up, width);
                self.add_halves(down, hidden);
            }
            return;
        }
        gated.resize(count * width, 0.0);
        self.multiply(hidden, Some(norm), gate_up, Into::SwiGlu(gated));
        self.multiply(gated, None, down, Into::Add(hidden));
    }

    /// Whether `count` rows are multiplied in bfloat16.
    #[cfg(target_arch = "x86_64")]
    fn in_halves(&self, matrix: &Matrix, count: usize) -> bool {
        matrix.parts.iter().all(|part| path(part.format, count, self.precision, false) == Path::Halves)
    }
}

#[cfg(target_arch = "x86_64")]
mod tiles {
    use std::cell::RefCell;

    use super::*;
    use crate::buffer::Line;
    use crate::lanes::{Kernel, Simd, run, silu};
    use crate::matrix::Part;
    use crate::product::{ROWS_BLOCK, fetch, grain, halves, next};
    use crate::rows::{Forms, Rows, TILE_ROWS};
    use crate::team::Parts;
    use crate::tiles::Tiles;

    /// Fills what is between the products.
    pub(super) fn gate(products: &mut Products, hidden: &[f32], norm: Norm<'_>, gate_up: &Matrix, width: usize) {
        let Products { team, isa, rows, between, .. } = products;
        let forms = Forms { halves: true, ..Forms::default() };
        rows.fill(team, *isa, hidden, gate_up.columns(), Some(norm), forms);
        let out = &Parts::new(between.room(rows.count(), width));
        let [gate, up] = gate_up.parts.as_slice() else { panic!("a gate of {} sources", gate_up.parts.len()) };
        assert_eq!(gate.rows, up.rows);
        let (gate_up, steps) = ([gate, up], gate.panels().div_ceil(2));
        let items = steps * rows.count().div_ceil(ROWS_BLOCK);
        let grain = grain(team, items);
        team.each(items, grain, |item| {
            let first = item / steps * ROWS_BLOCK;
            let (step, next) = (item % steps, next(team, grain, item) % steps);
            let item = Item { rows, gate_up, step, next, first, last: rows.count().min(first + ROWS_BLOCK), steps, out };
            PANELS.with_borrow_mut(|scratch| run(*isa, Compute { item, scratch }));
        });
    }

    thread_local! {
        /// Dequantised panels: of each of the two, gate and up.
        static PANELS: RefCell<[[Vec<Line>; 2]; 2]> = const { RefCell::new([[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]]) };
    }

    /// One step of the second product, 32 outputs of the gate, for up to [`ROWS_BLOCK`] rows.
    struct Item<'a> {
        rows: &'a Rows,
        gate_up: [&'a Part; 2],
        step: usize,
        /// The step that comes after it.
        next: usize,
        first: usize,
        last: usize,
        /// All steps.
        steps: usize,
        /// `[tiles of 16 rows, steps, 16 rows]`.
        out: &'a Parts<'a, Line>,
    }

    struct Compute<'a> {
        item: Item<'a>,
        scratch: &'a mut [[Vec<Line>; 2]; 2],
    }

    impl Kernel for Compute<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self { item, scratch } = self;
            let Some(tiles) = Tiles::take() else { unreachable!("who asks for tiles has seen that they are there") };
            let count = (item.gate_up[0].panels() - 2 * item.step).min(2);
            let [first, second] = scratch;
            let panels = [item.panels(s, 0, first), item.panels(s, count - 1, second)];
            // Where there is one panel, what would be the second's stays zero.
            let mut sums = [[[[Line([0; 16]); TILE_ROWS]; 2]; 2]; 2];
            for row in (item.first..item.last).step_by(2 * TILE_ROWS) {
                let tile = row / TILE_ROWS;
                let other = if row + TILE_ROWS < item.last { tile + 1 } else { tile };
                let rows = [item.rows.tile(tile), item.rows.tile(other)];
                for ((index, panels), sums) in panels.into_iter().enumerate().zip(&mut sums).take(count) {
                    tiles.product(rows, panels, item.fetch(row, index), sums);
                }
                for row in row..item.last.min(row + 2 * TILE_ROWS) {
                    item.finish(s, row, &sums);
                }
            }
        }
    }

    impl<'a> Item<'a> {
        /// Gate and up of the step's panel `index`.
        #[inline(always)]
        fn panels<S: Simd>(&self, s: S, index: usize, scratch: &'a mut [Vec<Line>; 2]) -> [&'a [Line]; 2] {
            let (panel, [gate, up]) = (2 * self.step + index, scratch);
            [halves(s, self.gate_up[0], panel, gate), halves(s, self.gate_up[1], panel, up)]
        }

        fn fetch(&self, row: usize, index: usize) -> crate::tiles::Fetch<'a> {
            let panel = (2 * self.next + index).min(self.gate_up[0].panels() - 1);
            fetch((row - self.first) / (2 * TILE_ROWS), self.gate_up.map(|part| (part, panel)))
        }

        /// One row.
        #[inline(always)]
        #[allow(unsafe_code)]
        fn finish<S: Simd>(&self, s: S, row: usize, sums: &[[[[Line; TILE_ROWS]; 2]; 2]; 2]) {
            let of = |index: usize, part: usize| &sums[index][row % (2 * TILE_ROWS) / TILE_ROWS][part][row % TILE_ROWS].0;
            let load = |index, part| s.load(bytemuck::cast_ref(of(index, part)));
            let gated = [s.mul(silu(s, load(0, 0)), load(0, 1)), s.mul(silu(s, load(1, 0)), load(1, 1))];
            let at = (row / TILE_ROWS * self.steps + self.step) * TILE_ROWS + row % TILE_ROWS;
            // SAFETY: this row's line of this step; each step and block of rows is one item, and each item comes once.
            let line = unsafe { self.out.part(at..at + 1) };
            s.store_words(s.narrow(gated[0], gated[1]), &mut line[0].0);
        }
    }
}
