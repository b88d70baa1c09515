//! Elections, commits, loss of leaders, partitions, reads, snapshots.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_commits_and_the_others_name_it() {
    let cluster = Cluster::start();
    let leader = cluster.leader_of(&[1, 2, 3]).await;
    let leader_id = leader.status().id;
    for handle in cluster.running().iter().filter(|h| h.status().id != leader_id) {
        let refused = handle.propose(b"x".to_vec()).await;
        assert_eq!(refused, Err(ProposeError::NotLeader { leader: Some(leader_id) }));
    }
    let bytes = COMMAND_BYTES_MAX + 1;
    assert_eq!(leader.propose(vec![0; bytes]).await, Err(ProposeError::TooLarge { bytes }));
    let acknowledged = cluster.commit_many(0..50).await;
    cluster.agree_on(&acknowledged).await;
    assert!(leader.status().committed >= 50 && leader.status().failure.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_leader_is_replaced_and_nothing_acknowledged_is_lost() {
    let mut cluster = Cluster::start();
    let mut acknowledged = cluster.commit_many(0..20).await;
    let old = cluster.leader_of(&[1, 2, 3]).await;
    let old_id = old.status().id;
    cluster.crash(old_id).await;
    assert_eq!(old.status().role, Role::Stopped);
    assert_eq!(old.propose(b"x".to_vec()).await, Err(ProposeError::Stopped));
    acknowledged.extend(cluster.commit_many(20..40).await);
    let rest: Vec<u64> = (1..=REPLICAS).filter(|id| *id != old_id).collect();
    assert!(cluster.leader_of(&rest).await.status().term > old.status().term);
    cluster.restart(old_id);
    acknowledged.extend(cluster.commit_many(40..60).await);
    cluster.agree_on(&acknowledged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_cut_off_loses_what_waits_and_rejoins() {
    let cluster = Cluster::start();
    let mut acknowledged = cluster.commit_many(0..5).await;
    let old = cluster.leader_of(&[1, 2, 3]).await;
    let old_id = old.status().id;
    cluster.cut(&[old_id]);
    // CheckQuorum deposes it, so the proposal does not wait for ever.
    assert_eq!(old.propose(b"never".to_vec()).await, Err(ProposeError::Lost));
    let rest: Vec<u64> = (1..=REPLICAS).filter(|id| *id != old_id).collect();
    let new = cluster.leader_of(&rest).await;
    let answer = new.propose(b"by the majority".to_vec()).await.unwrap();
    acknowledged.push((u64::from_le_bytes(answer.try_into().unwrap()), b"by the majority".to_vec()));
    cluster.cut(&[]);
    cluster.agree_on(&acknowledged).await;
    assert!(!cluster.journal(old_id).iter().any(|(_, c)| c == b"never"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lossy_network_slows_but_does_not_lose() {
    let cluster = Cluster::start();
    cluster.faults.lose_one_in.store(5, Ordering::Relaxed);
    let acknowledged = cluster.commit_many(0..60).await;
    cluster.faults.lose_one_in.store(0, Ordering::Relaxed);
    cluster.agree_on(&acknowledged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crashes_in_turn_lose_nothing_acknowledged() {
    let mut cluster = Cluster::start_with(LogLimits { entries_max: 25, bytes_max: 1 << 20, entries_kept: 5 });
    let mut acknowledged = Vec::new();
    for round in 0..6 {
        acknowledged.extend(cluster.commit_many(round * 20..round * 20 + 20).await);
        let id = u64::from(round) % REPLICAS + 1;
        cluster.crash(id).await;
        acknowledged.extend(cluster.commit_many(1000 + round..1001 + round).await);
        cluster.restart(id);
    }
    for id in 1..=REPLICAS {
        cluster.crash(id).await;
    }
    (1..=REPLICAS).for_each(|id| cluster.restart(id));
    cluster.agree_on(&acknowledged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_sees_what_any_replica_acknowledged() {
    let cluster = Cluster::start();
    for i in 0..30 {
        let index = cluster.commit(format!("write {i}").as_bytes()).await;
        let reader = i % REPLICAS + 1;
        let deadline = Instant::now() + DEADLINE;
        let applied = loop {
            match cluster.handle(reader).read_index().await {
                Ok(applied) => break applied,
                Err(error) => assert!(Instant::now() < deadline && error != ProposeError::Stopped, "{error}"),
            }
        };
        assert!(applied >= index, "read at {applied} behind the write at {index}");
        assert!(cluster.journal(reader).iter().any(|(i, _)| *i == index));
        assert!(cluster.handle(reader).status().applied >= index, "the status is published before the answer");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_quorum_answers_no_reads() {
    let cluster = Cluster::start();
    cluster.commit(b"x").await;
    let old = cluster.leader_of(&[1, 2, 3]).await;
    cluster.cut(&[old.status().id]);
    let error = old.read_index().await.unwrap_err();
    assert!(matches!(error, ProposeError::Dropped | ProposeError::NotLeader { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_moves_on_request() {
    let cluster = Cluster::start();
    let mut acknowledged = cluster.commit_many(0..5).await;
    let old = cluster.leader_of(&[1, 2, 3]).await.status().id;
    let to = old % REPLICAS + 1;
    let handle = cluster.handle(old);
    until("the transfer", || {
        handle.transfer_leader(to);
        (cluster.handle(to).status().role == Role::Leader).then_some(())
    })
    .await;
    acknowledged.extend(cluster.commit_many(5..10).await);
    cluster.agree_on(&acknowledged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_behind_the_log_catches_up_by_snapshot() {
    let mut cluster = Cluster::start_with(LogLimits { entries_max: 20, bytes_max: 1 << 20, entries_kept: 2 });
    let mut acknowledged = cluster.commit_many(0..3).await;
    let late = cluster.leader_of(&[1, 2, 3]).await.status().id % REPLICAS + 1;
    cluster.crash(late).await;
    acknowledged.extend(cluster.commit_many(3..120).await);
    let leader = cluster.running().into_iter().find(|h| h.status().role == Role::Leader).unwrap();
    let missing_from = leader.status().first_index;
    cluster.restart(late);
    let behind = cluster.handle(late).status().last_index;
    assert!(behind + 1 < missing_from, "the log still reaches back to the late replica");
    cluster.agree_on(&acknowledged).await;
    assert!(cluster.handle(late).status().snapshot_index >= missing_from - 1);
    // What came by snapshot is also what a restart finds.
    cluster.crash(late).await;
    cluster.restart(late);
    cluster.agree_on(&acknowledged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_longer_than_a_message_is_sent_in_pieces() {
    let mut cluster = Cluster::start();
    let late = cluster.leader_of(&[1, 2, 3]).await.status().id % REPLICAS + 1;
    cluster.crash(late).await;
    let mut acknowledged = Vec::new();
    for i in 0..12u8 {
        let command = vec![i; COMMAND_BYTES_MAX - 7];
        acknowledged.push((cluster.commit(&command).await, command));
    }
    cluster.restart(late);
    cluster.agree_on(&acknowledged).await;
}

#[test]
fn the_bench_commits_what_it_is_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let result = bench_commits(dir.path(), 16, 400, 64).unwrap();
    assert!(result.commits_per_s > 0.0 && result.p50_us > 0 && result.p99_us >= result.p50_us);
}
