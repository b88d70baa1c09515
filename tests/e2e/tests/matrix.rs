//! A share of the failure matrix and of the migrations; `make matrix` runs all. `MILLRACE_MATRIX_SEED` chooses another share.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use millrace_e2e::{full, process};

/// Longest time for the share; the whole takes longer.
const WAIT_MAX: Duration = Duration::from_secs(600);
/// Cases of the share.
const SHARE: usize = 12;
/// One of so many losses of a decode node.
const MIGRATE_EACH: usize = 16;

#[tokio::test]
async fn whoever_is_lost_in_whichever_state_the_answer_is_the_same_and_nothing_stays_behind() {
    let seed: usize = std::env::var("MILLRACE_MATRIX_SEED").map_or(0, |seed| seed.parse().unwrap());
    let share = if full() { usize::MAX } else { SHARE };
    let (seed, share, each) = (seed.to_string(), share.to_string(), MIGRATE_EACH.to_string());
    let ended = process::run(
        "millmatrix",
        &["--seed", &seed, "--share", &share, "--migrate-each", &each],
        if full() { WAIT_MAX * 6 } else { WAIT_MAX },
    )
    .await;
    println!("{}", ended.stdout);
    assert_eq!(ended.code, Some(0), "{}\n{}", ended.stdout, ended.stderr);
    assert!(ended.stdout.contains("cases held"), "{}", ended.stdout);
}

#[tokio::test]
async fn a_model_in_f32_goes_on_with_the_same_tokens_when_its_decode_node_is_killed() {
    let ended = process::run("millmatrix", &["--share", "0", "--migrate-each", "0", "--model-migrate-each", "22"], WAIT_MAX).await;
    println!("{}", ended.stdout);
    assert_eq!(ended.code, Some(0), "{}\n{}", ended.stdout, ended.stderr);
    assert!(ended.stdout.contains("answers equal"), "{}", ended.stdout);
}
