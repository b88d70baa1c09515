//! The replica's thread: waits, steps raft, and carries out each `Ready` in the order raft-rs documents.
//!
//! Order within a round: all waiting input up to a bound (so one sync serves many proposals), at most one tick, then
//! per `Ready`: a leader's messages (they may overtake the local write), a snapshot, committed entries, one synced
//! write, and only then the messages that promise something (votes, acknowledgements). Then `advance`. The
//! status is published before any waiter is answered.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use raft::eraftpb::{Entry, EntryType, HardState, Message, MessageType};
use raft::{Config, INVALID_ID, RawNode, ReadOnlyOption, Ready, SnapshotStatus, StateRole};
use tokio::sync::{mpsc, watch};

use super::background::{Background, Received, Spawn};
use super::clients::{Clients, Reply};
use super::disk::Disk;
use super::handle::{Input, Shared};
use super::members::Members;
use super::membership::Removal;
use super::room::{FULL_PAUSE, Room};
use super::ship::ShipInput;
use super::snapshot::Meta;
use super::storage::Store;
use super::wal::{Identity, LogPoint};
use super::{DiskError, ProposeError, RaftConfig, RaftFailure, RaftStartError, RaftStatus, Role, StateMachine};
use super::{admit, message};

/// Inputs taken in one round at most, and the bytes after which it is closed.
const ROUND_INPUTS_MAX: usize = 4096;
const ROUND_BYTES_MAX: usize = 8 << 20;
/// Entry bytes of one append message, as raft-rs counts them before it batches.
const APPEND_BYTES_MAX: u64 = 1 << 20;
/// Append messages in flight to one follower.
const INFLIGHT_MAX: usize = 256;
/// Proposed bytes that may be uncommitted; further proposals are answered `Dropped`.
const UNCOMMITTED_BYTES_MAX: u64 = 64 << 20;
/// Committed bytes applied in one round.
const APPLY_BYTES_MAX: u64 = 16 << 20;

/// What a replica is put together from.
pub(super) struct Parts {
    pub config: RaftConfig,
    pub disk: Arc<dyn Disk>,
    pub spawn: Spawn,
    pub inputs: Receiver<Input>,
    pub outgoing: mpsc::Sender<(u64, Vec<u8>)>,
    pub ship: SyncSender<ShipInput>,
    pub shared: Arc<Shared>,
}

/// Why a replica ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It was told to.
    Asked,
    /// It cannot go on.
    Failed(RaftFailure),
}

impl From<RaftFailure> for Stop {
    fn from(failure: RaftFailure) -> Self {
        Self::Failed(failure)
    }
}

/// How rarely the planted early acknowledgement syncs: longer than messages travel, or it would do no harm.
#[cfg(test)]
const LATE_SYNC_TICKS: u64 = 32;

/// A bug that a test plants, to see that it is found.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Planted {
    #[default]
    Nothing,
    /// Reads are served from the local state without asking the quorum.
    StaleRead,
    /// Appends are acknowledged before they are synced.
    EarlyAck,
}

/// One replica; see the module.
pub(super) struct Driver<M: StateMachine> {
    // Dropped first: the directory is released before `status`, the last field, closes.
    pub node: RawNode<Store>,
    pub machine: M,
    pub config: RaftConfig,
    pub disk: Arc<dyn Disk>,
    pub room: Room,
    pub background: Background<M::State>,
    pub inputs: Receiver<Input>,
    outgoing: mpsc::Sender<(u64, Vec<u8>)>,
    ship: SyncSender<ShipInput>,
    pub shared: Arc<Shared>,
    pub clients: Clients,
    pub applied: u64,
    /// The members as applied, and the entry that last changed them.
    pub members: Arc<Members>,
    pub members_index: u64,
    /// The tick at which each peer was last heard.
    pub heard: BTreeMap<u64, u64>,
    /// What speaks against this replica's membership.
    pub removal: Removal,
    /// Ticks so far, and when the next is due.
    pub ticks: u64,
    pub tick_due: Instant,
    /// When the present round began.
    pub now: Instant,
    /// Pause between two attempts to write what raft waits for while the disk is full.
    pub full_pause: Duration,
    /// The term this replica leads, while it does.
    reign: Option<u64>,
    /// Sends that failed since raft was last told: peer, and whether a snapshot was lost.
    failed_sends: Vec<(u64, bool)>,
    sends_dropped: u64,
    /// The snapshot that raft is being told of.
    pub received: Option<Received<M::State>>,
    #[cfg(test)]
    pub planted: Planted,
    status: watch::Sender<RaftStatus>,
}

