//! Scenarios over three replicas in one process, wired by a network that can cut and drop. Times here are deadlines,
//! generous ones; nothing asserts how long a thing takes.

mod cluster;
mod disk;
mod full;
mod history;
mod hostile;
mod members;
mod ship;
mod world;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::sync::mpsc;

use super::codec::{Reader, put_bytes, put_u64};
use super::disk::{Disk, OsDisk};
use super::handle::start_on;
use super::*;

const DEADLINE: Duration = Duration::from_secs(60);
/// Founders, unless a test says otherwise.
const REPLICAS: u64 = 3;
/// Highest number that a replica may have.
const SLOTS: usize = 9;

type Applied = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

/// Remembers every command and where it was applied; answers with the index.
#[derive(Clone, Default)]
struct Journal(Applied);

impl StateMachine for Journal {
    type State = Vec<(u64, Vec<u8>)>;

    fn apply(&mut self, index: u64, command: &[u8]) -> Vec<u8> {
        self.0.lock().unwrap().push((index, command.to_vec()));
        index.to_le_bytes().to_vec()
    }

    fn view(&self) -> Self::State {
        self.0.lock().unwrap().clone()
    }

    fn encode(state: &Self::State) -> Vec<u8> {
        let mut out = b"journal".to_vec();
        for (index, command) in state {
            put_u64(&mut out, *index);
            put_bytes(&mut out, command);
        }
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self::State, RestoreError> {
        parse(bytes)
    }

    fn install(&mut self, state: Self::State) {
        *self.0.lock().unwrap() = state;
    }
}

fn parse(bytes: &[u8]) -> Result<Vec<(u64, Vec<u8>)>, RestoreError> {
    let bad = || RestoreError("not a journal".into());
    let mut reader = Reader(bytes.strip_prefix(b"journal").ok_or_else(bad)?);
    let mut commands = Vec::new();
    while !reader.0.is_empty() {
        let index = reader.u64().ok_or_else(bad)?;
        commands.push((index, reader.bytes().ok_or_else(bad)?.to_vec()));
    }
    Ok(commands)
}

fn os_disks() -> Vec<Arc<dyn Disk>> {
    (0..SLOTS).map(|_| Arc::new(OsDisk) as Arc<dyn Disk>).collect()
}

/// What the network does with frames.
#[derive(Default)]
struct Faults {
    /// Bit `id` set: the replica is cut off.
    cut: AtomicU32,
    /// One frame in so many is lost; 0: none.
    lose_one_in: AtomicU64,
    /// One frame in so many is held back and overtaken by later ones; 0: none.
    delay_one_in: AtomicU64,
    /// Frames seen, with their senders, for tests that replay them; kept while `tap` is set.
    tapped: Mutex<Option<Vec<Vec<u8>>>>,
}

struct Cluster {
    dir: TempDir,
    log: LogLimits,
    founders: Vec<u64>,
    faults: Arc<Faults>,
    /// By id - 1; `None` while a replica is down.
    slots: Arc<Mutex<Vec<Option<RaftHandle>>>>,
    journals: Vec<Journal>,
    disks: Vec<Arc<dyn Disk>>,
}

impl Cluster {
    fn start() -> Self {
        Self::start_with(LogLimits::default())
    }

    fn start_with(log: LogLimits) -> Self {
        Self::start_on(os_disks(), log)
    }

    fn start_on(disks: Vec<Arc<dyn Disk>>, log: LogLimits) -> Self {
        Self::found_on(disks, &[1, 2, 3], log)
    }

    fn found(founders: &[u64], log: LogLimits) -> Self {
        Self::found_on(os_disks(), founders, log)
    }

    fn found_on(disks: Vec<Arc<dyn Disk>>, founders: &[u64], log: LogLimits) -> Self {
        let slots = Arc::new(Mutex::new(vec![None; SLOTS]));
        let dir = tempfile::tempdir().unwrap();
        let journals = vec![Journal::default(); SLOTS];
        let mut cluster = Self { dir, log, founders: founders.to_vec(), faults: Arc::default(), slots, journals, disks };
        founders.iter().for_each(|id| cluster.restart(*id));
        cluster
    }

    fn config(&self, id: u64) -> RaftConfig {
        let dir = self.dir.path().join(id.to_string());
        let founders = if self.founders.contains(&id) { self.founders.clone() } else { Vec::new() };
        RaftConfig { log: self.log, ..test_config(id, founders, dir) }
    }

