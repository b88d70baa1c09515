//! A gateway is lost and nobody notices: whatever ends it, in the middle of streams and of answers of one piece, a client gets one
//! unbroken answer with the tokens, the text and the usage of an undisturbed one, and no block stays in use.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;

use millrace_e2e::cluster::{Cluster, Member, Plan, Status};
use millrace_e2e::stream::{Answer, End, Event, Events};
use millrace_e2e::{WAIT_MAX, eventually, http, process, real_model};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

const STREAMS: usize = 6;
/// Tokens that each has delivered when its gateway is lost.
const BEFORE: usize = 10;
const TOKENS: usize = 120;
/// Engine time of a token: what is left of an answer when its gateway is looked for takes most of a second.
const TOKEN_US: u64 = 8000;

/// Requests and their undisturbed answers.
struct Asked {
    at: SocketAddr,
    path: &'static str,
    bodies: Vec<Value>,
    answers: Vec<Answer>,
}

impl Asked {
    async fn undisturbed(cluster: &Cluster, path: &'static str, bodies: Vec<Value>) -> Self {
        let mut asked = Self { at: cluster.http, path, bodies, answers: Vec::new() };
        let running: Vec<_> = (0..asked.bodies.len()).map(|n| asked.stream(n, "undisturbed", 0).1).collect();
        for (n, running) in running.into_iter().enumerate() {
            let answer = running.await.unwrap();
            assert_eq!(answer.end, End::Whole, "undisturbed {n}");
            asked.answers.push(answer);
        }
        asked
    }

    /// Streams answer `n`; the channel says when `before` chunks with tokens are there. The salt keeps rounds from finding each
    /// other's blocks.
    fn stream(&self, n: usize, salt: &str, before: usize) -> (tokio::sync::oneshot::Receiver<()>, JoinHandle<Answer>) {
        let (at, path, mut body) = (self.at, self.path, self.bodies[n].clone());
        body["cache_salt"] = json!(salt);
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(async move {
            let mut answer = Answer::default();
            let mut events = match Events::open(at, path, &body).await {
                Ok(events) => events,
                Err(reason) => return Answer { end: End::Broken(reason), ..answer },
            };
            while answer.chunks.len() < before {
                match events.next().await {
                    Ok(Some(event)) => answer.add(event),
                    other => return Answer { end: End::Broken(format!("{other:?} before anything was lost")), ..answer },
                }
            }
            let _ = ready.send(());
            events.collect(answer).await
        });
        (is_ready, task)
    }

    /// Streams everything, loses the gateway that carries most of it by `harm`, and holds all answers against the undisturbed ones.
    async fn disturbed(&self, cluster: &Cluster, what: &str, harm: impl AsyncFnOnce(&Member)) -> Member {
        let status = cluster.status().await.unwrap();
        let (ready, running): (Vec<_>, Vec<_>) = (0..self.bodies.len()).map(|n| self.stream(n, what, BEFORE)).unzip();
        for ready in ready {
            ready.await.unwrap_or_else(|_| panic!("{what}: a stream ended early"));
        }
        let (victim, carried) = busiest(&status).await;
        assert!(carried > 0, "{what}: {} carries nothing", victim.name);
        harm(&victim).await;
        for (n, running) in running.into_iter().enumerate() {
            let answer = tokio::time::timeout(WAIT_MAX, running).await.unwrap_or_else(|_| panic!("{what}: {n} hangs")).unwrap();
            same(&answer, &self.answers[n]).unwrap_or_else(|why| panic!("{what}: stream {n}: {why}"));
        }
        println!("{what}: {} lost with {carried} of {} streams", victim.name, self.bodies.len());
        victim
    }
}

/// Whether a client can tell the two answers apart, but for time, cached tokens and the name.
fn same(got: &Answer, want: &Answer) -> Result<(), String> {
    let count = |answer: &Answer| (answer.usage["prompt_tokens"].clone(), answer.usage["completion_tokens"].clone());
    if (&got.ids, &got.text, &got.finish, count(got)) != (&want.ids, &want.text, &want.finish, count(want)) || got.end != want.end {
        return Err(format!("{got:?}\ninstead of\n{want:?}"));
    }
    let names = |key: &str| got.chunks.iter().map(|chunk| chunk[key].clone()).collect::<Vec<_>>();
    for key in ["id", "created", "object"] {
        let values = names(key);
        if values.iter().any(|value| *value != values[0]) {
            return Err(format!("{key} changes in the middle: {values:?}"));
        }
    }
    if got.chunks.len() != want.chunks.len() {
        return Err(format!("{} chunks instead of {}", got.chunks.len(), want.chunks.len()));
    }
    Ok(())
}

