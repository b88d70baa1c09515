//! Questions about routing: where a prompt would go and why, and what the last decisions were and became.

use millrace_core::ids::{NodeId, ReplicaId, RequestId};
use millrace_core::route::{Breakdown, Decision};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Admin, MEMBER_WAIT_MAX, Text};
use crate::dispatch::Explanation;
use crate::dispatch::decisions::{Observed, Record};

/// Decisions that one answer may hold.
pub const DECISIONS_LISTED_MAX: usize = 1000;
/// Decisions when a query names no limit.
const DECISIONS_LISTED: usize = 20;

/// Which decisions.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Which {
    /// Only what changed after this time, milliseconds since 1970: with the last answer's `until`, a poll sees each change.
    since: Option<u64>,
    /// The newest so many; at most [`DECISIONS_LISTED_MAX`].
    limit: Option<usize>,
    /// Only of this request, 32 hexadecimal digits, with or without what the API puts before them.
    request: Option<String>,
    /// Only of the gateway that is asked, not of all.
    #[serde(default)]
    here: bool,
}

impl Admin {
    pub(super) fn route_explain(&self, text: &Text) -> Result<Value, String> {
        let explained = self.explain(text)?;
        let decision = explained.decision.as_ref().map_err(ToString::to_string)?;
        Ok(self.explanation(&explained, decision))
    }

    fn explanation(&self, explained: &Explanation, decision: &Decision) -> Value {
        let name = |node: NodeId| {
            let known = explained.nodes.iter().find(|n| n.node == node).map(|n| n.name.clone());
            known.unwrap_or_else(|| node.to_string())
        };
        let mut answer = decided(decision, &name);
        answer.insert("prompt_tokens".into(), json!(explained.prompt_tokens));
        answer.insert("hot".into(), hot(explained.hot));
        answer.insert("gateway".into(), json!(self.config.args.name));
        Value::Object(answer)
    }

    /// The decisions of every gateway that answers, oldest first; `missing` names those that do not.
    pub(super) async fn route_decisions(&self, which: &Which) -> Result<Value, String> {
        let limit = which.limit.unwrap_or(DECISIONS_LISTED).min(DECISIONS_LISTED_MAX);
        let (mut decisions, mut missing) = (self.own_decisions(which, limit)?, Vec::new());
        if !which.here {
            for (id, theirs) in self.others_decisions(which, limit).await {
                match theirs {
                    Some(theirs) => decisions.extend(theirs),
                    None => missing.push(self.config.replica_name(id)),
                }
            }
        }
        decisions.sort_by_key(|d| (d["at_ms"].as_u64(), d["gateway"].as_str().map(str::to_owned), d["no"].as_u64()));
        decisions.drain(..decisions.len().saturating_sub(limit));
        let until = decisions.iter().filter_map(|d| d["changed_ms"].as_u64()).max().or(which.since).unwrap_or(0);
        Ok(json!({"until": until, "missing": missing, "decisions": decisions}))
    }

    fn own_decisions(&self, which: &Which, limit: usize) -> Result<Vec<Value>, String> {
        let request = which.request.as_deref().map(request_id).transpose()?;
        let records = self.dispatcher.decisions().list(which.since.unwrap_or(0), limit, request);
        let cluster = self.proposer.cluster.read();
        let name = |node: NodeId| cluster.node(node).map_or_else(|| node.to_string(), |n| n.name.clone());
        Ok(records.iter().map(|record| self.recorded(record, &name)).collect())
    }

    async fn others_decisions(&self, which: &Which, limit: usize) -> Vec<(ReplicaId, Option<Vec<Value>>)> {
        let query = json!({"q": "route_decisions", "here": true, "since": which.since, "limit": limit, "request": which.request});
        let ask = |id: ReplicaId| {
            let (replicas, query) = (self.proposer.replicas.clone(), query.to_string());
            async move {
                let text = replicas.query(id, query, MEMBER_WAIT_MAX).await.ok()?;
                let answer: Value = serde_json::from_str(&text).ok()?;
                answer["decisions"].as_array().cloned()
            }
        };
        let asked: Vec<_> = self.proposer.roster.others().into_keys().map(|id| (id, tokio::spawn(ask(id)))).collect();
        let mut answers = Vec::with_capacity(asked.len());
        for (id, answer) in asked {
            answers.push((id, answer.await.ok().flatten()));
        }
        answers
    }

