//! The index of block locations at ten million blocks: memory, look-ups, and what copies, restores and the end of a node cost.

use std::hint::black_box;
use std::time::Instant;

use millrace_core::cluster::{Cluster, Command};
use millrace_core::holders::Holders;
use millrace_core::ids::{BlockHash, Epoch, NodeId};
use millrace_core::layout::{KvDtype, KvLayout, KvParts};
use millrace_core::message::{BlockOp, DELTA_OPS_MAX, Delta, Join, ModelIdentity, Role};
use millrace_core::sampling::mix;

use crate::machine::resident_bytes;
use crate::report::{Row, median};

/// Blocks of one prompt that nodes hold whole.
const CHAIN: u64 = 128;
/// Nodes among which the prompts lie.
const NODES: u64 = 64;
/// Prompts that are looked up in turn, and how often so many others.
const PROMPTS: u64 = 256;
const BATCHES: u64 = 64;
/// Blocks of a prompt of 100,000 tokens.
const LONG: usize = 6250;
/// Look-ups of the long prompt, of which the median counts.
const LOOKS: usize = 101;

/// Measures indexes of `millions` x 1,000,000 blocks, with one, two and three holders of each block.
#[must_use]
pub fn measure(runs: usize, millions: u64) -> Vec<Row> {
    let size = Size { chains: millions * 1_000_000 / CHAIN, title: format!("index, {millions} M blocks") };
    let mut rows = Vec::new();
    // All are kept until the end, so that each takes fresh memory.
    let mut kept = Vec::new();
    for holders in 1..=3 {
        let (before, begin) = (resident_bytes(), Instant::now());
        let cluster = size.fill(holders);
        let elapsed = begin.elapsed().as_secs_f64();
        let title = format!("{}, {holders} holder{} each", size.title, if holders == 1 { "" } else { "s" });
        rows.push(Row::new(format!("{title}, bytes a block"), vec![(resident_bytes() - before) / size.blocks() as f64]));
        rows.push(Row::new(format!("{title}, stores/s, one thread"), vec![(size.blocks() * holders) as f64 / elapsed]));
        rows.push(Row::new(
            format!("{title}, look-ups of held prefixes of {CHAIN}/s"),
            (0..runs as u64).map(|run| size.look_ups(&cluster, run)).collect(),
        ));
        kept.push(cluster);
    }
    rows.extend(long_prompt(runs, kept[0].holders().clone()));
    rows.extend(size.copies(runs, &kept[0]));
    rows
}

fn many(runs: usize, mut measured: impl FnMut() -> f64) -> Vec<f64> {
    (0..runs).map(|_| measured()).collect()
}

struct Size {
    chains: u64,
    title: String,
}

impl Size {
    const fn blocks(&self) -> u64 {
        self.chains * CHAIN
    }

    /// A state in which each prompt is held whole by so many nodes, other ones for each prompt; through deltas, as the log brings them.
    fn fill(&self, holders: u64) -> Cluster {
        let mut log = Log::new();
        for chain in 0..self.chains {
            let names: Vec<_> = (0..CHAIN).map(|i| name(chain * CHAIN + i)).collect();
            for holder in 0..holders {
                log.hold(node_of(chain, holder), &names);
            }
        }
        log.flush();
        log.cluster
    }

    /// Look-ups a second of prompts that one or more nodes hold whole, in random order. Their names are at hand, as after hashing; where
    /// they lead to is not.
    fn look_ups(&self, cluster: &Cluster, run: u64) -> f64 {
        let mut elapsed_s = 0.0;
        for batch in 0..BATCHES {
            let random = (0..PROMPTS).map(|i| mix(i ^ batch << 16 ^ run << 32) % self.chains);
            let prompts: Vec<Vec<_>> = random.map(|chain| (0..CHAIN).map(|i| name(chain * CHAIN + i)).collect()).collect();
            let look = |prompt: &Vec<_>| cluster.holders().prefixes(prompt).iter().map(|p| u64::from(p.blocks)).min();
            let (batch_s, whole) = timed(|| prompts.iter().all(|prompt| look(prompt) == Some(CHAIN)));
            assert!(whole, "a prompt that is held is not found");
            elapsed_s += batch_s;
        }
        (PROMPTS * BATCHES) as f64 / elapsed_s
    }

