//! `millctl nodes`: how the nodes are; taking them out of service and back.
//!
//! A node is *drained* when it takes no new requests and nobody needs it any more: no gateway that answers has a request there, and the
//! node itself says that nothing runs, waits or holds a block. Gateways learn of the drain within milliseconds of one another, so it must be so
//! for [`EMPTY_LOOKS`] looks in a row.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::cluster::Status;
use super::exit::Exit;
use super::output::{Answer, Ask, Change, Line, Wait};
use super::table::{Column, Page, cell, column, maybe, wide, word, yes_no};

/// Looks in a row that must find a draining node empty.
const EMPTY_LOOKS: u32 = 3;
/// Nodes that a hint lists.
const HINTED_MAX: usize = 12;

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Nodes {
    /// All nodes
    #[command(after_help = "Example:\n  millctl nodes list -o wide --watch\n  millctl nodes list --fresh")]
    List(Ask),
    /// Everything about one node
    #[command(after_help = "Example:\n  millctl nodes show decode-1")]
    Show(Shown),
    /// Give a node no new requests; what runs there goes on
    #[command(after_help = "Example:\n  millctl nodes cordon decode-1")]
    Cordon(Named),
    /// Let a node take requests again
    #[command(after_help = "Example:\n  millctl nodes uncordon decode-1")]
    Uncordon(Named),
    /// Give a node no new requests and let it finish, before it is stopped
    #[command(after_help = "Example:\n  millctl nodes drain decode-1 --wait --timeout 300 && systemctl stop decode-node")]
    Drain(Drain),
}

/// A node to look at.
#[derive(Args, Clone, Debug)]
pub struct Shown {
    /// The node's name
    name: String,
    #[command(flatten)]
    ask: Ask,
}

/// A node to be changed.
#[derive(Args, Clone, Debug)]
pub struct Named {
    /// The node's name
    name: String,
    #[command(flatten)]
    change: Change,
}

/// A node to be drained.
#[derive(Args, Clone, Debug)]
pub struct Drain {
    #[command(flatten)]
    named: Named,
    #[command(flatten)]
    wait: Wait,
}

/// Runs one.
///
/// # Errors
/// The cluster does not answer, or refuses; [`Exit::NotFound`] without such a node; [`Exit::Timeout`] when a drain takes too long.
pub async fn run(command: Nodes) -> Result<()> {
    match command {
        Nodes::List(ask) => {
            let question = async |line: &mut Line| {
                let mut status = line.ask(&json!({"q": "status"})).await?;
                Ok(json!({"nodes": status["nodes"].take(), "stale": status["stale"].take()}))
            };
            ask.show_of::<List>(question).await.map(drop)
        }
        Nodes::Show(shown) => show(&shown).await,
        Nodes::Cordon(node) => set(&node, "cordoned", None).await,
        Nodes::Uncordon(node) => set(&node, "up", None).await,
        Nodes::Drain(Drain { named, wait }) => set(&named, "draining", wait.wait.then_some(wait)).await,
    }
}

async fn show(shown: &Shown) -> Result<()> {
    let question = async |line: &mut Line| {
        let mut status = line.ask(&json!({"q": "status"})).await?;
        find(&serde_json::from_value(status.clone()).context("the answer's shape")?, &shown.name)?;
        let mut nodes = status["nodes"].as_array_mut().map(std::mem::take).unwrap_or_default();
        let mut node = nodes.iter_mut().find(|node| node["name"] == shown.name).map(Value::take).unwrap_or_default();
        node["stale"] = status["stale"].take();
        Ok(node)
    };
    shown.ask.show_of::<Node>(question).await.map(drop)
}

async fn set(named: &Named, state: &str, wait: Option<Wait>) -> Result<()> {
    let Named { name, change } = named;
    let mut line = Line::open(&change.which)?;
    let result = set_on(&mut line, named, state, wait).await;
    line.close().await;
    match result? {
        Some(set) => change.shape.print(&set),
        None => change.plan(&format!("set {name} to {state}; what runs there goes on")),
    }
}

