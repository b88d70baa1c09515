//! What a batch does in single situations.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod batch_common;

use batch_common::{BLOCK, Rig, answer, attempt, config, expected, split, steady, ticket};
use millrace_core::batch::{BatchConfig, Input, Output, ROOM_WAIT_MAX_US};
use millrace_core::engine::EngineError;
use millrace_core::ids::Time;
use millrace_core::message::{BlockOp, FailKind, Finish, Ticket};

fn refused(outputs: &[Output]) -> Option<FailKind> {
    outputs.iter().find_map(|o| if let Output::Refused { kind, .. } = o { Some(*kind) } else { None })
}

fn reserved(outputs: &[Output]) -> Vec<u128> {
    outputs.iter().filter_map(|o| if let Output::Reserved { attempt, .. } = o { Some(attempt.request.0) } else { None }).collect()
}

fn failed(outputs: &[Output]) -> Vec<(u128, FailKind)> {
    let of = |o: &Output| if let Output::Failed(f) = o { Some((f.attempt.request.0, f.kind)) } else { None };
    outputs.iter().filter_map(of).collect()
}

#[test]
fn a_prompt_is_computed_in_aligned_chunks_and_decoded() {
    let mut rig = Rig::new(BatchConfig { step_tokens_max: 10, ..config(32) });
    let t = steady(1, (1..=21).collect(), 6);
    assert_eq!(rig.give(Input::Add(t.clone())), []);
    let mut outputs = Vec::new();
    let mut rows = Vec::new();
    while let Some((step, more)) = rig.step() {
        rows.extend(step.rows.iter().map(|r| (r.start, r.tokens.len(), r.sample.is_some())));
        outputs.extend(more);
    }
    let prompt = [(0, 8, false), (8, 8, false), (16, 5, true)];
    assert_eq!(rows[..3], prompt, "chunks end at block boundaries, the last at the prompt's end");
    assert_eq!(rows[3..], [(21, 1, true), (22, 1, true), (23, 1, true), (24, 1, true), (25, 1, true)]);
    assert_eq!(answer(&outputs, attempt(1), 0), (expected(&t, 1000), Some(Finish::Length)));
    let Some(Output::Token(first)) = outputs.iter().find(|o| matches!(o, Output::Token(_))) else { panic!() };
    assert_eq!(first.prefill.as_ref().unwrap().compute_us, 300, "three steps");
    assert!(rig.batch.is_idle());
    assert_eq!((rig.batch.pool_stats().in_use, rig.batch.pool_stats().cached), (0, 6), "26 computed tokens fill 6 blocks");
}

#[test]
fn the_first_token_tells_what_the_prompt_cost() {
    let mut rig = Rig::new(config(32));
    rig.give(Input::Add(steady(1, (1..=16).collect(), 2)));
    rig.run();
    rig.now = Time(5_000);
    rig.give(Input::Add(steady(2, (1..=16).collect(), 2)));
    rig.now = Time(5_700);
    let outputs = rig.run();
    let stats: Vec<_> =
        outputs.iter().filter_map(|o| if let Output::Token(t) = o { Some(t.prefill.clone()) } else { None }).collect();
    let first = stats[0].as_ref().unwrap();
    assert_eq!((first.cached_tokens, first.queue_us, first.compute_us), (12, 700, 100), "the last token is always computed");
    assert_eq!(stats[1], None);
    assert_eq!(answer(&outputs, attempt(2), 0).0, expected(&steady(1, (1..=16).collect(), 2), 1000));
}

#[test]
fn the_next_turn_reuses_what_the_answer_filled() {
    let mut rig = Rig::new(config(64));
    let first = steady(1, (1..=10).collect(), 11);
    rig.give(Input::Add(first.clone()));
    let reply = answer(&rig.run(), attempt(1), 0).0;
    let mut tokens = first.tokens;
    tokens.extend(reply);
    tokens.extend([7, 7, 7]);
    rig.give(Input::Add(split(steady(2, tokens, 1))));
    let outputs = rig.run();
    let Some(Output::Token(token)) = outputs.iter().find(|o| matches!(o, Output::Token(_))) else { panic!() };
    assert_eq!(token.prefill.as_ref().unwrap().cached_tokens, 20, "20 of the 21 tokens known were computed");
}

