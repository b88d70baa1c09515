//! The KV path alone: cells from one slab to another over loopback QUIC with mutual TLS, both ends in this process, digests made and
//! checked as nodes do.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use millrace_core::identity::cell_digest;
use millrace_core::ids::{AttemptId, BlockHash, Generation};
use millrace_core::message::{CellsHeader, Role};
use millrace_kernels::KvSlab;
use millrace_node::cells::{CellsReader, send_cells};
use millrace_node::endpoint::{Connection, Endpoint, EndpointConfig, Target};
use millrace_node::pki::{Authority, Identity};

use crate::machine::cpu_s;
use crate::report::Row;

/// Bytes of a cell: SmolLM2-135M in bf16, and a model of 8 billion parameters.
const CELL_BYTES: [usize; 2] = [12 << 10, 64 << 10];
/// Bytes of one stream.
const STREAM_BYTES: usize = 8 << 20;

/// Measures `mib` MiB a run over one connection.
///
/// # Errors
/// The connection failed, or a digest did not match.
pub async fn measure(runs: usize, mib: usize) -> Result<Vec<Row>> {
    let dir = tempfile::tempdir()?;
    let mut rows = Vec::new();
    for cell_bytes in CELL_BYTES {
        let (mut speeds, mut costs) = (Vec::new(), Vec::new());
        for run in 0..=runs {
            let (speed, cost) = once(dir.path(), cell_bytes, mib << 20).await?;
            if run > 0 {
                speeds.push(speed);
                costs.push(cost);
            }
        }
        let name = format!("KV streams, {} KiB cells, one connection", cell_bytes >> 10);
        rows.push(Row::new(format!("{name}, GB/s"), speeds));
        rows.push(Row::new(format!("{name}, CPU s per GB (both ends)"), costs));
    }
    Ok(rows)
}

/// GB/s and processor seconds per GB of one run.
async fn once(dir: &Path, cell_bytes: usize, bytes: usize) -> Result<(f64, f64)> {
    let cells = STREAM_BYTES / cell_bytes;
    let streams = bytes.div_ceil(cells * cell_bytes);
    let (from, to) = (KvSlab::new(cell_bytes, 1, cells)?, KvSlab::new(cell_bytes, 1, cells)?);
    (0..cells).for_each(|slot| from.write(slot, 0).fill(slot as u8));
    let (sender, receiver, _ends) = connect(dir).await?;
    let (begin, cpu) = (Instant::now(), cpu_s());
    let receiving = tokio::spawn(receive(receiver, to, streams));
    send(&sender, &from, streams).await?;
    receiving.await??;
    let gigabytes = (streams * cells * cell_bytes) as f64 / 1e9;
    Ok((gigabytes / begin.elapsed().as_secs_f64(), (cpu_s() - cpu) / gigabytes))
}

async fn connect(dir: &Path) -> Result<(Connection, Connection, [Endpoint; 2])> {
    let authority = Authority::load(dir).or_else(|_| Authority::create(dir, "bench"))?;
    let bind = |role: Role| {
        let own = dir.join(role.as_str());
        authority.issue(role, "x", &own)?;
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        anyhow::Ok(Endpoint::bind(any, Identity::load(&own)?, EndpointConfig::default())?)
    };
    let (prefill, decode) = (bind(Role::Prefill)?, bind(Role::Decode)?);
    let target = Target { addr: decode.local_addr()?, role: Role::Decode, name: None };
    let accept = async { anyhow::Ok(decode.accept().await.context("the endpoint closed")?.finish().await?) };
    let (dialed, accepted) = tokio::join!(prefill.connect(&target), accept);
    Ok((dialed?, accepted?, [prefill, decode]))
}

fn name(slot: usize) -> BlockHash {
    BlockHash([slot as u8; 16])
}

async fn send(connection: &Connection, slab: &Arc<KvSlab>, streams: usize) -> Result<()> {
    let blocks = slab.slots() as u32;
    for _ in 0..streams {
        let cells: Vec<_> = (0..slab.slots()).map(|slot| slab.share(slot, 0)).collect();
        let digests = cells.iter().enumerate().map(|(slot, cell)| cell_digest(&name(slot), 0, cell.as_ref())).collect();
        let (attempt, generation) = (AttemptId::default(), Generation(1));
        let header = CellsHeader { attempt, generation, layer: 0, layers: 1, block: 0, blocks, digests };
        send_cells(&connection.quic, &header, cells.into_iter().map(Bytes::from_owner), 0).await?;
    }
    connection.quic.closed().await;
    Ok(())
}

async fn receive(connection: Connection, slab: Arc<KvSlab>, streams: usize) -> Result<()> {
    for _ in 0..streams {
        let mut reader = CellsReader::open(connection.quic.accept_uni().await?, slab.cell_bytes()).await?;
        while let Some(cell) = reader.next_cell().await? {
            let slot = cell.block as usize;
            let mut place = slab.write(slot, 0);
            cell.copy_to(&mut place);
            ensure!(cell_digest(&name(slot), 0, &place) == cell.digest, "digest of cell {slot}");
        }
    }
    connection.quic.close(0u32.into(), b"all here");
    Ok(())
}
