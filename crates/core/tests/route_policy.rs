//! The simpler rules of placement, each on a view where they disagree.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeSet;

use millrace_core::ids::{Epoch, NodeId};
use millrace_core::message::{Load, Role};
use millrace_core::route::correct::Correction;
use millrace_core::route::policy::{Policy, place};
use millrace_core::route::{Ask, CostModel, NoPlace, NodeView, View};

fn node(id: u16, role: Role, queued_tokens: u64, running: u32, prefix_blocks: u32) -> NodeView {
    NodeView {
        node: NodeId(id),
        role,
        usable: true,
        epoch: Epoch(1),
        load: Load { free_blocks: 1000, total_blocks: 1000, queued_tokens, running, ..Load::default() },
        prefix_blocks,
        inflight_tokens: 0,
        inflight_pairs: 0,
        inflight_sequences: 0,
        correction: Correction::default(),
    }
}

/// Two prefill nodes: 1 has the prompt and a queue, 2 neither. Two decode nodes: 3 is busy, 4 is not.
fn nodes() -> [NodeView; 4] {
    let (p, d) = (Role::Prefill, Role::Decode);
    [node(1, p, 50_000, 0, 60), node(2, p, 0, 0, 0), node(3, d, 0, 20, 0), node(4, d, 0, 0, 0)]
}

const ASK: Ask<'static> = Ask {
    tokens: 1000,
    max_new: 100,
    block_tokens: 16,
    block_bytes: 368_640,
    layers: 30,
    seed: 7,
    exclude: &[],
    slo: None,
    hot: None,
    copying: &[],
};

fn chosen(policy: Policy, turn: u64, nodes: &[NodeView], ask: &Ask) -> Result<(u16, Option<u16>), NoPlace> {
    let decision = place(policy, turn, &View { nodes, costs: CostModel::default() }, ask)?;
    Ok((decision.prefill.0, decision.decode.map(|node| node.0)))
}

#[test]
fn each_rule_does_what_it_says() {
    let nodes = nodes();
    let by = |policy| chosen(policy, 0, &nodes, &ASK).unwrap();
    assert_eq!(by(Policy::Cache).0, 1, "whatever waits there");
    assert_eq!(by(Policy::LeastLoaded), (2, Some(4)), "whatever is cached there");
    assert!(by(Policy::Split).1.is_some());
    let whole = by(Policy::Whole);
    assert!(whole.1.is_none() && [3, 4].contains(&whole.0), "{whole:?}");
}

#[test]
fn an_answer_of_one_token_stays_off_decode_nodes_where_requests_are_split() {
    let mut nodes = nodes();
    nodes[3].prefix_blocks = 60;
    let ask = Ask { max_new: 1, ..ASK };
    assert_eq!(chosen(Policy::Auto, 0, &nodes, &ask), Ok((4, None)), "where it is cached");
    assert_eq!(chosen(Policy::Split, 0, &nodes, &ask), Ok((2, None)));
}

#[test]
fn all_pairs_take_turns() {
    let nodes = nodes();
    let turns: Vec<_> = (0..8).map(|turn| chosen(Policy::RoundRobin, turn, &nodes, &ASK).unwrap()).collect();
    assert_eq!(turns[..4].iter().collect::<BTreeSet<_>>().len(), 4, "{turns:?}");
    assert_eq!(turns[..4], turns[4..]);
    assert_eq!(turns[..4].iter().filter(|(prefill, _)| *prefill == 1).count(), 2);
}

#[test]
fn rules_leave_out_who_may_not_be_chosen_and_fall_back_where_they_allow_nobody() {
    let mut nodes = nodes();
    nodes[1].usable = false;
    let excluded = [NodeId(4)];
    let ask = Ask { exclude: &excluded, ..ASK };
    for (word, policy) in Policy::WORDS {
        assert_eq!(Policy::from_word(word), Some(policy));
        for turn in 0..4 {
            let (prefill, decode) = chosen(policy, turn, &nodes, &ask).unwrap();
            assert!([prefill, decode.unwrap_or(prefill)].iter().all(|node| [1, 3].contains(node)), "{word}: {prefill} {decode:?}");
        }
        assert_eq!(chosen(policy, 0, &[], &ASK), Err(NoPlace::NoNodes), "{word}");
        let only_decode = &nodes[2..];
        assert_eq!(chosen(policy, 0, only_decode, &ask).unwrap(), (3, None), "{word}: nobody to split with");
    }
    assert_eq!(Policy::from_word("best"), None);
}
