//! A replica that its holder steps, in whatever time that one keeps, instead of running on threads of its own: for simulators.
//!
//! The driver, the shipments and the background jobs are the real ones. Here is only what else would be chance: raft-rs draws election
//! timeouts from a global generator, so they are set again after each step, from a seed. Other random numbers come from the [`Disk`].

use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::background::{Job, Spawn};
use crate::disk::Disk;
use crate::driver::{Driver, Stop, panic_text};
use crate::handle::{Assembled, RaftHandle, assemble};
use crate::ship::{Ship, ShipInput};
use crate::{RaftConfig, RaftFailure, RaftStartError, StateMachine};

/// Frames that wait for their holder; what does not fit is dropped, as on a link.
const OUTGOING_FRAMES_MAX: usize = 4096;

/// A replica without threads; see the module.
pub struct Stepped<M: StateMachine> {
    pub(crate) driver: Driver<M>,
    ship: Ship<M::State>,
    ship_inputs: Receiver<ShipInput>,
    outgoing: mpsc::Receiver<(u64, Vec<u8>)>,
    jobs: Arc<Mutex<Vec<Job>>>,
    handle: RaftHandle,
    seed: u64,
}

impl<M: StateMachine> Stepped<M> {
    /// Opens a replica whose time begins at `now`; `seed` decides its election timeouts.
    ///
    /// # Errors
    /// As for [`crate::start`].
    pub fn open(disk: Arc<dyn Disk>, config: RaftConfig, machine: M, now: Instant, seed: u64) -> Result<Self, RaftStartError> {
        let (to_network, outgoing) = mpsc::channel(OUTGOING_FRAMES_MAX);
        let jobs = Arc::<Mutex<Vec<Job>>>::default();
        let waiting = Arc::clone(&jobs);
        let spawn: Spawn = Arc::new(move |job| waiting.lock().unwrap_or_else(PoisonError::into_inner).push(job));
        let assembled = assemble(disk, config, machine, to_network, spawn, now)?;
        let Assembled { handle, mut driver, ship, ship_inputs } = assembled;
        driver.full_pause = Duration::ZERO;
        let mut replica = Self { driver, ship, ship_inputs, outgoing, jobs, handle, seed };
        replica.set_election_timeout();
        Ok(replica)
    }

    /// The way in, as for a replica with threads.
    #[must_use]
    pub fn handle(&self) -> &RaftHandle {
        &self.handle
    }

    /// When the next step is due if nothing comes in before.
    #[must_use]
    pub fn next_tick(&self) -> Instant {
        self.driver.tick_due
    }

    /// Does all that waits: background jobs, shipments, then one round of the driver.
    ///
    /// # Errors
    /// The replica has ended; a panic counts as a broken invariant.
    pub fn step(&mut self, now: Instant) -> Result<(), Stop> {
        let round = catch_unwind(AssertUnwindSafe(|| self.round(now)));
        round.unwrap_or_else(|panic| Err(RaftFailure::Invariant(panic_text(panic.as_ref())).into()))
    }

    fn round(&mut self, now: Instant) -> Result<(), Stop> {
        let jobs = std::mem::take(&mut *self.jobs.lock().unwrap_or_else(PoisonError::into_inner));
        jobs.into_iter().for_each(|job| job());
        while let Ok(input) = self.ship_inputs.try_recv() {
            self.ship.handle(now, input);
        }
        self.ship.look(now);
        self.driver.round(None, now)?;
        self.set_election_timeout();
        Ok(())
    }

    /// Plants a bug of the log's own, to see that a simulator finds it.
    #[cfg(millrace_planted)]
    pub fn plant(&mut self, planted: crate::Planted) {
        self.driver.planted = planted;
    }

    /// A frame for a peer, in the order in which they were sent.
    pub fn next_frame(&mut self) -> Option<(u64, Vec<u8>)> {
        self.outgoing.try_recv().ok()
    }

    /// Another timeout for each term, and for each try within one: else two that tie would tie for ever. (So would two whose hashes
    /// always differ by the same bits, as a CRC's do.)
    fn set_election_timeout(&mut self) {
        let (ticks, raft) = (self.driver.config.election_ticks, &mut self.driver.node.raft);
        let mut hasher = DefaultHasher::new();
        (self.seed, raft.id, raft.term, self.driver.ticks / (2 * ticks as u64)).hash(&mut hasher);
        raft.set_randomized_election_timeout(ticks + (hasher.finish() % ticks as u64) as usize);
    }
}
