//! What a replica does by itself, again and again: the leader renews the leases of nodes that it hears and makes sure that the default
//! tenant exists; every replica says where it can be reached.

use std::time::{Duration, Instant};

use millrace_core::cluster::{Answer, Command, Member, NODES_MAX, ReplicaInfo};
use millrace_core::identity::TenantKey;
use millrace_core::ids::{Epoch, NodeId};
use millrace_node::shutdown::Shutdown;
use tokio::time::MissedTickBehavior;
use tracing::{debug, info, warn};

use crate::deltas::must_join_again;
use crate::dispatch::DEFAULT_TENANT;
use crate::propose::{NoAnswer, Proposer};
use crate::raft::Role;

/// How often leases are renewed.
pub const RENEW_INTERVAL: Duration = Duration::from_secs(1);
/// How often a replica looks whether there is something to do.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// One replica's duties.
pub struct Duties {
    proposer: Proposer,
    /// What this replica is called.
    name: String,
    /// Where this replica can be reached.
    info: ReplicaInfo,
    /// The last renewal of this term of leadership.
    renewed: Option<Instant>,
}

impl Duties {
    /// Duties of the replica that proposes through `proposer`.
    #[must_use]
    pub fn new(proposer: Proposer, name: String, info: ReplicaInfo) -> Self {
        Self { proposer, name, info, renewed: None }
    }

    /// Does them until shutdown.
    pub async fn run(mut self, shutdown: Shutdown) {
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = look.tick() => {}
                _ = shutdown.wait() => return,
            }
            if let Err(error) = self.look(Instant::now()).await {
                debug!(%error, "a duty waits");
            }
        }
    }

    async fn look(&mut self, now: Instant) -> Result<(), NoAnswer> {
        let status = self.proposer.raft.status();
        if status.role == Role::Leader {
            self.put_tenant().await?;
            self.renew(now).await?;
        } else {
            self.renewed = None;
        }
        if status.leader.is_some() {
            self.enroll().await?;
            self.announce().await?;
        }
        Ok(())
    }

    async fn put_tenant(&self) -> Result<(), NoAnswer> {
        if self.proposer.cluster.read().tenant(DEFAULT_TENANT).is_some() {
            return Ok(());
        }
        let key = TenantKey(rand::random());
        let answer = self.proposer.propose(&Command::PutTenant { name: DEFAULT_TENANT.into(), key }).await?;
        match answer {
            Answer::Tenant(_) => info!(tenant = DEFAULT_TENANT, "tenant exists"),
            other => warn!(?other, "the default tenant cannot be made"),
        }
        Ok(())
    }

    async fn renew(&mut self, now: Instant) -> Result<(), NoAnswer> {
        let elapsed = self.renewed.map(|last| now.saturating_duration_since(last));
        if elapsed.is_some_and(|elapsed| elapsed < RENEW_INTERVAL) {
            return Ok(());
        }
        // The first renewal of a term adds no time: whoever was heard in the last interval is alive.
        let mut nodes = self.proposer.nodes.live(now, elapsed.unwrap_or(RENEW_INTERVAL));
        nodes.truncate(NODES_MAX);
        let elapsed_us = elapsed.unwrap_or_default().as_micros() as u64;
        self.renewed = Some(now);
        let answer = self.proposer.propose(&Command::Renew { elapsed_us, nodes: nodes.clone() }).await?;
        if let Answer::Renewed { expired, stale } = answer {
            self.tell_stale(&nodes, &stale);
            if !expired.is_empty() {
                warn!(nodes = ?expired, "leases ended");
            }
        }
        Ok(())
    }

    /// Nodes that are heard though the log has done with their incarnation must join again.
    fn tell_stale(&self, heard: &[(NodeId, Epoch)], stale: &[NodeId]) {
        for &(node, epoch) in heard.iter().filter(|(node, _)| stale.contains(node)) {
            if self.proposer.cluster.read().current(node, epoch).is_none() {
                self.proposer.nodes.send_to((node, epoch), must_join_again(epoch));
            }
        }
    }

    /// Says which log is this replica's, and where it listens.
    async fn enroll(&self) -> Result<(), NoAnswer> {
        let (me, status) = (self.proposer.me, self.proposer.raft.status());
        let member = Member { name: self.name.clone(), address: self.info.quic_address.clone(), log: Some(status.log) };
        if !status.members.contains(me.0) || self.proposer.cluster.read().member(me) == Some(&member) {
            return Ok(());
        }
        match self.proposer.propose(&Command::Enroll { replica: me, member }).await? {
            Answer::Done => info!("enrolled"),
            other => warn!(?other, "this replica cannot be enrolled"),
        }
        Ok(())
    }

    async fn announce(&self) -> Result<(), NoAnswer> {
        let me = self.proposer.me;
        if self.proposer.cluster.read().replicas().any(|(id, info)| id == me && *info == self.info) {
            return Ok(());
        }
        let command = Command::Announce { replica: me, info: self.info.clone() };
        match self.proposer.propose(&command).await? {
            Answer::Done => info!(http = self.info.http_address, "announced"),
            other => warn!(?other, "this replica cannot be announced"),
        }
        Ok(())
    }
}
