//! Runs the fuzzer: each target in a process of its own, so that one which takes its process with it is found as well, and its input kept.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use millrace_fuzz::run::{self, Broken, HUNG, Progress, Until};
use millrace_fuzz::targets::{TARGETS, Target, named};
use millrace_fuzz::{corpus, run::Tally};

/// Spoils valid inputs of every parser and holds the parsers to their promises.
#[derive(Parser)]
#[command(name = "millrace-fuzz", version)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// The targets
    List,
    /// Run targets; what breaks a promise is kept in the corpus
    Run(RunArgs),
    /// Run kept inputs of a target
    Replay {
        /// The target
        target: String,
        /// The inputs
        files: Vec<PathBuf>,
    },
    /// Run one target in this process; `run` starts these
    #[command(hide = true)]
    Alone(AloneArgs),
}

#[derive(Args)]
struct RunArgs {
    /// The targets; all if absent
    targets: Vec<String>,
    /// Names all inputs
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds for all targets together; a fixed number of inputs if absent
    #[arg(long)]
    seconds: Option<u64>,
}

#[derive(Args)]
struct AloneArgs {
    target: String,
    #[arg(long)]
    seed: u64,
    #[arg(long)]
    seconds: Option<f64>,
    #[arg(long)]
    progress: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run_verb(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("millrace-fuzz: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every promise was held.
fn run_verb(verb: Verb) -> Result<bool> {
    match verb {
        Verb::List => {
            TARGETS.iter().for_each(|target| println!("{:<14} {}", target.name, target.what));
            Ok(true)
        }
        Verb::Replay { target, files } => {
            let target = must(&target)?;
            Ok(tell(target, run::replay(target, &files), false))
        }
        Verb::Alone(args) => alone(&args),
        Verb::Run(args) => all(&args),
    }
}

fn must(name: &str) -> Result<&'static Target> {
    named(name).with_context(|| format!("no target {name:?}; `list` has them"))
}

fn alone(args: &AloneArgs) -> Result<bool> {
    let target = must(&args.target)?;
    let until = args.seconds.map_or(Until::Runs(target.short_runs), |seconds| Until::Time(Duration::from_secs_f64(seconds)));
    let progress = Progress::to(args.progress.as_deref()).context("the progress")?;
    Ok(tell(target, run::run(target, args.seed, until, &progress), true))
}

fn tell(target: &Target, outcome: Result<Tally, Broken>, keep: bool) -> bool {
    match outcome {
        Ok(Tally { runs, taken, memory }) => {
            println!("{:<14} {runs:>9} inputs, {taken:>8} taken, {:>6} KiB at most", target.name, memory >> 10);
            true
        }
        Err(Broken { why, input }) => {
            println!("{:<14} BROKEN {why}", target.name);
            if keep {
                kept(target, &input);
            }
            false
        }
    }
}

fn kept(target: &Target, input: &[u8]) {
    match corpus::keep(target.name, input) {
        Ok(path) => println!("kept as {}", path.display()),
        Err(error) => println!("cannot be kept: {error}; {input:?}"),
    }
}

fn all(args: &RunArgs) -> Result<bool> {
    let chosen: Vec<&Target> = match args.targets.is_empty() {
        true => TARGETS.iter().collect(),
        false => args.targets.iter().map(|name| must(name)).collect::<Result<_>>()?,
    };
    let each = args.seconds.map(|seconds| seconds as f64 / chosen.len() as f64);
    let mut sound = true;
    for target in chosen {
        sound &= watched(target, args.seed, each)?;
    }
    Ok(sound)
}

/// Runs one target in a process of its own.
fn watched(target: &Target, seed: u64, seconds: Option<f64>) -> Result<bool> {
    let dir = tempfile::tempdir().context("a scratch directory")?;
    let progress = dir.path().join("progress");
    let mut command = Command::new(std::env::current_exe().context("this program")?);
    command.args(["alone", target.name, "--seed", &seed.to_string(), "--progress"]).arg(&progress);
    if let Some(seconds) = seconds {
        command.args(["--seconds", &seconds.to_string()]);
    }
    let status = command.status().context("this program")?;
    match status.code() {
        Some(0) => return Ok(true),
        Some(1) => return Ok(false),
        Some(2) => bail!("the command line of a single target is wrong"),
        Some(HUNG) => println!("{:<14} BROKEN an input hangs", target.name),
        _ => println!("{:<14} BROKEN the process ends: {status}", target.name),
    }
    let number = Progress::read(&progress).context("which input it was")?;
    println!("{:<14} seed {seed}, input {number}", target.name);
    kept(target, &run::input(target, &(target.examples)(), seed, number));
    Ok(false)
}
