//! The gate of one hand-over that arrives: which cells may be written to which slots, and what stands there, verified.
//!
//! Apart from the [`Receiver`](super::recv::Receiver) because many streams ask it at once, a cell at a time, beside the node's loop: the shell
//! keeps it under a lock of its own, held for one cell's copy and never across a wait. It has no opinion about the hand-over; it says what
//! stands ([`Standing`]), and a closed gate lets nothing through, so slots are given away only after it was closed.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::{Cells, Grid, Span};
use crate::ids::{BlockHash, Generation, Slot, SlotRef};
use crate::planted::{Bug, planted};

/// What stands behind a gate, in all: a later word replaces an earlier one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The reservation.
    pub generation: Generation,
    /// Cells that were written and verified.
    pub cells: u64,
    /// Wrapping sum of their digests.
    pub digest_sum: u64,
    /// A sender broke the rules, or bytes did not match their digest. Nothing is let through any more.
    pub fault: Option<String>,
}

/// What to do with a cell that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Copy it here and report [`Gate::placed`], under the same lock. Its digest is bound to this name.
    Write(Slot, BlockHash),
    /// It stands already: pass over its bytes.
    Stands,
    /// Nothing may be written: give the stream up.
    Closed,
}

/// One hand-over's slots, while they may be written.
#[derive(Clone, Debug)]
pub struct Gate {
    grid: Grid,
    have_blocks: u32,
    table: Vec<SlotRef>,
    names: Vec<BlockHash>,
    stands: Cells,
    standing: Standing,
    open: bool,
}

impl Gate {
    /// An open gate before the slots `table` of the blocks `names`, of which `have_blocks` leading ones are not to be written.
    #[must_use]
    pub fn new(grid: Grid, have_blocks: u32, generation: Generation, table: Vec<SlotRef>, names: Vec<BlockHash>) -> Self {
        assert!(table.len() == grid.blocks as usize && names.len() == table.len(), "a slot and a name for each block");
        let standing = Standing { generation, cells: 0, digest_sum: 0, fault: None };
        Self { grid, have_blocks, table, names, stands: Cells::none(grid, have_blocks), standing, open: true }
    }

    /// Whether a stream may write `span` under `generation`. Ask before the first byte is placed. A stream that is only late is refused and
    /// nothing more; one that names cells outside the reservation is a fault of its sender.
    pub fn admit(&mut self, generation: Generation, span: &Span) -> bool {
        if !self.open || generation != self.standing.generation {
            return false;
        }
        if !span.fits(&self.grid) || span.block < self.have_blocks {
            self.fault(format!("stream names cells outside the reservation: {span:?}"));
        }
        self.open
    }

    /// What to do with this cell of a stream that was admitted under `generation`.
    #[must_use]
    pub fn place(&self, generation: Generation, layer: u16, block: u32) -> Place {
        if !self.open || generation != self.standing.generation || !self.stands.covers(layer, block) {
            return Place::Closed;
        }
        if self.stands.has(layer, block) {
            return Place::Stands;
        }
        Place::Write(self.table[block as usize].slot, self.names[block as usize])
    }

    /// The bytes of a cell are in the slot that [`Self::place`] named. `digest` is of what stands there now, `expected` the sender's.
    pub fn placed(&mut self, layer: u16, block: u32, digest: u64, expected: u64) {
        if digest != expected && !planted(Bug::SkipDigest) {
            return self.fault(format!("digest mismatch in layer {layer} block {block}"));
        }
        assert!(!self.stands.has(layer, block), "a cell that stands is not written again");
        self.stands.insert(layer, block);
        self.standing.cells += 1;
        self.standing.digest_sum = self.standing.digest_sum.wrapping_add(digest);
    }

    /// What stands.
    #[must_use]
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Which cells stand, for a sender that goes on after a lost link.
    #[must_use]
    pub fn stands(&self) -> &Cells {
        &self.stands
    }

    /// Nothing is written through it from now on, whoever still holds it.
    pub fn close(&mut self) {
        self.open = false;
    }

    /// Asserts what must always hold.
    pub fn check(&self) {
        assert_eq!(self.stands.count(), self.standing.cells, "every counted cell has its bit");
        assert!(self.standing.fault.is_none() || !self.open, "a fault closes the gate");
    }

    fn fault(&mut self, what: String) {
        self.standing.fault.get_or_insert(what);
        self.open = false;
    }
}
