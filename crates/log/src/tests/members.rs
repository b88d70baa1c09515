//! Members that come, vote, go and take one another's place, while the network and the replicas fail.

use super::*;

const SMALL_LOG: LogLimits = LogLimits { entries_max: 20, bytes_max: 1 << 20, entries_kept: 2 };

fn refused(error: ChangeError) -> Result<Vec<u8>, ProposeError> {
    Err(ProposeError::Change(error))
}

impl Cluster {
    /// A replica that leads and has committed in its term.
    async fn leader(&self) -> RaftHandle {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let leads = |handle: &RaftHandle| handle.status().role == Role::Leader;
            if let Some(leader) = self.running().into_iter().find(leads)
                && leader.propose(b"led".to_vec()).await.is_ok()
            {
                return leader;
            }
            assert!(
                Instant::now() < deadline,
                "nobody leads: {:?}",
                self.running().iter().map(RaftHandle::status).collect::<Vec<_>>()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn try_change(&self, change: Change) -> Result<Vec<u8>, ProposeError> {
        let leader = self.leader().await;
        leader.change(change, leader.status().members_index, b"changed".to_vec()).await
    }

    /// Changes the members, whatever it takes: the leader is moved out of the way, the learner waited for.
    async fn change(&self, change: Change) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let before = self.leader().await.status().members;
            let error = match self.try_change(change).await {
                Ok(_) => return,
                Err(error) => error,
            };
            if let ProposeError::Change(ChangeError::Leads(_)) = error {
                self.leader().await.hand_over();
            }
            let now = self.leader().await.status().members;
            if error == ProposeError::Lost && now != before {
                return;
            }
            assert!(Instant::now() < deadline, "{change:?}: {error}, {now:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the given replicas know the same members and none is on its way out.
    async fn settled(&self, ids: &[u64], voters: &[u64], learners: &[u64]) {
        let wanted = Members { voters: voters.into(), outgoing: Vec::new(), learners: learners.into() };
        until(&format!("{wanted:?}"), || ids.iter().all(|id| *self.handle(*id).status().members == wanted).then_some(())).await;
    }

    async fn lead(&self, id: u64) {
        until("leadership", || {
            self.running().iter().for_each(|handle| handle.transfer_leader(id));
            (self.handle(id).status().role == Role::Leader).then_some(())
        })
        .await;
        self.commit(b"leads").await;
    }

    /// Waits until a replica has stopped by itself and gives the reason.
    async fn ended(&self, id: u64) -> RaftFailure {
        let handle = self.handle(id);
        tokio::time::timeout(DEADLINE, handle.stopped()).await.unwrap();
        self.slots.lock().unwrap()[id as usize - 1] = None;
        handle.status().failure.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_follows_without_a_vote_and_votes_when_promoted() {
    let mut cluster = Cluster::start();
    let mut acknowledged = cluster.commit_many(0..10).await;
    assert_eq!(cluster.try_change(Change::Promote(4)).await, refused(ChangeError::NoMember(4)));
    cluster.restart(4);
    cluster.change(Change::AddLearner(4)).await;
    cluster.settled(&[1, 2, 3, 4], &[1, 2, 3], &[4]).await;
    cluster.agree_on(&acknowledged).await;
    assert!(cluster.journal(4).iter().any(|(_, command)| command == b"changed"), "its own admission is in its state");
    assert_eq!(cluster.try_change(Change::AddLearner(4)).await, refused(ChangeError::Member(4)));

    // One voter and the learner are no majority.
    let leader = cluster.leader().await;
    let others: Vec<u64> = (1..=3).filter(|id| *id != leader.status().id).collect();
    cluster.cut(&others);
    assert_eq!(leader.propose(b"never".to_vec()).await, Err(ProposeError::Lost));
    assert!(cluster.handle(4).status().role == Role::Follower, "a learner does not campaign");
    cluster.cut(&[]);

    cluster.change(Change::Promote(4)).await;
    cluster.settled(&[1, 2, 3, 4], &[1, 2, 3, 4], &[]).await;
    assert_eq!(cluster.try_change(Change::Promote(4)).await, refused(ChangeError::NoLearner(4)));
    cluster.lead(4).await;
    acknowledged.extend(cluster.commit_many(10..20).await);
    // Its membership is in its log.
    cluster.crash(4).await;
    cluster.restart(4);
    cluster.settled(&[4], &[1, 2, 3, 4], &[]).await;
    cluster.agree_on(&acknowledged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_joins_by_snapshot_when_the_log_is_cut() {
    let mut cluster = Cluster::start_with(SMALL_LOG);
    let mut acknowledged = cluster.commit_many(0..60).await;
    cluster.restart(7);
    cluster.change(Change::AddLearner(7)).await;
    until("a snapshot", || (cluster.handle(7).status().snapshot_index > 0).then_some(())).await;
    cluster.agree_on(&acknowledged).await;
    cluster.change(Change::Promote(7)).await;
    // All begin from snapshots in which the members have changed.
    acknowledged.extend(cluster.commit_many(60..120).await);
    for id in [1, 2, 3, 7] {
        cluster.crash(id).await;
    }
    [1, 2, 3, 7].into_iter().for_each(|id| cluster.restart(id));
    cluster.settled(&[1, 2, 3, 7], &[1, 2, 3, 7], &[]).await;
    cluster.agree_on(&acknowledged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_is_promoted_only_when_it_has_the_log() {
    let mut cluster = Cluster::start();
    cluster.change(Change::AddLearner(4)).await;
    assert_eq!(cluster.try_change(Change::Promote(4)).await, refused(ChangeError::Silent(4)));
    cluster.restart(4);
    cluster.agree_on(&[]).await;
    cluster.cut(&[4]);
    let leader = cluster.leader().await;
    let proposals = (0..CAUGHT_UP_ENTRIES_MAX + 50).map(|i| {
        let leader = leader.clone();
        tokio::spawn(async move { leader.propose(i.to_le_bytes().to_vec()).await })
    });
    for proposal in proposals.collect::<Vec<_>>() {
        proposal.await.unwrap().unwrap();
    }
    let error = cluster.try_change(Change::Promote(4)).await.unwrap_err();
    assert!(matches!(error, ProposeError::Change(ChangeError::Behind { id: 4, .. } | ChangeError::Silent(4))), "{error}");
    cluster.cut(&[]);
    cluster.change(Change::Promote(4)).await;
    cluster.settled(&[1, 2, 3, 4], &[1, 2, 3, 4], &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_replica_stops_and_says_so() {
    let cluster = Cluster::start();
    let mut acknowledged = cluster.commit_many(0..10).await;
    let leader = cluster.leader().await.status();
    assert_eq!(cluster.try_change(Change::Remove(leader.id)).await, refused(ChangeError::Leads(leader.id)));
    let stale = cluster.handle(leader.id).change(Change::Remove(leader.id % 3 + 1), leader.members_index + 1, Vec::new()).await;
    assert_eq!(stale, refused(ChangeError::Outdated));
    // The leader goes, after it has handed over.
    cluster.change(Change::Remove(leader.id)).await;
    assert!(matches!(cluster.ended(leader.id).await, RaftFailure::Removed(_)));
    let rest: Vec<u64> = (1..=3).filter(|id| *id != leader.id).collect();
    cluster.settled(&rest, &rest, &[]).await;
    acknowledged.extend(cluster.commit_many(10..20).await);
    // Of two, one goes; the last may not.
    let last = cluster.leader().await.status().id;
    let gone = *rest.iter().find(|id| **id != last).unwrap();
    cluster.change(Change::Remove(gone)).await;
    assert!(matches!(cluster.ended(gone).await, RaftFailure::Removed(_)));
    acknowledged.extend(cluster.commit_many(20..30).await);
    assert_eq!(cluster.try_change(Change::Remove(last)).await, refused(ChangeError::LastVoter(last)));
    cluster.agree_on(&acknowledged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_would_cost_the_quorum_is_refused() {
    let cluster = Cluster::start();
    let leader = cluster.leader().await.status().id;
    let (alive, dead) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    cluster.crash(dead).await;
    until("silence", || {
        let peers = cluster.handle(leader).status().peers;
        peers.iter().any(|peer| peer.id == dead && !peer.alive).then_some(())
    })
    .await;
    let error = cluster.try_change(Change::Remove(alive)).await;
    assert_eq!(error, refused(ChangeError::QuorumAtRisk { alive: 1, voters: 2 }));
    cluster.change(Change::Remove(dead)).await;
    cluster
        .settled(
            &[leader, alive],
            &{
                let mut two = [leader, alive];
                two.sort_unstable();
                two
            },
            &[],
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_missed_its_removal_is_told_by_most_and_not_by_one() {
    let cluster = Cluster::start();
    cluster.agree_on(&[]).await;
    let leader = cluster.leader().await.status().id;
    let (away, other) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    cluster.cut(&[away]);
    cluster.change(Change::Remove(away)).await;
    let handle = cluster.handle(away);
    assert!(handle.status().last_index > 1, "it has something to lose");
    handle.told_removed(leader, "you were removed".into());
    handle.told_removed(leader, "you were removed".into());
    handle.told_removed(77, "a stranger says so".into());
    handle.told_removed(away, "you say so yourself".into());
    // A read is answered by a later round.
    assert!(!matches!(handle.read_index().await, Err(ProposeError::Stopped)));
    handle.told_removed(other, "you were removed".into());
    assert_eq!(cluster.ended(away).await, RaftFailure::Removed("you were removed".into()));
}

/// Two founders and a learner that is to replace the second: the way out of the joint state needs the learner. It is cut
/// off, so the cluster stays joint over a restart of everybody, with and without snapshots.
async fn stays_joint_over_a_restart(log: LogLimits) {
    let mut cluster = Cluster::found(&[1, 2], log);
    let mut acknowledged = cluster.commit_many(0..5).await;
    cluster.restart(3);
    cluster.change(Change::AddLearner(3)).await;
    cluster.agree_on(&acknowledged).await;
    cluster.lead(1).await;
    let joint = Members { voters: vec![1, 3], outgoing: vec![1, 2], learners: Vec::new() };
    let leader = cluster.handle(1);
    let deadline = Instant::now() + DEADLINE;
    while leader.status().members.learners == [3] {
        // The learner counts as alive for a moment after it was cut off.
        cluster.cut(&[]);
        until("life", || leader.status().peers.iter().all(|peer| peer.alive).then_some(())).await;
        cluster.cut(&[3]);
        let _ = leader.change(Change::Replace { old: 2, new: 3 }, leader.status().members_index, b"replaced".to_vec()).await;
        assert!(Instant::now() < deadline);
    }
    // The entry with which the joint state will end tells both that it has begun, and is on both disks.
    let is_joint = |id: u64| {
        let status = cluster.handle(id).status();
        *status.members == joint && status.last_index > status.members_index
    };
    until("both are joint", || [1, 2].into_iter().all(is_joint).then_some(())).await;
    for id in [1, 2] {
        cluster.crash(id).await;
        cluster.restart(id);
    }
    until("both are joint again", || [1, 2].iter().all(|id| *cluster.handle(*id).status().members == joint).then_some(())).await;
    cluster.cut(&[]);
    cluster.settled(&[1, 3], &[1, 3], &[]).await;
    assert!(matches!(cluster.ended(2).await, RaftFailure::Removed(_)));
    acknowledged.extend(cluster.commit_many(5..10).await);
    cluster.agree_on(&acknowledged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_joint_state_survives_a_restart_from_the_log() {
    stays_joint_over_a_restart(LogLimits::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_joint_state_survives_a_restart_from_a_snapshot() {
    stays_joint_over_a_restart(LogLimits { entries_max: 1, bytes_max: 1 << 20, entries_kept: 0 }).await;
}

/// Voters 1, 2, 3 give way to 4, 5, 6 one by one, while frames are lost and overtaken and replicas crash in the middle.
#[tokio::test(flavor = "multi_thread")]
async fn voters_are_exchanged_under_faults_and_nothing_is_lost() {
    let mut cluster = Cluster::start_with(SMALL_LOG);
    let mut acknowledged = cluster.commit_many(0..10).await;
    cluster.faults.lose_one_in.store(20, Ordering::Relaxed);
    cluster.faults.delay_one_in.store(6, Ordering::Relaxed);
    for (old, new) in [(1, 4), (2, 5), (3, 6)] {
        cluster.restart(new);
        cluster.change(Change::AddLearner(new)).await;
        let replace = Change::Replace { old, new };
        let deadline = Instant::now() + DEADLINE;
        for victim in (1..=6).cycle() {
            let leader = cluster.leader().await;
            let members = leader.status().members;
            if members.voters.contains(&new) {
                break;
            }
            if leader.status().id == old {
                leader.hand_over();
            }
            let seen = leader.status().members_index;
            let change = tokio::spawn(async move { leader.change(replace, seen, b"replaced".to_vec()).await });
            if members.contains(victim) && victim != old {
                cluster.crash(victim).await;
                cluster.restart(victim);
            }
            acknowledged.extend(cluster.commit_many(old as u32 * 1000..old as u32 * 1000 + 3).await);
            let _ = change.await.unwrap();
            assert!(Instant::now() < deadline, "{members:?}");
        }
        until("the change is over", || {
            cluster.running().iter().any(|h| h.status().role == Role::Leader && !h.status().members.is_joint()).then_some(())
        })
        .await;
        // The old one hears of it, or is told, or is cut off for good.
        cluster.crash(old).await;
    }
    cluster.faults.lose_one_in.store(0, Ordering::Relaxed);
    cluster.faults.delay_one_in.store(0, Ordering::Relaxed);
    cluster.settled(&[4, 5, 6], &[4, 5, 6], &[]).await;
    cluster.agree_on(&acknowledged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_heir_is_who_has_most_of_the_log() {
    let cluster = Cluster::start();
    cluster.commit(b"x").await;
    let leader = cluster.leader_of(&[1, 2, 3]).await;
    let (behind, heir) = (leader.status().id % 3 + 1, (leader.status().id + 1) % 3 + 1);
    cluster.cut(&[behind]);
    cluster.commit_many(0..5).await;
    leader.hand_over();
    until("the heir leads", || (cluster.handle(heir).status().role == Role::Leader).then_some(())).await;
}
