//! Block events a second through three replicas in one process: deltas are made, encoded, proposed, written to three logs with
//! real syncs, committed, and applied to three indexes. Channels stand in place of the network.

use std::path::Path;
use std::time::{Duration, Instant};

use millrace_core::cluster::{self, Answer, Command, DeltaVerdict};
use millrace_core::ids::{BlockHash, Epoch, NodeId};
use millrace_core::layout::{KvDtype, KvLayout, KvParts};
use millrace_core::message::{BlockOp, DELTA_OPS_MAX, Delta, Join, ModelIdentity, Role};
use millrace_core::sampling::mix;
use tokio::task::JoinSet;

use crate::deltas::{BATCH_OPS_MAX, FOLD_WAIT};
use crate::state::{Replicated, SharedCluster};
use millrace_log::bench::{find_leader, start_replicas, stop};
use millrace_log::{BenchError, ProposeError, RaftHandle};

/// Who proposes: in a cluster each replica has one batch on its way.
const PROPOSERS: u64 = 3;
/// Nodes that each of them speaks for.
const NODES_EACH: u64 = 16;

/// What is to be measured.
#[derive(Clone, Copy, Debug)]
pub struct EventLoad {
    /// Blocks in the index; events then store and evict by turns.
    pub blocks: u64,
    /// Events a second that are to be reached; as many as there can be when absent.
    pub events_per_s: Option<f64>,
    /// For how long.
    pub duration: Duration,
}

/// What [`bench_events`] measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EventBench {
    /// Events applied by all replicas a second.
    pub events_per_s: f64,
    /// Median time from a proposal to its answer, microseconds.
    pub p50_us: u64,
    /// 99th percentile of the same.
    pub p99_us: u64,
    /// Events in one entry, on average.
    pub events_per_entry: f64,
}

