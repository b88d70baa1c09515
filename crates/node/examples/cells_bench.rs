//! How fast KV cells go over loopback, both ends in this process: `cargo run --release -p millrace-node --example cells_bench [MiB [connections]]`.
//! The receiver does what a decode node does: one copy to the cell's place, and its digest.

use std::net::SocketAddr;
use std::time::Instant;

use bytes::Bytes;
use millrace_core::identity::cell_digest;
use millrace_core::ids::{AttemptId, BlockHash, Generation};
use millrace_core::message::{CellsHeader, Role};
use millrace_node::cells::{CellsReader, send_cells};
use millrace_node::endpoint::{Connection, Endpoint, EndpointConfig, Target};
use millrace_node::pki::{Authority, Identity};

const CELL_BYTES: usize = 48 << 10;
const CELLS: usize = 340; // of one stream: 16 MiB

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mib: usize = arguments.next().map_or(Ok(4096), |a| a.parse())?;
    let pairs: usize = arguments.next().map_or(Ok(1), |a| a.parse())?;
    let streams = mib * (1 << 20) / (CELL_BYTES * CELLS) / pairs;
    let mut connections = Vec::new();
    for _ in 0..pairs {
        connections.push(connect().await?);
    }
    let begin = Instant::now();
    let mut tasks = Vec::new();
    for (sender, receiver) in connections.iter().cloned() {
        tasks.push(tokio::spawn(receive(receiver, streams)));
        tasks.push(tokio::spawn(send(sender, streams)));
    }
    for task in tasks {
        task.await??;
    }
    let (seconds, gigabytes) = (begin.elapsed().as_secs_f64(), (pairs * streams * CELLS * CELL_BYTES) as f64 / 1e9);
    println!("{gigabytes:.2} GB in {seconds:.2} s: {:.2} GB/s over {pairs} connection(s)", gigabytes / seconds);
    let stats = connections[0].0.quic.stats();
    println!(
        "mtu {} lost {} of {} packets, {} congestion events",
        stats.path.current_mtu, stats.path.lost_packets, stats.path.sent_packets, stats.path.congestion_events
    );
    Ok(())
}

async fn connect() -> anyhow::Result<(Connection, Connection)> {
    let dir = std::env::temp_dir().join(format!("millrace-cells-bench-{}", std::process::id()));
    let authority = Authority::load(&dir).or_else(|_| Authority::create(&dir, "bench"))?;
    let bind = |role: Role| {
        authority.issue(role, "x", &dir.join(role.as_str()))?;
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        anyhow::Ok(Endpoint::bind(any, Identity::load(&dir.join(role.as_str()))?, EndpointConfig::default())?)
    };
    let (prefill, decode) = (bind(Role::Prefill)?, bind(Role::Decode)?);
    let target = Target { addr: decode.local_addr()?, role: Role::Decode, name: None };
    let accept = async { anyhow::Ok(decode.accept().await.ok_or_else(|| anyhow::anyhow!("closed"))?.finish().await?) };
    let (dialed, accepted) = tokio::join!(prefill.connect(&target), accept);
    Ok((dialed?, accepted?))
}

async fn send(connection: Connection, streams: usize) -> anyhow::Result<()> {
    let cell = Bytes::from(vec![5; CELL_BYTES]);
    let digests = (0..CELLS).map(|i| cell_digest(&BlockHash([i as u8; 16]), 0, &cell)).collect();
    let (attempt, generation) = (AttemptId::default(), Generation(1));
    let header = CellsHeader { attempt, generation, layer: 0, layers: 1, block: 0, blocks: CELLS as u32, digests };
    for _ in 0..streams {
        send_cells(&connection.quic, &header, std::iter::repeat_n(cell.clone(), CELLS), 0).await?;
    }
    connection.quic.closed().await;
    Ok(())
}

async fn receive(connection: Connection, streams: usize) -> anyhow::Result<()> {
    let mut slab = vec![0; CELLS * CELL_BYTES];
    for _ in 0..streams {
        let mut reader = CellsReader::open(connection.quic.accept_uni().await?, CELL_BYTES).await?;
        while let Some(cell) = reader.next_cell().await? {
            let place = &mut slab[cell.block as usize * CELL_BYTES..][..CELL_BYTES];
            cell.copy_to(place);
            anyhow::ensure!(cell_digest(&BlockHash([cell.block as u8; 16]), 0, place) == cell.digest, "digest");
        }
    }
    connection.quic.close(0u32.into(), b"all here");
    Ok(())
}
