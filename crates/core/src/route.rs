//! Where a request goes: a pure function of what the gateway knows. One number in one unit, predicted microseconds until the
//! answer is done plus the microseconds that it costs others, over every prefill x decode pair and over every node that can do
//! it whole. The formula and its terms are in `cost`, how fast nodes are in `speed`, how far predictions were off in [`correct`],
//! what is asked for often in [`hot`]; the reasons are Mooncake's Algorithm 1, Dynamo's conditional
//! disaggregation and DistServe's placement, on one scale.
//!
//! Not decided here: what a node holds ([`crate::holders`]), whether it is alive ([`crate::cluster`]), and what to do when the place
//! turns out to be bad (the gateway asks again and names the node in [`Ask::exclude`]).

pub mod correct;
mod cost;
pub mod hot;
pub mod policy;
mod speed;

pub use cost::{Breakdown, cost};
use cost::{Spread, Terms, pair, whole};
pub use speed::{CostModel, Speed, pairs};

use alloc::vec::Vec;

use crate::ids::{Epoch, NodeId};
use crate::message::{Load, Role};
use crate::planted::{Bug, planted};
use correct::Correction;
use hot::Hot;

/// Nodes of each role that are tried in pairs; of more, those with the best partial cost. A node that can do the request whole is
/// always tried.
pub const SIDE_MAX: usize = 64;
/// Plans that [`Decision::alternatives`] names.
pub const ALTERNATIVES_MAX: usize = 4;
/// Plans whose cost is within this share of the best are equally good, unless [`CostModel::tie_percent`] says otherwise: one of them
/// falls by the seed, so that gateways which know the same do not all send to the same node.
pub const TIE_PERCENT: u64 = 3;

/// What the gateway knows of a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NodeView {
    /// Its number.
    pub node: NodeId,
    /// Prefill or decode; others are never chosen.
    pub role: Role,
    /// Whether new requests may go there ([`crate::cluster::NodeState::usable`], and the gateway has a link to it).
    pub usable: bool,
    /// Its incarnation.
    pub epoch: Epoch,
    /// Its last heartbeat. Where `total_blocks` is 0 (no heartbeat yet) there is room; where a measured value is 0 the
    /// [`CostModel`]'s counts.
    pub load: Load,
    /// Leading full blocks of the prompt that it is believed to hold ([`crate::holders::Holders::prefix_lengths`]).
    pub prefix_blocks: u32,
    /// Prompt tokens that this gateway sent there to be computed and that its load cannot show yet.
    pub inflight_tokens: u64,
    /// [`pairs`] of those tokens.
    pub inflight_pairs: u64,
    /// Sequences that this gateway sent there to be decoded and that its load cannot show yet.
    pub inflight_sequences: u32,
    /// What predictions for it were off by lately.
    pub correction: Correction,
}

impl NodeView {
    /// Whether its role is one that requests go to.
    const fn serves(&self) -> bool {
        matches!(self.role, Role::Prefill | Role::Decode)
    }
}

/// What the gateway knows.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The nodes, each once, in any order: it does not change the decision.
    pub nodes: &'a [NodeView],
    /// How to turn it into time.
    pub costs: CostModel,
}

/// How long an answer may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slo {
    /// To the first token, microseconds; `u64::MAX` for as fast as possible.
    pub ttft_us: u64,
    /// For each further token, microseconds; `u64::MAX` for as fast as possible.
    pub tpot_us: u64,
}

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Tokens to compute: the prompt, and what earlier attempts delivered.
    pub tokens: u32,
    /// Tokens still to be made, at most.
    pub max_new: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// KV bytes of a block, all layers.
    pub block_bytes: u64,
    /// Decoder layers: KV is sent layer by layer.
    pub layers: u16,
    /// Picks among equally good plans.
    pub seed: u64,
    /// Nodes that failed earlier attempts: avoided while anything else is possible.
    pub exclude: &'a [NodeId],
    /// What to hold; `None` for as good as possible.
    pub slo: Option<Slo>,
    /// The prefix of the prompt that is asked for often, if one is.
    pub hot: Option<Hot>,
    /// Nodes that are computing that prefix already.
    pub copying: &'a [NodeId],
}

/// Where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Who computes the prompt.
    pub prefill: NodeId,
    /// Who decodes; `None` when `prefill` does it whole.
    pub decode: Option<NodeId>,
    /// Leading blocks believed cached at `prefill`.
    pub prefill_cached_blocks: u32,
    /// Leading blocks believed cached at `decode`: not to be sent. 0 when there is none.
    pub decode_cached_blocks: u32,
    /// What it is predicted to cost.
    pub cost: Breakdown,
    /// What `prefill`'s times are predicted with.
    pub prefill_speed: Speed,
    /// What the times of the node that decodes are predicted with.
    pub decode_speed: Speed,
    /// Plans within [`TIE_PERCENT`] of the best, of which this is one; at least 1.
    pub ties: u32,
    /// The best other plans, best first.
    pub alternatives: Vec<Alternative>,
    /// Only nodes of [`Ask::exclude`] were left, so one was chosen.
    pub exclusion_ignored: bool,
}

