//! One page that shows a run: no script, no font, nothing fetched. Plots first, tables below.

use std::fmt::Write;

use super::super::figures::PERCENTILES;
use super::super::record::Record;
use super::super::summary::{Phases, Summary, Validity, good};
use super::Results;
use super::svg::{Plot, Scale, Series, bars, escape};
use super::text::{TIMES, cells, ms, percent, verdict};

/// Windows of the plots over time.
const WINDOWS: usize = 60;

const STYLE: &str = "
:root{--ink:#1d2733;--soft:#66727f;--line:#e3e7eb;--card:#fff;--back:#f4f6f8;--c0:#2667c9;--c1:#e0762f;--c2:#2c9a6b;--c3:#9a5bc4;--c4:#0f8a9d;--c5:#d1a413;--c6:#c2527f;--c7:#b9c2cc;--bad:#c4392f}
@media(prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#93a0ad;--line:#2c3640;--card:#1a222a;--back:#12181e;--c0:#6ea5f5;--c1:#f0985c;--c2:#5cc596;--c3:#c08ee6;--c4:#4fc3d4;--c5:#e6c34d;--c6:#e58aad;--c7:#4b5866;--bad:#ef7468}}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1380px;margin:0 auto;padding:28px 20px 60px}h1{font-size:24px;margin:0 0 2px}h2{font-size:15px;margin:0 0 8px}
p{margin:0 0 10px;color:var(--soft)}.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:16px;margin-top:16px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;min-width:0;overflow-x:auto}.wide{grid-column:1/-1}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:16px}.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.tile b{display:block;font-size:23px;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:13px}
.verdict{display:inline-block;margin-top:8px;padding:3px 12px;border-radius:99px;background:var(--c2);color:#fff;font-weight:600}.verdict.bad{background:var(--bad)}.verdict.soft{background:var(--soft)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}th,td{padding:4px 8px;text-align:right;border-bottom:1px solid var(--line)}th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
svg{width:100%;height:auto;display:block}svg text{fill:var(--ink);font:11px system-ui,sans-serif}svg .tick{fill:var(--soft)}svg .mark{fill:var(--bad)}
svg .grid{stroke:var(--line)}svg .axis{stroke:var(--soft)}svg .limit{stroke:var(--bad);stroke-dasharray:4 3}
svg polyline{fill:none;stroke-width:1.8}.line0{stroke:var(--c0)}.line1{stroke:var(--c1)}.line2{stroke:var(--c2)}.line3{stroke:var(--c3)}
.fill0{fill:var(--c0)}.fill1{fill:var(--c1)}.fill2{fill:var(--c2)}.fill3{fill:var(--c3)}.fill4{fill:var(--c4)}.fill5{fill:var(--c5)}.fill6{fill:var(--c6)}.fill7{fill:var(--c7)}circle{opacity:.6}
";

/// The page.
#[must_use]
pub fn page(results: &Results) -> String {
    let (summary, records) = (&results.summary, counted(results));
    let about = &summary.about;
    let title = if about.label.is_empty() { about.workload.clone() } else { about.label.clone() };
    let mut out = document_head(&title);
    let class = match summary.validity {
        Validity::Invalid(_) => "bad",
        Validity::Closed => "soft",
        Validity::Valid => "",
    };
    let _ = write!(
        out,
        "<h1>{}</h1><p>{} · {} · speed {} · {} at {} · plan {}</p>",
        escape(&title),
        escape(&about.workload),
        escape(&about.arrivals),
        about.speed,
        escape(&about.model),
        escape(&about.url),
        about.plan
    );
    let _ = write!(out, "<div class=\"verdict {class}\">{}</div>", escape(&verdict(summary)));
    tiles(&mut out, summary);
    out.push_str("<div class=\"grid\">");
    card(
        &mut out,
        "Time to the first token, request by request",
        "From the moment the request was due.",
        &scatter(summary, &records),
    );
    card(
        &mut out,
        "How many waited how long",
        "Share of requests whose first token came within the time; due against sent shows what waiting in front of the door hides.",
        &curves(&records),
    );
    card(&mut out, "Between tokens", "Share of gaps between two chunks that were no longer.", &gap_curve(&records));
    card(
        &mut out,
        "Load over time",
        "Requests due, whole answers, and requests under way at the middle of each window.",
        &load(&records),
    );
    if summary.phases.is_some() {
        card(
            &mut out,
            "Where the time to the first token went",
            "Means, measured by the generator, the server's front and gateway, and its nodes; outside is what none of them saw.",
            &phases(summary),
        );
    }
    if summary.reuse.is_some() {
        card(
            &mut out,
            "Prompt tokens reused",
            "Measured, beside one cache for all that never forgets and one of the cluster's size.",
            &reuse(summary),
        );
    }
    tables(&mut out, summary);
    out.push_str("</div></main></body></html>\n");
    out
}

/// Everything before the first heading of a page.
#[must_use]
pub fn document_head(title: &str) -> String {
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>{}</title><style>{STYLE}</style></head><body><main>",
        escape(title)
    )
}

