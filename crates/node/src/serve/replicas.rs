//! Which replicas of the coordinator a node keeps links to: those of its command line until a replica tells of others, and from then on
//! those of which replicas tell. One that went is forgotten when no other replica names it any more: its own word does not keep it, and one
//! replica that is behind cannot take away what another names.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use millrace_core::ids::ReplicaId;
use millrace_core::message::{REPLICAS_TOLD_MAX, ReplicaAddress};

/// What replicas tell of one another.
pub(super) struct Told {
    first: BTreeMap<ReplicaId, SocketAddr>,
    /// Who told, and what; the newest last.
    lists: Vec<(ReplicaId, BTreeMap<ReplicaId, SocketAddr>)>,
}

impl Told {
    /// Nothing yet, but for the command line.
    pub(super) fn new(first: Vec<(ReplicaId, SocketAddr)>) -> Self {
        Self { first: first.into_iter().collect(), lists: Vec::new() }
    }

    /// A replica tells where all of them are. Addresses that are none are passed over, and so is a list without any.
    pub(super) fn hear(&mut self, from: ReplicaId, list: Vec<ReplicaAddress>) {
        let list = list.into_iter().take(REPLICAS_TOLD_MAX);
        let list: BTreeMap<_, _> = list.filter_map(|one| Some((one.replica, one.address.parse().ok()?))).collect();
        if list.is_empty() {
            return;
        }
        self.lists.retain(|(teller, _)| *teller != from);
        self.lists.push((from, list));
        // One that is gone has no say in who else is.
        let wanted = self.wanted();
        self.lists.retain(|(teller, _)| wanted.contains_key(teller));
    }

    /// Where to dial, at most [`REPLICAS_TOLD_MAX`]; a newer word on an address counts.
    pub(super) fn wanted(&self) -> BTreeMap<ReplicaId, SocketAddr> {
        if self.lists.is_empty() {
            return self.first.clone();
        }
        let alone = self.lists.len() == 1;
        let named = self.lists.iter().flat_map(|(teller, list)| list.iter().filter(move |(id, _)| alone || *id != teller));
        let mut wanted: BTreeMap<_, _> = named.map(|(id, addr)| (*id, *addr)).collect();
        while wanted.len() > REPLICAS_TOLD_MAX {
            wanted.pop_last();
        }
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(ids: &[u64]) -> Vec<ReplicaAddress> {
        ids.iter().map(|id| ReplicaAddress { replica: ReplicaId(*id), address: format!("127.0.0.1:{}", 7000 + id) }).collect()
    }

    fn wanted(told: &Told) -> Vec<u64> {
        told.wanted().into_keys().map(|id| id.0).collect()
    }

    fn founders() -> Told {
        Told::new((1..=3).map(|id| (ReplicaId(id), SocketAddr::from(([127, 0, 0, 1], 7000 + id as u16)))).collect())
    }

    #[test]
    fn the_command_line_counts_until_somebody_tells() {
        let mut told = founders();
        assert_eq!(wanted(&told), [1, 2, 3]);
        told.hear(ReplicaId(2), list(&[]));
        let nowhere = vec![ReplicaAddress { replica: ReplicaId(9), address: "nowhere".into() }];
        told.hear(ReplicaId(2), nowhere);
        assert_eq!(wanted(&told), [1, 2, 3], "a list without an address says nothing");
        told.hear(ReplicaId(2), list(&[2, 3, 4]));
        assert_eq!(wanted(&told), [2, 3, 4]);
    }

    #[test]
    fn one_that_went_is_forgotten_whatever_it_says_itself() {
        let mut told = founders();
        (1..=4).for_each(|id| told.hear(ReplicaId(id), list(&[1, 2, 3, 4])));
        told.hear(ReplicaId(1), list(&[1, 2, 3]));
        told.hear(ReplicaId(2), list(&[1, 2, 3]));
        assert_eq!(wanted(&told), [1, 2, 3, 4], "replica 3 has not heard of it yet");
        told.hear(ReplicaId(3), list(&[1, 2, 3]));
        assert_eq!(wanted(&told), [1, 2, 3]);
        assert!(told.lists.iter().all(|(teller, _)| teller.0 != 4), "and has no say any more");
    }

    #[test]
    fn one_that_is_behind_takes_nobody_away() {
        let mut told = founders();
        told.hear(ReplicaId(1), list(&[1, 2, 3, 4]));
        told.hear(ReplicaId(2), list(&[1, 2, 3, 4]));
        told.hear(ReplicaId(3), list(&[3]));
        assert_eq!(wanted(&told), [1, 2, 3, 4]);
        let moved = vec![ReplicaAddress { replica: ReplicaId(4), address: "127.0.0.1:9".into() }];
        told.hear(ReplicaId(2), [list(&[1, 2, 3]), moved].concat());
        assert_eq!(told.wanted()[&ReplicaId(4)].port(), 9, "the newest word on an address counts");
    }

    #[test]
    fn a_single_replica_is_believed_about_itself() {
        let mut told = founders();
        told.hear(ReplicaId(1), list(&[1]));
        assert_eq!(wanted(&told), [1]);
    }

    #[test]
    fn there_are_never_more_than_the_bound() {
        let mut told = founders();
        for teller in 1..=3 {
            let from = teller * 100;
            told.hear(ReplicaId(teller), list(&(from..from + 60).chain(1..=3).collect::<Vec<_>>()));
        }
        assert_eq!(told.wanted().len(), REPLICAS_TOLD_MAX);
    }
}
