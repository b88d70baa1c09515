//! Commits a second of three replicas in one process: real logs with real syncs, channels in place of a network.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{ProposeError, RaftConfig, RaftHandle, RaftStartError, RestoreError, Role, StateMachine, start};

const REPLICAS: u64 = 3;
const OUTGOING_FRAMES_MAX: usize = 4096;
/// How long the bench waits for a leader before it gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// What [`bench_commits`] measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CommitBench {
    /// Commands committed, applied and answered a second.
    pub commits_per_s: f64,
    /// Median time from proposal to answer, in microseconds.
    pub p50_us: u64,
    /// 99th percentile of the same.
    pub p99_us: u64,
}

/// Why the bench has no result.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A replica did not start.
    #[error(transparent)]
    Start(#[from] RaftStartError),
    /// A replica stopped or no leader was found in time.
    #[error("the replicas stopped committing: {0}")]
    Stalled(ProposeError),
    /// No runtime for the proposers.
    #[error("no runtime: {0}")]
    Runtime(#[from] std::io::Error),
}

/// A state machine with nothing to do.
struct Nothing;

impl StateMachine for Nothing {
    type State = ();

    fn apply(&mut self, _: u64, _: &[u8]) -> Vec<u8> {
        Vec::new()
    }

    fn view(&self) {}

    fn encode((): &()) -> Vec<u8> {
        Vec::new()
    }

    fn decode(_: &[u8]) -> Result<(), RestoreError> {
        Ok(())
    }

    fn install(&mut self, (): ()) {}
}

/// Commits `count` commands of `bytes` bytes, `outstanding` at a time, through three replicas with their logs under `dir`
/// (which should be empty). Blocks; not to be called from within a tokio runtime.
///
/// # Errors
/// A replica did not start, or stopped, or none came to lead.
pub fn bench_commits(dir: &Path, outstanding: usize, count: usize, bytes: usize) -> Result<CommitBench, BenchError> {
    let replicas = start_replicas(dir, |_| Nothing)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let result = runtime.block_on(async {
        let leader = find_leader(&replicas).await?;
        let begun = Instant::now();
        let mut latencies_us = propose_all(&leader, outstanding, count, bytes).await?;
        let elapsed = begun.elapsed();
        latencies_us.sort_unstable();
        let rank = |percent: usize| latencies_us.get(latencies_us.len() * percent / 100).copied().unwrap_or(0);
        let commits_per_s = latencies_us.len() as f64 / elapsed.as_secs_f64();
        Ok(CommitBench { commits_per_s, p50_us: rank(50), p99_us: rank(99) })
    });
    runtime.block_on(stop(&replicas));
    result
}

/// Stops replicas and waits until they have.
pub async fn stop(replicas: &[RaftHandle]) {
    replicas.iter().for_each(RaftHandle::shutdown);
    for replica in replicas {
        replica.stopped().await;
    }
}

/// Three replicas that reach each other through channels; `machine` makes the state machine of each.
///
/// # Errors
/// A replica does not start.
pub fn start_replicas<M: StateMachine + 'static>(dir: &Path, machine: impl Fn(u64) -> M) -> Result<Vec<RaftHandle>, BenchError> {
    let mut replicas = Vec::new();
    let mut wires = Vec::new();
    for id in 1..=REPLICAS {
        let (outgoing, frames) = mpsc::channel(OUTGOING_FRAMES_MAX);
        let config = RaftConfig::new(id, (1..=REPLICAS).collect(), dir.join(format!("replica-{id}")), "bench");
        replicas.push(start(config, machine(id), outgoing)?);
        wires.push((id, frames));
    }
    for (from, mut frames) in wires {
        let replicas = replicas.clone();
        std::thread::spawn(move || {
            while let Some((to, frame)) = frames.blocking_recv() {
                replicas[to as usize - 1].step(from, &frame);
            }
        });
    }
    Ok(replicas)
}

/// Waits until one replica leads and has committed an entry.
///
/// # Errors
/// There is none within half a minute.
pub async fn find_leader(replicas: &[RaftHandle]) -> Result<RaftHandle, BenchError> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        for replica in replicas {
            if replica.status().role == Role::Leader && replica.propose(Vec::new()).await.is_ok() {
                return Ok(replica.clone());
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Err(BenchError::Stalled(ProposeError::NotLeader { leader: None }))
}

/// Latencies of all commits, in microseconds.
async fn propose_all(leader: &RaftHandle, outstanding: usize, count: usize, bytes: usize) -> Result<Vec<u64>, BenchError> {
    let left = Arc::new(AtomicUsize::new(count));
    let mut proposers = JoinSet::new();
    for _ in 0..outstanding.max(1) {
        proposers.spawn(propose_while(leader.clone(), Arc::clone(&left), bytes));
    }
    let mut latencies_us = Vec::with_capacity(count);
    while let Some(done) = proposers.join_next().await {
        let done = done.map_err(std::io::Error::other)?;
        latencies_us.extend(done.map_err(BenchError::Stalled)?);
    }
    Ok(latencies_us)
}

async fn propose_while(leader: RaftHandle, left: Arc<AtomicUsize>, bytes: usize) -> Result<Vec<u64>, ProposeError> {
    let mut latencies_us = Vec::new();
    while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
        let begun = Instant::now();
        leader.propose(vec![7; bytes]).await?;
        latencies_us.push(begun.elapsed().as_micros() as u64);
    }
    Ok(latencies_us)
}
