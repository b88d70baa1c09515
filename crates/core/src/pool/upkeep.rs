//! What operators and the log may do to a pool's cache: pin chains of blocks, drop blocks, look at them.
//!
//! A pinned block's whole chain is pinned, so pins keep exactly the blocks that they name: at most [`pins_max`] of a pool.

use alloc::vec::Vec;
use hashbrown::HashSet;

use super::Pool;
use crate::ids::{BlockHash, Generation, Slot, SlotRef};
use crate::message::{Evict, EvictCount, PinCount};

/// Share of a pool that pins may keep, percent; blocks beyond it are not pinned and counted in [`PinCount::over`].
pub const PIN_PERCENT_MAX: u32 = 50;

/// Slots of a pool that pins may keep.
#[must_use]
pub const fn pins_max(slots: u32) -> u32 {
    (slots as u64 * PIN_PERCENT_MAX as u64 / 100) as u32
}

/// A cached block, as somebody sees it who does not use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident {
    /// Where it is.
    pub at: SlotRef,
    /// Its name.
    pub name: BlockHash,
    /// Nobody holds a reference.
    pub idle: bool,
}

impl Pool {
    /// Pins these blocks and no others, those that are cached now and those that come later. `names` has each block after the one
    /// before it in its chain; earlier ones win when the share does not suffice for all. O(slots + names).
    pub fn set_pins(&mut self, names: &[BlockHash]) -> PinCount {
        let (mut keep, mut absent) = (HashSet::new(), 0);
        for name in names {
            let Some(&slot) = self.by_name.get(name) else {
                absent += 1;
                continue;
            };
            let parent = self.entries[slot as usize].block.and_then(|block| block.parent);
            if parent.is_none_or(|parent| keep.contains(&parent)) && keep.len() < pins_max(self.entries.len() as u32) as usize {
                keep.insert(slot);
            }
        }
        self.pins = names.iter().copied().collect();
        for slot in 0..self.entries.len() as u32 {
            let pinned = self.entries[slot as usize].block.is_some_and(|block| block.pinned);
            match (pinned, keep.contains(&slot)) {
                (true, false) => self.unpin(slot),
                (false, true) => self.pin(slot),
                _ => {}
            }
        }
        let (held, named) = (self.pinned, self.pins.len() as u32);
        PinCount { held, absent, over: named.saturating_sub(held + absent) }
    }

    /// Slots that a sequence with these leading blocks could have if nobody used any other: all but those that pins keep from it. O(names).
    #[must_use]
    pub fn reach(&self, names: &[BlockHash]) -> usize {
        let pinned = |name: &&BlockHash| {
            let slot = self.by_name.get(*name);
            slot.is_some_and(|slot| self.entries[*slot as usize].block.is_some_and(|block| block.pinned))
        };
        self.entries.len() - self.pinned as usize + names.iter().take_while(pinned).count()
    }

    /// Whether a block that is about to be cached behind `parent` is pinned from the start.
    pub(super) fn born_pinned(&self, parent: Option<u32>, name: &BlockHash) -> bool {
        let behind = parent.is_none_or(|parent| self.entries[parent as usize].block.is_some_and(|block| block.pinned));
        self.pins.contains(name) && behind && self.pinned < pins_max(self.entries.len() as u32)
    }

    fn pin(&mut self, slot: u32) {
        let entry = &mut self.entries[slot as usize];
        let was_busy = entry.busy();
        entry.block.as_mut().expect("only cached blocks are pinned").pinned = true;
        self.pinned += 1;
        self.pinned_idle += u32::from(entry.refs == 0);
        if !was_busy {
            self.enter_use(slot);
        }
    }

    fn unpin(&mut self, slot: u32) {
        let entry = &mut self.entries[slot as usize];
        entry.block.as_mut().expect("only cached blocks are pinned").pinned = false;
        self.pinned -= 1;
        self.pinned_idle -= u32::from(entry.refs == 0);
        if !entry.busy() {
            self.leave_use(slot);
        }
    }

