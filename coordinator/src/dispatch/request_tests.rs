//! The rules of one request: order, repeats, holes, migration, time.

use millrace_core::ids::Epoch;
use millrace_core::message::Finish;
use millrace_core::sampling::Sampling;

use super::*;

const P: NodeId = NodeId(1);
const D: NodeId = NodeId(2);

fn sampling() -> Sampling {
    Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 1, max_new: 8, eos: vec![], ignore_eos: false }
}

fn prompt() -> Prompt {
    Prompt {
        tokens: vec![10, 11, 12],
        sampling: sampling(),
        tenant: "default".into(),
        cache_salt: vec![],
        answer: None,
        budget: Duration::from_secs(300),
        ttft_max: None,
        trace: [0; 25],
    }
}

fn peer(node: NodeId) -> Peer {
    Peer { node, epoch: Epoch(u64::from(node.0)), name: format!("n{node}"), address: String::new() }
}

fn started() -> (Request, Instant) {
    let now = Instant::now();
    let mut request = Request::new(now, RequestId(9), prompt());
    assert_eq!(request.poll(), Some(Effect::Place));
    request.placed(now, peer(P), Some(peer(D)));
    (request, now)
}

fn out(attempt: u16, index: u32) -> TokenOut {
    let attempt = AttemptId { request: RequestId(9), attempt };
    TokenOut { attempt, index, token: 100 + index, logprob: -0.5, prefill: None, finish: None }
}

fn drain(request: &mut Request) -> Vec<Effect> {
    std::iter::from_fn(|| request.poll()).collect()
}

fn delivered_tokens(effects: &[Effect]) -> Vec<u32> {
    let index = |e: &Effect| match e {
        Effect::Deliver(Event::Token { index, .. }) => Some(*index),
        _ => None,
    };
    effects.iter().filter_map(index).collect()
}

fn failure(effects: &[Effect]) -> Option<FailureKind> {
    effects.iter().find_map(|e| match e {
        Effect::Deliver(Event::Failed { kind, .. }) => Some(*kind),
        _ => None,
    })
}

#[test]
fn tokens_are_delivered_once_and_in_order() {
    let (mut request, t) = started();
    for (from, index) in [(D, 1), (P, 0), (P, 0), (D, 3), (D, 1), (D, 2)] {
        request.token(t, from, out(0, index));
    }
    assert_eq!(delivered_tokens(&drain(&mut request)), [0, 1, 2, 3]);
    request.token(t, D, out(7, 4));
    request.token(t, NodeId(3), out(0, 4));
    assert_eq!(drain(&mut request), [], "another attempt's token and a stranger's do not count");
}

#[test]
fn the_last_token_finishes_with_the_truth_about_the_cache() {
    let (mut request, t) = started();
    let stats = PrefillStats { node: "n1".into(), cached_tokens: 2, queue_us: 1, compute_us: 2 };
    request.token(t, P, TokenOut { prefill: Some(stats.clone()), ..out(0, 0) });
    request.token(t, D, TokenOut { finish: Some(Finish::Length), ..out(0, 1) });
    let effects = drain(&mut request);
    let Some(Effect::Deliver(Event::Finished { finish: Finish::Length, usage })) = effects.last() else { panic!("{effects:?}") };
    assert_eq!((usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens), (3, 2, 2));
    assert_eq!(usage.timings.prefill, Some(stats));
    assert_eq!(usage.timings.decode_node.as_deref(), Some("n2"));
    assert!(request.ended() && !effects.iter().any(|e| matches!(e, Effect::Cancel(..))));
}

#[test]
fn what_later_attempts_compute_again_is_counted() {
    let (mut request, t) = started();
    let stats = |cached_tokens| Some(PrefillStats { cached_tokens, ..PrefillStats::default() });
    request.token(t, P, TokenOut { prefill: stats(0), ..out(0, 0) });
    request.token(t, D, out(0, 1));
    request.lost(t, D);
    request.placed(t, peer(P), None);
    request.token(t, P, TokenOut { prefill: stats(3), finish: Some(Finish::Length), ..out(1, 2) });
    let effects = drain(&mut request);
    let Some(Effect::Deliver(Event::Finished { usage, .. })) = effects.last() else { panic!("{effects:?}") };
    assert_eq!(usage.timings.recomputed_tokens, 3 + 2 - 3, "prompt and answer so far, but for what was cached");
}

