//! Prints measured figures as rows for `docs/benchmarks.md`. What they mean is said there.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use millrace_load::millload::network;
use millrace_load::report::{HEAD, Row};
use millrace_load::{beside, engine, events, exposed, faults, handover, index, machine, raft, route, wire};

/// Measures this machine and prints medians.
#[derive(Parser)]
struct Arguments {
    /// Sections to run; all but `faults`, which takes an hour, and `exposed` and `beside`, which want a network namespace, when absent. May be repeated.
    #[arg(long, value_enum)]
    only: Vec<Section>,
    /// Fewer and shorter runs: to see that it works, not to quote.
    #[arg(long)]
    quick: bool,
    /// Model directory or GGUF file.
    #[arg(long, env = "MILLRACE_MODEL")]
    model: Option<PathBuf>,
    /// Be one end of a path of `wire`.
    #[arg(long, hide = true, num_args = 1.., allow_hyphen_values = true)]
    wire_end: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    Engine,
    Handover,
    Wire,
    Route,
    Raft,
    Index,
    Events,
    Exposed,
    Beside,
    Faults,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if !arguments.wire_end.is_empty() {
        return wire::end::run(&arguments.wire_end);
    }
    if matches!(*arguments.only, [Section::Faults | Section::Exposed | Section::Beside]) && !network::inside() {
        let words: Vec<_> = std::env::args().skip(1).collect();
        if let Some(went_well) = network::run_inside(&words)? {
            anyhow::ensure!(went_well, "the run in the namespace failed");
            return Ok(());
        }
    }
    println!("{}\n\n{HEAD}", machine::describe());
    let wanted = |section: &Section| match arguments.only.as_slice() {
        [] => !matches!(section, Section::Exposed | Section::Beside | Section::Faults),
        named => named.contains(section),
    };
    for section in Section::value_variants().iter().filter(|section| wanted(section)) {
        run(*section, &arguments)?;
    }
    Ok(())
}

fn run(section: Section, arguments: &Arguments) -> Result<()> {
    let (runs, quick) = (if arguments.quick { 3 } else { 5 }, arguments.quick);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let print = |row: Row| println!("{row}");
    match section {
        Section::Engine => {
            let model = model(arguments)?;
            engine::alone(&model, (runs, quick), &print)?;
            runtime.block_on(engine::measure(&model, "bf16", (runs, quick), &print))?;
            runtime.block_on(engine::measure(&model, "f32", (runs, quick), &print))?;
        }
        Section::Handover => runtime.block_on(handover::measure(&model(arguments)?, "bf16", runs, &print))?,
        Section::Wire => wire::measure(runs, if quick { 128 } else { 1024 }, &print)?,
        Section::Route => route::measure(runs).into_iter().for_each(print),
        Section::Raft => raft::measure(runs.min(3), quick)?.into_iter().for_each(print),
        Section::Events => events::measure(runs.min(3), quick)?.into_iter().for_each(print),
        Section::Index => index::measure(runs, if quick { 1 } else { 10 }).into_iter().for_each(print),
        Section::Exposed => runtime.block_on(exposed::measure(&model(arguments)?, (runs, quick), &print))?,
        Section::Beside => runtime.block_on(beside::measure(&model(arguments)?, runs, &print))?,
        Section::Faults => runtime.block_on(faults::measure(quick, &print))?,
    }
    Ok(())
}

fn model(arguments: &Arguments) -> Result<PathBuf> {
    let path = arguments.model.clone().filter(|path| !path.as_os_str().is_empty());
    path.context("no model: set MILLRACE_MODEL or give --model (`make bench` does)")
}
