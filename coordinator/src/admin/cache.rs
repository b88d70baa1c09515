//! What operators do to caches: pin and unpin, evict, verify, and which beginnings of prompts are asked for most.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use millrace_core::cluster::{PolicyAnswer, PolicyCommand};
use millrace_core::ids::{BlockHash, Epoch, NodeId};
use millrace_core::message::{CacheResult, CacheTask, Evict, EvictCount, Verified};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Admin, MEMBER_WAIT_MAX, Text};
use crate::dispatch::DEFAULT_TENANT;
use crate::orders::OrderError;

/// How long a node may take to drop blocks.
const EVICT_WAIT_MAX: Duration = Duration::from_secs(5);
/// How long a node may take to read all of its idle blocks.
const VERIFY_WAIT_MAX: Duration = Duration::from_secs(7);
/// How often a node's names are compared with the index while both move.
const COMPARISONS_MAX: usize = 40;
/// Pause between two comparisons.
const COMPARE_PAUSE: Duration = Duration::from_millis(50);
/// Prefixes that one replica names.
const PREFIXES_MAX: usize = 256;

/// A question or change. Its JSON has `"op"`: the variant in snake case.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub(super) enum CacheQuery {
    Pin {
        #[serde(flatten)]
        text: Text,
        label: Option<String>,
        ttl_s: Option<u64>,
    },
    Unpin {
        pin: u64,
    },
    Pins,
    Evict {
        #[serde(flatten)]
        text: Text,
        #[serde(default)]
        all: bool,
        node: Option<String>,
        #[serde(default)]
        dry_run: bool,
    },
    Verify {
        node: Option<String>,
    },
    TopPrefixes {
        limit: Option<usize>,
        /// Only what this replica was asked for.
        #[serde(default)]
        own: bool,
    },
}

/// A node that is ordered: its name, number and incarnation.
type Target = (String, (NodeId, Epoch));

impl Admin {
    pub(super) async fn cache(&self, query: CacheQuery) -> Result<Value, String> {
        match query {
            CacheQuery::Pin { text, label, ttl_s } => self.pin(&text, label, ttl_s).await,
            CacheQuery::Unpin { pin } => {
                self.change(PolicyCommand::Unpin { pin }).await?;
                Ok(json!({"pin": pin, "pinned": false}))
            }
            CacheQuery::Pins => Ok(self.pins()),
            CacheQuery::Evict { text, all, node, dry_run } => {
                let what = self.evicted(&text, all)?;
                let (nodes, dropped) = self.evict_on(node.as_deref(), CacheTask::Evict { what, dry_run }).await?;
                Ok(json!({"dry_run": dry_run, "dropped": dropped, "nodes": nodes}))
            }
            CacheQuery::Verify { node } => self.verify(node.as_deref()).await,
            CacheQuery::TopPrefixes { limit, own } => Ok(self.top_prefixes(limit.unwrap_or(20), own).await),
        }
    }

    fn names(&self, text: &Text) -> Result<Vec<BlockHash>, String> {
        let tenant = text.tenant.as_deref().unwrap_or(DEFAULT_TENANT);
        if self.proposer.cluster.read().tenant(tenant).is_none() {
            return Err(format!("not found: tenant {tenant:?}"));
        }
        let tokens = self.tokens(text).map_err(|reason| format!("usage: {reason}"))?;
        self.dispatcher.block_names(tenant, &tokens).map_err(|e| e.to_string())
    }

    async fn pin(&self, text: &Text, label: Option<String>, ttl_s: Option<u64>) -> Result<Value, String> {
        let (names, tenant) = (self.names(text)?, text.tenant.clone().unwrap_or_else(|| DEFAULT_TENANT.into()));
        let blocks = names.len();
        let ttl_us = ttl_s.map(|ttl| ttl.saturating_mul(1_000_000));
        let label = label.unwrap_or_default();
        match self.change(PolicyCommand::Pin { tenant: tenant.clone(), label, names: names.clone(), ttl_us }).await? {
            PolicyAnswer::Pinned { pin } => {
                Ok(json!({"pin": pin, "pinned": true, "tenant": tenant, "blocks": blocks, "nodes": self.held(&names)}))
            }
            other => Err(format!("unexpected answer {other:?}")),
        }
    }

