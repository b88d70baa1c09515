//! The way in: starts a replica's thread and gives handles to it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc as std_mpsc};
use std::time::Instant;

use raft::eraftpb::{Message, MessageType};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::background::Spawn;
use super::clients::Reply;
use super::disk::{Disk, OsDisk};
use super::driver::{Driver, Parts};
use super::members::{CHANGE_COMMAND_BYTES_MAX, Change};
use super::ship::{self, Dock, SHIP_INPUTS_MAX, Ship, ShipInput};
use super::wal::Identity;
use super::{
    CLUSTER_ID_BYTES_MAX, COMMAND_BYTES_MAX, FRAME_BYTES_MAX, ProposeError, RaftConfig, RaftStartError, RaftStatus, StateMachine,
    VOTERS_MAX, message,
};

/// Proposals and reads that may wait at once; more are answered [`ProposeError::Busy`].
const WAITING_MAX: usize = 8192;
/// Bytes of frames that may wait for the thread; more are dropped, which raft takes as loss.
const FRAMES_QUEUED_BYTES_MAX: usize = FRAME_BYTES_MAX + (32 << 20);

/// What the thread is told.
pub(super) enum Input {
    /// A message from a peer, and its share of the queue's bytes.
    Peer {
        peer: u64,
        message: Message,
        bytes: OwnedSemaphorePermit,
    },
    Propose {
        command: Vec<u8>,
        reply: Reply<Vec<u8>>,
    },
    Change {
        change: Change,
        /// [`RaftStatus::members_index`] that the asker saw.
        seen: u64,
        command: Vec<u8>,
        reply: Reply<Vec<u8>>,
    },
    Read {
        reply: Reply<u64>,
    },
    Transfer {
        /// Nobody named: the voter that has most of the log.
        to: Option<u64>,
    },
    /// A peer says that this replica is no member.
    Removed {
        by: u64,
        why: String,
    },
    /// Look at [`Shared::halted`].
    Wake,
}

/// What handles and the thread both touch.
#[derive(Default)]
pub(super) struct Shared {
    pub halted: AtomicBool,
    /// The disk is full.
    pub full: AtomicBool,
    pub frames_refused: AtomicU64,
}

/// One replica, as seen by the rest of the process. Clones are handles to the same replica; it stops when
/// [`RaftHandle::shutdown`] is called or the last handle is gone.
#[derive(Clone)]
pub struct RaftHandle {
    inbox: std_mpsc::Sender<Input>,
    ship: std_mpsc::SyncSender<ShipInput>,
    status: watch::Receiver<RaftStatus>,
    shared: Arc<Shared>,
    waiting: Arc<Semaphore>,
    frame_bytes: Arc<Semaphore>,
}

/// Starts a replica on its own thread, with the state machine brought up to its snapshot; the log behind the snapshot is
/// applied again as raft finds it committed. `outgoing` takes `(peer, frame)`; what does not fit it is dropped.
///
/// # Errors
/// The configuration is impossible, the directory is in use, or its data is another's or damaged.
pub fn start(
    config: RaftConfig,
    state_machine: impl StateMachine,
    outgoing: mpsc::Sender<(u64, Vec<u8>)>,
) -> Result<RaftHandle, RaftStartError> {
    start_on(Arc::new(OsDisk), config, state_machine, outgoing)
}

/// As [`start`], over the file system `disk`.
pub(super) fn start_on<M: StateMachine>(
    disk: Arc<dyn Disk>,
    config: RaftConfig,
    state_machine: M,
    outgoing: mpsc::Sender<(u64, Vec<u8>)>,
) -> Result<RaftHandle, RaftStartError> {
    let name = format!("raft-{}", config.id);
    let assembled = assemble(disk, config, state_machine, outgoing, Arc::new(|job| drop(std::thread::spawn(job))), Instant::now())?;
    let Assembled { handle, driver, ship, ship_inputs } = assembled;
    let no_thread = |error| RaftStartError::Config(format!("no thread for the replica: {error}"));
    std::thread::Builder::new().name(format!("{name}-ship")).spawn(move || ship.run(&ship_inputs)).map_err(no_thread)?;
    std::thread::Builder::new().name(name).spawn(move || driver.run()).map_err(no_thread)?;
    Ok(handle)
}

