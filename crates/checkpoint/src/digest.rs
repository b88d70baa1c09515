//! The digest of a description: what makes two configurations the same. Every structure is taken apart by name, so that a new field does not
//! compile before it is in here.

use crate::{
    Attention, AttentionKind, Experts, Grouped, Groups, Latent, Mlp, MlpKind, ModelConfig, Norm, NormKind, Positions, Rope, Router,
    Scaling, Score,
};

impl ModelConfig {
    /// Digest of the fields that change an answer or the layout of its KV. Two machines with the same files agree on it.
    pub fn digest(&self) -> [u8; 32] {
        let Self {
            name: _,
            architecture: _,
            vocab_size,
            hidden_size,
            layers,
            norm,
            positions,
            attention,
            mlp,
            experts,
            max_positions,
            tie_word_embeddings,
            bos,
            eos,
        } = self;
        let mut digest = Digest(blake3::Hasher::new_derive_key("millrace 2026 model config v2"));
        digest.counts(&[*vocab_size, *hidden_size, *layers, *max_positions, usize::from(*tie_word_embeddings)]);
        let Norm { kind, eps } = norm;
        digest.counts(&[usize::from(*kind == NormKind::Layer)]);
        digest.number(*eps);
        digest.positions(positions);
        digest.attention(attention);
        let Mlp { width, kind } = mlp;
        digest.counts(&[*width, usize::from(*kind == MlpKind::Gelu)]);
        digest.experts(experts.as_ref());
        digest.optional(bos.map(|id| id as usize));
        digest.counts(&[eos.len()]);
        eos.iter().for_each(|&id| digest.counts(&[id as usize]));
        *digest.0.finalize().as_bytes()
    }
}

struct Digest(blake3::Hasher);

impl Digest {
    fn counts(&mut self, counts: &[usize]) {
        for &count in counts {
            self.0.update(&(count as u64).to_le_bytes());
        }
    }

    fn number(&mut self, number: f64) {
        self.0.update(&number.to_bits().to_le_bytes());
    }

    fn optional(&mut self, count: Option<usize>) {
        self.counts(&[usize::from(count.is_some()), count.unwrap_or(0)]);
    }

    fn positions(&mut self, positions: &Positions) {
        let Positions::Rotary(Rope { theta, scaling }) = positions else { return self.counts(&[0]) };
        self.counts(&[1]);
        self.number(*theta);
        match scaling {
            Scaling::Plain => self.counts(&[0]),
            Scaling::Llama3(s) => {
                self.counts(&[1]);
                [s.factor, s.low, s.high, s.original_max].into_iter().for_each(|x| self.number(x));
            }
            Scaling::Factors(factors) => {
                self.counts(&[2, factors.len()]);
                factors.iter().for_each(|&x| self.number(f64::from(x)));
            }
            Scaling::Yarn(y) => {
                self.counts(&[3]);
                [y.factor, y.fast, y.slow, y.original_max, y.turn_scale].into_iter().for_each(|x| self.number(x));
            }
        }
    }

    fn attention(&mut self, attention: &Attention) {
        let Attention { heads, kind, qkv_bias, output_bias, scale, windows } = attention;
        self.counts(&[*heads, usize::from(*qkv_bias), usize::from(*output_bias), windows.len()]);
        self.number(*scale);
        windows.iter().for_each(|window| self.optional(*window));
        match kind {
            AttentionKind::Grouped(Grouped { kv_heads, head_dim, joined, norms }) => {
                self.counts(&[0, *kv_heads, *head_dim, usize::from(*joined), usize::from(*norms)]);
            }
            AttentionKind::Latent(Latent { query_rank, rank, plain_dim, turned_dim, value_dim, pairs }) => {
                self.counts(&[1, *rank, *plain_dim, *turned_dim, *value_dim, usize::from(*pairs)]);
                self.optional(*query_rank);
            }
        }
    }

    fn experts(&mut self, experts: Option<&Experts>) {
        let Some(Experts { count, chosen, width, shared_width, first_layer, router }) = experts else { return self.counts(&[0]) };
        let Router { score, bias, groups, normalised, scale } = router;
        self.counts(&[1, *count, *chosen, *width, *shared_width, *first_layer, usize::from(*score == Score::Sigmoid)]);
        self.counts(&[usize::from(*bias), usize::from(*normalised), usize::from(groups.is_some())]);
        if let Some(Groups { count, chosen, best }) = groups {
            self.counts(&[*count, *chosen, *best]);
        }
        self.number(*scale);
    }
}
