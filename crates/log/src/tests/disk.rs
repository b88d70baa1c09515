//! What a replica finds in its directory: its own data after a crash, somebody else's, or damage.

use std::io::BufRead;
use std::process::{Command, Stdio};

use super::*;

const CHILD_DIR: &str = "MILLRACE_TEST_RAFT_CHILD_DIR";

/// A cluster of one, whose frames go nowhere.
fn start_single(dir: PathBuf) -> Result<(RaftHandle, Journal), RaftStartError> {
    start_single_with(test_config(1, vec![1], dir))
}

fn start_single_with(config: RaftConfig) -> Result<(RaftHandle, Journal), RaftStartError> {
    let journal = Journal::default();
    Ok((start(config, journal.clone(), mpsc::channel(1).0)?, journal))
}

async fn commit_single(handle: &RaftHandle, command: &[u8]) -> u64 {
    let mut status = handle.watch_status();
    let leads = status.wait_for(|s| s.role == Role::Leader);
    tokio::time::timeout(DEADLINE, leads).await.unwrap().unwrap();
    u64::from_le_bytes(handle.propose(command.to_vec()).await.unwrap().try_into().unwrap())
}

#[tokio::test]
async fn data_of_another_replica_or_cluster_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = test_config(1, vec![1, 2, 3], dir.path().into());
    let (handle, _) = start_single_with(config.clone()).unwrap();
    let locked = start_single_with(config.clone()).err().unwrap();
    assert!(matches!(locked, RaftStartError::Locked { .. }), "{locked}");
    handle.shutdown();
    handle.stopped().await;
    let refused = |config| start_single_with(config).err().unwrap();
    let other = refused(RaftConfig { cluster_id: "other".into(), ..config.clone() });
    assert!(matches!(other, RaftStartError::OtherCluster { .. }), "{other}");
    let other = refused(RaftConfig { id: 2, ..config.clone() });
    assert!(matches!(other, RaftStartError::OtherNode { found: 1, expected: 2 }), "{other}");
    let senseless = refused(RaftConfig { founders: vec![2, 3], ..config.clone() });
    assert!(matches!(senseless, RaftStartError::Config(_)), "{senseless}");
    start_single_with(config).unwrap().0.shutdown();
}

#[tokio::test]
async fn a_log_keeps_its_identity_and_a_new_one_has_another() {
    let dir = tempfile::tempdir().unwrap();
    let log = LogLimits { entries_max: 5, bytes_max: 1 << 20, entries_kept: 3 };
    let config = RaftConfig { log, ..test_config(1, vec![1], dir.path().join("a")) };
    let mut identities = Vec::new();
    for _ in 0..2 {
        let (handle, _) = start_single_with(config.clone()).unwrap();
        for _ in 0..12 {
            commit_single(&handle, b"x").await;
        }
        identities.push(handle.status().log);
        handle.shutdown();
        handle.stopped().await;
    }
    assert_eq!(identities[0], identities[1]);
    let other = RaftConfig { dir: dir.path().join("b"), ..config.clone() };
    let (handle, _) = start_single_with(other.clone()).unwrap();
    assert_ne!(handle.status().log, identities[0]);
    for _ in 0..12 {
        commit_single(&handle, b"x").await;
    }
    handle.shutdown();
    handle.stopped().await;
    // Files of two logs do not mix.
    std::fs::copy(config.dir.join("snapshot.bin"), other.dir.join("snapshot.bin")).unwrap();
    let mixed = start_single_with(other).err().unwrap();
    assert!(matches!(mixed, RaftStartError::OtherLog), "{mixed}");
}

