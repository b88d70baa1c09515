//! `millctl snapshot`: saves the replicated state to a file, shows what is in one, and begins a new cluster from one.
//!
//! `save` asks any replica; the others work on files alone, with no cluster in reach.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use millrace_core::cluster::Cluster;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::context::Which;
use super::exit::Exit;
use super::output::{Answer, Line, Shape};
use super::table::{Column, Page, cell, column, word, yes_no};
use crate::saved::{self, Head, Writer};
use millrace_log::{self as raft, RaftConfig};

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Snapshot {
    /// Save the state of the cluster to a file
    #[command(after_help = "Example:\n  millctl snapshot save state.mr")]
    Save(SaveArgs),
    /// Show what is in a saved state; needs no cluster
    #[command(after_help = "Example:\n  millctl snapshot inspect state.mr -o json")]
    Inspect(InspectArgs),
    /// Make the folder of a new cluster's replica from a saved state; needs no cluster
    ///
    /// Run it once for each member, with the same file and members, and start the replicas with these folders. Replicas of the old cluster must
    /// not be started again. Nodes join anew and say again what they cache.
    #[command(after_help = "Example:\n  millctl snapshot restore state.mr --dir log-1 --id 1 --members 1,2,3")]
    Restore(RestoreArgs),
}

/// Where to save.
#[derive(Args, Clone, Debug)]
pub struct SaveArgs {
    /// The file; it must not exist
    file: PathBuf,
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    shape: Shape,
}

/// What to show.
#[derive(Args, Clone, Debug)]
pub struct InspectArgs {
    /// The file
    file: PathBuf,
    #[command(flatten)]
    shape: Shape,
}

/// What to make of a file.
#[derive(Args, Clone, Debug)]
pub struct RestoreArgs {
    /// The file
    file: PathBuf,
    /// The folder to make: --dir of the replica
    #[arg(long)]
    dir: PathBuf,
    /// The replica's number
    #[arg(long, default_value_t = 1)]
    id: u64,
    /// Numbers of all replicas of the new cluster; only this one if absent
    #[arg(long, value_delimiter = ',')]
    members: Vec<u64>,
    #[command(flatten)]
    shape: Shape,
}

/// Runs one.
///
/// # Errors
/// The cluster does not answer; a file or folder cannot be read or written, or is in the way ([`Exit::Conflict`]).
pub async fn run(command: Snapshot) -> Result<()> {
    match command {
        Snapshot::Save(args) => {
            let mut line = Line::open(&args.which)?;
            let saved = save(&mut line, &args).await;
            line.close().await;
            args.shape.print(&saved?)
        }
        Snapshot::Inspect(args) => {
            let (head, cluster) = saved::read(&args.file)?;
            args.shape.print(&Inspection::of(head, &cluster))
        }
        Snapshot::Restore(args) => args.shape.print(&restore(&args)?),
    }
}

