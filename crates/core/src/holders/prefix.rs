//! What a prompt's leading blocks are worth on each node, by search instead of a walk.
//!
//! Blocks form chains: a pool keeps the block before each one it keeps, and evicts from the end. So the blocks that a node has of one
//! chain are a leading run, and its end is found by bisection: all nodes at once, those with one end together, and the last block first,
//! because a conversation that goes on is held whole. What holds even where the index lacks blocks (refused at the bound): a node that
//! is said to hold `n` blocks has the first and the `n`-th in the index and not the one after. A gap between them is not seen; the
//! pool that holds the `n`-th block holds those before it.

use alloc::vec::Vec;

use super::Holders;
use super::place::{Incarnation, Location, Locations};
use crate::ids::{BlockHash, NodeId};
use crate::message::Tier;
use crate::planted::{Bug, planted};

/// Leading blocks of a prompt on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Prefix {
    /// The node.
    pub node: NodeId,
    /// Leading blocks that it has in any tier; at least 1.
    pub blocks: u32,
    /// Leading blocks that it has in its device's memory.
    pub device_blocks: u32,
}

/// Holders `from..to` of the list: they have the block before `low`, and none of them has block `high`.
#[derive(Clone, Copy)]
struct Group {
    from: usize,
    to: usize,
    low: usize,
    high: usize,
}

impl Group {
    const fn middle(&self) -> usize {
        usize::midpoint(self.low, self.high)
    }
}

struct Run {
    holder: Incarnation,
    end: usize,
}

impl Holders {
    /// For each node that holds the first of `blocks`, which are one chain: how many leading ones it holds. Sorted by node.
    /// O(different ends x log blocks) look-ups; see the module for what is guaranteed.
    #[must_use]
    pub fn prefixes(&self, blocks: &[BlockHash]) -> Vec<Prefix> {
        let ([first, ..], [.., last]) = (blocks, blocks) else { return Vec::new() };
        let (first, last) = (self.locations_of(first), self.locations_of(last));
        let alive = |l: &&Location| self.incarnations.owner(l.holder()).is_some();
        let run = |l: &Location| Run { holder: l.holder(), end: blocks.len() };
        let mut runs: Vec<_> = first.as_slice().iter().filter(alive).map(run).collect();
        let whole = partition(&mut runs, |run| last.tier(run.holder).is_some());
        self.find_ends(blocks, &mut runs[whole..]);
        let mut prefixes: Vec<_> = runs.iter().filter_map(|run| self.prefix(blocks, run)).collect();
        prefixes.sort_unstable();
        prefixes
    }

    /// The same, without tiers.
    #[must_use]
    pub fn prefix_lengths(&self, blocks: &[BlockHash]) -> Vec<(NodeId, u32)> {
        self.prefixes(blocks).into_iter().map(|prefix| (prefix.node, prefix.blocks)).collect()
    }

    /// Where those end that do not have the last block. Level by level, so that the look-ups of one level wait for memory together.
    fn find_ends(&self, blocks: &[BlockHash], runs: &mut [Run]) {
        let mut groups = Vec::new();
        push(&mut groups, runs, Group { from: 0, to: runs.len(), low: 1, high: blocks.len() - 1 });
        while !groups.is_empty() {
            let middle = |group: &Group| self.locations_of(&blocks[group.middle()]);
            let held: Vec<Locations<'_>> = groups.iter().map(middle).collect();
            let mut next = Vec::with_capacity(groups.len() * 2);
            for (group, held) in groups.iter().zip(&held) {
                let split = group.from + partition(&mut runs[group.from..group.to], |run| held.tier(run.holder).is_some());
                push(&mut next, runs, Group { to: split, low: group.middle() + 1, ..*group });
                push(&mut next, runs, Group { from: split, high: group.middle(), ..*group });
            }
            groups = next;
        }
    }

    fn prefix(&self, blocks: &[BlockHash], run: &Run) -> Option<Prefix> {
        let node = self.incarnations.owner(run.holder)?;
        let device = if self.off_device == 0 { run.end } else { self.device_end(&blocks[..run.end], run.holder) };
        Some(Prefix { node, blocks: run.end as u32, device_blocks: device as u32 })
    }

    /// Tiers move from the end too: what is on the device is a leading run of what is there.
    fn device_end(&self, blocks: &[BlockHash], holder: Incarnation) -> usize {
        blocks.partition_point(|block| self.locations_of(block).tier(holder) == Some(Tier::Device))
    }
}

/// Keeps a group whose end is still to be found; writes the end down when it is known.
fn push(groups: &mut Vec<Group>, runs: &mut [Run], group: Group) {
    if group.low < group.high && group.from < group.to {
        groups.push(group);
    } else {
        runs[group.from..group.to].iter_mut().for_each(|run| run.end = group.low + usize::from(planted(Bug::PrefixOffByOne)));
    }
}

/// Puts those that `hold` before the others; gives how many they are.
fn partition(runs: &mut [Run], hold: impl Fn(&Run) -> bool) -> usize {
    let mut front = 0;
    for at in 0..runs.len() {
        if hold(&runs[at]) {
            runs.swap(front, at);
            front += 1;
        }
    }
    front
}
