//! `y = x W^T`: products of prepared rows with a packed matrix, for few rows and for many. Decides which kernel multiplies and in which order.
//!
//! Every output is one sum over the columns in one order, whatever the number of rows, of threads, and of outputs beside it. Only the *form* of the
//! activations depends on the number of rows, by [`Precision`]: what is batch-invariant there is batch-invariant here.
//!
//! | weights | exact | else |
//! |---|---|---|
//! | f32 | f32 | f32 |
//! | bf16 | f32 | bf16: AMX tiles, `vdpbf16ps`, or f32 on rounded numbers |
//! | quantised | f32 on dequantised panels | up to `bytes_rows_max` rows 8-bit dot products (VNNI); above, dequantised panels in bf16 |

use std::cell::RefCell;
use std::ops::Range;

use crate::buffer::Line;
use crate::isa::Isa;
use crate::lanes::{Kernel, LANES, Simd, claim, run, silu};
use crate::matrix::{BLOCK, Format, InF32, InHalves, Matrix, Part};
use crate::multiply::{Fetch, LATER_LINES, Later, Multiply, NO_BLOCK, load, rows_by_lanes};
use crate::rows::{Forms, Norm, Rows, TILE_ROWS};
use crate::team::{Parts, Team};

/// Rows that one item of work has at most: of 2,048 columns they are half of a second-level cache of 2 MiB.
pub(crate) const ROWS_BLOCK: usize = 256;
/// Up to so many rows it counts that panels and outputs are far away: items without tiles call for panels of the next, and claim the outputs.
const FAR_ROWS_MAX: usize = 64;
/// Up to so many rows what is called for goes into the second cache: it is more than the first holds, and soon read.
const SECOND_ROWS_MAX: usize = 8;
/// Lines of a panel up to which rows in one pass call for the next item's: what is longer the processor foresees by itself, and is not to be disturbed.
const SHORT_LINES_MAX: usize = 1024;

/// How a product may round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Activations stay in f32 and weights are what their bytes say.
    pub exact: bool,
    /// With quantised weights: up to so many rows activations are 8-bit numbers with a scale for 32; above, weights and activations are rounded
    /// to bfloat16. 0 or [`usize::MAX`] make it independent of the number of rows.
    pub bytes_rows_max: usize,
}

