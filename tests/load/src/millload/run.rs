//! Executes a plan. Each thread has a part of it, a runtime and connections of its own; what a request waits for is decided by the plan, never
//! by how many are under way. Above [`Options::in_flight_max`] a request is not sent and counts as a failure.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Barrier, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::client::body::Writer;
use super::client::pool::Pool;
use super::client::{Answer, Listening, exchange};
use super::clock::{SPIN, until};
use super::live::Live;
use super::plan::{Plan, Planned};
use super::record::{Outcome, Record};

/// Planned tokens of answers above which single gaps are not kept: 256 MB of them.
pub const GAPS_MAX: u64 = 64 << 20;
/// Bytes of bodies that each thread writes in advance.
const PREPARED_BYTES_MAX: usize = 64 << 20;

/// Whether a run goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It does.
    No,
    /// Nothing more is sent; what is under way ends by itself.
    Drain,
    /// What is under way ends now.
    Abort,
}

/// How a plan is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to, and how requests are written.
    pub writer: Writer,
    /// Threads.
    pub threads: u32,
    /// Which part of the plan, of how many.
    pub part: (u32, u32),
    /// Due times are divided by this.
    pub speed: f64,
    /// Time for one request.
    pub timeout: Duration,
    /// Requests under way at a time; one more is dropped.
    pub in_flight_max: usize,
    /// Idle connections that are kept for later requests.
    pub idle_max: usize,
    /// When to begin; several generators agree on it. At once when absent.
    pub begin: Option<Instant>,
}

struct Shared {
    plan: Arc<Plan>,
    options: Options,
    live: Arc<Live>,
    stop: watch::Receiver<Stop>,
    started: Arc<OnceLock<Instant>>,
    under_way: AtomicUsize,
    keep_gaps: bool,
    pool: Pool,
}

/// What a run gave.
#[derive(Debug)]
pub struct Ran {
    /// When it began.
    pub started: Instant,
    /// Every request that was taken up, by number.
    pub records: Vec<Record>,
}

/// Runs a plan to its end, or until `stop`. Blocks; `started` is set when the clock starts.
///
/// # Errors
/// Threads or sockets cannot be had.
pub fn run(
    plan: &Arc<Plan>,
    options: &Options,
    live: &Arc<Live>,
    stop: &watch::Receiver<Stop>,
    started: &Arc<OnceLock<Instant>>,
) -> Result<Ran> {
    let (index, of) = options.part;
    let threads = options.threads.max(1);
    let barrier = Arc::new(Barrier::new(threads as usize));
    let parts: Vec<Vec<Vec<u32>>> = (0..threads).map(|thread| plan.part(index + of * thread, of * threads)).collect();
    live.planned.store(parts.iter().flatten().map(|unit| unit.len() as u64).sum(), Relaxed);
    let output: u64 = plan.requests.iter().map(|request| u64::from(request.out)).sum();
    let mut records = std::thread::scope(|scope| {
        let start = |units: Vec<Vec<u32>>| {
            let shared = Shared {
                plan: plan.clone(),
                options: options.clone(),
                live: live.clone(),
                stop: stop.clone(),
                started: started.clone(),
                under_way: AtomicUsize::new(0),
                keep_gaps: output <= GAPS_MAX,
                pool: Pool::new(&options.writer.target, options.idle_max),
            };
            let barrier = barrier.clone();
            scope.spawn(move || thread(Arc::new(shared), units, &barrier))
        };
        let running: Vec<_> = parts.into_iter().map(start).collect();
        let ended =
            running.into_iter().map(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("a generator thread panicked")));
        ended.collect::<Result<Vec<_>>>().map(|parts| parts.concat())
    })?;
    records.sort_by_key(|record| record.i);
    let started = *started.get().context("the run never began")?;
    Ok(Ran { started, records })
}

fn thread(shared: Arc<Shared>, units: Vec<Vec<u32>>, barrier: &Barrier) -> Result<Vec<Record>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let prepared = Prepared::new(&shared, &units);
    barrier.wait();
    let runtime = runtime?;
    let begin = shared.options.begin.unwrap_or_else(|| Instant::now() + 2 * SPIN);
    shared.started.get_or_init(|| begin);
    Ok(match shared.plan.header.users {
        None => runtime.block_on(shared.open(units, prepared)),
        Some(users) => runtime.block_on(shared.closed(units, users)),
    })
}

/// Bodies of requests to come, written while there is time.
struct Prepared {
    bodies: VecDeque<Bytes>,
    bytes: usize,
    next: usize,
}

impl Prepared {
    fn new(shared: &Shared, units: &[Vec<u32>]) -> Self {
        let mut prepared = Self { bodies: VecDeque::new(), bytes: 0, next: 0 };
        if shared.plan.header.users.is_none() {
            while prepared.one_more(shared, units) {}
        }
        prepared
    }

    fn one_more(&mut self, shared: &Shared, units: &[Vec<u32>]) -> bool {
        let Some(unit) = units.get(self.next).filter(|_| self.bytes < PREPARED_BYTES_MAX) else { return false };
        let body = shared.body(unit[0], &[]);
        self.bytes += body.len();
        self.next += 1;
        self.bodies.push_back(body);
        true
    }

    fn take(&mut self, shared: &Shared, units: &[Vec<u32>], at: usize) -> Bytes {
        match self.bodies.pop_front() {
            Some(body) => {
                self.bytes -= body.len();
                body
            }
            None => {
                self.next = at + 1;
                shared.body(units[at][0], &[])
            }
        }
    }
}

