//! Hand-overs that arrive: the receiving machine of each attempt and the link that it listens to. No slot of one is given away before its gate is
//! closed.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::{Effect, LinkNo, Node};
use crate::batch;
use crate::ids::{AttemptId, BlockHash, Generation, SlotRef};
use crate::message::{Granted, Message};
use crate::transfer::gate::Gate;
use crate::transfer::recv::{Input, Output, Receiver};

/// One hand-over that arrives.
#[derive(Debug)]
pub(super) struct Arriving {
    /// The link that asked for it: no other may write.
    link: LinkNo,
    pub(super) machine: Receiver,
}

impl Node {
    /// The slots that a sender asked for are there.
    pub(super) fn on_reserved(&mut self, attempt: AttemptId, table: Vec<SlotRef>, names: Vec<BlockHash>, have_blocks: u32) {
        let Some((link, ticket)) = self.asking.remove(&attempt) else { return };
        self.generation = Generation(self.generation.0.wrapping_add(1));
        let (generation, grid) = (self.generation, self.grid(ticket.tokens.len()));
        let machine = Receiver::new(grid, have_blocks, generation, self.now.after(ticket.budget_us));
        let credit_bytes = machine.credit_bytes();
        self.gateways.insert(attempt, ticket.gateway);
        self.arriving.insert(attempt, Arriving { link, machine });
        let gate = Box::new(Gate::new(grid, have_blocks, generation, table, names));
        self.effects.push_back(Effect::OpenGate(attempt, link, gate));
        self.send(link, Message::Granted(Granted { attempt, have_blocks, generation, credit_bytes }));
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
            Output::Credit(bytes) => self.send(link, Message::Credit { attempt, bytes }),
            Output::Abort(kind, detail) => self.send(link, Message::Abort { attempt, kind, detail }),
            Output::Complete { first_token, finished } => {
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
        self.arriving.remove(&attempt);
        self.effects.push_back(Effect::CloseGate(attempt));
    }
}
