//! One replica of the coordinator: keeps the cluster's state in a replicated log, takes nodes in, and serves clients.
//!
//! A replica is a few parts that know each other by name: `state` applies the log (`millrace-log` keeps it), `propose` is the way into
//! it; `links` talks to `replicas` and `nodes`, `roster` knows who the replicas are, `join` takes nodes in, `deltas` batches what their
//! caches say, `orders` tells caches what to do and `pins` what to keep, `duties` is what a replica does unasked; `dispatch` owns running
//! requests and `traffic` counts what was served, `http` is the OpenAI gateway over it, `admin` answers operators; `serve` puts them
//! together. What the rules are is decided in `millrace-core`; no KV byte passes through here, and no LibTorch is linked.

pub mod admin;
pub mod config;
pub mod ctl;
pub mod deltas;
pub mod dispatch;
pub mod duties;
pub mod event_bench;
pub mod http;
pub mod join;
pub mod links;
pub mod nodes;
pub mod orders;
pub mod pins;
pub mod propose;
pub mod replicas;
pub mod roster;
pub mod saved;
pub mod serve;
pub mod state;
pub mod traffic;

use std::sync::Arc;

use millrace_checkpoint::Checkpoint;
use millrace_core::message::ModelIdentity;
use millrace_node::shutdown::Shutdown;

/// What the gateway works with. One for each replica, shared by all of its requests.
pub struct App {
    /// The command line.
    pub config: config::Config,
    /// What is served; its `name` is the public one.
    pub model: ModelIdentity,
    /// Text to tokens and back (`text`; `text_absent()` says why there is none), context length (`config.max_positions`), end tokens.
    pub checkpoint: Arc<Checkpoint>,
    /// Takes requests.
    pub dispatcher: dispatch::Dispatcher,
    /// The applied state of the cluster.
    pub cluster: state::SharedCluster,
    /// What is heard of the nodes.
    pub nodes: Arc<nodes::Nodes>,
    /// The log.
    pub raft: millrace_log::RaftHandle,
    /// Operators' questions, as JSON.
    pub admin: Arc<admin::Admin>,
    /// Begins when the process is to end: take no new connections, end the open ones soon.
    pub shutdown: Shutdown,
}