/// The replica whose gateway carries most requests, and how many.
async fn busiest(status: &Status) -> (Member, u64) {
    let mut found: Option<(Member, u64)> = None;
    for member in status.members.iter().filter(|member| member.reachable) {
        let text = http::send(member.http.unwrap(), "GET", "/metrics", "").await.unwrap().text;
        let line = text.lines().find(|line| line.starts_with("millrace_requests_running")).unwrap_or_else(|| panic!("{text}"));
        let running = line.split(' ').next_back().unwrap().parse::<f64>().unwrap() as u64;
        if found.as_ref().is_none_or(|(_, most)| running > *most) {
            found = Some((member.clone(), running));
        }
    }
    found.unwrap()
}

/// Greedy ones and sampled ones of token ids, with usage; the last asks for two answers at once.
fn completions(cluster: &Cluster) -> Vec<Value> {
    let prompt = |n: usize| (0..24 + 9 * n).map(|i| 3 + (i * 7 + n) % 290).collect::<Vec<_>>();
    let body = |n: usize| {
        let mut body = json!({
            "model": cluster.model, "prompt": prompt(n), "max_tokens": TOKENS, "ignore_eos": true, "return_token_ids": true,
            "stream": true, "stream_options": {"include_usage": true},
        });
        match n % 2 {
            0 => body["temperature"] = json!(0),
            _ => (body["temperature"], body["seed"]) = (json!(1.0), json!(n)),
        }
        body
    };
    (0..STREAMS).map(body).collect()
}

fn pid(member: &Member) -> u32 {
    member.pid.unwrap()
}

