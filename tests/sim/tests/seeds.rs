//! Many small worlds, and the proof that they repeat, in this process and in another.

use std::process::Command;

use millrace_sim::{Options, Outcome, run};

fn outcome(seed: u64, steps: u64) -> Outcome {
    run(Options { seed, steps, trace: false })
}

#[test]
fn a_hundred_worlds_hold_every_invariant() {
    let outcomes: Vec<_> = (1..=100).map(|seed| outcome(seed, 15_000)).collect();
    let sum = |of: fn(&Outcome) -> u64| outcomes.iter().map(of).sum::<u64>();
    // The worlds must be worth running: answers, hand-overs and faults in numbers.
    let (whole, split, broken) = (sum(|o| o.ends[0]), sum(|o| o.split), sum(|o| o.broken.values().sum()));
    assert!(whole > 1_000 && split > 500 && broken > 100, "{whole} whole, {split} handed over, {broken} broken");
    // Gateways are lost, leaders too, and operators see a history worth judging.
    let (moved, leaders, answered) = (sum(|o| o.moved), sum(|o| o.leaders), sum(|o| o.answered));
    assert!(moved > 200 && leaders > 110 && answered > 600, "{moved} moved, {leaders} terms, {answered} answered");
    // Some of them over QUIC that loses datagrams.
    let (sent, lost) = (sum(|o| o.datagrams.0), sum(|o| o.datagrams.1));
    assert!(sent > 50_000 && lost > 500, "{sent} datagrams, {lost} lost");
    // Each world came to rest, so each index is that of its caches; some were wrong before and must have been found to be.
    let (planted, found, mended) = (sum(|o| o.drift_planted), sum(|o| o.drift.found), sum(|o| o.drift.repaired));
    assert!(planted > 10 && found > 5 && mended > 5, "{planted} planted, {found} found, {mended} mended");
}

/// What the program prints for some seeds, in a process of its own.
fn printed(seed: u64) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_millrace-sim"))
        .args(["--seed", &seed.to_string(), "--seeds", "3", "--steps", "5000"])
        .output()
        .expect("the program starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_seed_is_one_history_in_every_process() {
    for seed in [3, 17, 41] {
        let text = printed(seed);
        assert_eq!(text, printed(seed));
        let here: String = (seed..seed + 3).map(|seed| format!("{}\n", outcome(seed, 5_000))).collect();
        assert_eq!(text, here);
    }
    assert_ne!(outcome(3, 1_000).trace, outcome(4, 1_000).trace);
}
