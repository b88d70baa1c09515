//! Links to other nodes: the ones that this node dialled to hand over KV, and the ones on which others hand over to it; and who may say what
//! on them.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::arriving::Asking;
use super::doubts::Doubts;
use super::{Effect, LinkNo, Node, Note};
use crate::batch;
use crate::ids::{AttemptId, Epoch, Time};
use crate::message::{FailKind, Granted, Message, Peer, Resumed, Ticket};
use crate::planted::{Bug, planted};
use crate::transfer::{recv, send};

/// All links to other nodes.
#[derive(Debug, Default)]
pub(super) struct Peers {
    /// Name and incarnation of the node at the other end.
    by_link: BTreeMap<LinkNo, (String, Epoch)>,
    dialed: BTreeMap<String, LinkNo>,
    dialing: BTreeMap<String, Peer>,
    /// Those that did not answer.
    doubts: Doubts,
}

/// The way to a node.
enum Way {
    /// A link to this incarnation.
    Link(LinkNo, Epoch),
    /// None yet; somebody dials already.
    Dialing,
    /// None yet: dial, after giving up the link to an older incarnation.
    Dial(Option<LinkNo>),
    /// It did not answer lately.
    Doubted(String),
}

impl Peers {
    pub(super) fn contains(&self, link: LinkNo) -> bool {
        self.by_link.contains_key(&link)
    }

    /// The node at the other end of a link.
    pub(super) fn at(&self, link: LinkNo) -> Option<&(String, Epoch)> {
        self.by_link.get(&link)
    }

    pub(super) fn links(&self) -> impl Iterator<Item = LinkNo> + '_ {
        self.by_link.keys().copied()
    }

    /// The incarnation that was dialed, if this link was.
    fn up(&mut self, link: LinkNo, name: String, epoch: Epoch) -> Option<Epoch> {
        let meant = self.dialing.remove(&name).map(|peer| peer.epoch);
        if meant.is_some() {
            self.doubts.dispel(&name);
            self.dialed.insert(name.clone(), link);
        }
        self.by_link.insert(link, (name, epoch));
        meant
    }

    fn down(&mut self, link: LinkNo) {
        self.by_link.remove(&link);
        self.dialed.retain(|_, dialed| *dialed != link);
    }

    /// When a node that did not answer is to be dialed again.
    pub(super) fn deadline(&self) -> Option<Time> {
        self.doubts.deadline()
    }

    /// Nodes that did not answer when they were dialed last.
    pub(super) fn doubted(&self) -> usize {
        self.doubts.len()
    }

    /// The link to a node, or who has to make one.
    fn way(&mut self, now: Time, peer: &Peer) -> Way {
        let mut old = None;
        if let Some(link) = self.dialed.get(&peer.name).copied() {
            let epoch = self.by_link.get(&link).map_or(Epoch(0), |(_, epoch)| *epoch);
            if epoch >= peer.epoch {
                return Way::Link(link, epoch);
            }
            self.dialed.remove(&peer.name);
            old = Some(link);
        }
        if let Some(reason) = self.doubts.about(now, peer) {
            return Way::Doubted(reason);
        }
        if self.begin(peer) { Way::Dial(old) } else { Way::Dialing }
    }

    /// False when somebody dials the node already.
    fn begin(&mut self, peer: &Peer) -> bool {
        let begins = !self.dialing.contains_key(&peer.name);
        if begins {
            self.dialing.insert(peer.name.clone(), peer.clone());
        }
        begins
    }
}

impl Node {
    /// Those who wait for the node ask it; but who means a newer incarnation than answered has it dialed once more, unless that one was
    /// dialed already: a dial that began earlier may find a process that has not joined yet.
    pub(super) fn on_peer_up(&mut self, link: LinkNo, name: String, epoch: Epoch) {
        let waiting = self.waiting_for(&name);
        let meant = self.peers.up(link, name, epoch);
        for (attempt, peer) in waiting {
            if peer.epoch > epoch && meant.is_some_and(|meant| meant < peer.epoch) {
                self.reach(attempt, peer);
            } else {
                self.ask(attempt, link, epoch);
            }
        }
    }

    pub(super) fn on_peer_down(&mut self, link: LinkNo) {
        self.peers.down(link);
        self.paces.remove(&link);
        for attempt in self.leaving_on(link).into_iter().filter(|_| !planted(Bug::LossUnheard)) {
            self.leaving_lost(attempt);
        }
        for attempt in self.arriving_on(link) {
            self.recv_input(attempt, recv::Input::LinkLost);
        }
        let asking: Vec<_> = self.asking.iter().filter(|(_, asking)| asking.link == link).map(|(attempt, _)| *attempt).collect();
        asking.into_iter().for_each(|attempt| self.cancel(attempt));
    }

