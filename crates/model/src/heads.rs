//! Queries, keys and values of a layer whose heads have their own: one product, norms of heads where there are some, the rotary turn.

use millrace_checkpoint::Grouped;
use millrace_kernels::{Into, Norm, elementwise};

use crate::ModelError;
use crate::angles::Angles;
use crate::compute::Multiplier;
use crate::decoder::ALONE_MAX;
use crate::linear::{Linear, Loader, NormWeights};

/// The weights.
pub(crate) struct Heads {
    /// Queries, keys and values of all heads, one after the other: `[(heads + 2 kv_heads) head_dim, hidden]`.
    qkv: Linear,
    /// Of each query head, of each key head.
    norms: Option<[NormWeights; 2]>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Heads {
    pub(crate) fn load(loader: &Loader<'_>, prefix: &str, grouped: &Grouped) -> Result<Self, ModelError> {
        let config = loader.config();
        let parts: &[&str] = if grouped.joined { &["qkv_proj"] } else { &["q_proj", "k_proj", "v_proj"] };
        let names: Vec<String> = parts.iter().map(|part| format!("{prefix}self_attn.{part}")).collect();
        let norm = |part: &str| loader.rms_norm(&format!("{prefix}self_attn.{part}"), config.norm.eps);
        Ok(Self {
            qkv: loader.linear(&names, config.attention.qkv_bias)?,
            norms: if grouped.norms { Some([norm("q_norm")?, norm("k_norm")?]) } else { None },
            heads: config.attention.heads,
            kv_heads: grouped.kv_heads,
            head_dim: grouped.head_dim,
        })
    }

    /// `qkv`: `[tokens, heads + 2 kv_heads, head_dim]`.
    pub(crate) fn project(
        &self,
        hidden: &[f32],
        norm: Norm<'_>,
        multiplier: &mut Multiplier,
        angles: Option<&Angles>,
        qkv: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let width = self.qkv.matrix.rows();
        qkv.resize(hidden.len() / self.qkv.matrix.columns() * width, 0.0);
        multiplier.multiply(hidden, Some(norm), &self.qkv, Into::Set(qkv))?;
        // LibTorch's weights are of one thread.
        let Self { norms, heads, kv_heads, head_dim, .. } = self;
        if norms.is_none() && angles.is_none() {
            return Ok(());
        }
        let (isa, queries, turned) = (multiplier.products.isa(), heads * head_dim, (heads + kv_heads) * head_dim);
        multiplier.products.team().chunks(qkv, width, ALONE_MAX / width, |token, all| {
            let heads = &mut all[..turned];
            if let Some([query, key]) = norms {
                let (queries, keys) = heads.split_at_mut(queries);
                elementwise::norm(isa, query.get(), queries);
                elementwise::norm(isa, key.get(), keys);
            }
            if let Some(angles) = angles {
                angles.turn(token, heads);
            }
        });
        Ok(())
    }

    pub(crate) fn linears(&mut self) -> Vec<&mut Linear> {
        vec![&mut self.qkv]
    }

    pub(crate) fn bytes(&self) -> usize {
        self.qkv.matrix.bytes()
    }
}
