//! A cluster whose processes are started one by one, each behind a relay, so that a test can follow what each says, do to each what
//! it wants and start it again. `millctl local up` keeps its processes alive by itself; here nobody comes back unasked.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use coordinator::ctl::ask::Asker;
use coordinator::ctl::cluster_file::{ClusterFile, CoordinatorEntry, NodeEntry, VERSION};
use coordinator::ctl::front::{self, Gateway};
use millrace_core::message::Role;
use millrace_node::pki::Authority;
use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::{broadcast, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::cluster::Status;
use crate::process::{self, binary};
use crate::relay::{Kind, Listens, Relays};
use crate::{WAIT_MAX, http};

/// Lines that one reader may be behind.
const LINES_MAX: usize = 4096;
/// Time for one answer of one replica.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(1);
/// What processes log: beside the usual every step of a hand-over and every placement.
const LOG: &str = "info,millrace_node::serve=debug,coordinator::dispatch=debug";

/// Of it, what tests wait for.
const FOLLOWED: [&str; 6] =
    ["hand-over: ", ": placed attempt=", MOVED, "cancelled: nothing of it is left", "link to a node down", "attempt failed"];

/// What a gateway says when it places a request anew.
pub(crate) const MOVED: &str = ": moved attempt=";

/// What to start.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Directory or GGUF file.
    pub model: PathBuf,
    /// Instead of the model: checksums, with these delays for each token of prefill nodes and of decode nodes.
    pub checksum_us: Option<(u64, u64)>,
    /// Blocks of each node's pool.
    pub kv_blocks: u32,
    /// Tokens of a prompt that one step computes.
    pub step_tokens: u32,
}

/// Replicas, prefill nodes and decode nodes of every such cluster.
pub const SHAPE: [(Kind, usize); 3] = [(Kind::Coordinator, 3), (Kind::Prefill, 2), (Kind::Decode, 2)];

/// What a process wrote to its log.
#[derive(Clone, Debug)]
pub struct Line {
    /// Which process.
    pub part: usize,
    /// The line.
    pub text: String,
}

/// One process.
pub struct Part {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    http: Option<SocketAddr>,
    args: Vec<String>,
    child: Option<Child>,
}

/// The cluster. Its processes are killed when it is dropped.
pub struct Parts {
    /// The processes; their places are their names for the relays too.
    pub parts: Vec<Part>,
    /// The relays before them.
    pub relays: Relays,
    /// Where clients talk to it.
    pub http: SocketAddr,
    /// The public name of what it serves.
    pub model: String,
    lines: broadcast::Sender<Line>,
    gateways: watch::Sender<Vec<Gateway>>,
    asker: Asker,
    front: AbortHandle,
    folder: TempDir,
}

impl Drop for Parts {
    fn drop(&mut self) {
        self.front.abort();
    }
}

