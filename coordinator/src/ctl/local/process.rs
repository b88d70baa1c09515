//! Keeps one process of a local cluster running, as Kubernetes would: starts it, hears when it serves, starts it again when it dies.
//!
//! It decides when a restart is due and when there is no sense in one. A child ends with us whatever ends us: it watches its
//! standard input, a pipe whose other end is ours, and closing that pipe is also how it is asked to stop.

use std::fs::File;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;
use std::net::SocketAddr;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::Say;

/// The first wait before a restart; doubles up to [`BACKOFF_MAX`].
pub const BACKOFF_MIN: Duration = Duration::from_millis(200);
/// The longest wait before a restart, and the life after which a process counts as good.
pub const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Starts of a process that never served; then there is no sense in another.
pub const STARTS_MAX: u32 = 3;
/// Time that a process has to stop when asked; then it is killed.
pub const STOP_WAIT_MAX: Duration = Duration::from_secs(8);
/// Lines of a log that are shown when a process fails.
const LOG_LINES: usize = 15;
/// Bytes at the end of a log that are searched for them.
const LOG_BYTES: u64 = 16 << 10;

/// What a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A replica of the coordinator.
    Coordinator,
    /// A prefill node.
    Prefill,
    /// A decode node.
    Decode,
}

impl Kind {
    /// Its name in tables and certificates.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }

    /// Its binary's file name.
    #[must_use]
    pub const fn binary(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Prefill => "prefill-node",
            Self::Decode => "decode-node",
        }
    }
}

/// How to start a process.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its name in the cluster.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Its binary.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Where its output goes, appended.
    pub log: PathBuf,
    /// Start it again when it dies.
    pub restart: bool,
}

/// How a process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Its number, while it lives.
    pub pid: Option<u32>,
    /// It has said that it is ready, in this life.
    pub serves: bool,
    /// Where its gateway listens, in this life; coordinators only.
    pub http: Option<SocketAddr>,
    /// How often it was started.
    pub starts: u32,
    /// Why it will not be started again.
    pub failed: Option<String>,
    /// It is needed no more.
    pub dismissed: bool,
}

/// What a process may be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// End, for good.
    Stop,
    /// Die now, as from `kill -9`; what follows is as if it had died by itself.
    Kill,
}

/// The board with the state of all processes. Each keeper writes its own.
pub type Board = watch::Sender<Vec<State>>;

/// Keeps one process.
pub struct Keeper {
    spec: Spec,
    index: usize,
    board: Board,
    orders: mpsc::Receiver<Order>,
    say: Say,
    ever_served: bool,
}

/// How one life of a process ended.
enum End {
    Stopped,
    Died(String),
}

/// What a process prints when it serves, after `ready `.
#[derive(Deserialize)]
struct ReadyLine {
    http: Option<SocketAddr>,
}

struct Life {
    child: Child,
    /// Closing it asks the child to stop.
    stdin: Option<ChildStdin>,
    lines: Option<Lines<BufReader<ChildStdout>>>,
}

impl Keeper {
    /// A keeper for the process at `index` of `board`.
    #[must_use]
    pub fn new(spec: Spec, index: usize, board: Board, orders: mpsc::Receiver<Order>, say: Say) -> Self {
        Self { spec, index, board, orders, say, ever_served: false }
    }

    /// Runs until told to stop.
    pub async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let born = Instant::now();
            let why = match self.live().await {
                End::Stopped => return,
                End::Died(why) => why,
            };
            if born.elapsed() > BACKOFF_MAX {
                backoff = BACKOFF_MIN;
            }
            let hopeless = !self.ever_served && self.state().starts >= STARTS_MAX;
            if hopeless || !self.spec.restart {
                (self.say)(&format!("{} {why}; it is not started again", self.spec.name));
                self.edit(|state| state.failed = Some(why));
                while matches!(self.orders.recv().await, Some(Order::Kill)) {}
                return;
            }
            (self.say)(&format!("{} {why}; starting it again in {:.1} s", self.spec.name, backoff.as_secs_f64()));
            if self.stopped_within(backoff).await {
                return;
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// Waits; true when told to stop meanwhile.
    async fn stopped_within(&mut self, wait: Duration) -> bool {
        let pause = sleep(wait);
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = &mut pause => return false,
                order = self.orders.recv() => if order != Some(Order::Kill) { return true },
            }
        }
    }

    async fn live(&mut self) -> End {
        let mut life = match self.spawn() {
            Ok(life) => life,
            Err(error) => {
                self.edit(|state| state.starts += 1);
                return End::Died(format!("cannot be started: {error:#}"));
            }
        };
        let pid = life.child.id();
        self.edit(|state| (state.pid, state.starts) = (pid, state.starts + 1));
        let end = loop {
            tokio::select! {
                line = next_line(&mut life.lines) => self.hear(line, &mut life),
                status = life.child.wait() => break End::Died(describe(status)),
                order = self.orders.recv() => match order {
                    Some(Order::Kill) => drop(life.child.start_kill()),
                    Some(Order::Stop) | None => {
                        self.stop(life).await;
                        break End::Stopped;
                    }
                }
            }
        };
        self.edit(|state| (state.pid, state.serves, state.http) = (None, false, None));
        end
    }

    fn spawn(&self) -> Result<Life> {
        let spec = &self.spec;
        let log = File::options().create(true).append(true).open(&spec.log).with_context(|| spec.log.display().to_string())?;
        let mut child = Command::new(&spec.program)
            .args(&spec.args)
            .arg("--exit-with-parent")
            // The engines share the machine: a thread that waits must not spin.
            .env("OMP_WAIT_POLICY", "passive")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // Ctrl-C is for us; the order in which the others stop is ours to keep.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| spec.program.display().to_string())?;
        let lines = child.stdout.take().map(|stdout| BufReader::new(stdout).lines());
        Ok(Life { stdin: child.stdin.take(), lines, child })
    }

    fn hear(&mut self, line: Option<String>, life: &mut Life) {
        let Some(line) = line else {
            life.lines = None;
            return;
        };
        let Some(ready) = line.strip_prefix("ready ").and_then(|json| serde_json::from_str::<ReadyLine>(json).ok()) else {
            return;
        };
        self.ever_served = true;
        self.edit(|state| (state.serves, state.http) = (true, ready.http));
        let state = self.state();
        if state.starts > 1 {
            (self.say)(&format!("{} is up again, pid {}", state.name, state.pid.unwrap_or_default()));
        }
    }

    /// Asks the process to stop, then kills it. One that does not serve yet has nothing to finish.
    async fn stop(&self, mut life: Life) {
        if self.state().serves {
            drop(life.stdin.take());
            if timeout(STOP_WAIT_MAX, life.child.wait()).await.is_ok() {
                return;
            }
            (self.say)(&format!("{} did not stop in {} s and is killed", self.spec.name, STOP_WAIT_MAX.as_secs()));
        }
        // A process in an uninterruptible system call is not waited for for ever.
        let _ = timeout(STOP_WAIT_MAX, life.child.kill()).await;
    }

    fn state(&self) -> State {
        self.board.borrow()[self.index].clone()
    }

    fn edit(&self, edit: impl FnOnce(&mut State)) {
        self.board.send_modify(|states| edit(&mut states[self.index]));
    }
}

