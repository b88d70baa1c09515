//! A whole replica in this process, at its doors: raw bytes to its HTTP port, an operator's queries, a node's messages. What panics on
//! any thread of it is noticed; that it still answers is looked at now and then.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clap::Parser as _;
use coordinator::config::{Args, Config};
use coordinator::serve;
use millrace_checkpoint::Checkpoint;
use millrace_core::ids::{Epoch, NodeId};
use millrace_core::layout::KvDtype;
use millrace_core::message::{Hello, Join, Message, ModelIdentity, Role};
use millrace_node::endpoint::{Endpoint, EndpointConfig, Target as Where};
use millrace_node::frame::{Assembler, FrameKind, encode};
use millrace_node::link::{Link, LinkReceiver};
use millrace_node::pki::{Authority, Identity};
use millrace_node::shutdown::Shutdown;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use super::{Target, http, model, mutate, wire};
use crate::mutate::Random;
use crate::{json, samples};

/// Memory of everything that goes on in a replica meanwhile, beside what an input takes.
const REPLICA_BYTES: usize = 96 << 20;

pub(super) const DOOR: Target = Target {
    name: "door",
    what: "bytes on the HTTP port, from anybody",
    examples: requests,
    spoil: request,
    open: || {
        let mut live = Live::start();
        Box::new(move |bytes| live.knock(bytes))
    },
    memory_max: |len| REPLICA_BYTES + 96 * len,
    caught: &[],
    short_runs: 1_500,
};

pub(super) const QUERY: Target = Target {
    name: "query",
    what: "an operator's query, as JSON",
    examples: || queries().into_iter().map(|query| query.to_string().into_bytes()).collect(),
    spoil: json::document,
    open: || {
        let mut live = Live::start();
        Box::new(move |bytes| live.query(bytes))
    },
    memory_max: |len| REPLICA_BYTES + 96 * len,
    caught: &[],
    short_runs: 1_500,
};

pub(super) const LINK: Target = Target {
    name: "link",
    what: "messages of a node that has joined, to a replica",
    examples: || samples::messages().iter().map(|message| encode(message).expect("a valid message").to_vec()).collect(),
    spoil: wire::frame,
    open: || {
        let mut live = Live::start();
        Box::new(move |bytes| live.tell(bytes))
    },
    memory_max: |len| REPLICA_BYTES + 96 * len,
    caught: &[],
    short_runs: 3_000,
};

/// The cluster's name.
const CLUSTER: &str = "fuzz";
/// Far more than anything takes that is going to come.
const PATIENCE: Duration = Duration::from_secs(40);
/// Time for an answer to bytes that may be half a request, whose rest the server waits for.
const ANSWER_WAIT: Duration = Duration::from_millis(40);
/// Bytes of an answer that are looked at.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Inputs between two looks at whether the replica still answers.
const LOOK_EVERY: u64 = 64;

/// A replica that serves in this process, and who talks to it.
struct Live {
    runtime: Runtime,
    authority: Authority,
    dir: TempDir,
    http: SocketAddr,
    quic: SocketAddr,
    operator: Option<Peer>,
    node: Option<Peer>,
    inputs: u64,
}

/// A link of ours.
struct Peer {
    /// Lives as long as the link.
    _endpoint: Endpoint,
    link: Link,
    receiver: LinkReceiver,
}

impl Peer {
    /// Whatever comes next that is of interest.
    async fn hear<T>(&mut self, what: &str, mut of: impl FnMut(Message) -> Option<T>) -> Result<T, String> {
        let listen = async {
            while let Some(message) = self.receiver.recv().await {
                if let Some(found) = of(message) {
                    return Ok(found);
                }
            }
            Err(format!("{what}: the link ended: {:?}", self.link.is_closed()))
        };
        timeout(PATIENCE, listen).await.map_err(|_| format!("{what}: nothing comes"))?
    }
}