impl Shared {
    fn started(&self) -> Instant {
        *self.started.get().expect("set before any request")
    }

    fn now_ns(&self) -> u64 {
        Instant::now().saturating_duration_since(self.started()).as_nanos() as u64
    }

    fn request(&self, i: u32) -> &Planned {
        &self.plan.requests[i as usize]
    }

    fn body(&self, i: u32, answers: &[Answer]) -> Bytes {
        self.options.writer.body(&self.plan, self.request(i), answers)
    }

    fn stopped(&self) -> bool {
        *self.stop.borrow() != Stop::No
    }

    /// Waits; false when the run was stopped first.
    async fn wait_until(&self, due_ns: u64) -> bool {
        let at = self.started() + Duration::from_nanos(due_ns);
        let mut stop = self.stop.clone();
        tokio::select! {
            () = until(at) => !self.stopped(),
            _ = stop.wait_for(|stop| *stop != Stop::No) => false,
        }
    }

    async fn open(self: Arc<Self>, units: Vec<Vec<u32>>, mut prepared: Prepared) -> Vec<Record> {
        let (mut running, mut records) = (JoinSet::new(), Vec::with_capacity(units.len()));
        for (at, unit) in units.iter().enumerate() {
            let due_ns = (self.request(unit[0]).due_ns as f64 / self.options.speed) as u64;
            let body = prepared.take(&self, &units, at);
            while self.now_ns() + 2 * (SPIN.as_nanos() as u64) < due_ns && prepared.one_more(&self, &units) {}
            if !self.wait_until(due_ns).await {
                break;
            }
            while let Some(done) = running.try_join_next() {
                records.extend(done.unwrap_or_default());
            }
            running.spawn(self.clone().unit(unit.clone(), due_ns, body));
        }
        while let Some(done) = running.join_next().await {
            records.extend(done.unwrap_or_default());
        }
        records
    }

    async fn closed(self: Arc<Self>, units: Vec<Vec<u32>>, users: u32) -> Vec<Record> {
        let parts = self.options.threads.max(1) * self.options.part.1;
        let (units, next) = (Arc::new(units), Arc::new(AtomicUsize::new(0)));
        let mut running = JoinSet::new();
        for _ in 0..users.div_ceil(parts) {
            let (shared, units, next) = (self.clone(), units.clone(), next.clone());
            running.spawn(async move {
                let mut records = Vec::new();
                if !shared.wait_until(0).await {
                    return records;
                }
                while let Some(unit) = units.get(next.fetch_add(1, Relaxed)).filter(|_| !shared.stopped()) {
                    let body = shared.body(unit[0], &[]);
                    let due_ns = shared.now_ns();
                    records.extend(shared.clone().unit(unit.clone(), due_ns, body).await);
                }
                records
            });
        }
        running.join_all().await.concat()
    }

    /// The turns of a session, or one request. A turn that fails ends the session: the next would need its answer.
    async fn unit(self: Arc<Self>, unit: Vec<u32>, due_ns: u64, body: Bytes) -> Vec<Record> {
        let (mut records, mut answers) = (Vec::with_capacity(unit.len()), Vec::new());
        let (mut due_ns, mut body) = (due_ns, Some(body));
        for (at, i) in unit.iter().enumerate() {
            let body = body.take().unwrap_or_else(|| self.body(*i, &answers));
            if at > 0 && !self.wait_until(due_ns).await {
                break;
            }
            let mut answer = Answer::default();
            let record = self.one(*i, due_ns, body, &mut answer).await;
            let after_ms = unit.get(at + 1).map_or(0, |next| self.request(*next).after_ms);
            due_ns = record.end_ns + u64::from(after_ms) * 1_000_000;
            let whole = record.ok();
            records.push(record);
            answers.push(answer);
            if !whole {
                break;
            }
        }
        records
    }

    async fn one(&self, i: u32, due_ns: u64, body: Bytes, answer: &mut Answer) -> Record {
        let request = self.request(i);
        let mut record = Record { i, class: request.class, due_ns, sent_ns: self.now_ns(), ..Record::default() };
        self.live.began();
        record.outcome = if self.under_way.fetch_add(1, Relaxed) >= self.options.in_flight_max {
            Outcome::Dropped
        } else {
            self.answered(request, body, &mut record, answer).await
        };
        self.under_way.fetch_sub(1, Relaxed);
        record.end_ns = self.now_ns();
        self.live.ended(&record);
        record
    }

    async fn answered(&self, request: &Planned, body: Bytes, record: &mut Record, answer: &mut Answer) -> Outcome {
        let trace = u64::from(request.i);
        let Ok(http) = self.options.writer.request(body, &self.plan.digest, trace) else { return Outcome::Malformed };
        let how = Listening { started: self.started(), keep_gaps: self.keep_gaps, tokens: self.least_tokens(request) };
        let mut stop = self.stop.clone();
        tokio::select! {
            outcome = exchange(&self.pool, http, how, record, answer) => outcome,
            () = tokio::time::sleep(self.options.timeout) => Outcome::Timeout,
            _ = stop.wait_for(|stop| *stop == Stop::Abort) => Outcome::Unfinished,
        }
    }

    /// Without `ignore_eos` an answer may end early.
    fn least_tokens(&self, request: &Planned) -> u32 {
        if self.options.writer.extensions { request.out } else { 1 }
    }
}
