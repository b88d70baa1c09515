//! The sending half: cells become ready layer by layer while later layers are still being computed, and leave as soon as
//! the receiver has reserved their slots and its credit allows.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use super::{GROUP_BYTES_MIN, Grid, SPAN_BYTES_MAX, Span};
use crate::ids::{Generation, Time, TokenId};
use crate::message::{FailKind, STREAM_CELLS_MAX};
use crate::planted::{Bug, planted};

/// What happens to a sender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The receiver has reserved every slot.
    Granted {
        /// Leading blocks that it holds already.
        have_blocks: u32,
        /// Names the reservation.
        generation: Generation,
        /// Bytes that may be sent.
        credit_bytes: u64,
    },
    /// The receiver does not take the sequence.
    Declined(FailKind, String),
    /// KV of blocks below `blocks` stands in its cells for `layer`. Monotone for each layer.
    Ready {
        /// The layer.
        layer: u16,
        /// Blocks complete in it, from 0.
        blocks: u32,
    },
    /// The prompt is computed and its first token drawn.
    Computed {
        /// The token.
        first_token: TokenId,
        /// Whether the answer ends with it.
        finished: bool,
    },
    /// Bytes that may have been sent in all; never less than before.
    Credit(u64),
    /// A span has been handed to the transport, with the wrapping sum of its digests.
    Sent {
        /// The span, as polled.
        span: Span,
        /// Wrapping sum of the digests of its cells.
        digest_sum: u64,
    },
    /// The receiver has verified everything.
    Received,
    /// The receiver gives up.
    Aborted(FailKind, String),
    /// The link to the receiver is gone, or writing to it failed.
    PeerLost(String),
    /// This side gives up (cancelled by the gateway, engine failure, shutdown).
    Cancel(FailKind, String),
    /// Time has passed.
    Tick,
}

/// What a sender wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send these cells on one stream, then report [`Input::Sent`].
    Cells {
        /// Which.
        span: Span,
        /// The reservation they may be written to.
        generation: Generation,
    },
    /// Everything is on the way: send the manifest.
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
    /// Tell the receiver that it is over.
    Abort(FailKind, String),
    /// Over, well: the blocks may be released.
    Done {
        /// KV bytes sent.
        bytes: u64,
        /// Blocks sent.
        blocks_sent: u32,
        /// Blocks that the receiver had.
        blocks_had: u32,
        /// From the first cells handed to the transport to the receiver's word, microseconds.
        transfer_us: u64,
        /// Of it, the part after the first token was drawn.
        exposed_us: u64,
    },
    /// Over, badly: the blocks may be released once no stream reads them.
    Failed(FailKind, String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Waiting for the receiver's grant; cells become ready meanwhile.
    Asking,
    /// Cells may leave.
    Streaming,
    /// The manifest is out.
    Finishing,
    /// Over.
    Over,
}

/// The sending half of one hand-over.
#[derive(Debug)]
pub struct Sender {
    grid: Grid,
    state: State,
    deadline: Time,
    generation: Generation,
    have_blocks: u32,
    credit_bytes: u64,
    /// Bytes polled as `Cells` so far.
    issued_bytes: u64,
    /// Spans polled whose `Sent` has not come.
    in_flight: u32,
    sent_cells: u64,
    digest_sum: u64,
    /// For each layer: blocks complete, and blocks issued.
    ready: Vec<u32>,
    issued: Vec<u32>,
    computed: Option<(TokenId, bool)>,
    first_sent_at: Option<Time>,
    computed_at: Option<Time>,
    outputs: VecDeque<Output>,
}

impl Sender {
    /// A sender whose request ends at `deadline`. `cached_blocks` leading blocks are ready in every layer.
    #[must_use]
    pub fn new(grid: Grid, cached_blocks: u32, deadline: Time) -> Self {
        assert!(grid.layers > 0 && grid.blocks > 0 && cached_blocks <= grid.blocks, "a grid with cells");
        let layers = usize::from(grid.layers);
        Self {
            grid,
            state: State::Asking,
            deadline,
            generation: Generation(0),
            have_blocks: 0,
            credit_bytes: 0,
            issued_bytes: 0,
            in_flight: 0,
            sent_cells: 0,
            digest_sum: 0,
            ready: vec![cached_blocks; layers],
            issued: vec![0; layers],
            computed: None,
            first_sent_at: None,
            computed_at: None,
            outputs: VecDeque::new(),
        }
    }

