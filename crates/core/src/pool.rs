//! The paged allocator and its prefix cache: which slot holds which block, who may still read it, what goes first when room is needed.
//!
//! A slot is *free* (nothing in it), *in use* (somebody holds a reference, or a cached block that follows it is in use),
//! *pinned* (cached, read by nobody, and to be kept) or *evictable* (cached, read by nobody). Cached blocks form trees by their parents: a block is cached only while the one before it is,
//! so eviction takes leaves first, the least recently used of them. A [`SlotRef`] whose generation has passed has no effect.
//! The pool knows nothing of tokens, sequences or bytes. Idea: vLLM's block pool and SGLang's radix cache, one table for both.

mod upkeep;

pub use upkeep::{PIN_PERCENT_MAX, Resident, pins_max};

use alloc::collections::{BTreeSet, VecDeque};
use alloc::vec::Vec;

use hashbrown::{HashMap, HashSet};

use crate::identity::Owner;
use crate::ids::{BlockHash, Generation, Slot, SlotRef};
use crate::message::BlockOp;
use crate::planted::{Bug, planted};

/// The pool has not so many slots to give now. Nothing was given or evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{need} blocks needed, {free} free and {evictable} evictable")]
pub struct PoolFull {
    /// Slots asked for.
    pub need: u32,
    /// Slots that hold nothing.
    pub free: u32,
    /// Slots that hold cached blocks nobody reads.
    pub evictable: u32,
}

/// What became of a [`Pool::publish`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// The block can be found from now on.
    Stored,
    /// The name is cached already, in this slot or another: nothing changed.
    Duplicate,
    /// The block before it is not cached, so nobody could find this one: nothing changed.
    Orphan,
    /// The reference has passed, or nobody holds the slot: nothing changed, and counted.
    Stale,
}

/// How full a pool is, in slots: `free + evictable + pinned + in_use == total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// All slots.
    pub total: u32,
    /// Holding nothing.
    pub free: u32,
    /// Cached, read by nobody: given out on demand.
    pub evictable: u32,
    /// Cached, read by nobody, and never given out while the pin lasts.
    pub pinned: u32,
    /// Referenced, or cached before a block that is.
    pub in_use: u32,
    /// Holding a block that can be found, in use or not.
    pub cached: u32,
    /// References that had passed when they were used, since the start.
    pub stale_refs: u64,
}

/// A block that can be found.
#[derive(Clone, Copy, Debug)]
struct Cached {
    name: BlockHash,
    owner: Owner,
    /// Counts as in use whoever reads it.
    pinned: bool,
    /// Slot of the block before it; stays put, since a parent outlives its children.
    parent: Option<u32>,
    /// Cached blocks right after this one.
    children: u32,
    /// Those of them that are in use.
    busy_children: u32,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    generation: u32,
    refs: u32,
    block: Option<Cached>,
    /// When the last reference was dropped, on the pool's own counter.
    used: u64,
}

impl Entry {
    fn busy(&self) -> bool {
        self.refs > 0 || self.block.is_some_and(|b| b.pinned && !planted(Bug::EvictPinned) || b.busy_children > 0)
    }

    fn leaf(&self) -> bool {
        self.block.is_some_and(|b| b.children == 0)
    }
}

/// All slots of one node.
#[derive(Debug)]
pub struct Pool {
    entries: Vec<Entry>,
    free: Vec<u32>,
    by_name: HashMap<BlockHash, u32>,
    /// Evictable slots without cached children, by `used`.
    leaves: BTreeSet<(u64, u32)>,
    evictable: u32,
    /// Names to be pinned, cached or not.
    pins: HashSet<BlockHash>,
    /// Blocks that are.
    pinned: u32,
    /// Those of them that nobody references.
    pinned_idle: u32,
    clock: u64,
    stale_refs: u64,
    ops: VecDeque<BlockOp>,
}

impl Pool {
    /// A pool of `slots` free slots.
    #[must_use]
    pub fn new(slots: u32) -> Self {
        Self {
            entries: alloc::vec![Entry::default(); slots as usize],
            free: (0..slots).rev().collect(),
            by_name: HashMap::new(),
            leaves: BTreeSet::new(),
            evictable: 0,
            pins: HashSet::new(),
            pinned: 0,
            pinned_idle: 0,
            clock: 0,
            stale_refs: 0,
            ops: VecDeque::new(),
        }
    }

    /// Gives out `n` slots with one reference each, all or none, evicting cached blocks when free slots do not suffice.
    /// Each giving-out raises the slot's generation. O(n log slots).
    pub fn alloc(&mut self, n: u32) -> Result<Vec<SlotRef>, PoolFull> {
        let free = self.free.len() as u32;
        if n > free + self.evictable {
            return Err(PoolFull { need: n, free, evictable: self.evictable });
        }
        Ok((0..n).map(|_| self.give()).collect())
    }

