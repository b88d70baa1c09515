//! `millctl cache`: what is cached where.

use anyhow::Result;
use clap::Subcommand;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::output::{Answer, Ask};
use super::prompt::Prompt;
use super::table::{Cell, Column, Page, Tone, cell, column, wide};

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Cache {
    /// Which nodes hold how much of a prompt
    #[command(after_help = "Example:\n  millctl cache lookup --prompt 'Once upon a time'")]
    Lookup(Prompt),
    /// How much is cached
    #[command(after_help = "Example:\n  millctl cache stat --watch")]
    Stat(Ask),
}

/// Runs one.
///
/// # Errors
/// The cluster does not answer, or refuses the prompt.
pub async fn run(command: Cache) -> Result<()> {
    match command {
        Cache::Stat(ask) => ask.show::<Stat>(json!({"q": "cache_stat"})).await.map(drop),
        Cache::Lookup(prompt) => prompt.ask.show::<Lookup>(prompt.query("cache_lookup")?).await.map(drop),
    }
}

/// What the index holds.
#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Stat {
    blocks: u64,
    holders: u64,
    applied: u64,
    nodes: Vec<Held>,
}

/// What it holds of one node.
#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Held {
    name: String,
    blocks: u64,
    seq: u64,
    refused: u64,
    digest: String,
}

const HELD: &[Column<Held>] = &[
    column("NODE", |n| cell(&n.name)),
    column("BLOCKS", |n| cell(n.blocks)),
    column("SEQ", |n| cell(n.seq)),
    column("REFUSED", |n| cell(n.refused).tone(if n.refused > 0 { Tone::Warn } else { Tone::Plain })),
    wide("DIGEST", |n| cell(&n.digest)),
];

impl Answer for Stat {
    fn page(&self) -> Page {
        let head = [("blocks", self.blocks), ("copies", self.holders), ("log index", self.applied)];
        Page::new().cells(head.map(|(what, count)| cell(format_args!("{what} {count}")))).table(HELD, &self.nodes)
    }

    fn names(&self) -> Vec<String> {
        self.nodes.iter().map(|node| format!("node/{}", node.name)).collect()
    }
}

/// How much of a prompt is where.
#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Lookup {
    prompt_tokens: u64,
    blocks: u64,
    block_tokens: u64,
    nodes: Vec<Share>,
}

/// How much of it one node holds.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
#[serde(default)]
struct Share {
    name: String,
    cached_blocks: u64,
    cached_tokens: u64,
}

const SHARES: &[Column<(Share, u64)>] = &[
    column("NODE", |(share, _)| cell(&share.name)),
    column("BLOCKS", |(share, _)| cell(share.cached_blocks)),
    column("TOKENS", |(share, _)| cell(share.cached_tokens)),
    column("PREFIX", |(share, tokens)| percent(share.cached_tokens, *tokens)),
];

fn percent(part: u64, whole: u64) -> Cell {
    let share = if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 };
    cell(format_args!("{share:.1} %"))
}

impl Answer for Lookup {
    fn page(&self) -> Page {
        let longest = self.nodes.iter().map(|node| node.cached_tokens).max().unwrap_or(0);
        let head = [
            format!("tokens {}", self.prompt_tokens),
            format!("blocks {} of {} tokens", self.blocks, self.block_tokens),
            format!("longest cached prefix {longest} tokens"),
        ];
        let rows: Vec<(Share, u64)> = self.nodes.iter().map(|node| (node.clone(), self.prompt_tokens)).collect();
        Page::new().cells(head.map(cell)).table(SHARES, &rows)
    }

    fn names(&self) -> Vec<String> {
        self.nodes.iter().filter(|node| node.cached_blocks > 0).map(|node| format!("node/{}", node.name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lookup_reads_as_a_table_and_names_the_holders() {
        let found = json!({"prompt_tokens": 40, "blocks": 2, "block_tokens": 16,
            "nodes": [{"name": "decode-1", "cached_blocks": 1, "cached_tokens": 16}, {"name": "decode-2", "cached_blocks": 0}]});
        let found: Lookup = serde_json::from_value(found).unwrap();
        let text = found.page().render(false, false);
        assert!(text.starts_with("tokens 40   blocks 2 of 16 tokens   longest cached prefix 16 tokens\n"), "{text}");
        assert!(text.contains("\ndecode-1       1      16  40.0 %\n"), "{text}");
        assert_eq!(found.names(), ["node/decode-1"]);
    }

    #[test]
    fn an_older_replica_may_leave_fields_out() {
        let stat: Stat = serde_json::from_value(json!({"blocks": 3, "nodes": [{"name": "a", "blocks": 3}]})).unwrap();
        assert!(stat.page().render(false, false).ends_with("a          3    0        0\n"));
    }
}
