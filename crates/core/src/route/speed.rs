//! How fast a node is taken to be: what it measured, or what its peers did, times what its predictions were off by lately.
//! Turns tokens, pairs and bytes into microseconds; what is added to what is `cost`'s.

use crate::message::Load;

use super::NodeView;
use super::correct::Correction;

/// Values for what is not measured yet, and the weights between terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CostModel {
    /// Nanoseconds to compute one prompt token, where a node has not measured it.
    pub prefill_ns_per_token: u64,
    /// Picoseconds for each pair of a prompt token and one before it, where a node has not measured it.
    pub prefill_ps_per_pair: u64,
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
    /// Weight of what a copy of a hot prefix will save, in percent; 0 makes no copies on purpose.
    pub spread_percent: u32,
    /// Plans within this share of the best are equally good, in percent.
    pub tie_percent: u32,
}

impl Default for CostModel {
    /// A small model on a CPU over a local network; the weights are proposals to be fitted by load tests.
    fn default() -> Self {
        Self {
            prefill_ns_per_token: 1_000_000,
            prefill_ps_per_pair: 0,
            decode_step_us: 20_000,
            send_bytes_per_s: 500_000_000,
            handover_us: 2_000,
            answer_tokens: 256,
            step_growth_percent: 5,
            tbt_percent: 25,
            stall_percent: 25,
            slo_percent: 400,
            spread_percent: 50,
            tie_percent: super::TIE_PERCENT as u32,
        }
    }
}

impl CostModel {
    /// The same, with the mean of what the usable nodes of a view have measured as the value for those that have not.
    pub(super) fn informed(&self, nodes: &[NodeView]) -> Self {
        let mean = |known: fn(&Load) -> bool, of: fn(&Load) -> u64, default| {
            let (mut sum, mut count) = (0u64, 0u64);
            for node in nodes.iter().filter(|n| n.usable && n.serves() && known(&n.load)) {
                (sum, count) = (sum.saturating_add(of(&node.load)), count + 1);
            }
            sum.checked_div(count).unwrap_or(default)
        };
        let prompts = |load: &Load| load.prefill_ns_per_token > 0;
        Self {
            prefill_ns_per_token: mean(prompts, |load| load.prefill_ns_per_token, self.prefill_ns_per_token),
            prefill_ps_per_pair: mean(prompts, |load| load.prefill_ps_per_pair, self.prefill_ps_per_pair),
            decode_step_us: mean(|load| load.decode_step_us > 0, |load| load.decode_step_us, self.decode_step_us),
            send_bytes_per_s: mean(|load| load.send_bytes_per_s > 0, |load| load.send_bytes_per_s, self.send_bytes_per_s),
            ..*self
        }
    }
}

/// What one node's times are predicted with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Speed {
    /// Nanoseconds to compute one prompt token.
    pub prefill_ns_per_token: u64,
    /// Picoseconds for each pair of a prompt token and one before it.
    pub prefill_ps_per_pair: u64,
    /// Microseconds of a decode step at the present batch.
    pub decode_step_us: u64,
    /// Bytes a second of a hand-over from there.
    pub send_bytes_per_s: u64,
    /// Fixed cost of a hand-over, microseconds.
    pub handover_us: u64,
    /// What predictions are multiplied by.
    pub correction: Correction,
}

impl Speed {
    /// Of a node; what it has not measured is `costs`'s.
    pub(super) fn of(view: &NodeView, costs: &CostModel) -> Self {
        let load = &view.load;
        let measured = |value: u64, default: u64| if value == 0 { default } else { value };
        let pairs = if load.prefill_ns_per_token == 0 { costs.prefill_ps_per_pair } else { load.prefill_ps_per_pair };
        Self {
            prefill_ns_per_token: measured(load.prefill_ns_per_token, costs.prefill_ns_per_token),
            prefill_ps_per_pair: pairs,
            decode_step_us: measured(load.decode_step_us, costs.decode_step_us),
            send_bytes_per_s: measured(load.send_bytes_per_s, costs.send_bytes_per_s),
            handover_us: costs.handover_us,
            correction: view.correction,
        }
    }

    /// Computing so many prompt tokens with so many [`pairs`], microseconds.
    #[must_use]
    pub fn curve_us(&self, tokens: u64, pairs: u64) -> u64 {
        let linear_ns = self.prefill_ns_per_token.saturating_mul(tokens);
        let pairs_ns = self.prefill_ps_per_pair.saturating_mul(pairs) / 1000;
        term(self.correction.prefill.apply(linear_ns.saturating_add(pairs_ns) / 1000))
    }

    /// Computing a prompt of `tokens` of which the first `cached` are in place, microseconds. At least one token is computed.
    #[must_use]
    pub fn prompt_us(&self, cached: u64, tokens: u64) -> u64 {
        self.curve_us(tokens.saturating_sub(cached).max(1), pairs(cached, tokens))
    }

    /// A decode step at the present batch, microseconds.
    #[must_use]
    pub fn step_us(&self) -> u64 {
        term(self.correction.step.apply(self.decode_step_us))
    }

    /// Moving so many bytes away from there, microseconds.
    #[must_use]
    pub fn transfer_us(&self, bytes: u64) -> u64 {
        term(self.correction.handover.apply(bytes.saturating_mul(1_000_000) / self.send_bytes_per_s.max(1)))
    }

    /// The part of a transfer that computing the prompt, layer by layer, does not hide, microseconds.
    #[must_use]
    pub fn tail_us(&self, transfer_us: u64, prefill_us: u64, layers: u16) -> u64 {
        let layers = u64::from(layers.max(1));
        let last_us = transfer_us / layers;
        let exposed_us = match transfer_us.saturating_sub(prefill_us) {
            0 => 0,
            more => more * (layers - 1) / layers, // a term times a layer count stays in 64 bits
        };
        term((last_us + exposed_us).saturating_add(self.handover_us))
    }
}

/// Pairs of the tokens at `from..to` of a sequence, each with every token before it: what attention grows with.
#[must_use]
pub const fn pairs(from: u64, to: u64) -> u64 {
    to.saturating_mul(to).saturating_sub(from.saturating_mul(from)) / 2
}

/// What a term is cut to, microseconds (200 days): sums of terms, and a term times a layer count, stay in 64 bits.
const TERM_MAX_US: u64 = 1 << 44;

pub(super) fn percent(value_us: u64, percent: u32) -> u64 {
    term(value_us.saturating_mul(u64::from(percent)) / 100)
}

pub(super) fn term(value_us: u64) -> u64 {
    value_us.min(TERM_MAX_US)
}
