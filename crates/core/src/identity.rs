//! Block identity: which bytes of KV may stand for which tokens.
//!
//! `H_i = blake3_keyed(tenant_key, H_{i-1} || tokens_i)`, rooted in the model's fingerprint. The key is the tenant's, so
//! nobody without it can search for a collision or name another tenant's blocks (vLLM's GHSA-rm76-4mrf-v9r8 is the failure this excludes).
//! The chain carries 256 bits; the name on wire and in the index is the first 128.

use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::ids::{BlockHash, TokenId};
use crate::planted::{Bug, planted};

/// A tenant's secret. Comes from the log; reaches a node only inside a ticket.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq)]
pub struct TenantKey(pub [u8; 32]);

impl core::fmt::Debug for TenantKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("TenantKey(..)")
    }
}

impl TenantKey {
    /// Tells the tenant's blocks from others' on a node, where names do not say whose they are.
    #[must_use]
    pub fn owner(&self) -> Owner {
        let digest = blake3::keyed_hash(&self.0, b"millrace owner v1");
        let mut short = [0; 8];
        short.copy_from_slice(&digest.as_bytes()[..8]);
        Owner(u64::from_le_bytes(short))
    }
}

/// Whose a cached block is, without saying who that is. Two tenants may have one by accident, once in 2^64: then evicting the blocks of one
/// evicts the other's too, which costs time only.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Owner(pub u64);

/// Digest of everything that two nodes must share for their KV to be interchangeable: weights, tokenizer, KV layout and dtype.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

/// What a link of the chain has before its tokens: its kind and the state.
const HEAD_BYTES: usize = 4 + 32;
/// The longest link that is laid out in place: a block of 128 tokens, the most that a cluster is set up with.
const LINK_BYTES_MAX: usize = HEAD_BYTES + 128 * size_of::<TokenId>();

/// The running state of a chain: grows by one full block at a time.
#[derive(Clone, Debug)]
pub struct Chain {
    key: TenantKey,
    state: [u8; 32],
}

impl Chain {
    /// An empty chain for one tenant and one model. `salt` narrows sharing further (OpenAI's `cache_salt`); empty for none.
    #[must_use]
    pub fn new(key: TenantKey, fingerprint: &Fingerprint, salt: &[u8]) -> Self {
        let key = if planted(Bug::HashWithoutTenant) { TenantKey([0; 32]) } else { key };
        let salt = if planted(Bug::HashWithoutSalt) { &[] } else { salt };
        let mut hasher = blake3::Hasher::new_keyed(&key.0);
        hasher.update(b"millrace root v1").update(&fingerprint.0).update(salt);
        Self { key, state: *hasher.finalize().as_bytes() }
    }

    /// Appends one full block and returns its name.
    pub fn push(&mut self, tokens: &[TokenId]) -> BlockHash {
        let next = self.next(b"full", tokens);
        if !planted(Bug::HashWithoutParent) {
            self.state = next;
        }
        name(&next)
    }

    /// The name of an unfinished last block. It binds a digest to its tokens; it is never shared or indexed.
    #[must_use]
    pub fn tail(&self, tokens: &[TokenId]) -> BlockHash {
        name(&self.next(b"tail", tokens))
    }

    /// Laid out in one piece first: hashing it in one call costs half of what an update for each token does.
    fn next(&self, kind: &[u8; 4], tokens: &[TokenId]) -> [u8; 32] {
        let mut bytes = [0; LINK_BYTES_MAX];
        let length = HEAD_BYTES + size_of_val(tokens);
        if length > bytes.len() {
            return self.next_of_many(kind, tokens);
        }
        bytes[..4].copy_from_slice(kind);
        bytes[4..HEAD_BYTES].copy_from_slice(&self.state);
        for (place, token) in bytes[HEAD_BYTES..].as_chunks_mut::<4>().0.iter_mut().zip(tokens) {
            *place = token.to_le_bytes();
        }
        *blake3::keyed_hash(&self.key.0, &bytes[..length]).as_bytes()
    }

