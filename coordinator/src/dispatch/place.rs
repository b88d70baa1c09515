//! From the applied state, the nodes' loads and what was just sent, to a ticket on its way.

use std::time::{Duration, Instant};

use millrace_core::cluster::{Cluster, Config as Settings};
use millrace_core::identity::{Chain, TenantKey, block_names};
use millrace_core::ids::{AttemptId, BlockHash, NodeId, TokenId};
use millrace_core::message::{Message, Peer, Ticket};
use millrace_core::route::correct::Correction;
use millrace_core::route::policy::{self, Policy};
use millrace_core::route::{Ask, CostModel, Decision, NoPlace, NodeView, Slo, View, pairs, read_at};

use super::decisions::{DecisionNo, Question};
use super::observe::{Plan, Watch};
use super::registry::Placement;
use super::request::Request;
use super::routing::HotNow;
use super::types::SubmitError;
use super::{CachedAt, Explanation, Inner};

/// `Retry-After` when the cluster does not say how long, seconds.
const RETRY_AFTER_S: u32 = 1;

/// Why there is no place.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotPlaced {
    /// The tenant has no key.
    #[error("tenant {0:?} is not known here")]
    NoTenant(String),
    /// The router found none.
    #[error(transparent)]
    NoPlace(NoPlace),
    /// The link of the node that was chosen takes no more: nothing was sent.
    #[error("the node that was chosen cannot be reached")]
    Unsent,
}

impl Inner {
    /// Places a new request; one that only has to wait for a moment is not an error.
    pub(super) fn first_place(&self, now: Instant, request: &mut Request) -> Result<(), SubmitError> {
        // The machine asks for a place first; this is that answer.
        let _ = request.poll();
        match self.place(now, request) {
            Ok(()) => Ok(()),
            Err(error @ NotPlaced::NoTenant(_)) => Err(SubmitError::NotReady(error.to_string())),
            Err(error @ (NotPlaced::NoPlace(NoPlace::NoNodes) | NotPlaced::Unsent)) if self.any_linked(now) => {
                request.unplaced(now, false, error.to_string());
                Ok(())
            }
            Err(NotPlaced::Unsent) => Err(self.refusal(request, NoPlace::NoNodes)),
            Err(NotPlaced::NoPlace(error)) => Err(self.refusal(request, error)),
        }
    }

    fn refusal(&self, request: &Request, error: NoPlace) -> SubmitError {
        let prompt = request.prompt();
        match error {
            NoPlace::NoNodes => SubmitError::NoNodes { detail: error.to_string() },
            NoPlace::TooBig { largest_blocks, .. } => SubmitError::TooLong {
                tokens: prompt.tokens.len() + prompt.sampling.max_new as usize,
                max: largest_blocks as usize * self.block_tokens(),
            },
            NoPlace::Overloaded { ttft_us, tpot_us, retry_after_us } => {
                let seconds = u32::try_from(retry_after_us.div_ceil(1_000_000)).unwrap_or(u32::MAX);
                SubmitError::TooLate { ttft_us, tpot_us, retry_after_s: seconds.max(RETRY_AFTER_S) }
            }
        }
    }

    /// Whether a member that may take requests has a link here, though it is silent at the moment.
    fn any_linked(&self, now: Instant) -> bool {
        let cluster = self.cluster.read();
        let mut members = cluster.nodes().filter(|n| n.state.usable());
        members.any(|n| self.nodes.seen(now, &n.name, n.epoch).is_some_and(|seen| !seen.lost()))
    }

