//! The admin interface: a JSON query in, a JSON answer out. `millctl` asks it over a link, replicas ask each other.
//!
//! It answers without a quorum too, from what this replica has applied, and says what it cannot know: `stale` is true when
//! no quorum vouches for the state, and a member that cannot be asked has `reachable: false` and no term.

mod cache;
mod config;
mod health;
mod members;
mod route;
mod snapshot;
mod tenants;
mod view;

use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_checkpoint::Checkpoint;
use millrace_core::cluster::{Answer, Command, NodeState, PolicyAnswer, PolicyCommand, PolicyError};
use millrace_core::ids::{ReplicaId, TokenId};
use serde::Deserialize;
use serde_json::{Value, json};

use self::health::Refusals;
use crate::config::Config;
use crate::dispatch::{DEFAULT_TENANT, Dispatcher, Explanation};
use crate::propose::{NoAnswer, Proposer};

/// How long a member may take to say how it is.
pub const MEMBER_WAIT_MAX: Duration = Duration::from_millis(500);
/// Bytes of a query.
pub const QUERY_BYTES_MAX: usize = 8 << 20;
/// Tokens of an answer that `route_explain` assumes.
const EXPLAIN_MAX_NEW: u32 = 256;

/// What is asked, and how old the answer may be.
#[derive(Debug, Deserialize)]
struct Question {
    /// All that was acknowledged before the question is in the answer; without a quorum there is none then.
    #[serde(default)]
    fresh: bool,
    #[serde(flatten)]
    query: Query,
}

/// A query. Its JSON has `"q"`: the variant in snake case.
#[derive(Debug, Deserialize)]
#[serde(tag = "q", rename_all = "snake_case")]
enum Query {
    Status,
    /// One replica about itself; asked by the others for `Status`.
    Member,
    CacheLookup(Text),
    CacheStat,
    RouteExplain(Text),
    RouteDecisions(route::Which),
    /// Cordon, drain or readmit a node.
    SetState {
        node: String,
        state: String,
    },
    Tenants(tenants::TenantQuery),
    Config(config::ConfigQuery),
    Cache(cache::CacheQuery),
    Snapshot(snapshot::SnapshotQuery),
    MembersList,
    /// Changes the members or the leader.
    Members {
        #[serde(flatten)]
        op: members::MembersOp,
        /// A replica that does not lead has passed it on.
        #[serde(default)]
        passed_on: bool,
    },
}

/// A prompt in one of three forms.
#[derive(Debug, Deserialize)]
struct Text {
    tokens: Option<Vec<TokenId>>,
    text: Option<String>,
    messages: Option<Value>,
    tenant: Option<String>,
    max_new: Option<u32>,
}

/// Answers queries.
pub struct Admin {
    config: Config,
    proposer: Proposer,
    dispatcher: Dispatcher,
    checkpoint: Arc<Checkpoint>,
    /// Where our gateway listens.
    http: String,
    saves: snapshot::Saves,
    refusals: Refusals,
}

/// A command that did not get into the log, for the operator. The first word of a refusal is `millctl`'s exit code.
fn no_answer(error: &NoAnswer) -> String {
    format!("unavailable: {error}")
}

/// A refusal of the log, for the operator.
fn refusal(error: &PolicyError) -> String {
    let word = match error {
        PolicyError::NotFound(_) => "not found",
        PolicyError::Conflict(_) | PolicyError::Full(_) => "conflict",
        PolicyError::Invalid(_) => "usage",
    };
    format!("{word}: {error}")
}

impl Admin {
    /// An admin interface over one replica; `http` is where its gateway listens.
    #[must_use]
    pub fn new(config: Config, proposer: Proposer, dispatcher: Dispatcher, checkpoint: Arc<Checkpoint>, http: String) -> Self {
        let (saves, refusals) = (snapshot::Saves::default(), Refusals::default());
        Self { config, proposer, dispatcher, checkpoint, http, saves, refusals }
    }

    /// Answers a query.
    ///
    /// # Errors
    /// For the operator: what is wrong with the query, or what cannot be done.
    pub async fn query(&self, json: &str) -> Result<String, String> {
        if json.len() > QUERY_BYTES_MAX {
            return Err(format!("a query may have {QUERY_BYTES_MAX} bytes"));
        }
        let Question { fresh, query } = serde_json::from_str(json).map_err(|e| format!("query: {e}"))?;
        if fresh {
            self.freshen().await?;
        }
        let answer = match query {
            Query::Status => self.status_as(fresh).await,
            Query::MembersList => self.members_list(fresh).await,
            Query::Members { op, passed_on } => self.members_op(&op, passed_on).await?,
            Query::Member => self.member(),
            Query::CacheLookup(text) => self.cache_lookup(&text)?,
            Query::CacheStat => self.cache_stat(),
            Query::RouteExplain(text) => self.route_explain(&text)?,
            Query::RouteDecisions(which) => self.route_decisions(&which).await?,
            Query::SetState { node, state } => self.set_state(&node, &state).await?,
            Query::Tenants(query) => self.tenants(query).await?,
            Query::Config(query) => self.settings(query).await?,
            Query::Cache(query) => self.cache(query).await?,
            Query::Snapshot(query) => self.snapshot(query).await?,
        };
        Ok(answer.to_string())
    }

