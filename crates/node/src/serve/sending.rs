//! The sending side of hand-overs: the tasks that read cells onto streams.
//!
//! A task holds a read lock on every cell that it has given to the transport until the peer's transport has acknowledged it;
//! the machine releases an attempt's blocks only when all its tasks are through, so a slot that is written is never being read. Nobody who
//! waits for that may hold the link: a lost connection lets go of what it never sent only when its last handle is dropped.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use millrace_core::identity::cell_digest;
use millrace_core::ids::{AttemptId, BlockHash, SlotRef};
use millrace_core::message::CellsHeader;
use millrace_core::node::{Input, SpanJob};
use millrace_core::transfer::Span;
use millrace_kernels::slab::{KvSlab, SharedCell};
use tokio::sync::{mpsc, oneshot, watch};

use super::event::Event;
use crate::cells::send_cells;
use crate::lane::Lane;
use crate::link::Link;

/// Starts the streams of all hand-overs, and stops those of one.
pub(super) struct Spans {
    /// Turns true to make an attempt's streams stop; there while any of them may run.
    stops: HashMap<AttemptId, watch::Sender<bool>>,
    slab: Arc<KvSlab>,
    events: mpsc::Sender<Event>,
}

impl Spans {
    pub(super) fn new(slab: Arc<KvSlab>, events: mpsc::Sender<Event>) -> Self {
        Self { stops: HashMap::new(), slab, events }
    }

    /// Sends a span over a link; without one it fails at once.
    pub(super) fn start(&mut self, link: Option<Link>, job: SpanJob) {
        self.stops.retain(|_, stop| !stop.is_closed());
        let stop = self.stops.entry(job.attempt).or_default().subscribe();
        let lane = link.ok_or("no link").and_then(|link| link.lane().ok_or("the link has ended"));
        let task = SpanTask { job, slab: Arc::clone(&self.slab), stop, events: self.events.clone() };
        match lane.clone() {
            Ok(on) => on.spawn(send_span(task, lane)),
            Err(_) => tokio::spawn(send_span(task, lane)),
        };
    }

    /// Gives up the streams of an attempt that are not sent yet.
    pub(super) fn stop(&mut self, attempt: AttemptId) {
        if let Some(stop) = self.stops.get(&attempt) {
            stop.send_replace(true);
        }
    }
}

/// Everything that a stream task needs, so that it shares nothing with the drive loop.
struct SpanTask {
    job: SpanJob,
    slab: Arc<KvSlab>,
    stop: watch::Receiver<bool>,
    events: mpsc::Sender<Event>,
}

async fn send_span(mut task: SpanTask, lane: Result<Lane, &'static str>) {
    let SpanJob { attempt, link, span, .. } = task.job;
    let events = task.events.clone();
    let started = Instant::now();
    let error = stream_span(&mut task, lane).await.err();
    drop(task);
    let elapsed_us = started.elapsed().as_micros() as u64;
    let _ = events.send(Event::Node(Input::SpanDrained { attempt, link, span, elapsed_us, error })).await;
}

/// Puts the span on a stream and waits until nothing reads its cells any more: all acknowledged, or given up.
async fn stream_span(task: &mut SpanTask, lane: Result<Lane, &'static str>) -> Result<(), String> {
    let lane = lane?;
    let (lent, returned) = oneshot::channel();
    let (digests, payload) = lend_cells(task, lent);
    let digest_sum = digests.iter().fold(0u64, |sum, digest| sum.wrapping_add(*digest));
    let SpanJob { attempt, span, generation, priority, .. } = task.job;
    let Span { layer, layers, block, blocks } = span;
    let header = CellsHeader { attempt, generation, layer, layers, block, blocks, digests };
    let sent = tokio::select! {
        sent = send_cells(&lane.quic, &header, payload.into_iter(), priority) => sent.map_err(|e| e.to_string()),
        () = stopped(&mut task.stop) => Err("the hand-over is over".to_owned()),
    };
    if sent.is_ok() {
        let _ = task.events.send(Event::Node(Input::SpanSent { attempt, span, digest_sum })).await;
    }
    drop(lane);
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
fn lend_cells(task: &SpanTask, span: oneshot::Sender<()>) -> (Vec<u64>, Vec<Bytes>) {
    let span = Arc::new(span);
    let lend = |&(layer, _, slot, name): &(u16, u32, SlotRef, BlockHash)| {
        let cell = task.slab.share(slot.slot.0 as usize, usize::from(layer));
        let digest = cell_digest(&name, layer, cell.as_ref());
        (digest, Bytes::from_owner(Lent { cell, _span: Arc::clone(&span) }))
    };
    task.job.cells.iter().map(lend).unzip()
}

/// Waits until the streams of the attempt are to stop; for ever when nobody can say so any more.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending().await
    }
}
