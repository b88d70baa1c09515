//! What this gateway has learned for its next decisions: how far predictions were off, which prefixes are hot, what it decided before.
//! The rules are `millrace_core::route`'s; here are their locks, their clock and their counters.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use millrace_core::ids::{BlockHash, Epoch, NodeId, Time};
use millrace_core::route::correct::{Correction, Corrections};
use millrace_core::route::hot::{Hot, HotPrefixes};
use millrace_core::route::policy::Policy;
use millrace_core::route::{Decision, NodeView};
use parking_lot::Mutex;

use super::decisions::Decisions;
use super::observe::{Believed, Learned, Side};

/// Added to the predicted time of a copy: until the index shows it.
const COPY_SHOWS_AFTER: Duration = Duration::from_secs(1);
/// A copy that takes longer is no longer believed in.
const COPY_WAIT_MAX: Duration = Duration::from_secs(60);

/// Blocks that were believed to be cached where requests went and that were, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BeliefCounts {
    /// Believed, where prompts are computed.
    pub prefill_belief: u64,
    /// Found there.
    pub prefill_found: u64,
    /// Believed, where answers are decoded after a hand-over.
    pub decode_belief: u64,
    /// Found there.
    pub decode_found: u64,
}

/// See the module.
pub(super) struct Routing {
    started: Instant,
    corrections: Mutex<Corrections>,
    hot: Mutex<HotPrefixes>,
    pub decisions: Decisions,
    beliefs: [AtomicU64; 4],
    policy: OnceLock<Policy>,
    turns: AtomicU64,
}

/// The hot prefix of a prompt, and where it is being computed.
#[derive(Clone, Debug, Default)]
pub(super) struct HotNow {
    pub hot: Option<Hot>,
    pub copying: Vec<NodeId>,
}

impl Default for Routing {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            corrections: Mutex::default(),
            hot: Mutex::default(),
            decisions: Decisions::default(),
            beliefs: Default::default(),
            policy: OnceLock::new(),
            turns: AtomicU64::new(0),
        }
    }
}

impl Routing {
    fn time(&self, now: Instant) -> Time {
        Time(now.saturating_duration_since(self.started).as_micros() as u64)
    }

    /// Takes what one message taught.
    pub(super) fn learn(&self, now: Instant, learned: Learned) {
        if let Some(seen) = &learned.seen {
            self.corrections.lock().handle(self.time(now), seen);
        }
        if let Some(Believed { role, belief, found }) = learned.believed {
            let at = if role == Side::Prefill { 0 } else { 2 };
            self.beliefs[at].fetch_add(belief, Ordering::Relaxed);
            self.beliefs[at + 1].fetch_add(found, Ordering::Relaxed);
        }
        if let Some((no, observed)) = learned.observed {
            self.decisions.learned(no, observed);
        }
    }

    /// Puts each node's correction into its view.
    pub(super) fn correct(&self, now: Instant, views: &mut [NodeView]) {
        let (corrections, time) = (self.corrections.lock(), self.time(now));
        views.iter_mut().for_each(|view| view.correction = corrections.of(time, view.node, view.epoch));
    }

    /// The correction of one node.
    pub(super) fn correction(&self, now: Instant, node: NodeId, epoch: Epoch) -> Correction {
        self.corrections.lock().of(self.time(now), node, epoch)
    }

    /// What is hot of a prompt; counts it as asked for once more when it is `new`.
    pub(super) fn hot(&self, now: Instant, names: &[BlockHash], new: bool) -> HotNow {
        let (mut prefixes, time) = (self.hot.lock(), self.time(now));
        let hot = if new { prefixes.asked(time, names) } else { prefixes.look(names) };
        let copying = hot.map_or_else(Vec::new, |hot| prefixes.copies(time, names[hot.blocks as usize - 1]));
        HotNow { hot, copying }
    }

    /// A request went where the hot prefix is not known to be: soon it will be.
    pub(super) fn placed(&self, now: Instant, names: &[BlockHash], hot: Option<Hot>, decision: &Decision) {
        let Some(hot) = hot.filter(|hot| decision.prefill_cached_blocks < hot.blocks) else { return };
        let takes = Duration::from_micros(decision.cost.ttft_us).saturating_add(COPY_SHOWS_AFTER).min(COPY_WAIT_MAX);
        let until = self.time(now).after(takes.as_micros() as u64);
        self.hot.lock().copying(self.time(now), names[hot.blocks as usize - 1], decision.prefill, until);
    }

    /// Says how requests are placed from now on; only the first word counts.
    pub(super) fn place_by(&self, policy: Policy) {
        let _ = self.policy.set(policy);
    }

    /// How requests are placed, and how many were so far.
    pub(super) fn policy(&self) -> (Policy, u64) {
        (self.policy.get().copied().unwrap_or_default(), self.turns.fetch_add(1, Ordering::Relaxed))
    }

    pub(super) fn beliefs(&self) -> BeliefCounts {
        let [prefill_belief, prefill_found, decode_belief, decode_found] =
            [0, 1, 2, 3].map(|at| self.beliefs[at].load(Ordering::Relaxed));
        BeliefCounts { prefill_belief, prefill_found, decode_belief, decode_found }
    }
}
