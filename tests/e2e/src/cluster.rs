//! A local cluster, started as an operator starts it, and looked at as an operator looks at it.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{Mutex, MutexGuard};

use crate::process::{self, Ended, binary};
use crate::{WAIT_MAX, eventually};

/// A cluster takes the whole machine, so tests take turns.
static TURN: Mutex<()> = Mutex::const_new(());
/// Time for a cluster to stop when it is asked to.
const STOP_WAIT_MAX: Duration = Duration::from_secs(15);
/// Lines of the log that a failed test shows.
const LOG_LINES: usize = 60;

/// What to start.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Directory or GGUF file.
    pub model: PathBuf,
    /// Replicas of the coordinator.
    pub coordinators: u32,
    /// Prefill nodes.
    pub prefill: u32,
    /// Decode nodes.
    pub decode: u32,
    /// Blocks of each node's pool.
    pub kv_blocks: u32,
    /// How requests are placed: a word of `--route`.
    pub route: &'static str,
    /// What KV is cached as, a word of `--kv-dtype`; as the activations if absent.
    pub kv_dtype: Option<&'static str>,
    /// Instead of the model: checksums, with this delay for each token.
    pub checksum_us: Option<u64>,
    /// Whether a process that dies is started again.
    pub restart: bool,
    /// Variables for all processes, beside the test's own.
    pub env: Vec<(String, String)>,
}

impl Plan {
    /// Seven processes that compute `model` in f32.
    #[must_use]
    pub fn of(model: PathBuf) -> Self {
        Self {
            model,
            coordinators: 3,
            prefill: 2,
            decode: 2,
            kv_blocks: 512,
            route: "auto",
            kv_dtype: None,
            checksum_us: None,
            restart: true,
            env: Vec::new(),
        }
    }

    /// Seven processes with the checksum engine over the tiny model's shape.
    #[must_use]
    pub fn checksum(token_us: u64) -> Self {
        Self { checksum_us: Some(token_us), ..Self::of(crate::tiny_model()) }
    }

    fn args(&self, dir: &Path) -> Vec<String> {
        let mut args: Vec<String> = ["local", "up", "--http", "127.0.0.1:0", "--dtype", "f32"].map(String::from).into();
        let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
        add("--model", self.model.display().to_string());
        add("--coordinators", self.coordinators.to_string());
        add("--prefill", self.prefill.to_string());
        add("--decode", self.decode.to_string());
        add("--kv-blocks", self.kv_blocks.to_string());
        add("--route", self.route.to_owned());
        add("--dir", dir.display().to_string());
        if let Some(word) = self.kv_dtype {
            add("--kv-dtype", word.to_owned());
        }
        if let Some(us) = self.checksum_us {
            add("--checksum-engine", us.to_string());
        }
        args.extend((!self.restart).then(|| "--no-restart".to_owned()));
        args
    }
}

/// What `millctl cluster status` says.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// The leader's name.
    pub leader: Option<String>,
    /// Whether most replicas follow it.
    pub quorum: bool,
    /// The replicas.
    pub members: Vec<Member>,
    /// The nodes.
    pub nodes: Vec<Node>,
}

impl Status {
    /// The process of a node or replica; `None` when there is none, or none that answers.
    #[must_use]
    pub fn pid(&self, name: &str) -> Option<u32> {
        let node = self.nodes.iter().find(|node| node.name == name).map(|node| node.pid);
        let member = self.members.iter().find(|member| member.name == name && member.reachable);
        node.or(member.and_then(|member| member.pid))
    }
}

/// A replica.
#[derive(Clone, Debug, Deserialize)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// leader, follower, ...
    pub role: String,
    /// Where its own gateway listens.
    pub http: Option<SocketAddr>,
    /// Its process.
    pub pid: Option<u32>,
    /// Whether it answers.
    pub reachable: bool,
}

/// A node.
#[derive(Clone, Debug, Deserialize)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its incarnation.
    pub epoch: u64,
    /// Whether new requests may go there.
    pub usable: bool,
    /// Its process.
    pub pid: u32,
    /// Sequences that run there.
    pub running: u32,
    /// Sequences that lost their room to others.
    pub preemptions: u64,
    /// Memory that its process had resident at most, bytes.
    pub resident_bytes_max: u64,
    /// Its pool.
    pub blocks: Blocks,
}

/// A node's pool, in blocks.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Blocks {
    /// All; each is free, cached and evictable, or in use.
    pub total: u32,
    /// In use by running requests; `None` while nothing is heard of the node.
    pub in_use: Option<u32>,
}

