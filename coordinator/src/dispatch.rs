//! The owner of running requests: takes a tokenised prompt, finds nodes for it, hands its tokens to the client in order, and moves it
//! when a node fails.
//!
//! [`request`] decides what becomes of one request; `millrace_core::route` where it goes; here is what joins them to the applied
//! state, the links and the client, and `routing` what the gateway learns from what became of its [`decisions`]. One task drives one
//! request; [`registry`] leads what nodes send to the right task.

mod asked;
pub mod decisions;
mod observe;
mod place;
pub mod registry;
pub mod request;
mod routing;
mod run;
mod types;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use millrace_core::identity::Fingerprint;
use millrace_core::ids::{BlockHash, Epoch, NodeId, ReplicaId, RequestId, TokenId};
use millrace_core::message::{AttemptFailed, HandoverStats, ModelIdentity, TOKENS_MAX, TokenOut};
use millrace_core::route::correct::Correction;
use millrace_core::route::hot::Hot;
use millrace_core::route::policy::Policy;
use millrace_core::route::{Decision, NoPlace};
use tokio::sync::{mpsc, watch};

use crate::nodes::Nodes;
use crate::state::SharedCluster;
use crate::traffic::Traffic;
use millrace_log::RaftStatus;

pub use asked::{Asked, AskedPrefixes};
use decisions::Decisions;
use registry::{Input, Registry};
use request::Request;
pub use routing::BeliefCounts;
use routing::Routing;
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
    routing: Routing,
    asked: AskedPrefixes,
    traffic: Traffic,
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
    /// The prefix of the prompt that is asked for often.
    pub hot: Option<Hot>,
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
        let (registry, routing, asked) = (Registry::default(), Routing::default(), AskedPrefixes::default());
        let traffic = Traffic::default();
        Self(Arc::new(Inner { me, model, fingerprint, cluster, nodes, raft, registry, routing, asked, traffic }))
    }

    /// Says how requests are placed, before the first.
    pub fn place_by(&self, policy: Policy) {
        self.0.routing.place_by(policy);
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
        self.check(&prompt)?;
        if delivered.tokens.len() >= prompt.sampling.max_new as usize {
            return Err(SubmitError::Invalid("every token is delivered already".into()));
        }
        let (now, id) = (Instant::now(), RequestId(rand::random()));
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let inputs = self.0.registry.open(id)?;
        let mut request = Request::resumed(now, id, prompt, delivered);
        if let Err(error) = self.0.first_place(now, &mut request) {
            let learned = self.0.registry.close(id);
            self.0.routing.learn(now, learned);
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

    /// The names of the full blocks of a prompt of this tenant. O(tokens).
    ///
    /// # Errors
    /// When the tenant is unknown.
    pub fn block_names(&self, tenant: &str, tokens: &[TokenId]) -> Result<Vec<BlockHash>, SubmitError> {
        self.0.names_of(tenant, tokens)
    }

    /// Which beginnings of prompts this gateway is asked for most, the most frequent first.
    #[must_use]
    pub fn asked(&self, most: usize) -> Vec<Asked> {
        self.0.asked.ranked(most)
    }

    /// Whether a prompt may be submitted at all, by the cluster's settings.
    fn check(&self, prompt: &Prompt) -> Result<(), SubmitError> {
        let (tokens_max, running_max) = {
            let cluster = self.0.cluster.read();
            (cluster.config().tokens_max().min(TOKENS_MAX), cluster.config().running_max())
        };
        check(prompt, tokens_max)?;
        if self.running() >= running_max {
            return Err(SubmitError::NoCapacity { retry_after_s: 1 });
        }
        Ok(())
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

    /// The last decisions.
    #[must_use]
    pub fn decisions(&self) -> &Decisions {
        &self.0.routing.decisions
    }

    /// What predictions for an incarnation of a node are multiplied by.
    #[must_use]
    pub fn correction(&self, node: NodeId, epoch: Epoch) -> Correction {
        self.0.routing.correction(Instant::now(), node, epoch)
    }

    /// How many cached blocks were believed in and how many were found.
    #[must_use]
    pub fn beliefs(&self) -> BeliefCounts {
        self.0.routing.beliefs()
    }

    /// What was served since the start.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.0.traffic
    }

    /// How many requests of this replica still need each node.
    #[must_use]
    pub fn needed(&self) -> BTreeMap<NodeId, u32> {
        self.0.registry.needed()
    }

    /// A token came from a node.
    pub fn token(&self, from: NodeId, token: TokenOut) {
        self.heard(token.attempt.request, Input::Token(from, token));
    }

    /// A node gave up on an attempt.
    pub fn failed(&self, from: NodeId, failed: AttemptFailed) {
        self.heard(failed.attempt.request, Input::Failed(from, failed));
    }

    /// A hand-over ended well.
    pub fn handover(&self, from: NodeId, stats: HandoverStats) {
        self.heard(stats.attempt.request, Input::Handover(from, stats));
    }

    fn heard(&self, id: RequestId, input: Input) {
        let learned = self.0.registry.input(id, input);
        self.0.routing.learn(Instant::now(), learned);
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

fn check(prompt: &Prompt, tokens_max: usize) -> Result<(), SubmitError> {
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
        tokens if tokens > tokens_max => Err(SubmitError::TooLong { tokens, max: tokens_max }),
        _ => Ok(()),
    }
}
