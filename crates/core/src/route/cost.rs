//! What a plan costs, in microseconds. Integer arithmetic that saturates, so every input gives the same answer everywhere.
//!
//! For a prompt of `n` tokens in `N` blocks, of which node x is believed to hold the first `h_x`, and `a = min(max_new, answer_tokens)`;
//! `rho` are the corrections of [`super::correct`], `H` and `r` the hot prefix of the prompt and its expected requests ([`super::hot`]):
//! ```text
//! curve(x,T,P) = rho_prefill(x) * (ns_per_token(x) * T + ps_per_pair(x) * P)         T tokens, each paired with all before it: P pairs
//! prefill(x)   = curve(x, max(1, n - h), (n^2 - h^2) / 2)                            with h = h_x * block_tokens
//! queue(x)     = curve(x, queued + in flight tokens, queued + in flight pairs)
//! xfer(p,d)    = rho_handover(p) * (N - h_d) * block_bytes / send_bytes_per_s(p)
//! tail(p,d)    = xfer/L + max(0, xfer - prefill(p)) * (L-1)/L + rtt     L layers: all but the last hide behind compute
//! step(d)      = rho_step(d) * decode_step_us(d)
//! wait(d)      = k * answer_tokens * step(d) / running(d)               k sequences must end first: those that wait already,
//!                                                                       and enough to free the blocks that lack
//! step'(d)     = step(d) * (1 + growth)                                 with one sequence more
//! decode(d)    = w_tbt * (a-1) * step'(d)
//! stall(x)     = w_stall * (running(x) + 1 if x decodes) * prefill(x)   a prompt computed where others decode stops them; a decode
//!                                                                       node is kept free for one sequence that is not there yet
//! join(d)      = w_tbt * (a-1) * running(d) * growth * step(d)
//! slo          = w_slo * (max(0, TTFT - slo.ttft) + (a-1) * max(0, step'(d) - slo.tpot))
//! spread(x)    = min(saved, w_spread * r / (k+1) * min(busy, saved))    taken off: a copy of a hot prefix is made on purpose;
//!                                                                       k nodes of x's role hold H, `busy` is the least queue (of
//!                                                                       decode nodes: queue + wait) of them, `saved` what the plan would cost less if x held H too
//!
//! pair(p,d)    = queue(p) + prefill(p) + tail(p,d) + wait(d) + decode(d) + stall(p) + join(d) + slo - spread(p), TTFT = queue(p) + prefill(p)
//! whole(x)     = queue(x) + prefill(x) +             wait(x) + decode(x) + stall(x) + join(x) + slo - spread(x), TTFT = queue(x) + wait(x) + prefill(x)
//! ```
//! A node that has not measured its speed is taken to have the mean of those that have, so that one which has just started looks
//! neither faster nor slower than its peers.
//!
//! `spread` is 0 while as many nodes are computing H as hold it: copies double, they do not come in bursts. It reads: each of the `r / (k+1)` requests that the new holder will get is spared the queue at the others or the computing
//! again, whichever is less. It never exceeds what is invested, so a hot prefix is copied to at most as many nodes as its holders'
//! queues call for, and idle holders keep it to themselves.
//!
//! With `max_new = 1` there is nothing to decode: `decode`, `join` and the blocks of the answer are 0. This is 3.8 of the reference page
//! reduced to what nodes report: no fetches between nodes, no disk tier, no price of evictions. One more cached block at a node
//! never makes a plan with it dearer: what it saves in `prefill` is never less than what it uncovers of `tail`, and `spread` shrinks by no
//! more than the plan does.

use crate::ids::NodeId;
use crate::message::{Load, Role};

use super::hot::Hot;
use super::speed::{CostModel, Speed, percent, term};
use super::{Ask, NodeView, View};

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
    /// Taken off: what a further copy of a hot prefix is worth. At most `prefill_us + tail_us + harm_us`.
    pub spread_us: u64,
    /// Predicted time to the first token. Not a term of the sum.
    pub ttft_us: u64,
    /// Predicted time between two tokens. Not a term of the sum.
    pub tpot_us: u64,
}

impl Breakdown {
    /// The one number.
    #[must_use]
    pub const fn total_us(&self) -> u64 {
        // each term is a sum of at most two that are cut to `speed::TERM_MAX_US`, so seven cannot overflow
        let sum = self.queue_us + self.prefill_us + self.tail_us + self.wait_us + self.decode_us + self.harm_us + self.slo_us;
        sum.saturating_sub(self.spread_us)
    }

    /// Its terms by name, as they are added up; the last is taken off.
    #[must_use]
    pub const fn terms(&self) -> [(&'static str, u64); 8] {
        [
            ("queue", self.queue_us),
            ("prefill", self.prefill_us),
            ("tail", self.tail_us),
            ("wait", self.wait_us),
            ("decode", self.decode_us),
            ("harm", self.harm_us),
            ("slo", self.slo_us),
            ("spread", self.spread_us),
        ]
    }
}

/// What a copy of the hot prefix of one prompt is worth, for each role; nothing where no prefix is hot. Copies on decode nodes do not
/// relieve prefill nodes, nor the other way, so that a block more at one node says nothing against a plan with it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Spread {
    prefill: Side,
    decode: Side,
}

