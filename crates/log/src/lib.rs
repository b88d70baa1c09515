//! Consensus: a replicated log of opaque commands, kept by three or five replicas, that survives `kill -9` of any of them.
//!
//! One thread per replica drives `raft` (raft-rs) and owns its log on disk. The coordinator talks to
//! it through a [`RaftHandle`]; what commands mean is the [`StateMachine`]'s business, and how frames travel is the
//! network's: the driver only emits `(peer, frame)` pairs and takes frames that came from an authenticated peer.
//!
//! Members change one at a time, by joint consensus where voters are exchanged ([`Change`]). The first voters are the log's
//! first entry; a replica that joins later starts with an empty log and learns everything, its own membership too,
//! from the leader. Each log has a random identity, so that an emptied disk can be told from the one that voted.
//!
//! What this crate does not do: it does not forward proposals (a follower answers
//! [`ProposeError::NotLeader`]), and it does not continue after a failed sync: the page cache can no longer be trusted then
//! (fsyncgate), so the replica stops and says so in its [`RaftStatus`]. A full disk alone does not stop it: it refuses writes until
//! there is room (`room`).
//!
//! Files: `driver` the thread and the handling of a `Ready` in documented order; `membership` when members may change and
//! what follows; `members` who they are; `clients` who waits for an answer; `admit` which peer messages may reach raft-rs, which
//! panics on impossible ones; `message` frames; `storage` the log in memory and on disk; `wal` and `snapshot` the two files over the
//! file layer `disk`; `codec` their bytes; `background` compaction beside the thread; `ship` snapshots between replicas, in chunks;
//! `room` the full disk; `stepped` a replica without threads, for simulators, and `testing` what their tests share; `bench` commits a second.

mod admit;
mod background;
pub mod bench;
mod clients;
mod codec;
pub mod disk;
mod driver;
mod found;
mod handle;
mod members;
mod membership;
mod message;
mod room;
mod ship;
mod snapshot;
mod stepped;
mod storage;
pub mod testing;
mod wal;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use bench::{BenchError, CommitBench, bench_commits};
pub use driver::Stop;
pub use found::found;
pub use handle::{RaftHandle, start};
pub use members::{Change, Members};
pub use stepped::Stepped;

/// Largest command of one proposal, in bytes; a larger one is refused with [`ProposeError::TooLarge`].
pub const COMMAND_BYTES_MAX: usize = 1 << 20;
/// Largest state machine snapshot that is sent to a lagging replica, in bytes. A larger one is kept on disk, but a
/// replica that needs it stays behind, and a peer that announces one is refused.
pub const SNAPSHOT_BYTES_MAX: u64 = 1 << 30;
/// Largest frame that the driver emits or accepts, in bytes: an append of the most and smallest entries stays below it.
pub const FRAME_BYTES_MAX: usize = 12 << 20;
/// Longest cluster id, in bytes.
pub const CLUSTER_ID_BYTES_MAX: usize = 64;
/// Most voters of one cluster; a change to more is refused.
pub const VOTERS_MAX: usize = 9;
/// Most learners of one cluster; a further one is refused.
pub const LEARNERS_MAX: usize = 16;
/// Committed entries that a learner may lack and still become a voter: some milliseconds of a busy log.
pub const CAUGHT_UP_ENTRIES_MAX: u64 = 256;

/// When the log is compacted into a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// A snapshot is taken when this many entries were applied since the last one.
    pub entries_max: u64,
    /// A snapshot is taken when this many bytes were appended since the last one.
    pub bytes_max: u64,
    /// Applied entries kept behind a snapshot, so that a replica that is a little behind needs no snapshot.
    pub entries_kept: u64,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { entries_max: 100_000, bytes_max: 256 << 20, entries_kept: 4_096 }
    }
}

/// What one replica is and where it keeps its log.
#[derive(Clone, Debug)]
pub struct RaftConfig {
    /// This replica; non-zero.
    pub id: u64,
    /// What a new log begins with: the first voters, the same list on each of them and this replica among it; or none, to
    /// join a cluster that there is. A log that exists knows its members.
    pub founders: Vec<u64>,
    /// Directory of the log and the snapshot, created if absent; one process at a time may hold it.
    pub dir: PathBuf,
    /// Names the cluster; data of another cluster is refused. At most [`CLUSTER_ID_BYTES_MAX`] bytes.
    pub cluster_id: String,
    /// Length of raft's unit of time.
    pub tick: Duration,
    /// A follower that hears nothing for `election_ticks..2 * election_ticks` ticks campaigns.
    pub election_ticks: usize,
    /// The leader sends a heartbeat every so many ticks.
    pub heartbeat_ticks: usize,
    /// When the log is compacted.
    pub log: LogLimits,
    /// Room held back on the disk, in bytes: enough for all that one round of the thread may have to persist after the
    /// disk has run full.
    pub reserve_bytes: u64,
}

