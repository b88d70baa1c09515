//! `millctl local status` and `millctl local down`: the local clusters that run, and ending one from elsewhere.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::ctl::cluster_file::ClusterFile;
use crate::ctl::exit::Exit;
use crate::ctl::output::{Answer, Shape, Wait};
use crate::ctl::running;
use crate::ctl::table::{Column, Page, cell, column, maybe, wide};

/// Time that a cluster may take to stop.
const DOWN_WAIT: Duration = Duration::from_secs(60);

/// What to list.
#[derive(Args, Clone, Copy, Debug)]
#[command(after_help = "Example:\n  millctl local status")]
pub struct StatusArgs {
    #[command(flatten)]
    shape: Shape,
}

/// What to stop.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Example:\n  millctl local down --dir /tmp/cluster")]
pub struct DownArgs {
    /// The cluster's folder; the newest local cluster that runs if absent
    #[arg(long, env = "MILLRACE_DIR")]
    dir: Option<PathBuf>,
    /// Say what would be stopped, and stop nothing
    #[arg(long)]
    dry_run: bool,
}

/// A local cluster that runs.
#[derive(Serialize, Deserialize, Clone, Debug)]
struct Running {
    dir: PathBuf,
    pid: Option<u32>,
    http: Option<String>,
    model: PathBuf,
    coordinators: usize,
    nodes: usize,
}

#[derive(Serialize, Deserialize, Debug)]
struct List {
    clusters: Vec<Running>,
}

const COLUMNS: &[Column<Running>] = &[
    column("DIR", |c| cell(c.dir.display())),
    column("PID", |c| maybe(c.pid)),
    column("HTTP", |c| maybe(c.http.as_ref())),
    column("COORDINATORS", |c| cell(c.coordinators)),
    column("NODES", |c| cell(c.nodes)),
    wide("MODEL", |c| cell(c.model.display())),
];

impl Answer for List {
    fn page(&self) -> Page {
        Page::new().table(COLUMNS, &self.clusters)
    }

    fn names(&self) -> Vec<String> {
        self.clusters.iter().map(|cluster| format!("cluster/{}", cluster.dir.display())).collect()
    }
}

/// Lists the local clusters that run, newest first.
///
/// # Errors
/// Standard output cannot be written.
pub fn status(args: StatusArgs) -> Result<()> {
    let dirs = running::state_dir().map(|state| running::all(&state)).unwrap_or_default();
    let running = |dir: PathBuf| {
        let file = ClusterFile::load(&dir).ok()?;
        let (coordinators, nodes) = (file.coordinators.len(), file.nodes.len());
        let http = file.http.map(|http| format!("http://{http}"));
        Some(Running { dir, pid: file.pid, http, model: file.model, coordinators, nodes })
    };
    args.shape.print(&List { clusters: dirs.into_iter().filter_map(running).collect() })
}

/// Asks a local cluster to stop, as its terminal would, and waits until it has.
///
/// # Errors
/// [`Exit::NotFound`] when none runs; [`Exit::Timeout`].
pub async fn down(args: DownArgs) -> Result<()> {
    let none = || Exit::NotFound.hinted("no local cluster runs", "`millctl local status` lists those that do");
    let dir = args.dir.clone().or_else(running::newest).ok_or_else(none)?;
    let pid = ClusterFile::load(&dir)?.pid;
    // The lock tells for sure that somebody runs it: a number in a file may have gone to another process.
    let pid =
        pid.filter(|_| running::runs(&dir)).ok_or_else(|| Exit::NotFound.error(format!("no cluster runs in {}", dir.display())))?;
    if args.dry_run {
        println!("would stop the cluster in {} (process {pid})", dir.display());
        return Ok(());
    }
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw).context("the process number in cluster.json")?;
    kill_process(process, Signal::TERM).with_context(|| format!("process {pid}"))?;
    let wait = Wait { wait: true, timeout: DOWN_WAIT.as_secs_f64() };
    let stopped = async || Ok(if running::runs(&dir) { Err("its processes are ending".to_owned()) } else { Ok(()) });
    wait.until(&format!("the cluster in {} has not stopped", dir.display()), stopped).await?;
    println!("stopped");
    Ok(())
}
