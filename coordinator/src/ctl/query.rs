//! Questions to a running cluster and what is printed of the answers: tables for people, JSON for programs. Any replica answers;
//! what it cannot vouch for is said.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

use super::ask::Asker;
use super::cluster_file::ClusterFile;
use super::context;
use super::exit::Exit;
use super::table::{cell, render};

/// The version of the JSON that is printed.
pub const API_VERSION: &str = "admin/v1";

/// How an answer is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs: one JSON object.
    Json,
}

/// Options of every question.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// The cluster's folder; the newest local cluster that runs if absent
    #[arg(long, env = "MILLRACE_DIR")]
    pub dir: Option<PathBuf>,
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value = "table")]
    pub output: Output,
}

/// A prompt in one of three forms.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct PromptForm {
    /// Text; @FILE reads it from a file
    #[arg(long)]
    prompt: Option<String>,
    /// Token ids: 1,2,3
    #[arg(long, value_delimiter = ',')]
    tokens: Option<Vec<u32>>,
    /// A chat: a JSON array of messages; @FILE reads it from a file
    #[arg(long)]
    messages: Option<String>,
}

/// A question about a prompt.
#[derive(Args, Clone, Debug)]
pub struct Prompt {
    #[command(flatten)]
    form: PromptForm,
    /// Whose cache; the default tenant's if absent
    #[arg(long)]
    tenant: Option<String>,
    #[command(flatten)]
    common: Common,
}

/// `millctl cluster`.
#[derive(Subcommand, Debug)]
pub enum Cluster {
    /// Members, nodes, leader
    #[command(after_help = "Example:\n  millctl cluster status -o json")]
    Status(StatusArgs),
}

/// What to ask about the cluster.
#[derive(Args, Clone, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    common: Common,
    /// Exit with 3 when a part is missing, with 4 when there is no quorum
    #[arg(long)]
    check: bool,
}

/// `millctl nodes`.
#[derive(Subcommand, Debug)]
pub enum Nodes {
    /// All nodes
    #[command(after_help = "Example:\n  millctl nodes list")]
    List(Common),
    /// Give a node no new requests; what runs there goes on
    #[command(after_help = "Example:\n  millctl nodes cordon decode-1")]
    Cordon(NodeName),
    /// Let a node take requests again
    #[command(after_help = "Example:\n  millctl nodes uncordon decode-1")]
    Uncordon(NodeName),
    /// Give a node no new requests and let it finish, before it is stopped
    #[command(after_help = "Example:\n  millctl nodes drain decode-1")]
    Drain(NodeName),
}

/// A node on the command line.
#[derive(Args, Clone, Debug)]
pub struct NodeName {
    /// The node's name
    name: String,
    #[command(flatten)]
    common: Common,
}

/// `millctl cache`.
#[derive(Subcommand, Debug)]
pub enum Cache {
    /// Which nodes hold how much of a prompt
    #[command(after_help = "Example:\n  millctl cache lookup --prompt 'Once upon a time'")]
    Lookup(Prompt),
    /// How much is cached
    #[command(after_help = "Example:\n  millctl cache stat")]
    Stat(Common),
}

/// `millctl route`.
#[derive(Subcommand, Debug)]
pub enum Route {
    /// Where a prompt would go, and what each part of that would cost
    #[command(after_help = "Example:\n  millctl route explain --prompt @question.txt")]
    Explain(Prompt),
}

/// Runs a `millctl cluster` command.
///
/// # Errors
/// The cluster does not answer, or `--check` finds something missing.
pub async fn cluster(command: Cluster) -> Result<()> {
    let Cluster::Status(StatusArgs { common, check }) = command;
    let (status, file) = ask(&common, json!({"q": "status"})).await?;
    print(&common, &with_front(status.clone(), &file), status_table)?;
    if check { verdict(&status) } else { Ok(()) }
}

/// Runs a `millctl nodes` command.
///
/// # Errors
/// The cluster does not answer, or refuses.
pub async fn nodes(command: Nodes) -> Result<()> {
    let (node, state) = match command {
        Nodes::List(common) => {
            let (status, _) = ask(&common, json!({"q": "status"})).await?;
            return print(&common, &json!({"nodes": status["nodes"], "stale": status["stale"]}), nodes_table);
        }
        Nodes::Cordon(node) => (node, "cordoned"),
        Nodes::Uncordon(node) => (node, "up"),
        Nodes::Drain(node) => (node, "draining"),
    };
    let (answer, _) = ask(&node.common, json!({"q": "set_state", "node": node.name, "state": state})).await?;
    print(&node.common, &answer, |answer| format!("{} is {}\n", cell(&answer["node"]), cell(&answer["state"])))
}

/// Runs a `millctl cache` command.
///
/// # Errors
/// The cluster does not answer, or refuses the prompt.
pub async fn cache(command: Cache) -> Result<()> {
    match command {
        Cache::Stat(common) => {
            let (stat, _) = ask(&common, json!({"q": "cache_stat"})).await?;
            print(&common, &stat, stat_table)
        }
        Cache::Lookup(prompt) => {
            let (found, _) = ask(&prompt.common, prompt.query("cache_lookup")?).await?;
            print(&prompt.common, &found, lookup_table)
        }
    }
}

