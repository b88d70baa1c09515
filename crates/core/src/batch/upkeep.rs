//! What operators and the log may do to the cache of a batch's pool. Room that it makes is given out at once.

use super::Batch;
use crate::ids::BlockHash;
use crate::message::{Evict, EvictCount, PinCount};
use crate::pool::Resident;

impl Batch {
    /// See [`crate::pool::Pool::set_pins`].
    pub fn set_pins(&mut self, names: &[BlockHash]) -> PinCount {
        let count = self.pool.set_pins(names);
        self.make_room();
        count
    }

    /// See [`crate::pool::Pool::drop_cached`].
    pub fn drop_cached(&mut self, what: &Evict, dry_run: bool) -> EvictCount {
        let count = self.pool.drop_cached(what, dry_run);
        self.make_room();
        count
    }

    /// See [`crate::pool::Pool::drop_damaged`].
    pub fn drop_damaged(&mut self, name: &BlockHash) -> EvictCount {
        let count = self.pool.drop_damaged(name);
        self.make_room();
        count
    }

    /// All cached blocks, in the order of their slots.
    pub fn residents(&self) -> impl Iterator<Item = Resident> + '_ {
        self.pool.residents()
    }

    /// The block of this name, if it is cached.
    #[must_use]
    pub fn resident(&self, name: &BlockHash) -> Option<Resident> {
        self.pool.resident(name)
    }

    fn make_room(&mut self) {
        self.blocked = None;
        self.admit();
    }
}
