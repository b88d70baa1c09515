//! `millload experiment`: the same plans on fresh local clusters that place requests by different rules.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::Verdict;
use super::execute::{Once, SendArgs, execute};
use crate::local::Local;
use crate::millload::experiment::{Ran, against, table, verdict};
use crate::millload::plan::Plan;
use crate::millload::report::Results;
use crate::millload::report::text::{ms, percent};

/// What to try.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  millload experiment conversation.jsonl toolagent.jsonl --weights model.gguf --rules auto,split,whole --rounds 3 --slo ttft=2s\nExit code 1: the judged rule is worse than another, beyond the tolerance and beyond doubt."
)]
pub struct ExperimentArgs {
    /// The plans
    #[arg(required = true)]
    plans: Vec<PathBuf>,
    /// Model directory or GGUF file
    #[arg(long, env = "MILLRACE_MODEL", value_name = "PATH")]
    weights: PathBuf,
    /// Rules of `millctl local up --route`
    #[arg(long, value_delimiter = ',', default_value = "auto,cache,round-robin,least-loaded,split,whole")]
    rules: Vec<String>,
    /// How often each rule runs each plan
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// More arguments for `millctl local up`
    #[arg(long, default_value = "--prefill 2 --decode 2", allow_hyphen_values = true, value_name = "ARGUMENTS")]
    up: String,
    /// The rule that must not be worse than the others
    #[arg(long, default_value = "auto")]
    judge: String,
    /// How much worse it may be, in per cent
    #[arg(long, default_value_t = 2.0)]
    tolerance: f64,
    /// Due times are divided by this
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
    /// Folder of the results: one for each plan, rule and round
    #[arg(short, long, default_value = "experiment", value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    send: SendArgs,
}

/// Does it.
///
/// # Errors
/// A file cannot be used, or a cluster does not serve.
pub fn main(args: &ExperimentArgs) -> Result<Verdict> {
    ensure!(args.weights.exists(), "--weights {}: there is no such file", args.weights.display());
    let mut worse = false;
    for path in &args.plans {
        let plan = Arc::new(Plan::load(path)?);
        let name = path.file_stem().map_or_else(|| plan.digest.clone(), |stem| stem.to_string_lossy().into_owned());
        let ran = rounds(args, &plan, &name)?;
        let text = table(&name, &ran);
        println!("\n{text}");
        std::fs::write(args.out.join(&name).join("table.md"), text)?;
        worse |= judge(args, &ran);
    }
    Ok(if worse { Verdict::Fails } else { Verdict::Holds })
}

/// All rules in turn, the first one another in each round.
fn rounds(args: &ExperimentArgs, plan: &Arc<Plan>, name: &str) -> Result<Vec<Ran>> {
    println!("{:<22}{:>6}  {:<14}{:>10}{:>14}{:>14}{:>10}", name, "round", "rule", "reused", "TTFT mean ms", "E2E mean ms", "good");
    let mut ran: Vec<Ran> = args.rules.iter().map(|rule| Ran::new(rule)).collect();
    for round in 0..args.rounds {
        for turn in 0..ran.len() {
            let one = &mut ran[(turn + round as usize) % args.rules.len()];
            let results = run(args, plan, &one.rule).with_context(|| format!("{name}, placed by {}", one.rule))?;
            results.save(&args.out.join(name).join(format!("{}-{}", one.rule, round + 1)))?;
            let summary = &results.summary;
            let mean = |time: &str| summary.times.get(time).map_or("–".to_owned(), |dist| ms(dist.mean));
            let (good, n) = summary.goodput.iter().fold((0, 0), |(good, n), g| (good + g.good, n + g.n));
            let reused = summary.reuse.as_ref().map_or(f64::NAN, |reuse| reuse.measured);
            let (ttft, e2e, good) = (mean("ttft"), mean("e2e"), percent(good as f64 / n as f64));
            println!("{:<22}{:>6}  {:<14}{:>10}{ttft:>14}{e2e:>14}{good:>10}", "", round + 1, one.rule, percent(reused));
            one.add(results.summary, results.records, plan.requests.len() as u32);
        }
    }
    Ok(ran)
}

fn run(args: &ExperimentArgs, plan: &Arc<Plan>, rule: &str) -> Result<Results> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut up: Vec<std::ffi::OsString> = args.up.split_whitespace().map(Into::into).collect();
    up.extend(["--route".into(), rule.into(), "--model".into(), args.weights.clone().into()]);
    let local = runtime.block_on(Local::start(up))?;
    let send = SendArgs { url: local.url().to_owned(), quiet: true, ..args.send.clone() };
    let results = execute(plan, &send, &Once { label: rule.to_owned(), ..Once::at_speed(args.speed) });
    runtime.block_on(local.stop())?;
    let results = results?;
    ensure!(!results.summary.about.partial, "interrupted");
    Ok(results)
}

/// Says how the judged rule stands against each other one; true when it is worse than any.
fn judge(args: &ExperimentArgs, ran: &[Ran]) -> bool {
    let Some(judged) = ran.iter().find(|ran| ran.rule == args.judge) else { return false };
    let mut any = false;
    for other in ran.iter().filter(|other| other.rule != judged.rule) {
        let lines = against(&judged.summaries[0].about, other, judged, args.tolerance / 100.0);
        let (text, worse) = verdict(&judged.rule, &other.rule, &lines);
        println!("{text}");
        any |= worse;
    }
    any
}
