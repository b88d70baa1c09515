//! Activations of a product, in the forms that its kernels read. Decides how they are rounded.
//!
//! Each row is prepared by itself, so its bits do not depend on its neighbours. A form's buffers grow to the largest step and are kept.

use std::cell::RefCell;

use crate::buffer::Line;
use crate::isa::Isa;
use crate::lanes::{Kernel, LANES, Simd, claim, run};
use crate::matrix::BLOCK;
use crate::team::{Parts, Team};

/// Elements that one thread prepares alone before it is worth waking another.
const ALONE_MAX: usize = 4096;
/// Rows of a tile of bfloat16.
pub(crate) const TILE_ROWS: usize = 16;

/// Which forms a product reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Forms {
    /// f32.
    pub(crate) plain: bool,
    /// bfloat16.
    pub(crate) halves: bool,
    /// 8-bit whole numbers with a scale for each block.
    pub(crate) bytes: bool,
}

/// A norm that is applied on the way: RMS norm, or LayerNorm where it has a bias.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// `[columns]`.
    pub weight: &'a [f32],
    /// `[columns]`. With it the mean is taken off first, and it is added last.
    pub bias: Option<&'a [f32]>,
    /// Added to the mean square.
    pub eps: f64,
}

impl Norm<'_> {
    /// Whether it is for rows of so many columns.
    pub(crate) fn fits(&self, columns: usize) -> bool {
        self.weight.len() == columns && self.bias.is_none_or(|bias| bias.len() == columns)
    }
}

/// Prepared rows.
#[derive(Default)]
pub(crate) struct Rows {
    count: usize,
    columns: usize,
    /// `[rows, steps * 32]`.
    plain: Vec<f32>,
    /// `[tiles of 16 rows, steps, 16 rows]` lines of 32 bfloat16.
    halves: Vec<Line>,
    /// `[rows, steps]` blocks of 32 signed bytes.
    bytes: Vec<[u32; BLOCK / 4]>,
    /// `[rows, steps]`.
    scales: Vec<Scale>,
}

/// What belongs to a block of bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Scale {
    /// What its bytes are multiplied with.
    pub(crate) scale: f32,
    /// The same times their sum.
    pub(crate) shift: f32,
}

impl Rows {
    /// How many.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Blocks of each.
    pub(crate) fn steps(&self) -> usize {
        self.columns.div_ceil(BLOCK)
    }

    /// Takes `x`, `[rows, columns]`, through `norm` if there is one, in `forms`.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub(crate) fn fill(&mut self, team: &Team, isa: Isa, x: &[f32], columns: usize, norm: Option<Norm<'_>>, forms: Forms) {
        assert!(columns > 0 && x.len().is_multiple_of(columns) && norm.is_none_or(|norm| norm.fits(columns)));
        *self = Self { count: x.len() / columns, columns, ..std::mem::take(self) };
        let (count, steps) = (self.count, self.steps());
        grow(&mut self.plain, if forms.plain { count * steps * BLOCK } else { 0 }, 0.0);
        grow(&mut self.halves, if forms.halves { count.next_multiple_of(TILE_ROWS) * steps } else { 0 }, Line([0; 16]));
        grow(&mut self.bytes, if forms.bytes { count * steps } else { 0 }, [0; BLOCK / 4]);
        grow(&mut self.scales, if forms.bytes { count * steps } else { 0 }, Scale::default());
        let (plain, halves) = (Parts::new(&mut self.plain), Parts::new(&mut self.halves));
        let (bytes, scales) = (Parts::new(&mut self.bytes), Parts::new(&mut self.scales));
        team.each(count, ALONE_MAX / columns, |row| {
            let place = Place { row, steps, forms, plain: &plain, halves: &halves, bytes: &bytes, scales: &scales };
            SCRATCH.with_borrow_mut(|scratch| {
                run(isa, Prepare { x: &x[row * columns..][..columns], norm, place, scratch });
            });
        });
    }

    /// Room for `count` rows of `columns` in bfloat16: `[tiles of 16 rows, steps, 16 rows]` lines, which stand as they stood.
    pub(crate) fn room(&mut self, count: usize, columns: usize) -> &mut [Line] {
        *self = Self { count, columns, ..std::mem::take(self) };
        let lines = count.next_multiple_of(TILE_ROWS) * self.steps();
        grow(&mut self.halves, lines, Line([0; 16]));
        &mut self.halves[..lines]
    }

    pub(crate) fn plain(&self, row: usize) -> &[f32] {
        let width = self.steps() * BLOCK;
        &self.plain[row * width..][..width]
    }

    /// `[steps, 16 rows]`.
    pub(crate) fn tile(&self, tile: usize) -> &[Line] {
        let lines = self.steps() * TILE_ROWS;
        &self.halves[tile * lines..][..lines]
    }

    /// `[steps]` blocks of bytes.
    pub(crate) fn bytes(&self, row: usize) -> &[[u32; BLOCK / 4]] {
        let steps = self.steps();
        &self.bytes[row * steps..][..steps]
    }

    /// `[steps]`.
    pub(crate) fn scales(&self, row: usize) -> &[Scale] {
        let steps = self.steps();
        &self.scales[row * steps..][..steps]
    }
}

