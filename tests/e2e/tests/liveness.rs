//! Who is alive: a node that is gone is not chosen any more after a second; a node that is there keeps its place whatever happens to the
//! coordinators and to the clocks; a former incarnation is not listened to.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use millrace_checkpoint::Checkpoint;
use millrace_core::ids::{Epoch, NodeId};
use millrace_core::layout::KvDtype;
use millrace_core::message::{Delta, Hello, Join, Load, Message, ModelIdentity, Role};
use millrace_e2e::cluster::{Cluster, Plan};
use millrace_e2e::stream::{End, complete};
use millrace_e2e::{WAIT_MAX, eventually, http, process, tiny_model};
use millrace_node::endpoint::{Endpoint, EndpointConfig, Target};
use millrace_node::link::{Link, LinkReceiver};
use millrace_node::pki::{Authority, Identity};
use serde_json::{Value, json};

/// A node that is not heard from for so long gets no new work.
const FRESH: Duration = Duration::from_secs(1);
/// For what was on its way, and for a machine that is busy.
const SLACK: Duration = Duration::from_millis(200);
const CLIENTS: usize = 4;

/// Where a request ran.
#[derive(Debug)]
struct Ran {
    begun: Instant,
    attempts: u64,
    nodes: [Option<String>; 2],
}

/// Sends requests, each unlike all others, until told to stop.
struct Clients {
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<Vec<Ran>>>,
}

impl Clients {
    fn start(cluster: &Cluster) -> Self {
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = |_| tokio::spawn(ask(cluster.http, cluster.model.clone(), stop.clone(), sent.clone()));
        let tasks = (0..CLIENTS).map(client).collect();
        Self { stop, tasks }
    }

    async fn stop(self) -> Vec<Ran> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for task in self.tasks {
            all.extend(task.await.unwrap());
        }
        all
    }
}

