//! One sequence of a batch: its tokens, how far they are computed, its block table, and when its answer is at its end.
//! It decides nothing about other sequences or about room.

use alloc::vec::Vec;

use crate::batch::BatchConfig;
use crate::identity::{Chain, Owner};
use crate::ids::{AttemptId, BlockHash, SlotRef, Time, TokenId};
use crate::message::{Finish, PrefillStats, Ticket};
use crate::planted::{Bug, planted};
use crate::pool::{Pool, Published};
use crate::sampling::Sampling;

/// Where a sequence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Has no slots and wants some.
    Waiting,
    /// Has slots for every known token but perhaps the newest; computes.
    Running,
    /// Has slots that the hand-over writes.
    Receiving,
    /// Has slots that the hand-over reads.
    Held,
    /// Ended for a reason of ours, but the hand-over may still read its slots.
    Retired,
    /// Ended, but the step in flight uses its slots.
    Doomed,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub attempt: AttemptId,
    pub phase: Phase,
    pub deadline: Time,
    /// Its prompt is computed elsewhere and has not arrived: it waits for slots that the hand-over writes, or has them.
    pub receives: bool,
    /// Decoded elsewhere: held after its first token; never preempted, since the sender reads its slots.
    pub split: bool,
    pub sampling: Sampling,
    prompt_tokens: usize,
    /// All known tokens: the prompt, what was delivered, what was drawn.
    pub tokens: Vec<TokenId>,
    /// How many of `tokens` have their KV in the table.
    pub computed: usize,
    pub table: Vec<SlotRef>,
    /// Names of the full blocks of `tokens`.
    pub names: Vec<BlockHash>,
    chain: Chain,
    owner: Owner,
    /// Leading full blocks that were offered to the cache.
    published: usize,
    /// Its last token is out.
    pub finished: bool,
    block_tokens: usize,
    pub arrived: Time,
    pub first_step: Option<Time>,
    pub cached_tokens: u32,
    /// The next token out is the attempt's first from this node's own prefill.
    stats_due: bool,
}

impl Sequence {
    /// One that waits. O(tokens): names all full blocks.
    pub fn new(now: Time, ticket: Ticket, config: &BatchConfig, receives: bool) -> Self {
        let block_tokens = usize::from(config.block_tokens);
        let mut chain = Chain::new(ticket.tenant_key, &config.fingerprint, &ticket.cache_salt);
        let names = ticket.tokens.chunks_exact(block_tokens).map(|block| chain.push(block)).collect();
        Self {
            attempt: ticket.attempt,
            phase: Phase::Waiting,
            deadline: now.after(ticket.budget_us),
            receives,
            split: ticket.decode.is_some() && !receives,
            sampling: ticket.sampling,
            prompt_tokens: if planted(Bug::ResumeIndex) { ticket.tokens.len() } else { ticket.prompt_tokens as usize },
            tokens: ticket.tokens,
            computed: 0,
            table: Vec::new(),
            names,
            chain,
            owner: ticket.tenant_key.owner(),
            published: 0,
            finished: false,
            block_tokens,
            arrived: now,
            first_step: None,
            cached_tokens: 0,
            stats_due: !receives,
        }
    }

    /// Tokens known and not computed.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Blocks that the known tokens need.
    pub fn blocks(&self) -> usize {
        self.tokens.len().div_ceil(self.block_tokens)
    }

    /// Blocks of growth that should stay free for it: at most `headroom`, at most what its answer can fill, less what it has.
    pub fn headroom(&self, headroom: usize, context_max: usize) -> usize {
        let tokens_max = (self.prompt_tokens.saturating_add(self.sampling.max_new as usize)).min(context_max);
        let growth = tokens_max.div_ceil(self.block_tokens).saturating_sub(self.blocks());
        growth.min(headroom).saturating_sub(self.table.len().saturating_sub(self.blocks()))
    }

