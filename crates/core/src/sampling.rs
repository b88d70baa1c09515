//! How the next token is chosen, and when a request is at its end. The drawing itself is the engine's work;
//! the parameters and the counter-based random numbers live here, so that every node draws the same.

use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::ids::TokenId;

/// Sampling parameters of one request, already validated by the gateway.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: keep the smallest set of tokens whose probabilities reach this; 1 keeps all.
    pub top_p: f32,
    /// Keep only the k likeliest; 0 keeps all.
    pub top_k: u32,
    /// Names the random sequence; with the position it decides the draw.
    pub seed: u64,
    /// Tokens to generate at most, counted from the end of the prompt.
    pub max_new: u32,
    /// Tokens that end the answer.
    pub eos: Vec<TokenId>,
    /// Go on past `eos`.
    pub ignore_eos: bool,
}

impl Sampling {
    /// Whether `token` ends the answer.
    #[must_use]
    pub fn is_end(&self, token: TokenId) -> bool {
        !self.ignore_eos && self.eos.contains(&token)
    }
}

/// A uniform number in [0, 1) for (seed, position): the same on every node, so a request that moves draws the same token.
/// SplitMix64's finaliser over the two words (Steele, Lea, Flood 2014), twice for independence of neighbouring seeds.
#[must_use]
pub fn uniform(seed: u64, position: u64) -> f64 {
    let word = mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(position.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (word >> 11) as f64 / (1u64 << 53) as f64
}

/// SplitMix64's finaliser: a good mixer of one 64-bit word.
#[must_use]
pub const fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_is_uniform_and_keyed() {
        let draws = 20_000u64;
        let mean = (0..draws).map(|p| uniform(42, p)).sum::<f64>() / draws as f64;
        assert!((mean - 0.5).abs() < 0.01, "mean {mean}");
        assert!((0..draws).all(|p| (0.0..1.0).contains(&uniform(7, p))));
        assert_ne!(uniform(1, 5), uniform(2, 5));
        assert_eq!(uniform(1, 5), uniform(1, 5));
    }
}
