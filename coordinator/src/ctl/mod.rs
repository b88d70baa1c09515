//! `millctl`: makes certificates, runs a whole cluster on one machine, asks a running one, and shows it off.
//!
//! `certs` makes certificates; `local` runs processes behind the `front`; `cluster_file` is what a local cluster writes down about
//! itself and `context` finds it; `ask` talks to any replica, `query` prints what it says as a `table` or JSON; `demo` is the show.
//! Standard output carries answers only, everything else goes to standard error. The exit codes are [`Exit`].

pub mod ask;
pub mod certs;
pub mod cluster_file;
pub mod context;
pub mod demo;
pub mod exit;
pub mod front;
pub mod local;
pub mod query;
pub mod table;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

pub use self::exit::{CtlError, Exit};

/// Millrace's tool: runs clusters, asks them, shows them.
///
/// Exit codes: 0 ok, 1 failed, 2 usage, 3 degraded, 4 no replica answers or no quorum, 5 not found, 6 conflict, 7 time-out, 8 denied.
#[derive(Parser, Debug)]
#[command(name = "millctl", version, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Make and show certificates
    #[command(subcommand)]
    Certs(certs::Certs),
    /// Run a cluster on this machine
    #[command(subcommand)]
    Local(LocalCommand),
    /// Ask about the whole cluster
    #[command(subcommand)]
    Cluster(query::Cluster),
    /// Ask about nodes, take them out and in
    #[command(subcommand)]
    Nodes(query::Nodes),
    /// Ask what is cached where
    #[command(subcommand)]
    Cache(query::Cache),
    /// Ask where a prompt would go, and why
    #[command(subcommand)]
    Route(query::Route),
    /// Run a cluster, talk to it, kill its leader in the middle of an answer, and stop it
    Demo(demo::DemoArgs),
}

#[derive(Subcommand, Debug)]
enum LocalCommand {
    /// Start a cluster and stay in the foreground until SIGINT or SIGTERM; prints `ready http://HOST:PORT` when it serves
    Up(local::UpArgs),
}

/// Runs a command to its end.
#[must_use]
pub fn main(cli: Cli) -> ExitCode {
    let error = match run(cli) {
        Ok(()) => return Exit::Ok.into(),
        Err(error) => error,
    };
    eprintln!("millctl: {error:#}");
    Exit::of(&error).into()
}

fn run(cli: Cli) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("starting the runtime")?;
    let result = runtime.block_on(async {
        match cli.command {
            Command::Certs(command) => certs::run(&command),
            Command::Local(LocalCommand::Up(args)) => local::up(args).await,
            Command::Cluster(command) => query::cluster(command).await,
            Command::Nodes(command) => query::nodes(command).await,
            Command::Cache(command) => query::cache(command).await,
            Command::Route(command) => query::route(command).await,
            Command::Demo(args) => demo::run(args).await,
        }
    });
    // A thread that reads standard input cannot be joined.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_every_command_has_an_example() {
        Cli::command().debug_assert();
        fn leaves(command: &clap::Command, path: &str, bad: &mut Vec<String>) {
            for sub in command.get_subcommands() {
                let path = format!("{path} {}", sub.get_name());
                let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
                if sub.has_subcommands() {
                    leaves(sub, &path, bad);
                } else if !help.contains(&path) {
                    bad.push(path);
                }
            }
        }
        let mut bad = Vec::new();
        leaves(&Cli::command(), "millctl", &mut bad);
        assert!(bad.is_empty(), "without an example: {bad:?}");
    }

    #[test]
    fn a_wrong_command_line_is_a_usage_error() {
        for line in ["millctl", "millctl local up", "millctl local up --model m --coordinators 0", "millctl cache lookup"] {
            let error = Cli::try_parse_from(line.split(' ')).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
