//! The coordinator's replicas as the log describes them: what each is called, where it listens, and which log is its own.
//!
//! Who votes is decided by the consensus layer, which changes in the same entries as this. A number is never given twice: one that
//! was taken out stays taken out. The first log that is enrolled under a number is the only one, so that a replica whose
//! disk was emptied, and which may have voted before, is told from the one that it was.

use alloc::format;
use alloc::string::String;
use rkyv::{Archive, Deserialize, Serialize};

use super::{Answer, Cluster, REPLICAS_MAX};
use crate::ids::ReplicaId;

/// Numbers that may ever be used by replicas; a further replica is refused.
pub const REPLICA_NUMBERS_MAX: usize = 4096;

/// A replica of the coordinator, as a member of the cluster.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name, as its certificate says.
    pub name: String,
    /// Where its QUIC endpoint listens, `ip:port`.
    pub address: String,
    /// The identity of its log; `None` until it has told.
    pub log: Option<u128>,
}

/// What an operator changes about the members.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum MemberChange {
    /// A replica that will follow the log. It is started afterwards.
    Add {
        /// Its number.
        replica: ReplicaId,
        /// Its name, as its certificate says.
        name: String,
        /// Where its QUIC endpoint will listen, `ip:port`.
        address: String,
    },
    /// It may vote.
    Promote {
        /// Who.
        replica: ReplicaId,
    },
    /// It is no member any more.
    Remove {
        /// Who.
        replica: ReplicaId,
    },
    /// One is no member any more, and another votes in its place.
    Replace {
        /// Who goes.
        old: ReplicaId,
        /// Who comes.
        new: ReplicaId,
    },
}

impl MemberChange {
    /// Who is no member after it.
    #[must_use]
    pub const fn removes(&self) -> Option<ReplicaId> {
        match self {
            Self::Remove { replica } | Self::Replace { old: replica, .. } => Some(*replica),
            Self::Add { .. } | Self::Promote { .. } => None,
        }
    }
}

/// Why a replica is not spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Estranged {
    /// It was taken out.
    Removed,
    /// Another log is enrolled under its number.
    OtherLog,
}

impl Cluster {
    /// The replicas that are members and enrolled or were added, by number. Founders are here once they enrolled.
    pub fn members(&self) -> impl Iterator<Item = (ReplicaId, &Member)> {
        self.members.iter().map(|(id, member)| (*id, member))
    }

    /// A member by its number.
    #[must_use]
    pub fn member(&self, replica: ReplicaId) -> Option<&Member> {
        self.members.get(&replica)
    }

    /// Whether the replica was a member and is none any more.
    #[must_use]
    pub fn was_removed(&self, replica: ReplicaId) -> bool {
        self.removed.contains(&replica)
    }

    /// The lowest number that no replica had and that is above all that had one.
    #[must_use]
    pub fn next_replica(&self) -> ReplicaId {
        let highest = [self.members.keys().next_back(), self.removed.last()].into_iter().flatten().max();
        ReplicaId(highest.map_or(1, |id| id.0.saturating_add(1)))
    }

    /// Whether a replica with this log may be spoken to.
    #[must_use]
    pub fn estranged(&self, replica: ReplicaId, log: u128) -> Option<Estranged> {
        if self.was_removed(replica) {
            return Some(Estranged::Removed);
        }
        let enrolled = self.members.get(&replica)?.log?;
        (enrolled != log).then_some(Estranged::OtherLog)
    }

    /// Forgets all replicas, for a state that is put into new logs: none of the old ones is a member of what begins there.
    pub fn forget_replicas(&mut self) {
        self.members.clear();
        self.removed.clear();
        self.replicas.clear();
    }

    /// Whether a change would be taken. The leader asks before it proposes one, and proposes one at a time.
    ///
    /// # Errors
    /// Why not, for the operator.
    pub fn may_change(&self, change: &MemberChange) -> Result<(), String> {
        let MemberChange::Add { replica, name, address } = change else { return Ok(()) };
        super::apply::text("name", name)?;
        super::apply::text("address", address)?;
        if self.was_removed(*replica) {
            return Err(format!("replica {replica} was removed, and a number is not given twice; {} is free", self.next_replica()));
        }
        if let Some((other, _)) = self.members().find(|(id, member)| member.name == *name && id != replica) {
            return Err(format!("the name {name:?} is replica {other}'s"));
        }
        if self.members.len() >= REPLICAS_MAX || self.members.len() + self.removed.len() >= REPLICA_NUMBERS_MAX {
            return Err(format!("there are {REPLICAS_MAX} replicas, or {REPLICA_NUMBERS_MAX} numbers are used up"));
        }
        Ok(())
    }

    /// The consensus layer has changed; this follows.
    pub(super) fn change_members(&mut self, change: &MemberChange) -> Answer {
        if let Err(reason) = self.may_change(change) {
            return Answer::Refused(reason);
        }
        if let MemberChange::Add { replica, name, address } = change {
            let member = Member { name: name.clone(), address: address.clone(), log: None };
            self.members.insert(*replica, member);
        }
        if let Some(gone) = change.removes() {
            self.members.remove(&gone);
            self.replicas.remove(&gone);
            if self.removed.len() < REPLICA_NUMBERS_MAX {
                self.removed.insert(gone);
            }
        }
        Answer::Done
    }

    /// A replica says which log is its own. The first word counts.
    pub(super) fn enroll(&mut self, replica: ReplicaId, said: &Member) -> Answer {
        let fits = super::apply::text("name", &said.name).and_then(|()| super::apply::text("address", &said.address));
        if let Err(reason) = fits {
            return Answer::Refused(reason);
        }
        let full = self.members.len() >= REPLICAS_MAX && !self.members.contains_key(&replica);
        if full || self.was_removed(replica) {
            return Answer::Refused(format!("replica {replica} is not a member"));
        }
        let known = self.members.get(&replica).and_then(|member| member.log);
        if known.is_some_and(|log| Some(log) != said.log) {
            return Answer::Refused(format!("another log is enrolled as replica {replica}"));
        }
        self.members.insert(replica, said.clone());
        Answer::Done
    }

    pub(super) fn validate_replicas(&self) -> Result<(), &'static str> {
        if self.members.len() > REPLICAS_MAX || self.removed.len() > REPLICA_NUMBERS_MAX {
            return Err("too many members");
        }
        if self.members.keys().any(|id| self.removed.contains(id)) {
            return Err("a member was removed");
        }
        Ok(())
    }
}
