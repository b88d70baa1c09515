//! What a plan costs, in microseconds. Integer arithmetic that saturates, so every input gives the same answer everywhere.
//!
//! For a prompt of `n` tokens in `N` blocks, of which node x is believed to hold the first `h_x`, and `a = min(max_new, answer_tokens)`:
//! ```text
//! queue(x)   = prefill_ns_per_token(x) * (queued + in flight tokens)(x)
//! prefill(x) = prefill_ns_per_token(x) * max(1, n - h_x * block_tokens)
//! xfer(p,d)  = (N - h_d) * block_bytes / send_bytes_per_s(p)
//! tail(p,d)  = xfer/L + max(0, xfer - prefill(p)) * (L-1)/L + rtt       L layers: all but the last hide behind compute
//! wait(d)    = k * answer_tokens * step(d) / running(d)                 k sequences must end first: those that wait already,
//!                                                                       and enough to free the blocks that lack
//! step'(d)   = step(d) * (1 + growth)                                   with one sequence more
//! decode(d)  = w_tbt * (a-1) * step'(d)
//! stall(x)   = w_stall * (running(x) + 1 if x decodes) * prefill(x)     a prompt computed where others decode stops them; a decode
//!                                                                       node is kept free for one sequence that is not there yet
//! join(d)    = w_tbt * (a-1) * running(d) * growth * step(d)
//! slo        = w_slo * (max(0, TTFT - slo.ttft) + (a-1) * max(0, step'(d) - slo.tpot))
//!
//! pair(p,d)  = queue(p) + prefill(p) + tail(p,d) + wait(d) + decode(d) + stall(p) + join(d) + slo,  TTFT = queue(p) + prefill(p)
//! whole(x)   = queue(x) + prefill(x) +             wait(x) + decode(x) + stall(x) + join(x) + slo,  TTFT = queue(x) + wait(x) + prefill(x)
//! ```
//! A rate that a node has not measured yet is taken to be the mean of those that others have, so that a node which has just
//! started looks neither faster nor slower than its peers.
//!
//! With `max_new = 1` there is nothing to decode: `decode`, `join` and the blocks of the answer are 0. This is 3.8 of the reference
//! page reduced to what [`Load`] carries: prompt cost is linear in tokens (the quadratic part of attention is in the measured
//! average), and there are no fetches between nodes and no disk tier. One more cached block at a node never makes a plan dearer:
//! what it saves in `prefill` is never less than what it uncovers of `tail`.

use crate::ids::NodeId;
use crate::message::{Load, Role};

use super::{Ask, NodeView, View};

/// Values for what is not measured yet, and the weights between terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CostModel {
    /// Nanoseconds to compute one prompt token, where a node has not measured it.
    pub prefill_ns_per_token: u64,
    /// Microseconds of a decode step, where a node has not measured it.
    pub decode_step_us: u64,
    /// Bytes a second of a hand-over, where a node has not measured it.
    pub send_bytes_per_s: u64,
    /// Fixed cost of a hand-over: opening, grant and receipt, microseconds.
    pub handover_us: u64,
    /// Tokens that an answer is expected to have when `max_new` allows more.
    pub answer_tokens: u32,
    /// How much one sequence more lengthens a step, in percent.
    pub step_growth_percent: u32,
    /// Weight of time between tokens (own and others'), in percent of time to the first token.
    pub tbt_percent: u32,
    /// Weight of time for which others' decoding stands still, in percent.
    pub stall_percent: u32,
    /// Weight of what exceeds the objective, in percent.
    pub slo_percent: u32,
}

impl Default for CostModel {
    /// A small model on a CPU over a local network; the weights are proposals to be fitted by load tests.
    fn default() -> Self {
        Self {
            prefill_ns_per_token: 1_000_000,
            decode_step_us: 20_000,
            send_bytes_per_s: 500_000_000,
            handover_us: 2_000,
            answer_tokens: 256,
            step_growth_percent: 5,
            tbt_percent: 25,
            stall_percent: 25,
            slo_percent: 400,
        }
    }
}

impl CostModel {
    /// The same, with what the nodes of a view have measured as the value for those that have not.
    pub(super) fn informed(&self, nodes: &[NodeView]) -> Self {
        let mean = |of: fn(&Load) -> u64, default| {
            let known = || nodes.iter().filter(|n| n.usable).map(|n| of(&n.load)).filter(|v| *v > 0);
            let sum = known().fold(0u64, u64::saturating_add);
            sum.checked_div(known().count() as u64).unwrap_or(default)
        };
        Self {
            prefill_ns_per_token: mean(|load| load.prefill_ns_per_token, self.prefill_ns_per_token),
            decode_step_us: mean(|load| load.decode_step_us, self.decode_step_us),
            send_bytes_per_s: mean(|load| load.send_bytes_per_s, self.send_bytes_per_s),
            ..*self
        }
    }
}

