//! The table of running requests: leads what nodes send to the task of its request, and knows what was sent where so lately
//! that the nodes' own figures cannot show it yet.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace_core::ids::{NodeId, RequestId};
use millrace_core::message::{AttemptFailed, HandoverStats, TokenOut};
use millrace_core::route::NodeView;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::decisions::Outcome;
use super::observe::{Learned, Watch};
use super::types::{REQUESTS_MAX, SubmitError};
use crate::nodes::FRESH;

/// Messages of nodes that wait for the task of one request; at more the request ends, because its client does not read.
pub const INPUTS_MAX: usize = 8192;
/// Tickets that are remembered until the loads of their nodes must show them; at more the oldest is forgotten.
pub const RECENT_MAX: usize = 4096;
/// A load that is older than this is of a node that is not chosen.
const RECENT_KEPT: Duration = FRESH.saturating_mul(2);

/// What a node said about a request.
#[derive(Debug)]
pub enum Input {
    /// A token.
    Token(NodeId, TokenOut),
    /// An attempt's end without its last token.
    Failed(NodeId, AttemptFailed),
    /// A hand-over's end.
    Handover(NodeId, HandoverStats),
}

/// Where the current attempt of a request runs.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    /// Who computes the prompt.
    pub prefill: NodeId,
    /// Who decodes, when another.
    pub decode: Option<NodeId>,
    /// Prompt tokens that are not cached there.
    pub tokens: u64,
    /// [`millrace_core::route::pairs`] of them.
    pub pairs: u64,
    /// Since when.
    pub at: Instant,
    /// Whether the decoding node has the sequence, so that its load shows it.
    pub decoding: bool,
}

impl Placement {
    /// The node that will decode it and does not show it yet.
    fn comes_to(&self) -> Option<NodeId> {
        self.decode.filter(|_| !self.decoding)
    }
}

#[derive(Default)]
struct Entry {
    inputs: Option<mpsc::Sender<Input>>,
    placement: Option<Placement>,
    watch: Option<Watch>,
}

#[derive(Default)]
struct Table {
    entries: HashMap<RequestId, Entry>,
    /// The newest placements, in order: a decision looks at these few, not at all that run.
    recent: VecDeque<Placement>,
    /// Sequences that will come to each node from another.
    coming: HashMap<NodeId, u32>,
}

/// The table.
#[derive(Default)]
pub struct Registry {
    table: Mutex<Table>,
    stopping: AtomicBool,
}

impl Registry {
    /// A new request and what nodes will say about it.
    ///
    /// # Errors
    /// When [`REQUESTS_MAX`] run, or the replica stops.
    pub fn open(&self, id: RequestId) -> Result<mpsc::Receiver<Input>, SubmitError> {
        let entries = &mut self.table.lock().entries;
        if self.stopping() {
            return Err(SubmitError::NotReady("this replica is stopping".into()));
        }
        if entries.len() >= REQUESTS_MAX {
            return Err(SubmitError::NoCapacity { retry_after_s: 1 });
        }
        let (sender, receiver) = mpsc::channel(INPUTS_MAX);
        entries.insert(id, Entry { inputs: Some(sender), ..Entry::default() });
        Ok(receiver)
    }

    /// The request has ended.
    pub(super) fn close(&self, id: RequestId) -> Learned {
        let mut table = self.table.lock();
        let Some(entry) = table.entries.remove(&id) else { return Learned::default() };
        table.comes_no_more(entry.placement.and_then(|placement| placement.comes_to()));
        Learned { observed: entry.watch.map(|mut watch| watch.end(Outcome::Dropped)), ..Learned::default() }
    }

    /// Requests in the table.
    pub fn running(&self) -> usize {
        self.table.lock().entries.len()
    }

