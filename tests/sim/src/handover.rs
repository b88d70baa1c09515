//! Both sides of a node's hand-overs, as `millrace-node` keeps them: a machine for each attempt, the link it speaks on, its slots.
//! An attempt that is sent is finished only when its machine is over and none of its streams reads cells any more.

use std::collections::BTreeMap;

use millrace_core::ids::{AttemptId, BlockHash, Epoch, SlotRef, Time};
use millrace_core::message::{FailKind, Fin, HandoverStats, Message, Open, Ticket};
use millrace_core::transfer::recv::Receiver;
use millrace_core::transfer::send::{Input, Output, Sender};

use crate::event::{Act, LinkNo, SpanJob};

/// One hand-over that leaves.
#[derive(Debug)]
pub struct Sending {
    machine: Sender,
    ticket: Ticket,
    table: Vec<SlotRef>,
    names: Vec<BlockHash>,
    link: Option<LinkNo>,
    undrained: u32,
}

/// What the drive loop has to do for a hand-over.
#[derive(Debug)]
pub enum Effect {
    /// Tell the gateway how it went.
    Report(HandoverStats),
    /// Tell the gateway that the attempt is lost.
    Lost(FailKind, String),
    /// Nothing reads the blocks any more.
    Release,
}

/// All hand-overs that leave.
#[derive(Debug, Default)]
pub struct Sendings(BTreeMap<AttemptId, Sending>);

impl Sendings {
    /// A sequence was admitted whose answer is decoded elsewhere.
    pub fn insert(&mut self, ticket: Ticket, machine: Sender, table: Vec<SlotRef>, names: Vec<BlockHash>) {
        let attempt = ticket.attempt;
        self.0.insert(attempt, Sending { machine, ticket, table, names, link: None, undrained: 0 });
    }

    /// Whether the attempt is being sent.
    #[must_use]
    pub fn contains(&self, attempt: AttemptId) -> bool {
        self.0.contains_key(&attempt)
    }

    /// Whether the receiver of an attempt speaks on this link.
    #[must_use]
    pub fn speaks(&self, attempt: AttemptId, link: LinkNo) -> bool {
        self.0.get(&attempt).is_some_and(|s| s.link == Some(link))
    }

    /// Hand-overs that were asked for and are not over.
    pub fn under_way(&self) -> impl Iterator<Item = (LinkNo, AttemptId)> {
        self.0.iter().filter(|(_, s)| !s.machine.is_over()).filter_map(|(attempt, s)| Some((s.link?, *attempt)))
    }

    /// Tokens of an attempt's sequence.
    #[must_use]
    pub fn tokens(&self, attempt: AttemptId) -> Option<u32> {
        self.0.get(&attempt).map(|s| s.ticket.tokens.len() as u32)
    }

    /// Whether nothing is being sent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Attempts whose receiver is the node `name` and that have no link to it yet.
    #[must_use]
    pub fn waiting_for(&self, name: &str) -> Vec<AttemptId> {
        let waits = |s: &&Sending| s.link.is_none() && s.ticket.decode.as_ref().is_some_and(|peer| peer.name == name);
        self.0.values().filter(waits).map(|s| s.ticket.attempt).collect()
    }

    /// Attempts that go over a link.
    #[must_use]
    pub fn on_link(&self, link: LinkNo) -> Vec<AttemptId> {
        self.0.values().filter(|s| s.link == Some(link)).map(|s| s.ticket.attempt).collect()
    }

    /// Every attempt, for timers.
    #[must_use]
    pub fn attempts(&self) -> Vec<AttemptId> {
        self.0.keys().copied().collect()
    }

