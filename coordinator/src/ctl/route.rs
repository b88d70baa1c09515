//! `millctl route`: where a prompt would go and why, and what the last decisions were and became.

use anyhow::Result;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::output::{Answer, Ask};
use super::prompt::Prompt;
use super::table::{Cell, Column, Page, cell, column, maybe, wide, word};

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Route {
    /// Where a prompt would go, and what each part of that would cost
    #[command(after_help = "Example:\n  millctl route explain --prompt @question.txt")]
    Explain(Prompt),
    /// The last decisions, what was predicted and what came of it
    #[command(after_help = "Examples:\n  millctl route decisions -w\n  millctl route decisions --request chatcmpl-… -o json")]
    Decisions(DecisionsArgs),
}

/// Which decisions.
#[derive(Args, Clone, Debug)]
pub struct DecisionsArgs {
    /// The newest so many
    #[arg(long, default_value_t = 20)]
    limit: usize,
    /// Only of this request: its id as the API gives it
    #[arg(long)]
    request: Option<String>,
    /// Only what changed after this time, milliseconds since 1970
    #[arg(long, value_name = "MS")]
    since: Option<u64>,
    #[command(flatten)]
    ask: Ask,
}

/// Runs one.
///
/// # Errors
/// The cluster does not answer, or cannot place the prompt.
pub async fn run(command: Route) -> Result<()> {
    match command {
        Route::Explain(prompt) => prompt.ask.show::<Decision>(prompt.query("route_explain")?).await.map(drop),
        Route::Decisions(DecisionsArgs { limit, request, since, ask }) => {
            let query = json!({"q": "route_decisions", "limit": limit, "request": request, "since": since});
            ask.show::<Decisions>(query).await.map(drop)
        }
    }
}

