//! One linear layer's weights, loaded: packed for the own kernels, and for LibTorch where it multiplies too.

use std::borrow::Cow;

use half::f16;
use millrace_checkpoint::{Checkpoint, ModelConfig, NormKind, TensorType, TensorView};
use millrace_kernels::matrix::BLOCK;
use millrace_kernels::{Format, Matrix, Norm, Source, convert};
use tch::{Device, Kind, Tensor};

use crate::compute::{Choice, Weights};
use crate::{Dtype, ModelError, tensors};

/// `[out, in]`.
pub(crate) struct Linear {
    pub(crate) matrix: Matrix,
    /// The same numbers in the engine's type.
    pub(crate) torch: Option<Tensor>,
    /// Which numbers of rows LibTorch multiplies.
    pub(crate) choice: Choice,
    /// `[out]`.
    pub(crate) bias: Option<Vec<f32>>,
    /// The tensors it was made of; none for one that LibTorch never multiplies.
    pub(crate) names: Vec<String>,
}

impl Linear {
    /// Whether the own kernels multiply `rows` rows.
    pub(crate) fn own(&self, rows: usize) -> bool {
        self.torch.is_none() || !self.choice.libtorch(rows)
    }
}

/// A norm's weights.
pub(crate) struct NormWeights {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    eps: f64,
}

impl NormWeights {
    /// As the kernels take it.
    pub(crate) fn get(&self) -> Norm<'_> {
        Norm { weight: &self.weight, bias: self.bias.as_deref(), eps: self.eps }
    }
}

/// Where weights come from and what they become.
pub(crate) struct Loader<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) dtype: Dtype,
    pub(crate) device: Device,
    pub(crate) weights: Weights,
}

