//! The decode node's process.

use clap::Parser;
use decode_node::Args;

fn main() -> std::process::ExitCode {
    decode_node::main(Args::parse())
}
