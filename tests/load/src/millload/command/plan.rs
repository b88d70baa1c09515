//! `millload plan WORKLOAD` and `millload plan verify`.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::Verdict;
use crate::millload::cache::reuse;
use crate::millload::plan::Plan;
use crate::millload::trace;
use crate::millload::verify::verify;
use crate::millload::workload::Workload;

/// What to do.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  millload plan -o p.jsonl trace conversation.jsonl --block-tokens 16 --requests 500 --speed 4\n  millload plan verify p.jsonl --against conversation.jsonl"
)]
pub struct PlanArgs {
    /// Where the plan goes
    #[arg(short, long, default_value = "plan.jsonl", value_name = "FILE")]
    out: PathBuf,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Prove a plan's sharing and lengths
    Verify(VerifyArgs),
    #[command(flatten)]
    Make(Workload),
}

#[derive(Args, Debug)]
struct VerifyArgs {
    /// The plan
    plan: PathBuf,
    /// The trace that it was made from: every row must have its length and its blocks
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Tokens that an id stands for in the trace
    #[arg(long, default_value_t = 512)]
    trace_block: u32,
    /// Caches to predict, in blocks
    #[arg(long, value_delimiter = ',')]
    cache_blocks: Vec<usize>,
}

/// Does it.
///
/// # Errors
/// A file that cannot be read or written, or a workload that makes no sense.
pub fn main(args: &PlanArgs) -> Result<Verdict> {
    match &args.what {
        What::Verify(verify) => check(verify),
        What::Make(workload) => {
            let plan = workload.plan()?;
            plan.save(&args.out)?;
            describe(&plan);
            println!("written     {}", args.out.display());
            Ok(Verdict::Holds)
        }
    }
}

fn describe(plan: &Plan) {
    let requests = &plan.requests;
    let span_s = requests.last().map_or(0.0, |last| last.due_ns as f64 / 1e9);
    let prompt: u64 = requests.iter().map(super::super::plan::Planned::prompt_tokens).sum();
    let output: u64 = requests.iter().map(|request| u64::from(request.out)).sum();
    let n = requests.len().max(1) as f64;
    println!("plan        {} (seed {})", plan.digest, plan.header.seed);
    println!("workload    {}", plan.header.workload);
    println!("arrivals    {}; the last is due after {span_s:.1} s", plan.header.arrivals);
    println!("requests    {} ({} units)", requests.len(), plan.units().len());
    println!("tokens      prompt {prompt} (mean {:.1}), answer {output} (mean {:.1})", prompt as f64 / n, output as f64 / n);
}

fn check(args: &VerifyArgs) -> Result<Verdict> {
    let plan = Plan::load(&args.plan)?;
    describe(&plan);
    let found = verify(&plan)?;
    println!("sharing     {} wrong of {} pairs", found.wrong, found.requests * found.requests.saturating_sub(1) / 2);
    if found.blurred > 0 {
        println!("            {} share some tokens more than planned, but no block", found.blurred);
    }
    for capacity in std::iter::once(None).chain(args.cache_blocks.iter().copied().map(Some)) {
        let cache = capacity.map_or("that never forgets".to_owned(), |blocks| format!("of {blocks} blocks (LRU)"));
        println!("reuse       {:.4} of prompt tokens in one cache {cache}", reuse(&plan, capacity).share(&plan, |_| true));
    }
    if let Some(path) = &args.against {
        let rows = trace::read(path, plan.requests.len())?;
        match trace::agrees(&plan, &rows, args.trace_block) {
            Ok(()) => println!("trace       every row has its length and its blocks"),
            Err(error) => {
                println!("trace       {error:#}");
                return Ok(Verdict::Fails);
            }
        }
    }
    Ok(if found.wrong == 0 { Verdict::Holds } else { Verdict::Fails })
}