/// Where a product goes.
#[derive(Debug)]
pub enum Into<'a> {
    /// `out = y`, `[rows, outputs]`.
    Set(&'a mut [f32]),
    /// `out += y`, `[rows, outputs]`.
    Add(&'a mut [f32]),
    /// `out = silu(y0) y1` where the matrix is two sources of equal size: `[rows, outputs / 2]`.
    SwiGlu(&'a mut [f32]),
}

/// What computes products: threads, instruction set, rounding, and room for activations.
pub struct Products {
    pub(crate) team: Team,
    pub(crate) isa: Isa,
    pub(crate) precision: Precision,
    pub(crate) rows: Rows,
    /// What is between two products, as the second reads it.
    pub(crate) between: Rows,
}

impl Products {
    /// On `threads` threads, with `isa`.
    #[must_use]
    pub fn new(threads: usize, isa: Isa, precision: Precision) -> Self {
        let isa = if isa.is_available() { isa } else { Isa::Portable };
        Self { team: Team::new(threads), isa, precision, rows: Rows::default(), between: Rows::default() }
    }

    /// The threads.
    #[must_use]
    pub fn team(&self) -> &Team {
        &self.team
    }

    /// The instruction set.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// How it rounds.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// `norm(x) W^T`, or `x W^T` without one. `x`: `[rows, columns]`.
    ///
    /// # Panics
    /// When the lengths do not fit, or [`Into::SwiGlu`] meets a matrix that is not two sources of equal size.
    pub fn multiply(&mut self, x: &[f32], norm: Option<Norm<'_>>, matrix: &Matrix, out: Into<'_>) {
        let count = x.len() / matrix.columns();
        let (kind, data) = match out {
            Into::Set(data) => (Kind::Set, data),
            Into::Add(data) => (Kind::Add, data),
            Into::SwiGlu(data) => (Kind::SwiGlu, data),
        };
        let pairs = kind.pairs(matrix);
        let mixed = kind == Kind::SwiGlu && matrix.parts[0].format != matrix.parts[1].format;
        let forms = forms(matrix, count, self.precision, mixed);
        self.rows.fill(&self.team, self.isa, x, matrix.columns(), norm, forms);
        let width = if kind == Kind::SwiGlu { matrix.rows() / 2 } else { matrix.rows() };
        assert_eq!(data.len(), count * width, "{count} rows of {width} outputs");
        let Self { team, isa, rows, precision, .. } = self;
        let (isa, precision, out) = (*isa, *precision, &Parts::new(data));
        Call { isa, rows, matrix, precision, mixed, kind, width, out }.run(team, pairs);
    }

    /// `out += rows W^T`, rows in bfloat16.
    pub(crate) fn add_halves(&mut self, matrix: &Matrix, out: &mut [f32]) {
        let Self { team, isa, between: rows, precision, .. } = self;
        assert_eq!(out.len(), rows.count() * matrix.rows());
        let (kind, width, out) = (Kind::Add, matrix.rows(), &Parts::new(out));
        // Whoever filled the rows has decided, maybe for more rows than these.
        let precision = Precision { bytes_rows_max: 0, ..*precision };
        let call = Call { isa: *isa, rows, matrix, precision, mixed: false, kind, width, out };
        call.run(team, kind.pairs(matrix));
    }
}

/// How a part is multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    Plain,
    Halves,
    Bytes,
}

/// `mixed`: two formats meet in one pair of panels and must be multiplied alike.
pub(crate) fn path(format: Format, count: usize, precision: Precision, mixed: bool) -> Path {
    match format {
        _ if precision.exact => Path::Plain,
        _ if mixed => Path::Halves,
        Format::F32 => Path::Plain,
        Format::Bf16 => Path::Halves,
        _ if count <= precision.bytes_rows_max => Path::Bytes,
        _ => Path::Halves,
    }
}

fn forms(matrix: &Matrix, count: usize, precision: Precision, mixed: bool) -> Forms {
    let any = |wanted| matrix.parts.iter().any(|part| path(part.format, count, precision, mixed) == wanted);
    Forms { plain: any(Path::Plain), halves: any(Path::Halves), bytes: any(Path::Bytes) }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Set,
    Add,
    SwiGlu,
}

impl Kind {
    /// Pairs of panels that a product has.
    fn pairs(self, matrix: &Matrix) -> usize {
        match (self, matrix.parts.as_slice()) {
            (Self::SwiGlu, [gate, up]) if gate.rows == up.rows => gate.panels(),
            (Self::SwiGlu, parts) => panic!("SwiGLU of {} sources of unequal size", parts.len()),
            (_, parts) => parts.iter().map(|part| part.panels().div_ceil(2)).sum(),
        }
    }
}

/// One product.
struct Call<'a> {
    isa: Isa,
    rows: &'a Rows,
    matrix: &'a Matrix,
    precision: Precision,
    mixed: bool,
    kind: Kind,
    width: usize,
    out: &'a Parts<'a, f32>,
}

/// Two panels that are computed together, or twice the same.
#[derive(Clone, Copy)]
struct Pair<'a> {
    parts: [&'a Part; 2],
    panels: [usize; 2],
    alone: bool,
}

