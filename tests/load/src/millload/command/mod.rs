//! The command line of `millload`. Exit codes: 0 fine, 1 what was asked does not hold (invalid run, worse, not verified), 2 usage or a broken
//! file.

mod calibrate;
mod compare;
pub mod execute;
mod experiment;
mod plan;
mod run;
mod search;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures a serving cluster under load, from the moment each request was due.
#[derive(Parser, Debug)]
#[command(name = "millload", version)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Make a plan, or verify one
    Plan(plan::PlanArgs),
    /// Run a plan and report
    Run(Box<run::RunArgs>),
    /// Make figures anew from results, or of the parts of a run together
    Report(run::ReportArgs),
    /// Is B better than A? Pairs requests of the same plan
    Compare(compare::CompareArgs),
    /// Which way of placing is better? Runs plans on fresh local clusters
    Experiment(Box<experiment::ExperimentArgs>),
    /// Find the highest rate that meets an objective
    Search(Box<search::SearchArgs>),
    /// Measure several rates
    Sweep(Box<search::SweepArgs>),
    /// Serve answers with known delays
    Serve(calibrate::ServeArgs),
    /// Hold the figures against known delays
    Check(calibrate::CheckArgs),
    /// Find the generator's own limit
    Ceiling(calibrate::CeilingArgs),
}

/// Whether what was asked holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It does.
    Holds,
    /// It does not.
    Fails,
}

impl From<Verdict> for ExitCode {
    fn from(verdict: Verdict) -> Self {
        Self::from(u8::from(verdict == Verdict::Fails))
    }
}

/// Does what the command line says.
///
/// # Errors
/// It cannot be done.
pub fn main(arguments: &Arguments) -> Result<Verdict> {
    match &arguments.command {
        Command::Plan(args) => plan::main(args),
        Command::Run(args) => run::main(args),
        Command::Report(args) => run::report(args),
        Command::Compare(args) => compare::main(args),
        Command::Experiment(args) => experiment::main(args),
        Command::Search(args) => search::search(args),
        Command::Sweep(args) => search::sweep(args),
        Command::Serve(args) => calibrate::serve(args),
        Command::Check(args) => calibrate::check(args),
        Command::Ceiling(args) => calibrate::ceiling(args),
    }
}