/// Runs a `millctl route` command.
///
/// # Errors
/// The cluster does not answer, or cannot place the prompt.
pub async fn route(command: Route) -> Result<()> {
    let Route::Explain(prompt) = command;
    let (decision, _) = ask(&prompt.common, prompt.query("route_explain")?).await?;
    print(&prompt.common, &decision, decision_table)
}

impl Prompt {
    fn query(&self, question: &str) -> Result<Value> {
        let mut query = json!({"q": question});
        if let Some(text) = &self.form.prompt {
            query["text"] = json!(at_file(text)?);
        }
        if let Some(tokens) = &self.form.tokens {
            query["tokens"] = json!(tokens);
        }
        if let Some(messages) = &self.form.messages {
            let wrong = |error| Exit::Usage.error(format!("--messages: {error}"));
            query["messages"] = serde_json::from_str(&at_file(messages)?).map_err(wrong)?;
        }
        if let Some(tenant) = &self.tenant {
            query["tenant"] = json!(tenant);
        }
        Ok(query)
    }
}

fn at_file(text: &str) -> Result<String> {
    match text.strip_prefix('@') {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.to_owned()),
        None => Ok(text.to_owned()),
    }
}

async fn ask(common: &Common, query: Value) -> Result<(Value, ClusterFile)> {
    let dir = context::resolve(common.dir.as_deref())?;
    let file = ClusterFile::load(&dir)?;
    let mut asker = Asker::new(&dir, &file)?;
    let answer = asker.ask(&query).await;
    asker.close().await;
    Ok((answer?, file))
}

/// Adds where clients are served, which the cluster itself does not know.
fn with_front(mut status: Value, file: &ClusterFile) -> Value {
    status["http"] = json!(file.http.map(|http| format!("http://{http}")));
    status
}

fn verdict(status: &Value) -> Result<()> {
    if status["quorum"] != true {
        return Err(Exit::Unavailable.error("there is no quorum"));
    }
    let absent = |list: &str, field: &str| {
        list_of(status, list).iter().filter(|one| one[field] != true).map(|one| cell(&one["name"])).collect::<Vec<_>>()
    };
    let missing = [absent("members", "reachable"), absent("nodes", "usable")].concat();
    if missing.is_empty() { Ok(()) } else { Err(Exit::Degraded.error(format!("missing: {}", missing.join(", ")))) }
}

fn print(common: &Common, answer: &Value, table: impl Fn(&Value) -> String) -> Result<()> {
    use std::io::Write;
    let text = match common.output {
        Output::Table => table(answer),
        Output::Json => {
            let mut versioned = Map::from_iter([("apiVersion".to_owned(), json!(API_VERSION))]);
            versioned.extend(answer.as_object().cloned().unwrap_or_default());
            serde_json::to_string_pretty(&versioned).context("writing JSON")? + "\n"
        }
    };
    // A reader such as `head` may have enough.
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("standard output"),
        _ => Ok(()),
    }
}

fn list_of<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().map_or(&[], Vec::as_slice)
}

fn rows(list: &[Value], columns: &[&str]) -> Vec<Vec<String>> {
    list.iter().map(|one| columns.iter().map(|pointer| cell(one.pointer(pointer).unwrap_or(&Value::Null))).collect()).collect()
}

fn status_table(status: &Value) -> String {
    let quorum = if status["quorum"] == true { "quorum" } else { "NO QUORUM" };
    let stale = if status["stale"] == true { "   (stale: figures may be old)" } else { "" };
    let head = ["cluster", "model", "http", "leader"].map(|name| format!("{name} {}", cell(&status[name])));
    let members = rows(list_of(status, "members"), &["/id", "/name", "/role", "/address", "/http", "/pid", "/term", "/applied"]);
    let members = render(&["ID", "MEMBER", "ROLE", "ADDRESS", "HTTP", "PID", "TERM", "APPLIED"], &members);
    format!("{}   {quorum}{stale}\n\n{members}\n{}", head.join("   "), nodes_table(status))
}

fn nodes_table(answer: &Value) -> String {
    let columns = [
        "/id",
        "/name",
        "/kind",
        "/state",
        "/usable",
        "/epoch",
        "/pid",
        "/running",
        "/waiting",
        "/blocks/in_use",
        "/blocks/cached",
        "/blocks/total",
    ];
    let nodes = rows(list_of(answer, "nodes"), &columns);
    render(&["ID", "NODE", "KIND", "STATE", "USABLE", "EPOCH", "PID", "RUNNING", "WAITING", "IN USE", "CACHED", "BLOCKS"], &nodes)
}

fn stat_table(stat: &Value) -> String {
    let nodes =
        render(&["NODE", "BLOCKS", "SEQ", "REFUSED"], &rows(list_of(stat, "nodes"), &["/name", "/blocks", "/seq", "/refused"]));
    format!(
        "blocks {}   copies {}   log index {}\n\n{nodes}",
        cell(&stat["blocks"]),
        cell(&stat["holders"]),
        cell(&stat["applied"])
    )
}

