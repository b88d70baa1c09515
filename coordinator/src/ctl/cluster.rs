//! `millctl cluster`: the whole cluster at a glance, as far as the replica that answers can know it.

use anyhow::Result;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::exit::Exit;
use super::nodes::{Model, NODES, Node};
use super::output::{Answer, Ask};
use super::table::{Column, Page, Tone, cell, column, maybe, wide, word};
use crate::traffic::Figures;

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Cluster {
    /// Replicas, nodes, leader; answers without a quorum too, and says what it cannot know. Exit code 4 without a quorum
    #[command(after_help = "Example:\n  millctl cluster status -o json")]
    Status(StatusArgs),
}

/// What to ask about the cluster.
#[derive(Args, Clone, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    ask: Ask,
    /// Exit with 3 when a part is missing
    #[arg(long)]
    check: bool,
}

/// Runs one.
///
/// # Errors
/// The cluster does not answer, has no quorum, or `--check` finds something missing.
pub async fn run(command: Cluster) -> Result<()> {
    let Cluster::Status(StatusArgs { ask, check }) = command;
    let status: Status = ask
        .show_of(async |line| {
            let mut status = line.ask(&json!({"q": "status"})).await?;
            // The door of a local cluster is in front of the replicas, who do not know it.
            status["http"] = json!(line.reach.http().map(|http| format!("http://{http}")));
            Ok(status)
        })
        .await?;
    status.verdict(check)
}

/// The whole cluster.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
#[serde(default)]
pub struct Status {
    /// Its name.
    pub cluster: String,
    /// What it serves.
    pub model: String,
    /// Where a local cluster serves clients.
    pub http: Option<String>,
    /// The replica that says all this.
    pub answered_by: Option<String>,
    /// The leader's name.
    pub leader: Option<String>,
    /// Whether most replicas follow it.
    pub quorum: bool,
    /// Whether nobody vouches for the figures.
    pub stale: bool,
    /// What the replica cannot know now.
    pub unknown: Vec<String>,
    /// The replicas.
    pub members: Vec<Member>,
    /// The nodes.
    pub nodes: Vec<Node>,
}

/// A replica.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
#[serde(default)]
pub struct Member {
    /// Its number.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// leader, follower, learner, unknown ...
    pub role: String,
    /// Where its QUIC endpoint listens.
    pub address: Option<String>,
    /// Where its gateway listens.
    pub http: Option<String>,
    /// Its process.
    pub pid: Option<u32>,
    /// Its term.
    pub term: Option<u64>,
    /// The entry that it has applied.
    pub applied: Option<u64>,
    /// Entries that it is behind the leader.
    pub lag: Option<u64>,
    /// The version of its program.
    pub version: Option<String>,
    /// Whether it answers.
    pub reachable: bool,
    /// Why its log stopped.
    pub failure: Option<String>,
    /// The protocol that it speaks.
    pub protocol: Option<String>,
    /// Its wall clock, milliseconds since 1970.
    pub wall_ms: Option<u64>,
    /// What it serves.
    pub model: Option<Model>,
    /// Whom it refused lately.
    pub refusals: Vec<Refusal>,
    /// Why its gateway takes no requests, if it takes none.
    pub not_ready: Option<String>,
    /// Requests that it runs.
    pub requests: Option<u64>,
    /// What it has served since it started.
    pub traffic: Option<Figures>,
}

/// A peer that a replica refused.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
#[serde(default)]
pub struct Refusal {
    /// Whom.
    pub name: String,
    /// Why.
    pub reason: String,
    /// When it was last so, milliseconds ago.
    pub ago_ms: u64,
    /// How often.
    pub times: u64,
}

/// The columns of a list of replicas.
pub const MEMBERS: &[Column<Member>] = &[
    column("ID", |m| cell(m.id)),
    column("MEMBER", |m| cell(&m.name)),
    column("ROLE", |m| word(&m.role, m.reachable && m.failure.is_none())),
    column("ADDRESS", |m| maybe(m.address.as_ref())),
    column("HTTP", |m| maybe(m.http.as_ref())),
    column("PID", |m| maybe(m.pid)),
    column("TERM", |m| maybe(m.term)),
    column("APPLIED", |m| maybe(m.applied)),
    column("LAG", |m| maybe(m.lag)),
    wide("REQUESTS", |m| maybe(m.requests)),
    wide("VERSION", |m| maybe(m.version.as_ref())),
    wide("FAILURE", |m| maybe(m.failure.as_ref()).tone(if m.failure.is_some() { Tone::Bad } else { Tone::Plain })),
];

