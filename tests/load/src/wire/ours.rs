//! Our path, as the shell of a node takes it: a link, KV streams beside it, a task for each, cells lent from the memory under their locks
//! and copied once into their slots, digests made before they leave and of what then stands in the slot.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use millrace_core::ids::{AttemptId, Epoch, Generation, NodeId};
use millrace_core::message::{CellsHeader, Hello, Message, Role};
use millrace_core::transfer::SPAN_BYTES_MAX;
use millrace_core::transfer::pace::ON_THE_WAY_MAX;
use millrace_kernels::slab::SharedCell;
use millrace_node::cells::{CellsReader, send_cells};
use millrace_node::endpoint::{Endpoint, Target};
use millrace_node::lane::Lane;
use millrace_node::link::{Link, LinkReceiver};
use tokio::runtime::Runtime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::end::{Bench, RoundFn};

/// Streams on their way at a time: as many as a node gives to one link.
const STREAMS: usize = (ON_THE_WAY_MAX / SPAN_BYTES_MAX) as usize;

/// The dialing end of a link, on a runtime of its own.
pub(super) struct Dialed {
    pub(super) runtime: Runtime,
    pub(super) link: Link,
    pub(super) messages: mpsc::UnboundedReceiver<Message>,
    _endpoint: Endpoint,
}

impl Dialed {
    pub(super) fn to(bench: &Bench, addr: SocketAddr) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let target = Target { addr, role: Role::Decode, name: None };
        let (endpoint, link, messages) = runtime.block_on(async {
            let endpoint = bench.endpoint()?;
            let (link, receiver) = Link::dial(&endpoint, &target, &hello(&endpoint)).await?;
            let (heard, messages) = mpsc::unbounded_channel();
            tokio::spawn(hear(receiver, heard));
            anyhow::Ok((endpoint, link, messages))
        })?;
        Ok(Self { runtime, link, messages, _endpoint: endpoint })
    }

    /// Waits until the receiver has placed everything.
    pub(super) async fn received(messages: &mut mpsc::UnboundedReceiver<Message>) -> Result<()> {
        let last = messages.recv().await;
        ensure!(matches!(last, Some(Message::Received { .. })), "the receiver said {last:?}");
        Ok(())
    }
}

/// The accepting end of a link, on a runtime of its own.
pub(super) struct Accepted {
    pub(super) runtime: Runtime,
    pub(super) link: Link,
    _messages: LinkReceiver,
    _endpoint: Endpoint,
}

impl Accepted {
    pub(super) fn one(bench: &Bench, announce: &dyn Fn(SocketAddr)) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let (endpoint, link, messages) = runtime.block_on(async {
            let endpoint = bench.endpoint()?;
            announce(endpoint.local_addr()?);
            let connection = endpoint.accept().await.context("the endpoint closed")?.finish().await?;
            let (link, messages) = Link::accept(connection, &hello(&endpoint)).await?;
            anyhow::Ok((endpoint, link, messages))
        })?;
        Ok(Self { runtime, link, _messages: messages, _endpoint: endpoint })
    }

    pub(super) fn say_received(&self) -> Result<()> {
        Ok(self.link.send(&Message::Received { attempt: AttemptId::default() })?)
    }
}

pub(super) fn sender(bench: &Arc<Bench>, addr: SocketAddr) -> Result<RoundFn> {
    let (bench, mut end) = (Arc::clone(bench), Dialed::to(bench, addr)?);
    Ok(Box::new(move || {
        end.runtime.block_on(send(&bench, &end.link))?;
        end.runtime.block_on(Dialed::received(&mut end.messages))
    }))
}

/// A link is read all the time, as nodes do.
async fn hear(mut receiver: LinkReceiver, heard: mpsc::UnboundedSender<Message>) {
    while let Some(message) = receiver.recv().await {
        let _ = heard.send(message);
    }
}

fn hello(endpoint: &Endpoint) -> Hello {
    let (cluster, name) = (endpoint.me().cluster.clone(), endpoint.me().name.clone());
    Hello { cluster, name, instance: 1, node: NodeId(1), epoch: Epoch(1), model: None }
}

async fn send(bench: &Arc<Bench>, link: &Link) -> Result<()> {
    let credit = Arc::new(Semaphore::new(STREAMS));
    let span_cells = SPAN_BYTES_MAX as usize / bench.setup.cell_bytes;
    let slots: Vec<_> = bench.round().collect();
    let mut streams = Vec::new();
    // A span is a run of neighbouring blocks, so none goes over the end of the memory.
    for span in slots.chunks(bench.setup.cells()).flat_map(|turn| turn.chunks(span_cells)) {
        let permit = Arc::clone(&credit).acquire_owned().await?;
        let lane = link.lane().context("no lane")?;
        streams.push(lane.spawn(send_span(Arc::clone(bench), lane.clone(), span.to_vec(), permit)));
    }
    for stream in streams {
        stream.await??;
    }
    Ok(())
}

/// A cell on its way; the span's permit returns with its last one.
struct Lent {
    cell: SharedCell,
    _span: Arc<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.cell.as_ref()
    }
}

async fn send_span(bench: Arc<Bench>, lane: Lane, slots: Vec<usize>, permit: OwnedSemaphorePermit) -> Result<()> {
    let permit = Arc::new(permit);
    let (block, blocks) = (slots[0] as u32, slots.len() as u32);
    let lend = |slot| {
        let cell = bench.slab.share(slot, 0);
        (bench.digest(slot, cell.as_ref()), Bytes::from_owner(Lent { cell, _span: Arc::clone(&permit) }))
    };
    let (digests, cells): (Vec<_>, Vec<_>) = slots.into_iter().map(lend).unzip();
    drop(permit);
    let (attempt, generation) = (AttemptId::default(), Generation(1));
    let header = CellsHeader { attempt, generation, layer: 0, layers: 1, block, blocks, digests };
    send_cells(&lane.quic, &header, cells.into_iter(), 0).await?;
    Ok(())
}

pub(super) fn receiver(bench: &Arc<Bench>, announce: &dyn Fn(SocketAddr)) -> Result<RoundFn> {
    let (bench, end) = (Arc::clone(bench), Accepted::one(bench, announce)?);
    let (count, mut counts) = mpsc::unbounded_channel();
    end.runtime.spawn(read_streams(Arc::clone(&bench), end.link.clone(), count));
    Ok(Box::new(move || {
        let mut missing = bench.setup.round_cells();
        while missing > 0 {
            missing -= counts.blocking_recv().context("the link is gone")??;
        }
        end.say_received()
    }))
}

async fn read_streams(bench: Arc<Bench>, link: Link, count: mpsc::UnboundedSender<Result<usize>>) {
    while let Some(arriving) = link.accept_cells().await {
        let (bench, count) = (Arc::clone(&bench), count.clone());
        arriving.read_by(|stream| async move { count.send(read_stream(&bench, stream).await) });
    }
}

/// Cells placed, once all of a stream are.
async fn read_stream(bench: &Bench, stream: quinn::RecvStream) -> Result<usize> {
    let mut reader = CellsReader::open(stream, bench.setup.cell_bytes).await?;
    while let Some(cell) = reader.next_cell().await? {
        let slot = cell.block as usize;
        let mut place = bench.slab.write(slot, 0);
        cell.copy_to(&mut place);
        ensure!(bench.digest(slot, &place) == cell.digest, "digest of cell {slot}");
    }
    Ok(reader.header().blocks as usize)
}
