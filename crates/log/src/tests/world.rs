//! Three replicas, a network, their disks and clients, all on one thread and in virtual time: the real driver, stepped, with every fault
//! drawn from a seed. The same seed gives the same history.
//!

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::driver::Planted;
use crate::testing::linear::{Kind, Op};
use crate::testing::simdisk::SimDisk;

const KEYS: u8 = 3;
const CLIENTS: usize = 5;
/// Writes that fail on a full disk before there is room again.
const FAILURES_MAX: u32 = 12;
/// Virtual milliseconds of one step, and until a client stops waiting.
const STEP_MS: u64 = 2;
const CLIENT_WAIT_MS: u64 = 1500;

type State = BTreeMap<u8, u64>;

/// Registers; a command is a key and a value.
#[derive(Clone, Default)]
struct Registers(Arc<Mutex<State>>);

impl StateMachine for Registers {
    type State = State;

    fn apply(&mut self, _: u64, command: &[u8]) -> Vec<u8> {
        let mut reader = Reader(command);
        let (key, value) = (reader.u8().unwrap(), reader.u64().unwrap());
        self.0.lock().unwrap().insert(key, value);
        Vec::new()
    }

    fn view(&self) -> State {
        self.0.lock().unwrap().clone()
    }

    fn encode(state: &State) -> Vec<u8> {
        let mut out = vec![0; 700_000]; // some chunks
        state.iter().for_each(|(key, value)| {
            out.push(*key);
            put_u64(&mut out, *value);
        });
        out
    }

    fn decode(bytes: &[u8]) -> Result<State, RestoreError> {
        let mut reader = Reader(bytes.get(700_000..).ok_or_else(|| RestoreError("short".into()))?);
        let mut state = State::new();
        while let (Some(key), Some(value)) = (reader.u8(), reader.u64()) {
            state.insert(key, value);
        }
        Ok(state)
    }

    fn install(&mut self, state: State) {
        *self.0.lock().unwrap() = state;
    }
}

struct Live {
    replica: Stepped<Registers>,
    registers: Registers,
}

struct Machine {
    disk: SimDisk,
    live: Option<Live>,
    /// Virtual times of coming back, of going on after a pause, and of room on the disk.
    back_ms: u64,
    paused_ms: u64,
    full_ms: Option<u64>,
}

/// An operation in flight.
struct Asked {
    op: Op,
    until_ms: u64,
    answer: Pin<Box<dyn Future<Output = Result<Option<u64>, ProposeError>>>>,
}

/// What happened, for a test to look at.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Story {
    pub history: Vec<Op>,
    pub crashes: u32,
    pub restarts: u32,
    pub fills: u32,
    pub snapshots_installed: u32,
    pub leaders: u32,
    /// Replicas that did not come back or broke down, which only planted bugs bring about.
    pub broken: u32,
}

/// When a frame arrives, its number, from whom, to whom, the frame.
type Flight = (u64, u64, u64, u64, Vec<u8>);

/// The whole.
pub(super) struct World {
    seed: u64,
    rng: StdRng,
    planted: Planted,
    start: Instant,
    now_ms: u64,
    events: u64,
    machines: Vec<Machine>,
    flights: BinaryHeap<Reverse<Flight>>,
    /// Pairs that do not hear each other, one way, until a time.
    cut: BTreeMap<(u64, u64), u64>,
    clients: Vec<Option<Asked>>,
    values: u64,
    leader_seen: (u64, u64),
    story: Story,
}

impl World {
    pub fn new(seed: u64, planted: Planted) -> Self {
        let machine = |_| Machine { disk: SimDisk::default(), live: None, back_ms: 0, paused_ms: 0, full_ms: None };
        let mut world = Self {
            seed,
            rng: StdRng::seed_from_u64(seed),
            planted,
            start: Instant::now(),
            now_ms: 0,
            events: 0,
            machines: (0..REPLICAS).map(machine).collect(),
            flights: BinaryHeap::new(),
            cut: BTreeMap::new(),
            clients: (0..CLIENTS).map(|_| None).collect(),
            values: 0,
            leader_seen: (0, 0),
            story: Story::default(),
        };
        (0..REPLICAS as usize).for_each(|i| world.launch(i));
        world
    }

