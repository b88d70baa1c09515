//! Who gets room and who computes: admission, reservation, growth with preemption, and the rows of the next step.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::batch::sequence::{Phase, Sequence};
use crate::batch::{Batch, Flight, Output, Rank};
use crate::engine::{Row, Step};
use crate::ids::{SlotRef, Time};
use crate::message::FailKind;
use crate::planted::{Bug, planted};

impl Batch {
    /// The next step to compute; `None` while one is in flight or when there is nothing to do. Answered by [`super::Input::Stepped`].
    /// May preempt; so [`Self::poll`] is to be drained after it.
    pub fn next_step(&mut self, now: Time) -> Option<Step> {
        if self.flight.is_some() {
            return None;
        }
        self.admit();
        self.grow();
        if self.running.is_empty() {
            // Whoever found no room to grow and sent itself back finds it now, in what it gave back.
            self.admit();
        }
        let plan = self.plan();
        let tokens = plan.iter().map(|(_, tokens)| tokens).sum::<usize>();
        let full =
            !plan.iter().any(|(rank, _)| self.sequences[rank].pending() == 1) && tokens >= self.config.step_tokens_max as usize;
        let (flight, rows): (Vec<Flight>, Vec<Row>) = plan.into_iter().map(|(s, n)| self.row(now, s, n)).unzip();
        if rows.is_empty() {
            return None;
        }
        self.speed.begin(now, full.then_some(tokens as u64));
        self.flight = Some(flight);
        Some(Step { rows })
    }

    /// Admits waiting sequences by rank, until one does not fit. One that never will, because of what is pinned, ends here:
    /// it would wait to its deadline, and everyone behind it.
    pub(super) fn admit(&mut self) {
        while let Some(rank) = self.head().filter(|rank| self.blocked != Some(*rank)) {
            if self.seat(rank) {
                continue;
            }
            let sequence = &self.sequences[&rank];
            let (need, reach) = (sequence.blocks(), self.reach(sequence));
            if need <= reach {
                self.blocked = Some(rank);
                return;
            }
            self.fail(rank, FailKind::TooLarge, too_large(need, reach));
        }
    }

    /// Whose turn it is to be admitted. While the first waits for its twin, those that compute nothing here may go before it.
    fn head(&self) -> Option<Rank> {
        let first = *self.waiting.first()?;
        if !self.twin_computes(first) {
            return Some(first);
        }
        self.waiting.iter().copied().find(|rank| self.sequences[rank].receives)
    }

    /// Whether another sequence is computing the very block that this one would compute first. Waiting for it costs little,
    /// and many prompts with one beginning, come at once, compute it once.
    fn twin_computes(&self, rank: Rank) -> bool {
        let (block_tokens, waits) = (usize::from(self.config.block_tokens), &self.sequences[&rank]);
        if waits.receives {
            return false;
        }
        let hits_max = (waits.tokens.len() - 1) / block_tokens;
        let hits = self.pool.prefix(&waits.names[..hits_max]);
        let computes = |s: &Sequence| s.computed <= hits * block_tokens && s.names.get(hits) == Some(&waits.names[hits]);
        hits < hits_max && self.running.iter().any(|running| computes(&self.sequences[running]))
    }

    /// Whether one more sequence may compute.
    fn has_row(&self) -> bool {
        self.running.len() + (self.receiving as usize) < self.config.rows_max as usize
    }

    /// Blocks kept free for the growth of those that decode here.
    fn kept(&self) -> usize {
        let (headroom, context_max) = (self.config.headroom_blocks as usize, self.config.context_max as usize);
        let decoding = self.running.iter().map(|rank| &self.sequences[rank]).filter(|s| !s.split);
        decoding.map(|s| s.headroom(headroom, context_max)).sum()
    }

    /// Cached leading blocks of `sequence` and fresh slots for the rest, when that leaves what is kept for others; else nothing, and `None`.
    /// Gives the table and how much of it is cached.
    fn seats(&mut self, sequence: &Sequence) -> Option<(Vec<SlotRef>, usize)> {
        let (blocks, kept) = (sequence.blocks() + self.growth(sequence), self.kept());
        let mut table = self.pool.acquire(&sequence.names[..self.hits_max(sequence)]);
        let (cached, stats) = (table.len(), self.pool.stats());
        let (need, room) = (blocks - cached, (stats.free + stats.evictable) as usize);
        if need + kept > room {
            table.into_iter().rev().for_each(|at| self.pool.release(at));
            return None;
        }
        table.extend(self.pool.alloc(need as u32).expect("the room was just counted"));
        Some((table, cached))
    }

    /// Leading blocks that may be taken from the cache. The last token is always computed, where one computes: its logits are what is wanted.
    fn hits_max(&self, sequence: &Sequence) -> usize {
        let last = usize::from(!sequence.receives && !planted(Bug::NothingToCompute));
        (sequence.tokens.len() - last) / usize::from(self.config.block_tokens)
    }

    /// The most blocks that a sequence could ever have here, beside what is pinned.
    fn reach(&self, sequence: &Sequence) -> usize {
        self.pool.reach(&sequence.names[..self.hits_max(sequence)])
    }

    /// Headroom that a sequence gets at once: one that is received cannot be preempted before it has arrived. None that can never be.
    fn growth(&self, sequence: &Sequence) -> usize {
        if !sequence.receives {
            return 0;
        }
        let wanted = sequence.headroom(self.config.headroom_blocks as usize, self.config.context_max as usize);
        wanted.min(self.reach(sequence).saturating_sub(sequence.blocks()))
    }

