//! The leader is killed, stopped, and cut off in either direction, under load: the short form of `make bench BENCH_ARGS="--only faults"`.
//! Every request must be right; how long the others took to find a new leader is printed, not judged: the machine may be busy.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use millrace_e2e::process;

/// Longest time for five faults.
const WAIT_MAX: Duration = Duration::from_secs(300);

#[tokio::test]
async fn nobody_notices_that_the_leader_is_lost() {
    let ended = process::run("millbench", &["--only", "faults", "--quick"], WAIT_MAX).await;
    println!("{}", ended.stdout);
    assert_eq!(ended.code, Some(0), "{}\n{}", ended.stdout, ended.stderr);
    for fault in ["leader killed", "leader stopped"] {
        let row = format!("| {fault}");
        assert!(ended.stdout.lines().any(|line| line.starts_with(&row)), "no row of {fault}:\n{}", ended.stdout);
    }
}
