//! Three real replicas on loopback, with nodes and an operator played by the test: joining, identity, cache changes through any
//! replica, the loss of the leader, and members that come, vote, go and take one another's place.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use coordinator::ctl::cluster_file::{self, ClusterFile, CoordinatorEntry};
use millrace_checkpoint::Checkpoint;
use millrace_core::ids::{BlockHash, Epoch, NodeId, ReplicaId};
use millrace_core::layout::KvDtype;
use millrace_core::message::{BlockOp, CacheDigest, Delta, Hello, Join, Load, Message, ModelIdentity, Role};
use millrace_node::endpoint::{Endpoint, EndpointConfig, Target};
use millrace_node::link::{Link, LinkReceiver};
use millrace_node::pki::{Authority, Identity};
use serde_json::{Value, json};

/// Far more than anything here takes; only a failure waits so long.
const PATIENCE: Duration = Duration::from_secs(60);
const CLUSTER: &str = "test";
/// Replicas that a cluster begins with.
const FOUNDERS: usize = 3;

fn model_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tiny-llama-gqa-tied")
}

fn model() -> ModelIdentity {
    Checkpoint::open(&model_path()).unwrap().identity("tiny", KvDtype::F32, 16)
}

/// A process that does not outlive the test.
struct Replica {
    child: Child,
    ready: Value,
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Cluster {
    dir: tempfile::TempDir,
    authority: Authority,
    addresses: Vec<SocketAddr>,
    replicas: Vec<Option<Replica>>,
}

impl Cluster {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(&dir.path().join("ca"), CLUSTER).unwrap();
        let sockets: Vec<UdpSocket> = (0..FOUNDERS).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        let addresses: Vec<SocketAddr> = sockets.iter().map(|s| s.local_addr().unwrap()).collect();
        drop(sockets);
        let mut cluster = Self { dir, authority, addresses, replicas: Vec::new() };
        for i in 0..FOUNDERS {
            cluster.issue(i);
            let replica = cluster.launch(i);
            cluster.replicas.push(Some(replica));
        }
        cluster
    }

    fn issue(&self, i: usize) {
        let name = format!("coordinator-{}", i + 1);
        self.authority.issue(Role::Coordinator, &name, &self.dir.path().join(&name)).unwrap();
    }

