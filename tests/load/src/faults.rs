//! The leader is lost under load, again and again: killed, stopped, and cut off in one direction. How long until the others have a new
//! leader, what clients notice, and whether what is cached is still found.
//!
//! A round: traffic with beginnings that its requests share (`traffic`), the fault, whose effect is proven, a new leader as every
//! survivor says (`watch`), more traffic, and the fault undone. Cuts need a network namespace (`net`). Requests that fail, hang or have
//! a wrong token make the whole measurement fail; times are printed and judged by whoever reads them.

pub mod net;
mod traffic;
mod watch;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use coordinator::ctl::ask::Asker;
use coordinator::ctl::cluster_file::{ClusterFile, CoordinatorEntry};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use self::net::Direction;
use self::traffic::{Outcome, Request, Traffic};
use self::watch::Watch;
use crate::report::Row;

/// Engine time of a token, microseconds.
const TOKEN_US: u64 = 500;
/// Traffic before each fault, and after its new leader.
const WINDOW: Duration = Duration::from_millis(800);
/// How long a stopped leader stands still: it has lost its office long before.
const STOP_FOR: Duration = Duration::from_secs(3);
/// How long a leader is cut off: links end by silence meanwhile.
const CUT_FOR: Duration = Duration::from_secs(6);
/// Longest wait for anything.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// How the leader is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Kill,
    Stop,
    Cut(Direction),
}

impl Fault {
    const fn name(self) -> &'static str {
        match self {
            Self::Kill => "leader killed",
            Self::Stop => "leader stopped for 3 s",
            Self::Cut(Direction::From) => "leader not heard for 6 s",
            Self::Cut(Direction::To) => "leader hears nobody for 6 s",
        }
    }
}

/// What one round showed.
struct Round {
    elected_ms: f64,
    before: Vec<Request>,
    after: Vec<Request>,
    /// All of the round, those in flight at the fault too.
    all: Vec<Request>,
}

/// Measures; `quick` is to see that it works.
///
/// # Errors
/// A request failed, hung or was wrong; a fault had no effect; the cluster did not come up or become whole again.
pub async fn measure(quick: bool, print: &dyn Fn(Row)) -> Result<()> {
    let cut = net::inside();
    if !cut {
        println!("(no network namespace can be had here: the leader is not cut off)");
    }
    let (kills, stops, cuts) = if quick { (3, 1, 1) } else { (100, 100, 100) };
    let mut plan = vec![(Fault::Kill, kills), (Fault::Stop, stops)];
    if cut {
        plan.extend([(Fault::Cut(Direction::From), cuts), (Fault::Cut(Direction::To), cuts)]);
    }
    let cluster = Cluster::start().await?;
    let traffic = Traffic::start(cluster.file()?.http.context("it serves")?).await?;
    let mut number = 0;
    for (fault, rounds) in plan {
        let mut done = Vec::new();
        let elections = cluster.whole().await?;
        for _ in 0..rounds {
            number += 1;
            done.push(cluster.round(&traffic, fault, number).await.with_context(|| format!("{}, round {number}", fault.name()))?);
        }
        let terms = cluster.whole().await? - elections;
        report(fault, &done, terms, print);
        bad(&done)?;
    }
    traffic.stop().await;
    cluster.rests().await?;
    cluster.stop().await
}

fn bad(rounds: &[Round]) -> Result<()> {
    let all = rounds.iter().flat_map(|round| &round.all);
    let wrong: Vec<String> =
        all.filter(|request| request.outcome != Outcome::Right).map(|request| format!("{request:?}")).collect();
    ensure!(wrong.is_empty(), "{} requests failed: {}", wrong.len(), wrong.join("\n"));
    Ok(())
}

