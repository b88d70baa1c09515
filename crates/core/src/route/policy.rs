//! Simpler rules beside the router's own, to compare it with: which of the possible plans are left to choose from. Everything else (which
//! nodes can be used, what fits, what is refused) is as in [`super::place`].
//!
//! Not decided here: who wants which rule (the gateway's command line), and the turn, which the gateway counts.

use alloc::vec::Vec;
use core::cmp::Reverse;

use super::cost::{Spread, Terms};
use super::{Ask, Decision, NoPlace, NodeView, Options, Plan, View, candidates, decide};
use crate::ids::NodeId;
use crate::message::Role;

/// How requests are placed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// By predicted cost: [`super::place`].
    #[default]
    Auto,
    /// Where most of the prompt is cached, whatever else is going on; of those by predicted cost.
    Cache,
    /// Prefill nodes and decode nodes in turn.
    RoundRobin,
    /// The fewest tokens waiting, then the fewest sequences, whatever is cached where.
    LeastLoaded,
    /// Always on two nodes, by predicted cost; what nobody need decode, at a prefill node.
    Split,
    /// Always on one node, by predicted cost.
    Whole,
}

impl Policy {
    /// The words of all policies.
    pub const WORDS: [(&'static str, Self); 6] = [
        ("auto", Self::Auto),
        ("cache", Self::Cache),
        ("round-robin", Self::RoundRobin),
        ("least-loaded", Self::LeastLoaded),
        ("split", Self::Split),
        ("whole", Self::Whole),
    ];

    /// The policy of a word.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::WORDS.iter().find(|(name, _)| *name == word).map(|(_, policy)| *policy)
    }
}

/// The best place that `policy` allows; where it allows none, the best place. `turn` counts requests. Pure and total, as [`super::place`].
///
/// # Errors
/// [`NoPlace`] when it can go nowhere. Only [`Policy::Auto`] refuses for the objective: the others take what comes, so that a comparison
/// compares places.
pub fn place(policy: Policy, turn: u64, view: &View, ask: &Ask) -> Result<Decision, NoPlace> {
    let terms = candidates(view, ask, ask.exclude);
    if policy == Policy::Auto || terms.is_empty() {
        return super::place(view, ask);
    }
    let spread = Spread::of(&terms, ask, &view.costs);
    let mut plans = Options::of(&terms, ask, &spread).plans;
    policy.keep(&mut plans, view.nodes, &terms, turn);
    if plans.is_empty() {
        return super::place(view, ask);
    }
    Ok(decide(&terms, ask, (&spread, view.costs.tie_percent), &mut plans))
}

impl Policy {
    fn keep(self, plans: &mut Vec<Plan>, nodes: &[NodeView], terms: &[Terms], turn: u64) {
        let cached = |node: NodeId| terms.iter().find(|t| t.node == node).map_or(0, |t| t.cached_blocks);
        let load = |node: NodeId| nodes.iter().find(|n| n.node == node).map_or((0, 0), busy);
        let prefill = |node: NodeId| nodes.iter().any(|n| n.node == node && n.role == Role::Prefill);
        match self {
            Self::Auto => {}
            Self::Whole => plans.retain(|plan| plan.decode.is_none()),
            Self::Split => {
                split_where_possible(plans);
                plans.retain(|plan| prefill(plan.prefill));
            }
            Self::Cache => best(plans, |plan| Reverse(cached(plan.prefill))),
            Self::LeastLoaded => {
                split_where_possible(plans);
                best(plans, |plan| (load(plan.prefill), plan.decode.map(load)));
            }
            Self::RoundRobin => {
                split_where_possible(plans);
                plans.sort_unstable_by_key(|plan| (plan.prefill, plan.decode));
                in_turn(plans, turn);
            }
        }
    }
}

/// Prompt tokens that wait there, then sequences.
fn busy(node: &NodeView) -> (u64, u64) {
    let sequences = u64::from(node.load.running) + u64::from(node.load.waiting) + u64::from(node.inflight_sequences);
    (node.load.queued_tokens.saturating_add(node.inflight_tokens), sequences)
}

fn best<K: Ord>(plans: &mut Vec<Plan>, key: impl Fn(&Plan) -> K) {
    if let Some(least) = plans.iter().map(&key).min() {
        plans.retain(|plan| key(plan) == least);
    }
}

/// Pairs where there are any: the fleets as they were set up.
fn split_where_possible(plans: &mut Vec<Plan>) {
    if plans.iter().any(|plan| plan.decode.is_some()) {
        plans.retain(|plan| plan.decode.is_some());
    }
}

/// Prefill nodes take turns with every request, decode nodes with every round of them, so that all pairs come up.
fn in_turn(plans: &mut Vec<Plan>, turn: u64) {
    let mut prefills: Vec<NodeId> = plans.iter().map(|plan| plan.prefill).collect();
    prefills.dedup();
    if prefills.is_empty() {
        return;
    }
    let n = prefills.len() as u64;
    let prefill = prefills[(turn % n) as usize];
    plans.retain(|plan| plan.prefill == prefill);
    let at = (turn / n % plans.len() as u64) as usize;
    plans.swap(0, at);
    plans.truncate(1);
}
