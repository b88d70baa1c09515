//! Continuous batching, one machine for prefill and decode nodes: which sequences compute what in the next step, and who gets room.
//!
//! One rule makes all steps: *computed tokens chase known tokens*. A prompt chunk, a prefix hit, a decoded token and the recomputation
//! after a preemption differ only in how far the two are apart. Who is to end first comes first, in the queue and for room; a growing
//! sequence may push out only the one with most time left. The machine holds block tables, never KV bytes; it does not compute, send or wait.
//! Ideas: vLLM v1's scheduler (one token budget, no phases), Sarathi-Serve (chunks beside decodes, OSDI '24).

mod schedule;
mod sequence;
mod speed;
mod upkeep;

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use hashbrown::HashMap;

use crate::engine::{EngineError, Sampled};
use crate::identity::Fingerprint;
use crate::ids::{AttemptId, BlockHash, Slot, SlotRef, Time, TokenId};
use crate::message::{AttemptFailed, BlockOp, FailKind, Finish, Load, Ticket, TokenOut};
use crate::planted::{Bug, planted};
use crate::pool::{Pool, PoolStats};
use crate::route::pairs;
use sequence::{Phase, Sequence};
use speed::Speed;

/// Who is to be received and found no room for so long is refused: there may be some elsewhere by now.
pub const ROOM_WAIT_MAX_US: u64 = 1_000_000;

/// Bounds of one node's batch.
#[derive(Clone, Debug)]
pub struct BatchConfig {
    /// Tokens of one block.
    pub block_tokens: u16,
    /// Blocks that the pool can hold.
    pub slots: u32,
    /// Tokens of one step. Decoding sequences are served first; prompts share the rest, at least one block in each step.
    pub step_tokens_max: u32,
    /// How long a step may take in which nothing decodes, microseconds: its first prompt may have as many tokens beyond `step_tokens_max`
    /// as were lately computed in so long, 2,048 at most.
    pub prompt_step_us: u64,
    /// Sequences of one step, and so sequences that compute or are being received at a time.
    pub rows_max: u32,
    /// Tokens of one sequence, prompt and answer. A pool of fewer tokens bounds it too.
    pub context_max: u32,
    /// Blocks kept free for the growth of each admitted decoding sequence.
    pub headroom_blocks: u32,
    /// Sequences that may wait; preempted ones wait beyond it.
    pub waiting_max: u32,
    /// Root of the blocks' names.
    pub fingerprint: Fingerprint,
}

/// What can happen to a batch.
#[derive(Debug)]
pub enum Input {
    /// Compute the prompt here; then decode here, or, if the ticket names a decode node, hold the blocks after the first token until [`Input::Release`].
    Add(Ticket),
    /// The prompt's KV will arrive from elsewhere: reserve every slot of it, and headroom, in one step. It waits for that room in its rank, for
    /// [`ROOM_WAIT_MAX_US`] at most: meanwhile its sender keeps its slots.
    Reserve(Ticket),
    /// All KV of a reserved sequence is in and verified.
    Arrived {
        /// Which attempt.
        attempt: AttemptId,
        /// The answer's next token, already delivered by the node that computed the prompt.
        first_token: TokenId,
        /// Whether the answer ended with it: keep the blocks, decode nothing.
        finished: bool,
    },
    /// The answer to the step in flight, one token for each row that asked, in row order.
    Stepped(Result<Vec<Sampled>, EngineError>),
    /// The sender is through with the blocks of a held sequence. No effect on any other (an abandoned one is cancelled).
    Release(AttemptId),
    /// Forget it. Slots that the step in flight uses are freed after the step.
    Cancel(AttemptId),
    /// Time has passed: see [`Batch::deadline`].
    Tick,
}