impl<M: StateMachine> Driver<M> {
    /// Opens the log, restores the state machine from the snapshot, and gives the status to watch. Time starts at `now`.
    pub fn open(parts: Parts, mut machine: M, now: Instant) -> Result<(Self, watch::Receiver<RaftStatus>), RaftStartError> {
        let Parts { config, disk, spawn, inputs, outgoing, ship, shared } = parts;
        let owner = Identity { cluster_id: config.cluster_id.clone(), node: config.id, log: 0 };
        let (store, snapshot) = Store::open(disk.clone(), &config.dir, owner, &config.founders)?;
        if let Some(data) = snapshot {
            machine.install(M::decode(&data)?);
        }
        let room = Room::open(disk.clone(), &config.dir, config.reserve_bytes)?;
        shared.full.store(room.full, Ordering::Relaxed);
        let applied = store.snapshot_index();
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let node = RawNode::new(&raft_config(&config, applied), store, &logger)?;
        let (status, watched) = watch::channel(observe(&node, applied));
        let clients = Clients::new(config.id, disk.random());
        let mut driver = Self {
            node,
            machine,
            disk,
            room,
            background: Background::new(spawn),
            inputs,
            outgoing,
            ship,
            shared,
            clients,
            applied,
            members: Arc::default(),
            members_index: 0,
            heard: BTreeMap::new(),
            removal: Removal::default(),
            ticks: 0,
            tick_due: now + config.tick,
            now,
            full_pause: FULL_PAUSE,
            reign: None,
            failed_sends: Vec::new(),
            sends_dropped: 0,
            received: None,
            #[cfg(test)]
            planted: Planted::default(),
            status,
            config,
        };
        driver.note_members(0);
        driver.publish();
        Ok((driver, watched))
    }

    /// Serves until told to stop or broken; says which in the last status.
    pub fn run(mut self) {
        let failure = match catch_unwind(AssertUnwindSafe(|| self.serve())) {
            Ok(Stop::Asked) => None,
            Ok(Stop::Failed(failure)) => Some(failure),
            Err(panic) => Some(RaftFailure::Invariant(panic_text(panic.as_ref()))),
        };
        if let Some(failure) = &failure {
            tracing::error!(id = self.config.id, %failure, "the replica stops");
        }
        self.shared.halted.store(true, Ordering::Release);
        self.status.send_modify(|status| {
            status.role = Role::Stopped;
            status.leader = None;
            status.failure = failure;
        });
    }

    fn serve(&mut self) -> Stop {
        loop {
            let wait = self.tick_due.saturating_duration_since(Instant::now());
            let first = match self.inputs.recv_timeout(wait) {
                Ok(input) => Some(input),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return Stop::Asked,
            };
            if let Err(stop) = self.round(first, Instant::now()) {
                return stop;
            }
        }
    }

    /// One round, with all input that waits behind `first`.
    pub fn round(&mut self, first: Option<Input>, now: Instant) -> Result<(), Stop> {
        #[cfg(test)]
        self.sync_late()?;
        self.now = now;
        self.collect_done()?;
        self.take_inputs(first);
        self.tick_if_due(now)?;
        self.begin_reads();
        self.handle_readies()?;
        self.watch_leadership();
        self.clients.settle_reads(self.applied, self.ticks);
        self.compact_if_due();
        self.publish();
        self.clients.answer();
        self.stop_if_removed()?;
        if self.halted() { Err(Stop::Asked) } else { Ok(()) }
    }

    /// Steps what has gathered.
    fn take_inputs(&mut self, first: Option<Input>) {
        let mut next = first.or_else(|| self.inputs.try_recv().ok());
        let (mut taken, mut bytes) = (0, 0);
        while let Some(input) = next {
            bytes += self.accept(input);
            taken += 1;
            self.watch_leadership();
            let full = taken >= ROUND_INPUTS_MAX || bytes >= ROUND_BYTES_MAX;
            next = if full { None } else { self.inputs.try_recv().ok() };
        }
    }

    /// Carries out whatever raft wants done.
    pub fn handle_readies(&mut self) -> Result<(), Stop> {
        while self.node.has_ready() && !self.halted() {
            let ready = self.node.ready();
            self.handle(ready)?;
            self.report_failed_sends();
        }
        Ok(())
    }

    pub fn halted(&self) -> bool {
        self.shared.halted.load(Ordering::Acquire)
    }

    /// Takes one input; gives its size in bytes.
    fn accept(&mut self, input: Input) -> usize {
        match input {
            Input::Peer { peer, message, bytes } => {
                self.step(peer, message);
                return bytes.num_permits();
            }
            Input::Propose { command, reply } => {
                let bytes = command.len();
                self.propose(command, reply);
                return bytes;
            }
            Input::Change { change, seen, command, reply } => self.propose_change(change, seen, &command, reply),
            Input::Read { reply } => self.clients.wait_for_read(reply),
            Input::Transfer { to } => self.transfer(to),
            Input::Removed { by, why } => self.told_removed(by, why),
            Input::Wake => {}
        }
        0
    }