/// One role's part of it.
#[derive(Clone, Copy, Debug, Default)]
struct Side {
    /// The least that a holder makes one wait.
    busy_us: u64,
    /// Percent of what one request saves.
    percent: u32,
}

impl Spread {
    /// O(nodes).
    pub(super) fn of(terms: &[Terms], ask: &Ask, costs: &CostModel) -> Self {
        let Some(hot) = ask.hot else { return Self::default() };
        let side = |role| {
            let holders = || terms.iter().filter(|t| t.role == role && t.cached_blocks >= hot.blocks);
            let Some(busy_us) = holders().map(Terms::busy_us).min() else { return Side::default() };
            let copying = |t: &&Terms| t.role == role && t.cached_blocks < hot.blocks && ask.copying.contains(&t.node);
            if terms.iter().filter(copying).count() >= holders().count() {
                return Side::default();
            }
            let each = u64::from(costs.spread_percent) * u64::from(hot.requests) / (holders().count() as u64 + 1);
            Side { busy_us, percent: u32::try_from(each).unwrap_or(u32::MAX) }
        };
        Self { prefill: side(Role::Prefill), decode: side(Role::Decode) }
    }

    const fn side(&self, role: Role) -> &Side {
        if matches!(role, Role::Decode) { &self.decode } else { &self.prefill }
    }
}

impl Side {
    fn worth_us(&self, saved_us: u64) -> u64 {
        percent(saved_us.min(self.busy_us), self.percent).min(saved_us)
    }
}

/// What one node contributes to any plan with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub node: NodeId,
    pub role: Role,
    /// Leading full blocks of the prompt that it has.
    pub cached_blocks: u32,
    /// Slots of its pool that pins leave for the request; 0 when not known.
    pub total_blocks: u64,
    /// Blocks of prompt and answer.
    pub need_blocks: u64,
    /// What its times are predicted with.
    pub speed: Speed,
    prompt_blocks: u64,
    queue_us: u64,
    compute: Compute,
    /// The same if it held the hot prefix.
    compute_hot: Compute,
    wait_us: u64,
    decode_us: u64,
    join_us: u64,
    tpot_us: u64,
    tpot_excess_us: u64,
    /// Nobody decodes there, so it is as fast as it gets.
    pub idle: bool,
    /// After this long one sequence is expected to have ended.
    pub one_ends_us: u64,
    missing_bytes: u64,
    slo_percent: u32,
}

/// Slots of a node's pool that a request could have if it were alone there. Which of the blocks that it finds cached are pinned is not known
/// here: all that may be count as its own, and the node, which knows, refuses what does not fit.
fn reach_blocks(load: &Load, cached_blocks: u64) -> u64 {
    let pinned = u64::from(load.pinned_blocks);
    u64::from(load.total_blocks).saturating_sub(pinned.saturating_sub(cached_blocks)).max(u64::from(load.total_blocks > 0))
}

/// Computing a prompt at a node, and what that does to those who decode there.
#[derive(Clone, Copy, Debug)]
struct Compute {
    prefill_us: u64,
    stall_us: u64,
}

