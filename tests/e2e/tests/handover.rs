//! What becomes of a hand-over and of what decodes when its client, its link or its node goes away on purpose, on real processes whose every
//! step is logged: nothing is kept, nothing is sent twice, nothing is computed twice.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use millrace_e2e::parts::{Line, Parts, Plan};
use millrace_e2e::relay::HANDOVER_WAYS;
use millrace_e2e::stream::{Answer, End, Events, complete};
use millrace_e2e::{WAIT_MAX, full, tiny_model};
use serde_json::{Value, json};
use tokio::sync::broadcast::Receiver;
use tokio::time::timeout;

const COMPLETIONS: &str = "/v1/completions";
/// A busy machine may take too long to go on with a hand-over; then a new ticket is made, and the test tries again.
const TRIES_MAX: usize = 4;
/// A node that was stopped is gone within this: it is bound by `DRAIN_MAX_US`, and hands over long before.
const STOP_WAIT_MAX: Duration = Duration::from_secs(15);
/// Tokens of a block.
const BLOCK_TOKENS: u64 = 16;

/// Engine time of a token on prefill and on decode nodes, microseconds.
async fn parts(checksum_us: (u64, u64)) -> Parts {
    let plan = Plan { model: tiny_model(), checksum_us: Some(checksum_us), kv_blocks: 256, step_tokens: 64 };
    Parts::start(&plan).await.unwrap()
}

fn body(parts: &Parts, (prompt_tokens, answer_tokens): (usize, usize), salt: &str) -> Value {
    let prompt: Vec<u32> = (0..prompt_tokens as u32).map(|i| 3 + i * 7 % 290).collect();
    json!({
        "model": parts.model, "prompt": prompt, "max_tokens": answer_tokens, "ignore_eos": true, "return_token_ids": true,
        "temperature": 0, "stream": true, "millrace_timings": true, "cache_salt": salt,
    })
}

/// The next line that has all of `words`.
async fn next(lines: &mut Receiver<Line>, words: &[&str]) -> Line {
    let find = async {
        loop {
            let line = lines.recv().await.unwrap();
            if words.iter().all(|word| line.text.contains(word)) {
                return line;
            }
        }
    };
    timeout(WAIT_MAX, find).await.unwrap_or_else(|_| panic!("nobody says {words:?}"))
}

/// All lines that were written and not read, as long as more come.
async fn rest(lines: &mut Receiver<Line>) -> Vec<Line> {
    let mut all = Vec::new();
    while let Ok(Ok(line)) = timeout(Duration::from_millis(300), lines.recv()).await {
        all.push(line);
    }
    all
}

/// The value after `key` in a line.
fn word<'a>(line: &'a str, key: &str) -> &'a str {
    let at = line.find(key).unwrap_or_else(|| panic!("no {key} in {line}"));
    line[at + key.len()..].split_whitespace().next().unwrap_or_default().trim_matches('"')
}

fn number(line: &str, key: &str) -> u64 {
    word(line, key).parse().unwrap_or_else(|e| panic!("{key} in {line}: {e}"))
}