impl Answer for Status {
    fn page(&self) -> Page {
        let quorum = if self.quorum { cell("quorum").tone(Tone::Good) } else { cell("NO QUORUM").tone(Tone::Bad) };
        let stale = self.stale.then(|| cell("(stale: figures may be old)").tone(Tone::Warn));
        let head = [
            cell(format_args!("cluster {}", self.cluster)),
            cell(format_args!("model {}", self.model)),
            cell(format_args!("http {}", self.http.as_deref().unwrap_or("-"))),
            cell(format_args!("leader {}", self.leader.as_deref().unwrap_or("-"))),
            quorum,
        ];
        let page = Page::new().cells(head.into_iter().chain(stale));
        let page =
            self.unknown.iter().fold(page, |page, what| page.cells([cell(format_args!("unknown: {what}")).tone(Tone::Warn)]));
        page.table(MEMBERS, &self.members).table(NODES, &self.nodes)
    }

    fn names(&self) -> Vec<String> {
        let members = self.members.iter().map(|member| format!("member/{}", member.name));
        members.chain(self.nodes.iter().map(|node| format!("node/{}", node.name))).collect()
    }
}

impl Status {
    fn verdict(&self, check: bool) -> Result<()> {
        if !self.quorum {
            let hint = "streams in flight go on; `millctl doctor` looks at each replica by itself";
            return Err(Exit::Unavailable.hinted("there is no quorum: nothing can be changed", hint));
        }
        let members = self.members.iter().filter(|member| !member.reachable || member.failure.is_some()).map(|m| &m.name);
        let missing: Vec<&str> =
            members.chain(self.nodes.iter().filter(|node| !node.usable).map(|n| &n.name)).map(String::as_str).collect();
        if check && !missing.is_empty() {
            return Err(Exit::Degraded.error(format!("missing: {}", missing.join(", "))));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn status() -> Value {
        json!({
            "cluster": "x", "model": "m", "leader": "coordinator-1", "quorum": true, "stale": false,
            "members": [{"id": 1, "name": "coordinator-1", "role": "leader", "address": "127.0.0.1:7001", "http": "127.0.0.1:7", "pid": 5,
                         "term": 2, "applied": 9, "lag": 0, "reachable": true}],
            "nodes": [{"id": 4, "name": "decode-1", "kind": "decode", "epoch": 3, "state": "up", "usable": true, "pid": 6, "running": 0,
                       "waiting": 0, "blocks": {"total": 64, "in_use": 2, "cached": 7}}],
        })
    }

    #[test]
    fn status_reads_as_a_table() {
        let text = serde_json::from_value::<Status>(status()).unwrap().page().render(false, false);
        assert!(text.starts_with("cluster x   model m   http -   leader coordinator-1   quorum\n"), "{text}");
        assert!(text.contains("coordinator-1  leader  127.0.0.1:7001"), "{text}");
        let node: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(node, ["decode-1", "decode", "up", "yes", "0", "0", "0", "2", "7", "64"]);
    }

    #[test]
    fn whole_degraded_and_lost_have_their_codes() {
        let code = |status: &Value, check| {
            let status: Status = serde_json::from_value(status.clone()).unwrap();
            status.verdict(check).err().map(|error| (Exit::of(&error), error.to_string()))
        };
        assert_eq!(code(&status(), true), None);
        let mut degraded = status();
        degraded["nodes"][0]["usable"] = json!(false);
        assert_eq!(code(&degraded, false), None, "nobody asked for a check");
        assert_eq!(code(&degraded, true), Some((Exit::Degraded, "missing: decode-1".into())));
        degraded["quorum"] = json!(false);
        assert_eq!(code(&degraded, false).map(|(exit, _)| exit), Some(Exit::Unavailable));
    }
}