impl Live {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let authority = Authority::create(&dir.path().join("ca"), CLUSTER).expect("an authority");
        authority.issue(Role::Coordinator, "coordinator-1", &dir.path().join("coordinator-1")).expect("a certificate");
        std::fs::write(dir.path().join("fuzz.gguf"), model::mini_gguf(1).build()).expect("a scratch file");
        let http = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port");
        let quic = UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port");
        let runtime = Runtime::new().expect("a runtime");
        let config = config(dir.path(), http, quic);
        let shutdown = Shutdown::new();
        runtime.spawn(async move {
            if let Err(error) = serve::run(config, shutdown).await {
                panic!("the replica stops: {error:#}");
            }
        });
        let mut live = Self { runtime, authority, dir, http, quic, operator: None, node: None, inputs: 0 };
        live.await_ready();
        live
    }

    fn await_ready(&mut self) {
        let began = std::time::Instant::now();
        loop {
            let fresh = self.operator("ready").and_then(|()| self.ask(r#"{"q":"status","fresh":true}"#));
            match fresh {
                Ok(_) => return,
                Err(reason) => assert!(began.elapsed() < PATIENCE, "the replica does not serve: {reason}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn dial(&self, role: Role, name: &str) -> Result<Peer, String> {
        let certs = self.dir.path().join(format!("{}-{name}", role.as_str()));
        self.authority.issue(role, name, &certs).map_err(|error| error.to_string())?;
        let identity = Identity::load(&certs).map_err(|error| error.to_string())?;
        let whom = Where { addr: self.quic, role: Role::Coordinator, name: None };
        let (cluster, name) = (CLUSTER.into(), name.into());
        let hello = Hello { cluster, name, instance: self.inputs.into(), node: NodeId(0), epoch: Epoch(0), model: None };
        self.runtime.block_on(async {
            let endpoint = Endpoint::bind("127.0.0.1:0".parse().expect("an address"), identity, EndpointConfig::default());
            let endpoint = endpoint.map_err(|error| error.to_string())?;
            let (link, receiver) = Link::dial(&endpoint, &whom, &hello).await.map_err(|error| error.to_string())?;
            Ok(Peer { _endpoint: endpoint, link, receiver })
        })
    }

    fn operator(&mut self, name: &str) -> Result<(), String> {
        if self.operator.as_ref().is_none_or(|operator| operator.link.is_closed().is_some()) {
            self.operator = Some(self.dial(Role::Admin, name)?);
        }
        Ok(())
    }

    /// Asks the replica; inside, what it says.
    fn ask(&mut self, json: &str) -> Result<Result<String, String>, String> {
        self.operator("operator")?;
        let (id, json) = (self.inputs, json.to_owned());
        let operator = self.operator.as_mut().ok_or("no link")?;
        self.runtime.block_on(async {
            operator.link.send(&Message::Query { id, json }).map_err(|closed| closed.to_string())?;
            let answer = |message| match message {
                Message::Answer { id: of, result } if of == id => Some(result),
                _ => None,
            };
            operator.hear("an answer", answer).await
        })
    }

    /// Whether it still answers, every now and then.
    fn look(&mut self) -> Result<(), String> {
        self.inputs += 1;
        if !self.inputs.is_multiple_of(LOOK_EVERY) {
            return Ok(());
        }
        self.ask(r#"{"q":"status","fresh":true}"#)??;
        let alive = self.exchange(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", PATIENCE)?;
        if alive.starts_with(b"HTTP/1.1 200 ") { Ok(()) } else { Err("the gateway does not live".into()) }
    }

    fn exchange(&mut self, bytes: &[u8], wait: Duration) -> Result<Vec<u8>, String> {
        let http = self.http;
        self.runtime.block_on(async {
            let mut stream = TcpStream::connect(http).await.map_err(|error| format!("nobody listens: {error}"))?;
            let mut answer = vec![0; ANSWER_BYTES_MAX];
            let mut len = 0;
            let talk = async {
                // A server that has heard enough may close before it was told everything.
                let _ = stream.write_all(bytes).await;
                while let Ok(more @ 1..) = stream.read(&mut answer[len..]).await {
                    len += more;
                }
            };
            let _ = timeout(wait, talk).await;
            answer.truncate(len);
            Ok(answer)
        })
    }

    fn knock(&mut self, bytes: &[u8]) -> Result<bool, String> {
        self.look()?;
        let answer = self.exchange(bytes, ANSWER_WAIT)?;
        let head = String::from_utf8_lossy(&answer[..answer.len().min(16)]).into_owned();
        match head.strip_prefix("HTTP/1.1 ").or(head.strip_prefix("HTTP/1.0 ")).map(|rest| rest.split(' ').next().unwrap_or("")) {
            None if answer.is_empty() => Ok(false),
            None => Err(format!("an answer that is none: {head:?}")),
            Some("500") => Err(format!("an internal error: {}", String::from_utf8_lossy(&answer))),
            Some(status) => Ok(status.starts_with('2') || status == "503"),
        }
    }

    fn query(&mut self, bytes: &[u8]) -> Result<bool, String> {
        self.look()?;
        let Ok(json) = std::str::from_utf8(bytes) else { return Ok(false) };
        // What is longer than a frame is never sent.
        if json.len() > coordinator::admin::QUERY_BYTES_MAX {
            return Ok(false);
        }
        let answer = self.ask(json)?;
        if let Ok(text) = &answer {
            serde_json::from_str::<Value>(text).map_err(|error| format!("an answer that is no JSON: {error}"))?;
        }
        Ok(answer.is_ok())
    }

    /// Makes sure that our node has joined.
    fn joined(&mut self) -> Result<(), String> {
        if self.node.as_ref().is_some_and(|node| node.link.is_closed().is_none()) {
            return Ok(());
        }
        let mut node = self.dial(Role::Prefill, "prefill-1")?;
        let join =
            Join { model: served(self.dir.path()), instance: self.inputs.into(), ..samples::join("prefill-1", Role::Prefill) };
        self.runtime.block_on(async {
            node.link.send(&Message::Join(join)).map_err(|closed| closed.to_string())?;
            let outcome = |message| match message {
                Message::Joined { .. } => Some(()),
                // The process before this one is taken for alive; it is over by the next input.
                Message::JoinRefused { retry: true, .. } => Some(()),
                _ => None,
            };
            node.hear("an answer to a join", outcome).await
        })?;
        self.node = Some(node);
        Ok(())
    }

    fn tell(&mut self, bytes: &[u8]) -> Result<bool, String> {
        self.look()?;
        let mut assembler = Assembler::new(FrameKind::Message);
        let whole = assembler.feed(&mut Bytes::copy_from_slice(bytes)).unwrap_or(false);
        let Some(message) = whole.then(|| assembler.take_message().ok()).flatten() else { return Ok(false) };
        self.joined()?;
        let node = self.node.as_mut().ok_or("no link")?;
        let allowed = message.may_send(Role::Prefill);
        let _ = node.link.send(&message);
        while let Ok(Some(_)) = self.runtime.block_on(async { timeout(Duration::ZERO, node.receiver.recv()).await }) {}
        // What was said of loads and caches shows in how prompts are placed.
        if self.inputs.is_multiple_of(8) {
            let _ = self.ask(r#"{"q":"route_explain","tokens":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}"#)?;
            let _ = self.exchange(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", ANSWER_WAIT)?;
        }
        Ok(allowed)
    }
}

fn config(dir: &Path, http: SocketAddr, quic: SocketAddr) -> Config {
    let at = |name: &str| dir.join(name).display().to_string();
    let words = [
        ("--id", "1".to_owned()),
        ("--name", "coordinator-1".into()),
        ("--peers", format!("1={quic}")),
        ("--listen", quic.to_string()),
        ("--http", http.to_string()),
        ("--dir", at("log")),
        ("--certs", at("coordinator-1")),
        ("--cluster", CLUSTER.into()),
        ("--model", at("fuzz.gguf")),
        ("--model-name", http::MODEL.into()),
    ];
    let line = words.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
    let args = Args::try_parse_from(["coordinator".to_owned()].into_iter().chain(line)).expect("a valid command line");
    Config::new(args).expect("a valid configuration")
}

fn served(dir: &Path) -> ModelIdentity {
    Arc::new(Checkpoint::open(&dir.join("fuzz.gguf")).expect("the small model opens")).identity(http::MODEL, KvDtype::Bf16, 16)
}

fn post(path: &str, body: &str, more: &str) -> Vec<u8> {
    let length = body.len();
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n{more}");
    format!("{head}content-length: {length}\r\n\r\n{body}").into_bytes()
}

fn requests() -> Vec<Vec<u8>> {
    let resume = r#"{"choices":[{"tokens":[5,6],"cached_tokens":0,"ended":false}]}"#;
    let carried = format!("x-millrace-front: id=7 created=3 seed=9 resume={}\r\n", resume.len());
    let chunked = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{\"mod\r\n0\r\n\r\n";
    let traced = "authorization: Bearer sk-1\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n";
    let mut all = vec![
        post("/v1/chat/completions", &http::chat().to_string(), ""),
        post("/v1/chat/completions", &format!("{resume}{}", http::chat()), &carried),
        post("/v1/completions", &http::completions()[1].to_string(), "x-millrace-ttft-ms: 500\r\n"),
        post("/v1/completions", &http::completions()[3].to_string(), traced),
        chunked.as_bytes().to_vec(),
    ];
    let paths = ["/v1/models", "/v1/models/fuzz", "/livez", "/readyz", "/health", "/metrics", "/nothing", "/v1/models/%2e%2e"];
    all.extend(paths.map(|path| format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").into_bytes()));
    all
}

/// Spoils the head or the body; mostly the length is made right, so that the body is read.
fn request(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let split = |bytes: &[u8]| bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4);
    let Some(at) = split(bytes).filter(|_| !random.once_in(4)) else { return mutate::bytes(bytes, other, random) };
    let (head, mut body) = (String::from_utf8_lossy(&bytes[..at]).into_owned(), bytes[at..].to_vec());
    let from = split(other).map_or(other, |at| &other[at..]);
    json::document(&mut body, from, random);
    let lines = head.lines().filter(|line| !line.is_empty());
    let right = |line: &str| match line.starts_with("content-length:") {
        true => format!("content-length: {}\r\n", body.len()),
        false => format!("{line}\r\n"),
    };
    let mut whole: Vec<u8> = lines.map(right).collect::<String>().into_bytes();
    whole.extend_from_slice(b"\r\n");
    whole.extend_from_slice(&body);
    *bytes = whole;
}

/// One of each question that changes no members: a change of those may take seconds, and the replica with it.
fn queries() -> Vec<Value> {
    let tokens: Vec<u32> = (0..40).collect();
    vec![
        json!({"q": "status", "fresh": false}),
        json!({"q": "member"}),
        json!({"q": "members_list", "fresh": true}),
        json!({"q": "members", "op": "add", "name": "coordinator-9", "address": "nowhere"}),
        json!({"q": "cache_lookup", "tokens": tokens, "tenant": "default"}),
        json!({"q": "cache_stat"}),
        json!({"q": "route_explain", "text": "hello the 12", "max_new": 3}),
        json!({"q": "route_explain", "messages": [{"role": "user", "content": "hi"}]}),
        json!({"q": "route_decisions", "since": 0, "limit": 5, "request": "cmpl-00000000000000000000000000000007", "here": true}),
        json!({"q": "set_state", "node": "prefill-1", "state": "cordoned"}),
        json!({"q": "tenants", "op": "create", "name": "acme", "api_key": "ab".repeat(32), "running_max": 3, "prompt_tokens_per_minute": 9}),
        json!({"q": "tenants", "op": "rotate_key", "name": "acme", "api_key": "cd".repeat(32), "keep": true}),
        json!({"q": "tenants", "op": "set", "name": "acme", "answer_tokens_max": 7}),
        json!({"q": "tenants", "op": "list"}),
        json!({"q": "tenants", "op": "delete", "name": "acme"}),
        json!({"q": "config", "op": "get", "key": "slo.ttft_ms"}),
        json!({"q": "config", "op": "set", "set": {"slo.ttft_ms": "500", "auth.required": null}, "if_version": 1, "dry_run": true}),
        json!({"q": "cache", "op": "pin", "tokens": tokens, "label": "l", "ttl_s": 60}),
        json!({"q": "cache", "op": "unpin", "pin": 1}),
        json!({"q": "cache", "op": "pins"}),
        json!({"q": "cache", "op": "evict", "tokens": tokens, "dry_run": true}),
        json!({"q": "cache", "op": "evict", "all": true, "node": "prefill-1"}),
        json!({"q": "cache", "op": "verify"}),
        json!({"q": "cache", "op": "top_prefixes", "limit": 3, "own": true}),
        json!({"q": "snapshot", "op": "open"}),
        json!({"q": "snapshot", "op": "read", "id": 1, "offset": 0}),
        json!({"q": "snapshot", "op": "close", "id": 1}),
    ]
}
