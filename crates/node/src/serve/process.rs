//! A node's process from start to end: logs, certificates, engine, port, one line on standard output, shutdown.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use millrace_core::engine::Engine;
use millrace_core::message::{ModelIdentity, Role};
use millrace_kernels::slab::KvSlab;

use super::args::NodeArgs;
use super::{Node, priority};
use crate::pki::Identity;
use crate::renew;
use crate::shutdown::Shutdown;

/// What the binary brings: an engine and what it serves.
pub struct Opened {
    /// Computes.
    pub engine: Box<dyn Engine>,
    /// Its KV memory.
    pub slab: Arc<KvSlab>,
    /// What the cluster compares.
    pub identity: ModelIdentity,
    /// Tokens of context.
    pub positions: usize,
}

/// What the process had resident at most, bytes; 0 where the system does not tell. One small file is read.
pub(super) fn resident_bytes_max() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Runs a node until it is told to stop. When it serves, it prints `ready {…}` on standard output; everything else is log.
/// The exit code is 0 after a shutdown, 1 after an error, which is printed.
pub fn run(role: Role, args: &NodeArgs, open: impl FnOnce() -> Result<Opened> + Send) -> ExitCode {
    if let Err(error) = crate::telemetry::init(args.log) {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    match run_to_end(role, args, open) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            eprintln!("{}-node {}: {error:#}", role.as_str(), args.name);
            ExitCode::FAILURE
        }
    }
}

fn run_to_end(role: Role, args: &NodeArgs, open: impl FnOnce() -> Result<Opened> + Send) -> Result<()> {
    let identity = Identity::load(&args.certs).with_context(|| format!("certificates of {}", args.certs.display()))?;
    let opened = priority::lowered(role, open).context("a thread for the engine")?;
    let opened = opened.with_context(|| format!("model {}", args.model.display()))?;
    if args.kv_populate {
        opened.slab.populate().context("taking the KV pool's memory (--kv-populate)")?;
    }
    let config = args.config(role, opened.identity, opened.positions)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    let result = runtime.block_on(async {
        let shutdown = Shutdown::new();
        shutdown.on_signals().context("signal handlers")?;
        if args.exit_with_parent {
            shutdown.on_stdin_end().context("watching standard input")?;
        }
        let node = Node::bind(config, identity)?;
        println!("ready {{\"name\":\"{}\",\"quic\":\"{}\",\"pid\":{}}}", args.name, node.address()?, std::process::id());
        tokio::spawn(renew::keep_renewed(node.endpoint(), args.certs.clone(), renew::LOOK_INTERVAL, shutdown.clone()));
        node.serve(opened.engine, opened.slab, shutdown).await
    });
    runtime.shutdown_background();
    result
}
