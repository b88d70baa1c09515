//! What operators decide, seen from outside on a whole cluster: tenants share nothing and are held to their limits, settings reach every
//! gateway and outlive a restart, pins outlive pressure, eviction empties, verification finds nothing wrong.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;

use millrace_e2e::cluster::{Cluster, Plan};
use millrace_e2e::http::{self, Reply};
use millrace_e2e::process;
use millrace_e2e::stream::{Answer, End, Events};
use millrace_e2e::{WAIT_MAX, eventually};
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";
/// Blocks of each node's pool.
const POOL: u32 = 96;
/// Full blocks of [`prompt`], and its tokens.
const BLOCKS: u64 = 6;
const TOKENS: usize = 100;
/// Streams of a tenant that is deleted: together they take seconds.
const STREAMS: usize = 16;

/// Token ids that begin like no other prompt's.
fn prompt(n: usize, tokens: usize) -> Vec<usize> {
    (0..tokens).map(|i| 3 + (i * (7 + n % 13) + n * 31) % 290).collect()
}

fn list(prompt: &[usize]) -> String {
    prompt.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Runs `millctl` and reads its JSON.
async fn ctl(cluster: &Cluster, line: &str) -> Value {
    let args: Vec<&str> = line.split_whitespace().chain(["-o", "json"]).collect();
    let ended = cluster.millctl(&args).await;
    assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
    serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{line}: {e}: {ended:?}"))
}

async fn code(cluster: &Cluster, line: &str) -> Option<i32> {
    cluster.millctl(&line.split_whitespace().collect::<Vec<_>>()).await.code
}

async fn ask(cluster: &Cluster, at: SocketAddr, prompt: &[usize], key: Option<&str>) -> Reply {
    let body = json!({"model": cluster.model, "prompt": prompt, "max_tokens": 2, "temperature": 0});
    http::send_as(at, "POST", COMPLETIONS, body.to_string(), key).await.unwrap()
}

/// Asks, and how many tokens were cached.
async fn cached(cluster: &Cluster, prompt: &[usize], key: Option<&str>) -> u64 {
    let answer = ask(cluster, cluster.http, prompt, key).await.ok();
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

/// Leading blocks of a prompt on the node that has most of them.
async fn held(cluster: &Cluster, prompt: &[usize], tenant: &str) -> u64 {
    let found = ctl(cluster, &format!("cache lookup --tenant {tenant} --tokens {}", list(prompt))).await;
    let nodes = found["nodes"].as_array().unwrap();
    nodes.iter().filter_map(|node| node["cached_blocks"].as_u64()).max().unwrap_or(0)
}

async fn until_held(cluster: &Cluster, prompt: &[usize], tenant: &str, blocks: u64) {
    eventually("the index knows", WAIT_MAX, async || match held(cluster, prompt, tenant).await {
        held if held == blocks => Ok(()),
        held => Err(format!("{held} of {blocks} blocks")),
    })
    .await;
}

/// Where each replica's own gateway listens.
async fn gateways(cluster: &Cluster) -> Vec<SocketAddr> {
    cluster.rests().await.members.iter().filter_map(|member| member.http).collect()
}

async fn tenants_share_nothing(cluster: &Cluster) -> String {
    let made = ctl(cluster, "tenants create acme").await;
    let key = made["key"].as_str().unwrap().to_owned();
    assert_eq!(code(cluster, "tenants create acme").await, Some(6), "it exists");
    assert_eq!(code(cluster, "tenants show nobody").await, Some(5));
    let shared = prompt(0, TOKENS);
    assert_eq!(cached(cluster, &shared, None).await, 0);
    until_held(cluster, &shared, "default", BLOCKS).await;
    assert_eq!(held(cluster, &shared, "acme").await, 0, "the same prompt has other names");
    eventually("the key is known everywhere", WAIT_MAX, async || match ask(cluster, cluster.http, &[3], Some(&key)).await.status {
        200 => Ok(()),
        status => Err(status.to_string()),
    })
    .await;
    assert_eq!(cached(cluster, &shared, Some(&key)).await, 0, "nothing of another tenant's is reused");
    until_held(cluster, &shared, "acme", BLOCKS).await;
    assert_eq!(cached(cluster, &shared, Some(&key)).await, BLOCKS * 16);
    let refused = ask(cluster, cluster.http, &shared, Some("mlr-wrong")).await;
    assert_eq!((refused.status, &refused.error().unwrap()["code"]), (401, &json!("invalid_api_key")));
    key
}

async fn limits_are_held(cluster: &Cluster, key: &str) {
    let at = gateways(cluster).await[0];
    ctl(cluster, "tenants set acme --prompt-tokens-per-minute 150").await;
    let limit = |reply: &Reply, name: &str| reply.headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let first = eventually("the limit is known", WAIT_MAX, async || {
        let reply = ask(cluster, at, &prompt(1, TOKENS), Some(key)).await;
        if limit(&reply, "x-ratelimit-limit-tokens").is_some() { Ok(reply) } else { Err(reply.text) }
    })
    .await;
    assert_eq!(limit(&first, "x-ratelimit-limit-tokens").as_deref(), Some("150"));
    let second = ask(cluster, at, &prompt(1, TOKENS), Some(key)).await;
    assert_eq!((second.status, &second.error().unwrap()["code"]), (429, &json!("rate_limit_exceeded")));
    assert!(limit(&second, "retry-after").is_some_and(|s| (1..=60).contains(&s.parse::<u32>().unwrap())), "{second:?}");
    assert_eq!(ask(cluster, at, &prompt(1, TOKENS), None).await.status, 200, "others are not held to it");
    ctl(cluster, "tenants set acme --prompt-tokens-per-minute 0 --answer-tokens-max 1").await;
    eventually("the other limit is known", WAIT_MAX, async || {
        let reply = ask(cluster, at, &prompt(1, TOKENS), Some(key)).await;
        if (reply.status, &reply.error()?["param"]) == (400, &json!("max_tokens")) { Ok(()) } else { Err(reply.text) }
    })
    .await;
    ctl(cluster, "tenants set acme --answer-tokens-max 0").await;
}

/// Every gateway refuses requests without a key, also one that was away when that was decided.
async fn settings_reach_everybody(cluster: &Cluster) {
    assert_eq!(code(cluster, "config set slo.ttft_ms=fast").await, Some(2));
    assert_eq!(code(cluster, "config set no.such=1").await, Some(5));
    let planned = ctl(cluster, "config set auth.required=true --dry-run").await;
    assert_eq!((&planned["changes"][0]["old"], &planned["changes"][0]["new"]), (&json!(false), &json!(true)));
    assert_eq!(ask(cluster, cluster.http, &[3], None).await.status, 200, "a dry run changes nothing");
    let changed = ctl(cluster, "config set auth.required=true request.tokens_max=5000").await;
    assert_eq!(changed["version"], 1);
    assert_eq!(code(cluster, "config set --if-version 0 slo.ttft_ms=9").await, Some(6), "somebody was faster");
    let refuses = async |at: SocketAddr| match http::send(at, "GET", "/v1/models", "").await {
        Ok(reply) if reply.status == 401 => Ok(()),
        other => Err(format!("{other:?}")),
    };
    for at in gateways(cluster).await {
        eventually("every gateway knows", WAIT_MAX, async || refuses(at).await).await;
    }
    let status = cluster.rests().await;
    let follower = status.members.iter().find(|member| member.role == "follower").unwrap();
    assert!(process::signal("KILL", follower.pid.unwrap()));
    let back = eventually("it is back", WAIT_MAX, async || {
        let now = cluster.status().await?;
        let again =
            now.members.iter().find(|member| member.name == follower.name && member.pid != follower.pid && member.reachable);
        again.and_then(|member| member.http).ok_or_else(|| format!("{now:?}"))
    })
    .await;
    eventually("it knows what was decided", WAIT_MAX, async || refuses(back).await).await;
    // The killed one may have been dialed as the leader for a moment still.
    cluster.rests().await;
    let differs = ctl(cluster, "config diff").await;
    let keys: Vec<&str> = differs["changes"].as_array().unwrap().iter().filter_map(|change| change["key"].as_str()).collect();
    assert_eq!(keys, ["request.tokens_max", "auth.required"]);
    ctl(cluster, "config set auth.required= request.tokens_max=").await;
    for at in gateways(cluster).await {
        eventually("and back", WAIT_MAX, async || refuses(at).await.err().map(|_| ()).ok_or_else(|| "refuses".into())).await;
    }
}

/// What is pinned stays while everything else of its age is pushed out.
async fn pins_outlive_pressure(cluster: &Cluster) {
    let (kept, gone) = (prompt(0, TOKENS), prompt(2, TOKENS));
    cached(cluster, &gone, None).await;
    until_held(cluster, &gone, "default", BLOCKS).await;
    until_held(cluster, &kept, "default", BLOCKS).await;
    let pinned = ctl(cluster, &format!("cache pin --label agent --tokens {}", list(&kept))).await;
    assert_eq!(pinned["blocks"], BLOCKS);
    eventually("a node keeps it", WAIT_MAX, async || {
        let status = ctl(cluster, "nodes list").await;
        let nodes = status["nodes"].as_array().unwrap();
        let pinned: u64 = nodes.iter().filter_map(|node| node["blocks"]["pinned"].as_u64()).sum();
        if pinned >= BLOCKS { Ok(()) } else { Err(format!("{status}")) }
    })
    .await;
    for n in 10..50 {
        assert_eq!(ask(cluster, cluster.http, &prompt(n, 300), None).await.status, 200);
    }
    until_held(cluster, &gone, "default", 0).await;
    assert_eq!(held(cluster, &kept, "default").await, BLOCKS, "the pinned prompt is whole");
    assert_eq!(cached(cluster, &kept, None).await, BLOCKS * 16);
    let pins = ctl(cluster, "cache pins").await;
    assert_eq!((&pins["pins"][0]["label"], &pins["pins"][0]["blocks"]), (&json!("agent"), &json!(BLOCKS)));
}

async fn eviction_empties_and_verification_finds_nothing(cluster: &Cluster) {
    cluster.rests().await;
    let first = ctl(cluster, "cache verify").await;
    let second = ctl(cluster, "cache verify").await;
    let count =
        |found: &Value, what: &str| -> u64 { found["nodes"].as_array().unwrap().iter().map(|n| n[what].as_u64().unwrap()).sum() };
    assert!(count(&first, "recorded") > 0 && count(&second, "sound") == count(&second, "blocks"), "{first} {second}");
    assert!(second["nodes"].as_array().unwrap().iter().all(|node| node["names"] == "equal"), "{second}");
    let planned = ctl(cluster, "cache evict --all --dry-run").await;
    let dropped = ctl(cluster, "cache evict --all").await;
    assert_eq!((planned["dropped"].as_u64() > Some(0), &planned["dropped"]), (true, &dropped["dropped"]));
    assert_eq!(held(cluster, &prompt(0, TOKENS), "default").await, BLOCKS, "pinned blocks stay");
    let pin = ctl(cluster, "cache pins").await["pins"][0]["pin"].to_string();
    ctl(cluster, &format!("cache unpin {pin}")).await;
    assert_eq!(code(cluster, &format!("cache unpin {pin}")).await, Some(5));
    eventually("nothing is left", WAIT_MAX, async || {
        ctl(cluster, "cache evict --all").await;
        let stat = ctl(cluster, "cache stat").await;
        if stat["blocks"] == 0 { Ok(()) } else { Err(format!("{stat}")) }
    })
    .await;
    ctl(cluster, "cache verify").await;
}

async fn what_is_asked_most_is_known(cluster: &Cluster) {
    let often = prompt(77, TOKENS);
    for _ in 0..12 {
        assert_eq!(ask(cluster, cluster.http, &often, None).await.status, 200);
    }
    let top = ctl(cluster, "cache top-prefixes").await;
    let first = &top["prefixes"][0];
    assert_eq!((&first["blocks"], &first["tenant"], &top["gateways"]), (&json!(BLOCKS), &json!("default"), &json!(3)), "{top}");
    // Counts may have been halved once meanwhile.
    assert!(first["count"].as_u64() >= Some(6), "{top}");
}

/// The running requests of a tenant that is deleted end with an error that says so, and its key ends.
async fn a_deleted_tenant_is_gone(cluster: &Cluster, key: &str) {
    let mut running = Vec::new();
    for n in 0..STREAMS {
        let body = json!({"model": cluster.model, "prompt": prompt(n, 40), "max_tokens": 470, "ignore_eos": true, "stream": true});
        running.push(Events::open_as(cluster.http, COMPLETIONS, &body, Some(key)).await.unwrap());
    }
    assert_eq!(code(cluster, "tenants delete acme").await, Some(2), "not without --yes");
    ctl(cluster, "tenants delete acme --yes").await;
    let mut ended = 0;
    for events in running {
        match events.collect(Answer::default()).await.end {
            End::Error(error) if error["code"] == "tenant_deleted" => ended += 1,
            End::Whole => {} // it was faster
            other => panic!("{other:?}"),
        }
    }
    assert!(ended > 0, "all {STREAMS} were faster");
    assert_eq!(ask(cluster, cluster.http, &[3], Some(key)).await.status, 401);
    assert_eq!(code(cluster, "tenants delete default --yes").await, Some(2));
    cluster.rests().await;
}

#[tokio::test]
async fn operators_decide() {
    let cluster = Cluster::start(Plan { kv_blocks: POOL, ..Plan::checksum(500) }).await;
    let key = tenants_share_nothing(&cluster).await;
    limits_are_held(&cluster, &key).await;
    settings_reach_everybody(&cluster).await;
    pins_outlive_pressure(&cluster).await;
    eviction_empties_and_verification_finds_nothing(&cluster).await;
    what_is_asked_most_is_known(&cluster).await;
    a_deleted_tenant_is_gone(&cluster, &key).await;
}
