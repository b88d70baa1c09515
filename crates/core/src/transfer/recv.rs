//! The receiving half: says which cells may be written, counts what has arrived and was verified, and lets decoding start
//! only when the whole grid is there and agrees with the manifest.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use super::{CREDIT_MAX, Grid, Span};
use crate::ids::{Generation, Time, TokenId};
use crate::message::FailKind;
use crate::planted::{Bug, planted};

/// What happens to a receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A cell's bytes are in their slot; `verified` tells whether their digest was the right one.
    Cell {
        /// The reservation that the stream named.
        generation: Generation,
        /// Its place.
        layer: u16,
        /// Its place.
        block: u32,
        /// Digest of the bytes in the slot.
        digest: u64,
        /// Whether it equals the sender's.
        verified: bool,
    },
    /// The sender's manifest.
    Fin {
        /// The reservation.
        generation: Generation,
        /// Cells sent.
        cells: u64,
        /// Wrapping sum of their digests.
        digest_sum: u64,
        /// The first token.
        first_token: TokenId,
        /// Whether the answer ends with it.
        finished: bool,
    },
    /// The sender gives up.
    Aborted(FailKind, String),
    /// The link to the sender is gone.
    PeerLost(String),
    /// This side gives up.
    Cancel(FailKind, String),
    /// Time has passed.
    Tick,
}

/// What a receiver wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Let the sender send up to this many bytes in all.
    Credit(u64),
    /// Everything is there and verified: tell the sender, decode.
    Complete {
        /// The first token.
        first_token: TokenId,
        /// Whether the answer ended with it.
        finished: bool,
    },
    /// Tell the sender that it is over.
    Abort(FailKind, String),
    /// Over, badly: free the slots.
    Failed(FailKind, String),
}

/// The receiving half of one hand-over.
#[derive(Debug)]
pub struct Receiver {
    grid: Grid,
    have_blocks: u32,
    generation: Generation,
    deadline: Time,
    /// One bit for each cell that may arrive, `[layers, blocks - have_blocks]`.
    arrived: Vec<u64>,
    arrived_cells: u64,
    digest_sum: u64,
    credit_bytes: u64,
    manifest: Option<(u64, u64, TokenId, bool)>,
    over: bool,
    stale: u64,
    outputs: VecDeque<Output>,
}

impl Receiver {
    /// A receiver that holds `have_blocks` leading blocks and has reserved slots for all others under `generation`.
    #[must_use]
    pub fn new(grid: Grid, have_blocks: u32, generation: Generation, deadline: Time) -> Self {
        assert!(have_blocks <= grid.blocks, "no more blocks than the sequence has");
        let cells = u64::from(grid.layers) * u64::from(grid.blocks - have_blocks);
        Self {
            grid,
            have_blocks,
            generation,
            deadline,
            arrived: vec![0; cells.div_ceil(64) as usize],
            arrived_cells: 0,
            digest_sum: 0,
            credit_bytes: (cells * grid.cell_bytes).min(CREDIT_MAX.max(grid.cell_bytes)),
            manifest: None,
            over: false,
            stale: 0,
            outputs: VecDeque::new(),
        }
    }

    /// The credit to state in the grant.
    #[must_use]
    pub fn credit_bytes(&self) -> u64 {
        self.credit_bytes
    }

    /// Whether a stream may write `span` under `generation`. Ask before the first byte is placed; a refusal aborts nothing
    /// when it is only late, and the whole hand-over when it breaks the rules.
    pub fn admit(&mut self, generation: Generation, span: &Span) -> bool {
        if self.over || generation != self.generation {
            self.stale += 1;
            return false;
        }
        if !span.fits(&self.grid) || span.block < self.have_blocks {
            self.fail(true, FailKind::Integrity, format!("stream names cells outside the reservation: {span:?}"));
            return false;
        }
        true
    }

    /// Whether this cell may be written now. Ask with the same lock held under which the bytes are copied and reported:
    /// a cell that has arrived already, or a hand-over that is over, is never written again.
    #[must_use]
    pub fn may_write(&self, generation: Generation, layer: u16, block: u32) -> bool {
        !self.over
            && generation == self.generation
            && layer < self.grid.layers
            && (self.have_blocks..self.grid.blocks).contains(&block)
            && !self.has(layer, block)
    }

