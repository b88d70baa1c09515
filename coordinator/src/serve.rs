//! Puts a replica together, says when it serves, and takes it apart again.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use millrace_checkpoint::Checkpoint;
use millrace_core::cluster::ReplicaInfo;
use millrace_core::message::{ModelIdentity, Role};
use millrace_node::endpoint::{Endpoint, EndpointConfig};
use millrace_node::pki::Identity;
use millrace_node::renew;
use millrace_node::shutdown::Shutdown;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::App;
use crate::admin::Admin;
use crate::config::Config;
use crate::deltas::{self, REPORTS_MAX};
use crate::dispatch::Dispatcher;
use crate::duties::Duties;
use crate::http;
use crate::links::{Links, RAFT_FRAMES_MAX, carry_raft};
use crate::nodes::Nodes;
use crate::pins;
use crate::propose::Proposer;
use crate::replicas::Replicas;
use crate::roster::Roster;
use crate::state::{Replicated, SharedCluster};
use millrace_log::{self as raft, RaftConfig, RaftHandle};

/// How long each part may take to stop.
const STOP_WAIT_MAX: Duration = Duration::from_secs(2);
/// How long the requests that run have to end when the replica stops; those that are left are a front's to take elsewhere.
pub const DRAIN_WAIT_MAX: Duration = Duration::from_secs(4);
/// How often it is looked whether they have.
const DRAIN_LOOK: Duration = Duration::from_millis(20);
/// How long a stopping leader waits for another to take over.
const HANDOVER_WAIT_MAX: Duration = Duration::from_millis(500);

/// What is known before anything is shared.
struct Opened {
    checkpoint: Arc<Checkpoint>,
    model: ModelIdentity,
    endpoint: Endpoint,
    listener: TcpListener,
    http: SocketAddr,
}

/// A replica that serves.
struct Replica {
    app: Arc<App>,
    endpoint: Endpoint,
}

/// Runs a replica until shutdown.
///
/// # Errors
/// What keeps it from starting, or why its log stopped.
pub async fn run(config: Config, shutdown: Shutdown) -> Result<()> {
    let opened = open(&config).await?;
    let (http, quic) = (opened.http, opened.endpoint.local_addr()?);
    let mut config = config;
    // Port 0 has become a real one.
    config.args.listen = quic;
    let (replica, listener) = start(config, opened, shutdown.clone())?;
    let app = replica.app.clone();
    let mut gateway = tokio::spawn(http::serve(app.clone(), listener));
    let name = &app.config.args.name;
    println!("ready {}", json!({"name": name, "http": http.to_string(), "quic": quic.to_string(), "pid": std::process::id()}));
    info!(name, %http, %quic, model = app.model.name, "serving");
    let failure = tokio::select! {
        reason = shutdown.wait() => {
            info!(reason, running = app.dispatcher.running(), "stopping");
            app.dispatcher.drain();
            replica.hand_leadership_over().await;
            drained(&app.dispatcher).await;
            None
        }
        () = app.raft.stopped() => {
            let differs = app.cluster.read().audit().differs_at().map(|entry| format!("its state after entry {entry} is not the majority's"));
            let failure = app.raft.status().failure.map(|failure| failure.to_string()).or(differs);
            let failure = failure.unwrap_or_else(|| "it was stopped".into());
            shutdown.begin("the log stopped");
            Some(failure)
        }
    };
    app.dispatcher.stop();
    if tokio::time::timeout(STOP_WAIT_MAX, &mut gateway).await.is_err() {
        gateway.abort();
    }
    replica.stop().await;
    failure.map_or(Ok(()), |failure| Err(anyhow::anyhow!("the replicated log stopped: {failure}")))
}

/// Opens everything that can be refused.
async fn open(config: &Config) -> Result<Opened> {
    let args = &config.args;
    let identity = Identity::load(&args.certs).with_context(|| format!("certificates in {}", args.certs.display()))?;
    let me = &identity.me;
    ensure!(me.cluster == args.cluster, "the certificate is of cluster {:?}, --cluster says {:?}", me.cluster, args.cluster);
    ensure!(me.role == Role::Coordinator, "the certificate is a {}'s, not a coordinator's", me.role.as_str());
    ensure!(me.name == args.name, "the certificate is {:?}'s, --name says {:?}", me.name, args.name);
    let endpoint = Endpoint::bind(args.listen, identity, EndpointConfig::default()).context("--listen")?;
    let listener = TcpListener::bind(args.http).await.with_context(|| format!("--http {}", args.http))?;
    let http = listener.local_addr()?;
    let (path, name, block_tokens) = (args.model.clone(), args.model_name.clone(), args.block_tokens);
    let dtype = args.kv_dtype.unwrap_or(args.dtype.into());
    let opening = tokio::task::spawn_blocking(move || open_model(&path, name, dtype, block_tokens));
    let (checkpoint, model) = opening.await?.with_context(|| format!("--model {}", args.model.display()))?;
    Ok(Opened { checkpoint, model, endpoint, listener, http })
}

