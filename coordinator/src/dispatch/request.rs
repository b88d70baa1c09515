//! One running request as a machine: which tokens count, when an attempt is broken, when to try again and when to give up.
//!
//! It decides everything that concerns one request alone. Where the next attempt runs is `route::place`'s; the driver
//! (`run`) places, sends and waits. `handle`-style methods take the time and change the state; [`Request::poll`] is drained
//! to `None` after each; [`Request::deadline`] says when to call [`Request::on_time`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use millrace_core::ids::{AttemptId, NodeId, RequestId, TokenId};
use millrace_core::message::{AttemptFailed, FailKind, HandoverStats, Peer, PrefillStats, TokenOut};

use super::types::{ATTEMPTS_MAX, Delivered, Event, FailureKind, Prompt, Usage};

/// An attempt whose first token takes longer is broken. Generous: a long prompt may queue on a slow machine.
pub const FIRST_TOKEN_WAIT_MAX: Duration = Duration::from_secs(180);
/// An attempt whose next token takes longer is broken.
pub const NEXT_TOKEN_WAIT_MAX: Duration = Duration::from_secs(60);
/// Tokens come over two links, so a later one may overtake; a hole that stays longer is a broken attempt.
pub const GAP_WAIT_MAX: Duration = Duration::from_secs(5);
/// Tokens that may overtake a missing one.
pub const EARLY_TOKENS_MAX: usize = 256;
/// How long a request without a usable node waits for one.
pub const NODES_WAIT_MAX: Duration = Duration::from_secs(10);
/// How long a request that finds every pool full waits for room.
pub const ROOM_WAIT_MAX: Duration = Duration::from_secs(60);
/// First and longest pause before the next try to place; it doubles in between.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// What the driver has to do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Hand this to the client.
    Deliver(Event),
    /// Tell this node to stop.
    Cancel(Peer, AttemptId),
    /// Find nodes for the next attempt and call [`Request::placed`] or [`Request::unplaced`].
    Place,
}

/// An attempt that runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Running {
    /// Its name.
    pub id: AttemptId,
    /// Who has the ticket.
    pub prefill: Peer,
    /// Who decodes, when that is another node.
    pub decode: Option<Peer>,
    /// Index of its first token.
    first: u32,
    /// When it was placed.
    placed: Instant,
    /// The last moment that it got further.
    progress: Instant,
    /// The prefill node has done its part.
    handed_over: bool,
}

impl Running {
    /// The nodes that the attempt still needs.
    pub fn needs(&self) -> impl Iterator<Item = &Peer> {
        (!self.handed_over || self.decode.is_none()).then_some(&self.prefill).into_iter().chain(&self.decode)
    }

    /// Whether the prefill node has done its part, so that the sequence is where it decodes.
    pub fn handed_over(&self) -> bool {
        self.handed_over
    }

    /// When it was placed.
    pub fn placed(&self) -> Instant {
        self.placed
    }

    /// Its node of this number.
    fn peer(&self, node: NodeId) -> Option<&Peer> {
        std::iter::once(&self.prefill).chain(&self.decode).find(|peer| peer.node == node)
    }

    /// Whom to avoid after a failure that `from` reported.
    fn suspect(&self, from: NodeId, kind: FailKind) -> Option<NodeId> {
        let other = if from == self.prefill.node { self.decode.as_ref() } else { Some(&self.prefill) };
        match kind {
            FailKind::PeerLost => Some(other.map_or(from, |peer| peer.node)),
            FailKind::Integrity => Some(self.prefill.node),
            FailKind::Engine | FailKind::Stopping => Some(from),
            FailKind::NoRoom | FailKind::TooLarge | FailKind::Deadline | FailKind::BadTicket => None,
        }
    }
}

/// Waiting for a place, and since when it is vain.
#[derive(Debug)]
struct Pause {
    length: Duration,
    retry: Instant,
    no_nodes_since: Option<Instant>,
    no_room_since: Option<Instant>,
}

/// A request.
#[derive(Debug)]
pub struct Request {
    id: RequestId,
    prompt: Prompt,
    started: Instant,
    answer: Vec<TokenId>,
    early: BTreeMap<u32, TokenOut>,
    running: Option<Running>,
    pause: Pause,
    tickets: u16,
    failures: u16,
    avoid: BTreeSet<NodeId>,
    /// A node that is to be emptied and has the KV: the next attempt reads it there.
    holder: Option<NodeId>,
    /// The node that was left last in this way. One that comes back to it for want of another stays.
    left: Option<Peer>,
    usage: Usage,
    /// Another gateway began it and counted what its first attempt found cached.
    resumed: bool,
    effects: VecDeque<Effect>,
    ended: bool,
}