impl Call<'_> {
    /// All of it, in items of a pair of panels and a block of rows.
    fn run(&self, team: &Team, pairs: usize) {
        let items = pairs * self.rows.count().div_ceil(ROWS_BLOCK);
        team.each(items, 1, |item| self.item(item % pairs, item / pairs * ROWS_BLOCK, (item + 1) % pairs));
    }

    fn pair(&self, mut index: usize) -> Pair<'_> {
        let parts = &self.matrix.parts;
        if self.kind == Kind::SwiGlu {
            return Pair { parts: [&parts[0], &parts[1]], panels: [index; 2], alone: false };
        }
        for part in parts {
            let pairs = part.panels().div_ceil(2);
            if index < pairs {
                let last = (2 * index + 1).min(part.panels() - 1);
                return Pair { parts: [part; 2], panels: [2 * index, last], alone: last == 2 * index };
            }
            index -= pairs;
        }
        unreachable!("an item of a product is one of its pairs")
    }

    /// One pair of panels for up to [`ROWS_BLOCK`] rows from `first` on; the pair that this thread probably has next.
    fn item(&self, pair: usize, first: usize, next: usize) {
        let last = self.rows.count().min(first + ROWS_BLOCK);
        let (pair, next) = (self.pair(pair), self.pair(next));
        let start = |index: usize| pair.parts[index].first + pair.panels[index] * LANES;
        let width = |index: usize| LANES.min(pair.parts[index].rows - pair.panels[index] * LANES);
        let second = if self.kind == Kind::SwiGlu || pair.alone { 0 } else { width(1) };
        let far = [0, 1].map(|index| Far::new(next.parts[index].panel(next.panels[index]), last - first));
        let item = Item { call: self, pair, next, far, first, last, outputs: start(0)..start(0) + width(0) + second };
        PANELS.with_borrow_mut(|scratch| run(self.isa, Compute { item, scratch }));
    }
}

thread_local! {
    /// Two dequantised panels.
    static PANELS: RefCell<[Vec<Line>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// One item of work.
struct Item<'a> {
    call: &'a Call<'a>,
    pair: Pair<'a>,
    /// What comes after it.
    next: Pair<'a>,
    /// What of it is far away.
    far: [Far<'a>; 2],
    first: usize,
    last: usize,
    /// Outputs of a row that it computes, at most two panels.
    outputs: Range<usize>,
}

/// A panel that rows of the item before it call for.
#[derive(Clone, Copy)]
struct Far<'a> {
    lines: &'a [Line],
    /// How many of them each row calls for.
    each: usize,
}

impl<'a> Far<'a> {
    /// None of it where there are so many rows that the wait for it does not count.
    fn new(panel: &'a [Line], rows: usize) -> Self {
        let lines = if rows <= FAR_ROWS_MAX { panel } else { &[] };
        Self { lines, each: lines.len().div_ceil(rows) }
    }
}

struct Compute<'a> {
    item: Item<'a>,
    scratch: &'a mut [Vec<Line>; 2],
}

impl Kernel for Compute<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { item, scratch } = self;
        let (call, pair) = (item.call, item.pair);
        match path(pair.parts[0].format, call.rows.count(), call.precision, call.mixed) {
            Path::Plain => {
                let [a, b] = scratch;
                let panels = [plain(s, &pair, 0, a), plain(s, &pair, 1, b)];
                item.sweep(s, Plain { rows: call.rows, panels });
            }
            Path::Halves => {
                let [a, b] = scratch;
                let [first, second] = pair.panels;
                item.halves(s, [halves(s, pair.parts[0], first, a), halves(s, pair.parts[1], second, b)]);
            }
            Path::Bytes => match pair.parts[0].format {
                Format::Q8_0 => item.sweep(s, Bytes::<8, false>(&item)),
                Format::Q4_0 => item.sweep(s, Bytes::<4, false>(&item)),
                _ => item.sweep(s, Bytes::<4, true>(&item)),
            },
        }
    }
}

/// A panel in f32, as it stands or dequantised.
#[inline(always)]
fn plain<'a, S: Simd>(s: S, pair: &Pair<'a>, index: usize, scratch: &'a mut Vec<Line>) -> &'a [Line] {
    let (part, panel) = (pair.parts[index], pair.panels[index]);
    if part.format == Format::F32 {
        return part.panel(panel);
    }
    scratch.resize(part.steps * BLOCK, Line([0; 16]));
    part.unpack(s, panel, &mut InF32(scratch));
    scratch
}

