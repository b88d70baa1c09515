//! The gate of one hand-over that arrives: which cells may be written to which slots, and what stands there, verified.
//!
//! Apart from the [`Receiver`](super::recv::Receiver) because many streams ask it at once, a cell at a time, beside the node's loop: the shell
//! keeps it under a lock of its own, held for one cell's copy and never across a wait. It has no opinion about the hand-over; it says what
//! stands ([`Standing`]), and a closed gate lets nothing through, so slots are given away only after it was closed.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use super::{Grid, Span};
use crate::ids::{BlockHash, Generation, Slot, SlotRef};

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
    /// One bit for each cell that may arrive, `[layers, blocks - have_blocks]`.
    stands: Vec<u64>,
    standing: Standing,
    open: bool,
}

impl Gate {
    /// An open gate before the slots `table` of the blocks `names`, of which `have_blocks` leading ones are not to be written.
    #[must_use]
    pub fn new(grid: Grid, have_blocks: u32, generation: Generation, table: Vec<SlotRef>, names: Vec<BlockHash>) -> Self {
        assert!(have_blocks <= grid.blocks, "no more blocks than the sequence has");
        assert!(table.len() == grid.blocks as usize && names.len() == table.len(), "a slot and a name for each block");
        let cells = grid.cells_from(have_blocks);
        let standing = Standing { generation, cells: 0, digest_sum: 0, fault: None };
        Self { grid, have_blocks, table, names, stands: vec![0; cells.div_ceil(64) as usize], standing, open: true }
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
        let inside = layer < self.grid.layers && (self.have_blocks..self.grid.blocks).contains(&block);
        if !self.open || generation != self.standing.generation || !inside {
            return Place::Closed;
        }
        if self.has(layer, block) {
            return Place::Stands;
        }
        Place::Write(self.table[block as usize].slot, self.names[block as usize])
    }

    /// The bytes of a cell are in the slot that [`Self::place`] named. `digest` is of what stands there now, `expected` the sender's.
    pub fn placed(&mut self, layer: u16, block: u32, digest: u64, expected: u64) {
        if digest != expected {
            return self.fault(format!("digest mismatch in layer {layer} block {block}"));
        }
        let (word, mask) = self.bit(layer, block);
        assert!(self.stands[word] & mask == 0, "a cell that stands is not written again");
        self.stands[word] |= mask;
        self.standing.cells += 1;
        self.standing.digest_sum = self.standing.digest_sum.wrapping_add(digest);
    }

    /// What stands.
    #[must_use]
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Nothing is written through it from now on, whoever still holds it.
    pub fn close(&mut self) {
        self.open = false;
    }

    /// Asserts what must always hold.
    pub fn check(&self) {
        let bits: u64 = self.stands.iter().map(|word| u64::from(word.count_ones())).sum();
        assert_eq!(bits, self.standing.cells, "every counted cell has its bit");
        assert!(self.standing.fault.is_none() || !self.open, "a fault closes the gate");
    }

    fn fault(&mut self, what: String) {
        self.standing.fault.get_or_insert(what);
        self.open = false;
    }

    fn bit(&self, layer: u16, block: u32) -> (usize, u64) {
        let width = u64::from(self.grid.blocks - self.have_blocks);
        let bit = u64::from(layer) * width + u64::from(block - self.have_blocks);
        ((bit / 64) as usize, 1 << (bit % 64))
    }

    fn has(&self, layer: u16, block: u32) -> bool {
        let (word, mask) = self.bit(layer, block);
        self.stands[word] & mask != 0
    }
}
