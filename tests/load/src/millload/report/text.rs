//! Figures as text, for the terminal.

use std::fmt::Write;

use super::super::figures::{Dist, PERCENTILES};
use super::super::summary::{Summary, Validity};

/// What each name of a time means, in the order of the report.
pub const TIMES: [(&str, &str); 9] = [
    ("ttft", "TTFT (from due)"),
    ("ttft_sent", "TTFT (from sent)"),
    ("tpot", "TPOT"),
    ("itl", "ITL (between chunks)"),
    ("gap_max", "longest gap"),
    ("e2e", "E2E (from due)"),
    ("e2e_sent", "E2E (from sent)"),
    ("server_queue", "server's queue"),
    ("lag", "own send lag"),
];

/// Milliseconds with as many digits as matter.
#[must_use]
pub fn ms(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 100.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The percentiles of a time; `–` where there are too few values.
#[must_use]
pub fn cells(dist: &Dist) -> Vec<String> {
    let mut cells = vec![dist.n.to_string(), ms(dist.mean)];
    cells.extend(dist.percentiles.iter().map(|value| value.map_or("–".to_owned(), ms)));
    cells.push(ms(dist.max));
    cells
}

/// A share in per cent.
#[must_use]
pub fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.1} %", share * 100.0) } else { "–".into() }
}

/// What to think of the run, in a sentence.
#[must_use]
pub fn verdict(summary: &Summary) -> String {
    let partial = if summary.about.partial { "PARTIAL: stopped before its end. " } else { "" };
    partial.to_owned()
        + &match &summary.validity {
            Validity::Valid => "valid: the generator kept its times".to_owned(),
            Validity::Invalid(why) => format!("INVALID: {why}"),
            Validity::Closed => "closed loop: not a latency test".to_owned(),
        }
}

/// The whole report.
#[must_use]
pub fn report(summary: &Summary) -> String {
    let mut out = String::new();
    let about = &summary.about;
    let _ = writeln!(out, "{}", verdict(summary));
    let _ = writeln!(out, "plan {} ({}; {}), speed {}", about.plan, about.workload, about.arrivals, about.speed);
    let _ = writeln!(
        out,
        "{} planned, {} sent, {} counted, {} whole; {:.1} s; {:.2} requests/s, {:.1} tokens/s out, {:.1} in\n",
        about.planned,
        summary.sent,
        summary.counted,
        summary.ok,
        summary.seconds,
        summary.requests_per_s,
        summary.output_tokens_per_s,
        summary.prompt_tokens_per_s
    );
    let head = ["n", "mean"].into_iter().chain(PERCENTILES.map(|(name, _)| name)).chain(["max"]);
    let head: String = head.map(|name| format!("{name:>10}")).collect();
    let _ = writeln!(out, "{:<22}{head}", "milliseconds");
    for (name, title) in TIMES {
        if let Some(dist) = summary.times.get(name) {
            let row: String = cells(dist).iter().map(|cell| format!("{cell:>10}")).collect();
            let _ = writeln!(out, "{title:<22}{row}");
        }
    }
    out.push('\n');
    for g in &summary.goodput {
        let (low, high) = g.interval;
        let range = format!("{}..{}", percent(low), percent(high));
        let _ =
            writeln!(out, "goodput {:<14} {} of {} ({}, 95 %: {range}), {:.2}/s", g.class, g.good, g.n, percent(g.share), g.per_s);
    }
    if let Some(reuse) = &summary.reuse {
        let lru =
            reuse.lru.map_or(String::new(), |lru| format!(", LRU of {} blocks {}", about.cache_blocks.unwrap_or(0), percent(lru)));
        let _ = writeln!(
            out,
            "prompt tokens reused   {}; a cache that never forgets {}{lru}",
            percent(reuse.measured),
            percent(reuse.infinite)
        );
    }
    if let Some((all, slow)) = &summary.phases {
        for (name, p) in [("TTFT, all", all), ("TTFT, slowest tenth", slow)] {
            let parts = p.parts().map(|(part, value)| format!("{part} {}", ms(value))).join(" + ");
            let _ = writeln!(out, "{name:<22} {parts} ms; unexplained {}", percent(p.unexplained));
        }
    }
    incidents(&mut out, summary);
    out
}

/// What went wrong, by itself or on purpose, and whether the answers were right.
fn incidents(out: &mut String, summary: &Summary) {
    for (kind, n) in &summary.errors {
        let _ = writeln!(out, "not whole: {kind:<12} {n}");
    }
    for f in &summary.faults {
        let what = f.error.as_ref().map_or_else(
            || format!("{} failed, {} bad, recovered after {:.2} s", f.failed, f.bad, f.recovery_s),
            |error| format!("could not be done: {error}"),
        );
        let _ = writeln!(out, "at {:.1} s {:<20} {what}", f.at_s, f.act);
    }
    if let Some(golden) = &summary.golden {
        let _ = writeln!(
            out,
            "answers: {} equal, {} different {:?}, {} not compared",
            golden.same, golden.different, golden.named, golden.incomparable
        );
    }
}
