//! How an engine computes its linear layers: on which threads, with which rounding, and from how many rows on LibTorch multiplies.
//!
//! The own kernels read weights once, in the form they have in the file, and win where memory is the limit. LibTorch needs a copy of its own
//! in the engine's type; where a measurement at the start says that it wins for many rows, that copy is made, and the log says so.

use std::time::{Duration, Instant};

use millrace_core::layout::KvDtype;
use millrace_kernels::{Into, Isa, Norm, Precision, Products, elementwise};
use tch::{Device, Kind, Tensor};

use crate::linear::{Linear, Loader};
use crate::{Dtype, ModelError, tensors};

/// Numbers of rows at which the own kernels and LibTorch are compared, ascending.
const MEASURED_ROWS: [usize; 5] = [8, 32, 128, 512, 2048];
/// The head multiplies the last token of each sequence only: it is compared up to so many rows.
const HEAD_ROWS_MAX: usize = 128;
/// Timed runs of each way at each of them, after one that is not timed; the fastest counts.
const MEASURED_RUNS: usize = 3;
/// No comparison begins that would likely end later than this after the first began: larger numbers of rows are then taken for the last compared.
const MEASURED_MAX: Duration = Duration::from_millis(1500);
/// LibTorch must be so much faster to be worth its copy of the weights, and that attention then has one thread only.
const WORTH: f64 = 0.8;
/// How often it must be: another node that starts beside this one takes processors away for a while, from the one or from the other.
const CONFIRMED: usize = 3;
/// With quantised weights and AMX up to so many rows activations are rounded to 8 bits; above, weights and activations to bfloat16. Without tiles dot products
/// of bytes are the faster ones for any number of rows.
const AMX_BYTES_ROWS_MAX: usize = 16;

/// From how many rows on LibTorch multiplies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Switch {
    /// As a short measurement at the start says.
    #[default]
    Measured,
    /// With more rows than this.
    Above(usize),
    /// Never: no second copy of the weights.
    Never,
}

/// What the weights of linear layers are kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weights {
    /// As the file has them.
    #[default]
    Kept,
    /// bfloat16, dequantised where they were quantised.
    Bf16,
    /// Blocks of 32 8-bit numbers, quantised where they were not. Layers whose rows are not whole blocks are kept.
    Q8_0,
}

/// What an engine may choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compute {
    /// Threads of the own kernels and of LibTorch; 0 is 1.
    pub threads: usize,
    /// When LibTorch multiplies.
    pub switch: Switch,
    /// A row's bits do not depend on its neighbours, on the number of rows, or on how its prompt was cut into chunks: own kernels only, one form of
    /// activations, attention token by token.
    pub batch_invariant: bool,
    /// What the weights are kept as; with activations in f32 always as in the file.
    pub weights: Weights,
    /// What keys and values are cached as; as the activations are where absent.
    pub kv_dtype: Option<KvDtype>,
}

impl Compute {
    /// What keys and values are cached as, with activations of `dtype`.
    #[must_use]
    pub fn cached_as(&self, dtype: Dtype) -> KvDtype {
        self.kv_dtype.unwrap_or(dtype.into())
    }

    /// The same on every machine and in every run: for tests.
    #[must_use]
    pub fn fixed(threads: usize) -> Self {
        Self { threads, switch: Switch::Above(32), ..Self::default() }
    }
}

/// Which numbers of rows LibTorch multiplies in one kind of linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// None.
    Own,
    /// More than this.
    Above(usize),
    /// Those of each of [`MEASURED_ROWS`] up to the next for which it is set.
    Measured([bool; MEASURED_ROWS.len()]),
}

impl Choice {
    pub(crate) fn libtorch(self, rows: usize) -> bool {
        match self {
            Self::Own => false,
            Self::Above(max) => rows > max,
            Self::Measured(faster) => MEASURED_ROWS.iter().zip(faster).rfind(|(at, _)| rows >= **at).is_some_and(|(_, it)| it),
        }
    }

    /// Whether LibTorch multiplies any.
    fn any(self) -> bool {
        match self {
            Self::Own => false,
            Self::Above(_) => true,
            Self::Measured(faster) => faster.contains(&true),
        }
    }
}

/// Multiplies, one way or the other.
pub(crate) struct Multiplier {
    pub(crate) products: Products,
    kind: Kind,
    device: Device,
}

impl Multiplier {
    pub(crate) fn new(compute: Compute, dtype: Dtype, device: Device) -> Self {
        let isa = Isa::best();
        let bytes_rows_max = if isa == Isa::Amx && !compute.batch_invariant { AMX_BYTES_ROWS_MAX } else { usize::MAX };
        let precision = Precision { exact: dtype == Dtype::F32, bytes_rows_max };
        let products = Products::new(compute.threads.max(1), isa, precision);
        Self { products, kind: tensors::kind(dtype), device }
    }

