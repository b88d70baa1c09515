//! Placement: laws that hold for any view (property tests), and the plain cases by hand.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use millrace_core::ids::{Epoch, NodeId};
use millrace_core::message::{Load, Role};
use millrace_core::route::correct::{Correction, Ratio};
use millrace_core::route::hot::Hot;
use millrace_core::route::{Ask, CostModel, NoPlace, NodeView, Slo, TIE_PERCENT, View, cost, place};
use proptest::prelude::*;

fn node(id: u16, role: Role) -> NodeView {
    let load = Load { free_blocks: 1000, total_blocks: 1000, ..Load::default() };
    let (node, epoch) = (NodeId(id), Epoch(1));
    let correction = Correction::default();
    let (prefix_blocks, inflight_tokens, inflight_pairs, inflight_sequences) = (0, 0, 0, 0);
    NodeView {
        node,
        role,
        usable: true,
        epoch,
        load,
        prefix_blocks,
        inflight_tokens,
        inflight_pairs,
        inflight_sequences,
        correction,
    }
}

fn ask(tokens: u32, max_new: u32) -> Ask<'static> {
    Ask {
        tokens,
        max_new,
        block_tokens: 16,
        block_bytes: 368_640,
        layers: 30,
        seed: 7,
        exclude: &[],
        slo: None,
        hot: None,
        copying: &[],
    }
}

fn view(nodes: &[NodeView]) -> View<'_> {
    View { nodes, costs: CostModel::default() }
}

/// Who was chosen, as numbers.
fn chosen(nodes: &[NodeView], ask: &Ask) -> (u16, Option<u16>) {
    let decision = place(&view(nodes), ask).unwrap();
    (decision.prefill.0, decision.decode.map(|d| d.0))
}

/// Every plan that is possible and in which the node at `at` has a part.
fn plans_with(nodes: &[NodeView], at: usize) -> Vec<(NodeId, Option<NodeId>)> {
    let side = |role| nodes.iter().filter(move |n| n.usable && n.role == role).map(|n| n.node);
    let pairs = side(Role::Prefill).flat_map(|p| side(Role::Decode).map(move |d| (p, Some(d))));
    let wholes = side(Role::Prefill).chain(side(Role::Decode)).map(|x| (x, None));
    pairs.chain(wholes).filter(|(p, d)| [Some(*p), *d].contains(&Some(nodes[at].node))).collect()
}

/// Mostly plausible figures, sometimes the largest there are.
fn figure(plausible: u64) -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0..plausible, 1 => Just(0), 1 => Just(u64::MAX)]
}

prop_compose! {
    fn any_load()(
        queued_tokens in figure(5000), running in 0..40_u32, waiting in 0..4_u32, free_blocks in 0..600_u32, evictable_blocks in 0..400_u32,
        total_blocks in prop_oneof![4 => 1000..2000_u32, 1 => Just(0), 1 => 1..50_u32], prefill_ns_per_token in figure(3_000_000),
        decode_step_us in figure(60_000), send_bytes_per_s in figure(2_000_000_000), prefill_ps_per_pair in figure(2_000_000), queued_pairs in figure(2_000_000),
    ) -> Load {
        let measured = Load { prefill_ns_per_token, prefill_ps_per_pair, decode_step_us, send_bytes_per_s, ..Load::default() };
        Load { queued_tokens, queued_pairs, running, waiting, free_blocks, evictable_blocks, total_blocks, ..measured }
    }
}

fn any_ratio() -> impl Strategy<Value = Ratio> {
    prop_oneof![2 => Just(Ratio::ONE), 1 => (0..10_000_u64).prop_map(Ratio::from_1024ths)]
}

prop_compose! {
    fn any_node()(
        role in prop_oneof![4 => Just(Role::Prefill), 4 => Just(Role::Decode), 1 => Just(Role::Admin)], usable in prop::bool::weighted(0.8),
        load in any_load(), prefix_blocks in 0..80_u32, inflight_tokens in figure(3000), inflight_sequences in 0..5_u32,
        inflight_pairs in figure(1_000_000), prefill in any_ratio(), handover in any_ratio(), step in any_ratio(),
    ) -> NodeView {
        let (node, epoch, correction) = (NodeId(0), Epoch(1), Correction { prefill, handover, step });
        NodeView { node, role, usable, epoch, load, prefix_blocks, inflight_tokens, inflight_pairs, inflight_sequences, correction }
    }
}