    /// Lets `ms` virtual milliseconds pass, then heals everything for long enough to see what became of all writes.
    pub fn run(mut self, ms: u64) -> Story {
        while self.now_ms < ms {
            self.fault();
            self.step();
        }
        self.cut.clear();
        (0..REPLICAS as usize).for_each(|i| self.heal(i));
        while self.now_ms < ms + 4000 {
            self.step();
        }
        let unanswered = self.clients.into_iter().flatten().map(|asked| asked.op);
        self.story.history.extend(unanswered.filter(|op| matches!(op.kind, Kind::Write(_))));
        self.story
    }

    fn heal(&mut self, i: usize) {
        self.machines[i].disk.free();
        (self.machines[i].full_ms, self.machines[i].paused_ms) = (None, 0);
        self.machines[i].back_ms = self.now_ms;
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.now_ms)
    }

    fn launch(&mut self, i: usize) {
        let id = i as u64 + 1;
        let log = LogLimits { entries_max: 40, bytes_max: 1 << 20, entries_kept: 5 };
        let config = RaftConfig { log, reserve_bytes: 1 << 16, ..test_config(id, (1..=REPLICAS).collect(), "/raft".into()) };
        let registers = Registers::default();
        let disk = Arc::new(self.machines[i].disk.clone());
        match Stepped::open(disk, config, registers.clone(), self.now(), self.seed) {
            Ok(mut replica) => {
                replica.driver.planted = self.planted;
                self.machines[i].live = Some(Live { replica, registers });
            }
            Err(RaftStartError::Disk(_)) => self.machines[i].back_ms = self.now_ms + 300,
            Err(error) => self.broke(i, &error.to_string()),
        }
    }

    fn broke(&mut self, i: usize, why: &str) {
        assert_ne!(self.planted, Planted::Nothing, "replica {} broke, seed {}: {why}", i + 1, self.seed);
        self.story.broken += 1;
        self.machines[i].live = None;
        self.machines[i].back_ms = u64::MAX;
    }

    fn crash(&mut self, i: usize) {
        if self.machines[i].live.take().is_none() {
            return;
        }
        let rng = &mut self.rng;
        self.machines[i].disk.crash(&mut |len| rng.random_range(0..=len));
        self.machines[i].back_ms = self.now_ms + self.rng.random_range(20..1200);
        self.story.crashes += 1;
    }

    /// Now and then, something goes wrong.
    fn fault(&mut self) {
        let i = self.rng.random_range(0..REPLICAS as usize);
        let until = self.now_ms + self.rng.random_range(50..1500);
        match self.rng.random_range(0..4000) {
            0..=5 => self.crash(i),
            6..=7 => (0..REPLICAS as usize).for_each(|i| self.crash(i)),
            8..=13 => {
                let (a, b) = (i as u64 + 1, self.rng.random_range(1..=REPLICAS));
                self.cut.insert((a, b), until);
                if self.rng.random() {
                    self.cut.insert((b, a), until);
                }
            }
            14..=18 => {
                for other in 1..=REPLICAS {
                    self.cut.insert((i as u64 + 1, other), until);
                    self.cut.insert((other, i as u64 + 1), until);
                }
            }
            19..=22 => self.machines[i].paused_ms = until,
            23..=26 => {
                self.machines[i].disk.fill_for(FAILURES_MAX);
                self.machines[i].full_ms = Some(until);
                self.story.fills += 1;
            }
            27 => self.machines[i].disk.fail_next_sync(),
            _ => {}
        }
    }

    fn step(&mut self) {
        self.now_ms += STEP_MS;
        let now_ms = self.now_ms;
        self.cut.retain(|_, until| *until > now_ms);
        while self.flights.peek().is_some_and(|Reverse(flight)| flight.0 <= now_ms) {
            let Some(Reverse((_, _, from, to, frame))) = self.flights.pop() else { break };
            if let Some(live) = &self.machines[to as usize - 1].live {
                live.replica.handle().step(from, &frame);
            }
        }
        for i in 0..REPLICAS as usize {
            self.step_machine(i);
        }
        for client in 0..CLIENTS {
            self.step_client(client);
        }
    }

    fn step_machine(&mut self, i: usize) {
        let now = self.now();
        let machine = &mut self.machines[i];
        if machine.full_ms.take_if(|until| *until <= self.now_ms).is_some() {
            machine.disk.free();
        }
        if machine.live.is_none() && machine.back_ms <= self.now_ms {
            self.story.restarts += 1;
            return self.launch(i);
        }
        if machine.paused_ms > self.now_ms {
            return;
        }
        let Some(live) = &mut machine.live else { return };
        let before = live.replica.handle().status();
        let round = live.replica.step(now);
        let after = live.replica.handle().status();
        if after.applied > before.applied && after.first_index > before.applied + 1 && after.snapshot_index == after.first_index - 1
        {
            self.story.snapshots_installed += 1;
        }
        if after.role == Role::Leader && (after.term, after.id) > self.leader_seen {
            self.leader_seen = (after.term, after.id);
            self.story.leaders += 1;
        }
        match round {
            Ok(()) => self.take_outgoing(i),
            Err(Stop::Failed(RaftFailure::Disk(_))) => self.crash(i),
            Err(Stop::Failed(failure)) => self.broke(i, &failure.to_string()),
            Err(Stop::Asked) => panic!("nobody asked it to stop"),
        }
    }

    fn take_outgoing(&mut self, i: usize) {
        let from = i as u64 + 1;
        while let Some((to, frame)) = self.machines[i].live.as_mut().and_then(|live| live.replica.next_frame()) {
            let copies = match self.rng.random_range(0..100) {
                0..=2 => 0,
                3 => 2,
                _ => 1,
            };
            for _ in 0..if self.cut.contains_key(&(from, to)) { 0 } else { copies } {
                let slow = if self.rng.random_range(0..20) == 0 { 200 } else { 8 };
                let at = self.now_ms + self.rng.random_range(1..=slow);
                self.events += 1;
                self.flights.push(Reverse((at, self.events, from, to, frame.clone())));
            }
        }
    }

    fn step_client(&mut self, client: usize) {
        let Some(mut asked) = self.clients[client].take() else {
            if self.rng.random_range(0..8) == 0 {
                self.clients[client] = self.ask();
            }
            return;
        };
        self.events += 1;
        match asked.answer.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Pending if asked.until_ms > self.now_ms => self.clients[client] = Some(asked),
            Poll::Ready(Ok(read)) => {
                if let Kind::Read(value) = &mut asked.op.kind {
                    *value = read;
                }
                asked.op.ret = Some(self.events);
                self.story.history.push(asked.op);
            }
            // Not answered, or answered that nobody knows: a write may yet take effect.
            Poll::Pending | Poll::Ready(Err(ProposeError::Lost | ProposeError::Stopped)) => {
                if matches!(asked.op.kind, Kind::Write(_)) {
                    self.story.history.push(asked.op);
                }
            }
            Poll::Ready(Err(_)) => {} // it had no effect
        }
    }

    fn ask(&mut self) -> Option<Asked> {
        let live: Vec<usize> = (0..REPLICAS as usize).filter(|i| self.machines[*i].live.is_some()).collect();
        let pick = *live.get(self.rng.random_range(0..live.len().max(1)))?;
        let (key, reads) = (self.rng.random_range(0..KEYS), self.rng.random::<bool>());
        let leads = |i: &&usize| self.machines[**i].live.as_ref().is_some_and(|l| l.replica.handle().status().role == Role::Leader);
        let pick = if reads { pick } else { live.iter().find(leads).copied().unwrap_or(pick) };
        let live = self.machines[pick].live.as_ref()?;
        let (handle, registers) = (live.replica.handle().clone(), live.registers.clone());
        self.events += 1;
        self.values += 1;
        let value = self.values;
        let answer: Pin<Box<dyn Future<Output = _>>> = match reads {
            true => Box::pin(async move {
                handle.read_index().await?;
                Ok(registers.0.lock().unwrap().get(&key).copied())
            }),
            false => Box::pin(async move {
                let mut command = vec![key];
                put_u64(&mut command, value);
                handle.propose(command).await.map(|_| None)
            }),
        };
        let kind = if reads { Kind::Read(None) } else { Kind::Write(value) };
        Some(Asked { op: Op { key, kind, call: self.events, ret: None }, until_ms: self.now_ms + CLIENT_WAIT_MS, answer })
    }
}
