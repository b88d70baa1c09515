//! A gated feed-forward layer as one: `hidden += down(silu(gate(norm(hidden))) * up(norm(hidden)))`.
//!
//! Where blocks of a product pay, what is between the products never stands in memory as f32: each item of work computes 32 outputs of the gate,
//! rounds them and puts them where the second product reads them. Some hundred rows go through both products before the next, so that what is
//! between stays in the caches. Elsewhere it is two products with f32 between. A row's bits are the same either way.

use std::cell::RefCell;

use crate::buffer::Line;
use crate::isa::Isa;
use crate::lanes::{Kernel, Simd, run, silu};
use crate::matrix::{Matrix, Part};
use crate::multiply::{Block, Fetch, Multiply, NO_BLOCK, load};
use crate::product::{Into, Path, Products, ROWS_BLOCK, fetch, halves, path};
use crate::rows::{Forms, Norm, Rows, TILE_ROWS};
use crate::team::Parts;

/// Rows that go through both products at once: with more, what is between does not stay in the caches.
const ROWS: usize = 512;
/// From so many rows on blocks of a product pay without tiles, which cost as much for one row as for 16.
const LANES_ROWS: usize = 64;

impl Products {
    /// `gate_up`: gate, then up, two sources of equal size; `hidden`: `[rows, columns]`; `gated` is room for what is between, where it is f32.
    ///
    /// # Panics
    /// When the sizes do not fit.
    pub fn add_gated(&mut self, hidden: &mut [f32], norm: Norm<'_>, gate_up: &Matrix, down: &Matrix, gated: &mut Vec<f32>) {
        let (columns, width) = (gate_up.columns(), down.columns());
        assert!(down.rows() == columns && gate_up.rows() == 2 * width && hidden.len().is_multiple_of(columns));
        let count = hidden.len() / columns;
        let blocks = self.isa == Isa::Amx || count >= LANES_ROWS;
        if blocks && [gate_up, down].iter().all(|matrix| self.in_halves(matrix, count)) {
            for hidden in hidden.chunks_mut(ROWS * columns) {
                self.gate(hidden, norm, gate_up, width);
                self.add_halves(down, hidden);
            }
            return;
        }
        gated.resize(count * width, 0.0);
        self.multiply(hidden, Some(norm), gate_up, Into::SwiGlu(gated));
        self.multiply(gated, None, down, Into::Add(hidden));
    }

    /// Whether `count` rows are multiplied in bfloat16.
    fn in_halves(&self, matrix: &Matrix, count: usize) -> bool {
        matrix.parts.iter().all(|part| path(part.format, count, self.precision, false) == Path::Halves)
    }

    /// Fills what is between the products.
    fn gate(&mut self, hidden: &[f32], norm: Norm<'_>, gate_up: &Matrix, width: usize) {
        let Self { team, isa, rows, between, .. } = self;
        let forms = Forms { halves: true, ..Forms::default() };
        rows.fill(team, *isa, hidden, gate_up.columns(), Some(norm), forms);
        let out = &Parts::new(between.room(rows.count(), width));
        let [gate, up] = gate_up.parts.as_slice() else { panic!("a gate of {} sources", gate_up.parts.len()) };
        assert_eq!(gate.rows, up.rows);
        let (gate_up, steps) = ([gate, up], gate.panels().div_ceil(2));
        let items = steps * rows.count().div_ceil(ROWS_BLOCK);
        team.each(items, 1, |item| {
            let first = item / steps * ROWS_BLOCK;
            let (step, next) = (item % steps, (item + 1) % steps);
            let last = rows.count().min(first + ROWS_BLOCK);
            let item = Item { isa: *isa, rows, gate_up, step, next, first, last, steps, out };
            PANELS.with_borrow_mut(|scratch| run(*isa, Compute { item, scratch }));
        });
    }
}

thread_local! {
    /// Dequantised panels: of each of the two, gate and up.
    static PANELS: RefCell<[[Vec<Line>; 2]; 2]> = const { RefCell::new([[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]]) };
}

/// One step of the second product, 32 outputs of the gate, for up to [`ROWS_BLOCK`] rows.
struct Item<'a> {
    isa: Isa,
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
        let multiply = Multiply::new(item.isa);
        let count = (item.gate_up[0].panels() - 2 * item.step).min(2);
        let [first, second] = scratch;
        let panels = [item.panels(s, 0, first), item.panels(s, count - 1, second)];
        // Where there is one panel, what would be the second's stays zero.
        let mut sums = [NO_BLOCK; 2];
        for row in (item.first..item.last).step_by(2 * TILE_ROWS) {
            let tile = row / TILE_ROWS;
            let other = if row + TILE_ROWS < item.last { tile + 1 } else { tile };
            let rows = [item.rows.tile(tile), item.rows.tile(other)];
            for ((index, panels), sums) in panels.into_iter().enumerate().zip(&mut sums).take(count) {
                multiply.product(s, rows, panels, item.fetch(row, index), sums);
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

    fn fetch(&self, row: usize, index: usize) -> Fetch<'a> {
        let panel = (2 * self.next + index).min(self.gate_up[0].panels() - 1);
        fetch((row - self.first) / (2 * TILE_ROWS), self.gate_up.map(|part| (part, panel)))
    }

    /// One row.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn finish<S: Simd>(&self, s: S, row: usize, sums: &[Block; 2]) {
        let [first, second] = sums.each_ref().map(|sums| &sums[row % (2 * TILE_ROWS) / TILE_ROWS]);
        let row_in = row % TILE_ROWS;
        let first = s.mul(silu(s, load(s, &first[0][row_in])), load(s, &first[1][row_in]));
        let second = s.mul(silu(s, load(s, &second[0][row_in])), load(s, &second[1][row_in]));
        let at = (row / TILE_ROWS * self.steps + self.step) * TILE_ROWS + row % TILE_ROWS;
        // SAFETY: this row's line of this step; each step and block of rows is one item, and each item comes once.
        let line = unsafe { self.out.part(at..at + 1) };
        s.store_words(s.narrow(first, second), &mut line[0].0);
    }
}