#[test]
fn decodes_go_first_and_prompts_share_the_rest() {
    let mut rig = Rig::new(config(64));
    rig.give(Input::Add(steady(1, vec![1, 2, 3], 50)));
    rig.step();
    rig.give(Input::Add(steady(2, (1..=9).collect(), 5)));
    rig.give(Input::Add(steady(3, (31..=49).collect(), 5)));
    let (step, _) = rig.step().unwrap();
    let rows: Vec<_> = step.rows.iter().map(|r| (r.attempt.request.0, r.tokens.len())).collect();
    assert_eq!(rows, [(1, 1), (2, 9), (3, 4)], "16 tokens: one decode, a whole prompt, an aligned part of the next");
}

#[test]
fn a_prompt_grows_its_steps_while_nothing_decodes() {
    // 16 tokens of a step, and what 250 us suffice for; each step takes 100 us.
    let mut rig = Rig::new(BatchConfig { prompt_step_us: 250, ..config(200) });
    let rows = |rig: &mut Rig| {
        let (step, _) = rig.step().unwrap();
        step.rows.iter().map(|r| (r.attempt.request.0, r.tokens.len())).collect::<Vec<_>>()
    };
    rig.give(Input::Add(steady(1, (1..=110).collect(), 9)));
    rig.give(Input::Add(steady(2, (201..=300).collect(), 9)));
    assert_eq!(rows(&mut rig), [(1, 16)], "nothing is known of its speed");
    assert_eq!(rows(&mut rig), [(1, 40)], "the other prompt does not wait for room that is not its own");
    assert_eq!(rows(&mut rig), [(1, 54)], "100 would do");
    assert_eq!(rows(&mut rig), [(1, 1), (2, 12)], "somebody waits for a token: no more than 16, and whole blocks");
}

#[test]
fn many_decodes_cannot_starve_a_prompt() {
    let mut rig = Rig::new(BatchConfig { step_tokens_max: 2, ..config(64) });
    for n in 1..=4 {
        rig.give(Input::Add(steady(n, vec![n as u32], 100)));
        rig.step();
    }
    rig.give(Input::Add(steady(9, (1..=12).collect(), 3)));
    let (step, _) = rig.step().unwrap();
    assert_eq!(step.rows.iter().map(|r| r.tokens.len()).collect::<Vec<_>>(), [1, 1, 1, 1, BLOCK]);
}

#[test]
fn a_split_prompt_is_held_until_release() {
    let mut rig = Rig::new(config(32));
    rig.give(Input::Add(steady(7, (1..=8).collect(), 1)));
    rig.run();
    let t = split(steady(1, (1..=10).collect(), 5));
    let outputs = rig.give(Input::Add(t.clone()));
    let [Output::Admitted { table, names, cached_blocks: 2, .. }] = &outputs[..] else { panic!("{outputs:?}") };
    assert_eq!((table.len(), names.len()), (3, 3));
    let outputs = rig.run();
    assert_eq!(answer(&outputs, attempt(1), 0), (expected(&t, 1000)[..1].to_vec(), None));
    assert_eq!((rig.batch.stats().held, rig.batch.pool_stats().in_use), (1, 3));
    rig.give(Input::Release(attempt(1)));
    assert!(rig.batch.is_idle());
    assert_eq!(rig.batch.pool_stats().in_use, 0);
}

#[test]
fn a_split_answer_of_one_token_is_held_too() {
    let mut rig = Rig::new(config(32));
    rig.give(Input::Add(split(steady(1, vec![1, 2, 3], 1))));
    assert_eq!(answer(&rig.run(), attempt(1), 0).1, Some(Finish::Length));
    assert_eq!(rig.batch.stats().held, 1);
    rig.now = rig.now.after(2_000_000_000);
    assert_eq!(rig.give(Input::Tick), [], "its answer is out: running out of time is no failure of the attempt");
    assert_eq!(rig.batch.stats().held, 1, "the sender may still be reading");
    rig.give(Input::Release(attempt(1)));
    assert!(rig.batch.is_idle());
}

