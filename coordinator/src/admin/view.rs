//! The shapes of the admin interface's answers.

use std::time::Instant;

use millrace_core::cluster::Node;
use millrace_core::holders::BLOCKS_MAX;
use millrace_core::ids::ReplicaId;
use serde_json::{Value, json};

use super::{Admin, health};
use millrace_log::Role;

/// Entries that a replica may be behind the leader and not be called stale: some milliseconds of a busy log.
const BEHIND_ENTRIES_MAX: u64 = 256;

const fn role_word(role: Role, learns: bool) -> &'static str {
    match role {
        Role::Follower if learns => "learner",
        Role::Leader => "leader",
        Role::Candidate | Role::PreCandidate => "candidate",
        Role::Follower => "follower",
        Role::Stopped => "stopped",
    }
}

/// An object with the fields of another added.
fn with(mut object: Value, more: Value) -> Value {
    if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
        object.extend(more);
    }
    object
}

impl Admin {
    /// This replica about itself.
    pub(super) fn member(&self) -> Value {
        let status = self.proposer.raft.status();
        let member = json!({
            "id": status.id,
            "name": self.config.args.name,
            "role": role_word(status.role, !status.members.is_voter(status.id)),
            "address": self.config.quic().to_string(),
            "http": self.http,
            "pid": std::process::id(),
            "term": status.term,
            "applied": status.applied,
            "committed": status.committed,
            "leader": status.leader,
            "reachable": true,
            "disk_full": status.disk_full,
            "failure": status.failure.map(|failure| failure.to_string()),
        });
        with(member, self.health())
    }

    /// What can be said of a replica that does not answer.
    pub(super) fn absent_member(&self, id: ReplicaId) -> Value {
        let place = self.proposer.roster.others().remove(&id);
        let cluster = self.proposer.cluster.read();
        let info = cluster.replicas().find(|(other, _)| *other == id).map(|(_, info)| info);
        json!({
            "id": id.0,
            "name": place.as_ref().map_or_else(|| self.config.replica_name(id), |place| place.name.clone()),
            "role": "unknown",
            "address": place.and_then(|place| place.addr).map(|addr| addr.to_string()),
            "http": info.map(|info| info.http_address.as_str()),
            "pid": info.map(|info| info.pid),
            "term": null,
            "applied": null,
            "reachable": false,
        })
    }

    /// The whole cluster. There is a quorum when most voters answer and follow one leader that answers; while voters are being
    /// exchanged, most of the old and of the new ones.
    pub(super) fn status_of(&self, mut members: Vec<Value>, now: Instant) -> Value {
        let reachable = |m: &&Value| m["reachable"] == true && m["role"] != "stopped";
        let leads = |m: &&Value| m["role"] == "leader";
        let leader = members.iter().filter(reachable).filter(leads).max_by_key(|m| m["term"].as_u64());
        let voters = self.proposer.raft.status().members;
        let follows =
            |id: u64, leader: &Value| members.iter().filter(reachable).any(|m| m["id"] == id && m["leader"] == leader["id"]);
        let most = |ids: &[u64], leader: &Value| ids.iter().filter(|id| follows(**id, leader)).count() * 2 > ids.len();
        let followed = leader
            .is_some_and(|leader| most(&voters.voters, leader) && (voters.outgoing.is_empty() || most(&voters.outgoing, leader)));
        let behind = leader.is_none_or(|leader| {
            let applied = self.proposer.raft.status().applied;
            applied + BEHIND_ENTRIES_MAX < leader["committed"].as_u64().unwrap_or(0)
        });
        let quorum = followed;
        let leader = leader.cloned();
        health::add_lag(&mut members, leader.as_ref());
        let nodes = self.nodes(&members, now);
        let unknown = health::unknown(&members, &nodes, quorum);
        json!({
            "cluster": self.config.args.cluster,
            "model": self.dispatcher.model().name,
            "answered_by": self.config.args.name,
            "leader": leader.map(|leader| leader["name"].clone()),
            "unknown": unknown,
            "quorum": quorum,
            "stale": !quorum || behind,
            "members": members,
            "nodes": nodes,
        })
    }

    fn nodes(&self, members: &[Value], now: Instant) -> Vec<Value> {
        let cluster = self.proposer.cluster.read();
        let cached = |node| cluster.holders().tally(node).map_or(0, |tally| tally.blocks);
        let all = cluster.nodes().map(|node| self.node(node, cached(node.node), now));
        all.map(|node| with(node.clone(), health::requests(members, &node["name"]))).collect()
    }

    fn node(&self, node: &Node, cached: u64, now: Instant) -> Value {
        let seen = self.proposer.nodes.seen(now, &node.name, node.epoch);
        let load = seen.map(|seen| seen.load).unwrap_or_default();
        let total = if load.total_blocks == 0 { node.slots } else { load.total_blocks };
        let known = load.total_blocks != 0;
        let idle = load.free_blocks.saturating_add(load.evictable_blocks).saturating_add(load.pinned_blocks);
        let in_use = total.saturating_sub(idle);
        json!({
            "id": node.node.0,
            "name": node.name,
            "kind": node.role.as_str(),
            "epoch": node.epoch.0,
            "state": node.state.as_str(),
            "usable": node.state.usable() && seen.is_some_and(|seen| seen.usable()),
            "pid": node.pid,
            "address": node.address,
            "model": health::model(&node.model),
            "blocks": {
                "total": total,
                "free": known.then_some(load.free_blocks),
                "evictable": known.then_some(load.evictable_blocks),
                "pinned": known.then_some(load.pinned_blocks),
                "in_use": known.then_some(in_use),
                "cached": cached,
            },
            "running": load.running,
            "waiting": load.waiting,
            "queued_tokens": load.queued_tokens,
            "last_heard_ms": seen.map(|seen| seen.silent.as_millis() as u64),
        })
    }

    /// What the index holds.
    pub(super) fn cache_stat(&self) -> Value {
        let cluster = self.proposer.cluster.read();
        let holders = cluster.holders();
        let per_node: Vec<Value> = cluster
            .nodes()
            .filter_map(|node| holders.tally(node.node).map(|tally| (node, tally)))
            .map(|(node, tally)| {
                let digest = format!("{:032x}", tally.digest);
                json!({"name": node.name, "blocks": tally.blocks, "seq": tally.seq, "digest": digest, "refused": tally.refused})
            })
            .collect();
        let (drift, audit) = (holders.drift(), cluster.audit());
        let differing: Vec<Value> = audit.differing().map(|(id, entry)| json!({"replica": id.0, "entry": entry})).collect();
        json!({
            "blocks": holders.blocks(),
            "holders": holders.locations(),
            "holders_max": BLOCKS_MAX,
            "applied": cluster.applied(),
            "drift": {"found": drift.found, "repaired": drift.repaired},
            "replicas": {"agreed": audit.agreed(), "differing": differing},
            "nodes": per_node,
        })
    }
}