    pub fn step(&mut self, peer: u64, message: Message) {
        let admitted = admit::admits(&self.node, peer, &message);
        if admitted && self.members.contains(peer) {
            self.heard.insert(peer, self.ticks);
        }
        if admitted && self.has_no_room_for(&message) {
            return;
        }
        if !admitted || self.node.step(message).is_err() {
            self.shared.frames_refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn propose(&mut self, command: Vec<u8>, reply: Reply<Vec<u8>>) {
        if self.node.raft.state != StateRole::Leader {
            let leader = self.leader();
            return self.clients.refuse(reply, ProposeError::NotLeader { leader });
        }
        if self.room.full {
            return self.clients.refuse(reply, ProposeError::DiskFull);
        }
        let (seq, context) = self.clients.wait_for_commit(reply);
        if self.node.propose(context, command).is_err() {
            self.clients.refuse_proposal(seq, ProposeError::Dropped);
        }
    }

    pub(super) fn leader(&self) -> Option<u64> {
        Some(self.node.raft.leader_id).filter(|id| *id != INVALID_ID)
    }

    /// Starts the round trip of the reads that have gathered, if a leader could answer it.
    fn begin_reads(&mut self) {
        let Some(leader) = self.leader() else {
            return self.clients.refuse_reads(&ProposeError::NotLeader { leader: None });
        };
        // A leader knows the commit index only once it has committed an entry of its own term; raft drops reads before.
        if leader == self.config.id && !self.node.raft.commit_to_current_term() {
            return self.clients.refuse_reads(&ProposeError::Dropped);
        }
        let expires = self.ticks + self.config.election_ticks as u64;
        if let Some(context) = self.clients.begin_reads(expires) {
            #[cfg(test)]
            if self.planted == Planted::StaleRead {
                return self.clients.confirm_read(&context, self.applied);
            }
            self.node.read_index(context);
        }
    }

    /// At most one tick a round, however late: a process that was paused must not depose its leader on waking.
    fn tick_if_due(&mut self, now: Instant) -> Result<(), Stop> {
        if now < self.tick_due {
            return Ok(());
        }
        self.tick_due = next_due(self.tick_due, now, self.config.tick);
        self.ticks += 1;
        self.node.tick();
        self.watch_room()
    }

    /// When leadership is lost, or lost and regained, what was proposed before has an unknown outcome.
    fn watch_leadership(&mut self) {
        let raft = &self.node.raft;
        let reign = (raft.state == StateRole::Leader).then_some(raft.term);
        if reign != self.reign {
            tracing::info!(id = self.config.id, term = raft.term, role = ?raft.state, "raft leadership changed here");
            self.clients.lose_proposals();
            self.reign = reign;
        }
    }

    fn handle(&mut self, mut ready: Ready) -> Result<(), Stop> {
        self.send(ready.take_messages());
        for read in ready.take_read_states() {
            self.clients.confirm_read(&read.request_ctx, read.index);
        }
        if !ready.snapshot().is_empty() {
            self.install(&ready)?;
        }
        self.apply(ready.take_committed_entries());
        let (must_sync, entries) = (ready.must_sync(), ready.take_entries());
        if must_sync {
            self.persist(&entries, ready.hs())?;
        } else if let Some(hard) = ready.hs() {
            self.node.mut_store().note_commit(hard.commit);
        }
        self.send(ready.take_persisted_messages());
        let mut light = self.node.advance(ready);
        if let Some(commit) = light.commit_index() {
            self.node.mut_store().note_commit(commit);
        }
        self.send(light.take_messages());
        self.apply(light.take_committed_entries());
        self.node.advance_apply();
        Ok(())
    }

    fn persist(&mut self, entries: &[Entry], hard: Option<&HardState>) -> Result<(), Stop> {
        while let Err(error) = self.node.mut_store().write(entries, hard) {
            self.make_room(error)?;
        }
        #[cfg(test)]
        if self.planted == Planted::EarlyAck {
            return Ok(());
        }
        Ok(self.node.mut_store().sync().map_err(disk_failure)?)
    }

    /// What the planted early acknowledgement did not wait for.
    #[cfg(test)]
    fn sync_late(&mut self) -> Result<(), Stop> {
        match self.planted {
            Planted::EarlyAck if self.ticks.is_multiple_of(LATE_SYNC_TICKS) => {
                Ok(self.node.mut_store().sync().map_err(disk_failure)?)
            }
            _ => Ok(()),
        }
    }

    /// Puts the snapshot that raft was told of in the place of state and log.
    fn install(&mut self, ready: &Ready) -> Result<(), Stop> {
        let meta = ready.snapshot().get_metadata();
        let at = LogPoint { index: meta.index, term: meta.term };
        let received = self.received.take().expect("raft is told only of snapshots that are here");
        let meta = Meta { at, members: Members::of(meta.get_conf_state()) };
        while let Err(error) = self.node.mut_store().install(&meta, &received.file, ready.hs()) {
            self.make_room(error)?;
        }
        self.machine.install(received.state);
        self.applied = at.index;
        self.note_members(at.index);
        Ok(())
    }

    fn apply(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            assert_eq!(entry.index, self.applied + 1, "entries are applied in order, once each");
            self.applied = entry.index;
            if entry.get_entry_type() != EntryType::EntryNormal {
                self.apply_step(&entry);
            } else if !entry.context.is_empty() {
                // Entries without a context are the empty ones with which leaders begin their terms.
                let answer = self.machine.apply(entry.index, &entry.data);
                self.clients.applied(&entry.context, answer);
            }
        }
    }

    fn send(&mut self, messages: Vec<Message>) {
        for message in messages.into_iter().flat_map(message::split) {
            let (to, is_snapshot) = (message.to, message.get_msg_type() == MessageType::MsgSnapshot);
            let sent = match is_snapshot {
                true => self.ship.try_send(ShipInput::Send(message)).is_ok(),
                false => self.outgoing.try_send((to, message::encode(&message))).is_ok(),
            };
            if !sent {
                self.sends_dropped += 1;
                self.failed_sends.push((to, is_snapshot));
            }
        }
    }

    /// Between rounds, because raft must not be stepped while a `Ready` is being handled.
    fn report_failed_sends(&mut self) {
        let mut failed = std::mem::take(&mut self.failed_sends);
        failed.sort_unstable();
        failed.dedup();
        for (peer, was_snapshot) in failed {
            self.node.report_unreachable(peer);
            if was_snapshot {
                self.node.report_snapshot(peer, SnapshotStatus::Failure);
            }
        }
    }

    pub fn publish(&mut self) {
        let mut now = observe(&self.node, self.applied);
        now.disk_full = self.shared.full.load(Ordering::Relaxed);
        now.frames_refused = self.shared.frames_refused.load(Ordering::Relaxed);
        now.sends_dropped = self.sends_dropped;
        (now.members, now.members_index, now.peers) = (Arc::clone(&self.members), self.members_index, self.peers());
        self.status.send_if_modified(|status| {
            let changed = *status != now;
            *status = now;
            changed
        });
    }
}

fn raft_config(config: &RaftConfig, applied: u64) -> Config {
    Config {
        id: config.id,
        election_tick: config.election_ticks,
        heartbeat_tick: config.heartbeat_ticks,
        applied,
        max_size_per_msg: APPEND_BYTES_MAX,
        max_inflight_msgs: INFLIGHT_MAX,
        max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
        max_committed_size_per_ready: APPLY_BYTES_MAX,
        check_quorum: true,
        pre_vote: true,
        batch_append: true,
        read_only_option: ReadOnlyOption::Safe,
        ..Config::default()
    }
}

fn observe(node: &RawNode<Store>, applied: u64) -> RaftStatus {
    let (raft, store) = (&node.raft, node.store());
    RaftStatus {
        id: raft.id,
        term: raft.term,
        role: match raft.state {
            StateRole::Follower => Role::Follower,
            StateRole::PreCandidate => Role::PreCandidate,
            StateRole::Candidate => Role::Candidate,
            StateRole::Leader => Role::Leader,
        },
        leader: Some(raft.leader_id).filter(|id| *id != INVALID_ID),
        applied,
        committed: raft.raft_log.committed,
        last_index: raft.raft_log.last_index(),
        first_index: store.first_index(),
        snapshot_index: store.snapshot_index(),
        members: Arc::default(),
        members_index: 0,
        peers: Arc::default(),
        log: store.log(),
        frames_refused: 0,
        sends_dropped: 0,
        disk_full: false,
        failure: None,
    }
}

fn next_due(due: Instant, now: Instant, tick: Duration) -> Instant {
    let regular = due + tick;
    if regular > now { regular } else { now + tick }
}

pub(super) fn disk_failure(error: DiskError) -> RaftFailure {
    RaftFailure::Disk(error.to_string())
}

pub(super) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without text").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paused_replica_ticks_once_on_waking() {
        let (start, tick) = (Instant::now(), Duration::from_millis(50));
        let on_time = start + Duration::from_millis(3);
        assert_eq!(next_due(start, on_time, tick), start + tick);
        let late = start + Duration::from_secs(60);
        assert_eq!(next_due(start, late, tick), late + tick);
    }
}
