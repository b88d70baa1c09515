//! Clients and the gateway: places requests with the real router, delivers tokens in order, and makes a new ticket (prompt and
//! delivered tokens, attempt + 1) when an attempt is lost. Every delivered token is compared with the undisturbed answer.

use std::collections::{BTreeMap, BTreeSet};

use millrace_core::cluster::NodeState;
use millrace_core::identity::{Chain, block_names};
use millrace_core::ids::{AttemptId, BlockHash, Epoch, NodeId, ReplicaId, RequestId, Time, TokenId};
use millrace_core::message::{AttemptFailed, FailKind, Finish, Message, Peer, Role, Ticket, TokenOut};
use millrace_core::route::{self, Ask, CostModel, Decision, NodeView, View};
use millrace_core::sampling::{Sampling, mix};

use crate::callers::{Caller, TENANTS};
use crate::coordinator::Coordinator;
use crate::event::LinkNo;
use crate::plan::Plan;

/// Broken attempts after which a request fails.
const FAILURES_MAX: u32 = 8;
/// First and longest pause before the next try to place, microseconds.
const PAUSE_US: (u64, u64) = (10_000, 1_000_000);

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The whole answer was delivered.
    Whole,
    /// Its time was used up.
    Deadline,
    /// Too many attempts were broken.
    Attempts,
    /// The client went away.
    ClientLeft,
}

#[derive(Debug)]
struct Running {
    id: AttemptId,
    prefill: Peer,
    decode: Option<Peer>,
    first: usize,
    handed_over: bool,
}

impl Running {
    fn peers(&self) -> impl Iterator<Item = &Peer> {
        std::iter::once(&self.prefill).chain(&self.decode)
    }

    fn needs(&self) -> impl Iterator<Item = &Peer> {
        (!self.handed_over || self.decode.is_none()).then_some(&self.prefill).into_iter().chain(&self.decode)
    }

    fn suspect(&self, from: NodeId, kind: FailKind) -> Option<NodeId> {
        let other = if from == self.prefill.node { self.decode.as_ref() } else { Some(&self.prefill) };
        match kind {
            FailKind::PeerLost => Some(other.map_or(from, |peer| peer.node)),
            FailKind::Integrity => Some(self.prefill.node),
            _ => Some(from),
        }
    }
}

/// One client's request.
#[derive(Debug)]
pub struct Request {
    prompt: Vec<TokenId>,
    sampling: Sampling,
    /// The undisturbed answer.
    expected: Vec<TokenId>,
    delivered: usize,
    early: BTreeMap<u32, TokenOut>,
    running: Option<Running>,
    attempts: u16,
    failures: u32,
    avoid: BTreeSet<NodeId>,
    until: Time,
    pause_us: u64,
    /// How it ended.
    pub end: Option<End>,
}

/// What the gateway wants done.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a few live at a time")]
pub enum Act {
    /// Say this on a link.
    Send(LinkNo, Message),
    /// Place the request after so many microseconds.
    PlaceIn(u64, RequestId),
}

/// All requests.
#[derive(Debug, Default)]
pub struct Gateway {
    /// By name.
    pub requests: BTreeMap<RequestId, Request>,
    /// Attempts of which a KV stream was damaged on purpose.
    pub damaged: BTreeSet<AttemptId>,
    /// Attempts that were broken, and why.
    pub broken: BTreeMap<String, u64>,
    /// Tickets that were handed over.
    pub split: u64,
    /// What is to be done.
    pub acts: Vec<Act>,
}

impl Gateway {
    /// A client's request; it wants a place at once.
    pub fn open(&mut self, id: RequestId, prompt: Vec<TokenId>, sampling: Sampling, expected: Vec<TokenId>, until: Time) {
        let request = Request {
            prompt,
            sampling,
            expected,
            delivered: 0,
            early: BTreeMap::new(),
            running: None,
            attempts: 0,
            failures: 0,
            avoid: BTreeSet::new(),
            until,
            pause_us: PAUSE_US.0,
            end: None,
        };
        self.requests.insert(id, request);
        self.acts.push(Act::PlaceIn(0, id));
    }

