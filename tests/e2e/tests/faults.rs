//! Nothing lost: each of the seven processes is killed without warning, in the middle of streams and at rest. Every stream goes on with
//! the same tokens to its end; no error, never a wrong token, never a hang. Afterwards the cluster is whole again, serves, and no
//! block is in use.
//!
//! The engine computes checksums of the KV bytes that it reads, so one lost, stale or misplaced block would change every later
//! token. The last test does the same with a model and sampling.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;

use millrace_e2e::cluster::{Cluster, Plan, Status};
use millrace_e2e::stream::{Answer, End, Events};
use millrace_e2e::{WAIT_MAX, eventually, process, tiny_model};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// Streams that run when something is killed.
const STREAMS: usize = 8;
/// Prompts that are being computed at that moment.
const LATE: usize = 4;
/// Tokens that each running stream has delivered by then.
const BEFORE: usize = 12;
const TOKENS: usize = 160;
/// Engine time of a token.
const TOKEN_US: u64 = 2000;

/// What every round asks, and the answers when nobody disturbs.
struct Asked {
    bodies: Vec<Value>,
    answers: Vec<Vec<u32>>,
}

/// How the streams of a round ended.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    went_on: usize,
    typed_errors: usize,
}

impl Asked {
    /// Some greedy, some sampled with a seed; prompts share beginnings.
    async fn undisturbed(cluster: &Cluster) -> Self {
        let body = |n: usize| {
            let (length, max) = if n < STREAMS { (20 + 9 * n, TOKENS) } else { (300 + n, 30) };
            let prompt: Vec<usize> = (0..length).map(|i| 3 + (i * 7 + n / 2) % 290).collect();
            let mut body = json!({
                "model": cluster.model, "prompt": prompt, "max_tokens": max, "ignore_eos": true, "return_token_ids": true, "stream": true,
            });
            match n % 2 {
                0 => body["temperature"] = json!(0),
                _ => (body["temperature"], body["seed"]) = (json!(1.0), json!(n)),
            }
            body
        };
        let bodies: Vec<Value> = (0..STREAMS + LATE).map(body).collect();
        let mut asked = Self { bodies, answers: Vec::new() };
        let running: Vec<_> =
            (0..STREAMS + LATE).map(|n| asked.start(cluster, n, "undisturbed", 0, Arc::new(Semaphore::new(0)))).collect();
        for (n, running) in running.into_iter().enumerate() {
            let answer = running.await.unwrap();
            assert_eq!(answer.end, End::Whole, "undisturbed {n}");
            asked.answers.push(answer.ids);
        }
        asked
    }

    /// Streams answer `n`. Says so on `ready` when `before` tokens are there; 0 means as soon as it is accepted. The salt keeps rounds
    /// from finding each other's blocks.
    fn start(&self, cluster: &Cluster, n: usize, salt: &str, before: usize, ready: Arc<Semaphore>) -> JoinHandle<Answer> {
        let (at, mut body) = (cluster.http, self.bodies[n].clone());
        body["cache_salt"] = json!(salt);
        tokio::spawn(async move {
            let begun = begin(at, &body, before).await;
            ready.add_permits(1);
            match begun {
                Ok((events, answer)) => events.collect(answer).await,
                Err(reason) => Answer { end: End::Broken(reason), ..Answer::default() },
            }
        })
    }

    /// Runs everything, does `harm` in the middle, and holds the answers against the undisturbed ones.
    async fn disturbed(&self, cluster: &Cluster, what: &str, harm: impl AsyncFnOnce()) -> Count {
        let ready = Arc::new(Semaphore::new(0));
        let mut running: Vec<_> = (0..STREAMS).map(|n| self.start(cluster, n, what, BEFORE, ready.clone())).collect();
        drop(ready.acquire_many(STREAMS as u32).await);
        ready.forget_permits(STREAMS);
        running.extend((STREAMS..STREAMS + LATE).map(|n| self.start(cluster, n, what, 0, ready.clone())));
        drop(ready.acquire_many(LATE as u32).await);
        harm().await;
        let mut count = Count::default();
        for (n, running) in running.into_iter().enumerate() {
            let answer = tokio::time::timeout(WAIT_MAX, running).await;
            let answer = answer.unwrap_or_else(|_| panic!("{what}: stream {n} hangs")).unwrap();
            let right = &self.answers[n];
            assert!(right.starts_with(&answer.ids), "{what}: stream {n} has wrong tokens: {:?} instead of {right:?}", answer.ids);
            match answer.end {
                End::Whole => {
                    assert_eq!(&answer.ids, right, "{what}: stream {n} claims to be whole");
                    count.went_on += 1;
                }
                End::Error(error) => {
                    println!("{what}: stream {n} ends after {} tokens with {error}", answer.ids.len());
                    count.typed_errors += 1;
                }
                other => panic!("{what}: stream {n} after {} tokens: {other:?}", answer.ids.len()),
            }
        }
        println!("{what}: {count:?} of {}", STREAMS + LATE);
        count
    }

    /// Waits until an answer comes through, and it must be right.
    async fn serves(&self, cluster: &Cluster, what: &str) {
        eventually("it serves again", WAIT_MAX, async || {
            let answer = self.start(cluster, 0, what, 0, Arc::new(Semaphore::new(0))).await.unwrap();
            assert!(self.answers[0].starts_with(&answer.ids), "{what}: wrong tokens: {:?}", answer.ids);
            if answer.end == End::Whole { Ok(()) } else { Err(format!("{:?}", answer.end)) }
        })
        .await;
    }
}

