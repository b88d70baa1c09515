//! The state machine of the log: the real one, and a ledger that no two replicas may write differently.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_core::cluster::{self, Answer, Cluster};
use millrace_log::{RestoreError, StateMachine};
use xxhash_rust::xxh3::xxh3_64;

use crate::invariants::{applied, follows};

/// The applied state: the log writes it, the replica reads.
pub(super) type Shared = Arc<Mutex<Cluster>>;

/// One thread only, so a lock is never waited for; a replica that panicked is gone.
pub(super) fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What each entry of the log was, as whoever applied it first has seen it. All replicas must see the same (I6).
#[derive(Clone, Debug, Default)]
pub struct Ledger(Arc<Mutex<BTreeMap<u64, u64>>>, Arc<AtomicU64>);

impl Ledger {
    /// Reports that did not build on what the index had, on all replicas.
    #[must_use]
    pub fn gaps(&self) -> u64 {
        self.1.load(Ordering::Relaxed)
    }

    fn gap(&self, count: u64) {
        self.1.fetch_add(count, Ordering::Relaxed);
    }

    fn note(&self, index: u64, command: &[u8]) {
        let hash = xxh3_64(command);
        let first = *lock(&self.0).entry(index).or_insert(hash);
        assert_eq!(hash, first, "I6: two replicas applied different commands as entry {index}");
    }
}

/// Applies the log.
pub(super) struct Applied {
    cluster: Shared,
    ledger: Ledger,
}

impl Applied {
    pub fn new(cluster: Shared, ledger: Ledger) -> Self {
        Self { cluster, ledger }
    }
}

impl StateMachine for Applied {
    type State = Cluster;

    fn apply(&mut self, index: u64, command: &[u8]) -> Vec<u8> {
        self.ledger.note(index, command);
        let mut cluster = lock(&self.cluster);
        let answer = match cluster::decode(command) {
            Ok(command) => {
                let before = applied(&cluster);
                let answer = cluster.apply(index, &command);
                self.ledger.gap(follows(&before, &cluster, &command, &answer));
                answer
            }
            Err(error) => Answer::Refused(format!("no command: {error}")),
        };
        cluster.check();
        cluster::encode_answer(&answer)
    }

    fn view(&self) -> Cluster {
        lock(&self.cluster).clone()
    }

    fn encode(state: &Cluster) -> Vec<u8> {
        state.snapshot()
    }

    fn decode(bytes: &[u8]) -> Result<Cluster, RestoreError> {
        let state = Cluster::restore(bytes).map_err(|error| RestoreError(error.to_string()))?;
        assert_eq!(state.snapshot(), bytes, "I6: a restored state differs");
        Ok(state)
    }

    fn install(&mut self, state: Cluster) {
        *lock(&self.cluster) = state;
    }
}