    /// When the first machine wants a `Tick`.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        self.0.values().filter_map(|s| s.machine.deadline()).min()
    }

    /// The link to the receiver, an incarnation `epoch`, is there: ask it.
    pub fn ask(&mut self, now: Time, attempt: AttemptId, (link, epoch): (LinkNo, Epoch), acts: &mut Vec<Act>) -> Vec<Effect> {
        let Some(sending) = self.0.get_mut(&attempt) else { return Vec::new() };
        if sending.ticket.decode.as_ref().map(|peer| peer.epoch) != Some(epoch) {
            let lost = Input::PeerLost("another incarnation than the ticket's".into());
            return self.handle(now, attempt, lost, acts);
        }
        sending.link = Some(link);
        acts.push(Act::Send(link, Message::Open(Open { ticket: sending.ticket.clone() })));
        Vec::new()
    }

    /// Feeds a machine and does what it wants done.
    pub fn handle(&mut self, now: Time, attempt: AttemptId, input: Input, acts: &mut Vec<Act>) -> Vec<Effect> {
        let Some(sending) = self.0.get_mut(&attempt) else { return Vec::new() };
        sending.machine.handle(now, input);
        sending.machine.check();
        let mut effects = Vec::new();
        while let Some(output) = sending.machine.poll() {
            effects.extend(sending.output(output, acts));
        }
        effects.extend(self.finish(attempt));
        effects
    }

    /// A stream's cells are read no more.
    pub fn drained(&mut self, now: Time, attempt: AttemptId, error: Option<&str>, acts: &mut Vec<Act>) -> Vec<Effect> {
        let Some(sending) = self.0.get_mut(&attempt) else { return Vec::new() };
        sending.undrained -= 1;
        match error {
            Some(detail) => self.handle(now, attempt, Input::PeerLost(detail.into()), acts),
            None => self.finish(attempt).into_iter().collect(),
        }
    }

    fn finish(&mut self, attempt: AttemptId) -> Option<Effect> {
        let over = self.0.get(&attempt).is_some_and(|s| s.machine.is_over() && s.undrained == 0);
        over.then(|| self.0.remove(&attempt)).flatten().map(|_| Effect::Release)
    }
}

impl Sending {
    fn output(&mut self, output: Output, acts: &mut Vec<Act>) -> Option<Effect> {
        let attempt = self.ticket.attempt;
        match output {
            Output::Cells { span, generation } => {
                self.undrained += 1;
                let place = |(layer, block): (u16, u32)| (layer, block, self.table[block as usize], self.names[block as usize]);
                let link = self.link.expect("granted on a link");
                let cells = span.iter().map(place).collect();
                let tokens = self.ticket.tokens.len() as u32;
                acts.push(Act::Span(SpanJob { attempt, link, span, generation, cells, tokens }));
                None
            }
            Output::Fin { generation, cells, digest_sum, first_token, finished } => {
                self.tell(Message::Fin(Fin { attempt, generation, cells, digest_sum, first_token, finished }), acts);
                None
            }
            Output::Abort(kind, detail) => {
                self.tell(Message::Abort { attempt, kind, detail }, acts);
                None
            }
            Output::Done { bytes, blocks_sent, blocks_had, transfer_us, exposed_us } => {
                let node = self.ticket.decode.as_ref().map(|p| p.name.clone()).unwrap_or_default();
                Some(Effect::Report(HandoverStats { attempt, node, bytes, blocks_sent, blocks_had, transfer_us, exposed_us }))
            }
            Output::Failed(kind, detail) => {
                acts.push(Act::StopSpans(attempt));
                Some(Effect::Lost(kind, detail))
            }
        }
    }

    fn tell(&self, message: Message, acts: &mut Vec<Act>) {
        acts.extend(self.link.map(|link| Act::Send(link, message)));
    }
}

/// One hand-over that arrives.
#[derive(Debug)]
pub struct Reception {
    /// The link that asked for it: no other may write.
    pub link: LinkNo,
    /// Slots of the sequence's blocks.
    pub table: Vec<SlotRef>,
    /// Names of the sequence's blocks.
    pub names: Vec<BlockHash>,
    /// The machine.
    pub machine: Receiver,
}
