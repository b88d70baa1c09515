//! The drive loop of a node: waits for what happens, tells the machine (`millrace_core::node`), does what it wants done. It holds no policy.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use millrace_core::identity::cell_digest;
use millrace_core::message::Message;
use millrace_core::node::{Effect, Input, LinkNo, Node, Note};
use millrace_core::pool::Resident;
use millrace_kernels::slab::KvSlab;
use tokio::sync::mpsc;

use super::Clock;
use super::compute::Compute;
use super::event::{Event, LinkEvent};
use super::links::ReplicasTold;
use super::peers::Dialer;
use super::receiving::Gates;
use super::sending::Spans;
use crate::link::Link;
use crate::shutdown::Shutdown;

/// Events told before the machine has its turn: keeps a flood of layer events from delaying tokens.
const EVENTS_PER_TURN: usize = 256;
/// The shortest wait for the machine's deadline.
const WAIT_MIN_US: u64 = 1_000;

/// The machine of a node, and what it acts through.
pub(super) struct Drive {
    pub(super) name: String,
    pub(super) clock: Clock,
    pub(super) node: Node,
    pub(super) events: mpsc::Receiver<Event>,
    /// Every link there is, to replicas and to nodes.
    pub(super) links: HashMap<LinkNo, Link>,
    pub(super) dialer: Dialer,
    pub(super) compute: Compute,
    pub(super) spans: Spans,
    pub(super) gates: Gates,
    pub(super) slab: Arc<KvSlab>,
    /// Where lists of the coordinator's replicas go.
    pub(super) replicas: mpsc::Sender<ReplicasTold>,
    /// Everything is finished.
    pub(super) over: bool,
}