    fn pins(&self) -> Value {
        let cluster = self.proposer.cluster.read();
        let now_us = cluster.now_us();
        let pins: Vec<_> = cluster.policy().pins().map(|(id, pin)| (id, pin.clone())).collect();
        drop(cluster);
        let pins = pins.into_iter().map(|(id, pin)| {
            let ends_in_s = pin.until_us.map(|until| until.saturating_sub(now_us).div_ceil(1_000_000));
            json!({
                "pin": id, "tenant": pin.tenant, "label": pin.label, "blocks": pin.names.len(), "ends_in_s": ends_in_s,
                "nodes": self.held(&pin.names),
            })
        });
        json!({"pins": pins.collect::<Vec<_>>()})
    }

    /// Which nodes hold how many of these leading blocks, by the index.
    fn held(&self, names: &[BlockHash]) -> Vec<Value> {
        let cluster = self.proposer.cluster.read();
        let held = cluster.holders().prefix_lengths(names).into_iter().filter(|(_, blocks)| *blocks > 0);
        held.map(|(node, blocks)| json!({"name": cluster.node(node).map(|n| n.name.clone()), "blocks": blocks})).collect()
    }

    fn evicted(&self, text: &Text, all: bool) -> Result<Evict, String> {
        let prompt = text.tokens.is_some() || text.text.is_some() || text.messages.is_some();
        match (&text.tenant, prompt, all) {
            (None, false, true) => Ok(Evict::All),
            (Some(tenant), false, false) => {
                let key = self.proposer.cluster.read().tenant(tenant).copied();
                key.map(|key| Evict::Owner(key.owner())).ok_or_else(|| format!("not found: tenant {tenant:?}"))
            }
            (_, true, false) => Ok(Evict::Prompt(self.names(text)?)),
            _ => Err("usage: what to evict: a prompt, a tenant, or all".into()),
        }
    }

    /// The live nodes, or the one that is named.
    fn targets(&self, only: Option<&str>) -> Result<Vec<Target>, String> {
        let cluster = self.proposer.cluster.read();
        let wanted = |name: &str| only.is_none_or(|only| only == name);
        let alive = cluster.nodes().filter(|n| n.state.alive() && wanted(&n.name));
        let targets: Vec<Target> = alive.map(|n| (n.name.clone(), (n.node, n.epoch))).collect();
        match only.filter(|_| targets.is_empty()) {
            Some(name) => Err(format!("not found: no live node {name:?}")),
            None => Ok(targets),
        }
    }

    async fn order(&self, to: (NodeId, Epoch), task: CacheTask, wait: Duration) -> Result<CacheResult, OrderError> {
        let nodes = &self.proposer.nodes;
        nodes.orders.give(nodes, to, task, wait).await
    }

    /// Has blocks dropped; what each node says, and how many went in all.
    pub(super) async fn evict_on(&self, only: Option<&str>, task: CacheTask) -> Result<(Vec<Value>, u64), String> {
        let orders = self.targets(only)?.into_iter().map(|(name, who)| {
            let task = task.clone();
            async move { (name, self.order(who, task, EVICT_WAIT_MAX).await) }
        });
        let mut dropped = 0;
        let said = join_all(orders).await.into_iter().map(|(name, result)| match result {
            Ok(CacheResult::Evicted(EvictCount { dropped: here, kept, pinned })) => {
                dropped += u64::from(here);
                json!({"name": name, "dropped": here, "kept": kept, "pinned": pinned})
            }
            Ok(other) => json!({"name": name, "error": format!("unexpected report {other:?}")}),
            Err(error) => json!({"name": name, "error": error.to_string()}),
        });
        let nodes = said.collect();
        Ok((nodes, dropped))
    }

    async fn verify(&self, only: Option<&str>) -> Result<Value, String> {
        let looks = self.targets(only)?.into_iter().map(|(name, who)| async move { (self.verify_one(who).await, name) });
        let mut clean = true;
        let said = join_all(looks).await.into_iter().map(|(result, name)| {
            let mut said = result.unwrap_or_else(|error| json!({"error": error.to_string(), "clean": false}));
            clean &= said["clean"] == true;
            said["name"] = json!(name);
            said
        });
        let nodes: Vec<Value> = said.collect();
        Ok(json!({"clean": clean, "nodes": nodes}))
    }