    fn recorded(&self, record: &Record, name: &impl Fn(NodeId) -> String) -> Value {
        let mut answer = match &record.placed {
            Ok(decision) => decided(decision, name),
            Err(reason) => Map::from_iter([("refused".to_owned(), json!(reason.to_string()))]),
        };
        answer.insert("no".into(), json!(record.no));
        answer.insert("gateway".into(), json!(self.config.args.name));
        answer.insert("at_ms".into(), json!(record.at_ms));
        answer.insert("changed_ms".into(), json!(record.changed_ms));
        answer.insert("request".into(), json!(RequestId(record.answer).to_string()));
        answer.insert("attempt".into(), json!(record.attempt.attempt));
        answer.insert("prompt_tokens".into(), json!(record.tokens));
        answer.insert("max_new".into(), json!(record.max_new));
        answer.insert("hot".into(), hot(record.hot));
        answer.insert("observed".into(), observed(&record.observed));
        Value::Object(answer)
    }
}

/// The id in `chatcmpl-…`, `cmpl-…` or by itself.
fn request_id(text: &str) -> Result<RequestId, String> {
    let digits = text.rsplit('-').next().unwrap_or(text);
    let id = u128::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 32);
    id.map(RequestId).ok_or_else(|| format!("usage: {text:?} is not a request's id: 32 hexadecimal digits"))
}