/// A running cluster. It is stopped when dropped.
#[derive(Debug)]
pub struct Cluster {
    /// Where clients talk to it.
    pub http: SocketAddr,
    /// The public name of what it serves.
    pub model: String,
    plan: Plan,
    child: Child,
    folder: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Starts a cluster, when it is this test's turn.
    ///
    /// # Panics
    /// When it does not serve in time.
    pub async fn start(plan: Plan) -> Self {
        let turn = TURN.lock().await;
        let folder = tempfile::tempdir().expect("a scratch directory");
        let log = File::create(folder.path().join("millctl.log")).expect("a log file");
        let mut command = Command::new(binary("millctl"));
        command.args(plan.args(&folder.path().join("cluster"))).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        // A cluster notes that it runs: keep that away from the user's own.
        command.env("XDG_STATE_HOME", folder.path().join("state"));
        command.envs(plan.env.iter().map(|(name, value)| (name, value)));
        let mut child = command.spawn().expect("millctl runs");
        let stdout = child.stdout.take().expect("it is piped");
        let http = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut cluster = Self { http, model: String::new(), plan, child, folder, _turn: turn };
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(WAIT_MAX, lines.next_line()).await.expect("a line in time").expect("a line of text");
        let Some(line) = line else { panic!("millctl ended before it served: {:?}", cluster.child.wait().await) };
        let address = line.strip_prefix("ready http://").unwrap_or_else(|| panic!("{line:?} is not the line that was promised"));
        cluster.http = address.trim_end_matches('/').parse().unwrap_or_else(|e| panic!("{line:?}: {e}"));
        let models = crate::http::send(cluster.http, "GET", "/v1/models", "").await.expect("it serves").ok();
        cluster.model = models["data"][0]["id"].as_str().expect("a model has a name").to_owned();
        cluster
    }

    /// The cluster's folder.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("cluster")
    }

    /// A folder that goes away with the cluster.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        self.folder.path()
    }

    /// What the cluster wrote down about itself.
    ///
    /// # Panics
    /// When it did not.
    #[must_use]
    pub fn file(&self) -> Value {
        let text = std::fs::read_to_string(self.dir().join("cluster.json")).expect("a cluster writes it");
        serde_json::from_str(&text).expect("it is JSON")
    }

    /// Runs `millctl` on this cluster; `--dir` is added.
    pub async fn millctl(&self, args: &[&str]) -> Ended {
        let dir = self.dir().display().to_string();
        process::run("millctl", &[args, &["--dir", &dir]].concat(), WAIT_MAX).await
    }

    /// Starts `millctl` on this cluster and leaves it running, its output on a pipe; it is killed when dropped.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn millctl_running(&self, args: &[&str]) -> Child {
        let mut command = Command::new(binary("millctl"));
        command.args(args).arg("--dir").arg(self.dir()).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        command.spawn().expect("millctl runs")
    }

    /// Environment variables that keep what `millctl` writes for a user below [`Cluster::scratch`].
    #[must_use]
    pub fn user(&self) -> Vec<(String, String)> {
        let below = |name: &str| self.scratch().join(name).display().to_string();
        vec![("XDG_STATE_HOME".into(), below("state")), ("XDG_CONFIG_HOME".into(), below("config"))]
    }

    /// What an operator sees.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn status(&self) -> Result<Status, String> {
        let ended = self.millctl(&["cluster", "status", "-o", "json"]).await;
        serde_json::from_str(&ended.stdout).map_err(|e| format!("{e}: {ended:?}"))
    }

    /// Waits until all processes of the plan are there and usable, and no request holds a block.
    pub async fn rests(&self) -> Status {
        eventually("the cluster rests, whole", WAIT_MAX, async || {
            let status = self.status().await?;
            self.whole(&status)?;
            match status.nodes.iter().find(|node| node.blocks.in_use != Some(0) || node.running != 0) {
                Some(node) => Err(format!("{node:?} is not at rest")),
                None => Ok(status),
            }
        })
        .await
    }

    fn whole(&self, status: &Status) -> Result<(), String> {
        let plan = &self.plan;
        let alive = status.members.iter().filter(|member| member.reachable).count();
        let usable = status.nodes.iter().filter(|node| node.usable).count();
        let wanted = ((plan.prefill + plan.decode) as usize, plan.coordinators as usize);
        let whole = (usable, alive) == wanted && status.nodes.len() == usable && status.quorum;
        if whole { Ok(()) } else { Err(format!("{usable} nodes and {alive} replicas of {wanted:?}: {status:?}")) }
    }

    /// The end of what the cluster's processes wrote to their logs.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let mut out = String::new();
        let mut logs = vec![self.folder.path().join("millctl.log")];
        for folder in [self.dir(), self.dir().join("logs"), self.dir().join("log")] {
            let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
            logs.extend(entries.filter(|path| path.extension().is_some_and(|e| e == "log")));
        }
        for log in logs {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
            out.push_str(&format!("--- {}\n{tail}\n", log.display()));
        }
        out
    }

    fn pids(&self) -> Vec<u32> {
        let text = std::fs::read_to_string(self.dir().join("cluster.json")).unwrap_or_default();
        let file: Value = serde_json::from_str(&text).unwrap_or_default();
        let entries = ["coordinators", "nodes"].into_iter().flat_map(|key| file[key].as_array().cloned().unwrap_or_default());
        entries.filter_map(|entry| entry["pid"].as_u64()).map(|pid| pid as u32).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
        let pids = self.pids();
        for pid in &pids {
            // One that a test has stopped could not end.
            let _ = process::signal("CONT", *pid);
        }
        let asked = self.child.id().is_some_and(|pid| process::signal("TERM", pid));
        let started = Instant::now();
        while asked && started.elapsed() < STOP_WAIT_MAX && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.start_kill();
        for pid in pids.into_iter().filter(|pid| process::lives(*pid)) {
            let _ = process::signal("KILL", pid);
        }
    }
}