impl Parts {
    /// Starts everything and waits until it serves.
    ///
    /// # Errors
    /// What does not start.
    pub async fn start(plan: &Plan) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let ports = free_ports(home()).map_err(|e| format!("free ports: {e}"))?;
        let kinds = SHAPE.into_iter().flat_map(|(kind, count)| (1..=count).map(move |number| (kind, number)));
        let listens = |(kind, [links, lanes]): (Kind, [SocketAddr; 2])| Listens {
            kind,
            links,
            lanes: (kind != Kind::Coordinator).then_some(lanes),
        };
        let (kinds, numbers): (Vec<_>, Vec<_>) = kinds.unzip();
        let processes: Vec<Listens> = kinds.into_iter().zip(ports).map(listens).collect();
        let relays = Relays::start(&processes).await.map_err(|e| format!("relays: {e}"))?;
        let known = processes.iter().zip(numbers).enumerate();
        let parts: Vec<_> = known.map(|(i, (process, number))| part(plan, folder.path(), &relays, (i, number), process)).collect();
        certificates(folder.path(), &parts).map_err(|e| format!("certificates: {e}"))?;
        let (listener, http) = front_listener().await.map_err(|e| format!("the front: {e}"))?;
        let file = cluster_file(plan, folder.path(), &parts, &relays, http);
        file.save(folder.path()).map_err(|e| e.to_string())?;
        let asker = Asker::new(folder.path(), &file).map_err(|e| e.to_string())?;
        let (gateways, listed) = watch::channel(Vec::new());
        let front = tokio::spawn(front::serve(listener, listed, std::future::pending())).abort_handle();
        let (lines, _) = broadcast::channel(LINES_MAX);
        let mut all = Self { parts, relays, http, model: String::new(), lines, gateways, asker, front, folder };
        for part in 0..all.parts.len() {
            all.spawn(part)?;
        }
        all.whole(WAIT_MAX).await?;
        let models = http::send(http, "GET", "/v1/models", "").await?.ok();
        all.model = models["data"][0]["id"].as_str().unwrap_or_default().to_owned();
        Ok(all)
    }

    /// Starts a process that does not run.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&mut self, part: usize) -> Result<(), String> {
        let log = self.log(part);
        let spawned = &mut self.parts[part];
        let out = OpenOptions::new().create(true).append(true).open(&log).map_err(|e| e.to_string())?;
        let mut command = Command::new(binary(spawned.binary()));
        command.args(&spawned.args).env("MILLRACE_LOG", LOG).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::from(out)).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| format!("{}: {e}", spawned.name))?;
        let stderr = child.stderr.take().ok_or("stderr is a pipe")?;
        tokio::spawn(follow(part, stderr, log, self.lines.clone()));
        spawned.child = Some(child);
        self.tell_gateways();
        Ok(())
    }

    /// What all processes log from now on, as far as it is about hand-overs, their ends and links, and placement.
    #[must_use]
    pub fn follow(&self) -> broadcast::Receiver<Line> {
        self.lines.subscribe()
    }

    /// The place of a process by name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<usize> {
        self.parts.iter().position(|part| part.name == name)
    }

    /// The number of a process.
    ///
    /// # Errors
    /// It does not run.
    pub fn pid(&self, part: usize) -> Result<u32, String> {
        let child = self.parts[part].child.as_ref();
        child.and_then(Child::id).ok_or_else(|| format!("{} does not run", self.parts[part].name))
    }

    /// Kills a process with SIGKILL; gives the signal that ended it.
    ///
    /// # Errors
    /// It did not run, or does not end.
    pub async fn kill(&mut self, part: usize) -> Result<i32, String> {
        use std::os::unix::process::ExitStatusExt;
        let pid = self.pid(part)?;
        if !process::signal("KILL", pid) {
            return Err(format!("no process {pid}"));
        }
        let child = self.parts[part].child.as_mut().ok_or("it runs")?;
        let status = timeout(WAIT_MAX, child.wait()).await.map_err(|_| "it lives on")?.map_err(|e| e.to_string())?;
        self.parts[part].child = None;
        self.tell_gateways();
        status.signal().ok_or_else(|| format!("it ended by itself: {status}"))
    }

    /// Stops a process with SIGTERM, as an operator does, and waits until it has ended; gives its exit code, none when a signal ended it.
    ///
    /// # Errors
    /// It did not run, or does not end in time.
    pub async fn stop(&mut self, part: usize, wait_max: Duration) -> Result<Option<i32>, String> {
        let pid = self.pid(part)?;
        if !process::signal("TERM", pid) {
            return Err(format!("no process {pid}"));
        }
        let child = self.parts[part].child.as_mut().ok_or("it runs")?;
        let status = timeout(wait_max, child.wait()).await.map_err(|_| "it lives on")?.map_err(|e| e.to_string())?;
        self.parts[part].child = None;
        self.tell_gateways();
        Ok(status.code())
    }

    /// Those that should run and do not, with how they ended.
    pub fn ended(&mut self) -> Vec<String> {
        let folder = self.folder.path();
        let ended = |part: &mut Part| match part.child.as_mut()?.try_wait() {
            Ok(None) => None,
            other => Some(format!("{}: {other:?}: {}", part.name, last_words(&log(folder, &part.name)))),
        };
        self.parts.iter_mut().filter_map(ended).collect()
    }

    /// What an operator sees, of whichever replica answers.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn status(&mut self) -> Result<Status, String> {
        let query = json!({"q": "status"});
        match timeout(ANSWER_WAIT_MAX, self.asker.ask(&query)).await {
            Ok(Ok(status)) => serde_json::from_value(status).map_err(|e| e.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => {
                self.asker.hang_up();
                Err("no answer in time".into())
            }
        }
    }

    /// The next question goes to whichever replica answers first.
    pub fn hang_up(&mut self) {
        self.asker.hang_up();
    }

    /// Waits until every process does its part and no request holds a block.
    ///
    /// # Errors
    /// What is missing at the end.
    pub async fn whole(&mut self, wait_max: Duration) -> Result<Status, String> {
        let (coordinators, nodes) = (SHAPE[0].1, SHAPE[1].1 + SHAPE[2].1);
        let mut last = String::new();
        let look = async {
            loop {
                let ended = self.ended();
                if !ended.is_empty() {
                    return Err(format!("processes have ended: {ended:?}"));
                }
                match self.status().await {
                    Ok(status) if is_whole(&status, coordinators, nodes) => return Ok(status),
                    Ok(status) => last = format!("{status:?}"),
                    Err(reason) => last = reason,
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(wait_max, look).await.map_err(|_| format!("not whole after {} s: {last}", wait_max.as_secs()))?
    }

    /// Folder with everything the processes wrote.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.folder.path()
    }

    fn log(&self, part: usize) -> PathBuf {
        log(self.folder.path(), &self.parts[part].name)
    }

    /// The front hears of the gateways whose process lives, as an orchestrator would tell it.
    fn tell_gateways(&self) {
        let alive = self.parts.iter().filter(|part| part.child.is_some());
        let gateway =
            |part: &Part| part.http.map(|address| Gateway { name: part.name.clone(), address, ready: true, leader: false });
        self.gateways.send_replace(alive.filter_map(gateway).collect());
    }
}

fn is_whole(status: &Status, coordinators: usize, nodes: usize) -> bool {
    let alive = status.members.iter().filter(|member| member.reachable).count();
    let rests = |node: &&crate::cluster::Node| node.usable && node.running == 0 && node.blocks.in_use == Some(0);
    let rest = status.nodes.iter().filter(rests).count();
    status.quorum && status.leader.is_some() && (alive, rest) == (coordinators, nodes)
}

impl Part {
    const fn binary(&self) -> &'static str {
        match self.kind {
            Kind::Coordinator => "coordinator",
            Kind::Prefill => "prefill-node",
            Kind::Decode => "decode-node",
        }
    }

    const fn role(&self) -> Role {
        match self.kind {
            Kind::Coordinator => Role::Coordinator,
            Kind::Prefill => Role::Prefill,
            Kind::Decode => Role::Decode,
        }
    }
}