/// What a batch wants done or known.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// A prompt whose answer is decoded elsewhere has its slots; its cached blocks may be sent at once. Said once an attempt.
    Admitted {
        /// Which attempt.
        attempt: AttemptId,
        /// Slot of each block of the ticket's tokens.
        table: Vec<SlotRef>,
        /// Name of each, the unfinished last one's included.
        names: Vec<BlockHash>,
        /// Leading blocks whose KV is in place.
        cached_blocks: u32,
    },
    /// A sequence to be received has its slots.
    Reserved {
        /// Which attempt.
        attempt: AttemptId,
        /// Slot of each block of the ticket's tokens (the headroom is not shown).
        table: Vec<SlotRef>,
        /// Name of each, the unfinished last one's included.
        names: Vec<BlockHash>,
        /// Leading blocks whose KV is in place: not to be sent, not to be written.
        have_blocks: u32,
    },
    /// An [`Input::Add`] or [`Input::Reserve`] that is not taken; nothing is kept of it.
    Refused {
        /// Which attempt.
        attempt: AttemptId,
        /// Why.
        kind: FailKind,
        /// For the log.
        detail: String,
    },
    /// A token of an answer. The node's name in its prefill statistics is left empty.
    Token(TokenOut),
    /// A sequence ended without its last token. One whose decode node is elsewhere keeps its slots, which a sender may be reading,
    /// until [`Input::Release`] or [`Input::Cancel`].
    Failed(AttemptFailed),
    /// A change of what the pool caches.
    Block(BlockOp),
}

/// How many sequences are where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchStats {
    /// Not admitted yet, or preempted.
    pub waiting: u32,
    /// Computing.
    pub running: u32,
    /// Reserved, KV not all in.
    pub receiving: u32,
    /// Computed, being sent.
    pub held: u32,
    /// Preemptions since the start.
    pub preemptions: u64,
}

/// Whose turn it is: its deadline, then its arrival. With equal budgets that is first come, first served, and a request that lost its node
/// keeps its place. Nobody starves: what comes later has, in the end, the later deadline.
type Rank = (Time, u64);

/// One row of the step in flight.
#[derive(Clone, Copy, Debug)]
struct Flight {
    rank: Rank,
    attempt: AttemptId,
    end: u32,
    sample: bool,
}

/// All sequences of one node and its pool.
#[derive(Debug)]
pub struct Batch {
    config: BatchConfig,
    pool: Pool,
    sequences: BTreeMap<Rank, Sequence>,
    ranks: HashMap<AttemptId, Rank>,
    waiting: BTreeSet<Rank>,
    running: BTreeSet<Rank>,
    receiving: u32,
    /// Of all that a deadline can still end.
    deadlines: BTreeSet<Rank>,
    /// When those that wait to be received are refused.
    patience: BTreeSet<(Time, Rank)>,
    flight: Option<Vec<Flight>>,
    speed: Speed,
    arrivals: u64,
    /// The head of the queue, when it was found not to fit and no room has been made since.
    blocked: Option<Rank>,
    outputs: VecDeque<Output>,
    preemptions: u64,
}

impl Batch {
    /// An empty batch over an empty pool. Every bound of `config` but the headroom and `waiting_max` must be at least 1.
    #[must_use]
    pub fn new(mut config: BatchConfig) -> Self {
        assert!(config.block_tokens > 0 && config.slots > 0 && config.context_max > 0, "{config:?}");
        assert!(config.step_tokens_max > 0 && config.rows_max > 0, "{config:?}");
        // A sequence that could outgrow the whole pool would be preempted for ever: the pool bounds the context.
        config.context_max = config.context_max.min(config.slots.saturating_mul(config.block_tokens.into()));
        Self {
            pool: Pool::new(config.slots),
            config,
            sequences: BTreeMap::new(),
            ranks: HashMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            receiving: 0,
            deadlines: BTreeSet::new(),
            patience: BTreeSet::new(),
            flight: None,
            speed: Speed::default(),
            arrivals: 0,
            blocked: None,
            outputs: VecDeque::new(),
            preemptions: 0,
        }
    }

