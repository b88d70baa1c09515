//! The tensors that follow from a description: canonical names and shapes, in the order of computation.
//!
//! Canonical names are those of Hugging Face's Llama, and its siblings' where Llama has no such part. How a file calls and lays them is said in
//! `names`.

use crate::{Attention, AttentionKind, Experts, Latent, MlpKind, ModelConfig, NormKind, Positions};

/// Names and shapes.
pub(crate) type Shapes = Vec<(String, Vec<usize>)>;

impl ModelConfig {
    /// Canonical name and shape of every tensor the description needs, in the order of computation.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut all = Shapes::new();
        linear(&mut all, "model.embed_tokens", [self.vocab_size, hidden], false);
        if self.positions == Positions::Learned {
            linear(&mut all, "model.embed_positions", [self.max_positions, hidden], false);
        }
        for layer in 0..self.layers {
            let prefix = format!("model.layers.{layer}.");
            self.norm_tensors(&mut all, &format!("{prefix}input_layernorm"));
            self.attention_tensors(&mut all, &format!("{prefix}self_attn."));
            self.norm_tensors(&mut all, &format!("{prefix}post_attention_layernorm"));
            self.mlp_tensors(&mut all, &format!("{prefix}mlp."), layer);
        }
        self.norm_tensors(&mut all, "model.norm");
        if !self.tie_word_embeddings {
            linear(&mut all, "lm_head", [self.vocab_size, hidden], false);
        }
        all
    }

    fn norm_tensors(&self, all: &mut Shapes, name: &str) {
        vector(all, &format!("{name}.weight"), self.hidden_size);
        if self.norm.kind == NormKind::Layer {
            vector(all, &format!("{name}.bias"), self.hidden_size);
        }
    }

    fn attention_tensors(&self, all: &mut Shapes, prefix: &str) {
        let attention = &self.attention;
        let Attention { heads, qkv_bias, output_bias, .. } = *attention;
        match &attention.kind {
            AttentionKind::Grouped(grouped) => {
                let (q, kv) = (heads * grouped.head_dim, grouped.kv_heads * grouped.head_dim);
                let apart = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
                let joined = [("qkv_proj", q + 2 * kv)];
                let parts: &[(&str, usize)] = if grouped.joined { &joined } else { &apart };
                for (part, rows) in parts {
                    linear(all, &format!("{prefix}{part}"), [*rows, self.hidden_size], qkv_bias);
                }
                for part in ["q_norm", "k_norm"].into_iter().filter(|_| grouped.norms) {
                    vector(all, &format!("{prefix}{part}.weight"), grouped.head_dim);
                }
            }
            AttentionKind::Latent(latent) => self.latent_tensors(all, prefix, latent),
        }
        linear(all, &format!("{prefix}o_proj"), [self.hidden_size, heads * attention.value_dim()], output_bias);
    }

    fn latent_tensors(&self, all: &mut Shapes, prefix: &str, latent: &Latent) {
        let (heads, hidden) = (self.attention.heads, self.hidden_size);
        let queries = heads * self.attention.query_dim();
        match latent.query_rank {
            None => linear(all, &format!("{prefix}q_proj"), [queries, hidden], false),
            Some(rank) => {
                linear(all, &format!("{prefix}q_a_proj"), [rank, hidden], false);
                vector(all, &format!("{prefix}q_a_layernorm.weight"), rank);
                linear(all, &format!("{prefix}q_b_proj"), [queries, rank], false);
            }
        }
        linear(all, &format!("{prefix}kv_a_proj_with_mqa"), [latent.rank + latent.turned_dim, hidden], false);
        vector(all, &format!("{prefix}kv_a_layernorm.weight"), latent.rank);
        linear(all, &format!("{prefix}kv_b_proj"), [heads * (latent.plain_dim + latent.value_dim), latent.rank], false);
    }

    fn mlp_tensors(&self, all: &mut Shapes, prefix: &str, layer: usize) {
        let hidden = self.hidden_size;
        match self.experts_of(layer) {
            Some(experts) => {
                linear(all, &format!("{prefix}gate"), [experts.count, hidden], false);
                if experts.router.bias {
                    vector(all, &format!("{prefix}gate.e_score_correction_bias"), experts.count);
                }
                for expert in 0..experts.count {
                    swiglu(all, &format!("{prefix}experts.{expert}."), experts.width, hidden);
                }
                if experts.shared_width > 0 {
                    swiglu(all, &format!("{prefix}shared_experts."), experts.shared_width, hidden);
                }
            }
            None if self.mlp.kind == MlpKind::SwiGlu => swiglu(all, prefix, self.mlp.width, hidden),
            None => {
                linear(all, &format!("{prefix}up_proj"), [self.mlp.width, hidden], true);
                linear(all, &format!("{prefix}down_proj"), [hidden, self.mlp.width], true);
            }
        }
    }

    /// The experts of a layer; `None` where it has a plain feed-forward layer.
    pub fn experts_of(&self, layer: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| layer >= experts.first_layer)
    }
}

fn linear(all: &mut Shapes, name: &str, shape: [usize; 2], bias: bool) {
    all.push((format!("{name}.weight"), shape.into()));
    if bias {
        all.push((format!("{name}.bias"), vec![shape[0]]));
    }
}

fn vector(all: &mut Shapes, name: &str, len: usize) {
    all.push((name.to_owned(), vec![len]));
}

fn swiglu(all: &mut Shapes, prefix: &str, width: usize, hidden: usize) {
    for part in ["gate_proj", "up_proj"] {
        linear(all, &format!("{prefix}{part}"), [width, hidden], false);
    }
    linear(all, &format!("{prefix}down_proj"), [hidden, width], false);
}
