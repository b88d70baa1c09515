//! Many small worlds, and the proof that they repeat.

use millrace_sim::{Options, Outcome, run};

fn outcome(seed: u64, steps: u64) -> Outcome {
    run(Options { seed, steps, trace: false })
}

#[test]
fn fifty_worlds_hold_every_invariant() {
    let outcomes: Vec<_> = (1..=50).map(|seed| outcome(seed, 3_000)).collect();
    let ends = |at: usize| outcomes.iter().map(|o| o.ends[at]).sum::<u64>();
    let broken: u64 = outcomes.iter().flat_map(|o| o.broken.values()).sum();
    let split: u64 = outcomes.iter().map(|o| o.split).sum();
    // The worlds must be worth running: answers, hand-overs and faults in numbers.
    assert!(ends(0) > 1_000 && split > 500 && broken > 100, "{} whole, {split} handed over, {broken} broken", ends(0));
    // Each world came to rest, so each index is that of its caches; some were wrong before and must have been found to be.
    let drift = |of: fn(&Outcome) -> u64| outcomes.iter().map(of).sum::<u64>();
    let (planted, found, mended) = (drift(|o| o.drift_planted), drift(|o| o.drift.found), drift(|o| o.drift.repaired));
    assert!(planted > 10 && found > 5 && mended > 5, "{planted} planted, {found} found, {mended} mended");
}

#[test]
fn a_seed_is_one_history() {
    for seed in [3, 17, 41] {
        assert_eq!(outcome(seed, 4_000), outcome(seed, 4_000));
    }
    assert_ne!(outcome(3, 1_000).trace, outcome(4, 1_000).trace);
}
