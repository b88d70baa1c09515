//! The operator's tool on a real cluster: what every command prints for programs, its exit codes, and what it does to the cluster. One
//! cluster serves the whole file; the last steps take its replicas away, one after the other.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use millrace_e2e::cluster::{Cluster, Plan};
use millrace_e2e::process::{self, Ended};
use millrace_e2e::stream::{self, Answer, End, Events};
use millrace_e2e::{WAIT_MAX, eventually};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

/// Engine time of a token: a stream of [`TOKENS`] takes some seconds.
const TOKEN_US: u64 = 10_000;
const TOKENS: usize = 400;
const NODES: [&str; 4] = ["decode-1", "decode-2", "prefill-1", "prefill-2"];

/// Its answer as JSON; the exit code must be `code`.
fn read(ended: &Ended, code: i32) -> Value {
    assert_eq!(ended.code, Some(code), "{ended:?}");
    let answer: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {ended:?}"));
    assert_eq!(answer["apiVersion"], "admin/v1", "{answer}");
    answer
}

async fn json(cluster: &Cluster, args: &[&str]) -> Value {
    read(&cluster.millctl(&[args, &["-o", "json"]].concat()).await, 0)
}

async fn code(cluster: &Cluster, args: &[&str]) -> i32 {
    cluster.millctl(args).await.code.unwrap()
}

fn names(list: &Value) -> BTreeSet<&str> {
    list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect()
}

fn has(object: &Value, fields: &[&str]) {
    for field in fields {
        assert!(object.get(field).is_some(), "{field} is missing: {object}");
    }
}

/// Shapes of what is asked.
async fn questions(cluster: &Cluster) {
    let status = json(cluster, &["cluster", "status"]).await;
    assert_eq!((&status["quorum"], &status["stale"], &status["unknown"]), (&json!(true), &json!(false), &json!([])));
    assert_eq!(names(&status["nodes"]), BTreeSet::from(NODES));
    assert_eq!(names(&status["members"]).len(), 3);
    has(
        &status["members"][0],
        &["id", "role", "address", "http", "pid", "term", "applied", "lag", "version", "traffic", "refusals"],
    );
    has(&status["nodes"][0], &["id", "kind", "epoch", "state", "usable", "address", "blocks", "requests", "requests_by", "model"]);
    assert_eq!(status["http"], format!("http://{}", cluster.http));
    assert_eq!(names(&json(cluster, &["nodes", "list"]).await["nodes"]), BTreeSet::from(NODES));
    let node = json(cluster, &["nodes", "show", "decode-1"]).await;
    assert_eq!(
        (&node["name"], &node["kind"], &node["state"], &node["stale"]),
        (&json!("decode-1"), &json!("decode"), &json!("up"), &json!(false))
    );
    let stat = json(cluster, &["cache", "stat"]).await;
    has(&stat, &["blocks", "holders", "applied"]);
    assert_eq!(names(&stat["nodes"]), BTreeSet::from(NODES));
    let prompt: Vec<String> = (0..40).map(|token| token.to_string()).collect();
    let prompt = prompt.join(",");
    let found = json(cluster, &["cache", "lookup", "--tokens", &prompt]).await;
    assert_eq!((&found["prompt_tokens"], &found["blocks"], &found["block_tokens"]), (&json!(40), &json!(2), &json!(16)));
    let route = json(cluster, &["route", "explain", "--tokens", &prompt]).await;
    has(&route, &["prefill", "decode", "cost", "alternatives"]);
    let doctor = json(cluster, &["doctor"]).await;
    assert_eq!((&doctor["verdict"], &doctor["quorum"], &doctor["unknown"]), (&json!("ok"), &json!(true), &json!([])));
    let checks: Vec<&str> = doctor["checks"].as_array().unwrap().iter().map(|check| check["name"].as_str().unwrap()).collect();
    let all = ["replicas", "quorum", "log", "versions", "models", "certificates", "nodes", "index", "gateways", "clocks"];
    assert_eq!(checks, all, "{doctor}");
}

