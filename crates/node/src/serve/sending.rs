//! The sending side of hand-overs: one machine for each attempt, and the tasks that read its cells onto streams.
//!
//! A task holds a read lock on every cell that it has given to the transport until the peer's transport has acknowledged it;
//! an attempt's blocks are released only when all its tasks are through, so a slot that is written is never being read. Nobody who
//! waits for that may hold the link: a lost connection lets go of what it never sent only when its last handle is dropped.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use millrace_core::identity::cell_digest;
use millrace_core::ids::{AttemptId, BlockHash, Generation, SlotRef};
use millrace_core::message::{CellsHeader, FailKind, Fin, HandoverStats, Message, Open, Ticket};
use millrace_core::transfer::Span;
use millrace_core::transfer::send::{Input, Output, Sender};
use millrace_kernels::slab::{KvSlab, SharedCell};
use tokio::sync::{mpsc, oneshot, watch};

use super::Clock;
use super::event::{Event, LinkNo};
use crate::cells::send_cells;
use crate::link::Link;

/// One hand-over that leaves.
pub(super) struct Sending {
    machine: Sender,
    ticket: Ticket,
    table: Vec<SlotRef>,
    names: Vec<BlockHash>,
    link: Option<(LinkNo, Link)>,
    /// Streams whose cells are still read.
    undrained: u32,
    /// Turns true to make them stop.
    stop: watch::Sender<bool>,
}

/// What the drive loop has to do for a hand-over.
pub(super) enum Effect {
    /// Tell the gateway how it went.
    Report(HandoverStats),
    /// Tell the gateway that the attempt is lost.
    Lost(FailKind, String),
    /// Nothing reads the blocks any more.
    Release(AttemptId),
}

/// All hand-overs that leave.
pub(super) struct Sendings {
    by_attempt: HashMap<AttemptId, Sending>,
    slab: Arc<KvSlab>,
    clock: Clock,
    events: mpsc::Sender<Event>,
}

impl Sendings {
    pub(super) fn new(slab: Arc<KvSlab>, clock: Clock, events: mpsc::Sender<Event>) -> Self {
        Self { by_attempt: HashMap::new(), slab, clock, events }
    }

    /// A sequence was admitted whose answer is decoded elsewhere.
    pub(super) fn insert(&mut self, ticket: Ticket, machine: Sender, table: Vec<SlotRef>, names: Vec<BlockHash>) {
        let (stop, _) = watch::channel(false);
        let attempt = ticket.attempt;
        let sending = Sending { machine, ticket, table, names, link: None, undrained: 0, stop };
        self.by_attempt.insert(attempt, sending);
    }

    pub(super) fn contains(&self, attempt: AttemptId) -> bool {
        self.by_attempt.contains_key(&attempt)
    }

    /// Whether the receiver of an attempt speaks on this link.
    pub(super) fn speaks(&self, attempt: AttemptId, no: LinkNo) -> bool {
        self.by_attempt.get(&attempt).is_some_and(|s| s.link.as_ref().is_some_and(|(n, _)| *n == no))
    }

    /// Tokens of an attempt's sequence.
    pub(super) fn tokens(&self, attempt: AttemptId) -> Option<u32> {
        self.by_attempt.get(&attempt).map(|s| s.ticket.tokens.len() as u32)
    }

    pub(super) fn len(&self) -> usize {
        self.by_attempt.len()
    }

    /// Attempts whose receiver is the node `name` and that have no link to it yet.
    pub(super) fn waiting_for(&self, name: &str) -> Vec<AttemptId> {
        let meant = |s: &Sending| s.ticket.decode.as_ref().is_some_and(|peer| peer.name == name);
        let waits = |s: &&Sending| s.link.is_none() && !s.machine.is_over() && meant(s);
        self.by_attempt.values().filter(waits).map(|s| s.ticket.attempt).collect()
    }

    /// Attempts that go over a link.
    pub(super) fn on_link(&self, no: LinkNo) -> Vec<AttemptId> {
        let uses = |s: &&Sending| s.link.as_ref().is_some_and(|(n, _)| *n == no);
        self.by_attempt.values().filter(uses).map(|s| s.ticket.attempt).collect()
    }

    /// Every attempt, for timers.
    pub(super) fn attempts(&self) -> Vec<AttemptId> {
        self.by_attempt.keys().copied().collect()
    }

    /// The link to the receiver is there: ask it. A receiver of another incarnation is not the one that the ticket means.
    pub(super) fn ask(&mut self, attempt: AttemptId, no: LinkNo, link: &Link) -> Vec<Effect> {
        let Some(sending) = self.by_attempt.get_mut(&attempt) else { return Vec::new() };
        let expected = sending.ticket.decode.as_ref().map(|peer| peer.epoch);
        if expected != Some(link.hello().epoch) {
            let detail = format!("{} is another incarnation than the ticket's", link.peer().name);
            return self.handle(attempt, Input::PeerLost(detail));
        }
        sending.link = Some((no, link.clone()));
        if link.send(&Message::Open(Open { ticket: sending.ticket.clone() })).is_err() {
            return self.handle(attempt, Input::PeerLost("the link closed before the hand-over began".into()));
        }
        Vec::new()
    }

