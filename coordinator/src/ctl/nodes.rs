//! `millctl nodes`: how the nodes are; taking them out of service and back.

use anyhow::Result;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::output::{Answer, Ask, Change};
use super::table::{Column, Page, cell, column, maybe, wide, word, yes_no};

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Nodes {
    /// All nodes
    #[command(after_help = "Example:\n  millctl nodes list -o wide --watch")]
    List(Ask),
    /// Give a node no new requests; what runs there goes on
    #[command(after_help = "Example:\n  millctl nodes cordon decode-1")]
    Cordon(Named),
    /// Let a node take requests again
    #[command(after_help = "Example:\n  millctl nodes uncordon decode-1")]
    Uncordon(Named),
    /// Give a node no new requests and let it finish, before it is stopped
    #[command(after_help = "Example:\n  millctl nodes drain decode-1")]
    Drain(Named),
}

/// A node to be changed.
#[derive(Args, Clone, Debug)]
pub struct Named {
    /// The node's name
    name: String,
    #[command(flatten)]
    change: Change,
}

/// Runs one.
///
/// # Errors
/// The cluster does not answer, or refuses.
pub async fn run(command: Nodes) -> Result<()> {
    let (node, state) = match command {
        Nodes::List(ask) => return ask.show::<List>(json!({"q": "status"})).await.map(drop),
        Nodes::Cordon(node) => (node, "cordoned"),
        Nodes::Uncordon(node) => (node, "up"),
        Nodes::Drain(node) => (node, "draining"),
    };
    let query = json!({"q": "set_state", "node": node.name, "state": state});
    node.change.apply::<Set>(&format!("set {} to {state}", node.name), query).await.map(drop)
}

/// A node.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
#[serde(default)]
pub struct Node {
    /// Its number.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// prefill or decode.
    pub kind: String,
    /// Its incarnation.
    pub epoch: u64,
    /// up, cordoned, draining, dead or left.
    pub state: String,
    /// Whether new requests may go there.
    pub usable: bool,
    /// Its process.
    pub pid: u32,
    /// Where its QUIC endpoint listens.
    pub address: String,
    /// Its pool.
    pub blocks: Blocks,
    /// Sequences that are decoding.
    pub running: u32,
    /// Sequences that wait for a place.
    pub waiting: u32,
    /// Prompt tokens waiting or being computed.
    pub queued_tokens: u64,
    /// Since it was last heard from, milliseconds.
    pub last_heard_ms: Option<u64>,
}

/// A node's pool, in blocks.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
#[serde(default)]
pub struct Blocks {
    /// All.
    pub total: u64,
    /// In use by requests; `None` while nothing is heard of the node.
    pub in_use: Option<u64>,
    /// That the index knows.
    pub cached: u64,
}

/// The columns of a list of nodes.
pub const NODES: &[Column<Node>] = &[
    wide("ID", |n| cell(n.id)),
    column("NODE", |n| cell(&n.name)),
    column("KIND", |n| cell(&n.kind)),
    column("STATE", |n| word(&n.state, n.state == "up")),
    column("USABLE", |n| yes_no(n.usable)),
    wide("EPOCH", |n| cell(n.epoch)),
    wide("PID", |n| cell(n.pid)),
    wide("ADDRESS", |n| cell(&n.address)),
    column("RUNNING", |n| cell(n.running)),
    column("WAITING", |n| cell(n.waiting)),
    wide("QUEUED TOKENS", |n| cell(n.queued_tokens)),
    column("IN USE", |n| maybe(n.blocks.in_use)),
    column("CACHED", |n| cell(n.blocks.cached)),
    column("BLOCKS", |n| cell(n.blocks.total)),
    wide("HEARD MS AGO", |n| maybe(n.last_heard_ms)),
];

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct List {
    nodes: Vec<Node>,
    stale: bool,
}

impl Answer for List {
    fn page(&self) -> Page {
        Page::new().table(NODES, &self.nodes)
    }

    fn names(&self) -> Vec<String> {
        self.nodes.iter().map(|node| format!("node/{}", node.name)).collect()
    }
}

/// A node's new state.
#[derive(Serialize, Deserialize, Debug)]
struct Set {
    node: String,
    state: String,
}

impl Answer for Set {
    fn page(&self) -> Page {
        Page::new().line(format_args!("{} is {}", self.node, self.state))
    }

    fn names(&self) -> Vec<String> {
        vec![format!("node/{}", self.node)]
    }
}