    fn give(&mut self) -> SlotRef {
        let free = if planted(Bug::SlotTwice) { self.free.last().copied() } else { self.free.pop() };
        let slot = free.unwrap_or_else(|| self.evict());
        let entry = &mut self.entries[slot as usize];
        // After 2^32 giving-outs of one slot a generation returns; no reference lives that long.
        entry.generation = entry.generation.wrapping_add(u32::from(!planted(Bug::GenerationKept)));
        entry.refs = 1;
        SlotRef { slot: Slot(slot), generation: Generation(entry.generation) }
    }

    /// Takes the least recently used leaf out of the cache and returns its slot.
    fn evict(&mut self) -> u32 {
        let &(_, slot) = self.leaves.first().expect("an evictable block has an evictable leaf below it");
        self.take_out(slot);
        slot
    }

    /// Takes an evictable leaf out of the cache; its slot is the caller's.
    fn take_out(&mut self, slot: u32) {
        let entry = &mut self.entries[slot as usize];
        let block = entry.block.take().expect("leaves are cached");
        self.leaves.remove(&(entry.used, slot));
        self.by_name.remove(&block.name);
        self.evictable -= 1;
        if !planted(Bug::EvictionUnsaid) {
            self.ops.push_back(BlockOp::Evicted(block.name));
        }
        if let Some(parent) = block.parent {
            let entry = &mut self.entries[parent as usize];
            entry.block.as_mut().expect("a parent outlives its children").children -= 1;
            if !entry.busy() && entry.leaf() {
                self.leaves.insert((entry.used, parent));
            }
        }
    }

    /// How many of the leading `names` are cached. Takes nothing and marks nothing as used.
    #[must_use]
    pub fn prefix(&self, names: &[BlockHash]) -> usize {
        names.iter().take_while(|name| self.by_name.contains_key(*name)).count()
    }

    /// Takes a reference on each block of the longest leading run of `names` that is cached.
    pub fn acquire(&mut self, names: &[BlockHash]) -> Vec<SlotRef> {
        let mut run = Vec::new();
        for name in names {
            let Some(&slot) = self.by_name.get(name) else { break };
            let entry = &mut self.entries[slot as usize];
            let was_busy = entry.busy();
            entry.refs += u32::from(!planted(Bug::HitUnheld));
            self.pinned_idle -= u32::from(entry.refs == 1 && entry.block.is_some_and(|b| b.pinned));
            run.push(SlotRef { slot: Slot(slot), generation: Generation(entry.generation) });
            if !was_busy {
                self.enter_use(slot);
            }
        }
        run
    }

    /// From now on the block in `at` can be found under `name`, behind the block `parent` (`None` for a first block); it is `owner`'s.
    pub fn publish(&mut self, at: SlotRef, parent: Option<BlockHash>, name: BlockHash, owner: Owner) -> Published {
        let slot = at.slot.0;
        if !self.holds(at) {
            self.stale_refs += 1;
            return Published::Stale;
        }
        if self.by_name.contains_key(&name) {
            return Published::Duplicate;
        }
        let parent = match parent.map(|p| self.by_name.get(&p).copied()) {
            Some(None) => return Published::Orphan,
            Some(found) => found,
            None => None,
        };
        let pinned = self.born_pinned(parent, &name);
        self.pinned += u32::from(pinned);
        let entry = &mut self.entries[slot as usize];
        assert!(entry.block.is_none(), "slot {slot} holds another block already: content never changes within a generation");
        entry.block = Some(Cached { name, owner, pinned, parent, children: 0, busy_children: 0 });
        self.by_name.insert(name, slot);
        self.ops.push_back(BlockOp::Stored(name));
        if let Some(parent) = parent {
            self.adopt(parent);
        }
        Published::Stored
    }

    /// Counts a new child, which is in use, at `parent`.
    fn adopt(&mut self, parent: u32) {
        let entry = &mut self.entries[parent as usize];
        if !entry.busy() && entry.leaf() {
            self.leaves.remove(&(entry.used, parent));
        }
        entry.block.as_mut().expect("parents are cached").children += 1;
        self.count_busy_child(parent);
    }

    /// Drops one reference. At none, a published block stays cached and becomes evictable, any other slot is free again.
    /// A passed generation, or a slot that nobody holds (a second release), has no effect and is counted;
    /// while others still hold the slot a second release cannot be told from a first.
    pub fn release(&mut self, at: SlotRef) {
        if !self.holds(at) {
            self.stale_refs += 1;
            return;
        }
        let slot = at.slot.0;
        self.clock += 1;
        let entry = &mut self.entries[slot as usize];
        entry.refs -= 1;
        entry.used = self.clock;
        if entry.refs > 0 {
            return;
        }
        self.pinned_idle += u32::from(entry.block.is_some_and(|b| b.pinned));
        if entry.block.is_none() {
            self.free.push(slot);
        } else if !entry.busy() {
            self.leave_use(slot);
        }
    }

