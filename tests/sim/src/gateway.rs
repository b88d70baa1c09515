//! Clients and gateways: a gateway places requests with the real router over its replica's applied state, delivers tokens in order, and makes
//! a new ticket (prompt and delivered tokens, attempt + 1) when an attempt is lost. When the gateway itself is lost, the client's front goes
//! on at another one, under another request id, after the tokens that went through. Every delivered token is compared with the
//! undisturbed answer.

use std::collections::{BTreeMap, BTreeSet};

use millrace_core::cluster::{Cluster, NodeState};
use millrace_core::identity::{Chain, block_names};
use millrace_core::ids::{AttemptId, BlockHash, Epoch, NodeId, ReplicaId, RequestId, Time, TokenId};
use millrace_core::message::{AttemptFailed, FailKind, Finish, Message, Peer, Role, Ticket, TokenOut};
use millrace_core::route::{self, Ask, CostModel, Decision, NodeView, View};
use millrace_core::sampling::{Sampling, mix};

use crate::callers::Caller;
use crate::event::{Client, Host, LinkNo};
use crate::plan::Plan;
use crate::replica::Replica;

/// Broken attempts after which a request fails.
const FAILURES_MAX: u32 = 8;
/// First and longest pause before the next try to place, microseconds.
const PAUSE_US: (u64, u64) = (10_000, 1_000_000);

/// How long the front waits before it goes to another gateway, microseconds.
const FRONT_PAUSE_US: u64 = 20_000;
/// How long the next token of an attempt may take, microseconds, as in `coordinator`: the first one, a further one, one that others have
/// overtaken.
const FIRST_WAIT_US: u64 = 180_000_000;
const NEXT_WAIT_US: u64 = 60_000_000;
const GAP_WAIT_US: u64 = 5_000_000;

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
    /// When the ticket was made, and the last moment that it got further, on the gateway's clock.
    placed: Time,
    /// See `placed`.
    progress: Time,
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
    /// Whose.
    tenant: &'static str,
    /// The gateway that runs it.
    pub home: Host,
    /// Gateways that ran it before.
    moves: u16,
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
    PlaceIn(u64, Client),
}

/// A gateway: its host, its replica and what its clock shows.
#[derive(Clone, Copy)]
pub struct Desk<'a> {
    /// Where.
    pub host: Host,
    /// Its replica.
    pub replica: &'a Replica,
    /// Its time.
    pub local: Time,
}

/// A request at one gateway, as tickets name it.
pub(crate) fn name(client: Client, moves: u16) -> RequestId {
    RequestId(u128::from(client) << 16 | u128::from(moves))
}

/// Whose request it is.
pub(crate) fn client(id: RequestId) -> Client {
    (id.0 >> 16) as Client
}

/// All requests.
#[derive(Debug, Default)]
pub struct Gateway {
    /// By number.
    pub requests: BTreeMap<Client, Request>,
    /// Those that have not ended.
    pub live: BTreeSet<Client>,
    /// Attempts of which a KV stream was damaged on purpose.
    pub damaged: BTreeSet<AttemptId>,
    /// Attempts that were broken, and why.
    pub broken: BTreeMap<String, u64>,
    /// Tickets that were handed over.
    pub split: u64,
    /// Requests that went on at another gateway.
    pub moved: u64,
    /// Which tenant a name belongs to: no two may share one.
    owners: BTreeMap<BlockHash, &'static str>,
    /// What is to be done.
    pub acts: Vec<Act>,
}

