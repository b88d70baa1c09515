//! The replicas of the coordinator as the state knows them: numbers, names and logs.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use millrace_core::cluster::{Answer, Cluster, Command, Estranged, Member, MemberChange, ReplicaInfo};
use millrace_core::ids::ReplicaId;

const FOUR: ReplicaId = ReplicaId(4);

fn add(replica: u64, name: &str) -> Command {
    Command::Members(MemberChange::Add { replica: ReplicaId(replica), name: name.into(), address: "127.0.0.1:4".into() })
}

fn enroll(replica: u64, log: u128) -> Command {
    let member = Member { name: format!("c-{replica}"), address: format!("127.0.0.1:{replica}"), log: Some(log) };
    Command::Enroll { replica: ReplicaId(replica), member }
}

fn replica_info() -> ReplicaInfo {
    ReplicaInfo { http_address: "h:1".into(), quic_address: "q:1".into(), pid: 1, instance: 1 }
}

#[test]
fn the_first_log_under_a_number_is_the_only_one() {
    let mut cluster = Cluster::new();
    assert_eq!(cluster.apply(1, &enroll(1, 7)), Answer::Done);
    assert_eq!(cluster.apply(2, &enroll(1, 7)), Answer::Done, "it may say so again");
    assert!(matches!(cluster.apply(3, &enroll(1, 8)), Answer::Refused(_)));
    assert_eq!(cluster.estranged(ReplicaId(1), 7), None);
    assert_eq!(cluster.estranged(ReplicaId(1), 8), Some(Estranged::OtherLog));
    assert_eq!(cluster.estranged(FOUR, 8), None, "nothing is known of it");
    cluster.check();
}

#[test]
fn a_number_is_never_given_twice() {
    let mut cluster = Cluster::new();
    cluster.apply(1, &enroll(3, 7));
    assert_eq!(cluster.next_replica(), FOUR);
    assert_eq!(cluster.apply(2, &add(4, "c-4")), Answer::Done);
    assert_eq!(cluster.member(FOUR).unwrap().log, None, "it has not told yet");
    assert!(matches!(cluster.apply(3, &add(5, "c-4")), Answer::Refused(_)), "a name is one replica's");
    assert_eq!(cluster.apply(4, &Command::Announce { replica: ReplicaId(3), info: replica_info() }), Answer::Done);
    let replace = MemberChange::Replace { old: ReplicaId(3), new: FOUR };
    assert_eq!(cluster.apply(5, &Command::Members(replace)), Answer::Done);
    assert_eq!(cluster.estranged(ReplicaId(3), 7), Some(Estranged::Removed));
    assert!(cluster.replicas().next().is_none(), "nobody is sent where it was");
    for again in [add(3, "c-3"), enroll(3, 7), Command::Announce { replica: ReplicaId(3), info: replica_info() }] {
        assert!(matches!(cluster.apply(cluster.applied() + 1, &again), Answer::Refused(_)), "{again:?}");
    }
    cluster.apply(20, &Command::Members(MemberChange::Remove { replica: FOUR }));
    assert_eq!(cluster.next_replica(), ReplicaId(5));
    let restored = Cluster::restore(&cluster.snapshot()).unwrap();
    assert!(restored.was_removed(FOUR) && restored.snapshot() == cluster.snapshot());
    cluster.check();
}

#[test]
fn names_and_addresses_are_bounded() {
    let mut cluster = Cluster::new();
    let long = "x".repeat(300);
    assert!(matches!(cluster.apply(1, &add(1, "")), Answer::Refused(_)));
    assert!(matches!(cluster.apply(2, &add(1, &long)), Answer::Refused(_)));
    let member = Member { name: "c".into(), address: long, log: Some(1) };
    assert!(matches!(cluster.apply(3, &Command::Enroll { replica: ReplicaId(1), member }), Answer::Refused(_)));
}