fn report(fault: Fault, rounds: &[Round], terms: u64, print: &dyn Fn(Row)) {
    let what = |text: &str| format!("{}, {text}", fault.name());
    let times: Vec<f64> = rounds.iter().map(|round| round.elected_ms).collect();
    print(Row::new(what("a new leader known, ms"), times.clone()));
    print(Row::new(what("a new leader known, 99th percentile, ms"), vec![percentile(times, 0.99)]));
    print(Row::new(what("terms for each fault"), vec![terms as f64 / rounds.len().max(1) as f64]));
    let requests = |of: fn(&Round) -> &Vec<Request>| rounds.iter().flat_map(of).collect::<Vec<_>>();
    let all = requests(|round| &round.all);
    print(Row::new(what("requests"), vec![all.len() as f64]));
    let failed = all.iter().filter(|request| request.outcome != Outcome::Right).count();
    print(Row::new(what("requests that failed, hung or were wrong"), vec![failed as f64]));
    let pause = |round: &Round| round.all.iter().map(|request| request.longest_pause.as_secs_f64() * 1e3).fold(0.0, f64::max);
    print(Row::new(what("longest pause of any answer, ms"), rounds.iter().map(pause).collect()));
    print(Row::new(what("prompt tokens found cached before, %"), vec![hit_rate(&requests(|round| &round.before))]));
    print(Row::new(what("prompt tokens found cached after, %"), vec![hit_rate(&requests(|round| &round.after))]));
}

fn percentile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() as f64 * share).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

fn hit_rate(requests: &[&Request]) -> f64 {
    let sum = |of: fn(&Request) -> u32| requests.iter().map(|request| f64::from(of(request))).sum::<f64>();
    100.0 * sum(|request| request.cached_tokens) / sum(|request| request.prompt_tokens)
}

/// A cluster of three replicas and two nodes of each kind, with the checksum engine.
struct Cluster {
    millctl: Child,
    dir: tempfile::TempDir,
    watch: Watch,
}

impl Cluster {
    async fn start() -> Result<Self> {
        let bin = std::env::current_exe()?.with_file_name("millctl");
        let dir = tempfile::tempdir()?;
        let log = dir.path().join("log");
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/tiny-llama-gqa-tied");
        let mut millctl = Command::new(&bin)
            .args(["local", "up", "--http", "127.0.0.1:0", "--dtype", "f32", "--kv-blocks", "4096", "--exit-with-parent"])
            .args(["--checksum-engine", &TOKEN_US.to_string(), "--model"])
            .arg(model)
            .arg("--dir")
            .arg(dir.path().join("cluster"))
            // A cluster notes that it runs: keep that away from the user's own.
            .env("XDG_STATE_HOME", dir.path().join("state"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log)?)
            .spawn()
            .with_context(|| format!("starting {}; build it: cargo build --release", bin.display()))?;
        let stdout = millctl.stdout.take().context("stdout is a pipe")?;
        let line = BufReader::new(stdout).lines().next_line().await?;
        if !line.is_some_and(|line| line.starts_with("ready ")) {
            bail!("the cluster does not serve: {}", std::fs::read_to_string(&log)?);
        }
        let home = dir.path().join("cluster");
        let watch = Watch::start(&home, &ClusterFile::load(&home)?)?;
        Ok(Self { millctl, dir, watch })
    }

    fn file(&self) -> Result<ClusterFile> {
        ClusterFile::load(&self.dir.path().join("cluster"))
    }

    /// Loses the leader once.
    async fn round(&self, traffic: &Traffic, fault: Fault, number: u64) -> Result<Round> {
        traffic.warm(number).await?;
        let begun = Instant::now();
        sleep(WINDOW).await;
        let leader = self.watch.leader().context("no leader before the fault")?;
        let victim = self.replica(leader.id)?;
        let fell = Instant::now();
        self.inflict(fault, &victim).await?;
        let known = timeout(WAIT_MAX, self.watch.successor(&leader, fell)).await.context("no new leader")?;
        sleep(WINDOW).await;
        let ended = Instant::now();
        self.heal(fault, &victim, fell).await?;
        self.whole().await?;
        let all = traffic.take();
        let within = |from: Instant, to: Instant| {
            let fits = |request: &&Request| request.begun >= from && request.begun + request.took <= to;
            all.iter().filter(fits).cloned().collect::<Vec<_>>()
        };
        let elected_ms = (known - fell).as_secs_f64() * 1e3;
        Ok(Round { elected_ms, before: within(begun, fell), after: within(known, ended), all })
    }

