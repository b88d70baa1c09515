//! `millctl tenants`: whose requests there are, their API keys and limits.
//!
//! API keys are made here, from the system's randomness, and shown once: only a digest leaves this process.

use anyhow::Result;
use clap::{Args, Subcommand};
use millrace_core::cluster::ApiKeyDigest;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::exit::Exit;
use super::output::{Answer, Ask, Change, Line};
use super::table::{Cell, Column, Page, cell, column};

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Tenants {
    /// All tenants
    #[command(after_help = "Example:\n  millctl tenants list")]
    List(Ask),
    /// One tenant
    #[command(after_help = "Example:\n  millctl tenants show acme -o yaml")]
    Show(Shown),
    /// Make a tenant and its first API key, which is shown once
    #[command(after_help = "Example:\n  millctl tenants create acme --running-max 64 --prompt-tokens-per-minute 1000000")]
    Create(Create),
    /// Change a tenant's limits; what is not named stays
    #[command(after_help = "Example:\n  millctl tenants set acme --answer-tokens-max 4096")]
    Set(Set),
    /// Make a new API key for a tenant, which is shown once; the old ones end
    #[command(after_help = "Example:\n  millctl tenants rotate-key acme --keep")]
    RotateKey(Rotate),
    /// Delete a tenant: its keys end, its requests end, its cached blocks cannot be found any more
    #[command(after_help = "Example:\n  millctl tenants delete acme --yes")]
    Delete(Delete),
}

/// Which tenant.
#[derive(Args, Clone, Debug)]
pub struct Shown {
    /// The tenant's name
    name: String,
    #[command(flatten)]
    ask: Ask,
}

/// Limits that each gateway holds.
#[derive(Args, Clone, Debug)]
pub struct Limits {
    /// Requests running at a time on each gateway; 0 for no limit
    #[arg(long)]
    running_max: Option<u32>,
    /// Prompt tokens in a minute on each gateway; 0 for no limit
    #[arg(long)]
    prompt_tokens_per_minute: Option<u64>,
    /// Tokens of one answer; 0 for no limit
    #[arg(long)]
    answer_tokens_max: Option<u32>,
}

/// A tenant to make.
#[derive(Args, Clone, Debug)]
pub struct Create {
    /// The tenant's name: a-z, 0-9, -, _ and .
    name: String,
    #[command(flatten)]
    limits: Limits,
    /// Make no API key yet
    #[arg(long)]
    no_key: bool,
    #[command(flatten)]
    change: Change,
}

/// A tenant to change.
#[derive(Args, Clone, Debug)]
pub struct Set {
    /// The tenant's name
    name: String,
    #[command(flatten)]
    limits: Limits,
    #[command(flatten)]
    change: Change,
}

/// A tenant to give a new key.
#[derive(Args, Clone, Debug)]
pub struct Rotate {
    /// The tenant's name
    name: String,
    /// Let the older keys go on; up to four are valid at a time
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    change: Change,
}

/// A tenant to delete.
#[derive(Args, Clone, Debug)]
pub struct Delete {
    /// The tenant's name
    name: String,
    /// Really
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    change: Change,
}

/// Runs one.
///
/// # Errors
/// The cluster does not answer, or refuses.
pub async fn run(command: Tenants) -> Result<()> {
    match command {
        Tenants::List(ask) => ask.show::<List>(json!({"q": "tenants", "op": "list"})).await.map(drop),
        Tenants::Show(Shown { name, ask }) => {
            ask.show::<Tenant>(json!({"q": "tenants", "op": "show", "name": name})).await.map(drop)
        }
        Tenants::Create(Create { name, limits, no_key, change }) => {
            let mut query = json!({"q": "tenants", "op": "create", "name": name});
            limits.write(&mut query);
            keyed(&change, &format!("make the tenant {name}"), query, !no_key).await
        }
        Tenants::Set(Set { name, limits, change }) => {
            let mut query = json!({"q": "tenants", "op": "set", "name": name});
            limits.write(&mut query);
            change.apply::<Tenant>(&format!("change the limits of {name}"), query).await.map(drop)
        }
        Tenants::RotateKey(Rotate { name, keep, change }) => {
            let query = json!({"q": "tenants", "op": "rotate_key", "name": name, "keep": keep});
            keyed(&change, &format!("make a new key for {name}"), query, true).await
        }
        Tenants::Delete(Delete { name, yes, change }) => {
            if !yes && !change.dry_run {
                let hint = format!("millctl tenants delete {name} --yes");
                return Err(Exit::Usage.hinted(format!("deleting {name} ends its keys and its requests"), hint));
            }
            let query = json!({"q": "tenants", "op": "delete", "name": name});
            change.apply::<Deleted>(&format!("delete the tenant {name}"), query).await.map(drop)
        }
    }
}

