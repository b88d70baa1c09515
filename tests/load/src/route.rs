//! How long the router takes for one decision over many nodes: with the naming of the prompt's blocks, and without.

use std::hint::black_box;
use std::time::Instant;

use millrace_core::holders::Holders;
use millrace_core::identity::{Chain, Fingerprint, TenantKey, block_names};
use millrace_core::ids::{BlockHash, Epoch, NodeId, TokenId};
use millrace_core::message::{Load, Role};
use millrace_core::route::{Ask, CostModel, NodeView, View, place};

use crate::report::{Row, median};

/// Nodes, half of each role.
const NODES: u16 = 64;
const BLOCK_TOKENS: usize = 16;
const PROMPTS: [usize; 3] = [1_000, 16_000, 100_000];
/// Decisions of one run, of which the median counts.
const DECISIONS: usize = 31;

/// Measures placing prompts of which each node holds another share.
///
/// # Panics
/// When a prompt cannot be placed: every node has room.
#[must_use]
pub fn measure(runs: usize) -> Vec<Row> {
    let mut rows = Vec::new();
    for tokens in PROMPTS {
        let prompt: Vec<TokenId> = (0..tokens as u32).map(|i| i.wrapping_mul(7919) % 49_000).collect();
        let names = name(&prompt);
        let holders = holders(&names);
        let measured = |f: &dyn Fn()| (0..runs).map(|_| timed_us(f)).collect::<Vec<_>>();
        let with = measured(&|| decide(&holders, &name(&prompt), tokens));
        let without = measured(&|| decide(&holders, &names, tokens));
        rows.push(Row::new(format!("route decision, {NODES} nodes, {tokens} tokens, naming included, us"), with));
        rows.push(Row::new(format!("route decision, {NODES} nodes, {tokens} tokens, names at hand, us"), without));
    }
    rows
}

fn timed_us(f: &dyn Fn()) -> f64 {
    let once = || {
        let begin = Instant::now();
        f();
        begin.elapsed().as_secs_f64() * 1e6
    };
    median(&(0..DECISIONS).map(|_| once()).collect::<Vec<_>>())
}

fn name(prompt: &[TokenId]) -> Vec<BlockHash> {
    let full = prompt.len() / BLOCK_TOKENS * BLOCK_TOKENS;
    block_names(&Chain::new(TenantKey([7; 32]), &Fingerprint::default(), &[]), &prompt[..full], BLOCK_TOKENS)
}

fn holders(names: &[BlockHash]) -> Holders {
    let mut holders = Holders::default();
    for node in 1..=NODES {
        holders.begin(NodeId(node));
        let share = names.len() * usize::from(node) / usize::from(NODES);
        names[..share].iter().for_each(|block| holders.store(NodeId(node), block));
    }
    holders
}

fn decide(holders: &Holders, names: &[BlockHash], tokens: usize) {
    let prefixes = holders.prefix_lengths(names);
    let view = |node: u16| NodeView {
        node: NodeId(node),
        role: if node.is_multiple_of(2) { Role::Prefill } else { Role::Decode },
        usable: true,
        epoch: Epoch(node.into()),
        load: Load { running: u32::from(node % 5), queued_tokens: u64::from(node) * 100, ..Load::default() },
        prefix_blocks: prefixes.binary_search_by_key(&NodeId(node), |(node, _)| *node).map_or(0, |at| prefixes[at].1),
        inflight_tokens: 0,
        inflight_pairs: 0,
        inflight_sequences: 0,
        correction: Default::default(),
    };
    let nodes: Vec<_> = (1..=NODES).map(view).collect();
    let ask = Ask {
        tokens: tokens as u32,
        max_new: 256,
        block_tokens: BLOCK_TOKENS as u32,
        block_bytes: 368_640,
        layers: 30,
        seed: 1,
        exclude: &[],
        slo: None,
        hot: None,
        copying: &[],
    };
    black_box(place(&View { nodes: &nodes, costs: CostModel::default() }, &ask)).expect("every node has room");
}
