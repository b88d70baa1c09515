//! The receiving half: hears what stands verified behind the [gate](super::gate), gives credit for more, and lets decoding start only
//! when the whole grid is there and agrees with the manifest. When the link is lost it keeps what stands for [`RESUME_KEEP_US`].

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;

use super::gate::Standing;
use super::{CREDIT_MAX, Grid, RESUME_KEEP_US};
use crate::ids::{Generation, Time, TokenId};
use crate::message::FailKind;
use crate::planted::{Bug, planted};

/// What happens to a receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// What stands behind the [`Gate`](super::gate::Gate), whenever that is more than before.
    Standing(Standing),
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
    /// The link to the sender is gone.
    LinkLost,
    /// The sender asks for the same slots on a new link: it has not heard of the grant.
    Reopened,
    /// The sender goes on with this reservation on a new link.
    Resume(Generation),
    /// The sender gives up.
    Aborted(FailKind, String),
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
    /// Tell the sender the grant again.
    Granted,
    /// Tell the sender what stands.
    Resumed,
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
    arrived_cells: u64,
    digest_sum: u64,
    credit_bytes: u64,
    manifest: Option<(u64, u64, TokenId, bool)>,
    /// The link is lost: given up at this time.
    lost: Option<Time>,
    over: bool,
    stale: u64,
    outputs: VecDeque<Output>,
}

impl Receiver {
    /// A receiver that holds `have_blocks` leading blocks and has reserved slots for all others under `generation`.
    #[must_use]
    pub fn new(grid: Grid, have_blocks: u32, generation: Generation, deadline: Time) -> Self {
        assert!(have_blocks <= grid.blocks, "no more blocks than the sequence has");
        let cells = grid.cells_from(have_blocks);
        Self {
            grid,
            have_blocks,
            generation,
            deadline,
            arrived_cells: 0,
            digest_sum: 0,
            credit_bytes: (cells * grid.cell_bytes).min(CREDIT_MAX.max(grid.cell_bytes)),
            manifest: None,
            lost: None,
            over: false,
            stale: 0,
            outputs: VecDeque::new(),
        }
    }

    /// Blocks that the sender need not send.
    #[must_use]
    pub fn have_blocks(&self) -> u32 {
        self.have_blocks
    }

    /// The reservation's name.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The credit to state in the grant.
    #[must_use]
    pub fn credit_bytes(&self) -> u64 {
        self.credit_bytes
    }

    /// The only mutator.
    pub fn handle(&mut self, now: Time, input: Input) {
        if self.over {
            return;
        }
        match input {
            Input::Standing(standing) => self.standing(standing),
            Input::Fin { generation, cells, digest_sum, first_token, finished } => {
                self.fin(generation, (cells, digest_sum, first_token, finished));
            }
            Input::LinkLost => self.lost = Some(now.after(RESUME_KEEP_US)),
            Input::Reopened => {
                self.lost = None;
                self.outputs.push_back(Output::Granted);
            }
            Input::Resume(generation) if generation == self.generation => {
                self.lost = None;
                self.outputs.push_back(Output::Resumed);
            }
            Input::Resume(_) => self.stale += 1,
            Input::Aborted(kind, detail) => self.fail(false, kind, detail),
            Input::Cancel(kind, detail) => self.fail(true, kind, detail),
            Input::Tick => {}
        }
        self.conclude();
        self.expire(now);
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
        let first = self.lost.map_or(self.deadline, |lost| lost.min(self.deadline));
        (!self.over).then_some(first)
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Frames that named another generation.
    #[must_use]
    pub fn stale_frames(&self) -> u64 {
        self.stale
    }

    /// Asserts what must always hold.
    pub fn check(&self) {
        assert!(self.arrived_cells <= self.expected_cells());
    }

    fn expected_cells(&self) -> u64 {
        self.grid.cells_from(self.have_blocks)
    }

    fn fin(&mut self, generation: Generation, manifest: (u64, u64, TokenId, bool)) {
        if generation != self.generation {
            self.stale += 1;
        } else if self.manifest.is_some_and(|before| before != manifest) {
            self.fail(true, FailKind::Integrity, String::from("two manifests that differ"));
        } else {
            self.manifest = Some(manifest);
        }
    }

    fn expire(&mut self, now: Time) {
        if self.over {
            return;
        }
        if now >= self.deadline {
            self.fail(true, FailKind::Deadline, String::from("hand-over not finished by the request's deadline"));
        } else if self.lost.is_some_and(|lost| now >= lost) {
            self.fail(false, FailKind::PeerLost, String::from("the link to the sender is lost"));
        }
    }

    fn standing(&mut self, standing: Standing) {
        let Standing { generation, cells, digest_sum, fault } = standing;
        if generation != self.generation {
            self.stale += 1;
            return;
        }
        if let Some(fault) = fault {
            return self.fail(true, FailKind::Integrity, fault);
        }
        assert!(self.arrived_cells <= cells && cells <= self.expected_cells(), "our own gate only adds to what stands");
        (self.arrived_cells, self.digest_sum) = (cells, digest_sum);
        self.extend_credit();
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