    /// An address for a replica that will join; gives its index.
    fn plan_replica(&mut self) -> usize {
        self.addresses.push(UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
        self.replicas.push(None);
        self.issue(self.addresses.len() - 1);
        self.addresses.len() - 1
    }

    /// Runs a replica that will not be taken for a member, to its end; gives what it says.
    fn run_in_vain(&self, i: usize) -> String {
        let out = self.command(i).stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{said}");
        said
    }

    fn command(&self, i: usize) -> Command {
        let name = format!("coordinator-{}", i + 1);
        let founders = self.addresses.iter().enumerate().take(FOUNDERS);
        let peers: Vec<String> = founders.map(|(i, a)| format!("{}={a}", i + 1)).collect();
        let mut command = Command::new(env!("CARGO_BIN_EXE_coordinator"));
        command
            .args((i >= FOUNDERS).then_some("--join"))
            .args(["--id", &(i + 1).to_string(), "--name", &name, "--peers", &peers.join(",")])
            .args(["--listen", &self.addresses[i].to_string(), "--cluster", CLUSTER, "--model-name", "tiny", "--dtype", "f32"])
            .arg("--dir")
            .arg(self.dir.path().join(format!("log-{}", i + 1)))
            .arg("--certs")
            .arg(self.dir.path().join(&name))
            .arg("--model")
            .arg(model_path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command
    }

    fn launch(&self, i: usize) -> Replica {
        let mut child = self.command(i).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready = line.strip_prefix("ready ").unwrap_or_else(|| panic!("first line {line:?}"));
        Replica { ready: serde_json::from_str(ready).unwrap(), child }
    }

    fn endpoint(&self, role: Role, name: &str) -> Endpoint {
        let certs = self.dir.path().join(format!("{}-{name}", role.as_str()));
        self.authority.issue(role, name, &certs).unwrap();
        Endpoint::bind("127.0.0.1:0".parse().unwrap(), Identity::load(&certs).unwrap(), EndpointConfig::default()).unwrap()
    }
}

/// One of the test's own links.
struct Peer {
    link: Link,
    receiver: LinkReceiver,
}

impl Peer {
    async fn dial(endpoint: &Endpoint, addr: SocketAddr, instance: u128, model: Option<ModelIdentity>) -> Self {
        let (cluster, name) = (CLUSTER.into(), endpoint.me().name.clone());
        let hello = Hello { cluster, name, instance, node: NodeId(0), epoch: Epoch(0), model };
        let target = Target { addr, role: Role::Coordinator, name: None };
        let (link, receiver) = Link::dial(endpoint, &target, &hello).await.unwrap();
        Self { link, receiver }
    }

    /// The next message that answers something: what replicas tell nodes unasked is passed over.
    async fn recv(&mut self) -> Message {
        loop {
            match self.hear().await {
                Message::Ping | Message::Replicas(_) => {}
                message => return message,
            }
        }
    }

    async fn hear(&mut self) -> Message {
        let message = tokio::time::timeout(PATIENCE, self.receiver.recv()).await.expect("in time");
        message.unwrap_or_else(|| panic!("link ended: {:?}", self.link.is_closed()))
    }

    async fn query(&mut self, query: Value) -> Value {
        self.try_query(query).await.unwrap()
    }

    async fn try_query(&mut self, query: Value) -> Result<Value, String> {
        self.link.send(&Message::Query { id: 1, json: query.to_string() }).unwrap();
        match self.recv().await {
            Message::Answer { id: 1, result } => result.map(|text| serde_json::from_str(&text).unwrap()),
            other => panic!("{other:?}"),
        }
    }

    /// Changes the members; what is a matter of a moment is tried again.
    async fn members(&mut self, op: &str, fields: Value) -> Value {
        let mut query = json!({"q": "members", "op": op});
        query.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.try_query(query.clone()).await {
                Ok(answer) => return answer,
                Err(reason) => {
                    let passing = ["entries behind", "does not answer", "under way", "unavailable:"];
                    assert!(passing.iter().any(|word| reason.contains(word)) && Instant::now() < deadline, "{query}: {reason}");
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The next message that is wanted; others are passed over.
    async fn find<T>(&mut self, wanted: impl Fn(Message) -> Option<T>) -> T {
        loop {
            if let Some(found) = wanted(self.hear().await) {
                return found;
            }
        }
    }

    /// Asks until the answer is as wanted.
    async fn until(&mut self, query: Value, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.query(query.clone()).await;
            if wanted(&answer) {
                return answer;
            }
            assert!(Instant::now() < deadline, "still {answer:#}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Asks to join until there is a leader to decide.
    async fn join(&mut self, join: &Join) -> Result<(NodeId, Epoch), (String, bool)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.link.send(&Message::Join(join.clone())).unwrap();
            match self.recv().await {
                Message::Joined { node, epoch } => return Ok((node, epoch)),
                Message::JoinRefused { reason, retry: true } if !reason.contains("identity") && Instant::now() < deadline => {}
                Message::JoinRefused { reason, retry } => return Err((reason, retry)),
                other => panic!("{other:?}"),
            }
        }
    }
}

fn join(name: &str, role: Role, instance: u128, model: ModelIdentity) -> Join {
    Join { name: name.into(), role, address: "127.0.0.1:9".into(), instance, pid: 4242, model, slots: 64 }
}

/// Sends heartbeats over clones of the links until dropped.
fn beat(links: Vec<Link>, node: NodeId, epoch: Epoch) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let load = Load { free_blocks: 60, evictable_blocks: 1, total_blocks: 64, ..Load::default() };
        loop {
            for link in &links {
                let _ = link.send(&Message::Heartbeat { node, epoch, load });
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
}

async fn operator(cluster: &Cluster, i: usize) -> Peer {
    let endpoint = cluster.endpoint(Role::Admin, &format!("operator-{i}"));
    Peer::dial(&endpoint, cluster.addresses[i], 99, None).await
}

fn leader_of(status: &Value) -> Option<usize> {
    status["members"].as_array()?.iter().position(|m| m["role"] == "leader")
}

fn delta(node: NodeId, epoch: Epoch, base_seq: u64, block: u8) -> Message {
    let ops = vec![BlockOp::Stored(BlockHash([block; 16]))];
    Message::Delta(Delta { node, epoch, base_seq, seq: base_seq + 1, ops })
}

#[tokio::test(flavor = "multi_thread")]
async fn three_replicas_take_nodes_in_and_survive_the_leader() {
    let mut cluster = Cluster::start();
    let whole = |s: &Value| {
        s["quorum"] == true && s["stale"] == false && s["members"].as_array().unwrap().iter().all(|m| m["reachable"] == true)
    };
    let mut operators = [operator(&cluster, 0).await, operator(&cluster, 1).await, operator(&cluster, 2).await];
    let status = operators[0].until(json!({"q": "status"}), whole).await;
    let leader = leader_of(&status).unwrap();
    let (follower, third) = ((leader + 1) % 3, (leader + 2) % 3);
    assert_eq!(status["leader"], format!("coordinator-{}", leader + 1));
    assert_eq!(status["members"][follower]["http"], cluster.replicas[follower].as_ref().unwrap().ready["http"]);

    // A node joins through a follower.
    let endpoint = cluster.endpoint(Role::Decode, "decode-0");
    let mut links = Vec::new();
    for addr in &cluster.addresses {
        links.push(Peer::dial(&endpoint, *addr, 7, Some(model())).await);
    }
    let asked = join("decode-0", Role::Decode, 7, model());
    let (node, epoch) = links[follower].join(&asked).await.unwrap();
    assert_eq!(links[third].join(&asked).await, Ok((node, epoch)), "the same process may ask again");
    let beating = beat(links.iter().map(|peer| peer.link.clone()).collect(), node, epoch);

    // Its name is taken while it lives, and other models do not fit.
    let mut usurper = Peer::dial(&endpoint, cluster.addresses[third], 8, Some(model())).await;
    let (reason, retry) = usurper.join(&join("decode-0", Role::Decode, 8, model())).await.unwrap_err();
    assert!(retry && reason.contains("held by a live process (pid 4242"), "{reason}");
    let other = ModelIdentity { weights: [9; 32], ..model() };
    let stranger_endpoint = cluster.endpoint(Role::Prefill, "prefill-0");
    let mut stranger = Peer::dial(&stranger_endpoint, cluster.addresses[leader], 9, Some(other.clone())).await;
    let (reason, retry) = stranger.join(&join("prefill-0", Role::Prefill, 9, other)).await.unwrap_err();
    assert!(!retry && reason.contains("weights"), "{reason}");

    // What it caches reaches every replica, whichever it tells.
    links[follower].link.send(&delta(node, epoch, 0, 1)).unwrap();
    assert_eq!(links[follower].recv().await, Message::DeltaApplied { epoch, seq: 1 });
    links[third].link.send(&delta(node, epoch, 5, 2)).unwrap();
    assert_eq!(links[third].recv().await, Message::WantSnapshot { epoch });
    for operator in &mut operators {
        operator.until(json!({"q": "cache_stat"}), |stat| stat["blocks"] == 1 && stat["nodes"][0]["seq"] == 1).await;
    }

    // A cache that differs after the same deltas is found, on every replica; and the replicas find each other equal.
    let said = CacheDigest { node, epoch, seq: 1, blocks: 2, digest: 5 };
    links[follower].link.send(&Message::CacheDigest(said)).unwrap();
    assert_eq!(links[follower].recv().await, Message::WantSnapshot { epoch });
    let agree = |s: &Value| s["replicas"]["agreed"].as_u64() > Some(0) && s["replicas"]["differing"] == json!([]);
    for operator in &mut operators {
        operator.until(json!({"q": "cache_stat"}), |stat| stat["drift"]["found"] == 1 && agree(stat)).await;
    }

    // The leader is lost; the others go on, with the same node and the same blocks.
    cluster.replicas[leader] = None;
    let went_on = |s: &Value| s["quorum"] == true && s["members"][leader]["reachable"] == false && s["nodes"][0]["usable"] == true;
    let status = operators[follower].until(json!({"q": "status"}), went_on).await;
    assert_eq!((&status["nodes"][0]["state"], &status["nodes"][0]["blocks"]["in_use"]), (&json!("up"), &json!(3)));
    links[follower].link.send(&delta(node, epoch, 1, 2)).unwrap();
    assert_eq!(links[follower].recv().await, Message::DeltaApplied { epoch, seq: 2 });

    // It comes back with its log.
    cluster.replicas[leader] = Some(cluster.launch(leader));
    let mut back = operator(&cluster, leader).await;
    back.until(json!({"q": "cache_stat"}), |stat| stat["blocks"] == 2).await;
    back.until(json!({"q": "status"}), whole).await;

    // Silence ends a lease.
    beating.abort();
    operators[third].until(json!({"q": "status"}), |s| s["nodes"][0]["state"] == "dead").await;
}

#[test]
fn a_replica_that_cannot_start_says_why() {
    let cluster = Cluster::start();
    let fails = |change: &dyn Fn(&mut Command), code: i32, word: &str| {
        let mut command = cluster.command(0);
        change(&mut command);
        let out = command.stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{said}");
        assert!(said.contains(word), "{said}");
        assert!(out.stdout.is_empty());
    };
    fails(&|_| (), 1, "in use by another process");
    fails(
        &|c| {
            c.args(["--nonsense"]);
        },
        2,
        "--nonsense",
    );
    let free = "127.0.0.1:0";
    let elsewhere = |c: &mut Command, name: &str| {
        *c = Command::new(env!("CARGO_BIN_EXE_coordinator"));
        let own = format!("1={free}");
        c.args(["--id", "1", "--name", name, "--peers", &own, "--listen", free, "--cluster", CLUSTER, "--dtype", "f32"]);
        c.stdin(Stdio::null()).stdout(Stdio::piped());
    };
    let rest = |c: &mut Command, dir: &str, certs: &str, model: &Path| {
        c.arg("--dir")
            .arg(cluster.dir.path().join(dir))
            .arg("--certs")
            .arg(cluster.dir.path().join(certs))
            .arg("--model")
            .arg(model);
    };
    let case = |name: &'static str, dir: &'static str, certs: &'static str, model: PathBuf| {
        move |c: &mut Command| {
            elsewhere(c, name);
            rest(c, dir, certs, &model);
        }
    };
    fails(&case("coordinator-2", "x", "coordinator-1", model_path()), 2, "must end in");
    fails(&case("other-1", "x", "coordinator-1", model_path()), 1, "the certificate is \"coordinator-1\"'s");
    fails(&case("coordinator-1", "x", "nowhere", model_path()), 1, "nowhere");
    fails(&case("coordinator-1", "x", "coordinator-1", "/nonexistent/model".into()), 1, "--model");
    fails(&case("coordinator-1", "log-2", "coordinator-1", model_path()), 1, "log-2");
}

impl Cluster {
    /// Writes down what `millctl` needs to find the cluster.
    fn write_cluster_file(&self) {
        self.authority.issue(Role::Admin, "admin", &self.dir.path().join("admin")).unwrap();
        let entry = |i: usize| CoordinatorEntry {
            id: i as u64 + 1,
            name: format!("coordinator-{}", i + 1),
            quic: self.addresses[i],
            http: None,
            pid: None,
            joined: false,
            removed: false,
        };
        let file = ClusterFile {
            version: cluster_file::VERSION,
            cluster: CLUSTER.into(),
            model: model_path(),
            http: None,
            certs: "ca".into(),
            admin_certs: "admin".into(),
            pid: None,
            coordinators: (0..3).map(entry).collect(),
            nodes: Vec::new(),
        };
        std::fs::write(self.dir.path().join(cluster_file::FILE), serde_json::to_vec(&file).unwrap()).unwrap();
    }

    /// Runs `millctl`; its JSON, or its exit code and what it complained about.
    fn millctl(&self, args: &[&str]) -> Result<Value, (i32, String)> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_millctl"));
        let output = command.args(args).args(["-o", "json"]).env("MILLRACE_DIR", self.dir.path()).output().unwrap();
        match output.status.code() {
            Some(0) => Ok(serde_json::from_slice(&output.stdout).unwrap()),
            code => Err((code.unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())),
        }
    }

    fn stop_all(&mut self) {
        self.replicas.iter_mut().for_each(|replica| *replica = None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_state_begins_another_life_of_the_cluster() {
    let mut cluster = Cluster::start();
    cluster.write_cluster_file();
    let mut first = operator(&cluster, 0).await;
    first.until(json!({"q": "status"}), |s| s["quorum"] == true).await;
    let endpoint = cluster.endpoint(Role::Decode, "decode-0");
    let mut peer = Peer::dial(&endpoint, cluster.addresses[0], 7, Some(model())).await;
    let (node, epoch) = peer.join(&join("decode-0", Role::Decode, 7, model())).await.unwrap();
    cluster.millctl(&["tenants", "create", "acme"]).unwrap();

    // Saved and looked into; a file is not overwritten.
    let file = cluster.dir.path().join("state.mr");
    let name = file.to_str().unwrap();
    let saved = cluster.millctl(&["snapshot", "save", name]).unwrap();
    assert_eq!((&saved["cluster"], &saved["fresh"]), (&json!(CLUSTER), &json!(true)));
    let again = cluster.millctl(&["snapshot", "save", name]).unwrap_err();
    assert_eq!(again.0, 6, "{}", again.1);
    cluster.stop_all();
    let seen = cluster.millctl(&["snapshot", "inspect", name]).unwrap();
    assert_eq!((&seen["applied"], &seen["nodes"][0]["name"]), (&saved["applied"], &json!("decode-0")));
    assert!(seen["tenants"].as_array().unwrap().contains(&json!("acme")), "{seen}");

    // Restored into empty folders only, for each member.
    let restore = |cluster: &Cluster, id: usize| {
        let dir = cluster.dir.path().join(format!("log-{id}"));
        let (dir, id) = (dir.to_str().unwrap().to_owned(), id.to_string());
        cluster.millctl(&["snapshot", "restore", name, "--dir", &dir, "--id", &id, "--members", "1,2,3"])
    };
    let refused = restore(&cluster, 1).unwrap_err();
    assert_eq!(refused.0, 6, "{}", refused.1);
    for id in 1..=3 {
        std::fs::remove_dir_all(cluster.dir.path().join(format!("log-{id}"))).unwrap();
        let restored = restore(&cluster, id).unwrap();
        assert!(restored["applied"].as_u64() > saved["applied"].as_u64(), "{restored}");
    }

    // The new life has the tenants and names of the old, and knows its nodes to be gone.
    for i in 0..3 {
        cluster.replicas[i] = Some(cluster.launch(i));
    }
    let mut first = operator(&cluster, 1).await;
    let status = first.until(json!({"q": "status"}), |s| s["quorum"] == true && s["stale"] == false).await;
    assert_eq!((&status["nodes"][0]["name"], &status["nodes"][0]["state"]), (&json!("decode-0"), &json!("dead")));
    let tenants = cluster.millctl(&["tenants", "list"]).unwrap();
    assert!(tenants["tenants"].as_array().unwrap().iter().any(|tenant| tenant["name"] == "acme"), "{tenants}");
    let mut peer = Peer::dial(&endpoint, cluster.addresses[1], 7, Some(model())).await;
    let (same, later) = peer.join(&join("decode-0", Role::Decode, 7, model())).await.unwrap();
    assert_eq!(same, node, "its number stays");
    assert!(later.0 > epoch.0 + (1 << 39), "an epoch that the old life cannot have granted: {later}");
}

fn names(list: &[usize]) -> Vec<String> {
    let mut list = list.to_vec();
    list.sort_unstable();
    list.iter().map(|i| format!("coordinator-{}", i + 1)).collect()
}

fn name(i: usize) -> Value {
    json!(format!("coordinator-{}", i + 1))
}

/// Sends a request to a gateway and does not wait for the answer.
fn ask_gateway(http: &str) -> TcpStream {
    let body = json!({"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 1}).to_string();
    let mut stream = TcpStream::connect(http).unwrap();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    stream
}

/// Empties a replica's disk, sees it refused, and puts a new one in its place; gives that and the voters then.
async fn lose_the_disk_of(cluster: &mut Cluster, admin: &mut Peer, wiped: usize) -> (usize, Value) {
    cluster.replicas[wiped] = None;
    std::fs::remove_dir_all(cluster.dir.path().join(format!("log-{}", wiped + 1))).unwrap();
    assert!(cluster.run_in_vain(wiped).contains("millctl members replace"));
    let new = cluster.plan_replica();
    let address = cluster.addresses[new].to_string();
    admin.members("add", json!({"name": name(new), "address": address})).await;
    cluster.replicas[new] = Some(cluster.launch(new));
    let replaced = admin.members("replace", json!({"old": name(wiped), "new": name(new)})).await;
    (new, replaced["voters"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn members_come_vote_go_and_are_replaced() {
    let mut cluster = Cluster::start();
    let mut operator_0 = operator(&cluster, 0).await;
    let led = |s: &Value| s["quorum"] == true && s["members"].as_array().unwrap().iter().all(|m| m["reachable"] == true);
    let status = operator_0.until(json!({"q": "status"}), led).await;
    let leader = leader_of(&status).unwrap();
    let (goes, wiped) = ((leader + 1) % 3, (leader + 2) % 3);
    let mut admin = operator(&cluster, goes).await;

    // A node that caches a block.
    let endpoint = cluster.endpoint(Role::Decode, "decode-0");
    let mut uplink = Peer::dial(&endpoint, cluster.addresses[leader], 7, Some(model())).await;
    let (node, epoch) = uplink.join(&join("decode-0", Role::Decode, 7, model())).await.unwrap();
    let beating = beat(vec![uplink.link.clone()], node, epoch);
    uplink.link.send(&delta(node, epoch, 0, 1)).unwrap();

    // A learner is added through a follower, cannot vote before it is there, and then is a warm gateway.
    let learner = cluster.plan_replica();
    let address = cluster.addresses[learner].to_string();
    let added = admin.members("add", json!({"name": name(learner), "address": address})).await;
    assert_eq!((&added["role"], &added["learners"]), (&json!("learner"), &json!(names(&[learner]))));
    let refused =
        |answer: Result<Value, String>, word: &str| assert!(answer.as_ref().is_err_and(|why| why.starts_with(word)), "{answer:?}");
    refused(admin.try_query(json!({"q": "members", "op": "add", "name": name(learner), "address": address})).await, "conflict: ");
    refused(admin.try_query(json!({"q": "members", "op": "promote", "member": name(learner)})).await, "conflict: ");
    refused(admin.try_query(json!({"q": "members", "op": "remove", "member": "coordinator-9"})).await, "not found: ");
    refused(admin.try_query(json!({"q": "members", "op": "add", "name": "other-9", "address": address})).await, "usage: ");
    cluster.replicas[learner] = Some(cluster.launch(learner));
    let told = uplink.find(|message| if let Message::Replicas(list) = message { Some(list) } else { None }).await;
    assert!(told.iter().any(|one| one.replica == ReplicaId(4) && one.address == address), "{told:?}");
    let mut gateway = Peer::dial(&endpoint, cluster.addresses[learner], 7, Some(model())).await;
    let beating_there = beat(vec![gateway.link.clone()], node, epoch);
    let mut newcomer = operator(&cluster, learner).await;
    newcomer.until(json!({"q": "cache_stat"}), |stat| stat["blocks"] == 1).await;
    let warm = |s: &Value| s["members"][learner]["role"] == "learner" && s["nodes"][0]["usable"] == true && s["quorum"] == true;
    newcomer.until(json!({"q": "status"}), warm).await;
    let request = ask_gateway(cluster.replicas[learner].as_ref().unwrap().ready["http"].as_str().unwrap());
    let ticket = gateway.find(|message| if let Message::Assign(ticket) = message { Some(ticket) } else { None }).await;
    assert_eq!(ticket.gateway, ReplicaId(4), "the learner routes");
    drop(request);

    // It is promoted. One that is dead is removed, and stops when it comes back.
    let promoted = admin.members("promote", json!({"member": name(learner)})).await;
    assert_eq!(promoted["voters"], json!(names(&[0, 1, 2, learner])));
    cluster.replicas[goes] = None;
    let removed = newcomer.members("remove", json!({"member": name(goes)})).await;
    assert_eq!((&removed["role"], &removed["voters"]), (&json!("removed"), &json!(names(&[leader, wiped, learner]))));
    assert!(cluster.run_in_vain(goes).contains("was removed from the cluster"));
    let listed = newcomer.query(json!({"q": "members_list", "fresh": true})).await;
    assert_eq!((&listed["fresh"], &listed["stale"], listed["members"].as_array().unwrap().len()), (&json!(true), &json!(false), 3));

    // One whose disk is lost is refused under its old number, and replaced.
    let (fifth, voters) = lose_the_disk_of(&mut cluster, &mut newcomer, wiped).await;
    assert_eq!(voters, json!(names(&[leader, learner, fifth])));

    // Leadership moves on demand; a leader that is removed hands it over, and what was cached is known to all.
    assert_eq!(newcomer.members("transfer_leader", json!({"to": name(fifth)})).await["leader"], name(fifth));
    newcomer.members("remove", json!({"member": name(fifth)})).await;
    let mut gone = cluster.replicas[fifth].take().unwrap();
    assert_eq!(gone.child.wait().unwrap().code(), Some(1), "it stops by itself");
    gateway.link.send(&delta(node, epoch, 1, 2)).unwrap();
    gateway.find(|message| (message == Message::DeltaApplied { epoch, seq: 2 }).then_some(())).await;
    let whole = |s: &Value| s["quorum"] == true && s["members"].as_array().unwrap().len() == 2 && led(s);
    newcomer.until(json!({"q": "status"}), whole).await;
    beating.abort();
    beating_there.abort();
}
