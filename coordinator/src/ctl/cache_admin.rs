//! What `millctl cache` changes or looks into: pins, eviction, verification, and what is asked for most.

use anyhow::Result;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::exit::Exit;
use super::output::{Answer, Ask, Change, Line};
use super::prompt::PromptForm;
use super::table::{Column, Page, Tone, cell, column, maybe, wide};

/// The commands.
#[derive(Subcommand, Debug)]
pub enum CacheAdmin {
    /// Keep the blocks of a prompt from eviction, on every node that has them or gets them
    #[command(after_help = "Example:\n  millctl cache pin --prompt @agent.txt --label agent --ttl 3600")]
    Pin(Pin),
    /// Take a pin back
    #[command(after_help = "Example:\n  millctl cache unpin 3")]
    Unpin(Unpin),
    /// What is pinned, and where it is
    #[command(after_help = "Example:\n  millctl cache pins")]
    Pins(Ask),
    /// Drop cached blocks that no request uses: those of a prompt, of a tenant, or all
    #[command(after_help = "Example:\n  millctl cache evict --tenant acme --dry-run")]
    Evict(Evict),
    /// Compare what nodes cache with the index, and the bytes of idle blocks with what they were
    #[command(after_help = "Example:\n  millctl cache verify --node decode-1")]
    Verify(Verify),
    /// Which beginnings of prompts are asked for most
    #[command(after_help = "Example:\n  millctl cache top-prefixes --limit 10")]
    TopPrefixes(TopPrefixes),
}

/// What to pin.
#[derive(Args, Clone, Debug)]
pub struct Pin {
    #[command(flatten)]
    form: PromptForm,
    /// Whose cache; the default tenant's if absent
    #[arg(long)]
    tenant: Option<String>,
    /// What to call it
    #[arg(long)]
    label: Option<String>,
    /// Seconds until it ends by itself; never if absent
    #[arg(long, value_name = "SECONDS")]
    ttl: Option<u64>,
    #[command(flatten)]
    change: Change,
}

/// Which pin.
#[derive(Args, Clone, Debug)]
pub struct Unpin {
    /// The pin's number
    pin: u64,
    #[command(flatten)]
    change: Change,
}

/// What to evict.
#[derive(Args, Clone, Debug)]
pub struct Evict {
    /// Text; @FILE reads it from a file
    #[arg(long, group = "what")]
    prompt: Option<String>,
    /// Token ids: 1,2,3
    #[arg(long, value_delimiter = ',', group = "what")]
    tokens: Option<Vec<u32>>,
    /// A chat: a JSON array of messages; @FILE reads it from a file
    #[arg(long, group = "what")]
    messages: Option<String>,
    /// Everything
    #[arg(long, group = "what", conflicts_with = "tenant")]
    all: bool,
    /// Whose; without a prompt all of this tenant's
    #[arg(long, required_unless_present = "what")]
    tenant: Option<String>,
    /// Only on this node
    #[arg(long)]
    node: Option<String>,
    #[command(flatten)]
    change: Change,
}

/// What to verify.
#[derive(Args, Clone, Debug)]
pub struct Verify {
    /// Only this node
    #[arg(long)]
    node: Option<String>,
    #[command(flatten)]
    ask: Ask,
}

/// How many.
#[derive(Args, Clone, Debug)]
pub struct TopPrefixes {
    /// Prefixes to name
    #[arg(long, default_value_t = 20)]
    limit: usize,
    #[command(flatten)]
    ask: Ask,
}