    /// The only mutator.
    pub fn handle(&mut self, now: Time, input: Input) {
        if self.state == State::Over {
            return;
        }
        match input {
            Input::Granted { have_blocks, generation, credit_bytes } => self.granted(have_blocks, generation, credit_bytes),
            Input::Declined(..) if planted(Bug::DeclineUnheard) => {}
            Input::Declined(kind, detail) => self.fail(false, kind, detail),
            Input::Ready { layer, blocks } => self.mark_ready(layer, blocks),
            Input::Computed { first_token, finished } => {
                self.computed = Some((first_token, finished));
                self.computed_at = Some(now);
                self.ready.fill(self.grid.blocks);
            }
            Input::Credit(bytes) => self.credit_bytes = self.credit_bytes.max(bytes),
            Input::Sent { span, digest_sum } => self.sent(now, span, digest_sum),
            Input::Received => self.received(now),
            Input::Aborted(kind, detail) => self.fail(false, kind, detail),
            Input::PeerLost(detail) => self.fail(false, FailKind::PeerLost, detail),
            Input::Cancel(kind, detail) => self.fail(true, kind, detail),
            Input::Tick => {}
        }
        if self.state != State::Over && now >= self.deadline {
            self.fail(true, FailKind::Deadline, String::from("hand-over not finished by the request's deadline"));
        }
        self.issue();
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
        (self.state != State::Over).then_some(self.deadline)
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Asserts what must always hold.
    pub fn check(&self) {
        assert!(self.issued_bytes <= self.credit_bytes, "credit overrun");
        for (issued, ready) in self.issued.iter().zip(&self.ready) {
            assert!(issued <= ready, "a cell was issued before it was ready");
            assert!(*ready <= self.grid.blocks);
        }
    }

    fn granted(&mut self, have_blocks: u32, generation: Generation, credit_bytes: u64) {
        if self.state != State::Asking {
            return;
        }
        if have_blocks > self.grid.blocks {
            self.fail(true, FailKind::Integrity, String::from("the receiver claims more blocks than the sequence has"));
            return;
        }
        (self.have_blocks, self.generation, self.credit_bytes) = (have_blocks, generation, credit_bytes);
        for (issued, ready) in self.issued.iter_mut().zip(&mut self.ready) {
            *issued = have_blocks + u32::from(planted(Bug::SkipOneBlock));
            *ready = (*ready).max(if planted(Bug::SendUncomputed) { self.grid.blocks } else { have_blocks });
        }
        self.state = State::Streaming;
    }

    fn mark_ready(&mut self, layer: u16, blocks: u32) {
        assert!(blocks <= self.grid.blocks, "our own engine reports blocks of this sequence");
        let ready = &mut self.ready[usize::from(layer)];
        *ready = (*ready).max(blocks);
    }

    fn sent(&mut self, now: Time, span: Span, digest_sum: u64) {
        self.in_flight -= 1;
        self.sent_cells += span.cells();
        self.digest_sum = self.digest_sum.wrapping_add(digest_sum);
        self.first_sent_at.get_or_insert(now);
    }

    /// Issues every span that is ready, large enough, and within credit; then the manifest.
    fn issue(&mut self) {
        if self.state != State::Streaming {
            return;
        }
        while let Some(span) = self.next_span() {
            let bytes = span.cells() * self.grid.cell_bytes;
            self.issued_bytes += bytes;
            self.in_flight += 1;
            for layer in span.layer..span.layer + span.layers {
                self.issued[usize::from(layer)] = span.block + span.blocks;
            }
            self.outputs.push_back(Output::Cells { span, generation: self.generation });
        }
        let all_issued = self.issued.iter().all(|&issued| issued == self.grid.blocks);
        let all_sent = self.in_flight == 0 || planted(Bug::FinEarly);
        if let (Some((first_token, finished)), true, true) = (self.computed, all_issued, all_sent) {
            self.state = State::Finishing;
            let (generation, cells, digest_sum) = (self.generation, self.sent_cells, self.digest_sum);
            self.outputs.push_back(Output::Fin { generation, cells, digest_sum, first_token, finished });
        }
    }

    /// The next rectangle: neighbouring layers with the same blocks to send, as many as make a group.
    fn next_span(&self) -> Option<Span> {
        let first = (0..self.issued.len()).find(|&l| self.issued[l] < self.ready[l])?;
        let (from, to) = (self.issued[first], self.ready[first]);
        let same = (first..self.issued.len()).take_while(|&l| self.issued[l] == from && self.ready[l] == to).count();
        let layer_bytes = u64::from(to - from) * self.grid.cell_bytes;
        let group = GROUP_BYTES_MIN.div_ceil(layer_bytes).min(u64::from(self.grid.layers)) as usize;
        // Wait for the next layer only if it can still join the group.
        let may_grow = self.ready.get(first + same).is_some_and(|&ready| ready < to);
        if same < group && may_grow {
            return None;
        }
        self.within_credit(first as u16, same.min(group) as u16, from, to - from)
    }

    fn within_credit(&self, layer: u16, layers: u16, block: u32, blocks: u32) -> Option<Span> {
        let cells_left = (self.credit_bytes - self.issued_bytes) / self.grid.cell_bytes;
        let span_cells = (SPAN_BYTES_MAX / self.grid.cell_bytes).clamp(1, STREAM_CELLS_MAX as u64);
        let cells_max = if planted(Bug::CreditOverrun) { span_cells } else { cells_left.min(span_cells) };
        let blocks = u64::from(blocks).min(cells_max) as u32;
        if blocks == 0 {
            return None;
        }
        let layers = u64::from(layers).min(cells_max / u64::from(blocks)) as u16;
        Some(Span { layer, layers, block, blocks })
    }

    fn received(&mut self, now: Time) {
        if self.state != State::Finishing {
            return;
        }
        self.state = State::Over;
        let started = self.first_sent_at.unwrap_or(now);
        self.outputs.push_back(Output::Done {
            bytes: self.issued_bytes,
            blocks_sent: self.grid.blocks - self.have_blocks,
            blocks_had: self.have_blocks,
            transfer_us: now.since(started),
            exposed_us: now.since(self.computed_at.unwrap_or(now).max(started)),
        });
    }

    fn fail(&mut self, tell_peer: bool, kind: FailKind, detail: String) {
        self.state = State::Over;
        self.outputs.clear();
        if tell_peer {
            self.outputs.push_back(Output::Abort(kind, detail.clone()));
        }
        self.outputs.push_back(Output::Failed(kind, detail));
    }
}