impl RaftConfig {
    /// The usual timing: ticks of 20 ms and elections after 16 to 31 of them, so that a dead leader is replaced in
    /// about 0.3 to 0.7 s, and one that hears nobody, which has to notice first, in 0.7 to 1.3 s. A tie costs another 0.3 to 0.6 s, and
    /// is the rarer the more ticks there are.
    pub fn new(id: u64, founders: Vec<u64>, dir: PathBuf, cluster_id: impl Into<String>) -> Self {
        Self {
            id,
            founders,
            dir,
            cluster_id: cluster_id.into(),
            tick: Duration::from_millis(20),
            election_ticks: 16,
            heartbeat_ticks: 4,
            log: LogLimits::default(),
            reserve_bytes: 16 << 20,
        }
    }
}

/// What the log is for: the committed commands are applied to it, in order, once each, on every replica.
pub trait StateMachine: Send + 'static {
    /// A whole state, as of one entry of the log.
    type State: Send + 'static;

    /// Applies the command of log entry `index`; the answer goes to whoever proposed it, if it waits on this replica.
    /// Must be a function of the state and the command alone: every replica has to come to the same state.
    fn apply(&mut self, index: u64, command: &[u8]) -> Vec<u8>;

    /// The present state, for another thread to write down. The log waits for it, so it should be cheap.
    fn view(&self) -> Self::State;

    /// A state as bytes, from which [`StateMachine::decode`] makes it again. Called on a thread of its own.
    fn encode(state: &Self::State) -> Vec<u8>;

    /// The state of some bytes, which may come from a hostile peer. Called on a thread of its own.
    ///
    /// # Errors
    /// The bytes are no snapshot of this machine: what a peer sent is dropped, and a replica with such a file does not start.
    fn decode(bytes: &[u8]) -> Result<Self::State, RestoreError>;

    /// Replaces the whole state. The log waits for it.
    fn install(&mut self, state: Self::State);
}

/// Bytes that are no snapshot of the state machine, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a snapshot of this state machine: {0}")]
pub struct RestoreError(pub String);

/// Why a proposal or a read was not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// This replica does not lead; nothing was proposed. Ask `leader`, if one is known.
    #[error("not the leader (leader: {leader:?})")]
    NotLeader {
        /// The leader this replica follows.
        leader: Option<u64>,
    },
    /// Not taken up: leadership is being handed over, too much is uncommitted, or a read found no quorum in time.
    /// It had no effect and may be tried again.
    #[error("dropped without effect; try again")]
    Dropped,
    /// Leadership was lost while it was in flight: it may or may not be committed.
    #[error("leadership lost; the outcome is unknown")]
    Lost,
    /// The replica has stopped; a proposal in flight may or may not be committed.
    #[error("the replica has stopped")]
    Stopped,
    /// Too many proposals and reads are waiting already; this one had no effect.
    #[error("too many proposals are waiting")]
    Busy,
    /// The disk of the replica that leads is full; nothing was proposed. It hands leadership over if another can take it.
    #[error("the disk is full; no writes are taken")]
    DiskFull,
    /// The command is longer than [`COMMAND_BYTES_MAX`].
    #[error("a command of {bytes} bytes is over the limit of {COMMAND_BYTES_MAX}")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// The members cannot change like that, or not now; nothing was changed.
    #[error(transparent)]
    Change(#[from] ChangeError),
}

/// Why the members do not change. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// One change at a time.
    #[error("another change of the members is under way")]
    Pending,
    /// The members are not those that the asker saw.
    #[error("the members have changed meanwhile")]
    Outdated,
    /// It is one already.
    #[error("replica {0} is a member already")]
    Member(u64),
    /// It is none.
    #[error("replica {0} is not a member")]
    NoMember(u64),
    /// Only a learner can be promoted or take another's place.
    #[error("replica {0} is a voter already")]
    NoLearner(u64),
    /// Only a voter can be replaced or lead.
    #[error("replica {0} is not a voter")]
    NoVoter(u64),
    /// Nobody would be left to decide.
    #[error("replica {0} is the last voter")]
    LastVoter(u64),
    /// The leader cannot take itself out.
    #[error("replica {0} leads; it must hand leadership over first")]
    Leads(u64),
    /// The learner does not hear us.
    #[error("replica {0} does not answer")]
    Silent(u64),
    /// The learner does not hold the log yet.
    #[error("replica {id} is {entries} entries behind; at most {CAUGHT_UP_ENTRIES_MAX} are allowed")]
    Behind {
        /// The learner.
        id: u64,
        /// Committed entries that it lacks.
        entries: u64,
    },
    /// Too few of the voters that would be left are alive.
    #[error("only {alive} of the {voters} voters that would decide are alive")]
    QuorumAtRisk {
        /// How many are.
        alive: usize,
        /// How many there would be.
        voters: usize,
    },
    /// Such members cannot be.
    #[error("{0}")]
    Impossible(&'static str),
}

