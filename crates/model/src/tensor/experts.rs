//! A mixture of experts in tensors. Which experts compute a token is decided on the processor, in f32, by the rule of `crate::experts`: one
//! small copy from the device for each layer that has experts.

use millrace_checkpoint::{Experts as Shape, Router};
use tch::{Kind, Tensor};

use crate::experts::tokens_of_experts;
use crate::tensor::layer::SwiGlu;
use crate::tensor::weights::{Loader, bytes};
use crate::{ModelError, tensors};

/// The weights.
pub(super) struct Experts {
    router: Router,
    chosen: usize,
    /// `[experts, hidden]`, in f32.
    gate: Tensor,
    bias: Option<Vec<f32>>,
    experts: Vec<SwiGlu>,
    /// What all tokens go through.
    shared: Option<SwiGlu>,
}

impl Experts {
    pub(super) fn load(loader: &Loader<'_>, prefix: &str, shape: &Shape) -> Result<Self, ModelError> {
        let name = |part: &str| format!("{prefix}mlp.{part}");
        let expert = |index: usize| SwiGlu::load(loader, &name(&format!("experts.{index}.")));
        let bias = || tensors::to_f32(&loader.exact(&name("gate.e_score_correction_bias"))?);
        Ok(Self {
            router: shape.router,
            chosen: shape.chosen,
            gate: loader.exact(&name("gate.weight"))?,
            bias: if shape.router.bias { Some(bias()?) } else { None },
            experts: (0..shape.count).map(expert).collect::<Result<_, _>>()?,
            shared: if shape.shared_width > 0 { Some(SwiGlu::load(loader, &name("shared_experts."))?) } else { None },
        })
    }

    /// `shared(x) + sum over a token's experts of weight * expert(x)`, in f32; `normed`: `[tokens, hidden]` in f32.
    pub(super) fn apply(&self, normed: &Tensor, kind: Kind) -> Result<Tensor, ModelError> {
        let (no_bias, device): (Option<&Tensor>, _) = (None, normed.device());
        let logits = tensors::to_f32(&normed.f_linear(&self.gate, no_bias)?)?;
        let x = normed.f_to_kind(kind)?;
        let mut sum = normed.f_zeros_like()?;
        let tokens = tokens_of_experts(&self.router, self.chosen, self.bias.as_deref(), self.experts.len(), &logits);
        for (expert, tokens) in self.experts.iter().zip(tokens) {
            if tokens.is_empty() {
                continue;
            }
            let (indices, weights): (Vec<i64>, Vec<f32>) = tokens.into_iter().map(|(token, weight)| (token as i64, weight)).unzip();
            let index = Tensor::f_from_slice(&indices)?.f_to_device(device)?;
            let weights = Tensor::f_from_slice(&weights)?.f_to_device(device)?.f_unsqueeze(1)?;
            let out = expert.apply(&x.f_index_select(0, &index)?)?.f_to_kind(Kind::Float)?.f_mul(&weights)?;
            let _ = sum.f_index_add_(0, &index, &out)?;
        }
        match &self.shared {
            Some(shared) => Ok(sum.f_add(&shared.apply(&x)?)?),
            None => Ok(sum),
        }
    }

    /// Bytes of weights that a step of one row reads: as many experts as a token has.
    pub(super) fn bytes(&self) -> usize {
        let experts: usize = self.experts.iter().take(self.chosen).map(SwiGlu::bytes).sum();
        experts + bytes(&self.gate) + self.shared.as_ref().map_or(0, SwiGlu::bytes)
    }
}
