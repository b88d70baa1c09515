//! Attempts that are cancelled while their hand-over is under way: in which state each was, and that nothing of it is left. Whole worlds do it,
//! with clients that leave soon; when a world is at rest no block is in use, no cell is lent, no ticket, stream or half of a hand-over is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use millrace_core::ids::AttemptId;

use crate::process::HostState;
use crate::world::{Options, World};

/// Events of one world before clients stop.
const STEPS: u64 = 20_000;
/// A client leaves within this, microseconds: hand-overs take milliseconds.
const LEAVES_MAX_US: u64 = 40_000;

/// Attempts that were cancelled in mid-transfer.
#[derive(Debug, Default)]
pub struct Aborts {
    counted: BTreeSet<AttemptId>,
    by_state: BTreeMap<&'static str, u64>,
}

/// What was aborted, and what was left: nothing, or there is no report.
#[derive(Debug, Default)]
pub struct Report {
    by_state: BTreeMap<&'static str, u64>,
    worlds: u64,
}

impl Report {
    /// Aborts in mid-transfer.
    #[must_use]
    pub fn aborts(&self) -> u64 {
        self.by_state.values().sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<40} {:>9}", "aborted while", "aborts")?;
        self.by_state.iter().try_for_each(|(state, aborts)| writeln!(f, "{state:<40} {aborts:>9}"))?;
        write!(f, "{} aborts in {} worlds: 0 blocks, cells, tickets, streams left", self.aborts(), self.worlds)
    }
}

/// Runs worlds until so many attempts were aborted in mid-transfer.
///
/// # Panics
/// When something is left of one.
#[must_use]
pub fn run(seed: u64, aborts: u64) -> Report {
    let mut report = Report::default();
    while report.aborts() < aborts {
        let mut world = World::new(Options { seed: seed + report.worlds, steps: STEPS, trace: false });
        world.plan.split_bias = 1_000_000;
        world.plan.leaves_us = LEAVES_MAX_US;
        world.plan.faults.client_leaves = 800;
        world.run_to_rest(STEPS);
        report.worlds += 1;
        for (state, count) in &world.aborts.by_state {
            *report.by_state.entry(state).or_default() += count;
        }
    }
    report
}

impl World {
    /// The gateway cancels an attempt.
    pub(crate) fn count_abort(&mut self, attempt: AttemptId) {
        if let Some(state) = self.transfer_state(attempt).filter(|_| self.aborts.counted.insert(attempt)) {
            *self.aborts.by_state.entry(state).or_default() += 1;
        }
    }

    /// How far the hand-over of an attempt is; `None` when none is under way.
    fn transfer_state(&self, attempt: AttemptId) -> Option<&'static str> {
        let nodes = || self.hosts.iter().filter_map(HostState::node);
        let sends = nodes().any(|node| node.is_sending(attempt));
        let receives = nodes().any(|node| node.is_asked(attempt));
        let streams = self.streams.values().any(|stream| stream.job().attempt == attempt);
        match (sends, receives, streams) {
            (true, false, false) => Some("asked for, not heard or not granted"),
            (true, true, false) => Some("granted, no cell on its way"),
            (true, true, true) => Some("cells on their way"),
            (true, false, true) => Some("all placed, the sender not told"),
            (false, true, _) => Some("the sender gave up, the receiver not told"),
            (false, false, true) => Some("over, cells still lent"),
            (false, false, false) => None,
        }
    }
}