#[test]
fn a_received_sequence_goes_on_where_prefill_stopped() {
    let mut rig = Rig::new(config(32));
    rig.give(Input::Add(steady(7, (1..=8).collect(), 1)));
    rig.run();
    let t = split(steady(1, (1..=10).collect(), 6));
    let answer_wanted = expected(&t, 1000);
    let outputs = rig.give(Input::Reserve(t.clone()));
    let [Output::Reserved { table, names, have_blocks: 2, .. }] = &outputs[..] else { panic!("{outputs:?}") };
    assert_eq!((table.len(), names.len(), rig.batch.pool_stats().in_use), (3, 3, 4), "one block of headroom beyond the table");
    assert!(rig.step().is_none());
    rig.engine.receive(&t.tokens, table, 2);
    rig.give(Input::Arrived { attempt: attempt(1), first_token: answer_wanted[0], finished: false });
    let duplicate = rig.give(Input::Arrived { attempt: attempt(1), first_token: 9, finished: true });
    assert_eq!(duplicate, []);
    assert_eq!(answer(&rig.run(), attempt(1), 1), (answer_wanted[1..].to_vec(), Some(Finish::Length)));
    assert!(rig.batch.is_idle());
}

#[test]
fn a_finished_hand_over_only_fills_the_cache() {
    let mut rig = Rig::new(config(32));
    rig.give(Input::Reserve(steady(1, (1..=9).collect(), 1)));
    rig.give(Input::Arrived { attempt: attempt(1), first_token: 3, finished: true });
    assert!(rig.batch.is_idle() && rig.step().is_none());
    assert_eq!((rig.batch.pool_stats().cached, rig.batch.pool_stats().in_use), (2, 0));
}

#[test]
fn a_hand_over_that_should_have_finished_fails() {
    let mut rig = Rig::new(config(32));
    rig.give(Input::Reserve(steady(1, (1..=9).collect(), 1)));
    let outputs = rig.give(Input::Arrived { attempt: attempt(1), first_token: 3, finished: false });
    assert_eq!(failed(&outputs), [(1, FailKind::BadTicket)]);
    assert!(rig.batch.is_idle());
}

#[test]
fn a_reservation_is_whole_and_waits_for_its_room_until_its_patience_ends() {
    let mut rig = Rig::new(config(6));
    rig.give(Input::Reserve(steady(1, (1..=12).collect(), 9)));
    assert_eq!(rig.batch.pool_stats().in_use, 4);
    let second = || Input::Reserve(steady(2, (31..=39).collect(), 9));
    assert_eq!(rig.give(second()), []);
    assert_eq!((rig.batch.pool_stats().in_use, rig.batch.stats().waiting), (4, 1), "no half of one");
    rig.now = rig.batch.deadline().unwrap();
    assert_eq!(rig.now, Time(ROOM_WAIT_MAX_US));
    assert_eq!(refused(&rig.give(Input::Tick)), Some(FailKind::NoRoom));
    assert!(!rig.batch.knows(attempt(2)), "nothing is kept of it");
    assert_eq!(rig.give(second()), []);
    assert_eq!(reserved(&rig.give(Input::Cancel(attempt(1)))), [2]);
    assert_eq!(
        rig.batch.deadline(),
        Some(rig.now.after(ticket(2, vec![1], 1).budget_us)),
        "it has its room: only its own time can end it"
    );
}

#[test]
fn who_waits_to_be_received_has_its_rank_among_all_that_wait() {
    let with_budget = |n: u128, budget_us: u64| Ticket { budget_us, ..steady(n, vec![n as u32; 9], 9) };
    let mut rig = Rig::new(BatchConfig { rows_max: 1, waiting_max: 8, ..config(32) });
    rig.give(Input::Add(with_budget(1, 9_000_000)));
    rig.step();
    rig.give(Input::Reserve(with_budget(2, 8_000_000)));
    rig.give(Input::Add(with_budget(3, 7_000_000)));
    rig.give(Input::Reserve(with_budget(4, 6_000_000)));
    assert_eq!(
        (rig.batch.stats().waiting, rig.batch.load().queued_tokens),
        (3, 9),
        "the prompt of one of three is to be computed here"
    );
    assert_eq!(reserved(&rig.give(Input::Cancel(attempt(1)))), [4]);
    assert_eq!(reserved(&rig.give(Input::Cancel(attempt(4)))), [0; 0], "the next is to be computed here");
    assert_eq!((rig.batch.stats().running, rig.batch.stats().waiting), (1, 1));
    assert_eq!(reserved(&rig.give(Input::Cancel(attempt(3)))), [2]);
}