    /// Finds nodes for the next attempt and sends the ticket.
    pub(super) fn place(&self, now: Instant, request: &mut Request) -> Result<(), NotPlaced> {
        let prompt = request.prompt();
        let avoid: Vec<NodeId> = request.avoid().iter().copied().collect();
        let key = self.cluster.read().tenant(&prompt.tenant).copied();
        let key = key.ok_or_else(|| NotPlaced::NoTenant(prompt.tenant.clone()))?;
        let (tokens, attempt) = (request.tokens(), request.next_attempt());
        let names = self.names(&key, &prompt.cache_salt, &tokens);
        let hot = self.routing.hot(now, &names, attempt.attempt == 0);
        if attempt.attempt == 0 {
            self.asked.count(now, &prompt.tenant, &names);
        }
        let max_new = prompt.sampling.max_new.saturating_sub(request.delivered()).max(1);
        let answer = prompt.answer.unwrap_or(request.id().0);
        let question = Question { attempt, answer, tokens: tokens.len() as u32, max_new, hot: hot.hot };
        let (decision, peers) = {
            let cluster = self.cluster.read();
            let views = self.views(now, &cluster, &names);
            // The first token is what the objective is about: a request that moved is not refused for it.
            let slo = objective(cluster.config(), prompt.ttft_max).filter(|_| attempt.attempt == 0);
            let wish = Wish { seed: seed(attempt), exclude: &avoid, slo, hot: &hot, holder: request.holder() };
            let decision = self.decide(cluster.config(), &views, &question, &wish);
            let peers = decision.as_ref().ok().and_then(|decision| peers(&cluster, decision));
            (decision, peers)
        };
        let no = self.routing.decisions.add(&question, decision.clone());
        let decision = decision.map_err(NotPlaced::NoPlace)?;
        let (prefill, decode) = peers.ok_or(NotPlaced::NoPlace(NoPlace::NoNodes))?;
        self.routing.placed(now, &names, hot.hot, &decision);
        let ticket = self.ticket(now, request, tokens, key, decode.clone());
        tracing::debug!(
            attempt = %ticket.attempt, prefill = prefill.name, decode = decode.as_ref().map(|peer| peer.name.as_str()),
            cached_blocks = decision.prefill_cached_blocks, cost_us = decision.cost.total_us(), "placed"
        );
        self.watch(now, no, &question, decision, (&prefill, decode.as_ref().unwrap_or(&prefill)));
        if !self.nodes.send(&prefill.name, prefill.epoch, Message::Assign(ticket)) {
            return Err(NotPlaced::Unsent);
        }
        request.placed(now, prefill, decode);
        request.leaves(Instant::now());
        Ok(())
    }

    fn ticket(&self, now: Instant, request: &Request, tokens: Vec<TokenId>, key: TenantKey, decode: Option<Peer>) -> Ticket {
        let prompt = request.prompt();
        Ticket {
            attempt: request.next_attempt(),
            gateway: self.me,
            decode,
            tokens,
            prompt_tokens: prompt.tokens.len() as u32,
            sampling: prompt.sampling.clone(),
            tenant_key: key,
            cache_salt: prompt.cache_salt.clone(),
            budget_us: request.budget_left(now).as_micros() as u64,
            trace: prompt.trace,
        }
    }

    /// From now on what the nodes say of the attempt is compared with what was predicted.
    fn watch(&self, now: Instant, no: DecisionNo, asked: &Question, decision: Decision, (prefill, decode): (&Peer, &Peer)) {
        let (tokens, cached) = (u64::from(asked.tokens), decision.prefill_cached_blocks as usize * self.block_tokens());
        let placement = Placement {
            prefill: decision.prefill,
            decode: decision.decode,
            tokens: tokens.saturating_sub(cached as u64),
            pairs: pairs(cached as u64, tokens),
            at: now,
            decoding: false,
        };
        let plan = Plan {
            no,
            attempt: asked.attempt,
            decision: Box::new(decision),
            prefill: (prefill.node, prefill.epoch),
            decode: (decode.node, decode.epoch),
            tokens: asked.tokens,
            block_tokens: self.block_tokens() as u32,
            layers: self.model.layout.layers,
        };
        let learned = self.registry.placed(asked.attempt.request, placement, Watch::new(now, plan));
        self.routing.learn(now, learned);
    }

    fn block_tokens(&self) -> usize {
        usize::from(self.model.layout.block_tokens)
    }

    fn decide(&self, config: &Settings, nodes: &[NodeView], asked: &Question, wish: &Wish) -> Result<Decision, NoPlace> {
        let layout = &self.model.layout;
        let ask = Ask {
            tokens: asked.tokens,
            max_new: asked.max_new,
            block_tokens: u32::from(layout.block_tokens),
            block_bytes: layout.block_bytes() as u64,
            layers: layout.layers,
            seed: wish.seed,
            exclude: wish.exclude,
            slo: wish.slo,
            hot: wish.hot.hot,
            copying: &wish.hot.copying,
        };
        let read = wish.holder.map(|holder| read_at(nodes, holder));
        let view = View { nodes: read.as_deref().unwrap_or(nodes), costs: config.costs(CostModel::default()) };
        let (policy, turn) = self.routing.policy();
        let policy = if read.is_some() { Policy::Split } else { policy };
        policy::place(policy, turn, &view, &ask)
    }

