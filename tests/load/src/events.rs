//! Block events a second through three replicas, from the delta to the index of each, with real syncs to the disk that holds the build.

use std::time::Duration;

use anyhow::{Context, Result};
use coordinator::event_bench::{EventLoad, bench_events};

use crate::machine::cpu_s;
use crate::report::Row;

/// Blocks in the index while it is measured.
const BLOCKS: u64 = 1 << 20;
/// What is to be reached, and what there can be.
const LOADS: [(&str, Option<f64>); 2] = [("1,000,000 offered", Some(1e6)), ("as many as there can be", None)];

/// Measures each load. Blocks.
///
/// # Errors
/// A replica does not start or stops.
pub fn measure(runs: usize, quick: bool) -> Result<Vec<Row>> {
    let beside = std::env::current_exe()?;
    let beside = beside.parent().context("the program lies in a folder")?;
    let duration = Duration::from_secs(if quick { 1 } else { 5 });
    let mut rows = Vec::new();
    for (title, events_per_s) in LOADS {
        let (mut rates, mut p50, mut p99, mut entries, mut cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..runs {
            let dir = tempfile::tempdir_in(beside)?;
            let load = EventLoad { blocks: BLOCKS, events_per_s, duration };
            let (before, bench) = (cpu_s(), bench_events(dir.path(), load)?);
            // Filling counts too: all events that the replicas applied.
            let events = bench.events_per_s * duration.as_secs_f64() + BLOCKS as f64;
            cpu.push((cpu_s() - before) / events * 1e6);
            rates.push(bench.events_per_s);
            p50.push(bench.p50_us as f64 / 1e3);
            p99.push(bench.p99_us as f64 / 1e3);
            entries.push(bench.events_per_entry);
        }
        let name = format!("block events, 3 replicas, fsync, index of 1 Mi blocks, {title}");
        rows.push(Row::new(format!("{name}, events/s"), rates));
        rows.push(Row::new(format!("{name}, commit median ms"), p50));
        rows.push(Row::new(format!("{name}, commit 99th percentile ms"), p99));
        rows.push(Row::new(format!("{name}, events in an entry"), entries));
        rows.push(Row::new(format!("{name}, processor seconds for 1 M events, all three"), cpu));
    }
    Ok(rows)
}
