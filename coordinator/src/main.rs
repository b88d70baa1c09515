//! The `coordinator` binary: one replica. Exit code 2 for a command line that makes no sense, 1 for any other failure.

use std::process::ExitCode;

use clap::Parser;
use coordinator::config::{Args, Config};
use coordinator::serve;
use millrace_node::shutdown::Shutdown;
use millrace_node::telemetry::{self, LogFormat};

fn main() -> ExitCode {
    let config = match Config::new(Args::parse()) {
        Ok(config) => config,
        Err(error) => return fail(&error, 2),
    };
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

fn run(config: Config) -> anyhow::Result<()> {
    telemetry::init(LogFormat::default())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let shutdown = Shutdown::new();
        shutdown.on_signals()?;
        if config.args.exit_with_parent {
            shutdown.on_stdin_end()?;
        }
        serve::run(config, shutdown).await
    })
}

fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("coordinator: {error:#}");
    ExitCode::from(code)
}