async fn set_on(line: &mut Line, Named { name, change }: &Named, state: &str, wait: Option<Wait>) -> Result<Option<Set>> {
    let status: Status = line.get(&json!({"q": "status"})).await?;
    find(&status, name)?;
    if change.dry_run {
        return Ok(None);
    }
    line.ask(&json!({"q": "set_state", "node": name, "state": state})).await?;
    let node = match wait {
        Some(wait) => drained(line, name, wait).await?,
        None => find(&line.get(&json!({"q": "status"})).await?, name)?.clone(),
    };
    let (drained, state) = (wait.map(|_| true), if node.state == "up" { state.to_owned() } else { node.state.clone() });
    Ok(Some(Set { node: name.clone(), state, drained, remaining: node.remaining() }))
}

/// Waits until nobody needs the node.
async fn drained(line: &mut Line, name: &str, wait: Wait) -> Result<Node> {
    let mut empty = 0;
    let look = async || {
        let status: Status = line.get(&json!({"q": "status"})).await?;
        let node = find(&status, name)?;
        if matches!(node.state.as_str(), "dead" | "left") {
            return Ok(Ok(node.clone()));
        }
        let missing = node.still_needed();
        empty = if missing.is_none() { empty + 1 } else { 0 };
        let silent: Vec<&str> = status.members.iter().filter(|m| !m.reachable).map(|m| m.name.as_str()).collect();
        let unknown = if silent.is_empty() { String::new() } else { format!(" (not asked: {})", silent.join(", ")) };
        Ok(match missing {
            None if empty >= EMPTY_LOOKS => Ok(node.clone()),
            None => Err(format!("it is empty; making sure{unknown}")),
            Some(missing) => Err(format!("{missing}{unknown}")),
        })
    };
    wait.until(&format!("{name} is draining but not empty"), look).await
}

/// The node of that name.
fn find<'a>(status: &'a Status, name: &str) -> Result<&'a Node> {
    status.nodes.iter().find(|node| node.name == name).ok_or_else(|| {
        let names: Vec<&str> = status.nodes.iter().map(|node| node.name.as_str()).take(HINTED_MAX).collect();
        Exit::NotFound.hinted(format!("no node {name:?}"), format!("there are: {}", names.join(", ")))
    })
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
    /// Requests that need it, of all gateways that answer.
    pub requests: u64,
    /// The same, by gateway.
    pub requests_by: BTreeMap<String, u64>,
    /// What it serves.
    pub model: Model,
}

/// What is served.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default)]
pub struct Model {
    /// Its public name.
    pub name: String,
    /// A digest of all that must be equal.
    pub fingerprint: String,
}

impl Node {
    /// Requests that are still there, whoever knows of them.
    fn remaining(&self) -> u64 {
        self.requests.max(u64::from(self.running) + u64::from(self.waiting))
    }

    /// Why it is not empty, if it is not.
    fn still_needed(&self) -> Option<String> {
        let (requests, in_use) = (self.remaining(), self.blocks.in_use.unwrap_or(0));
        if requests == 0 && in_use == 0 && self.queued_tokens == 0 {
            return None;
        }
        let by: Vec<String> = self.requests_by.iter().map(|(gateway, count)| format!("{count} of {gateway}")).collect();
        let by = if by.is_empty() { String::new() } else { format!(" ({})", by.join(", ")) };
        Some(format!("{requests} requests{by}, {} tokens queued, {in_use} blocks in use", self.queued_tokens))
    }
}