/// The process at place `index`, the `number`th of its kind.
fn part(plan: &Plan, dir: &Path, relays: &Relays, (index, number): (usize, usize), listens: &Listens) -> Part {
    let kind = listens.kind;
    let peers: Vec<String> = (0..SHAPE[0].1).map(|i| format!("{}={}", i + 1, relays.door(i))).collect();
    let name = match kind {
        Kind::Coordinator => format!("coordinator-{number}"),
        Kind::Prefill => format!("prefill-{number}"),
        Kind::Decode => format!("decode-{number}"),
    };
    let text = |path: PathBuf| path.display().to_string();
    let mut args = vec!["--exit-with-parent".to_owned()];
    let mut add = |flag: &str, value: String| args.extend([flag.to_owned(), value]);
    add("--name", name.clone());
    add("--cluster", "local".into());
    add("--certs", text(dir.join("certs").join(&name)));
    add("--model", text(plan.model.clone()));
    add("--dtype", "f32".into());
    add("--listen", listens.links.to_string());
    let mut http = None;
    if kind == Kind::Coordinator {
        let address = free_tcp_port(listens.links.ip());
        add("--id", number.to_string());
        add("--peers", peers.join(","));
        add("--http", address.to_string());
        add("--dir", text(dir.join(&name)));
        add("--route", "split".into());
        http = Some(address);
    } else {
        add("--coordinators", peers.join(","));
        add("--advertise", relays.door(index).to_string());
        if let (Some(lanes), Some(door)) = (listens.lanes, relays.lanes_door(index)) {
            add("--lanes-port", lanes.port().to_string());
            add("--advertise-lanes-port", door.port().to_string());
        }
        add("--threads", "1".into());
        add("--kv-blocks", plan.kv_blocks.to_string());
        add("--step-tokens", plan.step_tokens.to_string());
        // Steps of that size, however fast: what is lost at which of them is what is tested.
        add("--prompt-step-ms", "0".into());
        if let Some((prefill_us, decode_us)) = plan.checksum_us {
            let us = if kind == Kind::Prefill { prefill_us } else { decode_us };
            add("--checksum-engine", us.to_string());
        }
    }
    Part { name, kind, http, args, child: None }
}

