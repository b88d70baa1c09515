//! The pool against a naive model that recomputes everything at each step, and its answers to misuse.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use millrace_core::identity::Owner;
use millrace_core::ids::{BlockHash, Generation, Slot, SlotRef};
use millrace_core::message::{BlockOp, Evict, EvictCount, PinCount};
use millrace_core::pool::{Pool, PoolFull, Published};
use millrace_core::sampling::mix;

/// Names of a test are numbers from 1; block `n` follows block `(n - 1) / 3`, where 0 is the root.
fn name(n: u32) -> BlockHash {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    BlockHash(bytes)
}

/// Whose the blocks of the tests below are.
const OWNER: Owner = Owner(7);

/// In the walk each tree belongs to somebody else.
fn owner(n: u32) -> Owner {
    Owner(u64::from(path(n)[0]))
}

/// Block `n` and all before it, the first first.
fn path(n: u32) -> Vec<u32> {
    let mut path = vec![n];
    while let Some(p) = parent(path[0]) {
        path.insert(0, p);
    }
    path
}

fn parent(n: u32) -> Option<u32> {
    Some((n - 1) / 3).filter(|&p| p > 0)
}

fn drain(pool: &mut Pool) -> Vec<BlockOp> {
    std::iter::from_fn(|| pool.poll()).collect()
}

#[derive(Clone, Default)]
struct ModelSlot {
    generation: u32,
    refs: u32,
    name: Option<u32>,
    pinned: bool,
    used: u64,
}

#[derive(Default)]
struct Model {
    slots: Vec<ModelSlot>,
    clock: u64,
    stale: u64,
    held: Vec<SlotRef>,
    past: Vec<SlotRef>,
    /// Names to pin, in order.
    pins: Vec<u32>,
}

impl Model {
    fn find(&self, n: u32) -> Option<usize> {
        self.slots.iter().position(|s| s.name == Some(n))
    }

    fn children(&self, slot: usize) -> Vec<usize> {
        let Some(n) = self.slots[slot].name else { return Vec::new() };
        (0..self.slots.len()).filter(|&c| self.slots[c].name.is_some_and(|m| parent(m) == Some(n))).collect()
    }

    fn busy(&self, slot: usize) -> bool {
        self.slots[slot].refs > 0 || self.slots[slot].pinned || self.children(slot).into_iter().any(|c| self.busy(c))
    }

    fn free(&self) -> usize {
        self.slots.iter().filter(|s| s.refs == 0 && s.name.is_none()).count()
    }

    fn evictable(&self) -> usize {
        (0..self.slots.len()).filter(|&s| self.slots[s].name.is_some() && !self.busy(s)).count()
    }

    fn victim(&self) -> Option<usize> {
        let leaf = |&s: &usize| self.slots[s].name.is_some() && !self.busy(s) && self.children(s).is_empty();
        (0..self.slots.len()).filter(leaf).min_by_key(|&s| self.slots[s].used)
    }

    /// Follows an allocation that the pool made; gives the changes it must have told.
    fn give(&mut self, given: &[SlotRef]) -> Vec<BlockOp> {
        let mut ops = Vec::new();
        for at in given {
            let slot = at.slot.0 as usize;
            if self.free() == 0 {
                assert_eq!(Some(slot), self.victim(), "not the least recently used leaf");
                ops.push(BlockOp::Evicted(name(self.slots[slot].name.take().unwrap())));
            }
            let s = &mut self.slots[slot];
            assert!(s.refs == 0 && s.name.is_none(), "slot {slot} was given out while it was not free");
            s.generation += 1;
            s.refs = 1;
            assert_eq!(at.generation, Generation(s.generation));
        }
        self.held.extend(given);
        ops
    }

    fn pins_max(&self) -> usize {
        self.slots.len() / 2
    }