impl Loader<'_> {
    /// The model's description.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.checkpoint.config
    }

    /// The numbers of a tensor.
    pub(crate) fn numbers(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        Ok(self.checkpoint.tensor(name)?.to_f32())
    }

    /// A norm of hidden states, of the kind that the model has.
    pub(crate) fn norm(&self, name: &str) -> Result<NormWeights, ModelError> {
        let norm = self.config().norm;
        let bias = match norm.kind {
            NormKind::Rms => None,
            NormKind::Layer => Some(self.numbers(&format!("{name}.bias"))?),
        };
        Ok(NormWeights { bias, ..self.rms_norm(name, norm.eps)? })
    }

    /// An RMS norm inside of a layer.
    pub(crate) fn rms_norm(&self, name: &str, eps: f64) -> Result<NormWeights, ModelError> {
        Ok(NormWeights { weight: self.numbers(&format!("{name}.weight"))?, bias: None, eps })
    }

    /// Several weights as one, rows after rows, with their biases where `bias` is set. Names without an ending.
    pub(crate) fn linear(&self, names: &[String], bias: bool) -> Result<Linear, ModelError> {
        let weights: Vec<String> = names.iter().map(|name| format!("{name}.weight")).collect();
        let views = self.views(&weights)?;
        let columns = views.first().and_then(|view| view.shape.last().copied()).unwrap_or(0);
        let kept: Vec<(Format, Cow<'_, [u8]>)> = views.iter().map(|view| self.kept(view)).collect();
        let sources: Vec<Source<'_>> = kept.iter().map(|(format, bytes)| Source { format: *format, bytes }).collect();
        let matrix = Matrix::new(columns, &sources)?;
        let biases = || names.iter().map(|name| self.numbers(&format!("{name}.bias"))).collect::<Result<Vec<_>, _>>();
        let bias = if bias { Some(biases()?.concat()) } else { None };
        drop(kept);
        Ok(Linear { matrix, torch: None, choice: Choice::Own, bias, names: weights })
    }

    /// Rows of `columns` numbers, in the engine's type. Never multiplied by LibTorch.
    pub(crate) fn computed(&self, columns: usize, numbers: &[f32]) -> Result<Linear, ModelError> {
        let halves = || bytemuck::cast_slice(&convert::rounded(numbers)).to_vec();
        let (format, bytes) = match self.dtype {
            Dtype::F32 => (Format::F32, bytemuck::cast_slice(numbers).to_vec()),
            Dtype::Bf16 => (Format::Bf16, halves()),
        };
        let matrix = Matrix::new(columns, &[Source { format, bytes: &bytes }])?;
        Ok(Linear { matrix, torch: None, choice: Choice::Own, bias: None, names: Vec::new() })
    }

    /// A weight in f32, whatever the engine's type: its products are not rounded. Never multiplied by LibTorch.
    pub(crate) fn exact(&self, name: &str) -> Result<Linear, ModelError> {
        let view = self.checkpoint.tensor(name)?;
        let numbers = view.to_f32();
        let source = Source { format: Format::F32, bytes: bytemuck::cast_slice(&numbers) };
        let matrix = Matrix::new(view.shape.last().copied().unwrap_or(0), &[source])?;
        Ok(Linear { matrix, torch: None, choice: Choice::Own, bias: None, names: Vec::new() })
    }

    fn views(&self, names: &[String]) -> Result<Vec<TensorView<'_>>, ModelError> {
        names.iter().map(|name| Ok(self.checkpoint.tensor(name)?)).collect()
    }

    /// What the own kernels keep: bits of the file where they can multiply them, else the engine's type.
    fn kept<'v>(&self, view: &'v TensorView<'_>) -> (Format, Cow<'v, [u8]>) {
        let borrowed = |format| (format, Cow::Borrowed(&*view.bytes));
        let halves = || (Format::Bf16, Cow::Owned(bytemuck::cast_slice(&view.to_bf16()).to_vec()));
        let whole_blocks = view.shape.last().is_some_and(|columns| columns.is_multiple_of(BLOCK));
        match self.weights {
            Weights::Bf16 if self.dtype == Dtype::Bf16 => return halves(),
            Weights::Q8_0 if self.dtype == Dtype::Bf16 && whole_blocks && view.dtype != TensorType::Q8_0 => {
                return (Format::Q8_0, Cow::Owned(quantised(&view.to_f32())));
            }
            _ => {}
        }
        match (view.dtype, self.dtype) {
            (TensorType::Q8_0, _) => borrowed(Format::Q8_0),
            (TensorType::Q4_0, _) => borrowed(Format::Q4_0),
            (TensorType::Q4_1, _) => borrowed(Format::Q4_1),
            (TensorType::BF16, _) => borrowed(Format::Bf16),
            (TensorType::F32, Dtype::F32) => borrowed(Format::F32),
            (TensorType::F16, Dtype::F32) => (Format::F32, Cow::Owned(bytemuck::cast_slice(&view.to_f32()).to_vec())),
            (TensorType::F32 | TensorType::F16, Dtype::Bf16) => halves(),
        }
    }

    /// The same for LibTorch, in the engine's type.
    pub(crate) fn torch(&self, names: &[String]) -> Result<Tensor, ModelError> {
        let views = self.views(names)?;
        let tensor = |view: &TensorView<'_>| {
            let shape: Vec<i64> = view.shape.iter().map(|&side| side as i64).collect();
            match self.dtype {
                Dtype::F32 => tensors::from_f32(&view.to_f32(), &shape, Kind::Float, self.device),
                Dtype::Bf16 => tensors::from_bytes(bytemuck::cast_slice(&view.to_bf16()), &shape, Kind::BFloat16, self.device),
            }
        };
        let parts = views.iter().map(tensor).collect::<Result<Vec<_>, _>>()?;
        Ok(Tensor::f_cat(&parts, 0)?)
    }
}

/// Whole blocks of Q8_0, as ggml's `quantize_row_q8_0` makes them.
fn quantised(numbers: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(numbers.len() / BLOCK * Format::Q8_0.block_bytes());
    for block in numbers.chunks_exact(BLOCK) {
        let scale = block.iter().fold(0.0f32, |largest, x| largest.max(x.abs())) / 127.0;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        bytes.extend(f16::from_f32(scale).to_le_bytes());
        bytes.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantised_numbers_are_near() {
        let numbers: Vec<f32> = (0..64).map(|i| (i as f32 * 0.9).sin() * if i < 32 { 3.0 } else { 0.0 }).collect();
        let matrix = Matrix::new(64, &[Source { format: Format::Q8_0, bytes: &quantised(&numbers) }]).unwrap();
        let mut row = [0.0; 64];
        matrix.row(0, &mut row);
        assert!(row.iter().zip(&numbers).all(|(a, b)| (a - b).abs() < 0.015), "{row:?}");
    }
}