    /// Takes one input. What names an unknown attempt, or one that is past it, has no effect: messages may come late or twice.
    pub fn handle(&mut self, now: Time, input: Input) {
        match input {
            Input::Add(ticket) => self.take(now, ticket, false),
            Input::Reserve(ticket) => self.take(now, ticket, true),
            Input::Arrived { attempt, first_token, finished } => self.arrived(attempt, first_token, finished),
            Input::Stepped(result) => self.stepped(now, result),
            Input::Release(attempt) => {
                let of = |phase| self.in_phase(attempt, phase);
                if let Some(rank) = of(Phase::Held).or_else(|| of(Phase::Retired)) {
                    self.end(rank);
                }
            }
            Input::Cancel(attempt) => {
                let ignored = planted(Bug::CancelIgnored) && self.flight.is_some();
                if let Some(&rank) = self.ranks.get(&attempt).filter(|_| !ignored) {
                    self.end(rank);
                }
            }
            Input::Tick => self.expire(now),
        }
        self.admit();
    }

    /// The next output; to be drained after each [`Self::handle`] and [`Self::next_step`].
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front().or_else(|| self.pool.poll().map(Output::Block))
    }

    /// When the next [`Input::Tick`] is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        let ends = self.deadlines.first().map(|&(time, _)| time);
        ends.into_iter().chain(self.patience.first().map(|&(time, _)| time)).min()
    }

    /// Whether anything is kept for an attempt.
    #[must_use]
    pub fn knows(&self, attempt: AttemptId) -> bool {
        self.ranks.contains_key(&attempt)
    }

    /// Whether a sequence that is computed here and decoded elsewhere has its slots.
    #[must_use]
    pub fn keeps(&self, attempt: AttemptId) -> bool {
        let sequence = self.ranks.get(&attempt).map(|rank| &self.sequences[rank]);
        sequence.is_some_and(|s| s.split && matches!(s.phase, Phase::Running | Phase::Held | Phase::Retired))
    }

    /// Whether no sequence is known and no step is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.flight.is_none()
    }

    /// How full the pool is.
    #[must_use]
    pub fn pool_stats(&self) -> PoolStats {
        self.pool.stats()
    }

    /// How many sequences are where. O(sequences).
    #[must_use]
    pub fn stats(&self) -> BatchStats {
        BatchStats {
            waiting: self.waiting.len() as u32,
            running: self.running.len() as u32,
            receiving: self.receiving,
            held: self.sequences.values().filter(|s| matches!(s.phase, Phase::Held | Phase::Retired)).count() as u32,
            preemptions: self.preemptions,
        }
    }

    /// The load that the batch knows of; measured speeds are 0. `running` counts sequences that are being received too: they have their place.
    #[must_use]
    pub fn load(&self) -> Load {
        let pool = self.pool.stats();
        let behind = |rank: &Rank| self.sequences[rank].pending();
        let decoding = self.running.iter().filter(|s| behind(s) == 1).count() as u32;
        let (mut queued_tokens, mut queued_pairs) = (0, 0u64);
        let known = self.waiting.iter().chain(&self.running).map(|s| &self.sequences[s]);
        for sequence in known.filter(|s| s.pending() > 1 && !s.receives) {
            queued_tokens += sequence.pending() as u64;
            queued_pairs = queued_pairs.saturating_add(pairs(sequence.computed as u64, sequence.tokens.len() as u64));
        }
        Load {
            queued_tokens,
            queued_pairs,
            running: decoding + self.receiving,
            waiting: self.waiting.len() as u32,
            free_blocks: pool.free,
            evictable_blocks: pool.evictable,
            pinned_blocks: pool.pinned,
            total_blocks: pool.total,
            preemptions: self.preemptions,
            ..Load::default()
        }
    }

    /// All cached blocks, for a snapshot: equals the sum of all [`Output::Block`] once they are drained.
    pub fn cached_names(&self) -> impl Iterator<Item = BlockHash> + '_ {
        self.pool.cached_names()
    }

    /// Why a ticket can never be taken here.
    fn judge(&self, ticket: &Ticket) -> Result<(), (FailKind, String)> {
        let (tokens, bad) = (ticket.tokens.len(), |detail: String| Err((FailKind::BadTicket, detail)));
        if self.knows(ticket.attempt) {
            return bad("the attempt is known already".to_string());
        }
        if tokens == 0 {
            return bad("no tokens".to_string());
        }
        if tokens > self.config.context_max as usize {
            let detail = format!("{tokens} tokens, the context holds {} here", self.config.context_max);
            return Err((FailKind::TooLarge, detail));
        }
        if ticket.prompt_tokens as usize > tokens {
            return bad(format!("{} prompt tokens of {tokens}", ticket.prompt_tokens));
        }
        if ticket.delivered() >= ticket.sampling.max_new {
            return bad(format!("{} tokens delivered of {}", ticket.delivered(), ticket.sampling.max_new));
        }
        Ok(())
    }

    fn refuse(&mut self, attempt: AttemptId, kind: FailKind, detail: String) {
        self.outputs.push_back(Output::Refused { attempt, kind, detail });
    }

    fn take(&mut self, now: Time, ticket: Ticket, receives: bool) {
        let attempt = ticket.attempt;
        if let Err((kind, detail)) = self.judge(&ticket) {
            return self.refuse(attempt, kind, detail);
        }
        let rank = self.insert(Sequence::new(now, ticket, &self.config, receives));
        self.admit();
        if self.waiting.contains(&rank) && self.waiting.len() > self.config.waiting_max as usize {
            self.free(rank);
            self.refuse(attempt, FailKind::NoRoom, format!("{} sequences wait already", self.config.waiting_max));
        }
    }

    fn crowd(&self) -> String {
        format!("{} waiting, {} running, {} receiving", self.waiting.len(), self.running.len(), self.receiving)
    }

    fn insert(&mut self, sequence: Sequence) -> Rank {
        let rank = (sequence.deadline, self.arrivals);
        self.arrivals += 1;
        self.ranks.insert(sequence.attempt, rank);
        if !planted(Bug::DeadlineForgotten) {
            self.deadlines.insert(rank);
        }
        let phase = sequence.phase;
        self.sequences.insert(rank, sequence);
        self.count_phase(rank, phase, true);
        rank
    }

    fn in_phase(&self, attempt: AttemptId, phase: Phase) -> Option<Rank> {
        self.ranks.get(&attempt).copied().filter(|rank| self.sequences[rank].phase == phase)
    }

    fn sequence(&mut self, rank: Rank) -> &mut Sequence {
        self.sequences.get_mut(&rank).expect("ranks in sets name sequences")
    }

    /// Keeps the sets that mirror [`Sequence::phase`].
    fn count_phase(&mut self, rank: Rank, phase: Phase, enters: bool) {
        let sequence = &self.sequences[&rank];
        if phase == Phase::Waiting && sequence.receives {
            let until = (sequence.arrived.after(ROOM_WAIT_MAX_US), rank);
            if enters {
                self.patience.insert(until)
            } else {
                self.patience.remove(&until)
            };
        }
        let set = match phase {
            Phase::Waiting => &mut self.waiting,
            Phase::Running => &mut self.running,
            Phase::Receiving if enters => return self.receiving += 1,
            Phase::Receiving => return self.receiving -= 1,
            Phase::Held | Phase::Retired | Phase::Doomed => return,
        };
        if enters {
            set.insert(rank);
        } else {
            set.remove(&rank);
        }
    }

    fn set_phase(&mut self, rank: Rank, phase: Phase) {
        let old = core::mem::replace(&mut self.sequence(rank).phase, phase);
        self.count_phase(rank, old, false);
        self.count_phase(rank, phase, true);
        self.blocked = None;
    }

    /// Gives back all slots of a sequence; full published blocks stay cached.
    fn release_table(&mut self, rank: Rank) {
        for at in core::mem::take(&mut self.sequence(rank).table).into_iter().rev() {
            self.pool.release(at);
            if planted(Bug::FreeTwice) {
                self.pool.release(at);
            }
        }
        self.blocked = None;
    }

    /// Forgets a sequence that no step uses.
    fn free(&mut self, rank: Rank) {
        if !planted(Bug::FreeForgotten) {
            self.release_table(rank);
        }
        let phase = self.sequence(rank).phase;
        self.count_phase(rank, phase, false);
        let sequence = self.sequences.remove(&rank).expect("it was just there");
        self.ranks.remove(&sequence.attempt);
        self.deadlines.remove(&rank);
    }

    /// Forgets a sequence, now or, when the step in flight uses its slots, after it.
    fn end(&mut self, rank: Rank) {
        let computes = self.flight.as_ref().is_some_and(|rows| rows.iter().any(|row| row.rank == rank));
        if computes && !planted(Bug::CancelInFlight) {
            self.set_phase(rank, Phase::Doomed);
            self.deadlines.remove(&rank);
        } else {
            self.free(rank);
        }
    }

    /// Ends a sequence for a reason of ours. One that waits to be received was not taken yet.
    fn fail(&mut self, rank: Rank, kind: FailKind, detail: String) {
        let sequence = self.sequence(rank);
        let (attempt, asks) = (sequence.attempt, sequence.receives && sequence.phase == Phase::Waiting);
        if asks {
            self.free(rank);
            if !planted(Bug::RefusalUnsaid) {
                self.refuse(attempt, kind, detail);
            }
            return;
        }
        self.outputs.push_back(Output::Failed(AttemptFailed { attempt, kind, detail }));
        self.retire(rank);
    }

    /// Forgets a sequence. One whose slots a sender may be reading keeps them, idle, until the shell says
    /// `Release` or `Cancel`: given out earlier, they would be read under names that are no longer theirs.
    fn retire(&mut self, rank: Rank) {
        let sequence = self.sequence(rank);
        if sequence.split && matches!(sequence.phase, Phase::Running | Phase::Held) && !planted(Bug::FreeEarly) {
            self.deadlines.remove(&rank);
            self.set_phase(rank, Phase::Retired);
        } else {
            self.end(rank);
        }
    }

    fn expire(&mut self, now: Time) {
        while let Some(&(_, rank)) = self.patience.first().filter(|(until, _)| *until <= now) {
            let detail = format!("no room within {ROOM_WAIT_MAX_US} us: {}", self.crowd());
            self.fail(rank, FailKind::NoRoom, detail);
        }
        while let Some(&rank) = self.deadlines.first().filter(|(deadline, _)| *deadline <= now) {
            if self.sequence(rank).finished {
                // Its answer is complete; only the hand-over of its blocks ran out of time.
                self.retire(rank);
            } else {
                let phase = self.sequence(rank).phase;
                self.fail(rank, FailKind::Deadline, format!("{} us past the deadline, {phase:?}", now.since(rank.0)));
            }
        }
    }

    fn arrived(&mut self, attempt: AttemptId, first_token: TokenId, finished: bool) {
        let Some(rank) = self.in_phase(attempt, Phase::Receiving) else { return };
        let context_max = self.config.context_max;
        let sequence = self.sequence(rank);
        sequence.computed = sequence.tokens.len();
        sequence.receives = false;
        self.publish(rank);
        if finished {
            return self.free(rank);
        }
        let sequence = self.sequence(rank);
        sequence.push(first_token);
        if let Some(finish) = sequence.finish(context_max) {
            // Going on would deliver past the end; ending in silence would leave the gateway waiting.
            return self.fail(rank, FailKind::BadTicket, format!("handed over as unfinished, but at its end here: {finish:?}"));
        }
        self.set_phase(rank, Phase::Running);
    }

    fn stepped(&mut self, now: Time, result: Result<Vec<Sampled>, EngineError>) {
        let Some(rows) = self.flight.take() else { return };
        let asked = rows.iter().filter(|row| row.sample).map(|row| row.attempt);
        let result = result.map_err(|e| e.to_string()).and_then(|sampled| {
            let right = asked.eq(sampled.iter().map(|s| s.attempt));
            right.then_some(sampled).ok_or_else(|| "engine: answered for other rows than asked".to_string())
        });
        match result {
            Ok(sampled) => self.advance(now, &rows, &sampled),
            Err(detail) => {
                for row in rows {
                    match self.sequence(row.rank).phase {
                        Phase::Doomed => self.free(row.rank),
                        Phase::Retired => {}
                        _ => self.fail(row.rank, FailKind::Engine, detail.clone()),
                    }
                }
            }
        }
    }

    fn advance(&mut self, now: Time, rows: &[Flight], sampled: &[Sampled]) {
        self.speed.end(now);
        let mut sampled = sampled.iter();
        for row in rows {
            let drawn = if row.sample { sampled.next() } else { None };
            match self.sequence(row.rank).phase {
                Phase::Doomed => {
                    self.free(row.rank);
                    continue;
                }
                // Retired while the step ran: what it computed belongs to nobody.
                Phase::Retired => continue,
                _ => {}
            }
            self.sequence(row.rank).computed = row.end as usize;
            self.publish(row.rank);
            if let Some(drawn) = drawn {
                self.deliver(now, row.rank, drawn);
            }
        }
    }

    fn deliver(&mut self, now: Time, rank: Rank, drawn: &Sampled) {
        let context_max = self.config.context_max;
        let sequence = self.sequence(rank);
        let index = sequence.answered();
        sequence.push(drawn.token);
        let finish: Option<Finish> = sequence.finish(context_max);
        sequence.finished = finish.is_some();
        let (attempt, split, prefill) = (sequence.attempt, sequence.split, sequence.take_prefill_stats(now));
        let token = TokenOut { attempt, index, token: drawn.token, logprob: drawn.logprob, prefill, finish };
        if planted(Bug::IndexTwice) {
            self.outputs.push_back(Output::Token(token.clone()));
        }
        self.outputs.push_back(Output::Token(token));
        if split {
            self.set_phase(rank, Phase::Held);
        } else if finish.is_some() {
            self.free(rank);
        }
    }

    /// Makes newly completed full blocks of a sequence findable.
    fn publish(&mut self, rank: Rank) {
        let block_tokens = usize::from(self.config.block_tokens);
        let sequence = self.sequences.get_mut(&rank).expect("ranks in sets name sequences");
        sequence.publish(&mut self.pool, block_tokens);
    }

    /// Asserts every invariant of the batch and its pool. O(sequences + slots), for tests and the simulator.
    pub fn check(&self) {
        self.pool.check();
        assert_eq!(self.pool.stats().stale_refs, 0, "a table held a reference that had passed");
        let mut refs = alloc::vec![0u32; self.config.slots as usize];
        let mut receiving = 0;
        for (rank, sequence) in &self.sequences {
            sequence.check(usize::from(self.config.block_tokens));
            sequence.table.iter().for_each(|at| refs[at.slot.0 as usize] += 1);
            assert_eq!(self.ranks.get(&sequence.attempt), Some(rank));
            assert_eq!(self.waiting.contains(rank), sequence.phase == Phase::Waiting);
            assert_eq!(self.running.contains(rank), sequence.phase == Phase::Running);
            let timed = self.deadlines.contains(rank);
            assert_eq!(timed, !matches!(sequence.phase, Phase::Retired | Phase::Doomed), "the deadline of {}", sequence.attempt);
            receiving += u32::from(sequence.phase == Phase::Receiving);
            assert!(sequence.phase != Phase::Doomed || self.flight.is_some(), "{} waits for no step", sequence.attempt);
        }
        assert_eq!((self.ranks.len(), receiving), (self.sequences.len(), self.receiving));
        assert!(self.deadlines.len() <= self.sequences.len());
        let ask = self.waiting.iter().filter(|rank| self.sequences[rank].receives);
        assert!(ask.eq(self.patience.iter().map(|(_, rank)| rank).collect::<BTreeSet<_>>()), "who waits to be received");
        assert!(self.running.len() + receiving as usize <= self.config.rows_max as usize, "more rows than a step has");
        for (slot, &count) in refs.iter().enumerate() {
            assert_eq!(count, self.pool.refs(Slot(slot as u32)), "references on slot {slot}");
        }
        let alone = self.sequences.len() == self.waiting.len();
        assert!(!alone || self.waiting.is_empty(), "sequences wait while nothing holds room");
    }
}
