//! The pool against a naive model that recomputes everything at each step, and its answers to misuse.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use millrace_core::ids::{BlockHash, Generation, Slot, SlotRef};
use millrace_core::message::BlockOp;
use millrace_core::pool::{Pool, PoolFull, Published};
use millrace_core::sampling::mix;

/// Names of a test are numbers from 1; block `n` follows block `(n - 1) / 3`, where 0 is the root.
fn name(n: u32) -> BlockHash {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    BlockHash(bytes)
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
    used: u64,
}

#[derive(Default)]
struct Model {
    slots: Vec<ModelSlot>,
    clock: u64,
    stale: u64,
    held: Vec<SlotRef>,
    past: Vec<SlotRef>,
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
        self.slots[slot].refs > 0 || self.children(slot).into_iter().any(|c| self.busy(c))
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
    match dice.roll(6) {
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
            let mut path = vec![1 + dice.roll(80) as u32];
            while let Some(p) = parent(path[0]) {
                path.insert(0, p);
            }
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
            assert_eq!(pool.publish(at, parent(n).map(name), name(n)), expected);
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
                assert_eq!(pool.publish(at, None, name(1)), model.publish(at, 1));
            }
        }
        _ => {}
    }
}

#[test]
fn random_operations_follow_the_model() {
    let mut evictions = 0;
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
            let cached: Vec<_> = model.slots.iter().filter_map(|s| s.name.map(name)).collect();
            assert_eq!(pool.cached_names().collect::<Vec<_>>(), cached);
            evictions += u64::from(model.free() == 0);
        }
        while let Some(at) = model.held.pop() {
            pool.release(at);
        }
        pool.check();
        assert_eq!(pool.stats().in_use, 0);
        assert_eq!(pool.alloc(total).map(|given| given.len()), Ok(total as usize));
    }
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
    assert_eq!(pool.publish(old, None, name(1)), Published::Stale);
    assert_eq!((pool.refs(Slot(0)), pool.stats().in_use, pool.stats().stale_refs), (1, 1, 2));
    assert_eq!((pool.prefix(&[name(1)]), pool.poll()), (0, None));
    pool.check();
}

#[test]
fn a_second_release_is_counted_and_harmless() {
    let mut pool = Pool::new(2);
    let held = pool.alloc(2).unwrap();
    pool.publish(held[0], None, name(1));
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
    assert_eq!(pool.publish(at, None, name(1)), Published::Stale);
    assert_eq!((pool.stats().cached, pool.stats().free), (0, 1));
    pool.check();
}

#[test]
fn unknown_slots_are_stale() {
    let mut pool = Pool::new(1);
    let at = SlotRef { slot: Slot(9), generation: Generation(1) };
    pool.release(at);
    assert_eq!(pool.publish(at, None, name(1)), Published::Stale);
    assert_eq!(pool.refs(Slot(9)), 0);
}

#[test]
fn leaves_go_first_and_an_idle_parent_stays_under_a_busy_child() {
    let mut pool = Pool::new(3);
    // One sequence cached block 1; another computed the same block elsewhere and builds block 4 on it.
    let (a, b) = (pool.alloc(1).unwrap()[0], pool.alloc(2).unwrap());
    assert_eq!(pool.publish(a, None, name(1)), Published::Stored);
    assert_eq!(pool.publish(b[0], None, name(1)), Published::Duplicate);
    assert_eq!(pool.publish(b[1], Some(name(1)), name(4)), Published::Stored);
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
    assert_eq!(pool.publish(at, Some(name(1)), name(4)), Published::Orphan);
    assert_eq!(pool.stats().cached, 0);
    pool.check();
}

#[test]
#[should_panic(expected = "holds another block")]
fn a_slot_has_one_name_for_its_life() {
    let mut pool = Pool::new(1);
    let at = pool.alloc(1).unwrap()[0];
    pool.publish(at, None, name(1));
    pool.publish(at, None, name(2));
}
