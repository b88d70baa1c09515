//! What findings mean: a verdict for each thing that can be wrong, and its cure. Pure: whoever looks is in [`super`].

use std::collections::BTreeSet;
use std::fmt::Display;

use millrace_node::pki::{ALPN, Leaf};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Findings, Replica};
use crate::ctl::certs::RENEW_DAYS;
use crate::ctl::cluster::Member;
use crate::ctl::dates::days_left;

/// Entries that a replica may be behind before it is said.
const LAG_MAX: u64 = 256;
/// A node that was not heard from for longer is silent, milliseconds.
const SILENT_MS_MAX: u64 = 1000;
/// Wall clocks further apart are said; nothing but certificates' lives depends on them, milliseconds.
const SKEW_MS_MAX: i64 = 60_000;
/// A refusal longer ago is history, milliseconds.
const REFUSAL_MS_MAX: u64 = 300_000;

/// How a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    Ok,
    Warn,
    Bad,
    Unknown,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Check {
    /// What was looked at.
    pub name: String,
    pub verdict: Verdict,
    pub detail: String,
    /// What helps; `None` when all is well.
    pub cure: Option<String>,
}

/// What is wrong with one thing; collected, and `ok` when nothing is.
struct Topic {
    name: &'static str,
    checks: Vec<Check>,
}

impl Topic {
    fn new(name: &'static str) -> Self {
        Self { name, checks: Vec::new() }
    }

    fn add(&mut self, verdict: Verdict, detail: impl Display, cure: impl Display) {
        let (name, detail, cure) = (self.name.to_owned(), detail.to_string(), Some(cure.to_string()));
        self.checks.push(Check { name, verdict, detail, cure });
    }

    /// The findings, or that all is well.
    fn or_ok(mut self, detail: impl Display) -> Vec<Check> {
        if self.checks.is_empty() {
            let (name, detail) = (self.name.to_owned(), detail.to_string());
            self.checks.push(Check { name, verdict: Verdict::Ok, detail, cure: None });
        }
        self.checks
    }
}

/// Every check, in the order in which an operator should read them.
pub(super) fn diagnose(findings: &Findings) -> Vec<Check> {
    let topics =
        [replicas, quorum, log, versions, models, certificates, nodes, index, gateways, clocks].map(|topic| topic(findings));
    topics.into_iter().flatten().collect()
}

impl Findings {
    fn members(&self) -> impl Iterator<Item = &Member> {
        self.replicas.iter().filter_map(|replica| replica.member.as_ref().ok())
    }
}

fn replicas(findings: &Findings) -> Vec<Check> {
    let mut topic = Topic::new("replicas");
    for Replica { name, address, member, .. } in &findings.replicas {
        if let Err(reason) = member {
            let detail =
                if reason.starts_with(address) { format!("{name} at {reason}") } else { format!("{name} at {address}: {reason}") };
            topic.add(Verdict::Bad, detail, "read its log and start it again; if its machine is gone, `millctl members replace`");
        }
    }
    let count = findings.replicas.len();
    topic.or_ok(format_args!("{count} of {count} answer"))
}

fn quorum(findings: &Findings) -> Vec<Check> {
    let mut topic = Topic::new("quorum");
    let (answer, all) = (findings.members().count(), findings.replicas.len());
    let leaders: BTreeSet<&str> = findings.members().filter(|m| m.role == "leader").map(|m| m.name.as_str()).collect();
    let Some(status) = findings.status.as_ref().filter(|status| status.quorum) else {
        let needed = all / 2 + 1;
        let cure = if answer >= needed {
            "enough replicas answer but follow no leader: look at the network between them, then at their logs".to_owned()
        } else {
            format!("{needed} of {all} replicas must run, {answer} do: start {} more", needed - answer)
        };
        topic.add(Verdict::Bad, "there is none: streams in flight go on, nothing can be changed", cure);
        return topic.checks;
    };
    if leaders.len() > 1 {
        let names: Vec<&str> = leaders.into_iter().collect();
        let detail = format!("{} say that they lead", names.join(" and "));
        topic.add(Verdict::Warn, detail, "the one with the lower term is cut off and steps down by itself; look at its network");
    }
    let leader = status.leader.as_deref().unwrap_or("nobody");
    topic.or_ok(format_args!(
        "{answer} of {all}, led by {leader} in term {}",
        findings.members().filter_map(|m| m.term).max().unwrap_or(0)
    ))
}