impl Request {
    /// A request that asks for its first place at once.
    pub fn new(now: Instant, id: RequestId, prompt: Prompt) -> Self {
        let usage = Usage { prompt_tokens: prompt.tokens.len() as u32, ..Usage::default() };
        let pause = Pause { length: PAUSE.0, retry: now, no_nodes_since: None, no_room_since: None };
        Self {
            id,
            prompt,
            started: now,
            answer: Vec::new(),
            early: BTreeMap::new(),
            running: None,
            pause,
            tickets: 0,
            failures: 0,
            avoid: BTreeSet::new(),
            holder: None,
            left: None,
            usage,
            resumed: false,
            effects: VecDeque::from([Effect::Place]),
            ended: false,
        }
    }

    /// A request that another gateway began, if anything of it is delivered. The lost attempt counts as its first.
    pub fn resumed(now: Instant, id: RequestId, prompt: Prompt, delivered: Delivered) -> Self {
        let mut request = Self::new(now, id, prompt);
        if !delivered.tokens.is_empty() {
            request.answer = delivered.tokens;
            request.usage.cached_tokens = delivered.cached_tokens;
            (request.resumed, request.tickets) = (true, 1);
        }
        request
    }

    /// Its name.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// What the client asked.
    pub fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    /// Everything known so far: the prompt and the tokens delivered.
    pub fn tokens(&self) -> Vec<TokenId> {
        [self.prompt.tokens.as_slice(), &self.answer].concat()
    }

    /// Tokens delivered.
    pub fn delivered(&self) -> u32 {
        self.answer.len() as u32
    }

    /// The name of the next ticket.
    pub fn next_attempt(&self) -> AttemptId {
        AttemptId { request: self.id, attempt: self.tickets }
    }

    /// Nodes that failed this request: to be avoided while others can do it.
    pub fn avoid(&self) -> &BTreeSet<NodeId> {
        &self.avoid
    }

    /// The node from which the next attempt takes the KV, when the last one was moved off it.
    pub fn holder(&self) -> Option<NodeId> {
        self.holder
    }

    /// The node that decodes, once it has the KV of the whole prompt.
    pub fn decoding(&self) -> Option<&Peer> {
        let running = self.running.as_ref()?;
        match &running.decode {
            Some(decode) => running.handed_over.then_some(decode),
            None => (self.delivered() > running.first).then_some(&running.prefill),
        }
    }

    /// The attempt that runs.
    pub fn running(&self) -> Option<&Running> {
        self.running.as_ref()
    }