    /// Whether every request has ended.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.requests.values().all(|request| request.end.is_some())
    }

    /// Finds nodes for the next attempt and sends the ticket.
    pub fn place(&mut self, now: Time, id: RequestId, coordinator: &Coordinator, plan: &Plan) {
        let Some(request) = self.requests.get_mut(&id).filter(|r| r.end.is_none() && r.running.is_none()) else { return };
        let caller = Caller::of(id);
        let Some(key) = coordinator.cluster.tenant(TENANTS[caller.tenant]).copied() else {
            return self.acts.push(Act::PlaceIn(PAUSE_US.0, id));
        };
        let tokens = request.tokens();
        let chain = Chain::new(key, &plan.model.fingerprint(), caller.salt);
        let block_tokens = usize::from(plan.model.layout.block_tokens);
        let names = block_names(&chain, &tokens[..tokens.len() / block_tokens * block_tokens], block_tokens);
        let mut avoid: Vec<_> = request.avoid.iter().copied().collect();
        if request.attempts == 0 && mix(id.0 as u64) % 1000 < plan.whole {
            avoid.extend(coordinator.cluster.nodes().filter(|n| n.role == Role::Decode).map(|n| n.node));
        }
        let ask = request.ask(id, &tokens, plan, &avoid);
        let views = views(now, coordinator, plan, &names);
        let Ok(decision) = route::place(&View { nodes: &views, costs: CostModel { handover_us: 0, ..CostModel::default() } }, &ask)
        else {
            return self.wait(id);
        };
        check_choice(now, coordinator, &decision, &avoid);
        let peer = |node| coordinator.cluster.peer(node).expect("chosen nodes are alive");
        let (prefill, decode) = (peer(decision.prefill), decision.decode.map(peer));
        let ticket = Ticket {
            attempt: AttemptId { request: id, attempt: request.attempts },
            gateway: ReplicaId(1),
            decode: decode.clone(),
            tokens,
            prompt_tokens: request.prompt.len() as u32,
            sampling: request.sampling.clone(),
            tenant_key: key,
            cache_salt: caller.salt.to_vec(),
            budget_us: request.until.since(now),
            trace: [0; 25],
        };
        request.attempts += 1;
        self.split += u64::from(decode.is_some());
        let first = request.delivered;
        let link = coordinator.link_of(prefill.node, prefill.epoch).expect("usable nodes are linked").link;
        request.running = Some(Running { id: ticket.attempt, prefill, decode, first, handed_over: false });
        self.acts.push(Act::Send(link, Message::Assign(ticket)));
    }

    /// Pauses before the next try to place, and forgets who failed.
    fn wait(&mut self, id: RequestId) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.avoid.clear();
        self.acts.push(Act::PlaceIn(request.pause_us, id));
        request.pause_us = (request.pause_us * 2).min(PAUSE_US.1);
    }

    /// A token from the node `from`.
    pub fn token(&mut self, from: NodeId, token: TokenOut, coordinator: &Coordinator) {
        let id = token.attempt.request;
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Some(running) = request.running.as_ref().filter(|r| r.id == token.attempt) else { return };
        if running.peers().all(|peer| peer.node != from) || (token.index as usize) < request.delivered {
            return;
        }
        request.early.insert(token.index, token);
        while let Some(token) = request.early.remove(&(request.delivered as u32)) {
            request.deliver(id, &token);
            if request.end.is_some() {
                return self.stop_attempt(id, coordinator, false);
            }
        }
    }

    /// A hand-over is done.
    pub fn handed_over(&mut self, attempt: AttemptId) {
        let request = self.requests.get_mut(&attempt.request);
        if let Some(running) = request.and_then(|r| r.running.as_mut()).filter(|r| r.id == attempt) {
            running.handed_over = true;
        }
    }

    /// The node `from` gave up on an attempt.
    pub fn failed(&mut self, from: NodeId, failed: AttemptFailed, coordinator: &Coordinator) {
        let AttemptFailed { attempt, kind, detail } = failed;
        let Some(request) = self.requests.get_mut(&attempt.request) else { return };
        let Some(running) = request.running.as_ref().filter(|r| r.id == attempt) else { return };
        let suspect = running.suspect(from, kind);
        assert!(kind != FailKind::BadTicket, "I3: a node does not understand a ticket of this gateway: {detail}");
        let honest = kind != FailKind::Integrity || self.damaged.contains(&attempt);
        assert!(honest, "I2: {attempt}: KV that nobody damaged is refused: {detail}");
        match kind {
            FailKind::Deadline => self.end(attempt.request, End::Deadline, coordinator),
            FailKind::NoRoom => {
                self.count("no room");
                self.stop_attempt(attempt.request, coordinator, true);
                self.wait(attempt.request);
            }
            _ => self.break_attempt(attempt.request, suspect, &format!("{kind:?}"), coordinator),
        }
    }

    /// Incarnations that attempts wait for.
    pub fn waits_for(&self) -> impl Iterator<Item = (AttemptId, NodeId, Epoch)> {
        let running = self.requests.values().filter_map(|request| request.running.as_ref());
        running.flat_map(|running| running.needs().map(|peer| (running.id, peer.node, peer.epoch)))
    }

    /// Looks for attempts whose nodes are lost.
    pub fn sweep(&mut self, now: Time, coordinator: &Coordinator) {
        let lost = |request: &Request| {
            let running = request.running.as_ref()?;
            running.needs().find(|peer| coordinator.lost(now, peer.node, peer.epoch)).map(|peer| peer.node)
        };
        let lost: Vec<_> = self.requests.iter().filter_map(|(id, request)| Some((*id, lost(request)?))).collect();
        for (id, node) in lost {
            self.break_attempt(id, Some(node), "node lost", coordinator);
        }
    }

    fn count(&mut self, why: &str) {
        *self.broken.entry(why.to_owned()).or_default() += 1;
    }

    fn break_attempt(&mut self, id: RequestId, suspect: Option<NodeId>, why: &str, coordinator: &Coordinator) {
        self.count(why);
        self.stop_attempt(id, coordinator, true);
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.avoid.extend(suspect);
        request.failures += 1;
        match request.failures >= FAILURES_MAX {
            true => self.end(id, End::Attempts, coordinator),
            false => self.acts.push(Act::PlaceIn(0, id)),
        }
    }

    /// Ends a request that has not ended.
    pub fn end(&mut self, id: RequestId, end: End, coordinator: &Coordinator) {
        if let Some(request) = self.requests.get_mut(&id).filter(|r| r.end.is_none()) {
            request.end = Some(end);
            self.stop_attempt(id, coordinator, true);
        }
    }

    fn stop_attempt(&mut self, id: RequestId, coordinator: &Coordinator, tell: bool) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.early.clear();
        let Some(running) = request.running.take().filter(|_| tell) else { return };
        for peer in running.peers() {
            let link = coordinator.link_of(peer.node, peer.epoch).map(|linked| linked.link);
            self.acts.extend(link.map(|link| Act::Send(link, Message::Cancel(running.id))));
        }
    }
}