/// A plan that was not chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alternative {
    /// Who would compute the prompt.
    pub prefill: NodeId,
    /// Who would decode; `None` when `prefill` would do it whole.
    pub decode: Option<NodeId>,
    /// What it is predicted to cost.
    pub cost: Breakdown,
}

/// Why it goes nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// No node can be used. Trying again later may help.
    #[error("no usable node")]
    NoNodes,
    /// It fits no node's pool, even an empty one. Trying again does not help.
    #[error("the request needs {need_blocks} blocks, the largest pool has {largest_blocks}")]
    TooBig {
        /// Blocks of prompt and answer.
        need_blocks: u64,
        /// Slots of the largest pool of a usable node.
        largest_blocks: u64,
    },
    /// The objective cannot be met now, but could be by an idle cluster: refuse with Retry-After.
    #[error("the first token would take {ttft_us} us and each further one {tpot_us} us")]
    Overloaded {
        /// Predicted for the plan that will meet the objective first: time to the first token, microseconds.
        ttft_us: u64,
        /// And between two tokens, microseconds.
        tpot_us: u64,
        /// After this long it is predicted to meet it, microseconds.
        retry_after_us: u64,
    },
}

/// A possible plan; ordered by cost, then by nodes, which is a total order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Plan {
    cost_us: u64,
    prefill: NodeId,
    decode: Option<NodeId>,
}

/// The best place for a request. Pure, and total: any input has an answer. O(nodes^2), at most [`SIDE_MAX`]^2 pairs.
///
/// # Errors
/// [`NoPlace`] when it can go nowhere.
pub fn place(view: &View, ask: &Ask) -> Result<Decision, NoPlace> {
    match attempt(view, ask, ask.exclude) {
        Err(NoPlace::NoNodes | NoPlace::TooBig { .. }) if !ask.exclude.is_empty() => {
            attempt(view, ask, &[]).map(|decision| Decision { exclusion_ignored: true, ..decision })
        }
        outcome => outcome,
    }
}

/// What each node that may be chosen would contribute.
fn candidates(view: &View, ask: &Ask, exclude: &[NodeId]) -> Vec<Terms> {
    let usable = |n: &NodeView| n.usable || planted(Bug::DeadRoutable);
    let excluded = |n: &NodeView| exclude.contains(&n.node) && !planted(Bug::ExcludedChosen);
    let chosen = |n: &&NodeView| usable(n) && n.serves() && !excluded(n);
    let costs = view.costs.informed(view.nodes);
    view.nodes.iter().filter(chosen).map(|n| Terms::new(n, ask, &costs)).collect()
}

fn attempt(view: &View, ask: &Ask, exclude: &[NodeId]) -> Result<Decision, NoPlace> {
    let terms = candidates(view, ask, exclude);
    if terms.is_empty() {
        return Err(NoPlace::NoNodes);
    }
    let spread = Spread::of(&terms, ask, &view.costs);
    let mut options = Options::of(&terms, ask, &spread);
    if options.plans.is_empty() {
        let largest_blocks = terms.iter().map(|t| t.total_blocks).max().unwrap_or(0);
        return Err(NoPlace::TooBig { need_blocks: terms[0].need_blocks, largest_blocks });
    }
    // A prediction from nothing measured refuses nobody.
    let measured = view.nodes.iter().any(|n| n.usable && n.serves() && n.load.prefill_ns_per_token > 0);
    match options.first_to_meet {
        Some(late) if measured && !options.met => {
            let (ttft_us, tpot_us, retry_after_us) = (late.ttft_us, late.tpot_us, late.retry_after_us);
            Err(NoPlace::Overloaded { ttft_us, tpot_us, retry_after_us })
        }
        _ => Ok(decide(&terms, ask, (&spread, view.costs.tie_percent), &mut options.plans)),
    }
}

/// Every plan that is possible, and how they stand to the objective.
struct Options {
    plans: Vec<Plan>,
    /// One of them meets it; true when there is none.
    met: bool,
    /// Of those that miss it only because of what runs already, the one that will meet it first.
    first_to_meet: Option<Late>,
}

/// A plan that misses the objective; ordered by when it will not.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Late {
    retry_after_us: u64,
    ttft_us: u64,
    tpot_us: u64,
}