/// A box with a heading, a sentence and a plot.
pub fn card(out: &mut String, title: &str, note: &str, content: &str) {
    let _ = write!(out, "<section class=\"card\"><h2>{}</h2><p>{}</p>{content}</section>", escape(title), escape(note));
}

fn counted(results: &Results) -> Vec<&Record> {
    results.records.iter().filter(|record| results.summary.about.counts(record)).collect()
}

fn tiles(out: &mut String, summary: &Summary) {
    let time = |name: &str| {
        let dist = summary.times.get(name)?;
        Some(dist.p50().map_or((dist.mean, "mean"), |p50| (p50, "median")))
    };
    let mut tiles = Vec::new();
    for (name, title) in [("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "E2E")] {
        if let Some((value, what)) = time(name) {
            tiles.push((format!("{} ms", ms(value)), format!("{title}, {what}")));
        }
    }
    tiles.push((format!("{:.1}", summary.output_tokens_per_s), "answer tokens a second".into()));
    tiles.push((format!("{:.2}", summary.requests_per_s), "whole answers a second".into()));
    let (good, n) = summary.goodput.iter().fold((0, 0), |(good, n), g| (good + g.good, n + g.n));
    tiles.push((percent(good as f64 / n.max(1) as f64), "of requests within their objective".into()));
    if let Some(reuse) = &summary.reuse {
        tiles.push((percent(reuse.measured), format!("reused; {} possible", percent(reuse.infinite))));
    }
    let failed = summary.counted - summary.ok;
    tiles.push((failed.to_string(), format!("of {} not whole", summary.counted)));
    out.push_str("<div class=\"tiles\">");
    for (value, name) in tiles {
        let _ = write!(out, "<div class=\"tile\"><b>{}</b><span>{}</span></div>", escape(&value), escape(&name));
    }
    out.push_str("</div>");
}

fn marks(summary: &Summary) -> Vec<(f64, String)> {
    summary.faults.iter().map(|fault| (fault.at_s, fault.act.clone())).collect()
}

fn scatter(summary: &Summary, records: &[&Record]) -> String {
    let about = &summary.about;
    let place = |record: &&&Record| (record.due_ns as f64 / 1e9, record.ttft_ms().unwrap_or_else(|| record.e2e_ms()));
    let is_good = |record: &&&Record| good(record, &about.slo(record.class));
    let of = |name: &str, wanted: &dyn Fn(&&&Record) -> bool| Series {
        name: name.into(),
        points: records.iter().filter(|record| wanted(record)).map(|record| place(&record)).collect(),
        dots: true,
    };
    let series = vec![of("within the objective", &is_good), of("missed or failed", &|record| !is_good(record))];
    let limits = about.slo.ttft_ms.or(about.classes.first().and_then(|class| class.slo.ttft_ms));
    let limits = limits.map(|limit| (limit, format!("{} ms", ms(limit)))).into_iter().collect();
    Plot { x: "due, s", y: "TTFT, ms", scale: Scale::Log, series, marks: marks(summary), limits }.draw()
}

/// The share of values that are at most x.
fn cumulative(name: &str, values: impl Iterator<Item = f64>) -> Series {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let n = values.len().max(1) as f64;
    let points = values.into_iter().zip(1u32..).map(|(value, rank)| (value, f64::from(rank) / n * 100.0)).collect();
    Series { name: name.into(), points, dots: false }
}

fn curves(records: &[&Record]) -> String {
    let series = vec![
        cumulative("from due", records.iter().filter_map(|record| record.ttft_ms())),
        cumulative("from sent", records.iter().filter_map(|record| record.ttft_sent_ms())),
    ];
    Plot { x: "TTFT, ms", y: "requests, %", scale: Scale::Linear, series, marks: vec![], limits: vec![] }.draw()
}

fn gap_curve(records: &[&Record]) -> String {
    let gaps = records.iter().flat_map(|record| record.gaps_us.iter().map(|gap| f64::from(*gap) / 1e3));
    let mut series = cumulative("gaps", gaps);
    // The slowest thousandth would squeeze all others to the left; the table has the maximum.
    let kept = series.points.len() - series.points.len() / 1000;
    series.points.truncate(kept);
    Plot { x: "ms", y: "gaps, %", scale: Scale::Linear, series: vec![series], marks: vec![], limits: vec![] }.draw()
}

fn load(records: &[&Record]) -> String {
    let end_s = records.iter().map(|record| record.end_ns).max().unwrap_or(1) as f64 / 1e9;
    let width = end_s / WINDOWS as f64;
    let window = |at_ns: u64| ((at_ns as f64 / 1e9 / width) as usize).min(WINDOWS - 1);
    let (mut due, mut ended, mut open) = ([0u32; WINDOWS], [0u32; WINDOWS], [0u32; WINDOWS]);
    for record in records {
        due[window(record.due_ns)] += 1;
        ended[window(record.end_ns)] += u32::from(record.ok());
        let middle = |at: usize| ((at as f64 + 0.5) * width * 1e9) as u64;
        (window(record.due_ns)..=window(record.end_ns))
            .filter(|at| record.due_ns <= middle(*at) && middle(*at) < record.end_ns)
            .for_each(|at| open[at] += 1);
    }
    let line = |name: &str, counts: &[u32], per: f64| {
        let points = (0..WINDOWS).map(|at| ((at as f64 + 0.5) * width, f64::from(counts[at]) / per)).collect();
        Series { name: name.into(), points, dots: false }
    };
    let series = vec![line("due a second", &due, width), line("whole a second", &ended, width), line("under way", &open, 1.0)];
    Plot { x: "s", y: "requests", scale: Scale::Linear, series, marks: vec![], limits: vec![] }.draw()
}

fn phases(summary: &Summary) -> String {
    let Some((all, slow)) = &summary.phases else { return String::new() };
    let row = |name: &str, p: &Phases| (name.to_owned(), p.parts().map(|(_, ms)| ms).to_vec());
    let rows = [row("all requests", all), row("slowest tenth", slow)];
    let note =
        format!("<p>Unexplained: {} of all, {} of the slowest tenth.</p>", percent(all.unexplained), percent(slow.unexplained));
    bars(&all.parts().map(|(name, _)| name), &rows, "ms") + &note
}

fn reuse(summary: &Summary) -> String {
    let Some(reuse) = &summary.reuse else { return String::new() };
    let row = |name: String, share: f64| (name, vec![share * 100.0]);
    let mut rows = vec![row("measured".into(), reuse.measured), row("never forgets".into(), reuse.infinite)];
    rows.extend(reuse.lru.map(|lru| row(format!("LRU, {} blocks", summary.about.cache_blocks.unwrap_or(0)), lru)));
    bars(&["share of prompt tokens"], &rows, "%")
}

fn table(out: &mut String, title: &str, head: &[&str], rows: &[Vec<String>]) {
    if rows.is_empty() {
        return;
    }
    let _ = write!(out, "<section class=\"card wide\"><h2>{}</h2><table><tr>", escape(title));
    for cell in head {
        let _ = write!(out, "<th>{}</th>", escape(cell));
    }
    for row in rows {
        out.push_str("</tr><tr>");
        for cell in row {
            let _ = write!(out, "<td>{}</td>", escape(cell));
        }
    }
    out.push_str("</tr></table></section>");
}

fn tables(out: &mut String, summary: &Summary) {
    let head: Vec<&str> =
        ["milliseconds", "n", "mean"].into_iter().chain(PERCENTILES.map(|(name, _)| name)).chain(["max"]).collect();
    let times = TIMES.iter().filter_map(|(name, title)| {
        let mut row = vec![(*title).to_owned()];
        row.extend(cells(summary.times.get(*name)?));
        Some(row)
    });
    table(out, "Times; a percentile with fewer than ten values beyond it is not said", &head, &times.collect::<Vec<_>>());
    let goodput = summary.goodput.iter().map(|g| {
        let limits = [("ttft", g.slo.ttft_ms), ("tpot", g.slo.tpot_ms), ("e2e", g.slo.e2e_ms), ("gap", g.slo.gap_ms)];
        let limits =
            limits.iter().filter_map(|(name, limit)| Some(format!("{name} {} ms", ms((*limit)?)))).collect::<Vec<_>>().join(", ");
        let limits = if limits.is_empty() { "a whole answer".to_owned() } else { limits };
        let interval = format!("{} … {}", percent(g.interval.0), percent(g.interval.1));
        vec![g.class.clone(), limits, g.n.to_string(), g.good.to_string(), percent(g.share), interval, format!("{:.2}", g.per_s)]
    });
    table(
        out,
        "Goodput",
        &["class", "objective", "requests", "good", "share", "95 % interval", "good/s"],
        &goodput.collect::<Vec<_>>(),
    );
    let errors = summary.errors.iter().map(|(kind, n)| vec![kind.clone(), n.to_string()]);
    table(out, "Not whole", &["kind", "requests"], &errors.collect::<Vec<_>>());
    let faults = summary.faults.iter().map(|f| {
        let done = f.error.clone().unwrap_or_else(|| "done".into());
        vec![
            format!("{:.1} s", f.at_s),
            f.act.clone(),
            done,
            f.failed.to_string(),
            f.bad.to_string(),
            format!("{:.2} s", f.recovery_s),
        ]
    });
    table(
        out,
        "What was done to the cluster",
        &["at", "act", "result", "failed", "bad", "recovered after"],
        &faults.collect::<Vec<_>>(),
    );
    if let Some(g) = &summary.golden {
        let row = vec![g.same.to_string(), g.different.to_string(), g.incomparable.to_string(), format!("{:?}", g.named)];
        table(out, "Answers against the golden run", &["equal", "different", "not compared", "which differ"], &[row]);
    }
}
