//! The shell of a node, the same for prefill and decode: links, engine thread, drive loop. The binaries bring the engine.
//!
//! [`Node::serve`] introduces the parts to one another and runs until shutdown. The life of an attempt, seen from here:
//! `Assign` -> batch -> engine, layer by layer -> streams to the decoder -> first token to the gateway -> `Received` -> release;
//! or, on the other side, `Open` -> slots reserved -> cells verified one by one -> batch -> tokens to the gateway.

pub mod args;
mod compute;
mod drive;
mod event;
mod links;
mod peers;
mod priority;
pub mod process;
mod receiving;
mod replicas;
mod sending;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use millrace_core::batch::BatchConfig;
use millrace_core::engine::Engine;
use millrace_core::ids::{Epoch, NodeId, ReplicaId, Time};
use millrace_core::message::{Hello, Join, ModelIdentity, Role};
use millrace_core::node;
use millrace_kernels::slab::KvSlab;
use tokio::sync::{mpsc, watch};

use self::compute::Compute;
use crate::endpoint::{Endpoint, EndpointConfig};
use crate::pki::Identity;
use crate::shutdown::Shutdown;

/// Who a node is and whom it serves.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Prefill or decode.
    pub role: Role,
    /// The cluster's name.
    pub cluster: String,
    /// The node's name, as in its certificate.
    pub name: String,
    /// Where to listen; port 0 takes any.
    pub listen: SocketAddr,
    /// Where other nodes reach it, when that is another address.
    pub advertise: Option<SocketAddr>,
    /// Every coordinator replica: raft id and address.
    pub coordinators: Vec<(ReplicaId, SocketAddr)>,
    /// What the engine serves.
    pub model: ModelIdentity,
    /// Limits of the batch; `slots` is the pool's size.
    pub batch: BatchConfig,
    /// How it talks.
    pub endpoint: EndpointConfig,
    /// Whether KV leaves as soon as a layer has it; else when the prompt is computed.
    pub by_layer: bool,
}

/// A process's monotonic clock, in the units of `core`.
#[derive(Clone, Copy)]
struct Clock(Instant);

impl Clock {
    fn now(self) -> Time {
        Time(self.0.elapsed().as_micros() as u64)
    }
}

/// A node whose ports are bound and whose engine is ready.
pub struct Node {
    endpoint: Endpoint,
    config: NodeConfig,
    instance: u128,
}

impl Node {
    /// Binds the node's ports.
    ///
    /// # Errors
    /// A port is taken, or the certificate is not this node's.
    pub fn bind(config: NodeConfig, identity: Identity) -> Result<Self> {
        anyhow::ensure!(
            identity.me.name == config.name && identity.me.role == config.role && identity.me.cluster == config.cluster,
            "the certificate is for {}, not for {}/{}/{}",
            identity.me,
            config.cluster,
            config.role.as_str(),
            config.name
        );
        let endpoint = Endpoint::bind(config.listen, identity, config.endpoint.clone())?;
        Ok(Self { endpoint, config, instance: rand::random() })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn address(&self) -> Result<SocketAddr> {
        self.endpoint.local_addr().context("the node's own address")
    }

    /// The node's endpoint.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    /// Serves until shutdown: joins, computes, hands over, decodes.
    ///
    /// # Errors
    /// The cluster refuses the node, or a thread it cannot do without is gone.
    pub async fn serve(self, engine: Box<dyn Engine>, slab: Arc<KvSlab>, shutdown: Shutdown) -> Result<()> {
        let endpoint = self.endpoint.clone();
        let (hello, join) = (self.hello(), self.join()?);
        let clock = Clock(Instant::now());
        let (events_tx, events) = mpsc::channel(event::EVENTS_MAX);
        let gates = receiving::Gates::default();
        let streams = receiving::StreamContext { gates: gates.clone(), slab: Arc::clone(&slab), events: events_tx.clone() };
        let links = links::Links::new(streams);
        let (hello, hellos) = watch::channel(hello);
        let (replicas, told) = mpsc::channel(links::LISTS_MAX);
        let (first, context) = (self.config.coordinators.clone(), (links.clone(), events_tx.clone()));
        tokio::spawn(links::keep_uplinks(endpoint.clone(), first, told, hellos.clone(), context, shutdown.clone()));
        tokio::spawn(links::accept_links(endpoint.clone(), hellos, links.clone(), events_tx.clone()));
        let compute = Compute::start(engine, events_tx.clone(), &self.config).context("starting the engine's thread")?;
        let drive = drive::Drive {
            name: self.config.name,
            clock,
            node: node::Node::new(join, self.config.batch),
            events,
            links: HashMap::new(),
            compute,
            spans: sending::Spans::new(Arc::clone(&slab), events_tx.clone()),
            gates,
            slab,
            dialer: peers::Dialer { endpoint: endpoint.clone(), hello, links, events: events_tx },
            replicas,
            over: false,
        };
        let result = drive.run(shutdown).await;
        endpoint.close("the node has stopped").await;
        result
    }

    fn hello(&self) -> Hello {
        Hello {
            cluster: self.config.cluster.clone(),
            name: self.config.name.clone(),
            instance: self.instance,
            node: NodeId::default(),
            epoch: Epoch::default(),
            model: Some(self.config.model.clone()),
        }
    }

    fn join(&self) -> Result<Join> {
        Ok(Join {
            name: self.config.name.clone(),
            role: self.config.role,
            address: self.config.advertise.map_or_else(|| self.address(), Ok)?.to_string(),
            instance: self.instance,
            pid: std::process::id(),
            model: self.config.model.clone(),
            slots: self.config.batch.slots,
        })
    }
}
