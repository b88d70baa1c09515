//! The processes of a local cluster: how each is started, who keeps it, and that one more may come or one may go while the others run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::process::{Board, Keeper, Kind, Order, Spec, State};
use super::{Place, Say, UpArgs};
use crate::ctl::cluster_file::{ClusterFile, CoordinatorEntry, NodeEntry};
use crate::ctl::exit::Exit;

/// Orders to one process that wait.
const ORDERS_MAX: usize = 4;

struct Kept {
    name: String,
    kind: Kind,
    orders: mpsc::Sender<Order>,
    task: JoinHandle<()>,
}

/// Everybody who keeps a process. Dropped with the runtime's tasks, its processes are killed.
pub struct Crew {
    args: UpArgs,
    /// The folder of the binaries.
    bin: PathBuf,
    board: Board,
    kept: Mutex<Vec<Kept>>,
    say: Say,
}

impl Crew {
    /// Nobody yet. The model's path in `args` is absolute.
    #[must_use]
    pub fn new(args: UpArgs, bin: PathBuf, say: Say) -> Self {
        Self { args, bin, board: Board::new(Vec::new()), kept: Mutex::default(), say }
    }

    /// How all processes are.
    #[must_use]
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// Starts every process of the cluster.
    pub fn start_all(&self, place: &Place) {
        let file = &place.file;
        file.coordinators.iter().filter(|entry| !entry.removed).for_each(|entry| self.start_replica(place, entry));
        let threads = engine_threads(self.args.threads, file.nodes.len());
        file.nodes.iter().for_each(|node| self.start(self.node(place, node, threads)));
    }

    /// Starts a replica.
    pub fn start_replica(&self, place: &Place, entry: &CoordinatorEntry) {
        self.start(self.replica(place, entry));
    }

    fn start(&self, spec: Spec) {
        let (orders, inbox) = mpsc::channel(ORDERS_MAX);
        let (name, kind) = (spec.name.clone(), spec.kind);
        let state =
            State { name: name.clone(), kind, pid: None, serves: false, http: None, starts: 0, failed: None, dismissed: false };
        let mut kept = self.kept.lock();
        self.board.send_modify(|states| states.push(state));
        let index = self.board.borrow().len() - 1;
        let task = tokio::spawn(Keeper::new(spec, index, self.board.clone(), inbox, self.say.clone()).run());
        kept.push(Kept { name, kind, orders, task });
    }

    /// A process is needed no more: it is stopped and not started again.
    pub async fn dismiss(&self, name: &str) {
        self.board.send_modify(|states| {
            states.iter_mut().filter(|state| state.name == name).for_each(|state| state.dismissed = true);
        });
        // It may have ended by itself.
        let _ = self.order(name, Order::Stop).await;
    }

    /// Tells a process something.
    ///
    /// # Errors
    /// There is no such process, or nobody keeps it any more.
    pub async fn order(&self, name: &str, order: Order) -> Result<()> {
        let orders = self.kept.lock().iter().rev().find(|kept| kept.name == name).map(|kept| kept.orders.clone());
        let orders = orders.ok_or_else(|| Exit::NotFound.error(format!("no process {name:?}")))?;
        orders.send(order).await.with_context(|| format!("{name} is not kept any more"))
    }

    /// Stops everybody, nodes first, and waits for it.
    pub async fn stop(&self) {
        let kept = std::mem::take(&mut *self.kept.lock());
        let (coordinators, nodes): (Vec<_>, Vec<_>) = kept.into_iter().partition(|kept| kept.kind == Kind::Coordinator);
        for group in [nodes, coordinators] {
            for kept in &group {
                // A keeper that has ended already has nothing to stop.
                let _ = kept.orders.send(Order::Stop).await;
            }
            for kept in group {
                let _ = kept.task.await;
            }
        }
    }

    fn replica(&self, place: &Place, entry: &CoordinatorEntry) -> Spec {
        // Founders must know all founders; once their log exists, it knows better.
        let peers = |other: &CoordinatorEntry| if entry.joined { !other.removed } else { !other.joined };
        let own = vec![
            ("--id", entry.id.to_string()),
            ("--peers", addresses(&place.file, peers)),
            ("--listen", entry.quic.to_string()),
            ("--dir", text(&place.dir.join(&entry.name))),
            ("--route", self.args.route.clone()),
        ];
        let mut spec = self.spec(place, &entry.name, Kind::Coordinator, own);
        spec.args.extend(entry.joined.then(|| "--join".to_owned()));
        spec
    }

    fn node(&self, place: &Place, node: &NodeEntry, threads: usize) -> Spec {
        let kind = if node.kind == Kind::Prefill.as_str() { Kind::Prefill } else { Kind::Decode };
        let mut own = vec![("--coordinators", addresses(&place.file, |entry| !entry.removed)), ("--threads", threads.to_string())];
        own.extend(self.args.kv_blocks.map(|blocks| ("--kv-blocks", blocks.to_string())));
        own.extend(self.args.checksum_engine.map(|us| ("--checksum-engine", us.to_string())));
        let mut spec = self.spec(place, &node.name, kind, own);
        spec.args.extend(self.args.kv_populate.then(|| "--kv-populate".to_owned()));
        spec.args.extend(self.args.hand_over_after_prefill.then(|| "--hand-over-after-prefill".to_owned()));
        spec
    }

    fn spec(&self, place: &Place, name: &str, kind: Kind, own: Vec<(&str, String)>) -> Spec {
        let common = [
            ("--name", name.to_owned()),
            ("--cluster", place.file.cluster.clone()),
            ("--certs", text(&place.file.certs.join(name))),
            ("--model", text(&self.args.model)),
            ("--dtype", self.args.dtype.as_str().to_owned()),
        ];
        let kv_dtype = self.args.kv_dtype.map(|dtype| ("--kv-dtype", dtype.as_str().to_owned()));
        let args = common.into_iter().chain(kv_dtype).chain(own).flat_map(|(flag, value)| [flag.to_owned(), value]).collect();
        let (program, log) = (self.bin.join(kind.binary()), place.log(name));
        Spec { name: name.to_owned(), kind, program, args, log, restart: !self.args.no_restart }
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Replicas as `--peers` and `--coordinators` take them.
fn addresses(file: &ClusterFile, of: impl Fn(&CoordinatorEntry) -> bool) -> String {
    let chosen = file.coordinators.iter().filter(|entry| of(entry));
    chosen.map(|entry| format!("{}={}", entry.id, entry.quic)).collect::<Vec<_>>().join(",")
}

/// Engines that wait for one another's processors are slower than engines with fewer threads.
fn engine_threads(asked: u16, nodes: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    if asked > 0 { usize::from(asked) } else { (cores / nodes.max(1)).max(1) }
}