/// Waits until another process has the replica's place, and all rest.
async fn back(cluster: &Cluster, lost: &Member) {
    eventually("the gateway is back", WAIT_MAX, async || match cluster.status().await?.pid(&lost.name) {
        Some(now) if Some(now) != lost.pid => Ok(()),
        _ => Err(format!("{} is not back", lost.name)),
    })
    .await;
    cluster.rests().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_a_gateway_that_is_killed_stopped_or_ended_go_on_and_clients_see_no_seam() {
    let cluster = Cluster::start(Plan::checksum(TOKEN_US)).await;
    let asked = Asked::undisturbed(&cluster, "/v1/completions", completions(&cluster)).await;
    for round in 0..2 {
        cluster.rests().await;
        let what = format!("kill -9 of a gateway, {round}");
        let victim = asked.disturbed(&cluster, &what, async |victim| assert!(process::signal("KILL", pid(victim)))).await;
        back(&cluster, &victim).await;
    }
    let what = "SIGTERM of a gateway";
    let victim = asked.disturbed(&cluster, what, async |victim| assert!(process::signal("TERM", pid(victim)))).await;
    back(&cluster, &victim).await;
    let what = "SIGSTOP of a gateway";
    let victim = asked.disturbed(&cluster, what, async |victim| assert!(process::signal("STOP", pid(victim)))).await;
    assert!(process::signal("CONT", pid(&victim)), "nobody may kill what only stands still");
    cluster.rests().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_one_piece_are_asked_for_again_and_clients_that_leave_meanwhile_leave_nothing_behind() {
    let cluster = Cluster::start(Plan::checksum(TOKEN_US)).await;
    let asked = Asked::undisturbed(&cluster, "/v1/completions", completions(&cluster)).await;
    cluster.rests().await;
    let whole = |n: usize| {
        let (at, mut body) = (asked.at, asked.bodies[n].clone());
        body["stream"] = json!(false);
        body.as_object_mut().unwrap().remove("stream_options");
        body["cache_salt"] = json!("whole");
        tokio::spawn(async move { http::send(at, "POST", "/v1/completions", body.to_string()).await })
    };
    let running: Vec<_> = (0..STREAMS).map(whole).collect();
    let leaving: Vec<_> = (0..STREAMS).map(|n| asked.stream(n, "leaving", BEFORE)).collect();
    let mut left = Vec::new();
    for (ready, task) in leaving {
        ready.await.unwrap();
        left.push(task);
    }
    let (victim, carried) = busiest(&cluster.status().await.unwrap()).await;
    assert!(carried > 0);
    assert!(process::signal("KILL", pid(&victim)));
    left.iter().for_each(JoinHandle::abort);
    for (n, running) in running.into_iter().enumerate() {
        let answer = running.await.unwrap().unwrap().ok();
        assert_eq!(answer["choices"][0]["token_ids"], json!(asked.answers[n].ids), "{n}");
        assert_eq!(answer["usage"]["completion_tokens"], json!(TOKENS), "{n}");
    }
    back(&cluster, &victim).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_answers_in_one_stream_go_on_each_where_it_was() {
    let cluster = Cluster::start(Plan::checksum(TOKEN_US)).await;
    let prompts: Vec<Vec<usize>> = (0..3).map(|n| (0..40 + n).map(|i| 3 + (i * 5 + n) % 290).collect()).collect();
    let body = json!({
        "model": cluster.model, "prompt": prompts, "max_tokens": TOKENS, "ignore_eos": true, "return_token_ids": true,
        "stream": true, "stream_options": {"include_usage": true}, "temperature": 0,
    });
    let choices = async |kill: bool| {
        let mut events = Events::open(cluster.http, "/v1/completions", &body).await.unwrap();
        let (mut ids, mut finished, mut usage, mut chunks) = (vec![Vec::new(); 3], 0, Value::Null, 0);
        let mut victim = None;
        while let Some(event) = events.next().await.unwrap() {
            let Event::Chunk(chunk) = event else { break };
            assert!(chunk.get("error").is_none(), "{chunk}");
            for choice in chunk["choices"].as_array().unwrap() {
                let index = choice["index"].as_u64().unwrap() as usize;
                ids[index].extend(choice["token_ids"].as_array().into_iter().flatten().map(|id| id.as_u64().unwrap()));
                finished += usize::from(!choice["finish_reason"].is_null());
            }
            if !chunk["usage"].is_null() {
                usage = chunk["usage"].clone();
            }
            chunks += 1;
            if kill && chunks == 3 * BEFORE {
                let (member, carried) = busiest(&cluster.status().await.unwrap()).await;
                assert_eq!(carried, 3);
                assert!(process::signal("KILL", pid(&member)));
                victim = Some(member);
            }
        }
        ((ids, finished, usage["prompt_tokens"].clone(), usage["completion_tokens"].clone(), chunks), victim)
    };
    let (quiet, _) = choices(false).await;
    assert_eq!((quiet.1, &quiet.3), (3, &json!(3 * TOKENS)));
    cluster.rests().await;
    let (disturbed, victim) = choices(true).await;
    assert_eq!(disturbed, quiet);
    back(&cluster, &victim.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chats_of_a_model_go_on_with_their_text_and_their_stop_strings() {
    let cluster = Cluster::start(Plan::of(real_model())).await;
    let chat = |n: usize| {
        let question = ["Count from one to thirty in words.", "Name ten animals.", "Tell me about the sea."][n];
        let mut body = json!({
            "model": cluster.model, "messages": [{"role": "user", "content": question}], "max_tokens": 48, "stream": true,
            "stream_options": {"include_usage": true}, "return_token_ids": true, "ignore_eos": true,
        });
        match n {
            0 => (body["temperature"], body["stop"]) = (json!(0), json!(["twenty", "\n\n\n"])),
            n => (body["temperature"], body["seed"]) = (json!(0.8), json!(n)),
        }
        body
    };
    let asked = Asked::undisturbed(&cluster, "/v1/chat/completions", (0..3).map(chat).collect()).await;
    cluster.rests().await;
    let what = "kill -9 of a gateway under chats";
    let victim = asked.disturbed(&cluster, what, async |victim| assert!(process::signal("KILL", pid(victim)))).await;
    back(&cluster, &victim).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sampled_answers_without_a_seed_of_their_own_go_on_as_they_began() {
    let cluster = Cluster::start(Plan::of(real_model())).await;
    let body = json!({
        "model": cluster.model, "prompt": (0..70).map(|i| 3 + i * 3 % 290).collect::<Vec<_>>(), "max_tokens": 80, "ignore_eos": true,
        "return_token_ids": true, "stream": true, "stream_options": {"include_usage": true}, "temperature": 1.0,
    });
    let mut events = Events::open(cluster.http, "/v1/completions", &body).await.unwrap();
    let mut answer = Answer::default();
    while answer.ids.len() < BEFORE {
        answer.add(events.next().await.unwrap().unwrap());
    }
    let (victim, carried) = busiest(&cluster.status().await.unwrap()).await;
    assert_eq!(carried, 1);
    assert!(process::signal("KILL", pid(&victim)));
    let answer = events.collect(answer).await;
    assert_eq!((answer.end, answer.ids.len()), (End::Whole, 80));
    assert_eq!(answer.usage["completion_tokens"], json!(80));
    back(&cluster, &victim).await;
}
