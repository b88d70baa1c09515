//! The drive loop of a node: waits for one event, tells the machines, does what they want done. It holds no policy; what may
//! be sent, written, computed or freed is decided in `millrace-core`.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use millrace_core::batch::{Batch, Input, Output};
use millrace_core::engine::{EngineError, Sampled};
use millrace_core::ids::{AttemptId, BlockHash, Generation, ReplicaId, SlotRef, Time};
use millrace_core::message::{AttemptFailed, FailKind, Granted, Load, Message, Peer, Ticket, TokenOut};
use millrace_core::transfer::Grid;
use millrace_core::transfer::recv::{self, Receiver};
use millrace_core::transfer::send::{self, Sender};
use tokio::sync::mpsc;

use super::compute::Compute;
use super::event::{Event, LinkEvent, LinkNo};
use super::links::ReplicasTold;
use super::peers::Peers;
use super::rates::Rates;
use super::receiving::{Reception, Receptions};
use super::sending::{Effect, Sendings};
use super::upkeep::Upkeep;
use super::uplink::Uplinks;
use super::{Clock, NodeConfig};
use crate::shutdown::Shutdown;

/// Events handled before outputs are looked at again: keeps a flood of layer events from delaying tokens.
const EVENTS_PER_TURN: usize = 256;
/// Machines learn at least this often that time has passed; their deadlines are seconds away.
const TICK_US: u64 = 50_000;
/// A stopping node finishes what it has for at most this long.
const DRAIN_MAX_US: u64 = 20_000_000;

/// Everything a node owns.
pub(super) struct Drive {
    pub(super) config: NodeConfig,
    pub(super) clock: Clock,
    pub(super) batch: Batch,
    pub(super) compute: Compute,
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) uplinks: Uplinks,
    /// Where lists of the coordinator's replicas go.
    pub(super) replicas: mpsc::Sender<ReplicasTold>,
    pub(super) peers: Peers,
    pub(super) sendings: Sendings,
    pub(super) upkeep: Upkeep,
    pub(super) receptions: Receptions,
    pub(super) rates: Rates,
    /// Rows of the step in flight: attempt, tokens known after it, tokens in all.
    pub(super) in_flight: Option<Vec<(AttemptId, u32, u32)>>,
    /// Where the tokens of each live attempt go.
    pub(super) gateways: HashMap<AttemptId, ReplicaId>,
    /// Tickets whose slots are asked for on behalf of a sender, and the link it speaks on.
    pub(super) asking: HashMap<AttemptId, (LinkNo, Ticket)>,
    /// Tickets that are computed here and decoded elsewhere, until their hand-over begins.
    pub(super) leaving: HashMap<AttemptId, Ticket>,
    /// Attempts cancelled while a hand-over still reads their blocks.
    pub(super) cancelled: HashSet<AttemptId>,
    pub(super) generation: u32,
    pub(super) stopping_since: Option<Time>,
    /// When the machines are next told that time has passed.
    pub(super) next_tick: Time,
}

impl Drive {
    /// Runs until shutdown, or until the node may not be a member.
    pub(super) async fn run(mut self, shutdown: Shutdown) -> Result<()> {
        loop {
            if self.now() >= self.next_tick {
                self.on_tick();
            }
            self.advance()?;
            if self.stopped() {
                return Ok(());
            }
            let wait = Duration::from_micros(self.deadline().since(self.clock.now()).max(1_000));
            tokio::select! {
                event = self.events.recv() => {
                    let event = event.context("every source of events is gone")?;
                    self.on_events(event)?;
                }
                () = tokio::time::sleep(wait) => {}
                _ = shutdown.wait(), if self.stopping_since.is_none() => self.begin_stop(),
            }
        }
    }

    fn on_events(&mut self, first: Event) -> Result<()> {
        self.on_event(first)?;
        for _ in 1..EVENTS_PER_TURN {
            let Ok(event) = self.events.try_recv() else { break };
            self.on_event(event)?;
        }
        Ok(())
    }