    /// Decides who multiplies in the layers, which are alike, and in the head, and makes LibTorch's copies of the weights. Gives whether it made any.
    pub(crate) fn choose<'a>(
        &mut self,
        loader: &Loader<'_>,
        compute: Compute,
        mut layers: Vec<Vec<&'a mut Linear>>,
        mut head: &'a mut Linear,
    ) -> Result<bool, ModelError> {
        let kinds = layers.first().map_or(0, Vec::len);
        let (of_layers, of_head) = match compute.switch {
            _ if compute.batch_invariant => return Ok(false),
            Switch::Never => return Ok(false),
            Switch::Above(rows) => (vec![Choice::Above(rows); kinds], Choice::Above(rows)),
            Switch::Measured => {
                let begin = Instant::now();
                let of_layers =
                    self.measure(loader, layers.first_mut().map(Vec::as_mut_slice).unwrap_or_default(), usize::MAX, begin)?;
                let of_head = self.measure(loader, std::slice::from_mut(&mut head), HEAD_ROWS_MAX, begin)?;
                (of_layers, of_head[0])
            }
        };
        let all = layers.iter_mut().flat_map(|layer| layer.iter_mut().zip(&of_layers));
        for (linear, choice) in all.chain([(&mut head, &of_head)]) {
            linear.choice = *choice;
            linear.torch = if choice.any() { Some(loader.torch(&linear.names)?) } else { None };
        }
        tracing::info!(?of_layers, ?of_head, rows = ?MEASURED_ROWS, "who multiplies");
        Ok(of_layers.iter().chain([&of_head]).any(|choice| choice.any()))
    }

    /// Compares own kernels, LibTorch, and whoever is faster in each of `linears` by itself, on all of them one after the other, as a step has them:
    /// threads of LibTorch that still spin slow down what comes next.
    fn measure(
        &mut self,
        loader: &Loader<'_>,
        linears: &mut [&mut Linear],
        rows_max: usize,
        begin: Instant,
    ) -> Result<Vec<Choice>, ModelError> {
        let _no_grad = tch::no_grad_guard();
        for linear in &mut *linears {
            linear.torch = Some(loader.torch(&linear.names)?);
        }
        let mut chosen = vec![[false; MEASURED_ROWS.len()]; linears.len()];
        let mut last = (Duration::ZERO, 1);
        for (index, rows) in MEASURED_ROWS.into_iter().enumerate() {
            let (here, likely) = (Instant::now(), last.0.mul_f64(rows as f64 / last.1 as f64));
            let ways: Vec<bool> = if rows > rows_max || begin.elapsed() + likely > MEASURED_MAX {
                chosen.iter().map(|chosen| index > 0 && chosen[index - 1]).collect()
            } else {
                self.compare(linears, rows)?
            };
            chosen.iter_mut().zip(ways).for_each(|(chosen, way)| chosen[index] = way);
            last = (here.elapsed(), rows);
        }
        Ok(chosen.into_iter().map(Choice::Measured).collect())
    }

    /// Whether LibTorch is to multiply `rows` rows in each of `linears`. The fastest run counts, of all that it took to confirm it.
    fn compare(&mut self, linears: &mut [&mut Linear], rows: usize) -> Result<Vec<bool>, ModelError> {
        let none = vec![Duration::MAX; linears.len()];
        let (mut own, mut libtorch, mut ways) = (none.clone(), none, vec![false; linears.len()]);
        for _ in 0..CONFIRMED {
            ways = self.compare_once(linears, rows, [&mut own, &mut libtorch])?;
            if !ways.contains(&true) {
                break;
            }
        }
        Ok(ways)
    }

    /// Lowers the times of own kernels and of LibTorch to what they are now, and says who should multiply by them.
    fn compare_once(
        &mut self,
        linears: &mut [&mut Linear],
        rows: usize,
        [own, libtorch]: [&mut Vec<Duration>; 2],
    ) -> Result<Vec<bool>, ModelError> {
        let count = linears.len();
        for (times, way) in [(&mut *own, false), (&mut *libtorch, true)] {
            let now = self.time(linears, &vec![way; count], rows)?;
            times.iter_mut().zip(now).for_each(|(time, now)| *time = now.min(*time));
        }
        let mut ways = vec![(own.iter().sum::<Duration>(), vec![false; count]), (libtorch.iter().sum(), vec![true; count])];
        let mixed: Vec<bool> = own.iter().zip(libtorch.iter()).map(|(own, libtorch)| libtorch < own).collect();
        if mixed.contains(&true) && mixed.contains(&false) {
            ways.push((self.time(linears, &mixed, rows)?.iter().sum(), mixed));
        }
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let times: Vec<u64> = ways.iter().map(|way| micros(way.0)).collect();
        let (best, chosen) = ways.split_off(1).into_iter().min_by_key(|way| way.0).expect("LibTorch is a way");
        let worth = best.as_secs_f64() < WORTH * ways[0].0.as_secs_f64();
        tracing::info!(rows, own_libtorch_mixed_us = ?times, libtorch = ?if worth { &chosen } else { &ways[0].1 }, "products compared");
        Ok(if worth { chosen } else { vec![false; count] })
    }

    /// The fastest run of each of `linears`, by LibTorch where `libtorch` says so.
    fn time(&mut self, linears: &mut [&mut Linear], libtorch: &[bool], rows: usize) -> Result<Vec<Duration>, ModelError> {
        let mut best = vec![Duration::MAX; linears.len()];
        for run in 0..=MEASURED_RUNS {
            for (index, linear) in linears.iter_mut().enumerate() {
                linear.choice = if libtorch[index] { Choice::Above(0) } else { Choice::Own };
                let x = vec![0.5; rows * linear.matrix.columns()];
                let mut out = vec![0.0; rows * linear.matrix.rows()];
                let begin = Instant::now();
                self.multiply(&x, None, linear, Into::Set(&mut out))?;
                if run > 0 {
                    best[index] = best[index].min(begin.elapsed());
                }
            }
        }
        Ok(best)
    }

    /// `norm(x) W^T + bias`; no norm and no bias where there are none.
    ///
    /// # Panics
    /// When a layer with a bias goes into SwiGLU: no description has that.
    pub(crate) fn multiply(&mut self, x: &[f32], norm: Option<Norm<'_>>, linear: &Linear, out: Into<'_>) -> Result<(), ModelError> {
        let Some(bias) = &linear.bias else { return self.product(x, norm, linear, out) };
        let sum = match out {
            Into::Set(sum) => {
                sum.chunks_exact_mut(bias.len()).for_each(|row| row.copy_from_slice(bias));
                sum
            }
            Into::Add(sum) => {
                sum.chunks_exact_mut(bias.len()).for_each(|row| elementwise::add(row, bias));
                sum
            }
            Into::SwiGlu(_) => panic!("SwiGLU of a layer with a bias"),
        };
        self.product(x, norm, linear, Into::Add(sum))
    }

    fn product(&mut self, x: &[f32], norm: Option<Norm<'_>>, linear: &Linear, out: Into<'_>) -> Result<(), ModelError> {
        let columns = linear.matrix.columns();
        match &linear.torch {
            Some(weights) if !linear.own(x.len() / columns) => self.in_libtorch(x, norm, columns, weights, out),
            _ => {
                self.products.multiply(x, norm, &linear.matrix, out);
                Ok(())
            }
        }
    }

    fn in_libtorch(
        &self,
        x: &[f32],
        norm: Option<Norm<'_>>,
        columns: usize,
        weights: &Tensor,
        out: Into<'_>,
    ) -> Result<(), ModelError> {
        let mut normed = Vec::new();
        let x = match norm {
            None => x,
            Some(norm) => {
                normed.extend_from_slice(x);
                elementwise::norm(self.products.isa(), norm, &mut normed);
                &normed
            }
        };
        let shape = [(x.len() / columns) as i64, columns as i64];
        let no_bias: Option<&Tensor> = None;
        let y = tensors::to_f32(&tensors::from_f32(x, &shape, self.kind, self.device)?.f_linear(weights, no_bias)?)?;
        match out {
            Into::Set(out) => out.copy_from_slice(&y),
            Into::Add(out) => elementwise::add(out, &y),
            Into::SwiGlu(out) => elementwise::swiglu(self.products.isa(), &y, y.len() / shape[0] as usize / 2, out),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_holds_up_to_the_next_measured_number_of_rows() {
        let measured = Choice::Measured([false, true, false, true, true]);
        let rows = [1, 8, 31, 32, 127, 128, 511, 512, 4096];
        let want = [false, false, false, true, true, false, false, true, true];
        assert_eq!(rows.map(|rows| measured.libtorch(rows)), want);
        assert_eq!([0, 7, 8].map(|rows| Choice::Above(7).libtorch(rows)), [false, false, true]);
        assert!(!Choice::Own.libtorch(usize::MAX) && !Choice::Measured([false; MEASURED_ROWS.len()]).any());
    }
}
