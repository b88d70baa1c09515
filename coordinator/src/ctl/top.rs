//! `millctl top`: the cluster as it works, redrawn every second until `q`; one print when standard output is no terminal.
//!
//! Rates are differences of counters that only grow, between two looks; here they become lines. [`terminal`] is the screen.

mod terminal;

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use serde_json::json;

use self::terminal::{Key, Screen};
use super::cluster::{Member, Status};
use super::nodes::Node;
use super::output::{Line, colours_wanted};
use super::table::{Cell, Column, Page, Tone, cell, column, maybe, word};
use crate::traffic::Figures;

/// Characters of a bar.
const BAR: usize = 16;

/// What to watch.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Example:\n  millctl top --interval 0.5\n  millctl top --once")]
pub struct TopArgs {
    #[command(flatten)]
    which: super::context::Which,
    /// Seconds between two looks
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS", value_parser = super::output::seconds)]
    interval: f64,
    /// Look twice, print once, and end
    #[arg(long)]
    once: bool,
}

/// A look at the cluster.
struct Look {
    at: Instant,
    status: Status,
}

/// Shows it.
///
/// # Errors
/// The cluster does not answer at first, or the terminal cannot be used.
pub async fn run(args: TopArgs) -> Result<()> {
    let mut line = Line::open(&args.which)?;
    let interval = Duration::from_secs_f64(args.interval);
    let first = look(&mut line).await?;
    if args.once || !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        tokio::time::sleep(interval).await;
        let second = look(&mut line).await?;
        line.close().await;
        print!("{}", page(&first, &second).render(false, std::io::stdout().is_terminal() && colours_wanted()));
        return Ok(());
    }
    let screen = Screen::open()?;
    let result = watch(&mut line, &screen, first, interval).await;
    drop(screen);
    line.close().await;
    result
}

async fn watch(line: &mut Line, screen: &Screen, first: Look, interval: Duration) -> Result<()> {
    let mut keys = terminal::keys();
    let mut last = first;
    let mut page_shown = page(&last, &last);
    loop {
        screen.draw(&page_shown.render(false, colours_wanted()))?;
        tokio::select! {
            key = keys.recv() => if key.is_none_or(|key| key == Key::Quit) { return Ok(()) },
            () = tokio::time::sleep(interval) => {}
        }
        match look(line).await {
            Ok(next) => {
                page_shown = page(&last, &next);
                last = next;
            }
            // A cluster that is being restarted comes back; what was last seen stays, and says so.
            Err(error) => page_shown = page(&last, &last).cells([cell(format_args!("no answer: {error:#}")).tone(Tone::Bad)]),
        }
    }
}

async fn look(line: &mut Line) -> Result<Look> {
    let status = line.get(&json!({"q": "status"})).await?;
    Ok(Look { at: Instant::now(), status })
}

/// What a gateway did between two looks.
#[derive(Clone, Debug)]
struct Gateway {
    member: Member,
    rates: Rates,
}

/// Counts a second, and shares.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rates {
    requests_s: f64,
    failed_s: f64,
    prompt_tokens_s: f64,
    output_tokens_s: f64,
    /// Share of prompt tokens that were cached; `None` without a prompt.
    hit: Option<f64>,
    /// Mean time to the first token, milliseconds; `None` without one.
    ttft_ms: Option<f64>,
}

impl Rates {
    fn of(done: Figures, seconds: f64) -> Self {
        let a_second = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        Self {
            requests_s: a_second(done.ended),
            failed_s: a_second(done.failed),
            prompt_tokens_s: a_second(done.prompt_tokens),
            output_tokens_s: a_second(done.output_tokens),
            hit: share(done.cached_tokens, done.prompt_tokens),
            ttft_ms: share(done.first_token_us, done.first_tokens).map(|us| us / 1000.0),
        }
    }
}

const GATEWAYS: &[Column<Gateway>] = &[
    column("GATEWAY", |g| cell(&g.member.name)),
    column("ROLE", |g| word(&g.member.role, g.member.reachable)),
    column("RUNNING", |g| maybe(g.member.requests)),
    column("REQ/S", |g| cell(format_args!("{:.1}", g.rates.requests_s))),
    column("TOKENS/S", |g| cell(format_args!("{:.1}", g.rates.output_tokens_s))),
    column("HIT %", |g| percent(g.rates.hit)),
    column("TTFT MS", |g| maybe(g.rates.ttft_ms.map(|ms| format!("{ms:.0}")))),
    column("LAG", |g| maybe(g.member.lag)),
];

const NODES: &[Column<Node>] = &[
    column("NODE", |n| cell(&n.name)),
    column("KIND", |n| cell(&n.kind)),
    column("STATE", |n| word(&n.state, n.usable)),
    column("RUNNING", |n| cell(n.running)),
    column("WAITING", |n| cell(n.waiting)),
    column("QUEUED", |n| cell(n.queued_tokens)),
    column("POOL", bar),
    column("IN USE", |n| maybe(n.blocks.in_use)),
    column("CACHED", |n| cell(n.blocks.cached)),
    column("BLOCKS", |n| cell(n.blocks.total)),
];

fn percent(share: Option<f64>) -> Cell {
    maybe(share.map(|share| format!("{:.1}", share * 100.0)))
}