    fn on_event(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Uplink(replica, no, event) => self.on_uplink(replica, no, event)?,
            Event::Peer(no, event) => self.on_peer(no, event),
            Event::DialFailed { name, reason } => self.on_dial_failed(&name, &reason),
            Event::Layer(layer) => self.on_layer(layer),
            Event::Stepped { result, elapsed_us } => self.on_stepped(result, elapsed_us),
            Event::SpanSent { attempt, span, digest_sum } => self.send_input(attempt, send::Input::Sent { span, digest_sum }),
            Event::SpanDrained { attempt, bytes, elapsed_us, error } => {
                if error.is_none() {
                    self.rates.sent(bytes, elapsed_us);
                }
                let effects = self.sendings.drained(attempt, error);
                self.apply(attempt, effects);
            }
            Event::Arrived(attempt) => {
                let outputs = self.receptions.poll(attempt);
                self.on_reception(attempt, outputs);
            }
        }
        Ok(())
    }

    fn now(&self) -> Time {
        self.clock.now()
    }

    // --- coordinator -----------------------------------------------------------------------------------------------

    fn on_uplink(&mut self, replica: ReplicaId, no: LinkNo, event: LinkEvent) -> Result<()> {
        match event {
            LinkEvent::Up(link) => {
                tracing::info!(%replica, "coordinator link up");
                self.uplinks.up(self.now(), replica, no, link);
            }
            LinkEvent::Down(reason) => {
                if self.uplinks.down(replica, no) {
                    tracing::warn!(%replica, %reason, "coordinator link down");
                    self.cancel_all_of(replica);
                }
            }
            LinkEvent::Message(message) => self.on_coordinator(replica, *message)?,
        }
        Ok(())
    }

    fn on_coordinator(&mut self, replica: ReplicaId, message: Message) -> Result<()> {
        match message {
            Message::Assign(ticket) => self.on_assign(replica, ticket),
            Message::Cancel(attempt) => self.cancel(attempt),
            Message::CacheOrder(order) => self.on_order(replica, order),
            Message::Joined { node, epoch } => {
                let empty = self.batch.cached_names().next().is_none();
                if self.uplinks.on_joined(node, epoch, empty) {
                    tracing::info!(%node, %epoch, "joined");
                    self.peers.set_membership(node, epoch);
                }
            }
            Message::JoinRefused { reason, retry } => {
                if let Some(reason) = self.uplinks.on_refused(self.now(), reason, retry) {
                    bail!("the cluster refuses {}: {reason}", self.config.name);
                }
            }
            Message::DeltaApplied { epoch, seq } => self.uplinks.on_applied(epoch, seq),
            Message::WantSnapshot { epoch } => self.uplinks.on_want_snapshot(epoch),
            Message::Ping => {}
            // One that finds no room is told again with the next link.
            Message::Replicas(list) => drop(self.replicas.try_send((replica, list))),
            other => tracing::debug!(?other, "message without meaning on a coordinator link"),
        }
        Ok(())
    }

    fn on_assign(&mut self, replica: ReplicaId, ticket: Ticket) {
        let attempt = ticket.attempt;
        if self.stopping_since.is_some() {
            let detail = "the node is stopping".into();
            self.uplinks.send(replica, Message::Failed(AttemptFailed { attempt, kind: FailKind::Stopping, detail }));
            return;
        }
        if self.gateways.insert(attempt, replica).is_some() {
            return;
        }
        if ticket.decode.is_some() {
            self.leaving.insert(attempt, ticket.clone());
        }
        self.batch.handle(self.now(), Input::Add(ticket));
    }

    /// The gateway's process or the way to it is gone: its clients are too, or it has made new tickets.
    fn cancel_all_of(&mut self, replica: ReplicaId) {
        let attempts: Vec<_> = self.gateways.iter().filter(|(_, r)| **r == replica).map(|(a, _)| *a).collect();
        attempts.into_iter().for_each(|attempt| self.cancel(attempt));
    }

    /// Ends an attempt on this node, whatever it is doing.
    fn cancel(&mut self, attempt: AttemptId) {
        let reason = || (FailKind::Stopping, "cancelled by the gateway".to_owned());
        self.gateways.remove(&attempt);
        self.leaving.remove(&attempt);
        self.asking.remove(&attempt);
        let (kind, detail) = reason();
        let outputs = self.receptions.handle(self.clock, attempt, recv::Input::Cancel(kind, detail));
        self.on_reception(attempt, outputs);
        if self.sendings.contains(attempt) {
            self.cancelled.insert(attempt);
            let (kind, detail) = reason();
            self.send_input(attempt, send::Input::Cancel(kind, detail));
        } else {
            self.batch.handle(self.now(), Input::Cancel(attempt));
        }
    }

    fn fail(&mut self, attempt: AttemptId, kind: FailKind, detail: String) {
        if let Some(replica) = self.gateways.remove(&attempt) {
            tracing::warn!(%attempt, ?kind, %detail, "attempt failed");
            self.uplinks.send(replica, Message::Failed(AttemptFailed { attempt, kind, detail }));
        }
        self.leaving.remove(&attempt);
    }

    // --- other nodes -----------------------------------------------------------------------------------------------

    fn on_peer(&mut self, no: LinkNo, event: LinkEvent) {
        match event {
            LinkEvent::Up(link) => {
                let name = link.peer().name.clone();
                self.peers.up(no, link.clone());
                for attempt in self.sendings.waiting_for(&name) {
                    let effects = self.sendings.ask(attempt, no, &link);
                    self.apply(attempt, effects);
                }
            }
            LinkEvent::Message(message) => self.on_peer_message(no, *message),
            LinkEvent::Down(reason) => self.on_peer_down(no, &reason),
        }
    }

    fn on_peer_down(&mut self, no: LinkNo, reason: &str) {
        self.peers.down(no);
        for attempt in self.sendings.on_link(no) {
            self.send_input(attempt, send::Input::PeerLost(reason.to_owned()));
        }
        let receiving = self.receptions.attempts();
        for attempt in receiving.into_iter().filter(|(_, link)| *link == no).map(|(attempt, _)| attempt) {
            self.recv_input(attempt, recv::Input::PeerLost(reason.to_owned()));
        }
        let asking: Vec<_> = self.asking.iter().filter(|(_, (link, _))| *link == no).map(|(a, _)| *a).collect();
        asking.into_iter().for_each(|attempt| self.cancel(attempt));
    }

    fn on_dial_failed(&mut self, name: &str, reason: &str) {
        self.peers.dial_failed(name);
        for attempt in self.sendings.waiting_for(name) {
            self.send_input(attempt, send::Input::PeerLost(format!("{name} cannot be reached: {reason}")));
        }
    }

    fn on_peer_message(&mut self, no: LinkNo, message: Message) {
        match message {
            Message::Open(open) => self.on_open(no, open.ticket),
            Message::Granted(Granted { attempt, have_blocks, generation, credit_bytes }) => {
                self.answer(no, attempt, send::Input::Granted { have_blocks, generation, credit_bytes });
            }
            Message::Declined { attempt, kind, detail } => self.answer(no, attempt, send::Input::Declined(kind, detail)),
            Message::Credit { attempt, bytes } => self.answer(no, attempt, send::Input::Credit(bytes)),
            Message::Received { attempt } => self.answer(no, attempt, send::Input::Received),
            Message::Fin(fin) if self.receptions.link(fin.attempt) == Some(no) => {
                let (generation, cells, digest_sum) = (fin.generation, fin.cells, fin.digest_sum);
                let (first_token, finished) = (fin.first_token, fin.finished);
                self.recv_input(fin.attempt, recv::Input::Fin { generation, cells, digest_sum, first_token, finished });
            }
            Message::Abort { attempt, kind, detail } => {
                if self.receptions.link(attempt) == Some(no) {
                    self.recv_input(attempt, recv::Input::Aborted(kind, detail));
                } else if self.asking.get(&attempt).is_some_and(|(link, _)| *link == no) {
                    self.cancel(attempt);
                } else {
                    self.answer(no, attempt, send::Input::Aborted(kind, detail));
                }
            }
            other => tracing::debug!(?other, "message without meaning on a node link"),
        }
    }

    /// A receiver's word counts only on the link that the hand-over uses.
    fn answer(&mut self, no: LinkNo, attempt: AttemptId, input: send::Input) {
        if self.sendings.speaks(attempt, no) {
            self.send_input(attempt, input);
        }
    }

    /// A sender asks for slots.
    fn on_open(&mut self, no: LinkNo, ticket: Ticket) {
        let attempt = ticket.attempt;
        let meant = ticket.decode.as_ref().map(|peer| (peer.node, peer.epoch));
        if meant.is_none() || meant != self.uplinks.joined() || self.stopping_since.is_some() {
            let detail = "the ticket does not name this incarnation of this node, or it is stopping".into();
            self.peers.send(no, Message::Declined { attempt, kind: FailKind::PeerLost, detail });
            return;
        }
        if self.gateways.contains_key(&attempt) || self.asking.contains_key(&attempt) {
            return;
        }
        self.asking.insert(attempt, (no, ticket.clone()));
        self.batch.handle(self.now(), Input::Reserve(ticket));
    }

    // --- hand-over -------------------------------------------------------------------------------------------------

    fn grid(&self, tokens: usize) -> Grid {
        let layout = &self.config.model.layout;
        Grid { layers: layout.layers, blocks: layout.blocks(tokens) as u32, cell_bytes: layout.cell_bytes() as u64 }
    }

    fn send_input(&mut self, attempt: AttemptId, input: send::Input) {
        let effects = self.sendings.handle(attempt, input);
        self.apply(attempt, effects);
    }

    fn apply(&mut self, attempt: AttemptId, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Report(stats) => {
                    if let Some(replica) = self.gateways.get(&attempt) {
                        self.uplinks.send(*replica, Message::Handover(stats));
                    }
                }
                Effect::Lost(kind, detail) => {
                    self.cancelled.insert(attempt);
                    self.fail(attempt, kind, detail);
                }
                Effect::Release(attempt) => {
                    self.gateways.remove(&attempt);
                    let cancelled = self.cancelled.remove(&attempt);
                    let input = if cancelled { Input::Cancel(attempt) } else { Input::Release(attempt) };
                    self.batch.handle(self.now(), input);
                }
            }
        }
    }

    fn recv_input(&mut self, attempt: AttemptId, input: recv::Input) {
        let outputs = self.receptions.handle(self.clock, attempt, input);
        self.on_reception(attempt, outputs);
    }

    fn on_reception(&mut self, attempt: AttemptId, outputs: Vec<recv::Output>) {
        for output in outputs {
            let Some(no) = self.receptions.link(attempt) else { return };
            match output {
                recv::Output::Credit(bytes) => self.peers.send(no, Message::Credit { attempt, bytes }),
                recv::Output::Abort(kind, detail) => self.peers.send(no, Message::Abort { attempt, kind, detail }),
                recv::Output::Complete { first_token, finished } => {
                    self.receptions.remove(attempt);
                    self.peers.send(no, Message::Received { attempt });
                    self.batch.handle(self.now(), Input::Arrived { attempt, first_token, finished });
                    if finished {
                        self.gateways.remove(&attempt);
                    }
                }
                recv::Output::Failed(kind, detail) => {
                    self.receptions.remove(attempt);
                    self.batch.handle(self.now(), Input::Cancel(attempt));
                    self.fail(attempt, kind, detail);
                }
            }
        }
    }

    // --- computing -------------------------------------------------------------------------------------------------

    fn on_layer(&mut self, layer: u16) {
        let block_tokens = u32::from(self.config.model.layout.block_tokens);
        let Some(rows) = self.in_flight.take() else { return };
        for &(attempt, computed, known) in &rows {
            if self.sendings.contains(attempt) {
                let blocks = if computed == known { computed.div_ceil(block_tokens) } else { computed / block_tokens };
                self.send_input(attempt, send::Input::Ready { layer, blocks });
            }
        }
        self.in_flight = Some(rows);
    }

    fn on_stepped(&mut self, result: Result<Vec<Sampled>, EngineError>, elapsed_us: u64) {
        self.in_flight = None;
        self.rates.stepped(elapsed_us);
        self.batch.handle(self.now(), Input::Stepped(result));
    }

    /// Begins the next step, if there is none and something to compute. Whatever admission has to say is heard first, so that
    /// the layers of this very step find their hand-over.
    fn begin_step(&mut self) -> Result<()> {
        if self.in_flight.is_some() {
            return Ok(());
        }
        let now = self.now();
        let Some(step) = self.batch.next_step(now) else { return Ok(()) };
        self.drain_batch();
        self.in_flight = Some(step.rows.iter().map(|row| (row.attempt, row.end(), self.known(row.attempt))).collect());
        self.rates.begun(&step);
        if !self.compute.begin(step) {
            bail!("the engine's thread is gone");
        }
        Ok(())
    }

    /// Tokens of a sequence whose KV leaves: after the last of them its unfinished block is ready too.
    fn known(&self, attempt: AttemptId) -> u32 {
        self.sendings.tokens(attempt).unwrap_or(0)
    }

    // --- what the batch wants done ---------------------------------------------------------------------------------

    /// Does everything that is due, then begins a step if there is one.
    fn advance(&mut self) -> Result<()> {
        self.drain_batch();
        self.begin_step()?;
        self.look_on();
        self.drain_batch();
        let now = self.now();
        let (batch, rates) = (&self.batch, &self.rates);
        self.uplinks.advance(now, || load(batch, rates), || batch.cached_names().collect());
        Ok(())
    }

    fn drain_batch(&mut self) {
        while let Some(output) = self.batch.poll() {
            self.on_batch(output);
        }
    }

    fn on_batch(&mut self, output: Output) {
        match output {
            Output::Admitted { attempt, table, names, cached_blocks } => {
                let Some(ticket) = self.leaving.remove(&attempt) else { return };
                let grid = self.grid(ticket.tokens.len());
                let deadline = self.now().after(ticket.budget_us);
                let peer = ticket.decode.clone();
                self.sendings.insert(ticket, Sender::new(grid, cached_blocks, deadline), table, names);
                self.reach(attempt, peer);
            }
            Output::Reserved { attempt, table, names, have_blocks } => self.on_reserved(attempt, table, names, have_blocks),
            Output::Refused { attempt, kind, detail } => match self.asking.remove(&attempt) {
                Some((no, _)) => self.peers.send(no, Message::Declined { attempt, kind, detail }),
                None => self.fail(attempt, kind, detail),
            },
            Output::Token(token) => self.on_token(token),
            Output::Failed(failed) => {
                if self.sendings.contains(failed.attempt) {
                    self.send_input(failed.attempt, send::Input::Cancel(failed.kind, failed.detail.clone()));
                }
                let (kind, detail) = (failed.kind, failed.detail.clone());
                let outputs = self.receptions.handle(self.clock, failed.attempt, recv::Input::Cancel(kind, detail));
                self.on_reception(failed.attempt, outputs);
                if !self.sendings.contains(failed.attempt) {
                    self.batch.handle(self.clock.now(), Input::Cancel(failed.attempt));
                }
                self.fail(failed.attempt, failed.kind, failed.detail);
            }
            Output::Block(op) => self.uplinks.publish(self.clock.now(), op),
        }
    }

    /// Finds or makes the link to the receiver.
    fn reach(&mut self, attempt: AttemptId, peer: Option<Peer>) {
        let Some(peer) = peer else { return };
        if let Some((no, link)) = self.peers.to(&peer) {
            let effects = self.sendings.ask(attempt, no, &link);
            self.apply(attempt, effects);
        }
    }

    fn on_reserved(&mut self, attempt: AttemptId, table: Vec<SlotRef>, names: Vec<BlockHash>, have_blocks: u32) {
        let Some((no, ticket)) = self.asking.remove(&attempt) else { return };
        self.generation = self.generation.wrapping_add(1);
        let generation = Generation(self.generation);
        let deadline = self.now().after(ticket.budget_us);
        let machine = Receiver::new(self.grid(ticket.tokens.len()), have_blocks, generation, deadline);
        let credit_bytes = machine.credit_bytes();
        self.gateways.insert(attempt, ticket.gateway);
        self.receptions.insert(attempt, Reception { link: no, table, names, machine });
        self.peers.send(no, Message::Granted(Granted { attempt, have_blocks, generation, credit_bytes }));
    }

    fn on_token(&mut self, mut token: TokenOut) {
        if let Some(stats) = &mut token.prefill {
            stats.node.clone_from(&self.config.name);
        }
        let (attempt, first_token, finished) = (token.attempt, token.token, token.finish.is_some());
        if let Some(replica) = self.gateways.get(&attempt) {
            self.uplinks.send(*replica, Message::Token(token));
        }
        if self.sendings.contains(attempt) {
            self.send_input(attempt, send::Input::Computed { first_token, finished });
        } else if finished {
            self.gateways.remove(&attempt);
        }
    }

    // --- time and the end ------------------------------------------------------------------------------------------

    fn deadline(&self) -> Time {
        if self.upkeep.reads() {
            return self.clock.now();
        }
        self.uplinks.deadline().min(self.next_tick)
    }

    fn on_tick(&mut self) {
        self.next_tick = self.now().after(TICK_US);
        self.batch.handle(self.now(), Input::Tick);
        for attempt in self.sendings.attempts() {
            self.send_input(attempt, send::Input::Tick);
        }
        for (attempt, _) in self.receptions.attempts() {
            self.recv_input(attempt, recv::Input::Tick);
        }
    }

    fn begin_stop(&mut self) {
        tracing::info!("stopping: no new work, finishing what is here");
        self.uplinks.leave();
        self.stopping_since = Some(self.now());
    }

    fn stopped(&self) -> bool {
        let Some(since) = self.stopping_since else { return false };
        let idle = self.batch.is_idle() && self.sendings.len() == 0;
        idle || self.now().since(since) > DRAIN_MAX_US
    }
}

fn load(batch: &Batch, rates: &Rates) -> Load {
    Load {
        prefill_ns_per_token: rates.prefill_ns_per_token(),
        prefill_ps_per_pair: rates.prefill_ps_per_pair(),
        decode_step_us: rates.decode_step_us(),
        send_bytes_per_s: rates.send_bytes_per_s(),
        ..batch.load()
    }
}
