//! Continuous batching, one machine for prefill and decode nodes: which sequences compute what in the next step, and who gets room.
//!
//! One rule makes all steps: *computed tokens chase known tokens*. A prompt chunk, a prefix hit, a decoded token and the recomputation
//! after a preemption differ only in how far the two are apart. Admission is first come, first served; a growing sequence may
//! push out only the youngest. The machine holds block tables, never KV bytes; it does not compute, send or wait.
//! Ideas: vLLM v1's scheduler (one token budget, no phases), Sarathi-Serve (chunks beside decodes, OSDI '24).

mod schedule;
mod sequence;
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

/// Bounds of one node's batch.
#[derive(Clone, Debug)]
pub struct BatchConfig {
    /// Tokens of one block.
    pub block_tokens: u16,
    /// Blocks that the pool can hold.
    pub slots: u32,
    /// Tokens of one step. Decoding sequences are served first; prompts share the rest, at least one block in each step.
    pub step_tokens_max: u32,
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
    /// The prompt's KV will arrive from elsewhere: reserve every slot of it, and headroom, now or never.
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

/// Arrival order of a sequence; its seniority.
type Serial = u64;

/// One row of the step in flight.
#[derive(Clone, Copy, Debug)]
struct Flight {
    serial: Serial,
    attempt: AttemptId,
    end: u32,
    sample: bool,
}

/// All sequences of one node and its pool.
#[derive(Debug)]
pub struct Batch {
    config: BatchConfig,
    pool: Pool,
    sequences: BTreeMap<Serial, Sequence>,
    serials: HashMap<AttemptId, Serial>,
    waiting: BTreeSet<Serial>,
    running: BTreeSet<Serial>,
    receiving: u32,
    deadlines: BTreeSet<(Time, Serial)>,
    flight: Option<Vec<Flight>>,
    next_serial: Serial,
    /// The head of the queue, when it was found not to fit and no room has been made since.
    blocked: Option<Serial>,
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
            serials: HashMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            receiving: 0,
            deadlines: BTreeSet::new(),
            flight: None,
            next_serial: 0,
            blocked: None,
            outputs: VecDeque::new(),
            preemptions: 0,
        }
    }

    /// Takes one input. What names an unknown attempt, or one that is past it, has no effect: messages may come late or twice.
    pub fn handle(&mut self, now: Time, input: Input) {
        match input {
            Input::Add(ticket) => self.add(now, ticket),
            Input::Reserve(ticket) => self.reserve(now, ticket),
            Input::Arrived { attempt, first_token, finished } => self.arrived(attempt, first_token, finished),
            Input::Stepped(result) => self.stepped(now, result),
            Input::Release(attempt) => {
                let of = |phase| self.in_phase(attempt, phase);
                if let Some(serial) = of(Phase::Held).or_else(|| of(Phase::Retired)) {
                    self.end(serial);
                }
            }
            Input::Cancel(attempt) => {
                let ignored = planted(Bug::CancelIgnored) && self.flight.is_some();
                if let Some(&serial) = self.serials.get(&attempt).filter(|_| !ignored) {
                    self.end(serial);
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
        self.deadlines.first().map(|&(time, _)| time)
    }

    /// Whether anything is kept for an attempt.
    #[must_use]
    pub fn knows(&self, attempt: AttemptId) -> bool {
        self.serials.contains_key(&attempt)
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
        let behind = |serial: &Serial| self.sequences[serial].pending();
        let decoding = self.running.iter().filter(|s| behind(s) == 1).count() as u32;
        let (mut queued_tokens, mut queued_pairs) = (0, 0u64);
        for sequence in self.waiting.iter().chain(&self.running).map(|s| &self.sequences[s]).filter(|s| s.pending() > 1) {
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
            return Err((FailKind::NoRoom, detail));
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

    fn add(&mut self, now: Time, ticket: Ticket) {
        let attempt = ticket.attempt;
        if let Err((kind, detail)) = self.judge(&ticket) {
            return self.refuse(attempt, kind, detail);
        }
        let serial = self.insert(Sequence::new(now, ticket, &self.config, Phase::Waiting));
        self.admit();
        if self.waiting.contains(&serial) && self.waiting.len() > self.config.waiting_max as usize {
            self.free(serial);
            self.refuse(attempt, FailKind::NoRoom, format!("{} sequences wait already", self.config.waiting_max));
        }
    }

    fn insert(&mut self, sequence: Sequence) -> Serial {
        let serial = self.next_serial;
        self.next_serial += 1;
        self.serials.insert(sequence.attempt, serial);
        if !planted(Bug::DeadlineForgotten) {
            self.deadlines.insert((sequence.deadline, serial));
        }
        let phase = sequence.phase;
        self.sequences.insert(serial, sequence);
        self.count_phase(serial, phase, true);
        serial
    }

    fn in_phase(&self, attempt: AttemptId, phase: Phase) -> Option<Serial> {
        self.serials.get(&attempt).copied().filter(|serial| self.sequences[serial].phase == phase)
    }

    fn sequence(&mut self, serial: Serial) -> &mut Sequence {
        self.sequences.get_mut(&serial).expect("serials in sets name sequences")
    }

    /// Keeps the sets that mirror [`Sequence::phase`].
    fn count_phase(&mut self, serial: Serial, phase: Phase, enters: bool) {
        let set = match phase {
            Phase::Waiting => &mut self.waiting,
            Phase::Running => &mut self.running,
            Phase::Receiving if enters => return self.receiving += 1,
            Phase::Receiving => return self.receiving -= 1,
            Phase::Held | Phase::Retired | Phase::Doomed => return,
        };
        if enters {
            set.insert(serial);
        } else {
            set.remove(&serial);
        }
    }

    fn set_phase(&mut self, serial: Serial, phase: Phase) {
        let old = core::mem::replace(&mut self.sequence(serial).phase, phase);
        self.count_phase(serial, old, false);
        self.count_phase(serial, phase, true);
        self.blocked = None;
    }

    /// Gives back all slots of a sequence; full published blocks stay cached.
    fn release_table(&mut self, serial: Serial) {
        for at in core::mem::take(&mut self.sequence(serial).table).into_iter().rev() {
            self.pool.release(at);
            if planted(Bug::FreeTwice) {
                self.pool.release(at);
            }
        }
        self.blocked = None;
    }

    /// Forgets a sequence that no step uses.
    fn free(&mut self, serial: Serial) {
        if !planted(Bug::FreeForgotten) {
            self.release_table(serial);
        }
        let sequence = self.sequences.remove(&serial).expect("it was just there");
        self.count_phase(serial, sequence.phase, false);
        self.serials.remove(&sequence.attempt);
        self.deadlines.remove(&(sequence.deadline, serial));
    }

    /// Forgets a sequence, now or, when the step in flight uses its slots, after it.
    fn end(&mut self, serial: Serial) {
        let computes = self.flight.as_ref().is_some_and(|rows| rows.iter().any(|row| row.serial == serial));
        if computes && !planted(Bug::CancelInFlight) {
            self.set_phase(serial, Phase::Doomed);
            let deadline = self.sequence(serial).deadline;
            self.deadlines.remove(&(deadline, serial));
        } else {
            self.free(serial);
        }
    }

    fn fail(&mut self, serial: Serial, kind: FailKind, detail: String) {
        let attempt = self.sequence(serial).attempt;
        self.outputs.push_back(Output::Failed(AttemptFailed { attempt, kind, detail }));
        self.retire(serial);
    }

    /// Ends a sequence for a reason of ours. One whose slots a sender may be reading keeps them, idle, until the shell says
    /// `Release` or `Cancel`: given out earlier, they would be read under names that are no longer theirs.
    fn retire(&mut self, serial: Serial) {
        let sequence = self.sequence(serial);
        if sequence.split && matches!(sequence.phase, Phase::Running | Phase::Held) && !planted(Bug::FreeEarly) {
            let deadline = sequence.deadline;
            self.deadlines.remove(&(deadline, serial));
            self.set_phase(serial, Phase::Retired);
        } else {
            self.end(serial);
        }
    }

    fn expire(&mut self, now: Time) {
        while let Some(&(deadline, serial)) = self.deadlines.first().filter(|(deadline, _)| *deadline <= now) {
            if self.sequence(serial).finished {
                // Its answer is complete; only the hand-over of its blocks ran out of time.
                self.retire(serial);
            } else {
                let phase = self.sequence(serial).phase;
                self.fail(serial, FailKind::Deadline, format!("{} us past the deadline, {phase:?}", now.since(deadline)));
            }
        }
    }

    fn arrived(&mut self, attempt: AttemptId, first_token: TokenId, finished: bool) {
        let Some(serial) = self.in_phase(attempt, Phase::Receiving) else { return };
        let context_max = self.config.context_max;
        let sequence = self.sequence(serial);
        sequence.computed = sequence.tokens.len();
        self.publish(serial);
        if finished {
            return self.free(serial);
        }
        let sequence = self.sequence(serial);
        sequence.push(first_token);
        if let Some(finish) = sequence.finish(context_max) {
            // Going on would deliver past the end; ending in silence would leave the gateway waiting.
            return self.fail(serial, FailKind::BadTicket, format!("handed over as unfinished, but at its end here: {finish:?}"));
        }
        self.set_phase(serial, Phase::Running);
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
                    match self.sequence(row.serial).phase {
                        Phase::Doomed => self.free(row.serial),
                        Phase::Retired => {}
                        _ => self.fail(row.serial, FailKind::Engine, detail.clone()),
                    }
                }
            }
        }
    }

    fn advance(&mut self, now: Time, rows: &[Flight], sampled: &[Sampled]) {
        let mut sampled = sampled.iter();
        for row in rows {
            let drawn = if row.sample { sampled.next() } else { None };
            match self.sequence(row.serial).phase {
                Phase::Doomed => {
                    self.free(row.serial);
                    continue;
                }
                // Retired while the step ran: what it computed belongs to nobody.
                Phase::Retired => continue,
                _ => {}
            }
            self.sequence(row.serial).computed = row.end as usize;
            self.publish(row.serial);
            if let Some(drawn) = drawn {
                self.deliver(now, row.serial, drawn);
            }
        }
    }

    fn deliver(&mut self, now: Time, serial: Serial, drawn: &Sampled) {
        let context_max = self.config.context_max;
        let sequence = self.sequence(serial);
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
            self.set_phase(serial, Phase::Held);
        } else if finish.is_some() {
            self.free(serial);
        }
    }

    /// Makes newly completed full blocks of a sequence findable.
    fn publish(&mut self, serial: Serial) {
        let block_tokens = usize::from(self.config.block_tokens);
        let sequence = self.sequences.get_mut(&serial).expect("serials in sets name sequences");
        sequence.publish(&mut self.pool, block_tokens);
    }

    /// Asserts every invariant of the batch and its pool. O(sequences + slots), for tests and the simulator.
    pub fn check(&self) {
        self.pool.check();
        assert_eq!(self.pool.stats().stale_refs, 0, "a table held a reference that had passed");
        let mut refs = alloc::vec![0u32; self.config.slots as usize];
        let mut receiving = 0;
        for (serial, sequence) in &self.sequences {
            sequence.check(usize::from(self.config.block_tokens));
            sequence.table.iter().for_each(|at| refs[at.slot.0 as usize] += 1);
            assert_eq!(self.serials.get(&sequence.attempt), Some(serial));
            assert_eq!(self.waiting.contains(serial), sequence.phase == Phase::Waiting);
            assert_eq!(self.running.contains(serial), sequence.phase == Phase::Running);
            let timed = self.deadlines.contains(&(sequence.deadline, *serial));
            assert_eq!(timed, !matches!(sequence.phase, Phase::Retired | Phase::Doomed), "the deadline of {}", sequence.attempt);
            receiving += u32::from(sequence.phase == Phase::Receiving);
            assert!(sequence.phase != Phase::Doomed || self.flight.is_some(), "{} waits for no step", sequence.attempt);
        }
        assert_eq!((self.serials.len(), receiving), (self.sequences.len(), self.receiving));
        assert!(self.deadlines.len() <= self.sequences.len());
        assert!(self.running.len() + receiving as usize <= self.config.rows_max as usize, "more rows than a step has");
        for (slot, &count) in refs.iter().enumerate() {
            assert_eq!(count, self.pool.refs(Slot(slot as u32)), "references on slot {slot}");
        }
        let alone = self.sequences.len() == self.waiting.len();
        let pinned = self.pool.stats().pinned > 0; // a sequence may be larger than what pins leave
        assert!(!alone || self.waiting.is_empty() || pinned, "sequences wait while nothing holds room");
    }
}