impl Drive {
    /// Runs until shutdown, or until the node may not be a member.
    pub(super) async fn run(mut self, shutdown: Shutdown) -> Result<()> {
        let mut stopping = false;
        loop {
            self.tell(Input::Turn)?;
            if self.over {
                return Ok(());
            }
            let wait = Duration::from_micros(self.node.deadline().since(self.clock.now()).max(WAIT_MIN_US));
            tokio::select! {
                event = self.events.recv() => self.on_events(event.context("every source of events is gone")?)?,
                () = tokio::time::sleep(wait) => {}
                _ = shutdown.wait(), if !stopping => {
                    tracing::info!("stopping: no new work, finishing what is here");
                    stopping = true;
                    self.tell(Input::Stop)?;
                }
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
        let input = match event {
            Event::Uplink(replica, no, LinkEvent::Up(link)) => {
                tracing::info!(%replica, "coordinator link up");
                self.links.insert(no, link);
                Input::UplinkUp(replica, no)
            }
            Event::Uplink(replica, no, LinkEvent::Down(reason)) => {
                tracing::warn!(%replica, %reason, "coordinator link down");
                self.links.remove(&no);
                Input::Down(no)
            }
            Event::Peer(no, LinkEvent::Up(link)) => {
                let (name, epoch) = (link.peer().name.clone(), link.hello().epoch);
                self.links.insert(no, link);
                Input::PeerUp(no, name, epoch)
            }
            Event::Peer(no, LinkEvent::Down(reason)) => {
                let peer = self.links.remove(&no).map(|link| link.peer().name.clone());
                tracing::info!(?peer, %reason, "link to a node down");
                Input::Down(no)
            }
            Event::Uplink(_, no, LinkEvent::Message(message)) | Event::Peer(no, LinkEvent::Message(message)) => {
                Input::Message(no, message)
            }
            Event::Arrived(attempt) => match self.gates.standing(attempt) {
                Some(standing) => Input::Standing(attempt, standing),
                None => return Ok(()), // closed meanwhile
            },
            Event::Node(input) => input,
        };
        self.tell(input)
    }

    /// Tells the machine, and does what it wants done, in its order.
    fn tell(&mut self, input: Input) -> Result<()> {
        self.node.handle(self.clock.now(), input);
        while let Some(effect) = self.node.poll() {
            self.act(effect)?;
        }
        Ok(())
    }

    fn act(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Send(no, message) => {
                log_step(&message);
                if let Some(link) = self.links.get(&no) {
                    // A closed link is told by its own event.
                    let _ = link.send(&message);
                }
            }
            Effect::Dial(peer) => self.dialer.dial(peer),
            Effect::Close(no, why) => self.links.get(&no).into_iter().for_each(|link| link.close(why)),
            Effect::Greet(node, epoch) => self.dialer.greet(node, epoch),
            // One that finds no room is told again with the next link.
            // One that finds no room is told again with the next link.
            Effect::Replicas(from, list) => drop(self.replicas.try_send((from, list))),
            Effect::Step(step) => ensure!(self.compute.begin(step), "the engine's thread is gone"),
            Effect::Span(job) => self.spans.start(self.links.get(&job.link).cloned(), job),
            Effect::StopSpans(attempt) => self.spans.stop(attempt),
            Effect::OpenGate(attempt, link, gate) => self.gates.open(attempt, link, *gate),
            Effect::MoveGate(attempt, link) => self.gates.relink(attempt, link),
            Effect::ReadGate(attempt) => {
                if let Some(stands) = self.gates.stands(attempt) {
                    self.node.handle(self.clock.now(), Input::Stands(attempt, stands));
                }
            }
            Effect::CloseGate(attempt) => self.gates.close(attempt),
            Effect::Digest(blocks) => {
                let digested = blocks.into_iter().map(|block| (block, digest(&self.slab, &block))).collect();
                self.node.handle(self.clock.now(), Input::Digested(digested));
            }
            Effect::Note(note) => log(note),
            Effect::Refused(reason) => bail!("the cluster refuses {}: {reason}", self.name),
            Effect::Exit => self.over = true,
        }
        Ok(())
    }
}

/// The wrapping sum of the digests of a block's cells.
fn digest(slab: &KvSlab, block: &Resident) -> u64 {
    let cell = |layer: usize| cell_digest(&block.name, layer as u16, &slab.read(block.at.slot.0 as usize, layer));
    (0..slab.layers()).map(cell).fold(0, u64::wrapping_add)
}

fn log(note: Note) {
    match note {
        Note::Joined(node, epoch) => tracing::info!(%node, %epoch, "joined"),
        Note::NotYet(reason) => tracing::info!(%reason, "not a member yet"),
        Note::Admitted(attempt, cached_blocks) => tracing::debug!(%attempt, cached_blocks, "hand-over: admitted"),
        Note::Failed(attempt, kind, detail) => tracing::warn!(%attempt, ?kind, %detail, "attempt failed"),
        Note::Meaningless(message) => tracing::debug!(?message, "message without meaning on this link"),
        Note::Pins(version, pins) => {
            tracing::info!(version, held = pins.held, absent = pins.absent, over = pins.over, "pins");
        }
        Note::Evicted(count, dry_run) => {
            tracing::info!(dropped = count.dropped, kept = count.kept, pinned = count.pinned, dry_run, "evicted by order");
        }
        Note::Damaged(block, slot, dropped) => {
            tracing::error!(%block, slot = slot.0, dropped, "a cached block's bytes changed; it is dropped");
        }
    }
}

/// The steps of a hand-over, for whoever follows one request.
fn log_step(message: &Message) {
    match message {
        Message::Open(open) => tracing::debug!(attempt = %open.ticket.attempt, "hand-over: asked for slots"),
        Message::Granted(granted) => {
            tracing::debug!(attempt = %granted.attempt, have_blocks = granted.have_blocks, "hand-over: slots reserved");
        }
        Message::Resume { attempt, .. } => tracing::debug!(%attempt, "hand-over: goes on over another link"),
        Message::Fin(fin) => tracing::debug!(attempt = %fin.attempt, cells = fin.cells, "hand-over: manifest leaves"),
        Message::Received { attempt } => tracing::debug!(%attempt, "hand-over: all there"),
        _ => {}
    }
}
