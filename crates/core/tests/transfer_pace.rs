//! Whose turn it is on a link, as properties: whatever comes, spans of one hand-over keep their order, the link is neither idle nor flooded,
//! a short hand-over passes a long one, and nothing starves.

use std::collections::BTreeMap;

use millrace_core::ids::{AttemptId, Generation, RequestId, Time};
use millrace_core::transfer::Span;
use millrace_core::transfer::pace::{Claim, ON_THE_WAY_MAX, PATIENCE_MAX_US, Pace, Waiting, due, priority};
use proptest::prelude::*;

/// Spans that go alone.
const SPAN_BYTES: u64 = ON_THE_WAY_MAX;
/// A link of 8 Gb/s: what one span takes.
const SPAN_US: u64 = SPAN_BYTES / 1_000;
const FOREVER: Time = Time(u64::MAX);

fn attempt(id: usize) -> AttemptId {
    AttemptId { request: RequestId(id as u128), attempt: 0 }
}

fn span(block: u32, since: Time) -> Waiting {
    let span = Span { layer: 0, layers: 1, block, blocks: 1 };
    Waiting { span, generation: Generation(1), bytes: SPAN_BYTES, since }
}

/// A hand-over: when its spans are ready, how many, and whether anybody waits for it.
#[derive(Clone, Debug)]
struct Transfer {
    at_us: u64,
    spans: u32,
    awaited: bool,
}

fn transfer(spans: std::ops::Range<u32>) -> impl Strategy<Value = Transfer> {
    (0..3_000_000u64, spans, any::<bool>()).prop_map(|(at_us, spans, awaited)| Transfer { at_us, spans, awaited })
}

/// Sends all over one link, a span at a time; gives who went when, in order: attempt, block, moment.
fn run(transfers: &[Transfer]) -> Vec<(usize, u32, u64)> {
    let mut pace = Pace::default();
    let mut coming: BTreeMap<(u64, usize), &Transfer> = transfers.iter().enumerate().map(|(id, t)| ((t.at_us, id), t)).collect();
    let (mut now, mut went) = (0, Vec::new());
    let claim = |of: AttemptId| Claim { awaited: transfers[of.request.0 as usize].awaited, unissued_bytes: 0, deadline: FOREVER };
    loop {
        while let Some(((at, id), transfer)) = coming.first_key_value().filter(|((at, _), _)| *at <= now).map(|(key, t)| (*key, *t))
        {
            coming.remove(&(at, id));
            (0..transfer.spans).for_each(|block| pace.wait(attempt(id), span(block, Time(at))));
        }
        let Some((of, waiting, _)) = pace.next(Time(now), claim) else {
            let Some(((at, _), _)) = coming.first_key_value() else { return went };
            assert!(pace.is_empty(), "the link is idle and a span waits");
            now = *at;
            continue;
        };
        assert!(pace.next(Time(now), claim).is_none(), "more on its way than may be");
        pace.check();
        went.push((of.request.0 as usize, waiting.span.block, now));
        now += SPAN_US;
        pace.drained(SPAN_BYTES);
    }
}

proptest! {
    #[test]
    fn a_hand_over_keeps_its_order_and_nothing_starves(transfers in prop::collection::vec(transfer(1..40), 1..40)) {
        let went = run(&transfers);
        prop_assert_eq!(went.len() as u32, transfers.iter().map(|t| t.spans).sum::<u32>());
        let mut next = vec![0; transfers.len()];
        let mut turns: Vec<u64> = transfers.iter().map(|t| t.at_us).collect();
        for (id, block, at) in went {
            prop_assert_eq!(next[id], block);
            next[id] += 1;
            // When its patience is at an end, each of the others goes before it once at most.
            let latest = turns[id] + PATIENCE_MAX_US + transfers.len() as u64 * SPAN_US;
            prop_assert!(at <= latest, "span {block} of {id} went at {at}, {latest} at the latest");
            turns[id] = at;
        }
    }

    #[test]
    fn a_short_one_passes_a_long_one(at_us in 10_000..1_000_000u64, short in 1..4u32) {
        let long = Transfer { at_us: 0, spans: 180, awaited: true };
        let went = run(&[long, Transfer { at_us, spans: short, awaited: true }]);
        let last = went.iter().rfind(|(id, ..)| *id == 1).expect("all went").2;
        // One span of the other was on its way already.
        prop_assert!(last <= at_us + u64::from(short) * SPAN_US, "{last} for one that came at {at_us}");
    }

    #[test]
    fn patience_grows_with_what_is_left_and_ends(
        since in 0..u64::from(u32::MAX), left: u64, more: u64, awaited: bool, deadline in 0..u64::from(u32::MAX),
    ) {
        let claim = Claim { awaited, unissued_bytes: 0, deadline: Time(deadline) };
        let at = due(Time(since), left, &claim);
        prop_assert!(at <= due(Time(since), left.saturating_add(more), &claim));
        prop_assert!(at <= Time(since).after(PATIENCE_MAX_US) && at <= claim.deadline);
        prop_assert!(due(Time(since), left, &Claim { awaited: true, ..claim }) <= at, "nobody waits less for it");
        prop_assert!(priority(at) >= priority(at.after(more % PATIENCE_MAX_US)));
    }
}

#[test]
fn one_that_hides_behind_compute_lets_one_pass_for_which_a_client_waits() {
    let hidden = Transfer { at_us: 0, spans: 20, awaited: false };
    let went = run(&[hidden, Transfer { at_us: 50_000, spans: 5, awaited: true }]);
    let first = went.iter().position(|(id, ..)| *id == 1).expect("it went");
    assert!(went[first..first + 5].iter().all(|(id, ..)| *id == 1), "{went:?}");
}

#[test]
fn long_ones_take_turns() {
    let long = Transfer { at_us: 0, spans: 100, awaited: true };
    let went = run(&[long.clone(), long]);
    let (first, second) = went[..100].iter().fold((0, 0), |(a, b), (id, ..)| if *id == 0 { (a + 1, b) } else { (a, b + 1) });
    assert!((45..=55).contains(&first), "{first} and {second} of the first hundred");
}

#[test]
fn as_much_is_on_its_way_as_may_be_and_what_is_over_waits_no_more() {
    let mut pace = Pace::default();
    let claim = |_| Claim { awaited: true, unissued_bytes: 0, deadline: FOREVER };
    let small = |block| Waiting { bytes: ON_THE_WAY_MAX / 8, ..span(block, Time(0)) };
    (0..20).for_each(|block| pace.wait(attempt(1), small(block)));
    let mut went = 0;
    while let Some((_, waiting, _)) = pace.next(Time(9), claim) {
        went += waiting.bytes;
    }
    assert_eq!(went, ON_THE_WAY_MAX);
    pace.wait(attempt(2), small(0));
    pace.forget(attempt(1));
    assert!(pace.next(Time(9), claim).is_none(), "what is on its way is so, whoever it is of");
    pace.drained(ON_THE_WAY_MAX / 8);
    assert_eq!(pace.next(Time(9), claim).map(|(of, ..)| of), Some(attempt(2)));
    assert!(pace.is_empty());
    // One that is larger than all that may be on its way goes alone.
    pace.drained(went);
    pace.wait(attempt(3), Waiting { bytes: 3 * ON_THE_WAY_MAX, ..span(0, Time(9)) });
    assert!(pace.next(Time(9), claim).is_some());
}