    async fn verify_one(&self, who: (NodeId, Epoch)) -> Result<Value, OrderError> {
        let CacheResult::Verified(found) = self.order(who, CacheTask::Verify, VERIFY_WAIT_MAX).await? else {
            return Err(OrderError::Refused);
        };
        let names = self.compare(who.0, &found).await;
        let damaged: Vec<String> = found.damaged_names.iter().map(ToString::to_string).collect();
        Ok(json!({
            "names": names, "clean": names != "differ" && found.damaged == 0, "blocks": found.blocks, "sound": found.sound,
            "recorded": found.recorded, "busy": found.busy, "damaged": found.damaged, "damaged_names": damaged,
        }))
    }

    /// Whether the index knows the names that the node has: `equal`, `differ`, or `moving` when they never stood still together.
    async fn compare(&self, node: NodeId, found: &Verified) -> &'static str {
        let Some(settled) = found.settled_seq else { return "moving" };
        for _ in 0..COMPARISONS_MAX {
            let Some(tally) = self.proposer.cluster.read().holders().tally(node) else { return "moving" };
            if tally.refused > 0 || tally.seq > settled {
                return "moving";
            }
            if tally.seq == settled {
                let same = (tally.blocks, tally.digest) == (found.blocks, found.names_digest);
                return if same { "equal" } else { "differ" };
            }
            tokio::time::sleep(COMPARE_PAUSE).await;
        }
        "moving"
    }

    async fn top_prefixes(&self, limit: usize, own: bool) -> Value {
        let mut all = vec![self.asked_here()];
        if !own {
            let query = json!({"q": "cache", "op": "top_prefixes", "own": true, "limit": PREFIXES_MAX}).to_string();
            let others = self.proposer.roster.others();
            let asked = others.keys().map(|id| self.proposer.replicas.query(*id, query.clone(), MEMBER_WAIT_MAX));
            for text in join_all(asked).await.into_iter().flatten() {
                let answer: Value = serde_json::from_str(&text).unwrap_or_default();
                all.push(answer["prefixes"].as_array().cloned().unwrap_or_default());
            }
        }
        let (gateways, mut prefixes) = (all.len(), sum(all));
        prefixes.truncate(limit.min(PREFIXES_MAX));
        json!({"gateways": gateways, "prefixes": prefixes})
    }

    fn asked_here(&self) -> Vec<Value> {
        let block_tokens = u64::from(self.dispatcher.model().layout.block_tokens);
        let cluster = self.proposer.cluster.read();
        let prefix = |asked: crate::dispatch::Asked| {
            let holders = cluster.holders().prefix_lengths(&[asked.name]).into_iter().filter(|(_, blocks)| *blocks > 0);
            let holders: Vec<String> = holders.filter_map(|(node, _)| cluster.node(node).map(|n| n.name.clone())).collect();
            json!({
                "prefix": asked.name.to_string(), "tenant": asked.tenant, "blocks": asked.blocks,
                "tokens": u64::from(asked.blocks) * block_tokens, "count": asked.count, "error": asked.error, "holders": holders,
            })
        };
        self.dispatcher.asked(PREFIXES_MAX).into_iter().map(prefix).collect()
    }
}

/// The counts of several gateways together, the most frequent first.
fn sum(all: Vec<Vec<Value>>) -> Vec<Value> {
    let mut by_name: BTreeMap<String, Value> = BTreeMap::new();
    for one in all.into_iter().flatten() {
        let name = one["prefix"].as_str().unwrap_or_default().to_owned();
        let Some(known) = by_name.get_mut(&name) else {
            by_name.insert(name, one);
            continue;
        };
        for field in ["count", "error"] {
            known[field] = json!(known[field].as_u64().unwrap_or(0).saturating_add(one[field].as_u64().unwrap_or(0)));
        }
    }
    let mut prefixes: Vec<Value> = by_name.into_values().collect();
    prefixes.sort_by_key(|one| std::cmp::Reverse(one["count"].as_u64()));
    prefixes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateways_are_summed() {
        let one = |prefix: &str, count: u64| json!({"prefix": prefix, "count": count, "error": 1, "blocks": 2});
        let prefixes = sum(vec![vec![one("a", 5), one("b", 7)], vec![one("a", 4)]]);
        assert_eq!((&prefixes[0]["prefix"], &prefixes[0]["count"], &prefixes[0]["error"]), (&json!("a"), &json!(9), &json!(2)));
        assert_eq!(prefixes[1]["count"], 7);
    }
}