impl Request {
    /// The prompt, for other prompts to begin like it.
    #[must_use]
    pub fn prompt(&self) -> &[TokenId] {
        &self.prompt
    }

    fn tokens(&self) -> Vec<TokenId> {
        [&self.prompt[..], &self.expected[..self.delivered]].concat()
    }

    fn ask<'a>(&self, id: RequestId, tokens: &[TokenId], plan: &Plan, exclude: &'a [NodeId]) -> Ask<'a> {
        let layout = &plan.model.layout;
        Ask {
            tokens: tokens.len() as u32,
            max_new: self.sampling.max_new - self.delivered as u32,
            block_tokens: layout.block_tokens.into(),
            block_bytes: layout.block_bytes() as u64,
            layers: layout.layers,
            seed: (id.0 as u64).wrapping_add(self.attempts.into()),
            exclude,
            slo: None,
            hot: None,
            copying: &[],
        }
    }

    fn deliver(&mut self, id: RequestId, token: &TokenOut) {
        let attempt = token.attempt;
        let expected = self.expected.get(self.delivered).copied();
        assert_eq!(Some(token.token), expected, "I2: {attempt}: token {} is not that of the undisturbed answer", token.index);
        self.delivered += 1;
        self.pause_us = PAUSE_US.0;
        if let Some(running) = &mut self.running {
            running.handed_over |= token.index as usize > running.first;
        }
        let whole = self.delivered == self.expected.len();
        assert_eq!(
            token.finish.is_some(),
            whole,
            "I4: {attempt}: {:?} after {} tokens of {}",
            token.finish,
            self.delivered,
            self.expected.len()
        );
        if let Some(finish) = token.finish {
            let stops = self.sampling.is_end(token.token);
            assert_eq!(finish == Finish::Stop, stops, "I4: request {id}: why it ends");
            self.end = Some(End::Whole);
        }
    }
}

/// A decision names nodes that may be used, and none that failed the request while others can do it.
fn check_choice(now: Time, coordinator: &Coordinator, decision: &Decision, avoid: &[NodeId]) {
    for node in std::iter::once(decision.prefill).chain(decision.decode) {
        let usable = coordinator.cluster.node(node).filter(|n| n.state == NodeState::Up);
        assert!(usable.is_some_and(|n| coordinator.usable(now, node, n.epoch)), "I3: node {node} is routed to and not usable");
        assert!(decision.exclusion_ignored || !avoid.contains(&node), "I3: node {node} failed the request and gets it again");
    }
}

/// A node that is said to hold `n` leading blocks has the `n`-th in the index and not the one after.
fn check_prefixes(coordinator: &Coordinator, names: &[BlockHash], prefixes: &[(NodeId, u32)]) {
    let holds = |at: usize, node| names.get(at).is_some_and(|name| coordinator.cluster.holders().of(name).contains(&node));
    for (node, blocks) in prefixes {
        let end = *blocks as usize;
        assert!(holds(end - 1, *node) && !holds(end, *node), "I6: node {node} does not hold {end} leading blocks of a prompt");
    }
}

/// What is known of each live node, with a view to these blocks.
fn views(now: Time, coordinator: &Coordinator, plan: &Plan, names: &[BlockHash]) -> Vec<NodeView> {
    let prefixes = coordinator.cluster.holders().prefix_lengths(names);
    check_prefixes(coordinator, names, &prefixes);
    let live = coordinator.cluster.nodes().filter(|n| n.state.alive());
    let view = |n: &millrace_core::cluster::Node| {
        let mut load = coordinator.link_of(n.node, n.epoch).map(|linked| linked.load).unwrap_or_default();
        load.queued_tokens += if n.role == Role::Decode { plan.split_bias } else { 0 };
        NodeView {
            node: n.node,
            role: n.role,
            usable: coordinator.usable(now, n.node, n.epoch),
            epoch: n.epoch,
            load,
            prefix_blocks: prefixes.iter().find(|(node, _)| *node == n.node).map_or(0, |(_, blocks)| *blocks),
            inflight_tokens: 0,
            inflight_pairs: 0,
            inflight_sequences: 0,
            correction: Default::default(),
        }
    };
    live.map(view).collect()
}
