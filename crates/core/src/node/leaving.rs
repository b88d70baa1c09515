//! Hand-overs that leave: the sending machine of each attempt, the link it speaks on, and its streams. An attempt is through only when its
//! machine is over and none of its streams reads cells any more, so a slot that is written is never being read.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::{Effect, LinkNo, Node, Note, SpanJob};
use crate::batch;
use crate::ids::{AttemptId, BlockHash, Epoch, Generation, SlotRef, Time};
use crate::message::{FailKind, Fin, HandoverStats, Message, Open, Peer, Ticket};
use crate::planted::{Bug, planted};
use crate::transfer::Span;
use crate::transfer::pace::{self, Waiting};
use crate::transfer::send::{Input, Output, Sender};

/// One hand-over that leaves.
#[derive(Debug)]
pub(super) struct Leaving {
    pub(super) machine: Sender,
    ticket: Ticket,
    table: Vec<SlotRef>,
    names: Vec<BlockHash>,
    link: Option<LinkNo>,
    /// Streams whose cells are still read.
    undrained: u32,
}

impl Leaving {
    pub(super) fn link(&self) -> Option<LinkNo> {
        self.link
    }

    fn job(&self, link: LinkNo, waiting: &Waiting, due: Time) -> SpanJob {
        let place = |(layer, block): (u16, u32)| (layer, block, self.table[block as usize], self.names[block as usize]);
        let (span, generation, priority) = (waiting.span, waiting.generation, pace::priority(due));
        SpanJob { attempt: self.ticket.attempt, link, span, generation, priority, cells: span.iter().map(place).collect() }
    }
}

impl Node {
    /// A sequence is admitted whose answer is decoded elsewhere.
    pub(super) fn on_admitted(&mut self, attempt: AttemptId, table: Vec<SlotRef>, names: Vec<BlockHash>, cached_blocks: u32) {
        let Some(ticket) = self.splitting.remove(&attempt) else { return };
        let Some(peer) = ticket.decode.clone() else { return };
        self.note(Note::Admitted(attempt, cached_blocks));
        let deadline = self.now.after(ticket.budget_us);
        let machine = Sender::new(self.grid(ticket.tokens.len()), cached_blocks, deadline);
        self.leaving.insert(attempt, Leaving { machine, ticket, table, names, link: None, undrained: 0 });
        self.reach(attempt, peer);
    }

    /// Tokens of a sequence whose KV leaves.
    pub(super) fn leaving_tokens(&self, attempt: AttemptId) -> Option<u32> {
        self.leaving.get(&attempt).map(|leaving| leaving.ticket.tokens.len() as u32)
    }

    /// Attempts whose receiver is the node `name` and that have no link to it yet, and the receiver that each means.
    pub(super) fn waiting_for(&self, name: &str) -> Vec<(AttemptId, Peer)> {
        let waits = self.leaving.iter().filter(|(_, leaving)| leaving.link.is_none() && !leaving.machine.is_over());
        let meant = waits.filter_map(|(attempt, leaving)| Some((*attempt, leaving.ticket.decode.clone()?)));
        meant.filter(|(_, peer)| peer.name == name).collect()
    }

    /// Attempts that go over a link.
    pub(super) fn leaving_on(&self, link: LinkNo) -> Vec<AttemptId> {
        self.leaving.iter().filter(|(_, leaving)| leaving.link == Some(link)).map(|(attempt, _)| *attempt).collect()
    }

    /// Whether the receiver of an attempt speaks on this link.
    pub(super) fn leaves_on(&self, attempt: AttemptId, link: LinkNo) -> bool {
        self.leaving.get(&attempt).is_some_and(|leaving| leaving.link == Some(link))
    }

    /// The link to the receiver is there: ask it. A receiver of another incarnation is not the one that the ticket means.
    pub(super) fn ask(&mut self, attempt: AttemptId, link: LinkNo, epoch: Epoch) {
        let Some(leaving) = self.leaving.get_mut(&attempt) else { return };
        let expected = leaving.ticket.decode.as_ref().map(|peer| peer.epoch);
        if expected != Some(epoch) {
            let detail = format!("the receiver is incarnation {epoch}, another than the ticket's");
            return self.send_input(attempt, Input::PeerLost(detail));
        }
        leaving.link = Some(link);
        self.send_input(attempt, Input::Linked);
    }

    /// The link to the receiver is gone: look for another.
    pub(super) fn leaving_lost(&mut self, attempt: AttemptId) {
        let Some(leaving) = self.leaving.get_mut(&attempt) else { return };
        leaving.link = None;
        let peer = leaving.ticket.decode.clone();
        self.send_input(attempt, Input::LinkLost);
        if let Some(peer) = peer.filter(|_| self.leaving.get(&attempt).is_some_and(|leaving| !leaving.machine.is_over())) {
            self.reach(attempt, peer);
        }
    }