    /// Feeds a machine and does what it wants done.
    pub(super) fn handle(&mut self, attempt: AttemptId, input: Input) -> Vec<Effect> {
        let Some(sending) = self.by_attempt.get_mut(&attempt) else { return Vec::new() };
        sending.machine.handle(self.clock.now(), input);
        let mut effects = Vec::new();
        while let Some(output) = sending.machine.poll() {
            match output {
                Output::Cells { span, generation } => {
                    sending.undrained += 1;
                    tokio::spawn(send_span(sending.job(span, generation, &self.slab, &self.events)));
                }
                Output::Fin { generation, cells, digest_sum, first_token, finished } => {
                    sending.tell(Message::Fin(Fin { attempt, generation, cells, digest_sum, first_token, finished }));
                }
                Output::Abort(kind, detail) => sending.tell(Message::Abort { attempt, kind, detail }),
                Output::Done { bytes, blocks_sent, blocks_had, transfer_us, exposed_us } => {
                    let node = sending.ticket.decode.as_ref().map(|p| p.name.clone()).unwrap_or_default();
                    let stats = HandoverStats { attempt, node, bytes, blocks_sent, blocks_had, transfer_us, exposed_us };
                    effects.push(Effect::Report(stats));
                }
                Output::Failed(kind, detail) => {
                    sending.stop.send_replace(true);
                    effects.push(Effect::Lost(kind, detail));
                }
            }
        }
        if sending.machine.is_over() {
            sending.link = None;
        }
        effects.extend(self.finish(attempt));
        effects
    }

    /// A stream's cells are read no more.
    pub(super) fn drained(&mut self, attempt: AttemptId, error: Option<String>) -> Vec<Effect> {
        let Some(sending) = self.by_attempt.get_mut(&attempt) else { return Vec::new() };
        sending.undrained -= 1;
        match error {
            Some(detail) => self.handle(attempt, Input::PeerLost(detail)),
            None => self.finish(attempt).into_iter().collect(),
        }
    }

    fn finish(&mut self, attempt: AttemptId) -> Option<Effect> {
        let over = self.by_attempt.get(&attempt).is_some_and(|s| s.machine.is_over() && s.undrained == 0);
        over.then(|| {
            self.by_attempt.remove(&attempt);
            Effect::Release(attempt)
        })
    }
}

impl Sending {
    fn tell(&self, message: Message) {
        if let Some((_, link)) = &self.link {
            // A closed link is reported by its own event.
            let _ = link.send(&message);
        }
    }

    fn job(&self, span: Span, generation: Generation, slab: &Arc<KvSlab>, events: &mpsc::Sender<Event>) -> SpanJob {
        SpanJob {
            attempt: self.ticket.attempt,
            span,
            generation,
            cells: span.iter().map(|(layer, block)| (layer, self.table[block as usize], self.names[block as usize])).collect(),
            link: self.link.as_ref().map(|(_, link)| link.clone()),
            slab: Arc::clone(slab),
            stop: self.stop.subscribe(),
            events: events.clone(),
        }
    }
}

/// Everything that a stream task needs, so that it shares nothing with the drive loop.
struct SpanJob {
    attempt: AttemptId,
    span: Span,
    generation: Generation,
    cells: Vec<(u16, SlotRef, BlockHash)>,
    link: Option<Link>,
    slab: Arc<KvSlab>,
    stop: watch::Receiver<bool>,
    events: mpsc::Sender<Event>,
}

async fn send_span(mut job: SpanJob) {
    let (attempt, events) = (job.attempt, job.events.clone());
    let bytes = job.span.cells() * job.slab.cell_bytes() as u64;
    let started = Instant::now();
    let error = stream_span(&mut job).await.err();
    drop(job);
    let elapsed_us = started.elapsed().as_micros() as u64;
    let _ = events.send(Event::SpanDrained { attempt, bytes, elapsed_us, error }).await;
}

/// Puts the span on a stream and waits until nothing reads its cells any more: all acknowledged, or given up.
async fn stream_span(job: &mut SpanJob) -> Result<(), String> {
    let link = job.link.take().ok_or("no link")?;
    let lane = link.lane().await.map_err(|e| e.to_string())?;
    let (lent, returned) = oneshot::channel();
    let (digests, payload) = lend_cells(job, lent);
    let digest_sum = digests.iter().fold(0u64, |sum, digest| sum.wrapping_add(*digest));
    let Span { layer, layers, block, blocks } = job.span;
    let header = CellsHeader { attempt: job.attempt, generation: job.generation, layer, layers, block, blocks, digests };
    let sent = tokio::select! {
        sent = send_cells(&lane, &header, payload.into_iter(), -i32::from(layer)) => sent.map_err(|e| e.to_string()),
        () = stopped(&mut job.stop) => Err("the hand-over is over".to_owned()),
    };
    if sent.is_ok() {
        let _ = job.events.send(Event::SpanSent { attempt: job.attempt, span: job.span, digest_sum }).await;
    }
    drop((link, lane));
    let _ = returned.await;
    sent.map(|_| ())
}

/// A cell on its way: locked against writing until the transport has dropped its last reference.
struct Lent {
    cell: SharedCell,
    /// When the last of a span's cells is returned, the channel closes.
    _span: Arc<oneshot::Sender<()>>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.cell.as_ref()
    }
}

/// Digests every cell and lends it to the transport. No byte is copied.
fn lend_cells(job: &SpanJob, span: oneshot::Sender<()>) -> (Vec<u64>, Vec<Bytes>) {
    let span = Arc::new(span);
    let lend = |&(layer, slot, name): &(u16, SlotRef, BlockHash)| {
        let cell = job.slab.share(slot.slot.0 as usize, usize::from(layer));
        let digest = cell_digest(&name, layer, cell.as_ref());
        (digest, Bytes::from_owner(Lent { cell, _span: Arc::clone(&span) }))
    };
    job.cells.iter().map(lend).unzip()
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // The sender side is dropped only after the hand-over is over.
    let _ = stop.wait_for(|stop| *stop).await;
}
