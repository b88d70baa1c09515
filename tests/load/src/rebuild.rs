//! How long a replica takes to come back: from its own snapshot after a restart, and from its leader's when it has nothing.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use coordinator::state::{Replicated, SharedCluster};
use millrace_core::cluster::{self, Answer, Cluster, Command, DELTAS_OPS_MAX};
use millrace_core::ids::{BlockHash, Epoch, NodeId};
use millrace_core::layout::{KvDtype, KvLayout, KvParts};
use millrace_core::message::{BlockOp, DELTA_OPS_MAX, Delta, Join, ModelIdentity, Role as Kind};
use millrace_log::{RaftConfig, RaftHandle, Role, found, start};
use tokio::sync::mpsc;

use crate::report::Row;

/// Nodes that hold the blocks.
const NODES: u16 = 16;
/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// Frames that may wait between two replicas.
const FRAMES_MAX: usize = 4096;

/// Measures with an index of `blocks` blocks, in folders below `beside`. Blocks the thread.
///
/// # Errors
/// A replica does not start, or does not come back.
pub fn measure(beside: &Path, blocks: u64, runs: usize) -> Result<Vec<Row>> {
    let state = filled(blocks)?;
    let (index, bytes) = (state.applied(), state.snapshot());
    drop(state);
    let mb = bytes.len() as f64 / 1e6;
    let (mut restarts, mut catch_ups, mut commits, mut worst) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        let dir = tempfile::tempdir_in(beside)?;
        restarts.push(restart(dir.path(), index, &bytes)?);
        let dir = tempfile::tempdir_in(beside)?;
        let caught = catch_up(dir.path(), index, &bytes)?;
        catch_ups.push(caught.seconds);
        commits.push(caught.commits_per_s);
        worst.push(caught.worst_ms);
    }
    let name = format!("{blocks} blocks, snapshot of {mb:.0} MB");
    Ok(vec![
        Row::new(format!("replica restart to ready, {name}, s"), restarts),
        Row::new(format!("empty replica catches up, {name}, s"), catch_ups),
        Row::new(format!("commits meanwhile, one at a time, {name}, commits/s"), commits),
        Row::new(format!("slowest commit meanwhile, {name}, ms"), worst),
    ])
}

fn filled(blocks: u64) -> Result<Cluster> {
    let layout =
        KvLayout { layers: 1, parts: KvParts::KeysValues, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype: KvDtype::F32 };
    let model = ModelIdentity { name: "m".into(), weights: [0; 32], tokenizer: [0; 32], layout };
    let mut state = Cluster::new();
    for n in 1..=NODES {
        let (name, address, model) = (format!("decode-{n}"), "127.0.0.1:1".into(), model.clone());
        let join = Join { name, role: Kind::Decode, address, instance: n.into(), pid: 1, model, slots: 1 << 20 };
        let answer = state.apply(u64::from(n), &Command::Join(join));
        ensure!(matches!(answer, Answer::Joined { .. }), "{answer:?}");
    }
    let batch = DELTA_OPS_MAX.min(DELTAS_OPS_MAX) as u64;
    let (mut made, mut seqs) = (0, vec![0; NODES as usize]);
    while made < blocks {
        let n = (made / batch % u64::from(NODES)) as u16 + 1;
        let ops = (made..blocks.min(made + batch)).map(|i| BlockOp::Stored(block(i))).collect();
        let seq = &mut seqs[usize::from(n) - 1];
        let delta = Delta { node: NodeId(n), epoch: Epoch(n.into()), base_seq: *seq, seq: *seq + 1, ops };
        *seq += 1;
        state.apply(state.applied() + 1, &Command::Deltas(vec![delta]));
        made += batch;
    }
    ensure!(state.holders().blocks() as u64 == blocks, "{} blocks are in the index", state.holders().blocks());
    Ok(state)
}

