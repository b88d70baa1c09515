//! `millload search` and `millload sweep`: the same plan at several rates.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::Verdict;
use super::execute::{Once, SendArgs, execute};
use crate::millload::plan::{Header, Plan};
use crate::millload::report::html::{card, document_head};
use crate::millload::report::svg::{Plot, Scale, Series};
use crate::millload::report::text::{ms, percent};
use crate::millload::search::{Point, Search};

/// What both have in common.
#[derive(Args, Debug)]
struct Common {
    /// The plan; a point takes as many of its requests as fit its time
    plan: PathBuf,
    /// Folder of the curve
    #[arg(short, long, default_value = "curve", value_name = "DIR")]
    out: PathBuf,
    /// Seconds of each point
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// Other tokens at each point, so that none finds the cache of the one before
    #[arg(long)]
    cold: bool,
    #[command(flatten)]
    send: SendArgs,
}

/// What to search.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  millload search plan.jsonl --slo ttft=500ms,tpot=50ms --from 2 --attain 0.95")]
pub struct SearchArgs {
    #[command(flatten)]
    common: Common,
    /// The first rate, requests a second
    #[arg(long, default_value_t = 1.0)]
    from: f64,
    /// No rate above this
    #[arg(long, default_value_t = 10_000.0)]
    rate_max: f64,
    /// The share of requests that must meet their objective
    #[arg(long, default_value_t = 0.9)]
    attain: f64,
    /// Measurements at most
    #[arg(long, default_value_t = 12)]
    steps: u32,
}

/// Which rates to measure.
#[derive(Args, Debug)]
pub struct SweepArgs {
    #[command(flatten)]
    common: Common,
    /// Rates, requests a second
    #[arg(long, value_delimiter = ',', required = true)]
    rates: Vec<f64>,
}

/// Finds the best rate.
///
/// # Errors
/// The server or a file cannot be used.
pub fn search(args: &SearchArgs) -> Result<Verdict> {
    let plan = open_plan(&args.common)?;
    let mut search = Search::new(args.from, args.attain, args.rate_max, args.steps);
    let mut points = Vec::new();
    while let Some(rate) = search.next() {
        let point = measure(&plan, &args.common, rate, points.len() as u64)?;
        search.found(&point);
        points.push(point);
    }
    save(&args.common.out, &mut points)?;
    let (passed, failed) = search.bracket();
    let best = points.iter().rfind(|point| point.rate == passed);
    match (best, failed) {
        (Some(best), failed) => {
            let (low, high) = best.interval;
            let beyond = failed.map_or("none failed".to_owned(), |rate| format!("{rate:.3}/s failed"));
            println!(
                "best        {passed:.3} requests/s with {} within the objective (95 %: {}..{}); {beyond}",
                percent(best.share),
                percent(low),
                percent(high)
            );
            println!("goodput     {:.3} good requests/s", best.goodput_per_s);
            Ok(Verdict::Holds)
        }
        (None, _) => {
            println!("no rate that was measured met the objective");
            Ok(Verdict::Fails)
        }
    }
}

/// Measures every rate.
///
/// # Errors
/// The server or a file cannot be used.
pub fn sweep(args: &SweepArgs) -> Result<Verdict> {
    let plan = open_plan(&args.common)?;
    let measured = (0..).zip(&args.rates).map(|(at, rate)| measure(&plan, &args.common, *rate, at));
    let mut points = measured.collect::<Result<Vec<_>>>()?;
    save(&args.common.out, &mut points)?;
    Ok(if points.iter().all(|point| point.valid) { Verdict::Holds } else { Verdict::Fails })
}

fn open_plan(common: &Common) -> Result<Plan> {
    let plan = Plan::load(&common.plan)?;
    ensure!(plan.header.users.is_none(), "a closed loop has no rate");
    ensure!(own_rate(&plan).is_some(), "a plan needs two due times to have a rate");
    println!(
        "{:>10}{:>8}{:>10}{:>20}{:>12}{:>12}{:>12}",
        "rate/s", "n", "good", "95 % interval", "goodput/s", "TTFT ms", "TPOT ms"
    );
    Ok(plan)
}