    /// The only mutator, beside [`Self::admit`].
    pub fn handle(&mut self, now: Time, input: Input) {
        if self.over {
            return;
        }
        match input {
            Input::Cell { generation, layer, block, digest, verified } => self.cell(generation, layer, block, digest, verified),
            Input::Fin { generation, cells, digest_sum, first_token, finished } => {
                if generation == self.generation {
                    self.manifest = Some((cells, digest_sum, first_token, finished));
                } else {
                    self.stale += 1;
                }
            }
            Input::Aborted(kind, detail) => self.fail(false, kind, detail),
            Input::PeerLost(detail) => self.fail(false, FailKind::PeerLost, detail),
            Input::Cancel(kind, detail) => self.fail(true, kind, detail),
            Input::Tick => {}
        }
        if !self.over && now >= self.deadline {
            self.fail(true, FailKind::Deadline, String::from("hand-over not finished by the request's deadline"));
        }
        self.conclude();
    }

    /// What to do next; drain to `None`.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Whether [`Self::poll`] would give something.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.outputs.is_empty()
    }

    /// When to come back with a `Tick`.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        (!self.over).then_some(self.deadline)
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Frames that named another generation, or came after the end.
    #[must_use]
    pub fn stale_frames(&self) -> u64 {
        self.stale
    }

    /// Asserts what must always hold.
    pub fn check(&self) {
        let bits: u64 = self.arrived.iter().map(|word| u64::from(word.count_ones())).sum();
        assert_eq!(bits, self.arrived_cells, "every counted cell has its bit");
        assert!(self.arrived_cells <= self.expected_cells());
    }

    fn expected_cells(&self) -> u64 {
        u64::from(self.grid.layers) * u64::from(self.grid.blocks - self.have_blocks)
    }

    fn cell(&mut self, generation: Generation, layer: u16, block: u32, digest: u64, verified: bool) {
        if generation != self.generation {
            self.stale += 1;
            return;
        }
        if !verified && !planted(Bug::SkipDigest) {
            self.fail(true, FailKind::Integrity, format!("digest mismatch in layer {layer} block {block}"));
            return;
        }
        if layer >= self.grid.layers || block < self.have_blocks || block >= self.grid.blocks {
            self.fail(true, FailKind::Integrity, format!("cell outside the reservation: layer {layer} block {block}"));
            return;
        }
        if self.has(layer, block) {
            self.fail(true, FailKind::Integrity, format!("cell sent twice: layer {layer} block {block}"));
            return;
        }
        let (word, mask) = self.bit(layer, block);
        self.arrived[word] |= mask;
        self.arrived_cells += 1;
        self.digest_sum = self.digest_sum.wrapping_add(digest);
        self.extend_credit();
    }

    fn bit(&self, layer: u16, block: u32) -> (usize, u64) {
        let width = u64::from(self.grid.blocks - self.have_blocks);
        let bit = u64::from(layer) * width + u64::from(block - self.have_blocks);
        ((bit / 64) as usize, 1 << (bit % 64))
    }

    fn has(&self, layer: u16, block: u32) -> bool {
        let (word, mask) = self.bit(layer, block);
        self.arrived[word] & mask != 0
    }

    /// Keeps about [`CREDIT_MAX`] on the way; told in steps of a quarter, not cell by cell.
    fn extend_credit(&mut self) {
        let all = self.expected_cells() * self.grid.cell_bytes;
        let wanted = (self.arrived_cells * self.grid.cell_bytes + CREDIT_MAX).min(all);
        let withheld = planted(Bug::CreditWithheld);
        if !withheld && wanted > self.credit_bytes && (wanted - self.credit_bytes >= CREDIT_MAX / 4 || wanted == all) {
            self.credit_bytes = wanted;
            self.outputs.push_back(Output::Credit(wanted));
        }
    }

    fn conclude(&mut self) {
        let Some((cells, digest_sum, first_token, finished)) = self.manifest else { return };
        if self.over {
            return;
        }
        if cells != self.expected_cells() {
            let expected = self.expected_cells();
            self.fail(true, FailKind::Integrity, format!("manifest names {cells} cells, {expected} were reserved"));
        } else if self.arrived_cells == cells || planted(Bug::DecodeEarly) {
            if digest_sum == self.digest_sum || planted(Bug::DecodeEarly) {
                self.over = true;
                self.outputs.push_back(Output::Complete { first_token, finished });
            } else {
                self.fail(true, FailKind::Integrity, String::from("manifest digests disagree with what arrived"));
            }
        }
    }

    fn fail(&mut self, tell_peer: bool, kind: FailKind, detail: String) {
        self.over = true;
        self.outputs.clear();
        if tell_peer && !planted(Bug::AbortUnsaid) {
            self.outputs.push_back(Output::Abort(kind, detail.clone()));
        }
        self.outputs.push_back(Output::Failed(kind, detail));
    }
}