    fn replica(&self, id: u64) -> Result<CoordinatorEntry> {
        let found = self.file()?.coordinators.into_iter().find(|replica| replica.id == id && replica.pid.is_some());
        found.with_context(|| format!("replica {id} has no process"))
    }

    async fn inflict(&self, fault: Fault, victim: &CoordinatorEntry) -> Result<()> {
        let pid = victim.pid.context("it has a process")?;
        match fault {
            Fault::Kill => signal("KILL", pid)?,
            Fault::Stop => {
                signal("STOP", pid)?;
                // Its threads stop one by one.
                let stopped = async {
                    while state(pid) != Some('T') {
                        sleep(Duration::from_millis(1)).await;
                    }
                };
                ensure!(timeout(WAIT_MAX, stopped).await.is_ok(), "the leader was not stopped");
            }
            Fault::Cut(direction) => {
                net::cut(direction, victim.quic.port())?;
                let asked = Instant::now();
                ensure!(timeout(WAIT_MAX, self.watch.falls_silent(victim.id, asked)).await.is_ok(), "the leader was not cut off");
            }
        }
        Ok(())
    }

    async fn heal(&self, fault: Fault, victim: &CoordinatorEntry, since: Instant) -> Result<()> {
        let pid = victim.pid.context("it had a process")?;
        let rest = |length: Duration| sleep(length.saturating_sub(since.elapsed()));
        match fault {
            Fault::Kill => ensure!(state(pid).is_none_or(|state| state == 'Z'), "the leader was not killed"),
            Fault::Stop => {
                rest(STOP_FOR).await;
                signal("CONT", pid)?;
            }
            Fault::Cut(_) => {
                rest(CUT_FOR).await;
                net::heal()?;
            }
        }
        Ok(())
    }

    /// Waits until all replicas follow one leader and all nodes are usable; gives the term.
    async fn whole(&self) -> Result<u64> {
        self.until("whole", |status| {
            let nodes = status["nodes"].as_array().map_or(0, |nodes| nodes.iter().filter(|node| node["usable"] == true).count());
            let members = status["members"].as_array().map_or(0, |m| m.iter().filter(|m| m["reachable"] == true).count());
            status["quorum"] == true && (members, nodes) == (3, 4)
        })
        .await?;
        timeout(WAIT_MAX, self.watch.agree()).await.context("the replicas do not agree on a leader")
    }

    /// Waits until no request holds a block.
    async fn rests(&self) -> Result<()> {
        self.until("at rest", |status| {
            let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
            nodes.len() == 4 && nodes.iter().all(|node| node["blocks"]["in_use"] == 0 && node["running"] == 0)
        })
        .await
    }

    async fn until(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Result<()> {
        let home = self.dir.path().join("cluster");
        let mut asker = Asker::new(&home, &self.file()?)?;
        let (began, mut last) = (Instant::now(), Value::Null);
        while began.elapsed() < WAIT_MAX {
            if let Ok(Ok(status)) = timeout(Duration::from_secs(2), asker.ask(&json!({"q": "status"}))).await {
                if fits(&status) {
                    return Ok(());
                }
                last = status;
            } else {
                asker.hang_up();
            }
            sleep(Duration::from_millis(50)).await;
        }
        bail!("the cluster is not {what} after {} s: {last}", WAIT_MAX.as_secs())
    }

    async fn stop(mut self) -> Result<()> {
        drop(self.millctl.stdin.take());
        self.millctl.wait().await?;
        Ok(())
    }
}

fn signal(name: &str, pid: u32) -> Result<()> {
    let status = std::process::Command::new("sh").args(["-c", r#"kill -s "$0" "$1""#, name, &pid.to_string()]).status()?;
    ensure!(status.success(), "no process {pid} takes {name}");
    Ok(())
}

/// A process's state as `/proc` has it; `None` when there is no such process.
fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_99th_percentile_of_a_hundred_leaves_one_above() {
        assert_eq!(percentile((1..=100).rev().map(f64::from).collect(), 0.99), 99.0);
        assert_eq!(percentile(vec![5.0], 0.99), 5.0);
    }
}