/// A replica before its threads run. Tests step it themselves.
pub(super) struct Assembled<M: StateMachine> {
    pub handle: RaftHandle,
    pub driver: Driver<M>,
    pub ship: Ship<M::State>,
    pub ship_inputs: std_mpsc::Receiver<ShipInput>,
}

/// Opens a replica; its time begins at `now`.
pub(super) fn assemble<M: StateMachine>(
    disk: Arc<dyn Disk>,
    config: RaftConfig,
    machine: M,
    outgoing: mpsc::Sender<(u64, Vec<u8>)>,
    spawn: Spawn,
    now: Instant,
) -> Result<Assembled<M>, RaftStartError> {
    let config = checked(config)?;
    let shared = Arc::new(Shared::default());
    let (inbox, inputs) = std_mpsc::channel();
    let (to_ship, ship_inputs) = std_mpsc::sync_channel(SHIP_INPUTS_MAX);
    let (me, dir) = (config.id, config.dir.clone());
    let cluster_id = config.cluster_id.clone();
    let (ship, out) = (to_ship.clone(), outgoing.clone());
    let parts = Parts { config, disk: disk.clone(), spawn, inputs, outgoing, ship, shared: shared.clone() };
    let (driver, status) = Driver::open(parts, machine, now)?;
    let tell = driver.background.tell.clone();
    let owner = Identity { cluster_id, node: me, log: driver.node.store().log() };
    let dock =
        Dock { me, disk, dir, owner, outgoing: out, shared: shared.clone(), status: status.clone(), decode: M::decode, tell };
    let (waiting, frame_bytes) = (Arc::new(Semaphore::new(WAITING_MAX)), Arc::new(Semaphore::new(FRAMES_QUEUED_BYTES_MAX)));
    let handle = RaftHandle { inbox, ship: to_ship, status, shared, waiting, frame_bytes };
    Ok(Assembled { handle, driver, ship: Ship::new(dock), ship_inputs })
}

/// The configuration with its founders sorted, if it is possible.
pub(super) fn checked(mut config: RaftConfig) -> Result<RaftConfig, RaftStartError> {
    let refuse = |what: &str| Err(RaftStartError::Config(what.into()));
    config.founders.sort_unstable();
    config.founders.dedup();
    let founds = config.founders.is_empty() || config.founders.contains(&config.id);
    if config.id == 0 || config.founders.contains(&0) || !founds || config.founders.len() > VOTERS_MAX {
        return refuse("founders must be 1 to 9 non-zero ids, this replica's among them, or none");
    }
    if config.cluster_id.is_empty() || config.cluster_id.len() > CLUSTER_ID_BYTES_MAX {
        return refuse("the cluster id must have 1 to 64 bytes");
    }
    if config.tick.is_zero() || config.log.entries_max == 0 {
        return refuse("the tick and the log's limits must not be zero");
    }
    Ok(config)
}

impl RaftHandle {
    /// A raft frame that the peer `from`, already authenticated, has sent. Malformed frames are dropped and counted,
    /// and so is everything while the queue is full.
    pub fn step(&self, from: u64, frame: &[u8]) {
        if ship::is_shipment(frame) {
            // What does not fit counts as lost, and is sent again.
            let _ = self.ship.try_send(ShipInput::Frame { peer: from, frame: frame.to_vec() });
            return;
        }
        let len = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        let Ok(bytes) = Arc::clone(&self.frame_bytes).try_acquire_many_owned(len) else { return };
        match message::decode(frame) {
            // Without its data it means nothing; with it, it comes as a shipment.
            Ok(message) if message.get_msg_type() == MessageType::MsgSnapshot => {
                self.shared.frames_refused.fetch_add(1, Ordering::Relaxed);
            }
            Ok(message) => drop(self.inbox.send(Input::Peer { peer: from, message, bytes })),
            Err(error) => {
                self.shared.frames_refused.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(from, %error, "raft frame refused");
            }
        }
    }