/// Requests a second of the plan as it is. Sessions count with all their turns.
fn own_rate(plan: &Plan) -> Option<f64> {
    let (first, last) = (plan.requests.first()?.due_ns, plan.requests.last()?.due_ns);
    (last > first).then(|| (plan.requests.len() - 1) as f64 / ((last - first) as f64 / 1e9))
}

fn measure(plan: &Plan, common: &Common, rate: f64, at: u64) -> Result<Point> {
    ensure!(rate.is_finite() && rate > 0.0, "a rate must be above 0");
    let speed = rate / own_rate(plan).context("the plan has no rate")?;
    let limit_ns = (common.seconds * speed * 1e9) as u64;
    let requests = plan.requests.iter().take_while(|request| request.due_ns <= limit_ns).cloned().collect();
    let seed = plan.header.seed.wrapping_add(if common.cold { at + 1 } else { 0 });
    let part = Arc::new(Plan::new(Header { seed, ..plan.header.clone() }, requests)?);
    let results = execute(&part, &common.send, &Once::at_speed(speed))?;
    ensure!(!results.summary.about.partial, "interrupted");
    let point = Point::of(rate, &results.summary);
    let (low, high) = point.interval;
    let range = format!("{}..{}", percent(low), percent(high));
    let valid = if point.valid { "" } else { "  INVALID: the generator was late" };
    println!(
        "{rate:>10.3}{:>8}{:>10}{range:>20}{:>12.3}{:>12}{:>12}{valid}",
        point.n,
        percent(point.share),
        point.goodput_per_s,
        ms(point.ttft_ms),
        ms(point.tpot_ms)
    );
    Ok(point)
}

fn save(dir: &Path, points: &mut [Point]) -> Result<()> {
    points.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    let mut csv = "rate,n,good_share,low,high,goodput_per_s,output_tokens_per_s,ttft_ms,tpot_ms,valid\n".to_owned();
    for p in points.iter() {
        let (low, high) = p.interval;
        let _ = writeln!(
            csv,
            "{},{},{},{low},{high},{},{},{},{},{}",
            p.rate, p.n, p.share, p.goodput_per_s, p.output_tokens_per_s, p.ttft_ms, p.tpot_ms, p.valid
        );
    }
    let write = || -> Result<()> {
        std::fs::create_dir_all(dir)?;
        std::fs::write(dir.join("curve.csv"), csv)?;
        std::fs::write(dir.join("curve.json"), serde_json::to_string_pretty(points)? + "\n")?;
        std::fs::write(dir.join("curve.html"), page(points))?;
        Ok(())
    };
    write().with_context(|| dir.display().to_string())?;
    println!("written     {}", dir.join("curve.html").display());
    Ok(())
}

fn page(points: &[Point]) -> String {
    let line = |name: &str, value: &dyn Fn(&Point) -> f64| Series {
        name: name.into(),
        points: points.iter().map(|point| (point.rate, value(point))).collect(),
        dots: false,
    };
    let plot = |y, scale, series| Plot { x: "requests due a second", y, scale, series, marks: vec![], limits: vec![] }.draw();
    let mut out = document_head("Goodput over rate") + "<h1>Goodput over rate</h1><div class=\"grid\">";
    let goodput = vec![line("good a second", &|p| p.goodput_per_s), line("due a second", &|p| p.rate)];
    card(
        &mut out,
        "Goodput",
        "Requests a second that met their objective, beside those that were due.",
        &plot("requests/s", Scale::Linear, goodput),
    );
    let share = vec![
        line("share", &|p| p.share * 100.0),
        line("95 %, low", &|p| p.interval.0 * 100.0),
        line("95 %, high", &|p| p.interval.1 * 100.0),
    ];
    card(&mut out, "Attainment", "Share within the objective, with its 95 % interval.", &plot("%", Scale::Linear, share));
    let times = vec![line("TTFT", &|p| p.ttft_ms), line("TPOT", &|p| p.tpot_ms)];
    card(&mut out, "Times", "Medians, from the moment requests were due.", &plot("ms", Scale::Log, times));
    out + "</div></main></body></html>\n"
}