/// Runs one.
///
/// # Errors
/// The cluster does not answer, or refuses; [`Exit::Degraded`] when verification finds something wrong.
pub async fn run(command: CacheAdmin) -> Result<()> {
    match command {
        CacheAdmin::Pin(Pin { form, tenant, label, ttl, change }) => {
            let mut query = json!({"q": "cache", "op": "pin", "tenant": tenant, "label": label, "ttl_s": ttl});
            form.write(&mut query)?;
            change.apply::<Pinned>("pin the blocks of the prompt", query).await.map(drop)
        }
        CacheAdmin::Unpin(Unpin { pin, change }) => {
            let query = json!({"q": "cache", "op": "unpin", "pin": pin});
            change.apply::<Pinned>(&format!("take pin {pin} back"), query).await.map(drop)
        }
        CacheAdmin::Pins(ask) => ask.show::<Pins>(json!({"q": "cache", "op": "pins"})).await.map(drop),
        CacheAdmin::Evict(evict) => evict_blocks(evict).await,
        CacheAdmin::Verify(Verify { node, ask }) => {
            let found = ask.show::<Verified>(json!({"q": "cache", "op": "verify", "node": node})).await?;
            if found.clean { Ok(()) } else { Err(Exit::Degraded.error("the caches are not what they should be")) }
        }
        CacheAdmin::TopPrefixes(TopPrefixes { limit, ask }) => {
            ask.show::<Prefixes>(json!({"q": "cache", "op": "top_prefixes", "limit": limit})).await.map(drop)
        }
    }
}

