//! The most frequent keys of a stream in bounded memory: Space-Saving (Metwally, Agrawal, El Abbadi, ICDT 2005). A key that is asked
//! more often than `total / capacity` times is always among those kept, and no count is too low.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

/// What is known of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted<V> {
    /// How often it came, at most `error` too many.
    pub count: u64,
    /// What it may have inherited from the key whose place it took.
    pub error: u64,
    /// What came with it last.
    pub value: V,
}

/// The sketch. O(log capacity) for each key; memory is `capacity` entries.
#[derive(Clone, Debug)]
pub struct Top<K, V> {
    capacity: usize,
    entries: BTreeMap<K, Counted<V>>,
    /// The same by count: the first goes first.
    order: BTreeSet<(u64, K)>,
}

impl<K: Ord + Clone, V> Top<K, V> {
    /// An empty sketch that keeps `capacity` keys, at least 1.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        assert!(capacity > 0);
        Self { capacity, entries: BTreeMap::new(), order: BTreeSet::new() }
    }

    /// The key came.
    pub fn touch(&mut self, key: K, value: V) {
        if let Some(entry) = self.entries.get_mut(&key) {
            self.order.remove(&(entry.count, key.clone()));
            (entry.count, entry.value) = (entry.count + 1, value);
            self.order.insert((entry.count, key));
            return;
        }
        let error = match self.order.first().cloned().filter(|_| self.entries.len() >= self.capacity) {
            Some((count, rarest)) => {
                self.order.remove(&(count, rarest.clone()));
                self.entries.remove(&rarest);
                count
            }
            None => 0,
        };
        self.order.insert((error + 1, key.clone()));
        self.entries.insert(key, Counted { count: error + 1, error, value });
    }

    /// Halves all counts: what was asked long ago weighs less. Keys that came once are forgotten.
    pub fn decay(&mut self) {
        self.entries.retain(|_, entry| {
            (entry.count, entry.error) = (entry.count / 2, entry.error / 2);
            entry.count > 0
        });
        self.order = self.entries.iter().map(|(key, entry)| (entry.count, key.clone())).collect();
    }

    /// What is known of a key, if it is kept.
    #[must_use]
    pub fn get(&self, key: &K) -> Option<&Counted<V>> {
        self.entries.get(key)
    }

    /// All keys kept, the most frequent first.
    #[must_use]
    pub fn ranked(&self) -> Vec<(&K, &Counted<V>)> {
        self.order.iter().rev().map(|(_, key)| (key, &self.entries[key])).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::mix;

    #[test]
    fn what_is_asked_often_is_kept_and_no_count_is_too_low() {
        for seed in 0..20 {
            let (mut top, mut exact) = (Top::new(16), BTreeMap::new());
            for i in 0..4000u64 {
                let roll = mix(seed * 10_000 + i);
                // half of all touches go to five keys, the rest to a thousand
                let key = if roll.is_multiple_of(2) { (roll >> 8) % 5 } else { 5 + (roll >> 8) % 1000 };
                top.touch(key, i);
                *exact.entry(key).or_insert(0u64) += 1;
            }
            let ranked = top.ranked();
            assert_eq!(ranked.len(), 16);
            for (key, counted) in &ranked {
                let real = exact[*key];
                assert!((counted.count - counted.error..=counted.count).contains(&real), "{key}: {real} of {counted:?}");
            }
            let mut first: Vec<u64> = ranked.iter().take(5).map(|(key, _)| **key).collect();
            first.sort_unstable();
            assert_eq!(first, [0, 1, 2, 3, 4]);
        }
    }

    #[test]
    fn old_counts_fade() {
        let mut top = Top::new(4);
        (0..9).for_each(|i| top.touch("old", i));
        top.touch("once", 0);
        top.decay();
        assert_eq!((top.get(&"old").map(|c| (c.count, c.value)), top.get(&"once")), (Some((4, 8)), None));
        (0..5).for_each(|i| top.touch("new", i));
        assert_eq!(top.ranked()[0].0, &"new");
    }
}
