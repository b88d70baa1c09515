//! The owner of running requests: takes a tokenised prompt, finds nodes for it, hands its tokens to the client in order, and moves it
//! when a node fails.
//!
//! [`request`] decides what becomes of one request; `millrace_core::route` where it goes; here is what joins them to the applied
//! state, the links and the client. One task drives one request; [`registry`] leads what nodes send to the right task.

mod place;
pub mod registry;
pub mod request;
mod run;
mod types;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Instant;

use millrace_core::identity::Fingerprint;
use millrace_core::ids::{NodeId, ReplicaId, RequestId, TokenId};
use millrace_core::message::{AttemptFailed, HandoverStats, ModelIdentity, TOKENS_MAX, TokenOut};
use millrace_core::route::{Decision, NoPlace};
use tokio::sync::{mpsc, watch};

use crate::nodes::Nodes;
use crate::raft::RaftStatus;
use crate::state::SharedCluster;

use registry::{Input, Registry};
use request::Request;
pub use types::{
    ATTEMPTS_MAX, CACHE_SALT_BYTES_MAX, DEFAULT_TENANT, Delivered, Event, FailureKind, Prompt, REQUESTS_MAX, SubmitError, Timings,
    Usage,
};

/// Events that wait for a client; a client that leaves them unread for [`CLIENT_WAIT_MAX`] loses its request.
pub const EVENTS_MAX: usize = 1024;
/// See [`EVENTS_MAX`].
pub const CLIENT_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(10);

/// Takes requests. Clones share one table of running requests.
#[derive(Clone)]
pub struct Dispatcher(Arc<Inner>);

/// What the dispatcher reads and keeps.
struct Inner {
    me: ReplicaId,
    model: ModelIdentity,
    fingerprint: Fingerprint,
    cluster: SharedCluster,
    nodes: Arc<Nodes>,
    raft: watch::Receiver<RaftStatus>,
    registry: Registry,
}

/// A running request. Dropping it cancels the request.
#[derive(Debug)]
pub struct Running {
    id: RequestId,
    events: mpsc::Receiver<Event>,
}

impl Running {
    /// Its name.
    #[must_use]
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// What happens next; `None` after the last event. Cancel-safe.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }
}

/// Where a prompt would go now, and why.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Full blocks of the prompt.
    pub blocks: usize,
    /// The live nodes and what they are believed to hold.
    pub nodes: Vec<CachedAt>,
    /// Where it would go.
    pub decision: Result<Decision, NoPlace>,
}

/// What a node is believed to hold of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedAt {
    /// The node.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Leading full blocks.
    pub cached_blocks: u32,
    /// Whether new requests may go there.
    pub usable: bool,
}

impl Dispatcher {
    /// A dispatcher over the applied state and the nodes that this replica hears.
    #[must_use]
    pub fn new(
        me: ReplicaId,
        model: ModelIdentity,
        cluster: SharedCluster,
        nodes: Arc<Nodes>,
        raft: watch::Receiver<RaftStatus>,
    ) -> Self {
        let fingerprint = model.fingerprint();
        Self(Arc::new(Inner { me, model, fingerprint, cluster, nodes, raft, registry: Registry::default() }))
    }

    /// Starts a request. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was started then.
    pub fn submit(&self, prompt: Prompt) -> Result<Running, SubmitError> {
        self.resume(prompt, Delivered::default())
    }

    /// Goes on with a request that another gateway began, after the tokens that its client has: as if an attempt had been lost.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was started then.
    pub fn resume(&self, prompt: Prompt, delivered: Delivered) -> Result<Running, SubmitError> {
        check(&prompt)?;
        if delivered.tokens.len() >= prompt.sampling.max_new as usize {
            return Err(SubmitError::Invalid("every token is delivered already".into()));
        }
        let (now, id) = (Instant::now(), RequestId(rand::random()));
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let inputs = self.0.registry.open(id)?;
        let mut request = Request::resumed(now, id, prompt, delivered);
        if let Err(error) = self.0.first_place(now, &mut request) {
            self.0.registry.close(id);
            return Err(error);
        }
        tokio::spawn(run::run(self.0.clone(), request, inputs, events));
        Ok(Running { id, events: receiver })
    }

    /// Where a prompt would go now. Starts nothing. O(tokens).
    ///
    /// # Errors
    /// When the tenant is unknown.
    pub fn explain(&self, tenant: &str, tokens: &[TokenId], max_new: u32) -> Result<Explanation, SubmitError> {
        self.0.explain(Instant::now(), tenant, tokens, max_new)
    }

    /// Whether requests can be served.
    ///
    /// # Errors
    /// What is missing.
    pub fn ready(&self) -> Result<(), String> {
        if self.0.registry.stopping() {
            return Err("this replica is stopping".into());
        }
        if self.0.raft.borrow().leader.is_none() {
            return Err("no leader is known".into());
        }
        let cluster = self.0.cluster.read();
        if cluster.tenant(DEFAULT_TENANT).is_none() {
            return Err("the default tenant has no key yet".into());
        }
        let now = Instant::now();
        let usable = |n: &millrace_core::cluster::Node| {
            n.state.usable() && self.0.nodes.seen(now, &n.name, n.epoch).is_some_and(|seen| seen.usable())
        };
        if cluster.nodes().any(usable) { Ok(()) } else { Err("no usable node".into()) }
    }

    /// What is served.
    #[must_use]
    pub fn model(&self) -> &ModelIdentity {
        &self.0.model
    }

    /// Requests that run on this replica.
    #[must_use]
    pub fn running(&self) -> usize {
        self.0.registry.running()
    }

    /// A token came from a node.
    pub fn token(&self, from: NodeId, token: TokenOut) {
        self.0.registry.input(token.attempt.request, Input::Token(from, token));
    }

    /// A node gave up on an attempt.
    pub fn failed(&self, from: NodeId, failed: AttemptFailed) {
        self.0.registry.input(failed.attempt.request, Input::Failed(from, failed));
    }

    /// A hand-over ended well.
    pub fn handover(&self, from: NodeId, stats: HandoverStats) {
        self.0.registry.input(stats.attempt.request, Input::Handover(from, stats));
    }

    /// Takes no new requests; those that run go on.
    pub fn drain(&self) {
        self.0.registry.drain();
    }

    /// Ends every request: the replica stops.
    pub fn stop(&self) {
        self.0.registry.stop();
    }
}

fn check(prompt: &Prompt) -> Result<(), SubmitError> {
    if prompt.tokens.is_empty() {
        return Err(SubmitError::Invalid("the prompt is empty".into()));
    }
    if prompt.sampling.max_new == 0 {
        return Err(SubmitError::Invalid("no token is asked for".into()));
    }
    if prompt.cache_salt.len() > CACHE_SALT_BYTES_MAX {
        return Err(SubmitError::Invalid(format!("cache_salt: at most {CACHE_SALT_BYTES_MAX} bytes")));
    }
    match prompt.tokens.len().saturating_add(prompt.sampling.max_new as usize) {
        tokens if tokens > TOKENS_MAX => Err(SubmitError::TooLong { tokens, max: TOKENS_MAX }),
        _ => Ok(()),
    }
}