/// The pool: `#` in use, `+` cached and free on demand, `.` free.
fn bar(node: &Node) -> Cell {
    let (Some(in_use), Some(evictable)) = (node.blocks.in_use, node.blocks.evictable) else { return cell("?".repeat(BAR)) };
    let total = node.blocks.total.max(1);
    let cells = |blocks: u64| (blocks.min(total) as usize * BAR).div_ceil(total as usize).min(BAR);
    let used = cells(in_use);
    let held = cells(in_use + evictable).max(used) - used;
    let text = "#".repeat(used) + &"+".repeat(held) + &".".repeat(BAR - used - held);
    cell(text).tone(if used == BAR { Tone::Warn } else { Tone::Plain })
}

fn page(before: &Look, now: &Look) -> Page {
    let seconds = now.at.saturating_duration_since(before.at).as_secs_f64();
    let earlier: BTreeMap<&str, Figures> =
        before.status.members.iter().filter_map(|member| Some((member.name.as_str(), member.traffic?))).collect();
    // One that did not answer before has done nothing that we saw.
    let done = |member: &Member| {
        let (now, before) = (member.traffic, earlier.get(member.name.as_str()));
        now.zip(before).map(|(now, before)| now.since(*before)).unwrap_or_default()
    };
    let status = &now.status;
    let gateways: Vec<Gateway> =
        status.members.iter().map(|member| Gateway { member: member.clone(), rates: Rates::of(done(member), seconds) }).collect();
    let all = status.members.iter().map(done).fold(Figures::default(), Figures::plus);
    let ever = status.members.iter().filter_map(|member| member.traffic).fold(Figures::default(), Figures::plus);
    let rates = Rates::of(all, seconds);
    let quorum = if status.quorum { cell("quorum").tone(Tone::Good) } else { cell("NO QUORUM").tone(Tone::Bad) };
    let running: u64 = status.members.iter().filter_map(|member| member.requests).sum();
    let text = |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.1} %", share * 100.0));
    let mut page = Page::new()
        .cells([
            cell(format_args!("cluster {}", status.cluster)),
            cell(format_args!("model {}", status.model)),
            cell(format_args!("leader {}", status.leader.as_deref().unwrap_or("-"))),
            quorum,
        ])
        .line(format_args!(
            "running {running}   {:.1} requests/s   {:.1} failed/s   prompt {:.0} tokens/s   output {:.1} tokens/s",
            rates.requests_s, rates.failed_s, rates.prompt_tokens_s, rates.output_tokens_s
        ))
        .line(format_args!(
            "cache hit {} now, {} ever   first token {} ms   ended {}   failed {}",
            text(rates.hit),
            text(Rates::of(ever, 0.0).hit),
            rates.ttft_ms.map_or("-".to_owned(), |ms| format!("{ms:.0}")),
            ever.ended,
            ever.failed
        ));
    for what in &status.unknown {
        page = page.cells([cell(format_args!("unknown: {what}")).tone(Tone::Warn)]);
    }
    page.table(GATEWAYS, &gateways).table(NODES, &status.nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(at: Instant, ended: u64, output: u64) -> Look {
        let traffic = json!({"ended": ended, "prompt_tokens": ended * 100, "cached_tokens": ended * 25, "output_tokens": output,
            "first_tokens": ended, "first_token_us": ended * 8000});
        let node = json!({"name": "d-1", "kind": "decode", "state": "up", "usable": true, "blocks": {"total": 32, "in_use": 8, "evictable": 8, "free": 16}});
        let members = json!([{"name": "c-1", "role": "leader", "reachable": true, "requests": 3, "traffic": traffic}, {"name": "c-2", "role": "unknown"}]);
        let status = json!({"cluster": "x", "model": "m", "quorum": true, "members": members, "nodes": [node]});
        Look { at, status: serde_json::from_value(status).unwrap() }
    }

    #[test]
    fn two_looks_make_rates() {
        let now = Instant::now();
        let text = page(&look(now, 10, 1000), &look(now + Duration::from_secs(2), 14, 1300)).render(false, false);
        assert!(text.contains("running 3   2.0 requests/s   0.0 failed/s   prompt 200 tokens/s   output 150.0 tokens/s"), "{text}");
        assert!(text.contains("cache hit 25.0 % now, 25.0 % ever   first token 8 ms   ended 14"), "{text}");
        assert!(text.contains("####++++........"), "{text}");
        let silent: Vec<&str> = text.lines().find(|line| line.starts_with("c-2")).unwrap().split_whitespace().collect();
        assert_eq!(silent, ["c-2", "unknown", "-", "0.0", "0.0", "-", "-", "-"]);
    }

    #[test]
    fn one_look_has_no_rates_and_no_figure_is_no_crash() {
        let now = Instant::now();
        let text = page(&look(now, 10, 1000), &look(now, 10, 1000)).render(false, false);
        assert!(text.contains("0.0 requests/s") && text.contains("cache hit - now"), "{text}");
        let strange: Node = serde_json::from_value(json!({"blocks": {"total": 0, "in_use": 9, "evictable": 9}})).unwrap();
        assert_eq!(bar(&strange), cell("#".repeat(BAR)).tone(Tone::Warn));
    }
}