impl Gateway {
    /// A client's request at a gateway; it wants a place at once.
    pub fn open(
        &mut self,
        (tenant, home): (&'static str, Host),
        prompt: Vec<TokenId>,
        sampling: Sampling,
        expected: Vec<TokenId>,
        until: Time,
    ) {
        let id = self.requests.len() as Client + 1;
        let request = Request {
            tenant,
            home,
            moves: 0,
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
        self.live.insert(id);
        self.acts.push(Act::PlaceIn(0, id));
    }

    /// The gateways on a host are gone: the fronts go on at others. `pick` names one for each.
    pub fn move_from(&mut self, host: Host, mut pick: impl FnMut() -> Host) {
        for (id, request) in self.requests.iter_mut().filter(|(_, r)| r.home == host && r.end.is_none()) {
            request.home = pick();
            request.moves += 1;
            (request.attempts, request.failures, request.pause_us) = (0, 0, PAUSE_US.0);
            request.running = None;
            request.early.clear();
            request.avoid.clear();
            self.moved += 1;
            self.acts.push(Act::PlaceIn(FRONT_PAUSE_US, *id));
        }
    }

    /// The gateway of a request is not there: the front tries another one in a while.
    pub fn seek(&mut self, id: Client, home: Host, after_us: u64) {
        if let Some(request) = self.requests.get_mut(&id).filter(|r| r.end.is_none()) {
            request.home = home;
            request.moves += 1;
            request.attempts = 0;
            self.acts.push(Act::PlaceIn(after_us, id));
        }
    }

    /// Finds nodes for the next attempt and sends the ticket.
    ///
    /// # Panics
    /// When two tenants share a name.
    pub fn place(&mut self, now: Time, id: Client, desk: Desk<'_>, plan: &Plan) {
        let Some(request) = self.requests.get_mut(&id).filter(|r| r.end.is_none() && r.running.is_none()) else { return };
        let cluster = desk.replica.cluster();
        let Some(key) = cluster.tenant(request.tenant).copied() else { return self.acts.push(Act::PlaceIn(PAUSE_US.0, id)) };
        let tokens = request.tokens();
        let salt = Caller::of_client(id).salt;
        let chain = Chain::new(key, &plan.model.fingerprint(), salt);
        let block_tokens = usize::from(plan.model.layout.block_tokens);
        let names = block_names(&chain, &tokens[..tokens.len() / block_tokens * block_tokens], block_tokens);
        for block in &names {
            let owner = *self.owners.entry(*block).or_insert(request.tenant);
            assert_eq!(owner, request.tenant, "I8: two tenants share the block {block}");
        }
        let mut avoid: Vec<_> = request.avoid.iter().copied().collect();
        if request.attempts == 0 && mix(id) % 1000 < plan.whole {
            avoid.extend(cluster.nodes().filter(|n| n.role == Role::Decode).map(|n| n.node));
        }
        let ask = request.ask(id, &tokens, plan, &avoid);
        drop(cluster);
        let views = views(desk, plan, &names);
        let Ok(decision) = route::place(&View { nodes: &views, costs: CostModel { handover_us: 0, ..CostModel::default() } }, &ask)
        else {
            return self.wait(id);
        };
        check_choice(desk, &decision, &avoid);
        let cluster = desk.replica.cluster();
        let peer = |node| cluster.peer(node).expect("chosen nodes are alive");
        let (prefill, decode) = (peer(decision.prefill), decision.decode.map(peer));
        let ticket = Ticket {
            attempt: AttemptId { request: name(id, request.moves), attempt: request.attempts },
            gateway: ReplicaId(desk.host as u64 + 1),
            decode: decode.clone(),
            tokens,
            prompt_tokens: request.prompt.len() as u32,
            sampling: request.sampling.clone(),
            tenant_key: key,
            cache_salt: salt.to_vec(),
            budget_us: request.until.since(now),
            trace: [0; 25],
        };
        request.attempts += 1;
        self.split += u64::from(decode.is_some());
        let first = request.delivered;
        let (link, _) = desk.replica.link_of(prefill.node, prefill.epoch).expect("usable nodes are linked");
        let placed = desk.local;
        request.running =
            Some(Running { id: ticket.attempt, prefill, decode, first, placed, progress: placed, handed_over: false });
        self.acts.push(Act::Send(link, Message::Assign(ticket)));
    }

    /// Pauses before the next try to place, and forgets who failed.
    fn wait(&mut self, id: Client) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.avoid.clear();
        self.acts.push(Act::PlaceIn(request.pause_us, id));
        request.pause_us = (request.pause_us * 2).min(PAUSE_US.1);
    }

    /// A token from the node `from`.
    pub fn token(&mut self, from: NodeId, token: TokenOut, desk: Desk<'_>) {
        let id = client(token.attempt.request);
        let Some(request) = self.requests.get_mut(&id).filter(|r| r.home == desk.host) else { return };
        let Some(running) = request.running.as_ref().filter(|r| r.id == token.attempt) else { return };
        if running.peers().all(|peer| peer.node != from) || (token.index as usize) < request.delivered {
            return;
        }
        request.early.insert(token.index, token);
        while let Some(token) = request.early.remove(&(request.delivered as u32)) {
            request.deliver(id, desk.local, &token);
            if request.end.is_some() {
                self.live.remove(&id);
                return self.stop_attempt(id, None);
            }
        }
    }

    /// A hand-over is done.
    pub fn handed_over(&mut self, attempt: AttemptId) {
        let request = self.requests.get_mut(&client(attempt.request));
        if let Some(running) = request.and_then(|r| r.running.as_mut()).filter(|r| r.id == attempt) {
            running.handed_over = true;
        }
    }

    /// The node `from` gave up on an attempt.
    pub fn failed(&mut self, from: NodeId, failed: AttemptFailed, desk: Desk<'_>) {
        let AttemptFailed { attempt, kind, detail } = failed;
        let id = client(attempt.request);
        let Some(request) = self.requests.get_mut(&id).filter(|r| r.home == desk.host) else { return };
        let Some(running) = request.running.as_ref().filter(|r| r.id == attempt) else { return };
        let suspect = running.suspect(from, kind);
        assert!(kind != FailKind::BadTicket, "I3: a node does not understand a ticket of this gateway: {detail}");
        let honest = kind != FailKind::Integrity || self.damaged.contains(&attempt);
        assert!(honest, "I2: {attempt}: KV that nobody damaged is refused: {detail}");
        match kind {
            FailKind::Deadline => self.end(id, End::Deadline, Some(desk)),
            FailKind::NoRoom => {
                self.count("no room");
                self.stop_attempt(id, Some(desk));
                self.wait(id);
            }
            _ => self.break_attempt(id, suspect, &format!("{kind:?}"), desk),
        }
    }

    /// Who computes the prompt of an attempt that runs.
    #[must_use]
    pub fn prefill_of(&self, attempt: AttemptId) -> Option<NodeId> {
        let running = self.requests.get(&client(attempt.request))?.running.as_ref()?;
        (running.id == attempt).then_some(running.prefill.node)
    }

    /// Incarnations that attempts wait for.
    pub fn waits_for(&self) -> impl Iterator<Item = (AttemptId, NodeId, Epoch)> {
        let running = self.live.iter().filter_map(|id| self.requests[id].running.as_ref());
        running.flat_map(|running| running.needs().map(|peer| (running.id, peer.node, peer.epoch)))
    }

    /// Looks for attempts of this gateway whose nodes are lost, or too slow.
    pub fn sweep(&mut self, desk: Desk<'_>) {
        let lost = |request: &Request| {
            let running = request.running.as_ref().filter(|_| request.home == desk.host)?;
            let lost = running.needs().find(|peer| desk.replica.lost(desk.local, (peer.node, peer.epoch), running.placed));
            lost.map(|peer| (peer.node, "node lost")).or_else(|| Some((request.slow(running, desk.local)?, "no token in time")))
        };
        let lost: Vec<_> = self.live.iter().filter_map(|id| Some((*id, lost(&self.requests[id])?))).collect();
        for (id, (node, why)) in lost {
            self.break_attempt(id, Some(node), why, desk);
        }
    }

    fn count(&mut self, why: &str) {
        *self.broken.entry(why.to_owned()).or_default() += 1;
    }

    fn break_attempt(&mut self, id: Client, suspect: Option<NodeId>, why: &str, desk: Desk<'_>) {
        self.count(why);
        self.stop_attempt(id, Some(desk));
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.avoid.extend(suspect);
        request.failures += 1;
        match request.failures >= FAILURES_MAX {
            true => self.end(id, End::Attempts, Some(desk)),
            false => self.acts.push(Act::PlaceIn(0, id)),
        }
    }

    /// Ends a request that has not ended; its gateway, if there is one, tells the nodes.
    pub fn end(&mut self, id: Client, end: End, desk: Option<Desk<'_>>) {
        if let Some(request) = self.requests.get_mut(&id).filter(|r| r.end.is_none()) {
            request.end = Some(end);
            self.live.remove(&id);
            self.stop_attempt(id, desk);
        }
    }

    fn stop_attempt(&mut self, id: Client, tell: Option<Desk<'_>>) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.early.clear();
        let (Some(running), Some(desk)) = (request.running.take(), tell) else { return };
        for peer in running.peers() {
            let link = desk.replica.link_of(peer.node, peer.epoch).map(|(link, _)| link);
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

    fn ask<'a>(&self, id: Client, tokens: &[TokenId], plan: &Plan, exclude: &'a [NodeId]) -> Ask<'a> {
        let layout = &plan.model.layout;
        Ask {
            tokens: tokens.len() as u32,
            max_new: self.sampling.max_new - self.delivered as u32,
            block_tokens: layout.block_tokens.into(),
            block_bytes: layout.block_bytes() as u64,
            layers: layout.layers,
            seed: id.wrapping_mul(31).wrapping_add(self.attempts.into()),
            exclude,
            slo: None,
            hot: None,
            copying: &[],
        }
    }

    /// Who owes the next token of an attempt, if it takes too long.
    fn slow(&self, running: &Running, now: Time) -> Option<NodeId> {
        let first = self.delivered == running.first;
        let wait_us = match first {
            _ if !self.early.is_empty() => GAP_WAIT_US,
            true => FIRST_WAIT_US,
            false => NEXT_WAIT_US,
        };
        let owes = running.decode.as_ref().filter(|_| !first).unwrap_or(&running.prefill);
        (now.since(running.progress) >= wait_us).then_some(owes.node)
    }

    fn deliver(&mut self, id: Client, now: Time, token: &TokenOut) {
        let attempt = token.attempt;
        let expected = self.expected.get(self.delivered).copied();
        assert_eq!(Some(token.token), expected, "I2: {attempt}: token {} is not that of the undisturbed answer", token.index);
        self.delivered += 1;
        self.pause_us = PAUSE_US.0;
        if let Some(running) = &mut self.running {
            running.handed_over |= token.index as usize > running.first;
            running.progress = now;
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
fn check_choice(desk: Desk<'_>, decision: &Decision, avoid: &[NodeId]) {
    for node in std::iter::once(decision.prefill).chain(decision.decode) {
        let up = desk.replica.cluster().node(node).filter(|n| n.state == NodeState::Up).map(|n| n.epoch);
        let usable = up.is_some_and(|epoch| desk.replica.usable(desk.local, node, epoch));
        assert!(usable, "I3: node {node} is routed to and not usable");
        assert!(decision.exclusion_ignored || !avoid.contains(&node), "I3: node {node} failed the request and gets it again");
    }
}

/// A node that is said to hold `n` leading blocks has the `n`-th in the index and not the one after.
fn check_prefixes(cluster: &Cluster, names: &[BlockHash], prefixes: &[(NodeId, u32)]) {
    let holds = |at: usize, node| names.get(at).is_some_and(|name| cluster.holders().of(name).contains(&node));
    for (node, blocks) in prefixes {
        let end = *blocks as usize;
        assert!(holds(end - 1, *node) && !holds(end, *node), "I6: node {node} does not hold {end} leading blocks of a prompt");
    }
}

/// What is known of each live node, with a view to these blocks.
fn views(desk: Desk<'_>, plan: &Plan, names: &[BlockHash]) -> Vec<NodeView> {
    let replica = desk.replica;
    let (prefixes, live): (_, Vec<_>) = {
        let cluster = replica.cluster();
        let prefixes = cluster.holders().prefix_lengths(names);
        check_prefixes(&cluster, names, &prefixes);
        (prefixes, cluster.nodes().filter(|n| n.state.alive()).cloned().collect())
    };
    let view = |n: &millrace_core::cluster::Node| {
        let mut load = replica.link_of(n.node, n.epoch).map(|(_, linked)| linked.load).unwrap_or_default();
        load.queued_tokens += if n.role == Role::Decode { plan.split_bias } else { 0 };
        NodeView {
            node: n.node,
            role: n.role,
            usable: replica.usable(desk.local, n.node, n.epoch),
            epoch: n.epoch,
            load,
            prefix_blocks: prefixes.iter().find(|(node, _)| *node == n.node).map_or(0, |(_, blocks)| *blocks),
            inflight_tokens: 0,
            inflight_pairs: 0,
            inflight_sequences: 0,
            correction: Default::default(),
        }
    };
    live.iter().map(view).collect()
}