/// The first `tokens` tokens of a stream.
async fn begin(at: SocketAddr, body: &Value, tokens: usize) -> Result<(Events, Answer), String> {
    let mut answer = Answer::default();
    let mut events = Events::open(at, "/v1/completions", body).await?;
    while answer.ids.len() < tokens {
        match events.next().await? {
            Some(event) => answer.add(event),
            None => return Err("the stream ended before anything was killed".into()),
        }
    }
    Ok((events, answer))
}

/// Who is killed: nodes by name, replicas by what they are when it happens.
fn victim(status: &Status, who: &str) -> (String, u32) {
    let replica = |leads: bool, nth: usize| {
        let fits = |member: &&millrace_e2e::cluster::Member| (Some(&member.name) == status.leader.as_ref()) == leads;
        let member = status.members.iter().filter(fits).nth(nth).unwrap_or_else(|| panic!("no {who}: {status:?}"));
        (member.name.clone(), member.pid.unwrap())
    };
    match who {
        "leader" => replica(true, 0),
        "first follower" => replica(false, 0),
        "second follower" => replica(false, 1),
        name => {
            let node = status.nodes.iter().find(|node| node.name == name).unwrap_or_else(|| panic!("no {name}: {status:?}"));
            (node.name.clone(), node.pid)
        }
    }
}

const VICTIMS: [&str; 7] = ["prefill-1", "prefill-2", "decode-1", "decode-2", "leader", "first follower", "second follower"];

/// Kills, and looks that it was killed.
async fn kill(pid: u32) {
    assert!(process::signal("KILL", pid), "no process {pid}");
    eventually("the process is dead", WAIT_MAX, async || if process::lives(pid) { Err("it lives".into()) } else { Ok(()) }).await;
}

/// Waits until another process has the name, and all rest. A node that came back is another incarnation.
async fn back(cluster: &Cluster, before: &Status, name: &str, killed: u32) {
    eventually("another process has its place", WAIT_MAX, async || match cluster.status().await?.pid(name) {
        Some(pid) if pid != killed => Ok(()),
        _ => Err(format!("{name} is not back")),
    })
    .await;
    let after = cluster.rests().await;
    let epoch = |status: &Status| status.nodes.iter().find(|node| node.name == name).map(|node| node.epoch);
    if let (Some(old), Some(new)) = (epoch(before), epoch(&after)) {
        assert!(new > old, "{name} came back with epoch {new} after {old}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_killed_in_mid_stream_no_token_is_wrong_and_the_cluster_is_whole_again() {
    let cluster = Cluster::start(Plan::checksum(TOKEN_US)).await;
    let asked = Asked::undisturbed(&cluster).await;
    let mut total = Count::default();
    for who in VICTIMS {
        let before = cluster.rests().await;
        let (name, pid) = victim(&before, who);
        let what = format!("kill -9 of {who} ({name}) in mid-stream");
        let count = asked.disturbed(&cluster, &what, async || kill(pid).await).await;
        total.went_on += count.went_on;
        total.typed_errors += count.typed_errors;
        asked.serves(&cluster, &what).await;
        back(&cluster, &before, &name, pid).await;
    }
    assert_eq!(total.typed_errors, 0, "kill -9 of each of {} processes in mid-stream: {total:?}", VICTIMS.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_killed_at_rest_the_cluster_serves_and_is_whole_again() {
    let cluster = Cluster::start(Plan::checksum(100)).await;
    let asked = Asked::undisturbed(&cluster).await;
    for who in VICTIMS {
        let before = cluster.rests().await;
        let (name, pid) = victim(&before, who);
        kill(pid).await;
        asked.serves(&cluster, &format!("kill -9 of {who} ({name}) at rest")).await;
        back(&cluster, &before, &name, pid).await;
    }
    let quiet = asked.disturbed(&cluster, "after all that", async || {}).await;
    assert_eq!((quiet.went_on, quiet.typed_errors), (STREAMS + LATE, 0));
    cluster.rests().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_node_that_stands_still_and_goes_on_later_does_no_harm() {
    let cluster = Cluster::start(Plan::checksum(TOKEN_US)).await;
    let asked = Asked::undisturbed(&cluster).await;
    cluster.rests().await;
    let pid = cluster.status().await.unwrap().pid("decode-1").unwrap();
    let what = "SIGSTOP of decode-1 in mid-stream";
    asked.disturbed(&cluster, what, async || assert!(process::signal("STOP", pid))).await;
    asked.serves(&cluster, what).await;
    assert!(process::signal("CONT", pid), "nobody may kill what only stands still");
    cluster.rests().await;
    let quiet = asked.disturbed(&cluster, "after it went on", async || {}).await;
    assert_eq!((quiet.went_on, quiet.typed_errors), (STREAMS + LATE, 0));
    cluster.rests().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sampled_answers_of_a_model_keep_their_tokens_when_their_node_is_killed() {
    let cluster = Cluster::start(Plan::of(tiny_model())).await;
    let asked = Asked::undisturbed(&cluster).await;
    for who in ["decode-1", "decode-2", "prefill-1"] {
        let before = cluster.rests().await;
        let (name, pid) = victim(&before, who);
        asked.disturbed(&cluster, &format!("kill -9 of {who} under a model"), async || kill(pid).await).await;
        back(&cluster, &before, &name, pid).await;
    }
}