    /// Feeds the machine of an attempt, if it leaves, and does what it wants done.
    pub(super) fn send_input(&mut self, attempt: AttemptId, input: Input) {
        let Some(leaving) = self.leaving.get_mut(&attempt) else { return };
        leaving.machine.handle(self.now, input);
        while let Some(output) = self.leaving.get_mut(&attempt).and_then(|leaving| leaving.machine.poll()) {
            self.on_send_output(attempt, output);
        }
        let link = self.leaving.get(&attempt).and_then(|leaving| leaving.link);
        self.finish_leaving(attempt);
        link.into_iter().for_each(|link| self.take_turns(link));
    }

    fn on_send_output(&mut self, attempt: AttemptId, output: Output) {
        match output {
            Output::Open => {
                let ticket = self.leaving.get(&attempt).map(|leaving| leaving.ticket.clone());
                ticket.into_iter().for_each(|ticket| self.tell_receiver(attempt, Message::Open(Open { ticket })));
            }
            Output::Resume(generation) => self.tell_receiver(attempt, Message::Resume { attempt, generation }),
            Output::Cells { span, generation } => self.wait_for_turn(attempt, span, generation),
            Output::Fin { generation, cells, digest_sum, first_token, finished } => {
                self.tell_receiver(attempt, Message::Fin(Fin { attempt, generation, cells, digest_sum, first_token, finished }));
            }
            Output::Abort(kind, detail) => self.tell_receiver(attempt, Message::Abort { attempt, kind, detail }),
            Output::Done { bytes, blocks_sent, blocks_had, transfer_us, exposed_us } => {
                let Some(replica) = self.gateways.get(&attempt).copied() else { return };
                let peer = self.leaving.get(&attempt).and_then(|leaving| leaving.ticket.decode.as_ref());
                let node = peer.map(|peer| peer.name.clone()).unwrap_or_default();
                let stats = HandoverStats { attempt, node, bytes, blocks_sent, blocks_had, transfer_us, exposed_us };
                self.tell(replica, Message::Handover(stats));
            }
            Output::Failed(kind, detail) => self.give_up(attempt, kind, detail),
        }
    }

    fn wait_for_turn(&mut self, attempt: AttemptId, span: Span, generation: Generation) {
        let link = self.leaving.get(&attempt).and_then(|leaving| leaving.link).expect("a grant came on the link of the hand-over");
        let bytes = self.span_bytes(span);
        self.paces.entry(link).or_default().wait(attempt, Waiting { span, generation, bytes, since: self.now });
    }

    /// Sends what waits for a link, as far as there is room on it.
    fn take_turns(&mut self, link: LinkNo) {
        let Some(pace) = self.paces.get_mut(&link) else { return };
        while let Some((attempt, waiting, due)) = pace.next(self.now, |attempt| self.leaving[&attempt].machine.claim()) {
            let leaving = self.leaving.get_mut(&attempt).expect("what is over waits no more");
            leaving.undrained += 1;
            self.effects.push_back(Effect::Span(leaving.job(link, &waiting, due)));
        }
    }

    fn span_bytes(&self, span: Span) -> u64 {
        span.cells() * self.layout.cell_bytes() as u64
    }

    fn give_up(&mut self, attempt: AttemptId, kind: FailKind, detail: String) {
        self.effects.push_back(Effect::StopSpans(attempt));
        self.cancelled.insert(attempt);
        self.fail(attempt, kind, detail);
    }

    fn tell_receiver(&mut self, attempt: AttemptId, message: Message) {
        let link = self.leaving.get(&attempt).and_then(|leaving| leaving.link);
        self.effects.extend(link.map(|link| Effect::Send(link, message)));
    }

    /// A stream's cells are read no more.
    pub(super) fn on_drained(&mut self, attempt: AttemptId, link: LinkNo, span: Span, elapsed_us: u64, error: Option<String>) {
        let bytes = self.span_bytes(span);
        if let Some(pace) = self.paces.get_mut(&link) {
            pace.drained(bytes);
        }
        self.span_over(attempt, bytes, elapsed_us, error);
        self.take_turns(link);
    }

    fn span_over(&mut self, attempt: AttemptId, bytes: u64, elapsed_us: u64, error: Option<String>) {
        let Some(leaving) = self.leaving.get_mut(&attempt) else { return };
        leaving.undrained -= 1;
        match error {
            Some(detail) => self.send_input(attempt, Input::SpanLost(detail)),
            None => {
                self.rates.sent(bytes, elapsed_us);
                self.finish_leaving(attempt);
            }
        }
    }

    /// Lets go of the blocks when nothing reads them any more.
    fn finish_leaving(&mut self, attempt: AttemptId) {
        let Some(leaving) = self.leaving.get_mut(&attempt).filter(|leaving| leaving.machine.is_over()) else { return };
        if let Some(pace) = leaving.link.take().and_then(|link| self.paces.get_mut(&link)) {
            pace.forget(attempt);
        }
        if leaving.undrained > 0 && !planted(Bug::FreeUndrained) {
            return;
        }
        self.counts.stale_frames += leaving.machine.stale_frames();
        self.counts.resumes += u64::from(leaving.machine.resumes());
        self.leaving.remove(&attempt);
        self.gateways.remove(&attempt);
        let cancelled = self.cancelled.remove(&attempt);
        let input = if cancelled { batch::Input::Cancel(attempt) } else { batch::Input::Release(attempt) };
        self.batch.handle(self.now, input);
    }
}