    /// Leads an input to its request, and says what it teaches. Dropped when that has ended; ends that when its queue is full.
    pub(super) fn input(&self, id: RequestId, input: Input) -> Learned {
        let mut table = self.table.lock();
        let Some(entry) = table.entries.get_mut(&id) else { return Learned::default() };
        let ours = |node: &NodeId| entry.placement.is_some_and(|p| p.prefill == *node || p.decode == Some(*node));
        let learned = match (&mut entry.watch, &input) {
            (Some(watch), Input::Token(from, token)) if ours(from) => watch.token(Instant::now(), token),
            (Some(watch), Input::Handover(from, stats)) if ours(from) => watch.handover(stats),
            (Some(watch), Input::Failed(from, failed)) if ours(from) => watch.failed(failed),
            _ => Learned::default(),
        };
        if entry.inputs.as_ref().is_some_and(|inputs| inputs.try_send(input).is_err()) {
            entry.inputs = None;
        }
        learned
    }

    /// The request runs there now.
    pub(super) fn placed(&self, id: RequestId, placement: Placement, watch: Watch) -> Learned {
        let mut table = self.table.lock();
        let Some(entry) = table.entries.get_mut(&id) else { return Learned::default() };
        let before = entry.placement.replace(placement).and_then(|before| before.comes_to());
        let moved = entry.watch.replace(watch);
        table.comes_no_more(before);
        if let Some(node) = placement.comes_to() {
            *table.coming.entry(node).or_default() += 1;
        }
        while table.recent.len() >= RECENT_MAX || table.recent.front().is_some_and(|p| p.at + RECENT_KEPT < placement.at) {
            table.recent.pop_front();
        }
        table.recent.push_back(placement);
        Learned { observed: moved.map(|mut watch| watch.end(Outcome::Moved)), ..Learned::default() }
    }

    /// The decoding node has the sequence.
    pub fn decoding(&self, id: RequestId) {
        let mut table = self.table.lock();
        let Some(placement) = table.entries.get_mut(&id).and_then(|entry| entry.placement.as_mut()) else { return };
        let here = placement.comes_to();
        placement.decoding = true;
        table.comes_no_more(here);
    }

    /// Where requests run now.
    pub fn placements(&self) -> Vec<Placement> {
        self.table.lock().entries.values().filter_map(|entry| entry.placement).collect()
    }

    /// Adds to each view what its load, which is from `since` (one for each view), cannot show: prompt tokens that were sent after it,
    /// and sequences that will be decoded there. The views must be sorted by node. O(tickets of the last moments + nodes).
    pub fn add_in_flight(&self, views: &mut [NodeView], since: &[Instant]) {
        let table = self.table.lock();
        let find = |views: &[NodeView], node: NodeId| views.binary_search_by_key(&node, |view| view.node).ok();
        for placement in &table.recent {
            if let Some(at) = find(views, placement.prefill).filter(|at| placement.at >= since[*at]) {
                let view = &mut views[at];
                view.inflight_tokens = view.inflight_tokens.saturating_add(placement.tokens);
                view.inflight_pairs = view.inflight_pairs.saturating_add(placement.pairs);
                view.inflight_sequences += u32::from(placement.decode.is_none());
            }
        }
        for (node, coming) in &table.coming {
            if let Some(at) = find(views, *node) {
                views[at].inflight_sequences += coming;
            }
        }
    }

    /// How many requests still need each node: the one that decodes, and the one that computes the prompt until that is done.
    pub fn needed(&self) -> BTreeMap<NodeId, u32> {
        let mut needed = BTreeMap::new();
        for placement in self.placements() {
            let prefill = (placement.decode.is_none() || !placement.decoding).then_some(placement.prefill);
            let decode = placement.decode.filter(|decode| Some(*decode) != prefill);
            prefill.into_iter().chain(decode).for_each(|node| *needed.entry(node).or_default() += 1);
        }
        needed
    }

    /// Takes no new requests and ends those that run.
    pub fn stop(&self) {
        let entries = &mut self.table.lock().entries;
        self.stopping.store(true, Ordering::Release);
        entries.values_mut().for_each(|entry| entry.inputs = None);
    }

    /// Whether [`Registry::stop`] was called.
    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

impl Table {
    /// One sequence less will come to `node`.
    fn comes_no_more(&mut self, node: Option<NodeId>) {
        let Some(node) = node else { return };
        if let Some(coming) = self.coming.get_mut(&node) {
            *coming -= 1; // it was counted when it was placed
            if *coming == 0 {
                self.coming.remove(&node);
            }
        }
    }
}
