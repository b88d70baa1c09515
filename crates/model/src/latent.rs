//! Multi-head latent attention: queries and the cached latent of a layer, and values from what attention makes of latents.
//!
//! Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1). Keys and values of all heads are products of one latent for each token. Only the latent and
//! one turned key are cached. The key's product is taken to the query instead (`q (W c) = (q W) c`), the value's to the sum over latents, so a
//! context is read as it is cached, as if all heads shared one KV head of `rank + turned_dim` numbers, and is never expanded.

use millrace_checkpoint::{LATENT_NORM_EPS, Latent as Shape};
use millrace_kernels::{Into, Norm, elementwise};

use crate::ModelError;
use crate::angles::Angles;
use crate::compute::Multiplier;
use crate::linear::{Linear, Loader, NormWeights};

/// The weights.
pub(crate) struct Latent {
    shape: Shape,
    heads: usize,
    /// Queries or their latent, then the latent, then the key that is turned: `[.. + rank + turned_dim, hidden]`.
    down: Linear,
    /// From the queries' own latent to queries.
    query: Option<(NormWeights, Linear)>,
    norm: NormWeights,
    /// For each head from the query's plain numbers to the latent's space, `[rank, plain_dim]`.
    to_latent: Vec<Linear>,
    /// For each head from the latent's space to values, `[value_dim, rank]`.
    from_latent: Vec<Linear>,
}

impl Latent {
    pub(crate) fn load(loader: &Loader<'_>, prefix: &str, shape: &Shape) -> Result<Self, ModelError> {
        let heads = loader.config().attention.heads;
        let name = |part: &str| format!("{prefix}self_attn.{part}");
        let first = if shape.query_rank.is_some() { "q_a_proj" } else { "q_proj" };
        let query = match shape.query_rank {
            None => None,
            Some(_) => {
                Some((loader.rms_norm(&name("q_a_layernorm"), LATENT_NORM_EPS)?, loader.linear(&[name("q_b_proj")], false)?))
            }
        };
        let both = loader.numbers(&name("kv_b_proj.weight"))?;
        let of_head =
            |head: usize| both[head * (shape.plain_dim + shape.value_dim) * shape.rank..].split_at(shape.plain_dim * shape.rank);
        let to_latent = |head| {
            let keys = of_head(head).0;
            let turned: Vec<f32> = (0..shape.rank).flat_map(|r| keys.iter().skip(r).step_by(shape.rank)).copied().collect();
            loader.computed(shape.plain_dim, &turned)
        };
        let from_latent = |head| loader.computed(shape.rank, &of_head(head).1[..shape.value_dim * shape.rank]);
        Ok(Self {
            heads,
            down: loader.linear(&[name(first), name("kv_a_proj_with_mqa")], false)?,
            query,
            norm: loader.rms_norm(&name("kv_a_layernorm"), LATENT_NORM_EPS)?,
            to_latent: (0..heads).map(to_latent).collect::<Result<_, _>>()?,
            from_latent: (0..heads).map(from_latent).collect::<Result<_, _>>()?,
            shape: shape.clone(),
        })
    }

    /// `qkv`: `[tokens, heads + 1, rank + turned_dim]`: queries in the latent's space, then what is cached.
    pub(crate) fn project(
        &self,
        hidden: &[f32],
        norm: Norm<'_>,
        multiplier: &mut Multiplier,
        angles: Option<&Angles>,
        qkv: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let Shape { rank, plain_dim, turned_dim, .. } = self.shape;
        let (tokens, width) = (hidden.len() / self.down.matrix.columns(), self.down.matrix.rows());
        let (query_dim, key_dim) = (plain_dim + turned_dim, rank + turned_dim);
        let mut down = vec![0.0; tokens * width];
        multiplier.multiply(hidden, Some(norm), &self.down, Into::Set(&mut down))?;
        let mut queries = columns(&down, width, 0, width - key_dim);
        if let Some((norm, up)) = &self.query {
            let latents = std::mem::replace(&mut queries, vec![0.0; tokens * up.matrix.rows()]);
            multiplier.multiply(&latents, Some(norm.get()), up, Into::Set(&mut queries))?;
        }
        let row = (self.heads + 1) * key_dim;
        qkv.resize(tokens * row, 0.0);
        for (head, to_latent) in self.to_latent.iter().enumerate() {
            let plain = columns(&queries, self.heads * query_dim, head * query_dim, plain_dim);
            let mut taken = vec![0.0; tokens * rank];
            multiplier.multiply(&plain, None, to_latent, Into::Set(&mut taken))?;
            put_columns(&taken, rank, qkv, row, head * key_dim);
            let turned = columns(&queries, self.heads * query_dim, head * query_dim + plain_dim, turned_dim);
            put_columns(&turned, turned_dim, qkv, row, head * key_dim + rank);
        }
        put_columns(&columns(&down, width, width - key_dim, key_dim), key_dim, qkv, row, self.heads * key_dim);
        let isa = multiplier.products.isa();
        for (token, heads) in qkv.chunks_exact_mut(row).enumerate() {
            elementwise::norm(isa, self.norm.get(), &mut heads[self.heads * key_dim..][..rank]);
            if let Some(angles) = angles {
                heads.chunks_exact_mut(key_dim).for_each(|head| angles.turn(token, &mut head[rank..]));
            }
        }
        Ok(())
    }

    /// `attended`: sums of latents, `[tokens, heads, rank]`. Gives `[tokens, heads, value_dim]`.
    pub(crate) fn values(&self, attended: &[f32], multiplier: &mut Multiplier) -> Result<Vec<f32>, ModelError> {
        let Shape { rank, value_dim, .. } = self.shape;
        let tokens = attended.len() / (self.heads * rank);
        let mut values = vec![0.0; tokens * self.heads * value_dim];
        for (head, from_latent) in self.from_latent.iter().enumerate() {
            let mut out = vec![0.0; tokens * value_dim];
            multiplier.multiply(
                &columns(attended, self.heads * rank, head * rank, rank),
                None,
                from_latent,
                Into::Set(&mut out),
            )?;
            put_columns(&out, value_dim, &mut values, self.heads * value_dim, head * value_dim);
        }
        Ok(values)
    }

    pub(crate) fn linears(&mut self) -> Vec<&mut Linear> {
        [&mut self.down].into_iter().chain(self.query.as_mut().map(|(_, up)| up)).collect()
    }

    pub(crate) fn bytes(&self) -> usize {
        let query = self.query.as_ref().map(|(_, up)| up);
        let all = [&self.down].into_iter().chain(query).chain(&self.to_latent).chain(&self.from_latent);
        all.map(|linear| linear.matrix.bytes()).sum()
    }
}

/// Columns `first..first + count` of rows of `width` numbers.
fn columns(from: &[f32], width: usize, first: usize, count: usize) -> Vec<f32> {
    from.chunks_exact(width).flat_map(|row| &row[first..first + count]).copied().collect()
}

/// The other way: rows of `count` numbers into columns from `first` on of rows of `width`.
fn put_columns(from: &[f32], count: usize, to: &mut [f32], width: usize, first: usize) {
    to.chunks_exact_mut(width).zip(from.chunks_exact(count)).for_each(|(to, from)| to[first..first + count].copy_from_slice(from));
}