#[test]
fn tickets_that_make_no_sense_are_refused() {
    let mut rig = Rig::new(BatchConfig { context_max: 40, ..config(8) });
    let mut over = ticket(1, vec![1, 2], 5);
    over.prompt_tokens = 3;
    let mut spent = ticket(1, vec![1, 2, 3], 2);
    spent.prompt_tokens = 1;
    let cases = [
        (ticket(1, vec![], 5), FailKind::BadTicket),
        (ticket(1, vec![1], 0), FailKind::BadTicket),
        (over, FailKind::BadTicket),
        (spent, FailKind::BadTicket),
        (ticket(1, vec![1; 33], 5), FailKind::TooLarge),
    ];
    for (t, kind) in cases {
        assert_eq!(refused(&rig.give(Input::Add(t.clone()))), Some(kind), "{t:?}");
        assert_eq!(refused(&rig.give(Input::Reserve(t))), Some(kind));
        assert!(rig.batch.is_idle());
    }
    rig.give(Input::Add(ticket(1, vec![1], 5)));
    assert_eq!(refused(&rig.give(Input::Add(ticket(1, vec![1], 5)))), Some(FailKind::BadTicket));
    assert_eq!(rig.batch.stats().running, 1, "the first goes on");
}

#[test]
fn waiting_is_bounded_and_in_order() {
    let mut rig = Rig::new(BatchConfig { rows_max: 1, waiting_max: 1, ..config(32) });
    for n in 1..=2 {
        assert_eq!(rig.give(Input::Add(steady(n, vec![5; 3], 2))), []);
    }
    assert_eq!(refused(&rig.give(Input::Add(steady(3, vec![5; 3], 2)))), Some(FailKind::NoRoom));
    assert_eq!(refused(&rig.give(Input::Reserve(steady(4, vec![5; 3], 2)))), Some(FailKind::NoRoom), "those that wait come first");
    let order: Vec<_> =
        rig.run().iter().filter_map(|o| if let Output::Token(t) = o { Some(t.attempt.request.0) } else { None }).collect();
    assert_eq!(order, [1, 1, 2, 2]);
}

#[test]
fn who_is_to_end_first_comes_first_in_the_queue_and_for_room() {
    let with_budget = |n: u128, tokens: Vec<u32>, budget_us: u64| Ticket { budget_us, ..steady(n, tokens, 15) };
    let ends = |outputs: &[Output], n| outputs.iter().rposition(|o| matches!(o, Output::Token(t) if t.attempt == attempt(n)));
    for (rows_max, slots, preempts) in [(1, 32, false), (4, 8, true)] {
        let mut rig = Rig::new(BatchConfig { rows_max, headroom_blocks: 0, ..config(slots) });
        // The third lost its node, say: it came last and has the least time left.
        let tickets = [(1, 31, 9_000_000), (2, 51, 9_000_000), (3, 71, 5_000_000)]
            .map(|(n, token, budget_us)| with_budget(n, (token..token + 9).collect(), budget_us));
        let mut outputs: Vec<Output> = tickets.iter().flat_map(|t| rig.give(Input::Add(t.clone()))).collect();
        outputs.extend(rig.run());
        for t in &tickets {
            assert_eq!(answer(&outputs, t.attempt, 0), (expected(t, 1000), Some(Finish::Length)), "{}", t.attempt);
        }
        assert!(ends(&outputs, 3) < ends(&outputs, 2), "{rows_max} rows: the third overtakes the second");
        assert_eq!(rig.batch.stats().preemptions > 0, preempts);
    }
}

