//! Commits a second of three replicas with real syncs to the disk that holds the build, and the time that one commit takes.

use anyhow::{Context, Result};
use millrace_log::bench_commits;

use crate::rebuild;
use crate::report::Row;

/// Commands that wait for their commit at a time, and commands of one run.
const LOADS: [(usize, usize); 3] = [(1, 400), (64, 8_000), (1024, 60_000)];
/// Bytes of a command.
const COMMAND_BYTES: usize = 256;

/// Measures commits at each load. Blocks.
///
/// # Errors
/// A replica does not start or stops.
pub fn measure(runs: usize, quick: bool) -> Result<Vec<Row>> {
    let beside = std::env::current_exe()?;
    let beside = beside.parent().context("the program lies in a folder")?;
    let mut rows = Vec::new();
    for (outstanding, count) in LOADS {
        let count = if quick { count / 8 } else { count };
        let (mut rates, mut p50, mut p99) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..runs {
            let dir = tempfile::tempdir_in(beside)?;
            let bench = bench_commits(dir.path(), outstanding, count, COMMAND_BYTES)?;
            rates.push(bench.commits_per_s);
            p50.push(bench.p50_us as f64);
            p99.push(bench.p99_us as f64);
        }
        let name = format!("raft, 3 replicas, fsync, {COMMAND_BYTES} B, {outstanding} outstanding");
        rows.push(Row::new(format!("{name}, commits/s"), rates));
        rows.push(Row::new(format!("{name}, median us"), p50));
        rows.push(Row::new(format!("{name}, 99th percentile us"), p99));
    }
    rows.extend(rebuild::measure(beside, if quick { 1_000_000 } else { 10_000_000 }, runs)?);
    Ok(rows)
}
