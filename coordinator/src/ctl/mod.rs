//! `millctl`: makes certificates, runs a whole cluster on one machine, asks a running one, and shows it off.
//!
//! `output` is the frame of every command: how it asks, prints, waits, changes. `context` says which cluster is meant, `ask` talks to any
//! replica of it, `table` is what people see. One file for each group of commands: `cluster`, `nodes`, `cache`, `route`, `certs`,
//! `doctor`, `top`, and so on.
//! `local` runs processes behind the `front`; `cluster_file` is what a local cluster writes down about itself and `running` finds it; `demo`
//! is the show. Standard output carries answers only, everything else goes to standard error. The exit codes are [`Exit`].

pub mod ask;
pub mod cache;
pub mod cache_admin;
pub mod certs;
pub mod cluster;
pub mod cluster_file;
pub mod completion;
pub mod config;
pub mod context;
pub mod dates;
pub mod demo;
pub mod doctor;
pub mod exit;
pub mod front;
pub mod local;
pub mod members;
pub mod model;
pub mod nodes;
pub mod output;
pub mod prompt;
pub mod route;
pub mod running;
pub mod snapshot;
pub mod table;
pub mod tenants;
pub mod top;

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
    Cluster(cluster::Cluster),
    /// Ask about the replicas, take them in and out, let another lead
    #[command(subcommand)]
    Members(members::Members),
    /// Ask about nodes, take them out and in
    #[command(subcommand)]
    Nodes(nodes::Nodes),
    /// Ask what is cached where
    #[command(subcommand)]
    Cache(cache::Cache),
    /// Ask where a prompt would go, where others went, and why
    #[command(subcommand)]
    Route(route::Route),
    /// Whose requests there are: keys and limits
    #[command(subcommand)]
    Tenants(tenants::Tenants),
    /// Settings of the whole cluster
    #[command(subcommand)]
    Config(config::Config),
    /// Save the replicated state, look into a saved one, begin a new cluster from one
    #[command(subcommand)]
    Snapshot(snapshot::Snapshot),
    /// Look at a model on this machine: what it is made of, what its KV takes
    #[command(subcommand)]
    Model(model::Model),
    /// A live screen: nodes, load, requests, cache hits, tokens a second
    Top(top::TopArgs),
    /// Look at everything and say what is wrong and what cures it; exit code 3 when something is, 4 without a quorum
    Doctor(doctor::DoctorArgs),
    /// Name clusters and choose among them
    #[command(subcommand)]
    Context(context::ContextCommand),
    /// A shell's completion script
    Completion(completion::Completion),
    /// Run a cluster, talk to it, kill its leader in the middle of an answer, and stop it
    Demo(demo::DemoArgs),
}

#[derive(Subcommand, Debug)]
enum LocalCommand {
    /// Start a cluster and stay in the foreground until SIGINT or SIGTERM; prints `ready http://HOST:PORT` when it serves
    Up(local::UpArgs),
    /// List the clusters that run on this machine
    Status(local::StatusArgs),
    /// Stop one of them
    Down(local::DownArgs),
}

/// Runs a command to its end.
#[must_use]
pub fn main(cli: Cli) -> ExitCode {
    let error = match run(cli) {
        Ok(()) => return Exit::Ok.into(),
        Err(error) => error,
    };
    eprintln!("millctl: {error:#}");
    if let Some(hint) = Exit::hint(&error) {
        eprintln!("hint: {hint}");
    }
    Exit::of(&error).into()
}

fn run(cli: Cli) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("starting the runtime")?;
    let result = runtime.block_on(async {
        match cli.command {
            Command::Certs(command) => certs::run(command).await,
            Command::Local(LocalCommand::Up(args)) => local::up(args).await,
            Command::Local(LocalCommand::Status(args)) => local::status(args),
            Command::Local(LocalCommand::Down(args)) => local::down(args).await,
            Command::Cluster(command) => cluster::run(command).await,
            Command::Members(command) => members::run(command).await,
            Command::Nodes(command) => nodes::run(command).await,
            Command::Cache(command) => cache::run(command).await,
            Command::Route(command) => route::run(command).await,
            Command::Tenants(command) => tenants::run(command).await,
            Command::Config(command) => config::run(command).await,
            Command::Snapshot(command) => snapshot::run(command).await,
            Command::Model(command) => model::run(command),
            Command::Context(command) => context::run(command),
            Command::Top(args) => top::run(args).await,
            Command::Doctor(args) => doctor::run(args).await,
            Command::Completion(args) => {
                use std::io::Write;
                std::io::stdout().write_all(&completion::script(args)).context("standard output")
            }
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

    /// The command lines of an example: those that begin with `millctl`, joined where a `\` goes on, without what another program does.
    fn lines(help: &str) -> Vec<Vec<String>> {
        let joined = help.replace("\\\n", " ");
        let ours = joined.lines().map(str::trim).filter(|line| line.starts_with("millctl "));
        let words = |line: &str| -> Vec<String> {
            let end = line.find([';', '|', '>', '#']).unwrap_or(line.len());
            let end = line.find("&&").unwrap_or(end).min(end);
            // Quotes keep words together.
            let pieces = line[..end].split('\'').enumerate();
            pieces
                .flat_map(|(at, piece)| match at % 2 {
                    0 => piece.split_whitespace().map(str::to_owned).collect(),
                    _ => vec![piece.to_owned()],
                })
                .collect()
        };
        ours.map(words).collect()
    }

    fn leaves(command: &clap::Command, path: &str, bad: &mut Vec<String>) {
        for sub in command.get_subcommands() {
            let path = format!("{path} {}", sub.get_name());
            if sub.has_subcommands() {
                leaves(sub, &path, bad);
                continue;
            }
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            let examples = lines(&help);
            if !examples.iter().any(|words| words.join(" ").starts_with(&path)) {
                bad.push(format!("{path}: no example"));
            }
            let refused =
                |words: &Vec<String>| Cli::try_parse_from(words).err().map(|error| format!("{}: {error}", words.join(" ")));
            bad.extend(examples.iter().filter_map(refused));
        }
    }

    #[test]
    fn the_command_line_is_consistent_and_every_command_has_an_example_that_it_takes() {
        Cli::command().debug_assert();
        let mut bad = Vec::new();
        leaves(&Cli::command(), "millctl", &mut bad);
        assert!(bad.is_empty(), "{bad:#?}");
    }

    #[test]
    fn a_wrong_command_line_is_a_usage_error() {
        for line in ["millctl", "millctl local up", "millctl local up --model m --coordinators 0", "millctl cache lookup"] {
            let error = Cli::try_parse_from(line.split(' ')).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