    /// The names of the full blocks of `tokens`. O(tokens): not to be done under the state's lock.
    fn names(&self, key: &TenantKey, salt: &[u8], tokens: &[TokenId]) -> Vec<BlockHash> {
        let full = tokens.len() / self.block_tokens() * self.block_tokens();
        block_names(&Chain::new(*key, &self.fingerprint, salt), &tokens[..full], self.block_tokens())
    }

    pub(super) fn names_of(&self, tenant: &str, tokens: &[TokenId]) -> Result<Vec<BlockHash>, SubmitError> {
        let key = self.cluster.read().tenant(tenant).copied();
        let key = key.ok_or_else(|| SubmitError::NotReady(format!("tenant {tenant:?} is not known here")))?;
        Ok(self.names(&key, &[], tokens))
    }

    /// What is known of each live node, with a view to these blocks; sorted by node. O(blocks + nodes + tickets of the last moments).
    fn views(&self, now: Instant, cluster: &Cluster, names: &[BlockHash]) -> Vec<NodeView> {
        let prefixes = cluster.holders().prefix_lengths(names);
        let live = || cluster.nodes().filter(|n| n.state.alive());
        let (mut views, mut loaded) = (Vec::new(), Vec::new());
        for n in live() {
            let seen = self.nodes.seen(now, &n.name, n.epoch);
            loaded.push(seen.map_or(now, |seen| now - seen.load_age));
            views.push(NodeView {
                node: n.node,
                role: n.role,
                usable: n.state.usable() && seen.is_some_and(|seen| seen.usable()),
                epoch: n.epoch,
                load: seen.map(|seen| seen.load).unwrap_or_default(),
                prefix_blocks: prefixes.binary_search_by_key(&n.node, |(node, _)| *node).map_or(0, |i| prefixes[i].1),
                inflight_tokens: 0,
                inflight_pairs: 0,
                inflight_sequences: 0,
                correction: Correction::default(),
            });
        }
        self.registry.add_in_flight(&mut views, &loaded);
        self.routing.correct(now, &mut views);
        views
    }

    pub(super) fn explain(&self, now: Instant, tenant: &str, tokens: &[TokenId], max_new: u32) -> Result<Explanation, SubmitError> {
        let names = self.names_of(tenant, tokens)?;
        let hot = self.routing.hot(now, &names, false);
        let cluster = self.cluster.read();
        let views = self.views(now, &cluster, &names);
        let cached = |view: &NodeView| CachedAt {
            node: view.node,
            name: cluster.node(view.node).map(|n| n.name.clone()).unwrap_or_default(),
            cached_blocks: view.prefix_blocks,
            usable: view.usable,
        };
        let asked = Question { attempt: AttemptId::default(), answer: 0, tokens: tokens.len() as u32, max_new, hot: hot.hot };
        let wish = Wish { seed: 0, exclude: &[], slo: objective(cluster.config(), None), hot: &hot, holder: None };
        Ok(Explanation {
            prompt_tokens: tokens.len(),
            block_tokens: self.block_tokens(),
            blocks: tokens.len() / self.block_tokens(),
            nodes: views.iter().map(cached).collect(),
            hot: hot.hot,
            decision: self.decide(cluster.config(), &views, &asked, &wish),
        })
    }
}

/// What a decision depends on beside the nodes and the prompt.
struct Wish<'a> {
    seed: u64,
    exclude: &'a [NodeId],
    slo: Option<Slo>,
    hot: &'a HotNow,
    /// The node from which the KV is taken.
    holder: Option<NodeId>,
}

/// What the time to the first token and between tokens is to be: the client's own word on the first counts before the cluster's.
fn objective(config: &Settings, ttft_max: Option<Duration>) -> Option<Slo> {
    let cluster = config.slo();
    let own = ttft_max.map(|ttft| Slo {
        ttft_us: u64::try_from(ttft.as_micros()).unwrap_or(u64::MAX),
        tpot_us: cluster.map_or(u64::MAX, |slo| slo.tpot_us),
    });
    own.or(cluster)
}

const fn seed(attempt: AttemptId) -> u64 {
    (attempt.request.0 as u64).wrapping_add(attempt.attempt as u64)
}

/// Who was chosen, as the ticket names them; `None` when one has just left.
fn peers(cluster: &Cluster, decision: &Decision) -> Option<(Peer, Option<Peer>)> {
    let decode = match decision.decode {
        None => None,
        Some(node) => Some(cluster.peer(node)?),
    };
    Some((cluster.peer(decision.prefill)?, decode))
}