impl Options {
    fn of(terms: &[Terms], ask: &Ask, spread: &Spread) -> Self {
        let side = |role| terms.iter().filter(move |t| t.role == role);
        let decodes: Vec<_> = side(Role::Decode).filter(|t| t.fits_whole()).collect();
        let prefills: Vec<_> = side(Role::Prefill).filter(|t| t.fits_prompt()).collect();
        let one_token = ask.max_new <= 1; // nothing to decode: no reason to move any KV
        let mut options = Self { plans: Vec::with_capacity(terms.len()), met: ask.slo.is_none(), first_to_meet: None };
        decodes.iter().for_each(|node| options.add(node, None, ask, spread));
        if one_token || decodes.is_empty() {
            prefills.iter().filter(|t| t.fits_whole()).for_each(|node| options.add(node, None, ask, spread));
        }
        if !one_token {
            let prefills = best_of(prefills, Terms::as_prefill_us);
            let decodes = best_of(decodes, Terms::as_decode_us);
            options.plans.reserve(prefills.len() * decodes.len());
            for prefill in prefills {
                decodes.iter().for_each(|decode| options.add(prefill, Some(decode), ask, spread));
            }
        }
        options
    }

    fn add(&mut self, prefill: &Terms, decode: Option<&Terms>, ask: &Ask, spread: &Spread) {
        let cost = decode.map_or_else(|| whole(prefill, ask, spread), |decode| pair(prefill, decode, ask, spread));
        self.plans.push(Plan { cost_us: cost.total_us(), prefill: prefill.node, decode: decode.map(|d| d.node) });
        if let Some(slo) = ask.slo {
            self.compare(&slo, &cost, prefill, decode.unwrap_or(prefill));
        }
    }

    fn compare(&mut self, slo: &Slo, cost: &Breakdown, prefill: &Terms, decode: &Terms) {
        let (late_us, slow) = (cost.ttft_us.saturating_sub(slo.ttft_us), cost.tpot_us > slo.tpot_us);
        self.met |= late_us == 0 && !slow;
        // A prompt that is too long, or a node too slow, for the objective with nothing else to do: to try again would not help.
        let hopeless = prefill.alone_us() > slo.ttft_us || slow && decode.idle;
        if !hopeless && (late_us > 0 || slow) {
            let retry_after_us = if slow { late_us.max(decode.one_ends_us) } else { late_us };
            let late = Late { retry_after_us, ttft_us: cost.ttft_us, tpot_us: cost.tpot_us };
            self.first_to_meet = Some(self.first_to_meet.map_or(late, |first| first.min(late)));
        }
    }
}

/// At most [`SIDE_MAX`] of one side, by the part of the cost that does not depend on the other.
fn best_of(mut side: Vec<&Terms>, partial_us: impl Fn(&Terms) -> u64) -> Vec<&Terms> {
    if side.len() > SIDE_MAX {
        side.sort_unstable_by_key(|t| (partial_us(t), t.node));
        side.truncate(SIDE_MAX);
    }
    side
}

/// Picks among the best of the non-empty `plans` and explains it. O(plans): only the best few are sorted.
fn decide(terms: &[Terms], ask: &Ask, (spread, tie_percent): (&Spread, u32), plans: &mut [Plan]) -> Decision {
    let best_us = plans.iter().map(|plan| plan.cost_us).min().unwrap_or(0);
    let band_us = best_us.saturating_add(best_us / 100 * u64::from(tie_percent));
    let ties = plans.iter().filter(|plan| plan.cost_us <= band_us).count();
    let kept = (ties + ALTERNATIVES_MAX).min(plans.len());
    plans.select_nth_unstable(kept - 1);
    let plans = &mut plans[..kept];
    plans.sort_unstable();
    let at = (mix(ask.seed) % ties as u64) as usize;
    let find = |node| terms.iter().find(|t| t.node == node).expect("plans are made of these terms");
    let explained = |prefill: &Terms, decode: Option<&Terms>| {
        decode.map_or_else(|| whole(prefill, ask, spread), |decode| pair(prefill, decode, ask, spread))
    };
    let (prefill, decode) = (find(plans[at].prefill), plans[at].decode.map(find));
    let others = plans.iter().enumerate().filter(|(i, _)| *i != at).take(ALTERNATIVES_MAX);
    let alternative = |plan: &Plan| Alternative {
        prefill: plan.prefill,
        decode: plan.decode,
        cost: explained(find(plan.prefill), plan.decode.map(find)),
    };
    Decision {
        prefill: prefill.node,
        decode: decode.map(|d| d.node),
        prefill_cached_blocks: prefill.cached_blocks,
        decode_cached_blocks: decode.map_or(0, |d| d.cached_blocks),
        cost: explained(prefill, decode),
        prefill_speed: prefill.speed,
        decode_speed: decode.unwrap_or(prefill).speed,
        ties: ties as u32, // at most SIDE_MAX^2 and the nodes of a view
        alternatives: others.map(|(_, plan)| alternative(plan)).collect(),
        exclusion_ignored: false,
    }
}

/// SplitMix64's finaliser: neighbouring seeds pick independently.
const fn mix(seed: u64) -> u64 {
    let seed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let seed = (seed ^ (seed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    seed ^ (seed >> 31)
}