fn decided(decision: &Decision, name: &impl Fn(NodeId) -> String) -> Map<String, Value> {
    let alternative = |other: &millrace_core::route::Alternative| {
        let (prefill, decode) = (name(other.prefill), other.decode.map(name));
        json!({"prefill": prefill, "decode": decode, "total_us": other.cost.total_us(), "cost": cost(&other.cost)})
    };
    let fields = json!({
        "prefill": name(decision.prefill),
        "decode": decision.decode.map(name),
        "prefill_cached_blocks": decision.prefill_cached_blocks,
        "decode_cached_blocks": decision.decode_cached_blocks,
        "cost": cost(&decision.cost),
        "reason": reason(decision, name),
        "correction": {
            "prefill": factor(decision.prefill_speed.correction.prefill),
            "handover": factor(decision.prefill_speed.correction.handover),
            "step": factor(decision.decode_speed.correction.step),
        },
        "alternatives": decision.alternatives.iter().map(alternative).collect::<Vec<_>>(),
    });
    match fields {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

fn factor(ratio: millrace_core::route::correct::Ratio) -> f64 {
    ratio.in_1024ths() as f64 / 1024.0
}

/// Terms in the order in which they add up to the total; `spread` is taken off.
fn cost(cost: &Breakdown) -> Value {
    let mut fields = Map::from_iter([("total_us".to_owned(), json!(cost.total_us()))]);
    for (term, us) in cost.terms() {
        let value = if term == "spread" { json!(-(us.min(i64::MAX as u64) as i64)) } else { json!(us) };
        fields.insert(format!("{term}_us"), value);
    }
    fields.insert("ttft_us".into(), json!(cost.ttft_us));
    fields.insert("tpot_us".into(), json!(cost.tpot_us));
    Value::Object(fields)
}

fn hot(hot: Option<millrace_core::route::hot::Hot>) -> Value {
    hot.map_or(Value::Null, |hot| json!({"blocks": hot.blocks, "requests": hot.requests}))
}

fn observed(observed: &Observed) -> Value {
    json!({
        "outcome": observed.outcome.map(|outcome| outcome.as_str()),
        "cached_tokens": observed.cached_tokens,
        "queue_us": observed.queue_us,
        "compute_us": observed.compute_us,
        "ttft_us": observed.ttft_us,
        "had_blocks": observed.had_blocks,
        "exposed_us": observed.exposed_us,
        "tpot_us": observed.tpot_us,
        "tokens": observed.tokens,
    })
}

/// Why this plan, in words.
fn reason(decision: &Decision, name: &impl Fn(NodeId) -> String) -> String {
    let mut words = match decision.alternatives.first() {
        None => "the only possible plan".to_owned(),
        Some(_) if decision.ties > 1 => {
            format!("one of {} plans that cost as good as the same, drawn by the request's seed", decision.ties)
        }
        Some(next) => {
            let more_us = next.cost.total_us().saturating_sub(decision.cost.total_us());
            let plan = match next.decode {
                None => format!("{} alone", name(next.prefill)),
                Some(decode) => format!("{} with {}", name(next.prefill), name(decode)),
            };
            format!("cheapest: {plan} would cost {} ms more{}", tenths_ms(more_us), mostly(&decision.cost, &next.cost))
        }
    };
    if decision.decode.is_none() {
        words += "; the prompt is computed where it is decoded, without a hand-over";
    }
    if decision.cost.spread_us > 0 {
        words += &format!("; {} ms are taken off to make a copy of a hot prefix", tenths_ms(decision.cost.spread_us));
    }
    if decision.exclusion_ignored {
        words += "; only nodes that failed this request before are left";
    }
    words
}

/// The term in which `next` is dearest.
fn mostly(chosen: &Breakdown, next: &Breakdown) -> String {
    let gaps = chosen.terms().into_iter().zip(next.terms()).take(7);
    let worst = gaps.map(|((term, a), (_, b))| (b.saturating_sub(a), term)).max();
    worst.filter(|(gap, _)| *gap > 0).map_or_else(String::new, |(gap, term)| format!(", {} ms of it more {term}", tenths_ms(gap)))
}

fn tenths_ms(us: u64) -> String {
    format!("{}.{}", us / 1000, us % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use millrace_core::route::{Alternative, Speed};

    use super::*;

    fn decision() -> Decision {
        let cost = Breakdown { prefill_us: 40_000, tail_us: 5_000, ..Breakdown::default() };
        let next = Breakdown { queue_us: 90_000, ..cost };
        Decision {
            prefill: NodeId(1),
            decode: Some(NodeId(2)),
            prefill_cached_blocks: 7,
            decode_cached_blocks: 0,
            cost,
            prefill_speed: Speed::default(),
            decode_speed: Speed::default(),
            ties: 1,
            alternatives: vec![Alternative { prefill: NodeId(3), decode: None, cost: next }],
            exclusion_ignored: false,
        }
    }

    #[test]
    fn a_reason_names_the_next_best_and_what_is_wrong_with_it() {
        let words = |decision: &Decision| reason(decision, &|node| format!("n{node}"));
        let cheapest = words(&decision());
        assert_eq!(cheapest, "cheapest: n3 alone would cost 90.0 ms more, 90.0 ms of it more queue");
        let tied = words(&Decision { ties: 3, decode: None, ..decision() });
        assert!(tied.starts_with("one of 3 plans that cost") && tied.contains("without a hand-over"), "{tied}");
        let mut spread = Decision { alternatives: vec![], exclusion_ignored: true, ..decision() };
        spread.cost.spread_us = 12_345;
        let spread = words(&spread);
        assert!(spread.starts_with("the only possible plan") && spread.contains("12.3 ms are taken off"), "{spread}");
        assert!(spread.ends_with("failed this request before are left"), "{spread}");
    }

    #[test]
    fn terms_add_up_as_they_are_printed() {
        let value = cost(&Breakdown { spread_us: 30_000, ..decision().cost });
        let terms = ["queue", "prefill", "tail", "wait", "decode", "harm", "slo", "spread"];
        let sum: i64 = terms.iter().filter_map(|term| value[format!("{term}_us")].as_i64()).sum();
        assert_eq!((value["total_us"].as_i64(), value["spread_us"].as_i64()), (Some(sum), Some(-30_000)));
    }

    #[test]
    fn a_request_is_named_as_the_api_names_it() {
        let digits = "000000000000000000000000000000ff";
        assert_eq!(request_id(digits), Ok(RequestId(255)));
        assert_eq!(request_id(&format!("chatcmpl-{digits}")), Ok(RequestId(255)));
        assert!(request_id("ff").unwrap_err().starts_with("usage:"));
        assert!(request_id("").is_err());
    }
}