    /// Tokens of the answer so far: the index of the next.
    pub fn answered(&self) -> u32 {
        (self.tokens.len() - self.prompt_tokens) as u32
    }

    /// Appends a drawn token.
    pub fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
        if self.tokens.len().is_multiple_of(self.block_tokens) {
            let block = &self.tokens[self.tokens.len() - self.block_tokens..];
            self.names.push(self.chain.push(block));
        }
    }

    /// Whether the newest token ends the answer, and why.
    pub fn finish(&self, context_max: u32) -> Option<Finish> {
        let end = self.tokens.last().is_some_and(|&token| self.sampling.is_end(token)) && !planted(Bug::EndUnseen);
        let full = self.answered() >= self.sampling.max_new || self.tokens.len() >= context_max as usize;
        if end { Some(Finish::Stop) } else { full.then_some(Finish::Length) }
    }

    /// Names of all blocks of the known tokens, the unfinished last one's included.
    pub fn all_names(&self) -> Vec<BlockHash> {
        let mut names = self.names.clone();
        let rest = &self.tokens[self.names.len() * self.block_tokens..];
        if !rest.is_empty() {
            names.push(self.chain.tail(rest));
        }
        names
    }

    /// The cost of the prompt, once, with the first token.
    pub fn take_prefill_stats(&mut self, now: Time) -> Option<PrefillStats> {
        let first_step = self.first_step.filter(|_| core::mem::take(&mut self.stats_due))?;
        Some(PrefillStats {
            cached_tokens: self.cached_tokens,
            queue_us: first_step.since(self.arrived),
            compute_us: now.since(first_step),
            ..PrefillStats::default()
        })
    }

    /// Has a table now, whose first `cached` blocks are computed.
    pub fn seat(&mut self, table: Vec<SlotRef>, cached: usize) {
        (self.table, self.computed, self.published) = (table, cached * self.block_tokens, cached);
        if self.stats_due {
            let found = if planted(Bug::UsageWrong) { self.tokens.len() } else { self.computed };
            self.cached_tokens = found as u32;
        }
    }

    /// Has no table any more: everything is to be computed again.
    pub fn unseat(&mut self) {
        if !planted(Bug::RecomputeSkipped) {
            (self.computed, self.published) = (0, 0);
        }
    }

    /// Offers newly completed full blocks to the cache. When the block before one is gone, which another sequence had cached
    /// and this one holds too, its whole run is offered again.
    pub fn publish(&mut self, pool: &mut Pool, block_tokens: usize) {
        let ahead = if planted(Bug::PublishEarly) { block_tokens } else { 0 };
        let full = (self.computed + ahead).min(self.tokens.len()) / block_tokens;
        for block in self.published..full {
            if self.offer(pool, block) == Published::Orphan {
                for earlier in 0..=block {
                    self.offer(pool, earlier);
                }
            }
        }
        self.published = full;
    }

    pub(super) fn offer(&self, pool: &mut Pool, block: usize) -> Published {
        let parent = block.checked_sub(1).map(|before| self.names[before]);
        pool.publish(self.table[block], parent, self.names[block], self.owner)
    }

    pub fn check(&self, block_tokens: usize) {
        let id = self.attempt;
        assert_eq!(self.names.len(), self.tokens.len() / block_tokens, "names of {id}");
        assert!(self.computed <= self.tokens.len() && self.published * block_tokens <= self.computed, "{id}: computed past known");
        match self.phase {
            Phase::Waiting => assert!(self.table.is_empty() && self.computed == 0, "{id} waits with slots"),
            Phase::Running => {
                assert!(self.pending() > 0, "{id} has nothing to compute");
                assert!(self.table.len() * block_tokens >= self.tokens.len() - 1, "the table of {id} is short");
            }
            Phase::Receiving | Phase::Held | Phase::Retired | Phase::Doomed => {
                assert!(self.table.len() * block_tokens >= self.computed, "the table of {id} is short");
            }
        }
    }
}
