//! Holds one target to its promises: runs the kept inputs, then spoiled examples by number, and stops at the first that breaks one.
//!
//! A panic is caught, on whatever thread it happens; memory is counted; an input that takes longer than [`INPUT_TIME_MAX`] is a hang. What
//! takes the process with it (a stack that overflows, memory that is not there) leaves the number of its input behind ([`Progress`]),
//! for the process that watches this one.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use peakmem_alloc::PeakMemAllocTrait;

use crate::mutate::Random;
use crate::targets::{Parser, Target};
use crate::{MEMORY, corpus};

/// Time for one input, far above what any takes on a machine that is busy with other things.
pub const INPUT_TIME_MAX: Duration = Duration::from_secs(60);
/// Exit code of a process in which an input hung.
pub const HUNG: i32 = 124;
/// How often it is looked whether an input hangs.
const LOOK: Duration = Duration::from_secs(1);
/// Tries to make an input that breaks a promise smaller.
const SHRINKS_MAX: usize = 3000;

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After so many inputs.
    Runs(u64),
    /// After so much time.
    Time(Duration),
}

/// What came of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Inputs in all.
    pub runs: u64,
    /// Inputs that were taken for valid.
    pub taken: u64,
    /// Most memory that an input took, in bytes.
    pub memory: usize,
}

/// An input that breaks a promise.
#[derive(Debug)]
pub struct Broken {
    /// Which promise, and how.
    pub why: String,
    /// The input.
    pub input: Vec<u8>,
}

/// Where the number of the present input is written, for whoever watches this process. `None` is nobody.
pub struct Progress(Option<File>);

impl Progress {
    /// Writes to `path` from now on.
    ///
    /// # Errors
    /// What the system says.
    pub fn to(path: Option<&Path>) -> io::Result<Self> {
        path.map(File::create).transpose().map(Self)
    }

    fn at(&self, number: u64) {
        if let Some(file) = &self.0 {
            let _ = file.write_all_at(&number.to_le_bytes(), 0);
        }
    }

    /// The number that a process left behind.
    ///
    /// # Errors
    /// What the system says; it wrote none.
    pub fn read(path: &Path) -> io::Result<u64> {
        let mut bytes = [0; 8];
        File::open(path)?.read_exact_at(&mut bytes, 0)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// The input of a number. Depends on nothing but its arguments.
#[must_use]
pub fn input(target: &Target, examples: &[Vec<u8>], seed: u64, number: u64) -> Vec<u8> {
    let mut random = Random::new(seed ^ u64::from(crc32fast::hash(target.name.as_bytes())), number);
    let (mut input, other) = (random.pick(examples).clone(), random.pick(examples));
    // Now and then an example as it is: a target that takes none does not do what it is for.
    if !random.once_in(64) {
        (target.spoil)(&mut input, other, &mut random);
    }
    input
}

/// Runs a target.
///
/// # Errors
/// The first input that breaks a promise, made smaller where that can be done.
pub fn run(target: &Target, seed: u64, until: Until, progress: &Progress) -> Result<Tally, Broken> {
    let (mut bench, examples) = (Bench::new(target), (target.examples)());
    let began = Instant::now();
    for (path, bytes) in corpus::kept(target.name).expect("the corpus can be read") {
        bench.hold(&bytes, 0).map_err(|why| Broken { why: format!("{}: {why}", path.display()), input: bytes })?;
    }
    for number in 0.. {
        let over = match until {
            Until::Runs(runs) => number >= runs,
            Until::Time(time) => began.elapsed() >= time,
        };
        if over {
            break;
        }
        progress.at(number);
        let input = input(target, &examples, seed, number);
        if let Err(why) = bench.hold(&input, number) {
            return Err(bench.smaller(Broken { why: format!("seed {seed}, input {number}: {why}"), input }));
        }
    }
    Ok(bench.tally)
}

/// Runs single inputs.
///
/// # Errors
/// The first that breaks a promise.
pub fn replay(target: &Target, inputs: &[PathBuf]) -> Result<Tally, Broken> {
    let mut bench = Bench::new(target);
    for path in inputs {
        let input =
            std::fs::read(path).map_err(|error| Broken { why: format!("{}: {error}", path.display()), input: Vec::new() })?;
        bench.hold(&input, 0).map_err(|why| Broken { why, input })?;
    }
    Ok(bench.tally)
}

/// Panics since the last look, each with its place.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// A target that is being run.
struct Bench<'a> {
    target: &'a Target,
    parse: Parser,
    tally: Tally,
    watch: Arc<Watch>,
}

impl<'a> Bench<'a> {
    fn new(target: &'a Target) -> Self {
        set_hook(Box::new(|panic| PANICS.lock().unwrap_or_else(PoisonError::into_inner).push(panic.to_string())));
        let watch = Arc::new(Watch::default());
        thread::spawn({
            let (watch, name) = (watch.clone(), target.name);
            move || watch.keep(name)
        });
        Self { target, parse: (target.open)(), tally: Tally::default(), watch }
    }

    /// Parses one input and compares what happened with the promises.
    fn hold(&mut self, input: &[u8], number: u64) -> Result<(), String> {
        self.watch.begin(number);
        MEMORY.reset_peak_memory();
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.parse)(input)));
        let memory = MEMORY.get_peak_memory();
        self.watch.end();
        let mut panics = std::mem::take(&mut *PANICS.lock().unwrap_or_else(PoisonError::into_inner));
        let Ok(outcome) = outcome else { return Err(panics.join("; ")) };
        panics.retain(|panic| !self.target.caught.iter().any(|part| panic.contains(part)));
        if !panics.is_empty() {
            return Err(format!("on another thread: {}", panics.join("; ")));
        }
        let memory_max = (self.target.memory_max)(input.len());
        if memory > memory_max {
            return Err(format!("{memory} bytes of memory for {} of input, the promise is {memory_max}", input.len()));
        }
        self.tally.runs += 1;
        self.tally.taken += u64::from(outcome?);
        self.tally.memory = self.tally.memory.max(memory);
        Ok(())
    }

    /// Takes pieces out of an input for as long as it goes on breaking a promise.
    fn smaller(&mut self, broken: Broken) -> Broken {
        let Broken { why, mut input } = broken;
        let mut piece = input.len() / 2;
        let mut tries = 0;
        while piece > 0 && tries < SHRINKS_MAX {
            let mut at = 0;
            while at + piece <= input.len() && tries < SHRINKS_MAX {
                let mut shorter = input.clone();
                shorter.drain(at..at + piece);
                tries += 1;
                if self.hold(&shorter, u64::MAX).is_err() { input = shorter } else { at += piece }
            }
            piece /= 2;
        }
        Broken { why, input }
    }
}

/// Says which input hangs, and ends the process.
#[derive(Default)]
struct Watch {
    /// Inputs that were begun; the present one is under way while it is odd.
    turn: AtomicU64,
    number: AtomicU64,
}

impl Watch {
    fn begin(&self, number: u64) {
        self.number.store(number, Relaxed);
        self.turn.fetch_add(1, Relaxed);
    }

    fn end(&self) {
        self.turn.fetch_add(1, Relaxed);
    }

    fn keep(&self, target: &str) {
        let (mut turn, mut since) = (0, Instant::now());
        loop {
            thread::sleep(LOOK);
            let now = self.turn.load(Relaxed);
            if now != turn || now.is_multiple_of(2) {
                (turn, since) = (now, Instant::now());
            } else if since.elapsed() > INPUT_TIME_MAX {
                eprintln!("{target}: input {} hangs", self.number.load(Relaxed));
                process::exit(HUNG);
            }
        }
    }
}