/// The other four forms of an answer.
async fn forms(cluster: &Cluster) {
    let yaml = cluster.millctl(&["nodes", "list", "-o", "yaml"]).await;
    assert!(
        yaml.code == Some(0) && yaml.stdout.starts_with("apiVersion: admin/v1\n") && yaml.stdout.contains("- address: "),
        "{yaml:?}"
    );
    let list = cluster.millctl(&["nodes", "list", "-o", "name"]).await.stdout;
    assert_eq!(
        list.lines().collect::<BTreeSet<_>>(),
        BTreeSet::from(NODES.map(|name| format!("node/{name}")).each_ref().map(String::as_str))
    );
    let table = cluster.millctl(&["nodes", "list"]).await.stdout;
    let wide = cluster.millctl(&["nodes", "list", "-o", "wide"]).await.stdout;
    assert!(table.starts_with("NODE ") && !table.contains("ADDRESS") && !table.contains('\x1b'), "{table}");
    assert!(wide.contains("ADDRESS") && wide.lines().count() == table.lines().count(), "{wide}");
    let top = cluster.millctl(&["top", "--once", "--interval", "0.1"]).await;
    assert!(
        top.code == Some(0) && top.stdout.contains("GATEWAY") && top.stdout.contains("tokens/s") && !top.stdout.contains('\x1b'),
        "{top:?}"
    );
}

/// Exit codes, and that errors say what may help.
async fn codes(cluster: &Cluster) {
    for args in [&["nodes", "show", "nobody"][..], &["nodes", "cordon", "nobody"], &["nodes", "drain", "nobody", "--wait"]] {
        let ended = cluster.millctl(args).await;
        assert!(ended.code == Some(5) && ended.stdout.is_empty(), "{args:?}: {ended:?}");
        assert!(ended.stderr.contains("nobody") && ended.stderr.contains("hint: there are: "), "{ended:?}");
    }
    for args in
        [&["nodes", "drain"][..], &["cache", "lookup"], &["nodes", "list", "-o", "xml"], &["nodes", "list", "--interval", "1"]]
    {
        assert_eq!(code(cluster, args).await, 2, "{args:?}");
    }
    let elsewhere = process::run("millctl", &["cluster", "status", "--dir", "/nowhere"], WAIT_MAX).await;
    assert!(elsewhere.code == Some(5) && elsewhere.stderr.contains("/nowhere"), "{elsewhere:?}");
    let stranger = cluster.scratch().join("stranger");
    let certs = stranger.join("certs").display().to_string();
    for args in [&["certs", "init", "--cluster", "local"][..], &["certs", "issue", "--role", "admin", "--name", "admin"]] {
        assert_eq!(process::run("millctl", &[args, &["--dir", &certs]].concat(), WAIT_MAX).await.code, Some(0));
    }
    let again = process::run("millctl", &["certs", "init", "--dir", &certs], WAIT_MAX).await;
    assert_eq!(again.code, Some(6), "{again:?}");
    let mut file = cluster.file();
    file["admin_certs"] = json!(stranger.join("certs/admin"));
    std::fs::write(stranger.join("cluster.json"), file.to_string()).unwrap();
    let refused = process::run("millctl", &["nodes", "list", "--dir", &stranger.display().to_string()], WAIT_MAX).await;
    assert!(refused.code == Some(4) && refused.stderr.contains("another authority"), "{refused:?}");
}

/// Cordon and back; a dry run changes nothing; `--check` sees it; a watcher sees it come.
async fn cordons(cluster: &Cluster) {
    let mut watcher = cluster.millctl_running(&["nodes", "list", "-o", "json", "--watch", "--interval", "0.1"]);
    let mut lines = BufReader::new(watcher.stdout.take().unwrap()).lines();
    let mut next = async || serde_json::from_str::<Value>(&lines.next_line().await.unwrap().expect("a watcher goes on")).unwrap();
    let state =
        |nodes: &Value| nodes["nodes"].as_array().unwrap().iter().find(|n| n["name"] == "decode-2").unwrap()["state"].clone();
    assert_eq!(state(&next().await), "up");
    let plan = json(cluster, &["nodes", "cordon", "decode-2", "--dry-run"]).await;
    assert!(plan["dry_run"] == true && plan["plan"].as_str().unwrap().contains("decode-2"), "{plan}");
    assert_eq!(json(cluster, &["nodes", "show", "decode-2"]).await["state"], "up", "it was a dry run");
    let done = json(cluster, &["nodes", "cordon", "decode-2"]).await;
    assert_eq!((&done["node"], &done["state"]), (&json!("decode-2"), &json!("cordoned")));
    while state(&next().await) != "cordoned" {}
    drop(watcher);
    let checked = cluster.millctl(&["cluster", "status", "--check"]).await;
    assert!(checked.code == Some(3) && checked.stderr.contains("decode-2"), "{checked:?}");
    let doctor = read(&cluster.millctl(&["doctor", "-o", "json"]).await, 3);
    let ill: Vec<&Value> = doctor["checks"].as_array().unwrap().iter().filter(|check| check["verdict"] != "ok").collect();
    assert!(ill.len() == 1 && ill[0]["cure"].as_str().unwrap().contains("uncordon decode-2"), "{doctor}");
    assert_eq!(code(cluster, &["nodes", "uncordon", "decode-2"]).await, 0);
    eventually("it is whole again", WAIT_MAX, async || {
        let ended = cluster.millctl(&["cluster", "status", "--check"]).await;
        if ended.code == Some(0) { Ok(()) } else { Err(format!("{ended:?}")) }
    })
    .await;
}

