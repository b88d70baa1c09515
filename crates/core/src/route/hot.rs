//! How often prompts begin alike: a bounded count of the prefixes that this gateway was asked for lately.
//!
//! A prompt's prefixes at a few depths (two in each doubling of length) are counted in a count-min sketch of fixed size, whose counters
//! halve with time. So a count is "requests in about the last [`HOT_HALF_LIFE_US`]", which is also what the router expects
//! in the time to come. It may be too high when many prefixes share counters, never too low but for the halving.
//! It also remembers where such a prefix was sent to be computed and is not known to stand yet, so that a burst does not make
//! copies everywhere at once.
//! Not decided here: what a hot prefix is worth (`cost`). Each gateway counts for itself; nothing here is replicated.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use crate::ids::{BlockHash, NodeId, Time};

/// Counters of one row of the sketch, a power of two. The whole sketch has 256 KiB.
const ROW: usize = 1 << 14;
/// Rows: a count is the least of its counters in all of them.
const ROWS: usize = 4;
/// Counts halve in this time.
pub const HOT_HALF_LIFE_US: u64 = 10_000_000;
/// Requests in that time from which on a prefix is called hot.
pub const HOT_REQUESTS_MIN: u32 = 4;

/// Copies in the making that are remembered; at the bound the one that was to be done first is forgotten.
pub const COPIES_MAX: usize = 4096;

/// A prefix that is asked for often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hot {
    /// Leading full blocks of the prompt that make it up; at least 1.
    pub blocks: u32,
    /// Requests expected in the time that a copy is worth making for.
    pub requests: u32,
}

/// The sketch.
#[derive(Clone, Debug)]
pub struct HotPrefixes {
    counters: Vec<u32>,
    halved: Time,
    /// Copies in the making, and when they are no longer believed in.
    copies: BTreeMap<(BlockHash, NodeId), Time>,
}

impl Default for HotPrefixes {
    fn default() -> Self {
        Self { counters: vec![0; ROW * ROWS], halved: Time(0), copies: BTreeMap::new() }
    }
}

impl HotPrefixes {
    /// Counts a request whose full blocks have these names, and says which of its prefixes is worth most as a copy:
    /// that with the largest product of requests and blocks, if it is hot. O(log blocks).
    pub fn asked(&mut self, now: Time, names: &[BlockHash]) -> Option<Hot> {
        self.halve(now);
        for depth in depths(names.len()) {
            self.count(&names[depth - 1]);
        }
        self.hottest(names)
    }

    /// As [`Self::asked`], without counting a request.
    #[must_use]
    pub fn look(&self, names: &[BlockHash]) -> Option<Hot> {
        self.hottest(names)
    }

    /// A request that makes `node` compute the prefix named `name` is on its way; it is expected to be done before `until`.
    pub fn copying(&mut self, now: Time, name: BlockHash, node: NodeId, until: Time) {
        self.copies.insert((name, node), until);
        if self.copies.len() > COPIES_MAX {
            self.copies.retain(|_, until| *until > now);
            while self.copies.len() > COPIES_MAX {
                let first = self.copies.iter().min_by_key(|(key, until)| (**until, **key)).map(|(key, _)| *key);
                first.map(|key| self.copies.remove(&key));
            }
        }
    }

    /// Where the prefix named `name` is being computed. O(log copies).
    pub fn copies(&self, now: Time, name: BlockHash) -> Vec<NodeId> {
        let of_name = self.copies.range((name, NodeId(0))..=(name, NodeId(u16::MAX)));
        of_name.filter(|(_, until)| **until > now).map(|((_, node), _)| *node).collect()
    }

    fn hottest(&self, names: &[BlockHash]) -> Option<Hot> {
        let hot = depths(names.len())
            .map(|depth| Hot { blocks: depth as u32, requests: self.estimate(&names[depth - 1]) })
            .filter(|hot| hot.requests >= HOT_REQUESTS_MIN);
        hot.max_by_key(|hot| (u64::from(hot.requests) * u64::from(hot.blocks), hot.blocks))
    }

    fn estimate(&self, name: &BlockHash) -> u32 {
        places(name).map(|place| self.counters[place]).min().unwrap_or(0)
    }

