//! What this model is to the cluster: the identity that two processes compare before they exchange KV or tokens.

use millrace_core::layout::{KvDtype, KvLayout};
use millrace_core::message::ModelIdentity;

use crate::Checkpoint;

impl Checkpoint {
    /// How KV of this model is cached.
    ///
    /// # Panics
    /// Never: a configuration's numbers are bounded far below 65,536 when it is read.
    #[must_use]
    pub fn kv_layout(&self, dtype: KvDtype, block_tokens: u16) -> KvLayout {
        let small = |value: usize| u16::try_from(value).expect("bounded when the configuration was read");
        let (parts, kv_heads, head_dim) = self.config.attention.cached();
        let (layers, kv_heads, head_dim) = (small(self.config.layers), small(kv_heads), small(head_dim));
        KvLayout { layers, parts, kv_heads, head_dim, block_tokens, dtype }
    }

    /// The model's identity under its public `name`. Everything that shapes KV beside the layout (weights, rope, norms) is in the
    /// first digest. Reads all weights once.
    #[must_use]
    pub fn identity(&self, name: &str, dtype: KvDtype, block_tokens: u16) -> ModelIdentity {
        let mut weights = blake3::Hasher::new();
        weights.update(&self.weights_digest()).update(&self.config_digest());
        ModelIdentity {
            name: name.to_owned(),
            weights: *weights.finalize().as_bytes(),
            tokenizer: self.tokenizer_digest(),
            layout: self.kv_layout(dtype, block_tokens),
        }
    }

    /// The public name when the operator gives none.
    #[must_use]
    pub fn default_name(&self) -> String {
        self.config.name.clone()
    }
}