prop_compose! {
    /// Up to nine nodes with different numbers.
    fn any_nodes()(mut nodes in prop::collection::vec(any_node(), 0..9)) -> Vec<NodeView> {
        nodes.iter_mut().zip(1..).for_each(|(node, id)| node.node = NodeId(id));
        nodes
    }
}

prop_compose! {
    fn any_ask()(
        tokens in prop_oneof![8 => 0..1200_u32, 1 => Just(u32::MAX)], max_new in prop_oneof![8 => 0..600_u32, 1 => Just(u32::MAX)],
        block_tokens in prop_oneof![4 => Just(16_u32), 1 => Just(64), 1 => Just(0)], block_bytes in figure(2_000_000), layers in 0..64_u16,
        seed: u64, slo in prop::option::of((figure(3_000_000), figure(50_000))),
        hot in prop::option::of((1..100_u32, prop_oneof![4..60_u32, Just(u32::MAX)])),
    ) -> Ask<'static> {
        let hot = hot.map(|(blocks, requests)| Hot { blocks, requests });
        let slo = slo.map(|(ttft_us, tpot_us)| Slo { ttft_us, tpot_us });
        Ask { tokens, max_new, block_tokens, block_bytes, layers, seed, exclude: &[], slo, hot, copying: &[] }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_more_cached_block_never_makes_a_plan_with_that_node_dearer(nodes in any_nodes(), ask in any_ask(), at: prop::sample::Index) {
        prop_assume!(!nodes.is_empty());
        let mut better = nodes.clone();
        let at = at.index(nodes.len());
        better[at].prefix_blocks += 1;
        for (p, d) in plans_with(&nodes, at) {
            let with = |nodes| cost(&view(nodes), &ask, p, d).unwrap().total_us();
            prop_assert!(with(&better) <= with(&nodes), "{p} {d:?}");
        }
    }

    #[test]
    fn a_longer_queue_never_makes_a_plan_with_that_node_cheaper(
        nodes in any_nodes(), ask in any_ask(), at: prop::sample::Index, more in 1..5000_u64,
    ) {
        prop_assume!(!nodes.is_empty());
        let mut busier = nodes.clone();
        let at = at.index(nodes.len());
        let load = &mut busier[at].load;
        load.queued_tokens = load.queued_tokens.saturating_add(more);
        load.queued_pairs = load.queued_pairs.saturating_add(more * more);
        load.waiting += (more % 3) as u32;
        for (p, d) in plans_with(&nodes, at) {
            let with = |nodes| cost(&view(nodes), &ask, p, d).unwrap().total_us();
            prop_assert!(with(&busier) >= with(&nodes), "{p} {d:?}");
        }
    }

    #[test]
    fn what_is_taken_off_for_a_copy_is_bounded_by_what_the_copy_costs(nodes in any_nodes(), ask in any_ask()) {
        let cold = Ask { hot: None, ..ask };
        for (p, d) in (0..nodes.len()).flat_map(|at| plans_with(&nodes, at)) {
            let terms = cost(&view(&nodes), &ask, p, d).unwrap();
            prop_assert!(terms.spread_us <= terms.prefill_us + terms.tail_us + terms.harm_us);
            prop_assert_eq!(terms.total_us() + terms.spread_us, cost(&view(&nodes), &cold, p, d).unwrap().total_us());
        }
    }

    #[test]
    fn who_may_not_be_chosen_is_not(nodes in any_nodes(), ask in any_ask()) {
        let usable: Vec<_> = nodes.iter().filter(|n| n.usable && n.role != Role::Admin).copied().collect();
        let (all, only) = (place(&view(&nodes), &ask), place(&view(&usable), &ask));
        prop_assert_eq!(all, only, "as if what is dead, draining or cordoned were not there at all");
    }

    #[test]
    fn an_idle_decode_node_with_most_of_the_prompt_computes_the_rest_itself(tokens in 100..3000_u32, percent in 70..=100_u32, max_new in 2..400_u32) {
        let mut nodes = [node(1, Role::Prefill), node(2, Role::Prefill), node(3, Role::Decode)];
        nodes[2].prefix_blocks = tokens.div_ceil(16) * percent / 100;
        prop_assert_eq!(chosen(&nodes, &ask(tokens, max_new)), (3, None));
    }

    #[test]
    fn a_short_prompt_is_computed_where_it_is_decoded(tokens in 1..=8_u32, max_new in 2..400_u32) {
        let nodes = [node(1, Role::Prefill), node(2, Role::Decode)];
        prop_assert_eq!(chosen(&nodes, &ask(tokens, max_new)), (2, None), "a hand-over costs more than it spares");
    }

    #[test]
    fn refused_for_the_objective_means_that_no_plan_meets_it_and_an_idle_cluster_would(nodes in any_nodes(), ask in any_ask()) {
        let slo = ask.slo.unwrap_or(Slo { ttft_us: 1, tpot_us: 1 });
        match place(&view(&nodes), &Ask { slo: Some(slo), ..ask }) {
            Err(NoPlace::Overloaded { ttft_us, tpot_us, retry_after_us }) => {
                prop_assert!(ttft_us > slo.ttft_us || tpot_us > slo.tpot_us);
                prop_assert!(retry_after_us >= ttft_us.saturating_sub(slo.ttft_us));
            }
            refused => prop_assert_eq!(refused.is_ok(), place(&view(&nodes), &Ask { slo: None, ..ask }).is_ok()),
        }
    }

    #[test]
    fn a_decision_is_possible_explained_and_near_the_best(nodes in any_nodes(), ask in any_ask()) {
        let Ok(decision) = place(&view(&nodes), &ask) else { return Ok(()) };
        let find = |id| nodes.iter().find(|n| n.node == id).unwrap();
        let prefill = find(decision.prefill);
        prop_assert!(prefill.usable && matches!(prefill.role, Role::Prefill | Role::Decode));
        if let Some(decode) = decision.decode {
            prop_assert!(find(decode).usable && find(decode).role == Role::Decode && prefill.role == Role::Prefill && ask.max_new > 1);
        }
        prop_assert_eq!(Some(decision.cost), cost(&view(&nodes), &ask, decision.prefill, decision.decode));
        for other in &decision.alternatives {
            prop_assert_eq!(Some(other.cost), cost(&view(&nodes), &ask, other.prefill, other.decode));
        }
        let costs: Vec<_> = decision.alternatives.iter().map(|a| a.cost.total_us()).collect();
        prop_assert!(costs.is_sorted() && decision.ties >= 1);
        if let Some(best) = costs.first() {
            prop_assert!(decision.cost.total_us() <= best + best / 100 * TIE_PERCENT);
        }
        let chosen = (decision.prefill, decision.decode);
        prop_assert!(decision.alternatives.iter().all(|a| (a.prefill, a.decode) != chosen));
    }

    #[test]
    fn the_order_of_nodes_does_not_matter(nodes in any_nodes(), ask in any_ask()) {
        let mut turned = nodes.clone();
        turned.reverse();
        prop_assert_eq!(place(&view(&nodes), &ask), place(&view(&turned), &ask));
    }

    #[test]
    fn what_failed_is_avoided_while_anything_else_is_left(
        nodes in any_nodes(), ask in any_ask(), bad in prop::collection::vec(1..9_u16, 1..4),
    ) {
        let exclude: Vec<_> = bad.into_iter().map(NodeId).collect();
        let Ok(decision) = place(&view(&nodes), &Ask { exclude: &exclude, ..ask }) else { return Ok(()) };
        let uses = exclude.contains(&decision.prefill) || decision.decode.is_some_and(|d| exclude.contains(&d));
        let kept: Vec<_> = nodes.iter().filter(|n| !exclude.contains(&n.node)).copied().collect();
        prop_assert_eq!(decision.exclusion_ignored, matches!(place(&view(&kept), &ask), Err(NoPlace::NoNodes | NoPlace::TooBig { .. })));
        prop_assert!(!uses || decision.exclusion_ignored);
    }
}

