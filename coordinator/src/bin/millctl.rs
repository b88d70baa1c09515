//! The `millctl` binary: the operator's tool. What it can do is in `coordinator::ctl`.

use std::process::ExitCode;

use clap::Parser;
use coordinator::ctl::{self, Cli};

fn main() -> ExitCode {
    ctl::main(Cli::parse())
}