#[test]
fn a_shared_prefix_is_computed_once_even_at_once() {
    let mut rig = Rig::new(config(64));
    let system: Vec<u32> = (1..=24).collect();
    let with = |n: u128, end: u32| split(steady(n, system.iter().copied().chain([end; 3]).collect(), 5));
    (1..=4).for_each(|n| assert_eq!(refused(&rig.give(Input::Add(with(n, 40 + n as u32)))), None));
    assert_eq!(refused(&rig.give(Input::Reserve(steady(9, vec![9; 5], 5)))), None, "waiting for a prefix is no lack of room");
    let (mut computed, mut outputs) = (0, Vec::new());
    while let Some((step, more)) = rig.step() {
        computed += step.rows.iter().map(|r| r.tokens.len()).sum::<usize>();
        outputs.extend(more);
    }
    assert_eq!(computed, 24 + 4 * 3);
    (1..=4).for_each(|n| assert_eq!(answer(&outputs, attempt(n), 0).0, expected(&with(n, 40 + n as u32), 1000)[..1]));
}

#[test]
fn who_waits_for_a_shared_prefix_computes_it_when_the_other_is_gone() {
    let mut rig = Rig::new(config(64));
    rig.give(Input::Add(steady(1, vec![1; 40], 5)));
    rig.give(Input::Add(steady(2, vec![1; 40], 5)));
    rig.step();
    assert_eq!((rig.batch.stats().running, rig.batch.stats().waiting), (1, 1));
    rig.give(Input::Cancel(attempt(1)));
    assert_eq!(answer(&rig.run(), attempt(2), 0).0, expected(&steady(2, vec![1; 40], 5), 1000));
}

#[test]
fn a_split_prompt_that_is_done_makes_place_for_the_next() {
    let mut rig = Rig::new(BatchConfig { rows_max: 1, ..config(32) });
    rig.give(Input::Add(split(steady(1, vec![1; 6], 5))));
    rig.give(Input::Add(split(steady(2, vec![2; 6], 5))));
    assert_eq!(rig.batch.stats().waiting, 1);
    rig.run();
    assert_eq!(rig.batch.stats().held, 2);
}

#[test]
fn headroom_is_kept_for_those_that_decode() {
    let mut rig = Rig::new(BatchConfig { headroom_blocks: 2, ..config(8) });
    rig.give(Input::Add(steady(1, vec![1; 6], 30)));
    rig.step();
    rig.give(Input::Add(steady(2, vec![2; 17], 3)));
    assert_eq!(rig.batch.stats().waiting, 1, "5 of 6 free blocks are wanted, 2 are kept");
    assert_eq!(reserved(&rig.give(Input::Reserve(steady(3, vec![3; 2], 3)))), [0; 0], "who waits comes first");
    assert_eq!(reserved(&rig.give(Input::Cancel(attempt(2)))), [3]);
    assert_eq!(rig.batch.pool_stats().in_use, 2 + 2, "with the one block that its answer can fill");
    assert_eq!(reserved(&rig.give(Input::Reserve(steady(4, vec![4; 8], 1)))), [0; 0], "3 of 4 free blocks are wanted, 2 are kept");
    rig.give(Input::Cancel(attempt(4)));
    assert_eq!(reserved(&rig.give(Input::Reserve(steady(5, vec![5; 7], 1)))), [5], "2 of 4");
}

#[test]
fn a_run_whose_cached_twin_was_evicted_is_offered_again() {
    let mut rig = Rig::new(config(12));
    let (first, second) = (steady(1, (1..=8).collect(), 1), steady(2, (1..=8).collect(), 9));
    let tokens = expected(&second, 1000);
    for t in [&first, &second] {
        let outputs = rig.give(Input::Reserve(t.clone()));
        let [Output::Reserved { table, have_blocks: 0, .. }] = &outputs[..] else { panic!("{outputs:?}") };
        rig.engine.receive(&t.tokens, table, 0);
    }
    rig.give(Input::Arrived { attempt: attempt(1), first_token: tokens[0], finished: true });
    rig.give(Input::Arrived { attempt: attempt(2), first_token: tokens[0], finished: false });
    let outputs = rig.give(Input::Add(steady(3, (40..72).collect(), 1)));
    assert!(matches!(outputs[..], [Output::Block(BlockOp::Evicted(_))]), "the cached second block goes: {outputs:?}");
    assert_eq!(answer(&rig.run(), attempt(2), 1).0, tokens[1..]);
    let known: Vec<_> = (1..=8).chain(tokens[..8].iter().copied()).collect();
    let outputs = rig.give(Input::Reserve(steady(4, known, 1)));
    let Output::Reserved { have_blocks, .. } = &outputs[0] else { panic!("{outputs:?}") };
    assert_eq!(*have_blocks, 4);
}

