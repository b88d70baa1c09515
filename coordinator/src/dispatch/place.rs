//! From the applied state, the nodes' loads and what was just sent, to a ticket on its way.

use std::time::Instant;

use millrace_core::cluster::{Cluster, Config as Settings};
use millrace_core::identity::{Chain, TenantKey, block_names};
use millrace_core::ids::{BlockHash, NodeId, TokenId};
use millrace_core::message::{Message, Peer, Ticket};
use millrace_core::route::{self, Ask, CostModel, Decision, NoPlace, NodeView, View};

use super::registry::Placement;
use super::request::Request;
use super::types::SubmitError;
use super::{CachedAt, Explanation, Inner};

/// `Retry-After` when the cluster does not say how long, seconds.
const RETRY_AFTER_S: u32 = 1;

/// Why there is no place.
pub(super) enum NotPlaced {
    /// The tenant has no key.
    NoTenant(String),
    /// The router found none.
    NoPlace(NoPlace),
}

impl Inner {
    /// Places a new request; one that only has to wait for a moment is not an error.
    pub(super) fn first_place(&self, now: Instant, request: &mut Request) -> Result<(), SubmitError> {
        // The machine asks for a place first; this is that answer.
        let _ = request.poll();
        match self.place(now, request) {
            Ok(()) => Ok(()),
            Err(NotPlaced::NoTenant(name)) => Err(SubmitError::NotReady(format!("tenant {name:?} is not known here"))),
            Err(NotPlaced::NoPlace(NoPlace::NoNodes)) if self.any_linked(now) => {
                request.unplaced(now, false, NoPlace::NoNodes.to_string());
                Ok(())
            }
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
            NoPlace::Overloaded { retry_after_us, .. } => {
                let seconds = u32::try_from(retry_after_us.div_ceil(1_000_000)).unwrap_or(u32::MAX);
                SubmitError::NoCapacity { retry_after_s: seconds.max(RETRY_AFTER_S) }
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
        let tokens = request.tokens();
        let names = self.names(&key, &prompt.cache_salt, &tokens);
        if request.next_attempt().attempt == 0 {
            self.asked.count(now, &prompt.tenant, &names);
        }
        let max_new = prompt.sampling.max_new.saturating_sub(request.delivered()).max(1);
        let seed = (request.id().0 as u64).wrapping_add(u64::from(request.next_attempt().attempt));
        let (decision, prefill, decode) = {
            let cluster = self.cluster.read();
            let views = self.views(now, &cluster, &names);
            let decision =
                self.decide(cluster.config(), &views, (tokens.len(), max_new, seed), &avoid).map_err(NotPlaced::NoPlace)?;
            let gone = || NotPlaced::NoPlace(NoPlace::NoNodes);
            let prefill = cluster.peer(decision.prefill).ok_or_else(gone)?;
            let decode = decision.decode.map(|node| cluster.peer(node).ok_or_else(gone)).transpose()?;
            (decision, prefill, decode)
        };
        let ticket = self.ticket(now, request, tokens, key, decode.clone());
        self.registry.placed(request.id(), self.placement(now, &decision, ticket.tokens.len()));
        tracing::debug!(
            attempt = %ticket.attempt, prefill = prefill.name, decode = decode.as_ref().map(|peer| peer.name.as_str()),
            cached_blocks = decision.prefill_cached_blocks, cost_us = decision.cost.total_us(), "placed"
        );
        let (name, epoch) = (prefill.name.clone(), prefill.epoch);
        request.placed(now, prefill, decode);
        if !self.nodes.send(&name, epoch, Message::Assign(ticket)) {
            request.unsent(now);
        }
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

    fn placement(&self, now: Instant, decision: &Decision, tokens: usize) -> Placement {
        let cached = decision.prefill_cached_blocks as usize * self.block_tokens();
        let tokens = tokens.saturating_sub(cached) as u64;
        Placement { prefill: decision.prefill, decode: decision.decode, tokens, at: now, decoding: false }
    }

    fn block_tokens(&self) -> usize {
        usize::from(self.model.layout.block_tokens)
    }

    fn decide(
        &self,
        config: &Settings,
        nodes: &[NodeView],
        (tokens, max_new, seed): (usize, u32, u64),
        exclude: &[NodeId],
    ) -> Result<Decision, NoPlace> {
        let layout = &self.model.layout;
        let ask = Ask {
            tokens: tokens as u32,
            max_new,
            block_tokens: u32::from(layout.block_tokens),
            block_bytes: layout.block_bytes() as u64,
            layers: layout.layers,
            seed,
            exclude,
            slo: config.slo(),
        };
        route::place(&View { nodes, costs: config.costs(CostModel::default()) }, &ask)
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

    /// What is known of each live node, with a view to these blocks. O(blocks + nodes x requests in flight).
    fn views(&self, now: Instant, cluster: &Cluster, names: &[BlockHash]) -> Vec<NodeView> {
        let prefixes = cluster.holders().prefix_lengths(names);
        let placements = self.registry.placements();
        let live = cluster.nodes().filter(|n| n.state.alive());
        live.map(|n| {
            let seen = self.nodes.seen(now, &n.name, n.epoch);
            let (load, since) = seen.map_or((Default::default(), now), |seen| (seen.load, now - seen.load_age));
            let prefix = prefixes.binary_search_by_key(&n.node, |(node, _)| *node).map_or(0, |i| prefixes[i].1);
            let (inflight_tokens, inflight_sequences) = in_flight(&placements, n.node, since);
            NodeView {
                node: n.node,
                role: n.role,
                usable: n.state.usable() && seen.is_some_and(|seen| seen.usable()),
                epoch: n.epoch,
                load,
                prefix_blocks: prefix,
                inflight_tokens,
                inflight_sequences,
            }
        })
        .collect()
    }

    pub(super) fn explain(&self, now: Instant, tenant: &str, tokens: &[TokenId], max_new: u32) -> Result<Explanation, SubmitError> {
        let names = self.names_of(tenant, tokens)?;
        let cluster = self.cluster.read();
        let views = self.views(now, &cluster, &names);
        let cached = |view: &NodeView| CachedAt {
            node: view.node,
            name: cluster.node(view.node).map(|n| n.name.clone()).unwrap_or_default(),
            cached_blocks: view.prefix_blocks,
            usable: view.usable,
        };
        Ok(Explanation {
            prompt_tokens: tokens.len(),
            block_tokens: self.block_tokens(),
            blocks: tokens.len() / self.block_tokens(),
            nodes: views.iter().map(cached).collect(),
            decision: self.decide(cluster.config(), &views, (tokens.len(), max_new, 0), &[]),
        })
    }
}

/// What the node's load, which is from `since`, cannot show: prompt tokens sent after it, and sequences that will decode there.
fn in_flight(placements: &[Placement], node: NodeId, since: Instant) -> (u64, u32) {
    let (mut tokens, mut sequences) = (0, 0);
    for placement in placements {
        let unseen = placement.at >= since;
        if placement.prefill == node && unseen {
            tokens += placement.tokens;
        }
        sequences += match placement.decode {
            Some(decode) => u32::from(decode == node && !placement.decoding),
            None => u32::from(placement.prefill == node && unseen),
        };
    }
    (tokens, sequences)
}
