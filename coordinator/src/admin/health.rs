//! What a replica says of its own health, and what the whole of their answers leaves unknown. Verdicts and cures are `millctl doctor`'s.

use std::collections::VecDeque;
use std::time::{Instant, SystemTime};

use millrace_core::message::ModelIdentity;
use millrace_node::pki::ALPN;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};

use super::Admin;

/// Refusals that are remembered; an older one is forgotten.
const REFUSALS_MAX: usize = 16;
/// A node that was not heard from for longer is not known to be well, milliseconds.
const SILENT_MS_MAX: u64 = 1000;

struct Refusal {
    name: String,
    reason: String,
    at: Instant,
    times: u64,
}

/// Whom this replica refused lately, and why: what a misconfigured process looks like from here.
#[derive(Default)]
pub(super) struct Refusals(Mutex<VecDeque<Refusal>>);

impl Refusals {
    /// Remembers one. The same again is counted.
    fn put(&self, now: Instant, name: &str, reason: &str) {
        let mut all = self.0.lock();
        let same = |refusal: &Refusal| refusal.name == name && refusal.reason == reason;
        let before = all.iter().position(same).and_then(|i| all.remove(i)).map_or(0, |refusal| refusal.times);
        if all.len() >= REFUSALS_MAX {
            all.pop_front();
        }
        all.push_back(Refusal { name: name.to_owned(), reason: reason.to_owned(), at: now, times: before + 1 });
    }

    fn view(&self, now: Instant) -> Vec<Value> {
        let view = |refusal: &Refusal| {
            let ago_ms = now.saturating_duration_since(refusal.at).as_millis() as u64;
            json!({"name": refusal.name, "reason": refusal.reason, "ago_ms": ago_ms, "times": refusal.times})
        };
        self.0.lock().iter().map(view).collect()
    }
}

/// A model's name, and the digest of all that must be equal.
pub(super) fn model(model: &ModelIdentity) -> Value {
    let digest: String = model.fingerprint().0[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    json!({"name": model.name, "fingerprint": digest})
}

impl Admin {
    /// A peer was refused.
    pub fn refused(&self, name: &str, reason: &str) {
        self.refusals.put(Instant::now(), name, reason);
    }

    /// What doctors ask about this replica.
    pub(super) fn health(&self) -> Value {
        let raft = self.proposer.raft.status();
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "protocol": String::from_utf8_lossy(ALPN),
            "wall_ms": wall.as_millis() as u64,
            "model": model(self.dispatcher.model()),
            "snapshot_index": raft.snapshot_index,
            "frames_refused": raft.frames_refused,
            "sends_dropped": raft.sends_dropped,
            "requests": self.dispatcher.running(),
            "needed": self.needed(),
            "traffic": self.dispatcher.traffic().figures(),
            "refusals": self.refusals.view(Instant::now()),
            "ready": self.dispatcher.ready().err(),
        })
    }

    /// How many requests of this gateway still need each node, by name.
    fn needed(&self) -> Value {
        let cluster = self.proposer.cluster.read();
        let named = self.dispatcher.needed().into_iter();
        let named = named.filter_map(|(node, count)| Some((cluster.node(node)?.name.clone(), json!(count))));
        Value::Object(Map::from_iter(named))
    }
}

/// Tells each member how many entries it is behind what the leader knows to be committed.
pub(super) fn add_lag(members: &mut [Value], leader: Option<&Value>) {
    let committed = leader.and_then(|leader| leader["committed"].as_u64());
    for member in members {
        let lag = committed.zip(member["applied"].as_u64()).map(|(committed, applied)| committed.saturating_sub(applied));
        member["lag"] = json!(lag);
    }
}

/// How many requests need the node `name`, as far as the gateways that answer know.
pub(super) fn requests(members: &[Value], name: &Value) -> Value {
    let name = name.as_str().unwrap_or_default();
    let by: Map<String, Value> = members
        .iter()
        .filter(|member| member["reachable"] == true)
        .filter_map(|member| Some((member["name"].as_str()?.to_owned(), member["needed"].get(name)?.clone())))
        .collect();
    json!({"requests": by.values().filter_map(Value::as_u64).sum::<u64>(), "requests_by": by})
}

/// What the answers leave unknown, in words.
pub(super) fn unknown(members: &[Value], nodes: &[Value], quorum: bool) -> Vec<String> {
    let name = |one: &Value| one["name"].as_str().unwrap_or("?").to_owned();
    let mut unknown = Vec::new();
    for member in members.iter().filter(|member| member["reachable"] != true) {
        unknown.push(format!("{} does not answer: its role, its log and the requests that it serves", name(member)));
    }
    if !quorum {
        let applied = members.iter().filter_map(|member| member["applied"].as_u64()).max().unwrap_or(0);
        unknown.push(format!("no quorum vouches for anything after log entry {applied}: joins, leaves, leases, cached blocks"));
    }
    let silent = |node: &&Value| {
        let alive = !matches!(node["state"].as_str(), Some("dead" | "left"));
        alive && node["last_heard_ms"].as_u64().is_none_or(|ms| ms > SILENT_MS_MAX)
    };
    for node in nodes.iter().filter(silent) {
        let since = node["last_heard_ms"].as_u64().map_or_else(|| "never".to_owned(), |ms| format!("{ms} ms ago"));
        unknown.push(format!("the load of {}: last heard here {since}", name(node)));
    }
    unknown
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn refusals_are_counted_bounded_and_aged() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        for i in 0..50 {
            refusals.put(now, &format!("p-{i}"), "weights");
        }
        refusals.put(now, "p-49", "weights");
        let view = refusals.view(now + Duration::from_secs(2));
        assert_eq!(view.len(), REFUSALS_MAX);
        assert_eq!(view.last().unwrap(), &json!({"name": "p-49", "reason": "weights", "ago_ms": 2000, "times": 2}));
    }

    #[test]
    fn what_is_missing_is_said_and_requests_add_up() {
        let mut members = [
            json!({"name": "c-1", "reachable": true, "applied": 9, "committed": 12, "needed": {"d-1": 2}}),
            json!({"name": "c-2", "reachable": true, "applied": 12, "needed": {"d-1": 1}}),
            json!({"name": "c-3", "reachable": false, "needed": {"d-1": 7}}),
        ];
        let leader = members[0].clone();
        add_lag(&mut members, Some(&leader));
        assert_eq!((&members[0]["lag"], &members[1]["lag"], &members[2]["lag"]), (&json!(3), &json!(0), &Value::Null));
        let at = requests(&members, &json!("d-1"));
        assert_eq!(at, json!({"requests": 3, "requests_by": {"c-1": 2, "c-2": 1}}), "the answer of one that is gone is no answer");
        let nodes = [json!({"name": "d-1", "last_heard_ms": 3000, "state": "up"}), json!({"name": "d-2", "state": "dead"})];
        let said = unknown(&members, &nodes, false).join("; ");
        assert!(
            said.contains("c-3 does not") && said.contains("after log entry 12") && said.contains("d-1: last heard here 3000 ms"),
            "{said}"
        );
        assert!(!said.contains("d-2"), "nothing is expected of the dead: {said}");
        assert!(unknown(&members[..2], &[], true).is_empty());
    }
}