/// A plan's predicted cost, term by term, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Breakdown {
    /// Prompts that are before this one.
    pub queue_us: u64,
    /// Computing what is not cached.
    pub prefill_us: u64,
    /// The part of the hand-over that compute does not hide.
    pub tail_us: u64,
    /// Until the decoding node has room.
    pub wait_us: u64,
    /// Weighted: the answer's own steps.
    pub decode_us: u64,
    /// Weighted: to sequences that are decoding already.
    pub harm_us: u64,
    /// Weighted: what exceeds the objective.
    pub slo_us: u64,
    /// Predicted time to the first token. Not a term of the sum.
    pub ttft_us: u64,
}

impl Breakdown {
    /// The one number.
    #[must_use]
    pub const fn total_us(&self) -> u64 {
        // each term is at most TERM_MAX_US, so seven cannot overflow
        self.queue_us + self.prefill_us + self.tail_us + self.wait_us + self.decode_us + self.harm_us + self.slo_us
    }
}

/// What a term is cut to, microseconds (200 days): sums of terms, and a term times a layer count, stay in 64 bits.
const TERM_MAX_US: u64 = 1 << 44;

/// What one node contributes to any plan with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub node: NodeId,
    pub role: Role,
    /// Leading full blocks of the prompt that it has.
    pub cached_blocks: u32,
    /// Slots of its pool; 0 when not known.
    pub total_blocks: u64,
    /// Blocks of prompt and answer.
    pub need_blocks: u64,
    prompt_blocks: u64,
    queue_us: u64,
    prefill_us: u64,
    stall_us: u64,
    wait_us: u64,
    decode_us: u64,
    join_us: u64,
    tpot_excess_us: u64,
    missing_bytes: u64,
    send_bytes_per_s: u64,
    handover_us: u64,
    slo_percent: u32,
}

impl Terms {
    pub(super) fn new(view: &NodeView, ask: &Ask, costs: &CostModel) -> Self {
        let (load, block_tokens) = (&view.load, u64::from(ask.block_tokens.max(1)));
        let (tokens, answer) = (u64::from(ask.tokens), u64::from(ask.max_new.clamp(1, costs.answer_tokens.max(1))));
        let cached_blocks = u64::from(view.prefix_blocks).min(tokens / block_tokens);
        let ns = measured(load.prefill_ns_per_token, costs.prefill_ns_per_token);
        let prefill_us = term(ns.saturating_mul((tokens - cached_blocks * block_tokens).max(1)) / 1000);
        let step_us = term(measured(load.decode_step_us, costs.decode_step_us));
        let growth_us = percent(step_us, costs.step_growth_percent);
        let running = u64::from(load.running) + u64::from(view.inflight_sequences);
        let kept_free = u64::from(view.role == Role::Decode);
        let steps = answer - 1;
        let answers_us = step_us.saturating_mul(u64::from(costs.answer_tokens)); // how long a sequence decodes
        let prompt_blocks = tokens.div_ceil(block_tokens);
        let lacks = (tokens + steps).div_ceil(block_tokens) - cached_blocks;
        let tpot_excess_us = ask.slo.map_or(0, |slo| (step_us + growth_us).saturating_sub(slo.tpot_us));
        Self {
            node: view.node,
            role: view.role,
            cached_blocks: cached_blocks as u32, // at most the prompt's, a u32
            total_blocks: u64::from(load.total_blocks),
            need_blocks: (tokens + u64::from(ask.max_new.max(1)) - 1).div_ceil(block_tokens),
            prompt_blocks,
            queue_us: term(ns.saturating_mul(load.queued_tokens.saturating_add(view.inflight_tokens)) / 1000),
            prefill_us,
            stall_us: percent(prefill_us.saturating_mul(running + kept_free), costs.stall_percent),
            wait_us: term(answers_us.saturating_mul(ended_first(view, lacks)) / running.max(1)),
            decode_us: percent((step_us + growth_us).saturating_mul(steps), costs.tbt_percent),
            join_us: percent(growth_us.saturating_mul(steps).saturating_mul(running), costs.tbt_percent),
            tpot_excess_us: term(tpot_excess_us.saturating_mul(steps)),
            missing_bytes: (prompt_blocks - cached_blocks).saturating_mul(ask.block_bytes),
            send_bytes_per_s: measured(load.send_bytes_per_s, costs.send_bytes_per_s),
            handover_us: costs.handover_us,
            slo_percent: costs.slo_percent,
        }
    }

