//! Disks that are full, and disks that fail.

use super::*;
use crate::testing::simdisk::SimDisk;

fn disks() -> (Vec<SimDisk>, Vec<Arc<dyn Disk>>) {
    let disks: Vec<SimDisk> = (0..REPLICAS).map(|_| SimDisk::default()).collect();
    let any = disks.iter().map(|disk| Arc::new(disk.clone()) as Arc<dyn Disk>).collect();
    (disks, any)
}

/// As many bytes as make any log ask for room.
fn bulky(n: u32) -> Vec<u8> {
    vec![n as u8; 200_000]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_with_a_full_disk_lags_and_catches_up() {
    let (disks, any) = disks();
    let cluster = Cluster::start_on(any, LogLimits::default());
    let mut acknowledged = cluster.commit_many(0..3).await;
    let leader = cluster.leader_of(&[1, 2, 3]).await.status().id;
    let late = leader % REPLICAS + 1;
    disks[late as usize - 1].fill(0);
    for i in 0..8 {
        acknowledged.push((cluster.commit(&bulky(i)).await, bulky(i)));
    }
    let handle = cluster.handle(late);
    until("the disk is seen to be full", || handle.status().disk_full.then_some(())).await;
    let status = handle.status();
    assert!(status.applied < acknowledged[10].0 && status.failure.is_none(), "{status:?}");
    assert!(status.leader.is_some(), "it follows all the same");
    assert_eq!(cluster.journal(late)[..3], acknowledged[..3], "and answers for what it has applied");
    disks[late as usize - 1].free();
    cluster.agree_on(&acknowledged).await;
    assert!(!handle.status().disk_full);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_with_a_full_disk_hands_over() {
    let (disks, any) = disks();
    let cluster = Cluster::start_on(any, LogLimits::default());
    let mut acknowledged = cluster.commit_many(0..3).await;
    let old = cluster.leader_of(&[1, 2, 3]).await.status().id;
    disks[old as usize - 1].fill(0);
    for i in 0..8 {
        acknowledged.push((cluster.commit(&bulky(i)).await, bulky(i)));
    }
    let handle = cluster.handle(old);
    until("another leads", || (handle.status().role != Role::Leader && handle.status().leader.is_some()).then_some(())).await;
    assert_eq!(handle.status().failure, None);
    disks[old as usize - 1].free();
    cluster.agree_on(&acknowledged).await;
}

async fn single(disk: &SimDisk, reserve_bytes: u64) -> (RaftHandle, Journal) {
    let journal = Journal::default();
    let config = RaftConfig { reserve_bytes, ..test_config(1, vec![1], "/d".into()) };
    let handle = start_on(Arc::new(disk.clone()), config, journal.clone(), mpsc::channel(1).0).unwrap();
    until("it leads", || (handle.status().role == Role::Leader).then_some(())).await;
    (handle, journal)
}

/// Commands until one is refused: those that were committed, and the refusal.
async fn fill_up(handle: &RaftHandle) -> (Vec<Vec<u8>>, ProposeError) {
    let mut kept = Vec::new();
    for i in 0..40 {
        match handle.propose(bulky(i)).await {
            Ok(_) => kept.push(bulky(i)),
            Err(error) => return (kept, error),
        }
    }
    panic!("the disk was not full");
}

async fn commits_again(handle: &RaftHandle) {
    let deadline = Instant::now() + DEADLINE;
    while let Err(error) = handle.propose(b"after".to_vec()).await {
        assert!(error == ProposeError::DiskFull && Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_single_replica_with_a_full_disk_says_so_and_recovers() {
    // A bulky command fits a reserve of 1 MiB: it is kept, and the next refused. It does not fit 64 KiB: raft stands still with it.
    for (reserve, refusal) in [(1 << 20, ProposeError::DiskFull), (1 << 16, ProposeError::Lost)] {
        let disk = SimDisk::default();
        let (handle, journal) = single(&disk, reserve).await;
        handle.propose(b"first".to_vec()).await.unwrap();
        disk.fill(0);
        let (kept, error) = fill_up(&handle).await;
        assert_eq!(error, refusal);
        assert_eq!(handle.propose(b"no".to_vec()).await, Err(ProposeError::DiskFull));
        let reads = handle.read_index().await;
        assert_eq!(reads.is_ok(), error == ProposeError::DiskFull, "{reads:?}");
        let status = handle.status();
        assert!(status.disk_full && status.failure.is_none(), "{status:?}");
        assert_eq!(journal.0.lock().unwrap()[0].1, b"first", "it answers for what it has applied");
        disk.free();
        commits_again(&handle).await;
        handle.shutdown();
        handle.stopped().await;
        disk.crash(&mut |n| n / 2);
        let (handle, journal) = single(&disk, reserve).await;
        handle.propose(b"last".to_vec()).await.unwrap();
        let journal: Vec<Vec<u8>> = journal.0.lock().unwrap().iter().map(|(_, command)| command.clone()).collect();
        assert!(kept.iter().all(|command| journal.contains(command)), "what was acknowledged is there");
        handle.shutdown();
    }
}

#[tokio::test]
async fn a_failed_sync_stops_the_replica_and_loses_nothing_acknowledged() {
    let disk = SimDisk::default();
    let (handle, _) = single(&disk, 1 << 20).await;
    handle.propose(b"kept".to_vec()).await.unwrap();
    disk.fail_next_sync();
    assert_eq!(handle.propose(b"unknown".to_vec()).await, Err(ProposeError::Stopped));
    handle.stopped().await;
    let failure = handle.status().failure;
    assert!(matches!(&failure, Some(RaftFailure::Disk(text)) if text.contains("sync")), "{failure:?}");
    disk.crash(&mut |_| 0);
    let (handle, journal) = single(&disk, 1 << 20).await;
    handle.propose(b"after".to_vec()).await.unwrap();
    let journal: Vec<Vec<u8>> = journal.0.lock().unwrap().iter().map(|(_, command)| command.clone()).collect();
    assert_eq!(journal, [b"kept".to_vec(), b"after".to_vec()]);
}

#[tokio::test]
async fn a_compaction_without_room_waits_and_the_log_lives() {
    let disk = SimDisk::default();
    let journal = Journal::default();
    let log = LogLimits { entries_max: 10, bytes_max: 1 << 30, entries_kept: 2 };
    let config = RaftConfig { log, ..test_config(1, vec![1], "/d".into()) };
    let handle = start_on(Arc::new(disk.clone()), config, journal, mpsc::channel(1).0).unwrap();
    until("it leads", || (handle.status().role == Role::Leader).then_some(())).await;
    // Room for the log's next step of zeros, not for the journal as a snapshot.
    handle.propose(vec![1; 1 << 19]).await.unwrap();
    disk.fill(1 << 18);
    for i in 0..30u8 {
        handle.propose(vec![i]).await.unwrap();
    }
    assert_eq!((handle.status().snapshot_index, handle.status().failure), (0, None));
    disk.free();
    until("compacted", || (handle.status().snapshot_index > 0).then_some(())).await;
    until("no file is left over", || disk.names().iter().all(|name| !name.ends_with(".tmp")).then_some(())).await;
    handle.shutdown();
}
