//! `millctl local up`: a whole cluster on one machine, in the foreground.
//!
//! `place` is its folder, `crew` starts its processes and `process` keeps each running, `watcher` knows how they all are,
//! `crate::ctl::front` is its door.
//! Here they are put together and, in the reverse order, taken apart: door, nodes, coordinators, folder.

mod control;
mod crew;
mod place;
mod process;
mod watcher;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use millrace_core::layout::{Dtype, KvDtype};
use millrace_node::shutdown::Shutdown;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use self::control::{DownArgs, StatusArgs, down, status};
use self::crew::Crew;
pub use self::place::Place;
use self::process::log_tail;
pub use self::process::{Kind, Order, State};
pub use self::watcher::View;
use self::watcher::{Watcher, missing};
use super::exit::Exit;
use super::front;

/// Time that open answers have when the door closes.
const FRONT_WAIT_MAX: Duration = Duration::from_secs(1);

/// Where progress is told, one line at a time.
pub type Say = Arc<dyn Fn(&str) + Send + Sync>;

/// What to run.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Example:\n  millctl local up --model model.gguf --coordinators 3 --prefill 2 --decode 2 --http 127.0.0.1:8080"
)]
pub struct UpArgs {
    /// Model directory or GGUF file
    #[arg(long)]
    pub model: PathBuf,
    /// Replicas of the coordinator
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=7))]
    pub coordinators: u16,
    /// Prefill nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(0..=64))]
    pub prefill: u16,
    /// Decode nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub decode: u16,
    /// Where the OpenAI API is served; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub http: SocketAddr,
    /// Element type of weights and activations, bf16 or f32; and of cached KV where --kv-dtype does not say another
    #[arg(long, default_value = "bf16")]
    pub dtype: Dtype,
    /// What keys and values are cached as: bf16, int8 (half of the room, at the cost in docs/benchmarks.md) or f32
    #[arg(long, value_name = "TYPE")]
    pub kv_dtype: Option<KvDtype>,
    /// Folder for certificates, logs and state, kept afterwards; a temporary one, removed afterwards, if absent
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Blocks of each node's KV pool
    #[arg(long)]
    pub kv_blocks: Option<u32>,
    /// Take the memory of each node's KV pool at the start, not as it is first used
    #[arg(long)]
    pub kv_populate: bool,
    /// Threads of each node's engine; 0 shares the processors among the nodes
    #[arg(long, default_value_t = 0)]
    pub threads: u16,
    /// How requests are placed: auto, or a rule to compare it with: cache, round-robin, least-loaded, split, whole
    #[arg(long, default_value = "auto")]
    pub route: String,
    /// Leave a process that dies dead
    #[arg(long)]
    pub no_restart: bool,
    /// Seconds that the cluster may take until it serves
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    pub wait: u64,
    /// Stop when standard input ends
    #[arg(long, hide = true)]
    pub exit_with_parent: bool,
    /// Compute checksums instead of the model, with this delay for each token: for tests
    #[arg(long, hide = true, value_name = "MICROSECONDS")]
    pub checksum_engine: Option<u64>,
    /// Hand KV over only when a prompt is computed, not layer by layer: for measurements
    #[arg(long, hide = true)]
    pub hand_over_after_prefill: bool,
}

/// Runs a cluster until a signal.
///
/// # Errors
/// Why it does not serve; it is stopped then.
pub async fn up(args: UpArgs) -> Result<()> {
    let shutdown = Shutdown::new();
    shutdown.on_signals().context("signal handlers")?;
    if args.exit_with_parent {
        shutdown.on_stdin_end().context("watching standard input")?;
    }
    let mut local = Local::launch(&args, Arc::new(|line| eprintln!("{line}"))).await?;
    let result = tokio::select! {
        ready = local.ready(Duration::from_secs(args.wait)) => ready,
        _ = shutdown.wait() => Ok(()),
    };
    if result.is_ok() && !shutdown.has_begun() {
        announce(local.http());
        let reason = shutdown.wait().await;
        eprintln!("{reason}: stopping");
    }
    local.stop().await;
    result
}

/// The one line on standard output. Nobody may be reading it.
fn announce(http: SocketAddr) {
    use std::io::Write;
    let mut out = std::io::stdout();
    let _ = writeln!(out, "ready http://{http}").and_then(|()| out.flush());
}

/// A running cluster. [`Local::stop`] ends it; when it is merely dropped, its processes are killed.
pub struct Local {
    http: SocketAddr,
    dir: PathBuf,
    crew: Arc<Crew>,
    view: watch::Receiver<View>,
    watching: JoinHandle<Place>,
    stop_watching: Shutdown,
    front: JoinHandle<std::io::Result<()>>,
    stop_front: Shutdown,
    say: Say,
}