    /// Whether `at` is current and somebody holds it.
    fn holds(&self, at: SlotRef) -> bool {
        self.entries.get(at.slot.0 as usize).is_some_and(|e| e.generation == at.generation.0 && e.refs > 0)
    }

    /// A cached block that was idle is in use now; so is all before it. Amortised O(1): each level changes only when its first user comes.
    fn enter_use(&mut self, slot: u32) {
        self.evictable -= 1;
        let entry = &self.entries[slot as usize];
        if !planted(Bug::EvictInUse) {
            self.leaves.remove(&(entry.used, slot));
        }
        if let Some(parent) = entry.block.expect("only cached blocks are idle").parent {
            self.count_busy_child(parent);
        }
    }

    fn count_busy_child(&mut self, parent: u32) {
        let mut next = Some(parent);
        while let Some(slot) = next {
            let entry = &mut self.entries[slot as usize];
            let was_busy = entry.busy();
            let block = entry.block.as_mut().expect("a parent outlives its children");
            block.busy_children += 1;
            next = if was_busy { None } else { block.parent };
            if !was_busy {
                self.evictable -= 1;
            }
        }
    }

    /// A cached block has lost its last user; so may those before it.
    fn leave_use(&mut self, slot: u32) {
        let mut next = Some(slot);
        while let Some(slot) = next {
            self.evictable += 1;
            let entry = &self.entries[slot as usize];
            if entry.leaf() {
                self.leaves.insert((entry.used, slot));
            }
            next = entry.block.expect("only cached blocks become evictable").parent.filter(|&parent| {
                let entry = &mut self.entries[parent as usize];
                entry.block.as_mut().expect("a parent outlives its children").busy_children -= 1;
                !entry.busy()
            });
        }
    }

    /// How full the pool is.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let (total, free) = (self.entries.len() as u32, self.free.len() as u32);
        PoolStats {
            total,
            free,
            evictable: self.evictable,
            pinned: self.pinned_idle,
            in_use: total - free - self.evictable - self.pinned_idle,
            cached: self.by_name.len() as u32,
            stale_refs: self.stale_refs,
        }
    }

    /// The next change of what is cached, in the order of happening. To be drained after every call that changes the pool: that is its bound.
    pub fn poll(&mut self) -> Option<BlockOp> {
        self.ops.pop_front()
    }

    /// All cached blocks, in the order of their slots; equals the sum of all changes up to now, polled or not. O(slots).
    pub fn cached_names(&self) -> impl Iterator<Item = BlockHash> + '_ {
        self.entries.iter().filter_map(|entry| entry.block.map(|b| b.name))
    }

    /// References held on a slot.
    #[must_use]
    pub fn refs(&self, slot: Slot) -> u32 {
        self.entries.get(slot.0 as usize).map_or(0, |e| e.refs)
    }

    /// Asserts every invariant: conservation, counters, names, leaf order. O(slots log slots), for tests and the simulator.
    pub fn check(&self) {
        let mut seen = alloc::vec![false; self.entries.len()];
        for &slot in &self.free {
            assert!(!core::mem::replace(&mut seen[slot as usize], true), "slot {slot} is free twice");
            let entry = &self.entries[slot as usize];
            assert!(entry.refs == 0 && entry.block.is_none(), "slot {slot} is free and not empty");
        }
        let mut children = alloc::vec![(0u32, 0u32); self.entries.len()];
        let (mut idle, mut idle_leaves, mut cached) = (0, 0, 0);
        for (slot, entry) in self.entries.iter().enumerate() {
            let Some(block) = entry.block else {
                assert!(entry.refs > 0 || seen[slot], "slot {slot} is lost");
                continue;
            };
            cached += 1;
            assert_eq!(self.by_name.get(&block.name), Some(&(slot as u32)), "the name of slot {slot} leads elsewhere");
            if let Some(parent) = block.parent {
                assert!(self.entries[parent as usize].block.is_some(), "slot {slot} outlived its parent {parent}");
                children[parent as usize].0 += 1;
                children[parent as usize].1 += u32::from(entry.busy());
            }
            if !entry.busy() {
                idle += 1;
                idle_leaves += usize::from(entry.leaf());
                assert_eq!(self.leaves.contains(&(entry.used, slot as u32)), entry.leaf(), "slot {slot} and the eviction order");
            }
        }
        for (slot, entry) in self.entries.iter().enumerate() {
            let counted = entry.block.map_or((0, 0), |b| (b.children, b.busy_children));
            assert_eq!(counted, children[slot], "children of slot {slot}");
        }
        assert_eq!((idle, idle_leaves, cached), (self.evictable, self.leaves.len(), self.by_name.len()));
        let stats = self.stats();
        let in_use = self.entries.iter().filter(|e| e.busy()).count() as u32;
        assert_eq!(stats.in_use + stats.pinned, in_use, "conservation: {stats:?}");
        self.check_pins();
    }
}