    /// Raises only the counters that are the least: what others share is not pushed up further (conservative update).
    fn count(&mut self, name: &BlockHash) {
        let raised = self.estimate(name).saturating_add(1);
        for place in places(name) {
            self.counters[place] = self.counters[place].max(raised);
        }
    }

    fn halve(&mut self, now: Time) {
        let halvings = now.since(self.halved) / HOT_HALF_LIFE_US;
        if halvings > 0 {
            self.counters.iter_mut().for_each(|count| *count = count.checked_shr(halvings.min(32) as u32).unwrap_or(0));
            self.halved = self.halved.after(halvings.saturating_mul(HOT_HALF_LIFE_US));
        }
    }
}

/// Where a name is counted. Names are keyed digests: uniform already, and not to be steered from outside.
fn places(name: &BlockHash) -> impl Iterator<Item = usize> {
    let words = name.0.as_chunks::<4>().0;
    words.iter().take(ROWS).enumerate().map(|(row, word)| row * ROW + (u32::from_le_bytes(*word) as usize & (ROW - 1)))
}

/// The depths, in blocks, at which a prompt of `blocks` full blocks is counted: 1, 2, 3, 4, 6, 8, 12, ...
fn depths(blocks: usize) -> impl Iterator<Item = usize> {
    let doublings = (0..usize::BITS - 1).map(|bit| 1usize << bit);
    doublings.flat_map(|depth| [depth, depth / 2 * 3]).filter(|depth| *depth > 0).take_while(move |depth| *depth <= blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(root: u32, blocks: u32) -> Vec<BlockHash> {
        let name = |i: u32| {
            let mut name = [0; 16];
            name.copy_from_slice(
                &crate::identity::cell_digest(&BlockHash([root as u8; 16]), root as u16, &i.to_le_bytes()).to_le_bytes().repeat(2),
            );
            name[8..].reverse();
            BlockHash(name)
        };
        (0..blocks).map(name).collect()
    }

    #[test]
    fn depths_are_two_in_each_doubling() {
        assert_eq!(depths(13).collect::<Vec<_>>(), [1, 2, 3, 4, 6, 8, 12]);
        assert_eq!(depths(0).count(), 0);
    }

    #[test]
    fn the_shared_prefix_is_found_and_fades() {
        let mut hot = HotPrefixes::default();
        let shared = chain(1, 64);
        for request in 0..20 {
            let prompt = [shared.as_slice(), &chain(100 + request, 64)].concat();
            hot.asked(Time(1_000_000), &prompt);
        }
        let prompt = [shared.as_slice(), &chain(99, 64)].concat();
        assert_eq!(hot.look(&prompt), Some(Hot { blocks: 64, requests: 20 }));
        assert_eq!(hot.look(&chain(7, 64)), None);
        assert_eq!(hot.asked(Time(1_000_000 + HOT_HALF_LIFE_US), &prompt).map(|hot| hot.requests), Some(11));
        assert_eq!(hot.asked(Time(60 * HOT_HALF_LIFE_US), &prompt), None);
    }

    #[test]
    fn copies_in_the_making_are_bounded_and_end() {
        let (mut hot, names) = (HotPrefixes::default(), chain(1, 2));
        hot.copying(Time(0), names[0], NodeId(3), Time(50));
        hot.copying(Time(0), names[0], NodeId(1), Time(90));
        hot.copying(Time(0), names[1], NodeId(2), Time(90));
        assert_eq!(hot.copies(Time(10), names[0]), [NodeId(1), NodeId(3)]);
        assert_eq!(hot.copies(Time(50), names[0]), [NodeId(1)]);
        for (i, name) in (0..).zip(chain(2, COPIES_MAX as u32)) {
            hot.copying(Time(60), name, NodeId(9), Time(1000 + i));
        }
        assert!(hot.copies.len() <= COPIES_MAX);
        assert_eq!(hot.copies(Time(60), names[1]), [], "the first to end went first");
    }

    #[test]
    fn ten_thousand_other_prompts_make_no_cold_one_hot() {
        let mut hot = HotPrefixes::default();
        for i in 0..10_000 {
            hot.asked(Time(0), &chain(i, 2));
        }
        let wrongly = (20_000..21_000).filter(|i| hot.look(&chain(*i, 2)).is_some()).count();
        assert!(wrongly < 20, "{wrongly} of 1000");
    }
}