    /// Whether the last event has been given out.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Time left of the budget.
    pub fn budget_left(&self, now: Instant) -> Duration {
        (self.started + self.prompt.budget).saturating_duration_since(now)
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When to call [`Request::on_time`].
    pub fn deadline(&self) -> Instant {
        let budget = self.started + self.prompt.budget;
        let Some(running) = &self.running else { return budget.min(self.pause.retry) };
        budget.min(running.progress + self.patience(running))
    }

    fn patience(&self, running: &Running) -> Duration {
        if !self.early.is_empty() {
            GAP_WAIT_MAX
        } else if self.delivered() == running.first {
            FIRST_TOKEN_WAIT_MAX
        } else {
            NEXT_TOKEN_WAIT_MAX
        }
    }

    /// Acts on the time.
    pub fn on_time(&mut self, now: Instant) {
        if self.ended {
            return;
        }
        if self.budget_left(now).is_zero() {
            return self.fail(FailureKind::Deadline, "the request's time is used up".into());
        }
        match &self.running {
            None if now >= self.pause.retry => self.ask_for_place(),
            Some(running) if now >= running.progress + self.patience(running) => {
                let slow = self.owes_next(running);
                self.broken(now, Some(slow), "no token in time");
            }
            _ => {}
        }
    }

    /// Whose the next token is: the first one is the prefill node's.
    fn owes_next(&self, running: &Running) -> NodeId {
        let decode = running.decode.as_ref().filter(|_| self.delivered() > running.first);
        decode.map_or(running.prefill.node, |peer| peer.node)
    }

    /// The ticket is on its way.
    pub fn placed(&mut self, now: Instant, prefill: Peer, decode: Option<Peer>) {
        let id = self.next_attempt();
        self.tickets += 1;
        self.usage.timings.attempts = self.tickets;
        self.usage.timings.decode_node = Some(decode.as_ref().unwrap_or(&prefill).name.clone());
        self.pause.no_nodes_since = None;
        self.holder = None;
        let first = self.delivered();
        self.running = Some(Running { id, prefill, decode, first, placed: now, progress: now, handed_over: false });
    }

    /// The ticket leaves.
    pub fn leaves(&mut self, now: Instant) {
        if self.delivered() == 0 {
            self.usage.timings.route_us = self.elapsed_us(now);
        }
    }

    /// There is no place now.
    pub fn unplaced(&mut self, now: Instant, full: bool, detail: String) {
        let (since, wait_max, kind) = match full {
            true => (&mut self.pause.no_room_since, ROOM_WAIT_MAX, FailureKind::NoCapacity),
            false => (&mut self.pause.no_nodes_since, NODES_WAIT_MAX, FailureKind::NoNodes),
        };
        if now.saturating_duration_since(*since.get_or_insert(now)) >= wait_max {
            return self.fail(kind, detail);
        }
        // A node that failed before may be the only one left, or may have come back.
        self.avoid.clear();
        self.holder = None;
        self.pause_before_place(now);
    }

    fn pause_before_place(&mut self, now: Instant) {
        self.pause.retry = now + self.pause.length;
        self.pause.length = (self.pause.length * 2).min(PAUSE.1);
    }

    /// A token came from `from`.
    pub fn token(&mut self, now: Instant, from: NodeId, token: TokenOut) {
        let next = self.delivered();
        let Some(running) = self.running.as_mut().filter(|r| r.id == token.attempt && r.peer(from).is_some()) else {
            return;
        };
        if token.index < next {
            return;
        }
        if self.early.is_empty() {
            running.progress = now;
        }
        self.early.insert(token.index, token);
        while let Some(token) = self.early.remove(&self.delivered()) {
            self.deliver(now, token);
            if self.ended {
                return;
            }
        }
        if self.early.len() > EARLY_TOKENS_MAX {
            let slow = self.running.as_ref().map(|running| self.owes_next(running));
            self.broken(now, slow, "a token is missing");
        }
    }

    fn deliver(&mut self, now: Instant, token: TokenOut) {
        self.answer.push(token.token);
        if let Some(running) = &mut self.running {
            running.progress = now;
            // The second token of an attempt can only come from where the KV is now.
            running.handed_over |= token.index > running.first;
        }
        if token.index == 0 {
            self.usage.timings.ttft_us = self.elapsed_us(now);
        }
        self.note_recomputed(token.prefill.as_ref());
        self.note_prefill(token.prefill);
        self.pause.no_room_since = None;
        self.pause.length = PAUSE.0;
        let TokenOut { index, token, logprob, finish, .. } = token;
        self.effects.push_back(Effect::Deliver(Event::Token { index, token, logprob }));
        if let Some(finish) = finish {
            self.usage.completion_tokens = self.delivered();
            self.usage.timings.total_us = self.elapsed_us(now);
            self.running = None;
            let usage = Box::new(std::mem::take(&mut self.usage));
            self.end(Event::Finished { finish, usage });
        }
    }

    /// What a later ticket found cached need not be computed again.
    fn note_recomputed(&mut self, stats: Option<&PrefillStats>) {
        let Some((stats, running)) = stats.zip(self.running.as_ref()) else { return };
        if running.id.attempt > 0 {
            let tokens = self.prompt.tokens.len() as u32 + running.first;
            self.usage.timings.recomputed_tokens += tokens.saturating_sub(stats.cached_tokens);
        }
    }

    fn note_prefill(&mut self, stats: Option<PrefillStats>) {
        let Some(stats) = stats else { return };
        let prefill = &mut self.usage.timings.prefill;
        if prefill.is_none() {
            // What a later attempt finds cached is this request's own work.
            if !self.resumed {
                self.usage.cached_tokens = stats.cached_tokens.min(self.usage.prompt_tokens);
            }
            *prefill = Some(stats.clone());
            self.effects.push_back(Effect::Deliver(Event::Prefilled(Box::new(stats))));
        }
    }

    /// The hand-over of an attempt is done.
    pub fn handover(&mut self, now: Instant, from: NodeId, stats: HandoverStats) {
        if let Some(running) = self.running.as_mut().filter(|r| r.id == stats.attempt && r.peer(from).is_some()) {
            running.handed_over = true;
            running.progress = now;
            self.usage.timings.handover = Some(stats);
        }
    }

    /// `from` gave up on an attempt.
    pub fn failed(&mut self, now: Instant, from: NodeId, failed: AttemptFailed) {
        let Some(running) = self.running.as_ref().filter(|r| r.id == failed.attempt && r.peer(from).is_some()) else {
            return;
        };
        let AttemptFailed { kind, detail, .. } = failed;
        match kind {
            FailKind::Deadline => self.fail(FailureKind::Deadline, detail),
            FailKind::BadTicket => self.fail(FailureKind::Rejected, detail),
            FailKind::NoRoom => {
                self.stop_attempt();
                self.unplaced(now, true, detail);
            }
            FailKind::TooLarge => self.outgrown(now, detail),
            _ => {
                let suspect = running.suspect(from, kind);
                self.broken(now, suspect, &detail);
            }
        }
    }

    /// A pool of the attempt could never hold it; whose it is the sender of a hand-over does not say. Larger ones may: when all that were
    /// asked have refused, that is the answer.
    fn outgrown(&mut self, now: Instant, detail: String) {
        let asked = self.running.iter().flat_map(|r| std::iter::once(&r.prefill).chain(&r.decode)).map(|peer| peer.node);
        let asked: Vec<NodeId> = asked.collect();
        self.failures += 1;
        if self.failures >= ATTEMPTS_MAX || asked.iter().all(|node| self.avoid.contains(node)) {
            return self.fail(FailureKind::TooLarge, detail);
        }
        self.stop_attempt();
        self.avoid.extend(asked);
        self.pause.retry = now;
        self.ask_for_place();
    }

    /// A node of the running attempt is lost, or is not the one that the ticket means any more.
    pub fn lost(&mut self, now: Instant, node: NodeId) {
        if self.running.as_ref().is_some_and(|r| r.needs().any(|peer| peer.node == node)) {
            self.broken(now, Some(node), "the node is lost");
        }
    }

    /// The node that decodes is to be emptied: stops there, and goes on elsewhere with the KV that it has. It did not fail.
    pub fn drained(&mut self, now: Instant) {
        let Some(peer) = self.decoding().cloned().filter(|peer| self.left.as_ref() != Some(peer)) else { return };
        self.stop_attempt();
        self.holder = Some(peer.node);
        self.left = Some(peer);
        self.pause.retry = now;
        self.ask_for_place();
    }

    /// The client is gone, or the replica stops: nothing more is delivered but this.
    pub fn cancel(&mut self, kind: FailureKind, detail: &str) {
        if !self.ended {
            self.fail(kind, detail.into());
        }
    }

    /// Gives the attempt up and asks for a new place, while that makes sense.
    fn broken(&mut self, now: Instant, suspect: Option<NodeId>, detail: &str) {
        self.stop_attempt();
        self.avoid.extend(suspect);
        self.failures += 1;
        if self.failures >= ATTEMPTS_MAX {
            return self.fail(FailureKind::Attempts, format!("{} attempts failed; the last: {detail}", self.failures));
        }
        self.pause.retry = now;
        self.ask_for_place();
    }

    /// Asks once: a second place would run the request twice.
    fn ask_for_place(&mut self) {
        if !self.effects.contains(&Effect::Place) {
            self.effects.push_back(Effect::Place);
        }
    }

    fn stop_attempt(&mut self) {
        self.early.clear();
        if let Some(running) = self.running.take() {
            self.effects.push_back(Effect::Cancel(running.prefill, running.id));
            self.effects.extend(running.decode.map(|peer| Effect::Cancel(peer, running.id)));
        }
    }

    fn fail(&mut self, kind: FailureKind, detail: String) {
        self.stop_attempt();
        self.end(Event::Failed { kind, detail });
    }

    fn end(&mut self, last: Event) {
        self.ended = true;
        self.effects.retain(|effect| *effect != Effect::Place);
        self.effects.push_back(Effect::Deliver(last));
    }

    fn elapsed_us(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_micros() as u64
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
