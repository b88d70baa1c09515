//! One decoder layer in tensors: queries and what is cached of a token before attention, the feed-forward layer after it.
//!
//! Hidden states stay in f32, as they do on the processor; products are of the engine's type.

use millrace_checkpoint::{AttentionKind, Grouped, LATENT_NORM_EPS, Latent as LatentShape, MlpKind};
use tch::{Kind, Tensor};

use crate::ModelError;
use crate::tensor::experts::Experts;
use crate::tensor::weights::{Linear, Loader, Norm, bytes};

/// The weights.
pub(super) struct Layer {
    input_norm: Norm,
    source: Source,
    output: Linear,
    post_norm: Norm,
    feed: Feed,
    kind: Kind,
}

/// Cosines and sines of a step's tokens: `[tokens, 1, turned / 2]` each.
pub(super) struct Angles {
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
}

/// What attention takes of a layer.
pub(super) struct Projected {
    /// `[tokens, heads, head_dim]`, in f32.
    pub(super) queries: Tensor,
    /// `[tokens, parts * kv_heads, head_dim]`, in the engine's type and in a cell's order.
    pub(super) cached: Tensor,
}

/// Where queries, keys and values come from.
enum Source {
    Heads(Box<Heads>),
    Latent(Box<Latent>),
}

struct Heads {
    qkv: Linear,
    norms: Option<[Norm; 2]>,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
}

/// See `crate::latent` for what is computed and why.
struct Latent {
    shape: LatentShape,
    heads: i64,
    down: Linear,
    query: Option<(Norm, Linear)>,
    norm: Norm,
    /// `[heads, plain_dim, rank]`.
    to_latent: Tensor,
    /// `[heads, rank, value_dim]`.
    from_latent: Tensor,
}

/// What follows attention.
enum Feed {
    SwiGlu(SwiGlu),
    Gelu { up: Linear, down: Linear },
    Experts(Box<Experts>),
}

/// `down(silu(gate(x)) * up(x))`.
pub(super) struct SwiGlu {
    gate_up: Linear,
    down: Linear,
}

impl Layer {
    pub(super) fn load(loader: &Loader<'_>, layer: usize) -> Result<Self, ModelError> {
        let prefix = format!("model.layers.{layer}.");
        let attention = &loader.config.attention;
        let source = match &attention.kind {
            AttentionKind::Grouped(grouped) => Source::Heads(Box::new(Heads::load(loader, &prefix, grouped)?)),
            AttentionKind::Latent(latent) => Source::Latent(Box::new(Latent::load(loader, &prefix, latent)?)),
        };
        Ok(Self {
            input_norm: loader.norm(&format!("{prefix}input_layernorm"))?,
            source,
            output: loader.linear(&[format!("{prefix}self_attn.o_proj")], attention.output_bias)?,
            post_norm: loader.norm(&format!("{prefix}post_attention_layernorm"))?,
            feed: Feed::load(loader, &prefix, layer)?,
            kind: loader.kind(),
        })
    }

    /// `hidden`: `[tokens, hidden]` in f32.
    pub(super) fn project(&self, hidden: &Tensor, angles: Option<&Angles>) -> Result<Projected, ModelError> {
        let normed = self.input_norm.apply(hidden)?.f_to_kind(self.kind)?;
        match &self.source {
            Source::Heads(heads) => heads.project(&normed, angles),
            Source::Latent(latent) => latent.project(&normed, angles),
        }
    }

    /// `hidden += output(attended)`, then `hidden += feed(norm(hidden))`. `attended`: `[tokens, heads, value_dim]`, or sums of latents.
    pub(super) fn finish(&self, attended: &Tensor, hidden: &mut Tensor) -> Result<(), ModelError> {
        let values = match &self.source {
            Source::Heads(_) => attended.f_reshape([attended.size()[0], -1])?,
            Source::Latent(latent) => latent.values(attended)?,
        };
        let _ = hidden.f_add_(&self.output.apply(&values)?)?;
        let normed = self.post_norm.apply(hidden)?;
        let _ = hidden.f_add_(&self.feed.apply(&normed, self.kind)?)?;
        Ok(())
    }