    /// Proposes a command; resolves with the state machine's answer once it is committed and applied here.
    ///
    /// # Errors
    /// See [`ProposeError`]; only `Lost` and `Stopped` leave open whether the command took effect.
    pub async fn propose(&self, command: Vec<u8>) -> Result<Vec<u8>, ProposeError> {
        if command.len() > COMMAND_BYTES_MAX {
            return Err(ProposeError::TooLarge { bytes: command.len() });
        }
        self.ask(|reply| Input::Propose { command, reply }).await
    }

    /// Changes the members, with a command that the state machine applies in the same entry; resolves with its answer once that is
    /// applied here. `seen` is the [`RaftStatus::members_index`] that the command is based on. Only the leader does it. A
    /// replacement ends a moment after the answer: until then the members are joint.
    ///
    /// # Errors
    /// [`ProposeError::Change`] when it cannot be, or not now; else as for [`RaftHandle::propose`].
    pub async fn change(&self, change: Change, seen: u64, command: Vec<u8>) -> Result<Vec<u8>, ProposeError> {
        if command.len() > CHANGE_COMMAND_BYTES_MAX {
            return Err(ProposeError::TooLarge { bytes: command.len() });
        }
        self.ask(|reply| Input::Change { change, seen, command, reply }).await
    }

    /// A peer, already authenticated, says that this replica is no member of the cluster. When more than half of the other voters
    /// say so, it stops: no single one can stop it.
    pub fn told_removed(&self, by: u64, why: String) {
        // A stopped replica needs not be told.
        let _ = self.inbox.send(Input::Removed { by, why });
    }

    /// A point for linearizable reads: everything acknowledged anywhere before this call is applied on this replica
    /// when it resolves. Works on any replica that has a leader. Gives the applied index.
    ///
    /// # Errors
    /// See [`ProposeError`]; a read has no effect, so all but `Stopped` may be tried again.
    pub async fn read_index(&self) -> Result<u64, ProposeError> {
        self.ask(|reply| Input::Read { reply }).await
    }

    async fn ask<T>(&self, input: impl FnOnce(Reply<T>) -> Input) -> Result<T, ProposeError> {
        let slot = Arc::clone(&self.waiting).try_acquire_owned().map_err(|_| ProposeError::Busy)?;
        let (to, answer) = oneshot::channel();
        self.inbox.send(input(Reply { to, _slot: slot })).map_err(|_| ProposeError::Stopped)?;
        answer.await.unwrap_or(Err(ProposeError::Stopped))
    }

    /// State as of the thread's last round.
    pub fn status(&self) -> RaftStatus {
        self.status.borrow().clone()
    }

    /// Follows the state; the channel closes when the replica has stopped and released its directory.
    pub fn watch_status(&self) -> watch::Receiver<RaftStatus> {
        self.status.clone()
    }

    /// Asks this replica, if it leads, to hand leadership to `to`. Proposals are dropped meanwhile. The outcome shows in
    /// the status.
    pub fn transfer_leader(&self, to: u64) {
        // A stopped replica has no leadership to hand over.
        let _ = self.inbox.send(Input::Transfer { to: Some(to) });
    }

    /// Asks this replica, if it leads, to hand leadership to the voter that has most of the log, if one is alive.
    pub fn hand_over(&self) {
        let _ = self.inbox.send(Input::Transfer { to: None });
    }

    /// Stops the replica at once. There is nothing to flush: whatever was acknowledged is already on disk, so a
    /// shutdown is a crash that nobody minds.
    pub fn shutdown(&self) {
        self.shared.halted.store(true, Ordering::Release);
        let _ = self.inbox.send(Input::Wake);
        let _ = self.ship.try_send(ShipInput::Wake);
    }

    /// Resolves when the replica has stopped and released its directory.
    pub async fn stopped(&self) {
        let mut status = self.watch_status();
        while status.changed().await.is_ok() {}
    }
}
