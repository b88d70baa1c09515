//! Orders to nodes about their caches, and the reports that come back. It correlates and bounds; what is ordered is its callers'.

use std::collections::HashMap;
use std::time::Duration;

use millrace_core::ids::{Epoch, NodeId};
use millrace_core::message::{CacheOrder, CacheReport, CacheResult, CacheTask, Message};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::nodes::Nodes;

/// Orders in flight to all nodes; one more is refused with [`OrderError::Busy`].
pub const ORDERS_MAX: usize = 4096;

/// Why there is no report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// The node has no link here, or is another incarnation by now.
    #[error("the node cannot be reached")]
    Unreachable,
    /// It did not report in time. The order may have been obeyed.
    #[error("the node does not answer")]
    Timeout,
    /// Too many orders are in flight.
    #[error("{ORDERS_MAX} orders are in flight already")]
    Busy,
    /// It cannot do that now.
    #[error("the node refuses: it is busy with another such order, or has joined anew")]
    Refused,
}

/// Whose report is awaited, and by whom.
type Awaited = ((NodeId, Epoch), oneshot::Sender<CacheResult>);

/// The orders in flight.
#[derive(Default)]
pub struct Orders {
    inner: Mutex<(u64, HashMap<u64, Awaited>)>,
}

impl Orders {
    /// Gives an order to an incarnation of a node and waits for its report.
    ///
    /// # Errors
    /// See [`OrderError`].
    pub async fn give(
        &self,
        nodes: &Nodes,
        to: (NodeId, Epoch),
        task: CacheTask,
        wait: Duration,
    ) -> Result<CacheResult, OrderError> {
        let (id, receiver) = self.open(to)?;
        let sent = nodes.send_to(to, Message::CacheOrder(CacheOrder { id, epoch: to.1, task }));
        let report = if sent { tokio::time::timeout(wait, receiver).await.ok().and_then(Result::ok) } else { None };
        self.inner.lock().1.remove(&id);
        match report {
            Some(CacheResult::Refused) => Err(OrderError::Refused),
            Some(result) => Ok(result),
            None if sent => Err(OrderError::Timeout),
            None => Err(OrderError::Unreachable),
        }
    }

    fn open(&self, to: (NodeId, Epoch)) -> Result<(u64, oneshot::Receiver<CacheResult>), OrderError> {
        let mut inner = self.inner.lock();
        if inner.1.len() >= ORDERS_MAX {
            return Err(OrderError::Busy);
        }
        inner.0 += 1;
        let (id, (sender, receiver)) = (inner.0, oneshot::channel());
        inner.1.insert(id, (to, sender));
        Ok((id, receiver))
    }

    /// A node reports. What nobody waits for, or another node was asked for, is dropped.
    pub fn reported(&self, report: CacheReport) {
        let from = (report.node, report.epoch);
        let awaited = {
            let mut inner = self.inner.lock();
            let ours = inner.1.get(&report.id).is_some_and(|(to, _)| *to == from);
            ours.then(|| inner.1.remove(&report.id)).flatten()
        };
        if let Some((_, sender)) = awaited {
            // Whoever asked may have stopped waiting; then nobody misses the report.
            let _ = sender.send(report.result);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use millrace_core::message::{EvictCount, Load};
    use tokio::sync::mpsc;

    use super::*;

    const NODE: (NodeId, Epoch) = (NodeId(3), Epoch(9));
    const WAIT: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_report_reaches_who_ordered_and_only_from_the_node_that_was_asked() {
        let (sender, mut sent) = mpsc::unbounded_channel();
        let nodes = Arc::new(Nodes::default());
        let link = nodes.attach(Instant::now(), "n", 1, Arc::new(move |message| sender.send(message).is_ok()));
        nodes.heartbeat(Instant::now(), "n", link, NODE, Load::default());
        let asking = nodes.clone();
        let report = tokio::spawn(async move { asking.orders.give(&asking, NODE, CacheTask::Verify, WAIT).await });
        let Some(Message::CacheOrder(order)) = sent.recv().await else { panic!("an order") };
        let result = CacheResult::Evicted(EvictCount::default());
        let of = |node: NodeId, id| CacheReport { id, node, epoch: NODE.1, result: result.clone() };
        nodes.orders.reported(of(NodeId(4), order.id));
        nodes.orders.reported(of(NODE.0, order.id + 1));
        nodes.orders.reported(of(NODE.0, order.id));
        assert_eq!(report.await.unwrap(), Ok(result));
        let older = (NODE.0, Epoch(8));
        assert_eq!(nodes.orders.give(&nodes, older, CacheTask::Verify, WAIT).await, Err(OrderError::Unreachable));
        assert!(nodes.orders.inner.lock().1.is_empty());
    }
}