/// A dry run asks the nodes too: they count what they would drop.
async fn evict_blocks(evict: Evict) -> Result<()> {
    let Evict { prompt, tokens, messages, all, tenant, node, change } = evict;
    let dry_run = change.dry_run;
    let mut query = json!({"q": "cache", "op": "evict", "all": all, "tenant": tenant, "node": node, "dry_run": dry_run});
    PromptForm { prompt, tokens, messages }.write(&mut query)?;
    let mut line = Line::open(&change.which)?;
    let answer: Result<Evicted> = line.get(&query).await;
    line.close().await;
    let answer = answer?;
    change.shape.print(&answer)?;
    let silent: Vec<&str> = answer.nodes.iter().filter(|node| node.error.is_some()).map(|node| node.name.as_str()).collect();
    if silent.is_empty() { Ok(()) } else { Err(Exit::Degraded.error(format!("not obeyed by {}", silent.join(", ")))) }
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Held {
    name: String,
    blocks: u64,
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Pinned {
    pin: u64,
    pinned: bool,
    blocks: u64,
    nodes: Vec<Held>,
}

impl Answer for Pinned {
    fn page(&self) -> Page {
        match self.pinned {
            true => Page::new().line(format_args!("pin {}   blocks {}   now on {}", self.pin, self.blocks, places(&self.nodes))),
            false => Page::new().line(format_args!("pin {} is taken back", self.pin)),
        }
    }

    fn names(&self) -> Vec<String> {
        vec![format!("pin/{}", self.pin)]
    }
}

fn places(nodes: &[Held]) -> String {
    let places: Vec<String> = nodes.iter().map(|node| format!("{}:{}", node.name, node.blocks)).collect();
    if places.is_empty() { "no node".into() } else { places.join(" ") }
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Pins {
    pins: Vec<OnePin>,
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct OnePin {
    pin: u64,
    tenant: String,
    label: String,
    blocks: u64,
    ends_in_s: Option<u64>,
    nodes: Vec<Held>,
}

const PINS: &[Column<OnePin>] = &[
    column("PIN", |p| cell(p.pin)),
    column("TENANT", |p| cell(&p.tenant)),
    column("LABEL", |p| cell(&p.label)),
    column("BLOCKS", |p| cell(p.blocks)),
    column("ENDS IN S", |p| maybe(p.ends_in_s)),
    column("HELD", |p| cell(places(&p.nodes))),
];

impl Answer for Pins {
    fn page(&self) -> Page {
        Page::new().table(PINS, &self.pins)
    }

    fn names(&self) -> Vec<String> {
        self.pins.iter().map(|pin| format!("pin/{}", pin.pin)).collect()
    }
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Evicted {
    dry_run: bool,
    dropped: u64,
    nodes: Vec<EvictedOn>,
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct EvictedOn {
    name: String,
    dropped: u64,
    kept: u64,
    pinned: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

const EVICTED: &[Column<EvictedOn>] = &[
    column("NODE", |n| cell(&n.name)),
    column("DROPPED", |n| cell(n.dropped)),
    column("KEPT", |n| cell(n.kept)),
    column("PINNED", |n| cell(n.pinned)),
    column("ERROR", |n| maybe(n.error.as_deref()).tone(Tone::Warn)),
];

impl Answer for Evicted {
    fn page(&self) -> Page {
        let verb = if self.dry_run { "would drop" } else { "dropped" };
        Page::new().line(format_args!("{verb} {} blocks", self.dropped)).table(EVICTED, &self.nodes)
    }

    fn names(&self) -> Vec<String> {
        self.nodes.iter().map(|node| format!("node/{}", node.name)).collect()
    }
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Verified {
    clean: bool,
    nodes: Vec<VerifiedOn>,
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct VerifiedOn {
    name: String,
    clean: bool,
    names: String,
    blocks: u64,
    sound: u64,
    recorded: u64,
    busy: u64,
    damaged: u64,
    damaged_names: Vec<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

const VERIFIED: &[Column<VerifiedOn>] = &[
    column("NODE", |n| cell(&n.name)),
    column("BLOCKS", |n| cell(n.blocks)),
    column("INDEX", |n| cell(&n.names).tone(if n.names == "differ" { Tone::Bad } else { Tone::Plain })),
    column("SOUND", |n| cell(n.sound)),
    column("FIRST SEEN", |n| cell(n.recorded)),
    column("IN USE", |n| cell(n.busy)),
    column("DAMAGED", |n| cell(n.damaged).tone(if n.damaged > 0 { Tone::Bad } else { Tone::Plain })),
    wide("ERROR", |n| maybe(n.error.as_deref())),
];

impl Answer for Verified {
    fn page(&self) -> Page {
        let verdict = if self.clean { "nothing is wrong" } else { "NOT CLEAN" };
        Page::new().line(verdict).table(VERIFIED, &self.nodes)
    }

    fn names(&self) -> Vec<String> {
        self.nodes.iter().filter(|node| !node.clean).map(|node| format!("node/{}", node.name)).collect()
    }
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Prefixes {
    gateways: u64,
    prefixes: Vec<Prefix>,
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Prefix {
    prefix: String,
    tenant: String,
    blocks: u64,
    tokens: u64,
    count: u64,
    error: u64,
    holders: Vec<String>,
}

const PREFIXES: &[Column<Prefix>] = &[
    column("COUNT", |p| cell(p.count)),
    wide("AT MOST TOO MANY", |p| cell(p.error)),
    column("TENANT", |p| cell(&p.tenant)),
    column("BLOCKS", |p| cell(p.blocks)),
    column("TOKENS", |p| cell(p.tokens)),
    column("HOLDERS", |p| cell(if p.holders.is_empty() { "-".into() } else { p.holders.join(" ") })),
    wide("LAST BLOCK", |p| cell(&p.prefix)),
];

impl Answer for Prefixes {
    fn page(&self) -> Page {
        Page::new().line(format_args!("asked of {} gateways lately", self.gateways)).table(PREFIXES, &self.prefixes)
    }

    fn names(&self) -> Vec<String> {
        self.prefixes.iter().map(|prefix| format!("prefix/{}", prefix.prefix)).collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(subcommand)]
        command: CacheAdmin,
    }

    #[test]
    fn eviction_says_what_goes() {
        let parse = |line: &str| Command::try_parse_from(line.split(' '));
        for right in ["x evict --all", "x evict --tenant a", "x evict --tenant a --tokens 1,2", "x evict --prompt p --node n"] {
            assert!(parse(right).is_ok(), "{right}");
        }
        for wrong in ["x evict", "x evict --all --tenant a", "x evict --all --prompt p", "x evict --node n", "x pin"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn answers_read_as_tables() {
        let evicted: Evicted =
            serde_json::from_value(json!({"dry_run": true, "dropped": 7, "nodes": [{"name": "a", "dropped": 7}]})).unwrap();
        assert!(evicted.page().render(false, false).starts_with("would drop 7 blocks\n"));
        let verified = json!({"clean": false, "nodes": [{"name": "a", "clean": false, "names": "differ"}]});
        let verified: Verified = serde_json::from_value(verified).unwrap();
        assert_eq!(verified.names(), ["node/a"]);
        let pins: Pins = serde_json::from_value(json!({"pins": [{"pin": 1, "nodes": [{"name": "a", "blocks": 2}]}]})).unwrap();
        assert!(pins.page().render(false, false).contains("a:2"));
    }
}
