//! Targets that must fail: a fuzzer that finds nothing in them finds nothing anywhere. One test, because memory and panics are counted for
//! the whole process.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::hint::black_box;

use millrace_fuzz::run::{Broken, Progress, Until, input, run};
use millrace_fuzz::targets::{Parser, Target};

/// Inputs until one must have been found.
const RUNS: Until = Until::Runs(100_000);

fn planted(open: fn() -> Parser) -> Target {
    Target {
        name: "planted",
        what: "a planted bug",
        examples: || vec![(0..40).collect(), vec![7; 20]],
        spoil: |bytes, _, random| {
            let at = random.below(bytes.len());
            bytes[at] = random.below(256) as u8;
        },
        open,
        memory_max: |len| 4096 + 4 * len,
        caught: &["by design"],
        short_runs: 0,
    }
}

fn found(open: fn() -> Parser) -> Option<Broken> {
    let broken = run(&planted(open), 1, RUNS, &Progress::to(None).unwrap()).err();
    // What this test has to say is said again.
    let _ = std::panic::take_hook();
    broken
}

/// Wants memory in earnest: what nobody sees is not allocated.
fn hungry(bytes: &[u8]) -> Result<bool, String> {
    let size = bytes.first().map_or(0, |byte| usize::from(*byte)) * 64;
    Ok(!black_box(vec![1u8; size]).is_empty())
}

#[test]
fn planted_bugs_are_found_and_what_is_sound_is_not_blamed() {
    an_input_depends_on_its_number_alone();
    assert!(found(|| Box::new(|bytes| Ok(bytes.contains(&200)))).is_none());
    let panic = found(|| Box::new(|bytes| Ok(!bytes.starts_with(&[7, 200, 7]) || panic!("planted")))).expect("a panic");
    assert!(panic.why.contains("planted") && panic.input.len() <= 3, "made smaller: {panic:?}");
    let memory = found(|| Box::new(hungry)).expect("too much memory");
    assert!(memory.why.contains("bytes of memory"), "{memory:?}");
    let thread = found(|| {
        Box::new(|bytes| {
            let bad = bytes.get(1) == Some(&99);
            Ok(std::thread::spawn(move || assert!(!bad, "elsewhere")).join().is_ok())
        })
    });
    assert!(thread.expect("a panic elsewhere").why.contains("on another thread"));
    let word = found(|| Box::new(|bytes| if bytes.get(2) == Some(&5) { Err("not what it was".into()) } else { Ok(true) }));
    assert!(word.expect("a broken word").why.contains("not what it was"));
    let caught = found(|| {
        Box::new(|bytes| {
            let bad = bytes.get(1) == Some(&99);
            Ok(std::panic::catch_unwind(|| assert!(!bad, "by design")).is_ok())
        })
    });
    assert!(caught.is_none(), "a panic that is caught by design is none: {caught:?}");
}

fn an_input_depends_on_its_number_alone() {
    let target = planted(|| Box::new(|_| Ok(true)));
    let examples = (target.examples)();
    let all: Vec<Vec<u8>> = (0..100).map(|number| input(&target, &examples, 3, number)).collect();
    assert!((0..100).all(|number| input(&target, &examples, 3, number as u64) == all[number]));
    assert_ne!(all[0], input(&target, &examples, 4, 0));
}
