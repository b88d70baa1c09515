//! The replicated state of the cluster, as this replica has applied it. The raft thread writes it; everybody else reads.

use std::sync::Arc;

use millrace_core::cluster::{self, Answer, Cluster};
use parking_lot::RwLock;

use millrace_log::{RestoreError, StateMachine};

/// The applied state. Hold the lock for a computation, never across an await.
pub type SharedCluster = Arc<RwLock<Cluster>>;

/// Applies the log to the shared state.
pub struct Replicated {
    cluster: SharedCluster,
}

impl Replicated {
    /// A machine that writes to `cluster`, which nobody else may write.
    #[must_use]
    pub fn new(cluster: SharedCluster) -> Self {
        Self { cluster }
    }
}

impl StateMachine for Replicated {
    type State = Cluster;

    fn apply(&mut self, index: u64, command: &[u8]) -> Vec<u8> {
        let answer = match cluster::decode(command) {
            Ok(command) => self.cluster.write().apply(index, &command),
            // Every replica fails alike: what is in the log is the same bytes.
            Err(error) => Answer::Refused(format!("no command: {error}")),
        };
        cluster::encode_answer(&answer)
    }

    fn view(&self) -> Cluster {
        self.cluster.read().clone()
    }

    fn encode(state: &Cluster) -> Vec<u8> {
        state.snapshot()
    }

    fn decode(bytes: &[u8]) -> Result<Cluster, RestoreError> {
        Cluster::restore(bytes).map_err(|e| RestoreError(e.to_string()))
    }

    fn install(&mut self, state: Cluster) {
        let old = std::mem::replace(&mut *self.cluster.write(), state);
        // To free millions of blocks takes a while, and the log waits.
        std::thread::spawn(move || drop(old));
    }
}

#[cfg(test)]
mod tests {
    use millrace_core::cluster::Command;
    use millrace_core::identity::TenantKey;

    use super::*;

    #[test]
    fn commands_apply_and_garbage_does_not() {
        let cluster = SharedCluster::default();
        let mut machine = Replicated::new(cluster.clone());
        let put = Command::PutTenant { name: "t".into(), key: TenantKey([3; 32]) };
        let answer = cluster::decode_answer(&machine.apply(1, &cluster::encode(&put))).unwrap();
        assert_eq!(answer, Answer::Tenant(TenantKey([3; 32])));
        let answer = cluster::decode_answer(&machine.apply(2, b"garbage")).unwrap();
        assert!(matches!(answer, Answer::Refused(_)));
        let bytes = Replicated::encode(&machine.view());
        let copy = SharedCluster::default();
        let mut other = Replicated::new(copy.clone());
        assert!(Replicated::decode(&bytes[..bytes.len() - 1]).is_err());
        other.install(Replicated::decode(&bytes).unwrap());
        assert_eq!(copy.read().tenant("t"), Some(&TenantKey([3; 32])));
    }
}
