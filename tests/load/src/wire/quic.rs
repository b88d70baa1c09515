//! QUIC with the settings of nodes and nothing on top: one stream a round on a lane of a link; the receiver drops what arrives.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use millrace_node::lane::Lane;
use quinn::RecvStream;

use super::end::{Bench, RoundFn};
use super::ours::{Accepted, Dialed};

/// Cells that are given to QUIC, and pieces that are taken from it, at a time.
const BATCH: usize = 16;

pub(super) fn sender(bench: &Arc<Bench>, addr: SocketAddr) -> Result<RoundFn> {
    let (bench, mut end) = (Arc::clone(bench), Dialed::to(bench, addr)?);
    Ok(Box::new(move || {
        let lane = end.link.lane().context("no lane")?;
        end.runtime.block_on(lane.spawn(send(Arc::clone(&bench), lane.clone())))??;
        end.runtime.block_on(Dialed::received(&mut end.messages))
    }))
}

async fn send(bench: Arc<Bench>, lane: Lane) -> Result<()> {
    let mut stream = lane.quic.open_uni().await?;
    let mut slots = bench.round();
    loop {
        let mut batch: Vec<_> = slots.by_ref().take(BATCH).map(|slot| Bytes::from_owner(bench.slab.share(slot, 0))).collect();
        if batch.is_empty() {
            return Ok(stream.finish()?);
        }
        stream.write_all_chunks(&mut batch).await?;
    }
}

pub(super) fn receiver(bench: &Arc<Bench>, announce: &dyn Fn(SocketAddr)) -> Result<RoundFn> {
    let end = Accepted::one(bench, announce)?;
    let bytes = bench.setup.round_cells() * bench.setup.cell_bytes;
    Ok(Box::new(move || {
        let arriving = end.runtime.block_on(end.link.accept_cells()).context("the link is gone")?;
        let got = end.runtime.block_on(arriving.read_by(receive))??;
        ensure!(got == bytes, "{got} of {bytes} bytes");
        end.say_received()
    }))
}

async fn receive(mut stream: RecvStream) -> Result<usize> {
    let mut batch = [const { Bytes::new() }; BATCH];
    let mut got = 0;
    while let Some(n) = stream.read_chunks(&mut batch).await? {
        got += batch[..n].iter().map(Bytes::len).sum::<usize>();
    }
    Ok(got)
}