/// Names spread as digests are (splitmix64).
fn block(i: u64) -> BlockHash {
    let mix = |seed: u64| {
        let mut z = i.wrapping_add(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
    };
    BlockHash(((u128::from(mix(1)) << 64) | u128::from(mix(2))).to_le_bytes())
}

fn config(id: u64, voters: u64, dir: &Path) -> RaftConfig {
    RaftConfig::new(id, (1..=voters).collect(), dir.join(format!("replica-{id}")), "bench")
}

/// Seconds until a replica that finds its snapshot leads, which it does after an election.
fn restart(dir: &Path, index: u64, state: &[u8]) -> Result<f64> {
    found(config(1, 1, dir), index, state)?;
    let begun = Instant::now();
    let handle = start(config(1, 1, dir), Replicated::new(SharedCluster::default()), mpsc::channel(1).0)?;
    wait("a leader", || handle.status().role == Role::Leader)?;
    let took = begun.elapsed().as_secs_f64();
    handle.shutdown();
    wait("the end", || handle.status().role == Role::Stopped)?;
    Ok(took)
}

struct CaughtUp {
    seconds: f64,
    commits_per_s: f64,
    worst_ms: f64,
}

fn catch_up(dir: &Path, index: u64, state: &[u8]) -> Result<CaughtUp> {
    let mut inboxes = Vec::new();
    let mut replicas: Vec<RaftHandle> = Vec::new();
    for id in 1..=3 {
        if id < 3 {
            found(config(id, 3, dir), index, state)?;
        }
        inboxes.push(mpsc::channel::<(u64, Vec<u8>)>(FRAMES_MAX));
    }
    let (senders, receivers): (Vec<_>, Vec<_>) = inboxes.into_iter().unzip();
    let launch = |id: u64| start(config(id, 3, dir), Replicated::new(SharedCluster::default()), senders[id as usize - 1].clone());
    replicas.push(launch(1)?);
    replicas.push(launch(2)?);
    let late = Arc::new(Mutex::new(None::<RaftHandle>));
    for (from, mut frames) in (1..).zip(receivers) {
        let (replicas, late) = (replicas.clone(), late.clone());
        std::thread::spawn(move || {
            while let Some((to, frame)) = frames.blocking_recv() {
                match replicas.get(to as usize - 1) {
                    Some(replica) => replica.step(from, &frame),
                    None => {
                        late.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|replica| replica.step(from, &frame))
                    }
                }
            }
        });
    }
    wait("a leader", || replicas.iter().any(|r| r.status().role == Role::Leader))?;
    let leader = replicas.iter().find(|r| r.status().role == Role::Leader).context("a leader")?.clone();
    let term = leader.status().term;
    let stop = Arc::new(AtomicBool::new(false));
    let serving = std::thread::spawn({
        let (leader, stop) = (leader.clone(), stop.clone());
        move || commit_until(&leader, &stop)
    });
    let begun = Instant::now();
    let third = launch(3)?;
    *late.lock().unwrap_or_else(PoisonError::into_inner) = Some(third.clone());
    let caught = wait("the third replica", || third.status().applied >= leader.status().snapshot_index.max(index));
    let seconds = begun.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    let (count, worst_ms) = serving.join().map_err(|_| anyhow::anyhow!("the proposer panicked"))??;
    caught?;
    ensure!(leader.status().term == term, "leadership was lost meanwhile");
    replicas.iter().chain([&third]).for_each(RaftHandle::shutdown);
    wait("the end", || replicas.iter().chain([&third]).all(|r| r.status().role == Role::Stopped))?;
    Ok(CaughtUp { seconds, commits_per_s: count as f64 / seconds, worst_ms })
}

/// Commits one small command after the other; how many, and the slowest in milliseconds.
fn commit_until(leader: &RaftHandle, stop: &AtomicBool) -> Result<(u64, f64)> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let command = cluster::encode(&Command::Renew { elapsed_us: 0, nodes: Vec::new() });
    let (mut count, mut worst_ms) = (0, 0.0_f64);
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        runtime.block_on(leader.propose(command.clone()))?;
        worst_ms = worst_ms.max(begun.elapsed().as_secs_f64() * 1e3);
        count += 1;
    }
    Ok((count, worst_ms))
}

fn wait(what: &str, done: impl Fn() -> bool) -> Result<()> {
    let begun = Instant::now();
    while !done() {
        if begun.elapsed() > PATIENCE {
            bail!("waited in vain for {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn replicas_come_back_with_a_small_index() {
        let dir = tempfile::tempdir().expect("a folder");
        let rows = super::measure(dir.path(), 30_000, 1).expect("both ways of coming back");
        assert_eq!(rows.len(), 4);
    }
}
