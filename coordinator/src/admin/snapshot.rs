//! Saving the state, for operators: a replica keeps one point in time and hands it out piece by piece, because it does not fit an answer.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Admin;

/// Saves at a time; one more is refused, because each keeps a whole state in memory.
pub const SAVES_MAX: usize = 2;
/// Bytes of the state in one answer, which says them in hexadecimal.
pub const PIECE_BYTES_MAX: usize = 1 << 20;
/// A save that nobody asks about for so long is forgotten.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// How long a save waits for a quorum to vouch for the state, before it saves what is applied here.
const FRESH_WAIT_MAX: Duration = Duration::from_secs(2);

/// A question. Its JSON has `"op"`: the variant in snake case.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub(super) enum SnapshotQuery {
    /// Keep the state as it is now.
    Open,
    /// A piece of what is kept.
    Read { id: u64, offset: u64 },
    /// Forget it.
    Close { id: u64 },
}

struct Kept {
    state: Arc<Vec<u8>>,
    used: Instant,
}

/// The states that are kept for operators.
#[derive(Clone, Default)]
pub(super) struct Saves(Arc<Mutex<BTreeMap<u64, Kept>>>);

impl Saves {
    /// Keeps a place, then what `make` gives there.
    fn keep(&self, id: u64, now: Instant) -> Result<(), String> {
        let mut kept = self.0.lock();
        if kept.len() >= SAVES_MAX {
            return Err(format!("conflict: {SAVES_MAX} saves are under way already; an idle one is forgotten after a minute"));
        }
        kept.insert(id, Kept { state: Arc::default(), used: now });
        Ok(())
    }

    fn fill(&self, id: u64, state: Vec<u8>, now: Instant) {
        self.0.lock().insert(id, Kept { state: Arc::new(state), used: now });
    }

    fn get(&self, id: u64, now: Instant) -> Option<Arc<Vec<u8>>> {
        let mut kept = self.0.lock();
        let found = kept.get_mut(&id)?;
        found.used = now;
        Some(found.state.clone())
    }

    fn forget(&self, id: u64) -> bool {
        self.0.lock().remove(&id).is_some()
    }

    /// Whether it is gone.
    fn forget_idle(&self, id: u64, now: Instant) -> bool {
        let mut kept = self.0.lock();
        let idle = kept.get(&id).is_none_or(|kept| now.saturating_duration_since(kept.used) >= IDLE_MAX);
        if idle {
            kept.remove(&id);
        }
        idle
    }
}

impl Admin {
    pub(super) async fn snapshot(&self, query: SnapshotQuery) -> Result<Value, String> {
        let unknown = || "not found: that save is not kept here any more".to_owned();
        match query {
            SnapshotQuery::Open => self.open_save().await,
            SnapshotQuery::Read { id, offset } => {
                let state = self.saves.get(id, Instant::now()).ok_or_else(unknown)?;
                let rest = usize::try_from(offset).ok().and_then(|offset| state.get(offset..)).ok_or("usage: offset")?;
                Ok(json!({"data": hex(&rest[..rest.len().min(PIECE_BYTES_MAX)])}))
            }
            SnapshotQuery::Close { id } => self.saves.forget(id).then(|| json!({})).ok_or_else(unknown),
        }
    }

    async fn open_save(&self) -> Result<Value, String> {
        let id: u64 = rand::random::<u64>() >> 12; // a number that JSON readers do not round
        self.saves.keep(id, Instant::now())?;
        let read = tokio::time::timeout(FRESH_WAIT_MAX, self.proposer.raft.read_index()).await;
        let fresh = matches!(read, Ok(Ok(_)));
        let cluster = self.proposer.cluster.read().clone();
        let applied = cluster.applied();
        let written = tokio::task::spawn_blocking(move || cluster.snapshot()).await;
        let state = written.map_err(|error| format!("the state cannot be written: {error}"))?;
        let bytes = state.len();
        self.saves.fill(id, state, Instant::now());
        let saves = self.saves.clone();
        tokio::spawn(async move {
            while !saves.forget_idle(id, Instant::now()) {
                tokio::time::sleep(IDLE_MAX).await;
            }
        });
        let (cluster, replica) = (&self.config.args.cluster, &self.config.args.name);
        Ok(json!({"id": id, "cluster": cluster, "replica": replica, "applied": applied, "fresh": fresh, "bytes": bytes}))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saves_are_few_and_idle_ones_are_forgotten() {
        let (saves, now) = (Saves::default(), Instant::now());
        (0..SAVES_MAX as u64).for_each(|id| saves.keep(id, now).unwrap());
        assert!(saves.keep(9, now).unwrap_err().starts_with("conflict:"));
        saves.fill(0, vec![1, 2], now);
        assert_eq!(*saves.get(0, now + IDLE_MAX / 2).unwrap(), [1, 2]);
        assert!(saves.forget_idle(1, now + IDLE_MAX) && !saves.forget_idle(0, now + IDLE_MAX));
        saves.keep(9, now).unwrap();
        assert!(saves.forget(0) && !saves.forget(0));
        assert_eq!(hex(&[0, 171, 255]), "00abff");
    }
}