/// A panel in bfloat16, as it stands or dequantised.
#[inline(always)]
pub(crate) fn halves<'a, S: Simd>(s: S, part: &'a Part, panel: usize, scratch: &'a mut Vec<Line>) -> &'a [Line] {
    if part.format == Format::Bf16 {
        return part.panel(panel);
    }
    scratch.resize(part.steps * BLOCK / 2, Line([0; 16]));
    part.unpack(s, panel, &mut InHalves(scratch));
    scratch
}

/// The sums of up to 8 rows with the panels of a pair.
trait Inner: Copy {
    /// Kinds of sums that share the registers.
    fn share(self) -> usize {
        1
    }
    /// Sums of `R` rows from `row` on with both panels.
    fn tile<S: Simd, const R: usize>(self, s: S, row: usize) -> [[S::V; 2]; R];
}

impl<'a> Item<'a> {
    /// What `R` rows from `row` on call for: their share of the lines of the next item's panels, or nothing of long ones where they are all of the item.
    #[inline(always)]
    fn later<const R: usize>(&self, row: usize) -> Later<'a> {
        let Item { far, first, last, .. } = *self;
        let share = |p: usize| {
            let Far { lines, each } = far[p];
            let lines = if R == last - first && lines.len() > SHORT_LINES_MAX { &[] } else { lines };
            let rest = &lines[lines.len().min((row - first) * each)..];
            &rest[..rest.len().min(R * each)]
        };
        Later::new([share(0), share(1)], self.call.rows.steps(), last - first <= SECOND_ROWS_MAX)
    }

    #[inline(always)]
    fn sweep<S: Simd>(&self, s: S, inner: impl Inner) {
        let mut row = self.first;
        while row < self.last {
            let fits = |rows, share| S::ROWS / share >= rows && self.last - row >= rows;
            row += match inner.share() {
                share if fits(8, share) => self.tile::<S, _, 8>(s, inner, row),
                share if fits(4, share) => self.tile::<S, _, 4>(s, inner, row),
                share if fits(2, share) => self.tile::<S, _, 2>(s, inner, row),
                _ => self.tile::<S, _, 1>(s, inner, row),
            };
        }
    }

    #[inline(always)]
    fn tile<S: Simd, I: Inner, const R: usize>(&self, s: S, inner: I, row: usize) -> usize {
        if self.last - self.first <= FAR_ROWS_MAX {
            for r in 0..R {
                claim(self.out(row + r));
            }
        }
        let sums = inner.tile::<S, R>(s, row);
        for (r, sums) in sums.into_iter().enumerate() {
            self.finish(s, row + r, sums);
        }
        R
    }

    /// bfloat16: in tiles where there are some.
    #[inline(always)]
    fn halves<S: Simd>(&self, s: S, panels: [&[Line]; 2]) {
        match self.call.isa {
            Isa::Amx => self.in_tiles(s, panels),
            _ => self.sweep(s, Halves { rows: self.call.rows, panels, item: self }),
        }
    }

    #[inline(always)]
    fn in_tiles<S: Simd>(&self, s: S, panels: [&[Line]; 2]) {
        let (multiply, mut sums) = (Multiply::new(self.call.isa), NO_BLOCK);
        for first in (self.first..self.last).step_by(2 * TILE_ROWS) {
            let tile = first / TILE_ROWS;
            let next = if first + TILE_ROWS < self.last { tile + 1 } else { tile };
            let rows = [self.call.rows.tile(tile), self.call.rows.tile(next)];
            for row in first..self.last.min(first + 2 * TILE_ROWS) {
                claim(self.out(row));
            }
            multiply.product(s, rows, panels, self.fetch(first), &mut sums);
            for row in first..self.last.min(first + 2 * TILE_ROWS) {
                let [left, right] = &sums[(row - first) / TILE_ROWS];
                self.finish(s, row, [load(s, &left[row % TILE_ROWS]), load(s, &right[row % TILE_ROWS])]);
            }
        }
    }

    /// The first rows call for the panels they read, later ones for a part of the next item's.
    fn fetch(&self, row: usize) -> Fetch<'_> {
        let later = |index: usize| (self.next.parts[index], self.next.panels[index]);
        fetch((row - self.first) / (2 * TILE_ROWS), [later(0), later(1)])
    }

    /// Where a row's outputs go.
    #[inline(always)]
    #[allow(
        unsafe_code,
        clippy::mut_from_ref,
        reason = "items share nothing, and an item asks for a row again only when it has let go of it"
    )]
    fn out(&self, row: usize) -> &mut [f32] {
        let start = row * self.call.width;
        // SAFETY: outputs of this row and item; each pair of panels and block of rows is one item, and each item comes once.
        unsafe { self.call.out.part(start + self.outputs.start..start + self.outputs.end) }
    }

    /// One row of the result.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, row: usize, sums: [S::V; 2]) {
        let out = self.out(row);
        if self.call.kind == Kind::SwiGlu {
            return put(s, false, s.mul(silu(s, sums[0]), sums[1]), out);
        }
        let (first, second) = out.split_at_mut(LANES.min(out.len()));
        let add = self.call.kind == Kind::Add;
        put(s, add, sums[0], first);
        if !second.is_empty() {
            put(s, add, sums[1], second);
        }
    }
}

