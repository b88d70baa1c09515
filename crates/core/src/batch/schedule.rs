//! Who gets room and who computes: admission, reservation, growth with preemption, and the rows of the next step.

use alloc::format;
use alloc::vec::Vec;

use crate::batch::sequence::{Phase, Sequence};
use crate::batch::{Batch, Flight, Output, Serial};
use crate::engine::{Row, Step};
use crate::ids::{SlotRef, Time};
use crate::message::{FailKind, Ticket};
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
        let (flight, rows): (Vec<Flight>, Vec<Row>) = self.plan().into_iter().map(|(s, n)| self.row(now, s, n)).unzip();
        if rows.is_empty() {
            return None;
        }
        self.flight = Some(flight);
        Some(Step { rows })
    }

    /// Admits waiting sequences in order of arrival, until one does not fit.
    pub(super) fn admit(&mut self) {
        while let Some(&serial) = self.waiting.first() {
            if self.blocked == Some(serial) || self.twin_computes(serial) {
                return;
            }
            if !self.seat(serial) {
                self.blocked = Some(serial);
                return;
            }
        }
    }

    /// Whether an older sequence is computing the very block that this one would compute first. Waiting for it costs nothing,
    /// since older prompts are computed first anyway, and many prompts with one beginning, come at once, compute it once.
    fn twin_computes(&self, serial: Serial) -> bool {
        let (block_tokens, waits) = (usize::from(self.config.block_tokens), &self.sequences[&serial]);
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
        let decoding = self.running.iter().map(|serial| &self.sequences[serial]).filter(|s| !s.split);
        decoding.map(|s| s.headroom(headroom, context_max)).sum()
    }

    /// Cached leading blocks of `sequence`, at most `hits_max`, and fresh slots up to `blocks`, when that leaves `kept` blocks; else nothing.
    /// Gives the table and how much of it is cached.
    fn seats(&mut self, sequence: &Sequence, hits_max: usize, blocks: usize) -> Result<(Vec<SlotRef>, usize), (usize, usize)> {
        let kept = self.kept();
        let mut table = self.pool.acquire(&sequence.names[..hits_max]);
        let (cached, stats) = (table.len(), self.pool.stats());
        let (need, room) = (blocks - cached, (stats.free + stats.evictable) as usize);
        if need + kept > room {
            table.into_iter().rev().for_each(|at| self.pool.release(at));
            return Err((need + kept, room));
        }
        table.extend(self.pool.alloc(need as u32).expect("the room was just counted"));
        Ok((table, cached))
    }

    /// Gives a waiting sequence slots for all its known tokens; `false` when it must wait.
    fn seat(&mut self, serial: Serial) -> bool {
        if !self.has_row() {
            return false;
        }
        let mut sequence = self.sequences.remove(&serial).expect("serials in sets name sequences");
        // The last token is always computed: its logits are what is wanted.
        let last = usize::from(!planted(Bug::NothingToCompute));
        let hits_max = (sequence.tokens.len() - last) / usize::from(self.config.block_tokens);
        let seats = self.seats(&sequence, hits_max, sequence.blocks());
        let seated = seats.is_ok();
        if let Ok((table, cached)) = seats {
            sequence.seat(table, cached);
            if sequence.split {
                self.outputs.push_back(Output::Admitted {
                    attempt: sequence.attempt,
                    table: sequence.table.clone(),
                    names: sequence.all_names(),
                    cached_blocks: cached as u32,
                });
            }
        }
        self.sequences.insert(serial, sequence);
        if seated {
            self.set_phase(serial, Phase::Running);
        }
        seated
    }

    /// Takes a sequence that will be received, with every slot it needs and its headroom in one step, or refuses it:
    /// half-reserved sequences would wait for one another. Whoever waits for room already comes first.
    pub(super) fn reserve(&mut self, now: Time, ticket: Ticket) {
        let attempt = ticket.attempt;
        if let Err((kind, detail)) = self.judge(&ticket) {
            return self.refuse(attempt, kind, detail);
        }
        if self.blocked.is_some() || !self.has_row() {
            let detail = format!("{} waiting, {} running, {} receiving", self.waiting.len(), self.running.len(), self.receiving);
            return self.refuse(attempt, FailKind::NoRoom, detail);
        }
        let mut sequence = Sequence::new(now, ticket, &self.config, Phase::Receiving);
        let headroom = sequence.headroom(self.config.headroom_blocks as usize, self.config.context_max as usize);
        let blocks = sequence.blocks();
        match self.seats(&sequence, sequence.names.len(), blocks + headroom) {
            Ok((table, cached)) => {
                sequence.seat(table, cached);
                self.outputs.push_back(Output::Reserved {
                    attempt,
                    table: sequence.table[..blocks].to_vec(),
                    names: sequence.all_names(),
                    have_blocks: cached as u32,
                });
                if planted(Bug::PublishUnverified) {
                    (0..sequence.names.len()).for_each(|block| _ = sequence.offer(&mut self.pool, block));
                }
                self.insert(sequence);
            }
            Err((need, room)) => self.refuse(attempt, FailKind::NoRoom, format!("{need} blocks needed, {room} to be had")),
        }
    }

    /// Gives each running sequence the block that its newest token needs, oldest first, at the cost of the youngest.
    fn grow(&mut self) {
        let oldest_first: Vec<Serial> = self.running.iter().copied().collect();
        for serial in oldest_first {
            while self.running.contains(&serial) && self.sequences[&serial].table.len() < self.sequences[&serial].blocks() {
                match self.pool.alloc(1) {
                    Ok(slots) => self.sequence(serial).table.extend(slots),
                    Err(_) => self.preempt(),
                }
            }
        }
    }

    /// Sends the youngest sequence that may go back to the queue. Its full blocks stay cached until their room is needed.
    fn preempt(&mut self) {
        let youngest = self.running.iter().rev().copied().find(|serial| !self.sequences[serial].split || planted(Bug::PreemptSent));
        let victim = youngest.expect("only a sequence that decodes here grows, and it may go itself");
        self.release_table(victim);
        self.sequence(victim).unseat();
        self.set_phase(victim, Phase::Waiting);
        self.preemptions += 1;
    }

    /// Who computes how many tokens: decoding sequences first, then prompts by age.
    fn plan(&self) -> Vec<(Serial, usize)> {
        let block_tokens = usize::from(self.config.block_tokens);
        let pending = self.running.iter().map(|serial| (*serial, self.sequences[serial].pending()));
        let (mut plan, prompts): (Vec<_>, Vec<_>) = pending.partition(|&(_, pending)| pending == 1);
        // However many decode, a prompt gets on by a block in each step.
        let mut left = (self.config.step_tokens_max as usize).saturating_sub(plan.len()).max(block_tokens);
        for (serial, pending) in prompts {
            let tokens = chunk(self.sequences[&serial].computed, pending, left, block_tokens);
            if tokens > 0 {
                left -= tokens;
                plan.push((serial, tokens));
            }
        }
        plan
    }

    fn row(&mut self, now: Time, serial: Serial, tokens: usize) -> (Flight, Row) {
        let block_tokens = usize::from(self.config.block_tokens);
        let sequence = self.sequence(serial);
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
        (Flight { serial, attempt: sequence.attempt, end: end as u32, sample }, row)
    }
}

/// Tokens of the next chunk of a prompt of which `start` are computed and `pending` are not: all, if `left` allows; else up to a block boundary.
fn chunk(start: usize, pending: usize, left: usize, block_tokens: usize) -> usize {
    if pending <= left {
        return pending;
    }
    let end = start + left;
    (end - end % block_tokens).saturating_sub(start)
}