    fn set_pins(&mut self, pins: Vec<u32>) -> PinCount {
        let mut keep: Vec<usize> = Vec::new();
        for slot in pins.iter().filter_map(|&n| self.find(n)) {
            let before = parent(self.slots[slot].name.unwrap());
            if before.is_none_or(|p| keep.contains(&self.find(p).unwrap())) && keep.len() < self.pins_max() {
                keep.push(slot);
            }
        }
        for slot in 0..self.slots.len() {
            self.slots[slot].pinned = keep.contains(&slot);
        }
        let cached = pins.iter().filter(|&&n| self.find(n).is_some()).count();
        let count = PinCount { held: keep.len() as u32, absent: (pins.len() - cached) as u32, over: (cached - keep.len()) as u32 };
        self.pins = pins;
        count
    }

    /// Drops leaves among `chosen` until there is none that may go.
    fn drop_cached(&mut self, chosen: impl Fn(u32) -> bool) -> (EvictCount, Vec<BlockOp>) {
        let meant: Vec<usize> = (0..self.slots.len()).filter(|&s| self.slots[s].name.is_some_and(&chosen)).collect();
        let pinned = meant.iter().filter(|&&s| self.slots[s].pinned).count();
        let mut ops = Vec::new();
        while let Some(&slot) =
            meant.iter().find(|&&s| self.slots[s].name.is_some() && !self.busy(s) && self.children(s).is_empty())
        {
            ops.push(BlockOp::Evicted(name(self.slots[slot].name.take().unwrap())));
        }
        let kept = meant.len() - ops.len() - pinned;
        (EvictCount { dropped: ops.len() as u32, kept: kept as u32, pinned: pinned as u32 }, ops)
    }

    fn release(&mut self, at: SlotRef) {
        let s = &mut self.slots[at.slot.0 as usize];
        if s.generation != at.generation.0 || s.refs == 0 {
            self.stale += 1;
            return;
        }
        self.clock += 1;
        s.refs -= 1;
        s.used = self.clock;
    }

    fn publish(&mut self, at: SlotRef, n: u32) -> Published {
        let slot = at.slot.0 as usize;
        if self.slots[slot].generation != at.generation.0 || self.slots[slot].refs == 0 {
            self.stale += 1;
            Published::Stale
        } else if self.find(n).is_some() {
            Published::Duplicate
        } else if parent(n).is_some_and(|p| self.find(p).is_none()) {
            Published::Orphan
        } else {
            let room = self.slots.iter().filter(|s| s.pinned).count() < self.pins_max();
            let behind = parent(n).is_none_or(|p| self.find(p).is_some_and(|slot| self.slots[slot].pinned));
            self.slots[slot].pinned = self.pins.contains(&n) && behind && room;
            self.slots[slot].name = Some(n);
            Published::Stored
        }
    }
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0) % below
    }
}