#[test]
fn an_idle_decode_node_is_kept_free_unless_the_hand_over_costs_more() {
    let mut nodes = [node(1, Role::Prefill), node(2, Role::Decode)];
    assert_eq!(chosen(&nodes, &ask(500, 100)), (1, Some(2)), "the wire hides behind compute");
    nodes[0].load.send_bytes_per_s = 1_000_000;
    assert_eq!(chosen(&nodes, &ask(500, 100)), (2, None), "on a slow wire a hand-over would only add to it");
}

#[test]
fn a_node_that_has_measured_nothing_is_like_its_peers() {
    let mut nodes = [node(1, Role::Decode), node(2, Role::Decode)];
    nodes[0].load.decode_step_us = 60_000;
    nodes[0].load.prefill_ns_per_token = 2_000_000;
    nodes[0].prefix_blocks = 20;
    assert_eq!(chosen(&nodes, &ask(500, 100)), (1, None), "its prefix counts, not that its slowness is known");
}

#[test]
fn a_busy_decode_node_is_spared_the_prompt_but_not_a_cached_one() {
    let mut nodes = [node(1, Role::Prefill), node(2, Role::Decode)];
    nodes[1].load.running = 8;
    assert_eq!(chosen(&nodes, &ask(500, 100)), (1, Some(2)));
    nodes[1].prefix_blocks = 31; // 496 of 500 tokens are there
    assert_eq!(chosen(&nodes, &ask(500, 100)), (2, None));
}