    /// Drops cached blocks that nobody uses, or counts what it would drop. A block goes only after all that continue it. O(slots).
    pub fn drop_cached(&mut self, what: &Evict, dry_run: bool) -> EvictCount {
        let chosen = self.chosen(what);
        let mut count = EvictCount::default();
        let mut children: Vec<u32> = self.entries.iter().map(|e| e.block.map_or(0, |block| block.children)).collect();
        let goes = |pool: &Self, slot: usize, children: u32| chosen[slot] && children == 0 && !pool.entries[slot].busy();
        let mut next: Vec<usize> = (0..self.entries.len()).filter(|&slot| goes(self, slot, children[slot])).collect();
        while let Some(slot) = next.pop() {
            let parent = self.entries[slot].block.and_then(|block| block.parent);
            if !dry_run {
                self.take_out(slot as u32);
                self.free.push(slot as u32);
            }
            count.dropped += 1;
            if let Some(parent) = parent.map(|parent| parent as usize) {
                children[parent] -= 1;
                if goes(self, parent, children[parent]) {
                    next.push(parent);
                }
            }
        }
        let all = chosen.iter().filter(|chosen| **chosen).count() as u32;
        let pinned = |(slot, chosen): (usize, &bool)| *chosen && self.entries[slot].block.is_some_and(|block| block.pinned);
        count.pinned = chosen.iter().enumerate().filter(|one| pinned(*one)).count() as u32;
        count.kept = all - count.dropped - count.pinned;
        count
    }

    /// Drops a block whose bytes are wrong, and all that continues it, pinned or not; what a sequence uses stays. O(slots).
    pub fn drop_damaged(&mut self, name: &BlockHash) -> EvictCount {
        let Some(&root) = self.by_name.get(name) else { return EvictCount::default() };
        for (slot, wrong) in self.continuations(root).into_iter().enumerate() {
            if let Some(block) = self.entries[slot].block.filter(|block| wrong && block.pinned) {
                self.pins.remove(&block.name);
                self.unpin(slot as u32);
            }
        }
        self.drop_cached(&Evict::Prompt(alloc::vec![*name]), false)
    }

    /// For each slot, whether it holds a block that is meant.
    fn chosen(&self, what: &Evict) -> Vec<bool> {
        let block = |slot: &super::Entry| slot.block;
        match what {
            Evict::All => self.entries.iter().map(|entry| block(entry).is_some()).collect(),
            Evict::Owner(owner) => self.entries.iter().map(|entry| block(entry).is_some_and(|b| b.owner == *owner)).collect(),
            Evict::Prompt(names) => {
                let run: Vec<u32> = names.iter().map_while(|name| self.by_name.get(name).copied()).collect();
                let mut chosen = match run.last().filter(|_| run.len() == names.len()) {
                    Some(last) => self.continuations(*last),
                    None => alloc::vec![false; self.entries.len()],
                };
                run.iter().for_each(|slot| chosen[*slot as usize] = true);
                chosen
            }
        }
    }

    /// For each slot, whether its block comes after the one in `root`. O(slots): each is looked at once.
    fn continuations(&self, root: u32) -> Vec<bool> {
        let mut known: Vec<Option<bool>> = alloc::vec![None; self.entries.len()];
        known[root as usize] = Some(true);
        for slot in 0..self.entries.len() as u32 {
            let (mut path, mut at) = (Vec::new(), Some(slot));
            let verdict = loop {
                let Some(here) = at else { break false };
                if let Some(verdict) = known[here as usize] {
                    break verdict;
                }
                path.push(here);
                at = self.entries[here as usize].block.and_then(|block| block.parent);
            };
            path.into_iter().for_each(|slot| known[slot as usize] = Some(verdict));
        }
        known.into_iter().map(|verdict| verdict == Some(true)).collect()
    }

    /// All cached blocks, in the order of their slots. O(slots).
    pub fn residents(&self) -> impl Iterator<Item = Resident> + '_ {
        (0..self.entries.len() as u32).filter_map(|slot| self.resident_in(slot))
    }

    /// The block of this name, if it is cached.
    #[must_use]
    pub fn resident(&self, name: &BlockHash) -> Option<Resident> {
        self.by_name.get(name).and_then(|slot| self.resident_in(*slot))
    }

    fn resident_in(&self, slot: u32) -> Option<Resident> {
        let entry = &self.entries[slot as usize];
        let at = SlotRef { slot: Slot(slot), generation: Generation(entry.generation) };
        entry.block.map(|block| Resident { at, name: block.name, idle: entry.refs == 0 })
    }

    /// Asserts what must hold of pins.
    pub(super) fn check_pins(&self) {
        let (mut pinned, mut idle) = (0, 0);
        for (slot, entry) in self.entries.iter().enumerate() {
            let Some(block) = entry.block.filter(|block| block.pinned) else { continue };
            (pinned, idle) = (pinned + 1, idle + u32::from(entry.refs == 0));
            assert!(self.pins.contains(&block.name), "slot {slot} is pinned and nobody asked for it");
            let before = block.parent.and_then(|parent| self.entries[parent as usize].block);
            assert!(before.is_none_or(|before| before.pinned), "slot {slot} is pinned and the block before it is not");
        }
        assert_eq!((pinned, idle), (self.pinned, self.pinned_idle), "pins");
        assert!(pinned <= pins_max(self.entries.len() as u32), "{pinned} blocks are pinned");
    }
}