#[test]
fn a_lost_node_moves_the_request_with_what_was_delivered() {
    let (mut request, t) = started();
    request.token(t, P, out(0, 0));
    request.token(t, D, out(0, 1));
    drain(&mut request);
    request.lost(t, P);
    assert_eq!(drain(&mut request), [], "prefill has done its part");
    request.lost(t, D);
    let id = AttemptId { request: RequestId(9), attempt: 0 };
    assert_eq!(drain(&mut request), [Effect::Cancel(peer(P), id), Effect::Cancel(peer(D), id), Effect::Place]);
    assert_eq!(request.tokens(), [10, 11, 12, 100, 101]);
    assert_eq!(request.avoid().iter().copied().collect::<Vec<_>>(), [D]);
    assert_eq!(request.next_attempt().attempt, 1);
    request.placed(t, peer(P), None);
    request.token(t, D, out(0, 2));
    assert_eq!(drain(&mut request), [], "the old attempt is over");
    request.token(t, P, out(1, 2));
    assert_eq!(delivered_tokens(&drain(&mut request)), [2]);
}

#[test]
fn a_broken_attempt_is_placed_once_again() {
    let (mut request, t) = started();
    request.lost(t, P);
    request.on_time(t);
    let places = drain(&mut request).into_iter().filter(|e| *e == Effect::Place).count();
    assert_eq!(places, 1);
}

#[test]
fn prefill_is_needed_until_the_hand_over() {
    let (mut request, t) = started();
    request.token(t, P, out(0, 0));
    drain(&mut request);
    request.lost(t, P);
    assert_eq!(drain(&mut request).last(), Some(&Effect::Place));
    assert!(request.avoid().contains(&P));
}

#[test]
fn who_reports_is_not_always_who_failed() {
    for (from, kind, avoided) in [
        (P, FailKind::PeerLost, Some(D)),
        (D, FailKind::PeerLost, Some(P)),
        (D, FailKind::Integrity, Some(P)),
        (D, FailKind::Engine, Some(D)),
        (P, FailKind::NoRoom, None),
    ] {
        let (mut request, t) = started();
        let attempt = AttemptId { request: RequestId(9), attempt: 0 };
        request.failed(t, from, AttemptFailed { attempt, kind, detail: String::new() });
        assert_eq!(request.avoid().iter().copied().next(), avoided, "{kind:?} from {from}");
        assert!(!request.ended());
    }
}

#[test]
fn a_drained_node_is_left_with_its_kv_and_did_not_fail() {
    let (mut request, t) = started();
    request.drained(t);
    assert_eq!((drain(&mut request), request.decoding()), (vec![], None), "the prompt is not there yet");
    request.token(t, P, out(0, 0));
    request.token(t, D, out(0, 1));
    drain(&mut request);
    assert_eq!(request.decoding(), Some(&peer(D)));
    request.drained(t);
    let id = AttemptId { request: RequestId(9), attempt: 0 };
    assert_eq!(drain(&mut request), [Effect::Cancel(peer(P), id), Effect::Cancel(peer(D), id), Effect::Place]);
    assert_eq!((request.holder(), request.avoid().len()), (Some(D), 0));
    request.placed(t, peer(D), Some(peer(NodeId(3))));
    assert_eq!(request.holder(), None);
    let stats = PrefillStats { node: "n2".into(), cached_tokens: 4, queue_us: 1, compute_us: 2 };
    request.token(t, D, TokenOut { prefill: Some(stats), ..out(1, 2) });
    request.token(t, NodeId(3), TokenOut { finish: Some(Finish::Length), ..out(1, 3) });
    let effects = drain(&mut request);
    assert_eq!(delivered_tokens(&effects), [2, 3]);
    let Some(Effect::Deliver(Event::Finished { usage, .. })) = effects.last() else { panic!("{effects:?}") };
    assert_eq!((usage.completion_tokens, usage.timings.attempts, usage.timings.recomputed_tokens), (4, 2, 1));
}

#[test]
fn one_that_comes_back_to_a_drained_node_stays() {
    let (mut request, t) = started();
    request.token(t, P, out(0, 0));
    request.token(t, D, out(0, 1));
    request.drained(t);
    request.placed(t, peer(D), None);
    request.token(t, D, out(1, 2));
    drain(&mut request);
    request.drained(t);
    assert_eq!(drain(&mut request), []);
}

#[test]
fn attempts_are_bounded() {
    let (mut request, t) = started();
    for _ in 1..ATTEMPTS_MAX {
        request.lost(t, P);
        assert_eq!(drain(&mut request).last(), Some(&Effect::Place));
        request.placed(t, peer(P), None);
    }
    request.lost(t, P);
    assert_eq!(failure(&drain(&mut request)), Some(FailureKind::Attempts));
}

