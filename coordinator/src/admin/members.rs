//! Operators' changes of the members: who may come, vote, go, and lead.
//!
//! Any replica is asked; the leader does it. A change goes through the log as one entry that changes who decides and what the
//! state knows of the replicas. One at a time: another is a conflict. A leader that is to go hands leadership over first, and its
//! successor takes it out. What is wrong is said with the word that `millctl` makes an exit code of.

use std::time::{Duration, Instant};

use millrace_core::cluster::{self, Answer, Command, MemberChange};
use millrace_core::ids::ReplicaId;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Admin;
use crate::propose::COMMIT_WAIT_MAX;
use millrace_log::{Change, ChangeError, ProposeError, RaftStatus, Role};

/// Time that a change may take, the hand-over of leadership before it included.
pub const CHANGE_WAIT_MAX: Duration = Duration::from_secs(6);
/// Time that the leader has to answer a question that was passed on: longer than a change may take there.
const PASSED_ON_WAIT_MAX: Duration = Duration::from_secs(8);
/// Pause before something is tried again that is about to be possible.
const PAUSE: Duration = Duration::from_millis(50);

/// What a replica says that does not lead any more: the one that was asked first looks for the leader again.
const MOVED: &str = "unavailable: leadership has moved; try again";

/// A change of the members, or of who leads. Replicas go by name or number.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub(super) enum MembersOp {
    /// A learner: by `id`, or by a name that ends in it.
    Add {
        name: String,
        address: String,
    },
    Promote {
        member: String,
    },
    Remove {
        member: String,
    },
    Replace {
        old: String,
        new: String,
    },
    /// To the voter that has most of the log if nobody is named.
    TransferLeader {
        to: Option<String>,
    },
}

impl Admin {
    /// Who the members are.
    pub(super) async fn members_list(&self, fresh: bool) -> Value {
        let mut status = self.status_as(fresh).await;
        status["joint"] = json!(self.proposer.raft.status().members.is_joint());
        if let Some(fields) = status.as_object_mut() {
            fields.remove("nodes");
        }
        status
    }

    /// The whole cluster; says when a quorum has vouched for it.
    pub(super) async fn status_as(&self, fresh: bool) -> Value {
        let mut status = self.status().await;
        if fresh {
            (status["fresh"], status["stale"]) = (json!(true), json!(false));
        }
        status
    }

