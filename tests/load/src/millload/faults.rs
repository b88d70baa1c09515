//! What is done to a local cluster while it is under load, when, and what its users felt. Processes are found by name in the cluster's own
//! `cluster.json` at the moment of the act, because a process that was started again has another number.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::clock::until;
use super::network::{self, Cut};
use super::plan::millis;
use super::record::{Outcome, Record};
use super::summary::{About, good};

/// Steps of one timeline.
pub const STEPS_MAX: usize = 64;
/// Without an objective a request is bad when its first token takes so many times the median before the fault.
const SLOW_FACTOR: f64 = 3.0;
/// Time for a command.
const COMMAND_WAIT_MAX: Duration = Duration::from_secs(60);

/// An act.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Sends a signal to a process of the cluster: its name and the process's.
    Signal(&'static str, String),
    /// Cuts a process of the cluster off from its peers.
    Cut(Cut, String),
    /// Undoes all cuts.
    Heal,
    /// Runs `millctl` with these arguments.
    Millctl(Vec<String>),
}

/// An act and its time.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Since the start of the run.
    pub at: Duration,
    /// What is done.
    pub act: Act,
    /// As the user wrote it.
    pub text: String,
}

impl FromStr for Step {
    type Err = String;

    /// `at 30s kill decode-2`; acts are kill, term, stop, cont, partition, mute, deafen (with a process), heal, cordon, uncordon, drain
    /// (with a node), millctl (with arguments).
    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let wrong = || {
            let named = "kill|term|stop|cont|partition|mute|deafen|cordon|uncordon|drain NAME";
            format!("{text:?}: expected at TIME {named}, at TIME heal, or at TIME millctl ARGUMENTS")
        };
        let ["at", time, verb, rest @ ..] = &words[..] else { return Err(wrong()) };
        let at = Duration::from_secs_f64(millis(time)? / 1e3);
        let signals = [("kill", "KILL"), ("term", "TERM"), ("stop", "STOP"), ("cont", "CONT")];
        let cuts = [("partition", Cut::Partition), ("mute", Cut::Mute), ("deafen", Cut::Deafen)];
        let cut = cuts.iter().find(|(name, _)| name == verb).map(|(_, cut)| *cut);
        let act = match (signals.iter().find(|(name, _)| name == verb), *verb, rest) {
            (Some((_, signal)), _, [name]) => Act::Signal(signal, (*name).to_owned()),
            (None, "heal", []) => Act::Heal,
            (None, _, [name]) if let Some(cut) = cut => Act::Cut(cut, (*name).to_owned()),
            (None, "cordon" | "uncordon" | "drain", [name]) => {
                Act::Millctl(["nodes", *verb, *name].iter().map(|word| (*word).to_owned()).collect())
            }
            (None, "millctl", [_, ..]) => Act::Millctl(rest.iter().map(|word| (*word).to_owned()).collect()),
            _ => return Err(wrong()),
        };
        Ok(Self { at, act, text: words[2..].join(" ") })
    }
}

/// Reads steps separated by `;` or line ends; `#` begins a comment.
///
/// # Errors
/// Names the step that is wrong.
pub fn parse(text: &str) -> Result<Vec<Step>, String> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    let parts = lines.flat_map(|line| line.split(';')).map(str::trim).filter(|part| !part.is_empty());
    let mut steps: Vec<Step> = parts.map(str::parse).collect::<Result<_, _>>()?;
    if steps.len() > STEPS_MAX {
        return Err(format!("{} steps, the limit is {STEPS_MAX}", steps.len()));
    }
    steps.sort_by_key(|step| step.at);
    Ok(steps)
}

/// An act that was done, and what followed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// When, seconds from the start.
    pub at_s: f64,
    /// What.
    pub act: String,
    /// Why it could not be done; `None` when it was.
    pub error: Option<String>,
    /// Requests that failed, of those under way at the act or due before the next.
    pub failed: u64,
    /// Requests that failed, missed their objective or, without one, were [slow](SLOW_FACTOR).
    pub bad: u64,
    /// From the act to the end of the last bad request, seconds; 0 when none was bad.
    pub recovery_s: f64,
}

/// Where the cluster is.
#[derive(Clone, Debug)]
pub struct Site {
    /// Its folder, with `cluster.json`.
    pub dir: PathBuf,
    /// The `millctl` to use.
    pub millctl: PathBuf,
}

/// Does all steps, each at its time; what was done is in `done` as soon as it is.
pub async fn perform(steps: Vec<Step>, site: Site, started: Instant, done: Arc<Mutex<Vec<Done>>>) {
    for step in steps {
        until(started + step.at).await;
        let at_s = started.elapsed().as_secs_f64();
        let error = site.perform(&step.act).await.err().map(|error| format!("{error:#}"));
        let act = Done { at_s, act: step.text, error, ..Done::default() };
        done.lock().unwrap_or_else(PoisonError::into_inner).push(act);
    }
}