    /// The same for a block of any size.
    fn next_of_many(&self, kind: &[u8; 4], tokens: &[TokenId]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.key.0);
        hasher.update(kind).update(&self.state);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        *hasher.finalize().as_bytes()
    }
}

fn name(state: &[u8; 32]) -> BlockHash {
    let mut short = [0; 16];
    short.copy_from_slice(&state[..16]);
    BlockHash(short)
}

/// Names of all blocks of `tokens`, the unfinished last one included when there is one.
/// The first `tokens.len() / block_tokens` names are of full blocks. O(tokens).
#[must_use]
pub fn block_names(chain: &Chain, tokens: &[TokenId], block_tokens: usize) -> Vec<BlockHash> {
    let mut chain = chain.clone();
    tokens
        .chunks(block_tokens)
        .map(|block| if block.len() == block_tokens { chain.push(block) } else { chain.tail(block) })
        .collect()
}

/// Digest of one cell (the KV of one block in one layer): CRC-64/NVME over its bytes, mixed by XXH3-64 with the block's name and the layer,
/// so that a right-looking cell in the wrong place does not pass. Made where the bytes are born, checked where they are used. It finds
/// faults, of memory, of buses and of ours; against those who mean ill there is TLS (decision 46).
#[must_use]
pub fn cell_digest(block: &BlockHash, layer: u16, bytes: &[u8]) -> u64 {
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes);
    if planted(Bug::DigestWithoutPlace) {
        return crc;
    }
    let mut place = [0; 16 + 2 + 8];
    place[..16].copy_from_slice(&block.0);
    place[16..18].copy_from_slice(&layer.to_le_bytes());
    place[18..].copy_from_slice(&crc.to_le_bytes());
    xxhash_rust::xxh3::xxh3_64(&place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(key: u8, salt: &[u8]) -> Chain {
        Chain::new(TenantKey([key; 32]), &Fingerprint([7; 32]), salt)
    }

    #[test]
    fn names_depend_on_everything_before() {
        let names = block_names(&chain(1, b""), &[1, 2, 3, 4, 5], 2);
        assert_eq!(names.len(), 3);
        let other = block_names(&chain(1, b""), &[9, 2, 3, 4, 5], 2);
        assert!(names.iter().zip(&other).all(|(a, b)| a != b));
        assert_eq!(names, block_names(&chain(1, b""), &[1, 2, 3, 4, 5], 2));
    }

    #[test]
    fn a_link_is_the_hash_of_its_fields_in_order() {
        let chain = chain(1, b"");
        for tokens in [1_u32, 16, 100, 128, 129, 1000] {
            let tokens: Vec<TokenId> = (0..tokens).map(|i| i.wrapping_mul(0x0102_0305)).collect();
            assert_eq!(chain.next(b"full", &tokens), chain.next_of_many(b"full", &tokens), "{} tokens", tokens.len());
        }
    }

    #[test]
    fn tenants_salts_and_tails_do_not_share() {
        let base = block_names(&chain(1, b""), &[1, 2], 2);
        assert_ne!(base, block_names(&chain(2, b""), &[1, 2], 2));
        assert_ne!(base, block_names(&chain(1, b"x"), &[1, 2], 2));
        assert_ne!(base[0], chain(1, b"").tail(&[1, 2]));
    }

    #[test]
    fn digest_binds_place_and_bytes() {
        let (a, b) = (BlockHash([1; 16]), BlockHash([2; 16]));
        let digest = cell_digest(&a, 0, b"kv");
        assert_ne!(digest, cell_digest(&b, 0, b"kv"));
        assert_ne!(digest, cell_digest(&a, 1, b"kv"));
        assert_ne!(digest, cell_digest(&a, 0, b"kw"));
    }
}