    /// Whether its pool, if empty, holds prompt and answer.
    pub(super) const fn fits_whole(&self) -> bool {
        self.total_blocks == 0 || self.need_blocks <= self.total_blocks
    }

    /// Whether its pool, if empty, holds the prompt.
    pub(super) const fn fits_prompt(&self) -> bool {
        self.total_blocks == 0 || self.prompt_blocks <= self.total_blocks
    }

    /// The part of a pair's cost that is this prefill node's alone.
    pub(super) const fn as_prefill_us(&self) -> u64 {
        self.queue_us + self.prefill_us + self.stall_us
    }

    /// The part of a pair's cost that is this decode node's alone, with its transfer at its own speed and nothing hidden.
    pub(super) fn as_decode_us(&self) -> u64 {
        self.wait_us + self.decode_us + self.join_us + transfer_us(self.missing_bytes, self.send_bytes_per_s)
    }

    fn slo_us(&self, ttft_us: u64, ask: &Ask) -> u64 {
        let late_us = ask.slo.map_or(0, |slo| ttft_us.saturating_sub(slo.ttft_us));
        percent(late_us.saturating_add(self.tpot_excess_us), self.slo_percent)
    }
}

/// The cost of one plan, whether or not [`super::place`] would consider it; `None` when a node is not in the view. For explanations.
#[must_use]
pub fn cost(view: &View, ask: &Ask, prefill: NodeId, decode: Option<NodeId>) -> Option<Breakdown> {
    let costs = view.costs.informed(view.nodes);
    let terms = |id| view.nodes.iter().find(|n| n.node == id).map(|n| Terms::new(n, ask, &costs));
    let prefill = terms(prefill)?;
    Some(match decode {
        None => whole(&prefill, ask),
        Some(decode) => pair(&prefill, &terms(decode)?, ask),
    })
}

/// One node does everything.
pub(super) fn whole(node: &Terms, ask: &Ask) -> Breakdown {
    let ttft_us = node.queue_us + node.wait_us + node.prefill_us;
    Breakdown {
        queue_us: node.queue_us,
        prefill_us: node.prefill_us,
        tail_us: 0,
        wait_us: node.wait_us,
        decode_us: node.decode_us,
        harm_us: term(node.stall_us + node.join_us),
        slo_us: node.slo_us(ttft_us, ask),
        ttft_us,
    }
}

/// `prefill` computes the prompt and hands its KV to `decode`. The first token goes out before the hand-over is done.
pub(super) fn pair(prefill: &Terms, decode: &Terms, ask: &Ask) -> Breakdown {
    let ttft_us = prefill.queue_us + prefill.prefill_us;
    let layers = u64::from(ask.layers.max(1));
    let transfer_us = transfer_us(decode.missing_bytes, prefill.send_bytes_per_s);
    let exposed_us = transfer_us.saturating_sub(prefill.prefill_us) * (layers - 1) / layers;
    Breakdown {
        queue_us: prefill.queue_us,
        prefill_us: prefill.prefill_us,
        tail_us: term((transfer_us / layers + exposed_us).saturating_add(prefill.handover_us)),
        wait_us: decode.wait_us,
        decode_us: decode.decode_us,
        harm_us: term(prefill.stall_us + decode.join_us),
        slo_us: decode.slo_us(ttft_us, ask),
        ttft_us,
    }
}

/// Sequences that must end before the node can take this one: those that wait already, and enough to free the blocks that lack.
fn ended_first(view: &NodeView, need_blocks: u64) -> u64 {
    let load = &view.load;
    let free = u64::from(load.free_blocks) + u64::from(load.evictable_blocks);
    let lacking = if load.total_blocks == 0 { 0 } else { need_blocks.saturating_sub(free) };
    let used = u64::from(load.total_blocks).saturating_sub(free);
    let blocks_each = (used / u64::from(load.running.max(1))).max(1);
    u64::from(load.waiting) + lacking.div_ceil(blocks_each)
}

const fn measured(value: u64, default: u64) -> u64 {
    if value == 0 { default } else { value }
}

fn transfer_us(bytes: u64, bytes_per_s: u64) -> u64 {
    term(bytes.saturating_mul(1_000_000) / bytes_per_s.max(1))
}

fn percent(value_us: u64, percent: u32) -> u64 {
    term(value_us.saturating_mul(u64::from(percent)) / 100)
}

fn term(value_us: u64) -> u64 {
    value_us.min(TERM_MAX_US)
}
