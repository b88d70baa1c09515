//! Files that operators write, and what a server under load says.

use std::fs;
use std::path::Path;

use clap::Parser as _;
use coordinator::ctl::cluster_file::{self, ClusterFile};
use coordinator::ctl::config;
use millrace_load::millload::client::sse::{Chunk, Events, Malformed};
use millrace_load::millload::plan::Plan;
use millrace_load::millload::workload::Workload;

use super::{BASE_BYTES, Parser, Target, mutate, same, times};
use crate::json;

pub(super) const PLAN: Target = Target {
    name: "plan",
    what: "a plan of millload",
    examples: || vec![plan_of(WORKLOADS[0]), plan_of(WORKLOADS[1])],
    spoil: json::lines,
    open: || in_file("plan", plan),
    memory_max: |len| (4 << 20) + 128 * len,
    caught: &[],
    short_runs: 4_000,
};

pub(super) const TRACE: Target = Target {
    name: "trace",
    what: "a trace from which millload makes a plan",
    examples: || vec![ROWS.as_bytes().to_vec()],
    spoil: json::lines,
    open: || in_file("trace", trace),
    memory_max: |len| (8 << 20) + 256 * len,
    caught: &[],
    short_runs: 4_000,
};

pub(super) const EVENTS: Target = Target {
    name: "events",
    what: "events of a server under load",
    examples: || vec![STREAM.as_bytes().to_vec()],
    spoil: mutate::bytes,
    open: || Box::new(events),
    memory_max: times::<64>,
    caught: &[],
    short_runs: 20_000,
};

pub(super) const CLUSTER: Target = Target {
    name: "cluster-file",
    what: "cluster.json of a local cluster",
    examples: || vec![CLUSTER_FILE.to_owned().into_bytes()],
    spoil: json::document,
    open: || {
        let dir = tempfile::tempdir().expect("a scratch directory");
        Box::new(move |bytes| {
            fs::write(dir.path().join(cluster_file::FILE), bytes).map_err(|error| error.to_string())?;
            let Ok(file) = ClusterFile::load(dir.path()) else { return Ok(false) };
            let _ = file.pids().count();
            file.save(dir.path()).map_err(|error| error.to_string())?;
            same("a cluster file", &ClusterFile::load(dir.path()).ok(), &Some(file))?;
            Ok(true)
        })
    },
    memory_max: times::<96>,
    caught: &[],
    short_runs: 10_000,
};

pub(super) const SETTINGS: Target = Target {
    name: "settings",
    what: "a file of `millctl config set -f`",
    examples: || vec![b"# ours\nslo.ttft_ms = 500\nauth.required=true # all\n\nslo.tpot_ms =\n".to_vec()],
    spoil: mutate::bytes,
    open: || in_file("settings", |path| Ok(config::read(path).is_ok())),
    memory_max: |len| BASE_BYTES + 96 * len,
    caught: &[],
    short_runs: 10_000,
};

const WORKLOADS: [&str; 2] = ["plan random --requests 6 --rate 10 --prompt 40 --output 5", "plan sessions --requests 8 --rate 10"];

const ROWS: &str = r#"{"timestamp": 0, "input_length": 1500, "output_length": 320, "hash_ids": [0, 1, 2], "cls": "chat"}
{"timestamp": 0, "input_length": 1024, "output_length": 5, "hash_ids": [0, 3], "cls": "tool", "session": 4}
{"timestamp": 3000, "input_length": 1537, "output_length": 64, "hash_ids": [0, 3, 5, 6], "session": 4, "turn": 1, "delay_ms": 250}"#;

const STREAM: &str = "data: {\"choices\":[{\"text\":\"a\",\"token_ids\":[5]}],\"millrace\":{\"attempts\":1}}\n\n: t 0 5 0\ndata: {\"usage\":\
    {\"prompt_tokens\":3,\"completion_tokens\":1},\"choices\":[]}\r\n\r\ndata: two\ndata: lines\n\ndata: [DONE]\n\n";

const CLUSTER_FILE: &str = r#"{"version": 1, "cluster": "x", "model": "m.gguf", "http": "127.0.0.1:8080", "certs": "certs",
    "admin_certs": "certs/admin", "pid": 1, "coordinators": [{"id": 1, "name": "coordinator-1", "quic": "127.0.0.1:7001", "http": null,
    "pid": 2}], "nodes": [{"name": "prefill-1", "kind": "prefill", "pid": 3}]}"#;

#[derive(clap::Parser)]
struct Line {
    #[command(subcommand)]
    workload: Workload,
}

fn in_file(name: &'static str, parse: fn(&Path) -> Result<bool, String>) -> Parser {
    let dir = tempfile::tempdir().expect("a scratch directory");
    Box::new(move |bytes| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).map_err(|error| error.to_string())?;
        parse(&path)
    })
}

fn plan_of(words: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let path = dir.path().join("plan");
    let line = Line::try_parse_from(words.split(' ')).expect("a workload of millload");
    line.workload.plan().and_then(|plan| plan.save(&path)).expect("a plan");
    fs::read(path).expect("a plan")
}

/// Tokens of a prompt that is written out.
const PROMPT_TOKENS: u64 = 10_000;

fn plan(path: &Path) -> Result<bool, String> {
    let Ok(plan) = Plan::load(path) else { return Ok(false) };
    let units = plan.units();
    same("the number of requests", &units.iter().map(Vec::len).sum::<usize>(), &plan.requests.len())?;
    let _ = plan.part(1, 3);
    for request in plan.requests.iter().filter(|request| request.prompt_tokens() <= PROMPT_TOKENS) {
        let tokens = plan.prompt(request, &[]);
        same("the length of a prompt", &(tokens.len() as u64), &request.prompt_tokens())?;
    }
    plan.save(path).map_err(|error| error.to_string())?;
    same("a plan", &Plan::load(path).ok(), &Some(plan))?;
    Ok(true)
}

fn trace(path: &Path) -> Result<bool, String> {
    let words = ["plan", "trace", &path.display().to_string(), "--by-session", "--speed", "2"].map(str::to_owned);
    let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
    let Ok(plan) = line.workload.plan() else { return Ok(false) };
    let _ = plan.units();
    Ok(true)
}

/// Events in two pieces are those of the whole.
fn events(bytes: &[u8]) -> Result<bool, String> {
    let parts = |cut: usize| -> Result<Vec<Vec<u8>>, Malformed> {
        let (mut events, mut all) = (Events::default(), Vec::new());
        let mut each = |data: &[u8]| {
            all.push(data.to_vec());
            Ok(())
        };
        events.push(&bytes[..cut], &mut each)?;
        events.push(&bytes[cut..], &mut each)?;
        Ok(all)
    };
    let whole = parts(0);
    same("the events of a stream", &parts(bytes.len() / 2), &whole)?;
    let read = whole.iter().flatten().filter(|data| serde_json::from_slice::<Chunk>(data).is_ok()).count();
    Ok(read > 0)
}
