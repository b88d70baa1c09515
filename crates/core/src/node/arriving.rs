//! Hand-overs that arrive: the receiving machine of each attempt and the link that it listens to. No slot of one is given away before its gate is
//! closed.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use super::{Effect, LinkNo, Node};
use crate::batch;
use crate::ids::{AttemptId, BlockHash, Epoch, Generation, ReplicaId, SlotRef, Time};
use crate::message::{FailKind, Granted, Message, Resumed};
use crate::planted::{Bug, planted};
use crate::transfer::gate::Gate;
use crate::transfer::recv::{Input, Output, Receiver};
use crate::transfer::{Cells, RESUME_KEEP_US};

/// Hand-overs that arrived whole and are remembered, for a sender that lost the link and has not heard of it. At the bound the oldest is
/// forgotten, and its sender is told that there is none: a new ticket follows.
const RECEIVED_MAX: usize = 1024;

/// A ticket whose sender waits for slots.
#[derive(Debug)]
pub(super) struct Asking {
    /// The link that asks.
    pub(super) link: LinkNo,
    pub(super) gateway: ReplicaId,
    pub(super) tokens: usize,
    /// When the request has no time left.
    pub(super) until: Time,
}

/// One hand-over that arrives.
#[derive(Debug)]
pub(super) struct Arriving {
    /// The link that asked for it: no other may write.
    link: LinkNo,
    /// Who asked for it: no other may go on with it on a new link.
    sender: (String, Epoch),
    pub(super) machine: Receiver,
}

impl Arriving {
    pub(super) fn link(&self) -> LinkNo {
        self.link
    }
}

/// One that arrived whole.
#[derive(Debug)]
pub(super) struct Received {
    attempt: AttemptId,
    sender: (String, Epoch),
    at: Time,
}

impl Node {
    /// The slots that a sender asked for are there.
    pub(super) fn on_reserved(&mut self, attempt: AttemptId, table: Vec<SlotRef>, names: Vec<BlockHash>, have_blocks: u32) {
        let Some(Asking { link, gateway, tokens, until }) = self.asking.remove(&attempt) else { return };
        let sender = self.peers.at(link).cloned().expect("a link that is gone takes its questions with it");
        self.generation = Generation(self.generation.0.wrapping_add(1));
        let (generation, grid) = (self.generation, self.grid(tokens));
        let machine = Receiver::new(grid, have_blocks, generation, until);
        self.gateways.insert(attempt, gateway);
        self.arriving.insert(attempt, Arriving { link, sender, machine });
        let gate = Box::new(Gate::new(grid, have_blocks, generation, table, names));
        self.effects.push_back(Effect::OpenGate(attempt, link, gate));
        self.tell_grant(attempt);
    }

    fn tell_grant(&mut self, attempt: AttemptId) {
        let Some(Arriving { link, machine, .. }) = self.arriving.get(&attempt) else { return };
        let (have_blocks, generation, credit_bytes) = (machine.have_blocks(), machine.generation(), machine.credit_bytes());
        self.send(*link, Message::Granted(Granted { attempt, have_blocks, generation, credit_bytes }));
    }

    /// Whether the sender of an attempt speaks on this link.
    pub(super) fn arrives_on(&self, attempt: AttemptId, link: LinkNo) -> bool {
        self.arriving.get(&attempt).is_some_and(|arriving| arriving.link == link)
    }

    /// Attempts that come over a link.
    pub(super) fn arriving_on(&self, link: LinkNo) -> Vec<AttemptId> {
        self.arriving.iter().filter(|(_, arriving)| arriving.link == link).map(|(attempt, _)| *attempt).collect()
    }

    /// Feeds the machine of an attempt, if it arrives, and does what it wants done.
    pub(super) fn recv_input(&mut self, attempt: AttemptId, input: Input) {
        let Some(arriving) = self.arriving.get_mut(&attempt) else { return };
        let link = arriving.link;
        arriving.machine.handle(self.now, input);
        while let Some(output) = self.arriving.get_mut(&attempt).and_then(|arriving| arriving.machine.poll()) {
            self.on_recv_output(attempt, link, output);
        }
    }

