//! Attention of a step over the device's pool: rows of one token by the paged kernel, longer rows by LibTorch over what they gathered.

use tch::{Kind, Tensor};

use crate::ModelError;
use crate::tensor::plan::{Batch, Chunk, Plan};
use crate::tensor::pool::Pool;

/// What attention needs beside the cells.
pub(super) struct Attention {
    /// Of each layer.
    pub(super) windows: Vec<Option<usize>>,
    /// The engine's type.
    pub(super) kind: Kind,
}

impl Attention {
    /// `queries`: `[tokens, heads, head_dim]` in f32. Gives `[tokens, heads, value_dim]` in the engine's type.
    pub(super) fn attend(&self, layer: usize, queries: &Tensor, plan: &Plan, pool: &Pool) -> Result<Tensor, ModelError> {
        let Batch { chunks, singles } = plan.of(self.windows[layer]);
        let single = match singles {
            None => None,
            Some(singles) => {
                let queries =
                    singles.index.as_ref().map_or_else(|| Ok(queries.shallow_clone()), |index| queries.f_index_select(0, index))?;
                Some((pool.attend(layer, &queries, singles)?, &singles.index))
            }
        };
        match (single, chunks.as_slice()) {
            (Some((attended, None)), _) => Ok(attended),
            (None, [chunk]) => self.chunk(layer, queries, chunk, pool),
            (single, chunks) => {
                let sides = [plan.tokens(), pool.shape().heads as i64, pool.shape().value_dim() as i64];
                let mut out = Tensor::f_empty(sides, (self.kind, queries.device()))?;
                for chunk in chunks {
                    let attended = self.chunk(layer, queries, chunk, pool)?;
                    out.f_narrow(0, chunk.tokens.start, chunk.tokens.end - chunk.tokens.start)?.f_copy_(&attended)?;
                }
                if let Some((attended, Some(index))) = single {
                    let _ = out.f_index_copy_(0, index, &attended)?;
                }
                Ok(out)
            }
        }
    }

    /// One row of several tokens: `[tokens, heads, value_dim]`.
    ///
    /// LibTorch's flash attention has no masks, and only it knows heads that share keys: with a mask, or in f32, each head gets its own copy.
    fn chunk(&self, layer: usize, queries: &Tensor, chunk: &Chunk, pool: &Pool) -> Result<Tensor, ModelError> {
        let (shape, mask) = (pool.shape(), chunk.mask.as_ref());
        let own = queries.f_narrow(0, chunk.tokens.start, chunk.tokens.end - chunk.tokens.start)?;
        let query = own.f_to_kind(self.kind)?.f_transpose(0, 1)?.f_unsqueeze(0)?;
        let kv = pool.gather(layer, &chunk.table, chunk.gathered)?;
        let grouped = mask.is_none() && self.kind == Kind::BFloat16 && shape.heads > shape.kv_heads;
        let kv = if grouped { kv } else { shared(&kv, (shape.heads / shape.kv_heads) as i64)? };
        let (keys, values) = match shape.latent {
            None => (kv.f_narrow(0, 0, 1)?, kv.f_narrow(0, 1, 1)?),
            Some(rank) => (kv.shallow_clone(), kv.f_narrow(3, 0, rank as i64)?),
        };
        let (causal, scale) = (mask.is_none(), f64::from(shape.scale));
        let attended = Tensor::f_scaled_dot_product_attention(&query, &keys, &values, mask, 0.0, causal, scale, grouped)?;
        Ok(attended.f_squeeze_dim(0)?.f_transpose(0, 1)?)
    }
}

/// `[parts, kv_heads, ..]` with each head as often as query heads share it.
fn shared(kv: &Tensor, times: i64) -> Result<Tensor, ModelError> {
    if times == 1 { Ok(kv.shallow_clone()) } else { Ok(kv.f_repeat_interleave_self_int(times, 1, None)?) }
}