fn log(findings: &Findings) -> Vec<Check> {
    let mut topic = Topic::new("log");
    for member in findings.members() {
        if let Some(failure) = &member.failure {
            let cure = "its disk failed: free space or replace the disk, then start the replica again";
            topic.add(Verdict::Bad, format_args!("{} has stopped: {failure}", member.name), cure);
        }
    }
    let lag = |member: &Member| findings.status.iter().flat_map(|s| &s.members).find(|m| m.name == member.name).and_then(|m| m.lag);
    for (member, lag) in findings.members().filter_map(|member| Some((member, lag(member)?))) {
        if lag > LAG_MAX {
            let cure = "it catches up by itself; if the number grows, its disk or its network is too slow";
            topic.add(Verdict::Warn, format_args!("{} is {lag} entries behind", member.name), cure);
        }
    }
    let applied = findings.members().filter_map(|member| member.applied).max().unwrap_or(0);
    topic.or_ok(format_args!("entry {applied}, no replica more than {LAG_MAX} behind, no disk failed"))
}

fn versions(findings: &Findings) -> Vec<Check> {
    let mut topic = Topic::new("versions");
    let ours = (env!("CARGO_PKG_VERSION"), String::from_utf8_lossy(ALPN));
    for member in findings.members() {
        let theirs = (member.version.as_deref().unwrap_or("unknown"), member.protocol.as_deref().unwrap_or("unknown"));
        if theirs != (ours.0, &*ours.1) {
            let detail = format!(
                "{} is {} and speaks {}; this millctl is {} and speaks {}",
                member.name, theirs.0, theirs.1, ours.0, ours.1
            );
            topic.add(Verdict::Warn, detail, "finish the upgrade, or use the millctl of that version");
        }
    }
    topic.or_ok(format_args!("all {} and {}", ours.0, ours.1))
}

fn models(findings: &Findings) -> Vec<Check> {
    let mut topic = Topic::new("models");
    let mut prints: BTreeSet<&str> = findings.members().filter_map(|m| m.model.as_ref()).map(|m| m.fingerprint.as_str()).collect();
    if prints.len() > 1 {
        let of: Vec<String> =
            findings.members().filter_map(|m| Some(format!("{} {}", m.name, m.model.as_ref()?.fingerprint))).collect();
        topic.add(
            Verdict::Bad,
            of.join(", "),
            "replicas must be started with the same --model, --dtype, --kv-dtype and --block-tokens",
        );
    }
    let alive =
        findings.status.iter().flat_map(|status| &status.nodes).filter(|node| !matches!(node.state.as_str(), "dead" | "left"));
    for node in alive.filter(|node| !node.model.fingerprint.is_empty()) {
        if !prints.is_empty() && !prints.contains(node.model.fingerprint.as_str()) {
            let detail = format!("{} serves {} ({})", node.name, node.model.name, node.model.fingerprint);
            topic.add(Verdict::Bad, detail, "start it with the model of the coordinator");
        }
    }
    let refusals = findings.members().flat_map(|member| member.refusals.iter().map(move |refusal| (&member.name, refusal)));
    let mut told = BTreeSet::new();
    for (by, refusal) in refusals.filter(|(_, refusal)| refusal.ago_ms < REFUSAL_MS_MAX) {
        // Each replica refuses the same process for the same reason.
        if told.insert((&refusal.name, &refusal.reason)) {
            let seconds = refusal.ago_ms / 1000;
            let detail = format!("{by} refused {} {} times, {seconds} s ago: {}", refusal.name, refusal.times, refusal.reason);
            topic.add(Verdict::Warn, detail, "start that process with what the reason names set right");
        }
    }
    topic.or_ok(format_args!("one everywhere: {}", prints.pop_first().unwrap_or("unknown")))
}

fn certificates(findings: &Findings) -> Vec<Check> {
    let mut topic = Topic::new("certificates");
    let mut soonest = i64::MAX;
    let replicas = findings.replicas.iter().filter_map(|replica| Some((replica.name.as_str(), replica.leaf.as_ref()?)));
    let nodes = findings.nodes.iter().filter_map(|(name, leaf)| Some((name.as_str(), leaf.as_ref().ok()?)));
    for (name, leaf) in replicas.chain(nodes).chain([("this millctl", &findings.own)]) {
        let days = days_left(leaf.valid_until, findings.now);
        soonest = soonest.min(days);
        expiry(&mut topic, name, leaf, days);
    }
    for (name, error) in findings.nodes.iter().filter_map(|(name, leaf)| Some((name, leaf.as_ref().err()?))) {
        let cure = "run this where the node's address can be reached, or look at its certificate with `millctl certs show`";
        topic.add(Verdict::Unknown, format_args!("{name} showed none: {error}"), cure);
    }
    topic.or_ok(format_args!("each is who it says; the first ends in {soonest} days"))
}