#[test]
fn the_last_to_come_gives_way_and_loses_nothing() {
    let mut rig = Rig::new(BatchConfig { headroom_blocks: 0, ..config(8) });
    let tickets = [steady(1, (1..=9).collect(), 15), steady(2, (31..=39).collect(), 15)];
    tickets.iter().for_each(|t| assert_eq!(rig.give(Input::Add(t.clone())), []));
    let outputs = rig.run();
    assert!(rig.batch.stats().preemptions > 0);
    for t in &tickets {
        assert_eq!(answer(&outputs, t.attempt, 0), (expected(t, 1000), Some(Finish::Length)));
    }
    let last = |n| outputs.iter().rposition(|o| matches!(o, Output::Token(t) if t.attempt == attempt(n)));
    assert!(last(1) < last(2), "the elder was never the victim");
}

#[test]
fn a_prompt_that_is_being_sent_is_never_preempted() {
    let mut rig = Rig::new(BatchConfig { headroom_blocks: 0, step_tokens_max: 5, ..config(8) });
    let elder = steady(1, vec![1; 3], 20);
    rig.give(Input::Add(elder.clone()));
    let mut outputs = rig.step().unwrap().1;
    rig.give(Input::Add(split(steady(2, vec![2; 24], 5))));
    outputs.extend(rig.run());
    let stats = rig.batch.stats();
    assert_eq!((stats.held, stats.waiting, stats.preemptions), (1, 1, 1), "the elder made way for itself");
    rig.give(Input::Release(attempt(2)));
    outputs.extend(rig.run());
    assert_eq!(answer(&outputs, attempt(1), 0).0, expected(&elder, 1000));
}

#[test]
fn a_tiny_pool_finishes_many_long_answers() {
    for headroom_blocks in [0, 1, 3] {
        let mut rig = Rig::new(BatchConfig { headroom_blocks, ..config(7) });
        let tickets: Vec<_> = (1..=40).map(|n| steady(n, (0..(n % 11 + 1) as u32).collect(), 14)).collect();
        tickets.iter().for_each(|t| assert_eq!(refused(&rig.give(Input::Add(t.clone()))), None));
        let outputs = rig.run();
        for t in &tickets {
            assert_eq!(answer(&outputs, t.attempt, 0), (expected(t, 28), Some(Finish::Length)), "{}", t.attempt);
        }
        assert!(rig.batch.is_idle());
        assert!(rig.steps < 40 * 14 * 3, "{} steps: it thrashes", rig.steps);
    }
}

#[test]
fn an_answer_ends_where_the_pool_ends() {
    let mut rig = Rig::new(config(3));
    let t = steady(1, vec![1; 5], 1000);
    rig.give(Input::Add(t.clone()));
    assert_eq!(answer(&rig.run(), attempt(1), 0), (expected(&t, 12), Some(Finish::Length)));
    assert_eq!(rig.steps, 7);
}

#[test]
fn cancel_waits_for_the_step_in_flight() {
    let mut rig = Rig::new(config(8));
    rig.give(Input::Add(steady(1, vec![1; 6], 9)));
    let step = rig.batch.next_step(rig.now).unwrap();
    assert_eq!(rig.give(Input::Cancel(attempt(1))), []);
    assert_eq!(rig.batch.pool_stats().in_use, 2, "the step still writes these");
    assert_eq!(rig.batch.deadline(), None);
    let sampled = rig.engine.step(&step);
    assert_eq!(rig.give(Input::Stepped(Ok(sampled))), []);
    assert_eq!((rig.batch.pool_stats().in_use, rig.batch.pool_stats().cached), (0, 0));
    assert!(rig.batch.is_idle());
}

