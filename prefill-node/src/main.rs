//! The prefill node's process.

use clap::Parser;
use prefill_node::Args;

fn main() -> std::process::ExitCode {
    prefill_node::main(Args::parse())
}
