//! Which beginnings of prompts this gateway was asked for lately: counts at a few depths of each prompt, in bounded memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_core::ids::BlockHash;
use millrace_core::top::Top;
use parking_lot::Mutex;

/// Prefixes that are kept.
const PREFIXES_MAX: usize = 4096;
/// Counts halve in this time.
pub const HALF_LIFE: Duration = Duration::from_secs(300);
/// A prefix that nearly always goes on to one longer one says nothing that the longer one does not: share in percent.
const SAME_PERCENT: u64 = 90;

/// A prefix that is kept.
#[derive(Clone, Debug)]
struct Prefix {
    tenant: Arc<str>,
    blocks: u32,
    /// The name at the depth before, of the same prompt.
    above: Option<BlockHash>,
}

/// A prefix that is asked for often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The name of its last block.
    pub name: BlockHash,
    /// Whose.
    pub tenant: String,
    /// Its length.
    pub blocks: u32,
    /// How often it was asked for, halved with time; at most `error` too many.
    pub count: u64,
    /// See `count`.
    pub error: u64,
}

struct Counts {
    top: Top<BlockHash, Prefix>,
    halved: Instant,
}

/// The counts of one gateway.
pub struct AskedPrefixes(Mutex<Counts>);

impl Default for AskedPrefixes {
    fn default() -> Self {
        Self(Mutex::new(Counts { top: Top::new(PREFIXES_MAX), halved: Instant::now() }))
    }
}

impl AskedPrefixes {
    /// A prompt with these full blocks came. O(log blocks).
    pub fn count(&self, now: Instant, tenant: &str, names: &[BlockHash]) {
        let tenant: Arc<str> = tenant.into();
        let mut counts = self.0.lock();
        if now.saturating_duration_since(counts.halved) >= HALF_LIFE {
            counts.halved = now;
            counts.top.decay();
        }
        let mut above = None;
        for depth in depths(names.len()) {
            let name = names[depth - 1];
            counts.top.touch(name, Prefix { tenant: tenant.clone(), blocks: depth as u32, above });
            above = Some(name);
        }
    }

    /// The `most` most frequent, without those that a longer one stands for.
    #[must_use]
    pub fn ranked(&self, most: usize) -> Vec<Asked> {
        let counts = self.0.lock();
        let ranked = counts.top.ranked();
        let goes_on = |name: &BlockHash, count: u64| {
            let longer = ranked.iter().filter(|(_, other)| other.value.above == Some(*name));
            longer.map(|(_, other)| other.count).max().is_some_and(|longer| longer * 100 >= count * SAME_PERCENT)
        };
        let asked = ranked.iter().filter(|(name, entry)| !goes_on(name, entry.count)).map(|(name, entry)| Asked {
            name: **name,
            tenant: entry.value.tenant.to_string(),
            blocks: entry.value.blocks,
            count: entry.count,
            error: entry.error,
        });
        asked.take(most).collect()
    }
}

/// The depths at which a prompt of `blocks` full blocks is counted: the powers of two, and its end.
fn depths(blocks: usize) -> impl Iterator<Item = usize> {
    let powers = (0..usize::BITS).map(|bit| 1usize << bit).take_while(move |depth| *depth < blocks);
    powers.chain((blocks > 0).then_some(blocks))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(prompt: u8, block: u8) -> BlockHash {
        BlockHash([prompt, block, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    }

    #[test]
    fn a_shared_beginning_is_named_once_at_its_full_length() {
        let (asked, now) = (AskedPrefixes::default(), Instant::now());
        assert_eq!(depths(6).collect::<Vec<_>>(), [1, 2, 4, 6]);
        assert_eq!(depths(0).count(), 0);
        for prompt in 1..=20 {
            // four blocks in common, four of its own
            let names: Vec<_> = (0..8).map(|block| name(if block < 4 { 0 } else { prompt }, block)).collect();
            asked.count(now, "acme", &names);
        }
        (0..10).for_each(|_| asked.count(now, "default", &[name(99, 0)]));
        let ranked = asked.ranked(2);
        let shared = Asked { name: name(0, 3), tenant: "acme".into(), blocks: 4, count: 20, error: 0 };
        let short = Asked { name: name(99, 0), tenant: "default".into(), blocks: 1, count: 10, error: 0 };
        assert_eq!(ranked, [shared, short]);
        asked.count(now + HALF_LIFE, "default", &[]);
        assert_eq!(asked.ranked(9).iter().map(|asked| asked.count).collect::<Vec<_>>(), [10, 5]);
    }
}
