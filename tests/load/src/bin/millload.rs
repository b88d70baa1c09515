//! The load harness; see `docs/load.md`.

use std::process::ExitCode;

use clap::Parser;
use millrace_load::millload::command::{Arguments, main as run};

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(verdict) => verdict.into(),
        Err(error) => {
            eprintln!("millload: {error:#}");
            ExitCode::from(2)
        }
    }
}
