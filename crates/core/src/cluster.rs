//! The cluster as the log describes it: who its nodes are, which incarnation of each may speak, until when, and what they hold.
//!
//! [`Cluster::apply`] is the only mutator and is deterministic: replicas that applied the same entries are equal to the byte
//! ([`Cluster::snapshot`]). Time is *log time*: it moves only as [`Command::Renew`] entries say, so no replica's clock decides.
//! Not decided here: whether a join under the name of a live process is proposed at all, and how busy nodes are (heartbeats stay
//! out of the log).

mod apply;
mod audit;
mod codec;
mod command;
mod members;
mod policy;
mod refound;

pub use audit::{Audit, Checksum};
pub use codec::{COMMAND_BYTES_MAX, CodecError, DELTAS_OPS_MAX, decode, decode_answer, encode, encode_answer};
pub use command::{Answer, Command, DeltaVerdict, DigestVerdict, Node, NodeState, ReplicaInfo, SnapshotVerdict};
pub use members::{Estranged, Member, MemberChange, REPLICA_NUMBERS_MAX};
pub use policy::{
    API_KEYS_MAX, ApiKeyDigest, Change, Config, Kind, Limits, PIN_BLOCKS_MAX, PINNED_BLOCKS_MAX, PINS_MAX, Pin, Policy,
    PolicyAnswer, PolicyCommand, PolicyError, SETTINGS, Setting, Spec, Tenant, ValueError,
};

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::vec::Vec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::holders::Holders;
use crate::identity::TenantKey;
use crate::ids::{BlockHash, Epoch, NodeId, ReplicaId};
use crate::message::{ModelIdentity, Peer};
use crate::planted::{Bug, planted};

/// Log time that a node may live without a renewal, microseconds.
pub const LEASE_US: u64 = 6_000_000;
/// Log time that one renewal entry may add, microseconds: a leader that was stopped for a minute must hear the nodes again
/// before it can expire them.
pub const RENEW_STEP_MAX_US: u64 = LEASE_US / 3;
/// Names that may ever join; a further one is refused.
pub const NODES_MAX: usize = 1024;
/// Tenants; a further one is refused.
pub const TENANTS_MAX: usize = 1 << 16;
/// Replicas that announced themselves; a further one is refused.
pub const REPLICAS_MAX: usize = 64;
/// Blocks in all snapshots of nodes that are being assembled, 16 bytes each; what does not fit must be sent again later.
pub const ASSEMBLED_BLOCKS_MAX: usize = 1 << 23;
/// Bytes of a name or an address; a longer one is refused.
pub const NAME_BYTES_MAX: usize = 256;

/// Pages of a node's snapshot that have come so far.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
struct Assembly {
    node: NodeId,
    seq: u64,
    pages: u32,
    next_page: u32,
    blocks: Vec<BlockHash>,
}

/// The replicated state.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    applied: u64,
    now_us: u64,
    last_epoch: Epoch,
    model: Option<ModelIdentity>,
    nodes: BTreeMap<NodeId, Node>,
    names: BTreeMap<String, NodeId>,
    policy: Policy,
    replicas: BTreeMap<ReplicaId, ReplicaInfo>,
    members: BTreeMap<ReplicaId, Member>,
    removed: BTreeSet<ReplicaId>,
    assemblies: BTreeMap<NodeId, Assembly>,
    holders: Holders,
    audit: Audit,
}

impl Cluster {
    /// The state before the first entry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Log index of the last applied entry; 0 before the first.
    #[must_use]
    pub const fn applied(&self) -> u64 {
        self.applied
    }

    /// Log time, microseconds.
    #[must_use]
    pub const fn now_us(&self) -> u64 {
        self.now_us
    }

    /// What the cluster serves; `None` before the first join.
    #[must_use]
    pub const fn model(&self) -> Option<&ModelIdentity> {
        self.model.as_ref()
    }

    /// All nodes that ever joined, by number.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// A node by its number.
    #[must_use]
    pub fn node(&self, node: NodeId) -> Option<&Node> {
        self.nodes.get(&node)
    }

    /// A node by its name.
    #[must_use]
    pub fn node_named(&self, name: &str) -> Option<&Node> {
        self.names.get(name).and_then(|node| self.nodes.get(node))
    }

    /// A node if `epoch` is its current incarnation and it is alive: whether a message that names both is to be heard.
    #[must_use]
    pub fn current(&self, node: NodeId, epoch: Epoch) -> Option<&Node> {
        self.nodes.get(&node).filter(|n| (n.epoch == epoch || planted(Bug::EpochIgnored)) && n.state.alive())
    }

