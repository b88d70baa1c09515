//! The sending half: cells become ready layer by layer while later layers are still being computed, and leave as soon as
//! the receiver has reserved their slots and its credit allows.
//!
//! A lost link is not yet the end: the sender asks again on a new one, within [`RESUME_WAIT_US`], and goes on with what the receiver lacks.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use super::pace::Claim;
use super::{Cells, GROUP_BYTES_MIN, Grid, RESUME_WAIT_US, SPAN_BYTES_MAX, Span};
use crate::ids::{Generation, Time, TokenId};
use crate::message::{FailKind, STREAM_CELLS_MAX};
use crate::planted::{Bug, planted};

/// What happens to a sender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// There is a link to the receiver.
    Linked,
    /// It is gone, and all that was on its way may be lost.
    LinkLost,
    /// The receiver has reserved every slot.
    Granted {
        /// Leading blocks that it holds already.
        have_blocks: u32,
        /// Names the reservation.
        generation: Generation,
        /// Bytes that may be sent.
        credit_bytes: u64,
    },
    /// The receiver goes on with a hand-over whose link was lost.
    Resumed {
        /// The reservation, as before.
        generation: Generation,
        /// Bytes that may have been sent in all, of what stands already and what follows.
        credit_bytes: u64,
        /// One bit for each cell that it expects, as [`Cells`] counts them: what stands there, verified.
        stands: Vec<u64>,
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
    /// A span could not be sent. When the link is lost too, it is sent again.
    SpanLost(String),
    /// The receiver cannot be reached, or is not the one that is meant.
    PeerLost(String),
    /// This side gives up (cancelled by the gateway, engine failure, shutdown).
    Cancel(FailKind, String),
    /// Time has passed.
    Tick,
}

/// What a sender wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Ask the receiver for its slots.
    Open,
    /// Ask it to go on with this reservation.
    Resume(Generation),
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

/// What is agreed with the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing yet; cells become ready meanwhile.
    Asking,
    /// Cells may leave.
    Streaming,
    /// The manifest is out.
    Finishing,
    /// Over.
    Over,
}

/// The way to the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// None yet: somebody dials. Ends with [`Input::PeerLost`] or the deadline.
    Unlinked,
    /// There.
    Linked,
    /// Lost, or there again and the receiver has not said what stands: given up at this time.
    Lost(Time),
}

/// A span that was issued.
#[derive(Clone, Copy, Debug)]
struct Issued {
    span: Span,
    /// Wrapping sum of its digests, once it is in the transport's hands.
    digest_sum: Option<u64>,
}