fn expiry(topic: &mut Topic, name: &str, leaf: &Leaf, days: i64) {
    let cure = "`millctl certs rotate --dir CERTS`, and carry the folders to where the processes run";
    let until = crate::ctl::dates::rfc3339(leaf.valid_until);
    if days < 0 {
        topic.add(Verdict::Bad, format_args!("that of {name} ended at {until}"), cure);
    } else if days < RENEW_DAYS {
        topic.add(Verdict::Warn, format_args!("that of {name} ends in {days} days, at {until}"), cure);
    }
}

fn nodes(findings: &Findings) -> Vec<Check> {
    let mut topic = Topic::new("nodes");
    let Some(status) = &findings.status else {
        topic.add(Verdict::Unknown, "nobody can be asked", "start a replica");
        return topic.checks;
    };
    for node in &status.nodes {
        let name = &node.name;
        let silent = node.last_heard_ms.is_none_or(|ms| ms > SILENT_MS_MAX);
        let heard = node.last_heard_ms.map_or_else(|| "never heard here".into(), |ms| format!("last heard {ms} ms ago"));
        let room = node.blocks.free.zip(node.blocks.evictable);
        match node.state.as_str() {
            "left" => {}
            "dead" => topic.add(Verdict::Warn, format_args!("{name} is dead"), "start it again under the same name"),
            _ if silent => topic.add(
                Verdict::Bad,
                format_args!("{name} is silent: {heard}"),
                "see whether its process runs and reaches the replicas",
            ),
            "cordoned" | "draining" => {
                topic.add(
                    Verdict::Warn,
                    format_args!("{name} is {}", node.state),
                    format_args!("`millctl nodes uncordon {name}` when it may serve again"),
                );
            }
            _ if room == Some((0, 0)) => {
                topic.add(
                    Verdict::Warn,
                    format_args!("{name} is full: all {} blocks are in use", node.blocks.total),
                    "more nodes, larger pools (--kv-blocks), or fewer requests at a time",
                );
            }
            _ => {}
        }
    }
    let usable = |kind: &str| status.nodes.iter().filter(|node| node.usable && node.kind == kind).count();
    let (prefill, decode) = (usable("prefill"), usable("decode"));
    if decode == 0 {
        topic.add(Verdict::Bad, "no decode node is usable: nothing can be served", "start decode nodes");
    }
    topic.or_ok(format_args!("{prefill} prefill and {decode} decode nodes, all usable"))
}

fn index(findings: &Findings) -> Vec<Check> {
    let mut topic = Topic::new("index");
    let Some(cache) = &findings.cache else {
        topic.add(Verdict::Unknown, "nobody can be asked", "start a replica");
        return topic.checks;
    };
    let count = |value: &Value, name: &str| value[name].as_u64().unwrap_or(0);
    for node in cache["nodes"].as_array().into_iter().flatten() {
        let (name, refused) = (node["name"].as_str().unwrap_or("?"), count(node, "refused"));
        if refused > 0 {
            let cure = "the index is at its bound: fewer or smaller pools, or a coordinator with more memory";
            topic.add(Verdict::Warn, format_args!("{refused} blocks of {name} have no place"), cure);
        }
    }
    let (found, repaired) = (count(&cache["drift"], "found"), count(&cache["drift"], "repaired"));
    if found > repaired {
        let cure = "the node is asked for all of its blocks by itself; if this stays, restart that node";
        topic.add(Verdict::Warn, format_args!("{} of {found} drifts are not repaired yet", found - repaired), cure);
    }
    for differs in cache["replicas"]["differing"].as_array().into_iter().flatten() {
        let (replica, entry) = (count(differs, "replica"), count(differs, "entry"));
        let cure = "stop it and replace it with an empty one: `millctl members replace`; keep its folder, it shows a defect";
        topic.add(Verdict::Bad, format_args!("replica {replica} differs from the majority after entry {entry}"), cure);
    }
    let (blocks, holders, most) = (count(cache, "blocks"), count(cache, "holders"), count(cache, "holders_max"));
    if most > 0 && holders.saturating_mul(10) > most.saturating_mul(9) {
        let cure = "smaller pools or fewer nodes; beyond the bound new blocks are not known and are computed again";
        topic.add(Verdict::Warn, format_args!("{holders} of at most {most} places are in use"), cure);
    }
    topic.or_ok(format_args!("{blocks} blocks in {holders} places; {found} drifts found and {repaired} repaired so far"))
}