    /// Bytes of weights that a step reads.
    pub(super) fn bytes(&self) -> usize {
        let source = match &self.source {
            Source::Heads(heads) => heads.qkv.bytes(),
            Source::Latent(latent) => {
                let query = latent.query.as_ref().map_or(0, |(_, up)| up.bytes());
                latent.down.bytes() + query + bytes(&latent.to_latent) + bytes(&latent.from_latent)
            }
        };
        source + self.output.bytes() + self.feed.bytes()
    }
}

impl Angles {
    /// Turns heads `[tokens, heads, turned]` in f32: number `i` with number `i + turned / 2`.
    fn turn(&self, heads: &Tensor) -> Result<Tensor, ModelError> {
        let half = self.cos.size()[2];
        let (low, high) = (heads.f_narrow(2, 0, half)?, heads.f_narrow(2, half, half)?);
        let turned_low = low.f_mul(&self.cos)?.f_sub(&high.f_mul(&self.sin)?)?;
        let turned_high = high.f_mul(&self.cos)?.f_add(&low.f_mul(&self.sin)?)?;
        Ok(Tensor::f_cat(&[turned_low, turned_high], 2)?)
    }
}

impl Heads {
    fn load(loader: &Loader<'_>, prefix: &str, grouped: &Grouped) -> Result<Self, ModelError> {
        let config = loader.config;
        let parts: &[&str] = if grouped.joined { &["qkv_proj"] } else { &["q_proj", "k_proj", "v_proj"] };
        let names: Vec<String> = parts.iter().map(|part| format!("{prefix}self_attn.{part}")).collect();
        let norm = |part: &str| loader.rms_norm(&format!("{prefix}self_attn.{part}"), config.norm.eps);
        Ok(Self {
            qkv: loader.linear(&names, config.attention.qkv_bias)?,
            norms: if grouped.norms { Some([norm("q_norm")?, norm("k_norm")?]) } else { None },
            heads: config.attention.heads as i64,
            kv_heads: grouped.kv_heads as i64,
            head_dim: grouped.head_dim as i64,
        })
    }

    fn project(&self, normed: &Tensor, angles: Option<&Angles>) -> Result<Projected, ModelError> {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        let all = self.qkv.apply(normed)?.f_reshape([-1, heads + 2 * kv_heads, head_dim])?;
        let values = all.f_narrow(1, heads + kv_heads, kv_heads)?;
        let mut turned = all.f_narrow(1, 0, heads + kv_heads)?.f_to_kind(Kind::Float)?;
        if let Some([query, key]) = &self.norms {
            let parts = [query.apply(&turned.f_narrow(1, 0, heads)?)?, key.apply(&turned.f_narrow(1, heads, kv_heads)?)?];
            turned = Tensor::f_cat(&parts, 1)?;
        }
        if let Some(angles) = angles {
            turned = angles.turn(&turned)?;
        }
        let keys = turned.f_narrow(1, heads, kv_heads)?.f_to_kind(values.kind())?;
        Ok(Projected { queries: turned.f_narrow(1, 0, heads)?, cached: Tensor::f_cat(&[keys, values], 1)? })
    }
}

impl Latent {
    fn load(loader: &Loader<'_>, prefix: &str, shape: &LatentShape) -> Result<Self, ModelError> {
        let heads = loader.config.attention.heads as i64;
        let name = |part: &str| format!("{prefix}self_attn.{part}");
        let first = if shape.query_rank.is_some() { "q_a_proj" } else { "q_proj" };
        let query = match shape.query_rank {
            None => None,
            Some(_) => {
                Some((loader.rms_norm(&name("q_a_layernorm"), LATENT_NORM_EPS)?, loader.linear(&[name("q_b_proj")], false)?))
            }
        };
        let (plain, value) = (shape.plain_dim as i64, shape.value_dim as i64);
        let both = loader.tensor(&name("kv_b_proj.weight"))?.f_reshape([heads, plain + value, shape.rank as i64])?;
        Ok(Self {
            heads,
            down: loader.linear(&[name(first), name("kv_a_proj_with_mqa")], false)?,
            query,
            norm: loader.rms_norm(&name("kv_a_layernorm"), LATENT_NORM_EPS)?,
            to_latent: both.f_narrow(1, 0, plain)?.f_contiguous()?,
            from_latent: both.f_narrow(1, plain, value)?.f_transpose(1, 2)?.f_contiguous()?,
            shape: shape.clone(),
        })
    }

