//! Blocks of a bfloat16 product: two tiles of 16 rows by two panels of 16 columns, in AMX tiles where there are some, else in vector registers.
//! Each sum is over the pairs of columns in their order, so a row's bits depend on the instruction set alone.

use std::slice::from_ref;

use crate::buffer::Line;
use crate::isa::Isa;
use crate::lanes::{LANES, Simd, call_for, call_near};

/// Results of one product, `[2 tiles, 2 panels, 16 rows, 16 columns]` in f32.
pub(crate) type Block = [[[Line; LANES]; 2]; 2];

/// All zeroes.
pub(crate) const NO_BLOCK: Block = [[[Line([0; LANES]); LANES]; 2]; 2];

/// A line of results.
#[inline(always)]
pub(crate) fn load<S: Simd>(s: S, line: &Line) -> S::V {
    s.load(bytemuck::cast_ref(&line.0))
}

/// What a product in tiles calls for on its way, besides what it reads.
#[derive(Clone, Copy)]
pub(crate) enum Fetch<'a> {
    /// Nothing: all it reads is near.
    Nothing,
    /// Its own panels, some steps before it reads them.
    Own,
    /// What a later product reads, into the second-level cache: [`LATER_LINES`] of each for every step.
    Later([&'a [Line]; 2]),
}

/// Lines of a panel that a step calls for.
pub(crate) const LATER_LINES: usize = 2;

/// Multiplies blocks.
pub(crate) struct Multiply {
    #[cfg(target_arch = "x86_64")]
    tiles: Option<crate::tiles::Tiles>,
}

impl Multiply {
    /// With tiles where `isa` has them.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn new(isa: Isa) -> Self {
        Self { tiles: if isa == Isa::Amx { crate::tiles::Tiles::take() } else { None } }
    }

    /// Without tiles: they are not known here.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn new(_isa: Isa) -> Self {
        Self {}
    }

    /// `c[i][j] = a[i] b[j]`. `a[i]`: `[steps, 16 rows, 32 bf16]`; `b[j]`: `[steps, 16 pairs, 16 columns, 2 bf16]`. Where the second of `a` or `b` is
    /// the first again, what then stands for it in `c` means nothing.
    ///
    /// # Panics
    /// When the lengths differ or are not whole steps.
    #[inline(always)]
    pub(crate) fn product<S: Simd>(&self, s: S, a: [&[Line]; 2], b: [&[Line]; 2], fetch: Fetch<'_>, c: &mut Block) {
        #[cfg(target_arch = "x86_64")]
        if let Some(tiles) = &self.tiles {
            return tiles.product(a, b, fetch, c);
        }
        let _ = fetch;
        *c = NO_BLOCK;
        by_lanes(s, a, b, c);
    }

    /// `c[i][j] += a[i] b[j]`, else as [`Self::product`].
    ///
    /// # Panics
    /// When the lengths differ or are not whole steps.
    #[inline(always)]
    pub(crate) fn add_product<S: Simd>(&self, s: S, a: [&[Line]; 2], b: [&[Line]; 2], c: &mut Block) {
        #[cfg(target_arch = "x86_64")]
        if let Some(tiles) = &self.tiles {
            return tiles.add_product(a, b, c);
        }
        by_lanes(s, a, b, c);
    }
}

/// As tiles would, with as many rows at a time as keep their sums in registers.
#[inline(always)]
fn by_lanes<S: Simd>(s: S, a: [&[Line]; 2], b: [&[Line]; 2], c: &mut Block) {
    let lines = a[0].len();
    assert!(lines.is_multiple_of(LANES) && [a[1], b[0], b[1]].iter().all(|x| x.len() == lines));
    let tiles = if std::ptr::eq(a[0], a[1]) { 1 } else { 2 };
    for (a, c) in a.into_iter().zip(c).take(tiles) {
        for first in (0..LANES).step_by(S::ROWS) {
            match S::ROWS {
                8 => add_rows::<S, 8>(s, a, b, c, first),
                4 => add_rows::<S, 4>(s, a, b, c, first),
                2 => add_rows::<S, 2>(s, a, b, c, first),
                _ => add_rows::<S, 1>(s, a, b, c, first),
            }
        }
    }
}