fn step(pool: &mut Pool, model: &mut Model, dice: &mut Dice) {
    match dice.roll(9) {
        0 => {
            let n = dice.roll(5) as u32;
            let (free, evictable) = (model.free() as u32, model.evictable() as u32);
            match pool.alloc(n) {
                Ok(given) => {
                    assert_eq!(given.len(), n as usize);
                    let ops = model.give(&given);
                    assert_eq!(drain(pool), ops);
                }
                Err(full) => {
                    assert!(n > free + evictable);
                    assert_eq!(full, PoolFull { need: n, free, evictable });
                }
            }
        }
        1 => {
            let path = path(1 + dice.roll(80) as u32);
            let names: Vec<_> = path.iter().map(|&n| name(n)).collect();
            let run: Vec<usize> = path.iter().map_while(|&n| model.find(n)).collect();
            assert_eq!(pool.prefix(&names), run.len());
            let taken = pool.acquire(&names);
            assert_eq!(taken.iter().map(|at| at.slot.0 as usize).collect::<Vec<_>>(), run);
            run.iter().for_each(|&slot| model.slots[slot].refs += 1);
            model.held.extend(taken);
        }
        2 | 3 if !model.held.is_empty() => {
            let at = model.held[dice.roll(model.held.len() as u64) as usize];
            let n = model.slots[at.slot.0 as usize].name.unwrap_or(1 + dice.roll(80) as u32);
            let expected = model.publish(at, n);
            assert_eq!(pool.publish(at, parent(n).map(name), name(n), owner(n)), expected);
            let stored = expected == Published::Stored;
            assert_eq!(drain(pool), if stored { vec![BlockOp::Stored(name(n))] } else { vec![] });
        }
        4 if !model.held.is_empty() => {
            let at = model.held.swap_remove(dice.roll(model.held.len() as u64) as usize);
            model.release(at);
            pool.release(at);
            if !model.held.contains(&at) {
                model.past.push(at);
            }
        }
        _ if !model.past.is_empty() => {
            // What is past may have come back through the cache under the same generation: then it is not misuse but not ours either.
            let at = model.past[dice.roll(model.past.len() as u64) as usize];
            if !model.held.contains(&at) {
                model.release(at);
                pool.release(at);
                assert_eq!(pool.publish(at, None, name(1), OWNER), model.publish(at, 1));
            }
        }
        6 => {
            let mut pins: Vec<u32> = Vec::new();
            for _ in 0..dice.roll(4) {
                let chain = path(1 + dice.roll(80) as u32);
                pins.extend(chain.into_iter().filter(|n| !pins.contains(n)).collect::<Vec<_>>());
            }
            let names: Vec<_> = pins.iter().map(|&n| name(n)).collect();
            assert_eq!(pool.set_pins(&names), model.set_pins(pins));
        }
        7 => evict(pool, model, dice),
        _ => {}
    }
}

fn evict(pool: &mut Pool, model: &mut Model, dice: &mut Dice) {
    let n = 1 + dice.roll(80) as u32;
    let chain = path(n);
    let names: Vec<_> = chain.iter().map(|&n| name(n)).collect();
    let whole = pool.prefix(&names) == names.len();
    let what = match dice.roll(6) {
        0 => Evict::All,
        1 => Evict::Owner(owner(n)),
        _ => Evict::Prompt(names),
    };
    let before = pool.stats();
    let planned = pool.drop_cached(&what, true);
    assert_eq!((drain(pool), pool.stats()), (vec![], before), "a dry run changes nothing");
    let dropped = pool.drop_cached(&what, false);
    let (count, mut ops) = model.drop_cached(|m| match &what {
        Evict::All => true,
        Evict::Owner(whose) => owner(m) == *whose,
        // the run that is cached, and behind the last block everything
        Evict::Prompt(_) => chain.contains(&m) || (whole && path(m).contains(&n)),
    });
    assert_eq!((planned, dropped), (count, count), "{what:?}");
    let mut told = drain(pool);
    let key = |op: &BlockOp| op.block().0;
    ops.sort_by_key(key);
    told.sort_by_key(key);
    assert_eq!(told, ops);
}

#[test]
fn random_operations_follow_the_model() {
    let (mut evictions, mut pinned) = (0, 0);
    for seed in 0..60 {
        let mut dice = Dice(mix(seed));
        let total = 1 + dice.roll(24) as u32;
        let mut pool = Pool::new(total);
        let mut model = Model { slots: vec![ModelSlot::default(); total as usize], ..Model::default() };
        for _ in 0..400 {
            step(&mut pool, &mut model, &mut dice);
            pool.check();
            let stats = pool.stats();
            assert_eq!((stats.free as usize, stats.evictable as usize), (model.free(), model.evictable()), "seed {seed}");
            assert_eq!((stats.total, stats.stale_refs), (total, model.stale), "seed {seed}");
            let idle = model.slots.iter().filter(|s| s.pinned && s.refs == 0).count();
            assert_eq!(stats.pinned as usize, idle, "seed {seed}");
            pinned += idle;
            let cached: Vec<_> = model.slots.iter().filter_map(|s| s.name.map(name)).collect();
            assert_eq!(pool.cached_names().collect::<Vec<_>>(), cached);
            evictions += u64::from(model.free() == 0);
        }
        while let Some(at) = model.held.pop() {
            pool.release(at);
        }
        pool.check();
        assert_eq!(pool.stats().in_use, 0);
        let kept = pool.stats().pinned;
        assert!(pool.alloc(total - kept + 1).is_err(), "a pinned block is not given out");
        assert_eq!(pool.alloc(total - kept).map(|given| given.len() as u32), Ok(total - kept));
        pool.set_pins(&[]);
        pool.check();
        let total = kept;
        assert_eq!(pool.alloc(total).map(|given| given.len()), Ok(total as usize));
    }
    assert!(pinned > 1000, "the walk must meet pins: {pinned}");
    assert!(evictions > 1000, "the walk must spend time in a full pool: {evictions}");
}