    fn project(&self, normed: &Tensor, angles: Option<&Angles>) -> Result<Projected, ModelError> {
        let LatentShape { rank, plain_dim, turned_dim, .. } = self.shape;
        let (rank, plain_dim, turned_dim, kind) = (rank as i64, plain_dim as i64, turned_dim as i64, normed.kind());
        let down = self.down.apply(normed)?;
        let first = down.size()[1] - rank - turned_dim;
        let mut queries = down.f_narrow(1, 0, first)?;
        if let Some((norm, up)) = &self.query {
            queries = up.apply(&norm.apply(&queries)?.f_to_kind(kind)?)?;
        }
        let queries = queries.f_reshape([-1, self.heads, plain_dim + turned_dim])?;
        let plain = queries.f_narrow(2, 0, plain_dim)?.f_transpose(0, 1)?;
        let taken = plain.f_bmm(&self.to_latent)?.f_transpose(0, 1)?.f_to_kind(Kind::Float)?;
        let latent = self.norm.apply(&down.f_narrow(1, first, rank)?)?.f_unsqueeze(1)?;
        let mut turned = [queries.f_narrow(2, plain_dim, turned_dim)?, down.f_narrow(1, first + rank, turned_dim)?.f_unsqueeze(1)?];
        for turned in &mut turned {
            let exact = turned.f_to_kind(Kind::Float)?;
            *turned = angles.map_or(Ok(exact.shallow_clone()), |angles| angles.turn(&exact))?;
        }
        let [query, key] = turned;
        let cached = Tensor::f_cat(&[latent, key], 2)?.f_to_kind(kind)?;
        Ok(Projected { queries: Tensor::f_cat(&[taken, query], 2)?, cached })
    }

    /// `attended`: sums of latents, `[tokens, heads, rank]`. Gives `[tokens, heads * value_dim]`.
    fn values(&self, attended: &Tensor) -> Result<Tensor, ModelError> {
        let values = attended.f_transpose(0, 1)?.f_bmm(&self.from_latent)?;
        Ok(values.f_transpose(0, 1)?.f_reshape([attended.size()[0], -1])?)
    }
}

impl Feed {
    fn load(loader: &Loader<'_>, prefix: &str, layer: usize) -> Result<Self, ModelError> {
        if let Some(experts) = loader.config.experts_of(layer) {
            return Ok(Self::Experts(Box::new(Experts::load(loader, prefix, experts)?)));
        }
        let biased = |part: &str| loader.linear(&[format!("{prefix}mlp.{part}")], true);
        match loader.config.mlp.kind {
            MlpKind::SwiGlu => Ok(Self::SwiGlu(SwiGlu::load(loader, &format!("{prefix}mlp."))?)),
            MlpKind::Gelu => Ok(Self::Gelu { up: biased("up_proj")?, down: biased("down_proj")? }),
        }
    }

    /// `normed`: in f32.
    fn apply(&self, normed: &Tensor, kind: Kind) -> Result<Tensor, ModelError> {
        match self {
            Self::SwiGlu(mlp) => mlp.apply(&normed.f_to_kind(kind)?),
            Self::Gelu { up, down } => down.apply(&up.apply(&normed.f_to_kind(kind)?)?.f_gelu("tanh")?),
            Self::Experts(experts) => experts.apply(normed, kind),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::SwiGlu(mlp) => mlp.bytes(),
            Self::Gelu { up, down } => up.bytes() + down.bytes(),
            Self::Experts(experts) => experts.bytes(),
        }
    }
}

impl SwiGlu {
    /// From `gate_proj`, `up_proj` and `down_proj` behind `prefix`.
    pub(super) fn load(loader: &Loader<'_>, prefix: &str) -> Result<Self, ModelError> {
        let gate_up = loader.linear(&["gate_proj", "up_proj"].map(|part| format!("{prefix}{part}")), false)?;
        Ok(Self { gate_up, down: loader.linear(&[format!("{prefix}down_proj")], false)? })
    }

    /// `x` and what it gives are in the engine's type.
    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let both = self.gate_up.apply(x)?;
        let width = both.size()[1] / 2;
        let gated = both.f_narrow(1, 0, width)?.f_silu()?.f_mul(&both.f_narrow(1, width, width)?)?;
        self.down.apply(&gated)
    }

    pub(super) fn bytes(&self) -> usize {
        self.gate_up.bytes() + self.down.bytes()
    }
}