/// What the two tiles of rows `turn` of an item call for: the first for the panels they read, later ones for a part of those that come next. Panels that
/// are dequantised on the way are near already.
pub(crate) fn fetch<'a>(turn: usize, next: [(&'a Part, usize); 2]) -> Fetch<'a> {
    if next.iter().any(|(part, _)| part.format != Format::Bf16) {
        return Fetch::Nothing;
    }
    let Some(turn) = turn.checked_sub(1) else { return Fetch::Own };
    match next.map(|(part, panel)| part.panel(panel).get(turn * part.steps * LATER_LINES..)) {
        [Some(first), Some(second)] => Fetch::Later([first, second]),
        _ => Fetch::Nothing,
    }
}

/// Up to [`LANES`] results.
#[inline(always)]
pub(crate) fn put<S: Simd>(s: S, add: bool, value: S::V, out: &mut [f32]) {
    if let Some(out) = out.as_mut_array::<LANES>() {
        let value = if add { s.add(s.load(out), value) } else { value };
        return s.store(value, out);
    }
    let mut lanes = [0.0; LANES];
    s.store(value, &mut lanes);
    out.iter_mut().zip(lanes).for_each(|(out, value)| *out = if add { *out + value } else { value });
}

/// f32 by f32.
#[derive(Clone, Copy)]
struct Plain<'a> {
    rows: &'a Rows,
    panels: [&'a [Line]; 2],
}

impl Inner for Plain<'_> {
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(self, s: S, row: usize) -> [[S::V; 2]; R] {
        let columns = self.rows.steps() * BLOCK;
        let panels: [&[Line]; 2] = std::array::from_fn(|p| &self.panels[p][..columns]);
        let x: [&[f32]; R] = std::array::from_fn(|r| &self.rows.plain(row + r)[..columns]);
        let mut sums = [[s.splat(0.0); 2]; R];
        for i in 0..columns {
            let weights = [s.load(bytemuck::cast_ref(&panels[0][i].0)), s.load(bytemuck::cast_ref(&panels[1][i].0))];
            for r in 0..R {
                let x = s.splat(x[r][i]);
                for p in 0..2 {
                    sums[r][p] = s.fma(weights[p], x, sums[r][p]);
                }
            }
        }
        sums
    }
}