fn lookup_table(found: &Value) -> String {
    let nodes = rows(list_of(found, "nodes"), &["/name", "/cached_blocks", "/cached_tokens"]);
    let [tokens, blocks, size] = ["prompt_tokens", "blocks", "block_tokens"].map(|name| cell(&found[name]));
    format!("tokens {tokens}   blocks {blocks} of {size} tokens\n\n{}", render(&["NODE", "BLOCKS", "TOKENS"], &nodes))
}

fn decision_table(decision: &Value) -> String {
    let decode = if decision["decode"].is_null() { "where it is prefilled".to_owned() } else { cell(&decision["decode"]) };
    let [prompt, prefill, cached, had] =
        ["prompt_tokens", "prefill", "prefill_cached_blocks", "decode_cached_blocks"].map(|name| cell(&decision[name]));
    let head = format!("prefill on {prefill} (has {cached} blocks), decode {decode} (has {had} blocks), {prompt} tokens\n\n");
    let costs = decision["cost"].as_object().cloned().unwrap_or_default();
    let costs: Vec<Vec<String>> = costs.iter().map(|(name, us)| vec![name.trim_end_matches("_us").to_owned(), cell(us)]).collect();
    let others = rows(list_of(decision, "alternatives"), &["/prefill", "/decode", "/total_us"]);
    head + &render(&["COST", "MICROSECONDS"], &costs) + "\n" + &render(&["PREFILL", "DECODE", "MICROSECONDS"], &others)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Value {
        json!({
            "cluster": "x", "model": "m", "leader": "coordinator-1", "quorum": true, "stale": false,
            "members": [{"id": 1, "name": "coordinator-1", "role": "leader", "address": "127.0.0.1:7001", "http": "127.0.0.1:7", "pid": 5,
                         "term": 2, "applied": 9, "reachable": true}],
            "nodes": [{"id": 4, "name": "decode-1", "kind": "decode", "epoch": 3, "state": "up", "usable": true, "pid": 6, "running": 0,
                       "waiting": 0, "blocks": {"total": 64, "in_use": 2, "cached": 7}}],
        })
    }

    #[test]
    fn status_reads_as_a_table() {
        let text = status_table(&status());
        assert!(text.starts_with("cluster x   model m   http -   leader coordinator-1   quorum\n"), "{text}");
        assert!(text.contains("coordinator-1  leader  127.0.0.1:7001"), "{text}");
        let node: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(node, ["4", "decode-1", "decode", "up", "yes", "3", "6", "0", "0", "2", "7", "64"]);
    }

    #[test]
    fn a_check_tells_whole_from_degraded_from_lost() {
        let code = |status: &Value| verdict(status).err().map(|error| Exit::of(&error));
        assert_eq!(code(&status()), None);
        let mut degraded = status();
        degraded["nodes"][0]["usable"] = json!(false);
        assert_eq!(code(&degraded), Some(Exit::Degraded));
        assert!(verdict(&degraded).unwrap_err().to_string().contains("decode-1"));
        degraded["quorum"] = json!(false);
        assert_eq!(code(&degraded), Some(Exit::Unavailable));
    }

    #[test]
    fn a_prompt_may_be_text_tokens_a_chat_or_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        std::fs::write(&path, "from a file").unwrap();
        let common = Common { dir: None, output: Output::Json };
        let query = |prompt: Option<String>, tokens, messages: Option<&str>| {
            let form = PromptForm { prompt, tokens, messages: messages.map(str::to_owned) };
            Prompt { form, tenant: None, common: common.clone() }.query("cache_lookup")
        };
        assert_eq!(
            query(Some(format!("@{}", path.display())), None, None).unwrap(),
            json!({"q": "cache_lookup", "text": "from a file"})
        );
        assert_eq!(query(None, Some(vec![1, 2]), None).unwrap()["tokens"], json!([1, 2]));
        assert_eq!(query(None, None, Some("[{\"role\":\"user\"}]")).unwrap()["messages"][0]["role"], "user");
        assert_eq!(Exit::of(&query(None, None, Some("nonsense")).unwrap_err()), Exit::Usage);
    }

    #[test]
    fn a_decision_and_a_lookup_read_as_tables() {
        let decision = json!({"prompt_tokens": 40, "prefill": "prefill-1", "decode": null, "prefill_cached_blocks": 2, "decode_cached_blocks": 0,
            "cost": {"total_us": 7}, "alternatives": [{"prefill": "prefill-2", "decode": "decode-1", "total_us": 9}]});
        let text = decision_table(&decision);
        assert!(text.starts_with("prefill on prefill-1 (has 2 blocks), decode where it is prefilled"), "{text}");
        assert!(text.contains("\nprefill-2  decode-1             9\n"), "{text}");
        let found = json!({"prompt_tokens": 40, "blocks": 2, "block_tokens": 16, "nodes": [{"name": "decode-1", "cached_blocks": 1, "cached_tokens": 16}]});
        assert!(lookup_table(&found).ends_with("decode-1       1      16\n"), "{}", lookup_table(&found));
    }
}