impl Local {
    /// Takes the port, makes the folder, starts all processes. They do not serve yet.
    ///
    /// # Errors
    /// The port is taken, a binary or the model is missing, or the folder cannot be used; nothing is left then.
    pub async fn launch(args: &UpArgs, say: Say) -> Result<Self> {
        let model =
            args.model.canonicalize().map_err(|error| Exit::Usage.error(format!("--model {}: {error}", args.model.display())))?;
        let args = UpArgs { model, ..args.clone() };
        let bin = binaries()?;
        let listener = TcpListener::bind(args.http).await.with_context(|| format!("--http {}", args.http))?;
        let http = listener.local_addr().context("the front's own address")?;
        let place = Place::open(&args, http).await?;
        say(&format!("folder {}", place.dir.display()));
        let crew = Arc::new(Crew::new(args, bin, say.clone()));
        crew.start_all(&place);
        let (stop_watching, stop_front) = (Shutdown::new(), Shutdown::new());
        let dir = place.dir.clone();
        let (watcher, view, gateways) = Watcher::new(place, &crew)?;
        let watching = tokio::spawn(watcher.run(stop_watching.clone()));
        let stopping = stop_front.clone();
        let front = tokio::spawn(front::serve(listener, gateways, async move { drop(stopping.wait().await) }));
        Ok(Self { http, dir, crew, view, watching, stop_watching, front, stop_front, say })
    }

    /// Where clients are served.
    #[must_use]
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// The cluster's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How the processes are.
    #[must_use]
    pub fn states(&self) -> Vec<State> {
        self.crew.board().borrow().clone()
    }

    /// What the cluster says of itself.
    #[must_use]
    pub fn view(&self) -> watch::Receiver<View> {
        self.view.clone()
    }

    /// Kills a process, as `kill -9` would. It is started again, unless `--no-restart` says otherwise.
    ///
    /// # Errors
    /// There is no such process.
    pub async fn kill(&self, name: &str) -> Result<()> {
        self.crew.order(name, Order::Kill).await
    }

    /// Waits until every gateway is ready, a leader is known and every node has joined; tells of each.
    ///
    /// # Errors
    /// [`Exit::Timeout`] with what is missing; [`Exit::Failed`] with the last words of a process that cannot be started.
    pub async fn ready(&mut self, wait: Duration) -> Result<()> {
        let (mut board, mut view) = (self.crew.board().subscribe(), self.view.clone());
        let (mut told, began) = (Vec::new(), Instant::now());
        let deadline = tokio::time::sleep(wait);
        tokio::pin!(deadline);
        loop {
            let (states, seen) = (board.borrow_and_update().clone(), view.borrow_and_update().clone());
            if let Some(failed) = states.iter().find(|state| state.failed.is_some()) {
                return Err(self.gave_up(failed));
            }
            for state in states.iter().filter(|state| seen.has(state)) {
                if !told.contains(&state.name) {
                    told.push(state.name.clone());
                    (self.say)(&progress(state, began));
                }
            }
            let missing = missing(&states, &seen);
            if missing.is_empty() {
                return Ok(());
            }
            tokio::select! {
                _ = board.changed() => {}
                _ = view.changed() => {}
                () = &mut deadline => return Err(self.too_slow(&missing, wait)),
            }
        }
    }

    fn gave_up(&self, state: &State) -> anyhow::Error {
        let why = state.failed.as_deref().unwrap_or_default();
        Exit::Failed.error(format!("{} {why}; its last words:{}", state.name, self.tail(&state.name)))
    }

    fn too_slow(&self, missing: &[String], wait: Duration) -> anyhow::Error {
        let tails: String = missing.iter().map(|name| format!("\n  {name}:{}", self.tail(name))).collect();
        Exit::Timeout.error(format!("not ready after {} s: {}{tails}", wait.as_secs(), missing.join(", ")))
    }

    fn tail(&self, name: &str) -> String {
        log_tail(&place::log(&self.dir, name))
    }

    /// Stops everything and waits for it: the door, the nodes, the coordinators; then the folder is let go.
    pub async fn stop(self) {
        self.stop_front.begin("stopping");
        let mut front = self.front;
        if tokio::time::timeout(FRONT_WAIT_MAX, &mut front).await.is_err() {
            front.abort();
        }
        self.crew.stop().await;
        self.stop_watching.begin("stopping");
        drop(self.watching.await);
        (self.say)("stopped");
    }
}

fn progress(state: &State, began: Instant) -> String {
    let (name, pid, seconds) = (&state.name, state.pid.unwrap_or_default(), began.elapsed().as_secs_f64());
    match state.http {
        Some(http) => format!("{name:<14} serves  pid {pid:<7} {seconds:5.1} s  http://{http}"),
        None => format!("{name:<14} joined  pid {pid:<7} {seconds:5.1} s"),
    }
}

/// The names of a kind's processes: `KIND-1` and so on.
fn names(kind: Kind, count: u16) -> Vec<String> {
    (1..=count).map(|i| format!("{}-{i}", kind.as_str())).collect()
}

/// The folder of the binaries: our own.
fn binaries() -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program's own file")?;
    let dir = own.parent().context("this program's file is in no folder")?.to_owned();
    for binary in [Kind::Coordinator, Kind::Prefill, Kind::Decode].map(Kind::binary) {
        if !dir.join(binary).is_file() {
            let message =
                format!("{binary} is not beside millctl in {}; build it: cargo build --release -p {binary}", dir.display());
            return Err(Exit::NotFound.error(message));
        }
    }
    Ok(dir)
}
