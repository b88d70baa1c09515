//! One hand-over of a sequence's KV from the node that computed it to the node that will decode it: [`send`] and [`recv`], and the [`gate`]
//! that arriving streams ask.
//!
//! All are pure machines. They decide what may be sent, what may be written, when a hand-over is whole, and when it is over;
//! the bytes themselves, the streams and the clock belong to the shell. Every state has an exit for abort from either side,
//! loss of the peer, and time. A frame that names another generation than the reservation's has no effect and is counted.
//!
//! A sequence is a grid of cells, `layers` x `blocks`. Blocks below `have_blocks` are the receiver's already and never move.

pub mod gate;
pub mod recv;
pub mod send;

/// Bytes that a receiver lets a sender have on the way before it has placed any.
pub const CREDIT_MAX: u64 = 64 << 20;
/// Below this a group of layers waits for the next layer, so that small models do not pay for a stream per layer.
pub const GROUP_BYTES_MIN: u64 = 1 << 20;

/// Bytes of one span, unless a single cell is larger. Well below a stream's flow-control window, so that a stream whose receiver has
/// given up can always be sent to its end, and its cells come back.
pub const SPAN_BYTES_MAX: u64 = 8 << 20;

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
