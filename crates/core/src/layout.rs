//! The shape of cached KV, which two nodes compare before they exchange a byte of it.

use core::str::FromStr;

use rkyv::{Archive, Deserialize, Serialize};

/// Element type of weights and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 16 bits, for speed.
    Bf16,
    /// 32 bits, for exactness.
    F32,
}

impl Dtype {
    /// Its word on command lines.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }
}

/// A word that names no type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {0}")]
pub struct UnknownType(&'static str);

impl FromStr for Dtype {
    type Err = UnknownType;

    fn from_str(word: &str) -> Result<Self, UnknownType> {
        [Self::Bf16, Self::F32].into_iter().find(|dtype| dtype.as_str() == word).ok_or(UnknownType("bf16 or f32"))
    }
}

/// Numbers of an 8-bit vector that share a scale.
pub const INT8_GROUP: usize = 32;

/// Element type of cached keys and values.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 32-bit IEEE float, little-endian.
    F32,
    /// bfloat16, little-endian.
    Bf16,
    /// Signed bytes; behind those of a vector stands a bfloat16 for each [`INT8_GROUP`] of them (the last group may be shorter), by which
    /// they are multiplied.
    Int8,
}

impl KvDtype {
    /// Its word on command lines.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of one cached vector of so many numbers.
    #[must_use]
    pub const fn vector_bytes(self, numbers: usize) -> usize {
        match self {
            Self::F32 => 4 * numbers,
            Self::Bf16 => 2 * numbers,
            Self::Int8 => numbers + 2 * numbers.div_ceil(INT8_GROUP),
        }
    }
}

/// What KV is kept as where nobody says otherwise: as the activations are.
impl From<Dtype> for KvDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Bf16 => Self::Bf16,
            Dtype::F32 => Self::F32,
        }
    }
}

impl FromStr for KvDtype {
    type Err = UnknownType;

    fn from_str(word: &str) -> Result<Self, UnknownType> {
        let all = [Self::F32, Self::Bf16, Self::Int8];
        all.into_iter().find(|dtype| dtype.as_str() == word).ok_or(UnknownType("bf16, int8 or f32"))
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
/// `[parts (K, V or the latent), kv_heads, block_tokens]` of vectors of `head_dim` numbers; a block is `layers` cells.
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
        self.parts.count() * self.kv_heads as usize * self.vector_bytes()
    }

    /// Bytes of one cached vector: one run, whatever its type needs beside the numbers included, so that a vector's bytes depend on it alone.
    #[must_use]
    pub const fn vector_bytes(&self) -> usize {
        self.dtype.vector_bytes(self.head_dim as usize)
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
            (self.dtype != other.dtype, "kv_dtype"),
        ]
        .into_iter()
        .find_map(|(differs, name)| differs.then_some(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_follow_from_the_type() {
        let layout =
            |dtype, head_dim| KvLayout { layers: 3, parts: KvParts::KeysValues, kv_heads: 2, head_dim, block_tokens: 16, dtype };
        let block = |dtype, head_dim| layout(dtype, head_dim).block_bytes();
        assert_eq!([KvDtype::F32, KvDtype::Bf16].map(|dtype| block(dtype, 64)), [3 * 2 * 2 * 16 * 256, 3 * 2 * 2 * 16 * 128]);
        assert_eq!([64, 80, 10].map(|dim| block(KvDtype::Int8, dim)), [68, 86, 12].map(|vector| 3 * 2 * 2 * 16 * vector));
    }

    #[test]
    fn a_type_is_known_by_its_word_and_told_from_others() {
        let layout = |dtype| KvLayout { layers: 1, parts: KvParts::Latent, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype };
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
            assert_eq!(dtype.as_str().parse(), Ok(dtype));
            let differs = layout(dtype).differs(&layout(KvDtype::Int8));
            assert_eq!(differs, (dtype != KvDtype::Int8).then_some("kv_dtype"));
        }
        assert_eq!([Dtype::Bf16, Dtype::F32].map(|dtype| dtype.as_str().parse()), [Ok(Dtype::Bf16), Ok(Dtype::F32)]);
        assert!("int8".parse::<Dtype>().is_err() && "q8_0".parse::<KvDtype>().is_err());
    }
}
