//! Snapshots in chunks: over a network that loses them, from a leader that goes on leading, and from peers that lie.

use raft::eraftpb::{ConfState, Message, MessageType};

use super::*;
use crate::message::encode;

const SMALL_LOG: LogLimits = LogLimits { entries_max: 20, bytes_max: 1 << 30, entries_kept: 2 };

fn command(i: u8) -> Vec<u8> {
    (0..400_000u32).map(|n| (n as u8) ^ i).collect()
}

/// A cluster with a replica that needs a snapshot of some 20 chunks; gives the replica's id.
async fn one_behind() -> (Cluster, u64, Vec<(u64, Vec<u8>)>) {
    let cluster = Cluster::start_with(SMALL_LOG);
    let late = cluster.leader_of(&[1, 2, 3]).await.status().id % REPLICAS + 1;
    cluster.crash(late).await;
    let mut acknowledged = Vec::new();
    for i in 0..12 {
        acknowledged.push((cluster.commit(&command(i)).await, command(i)));
    }
    acknowledged.extend(cluster.commit_many(0..40).await);
    until("the log is compacted", || cluster.running().iter().all(|h| h.status().first_index > 13).then_some(())).await;
    (cluster, late, acknowledged)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_many_chunks_arrives_and_the_leader_stays() {
    let (mut cluster, late, mut acknowledged) = one_behind().await;
    let leader = cluster.running().into_iter().find(|h| h.status().role == Role::Leader).unwrap().status();
    cluster.restart(late);
    acknowledged.extend(cluster.commit_many(100..120).await);
    until("the snapshot is installed", || (cluster.handle(late).status().snapshot_index > 13).then_some(())).await;
    cluster.agree_on(&acknowledged).await;
    let now = cluster.handle(leader.id).status();
    assert_eq!((now.role, now.term), (Role::Leader, leader.term));
    let files = std::fs::read_dir(cluster.config(late).dir).unwrap();
    let names: Vec<String> = files.map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!names.iter().any(|name| name.starts_with("inbound")), "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_chunks_are_sent_again_and_a_receiver_that_restarts_begins_anew() {
    let (mut cluster, late, acknowledged) = one_behind().await;
    cluster.faults.lose_one_in.store(6, Ordering::Relaxed);
    cluster.restart(late);
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.crash(late).await;
    cluster.restart(late);
    until("the snapshot is installed", || (cluster.handle(late).status().snapshot_index > 13).then_some(())).await;
    cluster.faults.lose_one_in.store(0, Ordering::Relaxed);
    cluster.agree_on(&acknowledged).await;
}

fn put_all(kind: u8, fields: &[u64], bytes: Option<&[u8]>) -> Vec<u8> {
    let mut frame = b"MRSHIP\0\x01".to_vec();
    frame.push(kind);
    fields.iter().for_each(|field| put_u64(&mut frame, *field));
    bytes.into_iter().for_each(|bytes| put_bytes(&mut frame, bytes));
    frame
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_liars_leave_nothing_behind() {
    let cluster = Cluster::start();
    cluster.commit_many(0..5).await;
    let leader = cluster.leader_of(&[1, 2, 3]).await.status();
    let victim = cluster.handle(leader.id % REPLICAS + 1);
    let (me, other) = (victim.status().id, (1..=REPLICAS).find(|id| *id != leader.id && *id != victim.status().id).unwrap());
    let snapshot = |from: u64, term: u64| {
        let mut message = Message { from, to: me, term, ..Default::default() };
        message.set_msg_type(MessageType::MsgSnapshot);
        let meta = message.mut_snapshot().mut_metadata();
        (meta.index, meta.term) = (1 << 30, term);
        meta.set_conf_state(ConfState::from((vec![1, 2, 3], Vec::new())));
        encode(&message)
    };
    let (of_leader, of_other) = (snapshot(leader.id, leader.term), snapshot(other, leader.term));
    let junk = b"no state of this machine";
    let frames = [
        (other, put_all(1, &[1, 100, 0], Some(&of_other))),           // a follower
        (other, put_all(1, &[2, 100, 0], Some(&of_leader))),          // in the leader's name
        (leader.id, put_all(1, &[3, u64::MAX, 0], Some(&of_leader))), // larger than any
        (leader.id, put_all(1, &[4, 100, 0], Some(b"no message"))),
        (leader.id, put_all(2, &[5, 0], Some(junk))), // of nothing that was begun
        (leader.id, put_all(9, &[6, 0], None)),
        (leader.id, put_all(1, &[7, junk.len() as u64, 0], Some(&of_leader))),
        (leader.id, put_all(2, &[7, 0], Some(junk))), // whole, with a wrong checksum
        (leader.id, put_all(1, &[8, junk.len() as u64, u64::from(crc32fast::hash(junk))], Some(&of_leader))),
        (leader.id, put_all(2, &[8, 0], Some(junk))), // whole, and no state
        (leader.id, put_all(1, &[9, 10, 0], Some(&of_leader))),
        (leader.id, put_all(2, &[9, 0], Some(junk))), // longer than announced
    ];
    let before = victim.status().frames_refused;
    for (from, frame) in &frames {
        victim.step(*from, frame);
    }
    for id in 100..140 {
        victim.step(leader.id, &put_all(1, &[id, 1 << 20, 0], Some(&of_leader)));
    }
    until("the lies are refused", || (victim.status().frames_refused >= before + 6).then_some(())).await;
    cluster.agree_on(&[]).await;
    let status = victim.status();
    assert_eq!((status.failure, status.snapshot_index), (None, 0));
    let files = std::fs::read_dir(cluster.config(me).dir).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap());
    let inbound: Vec<String> = files.filter(|name| name.starts_with("inbound")).collect();
    assert!(inbound.len() <= 1, "one shipment at a time: {inbound:?}");
}

/// A machine whose state takes as long to write down as the test likes.
#[derive(Clone)]
struct Slow(Arc<(Mutex<bool>, std::sync::Condvar)>);

impl StateMachine for Slow {
    type State = Self;

    fn apply(&mut self, index: u64, _: &[u8]) -> Vec<u8> {
        index.to_le_bytes().to_vec()
    }

    fn view(&self) -> Self {
        self.clone()
    }

    fn encode(state: &Self) -> Vec<u8> {
        let (open, changed) = &*state.0;
        drop(changed.wait_while(open.lock().unwrap(), |open| !*open).unwrap());
        b"slow".to_vec()
    }

    fn decode(_: &[u8]) -> Result<Self, RestoreError> {
        Ok(Self(Arc::default()))
    }

    fn install(&mut self, _: Self) {}
}

#[tokio::test]
async fn the_log_goes_on_while_a_snapshot_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let config = RaftConfig { log: SMALL_LOG, ..test_config(1, vec![1], dir.path().into()) };
    let slow = Slow(Arc::default());
    let handle = start(config.clone(), slow.clone(), mpsc::channel(1).0).unwrap();
    until("it leads", || (handle.status().role == Role::Leader).then_some(())).await;
    for _ in 0..100 {
        handle.propose(vec![1; 50]).await.unwrap();
    }
    assert_eq!(handle.status().snapshot_index, 0, "the snapshot is not written yet");
    *slow.0.0.lock().unwrap() = true;
    slow.0.1.notify_all();
    until("compacted", || (handle.status().snapshot_index > 0).then_some(())).await;
    let last = u64::from_le_bytes(handle.propose(vec![2; 50]).await.unwrap().try_into().unwrap());
    handle.shutdown();
    handle.stopped().await;
    let handle = start(config, Slow(Arc::default()), mpsc::channel(1).0).unwrap();
    until("it leads", || (handle.status().role == Role::Leader).then_some(())).await;
    let next = u64::from_le_bytes(handle.propose(Vec::new()).await.unwrap().try_into().unwrap());
    assert!(next > last, "what was appended while segments changed is there");
    handle.shutdown();
}
