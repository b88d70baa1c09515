//! `millload serve`, `millload check` and `millload ceiling`: the harness held against servers whose truth is known.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, Parser};
use tokio::net::TcpListener;

use super::Verdict;
use super::execute::{Once, SendArgs, execute};
use crate::millload::plan::Plan;
use crate::millload::report::text::ms;
use crate::millload::server::{Script, Server};
use crate::millload::summary::Summary;
use crate::millload::workload::Workload;

/// What to serve.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// Where; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:8090")]
    listen: SocketAddr,
    /// Stop when standard input ends
    #[arg(long, hide = true)]
    exit_with_parent: bool,
    #[command(flatten)]
    script: Script,
}

/// Serves until killed.
///
/// # Errors
/// The address is taken.
pub fn serve(args: &ServeArgs) -> Result<Verdict> {
    if args.exit_with_parent {
        std::thread::spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            std::process::exit(0);
        });
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(args.listen).await.with_context(|| args.listen.to_string())?;
        println!("ready http://{}", listener.local_addr()?);
        std::io::stdout().flush()?;
        Server::new(args.script.clone(), false).serve(listener).await?;
        Ok(Verdict::Holds)
    })
}

/// A server of our own in a process of its own.
struct Own {
    child: Child,
    url: String,
}

impl Own {
    fn start(script: &[&str]) -> Result<Self> {
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command.args(["serve", "--listen", "127.0.0.1:0", "--exit-with-parent"]).args(script);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("stdout is a pipe")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let url = line.trim().strip_prefix("ready ").context("the server does not serve")?.to_owned();
        Ok(Self { child, url })
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

#[derive(Parser)]
struct Made {
    #[command(subcommand)]
    workload: Workload,
}

fn made(line: &str) -> Result<Arc<Plan>> {
    Ok(Arc::new(Made::try_parse_from(format!("plan {line}").split_whitespace())?.workload.plan()?))
}

/// The settings of `millload run` with these arguments.
fn send(url: &str, more: &str) -> Result<SendArgs> {
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        send: SendArgs,
    }
    let line = format!("send --url {url} --quiet {more}");
    Ok(Line::try_parse_from(line.split_whitespace())?.send)
}

/// What to check.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Requests of each case
    #[arg(long, default_value_t = 200)]
    requests: u32,
}