/// The sending half of one hand-over.
#[derive(Debug)]
pub struct Sender {
    grid: Grid,
    state: State,
    way: Way,
    deadline: Time,
    generation: Generation,
    have_blocks: u32,
    credit_bytes: u64,
    /// Spans polled as `Cells` and not known to be lost, by their first cell.
    issued: BTreeMap<(u16, u32), Issued>,
    issued_bytes: u64,
    /// Spans that were on a lost link, to be issued again.
    again: Vec<Span>,
    /// For each layer: blocks complete, and blocks issued or to be issued again.
    ready: Vec<u32>,
    reached: Vec<u32>,
    computed: Option<(TokenId, bool)>,
    /// A span failed while the link seemed to be there: if it is not lost by this time, the receiver refused it.
    refused: Option<(Time, String)>,
    first_sent_at: Option<Time>,
    computed_at: Option<Time>,
    resumes: u32,
    stale: u64,
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
            way: Way::Unlinked,
            deadline,
            generation: Generation(0),
            have_blocks: 0,
            credit_bytes: 0,
            issued: BTreeMap::new(),
            issued_bytes: 0,
            again: Vec::new(),
            ready: vec![cached_blocks; layers],
            reached: vec![0; layers],
            computed: None,
            refused: None,
            first_sent_at: None,
            computed_at: None,
            resumes: 0,
            stale: 0,
            outputs: VecDeque::new(),
        }
    }

    /// The only mutator.
    pub fn handle(&mut self, now: Time, input: Input) {
        if self.state == State::Over {
            return;
        }
        match input {
            Input::Linked => self.linked(),
            Input::LinkLost => self.link_lost(now),
            Input::Granted { have_blocks, generation, credit_bytes } => self.granted(have_blocks, generation, credit_bytes),
            Input::Declined(..) if planted(Bug::DeclineUnheard) => {}
            Input::Resumed { generation, credit_bytes, stands } => self.resumed(generation, credit_bytes, stands),
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
            // After a resume it may be a stream of the old link.
            Input::SpanLost(detail) if self.way == Way::Linked && self.resumes == 0 => {
                self.refused.get_or_insert((now.after(RESUME_WAIT_US), detail));
            }
            Input::SpanLost(_) | Input::Tick => {}
            Input::PeerLost(detail) => self.fail(false, FailKind::PeerLost, detail),
            Input::Cancel(kind, detail) => self.fail(true, kind, detail),
        }
        self.expire(now);
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
        let lost = if let Way::Lost(until) = self.way { Some(until) } else { None };
        let refused = self.refused.as_ref().map(|(until, _)| *until);
        let first = [lost, refused].into_iter().flatten().fold(self.deadline, Time::min);
        (self.state != State::Over).then_some(first)
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Messages that named another generation.
    #[must_use]
    pub fn stale_frames(&self) -> u64 {
        self.stale
    }

    /// What it says for itself among those that share its link.
    #[must_use]
    pub fn claim(&self) -> Claim {
        let all = self.grid.cells_from(self.have_blocks) * self.grid.cell_bytes;
        Claim { awaited: self.computed.is_some(), unissued_bytes: all - self.issued_bytes, deadline: self.deadline }
    }

    /// How often it went on after a lost link.
    #[must_use]
    pub fn resumes(&self) -> u32 {
        self.resumes
    }

    /// Asserts what must always hold.
    pub fn check(&self) {
        assert!(self.issued_bytes <= self.credit_bytes, "credit overrun");
        for (reached, ready) in self.reached.iter().zip(&self.ready) {
            assert!(reached <= ready, "a cell was issued before it was ready");
            assert!(*ready <= self.grid.blocks);
        }
        let bytes: u64 = self.issued.values().map(|issued| issued.span.cells() * self.grid.cell_bytes).sum();
        assert_eq!(bytes, self.issued_bytes, "every issued span is counted once");
        let again: u64 = self.again.iter().map(Span::cells).sum();
        let reached: u64 = self.reached.iter().map(|&reached| u64::from(reached.max(self.have_blocks) - self.have_blocks)).sum();
        assert_eq!(bytes, (reached - again) * self.grid.cell_bytes, "what was reached is issued or waits to be issued again");
    }

    fn linked(&mut self) {
        if self.way == Way::Linked {
            return;
        }
        match self.state {
            State::Asking => {
                self.way = Way::Linked;
                self.outputs.push_back(Output::Open);
            }
            // until the receiver has said what stands, the link counts as lost
            _ => self.outputs.push_back(Output::Resume(self.generation)),
        }
    }

    fn link_lost(&mut self, now: Time) {
        self.refused = None;
        if self.way == Way::Linked {
            self.way = Way::Lost(now.after(RESUME_WAIT_US));
        }
    }

    fn granted(&mut self, have_blocks: u32, generation: Generation, credit_bytes: u64) {
        if self.state != State::Asking {
            self.stale += u64::from(generation != self.generation);
            return;
        }
        if have_blocks > self.grid.blocks {
            self.fail(true, FailKind::Integrity, String::from("the receiver claims more blocks than the sequence has"));
            return;
        }
        (self.have_blocks, self.generation, self.credit_bytes) = (have_blocks, generation, credit_bytes);
        for (reached, ready) in self.reached.iter_mut().zip(&mut self.ready) {
            *reached = have_blocks + u32::from(planted(Bug::SkipOneBlock));
            *ready = (*ready).max(if planted(Bug::SendUncomputed) { self.grid.blocks } else { have_blocks });
        }
        self.state = State::Streaming;
    }

    /// Goes on with what does not stand there. A span counts as a whole: one of which a part stands is sent again, and the receiver passes
    /// over that part.
    fn resumed(&mut self, generation: Generation, credit_bytes: u64, stands: Vec<u64>) {
        let Way::Lost(_) = self.way else { return };
        if generation != self.generation || self.state == State::Asking {
            self.stale += 1;
            return;
        }
        let Some(stands) = Cells::parse(self.grid, self.have_blocks, stands) else {
            return self.fail(true, FailKind::Integrity, String::from("the receiver names other cells than the sequence has"));
        };
        let whole =
            |issued: &Issued| issued.digest_sum.is_some() && issued.span.iter().all(|(layer, block)| stands.has(layer, block));
        // The last of them is issued first.
        let lost: Vec<Span> = self.issued.values().rev().filter(|issued| !whole(issued)).map(|issued| issued.span).collect();
        self.issued.retain(|_, issued| whole(issued));
        self.issued_bytes -= lost.iter().map(Span::cells).sum::<u64>() * self.grid.cell_bytes;
        self.again.extend(lost);
        self.credit_bytes = credit_bytes.max(self.issued_bytes);
        (self.state, self.way) = (State::Streaming, Way::Linked);
        self.resumes += 1;
    }

    /// Gives up what has waited too long.
    fn expire(&mut self, now: Time) {
        if self.state == State::Over {
            return;
        }
        if now >= self.deadline {
            return self.fail(true, FailKind::Deadline, String::from("hand-over not finished by the request's deadline"));
        }
        match (&self.way, &self.refused) {
            (Way::Lost(until), _) if now >= *until => {
                self.fail(false, FailKind::PeerLost, String::from("the link to the receiver is lost"));
            }
            (_, Some((until, detail))) if now >= *until => {
                let detail = detail.clone();
                self.fail(true, FailKind::PeerLost, detail);
            }
            _ => {}
        }
    }

    fn mark_ready(&mut self, layer: u16, blocks: u32) {
        assert!(blocks <= self.grid.blocks, "our own engine reports blocks of this sequence");
        let ready = &mut self.ready[usize::from(layer)];
        *ready = (*ready).max(blocks);
    }

    fn sent(&mut self, now: Time, span: Span, digest_sum: u64) {
        if let Some(issued) = self.issued.get_mut(&(span.layer, span.block)).filter(|issued| issued.span == span) {
            issued.digest_sum = Some(digest_sum);
            self.first_sent_at.get_or_insert(now);
        }
    }

    /// Issues every span that is ready, large enough, and within credit; then the manifest.
    fn issue(&mut self) {
        if self.state != State::Streaming || self.way != Way::Linked {
            return;
        }
        while let Some(span) = self.next_again().or_else(|| self.next_span()) {
            self.issued_bytes += span.cells() * self.grid.cell_bytes;
            self.issued.insert((span.layer, span.block), Issued { span, digest_sum: None });
            for layer in span.layer..span.layer + span.layers {
                let reached = &mut self.reached[usize::from(layer)];
                *reached = (*reached).max(span.block + span.blocks);
            }
            self.outputs.push_back(Output::Cells { span, generation: self.generation });
        }
        let all = self.again.is_empty() && self.reached.iter().all(|&reached| reached == self.grid.blocks);
        let (Some((first_token, finished)), true) = (self.computed, all) else { return };
        let sum_of = |issued: &Issued| issued.digest_sum.or(planted(Bug::FinEarly).then_some(0));
        let sums = self.issued.values().try_fold(0u64, |sum, issued| Some(sum.wrapping_add(sum_of(issued)?)));
        let Some(digest_sum) = sums else { return };
        self.state = State::Finishing;
        let (generation, cells) = (self.generation, self.grid.cells_from(self.have_blocks));
        self.outputs.push_back(Output::Fin { generation, cells, digest_sum, first_token, finished });
    }

    /// A span that was lost, as it was: its part that stands is passed over there.
    fn next_again(&mut self) -> Option<Span> {
        let span = self.again.last()?;
        let fits = self.issued_bytes + span.cells() * self.grid.cell_bytes <= self.credit_bytes;
        if fits { self.again.pop() } else { None }
    }

    /// The next rectangle: neighbouring layers with the same blocks to send, as many as make a group.
    fn next_span(&self) -> Option<Span> {
        let reached = &self.reached;
        let first = (0..reached.len()).find(|&l| reached[l] < self.ready[l])?;
        let (from, to) = (reached[first], self.ready[first]);
        let same = (first..reached.len()).take_while(|&l| reached[l] == from && self.ready[l] == to).count();
        let layer_bytes = u64::from(to - from) * self.grid.cell_bytes;
        let group = GROUP_BYTES_MIN.div_ceil(layer_bytes).min(u64::from(self.grid.layers)) as usize;
        // Wait for the next layer only if it can still join the group. When the prompt ends, nothing else hides what leaves late: groups
        // shrink with the layers that follow.
        let follow = reached.len() - first - same;
        let enough = if to == self.grid.blocks { group.min(follow.max(1)) } else { group };
        let may_grow = self.ready.get(first + same).is_some_and(|&ready| ready < to);
        if same < enough && may_grow {
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