/// A node's pool, in blocks.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
#[serde(default)]
pub struct Blocks {
    /// All.
    pub total: u64,
    /// Unused, and cached but free on demand; `None` while nothing is heard of the node.
    pub free: Option<u64>,
    /// See `free`.
    pub evictable: Option<u64>,
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
    column("REQUESTS", |n| cell(n.requests)),
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

impl Answer for Node {
    fn page(&self) -> Page {
        let by: Vec<String> = self.requests_by.iter().map(|(gateway, count)| format!("{gateway} {count}")).collect();
        let blocks = &self.blocks;
        let pool = [("in use", blocks.in_use), ("evictable", blocks.evictable), ("free", blocks.free), ("of", Some(blocks.total))];
        let pool = pool.map(|(what, count)| cell(format_args!("{what} {}", count.map_or("-".into(), |count| count.to_string()))));
        let heard = self.last_heard_ms.map_or("never".into(), |ms| format!("{ms} ms ago"));
        Page::new()
            .cells([cell(format_args!("{} {}", self.kind, self.name)), word(&self.state, self.state == "up")])
            .line(format_args!("number {}   epoch {}   pid {}   address {}", self.id, self.epoch, self.pid, self.address))
            .line(format_args!("model {}   {}", self.model.name, self.model.fingerprint))
            .line(format_args!("heard {heard}   usable {}", if self.usable { "yes" } else { "no" }))
            .line(format_args!("requests {}   {}", self.requests, by.join("   ")))
            .line(format_args!("running {}   waiting {}   queued tokens {}", self.running, self.waiting, self.queued_tokens))
            .cells(std::iter::once(cell("blocks")).chain(pool))
            .line(format_args!("cached {} blocks in the index", blocks.cached))
    }

    fn names(&self) -> Vec<String> {
        vec![format!("node/{}", self.name)]
    }
}

/// A node's new state.
#[derive(Serialize, Deserialize, Debug)]
struct Set {
    node: String,
    state: String,
    /// Whether it was waited for, and nobody needs it any more.
    drained: Option<bool>,
    /// Requests that are still there.
    remaining: u64,
}

impl Answer for Set {
    fn page(&self) -> Page {
        let Self { node, state, remaining, .. } = self;
        match (self.drained, state.as_str()) {
            (Some(true), "draining") => Page::new().line(format_args!("{node} is drained: nothing runs there, it can be stopped")),
            (_, "draining") => Page::new().line(format_args!("{node} is draining: {remaining} requests are still there")),
            _ => Page::new().line(format_args!("{node} is {state}")),
        }
    }

    fn names(&self) -> Vec<String> {
        vec![format!("node/{}", self.node)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(fields: Value) -> Node {
        serde_json::from_value(fields).unwrap()
    }

    #[test]
    fn a_node_is_empty_when_nobody_needs_it() {
        let idle = node(json!({"name": "d", "requests": 0, "running": 0, "blocks": {"in_use": 0, "total": 8}}));
        assert_eq!(idle.still_needed(), None);
        let busy = [
            json!({"requests": 2, "requests_by": {"c-1": 2}}),
            json!({"running": 1}),
            json!({"waiting": 1}),
            json!({"queued_tokens": 5}),
            json!({"blocks": {"in_use": 3}}),
        ];
        for fields in busy {
            assert!(node(fields.clone()).still_needed().is_some(), "{fields}");
        }
        let told = node(json!({"requests": 2, "requests_by": {"c-1": 2}})).still_needed().unwrap();
        assert_eq!(told, "2 requests (2 of c-1), 0 tokens queued, 0 blocks in use");
    }

    #[test]
    fn a_wrong_name_is_not_found_and_the_right_ones_are_said() {
        let status = Status { nodes: vec![node(json!({"name": "decode-1"}))], ..Status::default() };
        let error = find(&status, "decode-7").unwrap_err();
        assert_eq!((Exit::of(&error), Exit::hint(&error).as_deref()), (Exit::NotFound, Some("there are: decode-1")));
        assert_eq!(find(&status, "decode-1").unwrap().name, "decode-1");
    }

    #[test]
    fn drained_and_draining_read_differently() {
        let set = |drained, remaining| Set { node: "d".into(), state: "draining".into(), drained, remaining };
        assert!(set(Some(true), 0).page().render(false, false).starts_with("d is drained"));
        assert_eq!(set(None, 3).page().render(false, false), "d is draining: 3 requests are still there\n");
    }
}
