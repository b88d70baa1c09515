//! Who the other replicas are, what they are called, where they listen, and whom this replica does not speak to.
//!
//! The log knows all that; until it does, the command line counts. A replica whose log is not the one that is enrolled under
//! its number is not spoken to: its disk was emptied or exchanged, it may have voted before and does not know it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use millrace_core::cluster::{Cluster, Estranged};
use millrace_core::ids::ReplicaId;
use millrace_core::message::{REPLICAS_TOLD_MAX, ReplicaAddress};
use parking_lot::Mutex;

use crate::config::Config;
use crate::state::SharedCluster;
use millrace_log::RaftHandle;

/// Where another replica is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its name, as its certificate says.
    pub name: String,
    /// Where its QUIC endpoint listens; `None` when what is known is no address.
    pub addr: Option<SocketAddr>,
}

/// All that this replica knows of the others.
pub struct Roster {
    config: Config,
    raft: RaftHandle,
    cluster: SharedCluster,
    /// Logs of members that were met and are not enrolled yet: the first one counts.
    met: Mutex<BTreeMap<ReplicaId, u128>>,
    /// Held while this replica changes the members: an operator's second change is refused.
    pub changing: tokio::sync::Mutex<()>,
}

impl Roster {
    /// What the command line and the applied state say.
    #[must_use]
    pub fn new(config: Config, raft: RaftHandle, cluster: SharedCluster) -> Self {
        Self { config, raft, cluster, met: Mutex::default(), changing: tokio::sync::Mutex::default() }
    }

    /// The other replicas: the members, or before this one has joined those of the command line.
    #[must_use]
    pub fn others(&self) -> BTreeMap<ReplicaId, Place> {
        let members = self.raft.status().members;
        let cluster = self.cluster.read();
        let ids: BTreeSet<ReplicaId> = match members.voters.is_empty() {
            true => self.config.others.keys().copied().collect(),
            false => members.ids().into_iter().map(ReplicaId).collect(),
        };
        let others = ids.into_iter().filter(|id| *id != self.config.me && !cluster.was_removed(*id));
        others.map(|id| (id, self.place(&cluster, id))).collect()
    }

    fn place(&self, cluster: &Cluster, id: ReplicaId) -> Place {
        let member = cluster.member(id);
        let name = member.map_or_else(|| self.config.replica_name(id), |member| member.name.clone());
        let addr = member.and_then(|member| member.address.parse().ok());
        Place { name, addr: addr.or_else(|| self.config.others.get(&id).copied()) }
    }

    /// The number of the replica of this name. One that nobody has heard of yet gets the number that its name ends in.
    #[must_use]
    pub fn id_of(&self, name: &str) -> Option<ReplicaId> {
        let cluster = self.cluster.read();
        if let Some((id, _)) = cluster.members().find(|(_, member)| member.name == name) {
            return Some(id);
        }
        self.config.replica_of(name).filter(|id| cluster.member(*id).is_none())
    }

    /// Whether a replica with this log may be spoken to.
    ///
    /// # Errors
    /// Why not, and what to do about it.
    pub fn judge(&self, id: ReplicaId, log: u128) -> Result<(), String> {
        let cluster = self.cluster.read();
        let (name, free) = (self.place(&cluster, id).name, cluster.next_replica());
        let next = self.config.replica_name(free);
        let estranged = cluster.estranged(id, log);
        drop(cluster);
        let member = self.raft.status().members.contains(id.0);
        let met = member.then(|| *self.met.lock().entry(id).or_insert(log));
        match estranged {
            Some(Estranged::Removed) => Err(format!(
                "{name} was removed from the cluster and its number is not given again; add a replica with an empty folder as \
                 `millctl members add {next} --address IP:PORT`"
            )),
            None if met.is_none_or(|met| met == log) => Ok(()),
            _ => Err(format!(
                "the log of {name} is not the one that is a member: its folder was emptied or exchanged, and it may have voted \
                 before; replace it with `millctl members replace {name} {next} --address IP:PORT`"
            )),
        }
    }

    /// Whether the replica was a member and is none any more.
    #[must_use]
    pub fn was_removed(&self, id: ReplicaId) -> bool {
        self.cluster.read().was_removed(id)
    }

    /// Where all replicas are, for nodes: their command line names those that there were when they were started. `None` while this
    /// replica has not joined: it knows no better then.
    #[must_use]
    pub fn told(&self) -> Option<Vec<ReplicaAddress>> {
        if self.raft.status().members.voters.is_empty() {
            return None;
        }
        let others = self.others();
        let mut all: Vec<_> = others.into_iter().filter_map(|(id, place)| Some((id, place.addr?))).collect();
        if self.raft.status().members.contains(self.config.me.0) {
            all.push((self.config.me, self.config.quic()));
        }
        all.truncate(REPLICAS_TOLD_MAX);
        Some(all.into_iter().map(|(replica, addr)| ReplicaAddress { replica, address: addr.to_string() }).collect())
    }
}
