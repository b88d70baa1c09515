//! Which incarnations the locations in the tables speak of. A dead one is forgotten at once and its locations go later, a few shards with
//! each entry of the log: nothing reads a location whose incarnation has no owner, and a number is given out again only after all shards
//! have been swept since its death.

use alloc::vec::Vec;

use super::place::{INCARNATIONS_MAX, Incarnation};
use super::shard::SHARDS;
use crate::ids::NodeId;

#[derive(Clone, Debug, Default)]
pub(super) struct Incarnations {
    /// The node of each living incarnation.
    owners: Vec<Option<NodeId>>,
    free: Vec<Incarnation>,
    /// Dead since the sweep under way began, or waiting for one.
    dead: Dead,
    /// Dead since before the sweep under way.
    swept: Dead,
    /// The next shard of the sweep.
    cursor: usize,
}

#[derive(Clone, Debug, Default)]
struct Dead {
    incarnations: Vec<Incarnation>,
    locations: usize,
}

impl Incarnations {
    /// A number for a new incarnation; `None` when all are taken by the living and the dead.
    pub fn begin(&mut self, node: NodeId) -> Option<Incarnation> {
        let number = match self.free.pop() {
            Some(number) => number,
            None if self.owners.len() < INCARNATIONS_MAX => {
                self.owners.push(None);
                (self.owners.len() - 1) as Incarnation
            }
            None => return None,
        };
        self.owners[usize::from(number)] = Some(node);
        Some(number)
    }

    /// An incarnation that had so many locations is over.
    pub fn end(&mut self, number: Incarnation, locations: usize) {
        self.owners[usize::from(number)] = None;
        if locations == 0 {
            self.free.push(number);
        } else {
            self.dead.incarnations.push(number);
            self.dead.locations += locations;
        }
    }

    pub fn owner(&self, number: Incarnation) -> Option<NodeId> {
        self.owners.get(usize::from(number)).copied().flatten()
    }

    /// Locations of dead incarnations that may still be in the tables.
    pub const fn dead_locations(&self) -> usize {
        self.dead.locations + self.swept.locations
    }

    /// The next shard to sweep; `None` when nothing is left to be swept.
    pub fn next_shard(&mut self) -> Option<usize> {
        if self.cursor == SHARDS {
            self.free.append(&mut self.swept.incarnations);
            self.swept.locations = 0;
            self.cursor = 0;
        }
        if self.cursor == 0 {
            if self.dead.incarnations.is_empty() {
                return None;
            }
            self.swept = core::mem::take(&mut self.dead);
        }
        self.cursor += 1;
        Some(self.cursor - 1)
    }
}
