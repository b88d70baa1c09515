//! `millload run` and `millload report`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::Verdict;
use super::execute::{Once, SendArgs, execute};
use crate::millload::faults::{self, Site, Step};
use crate::millload::plan::{Plan, Slo};
use crate::millload::report::{Results, text};
use crate::millload::summary::{Summary, Validity, summarise};

/// What to run.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  millload run plan.jsonl -o results --slo ttft=500ms,tpot=50ms\n  millload run plan.jsonl --cluster .millrace --faults 'at 30s kill decode-2; at 60s drain prefill-1'"
)]
pub struct RunArgs {
    /// The plan
    plan: PathBuf,
    /// Folder of the results
    #[arg(short, long, default_value = "results", value_name = "DIR")]
    out: PathBuf,
    /// A name for the report
    #[arg(long, default_value = "")]
    label: String,
    /// Due times are divided by this
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
    /// Run only part N of M of the plan: N/M, from 1
    #[arg(long, value_parser = parse_part, default_value = "1/1")]
    part: (u32, u32),
    /// Begin at this time, seconds since 1970: for several generators
    #[arg(long, value_name = "UNIX_SECONDS")]
    begin: Option<f64>,
    /// What is done to the cluster and when, as text or a file with it
    #[arg(long, value_name = "TIMELINE")]
    faults: Option<String>,
    /// Folder of the local cluster (`millctl local up --dir`)
    #[arg(long, value_name = "DIR")]
    cluster: Option<PathBuf>,
    /// The millctl for acts; the one beside this program when absent
    #[arg(long)]
    millctl: Option<PathBuf>,
    /// Results of the same plan whose answers are right
    #[arg(long, value_name = "DIR")]
    golden: Option<PathBuf>,
    /// Do not fail for the generator's own lag
    #[arg(long)]
    allow_lag: bool,
    #[command(flatten)]
    send: SendArgs,
}

fn parse_part(text: &str) -> Result<(u32, u32), String> {
    let parts = text.split_once('/').and_then(|(index, of)| Some((index.parse::<u32>().ok()?, of.parse::<u32>().ok()?)));
    match parts {
        Some((index, of)) if index >= 1 && index <= of => Ok((index - 1, of)),
        _ => Err(format!("{text:?}: expected N/M with N from 1 to M")),
    }
}

/// The timeline: a file of that name, or the text itself.
fn timeline(given: Option<&str>) -> Result<Vec<Step>> {
    let Some(given) = given else { return Ok(Vec::new()) };
    let text = if given.trim_start().starts_with("at ") {
        given.to_owned()
    } else {
        std::fs::read_to_string(given).context(given.to_owned())?
    };
    faults::parse(&text).map_err(anyhow::Error::msg)
}

/// Does it.
///
/// # Errors
/// A file or the server cannot be used.
pub fn main(args: &RunArgs) -> Result<Verdict> {
    let plan = Arc::new(Plan::load(&args.plan)?);
    let millctl = match &args.millctl {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("millctl"),
    };
    let once = Once {
        label: args.label.clone(),
        speed: args.speed,
        part: args.part,
        begin_unix_s: args.begin,
        faults: timeline(args.faults.as_deref())?,
        site: args.cluster.clone().map(|dir| Site { dir, millctl }),
        golden: args.golden.clone(),
    };
    let results = execute(&plan, &args.send, &once)?;
    results.save(&args.out)?;
    print!("{}", text::report(&results.summary));
    println!("\nwritten {}", args.out.join("report.html").display());
    Ok(judge(&results.summary, args.allow_lag))
}

fn judge(summary: &Summary, allow_lag: bool) -> Verdict {
    let late = matches!(summary.validity, Validity::Invalid(_)) && !allow_lag;
    let wrong = summary.golden.as_ref().is_some_and(|golden| golden.different > 0);
    if late || wrong { Verdict::Fails } else { Verdict::Holds }
}

/// What to report.
#[derive(Args, Debug)]
pub struct ReportArgs {
    /// Folders of results of one plan: one, or its parts
    #[arg(required = true)]
    results: Vec<PathBuf>,
    /// The plan
    #[arg(long)]
    plan: PathBuf,
    /// Folder of the new results
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Another objective
    #[arg(long, value_parser = Slo::parse)]
    slo: Option<Slo>,
    /// Seconds at the start that do not count
    #[arg(long)]
    warm_up: Option<f64>,
    /// Another size of cache
    #[arg(long)]
    cache_blocks: Option<usize>,
}

/// Joins parts and makes their figures anew.
///
/// # Errors
/// A file cannot be used, or the results are not of this plan.
pub fn report(args: &ReportArgs) -> Result<Verdict> {
    let plan = Plan::load(&args.plan)?;
    let parts = args.results.iter().map(|dir| Results::load(dir)).collect::<Result<Vec<_>>>()?;
    for (dir, part) in args.results.iter().zip(&parts) {
        ensure!(part.summary.about.plan == plan.digest, "{}: of another plan", dir.display());
    }
    let first = &parts[0].summary;
    let mut about = first.about.clone();
    if parts.len() > 1 {
        about.part = (0, 1);
        about.planned = parts.iter().map(|part| part.summary.about.planned).sum();
        about.partial = parts.iter().any(|part| part.summary.about.partial) || about.planned < plan.requests.len() as u64;
    }
    about.slo = args.slo.unwrap_or(about.slo);
    about.warm_up_s = args.warm_up.unwrap_or(about.warm_up_s);
    about.cache_blocks = args.cache_blocks.or(about.cache_blocks);
    let mut faults = first.faults.clone();
    let golden = first.golden.clone();
    let mut records: Vec<_> = parts.into_iter().flat_map(|part| part.records).collect();
    records.sort_by_key(|record| record.i);
    ensure!(
        records.windows(2).all(|pair| pair[0].i != pair[1].i),
        "a request is in two of the results: they are not parts of one run"
    );
    let mut summary = summarise(about, &plan, &records);
    faults::judge(&mut faults, &summary.about, &records);
    (summary.faults, summary.golden) = (faults, golden);
    let results = Results { summary, records };
    results.save(&args.out)?;
    print!("{}", text::report(&results.summary));
    Ok(judge(&results.summary, true))
}
