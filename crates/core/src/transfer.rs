//! One hand-over of a sequence's KV from the node that computed it to the node that will decode it: [`send`] and [`recv`], and the [`gate`]
//! that arriving streams ask; and whose turn it is of those that share a link: [`pace`].
//!
//! All are pure machines. They decide what may be sent, what may be written, when a hand-over is whole, and when it is over;
//! the bytes themselves, the streams and the clock belong to the shell. Every state has an exit for abort from either side,
//! loss of the peer, and time; `docs/protocol.md` has them in a table. A lost link is not the loss of the peer: on a new one both go on with what
//! does not stand yet. A frame that names another generation than the reservation's has no effect and is counted.
//!
//! A sequence is a grid of cells, `layers` x `blocks`. Blocks below `have_blocks` are the receiver's already and never move.

use alloc::vec;
use alloc::vec::Vec;

pub mod gate;
pub mod pace;
pub mod recv;
pub mod send;

/// Bytes that a receiver lets a sender have on the way before it has placed any.
pub const CREDIT_MAX: u64 = 64 << 20;
/// Below this a group of layers waits for the next layer, so that small models do not pay for a stream per layer.
pub const GROUP_BYTES_MIN: u64 = 1 << 20;

/// Bytes of one span, unless a single cell is larger: a quarter of what may be on its way on a link, so that the next goes before the last has
/// arrived. Well below a stream's flow-control window, so that a stream whose receiver has given up can always be sent to its end, and its cells
/// come back.
pub const SPAN_BYTES_MAX: u64 = pace::ON_THE_WAY_MAX / 4;

/// How long a sender tries to go on after its link was lost, and how long a stream that failed may mean that.
pub const RESUME_WAIT_US: u64 = 1_000_000;
/// How long a receiver keeps what stands for a sender whose link was lost: it may notice earlier than the sender does.
pub const RESUME_KEEP_US: u64 = 2 * RESUME_WAIT_US;

/// The grid of one hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Decoder layers.
    pub layers: u16,
    /// Blocks of the sequence, the unfinished last one included.
    pub blocks: u32,
    /// Bytes of one cell.
    pub cell_bytes: u64,
}

impl Grid {
    /// Cells of the blocks from `block` on.
    #[must_use]
    pub const fn cells_from(&self, block: u32) -> u64 {
        self.layers as u64 * (self.blocks - block) as u64
    }
}

/// A set of the cells that move: one bit for each, layer by layer, of the blocks that the receiver did not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cells {
    grid: Grid,
    have_blocks: u32,
    words: Vec<u64>,
}

impl Cells {
    /// None of the cells of the blocks from `have_blocks` on.
    #[must_use]
    pub fn none(grid: Grid, have_blocks: u32) -> Self {
        assert!(have_blocks <= grid.blocks, "no more blocks than the sequence has");
        Self { grid, have_blocks, words: vec![0; grid.cells_from(have_blocks).div_ceil(64) as usize] }
    }

    /// A set as a peer says it; `None` when it is one of another grid.
    #[must_use]
    pub fn parse(grid: Grid, have_blocks: u32, words: Vec<u64>) -> Option<Self> {
        let cells = grid.cells_from(have_blocks);
        let beyond = match (words.last(), cells % 64) {
            (Some(last), 1..) => last >> (cells % 64) != 0,
            _ => false,
        };
        (words.len() as u64 == cells.div_ceil(64) && !beyond).then_some(Self { grid, have_blocks, words })
    }

    /// The set as it is told.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many. O(cells).
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether a cell can be in it at all.
    #[must_use]
    pub const fn covers(&self, layer: u16, block: u32) -> bool {
        layer < self.grid.layers && self.have_blocks <= block && block < self.grid.blocks
    }

    /// Whether it has this cell, which it covers.
    #[must_use]
    pub fn has(&self, layer: u16, block: u32) -> bool {
        let (word, mask) = self.bit(layer, block);
        self.words[word] & mask != 0
    }

    /// Adds a cell that it covers.
    pub fn insert(&mut self, layer: u16, block: u32) {
        let (word, mask) = self.bit(layer, block);
        self.words[word] |= mask;
    }

    fn bit(&self, layer: u16, block: u32) -> (usize, u64) {
        let width = u64::from(self.grid.blocks - self.have_blocks);
        let bit = u64::from(layer) * width + u64::from(block - self.have_blocks);
        ((bit / 64) as usize, 1 << (bit % 64))
    }
}

/// A rectangle of cells: `layers` x `blocks`, sent on one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First layer.
    pub layer: u16,
    /// Layers; at least 1.
    pub layers: u16,
    /// First block.
    pub block: u32,
    /// Blocks; at least 1.
    pub blocks: u32,
}

impl Span {
    /// Cells in it.
    #[must_use]
    pub const fn cells(&self) -> u64 {
        self.layers as u64 * self.blocks as u64
    }

    /// Whether it lies inside `grid`, without overflow on hostile numbers.
    #[must_use]
    pub const fn fits(&self, grid: &Grid) -> bool {
        self.layers > 0
            && self.blocks > 0
            && self.layer as u32 + self.layers as u32 <= grid.layers as u32
            && self.block as u64 + self.blocks as u64 <= grid.blocks as u64
    }

    /// `(layer, block)` of every cell, in payload order.
    pub fn iter(self) -> impl Iterator<Item = (u16, u32)> {
        (self.layer..self.layer + self.layers)
            .flat_map(move |layer| (self.block..self.block + self.blocks).map(move |block| (layer, block)))
    }
}