    /// Starts a replica from whatever is in its directory, with an empty state machine. One that is no founder joins.
    fn restart(&mut self, id: u64) {
        let (outgoing, mut frames) = mpsc::channel::<(u64, Vec<u8>)>(4096);
        let journal = Journal::default();
        self.journals[id as usize - 1] = journal.clone();
        let disk = self.disks[id as usize - 1].clone();
        let handle = start_on(disk, self.config(id), journal, outgoing).unwrap();
        self.slots.lock().unwrap()[id as usize - 1] = Some(handle);
        let (slots, faults) = (Arc::clone(&self.slots), Arc::clone(&self.faults));
        std::thread::spawn(move || {
            let mut held = Vec::new();
            while let Some((mut to, mut frame)) = frames.blocking_recv() {
                let odds = faults.delay_one_in.load(Ordering::Relaxed);
                if odds > 0 && rand::random_range(0..odds) == 0 {
                    held.push((to, frame));
                    if held.len() < 4 {
                        continue;
                    }
                    (to, frame) = held.swap_remove(rand::random_range(0..held.len()));
                }
                let cut = faults.cut.load(Ordering::Relaxed) & (1 << id | 1 << to) != 0;
                let odds = faults.lose_one_in.load(Ordering::Relaxed);
                if cut || odds > 0 && rand::random_range(0..odds) == 0 {
                    continue;
                }
                if let Some(tapped) = faults.tapped.lock().unwrap().as_mut() {
                    tapped.push(frame.clone());
                }
                let receiver = slots.lock().unwrap()[to as usize - 1].clone();
                if let Some(receiver) = receiver {
                    receiver.step(id, &frame);
                }
            }
        });
    }

    /// Stops a replica at once, as a crash would, and waits until its directory is free.
    async fn crash(&self, id: u64) {
        let handle = self.slots.lock().unwrap()[id as usize - 1].take().unwrap();
        handle.shutdown();
        handle.stopped().await;
    }

    fn cut(&self, ids: &[u64]) {
        self.faults.cut.store(ids.iter().map(|id| 1 << id).sum(), Ordering::Relaxed);
    }

    fn handle(&self, id: u64) -> RaftHandle {
        self.slots.lock().unwrap()[id as usize - 1].clone().unwrap()
    }

    fn running(&self) -> Vec<RaftHandle> {
        self.slots.lock().unwrap().iter().flatten().cloned().collect()
    }

    /// Waits for a leader among the given replicas that all of them follow.
    async fn leader_of(&self, ids: &[u64]) -> RaftHandle {
        until("a leader", || {
            let seen: Vec<RaftStatus> = ids.iter().map(|id| self.handle(*id).status()).collect();
            let leader = seen.iter().find(|s| s.role == Role::Leader)?;
            seen.iter().all(|s| s.leader == Some(leader.id)).then(|| self.handle(leader.id))
        })
        .await
    }

    /// Proposes until it is acknowledged; a command may so be applied more than once.
    async fn commit(&self, command: &[u8]) -> u64 {
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            for handle in self.running() {
                if let Ok(answer) = handle.propose(command.to_vec()).await {
                    return u64::from_le_bytes(answer.try_into().unwrap());
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not committed: {:?}", self.running().iter().map(RaftHandle::status).collect::<Vec<_>>());
    }

    async fn commit_many(&self, range: std::ops::Range<u32>) -> Vec<(u64, Vec<u8>)> {
        let mut acknowledged = Vec::new();
        for i in range {
            let command = format!("command {i}").into_bytes();
            acknowledged.push((self.commit(&command).await, command));
        }
        acknowledged
    }

    fn journal(&self, id: u64) -> Vec<(u64, Vec<u8>)> {
        self.journals[id as usize - 1].0.lock().unwrap().clone()
    }

    /// Waits until every running replica has applied all of `acknowledged`, then compares their whole journals.
    async fn agree_on(&self, acknowledged: &[(u64, Vec<u8>)]) {
        let last = self.commit(b"the last").await;
        let ids: Vec<u64> = self.running().iter().map(|h| h.status().id).collect();
        for id in &ids {
            until("all is applied", || (self.handle(*id).status().applied >= last).then_some(())).await;
        }
        let cut = |id: u64| self.journal(id).into_iter().filter(|(i, _)| *i <= last).collect::<Vec<_>>();
        let first = cut(ids[0]);
        for item in acknowledged {
            assert!(first.contains(item), "{item:?} was acknowledged and is lost");
        }
        for id in &ids {
            assert_eq!(cut(*id), first, "replica {id} differs from replica {}", ids[0]);
        }
    }
}

fn test_config(id: u64, voters: Vec<u64>, dir: PathBuf) -> RaftConfig {
    RaftConfig { tick: Duration::from_millis(20), reserve_bytes: 1 << 20, ..RaftConfig::new(id, voters, dir, "test") }
}

/// Polls until there is a value; panics after [`DEADLINE`].
async fn until<T>(what: &str, mut value: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = value() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