/// The next line; never, once the child has closed its output.
async fn next_line(lines: &mut Option<Lines<BufReader<ChildStdout>>>) -> Option<String> {
    match lines {
        Some(lines) => lines.next_line().await.ok().flatten(),
        None => std::future::pending().await,
    }
}

fn describe(status: std::io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => format!("died ({status})"),
        Err(error) => format!("is lost: {error}"),
    }
}

/// The last lines of a process's log, indented; empty when there are none.
#[must_use]
pub fn log_tail(log: &std::path::Path) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || {
        let mut file = File::open(log)?;
        let from = file.metadata()?.len().saturating_sub(LOG_BYTES);
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(LOG_BYTES).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].iter().map(|line| format!("\n    {line}")).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    struct Kept {
        board: Board,
        orders: mpsc::Sender<Order>,
        task: tokio::task::JoinHandle<()>,
        _dir: tempfile::TempDir,
    }

    /// A process that runs `script`; `$0` is a folder of its own.
    fn keep(script: &str, restart: bool) -> Kept {
        let dir = tempfile::tempdir().unwrap();
        let args = ["-c".into(), script.into(), dir.path().display().to_string()];
        let (program, log) = ("/bin/sh".into(), dir.path().join("log"));
        let spec = Spec { name: "x".into(), kind: Kind::Decode, program, args: args.into(), log, restart };
        let (name, kind) = ("x".into(), Kind::Decode);
        let state = State { name, kind, pid: None, serves: false, http: None, starts: 0, failed: None, dismissed: false };
        let (board, (orders, inbox)) = (watch::Sender::new(vec![state]), mpsc::channel(4));
        let task = tokio::spawn(Keeper::new(spec, 0, board.clone(), inbox, Arc::new(|_| {})).run());
        Kept { board, orders, task, _dir: dir }
    }

    impl Kept {
        async fn wait(&self, condition: impl Fn(&State) -> bool) -> State {
            self.board.subscribe().wait_for(|states| condition(&states[0])).await.unwrap()[0].clone()
        }
    }

    #[tokio::test]
    async fn a_process_that_dies_is_started_again_and_stops_when_asked() {
        let kept = keep("echo 'ready {\"http\":\"127.0.0.1:9\"}'; cat > /dev/null; touch $0/polite", true);
        let first = kept.wait(|s| s.serves).await;
        assert_eq!((first.starts, first.http.unwrap().port()), (1, 9));
        kept.orders.send(Order::Kill).await.unwrap();
        kept.wait(|s| s.pid.is_none() && !s.serves).await;
        let second = kept.wait(|s| s.serves).await;
        assert!(second.starts == 2 && second.pid != first.pid);
        kept.orders.send(Order::Stop).await.unwrap();
        kept.task.await.unwrap();
        assert_eq!(kept.board.borrow()[0].pid, None);
        assert!(kept._dir.path().join("polite").exists(), "the closed pipe is what stopped it");
    }

    #[tokio::test]
    async fn a_process_that_never_serves_is_given_up_with_its_last_words() {
        let kept = keep("echo 'no such model' >&2; exit 3", true);
        let state = kept.wait(|s| s.failed.is_some()).await;
        assert_eq!(state.starts, STARTS_MAX);
        assert!(state.failed.unwrap().contains('3'));
        assert_eq!(log_tail(&kept._dir.path().join("log")), "\n    no such model".repeat(3));
        drop(kept.orders);
        kept.task.await.unwrap();
    }

    #[tokio::test]
    async fn without_restarts_one_death_is_the_end_and_a_program_that_is_missing_a_death() {
        let kept = keep("exit 0", false);
        assert_eq!(kept.wait(|s| s.failed.is_some()).await.starts, 1);
        assert_eq!(log_tail(std::path::Path::new("/nonexistent")), "");
    }
}