/// One decision, made or as it would be.
#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Decision {
    gateway: String,
    at_ms: u64,
    request: String,
    attempt: u64,
    prompt_tokens: u64,
    prefill: Option<String>,
    decode: Option<String>,
    prefill_cached_blocks: u64,
    decode_cached_blocks: u64,
    reason: String,
    refused: Option<String>,
    cost: Map<String, Value>,
    hot: Option<Hot>,
    alternatives: Vec<Alternative>,
    observed: Observed,
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Hot {
    blocks: u64,
    requests: u64,
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Alternative {
    prefill: Option<String>,
    decode: Option<String>,
    total_us: u64,
    cost: Map<String, Value>,
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Observed {
    outcome: Option<String>,
    cached_tokens: Option<u64>,
    queue_us: Option<u64>,
    compute_us: Option<u64>,
    ttft_us: Option<u64>,
    tpot_us: Option<u64>,
    exposed_us: Option<u64>,
    tokens: u64,
}

/// Microseconds as milliseconds with one digit.
fn ms(us: i64) -> String {
    format!("{:.1}", us as f64 / 1e3)
}

fn some_ms(us: Option<u64>) -> Cell {
    maybe(us.map(|us| ms(us as i64)))
}

fn term(plan: &Alternative, name: &str) -> Cell {
    maybe(plan.cost.get(name).and_then(Value::as_i64).map(ms))
}

/// The plan that was chosen, and others.
const PLANS: &[Column<Alternative>] = &[
    column("PREFILL", |p| maybe(p.prefill.as_ref())),
    column("DECODE", |p| maybe(p.decode.as_ref())),
    column("TOTAL MS", |p| term(p, "total_us")),
    column("QUEUE", |p| term(p, "queue_us")),
    column("PREFILL", |p| term(p, "prefill_us")),
    column("TAIL", |p| term(p, "tail_us")),
    column("WAIT", |p| term(p, "wait_us")),
    column("DECODE", |p| term(p, "decode_us")),
    column("HARM", |p| term(p, "harm_us")),
    column("SLO", |p| term(p, "slo_us")),
    column("SPREAD", |p| term(p, "spread_us")),
    column("TTFT", |p| term(p, "ttft_us")),
    wide("TPOT", |p| term(p, "tpot_us")),
];

impl Decision {
    /// The plan that was chosen, as a row beside the others.
    fn chosen(&self) -> Alternative {
        Alternative { prefill: self.prefill.clone(), decode: self.decode.clone(), total_us: 0, cost: self.cost.clone() }
    }
}

impl Answer for Decision {
    fn page(&self) -> Page {
        let prefill = self.prefill.as_deref().unwrap_or("-");
        let decode = self.decode.as_deref().unwrap_or("where it is prefilled");
        let (cached, had, tokens) = (self.prefill_cached_blocks, self.decode_cached_blocks, self.prompt_tokens);
        let mut page = Page::new()
            .line(format_args!("prefill on {prefill} (has {cached} blocks), decode {decode} (has {had} blocks), {tokens} tokens"))
            .line(&self.reason);
        if let Some(Hot { blocks, requests }) = &self.hot {
            page = page.line(format_args!("hot: its first {blocks} blocks were asked for {requests} times lately"));
        }
        page.table(PLANS, std::iter::once(&self.chosen()).chain(&self.alternatives))
    }

    fn names(&self) -> Vec<String> {
        [&self.prefill, &self.decode].into_iter().flatten().map(|name| format!("node/{name}")).collect()
    }
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Decisions {
    missing: Vec<String>,
    decisions: Vec<Decision>,
}

fn predicted(decision: &Decision, name: &str) -> Cell {
    maybe(decision.cost.get(name).and_then(Value::as_i64).map(ms))
}

const DECISIONS: &[Column<Decision>] = &[
    column("AT", |d| cell(clock(d.at_ms))),
    wide("GATEWAY", |d| cell(&d.gateway)),
    column("REQUEST", |d| cell(short(&d.request))),
    column("TOKENS", |d| cell(d.prompt_tokens)),
    column("PREFILL", |d| maybe(d.prefill.as_ref())),
    column("DECODE", |d| maybe(d.decode.as_ref())),
    column("BELIEVED", |d| cell(d.prefill_cached_blocks)),
    column("FOUND TOKENS", |d| maybe(d.observed.cached_tokens)),
    column("TTFT MS", |d| predicted(d, "ttft_us")),
    column("WAS", |d| some_ms(d.observed.ttft_us)),
    wide("PREFILL MS", |d| predicted(d, "prefill_us")),
    wide("WAS", |d| some_ms(d.observed.compute_us)),
    wide("QUEUE MS", |d| predicted(d, "queue_us")),
    wide("WAS", |d| some_ms(d.observed.queue_us)),
    wide("TAIL MS", |d| predicted(d, "tail_us")),
    wide("WAS", |d| some_ms(d.observed.exposed_us)),
    wide("TPOT MS", |d| predicted(d, "tpot_us")),
    wide("WAS", |d| some_ms(d.observed.tpot_us)),
    column("OUTCOME", outcome),
];

fn outcome(decision: &Decision) -> Cell {
    if let Some(reason) = &decision.refused {
        return word(format_args!("refused: {reason}"), false);
    }
    let outcome = decision.observed.outcome.as_deref();
    word(outcome.unwrap_or("runs"), matches!(outcome, None | Some("done")))
}

/// The first digits of a request's id.
fn short(request: &str) -> &str {
    request.get(..12).unwrap_or(request)
}

/// Milliseconds since 1970 as the time of the day, UTC.
fn clock(at_ms: u64) -> String {
    let seconds = at_ms / 1000;
    format!("{:02}:{:02}:{:02}.{:03}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60, at_ms % 1000)
}

impl Answer for Decisions {
    fn page(&self) -> Page {
        let page = Page::new().table(DECISIONS, &self.decisions);
        if self.missing.is_empty() { page } else { page.line(format_args!("no answer from {}", self.missing.join(", "))) }
    }

    fn names(&self) -> Vec<String> {
        self.decisions.iter().map(|d| format!("request/{}", d.request)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_reads_as_a_table_with_the_terms_of_every_plan() {
        let decision = json!({"prompt_tokens": 40, "prefill": "prefill-1", "decode": null, "prefill_cached_blocks": 2,
            "decode_cached_blocks": 0, "reason": "cheapest", "hot": {"blocks": 2, "requests": 9},
            "cost": {"total_us": 7000, "queue_us": 1000, "spread_us": -500},
            "alternatives": [{"prefill": "prefill-2", "decode": "decode-1", "total_us": 9000, "cost": {"total_us": 9000, "tail_us": 2300}}]});
        let decision: Decision = serde_json::from_value(decision).unwrap();
        let text = decision.page().render(false, false);
        assert!(text.starts_with("prefill on prefill-1 (has 2 blocks), decode where it is prefilled"), "{text}");
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["cheapest"]);
        assert!(text.contains("first 2 blocks were asked for 9 times"), "{text}");
        let of = |node| rows.iter().find(|row| row.first() == Some(&node)).unwrap().clone();
        assert_eq!(of("prefill-1"), ["prefill-1", "-", "7.0", "1.0", "-", "-", "-", "-", "-", "-", "-0.5", "-"]);
        assert_eq!(of("prefill-2")[..6], ["prefill-2", "decode-1", "9.0", "-", "-", "2.3"]);
        assert_eq!(decision.names(), ["node/prefill-1"]);
    }

    #[test]
    fn decisions_show_what_was_predicted_beside_what_was() {
        let answer = json!({"missing": ["c-3"], "decisions": [
            {"at_ms": 3_723_004, "request": "00112233445566778899aabbccddeeff", "prompt_tokens": 40, "prefill": "p", "decode": "d",
             "prefill_cached_blocks": 2, "cost": {"ttft_us": 5000}, "observed": {"cached_tokens": 32, "ttft_us": 6100, "outcome": "done"}},
            {"request": "ff", "refused": "no usable node"},
        ]});
        let decisions: Decisions = serde_json::from_value(answer).unwrap();
        let text = decisions.page().render(false, false);
        let row: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["01:02:03.004", "001122334455", "40", "p", "d", "2", "32", "5.0", "6.1", "done"]);
        assert!(text.contains("refused: no usable node") && text.ends_with("no answer from c-3\n"), "{text}");
        assert_eq!(decisions.names()[1], "request/ff");
    }
}