    /// Waits until all that was acknowledged before now is applied here.
    pub(super) async fn freshen(&self) -> Result<(), String> {
        let until = Instant::now() + COMMIT_WAIT_MAX;
        loop {
            let wait = until.saturating_duration_since(Instant::now());
            let error = match tokio::time::timeout(wait, self.proposer.raft.read_index()).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no quorum answers".into(),
            };
            if Instant::now() + PAUSE >= until {
                return Err(format!("unavailable: nothing fresh can be known: {error}"));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Carries out a change here if this replica leads, else lets the leader do it, unless it was passed on here.
    pub(super) async fn members_op(&self, op: &MembersOp, passed_on: bool) -> Result<Value, String> {
        let until = Instant::now() + CHANGE_WAIT_MAX;
        loop {
            let status = self.proposer.raft.status();
            let error = match status.leader.map(ReplicaId) {
                None => "unavailable: there is no leader now".to_owned(),
                Some(leader) if leader != self.proposer.me && passed_on => return Err(MOVED.into()),
                Some(leader) if leader != self.proposer.me => match self.pass_on(leader, op).await {
                    Err(reason) if reason == MOVED => reason,
                    answer => return answer,
                },
                Some(_) => match self.lead_op(op).await {
                    Ok(answer) => return Ok(answer),
                    Err(Refused::ForGood(reason)) => return Err(reason),
                    Err(Refused::ForNow(reason)) => reason,
                },
            };
            if Instant::now() >= until {
                return Err(error);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn pass_on(&self, leader: ReplicaId, op: &MembersOp) -> Result<Value, String> {
        let mut query = op.json();
        (query["q"], query["passed_on"]) = (json!("members"), json!(true));
        match self.proposer.replicas.query(leader, query.to_string(), PASSED_ON_WAIT_MAX).await {
            Ok(text) => serde_json::from_str(&text).map_err(|e| format!("the leader's answer: {e}")),
            Err(crate::replicas::CallError::Refused(reason)) => Err(reason),
            Err(error) => Err(format!("unavailable: {error}")),
        }
    }

    async fn lead_op(&self, op: &MembersOp) -> Result<Value, Refused> {
        let status = self.proposer.raft.status();
        if let MembersOp::TransferLeader { to } = op {
            let to = to.as_deref().map(|to| self.replica(to)).transpose()?;
            return self.transfer_leader(&status, to).await;
        }
        let change = self.change_of(op)?;
        let _one = self.proposer.roster.changing.try_lock().map_err(|_| Refused::conflict(&ChangeError::Pending))?;
        self.proposer.cluster.read().may_change(&change).map_err(|reason| Refused::ForGood(format!("conflict: {reason}")))?;
        let command = cluster::encode(&Command::Members(change.clone()));
        let asked = self.proposer.raft.change(raft_change(&change), status.members_index, command);
        let answer = match tokio::time::timeout(COMMIT_WAIT_MAX, asked).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(self.not_changed(error)),
            Err(_) => return Err(Refused::ForGood("unavailable: not committed in time: no quorum?".into())),
        };
        match cluster::decode_answer(&answer) {
            Ok(Answer::Done) => self.changed(&change).await,
            Ok(Answer::Refused(reason)) => Err(Refused::ForGood(format!("conflict: {reason}"))),
            other => Err(Refused::ForGood(format!("unexpected answer {other:?}"))),
        }
    }

    /// Waits for the end of a joint state, so that nobody is told that a voter is replaced while it is still needed.
    async fn changed(&self, change: &MemberChange) -> Result<Value, Refused> {
        let mut status = self.proposer.raft.watch_status();
        let over = tokio::time::timeout(COMMIT_WAIT_MAX, status.wait_for(|status| !status.members.is_joint())).await;
        let members = match over {
            Ok(Ok(status)) => status.members.clone(),
            _ => {
                return Err(Refused::ForGood(
                    "unavailable: the old voters are still needed: too few of the new ones answer".into(),
                ));
            }
        };
        let id = match change {
            MemberChange::Add { replica, .. } | MemberChange::Promote { replica } | MemberChange::Remove { replica } => replica,
            MemberChange::Replace { new, .. } => new,
        };
        let names = |ids: &[u64]| ids.iter().map(|id| self.name_of(ReplicaId(*id))).collect::<Vec<_>>();
        let role = match (members.is_learner(id.0), members.is_voter(id.0)) {
            (true, _) => "learner",
            (_, true) => "voter",
            _ => "removed",
        };
        let (voters, learners) = (names(&members.voters), names(&members.learners));
        Ok(json!({"member": self.name_of(*id), "id": id.0, "role": role, "voters": voters, "learners": learners}))
    }

    async fn transfer_leader(&self, status: &RaftStatus, to: Option<ReplicaId>) -> Result<Value, Refused> {
        match to {
            Some(to) if to == self.proposer.me => {}
            Some(to) if !status.members.contains(to.0) => return Err(self.not_changed(ChangeError::NoMember(to.0).into())),
            Some(to) if status.members.voters.binary_search(&to.0).is_err() => {
                return Err(Refused::conflict(&ChangeError::NoVoter(to.0)));
            }
            Some(to) if !status.peers.iter().any(|peer| peer.id == to.0 && peer.alive) => {
                return Err(Refused::conflict(&ChangeError::Silent(to.0)));
            }
            Some(to) => self.proposer.raft.transfer_leader(to.0),
            None => self.proposer.raft.hand_over(),
        }
        let heir = |status: &RaftStatus| match to {
            Some(to) => status.leader == Some(to.0),
            None => status.role != Role::Leader && status.leader.is_some(),
        };
        let mut watched = self.proposer.raft.watch_status();
        match tokio::time::timeout(COMMIT_WAIT_MAX, watched.wait_for(heir)).await {
            Ok(Ok(status)) => Ok(json!({"leader": status.leader.map(|id| self.name_of(ReplicaId(id)))})),
            _ => Err(Refused::ForGood("timeout: nobody took the leadership over".into())),
        }
    }

    fn not_changed(&self, error: ProposeError) -> Refused {
        match error {
            ProposeError::Change(ChangeError::Leads(_)) => {
                self.proposer.raft.hand_over();
                Refused::ForNow("unavailable: the leader is to go and nobody takes over".into())
            }
            ProposeError::Change(ChangeError::NoMember(id)) => {
                Refused::ForGood(format!("not found: member {}", self.name_of(ReplicaId(id))))
            }
            ProposeError::Change(ChangeError::Outdated) | ProposeError::Dropped | ProposeError::NotLeader { .. } => {
                Refused::ForNow(format!("unavailable: {error}"))
            }
            ProposeError::Change(error) => Refused::conflict(&error),
            error => Refused::ForGood(format!("unavailable: {error}")),
        }
    }

    fn change_of(&self, op: &MembersOp) -> Result<MemberChange, Refused> {
        Ok(match op {
            MembersOp::Add { name, address } => {
                address
                    .parse::<std::net::SocketAddr>()
                    .map_err(|e| Refused::ForGood(format!("usage: address {address:?}: {e}")))?;
                let replica = self.config.replica_of(name).ok_or_else(|| {
                    let like = self.config.replica_name(self.proposer.cluster.read().next_replica());
                    Refused::ForGood(format!("usage: replicas' names end in their numbers, like {like}"))
                })?;
                MemberChange::Add { replica, name: name.clone(), address: address.clone() }
            }
            MembersOp::Promote { member } => MemberChange::Promote { replica: self.replica(member)? },
            MembersOp::Remove { member } => MemberChange::Remove { replica: self.replica(member)? },
            MembersOp::Replace { old, new } => MemberChange::Replace { old: self.replica(old)?, new: self.replica(new)? },
            MembersOp::TransferLeader { .. } => return Err(Refused::ForGood("usage: not a change of the members".into())),
        })
    }

    /// A replica by its name or number.
    fn replica(&self, text: &str) -> Result<ReplicaId, Refused> {
        let numbered = text.parse().ok().map(ReplicaId);
        numbered.or_else(|| self.proposer.roster.id_of(text)).ok_or_else(|| Refused::ForGood(format!("not found: member {text:?}")))
    }

    pub(super) fn name_of(&self, id: ReplicaId) -> String {
        self.proposer.cluster.read().member(id).map_or_else(|| self.config.replica_name(id), |member| member.name.clone())
    }
}

/// Why a change is not made.
enum Refused {
    /// It may be possible in a moment.
    ForNow(String),
    /// For the operator.
    ForGood(String),
}

impl Refused {
    fn conflict(error: &ChangeError) -> Self {
        Self::ForGood(format!("conflict: {error}"))
    }
}

fn raft_change(change: &MemberChange) -> Change {
    match change {
        MemberChange::Add { replica, .. } => Change::AddLearner(replica.0),
        MemberChange::Promote { replica } => Change::Promote(replica.0),
        MemberChange::Remove { replica } => Change::Remove(replica.0),
        MemberChange::Replace { old, new } => Change::Replace { old: old.0, new: new.0 },
    }
}

impl MembersOp {
    fn json(&self) -> Value {
        match self {
            Self::Add { name, address } => json!({"op": "add", "name": name, "address": address}),
            Self::Promote { member } => json!({"op": "promote", "member": member}),
            Self::Remove { member } => json!({"op": "remove", "member": member}),
            Self::Replace { old, new } => json!({"op": "replace", "old": old, "new": new}),
            Self::TransferLeader { to } => json!({"op": "transfer_leader", "to": to}),
        }
    }
}
