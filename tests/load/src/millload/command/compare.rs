//! `millload compare A B`.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;

use super::Verdict;
use crate::millload::compare::{Better, Line, compare};
use crate::millload::report::Results;
use crate::millload::report::text::ms;

/// What to compare.
#[derive(Args, Debug)]
#[command(after_help = "Exit code 0: nothing is worse. 1: something is. 2: they cannot be compared.")]
pub struct CompareArgs {
    /// Results before
    a: PathBuf,
    /// Results after
    b: PathBuf,
    /// A change for the worse that is forgiven, in per cent
    #[arg(long, default_value_t = 0.0)]
    tolerance: f64,
    /// JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Does it.
///
/// # Errors
/// Results that cannot be read, or of different plans.
pub fn main(args: &CompareArgs) -> Result<Verdict> {
    let (a, b) = (Results::load(&args.a)?, Results::load(&args.b)?);
    let (plan_a, plan_b) = (&a.summary.about, &b.summary.about);
    ensure!(plan_a.plan == plan_b.plan, "different plans ({} and {}): requests cannot be paired", plan_a.plan, plan_b.plan);
    ensure!(plan_a.speed == plan_b.speed, "different speeds ({} and {})", plan_a.speed, plan_b.speed);
    let lines = compare(plan_a, &a.records, &b.records, args.tolerance / 100.0);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&lines)?);
    } else {
        println!(
            "{:<14}{:>7}{:>12}{:>12}{:>10}  {:<22}verdict",
            "figure", "pairs", "A, mean", "B, mean", "change", "95 % interval"
        );
        lines.iter().filter(|line| line.pairs > 0).for_each(print);
    }
    let worse = lines.iter().any(|line| line.verdict == Better::Worse);
    Ok(if worse { Verdict::Fails } else { Verdict::Holds })
}

fn print(line: &Line) {
    let verdict = match line.verdict {
        Better::Better => "better",
        Better::Worse => "WORSE",
        Better::NoDifference => "no difference",
        Better::TooFew => "too few pairs",
    };
    let signed = |share: f64| format!("{:+.2} %", share * 100.0);
    let interval = format!("{} .. {}", signed(line.interval.0), signed(line.interval.1));
    println!(
        "{:<14}{:>7}{:>12}{:>12}{:>10}  {interval:<22}{verdict}",
        line.name,
        line.pairs,
        ms(line.a),
        ms(line.b),
        signed(line.change)
    );
}
