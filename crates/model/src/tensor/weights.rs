//! Weights as tensors on a device: from a model's files, dequantised to the engine's type, or random.

use std::collections::HashMap;

use millrace_checkpoint::{Checkpoint, ModelConfig, NormKind};
use tch::{Device, Kind, Tensor};

use crate::{Dtype, ModelError, tensors};

/// Deviation of random weights: near those of trained ones, so that numbers stay in range through many layers.
const RANDOM_DEVIATION: f64 = 0.02;

/// Where numbers come from.
pub(super) enum Source<'a> {
    Checkpoint(&'a Checkpoint),
    /// Drawn, in these shapes.
    Random(HashMap<String, Vec<i64>>),
}

impl Source<'_> {
    pub(super) fn random(config: &ModelConfig) -> Self {
        let sides = |shape: Vec<usize>| shape.into_iter().map(|side| side as i64).collect();
        Self::Random(config.tensors().into_iter().map(|(name, shape)| (name, sides(shape))).collect())
    }
}

/// Where weights come from and what they become.
pub(super) struct Loader<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) source: Source<'a>,
    pub(super) dtype: Dtype,
    pub(super) device: Device,
}

/// `[out, in]`, in the engine's type.
pub(super) struct Linear {
    pub(super) weight: Tensor,
    bias: Option<Tensor>,
}

/// A norm's weights, in f32.
pub(super) struct Norm {
    kind: NormKind,
    weight: Tensor,
    bias: Option<Tensor>,
    eps: f64,
}

impl Linear {
    /// `x W^T + bias`, in the engine's type.
    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(x.f_linear(&self.weight, self.bias.as_ref())?)
    }

    pub(super) fn bytes(&self) -> usize {
        bytes(&self.weight) + self.bias.as_ref().map_or(0, bytes)
    }
}

/// Bytes of a tensor's numbers.
pub(super) fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

impl Norm {
    /// The norm of the last side of `x`, computed in f32.
    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let (x, sides) = (x.f_to_kind(Kind::Float)?, self.weight.size());
        match self.kind {
            NormKind::Rms => Ok(x.f_rms_norm(&sides, Some(&self.weight), self.eps)?),
            NormKind::Layer => Ok(x.f_layer_norm(&sides, Some(&self.weight), self.bias.as_ref(), self.eps, false)?),
        }
    }
}

impl Loader<'_> {
    /// LibTorch's name of the engine's type.
    pub(super) fn kind(&self) -> Kind {
        tensors::kind(self.dtype)
    }

    /// A tensor in the engine's type.
    pub(super) fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        match &self.source {
            Source::Random(shapes) => self.drawn(name, shapes, self.kind()),
            Source::Checkpoint(checkpoint) => {
                let view = checkpoint.tensor(name)?;
                let shape: Vec<i64> = view.shape.iter().map(|&side| side as i64).collect();
                match self.dtype {
                    Dtype::F32 => tensors::from_f32(&view.to_f32(), &shape, Kind::Float, self.device),
                    Dtype::Bf16 => tensors::from_bytes(bytemuck::cast_slice(&view.to_bf16()), &shape, Kind::BFloat16, self.device),
                }
            }
        }
    }

    /// A tensor in f32, whatever the engine's type.
    pub(super) fn exact(&self, name: &str) -> Result<Tensor, ModelError> {
        match &self.source {
            Source::Random(shapes) => self.drawn(name, shapes, Kind::Float),
            Source::Checkpoint(checkpoint) => {
                let view = checkpoint.tensor(name)?;
                let shape: Vec<i64> = view.shape.iter().map(|&side| side as i64).collect();
                tensors::from_f32(&view.to_f32(), &shape, Kind::Float, self.device)
            }
        }
    }

    /// Random numbers; ones where a vector scales.
    fn drawn(&self, name: &str, shapes: &HashMap<String, Vec<i64>>, kind: Kind) -> Result<Tensor, ModelError> {
        let shape = shapes.get(name).ok_or_else(|| ModelError::Bench(format!("no tensor {name} in this description")))?;
        if shape.len() == 1 && name.ends_with(".weight") {
            return Ok(Tensor::f_ones(shape, (kind, self.device))?);
        }
        Ok(Tensor::f_empty(shape, (kind, self.device))?.f_normal_(0.0, RANDOM_DEVIATION)?)
    }

    /// Several weights as one, rows after rows, with their biases where `bias` is set. Names without an ending.
    pub(super) fn linear(&self, names: &[String], bias: bool) -> Result<Linear, ModelError> {
        let joined = |ending: &str| {
            let mut parts = names.iter().map(|name| self.tensor(&format!("{name}.{ending}"))).collect::<Result<Vec<_>, _>>()?;
            if parts.len() == 1 { Ok::<_, ModelError>(parts.remove(0)) } else { Ok(Tensor::f_cat(&parts, 0)?) }
        };
        Ok(Linear { weight: joined("weight")?, bias: if bias { Some(joined("bias")?) } else { None } })
    }

    /// A norm of hidden states, of the kind that the model has.
    pub(super) fn norm(&self, name: &str) -> Result<Norm, ModelError> {
        let norm = self.config.norm;
        let bias = match norm.kind {
            NormKind::Rms => None,
            NormKind::Layer => Some(self.exact(&format!("{name}.bias"))?),
        };
        Ok(Norm { kind: norm.kind, bias, ..self.rms_norm(name, norm.eps)? })
    }

    /// An RMS norm inside of a layer.
    pub(super) fn rms_norm(&self, name: &str, eps: f64) -> Result<Norm, ModelError> {
        Ok(Norm { kind: NormKind::Rms, weight: self.exact(&format!("{name}.weight"))?, bias: None, eps })
    }
}
