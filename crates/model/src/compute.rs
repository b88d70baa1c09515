//! How an engine computes its linear layers: on which threads, with which rounding, and from how many rows on LibTorch multiplies.
//!
//! The own kernels read weights once, in the form they have in the file, and win where memory is the limit. LibTorch needs a copy of its own
//! in the engine's type; where a measurement at the start says that it wins for many rows, that copy is made, and the log says so.

use std::time::{Duration, Instant};

use millrace_kernels::{Into, Isa, Norm, Precision, Products, elementwise};
use tch::{Device, Kind, Tensor};

use crate::linear::Linear;
use crate::{Dtype, ModelError, tensors};

/// Numbers of rows at which the own kernels and LibTorch are compared.
const MEASURED_ROWS: [usize; 4] = [32, 64, 128, 512];
/// Timed products of each kind at each of them; the fastest counts.
const MEASURED_RUNS: usize = 3;
/// LibTorch must be so much faster to be worth its copy of the weights.
const WORTH: f64 = 0.9;
/// With quantised weights up to so many rows activations are rounded to 8 bits; above, weights and activations to bfloat16.
const BYTES_ROWS_MAX: usize = 32;

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
}

impl Compute {
    /// The same on every machine and in every run: for tests.
    #[must_use]
    pub fn fixed(threads: usize) -> Self {
        Self { threads, switch: Switch::Above(32), ..Self::default() }
    }
}

/// Multiplies, one way or the other.
pub(crate) struct Multiplier {
    pub(crate) products: Products,
    /// Rows above which LibTorch multiplies; it has no weights where this is `usize::MAX`.
    pub(crate) own_rows_max: usize,
    kind: Kind,
    device: Device,
}

impl Multiplier {
    pub(crate) fn new(compute: Compute, dtype: Dtype, device: Device) -> Self {
        let bytes_rows_max = if compute.batch_invariant { usize::MAX } else { BYTES_ROWS_MAX };
        let precision = Precision { exact: dtype == Dtype::F32, bytes_rows_max };
        let products = Products::new(compute.threads.max(1), Isa::best(), precision);
        let own_rows_max = match compute.switch {
            Switch::Above(rows) if !compute.batch_invariant => rows,
            _ => usize::MAX,
        };
        Self { products, own_rows_max, kind: tensors::kind(dtype), device }
    }

    /// Compares both on `linear`, which has weights for LibTorch, and keeps the smallest number of rows above which LibTorch is faster.
    pub(crate) fn measure(&mut self, linear: &Linear) -> Result<(), ModelError> {
        self.own_rows_max = usize::MAX;
        for rows in MEASURED_ROWS.into_iter().rev() {
            let (own, torch) = (self.time(linear, rows, usize::MAX)?, self.time(linear, rows, 0)?);
            let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
            tracing::info!(rows, own_us = micros(own), libtorch_us = micros(torch), "products compared");
            if torch.as_secs_f64() > WORTH * own.as_secs_f64() {
                break;
            }
            self.own_rows_max = rows - 1;
        }
        Ok(())
    }

    fn time(&mut self, linear: &Linear, rows: usize, own_rows_max: usize) -> Result<Duration, ModelError> {
        let x = vec![0.5; rows * linear.matrix.columns()];
        let mut out = vec![0.0; rows * linear.matrix.rows()];
        let chosen = std::mem::replace(&mut self.own_rows_max, own_rows_max);
        let mut best = Duration::MAX;
        for _ in 0..=MEASURED_RUNS {
            let begin = Instant::now();
            self.multiply(&x, None, linear, Into::Set(&mut out))?;
            best = best.min(begin.elapsed());
        }
        self.own_rows_max = chosen;
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
            Some(weights) if x.len() / columns > self.own_rows_max => self.in_libtorch(x, norm, columns, weights, out),
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