/// Asks for a change that comes with a fresh API key, and shows the key with the answer.
async fn keyed(change: &Change, plan: &str, mut query: Value, with_key: bool) -> Result<()> {
    if change.dry_run {
        return change.plan(plan);
    }
    let key = with_key.then(new_key);
    if let Some(key) = &key {
        query["api_key"] = json!(hex(&ApiKeyDigest::of(key).0));
    }
    let mut line = Line::open(&change.which)?;
    let answer = line.ask(&query).await;
    line.close().await;
    let mut made: Made = serde_json::from_value(answer?)?;
    made.key = key;
    change.shape.print(&made)
}

/// 256 random bits, with a mark that secret scanners can look for.
fn new_key() -> String {
    format!("mlr-{}", hex(&rand::random::<[u8; 32]>()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Limits {
    fn write(&self, query: &mut Value) {
        let limits = [
            ("running_max", self.running_max.map(u64::from)),
            ("prompt_tokens_per_minute", self.prompt_tokens_per_minute),
            ("answer_tokens_max", self.answer_tokens_max.map(u64::from)),
        ];
        for (name, value) in limits {
            if let Some(value) = value {
                query[name] = json!(value);
            }
        }
    }
}

/// A tenant.
#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Tenant {
    name: String,
    api_keys: Vec<String>,
    running_max: u64,
    prompt_tokens_per_minute: u64,
    answer_tokens_max: u64,
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct List {
    tenants: Vec<Tenant>,
    auth_required: bool,
}

const COLUMNS: &[Column<Tenant>] = &[
    column("NAME", |t| cell(&t.name)),
    column("KEYS", |t| cell(t.api_keys.len())),
    column("DIGESTS", |t| cell(if t.api_keys.is_empty() { "-".into() } else { t.api_keys.join(",") })),
    column("RUNNING MAX", |t| limit(t.running_max)),
    column("PROMPT TOKENS/MIN", |t| limit(t.prompt_tokens_per_minute)),
    column("ANSWER MAX", |t| limit(t.answer_tokens_max)),
];

fn limit(value: u64) -> Cell {
    if value == 0 { cell("-") } else { cell(value) }
}

impl Answer for List {
    fn page(&self) -> Page {
        let keys = if self.auth_required { "refused" } else { "the default tenant's" };
        Page::new().line(format_args!("requests without a key are {keys}")).table(COLUMNS, &self.tenants)
    }

    fn names(&self) -> Vec<String> {
        self.tenants.iter().map(|t| format!("tenant/{}", t.name)).collect()
    }
}

impl Answer for Tenant {
    fn page(&self) -> Page {
        Page::new().table(COLUMNS, [self])
    }

    fn names(&self) -> Vec<String> {
        vec![format!("tenant/{}", self.name)]
    }
}

/// A tenant that was made or got a key, and the key.
#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Made {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
}

impl Answer for Made {
    fn page(&self) -> Page {
        match &self.key {
            Some(key) => Page::new().line(format_args!("tenant {}", self.name)).line(format_args!("key {key}   (shown once)")),
            None => Page::new().line(format_args!("tenant {}", self.name)),
        }
    }

    fn names(&self) -> Vec<String> {
        vec![format!("tenant/{}", self.name)]
    }
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Deleted {
    name: String,
    dropped: u64,
}

impl Answer for Deleted {
    fn page(&self) -> Page {
        Page::new().line(format_args!("tenant {} is deleted; {} of its cached blocks are dropped", self.name, self.dropped))
    }

    fn names(&self) -> Vec<String> {
        vec![format!("tenant/{}", self.name)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_long_and_never_the_same() {
        let (one, other) = (new_key(), new_key());
        assert!(one.len() == 68 && one.starts_with("mlr-") && one != other);
    }

    #[test]
    fn a_list_says_what_becomes_of_requests_without_a_key() {
        let list = json!({"tenants": [{"name": "acme", "api_keys": ["01ab"], "running_max": 3}], "auth_required": true});
        let list: List = serde_json::from_value(list).unwrap();
        let text = list.page().render(false, false);
        assert!(text.starts_with("requests without a key are refused\n"), "{text}");
        assert!(text.contains("\nacme"), "{text}");
        assert_eq!(list.names(), ["tenant/acme"]);
    }
}
