//! The same process is killed and comes back again and again, while answers are asked for: a replica, and a node, whose lease has not
//! ended when its next incarnation joins. Afterwards every block is free and all replicas know the same of every node.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use millrace_e2e::cluster::{Cluster, Plan};
use millrace_e2e::stream::{End, complete};
use millrace_e2e::{WAIT_MAX, eventually, process};
use serde_json::{Value, json};

/// How often each is killed.
const KILLS: usize = 4;
const CLIENTS: usize = 3;

fn body(model: &str, number: usize) -> Value {
    let prompt: Vec<usize> = (0..100).map(|i| 3 + (i * 7 + number % 4) % 290).collect();
    let (salt, tokens) = (format!("{}", number / 40), 30);
    json!({
        "model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": true, "temperature": 0, "return_token_ids": true,
        "stream": true, "cache_salt": salt,
    })
}

/// Asks until told to stop; every answer to a prompt must be the same. Gives how many came.
async fn ask(cluster: (std::net::SocketAddr, String), client: usize, stop: Arc<AtomicBool>) -> usize {
    let (mut number, mut known) = (client, vec![Vec::new(); 4]);
    while !stop.load(Ordering::Relaxed) {
        let answer = complete(cluster.0, "/v1/completions", &body(&cluster.1, number)).await;
        assert_eq!(answer.end, End::Whole, "client {client}, request {number}");
        let known = &mut known[number % 4];
        if known.is_empty() {
            known.clone_from(&answer.ids);
        }
        assert_eq!(*known, answer.ids, "client {client}, request {number}");
        number += CLIENTS;
    }
    number / CLIENTS
}

/// What one replica knows of what each node holds: name, blocks, digest.
async fn index(cluster: &Cluster, replica: usize) -> Result<Vec<(String, u64, String)>, String> {
    let mut file = cluster.file();
    let alone = file["coordinators"][replica].clone();
    file["coordinators"] = json!([alone]);
    let dir = cluster.scratch().join(format!("replica-{replica}"));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("cluster.json"), file.to_string()).unwrap();
    let dir = dir.display().to_string();
    let ended = process::run("millctl", &["cache", "stat", "-o", "json", "--dir", &dir], WAIT_MAX).await;
    let stat: Value = serde_json::from_str(&ended.stdout).map_err(|e| format!("{e}: {ended:?}"))?;
    let node = |node: &Value| Some((node["name"].as_str()?.into(), node["blocks"].as_u64()?, node["digest"].as_str()?.into()));
    stat["nodes"].as_array().ok_or("no nodes")?.iter().map(|n| node(n).ok_or(format!("{n}"))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_dies_again_and_again_leaves_nothing_behind_and_all_replicas_agree() {
    let cluster = Cluster::start(Plan::checksum(300)).await;
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..CLIENTS).map(|n| tokio::spawn(ask((cluster.http, cluster.model.clone()), n, stop.clone()))).collect();
    for name in ["coordinator-2", "decode-1", "prefill-2"] {
        for _ in 0..KILLS {
            let pid =
                eventually("it has a process", WAIT_MAX, async || cluster.status().await?.pid(name).ok_or("none".into())).await;
            assert!(process::signal("KILL", pid), "{name}");
            eventually("the next one is there", WAIT_MAX, async || match cluster.status().await?.pid(name) {
                Some(next) if next != pid => Ok(()),
                _ => Err(format!("{name} is not back")),
            })
            .await;
        }
    }
    stop.store(true, Ordering::Relaxed);
    let mut answers = 0;
    for client in clients {
        answers += client.await.unwrap();
    }
    println!("{answers} answers, all right, while three processes died {KILLS} times each");
    cluster.rests().await;
    eventually("all replicas know the same", WAIT_MAX, async || {
        let known = [index(&cluster, 0).await?, index(&cluster, 1).await?, index(&cluster, 2).await?];
        if known.iter().any(|one| one.len() != 4) {
            return Err(format!("not all nodes: {known:?}"));
        }
        if known.iter().all(|one| *one == known[0]) { Ok(()) } else { Err(format!("{known:?}")) }
    })
    .await;
}
