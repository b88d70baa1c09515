//! Routing as clients and operators see it: decisions are kept with what came of them, a mostly cached prompt stays where it is decoded, a
//! miss of the objective is refused in time.
#![allow(clippy::unwrap_used)]

use millrace_e2e::cluster::{Cluster, Plan};
use millrace_e2e::{WAIT_MAX, eventually, http};
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";
const TTFT: &str = "x-millrace-ttft-ms";
/// What the engine takes for a token: prompts of some hundred tokens take seconds.
const TOKEN_US: u64 = 5_000;

fn prompt(n: usize, tokens: usize) -> Vec<usize> {
    (0..tokens).map(|i| 3 + (i * (7 + n % 13) + n * 31) % 290).collect()
}

fn body(cluster: &Cluster, prompt: &[usize], max_tokens: u32) -> String {
    json!({"model": cluster.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true}).to_string()
}

/// Runs `millctl` and reads its JSON.
async fn ctl(cluster: &Cluster, args: &[&str]) -> Value {
    let ended = cluster.millctl(&[args, &["-o", "json"]].concat()).await;
    assert_eq!(ended.code, Some(0), "{args:?}: {ended:?}");
    serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}: {ended:?}"))
}

/// Answers a prompt, then looks at its decision: what was predicted, believed, found.
async fn decisions_are_kept(cluster: &Cluster) {
    let tokens = prompt(1, 200);
    let answer = http::send(cluster.http, "POST", COMPLETIONS, body(cluster, &tokens, 4)).await.unwrap().ok();
    let id = answer["id"].as_str().unwrap().to_owned();
    let listed = ctl(cluster, &["route", "decisions", "--request", &id]).await;
    let [decision] = listed["decisions"].as_array().unwrap().as_slice() else { panic!("{listed}") };
    assert_eq!((&decision["prompt_tokens"], &decision["observed"]["outcome"]), (&json!(200), &json!("done")), "{decision}");
    assert_eq!((&decision["observed"]["cached_tokens"], &decision["observed"]["tokens"]), (&json!(0), &json!(4)), "{decision}");
    assert!(decision["observed"]["ttft_us"].as_u64() > Some(200 * TOKEN_US / 2), "{decision}");
    assert!(!decision["reason"].as_str().unwrap().is_empty() && decision["cost"]["prefill_us"].as_u64() > Some(0), "{decision}");
    assert!(decision["alternatives"].as_array().unwrap().iter().all(|other| other["cost"]["total_us"].is_u64()), "{decision}");
    let table = cluster.millctl(&["route", "decisions"]).await;
    assert!(table.stdout.contains("done"), "{table:?}");
}

/// The same prompt again: a decode node has it now and does the little that is left by itself.
async fn what_is_cached_stays_where_it_is_decoded(cluster: &Cluster) {
    let list = prompt(1, 200).iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let explained = eventually("the index shows the blocks", WAIT_MAX, async || {
        let explained = ctl(cluster, &["route", "explain", "--tokens", &list]).await;
        let cached = explained["prefill_cached_blocks"].as_u64() >= Some(12);
        if cached && explained["decode"].is_null() { Ok(explained) } else { Err(explained.to_string()) }
    });
    let explained = explained.await;
    assert!(explained["prefill"].as_str().unwrap().starts_with("decode-"), "{explained}");
    assert!(explained["reason"].as_str().unwrap().contains("computed where it is decoded"), "{explained}");
    let again = http::send(cluster.http, "POST", COMPLETIONS, body(cluster, &prompt(1, 200), 4)).await.unwrap().ok();
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() >= Some(192), "{again}");
    let metrics = http::send(cluster.http, "GET", "/metrics", "").await.unwrap().text;
    let count = |name: &str| {
        let of = |line: &&str| line.starts_with(name) && line.contains("prefill");
        metrics.lines().find(of).and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).unwrap_or_default()
    };
    let (belief, found) = (count("millrace_route_belief_blocks_total"), count("millrace_route_found_blocks_total"));
    assert!(belief >= 12.0 && found >= 12.0, "{belief} {found}: {metrics}");
}

/// Every node has seconds of prompts before it: who cannot wait is told so at once, and when to come back.
async fn a_miss_is_refused_at_once(cluster: &Cluster) {
    let busy: Vec<_> =
        (10..18).map(|n| tokio::spawn(http::send(cluster.http, "POST", COMPLETIONS, body(cluster, &prompt(n, 400), 2)))).collect();
    let refused = eventually("a request is refused", WAIT_MAX, async || {
        let reply = http::post_with(cluster.http, COMPLETIONS, body(cluster, &prompt(30, 40), 2), (TTFT, "700")).await.unwrap();
        if reply.status == 429 { Ok(reply) } else { Err(format!("{}: {}", reply.status, reply.text)) }
    });
    let refused = refused.await;
    let error = refused.error().unwrap();
    assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("objective")));
    let seconds: u64 = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..60).contains(&seconds), "{seconds}");
    let patient = http::post_with(cluster.http, COMPLETIONS, body(cluster, &prompt(31, 40), 2), (TTFT, "600000")).await.unwrap();
    assert_eq!(patient.status, 200, "{}", patient.text);
    for request in busy {
        assert_eq!(request.await.unwrap().unwrap().status, 200, "what was accepted is answered");
    }
    let wrong = http::post_with(cluster.http, COMPLETIONS, body(cluster, &prompt(32, 40), 2), (TTFT, "soon")).await.unwrap();
    assert_eq!((wrong.status, wrong.error().unwrap()["param"].as_str()), (400, Some(TTFT)));
}

#[tokio::test(flavor = "multi_thread")]
async fn decisions_are_explained_kept_and_foretell_misses() {
    let plan = Plan { coordinators: 1, prefill: 1, decode: 1, ..Plan::checksum(TOKEN_US) };
    let cluster = Cluster::start(plan).await;
    decisions_are_kept(&cluster).await;
    what_is_cached_stays_where_it_is_decoded(&cluster).await;
    a_miss_is_refused_at_once(&cluster).await;
    cluster.rests().await;
}