    /// What happens beside look-ups: a copy, a snapshot, a restore, the end of a node.
    fn copies(&self, runs: usize, cluster: &Cluster) -> Vec<Row> {
        let row = |what: &str, values| Row::new(format!("{}, {what}", self.title), values);
        let clone_us = many(runs, || timed(|| cluster.clone()).0 * 1e6);
        let (snapshot_s, bytes) = timed(|| cluster.snapshot());
        let (restore_s, mut restored) = timed(|| Cluster::restore(&bytes).expect("a snapshot can be restored"));
        assert_eq!(restored.holders().locations(), cluster.holders().locations());
        let end = Command::MarkDead { node: NodeId(1), epoch: Epoch(1) };
        let (end_s, _) = timed(|| restored.apply(restored.applied() + 1, &end));
        let idle = Command::Renew { elapsed_us: 0, nodes: Vec::new() };
        let sweeps: Vec<_> = (0..256).map(|_| timed(|| restored.apply(restored.applied() + 1, &idle)).0 * 1e6).collect();
        vec![
            row("copy at a point in time, us", clone_us),
            row("snapshot, bytes a block", vec![bytes.len() as f64 / self.blocks() as f64]),
            row("snapshot written to memory, s", vec![snapshot_s]),
            row("snapshot restored, s", vec![restore_s]),
            row("end of a node, its entry applied, us", vec![end_s * 1e6]),
            row("an entry that sweeps for it, us", sweeps),
        ]
    }
}

/// A prompt of 100,000 tokens over 64 nodes of which each holds another share, and of which all hold one of two shares.
fn long_prompt(runs: usize, mut holders: Holders) -> Vec<Row> {
    let names = |tag: u64| (0..LONG as u64).map(|i| name(tag << 50 | i)).collect::<Vec<_>>();
    let (spread, two) = (names(1), names(2));
    for node in 1..=NODES {
        let share = LONG * node as usize / NODES as usize;
        spread[..share].iter().for_each(|block| holders.store(NodeId(node as u16), block));
        let share = if node % 2 == 0 { LONG } else { LONG / 3 };
        two[..share].iter().for_each(|block| holders.store(NodeId(node as u16), block));
    }
    let looked = |names: &[BlockHash]| {
        let once = || timed(|| black_box(holders.prefixes(names))).0 * 1e6;
        many(runs, || median(&many(LOOKS, once)))
    };
    vec![
        Row::new(format!("index, prefix of {LONG} blocks, {NODES} nodes with {NODES} different shares, us"), looked(&spread)),
        Row::new(format!("index, prefix of {LONG} blocks, {NODES} nodes with two different shares, us"), looked(&two)),
    ]
}

/// Deltas of nodes into a state.
struct Log {
    cluster: Cluster,
    waiting: Vec<Vec<BlockOp>>,
}

impl Log {
    fn new() -> Self {
        let mut cluster = Cluster::new();
        (1..=NODES).for_each(|node| drop(cluster.apply(node, &Command::Join(join(node)))));
        Self { cluster, waiting: vec![Vec::new(); NODES as usize] }
    }

    fn hold(&mut self, node: u64, names: &[BlockHash]) {
        let waiting = &mut self.waiting[node as usize - 1];
        waiting.extend(names.iter().map(|name| BlockOp::Stored(*name)));
        if waiting.len() + CHAIN as usize > DELTA_OPS_MAX {
            self.send(node);
        }
    }

    fn send(&mut self, node: u64) {
        let ops = std::mem::take(&mut self.waiting[node as usize - 1]);
        let id = NodeId(node as u16);
        let base_seq = self.cluster.holders().tally(id).map_or(0, |tally| tally.seq);
        let delta = Delta { node: id, epoch: Epoch(node), base_seq, seq: base_seq + 1, ops };
        self.cluster.apply(self.cluster.applied() + 1, &Command::Deltas(vec![delta]));
    }

    fn flush(&mut self) {
        (1..=NODES).for_each(|node| self.send(node));
    }
}

/// A node that joins.
#[must_use]
pub fn join(node: u64) -> Join {
    let layout =
        KvLayout { layers: 1, parts: KvParts::KeysValues, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype: KvDtype::F32 };
    Join {
        name: format!("node-{node}"),
        role: Role::Decode,
        address: "127.0.0.1:1".into(),
        instance: node.into(),
        pid: 1,
        model: ModelIdentity { name: "m".into(), weights: [0; 32], tokenizer: [0; 32], layout },
        slots: 1 << 20,
    }
}

/// Which node is the `holder`-th of a prompt.
fn node_of(chain: u64, holder: u64) -> u64 {
    let third = NODES / 3;
    1 + (mix(chain ^ holder << 60) % third + holder * third)
}

fn timed<T>(f: impl FnOnce() -> T) -> (f64, T) {
    let begin = Instant::now();
    let value = f();
    (begin.elapsed().as_secs_f64(), value)
}

/// A name that looks like a hash.
#[must_use]
pub fn name(i: u64) -> BlockHash {
    let (high, low) = (mix(i), mix(i ^ 1 << 63));
    BlockHash((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
}