fn open_model(
    path: &Path,
    name: Option<String>,
    dtype: millrace_core::layout::KvDtype,
    block_tokens: u16,
) -> Result<(Arc<Checkpoint>, ModelIdentity)> {
    let checkpoint = Checkpoint::open(path)?;
    let name = name.unwrap_or_else(|| checkpoint.default_name());
    let model = checkpoint.identity(&name, dtype, block_tokens);
    if let Some(reason) = checkpoint.text_absent() {
        warn!(reason, "only token-id prompts are served");
    }
    Ok((Arc::new(checkpoint), model))
}

/// Starts the log and every task.
fn start(config: Config, opened: Opened, shutdown: Shutdown) -> Result<(Replica, TcpListener)> {
    let Opened { checkpoint, model, endpoint, listener, http } = opened;
    let (cluster, nodes, replicas) = (SharedCluster::default(), Arc::new(Nodes::default()), Arc::new(Replicas::default()));
    let (raft, frames) = start_raft(&config, cluster.clone())?;
    let roster = Arc::new(Roster::new(config.clone(), raft.clone(), cluster.clone()));
    let me = config.me;
    let proposer = Proposer { me, raft: raft.clone(), replicas, nodes: nodes.clone(), cluster: cluster.clone(), roster };
    let dispatcher = Dispatcher::new(config.me, model.clone(), cluster.clone(), nodes.clone(), raft.watch_status());
    dispatcher.place_by(config.args.route);
    let admin = Admin::new(config.clone(), proposer.clone(), dispatcher.clone(), checkpoint.clone(), http.to_string());
    let (admin, instance) = (Arc::new(admin), rand::random());
    let (reports, inbox) = mpsc::channel(REPORTS_MAX);
    let (who, about) = ((config.clone(), model.clone(), instance), admin.clone());
    let links = Links::new(who, proposer.clone(), dispatcher.clone(), about, reports);
    let (http_address, quic_address, pid) = (http.to_string(), config.quic().to_string(), std::process::id());
    let duties = Duties::new(proposer.clone(), config.args.name.clone(), ReplicaInfo { http_address, quic_address, pid, instance });
    tokio::spawn(carry_raft(proposer.clone(), frames));
    tokio::spawn(deltas::run(proposer.clone(), inbox));
    tokio::spawn(duties.run(shutdown.clone()));
    tokio::spawn(pins::run(proposer.clone(), shutdown.clone()));
    tokio::spawn(links.clone().keep(endpoint.clone(), shutdown.clone()));
    tokio::spawn(renew::keep_renewed(endpoint.clone(), config.args.certs.clone(), renew::LOOK_INTERVAL, shutdown.clone()));
    tokio::spawn(links.accept(endpoint.clone()));
    let app = App { config, model, checkpoint, dispatcher, cluster, nodes, raft, admin, shutdown };
    Ok((Replica { app: Arc::new(app), endpoint }, listener))
}

/// Frames for other replicas, by raft id.
type RaftFrames = mpsc::Receiver<(u64, Vec<u8>)>;

fn start_raft(config: &Config, cluster: SharedCluster) -> Result<(RaftHandle, RaftFrames)> {
    let dir = config.args.dir.clone();
    let raft_config = RaftConfig::new(config.me.0, config.founders(), dir.clone(), config.args.cluster.as_str());
    let (outgoing, frames) = mpsc::channel(RAFT_FRAMES_MAX);
    let raft = raft::start(raft_config, Replicated::new(cluster), outgoing).with_context(|| format!("--dir {}", dir.display()))?;
    Ok((raft, frames))
}

/// Waits until nothing runs, within its time.
async fn drained(dispatcher: &Dispatcher) {
    let none_left = async {
        while dispatcher.running() > 0 {
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    };
    if tokio::time::timeout(DRAIN_WAIT_MAX, none_left).await.is_err() {
        warn!(running = dispatcher.running(), "requests are ended: the replica stops");
    }
}

impl Replica {
    async fn stop(self) {
        self.endpoint.close("the replica stops").await;
        self.app.raft.shutdown();
        if tokio::time::timeout(STOP_WAIT_MAX, self.app.raft.stopped()).await.is_err() {
            warn!("the log did not stop in time");
        }
    }

    /// Spares the cluster an election by time-out.
    async fn hand_leadership_over(&self) {
        let raft = &self.app.raft;
        let mut status = raft.watch_status();
        let now = raft.status();
        if now.role != raft::Role::Leader || now.members.voters.len() < 2 {
            return;
        }
        raft.hand_over();
        let handed = status.wait_for(|status| status.role != raft::Role::Leader);
        // If nobody takes it, the others elect a leader a moment later.
        let _ = tokio::time::timeout(HANDOVER_WAIT_MAX, handed).await;
    }
}