#[test]
fn a_passed_generation_has_no_effect() {
    let mut pool = Pool::new(1);
    let old = pool.alloc(1).unwrap()[0];
    pool.release(old);
    let new = pool.alloc(1).unwrap()[0];
    assert_eq!((new.slot, old.slot), (Slot(0), Slot(0)));
    assert_ne!(new.generation, old.generation);
    pool.release(old);
    assert_eq!(pool.publish(old, None, name(1), OWNER), Published::Stale);
    assert_eq!((pool.refs(Slot(0)), pool.stats().in_use, pool.stats().stale_refs), (1, 1, 2));
    assert_eq!((pool.prefix(&[name(1)]), pool.poll()), (0, None));
    pool.check();
}

#[test]
fn a_second_release_is_counted_and_harmless() {
    let mut pool = Pool::new(2);
    let held = pool.alloc(2).unwrap();
    pool.publish(held[0], None, name(1), OWNER);
    for at in [held[0], held[0], held[1], held[1]] {
        pool.release(at);
        pool.check();
    }
    let stats = pool.stats();
    assert_eq!((stats.free, stats.evictable, stats.stale_refs), (1, 1, 2));
}

#[test]
fn a_freed_slot_cannot_be_published() {
    let mut pool = Pool::new(1);
    let at = pool.alloc(1).unwrap()[0];
    pool.release(at);
    assert_eq!(pool.publish(at, None, name(1), OWNER), Published::Stale);
    assert_eq!((pool.stats().cached, pool.stats().free), (0, 1));
    pool.check();
}

#[test]
fn unknown_slots_are_stale() {
    let mut pool = Pool::new(1);
    let at = SlotRef { slot: Slot(9), generation: Generation(1) };
    pool.release(at);
    assert_eq!(pool.publish(at, None, name(1), OWNER), Published::Stale);
    assert_eq!(pool.refs(Slot(9)), 0);
}

#[test]
fn leaves_go_first_and_an_idle_parent_stays_under_a_busy_child() {
    let mut pool = Pool::new(3);
    // One sequence cached block 1; another computed the same block elsewhere and builds block 4 on it.
    let (a, b) = (pool.alloc(1).unwrap()[0], pool.alloc(2).unwrap());
    assert_eq!(pool.publish(a, None, name(1), OWNER), Published::Stored);
    assert_eq!(pool.publish(b[0], None, name(1), OWNER), Published::Duplicate);
    assert_eq!(pool.publish(b[1], Some(name(1)), name(4), OWNER), Published::Stored);
    pool.release(a);
    pool.check();
    assert_eq!(pool.stats().evictable, 0, "block 1 is idle itself, but what follows it is in use");
    assert!(pool.alloc(1).is_err());
    pool.release(b[0]);
    pool.release(b[1]);
    drain(&mut pool);
    assert_eq!(pool.stats().evictable, 2);
    pool.alloc(3).unwrap();
    assert_eq!(drain(&mut pool), [BlockOp::Evicted(name(4)), BlockOp::Evicted(name(1))], "the older parent goes after its child");
}

#[test]
fn an_orphan_is_not_cached() {
    let mut pool = Pool::new(1);
    let at = pool.alloc(1).unwrap()[0];
    assert_eq!(pool.publish(at, Some(name(1)), name(4), OWNER), Published::Orphan);
    assert_eq!(pool.stats().cached, 0);
    pool.check();
}