    /// Those who wait for the node learn it; but who means a newer incarnation than was dialed has it dialed, too.
    pub(super) fn on_dial_failed(&mut self, name: &str, reason: &str) {
        let Some(failed) = self.peers.dialing.remove(name) else { return };
        let epoch = failed.epoch;
        self.peers.doubts.failed(self.now, &self.name, failed, reason);
        for (attempt, peer) in self.waiting_for(name) {
            if peer.epoch > epoch {
                self.reach(attempt, peer);
            } else {
                self.send_input(attempt, send::Input::PeerLost(format!("{name} cannot be reached: {reason}")));
            }
        }
    }

    /// Finds or makes the link to the receiver of an attempt.
    pub(super) fn reach(&mut self, attempt: AttemptId, peer: Peer) {
        match self.peers.way(self.now, &peer) {
            Way::Link(link, epoch) => self.ask(attempt, link, epoch),
            Way::Dialing => {}
            Way::Dial(old) => {
                self.effects.extend(old.map(|link| Effect::Close(link, "a newer incarnation is meant")));
                self.effects.push_back(Effect::Dial(peer));
            }
            Way::Doubted(reason) => self.send_input(attempt, send::Input::PeerLost(reason)),
        }
    }

    /// Dials those again that did not answer.
    pub(super) fn dial_again(&mut self) {
        for peer in self.peers.doubts.due(self.now) {
            if self.peers.begin(&peer) {
                self.effects.push_back(Effect::Dial(peer));
            }
        }
    }

    pub(super) fn on_peer_message(&mut self, link: LinkNo, message: Message) {
        match message {
            Message::Open(open) => self.on_open(link, open.ticket),
            Message::Granted(Granted { attempt, have_blocks, generation, credit_bytes }) => {
                self.answer(link, attempt, send::Input::Granted { have_blocks, generation, credit_bytes });
            }
            Message::Declined { attempt, kind, detail } => self.answer(link, attempt, send::Input::Declined(kind, detail)),
            Message::Credit { attempt, bytes } => self.answer(link, attempt, send::Input::Credit(bytes)),
            Message::Resume { attempt, generation } => self.on_resume(link, attempt, generation),
            Message::Resumed(Resumed { attempt, generation, credit_bytes, stands }) => {
                self.answer(link, attempt, send::Input::Resumed { generation, credit_bytes, stands });
            }
            Message::Received { attempt } => self.answer(link, attempt, send::Input::Received),
            Message::Fin(fin) if self.arrives_on(fin.attempt, link) => {
                let (generation, cells, digest_sum) = (fin.generation, fin.cells, fin.digest_sum);
                let (first_token, finished) = (fin.first_token, fin.finished);
                self.recv_input(fin.attempt, recv::Input::Fin { generation, cells, digest_sum, first_token, finished });
            }
            Message::Fin(_) => self.counts.stale_frames += 1,
            Message::Abort { attempt, kind, detail } => self.on_abort(link, attempt, kind, detail),
            other => self.note(Note::Meaningless(other.into())),
        }
    }

    fn on_abort(&mut self, link: LinkNo, attempt: AttemptId, kind: FailKind, detail: String) {
        if self.arrives_on(attempt, link) {
            self.recv_input(attempt, recv::Input::Aborted(kind, detail));
        } else if self.asking.get(&attempt).is_some_and(|asking| asking.link == link) {
            self.cancel(attempt);
        } else {
            self.answer(link, attempt, send::Input::Aborted(kind, detail));
        }
    }

    /// A receiver's word counts only on the link that the hand-over uses.
    fn answer(&mut self, link: LinkNo, attempt: AttemptId, input: send::Input) {
        if self.leaves_on(attempt, link) {
            self.send_input(attempt, input);
        } else {
            self.counts.stale_frames += 1;
        }
    }

    /// A sender asks for slots.
    fn on_open(&mut self, link: LinkNo, ticket: Ticket) {
        let attempt = ticket.attempt;
        let meant = ticket.decode.as_ref().map(|peer| (peer.node, peer.epoch));
        if meant.is_none() || meant != self.joined() || self.stopping.is_some() {
            let detail = "the ticket does not name this incarnation of this node, or it is stopping".into();
            return self.send(link, Message::Declined { attempt, kind: FailKind::PeerLost, detail });
        }
        if self.arriving.contains_key(&attempt) {
            return self.on_reopen(link, attempt);
        }
        if self.gateways.contains_key(&attempt) || self.asking.contains_key(&attempt) {
            return;
        }
        if self.uplinks.link(ticket.gateway).is_none() {
            // Its tokens would go nowhere, and the gateway, which may hold the link for up already, would wait for them.
            let detail = "there is no link to the gateway of the ticket".into();
            return self.send(link, Message::Declined { attempt, kind: FailKind::PeerLost, detail });
        }
        self.asking.insert(
            attempt,
            Asking { link, gateway: ticket.gateway, tokens: ticket.tokens.len(), until: self.now.after(ticket.budget_us) },
        );
        self.batch.handle(self.now, batch::Input::Reserve(ticket));
    }
}