fn gateways(findings: &Findings) -> Vec<Check> {
    let mut topic = Topic::new("gateways");
    let cure = "look at that replica's log; clients are served by the others meanwhile";
    for replica in &findings.replicas {
        if let (Some(Err(error)), Ok(member)) = (&replica.http, &replica.member) {
            let why = member.not_ready.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
            let http = member.http.as_deref().unwrap_or("-");
            topic.add(Verdict::Warn, format_args!("{} at http://{http} {error}{why}", replica.name), cure);
        }
    }
    if let Some((http, Err(error))) = &findings.front {
        topic.add(
            Verdict::Bad,
            format_args!("the local door http://{http}: {error}"),
            "`millctl local status` tells whether the cluster runs",
        );
    }
    let open = findings.replicas.iter().filter(|replica| matches!(replica.http, Some(Ok(())))).count();
    if open == 0 {
        topic.add(Verdict::Bad, "no gateway takes requests", "start a replica and a decode node");
    }
    topic.or_ok(format_args!("{open} take requests"))
}

fn clocks(findings: &Findings) -> Vec<Check> {
    let mut topic = Topic::new("clocks");
    let skews: Vec<(i64, i64)> = findings.replicas.iter().filter_map(|replica| replica.skew_ms).collect();
    let spread = |value: fn(&(i64, i64)) -> i64| skews.iter().map(value).max().zip(skews.iter().map(value).min());
    let apart_ms = spread(|(skew, _)| *skew).map_or(0, |(most, least)| most - least);
    let error_ms = skews.iter().map(|(_, error)| *error).max().unwrap_or(0);
    if apart_ms > SKEW_MS_MAX {
        topic.add(
            Verdict::Warn,
            format_args!("replicas are {apart_ms} ms apart"),
            "run NTP; only the lives of certificates depend on it",
        );
    }
    topic.or_ok(format_args!("replicas at most {apart_ms} ms apart (measured to {error_ms} ms); no decision reads them"))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use serde_json::json;

    use super::*;

    fn replica(id: u64) -> Replica {
        let member = json!({"id": id, "name": format!("c-{id}"), "role": if id == 1 { "leader" } else { "follower" }, "reachable": true, "term": 3,
            "applied": 9, "lag": 0, "version": env!("CARGO_PKG_VERSION"), "protocol": String::from_utf8_lossy(ALPN), "http": "127.0.0.1:1",
            "model": {"name": "m", "fingerprint": "aa"}});
        let leaf = Leaf { serial: "1".into(), valid_until: SystemTime::UNIX_EPOCH + Duration::from_secs(100 * 86_400) };
        Replica {
            name: format!("c-{id}"),
            address: "h:1".into(),
            member: Ok(serde_json::from_value(member).unwrap()),
            status: None,
            leaf: Some(leaf),
            skew_ms: Some((id as i64, 1)),
            http: Some(Ok(())),
        }
    }

    fn healthy() -> Findings {
        let replicas: Vec<Replica> = (1..=3).map(replica).collect();
        let members: Vec<Member> = replicas.iter().map(|replica| replica.member.clone().unwrap()).collect();
        let node = json!({"name": "d-1", "kind": "decode", "state": "up", "usable": true, "last_heard_ms": 5, "model": {"fingerprint": "aa"},
            "blocks": {"total": 8, "free": 8, "evictable": 0}});
        let mut status: crate::ctl::cluster::Status =
            serde_json::from_value(json!({"quorum": true, "leader": "c-1", "nodes": [node]})).unwrap();
        status.members = members;
        let leaf = replicas[0].leaf.clone().unwrap();
        Findings {
            now: SystemTime::UNIX_EPOCH,
            own: leaf.clone(),
            replicas,
            status: Some(status),
            cache: Some(json!({"blocks": 2, "holders": 3, "nodes": []})),
            nodes: [("d-1".to_owned(), Ok(leaf))].into(),
            front: None,
        }
    }

    /// The checks that are not well, as `name: detail`.
    fn sick(findings: &Findings) -> Vec<String> {
        let checks = diagnose(findings);
        assert!(
            checks.iter().all(|check| (check.verdict == Verdict::Ok) == check.cure.is_none()),
            "every ill has a cure: {checks:?}"
        );
        checks
            .into_iter()
            .filter(|check| check.verdict != Verdict::Ok)
            .map(|check| format!("{}: {}", check.name, check.detail))
            .collect()
    }

    fn assert_sick(spoil: impl FnOnce(&mut Findings), words: &str) {
        let mut findings = healthy();
        spoil(&mut findings);
        let sick = sick(&findings);
        assert!(sick.iter().any(|check| check.contains(words)), "{words:?} is not in {sick:?}");
    }

    #[test]
    fn a_healthy_cluster_has_ten_good_checks() {
        let checks = diagnose(&healthy());
        assert_eq!((checks.len(), sick(&healthy())), (10, Vec::<String>::new()), "{checks:?}");
    }

    #[test]
    fn every_ill_is_found_by_name() {
        assert_sick(|f| f.replicas[2].member = Err("gone".into()), "replicas: c-3 at h:1: gone");
        assert_sick(|f| f.status.as_mut().unwrap().quorum = false, "quorum: there is none");
        assert_sick(|f| f.status = None, "nodes: nobody can be asked");
        assert_sick(|f| f.replicas[1].member.as_mut().unwrap().role = "leader".into(), "c-1 and c-2 say that they lead");
        assert_sick(|f| f.replicas[1].member.as_mut().unwrap().failure = Some("fsync".into()), "log: c-2 has stopped: fsync");
        assert_sick(|f| f.status.as_mut().unwrap().members[2].lag = Some(1000), "log: c-3 is 1000 entries behind");
        assert_sick(|f| f.replicas[0].member.as_mut().unwrap().version = Some("9.9".into()), "versions: c-1 is 9.9");
        assert_sick(
            |f| f.replicas[0].member.as_mut().unwrap().model.as_mut().unwrap().fingerprint = "bb".into(),
            "models: c-1 bb, c-2 aa",
        );
        assert_sick(|f| f.status.as_mut().unwrap().nodes[0].model.fingerprint = "bb".into(), "models: d-1 serves");
        let refusal = json!({"name": "p-9", "reason": "weights differ", "ago_ms": 2000, "times": 3});
        let refusal: crate::ctl::cluster::Refusal = serde_json::from_value(refusal).unwrap();
        assert_sick(|f| f.replicas[0].member.as_mut().unwrap().refusals = vec![refusal], "refused p-9 3 times, 2 s ago: weights");
        let at = |days: u64| Leaf { serial: "1".into(), valid_until: SystemTime::UNIX_EPOCH + Duration::from_secs(days * 86_400) };
        assert_sick(|f| f.replicas[0].leaf = Some(at(3)), "certificates: that of c-1 ends in 3 days");
        assert_sick(
            |f| {
                f.nodes.insert("d-1".into(), Ok(at(0)));
                f.now += Duration::from_secs(86_401)
            },
            "that of d-1 ended",
        );
        assert_sick(
            |f| {
                f.nodes.insert("d-1".into(), Err("no route".into()));
            },
            "d-1 showed none: no route",
        );
        assert_sick(|f| f.status.as_mut().unwrap().nodes[0].last_heard_ms = Some(5000), "nodes: d-1 is silent");
        assert_sick(|f| f.status.as_mut().unwrap().nodes[0].state = "cordoned".into(), "nodes: d-1 is cordoned");
        assert_sick(|f| f.status.as_mut().unwrap().nodes[0].blocks.free = Some(0), "nodes: d-1 is full");
        assert_sick(|f| f.cache.as_mut().unwrap()["nodes"] = json!([{"name": "d-1", "refused": 4}]), "index: 4 blocks of d-1");
        assert_sick(|f| f.cache.as_mut().unwrap()["drift"] = json!({"found": 3, "repaired": 2}), "index: 1 of 3 drifts");
        let differing = json!({"agreed": 5, "differing": [{"replica": 2, "entry": 77}]});
        assert_sick(
            |f| f.cache.as_mut().unwrap()["replicas"] = differing,
            "index: replica 2 differs from the majority after entry 77",
        );
        assert_sick(|f| f.cache.as_mut().unwrap()["holders_max"] = json!(3), "index: 3 of at most 3 places");
        assert_sick(|f| f.replicas[0].http = Some(Err("answers 503".into())), "gateways: c-1 at http://127.0.0.1:1 answers 503");
        assert_sick(|f| f.replicas[0].skew_ms = Some((90_000, 1)), "clocks: replicas are 89998 ms apart");
    }

    #[test]
    fn a_lost_quorum_says_how_many_are_missing() {
        let mut findings = healthy();
        findings.replicas[1].member = Err("gone".into());
        findings.replicas[2].member = Err("gone".into());
        findings.status.as_mut().unwrap().quorum = false;
        let cure = diagnose(&findings).into_iter().find(|check| check.name == "quorum").and_then(|check| check.cure);
        assert_eq!(cure.as_deref(), Some("2 of 3 replicas must run, 1 do: start 1 more"));
    }
}
