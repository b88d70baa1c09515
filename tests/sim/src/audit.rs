//! What must hold between processes, looked at every few events; each machine asserts its own invariants whenever it is touched.

use std::collections::BTreeMap;

use millrace_log::Role;

use crate::event::Host;
use crate::process::HostState;
use crate::world::World;

/// Events between two looks.
pub(crate) const EVERY: u64 = 64;
/// Events that may wait for one process: whoever falls behind further would run out of memory (I7).
const INBOX_MAX: usize = 20_000;

/// What was seen so far.
#[derive(Debug, Default)]
pub struct Audit {
    /// Who led in each term.
    leaders: BTreeMap<u64, Host>,
}

impl Audit {
    /// Terms in which somebody was seen to lead.
    #[must_use]
    pub fn terms(&self) -> u64 {
        self.leaders.len() as u64
    }

    /// Looks at all hosts.
    ///
    /// # Panics
    /// When two replicas lead in one term, or a queue has no end.
    pub(crate) fn look(&mut self, hosts: &[HostState]) {
        for (host, state) in hosts.iter().enumerate() {
            let waiting = state.waiting();
            assert!(waiting < INBOX_MAX, "I7: {} has {waiting} events to look at", state.name);
            let Some(status) = state.replica().map(|replica| replica.status()).filter(|status| status.role == Role::Leader) else {
                continue;
            };
            let first = *self.leaders.entry(status.term).or_insert(host);
            assert_eq!(first, host, "I6: two replicas lead in term {}", status.term);
        }
    }
}

impl World {
    /// Looks at everything, if it is time.
    pub(crate) fn audit(&mut self) {
        if self.events.is_multiple_of(EVERY) {
            self.audit.look(&self.hosts);
            self.look();
        }
    }
}