fn certificates(dir: &Path, parts: &[Part]) -> Result<(), millrace_node::pki::PkiError> {
    let certs = dir.join("certs");
    let authority = Authority::create(&certs, "local")?;
    authority.issue(Role::Admin, "admin", &certs.join("admin"))?;
    parts.iter().try_for_each(|part| authority.issue(part.role(), &part.name, &certs.join(&part.name)))
}

/// What `millctl --dir` needs to find the cluster: replicas are reached over their relays too.
fn cluster_file(plan: &Plan, dir: &Path, parts: &[Part], relays: &Relays, http: SocketAddr) -> ClusterFile {
    let (replicas, nodes) = parts.split_at(SHAPE[0].1);
    let replica = |(i, part): (usize, &Part)| CoordinatorEntry {
        id: i as u64 + 1,
        name: part.name.clone(),
        quic: relays.door(i),
        http: part.http,
        pid: None,
        joined: false,
        removed: false,
    };
    let node = |part: &Part| NodeEntry { name: part.name.clone(), kind: part.role().as_str().into(), pid: None };
    ClusterFile {
        version: VERSION,
        cluster: "local".into(),
        model: plan.model.clone(),
        http: Some(http),
        certs: dir.join("certs"),
        admin_certs: dir.join("certs").join("admin"),
        pid: None,
        coordinators: replicas.iter().enumerate().map(replica).collect(),
        nodes: nodes.iter().map(node).collect(),
    }
}

/// Where the processes of one cluster listen: an address that no other cluster of this process has, nor of others that run at the same time. Ports that the
/// system hands out meanwhile, to relays, clients and other clusters, are another address's.
fn home() -> Ipv4Addr {
    static CLUSTERS: AtomicU32 = AtomicU32::new(0);
    let (process, cluster) = (std::process::id(), CLUSTERS.fetch_add(1, Ordering::Relaxed));
    Ipv4Addr::new(127, 128 | (process >> 8) as u8, process as u8, 1 + (cluster % 254) as u8)
}

/// Two UDP ports for each process. All are held until all are found, so that they differ.
fn free_ports(home: Ipv4Addr) -> std::io::Result<Vec<[SocketAddr; 2]>> {
    let count: usize = SHAPE.iter().map(|(_, count)| count).sum();
    let held = std::iter::repeat_with(|| UdpSocket::bind((home, 0))).take(2 * count).collect::<Result<Vec<_>, _>>()?;
    let ports = held.iter().map(UdpSocket::local_addr).collect::<Result<Vec<_>, _>>()?;
    Ok(ports.chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect())
}

/// A TCP port that was free a moment ago.
fn free_tcp_port(home: IpAddr) -> SocketAddr {
    let listener = TcpListener::bind((home, 0)).and_then(|listener| listener.local_addr());
    listener.expect("loopback has a free port")
}

/// Where the output of a process goes.
fn log(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.log"))
}

/// The last lines of a log.
fn last_words(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_else(|error| error.to_string());
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(3)..].join(" | ")
}

async fn front_listener() -> std::io::Result<(tokio::net::TcpListener, SocketAddr)> {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Writes what a process logs to a file, and passes on what tests wait for.
async fn follow(part: usize, stderr: ChildStderr, log: PathBuf, followers: broadcast::Sender<Line>) {
    let mut file: Option<File> = OpenOptions::new().create(true).append(true).open(log).ok();
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(text)) = lines.next_line().await {
        if let Some(file) = &mut file {
            // A full disk costs the log, not the test.
            let _ = writeln!(file, "{text}");
        }
        if FOLLOWED.iter().any(|words| text.contains(words)) {
            // Nobody may be following.
            let _ = followers.send(Line { part, text });
        }
    }
}