/// A drain waits for what runs while nobody else can decode, says what it waits for, and gives up in time. As soon as another can, the stream
/// goes on there with the same tokens.
async fn drains(cluster: &Cluster) {
    let prompt: Vec<u32> = (0..64).map(|token| token % 250).collect();
    let body = json!({"model": cluster.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true, "stream": true, "return_token_ids": true});
    let (mut events, mut answer) = (Events::open(cluster.http, "/v1/completions", &body).await.unwrap(), Answer::default());
    while answer.ids.len() < 4 {
        answer.add(events.next().await.unwrap().expect("the stream goes on"));
    }
    let reading = tokio::spawn(events.collect(answer));
    let busy = eventually("somebody decodes", WAIT_MAX, async || {
        let nodes = json(cluster, &["nodes", "list"]).await;
        let busy = nodes["nodes"].as_array().unwrap().iter().find(|node| node["running"] == 1).map(|node| node["name"].clone());
        busy.and_then(|name| name.as_str().map(str::to_owned)).ok_or_else(|| nodes.to_string())
    })
    .await;
    let other = if busy == "decode-1" { "decode-2" } else { "decode-1" };
    assert_eq!(code(cluster, &["nodes", "cordon", other]).await, 0);
    let late = cluster.millctl(&["nodes", "drain", &busy, "--wait", "--timeout", "0.3"]).await;
    assert!(late.code == Some(7) && late.stderr.contains("1 requests") && late.stderr.contains("of coordinator-"), "{late:?}");
    let shown = json(cluster, &["nodes", "show", &busy]).await;
    assert_eq!((&shown["state"], &shown["requests"], &shown["usable"]), (&json!("draining"), &json!(1), &json!(false)));
    assert_eq!(code(cluster, &["nodes", "uncordon", other]).await, 0);
    let done = json(cluster, &["nodes", "drain", &busy, "--wait"]).await;
    assert_eq!((&done["drained"], &done["remaining"], &done["state"]), (&json!(true), &json!(0), &json!("draining")));
    let answer = reading.await.unwrap();
    assert_eq!((answer.end, answer.ids.len()), (End::Whole, TOKENS), "a drain disturbs nobody");
    assert_eq!(code(cluster, &["nodes", "uncordon", &busy]).await, 0);
    cluster.rests().await;
    let again = stream::complete(cluster.http, "/v1/completions", &body).await;
    assert_eq!((again.end, again.ids), (End::Whole, answer.ids), "the tokens are those of an undisturbed answer");
}

/// Traffic was counted.
async fn traffic(cluster: &Cluster) {
    let status = json(cluster, &["cluster", "status"]).await;
    let sum =
        |field: &str| status["members"].as_array().unwrap().iter().map(|m| m["traffic"][field].as_u64().unwrap()).sum::<u64>();
    assert_eq!((sum("ended"), sum("failed"), sum("output_tokens"), sum("prompt_tokens")), (2, 0, 2 * TOKENS as u64, 128));
}

