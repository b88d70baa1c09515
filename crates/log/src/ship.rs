//! Snapshots between replicas: in chunks, with a window of chunks that are not acknowledged, over the links that carry raft's frames.
//!
//! raft-rs sees a `MsgSnapshot` without data. On the leader it goes to this thread instead of the network; on the follower it
//! comes out of this thread, when the data lies in a finished file and has been read whole. Between the two:
//! ```text
//! leader  Begin{id, bytes, checksum, MsgSnapshot} ->   follower: takes it from the leader of its term only, one at a time
//!         <- Ack{offset}                               how much is there; also the answer to a Begin that is repeated
//!         Chunk{offset, data} ->                       CHUNK_BYTES each, WINDOW_CHUNKS ahead of the last Ack
//!         <- Ack{taken | refused | unknown}            unknown: begin again, the follower has restarted
//! ```
//! What is lost is sent again from the last acknowledged byte on; a link that comes back goes on where it was. Both ends hold a chunk
//! or a few in memory, the rest is in files; the window is small, so that heartbeats on the same link wait for little. Every state ends by
//! itself: the sender gives up ([`SnapshotStatus::Failure`], after which raft begins anew), the receiver drops what nobody continues.

mod frame;
mod receive;
mod send;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use raft::SnapshotStatus;
use raft::eraftpb::Message;
use tokio::sync::{mpsc, watch};

use super::background::Done;
use super::disk::Disk;
use super::handle::Shared;
use super::wal::Identity;
use super::{RaftStatus, RestoreError};

use frame::{Frame, Verdict};
use receive::Inbound;
use send::Outbound;

pub(super) use frame::is_shipment;

/// Data of one chunk, in bytes.
const CHUNK_BYTES: usize = 256 << 10;
/// Chunks that may be on their way to one follower without an acknowledgement.
const WINDOW_CHUNKS: u64 = 4;
/// Inputs that may wait for the thread; a frame more is dropped, as if lost.
pub(super) const SHIP_INPUTS_MAX: usize = 64;
/// How often the thread looks at its deadlines while anything is on its way.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// What the thread is told.
pub(super) enum ShipInput {
    /// raft wants this snapshot sent: a `MsgSnapshot` without data.
    Send(Message),
    /// A frame of the authenticated `peer`.
    Frame { peer: u64, frame: Vec<u8> },
    /// Look whether the replica has stopped.
    Wake,
}

/// What both directions need of the replica.
pub(super) struct Dock<S> {
    pub me: u64,
    pub disk: Arc<dyn Disk>,
    pub dir: PathBuf,
    pub owner: Identity,
    pub outgoing: mpsc::Sender<(u64, Vec<u8>)>,
    pub shared: Arc<Shared>,
    pub status: watch::Receiver<RaftStatus>,
    pub decode: fn(&[u8]) -> Result<S, RestoreError>,
    pub tell: Sender<Done<S>>,
}

impl<S> Dock<S> {
    /// Sends if there is room; what is not sent is repeated by whoever waits for it.
    fn send(&self, to: u64, frame: &Frame<'_>) -> bool {
        self.outgoing.try_send((to, frame::encode(frame))).is_ok()
    }

    fn answer(&self, to: u64, id: u64, verdict: Verdict) {
        self.send(to, &Frame::Ack { id, verdict });
    }

    fn refuse(&self) {
        self.shared.frames_refused.fetch_add(1, Ordering::Relaxed);
    }
}

/// All shipments of one replica.
pub(super) struct Ship<S> {
    dock: Dock<S>,
    /// By receiver.
    outbound: BTreeMap<u64, Outbound>,
    inbound: Option<Inbound>,
    /// The last shipment that was taken: its last acknowledgement may be lost.
    taken: Option<(u64, u64)>,
}

impl<S> Ship<S> {
    pub fn new(dock: Dock<S>) -> Self {
        Self { dock, outbound: BTreeMap::new(), inbound: None, taken: None }
    }

    /// Serves until the replica stops.
    pub fn run(mut self, inputs: &Receiver<ShipInput>) {
        while !self.dock.shared.halted.load(Ordering::Acquire) {
            let idle = self.outbound.is_empty() && self.inbound.is_none();
            let input = match idle {
                true => inputs.recv().map_err(|_| RecvTimeoutError::Disconnected),
                false => inputs.recv_timeout(LOOK_INTERVAL),
            };
            match input {
                Ok(input) => self.handle(Instant::now(), input),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.look(Instant::now());
        }
    }

    /// Takes one input.
    pub fn handle(&mut self, now: Instant, input: ShipInput) {
        match input {
            ShipInput::Send(message) => self.begin(now, message),
            ShipInput::Frame { peer, frame } => match frame::decode(&frame) {
                Some(frame) => self.on_frame(now, peer, &frame),
                None => self.dock.refuse(),
            },
            ShipInput::Wake => {}
        }
    }

    fn on_frame(&mut self, now: Instant, peer: u64, frame: &Frame<'_>) {
        match *frame {
            Frame::Begin { id, total, crc, message } => self.on_begin(now, peer, (id, total, crc), message),
            Frame::Chunk { id, offset, data } => self.on_chunk(now, (peer, id), offset, data),
            Frame::Ack { id, verdict } => self.on_ack(now, peer, id, verdict),
        }
    }

    /// Repeats what was lost and gives up what is hopeless.
    pub fn look(&mut self, now: Instant) {
        self.look_outbound(now);
        self.look_inbound(now);
    }

    fn report(&self, peer: u64, status: SnapshotStatus) {
        // A replica that has stopped does not mind.
        let _ = self.dock.tell.send(Done::Sent { peer, status });
    }
}
