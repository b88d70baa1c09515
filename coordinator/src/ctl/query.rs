//! `millctl route`: where a prompt would go, and why.

use anyhow::Result;
use clap::Subcommand;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::output::Answer;
use super::prompt::Prompt;
use super::table::{Column, Page, cell, column, maybe};

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Route {
    /// Where a prompt would go, and what each part of that would cost
    #[command(after_help = "Example:\n  millctl route explain --prompt @question.txt")]
    Explain(Prompt),
}

/// Runs one.
///
/// # Errors
/// The cluster does not answer, or cannot place the prompt.
pub async fn route(command: Route) -> Result<()> {
    let Route::Explain(prompt) = command;
    prompt.ask.show::<Decision>(prompt.query("route_explain")?).await.map(drop)
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Decision {
    prompt_tokens: u64,
    prefill: Option<String>,
    decode: Option<String>,
    prefill_cached_blocks: u64,
    decode_cached_blocks: u64,
    cost: Map<String, Value>,
    alternatives: Vec<Alternative>,
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Alternative {
    prefill: Option<String>,
    decode: Option<String>,
    total_us: u64,
}

const COSTS: &[Column<(String, Value)>] =
    &[column("COST", |(name, _)| cell(name.trim_end_matches("_us"))), column("MICROSECONDS", |(_, us)| cell(us))];

const OTHERS: &[Column<Alternative>] = &[
    column("PREFILL", |a| maybe(a.prefill.as_ref())),
    column("DECODE", |a| maybe(a.decode.as_ref())),
    column("MICROSECONDS", |a| cell(a.total_us)),
];

impl Answer for Decision {
    fn page(&self) -> Page {
        let prefill = self.prefill.as_deref().unwrap_or("-");
        let decode = self.decode.as_deref().unwrap_or("where it is prefilled");
        let (cached, had, tokens) = (self.prefill_cached_blocks, self.decode_cached_blocks, self.prompt_tokens);
        let costs: Vec<(String, Value)> = self.cost.clone().into_iter().collect();
        Page::new()
            .line(format_args!("prefill on {prefill} (has {cached} blocks), decode {decode} (has {had} blocks), {tokens} tokens"))
            .table(COSTS, &costs)
            .table(OTHERS, &self.alternatives)
    }

    fn names(&self) -> Vec<String> {
        [&self.prefill, &self.decode].into_iter().flatten().map(|name| format!("node/{name}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_decision_reads_as_a_table() {
        let decision = json!({"prompt_tokens": 40, "prefill": "prefill-1", "decode": null, "prefill_cached_blocks": 2, "decode_cached_blocks": 0,
            "cost": {"total_us": 7}, "alternatives": [{"prefill": "prefill-2", "decode": "decode-1", "total_us": 9}]});
        let decision: Decision = serde_json::from_value(decision).unwrap();
        let text = decision.page().render(false, false);
        assert!(text.starts_with("prefill on prefill-1 (has 2 blocks), decode where it is prefilled"), "{text}");
        assert!(text.contains("\nprefill-2  decode-1             9\n"), "{text}");
        assert_eq!(decision.names(), ["node/prefill-1"]);
    }
}