/// Names of a time and how it is read from a summary, and its truth in milliseconds.
type Truth = (&'static str, fn(&Summary) -> Option<f64>, f64);

fn p50(summary: &Summary, name: &str) -> Option<f64> {
    summary.times.get(name)?.p50()
}

/// Waits of requests that come every `gap_ms`, are served for `service_ms` each by `slots` in their order.
fn waits(n: u32, gap_ms: f64, service_ms: f64, slots: usize) -> Vec<f64> {
    let mut ends: Vec<f64> = vec![0.0; slots];
    let mut wait = |i: u32| {
        let due = f64::from(i) * gap_ms;
        let slot = &mut ends[i as usize % slots];
        let begin = slot.max(due);
        *slot = begin + service_ms;
        begin - due
    };
    (0..n).map(&mut wait).collect()
}

/// Holds figures against scripted delays: each must be within 1 %.
///
/// # Errors
/// The server cannot be started.
pub fn check(args: &CheckArgs) -> Result<Verdict> {
    let n = args.requests.max(20);
    println!("{:<34}{:<20}{:>12}{:>12}{:>10}", "case", "figure", "truth", "measured", "off by");
    let plain = case(
        "no queue",
        &["--ttft-ms", "50", "--itl-ms", "10"],
        &format!("random --requests {n} --prompt 64 --output 17 --arrivals constant --rate 20"),
        &[
            ("TTFT p50, ms", |s| p50(s, "ttft"), 50.0),
            ("TPOT p50, ms", |s| p50(s, "tpot"), 10.0),
            ("ITL p50, ms", |s| p50(s, "itl"), 10.0),
            ("E2E p50, ms", |s| p50(s, "e2e"), 210.0),
            ("reused, %", |s| Some(s.reuse.as_ref()?.measured * 100.0 + 100.0), 100.0),
        ],
    )?;
    // Twelve a second to two slots of 250 ms: AIPerf, with two requests under way at most, calls the wait nothing.
    let mut waited = waits(60, 1000.0 / 12.0, 250.0, 2);
    waited.sort_by(f64::total_cmp);
    let median = waited[29];
    let queue = case(
        "12/s to 2 slots of 250 ms",
        &["--ttft-ms", "50", "--itl-ms", "10", "--slots", "2"],
        "random --requests 60 --prompt 64 --output 21 --arrivals constant --rate 12",
        &[
            ("TTFT p50, ms", |s| p50(s, "ttft"), median + 50.0),
            ("E2E p50, ms", |s| p50(s, "e2e"), median + 250.0),
            ("server's queue p50, ms", |s| p50(s, "server_queue"), median),
        ],
    )?;
    Ok(if plain && queue { Verdict::Holds } else { Verdict::Fails })
}

fn case(name: &str, script: &[&str], plan: &str, truths: &[Truth]) -> Result<bool> {
    let (server, plan) = (Own::start(script)?, made(plan)?);
    let results = execute(&plan, &send(&server.url, "")?, &Once::at_speed(1.0))?;
    let mut holds = true;
    for (figure, read, truth) in truths {
        let measured = read(&results.summary).unwrap_or(f64::NAN);
        let off = (measured - truth) / truth;
        holds &= off.abs() <= 0.01;
        println!("{name:<34}{figure:<20}{:>12}{:>12}{:>9.2} %", ms(*truth), ms(measured), off * 100.0);
    }
    println!("{name:<34}{}", crate::millload::report::text::verdict(&results.summary));
    Ok(holds)
}

/// What to drive to its limit.
#[derive(Args, Debug)]
pub struct CeilingArgs {
    /// Rates to try, requests a second
    #[arg(long, value_delimiter = ',', default_value = "1000,2000,5000,10000,15000,20000")]
    rates: Vec<u32>,
    /// Seconds of each
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Generator threads
    #[arg(long, default_value_t = 1)]
    threads: u32,
    /// Tokens of each answer
    #[arg(long, default_value_t = 4)]
    output: u32,
}

/// Prints the generator's own lag at rising rates against a server without delays, in a process of its own.
///
/// # Errors
/// The server cannot be started.
pub fn ceiling(args: &CeilingArgs) -> Result<Verdict> {
    let server = Own::start(&[])?;
    println!(
        "{:>10}{:>12}{:>14}{:>14}{:>14}{:>12}  verdict",
        "planned/s", "whole/s", "lag p50 ms", "lag p99 ms", "lag max ms", "TTFT p50"
    );
    let mut best = None;
    for rate in &args.rates {
        let line = format!(
            "random --requests {} --prompt 32 --output {} --arrivals constant --rate {rate}",
            rate * args.seconds,
            args.output
        );
        let more = format!("--threads {} --in-flight-max 20000", args.threads);
        let summary = execute(&made(&line)?, &send(&server.url, &more)?, &Once::at_speed(1.0))?.summary;
        let lag = summary.times.get("lag").copied().unwrap_or_default();
        let show = |value: Option<f64>| value.map_or("–".to_owned(), ms);
        let p99 = lag.p99().unwrap_or(lag.max);
        let fine = p99 < 1.0 && summary.ok == summary.counted;
        best = if fine { Some(*rate) } else { best };
        let verdict = if fine { "holds" } else { "too late" };
        println!(
            "{rate:>10}{:>12.0}{:>14}{:>14}{:>14}{:>12}  {verdict}",
            summary.requests_per_s,
            show(lag.p50()),
            show(lag.p99()),
            ms(lag.max),
            show(p50(&summary, "ttft"))
        );
    }
    match best {
        Some(rate) => println!("highest rate with lag under 1 ms at the 99th percentile: {rate}/s on {} thread(s)", args.threads),
        None => println!("no rate that was tried kept its lag under 1 ms"),
    }
    Ok(if best.is_some() { Verdict::Holds } else { Verdict::Fails })
}