impl Terms {
    pub(super) fn new(view: &NodeView, ask: &Ask, costs: &CostModel) -> Self {
        let (load, block_tokens) = (&view.load, u64::from(ask.block_tokens.max(1)));
        let (tokens, answer) = (u64::from(ask.tokens), u64::from(ask.max_new.clamp(1, costs.answer_tokens.max(1))));
        let cached_blocks = u64::from(view.prefix_blocks).min(tokens / block_tokens);
        let hot_blocks = cached_blocks.max(ask.hot.map_or(0, |hot: Hot| u64::from(hot.blocks)).min(tokens / block_tokens));
        let speed = Speed::of(view, costs);
        let step_us = speed.step_us();
        let growth_us = percent(step_us, costs.step_growth_percent);
        let running = u64::from(load.running) + u64::from(view.inflight_sequences);
        let stopped = running + u64::from(view.role == Role::Decode);
        let compute = |blocks: u64| {
            let prefill_us = speed.prompt_us(blocks * block_tokens, tokens);
            Compute { prefill_us, stall_us: percent(prefill_us.saturating_mul(stopped), costs.stall_percent) }
        };
        let steps = answer - 1;
        let answers_us = step_us.saturating_mul(u64::from(costs.answer_tokens)); // how long a sequence decodes
        let prompt_blocks = tokens.div_ceil(block_tokens);
        let lacks = (tokens + steps).div_ceil(block_tokens) - cached_blocks;
        let tpot_excess_us = ask.slo.map_or(0, |slo| (step_us + growth_us).saturating_sub(slo.tpot_us));
        let queued =
            (load.queued_tokens.saturating_add(view.inflight_tokens), load.queued_pairs.saturating_add(view.inflight_pairs));
        let compute_now = compute(cached_blocks);
        Self {
            node: view.node,
            role: view.role,
            cached_blocks: cached_blocks as u32, // at most the prompt's, a u32
            total_blocks: reach_blocks(load, cached_blocks),
            need_blocks: (tokens + u64::from(ask.max_new.max(1)) - 1).div_ceil(block_tokens),
            speed,
            prompt_blocks,
            queue_us: speed.curve_us(queued.0, queued.1),
            compute: compute_now,
            compute_hot: if hot_blocks == cached_blocks { compute_now } else { compute(hot_blocks) },
            wait_us: term(answers_us.saturating_mul(ended_first(view, lacks)) / running.max(1)),
            decode_us: percent((step_us + growth_us).saturating_mul(steps), costs.tbt_percent),
            join_us: percent(growth_us.saturating_mul(steps).saturating_mul(running), costs.tbt_percent),
            tpot_us: if steps == 0 { 0 } else { step_us + growth_us },
            tpot_excess_us: term(tpot_excess_us.saturating_mul(steps)),
            idle: running == 0,
            one_ends_us: term(answers_us / running.max(1)),
            missing_bytes: (prompt_blocks - cached_blocks).saturating_mul(ask.block_bytes),
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

    /// The part of a pair's cost that is this prefill node's alone, at its least.
    pub(super) const fn as_prefill_us(&self) -> u64 {
        self.queue_us + self.compute_hot.prefill_us + self.compute_hot.stall_us
    }

    /// The part of a pair's cost that is this decode node's alone, with its transfer at its own speed and nothing hidden.
    pub(super) fn as_decode_us(&self) -> u64 {
        self.wait_us + self.decode_us + self.join_us + self.speed.transfer_us(self.missing_bytes)
    }

    /// How long one that comes here has to wait.
    const fn busy_us(&self) -> u64 {
        match self.role {
            Role::Decode => self.queue_us + self.wait_us,
            _ => self.queue_us,
        }
    }

    /// How long the prompt would take here if nothing were before it.
    pub(super) const fn alone_us(&self) -> u64 {
        self.compute.prefill_us
    }

    fn slo_us(&self, ttft_us: u64, ask: &Ask) -> u64 {
        let Some(slo) = ask.slo else { return 0 };
        percent(ttft_us.saturating_sub(slo.ttft_us).saturating_add(self.tpot_excess_us), self.slo_percent)
    }
}

/// The cost of one plan, whether or not [`super::place`] would consider it; `None` when a node is not in the view. For explanations.
#[must_use]
pub fn cost(view: &View, ask: &Ask, prefill: NodeId, decode: Option<NodeId>) -> Option<Breakdown> {
    let terms = super::candidates(view, ask, &[]);
    let spread = Spread::of(&terms, ask, &view.costs);
    let costs = view.costs.informed(view.nodes);
    let terms = |id| view.nodes.iter().find(|n| n.node == id).map(|n| Terms::new(n, ask, &costs));
    let prefill = terms(prefill)?;
    Some(match decode {
        None => whole(&prefill, ask, &spread),
        Some(decode) => pair(&prefill, &terms(decode)?, ask, &spread),
    })
}

/// One node does everything.
pub(super) fn whole(node: &Terms, ask: &Ask, spread: &Spread) -> Breakdown {
    let (now, hot) = (&node.compute, &node.compute_hot);
    let ttft_us = node.queue_us + node.wait_us + now.prefill_us;
    let saved_us = (now.prefill_us + now.stall_us) - (hot.prefill_us + hot.stall_us);
    Breakdown {
        queue_us: node.queue_us,
        prefill_us: now.prefill_us,
        tail_us: 0,
        wait_us: node.wait_us,
        decode_us: node.decode_us,
        harm_us: now.stall_us + node.join_us,
        slo_us: node.slo_us(ttft_us, ask),
        spread_us: spread.side(node.role).worth_us(saved_us),
        ttft_us,
        tpot_us: node.tpot_us,
    }
}

/// `prefill` computes the prompt and hands its KV to `decode`. The first token goes out before the hand-over is done.
pub(super) fn pair(prefill: &Terms, decode: &Terms, ask: &Ask, spread: &Spread) -> Breakdown {
    let (now, hot) = (&prefill.compute, &prefill.compute_hot);
    let ttft_us = prefill.queue_us + now.prefill_us;
    let transfer_us = prefill.speed.transfer_us(decode.missing_bytes);
    let tail = |prefill_us| prefill.speed.tail_us(transfer_us, prefill_us, ask.layers);
    let tail_us = tail(now.prefill_us);
    let saved_us = if spread.prefill.percent == 0 || hot.prefill_us == now.prefill_us {
        0
    } else {
        (now.prefill_us + now.stall_us + tail_us).saturating_sub(hot.prefill_us + hot.stall_us + tail(hot.prefill_us))
    };
    Breakdown {
        queue_us: prefill.queue_us,
        prefill_us: now.prefill_us,
        tail_us,
        wait_us: decode.wait_us,
        decode_us: decode.decode_us,
        harm_us: now.stall_us + decode.join_us,
        slo_us: decode.slo_us(ttft_us, ask),
        spread_us: spread.prefill.worth_us(saved_us),
        ttft_us,
        tpot_us: decode.tpot_us,
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