    fn on_recv_output(&mut self, attempt: AttemptId, link: LinkNo, output: Output) {
        match output {
            Output::Granted => self.tell_grant(attempt),
            Output::Resumed => self.effects.push_back(Effect::ReadGate(attempt)),
            Output::Credit(bytes) => self.send(link, Message::Credit { attempt, bytes }),
            Output::Abort(kind, detail) => self.send(link, Message::Abort { attempt, kind, detail }),
            Output::Complete { first_token, finished } => {
                self.remember(attempt);
                self.close_gate(attempt);
                self.send(link, Message::Received { attempt });
                self.batch.handle(self.now, batch::Input::Arrived { attempt, first_token, finished });
                if finished {
                    self.gateways.remove(&attempt);
                }
            }
            Output::Failed(kind, detail) => {
                self.close_gate(attempt);
                self.batch.handle(self.now, batch::Input::Cancel(attempt));
                self.fail(attempt, kind, detail);
            }
        }
    }

    fn close_gate(&mut self, attempt: AttemptId) {
        let stale = self.arriving.remove(&attempt).map_or(0, |arriving| arriving.machine.stale_frames());
        self.counts.stale_frames += stale;
        if !planted(Bug::GateLeftOpen) {
            self.effects.push_back(Effect::CloseGate(attempt));
        }
    }

    // --- after a lost link -----------------------------------------------------------------------------------------

    /// The sender asks again for slots that it has, since the grant was lost with the link.
    pub(super) fn on_reopen(&mut self, link: LinkNo, attempt: AttemptId) {
        if self.move_link(link, attempt) {
            self.recv_input(attempt, Input::Reopened);
        }
    }

    /// The sender goes on. One that is not known any more, or is another's, is told so.
    pub(super) fn on_resume(&mut self, link: LinkNo, attempt: AttemptId, generation: Generation) {
        let sender = self.peers.at(link);
        if self.received.iter().any(|done| done.attempt == attempt && Some(&done.sender) == sender) {
            return self.send(link, Message::Received { attempt });
        }
        if self.move_link(link, attempt) {
            return self.recv_input(attempt, Input::Resume(generation));
        }
        let detail = "this hand-over is not known here any more".into();
        self.send(link, Message::Abort { attempt, kind: FailKind::PeerLost, detail });
    }

    /// Listens to the sender of an attempt on another link; false when it is not the sender's.
    fn move_link(&mut self, link: LinkNo, attempt: AttemptId) -> bool {
        let sender = self.peers.at(link);
        let Some(arriving) = self.arriving.get_mut(&attempt).filter(|arriving| Some(&arriving.sender) == sender) else {
            return false;
        };
        if arriving.link != link {
            arriving.link = link;
            self.effects.push_back(Effect::MoveGate(attempt, link));
        }
        true
    }

    /// What stands is read: the sender is told.
    pub(super) fn on_stands(&mut self, attempt: AttemptId, stands: &Cells) {
        let Some(Arriving { link, machine, .. }) = self.arriving.get(&attempt) else { return };
        let (link, generation, credit_bytes) = (*link, machine.generation(), machine.credit_bytes());
        self.counts.resumes += 1;
        self.send(link, Message::Resumed(Resumed { attempt, generation, credit_bytes, stands: stands.words().to_vec() }));
    }

    fn remember(&mut self, attempt: AttemptId) {
        let Some(sender) = self.arriving.get(&attempt).map(|arriving| arriving.sender.clone()) else { return };
        if self.received.len() == RECEIVED_MAX {
            self.received.pop_front();
        }
        self.received.push_back(Received { attempt, sender, at: self.now });
    }

    /// Forgets what no sender can still ask about.
    pub(super) fn forget_received(&mut self) {
        let now = self.now;
        while self.received.front().is_some_and(|done| now.since(done.at) > RESUME_KEEP_US) {
            self.received.pop_front();
        }
    }
}
