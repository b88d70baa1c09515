//! A small cluster's certificates and endpoints on loopback, for the tests of this package.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::PathBuf;

use millrace_core::ids::{Epoch, NodeId};
use millrace_core::layout::{KvDtype, KvLayout, KvParts};
use millrace_core::message::{Hello, Message, ModelIdentity, Role};
use millrace_node::endpoint::{Endpoint, EndpointConfig, Target};
use millrace_node::link::{Link, LinkError, LinkReceiver};
use millrace_node::pki::{Authority, Identity};
use tempfile::TempDir;
use tokio::sync::mpsc;

/// One authority and the directory it lives in.
pub struct World {
    dir: TempDir,
    authority: Authority,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(&dir.path().join("ca"), "demo").unwrap();
        Self { dir, authority }
    }

    pub fn identity(&self, role: Role, name: &str) -> Identity {
        let dir = self.dir(name);
        self.authority.issue(role, name, &dir).unwrap();
        Identity::load(&dir).unwrap()
    }

    /// Issues the certificate of `name` again.
    pub fn renew(&self, role: Role, name: &str) {
        self.authority.issue(role, name, &self.dir(name)).unwrap();
    }

    /// Where the certificates of `name` are, once it has an identity or an endpoint.
    pub fn dir(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn endpoint(&self, role: Role, name: &str) -> Endpoint {
        self.endpoint_with(role, name, EndpointConfig::default())
    }

    pub fn endpoint_with(&self, role: Role, name: &str, config: EndpointConfig) -> Endpoint {
        Endpoint::bind("127.0.0.1:0".parse().unwrap(), self.identity(role, name), config).unwrap()
    }
}

pub fn model() -> ModelIdentity {
    let layout =
        KvLayout { layers: 4, parts: KvParts::KeysValues, kv_heads: 2, head_dim: 64, block_tokens: 16, dtype: KvDtype::F32 };
    ModelIdentity { name: "tiny".into(), weights: [1; 32], tokenizer: [2; 32], layout }
}

pub fn hello(endpoint: &Endpoint) -> Hello {
    let me = endpoint.me();
    let (cluster, name) = (me.cluster.clone(), me.name.clone());
    Hello { cluster, name, instance: 7, node: NodeId(0), epoch: Epoch(0), model: Some(model()) }
}

pub fn target(endpoint: &Endpoint) -> Target {
    let me = endpoint.me();
    Target { addr: endpoint.local_addr().unwrap(), role: me.role, name: Some(me.name.clone()) }
}

pub type Half = Result<(Link, LinkReceiver), LinkError>;

/// Dials from `a` to `b` with the given first words, and gives both ends.
pub async fn meet(a: &Endpoint, b: &Endpoint, a_hello: &Hello, b_hello: &Hello) -> (Half, Half) {
    let whom = target(b);
    let accept = async {
        let connection = b.accept().await.unwrap().finish().await.map_err(LinkError::Connect)?;
        Link::accept(connection, b_hello).await
    };
    tokio::join!(Link::dial(a, &whom, a_hello), accept)
}

/// [`meet`] where nothing is wrong.
pub async fn pair(a: &Endpoint, b: &Endpoint) -> ((Link, LinkReceiver), (Link, LinkReceiver)) {
    let (dialed, accepted) = meet(a, b, &hello(a), &hello(b)).await;
    (dialed.unwrap(), accepted.unwrap())
}

/// Two nodes with a link between them that is read at both ends, and its first lane.
pub struct Nodes {
    pub prefill: Endpoint,
    pub decode: Endpoint,
    pub sender: Link,
    pub receiver: Link,
    /// What the sender says.
    pub messages: mpsc::UnboundedReceiver<Message>,
}

impl Nodes {
    pub async fn new() -> Self {
        let world = World::new();
        let (prefill, decode) = (world.endpoint(Role::Prefill, "p1"), world.endpoint(Role::Decode, "d1"));
        let ((sender, mut sender_in), (receiver, mut receiver_in)) = pair(&prefill, &decode).await;
        let (heard, messages) = mpsc::unbounded_channel();
        tokio::spawn(async move { while sender_in.recv().await.is_some() {} });
        tokio::spawn(async move {
            while let Some(message) = receiver_in.recv().await {
                let _ = heard.send(message);
            }
        });
        Self { prefill, decode, sender, receiver, messages }
    }

    pub fn lane(&self) -> quinn::Connection {
        self.sender.lane().unwrap().quic
    }
}

/// Bytes that look like nothing in particular, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    (0..len.div_ceil(8) as u64).flat_map(|i| millrace_core::sampling::mix(seed ^ i).to_le_bytes()).take(len).collect()
}
