//! Whether the replicas are still equal. Each notes the checksum of its state after the same entries, says it through the log, and all
//! hear the same: a replica whose checksum is not that of the majority knows it, and so do the others.
//!
//! What is noted here is not part of the state: it is in no snapshot, and a replica that was restored begins anew. It is bounded by
//! [`NOTED_MAX`]. What is done about a difference is the shell's: it stops the replica.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use super::{Cluster, codec};
use crate::ids::ReplicaId;

/// How a checksum is computed. Replicas of two programs compare only what they compute alike: raise it with every change of
/// [`Cluster::checksum`].
const METHOD: u16 = 1;
/// Entries whose checksums are remembered.
const NOTED_MAX: usize = 32;

/// The state after one entry, in short.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// How it was computed.
    pub method: u16,
    /// The entry.
    pub index: u64,
    /// XXH3-128.
    pub sum: u128,
}

/// What this replica noted and what all said.
#[derive(Clone, Debug, Default)]
pub struct Audit {
    own: VecDeque<Checksum>,
    heard: BTreeMap<u64, Vec<(ReplicaId, u128)>>,
    differing: BTreeMap<ReplicaId, u64>,
    differs_at: Option<u64>,
    /// Entries for which a majority has said the same.
    agreed: u64,
}

impl Audit {
    /// The newest checksum of this replica.
    #[must_use]
    pub fn newest(&self) -> Option<Checksum> {
        self.own.back().copied()
    }

    /// The last entry after which this replica was found to differ from the majority.
    #[must_use]
    pub const fn differs_at(&self) -> Option<u64> {
        self.differs_at
    }

    /// The replicas that differed from the majority, and after which entry last.
    pub fn differing(&self) -> impl Iterator<Item = (ReplicaId, u64)> {
        self.differing.iter().map(|(id, index)| (*id, *index))
    }

    /// Entries after which a majority was found to be equal.
    #[must_use]
    pub const fn agreed(&self) -> u64 {
        self.agreed
    }

    pub(super) fn note(&mut self, checksum: Checksum) {
        self.own.push_back(checksum);
        if self.own.len() > NOTED_MAX {
            self.own.pop_front();
        }
    }

    /// A replica's checksum came through the log, in a cluster of so many.
    pub(super) fn hear(&mut self, replica: ReplicaId, said: Checksum, replicas: usize) {
        if said.method != METHOD {
            return;
        }
        let all = self.heard.entry(said.index).or_default();
        if all.len() < super::REPLICAS_MAX && !all.iter().any(|(id, _)| *id == replica) {
            all.push((replica, said.sum));
        }
        self.judge(said.index, replicas);
        if self.heard.len() > NOTED_MAX {
            self.heard.pop_first();
        }
    }

    fn judge(&mut self, index: u64, replicas: usize) {
        let Some(all) = self.heard.get(&index) else { return };
        let quorum = replicas.max(all.len()) / 2 + 1;
        let votes = |sum: u128| all.iter().filter(|(_, other)| *other == sum).count();
        let Some(&(_, agreed)) = all.iter().find(|(_, sum)| votes(*sum) >= quorum) else { return };
        self.agreed += u64::from(all.last().is_some_and(|(_, sum)| *sum == agreed) && votes(agreed) == quorum);
        self.differing.extend(all.iter().filter(|(_, sum)| *sum != agreed).map(|(id, _)| (*id, index)));
        if self.own.iter().any(|own| own.index == index && own.sum != agreed) {
            self.differs_at = Some(index);
        }
    }
}

impl Cluster {
    /// The state at this entry in short: membership, policy, and the index by its digests. O(nodes + policy).
    #[must_use]
    pub fn checksum(&self) -> Checksum {
        let mut bytes = Vec::new();
        let mut put = |value: u128| bytes.extend_from_slice(&value.to_le_bytes());
        [self.now_us, self.last_epoch.0, self.nodes.len() as u64].iter().for_each(|n| put((*n).into()));
        for node in self.nodes.values() {
            put(node.epoch.0.into());
            put(u128::from(node.lease_until_us) << 8 | node.state as u128);
        }
        for held in self.holders.held() {
            put(held.digest);
            put(u128::from(held.seq) << 64 | u128::from(held.blocks));
            put(u128::from(held.refused) << 64 | u128::from(held.drifted));
        }
        bytes.extend_from_slice(&codec::archive(&self.policy.image()));
        Checksum { method: METHOD, index: self.applied, sum: xxhash_rust::xxh3::xxh3_128(&bytes) }
    }

    /// Whether the replicas are still equal.
    #[must_use]
    pub const fn audit(&self) -> &Audit {
        &self.audit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Answer, Command, ReplicaInfo};
    use alloc::string::String;
    use alloc::vec;

    fn replicas() -> Vec<Cluster> {
        let info = || ReplicaInfo { http_address: String::from("h"), quic_address: String::from("q"), pid: 1, instance: 1 };
        let mut cluster = Cluster::new();
        for id in 1..=3 {
            cluster.apply(id, &Command::Announce { replica: ReplicaId(id), info: info() });
        }
        vec![cluster; 3]
    }

    fn apply(replicas: &mut [Cluster], command: &Command) {
        for cluster in replicas {
            assert!(!matches!(cluster.apply(cluster.applied() + 1, command), Answer::Refused(_)));
        }
    }

    fn renew(replicas: &mut [Cluster]) {
        apply(replicas, &Command::Renew { elapsed_us: 1000, nodes: vec![] });
    }

    /// Each replica says its newest checksum, and all hear it.
    fn say(replicas: &mut [Cluster]) {
        let sums: Vec<_> = replicas.iter().map(|cluster| cluster.audit().newest().unwrap()).collect();
        for (id, checksum) in (1..).zip(sums) {
            apply(replicas, &Command::Checksum { replica: ReplicaId(id), checksum });
        }
    }

    #[test]
    fn the_one_that_differs_is_known_to_itself_and_to_the_others() {
        let mut all = replicas();
        renew(&mut all);
        say(&mut all);
        assert!(all.iter().all(|c| c.audit().differs_at().is_none() && c.audit().agreed() == 1));
        all[1].now_us += 1; // planted
        renew(&mut all);
        say(&mut all);
        let at = all[0].audit().newest().unwrap().index;
        let differs: Vec<_> = all.iter().map(|c| c.audit().differs_at()).collect();
        assert_eq!(differs, [None, Some(at), None]);
        assert!(all.iter().all(|c| c.audit().differing().eq([(ReplicaId(2), at)])));
    }

    #[test]
    fn without_a_majority_or_with_another_method_nobody_is_blamed() {
        let mut all = replicas();
        renew(&mut all);
        let own = all[0].audit().newest().unwrap();
        for (id, sum) in [(1, own.sum), (2, 5), (3, 6)] {
            apply(&mut all, &Command::Checksum { replica: ReplicaId(id), checksum: Checksum { sum, ..own } });
        }
        for id in 1..=3 {
            let other = Checksum { method: METHOD + 1, sum: 7, ..own };
            apply(&mut all, &Command::Checksum { replica: ReplicaId(id), checksum: other });
        }
        assert!(all.iter().all(|c| c.audit().differs_at().is_none() && c.audit().differing().next().is_none()));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut all = replicas();
        for _ in 0..100 {
            renew(&mut all);
            say(&mut all);
        }
        assert_eq!((all[0].audit.own.len(), all[0].audit.heard.len()), (NOTED_MAX, NOTED_MAX));
        assert_eq!(all[0].audit().agreed(), 100);
    }
}