/// `R` rows of a tile, from `first` on, times two panels, added to what stands in `c`.
#[inline(always)]
fn add_rows<S: Simd, const R: usize>(s: S, a: &[Line], b: [&[Line]; 2], c: &mut [[Line; LANES]; 2], first: usize) {
    let mut sums = [[s.splat(0.0); 2]; R];
    for r in 0..R {
        sums[r] = [load(s, &c[0][first + r]), load(s, &c[1][first + r])];
    }
    let sums = rows_by_lanes(s, a, b, first, Later::NONE, sums);
    for r in 0..R {
        s.store(sums[r][0], bytemuck::cast_mut(&mut c[0][first + r].0));
        s.store(sums[r][1], bytemuck::cast_mut(&mut c[1][first + r].0));
    }
}

/// Lines of two panels that are read later, called for bit by bit meanwhile: many at a time would wait for one another.
#[derive(Clone, Copy)]
pub(crate) struct Later<'a> {
    lines: [&'a [Line]; 2],
    /// Lines of each for one step.
    each: usize,
    /// Into the second cache: the first is for what is read now.
    to_second: bool,
}

impl<'a> Later<'a> {
    /// Nothing.
    const NONE: Self = Self { lines: [&[], &[]], each: 0, to_second: false };

    /// Lines for so many steps.
    #[inline(always)]
    pub(crate) fn new(lines: [&'a [Line]; 2], steps: usize, to_second: bool) -> Self {
        Self { lines, each: lines[0].len().max(lines[1].len()).div_ceil(steps), to_second }
    }

    /// Takes what the next step calls for.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Self {
        let mut next = *self;
        for p in 0..2 {
            (next.lines[p], self.lines[p]) = self.lines[p].split_at(self.each.min(self.lines[p].len()));
        }
        next
    }

    /// Calls for all of it.
    #[inline(always)]
    pub(crate) fn call_all(self) {
        let [left, right] = self.lines;
        if self.to_second {
            call_near(left);
            call_near(right);
        } else {
            call_for(left);
            call_for(right);
        }
    }

    /// Calls for line `i` of each, where there is one.
    #[inline(always)]
    pub(crate) fn call(self, i: usize) {
        for lines in self.lines {
            match lines.get(i) {
                Some(line) if self.to_second => call_near(from_ref(line)),
                Some(line) => call_for(from_ref(line)),
                None => (),
            }
        }
    }
}

/// `sums` and the products of `R` rows of a tile, from `first` on, with two panels. Calls for `later`, some of it with each step.
#[inline(always)]
pub(crate) fn rows_by_lanes<S: Simd, const R: usize>(
    s: S,
    a: &[Line],
    b: [&[Line]; 2],
    first: usize,
    mut later: Later<'_>,
    mut sums: [[S::V; 2]; R],
) -> [[S::V; 2]; R] {
    let (a, left, right) = (a.as_chunks().0, b[0].as_chunks().0, b[1].as_chunks().0);
    for ((a, left), right) in a.iter().zip(left).zip(right) {
        add_step(s, a, [left, right], first, later.next(), &mut sums);
    }
    sums
}

/// One step of [`rows_by_lanes`].
#[inline(always)]
fn add_step<S: Simd, const R: usize>(
    s: S,
    a: &[Line; LANES],
    b: [&[Line; LANES]; 2],
    first: usize,
    later: Later<'_>,
    sums: &mut [[S::V; 2]; R],
) {
    #[allow(clippy::needless_range_loop, reason = "iterators over both panels become twice as many instructions")]
    for i in 0..LANES {
        later.call(i);
        let columns = [s.words(&b[0][i].0), s.words(&b[1][i].0)];
        for r in 0..R {
            let row = a[first + r].0[i];
            sums[r] = [s.dot_halves(sums[r][0], columns[0], row), s.dot_halves(sums[r][1], columns[1], row)];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_called_for_once() {
        let lines: Vec<Line> = (0..40).map(|i| Line([i; LANES])).collect();
        for (left, right, steps) in [(40, 40, 5), (40, 7, 3), (0, 1, 9), (5, 5, 18), (0, 0, 4)] {
            let mut later = Later::new([&lines[..left], &lines[..right]], steps, true);
            let mut called = [Vec::new(), Vec::new()];
            for _ in 0..steps {
                for (called, lines) in called.iter_mut().zip(later.next().lines) {
                    called.extend(lines.iter().map(|line| line.0[0] as usize));
                }
            }
            assert_eq!(
                called,
                [(0..left).collect::<Vec<_>>(), (0..right).collect::<Vec<_>>()],
                "{left} and {right} lines in {steps} steps"
            );
        }
    }
}