/// bfloat16 by bfloat16.
#[derive(Clone, Copy)]
struct Halves<'a> {
    rows: &'a Rows,
    panels: [&'a [Line]; 2],
    item: &'a Item<'a>,
}

impl Inner for Halves<'_> {
    /// Rows that are computed together stand in one tile: both begin at a multiple of their number.
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(self, s: S, row: usize) -> [[S::V; 2]; R] {
        let nothing = [[s.splat(0.0); 2]; R];
        rows_by_lanes(s, self.rows.tile(row / TILE_ROWS), self.panels, row % TILE_ROWS, self.item.later::<R>(row), nothing)
    }
}

/// Quantised weights by bytes: `LINES` lines of numbers for a block, with minima where `MIN`.
#[derive(Clone, Copy)]
struct Bytes<'a, const LINES: usize, const MIN: bool>(&'a Item<'a>);

impl<const LINES: usize, const MIN: bool> Inner for Bytes<'_, LINES, MIN> {
    /// Sums of whole numbers and of floats.
    #[inline(always)]
    fn share(self) -> usize {
        2
    }

    /// Plain loops over indices: iterators over both panels, and arrays made by closures, become calls and jumps in the innermost loop.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "said above")]
    fn tile<S: Simd, const R: usize>(self, s: S, row: usize) -> [[S::V; 2]; R] {
        let (rows, Pair { parts, panels: [left, right], .. }) = (self.0.call.rows, self.0.pair);
        let (steps, zero, sets) = (rows.steps(), -parts[0].format.zero(), if MIN { 2 } else { 1 });
        let (first, second) = (parts[0].panel(left), parts[1].panel(right));
        let panels: [&[[Line; LINES]]; 2] = [&first.as_chunks().0[..steps], &second.as_chunks().0[..steps]];
        let (first, second) = (parts[0].panel_scales(left), parts[1].panel_scales(right));
        let scales = [&first[..steps * sets], &second[..steps * sets]];
        let (mut x, mut x_scales): ([&[_]; R], [&[_]; R]) = ([&[]; R], [&[]; R]);
        for r in 0..R {
            (x[r], x_scales[r]) = (&rows.bytes(row + r)[..steps], &rows.scales(row + r)[..steps]);
        }
        let mut later = self.0.later::<R>(row);
        let mut sums = [[s.splat(0.0); 2]; R];
        for step in 0..steps {
            let later = later.next();
            if LINES == 8 {
                later.call_all();
            }
            let mut dots = [[s.no_words(); 2]; R];
            for i in 0..LINES {
                if LINES == 4 {
                    later.call(i);
                }
                for p in 0..2 {
                    let words = s.words(&panels[p][step][i].0);
                    if LINES == 8 {
                        for r in 0..R {
                            dots[r][p] = s.dot_bytes(dots[r][p], words, x[r][step][i]);
                        }
                    } else {
                        let (low, high) = (s.low_nibbles(words), s.high_nibbles(words));
                        for r in 0..R {
                            dots[r][p] = s.dot_bytes(dots[r][p], low, x[r][step][i]);
                        }
                        for r in 0..R {
                            dots[r][p] = s.dot_bytes(dots[r][p], high, x[r][step][i + 4]);
                        }
                    }
                }
            }
            for p in 0..2 {
                let scale = s.load_f16(&scales[p][step * sets]);
                let min = if MIN { s.load_f16(&scales[p][step * sets + 1]) } else { s.splat(0.0) };
                for r in 0..R {
                    let (x, dot) = (x_scales[r][step], s.floats(dots[r][p]));
                    let product = if MIN {
                        sums[r][p] = s.fma(min, s.splat(x.shift), sums[r][p]);
                        s.mul(dot, s.splat(x.scale))
                    } else {
                        s.fma(dot, s.splat(x.scale), s.splat(zero * x.shift))
                    };
                    sums[r][p] = s.fma(scale, product, sums[r][p]);
                }
            }
        }
        sums
    }
}
