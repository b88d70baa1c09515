//! What follows attention in a layer: a feed-forward layer, or a mixture of experts (`experts`).

use millrace_checkpoint::MlpKind;
use millrace_kernels::{Into, Norm, elementwise};

use crate::ModelError;
use crate::compute::Multiplier;
use crate::experts::Experts;
use crate::linear::{Linear, Loader};

/// The weights.
pub(crate) enum Feed {
    SwiGlu(SwiGlu),
    Gelu {
        /// `[width, hidden]`.
        up: Linear,
        /// `[hidden, width]`.
        down: Linear,
    },
    Experts(Box<Experts>),
}

/// `down(silu(gate(x)) * up(x))`.
pub(crate) struct SwiGlu {
    /// Gate, then up: `[2 width, hidden]`.
    pub(crate) gate_up: Linear,
    /// `[hidden, width]`.
    pub(crate) down: Linear,
}

impl Feed {
    pub(crate) fn load(loader: &Loader<'_>, prefix: &str, layer: usize) -> Result<Self, ModelError> {
        let config = loader.config();
        if let Some(experts) = config.experts_of(layer) {
            return Ok(Self::Experts(Box::new(Experts::load(loader, prefix, experts)?)));
        }
        let biased = |part: &str| loader.linear(&[format!("{prefix}mlp.{part}")], true);
        match config.mlp.kind {
            MlpKind::SwiGlu => Ok(Self::SwiGlu(SwiGlu::load(loader, &format!("{prefix}mlp."))?)),
            MlpKind::Gelu => Ok(Self::Gelu { up: biased("up_proj")?, down: biased("down_proj")? }),
        }
    }

    /// `hidden += feed(norm(hidden))`; `gated` is room for what is between the products.
    pub(crate) fn add(
        &self,
        hidden: &mut [f32],
        norm: Norm<'_>,
        multiplier: &mut Multiplier,
        gated: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        match self {
            Self::SwiGlu(mlp) => mlp.add(hidden, norm, multiplier, gated),
            Self::Experts(experts) => experts.add(hidden, norm, multiplier, gated),
            Self::Gelu { up, down } => {
                let width = up.matrix.rows();
                gated.resize(hidden.len() / up.matrix.columns() * width, 0.0);
                multiplier.multiply(hidden, Some(norm), up, Into::Set(gated))?;
                let isa = multiplier.products.isa();
                multiplier.products.team().chunks(gated, width, 1, |_, row| elementwise::gelu(isa, row));
                multiplier.multiply(gated, None, down, Into::Add(hidden))
            }
        }
    }

    /// The linear layers that LibTorch may multiply.
    pub(crate) fn linears(&mut self) -> Vec<&mut Linear> {
        match self {
            Self::SwiGlu(mlp) => vec![&mut mlp.gate_up, &mut mlp.down],
            Self::Gelu { up, down } => vec![up, down],
            Self::Experts(experts) => experts.linears(),
        }
    }

    /// Bytes of weights that a step of one row reads.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::SwiGlu(mlp) => mlp.bytes(),
            Self::Gelu { up, down } => up.matrix.bytes() + down.matrix.bytes(),
            Self::Experts(experts) => experts.bytes(),
        }
    }
}

impl SwiGlu {
    /// From `gate_proj`, `up_proj` and `down_proj` behind `prefix`.
    pub(crate) fn load(loader: &Loader<'_>, prefix: &str) -> Result<Self, ModelError> {
        let gate_up = loader.linear(&["gate_proj", "up_proj"].map(|part| format!("{prefix}{part}")), false)?;
        Ok(Self { gate_up, down: loader.linear(&[format!("{prefix}down_proj")], false)? })
    }

    /// `hidden += mlp(norm(hidden))`.
    pub(crate) fn add(
        &self,
        hidden: &mut [f32],
        norm: Norm<'_>,
        multiplier: &mut Multiplier,
        gated: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let rows = hidden.len() / self.gate_up.matrix.columns();
        if [&self.gate_up, &self.down].iter().all(|linear| linear.own(rows)) {
            multiplier.products.add_gated(hidden, norm, &self.gate_up.matrix, &self.down.matrix, gated);
            return Ok(());
        }
        self.gate(hidden, norm, multiplier, gated)?;
        multiplier.multiply(gated, None, &self.down, Into::Add(hidden))
    }

    /// `gated = silu(gate(norm(x))) * up(norm(x))`.
    pub(crate) fn gate(
        &self,
        x: &[f32],
        norm: Norm<'_>,
        multiplier: &mut Multiplier,
        gated: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        gated.resize(x.len() / self.gate_up.matrix.columns() * self.down.matrix.columns(), 0.0);
        multiplier.multiply(x, Some(norm), &self.gate_up, Into::SwiGlu(gated))
    }

    pub(crate) fn bytes(&self) -> usize {
        self.gate_up.matrix.bytes() + self.down.matrix.bytes()
    }
}
