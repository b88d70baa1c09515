//! Corrections: what follows from many observations, and what is forgotten.

use millrace_core::ids::{Epoch, NodeId, Time};
use millrace_core::route::correct::{
    CORRECTED_NODES_MAX, CORRECTION_HALF_LIFE_US, Correction, Corrections, Observation, Predicted, Ratio,
};
use proptest::prelude::*;

const NODE: NodeId = NodeId(3);
const EPOCH: Epoch = Epoch(7);

fn observation(applied: Ratio, predicted_us: u64, observed_us: u64) -> Observation {
    Observation { node: NODE, epoch: EPOCH, what: Predicted::Prefill, predicted_us, applied, observed_us }
}

/// `count` observations of a node whose true time is `true_us` where `raw_us` would be predicted without any correction.
fn observed(count: usize, raw_us: u64, true_us: u64) -> Corrections {
    let mut corrections = Corrections::default();
    for _ in 0..count {
        let applied = corrections.of(Time(0), NODE, EPOCH).prefill;
        corrections.handle(Time(0), &observation(applied, applied.apply(raw_us), true_us));
    }
    corrections
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn predictions_become_right_where_the_bounds_allow(raw_us in 10_000..1_000_000_u64, ratio in 0.15..7.5_f64) {
        let true_us = (raw_us as f64 * ratio) as u64;
        let ratio = observed(60, raw_us, true_us).of(Time(0), NODE, EPOCH).prefill;
        let error = ratio.apply(raw_us).abs_diff(true_us);
        prop_assert!(error <= true_us / 10 + 1000, "{ratio:?}: {} for {true_us}", ratio.apply(raw_us));
    }

    #[test]
    fn nothing_observed_leaves_the_bounds_and_time_leads_back_to_one(
        seen in prop::collection::vec((any::<u64>(), any::<u64>(), 0..10_000_u64, 0..100_000_000_u64), 0..40),
    ) {
        let (mut corrections, mut now) = (Corrections::default(), Time(0));
        for (predicted, observed, applied, pause_us) in seen {
            now = now.after(pause_us);
            corrections.handle(now, &observation(Ratio::from_1024ths(applied), predicted, observed));
            let ratio = corrections.of(now, NODE, EPOCH).prefill;
            prop_assert!((Ratio::MIN..=Ratio::MAX).contains(&ratio));
        }
        let gap = |now| corrections.of(now, NODE, EPOCH).prefill.in_1024ths().abs_diff(1024);
        let mut before = gap(now);
        for _ in 0..200 {
            now = now.after(CORRECTION_HALF_LIFE_US / 7);
            let after = gap(now);
            prop_assert!(after <= before, "it never grows by itself");
            before = after;
        }
        prop_assert_eq!(corrections.of(now, NODE, EPOCH), Correction::default());
    }

    #[test]
    fn a_factor_grows_with_what_it_is_applied_to(ratio in 0..10_000_u64, a: u64, b: u64) {
        let ratio = Ratio::from_1024ths(ratio);
        prop_assert!(ratio.apply(a.min(b)) <= ratio.apply(a.max(b)));
        prop_assert_eq!(Ratio::ONE.apply(a), a);
    }
}

#[test]
fn kinds_and_incarnations_are_apart() {
    let mut corrections = observed(50, 100_000, 300_000);
    let correction = corrections.of(Time(0), NODE, EPOCH);
    assert!(correction.prefill > Ratio::from_1024ths(2900));
    assert_eq!((correction.handover, correction.step), (Ratio::ONE, Ratio::ONE));
    assert_eq!(corrections.of(Time(0), NODE, Epoch(8)), Correction::default());
    let mut late = observation(Ratio::ONE, 100_000, 50_000);
    (late.epoch, late.what) = (Epoch(8), Predicted::Step);
    corrections.handle(Time(0), &late);
    assert_eq!(corrections.of(Time(0), NODE, EPOCH), Correction::default(), "the old incarnation is forgotten");
    let step = corrections.of(Time(0), NODE, Epoch(8)).step;
    assert!(step < Ratio::ONE);
    corrections.handle(Time(0), &observation(Ratio::ONE, 100_000, 500_000));
    assert_eq!(corrections.of(Time(0), NODE, Epoch(8)).step, step, "and has nothing to say any more");
}

#[test]
fn times_too_short_to_mean_anything_change_little() {
    let ratio = observed(100, 10, 200).of(Time(0), NODE, EPOCH).prefill;
    assert!(ratio < Ratio::from_1024ths(1500), "{ratio:?}");
}

#[test]
fn nodes_are_bounded_and_the_longest_silent_one_goes() {
    let mut corrections = Corrections::default();
    for i in 0..CORRECTED_NODES_MAX as u64 + 10 {
        let node = NodeId(i as u16);
        corrections.handle(Time(i), &Observation { node, ..observation(Ratio::ONE, 1_000, 100_000) });
    }
    assert_eq!(corrections.len(), CORRECTED_NODES_MAX);
    assert_eq!(corrections.of(Time(5000), NodeId(9), EPOCH), Correction::default());
    assert_ne!(corrections.of(Time(5000), NodeId(10), EPOCH), Correction::default());
}
