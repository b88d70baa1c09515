//! What pins keep of a pool nobody waits for: a sequence that could not fit beside them even alone is refused at once, with the reason.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod batch_common;

use batch_common::{BLOCK, Rig, answer, attempt, config, expected, split, steady};
use millrace_core::batch::{BatchConfig, Input, Output};
use millrace_core::ids::TokenId;
use millrace_core::message::{BlockOp, FailKind};

/// Blocks of the pool; half of them can be pinned.
const SLOTS: u32 = 8;

/// A rig whose pool has pinned the four blocks of the prompt `1..=16`.
fn pinned() -> Rig {
    let mut rig = Rig::new(BatchConfig { headroom_blocks: 3, ..config(SLOTS) });
    rig.give(Input::Add(steady(1, (1..=16).collect(), 1)));
    let stored = |output: &Output| if let Output::Block(BlockOp::Stored(name)) = output { Some(*name) } else { None };
    let names: Vec<_> = rig.run().iter().filter_map(stored).collect();
    assert_eq!(names.len(), 4);
    assert_eq!(rig.batch.set_pins(&names).held, 4);
    rig
}

/// A prompt of so many blocks that shares none with what is pinned.
fn prompt(blocks: usize) -> Vec<TokenId> {
    (0..blocks * BLOCK).map(|n| 30 + n as TokenId).collect()
}

fn end(outputs: &[Output]) -> Option<FailKind> {
    outputs.iter().find_map(|output| match output {
        Output::Failed(failed) => Some(failed.kind),
        Output::Refused { kind, .. } => Some(*kind),
        _ => None,
    })
}

#[test]
fn a_prompt_that_fits_beside_the_pins_is_computed_and_a_larger_one_refused() {
    let mut rig = pinned();
    assert_eq!(end(&rig.give(Input::Add(split(steady(2, prompt(4), 1))))), None);
    let outputs = rig.run();
    assert_eq!(answer(&outputs, attempt(2), 0).0.len(), 1);
    rig.give(Input::Release(attempt(2)));
    let outputs = rig.give(Input::Add(split(steady(3, prompt(5), 1))));
    assert_eq!(end(&outputs), Some(FailKind::TooLarge), "{outputs:?}");
    assert!(rig.batch.is_idle(), "nobody waits for it");
}

#[test]
fn a_prompt_that_begins_with_what_is_pinned_has_those_blocks_too() {
    let mut rig = pinned();
    let tokens: Vec<TokenId> = (1..=16).chain(prompt(4)).collect();
    let ticket = steady(2, tokens, 1);
    rig.give(Input::Add(ticket.clone()));
    let outputs = rig.run();
    assert_eq!(answer(&outputs, attempt(2), 0).0, expected(&ticket, 1000));
}

#[test]
fn an_answer_that_outgrows_what_pins_leave_ends_there_and_nobody_waits_behind_it() {
    let mut rig = pinned();
    let (long, short) = (steady(2, prompt(3), 12), steady(3, prompt(2), 3));
    rig.give(Input::Add(long));
    rig.give(Input::Add(short.clone()));
    let outputs = rig.run();
    let failed: Vec<_> =
        outputs.iter().filter_map(|o| if let Output::Failed(f) = o { Some((f.attempt, f.kind)) } else { None }).collect();
    assert_eq!(failed, [(attempt(2), FailKind::TooLarge)]);
    assert_eq!(answer(&outputs, attempt(3), 0).0, expected(&short, 1000));
    assert!(rig.batch.is_idle());
}

#[test]
fn pins_that_come_later_end_the_wait_of_whoever_cannot_fit_any_more() {
    let mut rig = Rig::new(BatchConfig { rows_max: 1, ..config(SLOTS) });
    rig.give(Input::Add(steady(1, (1..=16).collect(), 8)));
    let mut names = Vec::new();
    while let Some((_, outputs)) = rig.step() {
        names.extend(outputs.iter().filter_map(|o| if let Output::Block(BlockOp::Stored(name)) = o { Some(*name) } else { None }));
        if names.len() == 4 && rig.batch.stats().waiting == 0 {
            rig.give(Input::Add(steady(2, prompt(5), 1)));
            assert_eq!(rig.batch.stats().waiting, 1, "there is one row, and the other has it");
            assert_eq!(rig.batch.set_pins(&names).held, 4);
            let outputs = rig.drain();
            assert_eq!(end(&outputs), Some(FailKind::TooLarge), "{outputs:?}");
            return;
        }
    }
    panic!("nothing was cached")
}

#[test]
fn a_reservation_says_whether_waiting_helps_and_asks_for_no_headroom_that_cannot_be() {
    let mut rig = pinned();
    let outputs = rig.give(Input::Reserve(split(steady(2, prompt(5), 20))));
    assert_eq!(end(&outputs), Some(FailKind::TooLarge), "{outputs:?}");
    // Four blocks and three of headroom are over what the pool has; the four are not.
    let outputs = rig.give(Input::Reserve(split(steady(3, prompt(4), 20))));
    assert_eq!(end(&outputs), None, "{outputs:?}");
    let outputs = rig.give(Input::Reserve(split(steady(4, prompt(2), 20))));
    assert_eq!(end(&outputs), None, "{outputs:?}");
    assert_eq!((rig.batch.stats().receiving, rig.batch.stats().waiting), (1, 1));
    rig.now = rig.batch.deadline().unwrap();
    assert_eq!(end(&rig.give(Input::Tick)), Some(FailKind::NoRoom));
}