/// Named clusters: by flag, by variable, by use; forgotten names are not found.
async fn contexts(cluster: &Cluster) {
    let (file, env) = (cluster.file(), cluster.user());
    let millctl = async |more: &[(&str, &str)], args: &[&str]| {
        let more = more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let env: Vec<(String, String)> = env.iter().cloned().chain(more).collect();
        process::run_as(&env, "millctl", args, WAIT_MAX).await
    };
    let doors: Vec<String> = file["coordinators"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| format!("{}={}", c["name"].as_str().unwrap(), c["quic"].as_str().unwrap()))
        .collect();
    let (doors, certs) = (doors.join(","), file["admin_certs"].as_str().unwrap());
    let added = millctl(&[], &["context", "add", "prod", "--coordinators", &doors, "--certs", certs]).await;
    assert_eq!(added.code, Some(0), "{added:?}");
    let list = read(&millctl(&[], &["context", "list", "-o", "json"]).await, 0);
    assert_eq!(names(&list["contexts"]), BTreeSet::from(["local", "prod"]));
    let named = read(&millctl(&[], &["cluster", "status", "--context", "prod", "-o", "json"]).await, 0);
    let by_variable = read(&millctl(&[("MILLCTL_CONTEXT", "prod")], &["cluster", "status", "-o", "json"]).await, 0);
    assert_eq!(
        (&named["http"], &named["quorum"], &by_variable["http"]),
        (&Value::Null, &json!(true), &Value::Null),
        "a door is local"
    );
    let nearest = read(&millctl(&[], &["cluster", "status", "-o", "json"]).await, 0);
    assert!(nearest["http"].is_string(), "nothing is in use, so it is the local cluster: {nearest}");
    assert_eq!(millctl(&[], &["context", "use", "prod"]).await.code, Some(0));
    assert_eq!(read(&millctl(&[], &["cluster", "status", "-o", "json"]).await, 0)["http"], Value::Null);
    assert!(millctl(&[], &["context", "show", "-o", "yaml"]).await.stdout.contains("name: prod"));
    let both = millctl(&[], &["cluster", "status", "--context", "prod", "--dir", "x"]).await;
    assert_eq!(both.code, Some(2), "{both:?}");
    assert_eq!(millctl(&[], &["context", "delete", "prod"]).await.code, Some(0));
    for args in [&["context", "use", "prod"][..], &["context", "delete", "prod"], &["nodes", "list", "--context", "prod"]] {
        assert_eq!(millctl(&[], args).await.code, Some(5), "{args:?}");
    }
    let running = read(&millctl(&[], &["local", "status", "-o", "json"]).await, 0);
    assert_eq!(running["clusters"][0]["dir"], json!(cluster.dir().canonicalize().unwrap()));
    for shell in ["bash", "zsh", "fish"] {
        let script = millctl(&[], &["completion", shell]).await;
        assert!(script.code == Some(0) && script.stdout.contains("uncordon"), "{shell}");
    }
}

/// Every process shows a new certificate, without a restart; the cluster serves on.
async fn certificates(cluster: &Cluster) {
    let before = cluster.status().await.unwrap();
    let certs = cluster.file()["certs"].as_str().unwrap().to_owned();
    let shown = read(&process::run("millctl", &["certs", "show", "--dir", &certs, "-o", "json"], WAIT_MAX).await, 0);
    let shown = shown["certificates"].as_array().unwrap();
    assert_eq!(shown.len(), 9, "an authority, an operator and seven processes: {shown:?}");
    assert!(shown.iter().all(|one| one["state"] == "valid" && one["days_left"].as_i64().unwrap() > 300), "{shown:?}");
    let rotated = process::run("millctl", &["certs", "rotate", "--dir", &certs, "--wait", "-o", "json"], WAIT_MAX).await;
    let rotated = read(&rotated, 0);
    let states: Vec<&str> = rotated["rotated"].as_array().unwrap().iter().map(|one| one["state"].as_str().unwrap()).collect();
    assert_eq!((states.len(), states.iter().filter(|state| **state == "in use").count()), (8, 7), "{rotated}");
    let former: Vec<&Value> = shown.iter().map(|one| &one["serial"]).collect();
    assert!(rotated["rotated"].as_array().unwrap().iter().all(|one| !former.contains(&&one["serial"])), "{rotated}");
    let after = cluster.rests().await;
    let pids = |status: &millrace_e2e::cluster::Status| status.nodes.iter().map(|node| (node.pid, node.epoch)).collect::<Vec<_>>();
    assert_eq!(pids(&after), pids(&before), "nobody was started again");
}

