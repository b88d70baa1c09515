//! A model engine whose KV is a number per position that depends on every earlier position *as read through the block table*:
//! one lost, stale or misplaced block changes every token after it.
#![allow(dead_code)]

use std::collections::BTreeMap;

use millrace_core::batch::{Batch, BatchConfig, Input, Output};
use millrace_core::engine::{Sampled, Step};
use millrace_core::identity::{Fingerprint, TenantKey};
use millrace_core::ids::{AttemptId, Epoch, NodeId, ReplicaId, RequestId, SlotRef, Time, TokenId};
use millrace_core::message::{Finish, Peer, Ticket};
use millrace_core::sampling::{Sampling, mix};

pub const BLOCK: usize = 4;
/// The end-of-answer token; the model draws from 0..VOCAB.
pub const EOS: TokenId = 0;
pub const VOCAB: u64 = 24;

pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0) % below
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.roll(n) == 0
    }
}

/// The KV of position `earlier.len()`.
fn cell(earlier: impl Iterator<Item = u64>, token: TokenId) -> u64 {
    let sum = earlier.enumerate().fold(0u64, |sum, (i, kv)| sum.wrapping_add(mix(kv ^ mix(i as u64))));
    mix(sum ^ mix(u64::from(token) + 1))
}

fn draw(kv: u64) -> TokenId {
    (kv % VOCAB) as TokenId
}

pub fn plain_kv(tokens: &[TokenId]) -> Vec<u64> {
    let mut kv = Vec::new();
    for &token in tokens {
        kv.push(cell(kv.iter().copied(), token));
    }
    kv
}

/// The answer that an undisturbed model gives after `tokens`.
pub fn expected(ticket: &Ticket, context_max: usize) -> Vec<TokenId> {
    let mut tokens = ticket.tokens.clone();
    let mut kv = plain_kv(&tokens);
    let mut answer = Vec::new();
    loop {
        let token = draw(*kv.last().unwrap());
        answer.push(token);
        tokens.push(token);
        let count = tokens.len() - ticket.prompt_tokens as usize;
        if ticket.sampling.is_end(token) || count >= ticket.sampling.max_new as usize || tokens.len() >= context_max {
            return answer;
        }
        kv.push(cell(kv.iter().copied(), token));
    }
}

/// KV memory by (slot, offset).
#[derive(Default)]
pub struct ModelEngine {
    pub memory: BTreeMap<(u32, usize), u64>,
}

impl ModelEngine {
    pub fn step(&mut self, step: &Step) -> Vec<Sampled> {
        let mut sampled = Vec::new();
        for row in &step.rows {
            assert!(!row.tokens.is_empty());
            assert_eq!(row.table.len(), (row.end() as usize).div_ceil(BLOCK));
            let place = |p: usize| (row.table[p / BLOCK].0, p % BLOCK);
            let mut last = 0;
            for (i, &token) in row.tokens.iter().enumerate() {
                let position = row.start as usize + i;
                last = cell((0..position).map(|p| *self.memory.get(&place(p)).unwrap_or(&0)), token);
                self.memory.insert(place(position), last);
            }
            if row.sample.is_some() {
                sampled.push(Sampled { attempt: row.attempt, token: draw(last), logprob: -1.0 });
            }
        }
        sampled
    }

    /// Writes what a hand-over would: blocks `have..` of `tokens`.
    pub fn receive(&mut self, tokens: &[TokenId], table: &[SlotRef], have: usize) {
        for (position, kv) in plain_kv(tokens).into_iter().enumerate().skip(have * BLOCK) {
            self.memory.insert((table[position / BLOCK].slot.0, position % BLOCK), kv);
        }
    }
}

pub fn config(slots: u32) -> BatchConfig {
    BatchConfig {
        block_tokens: BLOCK as u16,
        slots,
        step_tokens_max: 16,
        prompt_step_us: 0,
        rows_max: 8,
        context_max: 1000,
        headroom_blocks: 1,
        waiting_max: 100,
        fingerprint: Fingerprint::default(),
    }
}

pub fn attempt(n: u128) -> AttemptId {
    AttemptId { request: RequestId(n), attempt: 0 }
}

pub fn ticket(n: u128, tokens: Vec<TokenId>, max_new: u32) -> Ticket {
    Ticket {
        attempt: attempt(n),
        gateway: ReplicaId(1),
        decode: None,
        prompt_tokens: tokens.len() as u32,
        tokens,
        sampling: Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, max_new, eos: vec![EOS], ignore_eos: false },
        tenant_key: TenantKey([3; 32]),
        cache_salt: Vec::new(),
        budget_us: 1_000_000_000,
        trace: [0; 25],
    }
}

/// A ticket whose answer goes on to the very end of `max_new`.
pub fn steady(n: u128, tokens: Vec<TokenId>, max_new: u32) -> Ticket {
    let mut ticket = ticket(n, tokens, max_new);
    ticket.sampling.ignore_eos = true;
    ticket
}

pub fn split(mut ticket: Ticket) -> Ticket {
    ticket.decode = Some(Peer { node: NodeId(2), epoch: Epoch(1), name: "d".into(), address: "127.0.0.1:1".into() });
    ticket
}

/// A batch with its engine and a clock that goes on by 100 us a step.
pub struct Rig {
    pub batch: Batch,
    pub engine: ModelEngine,
    pub now: Time,
    pub steps: usize,
}

impl Rig {
    pub fn new(config: BatchConfig) -> Self {
        Self { batch: Batch::new(config), engine: ModelEngine::default(), now: Time(0), steps: 0 }
    }

    pub fn give(&mut self, input: Input) -> Vec<Output> {
        self.batch.handle(self.now, input);
        self.batch.check();
        self.drain()
    }

    pub fn drain(&mut self) -> Vec<Output> {
        std::iter::from_fn(|| self.batch.poll()).collect()
    }

    /// One step, if there is one to do; its outputs.
    pub fn step(&mut self) -> Option<(Step, Vec<Output>)> {
        let step = self.batch.next_step(self.now)?;
        self.batch.check();
        assert!(self.batch.next_step(self.now).is_none(), "one step at a time");
        let mut outputs = self.drain();
        let sampled = self.engine.step(&step);
        self.now = self.now.after(100);
        self.steps += 1;
        outputs.extend(self.give(Input::Stepped(Ok(sampled))));
        Some((step, outputs))
    }

    pub fn run(&mut self) -> Vec<Output> {
        let mut outputs = Vec::new();
        while let Some((_, more)) = self.step() {
            outputs.extend(more);
        }
        outputs
    }
}

/// The tokens of one attempt in `outputs`, which must be contiguous from `first`, and why they end.
pub fn answer(outputs: &[Output], id: AttemptId, first: u32) -> (Vec<TokenId>, Option<Finish>) {
    let (mut tokens, mut finish) = (Vec::new(), None);
    for output in outputs {
        if let Output::Token(out) = output
            && out.attempt == id
        {
            assert_eq!(out.index, first + tokens.len() as u32, "indices of {id}");
            assert_eq!(finish, None, "{id} goes on past its end");
            tokens.push(out.token);
            finish = out.finish;
        }
    }
    (tokens, finish)
}