    /// A live node as a ticket names it.
    #[must_use]
    pub fn peer(&self, node: NodeId) -> Option<Peer> {
        let node = self.nodes.get(&node).filter(|n| n.state.alive())?;
        Some(Peer { node: node.node, epoch: node.epoch, name: node.name.clone(), address: node.address.clone() })
    }

    /// A tenant's key.
    #[must_use]
    pub fn tenant(&self, name: &str) -> Option<&TenantKey> {
        self.policy.tenant(name).map(|tenant| &tenant.key)
    }

    /// What operators decided: settings, tenants, pins.
    #[must_use]
    pub const fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The settings.
    #[must_use]
    pub const fn config(&self) -> &Config {
        self.policy.config()
    }

    /// Slots of the smallest live node's pool.
    fn smallest_pool(&self) -> Option<u32> {
        self.nodes.values().filter(|n| n.state.alive()).map(|n| n.slots).min()
    }

    /// The replicas that announced themselves, by number.
    pub fn replicas(&self) -> impl Iterator<Item = (ReplicaId, &ReplicaInfo)> {
        self.replicas.iter().map(|(id, info)| (*id, info))
    }

    /// Which node holds which block.
    #[must_use]
    pub const fn holders(&self) -> &Holders {
        &self.holders
    }

    /// Stops the process when an invariant does not hold. O(locations).
    ///
    /// # Panics
    /// When an invariant does not hold: a defect of this module.
    pub fn check(&self) {
        if let Err(broken) = self.validate() {
            panic!("cluster state is broken: {broken}");
        }
    }

    fn validate(&self) -> Result<(), &'static str> {
        self.validate_members()?;
        self.holders.validate()
    }

    /// All but the tables of the index.
    fn validate_members(&self) -> Result<(), &'static str> {
        let sizes = [(self.nodes.len(), NODES_MAX, "too many nodes"), (self.replicas.len(), REPLICAS_MAX, "too many replicas")];
        if let Some((.., what)) = sizes.iter().find(|(len, max, _)| len > max) {
            return Err(what);
        }
        self.validate_replicas()?;
        let named = |(name, id): (&String, &NodeId)| self.nodes.get(id).is_some_and(|n| n.name == *name && n.node == *id);
        if self.names.len() != self.nodes.len() || !self.names.iter().all(named) {
            return Err("names and nodes do not match");
        }
        if self.nodes.keys().ne((1..=self.nodes.len() as u16).map(NodeId).collect::<Vec<_>>().iter()) {
            return Err("node numbers are not 1, 2, 3 and so on");
        }
        let mut epochs: Vec<_> = self.nodes.values().map(|n| n.epoch).collect();
        epochs.sort_unstable();
        let fenced = epochs.iter().all(|e| (1..=self.last_epoch.0).contains(&e.0));
        // each entry grants at most one epoch, so the counter cannot overflow before the log's index does
        if !fenced || self.last_epoch.0 > self.applied || epochs.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err("epochs are not unique and below the counter");
        }
        self.nodes.values().try_for_each(|node| self.validate_node(node))?;
        let alive = self.nodes.values().filter(|n| n.state.alive()).map(|n| n.node);
        if !self.holders.nodes().eq(alive) {
            return Err("the index knows other nodes than those alive");
        }
        if self.assemblies.values().map(|a| a.blocks.len()).sum::<usize>() > ASSEMBLED_BLOCKS_MAX {
            return Err("too many blocks are being assembled");
        }
        self.assemblies.iter().try_for_each(|(id, assembly)| self.validate_assembly(*id, assembly))?;
        self.policy.validate()
    }

    fn validate_node(&self, node: &Node) -> Result<(), &'static str> {
        if !node.state.alive() {
            return Ok(());
        }
        if node.lease_until_us <= self.now_us || node.lease_until_us > self.now_us.saturating_add(LEASE_US) {
            return Err("a live node's lease is over, or too long");
        }
        if self.model.as_ref().is_none_or(|model| model.differs(&node.model).is_some()) {
            return Err("a live node serves another model");
        }
        Ok(())
    }

    fn validate_assembly(&self, id: NodeId, assembly: &Assembly) -> Result<(), &'static str> {
        let alive = self.nodes.get(&id).is_some_and(|n| n.state.alive());
        if !alive || assembly.node != id || !(1..assembly.pages).contains(&assembly.next_page) {
            return Err("a snapshot is being assembled that cannot be");
        }
        Ok(())
    }
}
