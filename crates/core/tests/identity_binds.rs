//! What a cell's digest binds: change any one thing that makes KV another's, and the digest is another.

use std::collections::BTreeSet;

use millrace_core::identity::{Chain, TenantKey, block_names, cell_digest};
use millrace_core::ids::TokenId;
use millrace_core::layout::{KvDtype, KvLayout, KvParts};
use millrace_core::message::ModelIdentity;

#[derive(Clone)]
struct Cell {
    tenant: [u8; 32],
    model: ModelIdentity,
    salt: Vec<u8>,
    tokens: Vec<TokenId>,
    block: usize,
    layer: u16,
    bytes: Vec<u8>,
}

impl Cell {
    fn digest(&self) -> u64 {
        let chain = Chain::new(TenantKey(self.tenant), &self.model.fingerprint(), &self.salt);
        cell_digest(&block_names(&chain, &self.tokens, 4)[self.block], self.layer, &self.bytes)
    }
}

fn cell() -> Cell {
    let layout =
        KvLayout { layers: 4, parts: KvParts::KeysValues, kv_heads: 2, head_dim: 8, block_tokens: 4, dtype: KvDtype::Bf16 };
    let model = ModelIdentity { name: "m".into(), weights: [1; 32], tokenizer: [2; 32], layout };
    let bytes = (0..64).map(|i| i * 3).collect();
    Cell { tenant: [7; 32], model, salt: vec![], tokens: (0..11).collect(), block: 1, layer: 2, bytes }
}

/// What is changed of a cell.
type Change = fn(&mut Cell);

#[test]
fn whatever_makes_it_another_cell_makes_it_another_digest() {
    let changes: [(&str, Change); 19] = [
        ("nothing", |_| {}),
        ("tenant", |c| c.tenant[31] ^= 1),
        ("weights", |c| c.model.weights[0] ^= 1),
        ("tokenizer", |c| c.model.tokenizer[0] ^= 1),
        ("layers", |c| c.model.layout.layers += 1),
        ("what is cached", |c| c.model.layout.parts = KvParts::Latent),
        ("kv heads", |c| c.model.layout.kv_heads += 1),
        ("head size", |c| c.model.layout.head_dim += 1),
        ("block size", |c| c.model.layout.block_tokens *= 2),
        ("element type", |c| c.model.layout.dtype = KvDtype::F32),
        ("numbers of 8 bits", |c| c.model.layout.dtype = KvDtype::Int8),
        ("salt", |c| c.salt.push(0)),
        ("the first token", |c| c.tokens[0] += 100),
        ("a token of the block", |c| c.tokens[5] += 100),
        ("the block before", |c| c.block = 0),
        ("the unfinished block", |c| c.block = 2),
        ("layer", |c| c.layer += 1),
        ("a bit", |c| c.bytes[63] ^= 0x80),
        ("two bytes swapped", |c| c.bytes.swap(0, 1)),
    ];
    let digest = |change: fn(&mut Cell)| {
        let mut cell = cell();
        change(&mut cell);
        cell.digest()
    };
    let digests: BTreeSet<u64> = changes.iter().map(|(_, change)| digest(*change)).collect();
    let same: Vec<_> = changes[1..].iter().filter(|(_, change)| digest(*change) == digest(|_| {})).map(|(what, _)| what).collect();
    assert_eq!((same.len(), digests.len()), (0, changes.len()), "not bound: {same:?}");
}

#[test]
fn what_comes_later_does_not_change_it() {
    let (mut longer, shorter) = (cell(), cell());
    longer.tokens.extend([1, 2, 3]);
    longer.model.name = "another name of the same model".into();
    assert_eq!(longer.digest(), shorter.digest());
}
