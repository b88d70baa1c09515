//! The table of running requests: leads what nodes send to the task of its request, and knows what was sent where so lately
//! that the nodes' own figures cannot show it yet.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use millrace_core::ids::{NodeId, RequestId};
use millrace_core::message::{AttemptFailed, HandoverStats, TokenOut};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::types::{REQUESTS_MAX, SubmitError};

/// Messages of nodes that wait for the task of one request; at more the request ends, because its client does not read.
pub const INPUTS_MAX: usize = 8192;

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
    /// Since when.
    pub at: Instant,
    /// Whether the decoding node has the sequence, so that its load shows it.
    pub decoding: bool,
}

#[derive(Default)]
struct Entry {
    inputs: Option<mpsc::Sender<Input>>,
    placement: Option<Placement>,
}

/// The table.
#[derive(Default)]
pub struct Registry {
    entries: Mutex<HashMap<RequestId, Entry>>,
    stopping: AtomicBool,
}

impl Registry {
    /// A new request and what nodes will say about it.
    ///
    /// # Errors
    /// When [`REQUESTS_MAX`] run, or the replica stops.
    pub fn open(&self, id: RequestId) -> Result<mpsc::Receiver<Input>, SubmitError> {
        let mut entries = self.entries.lock();
        if self.stopping() {
            return Err(SubmitError::NotReady("this replica is stopping".into()));
        }
        if entries.len() >= REQUESTS_MAX {
            return Err(SubmitError::NoCapacity { retry_after_s: 1 });
        }
        let (sender, receiver) = mpsc::channel(INPUTS_MAX);
        entries.insert(id, Entry { inputs: Some(sender), placement: None });
        Ok(receiver)
    }

    /// The request has ended.
    pub fn close(&self, id: RequestId) {
        self.entries.lock().remove(&id);
    }

    /// Requests in the table.
    pub fn running(&self) -> usize {
        self.entries.lock().len()
    }

    /// Leads an input to its request. Dropped when that has ended; ends that when its queue is full.
    pub fn input(&self, id: RequestId, input: Input) {
        let mut entries = self.entries.lock();
        let Some(entry) = entries.get_mut(&id) else { return };
        if entry.inputs.as_ref().is_some_and(|inputs| inputs.try_send(input).is_err()) {
            entry.inputs = None;
        }
    }

    /// The request runs there now.
    pub fn placed(&self, id: RequestId, placement: Placement) {
        if let Some(entry) = self.entries.lock().get_mut(&id) {
            entry.placement = Some(placement);
        }
    }

    /// The decoding node has the sequence.
    pub fn decoding(&self, id: RequestId) {
        if let Some(placement) = self.entries.lock().get_mut(&id).and_then(|entry| entry.placement.as_mut()) {
            placement.decoding = true;
        }
    }

    /// Where requests run now.
    pub fn placements(&self) -> Vec<Placement> {
        self.entries.lock().values().filter_map(|entry| entry.placement).collect()
    }

    /// Takes no new requests.
    pub fn drain(&self) {
        // Under the lock, so that no request is opened after it.
        let _entries = self.entries.lock();
        self.stopping.store(true, Ordering::Release);
    }

    /// Takes no new requests and ends those that run.
    pub fn stop(&self) {
        self.drain();
        self.entries.lock().values_mut().for_each(|entry| entry.inputs = None);
    }

    /// Whether [`Registry::drain`] or [`Registry::stop`] was called.
    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}
