//! The decode node: receiver -> batch -> device -> tokens. It introduces the engine of `millrace-model` to the shell of `millrace-node`;
//! what a step holds and what may be sent is decided in `millrace-core`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use millrace_core::message::Role;
use millrace_model::args::ComputeArgs;
use millrace_model::open::{EngineKind, Options, open};
use millrace_node::serve::args::NodeArgs;
use millrace_node::serve::process::{Opened, run};

/// A Millrace decode node: decodes answers over KV that arrives from prefill nodes, or that it computes itself.
#[derive(Parser, Clone, Debug)]
#[command(name = "decode-node", version)]
pub struct Args {
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Compute checksums of the KV instead of the model, with this delay for each token: for tests of the cluster
    #[arg(long, hide = true, value_name = "MICROSECONDS")]
    checksum_engine: Option<u64>,
}

/// Runs the process to its end.
#[must_use]
pub fn main(args: Args) -> ExitCode {
    run(Role::Decode, &args.node, || {
        let node = &args.node;
        let checksum = |us| EngineKind::Checksum { token_delay: Duration::from_micros(us) };
        let opened = open(&Options {
            path: &node.model,
            name: node.model_name.as_deref(),
            dtype: node.dtype,
            block_tokens: node.block_tokens,
            slots: node.kv_blocks as usize,
            compute: args.compute.compute(node.threads()),
            engine: args.checksum_engine.map_or(EngineKind::Model, checksum),
            device: args.compute.device(),
        })?;
        let (engine, slab) = (opened.engine, opened.slab);
        Ok(Opened { engine, slab, identity: opened.identity, positions: opened.positions })
    })
}