#[test]
fn a_bad_ticket_is_not_tried_again() {
    let (mut request, t) = started();
    let attempt = AttemptId { request: RequestId(9), attempt: 0 };
    request.failed(t, P, AttemptFailed { attempt, kind: FailKind::BadTicket, detail: "too long".into() });
    assert_eq!(failure(&drain(&mut request)), Some(FailureKind::Rejected));
}

#[test]
fn what_no_pool_can_hold_is_tried_elsewhere_and_then_refused_without_a_wait() {
    let (mut request, t) = started();
    let too_large = |attempt: u16| {
        let attempt = AttemptId { request: RequestId(9), attempt };
        AttemptFailed { attempt, kind: FailKind::TooLarge, detail: "5 blocks needed, 4 are the most".into() }
    };
    request.failed(t, P, too_large(0));
    assert!(drain(&mut request).contains(&Effect::Place), "other pools may be larger");
    assert_eq!(request.avoid().iter().copied().collect::<Vec<_>>(), [P, D]);
    request.placed(t, peer(P), None); // there are no others
    request.failed(t, P, too_large(1));
    assert_eq!(failure(&drain(&mut request)), Some(FailureKind::TooLarge));
}

#[test]
fn without_nodes_it_waits_and_then_fails() {
    let t = Instant::now();
    let mut request = Request::new(t, RequestId(9), prompt());
    let (mut now, mut tries) = (t, 0);
    while !request.ended() {
        match request.poll() {
            Some(Effect::Place) => {
                tries += 1;
                request.unplaced(now, false, "no prefill node".into());
            }
            Some(_) => {}
            None => {
                now = request.deadline();
                request.on_time(now);
            }
        }
    }
    assert!(now >= t + NODES_WAIT_MAX && now <= t + NODES_WAIT_MAX + PAUSE.1 * 2);
    assert!((5..30).contains(&tries), "{tries}");
    assert_eq!(failure(&drain(&mut request)), Some(FailureKind::NoNodes));
}

#[test]
fn silence_breaks_an_attempt_and_the_budget_ends_the_request() {
    let (mut request, t) = started();
    request.on_time(t + FIRST_TOKEN_WAIT_MAX / 2);
    assert_eq!(drain(&mut request), []);
    request.on_time(request.deadline());
    assert_eq!(drain(&mut request).last(), Some(&Effect::Place));
    request.placed(t + FIRST_TOKEN_WAIT_MAX, peer(P), None);
    request.on_time(t + Duration::from_secs(300));
    assert_eq!(failure(&drain(&mut request)), Some(FailureKind::Deadline));
}

#[test]
fn a_hole_breaks_the_attempt() {
    let (mut request, t) = started();
    request.token(t, D, out(0, 1));
    request.token(t + GAP_WAIT_MAX / 2, D, out(0, 2));
    request.on_time(t + GAP_WAIT_MAX);
    assert_eq!(drain(&mut request).last(), Some(&Effect::Place));
    assert_eq!(request.delivered(), 0);
}

#[test]
fn a_request_that_another_gateway_began_goes_on_after_what_its_client_has() {
    let now = Instant::now();
    let delivered = Delivered { tokens: vec![100, 101], cached_tokens: 1 };
    let mut request = Request::resumed(now, RequestId(9), prompt(), delivered);
    assert_eq!((request.tokens(), request.delivered()), (vec![10, 11, 12, 100, 101], 2));
    assert_eq!(request.next_attempt().attempt, 1, "the lost attempt counts");
    request.poll();
    request.placed(now, peer(P), None);
    let stats = PrefillStats { node: "n1".into(), cached_tokens: 3, queue_us: 0, compute_us: 0 };
    request.token(now, P, TokenOut { prefill: Some(stats), ..out(1, 2) });
    request.token(now, P, TokenOut { finish: Some(Finish::Length), ..out(1, 3) });
    let effects = drain(&mut request);
    assert_eq!(delivered_tokens(&effects), [2, 3]);
    let Some(Effect::Deliver(Event::Finished { usage, .. })) = effects.last() else { panic!("{effects:?}") };
    assert_eq!((usage.completion_tokens, usage.cached_tokens, usage.timings.attempts), (4, 1, 2), "what the first attempt found");
    let fresh = Request::resumed(now, RequestId(9), prompt(), Delivered::default());
    assert_eq!((fresh.delivered(), fresh.next_attempt().attempt), (0, 0));
}
