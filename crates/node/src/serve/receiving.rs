//! The receiving side of hand-overs: the gates of all attempts that may be written to, and the tasks that copy arriving cells into their slots.

use std::collections::HashMap;
use std::sync::Arc;

use millrace_core::identity::cell_digest;
use millrace_core::ids::{AttemptId, BlockHash, Generation, Slot};
use millrace_core::node::{Input, LinkNo};
use millrace_core::transfer::gate::{Gate, Place, Standing};
use millrace_core::transfer::{Cells, Span};
use millrace_kernels::slab::KvSlab;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::event::Event;
use crate::cells::{Cell, CellsReader};

/// The gate of an attempt, and the link whose streams may write. The lock is held for one cell's copy at a time and never across a wait.
type Entry = Arc<Mutex<(LinkNo, Gate)>>;

/// All gates, shared between the drive loop and the stream tasks.
#[derive(Clone, Default)]
pub(super) struct Gates(Arc<Mutex<HashMap<AttemptId, Entry>>>);

impl Gates {
    /// Lets the streams of a link write.
    pub(super) fn open(&self, attempt: AttemptId, link: LinkNo, gate: Gate) {
        self.0.lock().insert(attempt, Arc::new(Mutex::new((link, gate))));
    }

    /// Closes the gate of an attempt: streams that still hold it write no more.
    pub(super) fn close(&self, attempt: AttemptId) {
        if let Some(entry) = self.0.lock().remove(&attempt) {
            entry.lock().1.close();
        }
    }

    /// What stands behind the gate of an attempt, if it is open.
    pub(super) fn standing(&self, attempt: AttemptId) -> Option<Standing> {
        self.get(attempt).map(|entry| entry.lock().1.standing().clone())
    }

    /// Which cells stand behind the gate of an attempt, if it is open.
    pub(super) fn stands(&self, attempt: AttemptId) -> Option<Cells> {
        self.get(attempt).map(|entry| entry.lock().1.stands().clone())
    }

    /// Lets the streams of another link write. One of the old link that was let in goes on: what it writes is verified like any other.
    pub(super) fn relink(&self, attempt: AttemptId, link: LinkNo) {
        if let Some(entry) = self.get(attempt) {
            entry.lock().0 = link;
        }
    }

    fn get(&self, attempt: AttemptId) -> Option<Entry> {
        self.0.lock().get(&attempt).cloned()
    }
}

/// What a stream task needs.
#[derive(Clone)]
pub(super) struct StreamContext {
    pub(super) gates: Gates,
    pub(super) slab: Arc<KvSlab>,
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
    let entry = context.gates.get(attempt);
    let admits = |entry: &Entry| {
        let (asks, gate) = &mut *entry.lock();
        *asks == link && gate.admit(generation, &span)
    };
    let result = match entry.as_ref().filter(|entry| admits(entry)) {
        Some(gate) => {
            tracing::debug!(%attempt, ?span, "hand-over: cells arrive");
            copy_admitted(context, &mut reader, gate, generation).await
        }
        None => {
            let _ = context.events.send(Event::Node(Input::StreamRefused)).await;
            Err("not a hand-over that this stream may write to".into())
        }
    };
    let _ = context.events.send(Event::Arrived(attempt)).await;
    result
}

async fn copy_admitted(
    context: &StreamContext,
    reader: &mut CellsReader,
    entry: &Entry,
    generation: Generation,
) -> Result<(), String> {
    while let Some(cell) = reader.next_cell().await.map_err(|e| e.to_string())? {
        let (_, gate) = &mut *entry.lock();
        match gate.place(generation, cell.layer, cell.block) {
            Place::Write(slot, name) => {
                let digest = write(&context.slab, slot, &cell, &name);
                gate.placed(cell.layer, cell.block, digest, cell.digest);
            }
            Place::Stands => {}
            Place::Closed => return Err("the hand-over is over".into()),
        }
    }
    Ok(())
}

/// Copies a cell into its slot and digests what now stands there, not what was on the wire.
/// The wait for the cell's lock is not one in practice: a slot is given out only when no stream reads it any more.
fn write(slab: &KvSlab, slot: Slot, cell: &Cell<'_>, name: &BlockHash) -> u64 {
    let mut bytes = slab.write(slot.0 as usize, usize::from(cell.layer));
    cell.copy_to(&mut bytes);
    cell_digest(name, cell.layer, &bytes)
}
