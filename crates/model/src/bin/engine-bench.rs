//! Measures the engine on this machine; `millbench --only engine` runs it, because it needs LibTorch and `millbench` does not.
//!
//! Each line is one value: the figure's name, a tab, the number.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use millrace_model::bench::{self, Plan};

/// Measures engines beside the limits of the machine.
#[derive(Parser)]
struct Arguments {
    /// Model directory or GGUF file
    #[arg(long)]
    model: PathBuf,
    /// Threads; 0 takes all processors
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// How often everything is measured
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Timed decode steps
    #[arg(long, default_value_t = 24)]
    steps: usize,
    /// Only figures whose names contain this; may be given several times
    #[arg(long)]
    only: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = if arguments.threads == 0 { processors } else { arguments.threads };
    let plan = Plan { rounds: arguments.rounds, steps: arguments.steps, threads, only: arguments.only };
    let mut print = |what: &str, value: f64| println!("{what}\t{value}");
    match bench::measure(&arguments.model, &plan, &mut print) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("engine-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