#[test]
fn the_cache_draws_and_the_queue_repels() {
    let mut nodes = [node(1, Role::Prefill), node(2, Role::Prefill), node(3, Role::Decode)];
    nodes[2].load.running = 20;
    nodes[1].prefix_blocks = 20;
    let found = place(&view(&nodes), &ask(500, 100)).unwrap();
    assert_eq!((found.prefill, found.decode, found.prefill_cached_blocks), (NodeId(2), Some(NodeId(3)), 20));
    assert_eq!(found.cost.prefill_us, 180_000, "180 tokens at the default millisecond");
    nodes[1].inflight_tokens = 400; // more than the cache saves: a hot prefix spreads
    assert_eq!(chosen(&nodes, &ask(500, 100)).0, 1);
}

#[test]
fn decode_nodes_share_sequences_also_within_a_heartbeat() {
    let mut nodes = [node(1, Role::Prefill), node(2, Role::Decode), node(3, Role::Decode)];
    nodes[1].load.running = 12;
    nodes[2].load.running = 10;
    assert_eq!(chosen(&nodes, &ask(500, 200)), (1, Some(3)));
    nodes[2].inflight_sequences = 9;
    assert_eq!(chosen(&nodes, &ask(500, 200)), (1, Some(2)));
    nodes[1].load.free_blocks = 3; // full: sequences must end first
    assert_eq!(chosen(&nodes, &ask(500, 200)), (1, Some(3)));
}

#[test]
fn attention_makes_the_second_half_of_a_long_prompt_dearer() {
    let mut nodes = [node(1, Role::Prefill), node(2, Role::Decode)];
    nodes[0].load.prefill_ns_per_token = 1_000_000;
    nodes[0].load.prefill_ps_per_pair = 1_000_000;
    let us = |nodes: &[NodeView]| cost(&view(nodes), &ask(3200, 100), NodeId(1), Some(NodeId(2))).unwrap().prefill_us;
    assert_eq!(us(&nodes), 3_200_000 + 3200 * 3200 / 2);
    nodes[0].prefix_blocks = 100;
    assert_eq!(us(&nodes), 1_600_000 + (3200 * 3200 - 1600 * 1600) / 2, "three quarters of the pairs are in it");
    nodes[0].correction.prefill = Ratio::from_1024ths(2048);
    assert_eq!(us(&nodes), 2 * (1_600_000 + (3200 * 3200 - 1600 * 1600) / 2));
}

#[test]
fn a_hot_prefix_is_copied_while_its_holder_is_busy_and_not_before() {
    let mut nodes = [node(1, Role::Prefill), node(2, Role::Prefill), node(3, Role::Decode)];
    nodes[0].prefix_blocks = 31;
    nodes[2].load.running = 20; // not to be bothered with prompts
    let hot = Some(Hot { blocks: 24, requests: 40 });
    let hot = |blocks: u32| Ask { hot, ..ask(blocks * 16, 100) };
    assert_eq!(chosen(&nodes, &hot(32)).0, 1, "its holder is idle");
    nodes[0].load.queued_tokens = 200;
    assert_eq!(chosen(&nodes, &ask(32 * 16, 100)).0, 1, "for one request alone the queue is shorter than computing again");
    let copied = place(&view(&nodes), &hot(32)).unwrap();
    assert_eq!(copied.prefill, NodeId(2), "for the forty to come it is not");
    assert_eq!(copied.cost.spread_us, 24 * 16 * 1000, "never more than what the copy costs");
    nodes[1].prefix_blocks = 24;
    assert_eq!(place(&view(&nodes), &hot(32)).unwrap().cost.spread_us, 0, "it has it now");
}

#[test]
fn ties_fall_by_the_seed_over_all_equals() {
    let nodes: Vec<_> = (1..=4).map(|id| node(id, Role::Decode)).collect();
    let mut hits = [0; 5];
    for seed in 0..400 {
        hits[usize::from(chosen(&nodes, &Ask { seed, ..ask(100, 10) }).0)] += 1;
    }
    assert!(hits[1..].iter().all(|n| (60..140).contains(n)), "{hits:?}");
}

