//! The shape of cached KV, which two nodes compare before they exchange a byte of it.

use rkyv::{Archive, Deserialize, Serialize};

/// Element type of cached keys and values.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 32-bit IEEE float, little-endian.
    F32,
    /// bfloat16, little-endian.
    Bf16,
}

impl KvDtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// What of a token is cached in a layer.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvParts {
    /// For each KV head a key and a value, `head_dim` numbers each.
    KeysValues,
    /// One vector of `head_dim` numbers for all heads: multi-head latent attention's latent, then its turned key. Keys and values are made
    /// of it where it is read.
    Latent,
}

impl KvParts {
    /// Vectors for each token and KV head.
    #[must_use]
    pub const fn count(self) -> usize {
        match self {
            Self::KeysValues => 2,
            Self::Latent => 1,
        }
    }
}

/// How a node keeps KV. One *cell* is the KV of one block in one layer, contiguous,
/// `[parts (K, V or the latent), kv_heads, block_tokens, head_dim]`; a block is `layers` cells.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Decoder layers.
    pub layers: u16,
    /// What of a token is cached.
    pub parts: KvParts,
    /// Key/value heads (fewer than query heads with GQA; one with a latent).
    pub kv_heads: u16,
    /// Elements of one cached vector.
    pub head_dim: u16,
    /// Tokens of one block: a power of two.
    pub block_tokens: u16,
    /// Element type.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// Bytes of one cell.
    #[must_use]
    pub const fn cell_bytes(&self) -> usize {
        self.token_bytes() * self.block_tokens as usize
    }

    /// Bytes of one token in one layer.
    #[must_use]
    pub const fn token_bytes(&self) -> usize {
        self.parts.count() * self.kv_heads as usize * self.head_dim as usize * self.dtype.bytes()
    }

    /// Bytes of one block, all layers.
    #[must_use]
    pub const fn block_bytes(&self) -> usize {
        self.cell_bytes() * self.layers as usize
    }

    /// Blocks that `tokens` tokens need.
    #[must_use]
    pub const fn blocks(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens as usize)
    }

    /// The first field in which two layouts differ, by name; `None` when they are equal.
    #[must_use]
    pub fn differs(&self, other: &Self) -> Option<&'static str> {
        [
            (self.layers != other.layers, "layers"),
            (self.parts != other.parts, "parts"),
            (self.kv_heads != other.kv_heads, "kv_heads"),
            (self.head_dim != other.head_dim, "head_dim"),
            (self.block_tokens != other.block_tokens, "block_tokens"),
            (self.dtype != other.dtype, "dtype"),
        ]
        .into_iter()
        .find_map(|(differs, name)| differs.then_some(name))
    }
}
