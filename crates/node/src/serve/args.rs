//! The command line that prefill and decode nodes share, parsed once into values that cannot be wrong.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use millrace_core::batch::BatchConfig;
use millrace_core::ids::ReplicaId;
use millrace_core::layout::Dtype;
use millrace_core::message::{ModelIdentity, Role};

use super::NodeConfig;
use crate::endpoint::EndpointConfig;
use crate::telemetry::LogFormat;

/// Options of a node.
#[derive(Args, Clone, Debug)]
pub struct NodeArgs {
    /// This node's name, unique in the cluster; its certificate says the same
    #[arg(long)]
    pub name: String,
    /// The cluster's name
    #[arg(long)]
    pub cluster: String,
    /// Where this node's QUIC endpoint listens; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Where other nodes reach it, if not at --listen: behind a translated or relayed address
    #[arg(long)]
    pub advertise: Option<SocketAddr>,
    /// UDP port for KV beside --listen, to be open between nodes; 0 takes a free one
    #[arg(long, default_value_t = 0)]
    pub lanes_port: u16,
    /// The port at which other nodes reach --lanes-port, if another: behind a translated or relayed address
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub advertise_lanes_port: Option<u16>,
    /// All coordinator replicas: 1=127.0.0.1:7001,2=127.0.0.1:7002
    #[arg(long, value_delimiter = ',', value_parser = parse_replica, required = true)]
    pub coordinators: Vec<(u64, SocketAddr)>,
    /// Folder of the certificates
    #[arg(long)]
    pub certs: PathBuf,
    /// Model directory or GGUF file
    #[arg(long)]
    pub model: PathBuf,
    /// The model's public name; from the path if absent
    #[arg(long)]
    pub model_name: Option<String>,
    /// Element type of weights and activations, bf16 or f32; and of cached KV where --kv-dtype does not say another
    #[arg(long, default_value = "bf16")]
    pub dtype: Dtype,
    /// Tokens of one block, a power of two from 16 to 128, the same on every node
    #[arg(long, default_value_t = 16, value_parser = parse_block_tokens)]
    pub block_tokens: u16,
    /// Blocks that the KV pool can hold
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(2..=4_194_304))]
    pub kv_blocks: u32,
    /// Take the memory of the KV pool at the start, not as it is first used: the first requests are faster, and memory that is not there is missed at once
    #[arg(long)]
    pub kv_populate: bool,
    /// Prompt tokens computed in one step
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub step_tokens: u32,
    /// How long a step may take in which nothing decodes, in milliseconds: one prompt may have more tokens in it than `--step-tokens`, 2,048 at most
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(0..=60_000))]
    pub prompt_step_ms: u32,
    /// Sequences computed at a time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub rows: u32,
    /// Sequences that may wait; one more is refused
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub waiting: u32,
    /// Threads of the engine; 0 takes all processors
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Hand KV over only when a prompt is computed, not layer by layer: to measure what that costs, and for nothing else
    #[arg(long, hide = true)]
    pub hand_over_after_prefill: bool,
    /// Stop when the parent process ends
    #[arg(long)]
    pub exit_with_parent: bool,
    /// How log lines look
    #[arg(long, default_value = "text", value_enum)]
    pub log: LogFormat,
}

impl NodeArgs {
    /// Threads of the engine.
    #[must_use]
    pub fn threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            threads => threads,
        }
    }

    /// The node's configuration for a model of `positions` tokens of context.
    ///
    /// # Errors
    /// Names the argument that is wrong.
    pub fn config(&self, role: Role, model: ModelIdentity, positions: usize) -> Result<NodeConfig> {
        let mut coordinators: Vec<_> = self.coordinators.iter().map(|&(id, addr)| (ReplicaId(id), addr)).collect();
        coordinators.sort_unstable();
        coordinators.dedup_by_key(|(id, _)| *id);
        ensure!(coordinators.len() == self.coordinators.len(), "--coordinators names a replica twice");
        let batch = BatchConfig {
            block_tokens: self.block_tokens,
            slots: self.kv_blocks,
            step_tokens_max: self.step_tokens,
            prompt_step_us: u64::from(self.prompt_step_ms) * 1_000,
            rows_max: self.rows,
            context_max: u32::try_from(positions).unwrap_or(u32::MAX),
            headroom_blocks: 1,
            waiting_max: self.waiting,
            fingerprint: model.fingerprint(),
        };
        let dialed = self.advertise.unwrap_or(self.listen);
        ensure!(!dialed.ip().is_unspecified(), "{dialed} is no address that other nodes can dial; say --advertise");
        let (cluster, name, listen, advertise) = (self.cluster.clone(), self.name.clone(), self.listen, self.advertise);
        let (lanes_port, lanes_advertise) = (self.lanes_port, self.advertise_lanes_port);
        let endpoint = EndpointConfig { lanes_port, lanes_advertise, ..EndpointConfig::default() };
        let by_layer = !self.hand_over_after_prefill;
        Ok(NodeConfig { role, cluster, name, listen, advertise, coordinators, model, batch, endpoint, by_layer })
    }
}

fn parse_replica(text: &str) -> Result<(u64, SocketAddr), String> {
    let (id, addr) = text.split_once('=').ok_or("expected ID=IP:PORT")?;
    let id: u64 = id.parse().map_err(|e| format!("replica number {id:?}: {e}"))?;
    let addr = addr.parse().map_err(|e| format!("address {addr:?}: {e}"))?;
    if id == 0 { Err("replica numbers start at 1".into()) } else { Ok((id, addr)) }
}

fn parse_block_tokens(text: &str) -> Result<u16, String> {
    let tokens: u16 = text.parse().map_err(|e| format!("{e}"))?;
    if tokens.is_power_of_two() && (16..=128).contains(&tokens) { Ok(tokens) } else { Err("expected 16, 32, 64 or 128".into()) }
}
