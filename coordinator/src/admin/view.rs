//! The shapes of the admin interface's answers.

use std::time::Instant;

use millrace_core::cluster::Node;
use millrace_core::ids::{NodeId, ReplicaId};
use millrace_core::route::Decision;
use serde_json::{Value, json};

use super::Admin;
use crate::dispatch::Explanation;
use crate::raft::Role;

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

impl Admin {
    /// This replica about itself.
    pub(super) fn member(&self) -> Value {
        let status = self.proposer.raft.status();
        json!({
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
            "failure": status.failure.map(|failure| failure.to_string()),
        })
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
    pub(super) fn status_of(&self, members: Vec<Value>, now: Instant) -> Value {
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
        json!({
            "cluster": self.config.args.cluster,
            "model": self.dispatcher.model().name,
            "answered_by": self.config.args.name,
            "leader": leader.map(|leader| leader["name"].clone()),
            "quorum": quorum,
            "stale": !quorum || behind,
            "members": members,
            "nodes": self.nodes(now),
        })
    }

    fn nodes(&self, now: Instant) -> Vec<Value> {
        let cluster = self.proposer.cluster.read();
        let cached = |node| cluster.holders().tally(node).map_or(0, |tally| tally.blocks);
        cluster.nodes().map(|node| self.node(node, cached(node.node), now)).collect()
    }

    fn node(&self, node: &Node, cached: u64, now: Instant) -> Value {
        let seen = self.proposer.nodes.seen(now, &node.name, node.epoch);
        let load = seen.map(|seen| seen.load).unwrap_or_default();
        let total = if load.total_blocks == 0 { node.slots } else { load.total_blocks };
        let known = load.total_blocks != 0;
        let in_use = total.saturating_sub(load.free_blocks).saturating_sub(load.evictable_blocks);
        json!({
            "id": node.node.0,
            "name": node.name,
            "kind": node.role.as_str(),
            "epoch": node.epoch.0,
            "state": node.state.as_str(),
            "usable": node.state.usable() && seen.is_some_and(|seen| seen.usable()),
            "pid": node.pid,
            "address": node.address,
            "blocks": {
                "total": total,
                "free": known.then_some(load.free_blocks),
                "evictable": known.then_some(load.evictable_blocks),
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
        json!({"blocks": holders.blocks(), "holders": holders.locations(), "applied": cluster.applied(), "nodes": per_node})
    }

    /// A routing decision, term by term.
    pub(super) fn decision(&self, explained: &Explanation, decision: &Decision) -> Value {
        let name = |node: NodeId| explained.nodes.iter().find(|n| n.node == node).map(|n| n.name.clone());
        let alternatives: Vec<Value> = decision
            .alternatives
            .iter()
            .map(|(prefill, decode, us)| json!({"prefill": name(*prefill), "decode": decode.and_then(name), "total_us": us}))
            .collect();
        let cost = &decision.cost;
        json!({
            "prompt_tokens": explained.prompt_tokens,
            "prefill": name(decision.prefill),
            "decode": decision.decode.and_then(name),
            "prefill_cached_blocks": decision.prefill_cached_blocks,
            "decode_cached_blocks": decision.decode_cached_blocks,
            "cost": {
                "total_us": cost.total_us(),
                "queue_us": cost.queue_us,
                "prefill_us": cost.prefill_us,
                "tail_us": cost.tail_us,
                "wait_us": cost.wait_us,
                "decode_us": cost.decode_us,
                "harm_us": cost.harm_us,
                "slo_us": cost.slo_us,
                "ttft_us": cost.ttft_us,
            },
            "alternatives": alternatives,
        })
    }
}
