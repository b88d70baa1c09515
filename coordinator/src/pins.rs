//! The leader's duty towards pins: every live node hears which blocks are pinned, after each change and after each join.
//!
//! A node's pins are replaced as a whole, under the log's count of changes, so a repeat is harmless and an order that was overtaken has
//! no effect. A new leader tells everybody once.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::future::join_all;
use millrace_core::ids::{BlockHash, Epoch, NodeId};
use millrace_core::message::{CacheResult, CacheTask, PinCount};
use millrace_node::shutdown::Shutdown;
use tracing::{debug, warn};

use crate::propose::Proposer;
use millrace_log::Role;

/// How often the leader looks whether a node must be told.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How long a node may take to report.
const REPORT_WAIT_MAX: Duration = Duration::from_secs(2);

/// Tells nodes until shutdown.
pub async fn run(proposer: Proposer, shutdown: Shutdown) {
    let mut told = HashMap::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
            _ = shutdown.wait() => return,
        }
        if proposer.raft.status().role == Role::Leader {
            round(&proposer, &mut told).await;
        } else {
            told.clear();
        }
    }
}

/// The epoch and the version of pins that each node is known to have.
type Told = HashMap<NodeId, (Epoch, u64)>;

async fn round(proposer: &Proposer, told: &mut Told) {
    let Some((version, names, nodes)) = due(proposer, told) else { return };
    let orders = nodes.into_iter().map(|who| {
        let task = CacheTask::Pin { version, names: names.clone() };
        async move { (who, proposer.nodes.orders.give(&proposer.nodes, who, task, REPORT_WAIT_MAX).await) }
    });
    for ((node, epoch), result) in join_all(orders).await {
        match result {
            Ok(CacheResult::Pinned { version, pins }) => {
                told.insert(node, (epoch, version));
                warn_of(node, pins);
            }
            other => debug!(%node, ?other, "pins are not told yet"),
        }
    }
}

/// The version of the pins, their blocks, and the nodes that must be told.
type Due = (u64, Vec<BlockHash>, Vec<(NodeId, Epoch)>);

/// What must be told, and to whom; `None` when everybody knows.
fn due(proposer: &Proposer, told: &Told) -> Option<Due> {
    let cluster = proposer.cluster.read();
    let version = cluster.policy().pins_version();
    // A cluster that never had a pin has nothing to say: every node starts without.
    let knows = |node: NodeId, epoch: Epoch| version == 0 || told.get(&node) == Some(&(epoch, version));
    let late = |n: &&millrace_core::cluster::Node| n.state.alive() && !knows(n.node, n.epoch);
    let nodes: Vec<_> = cluster.nodes().filter(late).map(|n| (n.node, n.epoch)).collect();
    (!nodes.is_empty()).then(|| (version, cluster.policy().pinned_names(), nodes))
}

fn warn_of(node: NodeId, pins: PinCount) {
    if pins.over > 0 {
        warn!(%node, held = pins.held, over = pins.over, "a node's pool is too small for all pinned blocks");
    }
}