#[test]
fn deadlines_end_every_phase() {
    let mut rig = Rig::new(BatchConfig { rows_max: 3, ..config(32) });
    let timed = |n: u128, is_split: bool, budget_us| {
        let mut t = steady(n, vec![n as u32; 6], 500);
        t.budget_us = budget_us;
        if is_split { split(t) } else { t }
    };
    let (held, decoding, receiving, waits) =
        (timed(1, true, 900), timed(2, false, 1_000), timed(3, false, 1_100), timed(4, false, 800));
    rig.give(Input::Add(held));
    rig.step();
    rig.give(Input::Add(decoding));
    rig.give(Input::Reserve(receiving));
    rig.give(Input::Add(steady(5, vec![9; 3], 500)));
    rig.give(Input::Add(waits));
    rig.step();
    assert_eq!(rig.batch.deadline(), Some(Time(900)));
    let mut seen = Vec::new();
    while let Some(deadline) = rig.batch.deadline().filter(|t| *t < Time(10_000)) {
        rig.now = deadline;
        seen.extend(failed(&rig.give(Input::Tick)));
    }
    assert_eq!(seen, [1, 4, 2, 3].map(|n| (n, FailKind::Deadline)));
    assert_eq!(rig.batch.stats().running, 1);
    rig.give(Input::Cancel(attempt(5)));
    assert!(rig.batch.pool_stats().in_use > 0, "what a sender may still read is not given out again");
    rig.give(Input::Release(attempt(1)));
    assert_eq!(rig.batch.pool_stats().in_use, 0);
}

#[test]
fn an_engine_error_fails_its_step_only() {
    let mut rig = Rig::new(BatchConfig { rows_max: 1, ..config(32) });
    let t = steady(2, vec![2; 6], 3);
    rig.give(Input::Add(steady(1, vec![1; 6], 3)));
    rig.give(Input::Add(t.clone()));
    rig.batch.next_step(rig.now).unwrap();
    let outputs = rig.give(Input::Stepped(Err(EngineError("out of memory".into()))));
    assert_eq!(failed(&outputs), [(1, FailKind::Engine)]);
    assert_eq!(rig.batch.pool_stats().cached, 0, "what was not computed is not cached");
    assert_eq!(answer(&rig.run(), attempt(2), 0).0, expected(&t, 1000));
}

#[test]
fn an_answer_for_other_rows_is_an_engine_error() {
    let mut rig = Rig::new(config(32));
    rig.give(Input::Add(steady(1, vec![1; 6], 3)));
    rig.batch.next_step(rig.now).unwrap();
    assert_eq!(failed(&rig.give(Input::Stepped(Ok(vec![])))), [(1, FailKind::Engine)]);
}

#[test]
fn late_and_unknown_messages_have_no_effect() {
    let mut rig = Rig::new(config(32));
    rig.give(Input::Add(split(steady(1, vec![1; 6], 3))));
    let before = (rig.batch.stats(), rig.batch.pool_stats());
    for n in [1, 9] {
        assert_eq!(rig.give(Input::Release(attempt(n))), []);
        assert_eq!(rig.give(Input::Arrived { attempt: attempt(n), first_token: 1, finished: true }), []);
    }
    assert_eq!(rig.give(Input::Cancel(attempt(9))), []);
    assert_eq!(rig.give(Input::Stepped(Ok(vec![]))), []);
    assert_eq!((rig.batch.stats(), rig.batch.pool_stats()), before);
}

#[test]
fn a_retried_ticket_counts_from_the_prompt() {
    let whole = steady(1, (1..=6).collect(), 8);
    let answer_wanted = expected(&whole, 1000);
    let mut again = whole.clone();
    again.tokens.extend(&answer_wanted[..3]);
    let mut rig = Rig::new(config(32));
    rig.give(Input::Add(again));
    assert_eq!(answer(&rig.run(), attempt(1), 3), (answer_wanted[3..].to_vec(), Some(Finish::Length)));
}

#[test]
fn load_counts_what_waits_and_what_runs() {
    let mut rig = Rig::new(BatchConfig { rows_max: 2, ..config(32) });
    rig.give(Input::Add(steady(1, vec![1; 3], 50)));
    rig.step();
    rig.give(Input::Add(steady(2, vec![2; 30], 5)));
    rig.give(Input::Add(steady(3, vec![3; 10], 5)));
    rig.step();
    let load = rig.batch.load();
    assert_eq!((load.running, load.waiting, load.queued_tokens), (1, 1, 18 + 10));
    assert_eq!(load.queued_pairs, (30 * 30 - 12 * 12) / 2 + 10 * 10 / 2);
    assert_eq!(load.free_blocks + load.evictable_blocks + rig.batch.pool_stats().in_use, load.total_blocks);
}
