//! The index of block locations at a million blocks: memory and speed.

use std::hint::black_box;
use std::time::Instant;

use millrace_core::holders::Holders;
use millrace_core::ids::{BlockHash, NodeId};
use millrace_core::sampling::mix;

use crate::machine::resident_bytes;
use crate::report::Row;

const BLOCKS: u64 = 1 << 20;
/// Nodes among which the blocks lie, each block at one.
const NODES: u64 = 16;

/// Fills an index and looks blocks up in another order. Earlier indexes are kept, so that each takes fresh memory.
#[must_use]
pub fn measure(runs: usize) -> Vec<Row> {
    let (mut kept, mut bytes, mut stores, mut lookups) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for run in 0..runs as u64 {
        let before = resident_bytes();
        let mut holders = Holders::default();
        (1..=NODES).for_each(|node| holders.begin(NodeId(node as u16)));
        stores.push(rate(|i| holders.store(NodeId((1 + i % NODES) as u16), &name(run, i))));
        bytes.push((resident_bytes() - before) / BLOCKS as f64);
        lookups.push(rate(|i| {
            black_box(holders.of(&name(run, i.wrapping_mul(0x9e37_79b1) % BLOCKS)));
        }));
        kept.push(holders);
    }
    vec![
        Row::new("index, 1 Mi blocks, bytes per block", bytes),
        Row::new("index, 1 Mi blocks, stores/s, one thread", stores),
        Row::new("index, 1 Mi blocks, lookups/s, one thread", lookups),
    ]
}

fn rate(mut act: impl FnMut(u64)) -> f64 {
    let begin = Instant::now();
    (0..BLOCKS).for_each(&mut act);
    BLOCKS as f64 / begin.elapsed().as_secs_f64()
}

fn name(run: u64, i: u64) -> BlockHash {
    let (high, low) = (mix(i ^ run << 40), mix(i.wrapping_add(1 << 50)));
    BlockHash((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
}
