//! Runs the simulator over seeds and says how to repeat the one that fails.

use std::panic::catch_unwind;
use std::process::ExitCode;

use clap::Parser;
use millrace_sim::{Options, run};

/// Runs the whole cluster deterministically, with faults, and checks every invariant after every event.
#[derive(Parser)]
struct Arguments {
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Events of each run before faults and clients stop.
    #[arg(long, default_value_t = 10_000)]
    steps: u64,
    /// Seeds, one after another.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Print every event.
    #[arg(long)]
    trace: bool,
    /// Damage so many hand-overs and see that none is decoded, hand ten times as many blocks over undamaged, and abort a tenth as many.
    #[arg(long)]
    corruptions: Option<u64>,
    /// Plant each bug whose name has this in it (all have nothing), and see whether the seeds find it.
    #[cfg(millrace_planted)]
    #[arg(long)]
    mutants: Option<String>,
    /// Seeds for a bug that the first ones do not find.
    #[cfg(millrace_planted)]
    #[arg(long, default_value_t = 1_000)]
    seeds_max: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    #[cfg(millrace_planted)]
    if let Some(only) = &arguments.mutants {
        let Arguments { seed, steps, seeds, seeds_max, .. } = arguments;
        let found = millrace_sim::mutants::search(&millrace_sim::mutants::Search { seed, steps, seeds, seeds_max }, only);
        return if found { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    if let Some(corruptions) = arguments.corruptions {
        return corrupt(arguments.seed, corruptions);
    }
    let Arguments { seed, steps, seeds, trace, .. } = arguments;
    for seed in seed..seed.saturating_add(seeds) {
        match catch_unwind(|| run(Options { seed, steps, trace })) {
            Ok(outcome) => println!("{outcome}"),
            Err(_) => return ExitCode::FAILURE,
        }
    }
    ExitCode::SUCCESS
}

fn corrupt(seed: u64, corruptions: u64) -> ExitCode {
    let report = millrace_sim::corruption::run(seed, corruptions, corruptions * 10);
    println!("{report}\n");
    println!("{}", millrace_sim::aborts::run(seed, corruptions / 10));
    if report.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
