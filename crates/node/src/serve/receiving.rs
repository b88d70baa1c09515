//! The receiving side of hand-overs: which attempts may be written to, and the tasks that copy arriving cells into their slots.

use std::collections::HashMap;
use std::sync::Arc;

use millrace_core::identity::cell_digest;
use millrace_core::ids::{AttemptId, BlockHash, Generation, Slot, SlotRef};
use millrace_core::transfer::Span;
use millrace_core::transfer::recv::{Input, Output, Receiver};
use millrace_kernels::slab::KvSlab;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::Clock;
use super::event::{Event, LinkNo};
use crate::cells::{Cell, CellsReader};

/// One hand-over that arrives. The lock is held for one cell's copy at a time and never across a wait.
pub(super) struct Reception {
    /// The link that asked for it: no other may write.
    pub(super) link: LinkNo,
    /// Slots of the sequence's blocks.
    pub(super) table: Vec<SlotRef>,
    /// Names of the sequence's blocks.
    pub(super) names: Vec<BlockHash>,
    /// The machine.
    pub(super) machine: Receiver,
}

/// All hand-overs that arrive, shared between the drive loop and the stream tasks.
#[derive(Clone, Default)]
pub(super) struct Receptions(Arc<Mutex<HashMap<AttemptId, Arc<Mutex<Reception>>>>>);

impl Receptions {
    /// Opens the slots of an attempt for writing.
    pub(super) fn insert(&self, attempt: AttemptId, reception: Reception) {
        self.0.lock().insert(attempt, Arc::new(Mutex::new(reception)));
    }

    /// Closes them. Streams that still hold the entry find its machine over.
    pub(super) fn remove(&self, attempt: AttemptId) {
        self.0.lock().remove(&attempt);
    }

    /// Every attempt, for timers and lost links.
    pub(super) fn attempts(&self) -> Vec<(AttemptId, LinkNo)> {
        self.0.lock().iter().map(|(attempt, entry)| (*attempt, entry.lock().link)).collect()
    }

    /// Feeds the machine of an attempt and returns what it wants done; nothing when there is none.
    pub(super) fn handle(&self, clock: Clock, attempt: AttemptId, input: Input) -> Vec<Output> {
        let Some(entry) = self.get(attempt) else { return Vec::new() };
        let mut reception = entry.lock();
        reception.machine.handle(clock.now(), input);
        std::iter::from_fn(|| reception.machine.poll()).collect()
    }

    /// What the machine of an attempt wants done.
    pub(super) fn poll(&self, attempt: AttemptId) -> Vec<Output> {
        let Some(entry) = self.get(attempt) else { return Vec::new() };
        let mut reception = entry.lock();
        std::iter::from_fn(|| reception.machine.poll()).collect()
    }

    /// The link on which the sender of an attempt speaks.
    pub(super) fn link(&self, attempt: AttemptId) -> Option<LinkNo> {
        self.get(attempt).map(|entry| entry.lock().link)
    }

    fn get(&self, attempt: AttemptId) -> Option<Arc<Mutex<Reception>>> {
        self.0.lock().get(&attempt).cloned()
    }
}

/// What a stream task needs.
#[derive(Clone)]
pub(super) struct StreamContext {
    pub(super) receptions: Receptions,
    pub(super) slab: Arc<KvSlab>,
    pub(super) clock: Clock,
    pub(super) events: mpsc::Sender<Event>,
}

/// Reads one KV stream to its end, or to the first reason not to. A stream that may not write is dropped, which stops its
/// sender; the hand-over itself is judged by the machine.
pub(super) async fn receive_stream(context: StreamContext, link: LinkNo, stream: quinn::RecvStream) {
    if let Err(reason) = copy_cells(&context, link, stream).await {
        tracing::debug!(%reason, "KV stream refused");
    }
}

async fn copy_cells(context: &StreamContext, link: LinkNo, stream: quinn::RecvStream) -> Result<(), String> {
    let mut reader = CellsReader::open(stream, context.slab.cell_bytes()).await.map_err(|e| e.to_string())?;
    let header = reader.header();
    let (attempt, generation) = (header.attempt, header.generation);
    let span = Span { layer: header.layer, layers: header.layers, block: header.block, blocks: header.blocks };
    let entry = context.receptions.get(attempt).ok_or("no hand-over under this attempt")?;
    let admitted = {
        let mut reception = entry.lock();
        reception.link == link && reception.machine.admit(generation, &span)
    };
    if !admitted {
        let _ = context.events.send(Event::Arrived(attempt)).await;
        return Err("not a hand-over that this stream may write to".into());
    }
    tracing::debug!(%attempt, ?span, "hand-over: cells arrive");
    while let Some(cell) = reader.next_cell().await.map_err(|e| e.to_string())? {
        let more = accept_cell(context, &mut entry.lock(), generation, &cell)?;
        if more {
            let _ = context.events.send(Event::Arrived(attempt)).await;
        }
    }
    Ok(())
}

/// Places one cell under the hand-over's lock; true when the machine has something to say.
fn accept_cell(
    context: &StreamContext,
    reception: &mut Reception,
    generation: Generation,
    cell: &Cell<'_>,
) -> Result<bool, String> {
    let (layer, block) = (cell.layer, cell.block);
    if !reception.machine.may_write(generation, layer, block) {
        return Err("the hand-over is over, or this cell is there already".into());
    }
    let slot = reception.table[block as usize].slot;
    let digest = place(&context.slab, slot, cell, &reception.names[block as usize]);
    let verified = digest == cell.digest;
    reception.machine.handle(context.clock.now(), Input::Cell { generation, layer, block, digest, verified });
    Ok(reception.machine.has_output())
}

/// Copies a cell into its slot and digests what now stands there, not what was on the wire.
/// The wait for the cell's lock is not one in practice: a slot is given out only when no stream reads it any more.
fn place(slab: &KvSlab, slot: Slot, cell: &Cell<'_>, name: &BlockHash) -> u64 {
    let mut bytes = slab.write(slot.0 as usize, usize::from(cell.layer));
    cell.copy_to(&mut bytes);
    cell_digest(name, cell.layer, &bytes)
}