#[test]
#[should_panic(expected = "holds another block")]
fn a_slot_has_one_name_for_its_life() {
    let mut pool = Pool::new(1);
    let at = pool.alloc(1).unwrap()[0];
    pool.publish(at, None, name(1), OWNER);
    pool.publish(at, None, name(2), OWNER);
}

#[test]
fn a_pin_outlives_pressure_and_ends_when_it_is_taken_back() {
    let mut pool = Pool::new(4);
    let held = pool.alloc(3).unwrap();
    for (at, n) in held.iter().zip([1, 4, 13]) {
        pool.publish(*at, parent(n).map(name), name(n), OWNER);
    }
    held.iter().for_each(|at| pool.release(*at));
    let count = pool.set_pins(&[name(1), name(4), name(13), name(40)]);
    assert_eq!(count, PinCount { held: 2, absent: 1, over: 1 }, "half of the pool, from the front of the chain");
    assert_eq!(pool.alloc(3).unwrap_err(), PoolFull { need: 3, free: 1, evictable: 1 });
    drain(&mut pool);
    let taken = pool.alloc(2).unwrap();
    assert_eq!(drain(&mut pool), [BlockOp::Evicted(name(13))]);
    assert_eq!(pool.drop_cached(&Evict::All, false), EvictCount { dropped: 0, kept: 0, pinned: 2 });
    assert_eq!((pool.prefix(&[name(1), name(4)]), pool.set_pins(&[])), (2, PinCount::default()));
    assert_eq!(pool.alloc(2).unwrap().len(), 2, "unpinned, they go like any other");
    taken.iter().for_each(|at| pool.release(*at));
    pool.check();
}

#[test]
fn a_block_that_comes_after_its_pin_is_kept() {
    let mut pool = Pool::new(2);
    assert_eq!(pool.set_pins(&[name(1)]), PinCount { held: 0, absent: 1, over: 0 });
    let at = pool.alloc(1).unwrap()[0];
    pool.publish(at, None, name(1), OWNER);
    pool.release(at);
    assert_eq!((pool.stats().pinned, pool.alloc(2).is_err()), (1, true));
    pool.check();
}

#[test]
fn only_what_nobody_else_continues_is_evicted_with_a_prompt() {
    let mut pool = Pool::new(8);
    // Two prompts share block 1; a third continues the first of them.
    let held = pool.alloc(4).unwrap();
    for (at, n) in held.iter().zip([1, 4, 5, 13]) {
        pool.publish(*at, parent(n).map(name), name(n), OWNER);
    }
    held.iter().for_each(|at| pool.release(*at));
    let prompt = Evict::Prompt(vec![name(1), name(4)]);
    assert_eq!(pool.drop_cached(&prompt, false), EvictCount { dropped: 2, kept: 1, pinned: 0 });
    assert_eq!((pool.prefix(&[name(1), name(5)]), pool.prefix(&[name(1), name(4)])), (2, 1));
    pool.check();
    assert_eq!(pool.drop_cached(&Evict::Owner(Owner(1)), false), EvictCount::default(), "nothing is somebody else's");
    assert_eq!(pool.drop_cached(&Evict::Owner(OWNER), false), EvictCount { dropped: 2, kept: 0, pinned: 0 });
    assert_eq!(pool.stats().free, 8);
}

#[test]
fn a_damaged_block_goes_with_all_that_continues_it_though_it_is_pinned() {
    let mut pool = Pool::new(8);
    let held = pool.alloc(3).unwrap();
    for (at, n) in held.iter().zip([1, 4, 13]) {
        pool.publish(*at, parent(n).map(name), name(n), OWNER);
    }
    held.iter().for_each(|at| pool.release(*at));
    pool.set_pins(&[name(1), name(4), name(13)]);
    assert_eq!(pool.drop_damaged(&name(4)), EvictCount { dropped: 2, kept: 0, pinned: 0 });
    pool.check();
    assert_eq!((pool.prefix(&[name(1), name(4)]), pool.stats().pinned, pool.stats().free), (1, 1, 7));
}
