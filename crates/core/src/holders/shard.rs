//! A part of the index: the blocks whose names begin with the same bits, in one open-addressing table.
//!
//! A name is keyed BLAKE3, so its own bits are the hash: the first choose the shard, the last eight bytes the place in the table. Who does
//! not know a tenant's key cannot choose names that collide.

use alloc::vec::Vec;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry as Slot;

use super::place::{Incarnation, Lists, Location, Locations, Place};
use crate::ids::BlockHash;
use crate::message::Tier;

/// Shards of the index: what one copy-on-write copies, and what one table's growth moves, is a thousandth of it.
pub(super) const SHARDS: usize = 1 << SHARD_BITS;
const SHARD_BITS: u32 = 10;

/// The shard of a block. Shards in order hold blocks in the order of their names.
pub(super) const fn shard_of(block: &BlockHash) -> usize {
    (u16::from_be_bytes([block.0[0], block.0[1]]) >> (u16::BITS - SHARD_BITS)) as usize
}

const fn hash(block: &BlockHash) -> u64 {
    let [.., a, b, c, d, e, f, g, h] = block.0;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    block: BlockHash,
    place: Place,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Shard {
    table: HashTable<Entry>,
    lists: Lists,
}

impl Shard {
    /// Where `block` is.
    pub fn locations(&self, block: &BlockHash) -> Locations<'_> {
        let entry = self.table.find(hash(block), |entry| entry.block == *block);
        entry.map_or(Locations::NONE, |entry| self.lists.locations(entry.place))
    }

    /// Adds a location or changes its tier; gives the tier that it had.
    pub fn insert(&mut self, block: &BlockHash, location: Location) -> Option<Tier> {
        let Self { table, lists } = self;
        match table.entry(hash(block), |entry| entry.block == *block, |entry| hash(&entry.block)) {
            Slot::Occupied(mut entry) => lists.insert(&mut entry.get_mut().place, location),
            Slot::Vacant(vacant) => {
                let mut place = Place::default();
                lists.insert(&mut place, location);
                vacant.insert(Entry { block: *block, place });
                None
            }
        }
    }

    /// Takes a holder of a block out; gives the tier in which it had it.
    pub fn remove(&mut self, block: &BlockHash, holder: Incarnation) -> Option<Tier> {
        let mut entry = self.table.find_entry(hash(block), |entry| entry.block == *block).ok()?;
        let old = self.lists.remove(&mut entry.get_mut().place, holder);
        if entry.get().place.is_empty() {
            entry.remove();
        }
        old
    }

    /// Keeps the holders that `alive` approves, and gives back memory that is no longer needed. O(blocks).
    pub fn retain(&mut self, alive: impl Fn(Incarnation) -> bool) {
        let Self { table, lists } = self;
        table.retain(|entry| {
            lists.retain(&mut entry.place, |location| alive(location.holder()));
            !entry.place.is_empty()
        });
        if table.len() < table.capacity() / 4 {
            table.shrink_to(table.len() * 2, |entry| hash(&entry.block));
        }
    }

    /// Makes room for so many blocks more.
    pub fn reserve(&mut self, blocks: usize) {
        self.table.reserve(blocks, |entry| hash(&entry.block));
    }

    /// Blocks, those included whose holders are all dead.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// All blocks, sorted by name. O(n log n).
    pub fn sorted(&self) -> Vec<(BlockHash, Locations<'_>)> {
        let mut blocks: Vec<_> = self.table.iter().map(|e| (e.block, self.lists.locations(e.place))).collect();
        blocks.sort_unstable_by_key(|(block, _)| *block);
        blocks
    }

    /// All blocks, in no order that may leave the module.
    pub fn iter(&self) -> impl Iterator<Item = (&BlockHash, Locations<'_>)> {
        self.table.iter().map(|e| (&e.block, self.lists.locations(e.place)))
    }

    /// Whether each list belongs to one place.
    pub fn lists_are_owned(&self) -> bool {
        self.table.iter().filter(|entry| Lists::has_list(entry.place)).count() == self.lists.used()
    }
}
