//! `millmatrix`: runs the failure matrix and the migrations, and says for each what became of the request and how the fault was proven.
//! `make matrix` runs all of it, `make test` a seeded share. The exit code is 0 when every case held.

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use millrace_e2e::matrix::migrate::{LOSSES, Loss};
use millrace_e2e::matrix::{Asked, Case, Matrix, Outcome, Went, cases, client};

/// A step that has no common divisor with the number of cases: a share has cases of every kind.
const STRIDE: usize = 37;

/// Runs the failure matrix.
#[derive(Parser, Debug)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    plan: Plan,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// The client's process: streams one answer and says what comes
    Client {
        /// Where the cluster is
        at: SocketAddr,
        /// What to ask, as JSON
        body: String,
    },
}

#[derive(Args, Debug)]
struct Plan {
    /// Rounds; faults are short and long in turn
    #[arg(long, default_value_t = 1)]
    repeats: usize,
    /// So many cases of each round instead of all, chosen by the seed
    #[arg(long)]
    share: Option<usize>,
    /// Chooses the share, and the first round
    #[arg(long, default_value_t = 0)]
    seed: usize,
    /// Only cases whose name has this, such as kill-prefill or streaming
    #[arg(long)]
    only: Option<String>,
    /// Of the losses of a decode node at each token: each of so many; 0 for none
    #[arg(long, default_value_t = 1)]
    migrate_each: usize,
    /// The same with the demo's model in f32
    #[arg(long, default_value_t = 0)]
    model_migrate_each: usize,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.to_string()),
    };
    let result = runtime.block_on(async {
        match cli.command {
            Some(Command::Client { at, body }) => {
                let body = serde_json::from_str(&body).map_err(|e| e.to_string())?;
                client::speak(at, &body).await;
                Ok(())
            }
            None => run(&cli.plan).await,
        }
    });
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => fail(&reason),
    }
}

fn fail(reason: &str) -> ExitCode {
    eprintln!("millmatrix: {reason}");
    ExitCode::FAILURE
}

async fn run(plan: &Plan) -> Result<(), String> {
    let mut failed = Vec::new();
    if plan.share != Some(0) || plan.migrate_each > 0 {
        run_matrix(plan, &mut failed).await?;
    }
    migrate_model(plan, &mut failed).await?;
    if failed.is_empty() { Ok(()) } else { Err(format!("{} failed:\n{}", failed.len(), failed.join("\n"))) }
}

async fn run_matrix(plan: &Plan, failed: &mut Vec<String>) -> Result<(), String> {
    println!("cuts: by a relay before each process; every packet to or from the victim is lost and counted");
    let mut matrix = Matrix::start().await?;
    for round in plan.seed..plan.seed + plan.repeats {
        let chosen = choose(plan, round);
        let (all, mut held, mut errors) = (chosen.len(), 0, 0);
        for (index, case) in chosen {
            match matrix.run(case, round + index).await {
                Ok(outcome) => {
                    (held, errors) = (held + 1, errors + usize::from(outcome.went == Went::Error));
                    tell(case, &outcome);
                }
                Err(reason) => {
                    println!("FAILED {case}: {reason}");
                    failed.push(format!("--seed {round} --only {case}: {reason}"));
                    matrix = renewed(matrix).await?;
                }
            }
        }
        println!("round {round}: {held} of {all} cases held, {errors} of them with a typed error");
    }
    migrate(plan, &mut matrix, failed).await
}

/// The cases of a round with their numbers, which do not depend on how many are chosen.
fn choose(plan: &Plan, round: usize) -> Vec<(usize, Case)> {
    let cases = cases();
    let order = (0..cases.len()).map(|i| if plan.share.is_some() { (round + i * STRIDE) % cases.len() } else { i });
    let wanted = |case: &Case| plan.only.as_ref().is_none_or(|only| case.to_string().contains(only.as_str()));
    let chosen = order.map(|i| (i, cases[i])).filter(|(_, case)| wanted(case));
    chosen.take(plan.share.unwrap_or(cases.len())).collect()
}

fn tell(case: Case, outcome: &Outcome) {
    let Outcome { went, late, rest, recomputed, attempts, proof } = outcome;
    let went = match went {
        Went::Same => "same tokens",
        Went::Error => "typed error",
        Went::Freed => "all freed",
    };
    let (late, rest) = (late.as_millis(), rest.as_millis());
    println!(
        "{case:<28} {went:<12} late {late:>5} ms  at rest {rest:>4} ms  tickets {attempts}  recomputed {recomputed:>3}  {proof}"
    );
}

/// Another cluster, after a case that failed; the logs of the old one are kept.
async fn renewed(matrix: Matrix) -> Result<Matrix, String> {
    let kept = matrix.parts.dir().with_extension("failed");
    std::fs::rename(matrix.parts.dir(), &kept).map_err(|e| e.to_string())?;
    println!("its logs are in {}", kept.display());
    drop(matrix);
    Matrix::start().await
}

/// Which tokens are the last before a loss.
fn losses(seed: usize, each: usize) -> Vec<usize> {
    if each == 0 { Vec::new() } else { (1..=LOSSES).skip(seed % each).step_by(each).collect() }
}

async fn migrate(plan: &Plan, matrix: &mut Matrix, failed: &mut Vec<String>) -> Result<(), String> {
    let tokens = losses(plan.seed, plan.migrate_each);
    if tokens.is_empty() {
        return Ok(());
    }
    for (asked, what) in matrix.migrants().await?.into_iter().zip(["greedy", "sampled"]) {
        lose(matrix, &[asked], &tokens, what, failed).await;
    }
    Ok(())
}

async fn migrate_model(plan: &Plan, failed: &mut Vec<String>) -> Result<(), String> {
    let tokens = losses(plan.seed, plan.model_migrate_each);
    if tokens.is_empty() {
        return Ok(());
    }
    let (mut matrix, asked) = Matrix::with_model().await?;
    lose(&mut matrix, &asked, &tokens, "the model in f32", failed).await;
    Ok(())
}

/// Kills decode nodes at `tokens`, asking `asked` in turn.
async fn lose(matrix: &mut Matrix, asked: &[Asked], tokens: &[usize], what: &str, failed: &mut Vec<String>) {
    let mut losses: Vec<Loss> = Vec::new();
    for (token, asked) in tokens.iter().zip(asked.iter().cycle()) {
        match matrix.migrate(asked, *token).await {
            Ok(loss) => losses.push(loss),
            Err(reason) => {
                println!("FAILED decode killed at token {token}, {what}: {reason}");
                failed.push(format!("decode killed at token {token}, {what}: {reason}"));
            }
        }
    }
    let recomputed: u64 = losses.iter().map(|loss| loss.recomputed).sum();
    let mut late: Vec<u128> = losses.iter().map(|loss| loss.late.as_millis()).collect();
    late.sort_unstable();
    let (median, most) = (late.get(late.len() / 2).copied().unwrap_or_default(), late.last().copied().unwrap_or_default());
    let (equal, all) = (losses.len(), tokens.len());
    println!(
        "decode killed at tokens 1 to {LOSSES}, {what}: {equal} of {all} answers equal; {recomputed} tokens recomputed; late {median} ms \
         (median), {most} ms (most)"
    );
}