#[tokio::test]
async fn damaged_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = LogLimits { entries_max: 10, bytes_max: 1 << 20, entries_kept: 3 };
    let config = RaftConfig { log, ..test_config(1, vec![1], dir.path().into()) };
    let (handle, _) = start_single_with(config.clone()).unwrap();
    for i in 0..25u8 {
        commit_single(&handle, &[i; 100]).await;
    }
    handle.shutdown();
    handle.stopped().await;
    let path = dir.path().join("snapshot.bin");
    let snapshot = std::fs::read(&path).unwrap();
    let mut flipped = snapshot.clone();
    flipped[snapshot.len() / 2] ^= 4;
    std::fs::write(&path, &flipped).unwrap();
    assert!(matches!(start_single_with(config.clone()), Err(RaftStartError::Corrupt { .. })));
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(start_single_with(config.clone()), Err(RaftStartError::Corrupt { .. })), "no snapshot");
    std::fs::write(&path, &snapshot).unwrap();
    let (handle, journal) = start_single_with(config).unwrap();
    commit_single(&handle, b"after").await;
    assert_eq!(journal.0.lock().unwrap().len(), 26);
}

#[tokio::test]
async fn a_disk_that_fails_stops_the_replica_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("replica");
    let log = LogLimits { entries_max: 20, bytes_max: 1 << 20, entries_kept: 3 };
    let (handle, _) = start_single_with(RaftConfig { log, ..test_config(1, vec![1], home.clone()) }).unwrap();
    commit_single(&handle, b"x").await;
    // The next compaction cannot make its files.
    std::fs::remove_dir_all(&home).unwrap();
    let mut error = None;
    for _ in 0..30 {
        error = error.or(handle.propose(b"y".to_vec()).await.err());
    }
    handle.stopped().await;
    assert_eq!(error, Some(ProposeError::Stopped));
    let status = handle.status();
    assert_eq!(status.role, Role::Stopped);
    assert!(matches!(status.failure, Some(RaftFailure::Disk(_))), "{:?}", status.failure);
}

/// The test runs itself as a child that commits without pause, kills it with SIGKILL, and looks for what it acknowledged.
#[tokio::test]
async fn nothing_acknowledged_is_lost_to_kill_minus_nine() {
    if let Some(dir) = std::env::var_os(CHILD_DIR) {
        return commit_until_killed(dir.into()).await;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = Vec::new();
    for round in 0..3 {
        let found = acknowledged_by_killed_child(dir.path(), 200);
        assert!(found.len() >= 200, "round {round}: the child stopped by itself");
        acknowledged.extend(found);
    }
    let (handle, journal) = start_single(dir.path().into()).unwrap();
    commit_single(&handle, b"after").await;
    let journal: Vec<u64> = journal.0.lock().unwrap().iter().map(|(index, _)| *index).collect();
    assert!(journal.is_sorted());
    for index in acknowledged {
        assert!(journal.contains(&index), "entry {index} was acknowledged and is lost");
    }
}

async fn commit_until_killed(dir: PathBuf) {
    let log = LogLimits { entries_max: 150, bytes_max: 1 << 20, entries_kept: 10 };
    let (handle, _) = start_single_with(RaftConfig { log, ..test_config(1, vec![1], dir) }).unwrap();
    loop {
        let index = commit_single(&handle, &[7; 300]).await;
        println!("committed {index}");
    }
}

fn acknowledged_by_killed_child(dir: &std::path::Path, at_least: usize) -> Vec<u64> {
    let name = "disk::nothing_acknowledged_is_lost_to_kill_minus_nine";
    let path = format!("{}::{name}", module_path!().trim_end_matches("::disk"));
    let filter = path.split_once("::").unwrap().1;
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", filter, "--nocapture"])
        .env(CHILD_DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let mut killed = false;
    let mut indexes = Vec::new();
    for line in lines {
        let Some(index) = line.unwrap().split_once("committed ").and_then(|(_, n)| n.parse().ok()) else { continue };
        indexes.push(index);
        if indexes.len() >= at_least && !killed {
            child.kill().unwrap();
            killed = true;
        }
    }
    child.wait().unwrap();
    indexes
}