/// Why a replica did not start.
#[derive(Debug, thiserror::Error)]
pub enum RaftStartError {
    /// The configuration makes no sense.
    #[error("raft configuration: {0}")]
    Config(String),
    /// Another process holds the directory.
    #[error("{} is in use by another process", .dir.display())]
    Locked {
        /// The directory.
        dir: PathBuf,
    },
    /// The directory holds the data of another cluster.
    #[error("data of cluster {found:?} found where cluster {expected:?} was expected")]
    OtherCluster {
        /// Cluster id on disk.
        found: String,
        /// Cluster id of the configuration.
        expected: String,
    },
    /// The directory holds the data of another replica.
    #[error("data of replica {found} found where replica {expected} was expected")]
    OtherNode {
        /// Replica id on disk.
        found: u64,
        /// Replica id of the configuration.
        expected: u64,
    },
    /// The directory holds a snapshot that does not belong to its log.
    #[error("the snapshot belongs to another log of this replica")]
    OtherLog,
    /// Damaged data that is not the torn end of the last write. The replica must be rebuilt from the others.
    #[error("{} is corrupt at byte {offset}: {what}", .file.display())]
    Corrupt {
        /// The damaged file.
        file: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is wrong there.
        what: &'static str,
    },
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The state machine did not take its own snapshot.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// raft-rs refused the configuration or the stored state.
    #[error("raft: {0}")]
    Raft(#[from] raft::Error),
}

/// A file operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {op} {}: {source}", .path.display())]
pub struct DiskError {
    /// What was tried.
    pub op: &'static str,
    /// On which file.
    pub path: PathBuf,
    /// The answer of the operating system.
    #[source]
    pub source: std::io::Error,
}

/// Why a running replica stopped by itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RaftFailure {
    /// A write, fsync or rename failed. Nothing after the last successful fsync was promised to anybody.
    #[error("disk: {0}")]
    Disk(String),
    /// An invariant of raft or of this driver broke.
    #[error("invariant: {0}")]
    Invariant(String),
    /// This replica was taken out of the cluster; the text says why, or how it knows.
    #[error("not a member of the cluster: {0}")]
    Removed(String),
}

/// What a replica is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Follows a leader, or waits for one.
    Follower,
    /// Asks whether an election would succeed (PreVote).
    PreCandidate,
    /// Campaigns.
    Candidate,
    /// Leads its term.
    Leader,
    /// The thread has ended; see [`RaftStatus::failure`].
    Stopped,
}

/// What a leader knows of another member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerProgress {
    /// Who.
    pub id: u64,
    /// The last entry that it has acknowledged.
    pub matched: u64,
    /// Whether it was heard within the last election time-out.
    pub alive: bool,
}

/// State of one replica, as of the last round of its thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaftStatus {
    /// This replica.
    pub id: u64,
    /// Current term.
    pub term: u64,
    /// Current role.
    pub role: Role,
    /// The leader of the term, if known.
    pub leader: Option<u64>,
    /// Last entry applied to the state machine.
    pub applied: u64,
    /// Last entry known to be committed.
    pub committed: u64,
    /// Last entry of the log.
    pub last_index: u64,
    /// First entry of the log; those before it live on only in the snapshot.
    pub first_index: u64,
    /// Last entry inside the newest snapshot on disk; 0 without one.
    pub snapshot_index: u64,
    /// All members, as applied here; nobody before this replica has joined.
    pub members: Arc<Members>,
    /// Entry of the last change of the members; 0 when that lies inside the snapshot.
    pub members_index: u64,
    /// What the leader knows of the others, by id; empty on other replicas.
    pub peers: Arc<[PeerProgress]>,
    /// Random number of this replica's log, drawn when it was created.
    pub log: u128,
    /// Frames from peers that were malformed or impossible and did not reach raft.
    pub frames_refused: u64,
    /// Messages to peers dropped because the outgoing queue was full.
    pub sends_dropped: u64,
    /// The disk is full: this replica takes no entries until there is room again. It votes and answers for what it has applied.
    pub disk_full: bool,
    /// Why the replica stopped, if it did so by itself.
    pub failure: Option<RaftFailure>,
}
