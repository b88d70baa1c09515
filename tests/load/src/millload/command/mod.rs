//! The command line of `millload`. Exit codes: 0 fine, 1 what was asked does not hold (invalid run, worse, not verified), 2 usage or a broken
//! file.

mod plan;

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
    }
}
