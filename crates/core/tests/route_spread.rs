//! A hot prefix over eight prefill nodes, in a simulation of arrivals: the queue stays short and the hits stay many, which without the
//! term for copies they do not.

use millrace_core::ids::{BlockHash, Epoch, NodeId, Time};
use millrace_core::message::{Load, Role};
use millrace_core::route::correct::Correction;
use millrace_core::route::hot::HotPrefixes;
use millrace_core::route::{Ask, CostModel, NodeView, View, place};

const NODES: u16 = 8;
const BLOCK_TOKENS: u32 = 16;
/// The prefix that every second request begins with: two seconds to compute.
const HOT_BLOCKS: u32 = 125;
/// What each request has of its own.
const OWN_TOKENS: u32 = 100;
const NS_PER_TOKEN: u64 = 1_000_000;

/// A prefill node: what it has still to compute, and which hot prefixes it holds.
#[derive(Clone, Default)]
struct Node {
    /// When it will be through.
    free_at_us: u64,
    /// Whether it has the hot prefix, and from when on.
    holds_from_us: Option<u64>,
}

/// What came of a run.
#[derive(Debug)]
struct Outcome {
    worst_queue_us: u64,
    mean_queue_us: u64,
    /// Requests with the hot prefix that found it, percent.
    hits: u32,
    copies: usize,
}

fn names(request: u32, hot: bool) -> Vec<BlockHash> {
    let name = |root: u32, i: u32| {
        let mixed = (u64::from(root) << 32 | u64::from(i)).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let bytes = (u128::from(mixed ^ mixed >> 29) << 64) | u128::from(mixed.wrapping_mul(0xbf58_476d_1ce4_e5b9));
        BlockHash(bytes.to_le_bytes())
    };
    let own = (0..OWN_TOKENS / BLOCK_TOKENS).map(|i| name(1000 + request, i));
    (0..if hot { HOT_BLOCKS } else { 0 }).map(|i| name(1, i)).chain(own).collect()
}

/// Eight nodes, of which the first holds the prefix, and one decode node with no time for prompts; requests come each `gap_us`, by turns with and without the prefix.
fn run(spread_percent: u32, gap_us: u64, requests: u32) -> Outcome {
    let costs = CostModel { spread_percent, ..CostModel::default() };
    let (mut nodes, mut sketch) = (vec![Node::default(); usize::from(NODES)], HotPrefixes::default());
    nodes[0].holds_from_us = Some(0);
    let (mut worst, mut sum, mut hits, mut asked) = (0, 0, 0, 0);
    for request in 0..requests {
        let (now_us, shares) = (u64::from(request) * gap_us, request % 2 == 0);
        let names = names(request, shares);
        let tokens = if shares { HOT_BLOCKS * BLOCK_TOKENS } else { 0 } + OWN_TOKENS;
        let views: Vec<_> = views(&nodes, now_us, shares);
        let hot = sketch.asked(Time(now_us), &names);
        let copying = hot.map_or_else(Vec::new, |hot| sketch.copies(Time(now_us), names[hot.blocks as usize - 1]));
        let ask = Ask {
            tokens,
            max_new: 64,
            block_tokens: BLOCK_TOKENS,
            block_bytes: 1,
            layers: 8,
            seed: u64::from(request),
            exclude: &[],
            slo: None,
            hot,
            copying: &copying,
        };
        let decision = place(&View { nodes: &views, costs }, &ask).expect("there is room");
        if let Some(hot) = hot.filter(|hot| decision.prefill_cached_blocks < hot.blocks) {
            let until = Time(now_us).after(decision.cost.ttft_us);
            sketch.copying(Time(now_us), names[hot.blocks as usize - 1], decision.prefill, until);
        }
        let node = &mut nodes[usize::from(decision.prefill.0) - 1];
        let queue_us = node.free_at_us.saturating_sub(now_us);
        (worst, sum) = (worst.max(queue_us), sum + queue_us);
        let held = node.holds_from_us.is_some_and(|from_us| from_us <= now_us);
        let compute = if shares && held { OWN_TOKENS } else { tokens };
        node.free_at_us = now_us.max(node.free_at_us) + u64::from(compute) * NS_PER_TOKEN / 1000;
        if shares {
            node.holds_from_us.get_or_insert(node.free_at_us);
            asked += 1;
            hits += u32::from(held);
        }
    }
    let copies = nodes.iter().filter(|node| node.holds_from_us.is_some()).count();
    Outcome { worst_queue_us: worst, mean_queue_us: sum / u64::from(requests), hits: hits * 100 / asked, copies }
}

fn views(nodes: &[Node], now_us: u64, hot: bool) -> Vec<NodeView> {
    let view = |id: u16, role, load, prefix_blocks| NodeView {
        node: NodeId(id),
        role,
        usable: true,
        epoch: Epoch(1),
        load,
        prefix_blocks,
        inflight_tokens: 0,
        inflight_pairs: 0,
        inflight_sequences: 0,
        correction: Correction::default(),
    };
    let prefill = |(id, node): (u16, &Node)| {
        let queued_tokens = node.free_at_us.saturating_sub(now_us) * 1000 / NS_PER_TOKEN;
        let held = hot && node.holds_from_us.is_some_and(|from_us| from_us <= now_us);
        let load = Load { queued_tokens, prefill_ns_per_token: NS_PER_TOKEN, ..Load::default() };
        view(id, Role::Prefill, load, if held { HOT_BLOCKS } else { 0 })
    };
    let decode = view(100, Role::Decode, Load { running: 1000, ..Load::default() }, 0);
    (1..).zip(nodes).map(prefill).chain([decode]).collect()
}

#[test]
fn a_hot_prefix_is_spread_before_its_holder_is_the_bottleneck() {
    // Each pair of requests brings 200 ms of work with hits, and one comes each 30 ms: three and a third nodes' worth.
    let (with, without) = (run(CostModel::default().spread_percent, 30_000, 3000), run(0, 30_000, 3000));
    assert!(with.worst_queue_us * 3 < without.worst_queue_us * 2, "{with:?} {without:?}");
    assert!(with.mean_queue_us * 5 < without.mean_queue_us * 4, "{with:?} {without:?}");
    assert!(with.hits >= 98, "{with:?}");
    assert!((2..=without.copies).contains(&with.copies), "{with:?} {without:?}");
}

#[test]
fn a_prefix_that_one_node_serves_with_ease_stays_there() {
    let calm = run(CostModel::default().spread_percent, 1_000_000, 300);
    assert!(calm.copies <= 2 && calm.hits >= 98, "{calm:?}");
}