    /// Gives a waiting sequence slots for all its known tokens, all in one step: half-seated sequences would wait for one another. `false` when it
    /// must wait.
    fn seat(&mut self, rank: Rank) -> bool {
        if !self.has_row() {
            return false;
        }
        let mut sequence = self.sequences.remove(&rank).expect("ranks in sets name sequences");
        let seats = self.seats(&sequence);
        let seated = seats.is_some();
        if let Some((table, cached)) = seats {
            sequence.seat(table, cached);
            self.outputs.extend(said_of(&sequence, cached as u32));
            if sequence.receives && planted(Bug::PublishUnverified) {
                (0..sequence.names.len()).for_each(|block| _ = sequence.offer(&mut self.pool, block));
            }
        }
        let phase = if sequence.receives { Phase::Receiving } else { Phase::Running };
        self.sequences.insert(rank, sequence);
        if seated {
            self.set_phase(rank, phase);
        }
        seated
    }

    /// Gives each running sequence the block that its newest token needs, by rank, at the cost of the last.
    fn grow(&mut self) {
        let by_rank: Vec<Rank> = self.running.iter().copied().collect();
        for rank in by_rank {
            while self.running.contains(&rank) && self.sequences[&rank].table.len() < self.sequences[&rank].blocks() {
                match self.pool.alloc(1) {
                    Ok(slots) => self.sequence(rank).table.extend(slots),
                    Err(_) => self.preempt(),
                }
            }
        }
    }

    /// Sends the last in rank that may go back to the queue. Its full blocks stay cached until their room is needed.
    fn preempt(&mut self) {
        let last = self.running.iter().rev().copied().find(|rank| !self.sequences[rank].split || planted(Bug::PreemptSent));
        let victim = last.expect("only a sequence that decodes here grows, and it may go itself");
        self.release_table(victim);
        self.sequence(victim).unseat();
        self.set_phase(victim, Phase::Waiting);
        self.preemptions += 1;
    }

    /// Who computes how many tokens: decoding sequences first, then prompts by rank.
    fn plan(&self) -> Vec<(Rank, usize)> {
        let block_tokens = usize::from(self.config.block_tokens);
        let pending = self.running.iter().map(|rank| (*rank, self.sequences[rank].pending()));
        let (mut plan, prompts): (Vec<_>, Vec<_>) = pending.partition(|&(_, pending)| pending == 1);
        // Where nobody waits for a next token the first prompt may take longer: large steps are faster. Others' first tokens would come later for it.
        let step_tokens = self.config.step_tokens_max as usize;
        let mut alone = if plan.is_empty() { self.speed.tokens_in(self.config.prompt_step_us) } else { 0 };
        // However many decode, a prompt gets on by a block in each step.
        let mut left = step_tokens.saturating_sub(plan.len()).max(block_tokens);
        for (rank, pending) in prompts {
            let most = match core::mem::take(&mut alone) {
                // What would be left is less than a step: its last tokens would wait for one more.
                alone if alone >= step_tokens && pending <= alone + step_tokens => pending,
                alone => left.max(alone),
            };
            let tokens = chunk(self.sequences[&rank].computed, pending, most, block_tokens);
            if tokens > 0 {
                left = left.saturating_sub(tokens);
                plan.push((rank, tokens));
            }
        }
        plan
    }

    fn row(&mut self, now: Time, rank: Rank, tokens: usize) -> (Flight, Row) {
        let block_tokens = usize::from(self.config.block_tokens);
        let sequence = self.sequence(rank);
        sequence.first_step.get_or_insert(now);
        let (start, end) = (sequence.computed, sequence.computed + tokens);
        let sample = end == sequence.tokens.len();
        let back = usize::from(planted(Bug::TokenOffByOne) && start > 0);
        let row = Row {
            attempt: sequence.attempt,
            tokens: sequence.tokens[start - back..end - back].to_vec(),
            start: start as u32,
            table: sequence.table[..end.div_ceil(block_tokens)].iter().map(|at| at.slot).collect(),
            sample: sample.then(|| sequence.sampling.clone()),
        };
        (Flight { rank, attempt: sequence.attempt, end: end as u32, sample }, row)
    }
}

/// What is said of a sequence that has just got its table, of which so many blocks are cached.
fn said_of(sequence: &Sequence, cached_blocks: u32) -> Option<Output> {
    let (attempt, blocks) = (sequence.attempt, sequence.blocks());
    match (sequence.receives, sequence.split) {
        (true, _) => {
            let (table, names) = (sequence.table[..blocks].to_vec(), sequence.all_names());
            Some(Output::Reserved { attempt, table, names, have_blocks: cached_blocks })
        }
        (false, true) => {
            let (table, names) = (sequence.table.clone(), sequence.all_names());
            Some(Output::Admitted { attempt, table, names, cached_blocks })
        }
        (false, false) => None,
    }
}

fn too_large(need: usize, reach: usize) -> String {
    format!("{need} blocks needed, {reach} are the most that pins leave of the pool")
}

/// Tokens of the next chunk of a prompt of which `start` are computed and `pending` are not: all, if `left` allows; else up to a block boundary.
fn chunk(start: usize, pending: usize, left: usize, block_tokens: usize) -> usize {
    if pending <= left {
        return pending;
    }
    let end = start + left;
    (end - end % block_tokens).saturating_sub(start)
}
