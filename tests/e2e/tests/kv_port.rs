//! The port for KV apart from that for links: what becomes of requests when only one of the two gets through.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::time::Duration;

use millrace_e2e::matrix::Matrix;
use millrace_e2e::matrix::client::Client;
use millrace_e2e::parts::{Line, Plan};
use millrace_e2e::{WAIT_MAX, tiny_model};
use tokio::sync::broadcast::Receiver;
use tokio::time::timeout;

const PROMPT_TOKENS: usize = 420;
const ANSWER_TOKENS: usize = 32;
/// Longest time for an answer where no port for KV can be reached: each decode node is tried in vain for three seconds.
const WALLED_MAX: Duration = Duration::from_secs(20);

/// A prompt takes six tenths of a second, in seven steps.
async fn cluster() -> Matrix {
    let plan = Plan { model: tiny_model(), checksum_us: Some((1500, 3000)), kv_blocks: 256, step_tokens: 64 };
    Matrix::of(&plan).await.unwrap()
}

/// The next line with these words.
async fn next(lines: &mut Receiver<Line>, words: &str) -> String {
    let find = async {
        loop {
            let text = lines.recv().await.unwrap().text;
            if text.contains(words) {
                return text;
            }
        }
    };
    timeout(WAIT_MAX, find).await.unwrap_or_else(|_| panic!("no {words:?} in time"))
}

/// The span that has begun to arrive, as its line says it.
fn span(line: &str) -> String {
    line.split_once("span=").expect("the line names it").1.to_owned()
}

async fn end_of(client: &mut Client) -> serde_json::Value {
    client.read(usize::MAX, WAIT_MAX).await.unwrap();
    client.end.clone().unwrap()
}

#[tokio::test]
async fn kv_that_is_lost_while_its_link_lives_is_sent_again_and_only_that() {
    let mut matrix = cluster().await;
    let asked = matrix.undisturbed(matrix.body(0, PROMPT_TOKENS, ANSWER_TOKENS)).await.unwrap();
    let mut lines = matrix.parts.follow();
    let mut client = matrix.ask(&asked.body).await.unwrap();
    let before = span(&next(&mut lines, "hand-over: cells arrive").await);
    next(&mut lines, "hand-over: cells arrive").await;
    next(&mut lines, "hand-over: cells arrive").await;
    let dropped = |matrix: &Matrix| (0..matrix.parts.parts.len()).map(|part| matrix.parts.relays.dropped(part)).sum::<u64>();
    let calm = dropped(&matrix);
    matrix.parts.relays.set(|weather| weather.lanes_lost = true);
    next(&mut lines, "link to a node down").await;
    assert!(dropped(&matrix) > calm, "no packet was lost");
    matrix.parts.relays.set(|weather| weather.lanes_lost = false);
    next(&mut lines, "hand-over: goes on over another link").await;
    let mut again = vec![span(&next(&mut lines, "hand-over: cells arrive").await)];
    let end = end_of(&mut client).await;
    while let Ok(line) = lines.try_recv() {
        again.extend(line.text.contains("hand-over: cells arrive").then(|| span(&line.text)));
    }
    asked.check(&client.ids).unwrap();
    assert_eq!(client.ids.len(), ANSWER_TOKENS);
    let timings = &end["millrace"];
    assert_eq!((&timings["attempts"], &timings["recomputed_tokens"]), (&1.into(), &0.into()), "{end}");
    assert!(!again.contains(&before), "{before} stood, and came again: {again:?}");
    matrix.parts.whole(WAIT_MAX).await.unwrap();
}

#[tokio::test]
async fn where_no_port_for_kv_can_be_reached_the_log_says_so_and_no_request_hangs() {
    let mut matrix = cluster().await;
    matrix.parts.relays.set(|weather| weather.lanes_lost = true);
    let mut lines = matrix.parts.follow();
    let body = matrix.body(1, PROMPT_TOKENS, ANSWER_TOKENS);
    let mut client = matrix.ask(&body).await.unwrap();
    let failed = next(&mut lines, "attempt failed").await;
    assert!(failed.contains("no connection for KV at UDP 127.0.0.1:"), "{failed}");
    let end = timeout(WALLED_MAX, end_of(&mut client)).await.expect("it hangs");
    assert!(!end["whole"].is_null() || end["error"].is_object(), "{end}");
    // It is remembered: whoever asks next for the same pair of nodes is refused by name, not made to wait.
    let pair = |line: &Line| Some((line.part, line.text.split_once("detail=")?.1.split_whitespace().next()?.to_owned()));
    let (mut waited, mut refused) = (Vec::new(), 0);
    for number in 2..6 {
        let mut client = matrix.ask(&matrix.body(number, PROMPT_TOKENS, ANSWER_TOKENS)).await.unwrap();
        timeout(WALLED_MAX, end_of(&mut client)).await.expect("it hangs");
    }
    // Gateways repeat what the nodes tell them.
    let nodes = |line: &Line| matrix.parts.parts[line.part].name.starts_with("prefill");
    while let Ok(line) = lines.try_recv() {
        waited.extend((nodes(&line) && line.text.contains("cannot be reached: ")).then(|| pair(&line)).flatten());
        refused += u32::from(line.text.contains("could not be reached, and is dialed again: "));
    }
    let pairs: BTreeSet<_> = waited.iter().cloned().collect();
    assert!(pairs.len() == waited.len() && refused > 0, "{waited:?} were waited for, {refused} refused");
    // The wall is opened: nobody has to be told.
    matrix.parts.relays.set(|weather| weather.lanes_lost = false);
    let after = matrix.undisturbed(body.clone()).await.unwrap();
    assert_eq!(after.ids.len(), ANSWER_TOKENS);
    after.check(&client.ids).unwrap();
    let again = async {
        while !lines.try_recv().is_ok_and(|line| line.text.contains("hand-over: all there")) {
            if lines.is_empty() {
                matrix.undisturbed(body.clone()).await.unwrap();
            }
        }
    };
    timeout(WAIT_MAX, again).await.expect("no hand-over after the wall was opened");
    matrix.parts.whole(WAIT_MAX).await.unwrap();
}