impl Site {
    async fn perform(&self, act: &Act) -> Result<()> {
        let mut command = match act {
            Act::Signal(signal, name) => {
                let mut command = Command::new("sh");
                command.args(["-c", &format!("kill -{signal} {}", pid(&self.dir, name)?)]);
                command
            }
            Act::Cut(how, name) => return network::cut(pid(&self.dir, name)?, *how).await,
            Act::Heal => return network::heal().await,
            Act::Millctl(args) => {
                let mut command = Command::new(&self.millctl);
                command.args(args).args(["--dir"]).arg(&self.dir);
                command
            }
        };
        let running = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true).output();
        let output = tokio::time::timeout(COMMAND_WAIT_MAX, running).await.context("no end in a minute")??;
        ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }
}

/// The number of a process of the cluster.
fn pid(dir: &Path, name: &str) -> Result<u64> {
    let path = dir.join("cluster.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let file: serde_json::Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let entries = ["nodes", "coordinators"].iter().filter_map(|kind| file[*kind].as_array()).flatten();
    let entry = entries.into_iter().find(|entry| entry["name"] == name).with_context(|| format!("no process {name:?}"))?;
    entry["pid"].as_u64().with_context(|| format!("{name} does not run"))
}

/// Fills in what users felt of each act.
pub fn judge(done: &mut [Done], about: &About, records: &[Record]) {
    let times: Vec<f64> = done.iter().map(|act| act.at_s).collect();
    let before = |record: &&Record| times.first().is_some_and(|first| record.end_ns as f64 / 1e9 < *first);
    let mut usual: Vec<f64> = records.iter().filter(|r| r.ok()).filter(before).filter_map(Record::ttft_ms).collect();
    usual.sort_by(f64::total_cmp);
    let slow_ms = usual.get(usual.len() / 2).map_or(f64::INFINITY, |median| median * SLOW_FACTOR);
    let bad = |record: &Record| !good(record, &about.slo(record.class)) || record.ttft_ms().is_some_and(|ttft| ttft > slow_ms);
    for (at, act) in done.iter_mut().enumerate() {
        let next = times.get(at + 1).copied().unwrap_or(f64::INFINITY);
        let touched = |record: &&Record| {
            let (due_s, end_s) = (record.due_ns as f64 / 1e9, record.end_ns as f64 / 1e9);
            record.outcome != Outcome::Unfinished && end_s >= act.at_s && due_s < next
        };
        let (mut failed, mut harmed, mut last_s) = (0, 0, act.at_s);
        for record in records.iter().filter(touched) {
            failed += u64::from(!record.ok());
            if bad(record) {
                harmed += 1;
                last_s = f64::max(last_s, record.end_ns as f64 / 1e9);
            }
        }
        (act.failed, act.bad, act.recovery_s) = (failed, harmed, last_s - act.at_s);
    }
}

#[cfg(test)]
mod tests {
    use super::super::summary::tests::known;
    use super::*;

    #[test]
    fn timelines_are_read() {
        let steps = parse("at 60s drain decode-1\nat 1.5s kill decode-2 # first; not this\n").unwrap();
        assert_eq!(
            steps[0],
            Step { at: Duration::from_millis(1500), act: Act::Signal("KILL", "decode-2".into()), text: "kill decode-2".into() }
        );
        let cuts = parse("at 1s mute decode-1; at 2s heal").unwrap();
        assert_eq!((&cuts[0].act, &cuts[1].act), (&Act::Cut(Cut::Mute, "decode-1".into()), &Act::Heal));
        assert_eq!(steps[1].act, Act::Millctl(vec!["nodes".into(), "drain".into(), "decode-1".into()]));
        for bad in ["kill x", "at 5s kill", "at 5s burn x", "at soon kill x", "at 5s millctl", "at 5s heal x", "at 5s mute"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn users_feel_what_they_feel() {
        let (about, _, mut records) = known(60);
        // The act is at 3 s. Three requests after it fail or are slow; the last of them ends 1.2 s after it.
        records[30].outcome = Outcome::Closed;
        records[31].outcome = Outcome::Status(503);
        records[33].first_ns += 600_000_000;
        records[33].end_ns = 4_200_000_000;
        let mut done = vec![Done { at_s: 3.0, act: "kill x".into(), ..Done::default() }];
        judge(&mut done, &about, &records);
        assert_eq!((done[0].failed, done[0].bad), (2, 3));
        assert!((done[0].recovery_s - 1.2).abs() < 1e-9, "{}", done[0].recovery_s);
        judge(&mut done, &about, &records[34..]);
        assert_eq!((done[0].bad, done[0].recovery_s), (0, 0.0));
    }

    #[test]
    fn signals_reach_the_process_that_the_cluster_names() {
        let dir = tempfile::tempdir().unwrap();
        let mut victim = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let file = serde_json::json!({"nodes": [{"name": "decode-2", "pid": victim.id()}, {"name": "decode-1", "pid": null}], "coordinators": []});
        std::fs::write(dir.path().join("cluster.json"), file.to_string()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let steps = parse("at 0s kill decode-1; at 0s kill nobody; at 0s kill decode-2").unwrap();
        let site = Site { dir: dir.path().to_owned(), millctl: "millctl".into() };
        let done = Arc::new(Mutex::new(Vec::new()));
        runtime.block_on(perform(steps, site, Instant::now(), done.clone()));
        let done = done.lock().unwrap();
        assert_eq!(done[0].error.as_deref(), Some("decode-1 does not run"));
        assert!(done[1].error.is_some() && done[2].error.is_none());
        assert!(!victim.wait().unwrap().success(), "the signal ended it");
    }
}
