//! The way of a command into the log from any replica: proposed here by the leader, passed to the leader by a follower.

use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_core::cluster::{self, Answer, Command};
use millrace_core::ids::ReplicaId;
use millrace_core::message::Join;

use crate::nodes::Nodes;
use crate::replicas::{CallError, Replicas};
use crate::roster::Roster;
use crate::state::SharedCluster;
use millrace_log::{ProposeError, RaftHandle};

/// How long a command may take to be applied.
pub const COMMIT_WAIT_MAX: Duration = Duration::from_secs(3);
/// How long a follower waits for the leader's answer: a little longer.
pub const FORWARD_WAIT_MAX: Duration = Duration::from_secs(4);

/// Why a command has no answer of the state machine. It may be tried again; it may also have taken effect unless said otherwise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// Nothing was proposed.
    #[error("there is no leader now")]
    NoLeader,
    /// Nothing was proposed: the leader's rule is against it for now.
    #[error("{0}")]
    NotNow(String),
    /// Raft gave no answer.
    #[error(transparent)]
    Raft(#[from] ProposeError),
    /// The leader gave no answer.
    #[error(transparent)]
    Forward(#[from] CallError),
    /// It was not applied in time: a quorum is missing.
    #[error("not committed in time: no quorum?")]
    Timeout,
    /// An answer that cannot be read.
    #[error("answer: {0}")]
    Answer(String),
}

/// Proposes commands.
#[derive(Clone)]
pub struct Proposer {
    /// This replica.
    pub me: ReplicaId,
    /// Its log.
    pub raft: RaftHandle,
    /// The others.
    pub replicas: Arc<Replicas>,
    /// Who lives, for the rule about joins.
    pub nodes: Arc<Nodes>,
    /// The applied state.
    pub cluster: SharedCluster,
    /// Who the others are.
    pub roster: Arc<Roster>,
}

impl Proposer {
    /// Puts a command into the log and gives the state machine's answer.
    ///
    /// # Errors
    /// See [`NoAnswer`].
    pub async fn propose(&self, command: &Command) -> Result<Answer, NoAnswer> {
        let bytes = cluster::encode(command);
        let answer = match self.raft.status().leader {
            Some(leader) if leader != self.me.0 => self.replicas.forward(ReplicaId(leader), bytes, FORWARD_WAIT_MAX).await?,
            Some(_) => self.propose_here(command, bytes).await?,
            None => return Err(NoAnswer::NoLeader),
        };
        cluster::decode_answer(&answer).map_err(|e| NoAnswer::Answer(e.to_string()))
    }

    /// Answers a command that the replica `from` passed on. A replica speaks of itself only for itself.
    ///
    /// # Errors
    /// For that replica, in words.
    pub async fn forwarded(&self, from: ReplicaId, bytes: Vec<u8>) -> Result<Vec<u8>, String> {
        let command = cluster::decode(&bytes).map_err(|e| e.to_string())?;
        if matches!(&command, Command::Enroll { replica, .. } | Command::Announce { replica, .. } if *replica != from) {
            return Err(format!("replica {from} speaks for another"));
        }
        self.propose_here(&command, bytes).await.map_err(|e| e.to_string())
    }

    async fn propose_here(&self, command: &Command, bytes: Vec<u8>) -> Result<Vec<u8>, NoAnswer> {
        if let Command::Join(join) = command
            && let Some(reason) = name_is_held(&self.nodes, &self.cluster, Instant::now(), join)
        {
            return Err(NoAnswer::NotNow(reason));
        }
        match command {
            // What changes the members goes with a change of raft's, in one entry.
            Command::Members(_) => return Err(NoAnswer::NotNow("the members change by an operator's query only".into())),
            Command::Enroll { replica, .. } if !self.raft.status().members.contains(replica.0) => {
                return Err(NoAnswer::NotNow(format!("replica {replica} is not a member")));
            }
            _ => {}
        }
        match tokio::time::timeout(COMMIT_WAIT_MAX, self.raft.propose(bytes)).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(NoAnswer::Timeout),
        }
    }
}

/// Whether another live process has the name that `join` wants: then it is not proposed, because the log would take
/// the name from that one.
#[must_use]
pub fn name_is_held(nodes: &Nodes, cluster: &SharedCluster, now: Instant, join: &Join) -> Option<String> {
    let holder = nodes.live_other(now, &join.name, join.instance)?;
    let pid = cluster.read().node_named(&join.name).filter(|n| n.instance == holder.instance).map(|n| n.pid);
    let pid = pid.map_or_else(|| "unknown pid".into(), |pid| format!("pid {pid}"));
    let heard = holder.silent.as_millis();
    Some(format!("identity {} is held by a live process ({pid}, last heard {heard} ms ago)", join.name))
}
