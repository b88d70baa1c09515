//! Damaged KV is never decoded, undamaged KV always is, and an abort leaves nothing: a share of the long run (`make sim CORRUPTIONS=100000`).

use millrace_sim::corruption::CORRUPTIONS;
use millrace_sim::{aborts, corruption};

#[test]
fn no_damaged_hand_over_is_decoded_and_no_clean_one_refused() {
    let report = corruption::run(1, 6_000, 20_000);
    assert!(report.holds(), "{report}");
    assert_eq!(report.by_kind.len(), CORRUPTIONS.len());
}

#[test]
fn aborts_in_every_state_leave_nothing() {
    let report = aborts::run(1, 300);
    assert!(report.aborts() >= 300, "{report}");
}