    async fn status(&self) -> Value {
        let mut asked: Vec<(ReplicaId, tokio::task::JoinHandle<Option<Value>>)> = Vec::new();
        for id in self.proposer.roster.others().into_keys() {
            let replicas = self.proposer.replicas.clone();
            let ask = async move {
                let answer = replicas.query(id, json!({"q": "member"}).to_string(), MEMBER_WAIT_MAX).await;
                answer.ok().and_then(|text| serde_json::from_str(&text).ok())
            };
            asked.push((id, tokio::spawn(ask)));
        }
        let mut members = vec![self.member()];
        for (id, answer) in asked {
            let answer = answer.await.ok().flatten();
            members.push(answer.unwrap_or_else(|| self.absent_member(id)));
        }
        members.sort_by_key(|m| m["id"].as_u64());
        self.status_of(members, Instant::now())
    }

    async fn set_state(&self, name: &str, state: &str) -> Result<Value, String> {
        let states = [NodeState::Up, NodeState::Cordoned, NodeState::Draining];
        let state = states.into_iter().find(|s| s.as_str() == state).ok_or("usage: state: up, cordoned or draining")?;
        let node =
            self.proposer.cluster.read().node_named(name).map(|n| n.node).ok_or_else(|| format!("not found: node {name:?}"))?;
        match self.proposer.propose(&Command::SetState { node, state }).await {
            Ok(Answer::Done) => Ok(json!({"node": name, "state": state.as_str()})),
            Ok(Answer::Refused(reason)) => Err(format!("conflict: {reason}")),
            Ok(other) => Err(format!("unexpected answer {other:?}")),
            Err(error) => Err(no_answer(&error)),
        }
    }

    /// Puts a change of policy into the log.
    async fn change(&self, command: PolicyCommand) -> Result<PolicyAnswer, String> {
        match self.proposer.propose(&Command::Policy(command)).await {
            Ok(Answer::Policy(PolicyAnswer::Refused(error))) => Err(refusal(&error)),
            Ok(Answer::Policy(answer)) => Ok(answer),
            Ok(other) => Err(format!("unexpected answer {other:?}")),
            Err(error) => Err(no_answer(&error)),
        }
    }

    fn tokens(&self, text: &Text) -> Result<Vec<TokenId>, String> {
        let codec = || {
            let absent = || self.checkpoint.text_absent().unwrap_or("the model has no tokenizer").to_owned();
            self.checkpoint.text.as_ref().ok_or_else(absent)
        };
        match text {
            Text { tokens: Some(tokens), text: None, messages: None, .. } => Ok(tokens.clone()),
            Text { tokens: None, text: Some(text), messages: None, .. } => codec()?.encode(text).map_err(|e| e.to_string()),
            Text { tokens: None, text: None, messages: Some(messages), .. } => {
                codec()?.encode_chat(messages).map(|(_, tokens)| tokens).map_err(|e| e.to_string())
            }
            _ => Err("exactly one of tokens, text and messages".into()),
        }
    }

    fn explain(&self, text: &Text) -> Result<Explanation, String> {
        let tenant = text.tenant.as_deref().unwrap_or(DEFAULT_TENANT);
        let max_new = text.max_new.unwrap_or(EXPLAIN_MAX_NEW);
        self.dispatcher.explain(tenant, &self.tokens(text)?, max_new).map_err(|e| e.to_string())
    }

    fn cache_lookup(&self, text: &Text) -> Result<Value, String> {
        let explained = self.explain(text)?;
        let nodes: Vec<Value> = explained
            .nodes
            .iter()
            .map(|n| {
                let cached_tokens = n.cached_blocks as usize * explained.block_tokens;
                json!({"name": n.name, "cached_blocks": n.cached_blocks, "cached_tokens": cached_tokens})
            })
            .collect();
        Ok(json!({
            "prompt_tokens": explained.prompt_tokens,
            "block_tokens": explained.block_tokens,
            "blocks": explained.blocks,
            "nodes": nodes,
        }))
    }
}