#[test]
fn one_token_needs_no_decode_node_and_availability_comes_first() {
    let mut nodes = [node(1, Role::Prefill), node(2, Role::Decode)];
    nodes[1].load.running = 30;
    assert_eq!(chosen(&nodes, &ask(500, 1)), (1, None));
    assert_eq!(chosen(&nodes[..1], &ask(500, 100)), (1, None), "no decode node: the prefill node does it whole");
    assert_eq!(chosen(&nodes[1..], &ask(500, 100)), (2, None), "no prefill node: the decode node does");
    let failed = [NodeId(2)];
    assert_eq!(chosen(&nodes, &Ask { exclude: &failed, ..ask(500, 100) }), (1, None));
    let all = [NodeId(1), NodeId(2)];
    let decision = place(&view(&nodes), &Ask { exclude: &all, ..ask(500, 100) }).unwrap();
    assert!(decision.exclusion_ignored);
}

#[test]
fn what_cannot_be_placed_says_why() {
    assert_eq!(place(&view(&[]), &ask(10, 10)), Err(NoPlace::NoNodes));
    let mut nodes = [node(1, Role::Prefill), node(2, Role::Decode)];
    let too_big = place(&view(&nodes), &ask(15_990, 20));
    assert_eq!(too_big, Err(NoPlace::TooBig { need_blocks: 1001, largest_blocks: 1000 }));
    assert!(place(&view(&nodes), &ask(15_990, 11)).is_ok(), "the last token's KV is never kept");
    nodes.iter_mut().for_each(|n| n.load.queued_tokens = 9_500);
    let slo = Some(Slo { ttft_us: 2_000_000, tpot_us: 50_000 });
    assert!(place(&view(&nodes), &Ask { slo, ..ask(500, 100) }).is_ok(), "nothing is measured: nothing is foretold");
    nodes.iter_mut().for_each(|n| n.load.prefill_ns_per_token = 1_000_000);
    let late = place(&view(&nodes), &Ask { slo, ..ask(500, 100) });
    assert_eq!(late, Err(NoPlace::Overloaded { ttft_us: 10_000_000, tpot_us: 21_000, retry_after_us: 8_000_000 }));
    assert!(place(&view(&nodes), &Ask { slo, ..ask(2500, 100) }).is_ok(), "too long for the objective on an idle node too");
    nodes.iter_mut().for_each(|n| (n.load.queued_tokens, n.load.running) = (0, 10));
    let slow = place(&view(&nodes), &Ask { slo: slo.map(|slo| Slo { tpot_us: 20_500, ..slo }), ..ask(500, 100) });
    let ends_us = 256 * 20_000 / 10; // one of ten
    assert_eq!(slow, Err(NoPlace::Overloaded { ttft_us: 500_000, tpot_us: 21_000, retry_after_us: ends_us }));
    nodes.iter_mut().for_each(|n| n.usable = false);
    assert_eq!(place(&view(&nodes), &ask(10, 10)), Err(NoPlace::NoNodes));
}

#[test]
fn only_the_tail_of_a_transfer_counts() {
    let nodes = [node(1, Role::Prefill), node(2, Role::Decode)];
    let tail_us = |ask: &Ask| cost(&view(&nodes), ask, NodeId(1), Some(NodeId(2))).unwrap().tail_us;
    let block_ns = 368_640 * 2; // at the default 500 MB/s; all 32 take 23.6 ms, while the prompt takes half a second
    assert_eq!(tail_us(&ask(500, 100)), 32 * block_ns / 1000 / 30 + 2_000);
    let slow = Ask { block_bytes: 368_640 * 100, layers: 1, ..ask(500, 100) };
    assert_eq!(tail_us(&slow), 32 * block_ns / 10 + 2_000, "one layer: nothing to hide behind");
}

#[test]
fn many_nodes_are_cut_to_the_best_sides_and_still_well_placed() {
    let mut nodes: Vec<_> = (1..=400).map(|id| node(id, if id % 2 == 0 { Role::Prefill } else { Role::Decode })).collect();
    nodes.iter_mut().for_each(|n| n.load.running = if n.role == Role::Decode { 20 } else { 0 });
    nodes[301].prefix_blocks = 30; // number 302, prefill
    nodes[250].load.running = 4; // number 251, decode
    assert_eq!(chosen(&nodes, &ask(500, 300)), (302, Some(251)));
}