/// Reads until the answer has so many tokens.
async fn read(events: &mut Events, answer: &mut Answer, tokens: usize) {
    while answer.ids.len() < tokens {
        answer.add(events.next().await.unwrap().expect("the stream goes on"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_frees_what_both_nodes_hold() {
    const ROUNDS: usize = 12;
    let rounds = if full() { ROUNDS * 5 } else { ROUNDS };
    let mut parts = parts((500, 5_000)).await;
    let mut took = Vec::new();
    for round in 0..rounds {
        let mut lines = parts.follow();
        let mut events = Events::open(parts.http, COMPLETIONS, &body(&parts, (300, 200), &round.to_string())).await.unwrap();
        let placed = next(&mut lines, &[": placed attempt="]).await;
        let attempt = word(&placed.text, "attempt=").to_owned();
        // In every third round it computes and sends, in the others it decodes.
        match round % 3 {
            0 => drop(next(&mut lines, &["hand-over: cells arrive", &attempt]).await),
            _ => read(&mut events, &mut Answer::default(), 2 + round).await,
        }
        drop(events);
        let left = Instant::now();
        let freed = next(&mut lines, &["nothing of it is left", &attempt]).await;
        if round % 3 == 0 {
            let other = next(&mut lines, &["nothing of it is left", &attempt]).await;
            assert_ne!(freed.part, other.part, "both nodes had a part in it");
        }
        took.push(left.elapsed());
    }
    took.sort_unstable();
    println!("a client leaves: all free after {:?} in the middle of {rounds}, {:?} at most", took[rounds / 2], took[rounds - 1]);
    parts.whole(WAIT_MAX).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_whose_link_is_lost_goes_on_and_what_stands_is_not_sent_again() {
    let mut parts = parts((3_000, 2_000)).await;
    let right = complete(parts.http, COMPLETIONS, &body(&parts, (420, 40), "undisturbed")).await;
    assert_eq!((&right.end, right.ids.len()), (&End::Whole, 40));
    for number in 0..TRIES_MAX {
        parts.whole(WAIT_MAX).await.unwrap();
        if let Some(resumed) = cut(&mut parts, &right, &number.to_string()).await {
            let Resumed { lost, all, stood, again } = resumed;
            println!("{lost} packets lost; {stood} of {all} cells stood, {again} were sent after that");
            assert!(stood > 0, "something stood");
            // A span of which a part stands is sent whole.
            assert!(all - stood <= again && again < all, "{again} cells were sent again, {stood} of {all} stood");
            return parts.whole(WAIT_MAX).await.map(drop).unwrap();
        }
    }
    panic!("no hand-over went on after a lost link in {TRIES_MAX} tries");
}

/// How a hand-over went on.
struct Resumed {
    /// Packets that the relays lost.
    lost: u64,
    /// Cells of the hand-over, those that stood when it went on, and those that were sent after that.
    all: u64,
    stood: u64,
    again: u64,
}

/// Cuts the way from the prefill to the decode node in the middle of a hand-over, until the decode node has given the link up. The tokens are
/// right in any case; `None` when a new ticket was made, because the machine was too busy to go on in time.
async fn cut(parts: &mut Parts, right: &Answer, salt: &str) -> Option<Resumed> {
    let mut lines = parts.follow();
    let events = Events::open(parts.http, COMPLETIONS, &body(parts, (420, 40), salt)).await.unwrap();
    let answer = tokio::spawn(events.collect(Answer::default()));
    let placed = next(&mut lines, &[": placed attempt="]).await;
    let attempt = word(&placed.text, "attempt=").to_owned();
    let decode = parts.find(word(&placed.text, "decode=")).unwrap();
    next(&mut lines, &["hand-over: cells arrive", &attempt]).await;
    let before = parts.relays.dropped(decode);
    parts.relays.set(|weather| weather.lost = vec![HANDOVER_WAYS[0]]);
    while next(&mut lines, &[": link to a node down"]).await.part != decode {}
    let lost = parts.relays.dropped(decode) - before;
    assert!(lost > 0, "no packet was lost: the link was not cut");
    parts.relays.set(|weather| weather.lost.clear());

    let answer = timeout(WAIT_MAX, answer).await.unwrap().unwrap();
    assert_eq!((&answer.end, &answer.ids), (&End::Whole, &right.ids));
    if answer.timings["attempts"] != 1 {
        return None;
    }
    let lines = rest(&mut lines).await;
    let (asks, stands) = ("hand-over: goes on over another link", "hand-over: what stands");
    let mine: Vec<&str> = lines.iter().map(|line| line.text.as_str()).filter(|text| text.contains(&attempt)).collect();
    let count = |what: &str| mine.iter().filter(|text| text.contains(what)).count();
    assert_eq!((count(asks), count(stands)), (1, 1), "the sender asks and the receiver says: {mine:#?}");
    let find = |what: &str| mine.iter().find(|text| text.contains(what)).copied().unwrap_or_else(|| panic!("no {what}: {mine:#?}"));
    let (all, stood) = (number(find("hand-over: manifest leaves"), "cells="), number(find(stands), "cells="));
    // Lines of one process are in order; spans leave after the receiver has said what stands, so after the question.
    let later = mine.iter().skip_while(|text| !text.contains(asks)).filter(|text| text.contains("hand-over: cells leave"));
    Some(Resumed { lost, all, stood, again: later.map(|text| number(text, "cells=")).sum() })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_node_that_is_stopped_hands_over_what_it_decodes_and_ends() {
    let mut parts = parts((200, 10_000)).await;
    let right = complete(parts.http, COMPLETIONS, &body(&parts, (200, 200), "undisturbed")).await;
    assert_eq!((&right.end, right.ids.len()), (&End::Whole, 200));
    parts.whole(WAIT_MAX).await.unwrap();

    let mut lines = parts.follow();
    let mut events = Events::open(parts.http, COMPLETIONS, &body(&parts, (200, 200), "stopped")).await.unwrap();
    let placed = next(&mut lines, &[": placed attempt="]).await;
    let decode = parts.find(word(&placed.text, "decode=")).unwrap();
    let mut answer = Answer::default();
    read(&mut events, &mut answer, 20).await;
    let stopped = Instant::now();
    let code = parts.stop(decode, STOP_WAIT_MAX).await.unwrap();
    let (gone, had) = (stopped.elapsed(), answer.ids.len());
    let answer = timeout(WAIT_MAX, events.collect(answer)).await.unwrap();
    assert_eq!((&answer.end, &answer.ids), (&End::Whole, &right.ids));
    let number = |key: &str| answer.timings[key].as_u64().unwrap();
    println!("stopped after {had} tokens: gone after {gone:?}, {} tokens computed again", number("recomputed_tokens"));
    assert_eq!(code, Some(0), "it ends by itself");
    assert_eq!(number("attempts"), 2, "{}", answer.timings);
    // Its last block was not full, and the last token of a prompt is always computed.
    assert!(number("recomputed_tokens") <= BLOCK_TOKENS, "{}", answer.timings);
    parts.spawn(decode).unwrap();
    parts.whole(WAIT_MAX).await.unwrap();
}
