//! Random tickets, hand-overs, cancels, engine failures and preemptions: every request that is let live delivers exactly
//! the tokens of an undisturbed model, and all room comes back.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod batch_common;

use std::collections::{BTreeMap, BTreeSet};

use batch_common::{Dice, Rig, attempt, config, expected, split, ticket};
use millrace_core::batch::{BatchConfig, Input, Output};
use millrace_core::engine::EngineError;
use millrace_core::ids::{AttemptId, BlockHash, SlotRef, TokenId};
use millrace_core::message::{BlockOp, FailKind, Ticket};

/// What the test knows of one request.
struct Request {
    ticket: Ticket,
    answer: Vec<TokenId>,
    /// Index of the next token this batch must deliver.
    next: usize,
    /// Tokens it has to deliver here.
    end: usize,
    reserved: Option<(Vec<SlotRef>, usize)>,
    is_split: bool,
    over: bool,
}

struct World {
    rig: Rig,
    dice: Dice,
    context_max: usize,
    requests: BTreeMap<u128, Request>,
    cached: BTreeSet<BlockHash>,
    finished: usize,
    /// Split requests that failed: their blocks stay until the sender is through with them.
    retired: Vec<AttemptId>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let slots = 6 + dice.roll(30) as u32;
        let config = BatchConfig {
            step_tokens_max: 1 + dice.roll(24) as u32,
            prompt_step_us: [0, 50, 1_000_000][dice.roll(3) as usize],
            rows_max: 1 + dice.roll(8) as u32,
            context_max: 20 + dice.roll(60) as u32,
            headroom_blocks: dice.roll(3) as u32,
            waiting_max: dice.roll(20) as u32,
            ..config(slots)
        };
        let context_max = (config.context_max as usize).min(slots as usize * batch_common::BLOCK);
        Self {
            rig: Rig::new(config),
            dice,
            context_max,
            requests: BTreeMap::new(),
            cached: BTreeSet::new(),
            finished: 0,
            retired: Vec::new(),
        }
    }

    /// Prompts share prefixes of two stems; some are resumed after tokens that an earlier attempt delivered.
    fn make(&mut self, n: u128) -> Ticket {
        let dice = &mut self.dice;
        let stem = dice.roll(2) as u32;
        let mut tokens: Vec<TokenId> = (0..dice.roll(14) as u32).map(|i| 1 + stem + i % 5).collect();
        (0..1 + dice.roll(8)).for_each(|_| tokens.push(1 + dice.roll(3) as u32));
        let mut t = ticket(n, tokens, 1 + dice.roll(30) as u32);
        t.sampling.ignore_eos = dice.one_in(2);
        if dice.one_in(12) {
            t.budget_us = 100 * dice.roll(40);
        }
        if dice.one_in(4) {
            let answer = expected(&t, self.context_max.max(t.tokens.len() + 1));
            let delivered = dice.roll(answer.len() as u64) as usize;
            t.tokens.extend(&answer[..delivered]);
        }
        t
    }

    fn begin(&mut self, n: u128) {
        let mut t = self.make(n);
        let (reserve, is_split) = (self.dice.one_in(3), self.dice.one_in(3));
        if is_split || reserve {
            t = split(t);
        }
        let first = t.delivered() as usize;
        let answer = if t.tokens.len() <= self.context_max { expected(&t, self.context_max) } else { Vec::new() };
        let (next, end) = match (reserve, is_split) {
            (true, _) => (first + 1, first + answer.len()),
            (false, true) => (first, first + 1),
            (false, false) => (first, first + answer.len()),
        };
        let request = Request { ticket: t.clone(), answer, next, end, reserved: None, is_split: is_split && !reserve, over: false };
        self.requests.insert(n, request);
        let outputs = self.rig.give(if reserve { Input::Reserve(t) } else { Input::Add(t) });
        self.read(outputs);
    }

    fn read(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Token(out) => {
                    let request = self.requests.get_mut(&out.attempt.request.0).unwrap();
                    assert!(!request.over, "{} speaks after its end", out.attempt);
                    assert_eq!(out.index as usize, request.next, "the index of {}", out.attempt);
                    let delivered = request.ticket.delivered() as usize;
                    assert_eq!(out.token, request.answer[request.next - delivered], "token {} of {}", out.index, out.attempt);
                    request.next += 1;
                    let whole = request.next == delivered + request.answer.len();
                    assert_eq!(out.finish.is_some(), whole, "the finish of {}", out.attempt);
                    if request.next == request.end {
                        self.finished += 1;
                        request.over = !request.is_split;
                    }
                }
                Output::Reserved { attempt, table, names, have_blocks } => {
                    assert_eq!(table.len(), names.len());
                    self.requests.get_mut(&attempt.request.0).unwrap().reserved = Some((table, have_blocks as usize));
                }
                Output::Admitted { attempt, table, names, .. } => {
                    assert_eq!(table.len(), names.len());
                    assert!(self.requests[&attempt.request.0].is_split);
                }
                Output::Refused { attempt, .. } => self.requests.get_mut(&attempt.request.0).unwrap().over = true,
                Output::Failed(failed) => {
                    assert!(matches!(failed.kind, FailKind::Deadline | FailKind::Engine), "{failed:?}");
                    let request = self.requests.get_mut(&failed.attempt.request.0).unwrap();
                    request.over = true;
                    if request.is_split {
                        self.retired.push(failed.attempt);
                    }
                }
                Output::Block(BlockOp::Stored(name)) => assert!(self.cached.insert(name)),
                Output::Block(BlockOp::Evicted(name)) => assert!(self.cached.remove(&name)),
                Output::Block(other) => panic!("a pool has one tier: {other:?}"),
            }
        }
    }

    fn arrive(&mut self, n: u128) {
        let request = self.requests.get_mut(&n).unwrap();
        let Some((table, have)) = request.reserved.take().filter(|_| !request.over) else { return };
        self.rig.engine.receive(&request.ticket.tokens, &table, have);
        let finished = request.answer.len() == 1;
        let input = Input::Arrived { attempt: attempt(n), first_token: request.answer[0], finished };
        if finished {
            request.over = true;
            self.finished += 1;
        }
        let outputs = self.rig.give(input);
        self.read(outputs);
    }

    fn release(&mut self, n: u128) {
        let request = self.requests.get_mut(&n).unwrap();
        if request.is_split && request.next == request.end {
            request.over = true;
            let outputs = self.rig.give(Input::Release(attempt(n)));
            self.read(outputs);
        }
    }

    /// One step, during which other things happen.
    fn step(&mut self, n: u128) -> bool {
        let Some(step) = self.rig.batch.next_step(self.rig.now) else { return false };
        self.rig.batch.check();
        let outputs = self.rig.drain();
        self.read(outputs);
        let sampled = self.rig.engine.step(&step);
        if n > 0 {
            self.disturb(n);
        }
        self.rig.now = self.rig.now.after(100);
        let broken = n > 0 && self.dice.one_in(60);
        let outputs = self.rig.give(Input::Stepped(if broken { Err(EngineError("planned".into())) } else { Ok(sampled) }));
        self.read(outputs);
        true
    }

    fn disturb(&mut self, n: u128) {
        let any = 1 + u128::from(self.dice.roll(n as u64));
        match self.dice.roll(8) {
            0 if self.dice.one_in(3) => {
                if let Some(request) = self.requests.get_mut(&any) {
                    request.over = true;
                    let outputs = self.rig.give(Input::Cancel(attempt(any)));
                    self.read(outputs);
                }
            }
            1 | 2 => self.settle(|world, n| world.dice.one_in(2) && !world.requests[&n].over),
            3 => {
                let outputs = self.rig.give(Input::Tick);
                self.read(outputs);
            }
            4 => self.drain_one(),
            _ => {}
        }
    }

    /// The sender of a failed split request is through with its blocks.
    fn drain_one(&mut self) {
        if let Some(attempt) = self.retired.pop() {
            let outputs = self.rig.give(Input::Cancel(attempt));
            self.read(outputs);
        }
    }

    /// Lets hand-overs that `chosen` picks arrive or be through.
    fn settle(&mut self, chosen: impl Fn(&mut Self, u128) -> bool) {
        for n in self.requests.keys().copied().collect::<Vec<_>>() {
            if chosen(self, n) {
                self.arrive(n);
                self.release(n);
            }
        }
    }

    fn run(&mut self, requests: u128) {
        for n in 1..=requests {
            self.begin(n);
            for _ in 0..self.dice.roll(6) {
                self.step(n);
                self.disturb(n);
            }
        }
        loop {
            while self.step(0) {}
            while !self.retired.is_empty() {
                self.drain_one();
            }
            let before = self.rig.batch.stats();
            self.settle(|world, n| !world.requests[&n].over);
            if !self.step(0) && before == self.rig.batch.stats() {
                break;
            }
        }
    }
}

#[test]
fn every_live_request_gets_the_undisturbed_answer() {
    let (mut finished, mut preemptions, requests) = (0, 0, 60);
    for seed in 0..120 {
        let mut world = World::new(seed);
        world.run(requests);
        for (n, request) in &world.requests {
            assert!(request.over, "seed {seed}: request {n} is left behind at {} of {}", request.next, request.end);
        }
        let pool = world.rig.batch.pool_stats();
        assert!(world.rig.batch.is_idle() && pool.in_use == 0, "seed {seed}: {pool:?}");
        assert_eq!(world.rig.batch.cached_names().collect::<BTreeSet<_>>(), world.cached, "seed {seed}: the deltas");
        assert_eq!(pool.stale_refs, 0);
        finished += world.finished;
        preemptions += world.rig.batch.stats().preemptions;
    }
    println!("{finished} finished, {preemptions} preemptions");
    assert!(finished > 2000 && preemptions > 200, "{finished} finished, {preemptions} preemptions: the walk is too tame");
}