async fn save(line: &mut Line, args: &SaveArgs) -> Result<Saved> {
    if args.file.exists() {
        return Err(Exit::Conflict.error(format!("{} exists already", args.file.display())));
    }
    let opened = line.ask(&json!({"q": "snapshot", "op": "open"})).await?;
    let head: Head = serde_json::from_value(opened.clone()).context("the answer")?;
    let id = opened["id"].as_u64().context("the answer has no id")?;
    let mut writer = Writer::create(&args.file, &head)?;
    let mut offset = 0;
    while offset < head.bytes {
        let piece = line.ask(&json!({"q": "snapshot", "op": "read", "id": id, "offset": offset})).await?;
        let piece = piece["data"].as_str().and_then(unhex).filter(|piece| !piece.is_empty()).context("a piece that is none")?;
        writer.push(&piece)?;
        offset += piece.len() as u64;
    }
    writer.finish()?;
    // It would be forgotten by itself.
    let _ = line.ask(&json!({"q": "snapshot", "op": "close", "id": id})).await;
    Ok(Saved { file: args.file.display().to_string(), head })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |c: u8| (c as char).to_digit(16).map(|digit| digit as u8);
    let pairs = text.as_bytes().chunks_exact(2);
    pairs.remainder().is_empty().then_some(())?;
    pairs.map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

fn restore(args: &RestoreArgs) -> Result<Restored> {
    let (head, mut cluster) = saved::read(&args.file)?;
    cluster.refound();
    let members = if args.members.is_empty() { vec![args.id] } else { args.members.clone() };
    let taken = args.dir.exists() && std::fs::read_dir(&args.dir).map_or(true, |mut files| files.next().is_some());
    if taken {
        return Err(Exit::Conflict.error(format!("{} exists and is not an empty folder", args.dir.display())));
    }
    let config = RaftConfig::new(args.id, members.clone(), args.dir.clone(), head.cluster.as_str());
    raft::found(config, cluster.applied(), &cluster.snapshot()).with_context(|| args.dir.display().to_string())?;
    let applied = cluster.applied();
    Ok(Restored { dir: args.dir.display().to_string(), cluster: head.cluster, id: args.id, members, applied })
}

#[derive(Serialize, Deserialize, Debug)]
struct Saved {
    file: String,
    #[serde(flatten)]
    head: Head,
}

impl Answer for Saved {
    fn page(&self) -> Page {
        let Head { cluster, replica, applied, bytes, fresh } = &self.head;
        let vouched = if *fresh { "" } else { "   (no quorum vouches for it: changes may be missing)" };
        Page::new()
            .line(format_args!("{}: cluster {cluster} at entry {applied}, {bytes} bytes, from {replica}{vouched}", self.file))
    }
}

#[derive(Serialize, Deserialize, Debug)]
struct Restored {
    dir: String,
    cluster: String,
    id: u64,
    members: Vec<u64>,
    applied: u64,
}

impl Answer for Restored {
    fn page(&self) -> Page {
        let Self { dir, cluster, id, members, applied } = self;
        Page::new().line(format_args!("{dir}: replica {id} of {members:?}, cluster {cluster}, begins at entry {applied}"))
    }
}

/// What a file holds. Keys are not shown.
#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Inspection {
    #[serde(flatten)]
    head: Head,
    /// Log time, seconds.
    log_time_s: u64,
    model: Option<String>,
    blocks: usize,
    pins: usize,
    tenants: Vec<String>,
    settings: Vec<(String, String)>,
    nodes: Vec<InspectedNode>,
    replicas: Vec<u64>,
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct InspectedNode {
    name: String,
    kind: String,
    state: String,
    cordoned: bool,
    epoch: u64,
    blocks: u64,
}

impl Inspection {
    fn of(head: Head, cluster: &Cluster) -> Self {
        let node = |node: &millrace_core::cluster::Node| InspectedNode {
            name: node.name.clone(),
            kind: node.role.as_str().into(),
            state: node.state.as_str().into(),
            cordoned: node.cordoned,
            epoch: node.epoch.0,
            blocks: cluster.holders().tally(node.node).map_or(0, |tally| tally.blocks),
        };
        Self {
            head,
            log_time_s: cluster.now_us() / 1_000_000,
            model: cluster.model().map(|model| model.name.clone()),
            blocks: cluster.holders().blocks(),
            pins: cluster.policy().pins().count(),
            tenants: cluster.policy().tenants().map(|(name, _)| name.to_owned()).collect(),
            settings: cluster.config().changed().map(|(spec, value)| (spec.key.to_owned(), spec.show(value))).collect(),
            nodes: cluster.nodes().map(node).collect(),
            replicas: cluster.replicas().map(|(id, _)| id.0).collect(),
        }
    }
}

const SETTINGS: &[Column<(String, String)>] = &[column("SETTING", |(key, _)| cell(key)), column("VALUE", |(_, value)| cell(value))];

const NODES: &[Column<InspectedNode>] = &[
    column("NODE", |n| cell(&n.name)),
    column("KIND", |n| cell(&n.kind)),
    column("STATE", |n| word(&n.state, n.state == "up")),
    column("CORDONED", |n| yes_no(n.cordoned)),
    column("EPOCH", |n| cell(n.epoch)),
    column("BLOCKS", |n| cell(n.blocks)),
];

impl Answer for Inspection {
    fn page(&self) -> Page {
        let Head { cluster, replica, applied, bytes, fresh } = &self.head;
        let model = self.model.as_deref().unwrap_or("-");
        let vouched = if *fresh { "by a quorum" } else { "by nobody" };
        Page::new()
            .line(format_args!("cluster {cluster}   entry {applied}   from {replica}, vouched for {vouched}   {bytes} bytes"))
            .line(format_args!(
                "model {model}   log time {} s   blocks {}   pins {}   replicas {:?}",
                self.log_time_s, self.blocks, self.pins, self.replicas
            ))
            .line(format_args!("tenants {}", self.tenants.join(" ")))
            .table(SETTINGS, &self.settings)
            .table(NODES, &self.nodes)
    }

    fn names(&self) -> Vec<String> {
        self.nodes.iter().map(|node| format!("node/{}", node.name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_hexadecimal() {
        assert_eq!(unhex("00abff"), Some(vec![0, 171, 255]));
        assert_eq!((unhex("0"), unhex("0g"), unhex("")), (None, None, Some(vec![])));
    }

    #[test]
    fn an_inspection_shows_names_and_no_keys() {
        let mut cluster = Cluster::new();
        let key = millrace_core::identity::TenantKey([0x5a; 32]);
        cluster.apply(3, &millrace_core::cluster::Command::PutTenant { name: "acme".into(), key });
        let head = Head { cluster: "c".into(), applied: 3, ..Head::default() };
        let shown = Inspection::of(head, &cluster);
        let text = shown.page().render(false, false);
        assert!(text.contains("cluster c   entry 3") && text.contains("tenants acme"), "{text}");
        let json = serde_json::to_string(&shown).unwrap();
        assert!(!json.contains("5a5a") && !json.contains("90, 90") && !json.contains("90,90"), "{json}");
    }
}