async fn kill(cluster: &Cluster, name: &str) {
    let pid = cluster.file()["coordinators"].as_array().unwrap().iter().find(|c| c["name"] == name).unwrap()["pid"]
        .as_u64()
        .unwrap() as u32;
    assert!(process::signal("KILL", pid), "no process {pid}");
    eventually("the process is dead", WAIT_MAX, async || if process::lives(pid) { Err("it lives".into()) } else { Ok(()) }).await;
}

/// One replica less: degraded. Two less: no quorum, and what is unknown is said; nothing can be changed.
async fn losses(cluster: &Cluster) {
    let leader = cluster.status().await.unwrap().leader.unwrap();
    let others: Vec<String> = (1..=3).map(|id| format!("coordinator-{id}")).filter(|name| *name != leader).collect();
    kill(cluster, &leader).await;
    eventually("the others have a leader", WAIT_MAX, async || {
        let ended = cluster.millctl(&["doctor", "-o", "json"]).await;
        if ended.code == Some(3) { Ok(()) } else { Err(format!("{ended:?}")) }
    })
    .await;
    assert_eq!(code(cluster, &["cluster", "status"]).await, 0);
    assert_eq!(code(cluster, &["cluster", "status", "--check"]).await, 3);
    kill(cluster, &others[0]).await;
    let status = eventually("the last one knows that it is alone", WAIT_MAX, async || {
        let ended = cluster.millctl(&["cluster", "status", "-o", "json"]).await;
        if ended.code == Some(4) && !ended.stdout.is_empty() { Ok(read(&ended, 4)) } else { Err(format!("{ended:?}")) }
    })
    .await;
    assert_eq!((&status["quorum"], &status["stale"], &status["answered_by"]), (&json!(false), &json!(true), &json!(others[1])));
    let said = status["unknown"].to_string();
    assert!(said.contains(&leader) && said.contains(&others[0]) && said.contains("no quorum vouches"), "{said}");
    assert_eq!(names(&status["nodes"]), BTreeSet::from(NODES), "what is known is still told");
    let doctor = read(&cluster.millctl(&["doctor", "-o", "json"]).await, 4);
    assert_eq!((&doctor["verdict"], &doctor["quorum"]), (&json!("no_quorum"), &json!(false)));
    assert!(doctor["unknown"].to_string().contains("no quorum vouches"), "{doctor}");
    let cures = doctor["checks"].to_string();
    assert!(cures.contains("2 of 3 replicas must run, 1 do: start 1 more"), "{cures}");
    let text = cluster.millctl(&["cluster", "status"]).await;
    assert!(text.stdout.contains("NO QUORUM") && text.stdout.contains("unknown: ") && text.stderr.contains("hint: "), "{text:?}");
    let refused = cluster.millctl(&["nodes", "cordon", "decode-1"]).await;
    assert_eq!(refused.code, Some(4), "{refused:?}");
    kill(cluster, &others[1]).await;
    let nobody = read(&cluster.millctl(&["doctor", "-o", "json"]).await, 4);
    assert_eq!(nobody["unknown"][0], "everything about the cluster: no replica answers");
    let silent = cluster.millctl(&["cluster", "status"]).await;
    assert!(silent.code == Some(4) && silent.stderr.contains("no coordinator of the cluster answers"), "{silent:?}");
}

/// The cluster is stopped from elsewhere; a second time there is none.
async fn down(cluster: &Cluster) {
    let dir = cluster.dir().display().to_string();
    let dry = process::run("millctl", &["local", "down", "--dir", &dir, "--dry-run"], WAIT_MAX).await;
    assert!(dry.code == Some(0) && dry.stdout.starts_with("would stop"), "{dry:?}");
    let ended = process::run("millctl", &["local", "down", "--dir", &dir], WAIT_MAX).await;
    assert!(ended.code == Some(0) && ended.stdout == "stopped\n", "{ended:?}");
    assert_eq!(process::run("millctl", &["local", "down", "--dir", &dir], WAIT_MAX).await.code, Some(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_on_a_real_cluster_until_its_last_replica() {
    let cluster = Cluster::start(Plan { restart: false, ..Plan::checksum(TOKEN_US) }).await;
    cluster.rests().await;
    questions(&cluster).await;
    forms(&cluster).await;
    codes(&cluster).await;
    cordons(&cluster).await;
    drains(&cluster).await;
    traffic(&cluster).await;
    contexts(&cluster).await;
    certificates(&cluster).await;
    losses(&cluster).await;
    down(&cluster).await;
}