/// Measures one load, with logs under `dir` (which should be empty). Blocks; not to be called from within a tokio runtime.
///
/// # Errors
/// A replica did not start, or stopped, or none came to lead.
///
/// # Panics
/// When an event is not applied, or the replicas' indexes differ at the end: a defect.
pub fn bench_events(dir: &Path, load: EventLoad) -> Result<EventBench, BenchError> {
    let clusters: [SharedCluster; 3] = Default::default();
    let replicas = start_replicas(dir, |id| Replicated::new(clusters[id as usize - 1].clone()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let result = runtime.block_on(async {
        let leader = find_leader(&replicas).await?;
        let result = run(&leader, load).await?;
        let applied = leader.read_index().await.map_err(BenchError::Stalled)?;
        for replica in &replicas {
            let mut status = replica.watch_status();
            status.wait_for(|status| status.applied >= applied).await.map_err(|_| BenchError::Stalled(ProposeError::Stopped))?;
        }
        Ok(result)
    });
    runtime.block_on(stop(&replicas));
    let sums = clusters.each_ref().map(|cluster| cluster.read().checksum().sum);
    assert!(result.is_err() || sums.iter().all(|sum| *sum == sums[0]), "the indexes of the replicas differ");
    result
}

async fn run(leader: &RaftHandle, load: EventLoad) -> Result<EventBench, BenchError> {
    let mut speakers = Vec::new();
    for first in 0..PROPOSERS {
        speakers.push(Speaker::join(leader, first * NODES_EACH + 1, load.blocks / (PROPOSERS * NODES_EACH)).await?);
    }
    let fill = EventLoad { events_per_s: None, duration: Duration::MAX, ..load };
    let (_, _, speakers) = together(speakers, fill, true).await?;
    let begin = Instant::now();
    let (events, mut latencies_us, _) = together(speakers, load, false).await?;
    let elapsed_s = begin.elapsed().as_secs_f64();
    latencies_us.sort_unstable();
    let rank = |percent: usize| latencies_us.get(latencies_us.len() * percent / 100).copied().unwrap_or(0);
    let (events, entries) = (events as f64, latencies_us.len() as f64);
    Ok(EventBench { events_per_s: events / elapsed_s, p50_us: rank(50), p99_us: rank(99), events_per_entry: events / entries })
}

/// Lets all speak at once; gives their events, the latencies of their entries, and themselves.
async fn together(speakers: Vec<Speaker>, load: EventLoad, fill: bool) -> Result<(u64, Vec<u64>, Vec<Speaker>), BenchError> {
    let mut tasks: JoinSet<_> = speakers.into_iter().map(|speaker| speaker.speak(load, fill)).collect();
    let (mut events, mut latencies_us, mut back) = (0, Vec::new(), Vec::new());
    while let Some(done) = tasks.join_next().await {
        let (speaker, sent, latencies) = done.map_err(std::io::Error::other)?.map_err(BenchError::Stalled)?;
        events += sent;
        latencies_us.extend(latencies);
        back.push(speaker);
    }
    Ok((events, latencies_us, back))
}

/// Some nodes, whose deltas go in one entry.
struct Speaker {
    leader: RaftHandle,
    nodes: Vec<Pool>,
    next: usize,
}

/// A node that caches a queue of blocks: what is stored first is evicted first.
struct Pool {
    node: NodeId,
    epoch: Epoch,
    seq: u64,
    stored: u64,
    evicted: u64,
    blocks: u64,
}

impl Speaker {
    async fn join(leader: &RaftHandle, first: u64, blocks: u64) -> Result<Self, BenchError> {
        let mut nodes = Vec::new();
        for number in first..first + NODES_EACH {
            let answer = propose(leader, &Command::Join(join(number))).await.map_err(BenchError::Stalled)?;
            let Answer::Joined { node, epoch } = answer else { panic!("{answer:?}") };
            nodes.push(Pool { node, epoch, seq: 0, stored: 0, evicted: 0, blocks });
        }
        Ok(Self { leader: leader.clone(), nodes, next: 0 })
    }

    /// Reports until the time is over, or until all pools are full.
    async fn speak(mut self, load: EventLoad, fill: bool) -> Result<(Self, u64, Vec<u64>), ProposeError> {
        let (begin, mut sent, mut latencies_us) = (Instant::now(), 0_u64, Vec::new());
        while begin.elapsed() < load.duration && !(fill && self.nodes.iter().all(|pool| pool.stored >= pool.blocks)) {
            let share = load.events_per_s.map(|rate| rate / PROPOSERS as f64);
            let due = share.map_or(u64::MAX, |rate| (begin.elapsed().as_secs_f64() * rate) as u64 - sent);
            let fold_full = share.map_or(1, |rate| (rate * FOLD_WAIT.as_secs_f64()) as u64);
            if due < fold_full {
                tokio::time::sleep(Duration::from_millis(1)).await;
                continue;
            }
            let ops = due.min(BATCH_OPS_MAX as u64) as usize;
            let deltas = self.deltas(ops);
            sent += ops as u64;
            let proposed = Instant::now();
            let answer = propose(&self.leader, &Command::Deltas(deltas)).await?;
            latencies_us.push(proposed.elapsed().as_micros() as u64);
            let applied = |verdict: &(NodeId, DeltaVerdict)| matches!(verdict.1, DeltaVerdict::Applied { .. });
            assert!(matches!(&answer, Answer::Deltas(verdicts) if verdicts.iter().all(applied)), "an event was not applied");
        }
        Ok((self, sent, latencies_us))
    }

    /// So many events, in deltas of one node after another.
    fn deltas(&mut self, mut ops: usize) -> Vec<Delta> {
        let each = ops.div_ceil(NODES_EACH as usize).clamp(1, DELTA_OPS_MAX);
        let mut deltas = Vec::new();
        while ops > 0 {
            let now = ops.min(each);
            let pool = &mut self.nodes[self.next];
            deltas.push(pool.delta(now));
            self.next = (self.next + 1) % self.nodes.len();
            ops -= now;
        }
        deltas
    }
}

impl Pool {
    fn delta(&mut self, ops: usize) -> Delta {
        let ops = (0..ops).map(|_| self.op()).collect();
        self.seq += 1;
        Delta { node: self.node, epoch: self.epoch, base_seq: self.seq - 1, seq: self.seq, ops }
    }

    fn op(&mut self) -> BlockOp {
        if self.stored - self.evicted > self.blocks {
            self.evicted += 1;
            return BlockOp::Evicted(self.name(self.evicted - 1));
        }
        self.stored += 1;
        BlockOp::Stored(self.name(self.stored - 1))
    }

    fn name(&self, i: u64) -> BlockHash {
        let i = i ^ u64::from(self.node.0) << 48;
        BlockHash((u128::from(mix(i)) << 64 | u128::from(mix(i ^ 1 << 63))).to_le_bytes())
    }
}

async fn propose(leader: &RaftHandle, command: &Command) -> Result<Answer, ProposeError> {
    let answer = leader.propose(cluster::encode(command)).await?;
    Ok(cluster::decode_answer(&answer).expect("a replica of this program answers"))
}

fn join(number: u64) -> Join {
    let layout =
        KvLayout { layers: 1, parts: KvParts::KeysValues, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype: KvDtype::F32 };
    Join {
        name: format!("node-{number}"),
        role: Role::Decode,
        address: "127.0.0.1:1".into(),
        instance: number.into(),
        pid: 1,
        model: ModelIdentity { name: "m".into(), weights: [0; 32], tokenizer: [0; 32], layout },
        slots: 1 << 20,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_reach_three_indexes() {
        let dir = tempfile::tempdir().unwrap();
        let load = EventLoad { blocks: 20_000, events_per_s: None, duration: Duration::from_millis(300) };
        let bench = bench_events(dir.path(), load).unwrap();
        assert!(bench.events_per_s > 0.0 && bench.p50_us > 0 && bench.events_per_entry > 1.0, "{bench:?}");
    }
}