fn grow<T: Clone>(buffer: &mut Vec<T>, len: usize, empty: T) {
    if buffer.len() < len {
        buffer.resize(len, empty);
    }
}

thread_local! {
    /// A row in f32 on its way to another form.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Where a row goes.
struct Place<'a> {
    row: usize,
    steps: usize,
    forms: Forms,
    plain: &'a Parts<'a, f32>,
    halves: &'a Parts<'a, Line>,
    bytes: &'a Parts<'a, [u32; BLOCK / 4]>,
    scales: &'a Parts<'a, Scale>,
}

impl Place<'_> {
    /// Asks for the bytes: other threads have read what stood there, and stores would wait for each line.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn claim(&self) {
        let own = self.row * self.steps..(self.row + 1) * self.steps;
        if self.forms.bytes {
            // SAFETY: this row's own range, and each row comes once.
            claim(unsafe { self.bytes.part(own.clone()) });
            // SAFETY: as above.
            claim(unsafe { self.scales.part(own) });
        }
    }
}

/// One row.
struct Prepare<'a> {
    x: &'a [f32],
    norm: Option<Norm<'a>>,
    place: Place<'a>,
    scratch: &'a mut Vec<f32>,
}

impl Kernel for Prepare<'_> {
    #[inline(always)]
    #[allow(unsafe_code)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, norm, place, scratch } = self;
        let Place { row, steps, forms, .. } = place;
        place.claim();
        scratch.clear();
        scratch.extend_from_slice(x);
        scratch.resize(steps * BLOCK, 0.0);
        if let Some(norm) = norm {
            apply_norm(s, norm, &mut scratch[..x.len()]);
        }
        let blocks = scratch.as_chunks::<LANES>().0.as_chunks::<2>().0;
        if forms.plain {
            // SAFETY: this row's own range, and each row comes once.
            unsafe { place.plain.part(row * steps * BLOCK..(row + 1) * steps * BLOCK) }.copy_from_slice(scratch);
        }
        if forms.halves {
            let first = row / TILE_ROWS * steps * TILE_ROWS + row % TILE_ROWS;
            for (step, block) in blocks.iter().enumerate() {
                let at = first + step * TILE_ROWS;
                // SAFETY: this row's own line of the tile, and each row comes once.
                let line = unsafe { place.halves.part(at..at + 1) };
                s.store_words(s.narrow(s.load(&block[0]), s.load(&block[1])), &mut line[0].0);
            }
        }
        if forms.bytes {
            let own = row * steps..(row + 1) * steps;
            // SAFETY: this row's own ranges, and each row comes once.
            let (bytes, scales) = unsafe { (place.bytes.part(own.clone()), place.scales.part(own)) };
            for (step, block) in blocks.iter().enumerate() {
                scales[step] = quantise(s, block, &mut bytes[step]);
            }
        }
    }
}

/// A row through a norm, in place.
#[inline(always)]
pub(crate) fn apply_norm<S: Simd>(s: S, norm: Norm<'_>, x: &mut [f32]) {
    if norm.bias.is_some() {
        let (whole, tail) = x.as_chunks::<LANES>();
        let sums = whole.iter().fold(s.splat(0.0), |sum, x| s.add(s.load(x), sum));
        let mean = tail.iter().fold(s.sum(sums), |sum, x| sum + x) / x.len() as f32;
        x.iter_mut().for_each(|x| *x -= mean);
    }
    let scale = inverse_rms(s, x, norm.eps);
    x.iter_mut().zip(norm.weight).for_each(|(x, weight)| *x = *x * scale * weight);
    if let Some(bias) = norm.bias {
        x.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f64) -> f32 {
    let (whole, tail) = x.as_chunks::<LANES>();
    let mut squares = s.splat(0.0);
    for x in whole {
        squares = s.fma(s.load(x), s.load(x), squares);
    }
    let sum = tail.iter().fold(s.sum(squares), |sum, x| sum + x * x);
    (1.0 / (f64::from(sum) / x.len() as f64 + eps).sqrt()) as f32
}

/// 32 numbers as bytes `q` of -127..=127 with `x = d q`. A block with a number that is not finite has a
/// `d` that is none either, so it is not lost.
#[inline(always)]
fn quantise<S: Simd>(s: S, block: &[[f32; LANES]; 2], bytes: &mut [u32; BLOCK / 4]) -> Scale {
    /// 1.5 * 2^23: adding it leaves the nearest whole number in the low bits, two's complement.
    const ROUND: f32 = 12_582_912.0;
    let x = [s.load(&block[0]), s.load(&block[1])];
    let zero = s.splat(0.0);
    let sizes = [s.max(x[0], s.sub(zero, x[0])), s.max(x[1], s.sub(zero, x[1]))];
    let largest = s.largest(s.max(sizes[0], sizes[1]));
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    let (inverse, round) = (s.splat(inverse), s.splat(ROUND));
    let shifted = [s.fma(x[0], inverse, round), s.fma(x[1], inverse, round)];
    s.store_bytes(shifted[0], shifted[1], bytes);
    // A number that is not finite is none here either: infinity by an inverse of zero.
    let sum = s.sum(s.add(s.sub(shifted[0], round), s.sub(shifted[1], round)));
    let scale = largest / 127.0 + 0.0 * sum;
    Scale { scale, shift: scale * sum }
}