async fn ask(at: SocketAddr, model: String, stop: Arc<AtomicBool>, sent: Arc<AtomicUsize>) -> Vec<Ran> {
    let mut all = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let number = sent.fetch_add(1, Ordering::Relaxed);
        let prompt: Vec<usize> = (0..48).map(|i| 3 + (i * 7 + number * 13 + number / 290) % 290).collect();
        let body = json!({
            "model": model, "prompt": prompt, "max_tokens": 6, "ignore_eos": true, "temperature": 0, "millrace_timings": true,
            "cache_salt": number.to_string(),
        });
        let begun = Instant::now();
        let answer = http::send(at, "POST", "/v1/completions", body.to_string()).await.unwrap().ok();
        let name = |value: &Value| value.as_str().map(str::to_owned);
        let timings = &answer["millrace"];
        let nodes = [name(&timings["prefill"]["node"]), name(&timings["decode_node"])];
        all.push(Ran { begun, attempts: timings["attempts"].as_u64().unwrap(), nodes });
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_gone_is_not_chosen_later_than_a_second() {
    let cluster = Cluster::start(Plan { restart: false, ..Plan::checksum(100) }).await;
    // A node that stood still is predicted to be slow for a while, so the others are the ones to kill.
    for (signal, name) in [("STOP", "decode-1"), ("STOP", "prefill-1"), ("KILL", "decode-2"), ("KILL", "prefill-2")] {
        let pid = cluster.status().await.unwrap().pid(name).unwrap();
        let clients = Clients::start(&cluster);
        tokio::time::sleep(FRESH).await;
        let gone = Instant::now();
        assert!(process::signal(signal, pid));
        tokio::time::sleep(FRESH + SLACK).await;
        // The first clients may still wait for answers that were on their way.
        let later = Clients::start(&cluster);
        tokio::time::sleep(FRESH * 2).await;
        let (later, all) = (later.stop().await, clients.stop().await);
        let chosen = |ran: &&Ran| ran.nodes.iter().flatten().any(|node| node == name);
        assert!(all.iter().filter(|ran| ran.begun < gone).any(|ran| chosen(&ran)), "{name} had nothing to do before {signal}");
        let wrong: Vec<&Ran> = later.iter().filter(|ran| chosen(ran) || ran.attempts > 1).collect();
        assert!(wrong.is_empty(), "after {signal} of {name}: {wrong:?}");
        println!("{signal} of {name}: {} requests before, {} later, of which none went there", all.len(), later.len());
        assert!(later.len() > 5);
        if signal == "STOP" {
            assert!(process::signal("CONT", pid));
            cluster.rests().await;
        }
    }
}

/// The nodes' incarnations.
async fn epochs(cluster: &Cluster) -> BTreeMap<String, u64> {
    cluster.rests().await.nodes.into_iter().map(|node| (node.name, node.epoch)).collect()
}

async fn answers(cluster: &Cluster, salt: &str) {
    let body = json!({
        "model": cluster.model, "prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": true, "stream": true, "cache_salt": salt,
    });
    let answer = complete(cluster.http, "/v1/completions", &body).await;
    assert_eq!(answer.end, End::Whole, "{salt}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_lease_ends_because_all_coordinators_do_again_and_again() {
    let cluster = Cluster::start(Plan::checksum(100)).await;
    let before = epochs(&cluster).await;
    for round in 0..3 {
        let status = cluster.status().await.unwrap();
        for member in &status.members {
            assert!(process::signal("KILL", member.pid.unwrap()));
        }
        let dead = status.members.iter().filter_map(|member| member.pid).collect::<Vec<_>>();
        eventually("other processes have a leader", WAIT_MAX, async || {
            let status = cluster.status().await?;
            let fresh = status.members.iter().all(|member| member.pid.is_some_and(|pid| !dead.contains(&pid)));
            if fresh && status.quorum { Ok(()) } else { Err(format!("{status:?}")) }
        })
        .await;
        println!("round {round}: all coordinators are new");
    }
    assert_eq!(epochs(&cluster).await, before, "no node had to join again");
    answers(&cluster, "after").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_answers_go_on_and_nobody_loses_its_place() {
    let cluster = Cluster::start(Plan::checksum(8000)).await;
    let before = epochs(&cluster).await;
    let body = json!({
        "model": cluster.model, "prompt": [5, 6, 7], "max_tokens": 480, "ignore_eos": true, "stream": true, "temperature": 0,
    });
    let (at, model) = (cluster.http, cluster.model.clone());
    let running = tokio::spawn(async move { complete(at, "/v1/completions", &body).await });
    let status = cluster.status().await.unwrap();
    let stopped: Vec<u32> = status.members.iter().take(2).map(|member| member.pid.unwrap()).collect();
    assert!(stopped.iter().all(|pid| process::signal("STOP", *pid)));
    let body = json!({"model": model, "prompt": [8, 9], "max_tokens": 20, "ignore_eos": true, "stream": true});
    for n in 0..6 {
        let answer = complete(at, "/v1/completions", &body).await;
        assert_eq!(answer.end, End::Whole, "request {n} without a quorum");
    }
    assert_eq!(running.await.unwrap().end, End::Whole, "the one that ran");
    assert!(stopped.iter().all(|pid| process::signal("CONT", *pid)));
    assert_eq!(epochs(&cluster).await, before);
}

/// Makes every process's wall clock jump by two hours each second, and nothing else.
const JUMPS: &str = r"
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *out) {
    struct timespec steady;
    long failed = syscall(SYS_clock_gettime, clock, out);
    if (failed || clock != CLOCK_REALTIME) return failed;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &steady);
    out->tv_sec += steady.tv_sec % 2 ? 3600 : -3600;
    return 0;
}
";

fn jumping_clock(dir: &Path) -> String {
    let (source, library) = (dir.join("jumps.c"), dir.join("jumps.so"));
    std::fs::write(&source, JUMPS).unwrap();
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
    assert!(built.is_ok_and(|status| status.success()), "cc, which the build needs too, makes the library");
    library.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_jump_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let env = vec![("LD_PRELOAD".to_owned(), jumping_clock(dir.path()))];
    let cluster = Cluster::start(Plan { env, ..Plan::checksum(100) }).await;
    let (before, leader) = (epochs(&cluster).await, cluster.status().await.unwrap().leader);
    let (mut created, began) = (Vec::new(), Instant::now());
    // Longer than a lease.
    while began.elapsed() < Duration::from_secs(7) {
        let body = json!({"model": cluster.model, "prompt": [5, 6, 7], "max_tokens": 20, "ignore_eos": true});
        let answer = http::send(cluster.http, "POST", "/v1/completions", body.to_string()).await.unwrap().ok();
        created.push(answer["created"].as_i64().unwrap());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let jumps = created.windows(2).filter(|pair| (pair[1] - pair[0]).abs() > 3600).count();
    assert!(jumps >= 4, "the clocks did jump: {created:?}");
    assert_eq!((epochs(&cluster).await, cluster.status().await.unwrap().leader), (before, leader));
}

/// A process that calls itself a decode node.
struct Fake {
    endpoint: Endpoint,
    coordinator: SocketAddr,
    model: ModelIdentity,
}

const NAME: &str = "decode-9";

impl Fake {
    fn new(cluster: &Cluster) -> Self {
        let dir = cluster.scratch().join(NAME);
        Authority::load(&cluster.dir().join("certs")).unwrap().issue(Role::Decode, NAME, &dir).unwrap();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let endpoint = Endpoint::bind(any, Identity::load(&dir).unwrap(), EndpointConfig::default()).unwrap();
        let coordinator = cluster.file()["coordinators"][0]["quic"].as_str().unwrap().parse().unwrap();
        let checkpoint = Checkpoint::open(&tiny_model()).unwrap();
        let model = checkpoint.identity(&checkpoint.default_name(), KvDtype::F32, 16);
        Self { endpoint, coordinator, model }
    }

    async fn dial(&self, instance: u128, (node, epoch): (NodeId, Epoch)) -> (Link, LinkReceiver) {
        let target = Target { addr: self.coordinator, role: Role::Coordinator, name: None };
        let (cluster, model) = (self.endpoint.me().cluster.clone(), Some(self.model.clone()));
        Link::dial(&self.endpoint, &target, &Hello { cluster, name: NAME.into(), instance, node, epoch, model }).await.unwrap()
    }

    async fn join(&self, instance: u128) -> ((Link, LinkReceiver), (NodeId, Epoch)) {
        let (link, mut receiver) = self.dial(instance, (NodeId(0), Epoch(0))).await;
        let (address, model) = (self.endpoint.local_addr().unwrap().to_string(), self.model.clone());
        let join = Join { name: NAME.into(), role: Role::Decode, address, instance, pid: 1, model, slots: 8 };
        let who = eventually("it joins", WAIT_MAX, async || {
            link.send(&Message::Join(join.clone())).unwrap();
            loop {
                match receiver.recv().await {
                    Some(Message::Joined { node, epoch }) => return Ok((node, epoch)),
                    Some(Message::JoinRefused { reason, retry: true }) => return Err(reason),
                    Some(_) => {}
                    None => panic!("the link ended: {:?}", link.is_closed()),
                }
            }
        })
        .await;
        ((link, receiver), who)
    }
}

/// What a delta of this incarnation is answered with.
async fn delta(link: &Link, receiver: &mut LinkReceiver, (node, epoch): (NodeId, Epoch), seq: u64) -> Message {
    link.send(&Message::Delta(Delta { node, epoch, base_seq: seq - 1, seq, ops: vec![] })).unwrap();
    loop {
        match receiver.recv().await.expect("the link is up") {
            // Said to every node, whatever it asks.
            Message::Ping | Message::Replicas(_) => {}
            other => return other,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_former_incarnation_at_the_same_address_is_not_listened_to() {
    let cluster = Cluster::start(Plan::checksum(100)).await;
    let fake = Fake::new(&cluster);
    let ((link, mut receiver), first) = fake.join(1).await;
    assert_eq!(delta(&link, &mut receiver, first, 1).await, Message::DeltaApplied { epoch: first.1, seq: 1 });
    link.close("the process dies");
    let ((link, mut receiver), second) = fake.join(2).await;
    assert_eq!(first.0, second.0, "one name, one number");
    assert!(second.1 > first.1, "and a new epoch");
    assert_eq!(delta(&link, &mut receiver, second, 1).await, Message::DeltaApplied { epoch: second.1, seq: 1 });
    let (old, mut old_receiver) = fake.dial(1, first).await;
    let refused = delta(&old, &mut old_receiver, first, 2).await;
    assert!(matches!(&refused, Message::JoinRefused { reason, retry: true } if reason.contains("not current")), "{refused:?}");
    let load = Load { free_blocks: 8, total_blocks: 8, ..Load::default() };
    let heartbeat = |(node, epoch)| Message::Heartbeat { node, epoch, load };
    drop((link, receiver));
    eventually("the new incarnation is gone", WAIT_MAX, async || {
        old.send(&heartbeat(first)).map_err(|e| e.to_string())?;
        let status = cluster.status().await?;
        let node = status.nodes.iter().find(|node| node.name == NAME).ok_or("no such node")?;
        assert_eq!(node.epoch, second.1.0, "the old one's heartbeats bring nothing back");
        if node.usable { Err("it still counts as usable".into()) } else { Ok(()) }
    })
    .await;
}
