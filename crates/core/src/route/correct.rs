//! How far the predictions for one node have been off lately: for each node and each kind of prediction, the ratio of what was
//! observed to what was predicted, smoothed and bounded, which later predictions are multiplied by.
//!
//! Decides what a ratio is and how long it counts. Not decided here: what is predicted (`cost`), and who observes it (the gateway,
//! from what nodes and tokens tell it). The idea is Mooncake's corrected estimators; the form is a first-order controller:
//! an observation is compared with the prediction that was made, *corrected as it was then*, so that the ratio
//! settles where predictions are right, also for terms that do not grow in proportion to it.

use alloc::collections::BTreeMap;

use crate::ids::{Epoch, NodeId, Time};

/// Nodes that are remembered; at the bound the one that was observed the longest ago is forgotten.
pub const CORRECTED_NODES_MAX: usize = 4096;
/// Without observations a ratio comes half the way back to 1 in this time.
pub const CORRECTION_HALF_LIFE_US: u64 = 30_000_000;
/// Added to both sides of a comparison: short times say little about a node's speed.
const FLOOR_US: u64 = 500;
/// A new observation counts one in this many.
const WEIGHT: i64 = 8;

/// A factor between 1/8 and 8, in 1024ths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ratio(u16);

impl Ratio {
    /// As predicted.
    pub const ONE: Self = Self(1024);
    /// The least, 1/8.
    pub const MIN: Self = Self(128);
    /// The greatest, 8.
    pub const MAX: Self = Self(8192);

    /// From 1024ths, cut to the bounds.
    #[must_use]
    pub fn from_1024ths(value: u64) -> Self {
        Self(value.clamp(u64::from(Self::MIN.0), u64::from(Self::MAX.0)) as u16) // within a u16 by its bounds
    }

    /// In 1024ths.
    #[must_use]
    pub const fn in_1024ths(self) -> u64 {
        self.0 as u64
    }

    /// `value` times this factor; grows with both.
    #[must_use]
    pub const fn apply(self, value: u64) -> u64 {
        (value / 1024).saturating_mul(self.0 as u64).saturating_add((value % 1024) * self.0 as u64 / 1024)
    }
}

impl Default for Ratio {
    fn default() -> Self {
        Self::ONE
    }
}

/// What the predictions for one node are multiplied by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Correction {
    /// Time to compute a prompt, own and queued.
    pub prefill: Ratio,
    /// Time to move KV away from here.
    pub handover: Ratio,
    /// A decode step.
    pub step: Ratio,
}

/// What was predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predicted {
    /// The time from a prompt's first step to its first token.
    Prefill,
    /// The part of a hand-over that compute does not hide.
    Handover,
    /// The time between two tokens.
    Step,
}

/// One prediction and what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Whose.
    pub node: NodeId,
    /// In which incarnation.
    pub epoch: Epoch,
    /// Of what.
    pub what: Predicted,
    /// What was predicted, corrected with `applied`, microseconds.
    pub predicted_us: u64,
    /// The factor in it.
    pub applied: Ratio,
    /// What it was, microseconds.
    pub observed_us: u64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    epoch: Epoch,
    correction: Correction,
    at: Time,
}

/// The corrections of all nodes.
#[derive(Clone, Debug, Default)]
pub struct Corrections {
    nodes: BTreeMap<NodeId, Entry>,
}

impl Corrections {
    /// Takes an observation. One of an older incarnation has no effect, the first of a newer one begins afresh. O(log nodes).
    pub fn handle(&mut self, now: Time, seen: &Observation) {
        let fresh = Entry { epoch: seen.epoch, correction: Correction::default(), at: now };
        let mut entry = self.nodes.get(&seen.node).copied().unwrap_or(fresh);
        if seen.epoch < entry.epoch {
            return;
        }
        if seen.epoch > entry.epoch {
            entry = fresh;
        }
        entry.correction = faded(&entry, now);
        entry.at = now.max(entry.at);
        let ratio = match seen.what {
            Predicted::Prefill => &mut entry.correction.prefill,
            Predicted::Handover => &mut entry.correction.handover,
            Predicted::Step => &mut entry.correction.step,
        };
        *ratio = toward(*ratio, sample(seen));
        self.nodes.insert(seen.node, entry);
        if self.nodes.len() > CORRECTED_NODES_MAX {
            let oldest = self.nodes.iter().min_by_key(|(node, entry)| (entry.at, **node)).map(|(node, _)| *node);
            oldest.map(|node| self.nodes.remove(&node));
        }
    }

    /// The correction of an incarnation, as it is `now`; that of one without observations is 1. O(log nodes).
    #[must_use]
    pub fn of(&self, now: Time, node: NodeId, epoch: Epoch) -> Correction {
        let known = self.nodes.get(&node).filter(|entry| entry.epoch == epoch);
        known.map_or_else(Correction::default, |entry| faded(entry, now))
    }

    /// Nodes that are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }
}

/// The ratio that would have made the prediction right, short times aside.
fn sample(seen: &Observation) -> Ratio {
    let observed = seen.observed_us.min(1 << 40) + FLOOR_US;
    let uncorrected = seen.predicted_us.min(1 << 40) * 1024 / seen.applied.in_1024ths() + FLOOR_US;
    Ratio::from_1024ths(observed * 1024 / uncorrected)
}

fn toward(ratio: Ratio, sample: Ratio) -> Ratio {
    let gap = i64::from(sample.0) - i64::from(ratio.0);
    // away from zero, so that a steady sample is reached and not only approached
    let step = (gap.abs() + WEIGHT - 1) / WEIGHT * gap.signum();
    Ratio::from_1024ths((i64::from(ratio.0) + step).unsigned_abs())
}

/// The correction of `entry` after the time since its last observation.
fn faded(entry: &Entry, now: Time) -> Correction {
    let elapsed_us = now.since(entry.at);
    let fade = |ratio: Ratio| {
        let (halvings, rest_us) = (elapsed_us / CORRECTION_HALF_LIFE_US, elapsed_us % CORRECTION_HALF_LIFE_US);
        let one = i64::from(Ratio::ONE.0);
        let gap = (i64::from(ratio.0) - one) / (1 << halvings.min(32));
        let gap = gap - gap * rest_us as i64 / CORRECTION_HALF_LIFE_US as i64 / 2; // both are far below 2^40
        Ratio::from_1024ths((one + gap).unsigned_abs())
    };
    let Correction { prefill, handover, step } = entry.correction;
    Correction { prefill: fade(prefill), handover: fade(handover), step: fade(step) }
}
