//! What a replica does by itself, again and again: the leader renews the leases of nodes that it hears and makes sure that the default
//! tenant exists; every replica says where it can be reached and what its state comes to, and stops when a majority says otherwise.

use std::time::{Duration, Instant};

use millrace_core::cluster::{Answer, Command, Member, NODES_MAX, ReplicaInfo};
use millrace_core::identity::TenantKey;
use millrace_core::ids::{Epoch, NodeId};
use millrace_node::shutdown::Shutdown;
use tokio::time::MissedTickBehavior;
use tracing::{debug, error, info, warn};

use crate::deltas::must_join_again;
use crate::dispatch::DEFAULT_TENANT;
use crate::propose::{NoAnswer, Proposer};
use millrace_log::Role;

/// How often leases are renewed.
pub const RENEW_INTERVAL: Duration = Duration::from_secs(1);
/// Time that a new leader gives members to be heard: log time stands still meanwhile, so that nobody's lease ends because its link to
/// this replica is not up yet. Longer than a node takes to dial a replica that was restarted.
pub const HEARING_WAIT_MAX: Duration = Duration::from_secs(8);
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
    /// Since when it leads, while members may still have to be heard.
    hearing_since: Option<Instant>,
    /// The entry of the last checksum that was told.
    told: u64,
}

impl Duties {
    /// Duties of the replica that proposes through `proposer`.
    #[must_use]
    pub fn new(proposer: Proposer, name: String, info: ReplicaInfo) -> Self {
        Self { proposer, name, info, renewed: None, hearing_since: None, told: 0 }
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
        self.stop_if_differing();
        if status.leader.is_some() {
            self.enroll().await?;
            self.announce().await?;
            self.tell_checksum().await?;
        }
        Ok(())
    }

    /// A state that is not the majority's is a defect of this replica's memory, disk or program. It must not serve, vote or be copied.
    fn stop_if_differing(&self) {
        if let Some(entry) = self.proposer.cluster.read().audit().differs_at() {
            error!(entry, "the state of this replica is not that of the majority: it stops");
            self.proposer.raft.shutdown();
        }
    }

    /// After each renewal all replicas say what their state came to after it.
    async fn tell_checksum(&mut self) -> Result<(), NoAnswer> {
        let (newest, replicas) = {
            let cluster = self.proposer.cluster.read();
            (cluster.audit().newest(), cluster.replicas().count())
        };
        let Some(checksum) = newest.filter(|newest| newest.index > self.told && replicas > 1) else { return Ok(()) };
        self.told = checksum.index;
        self.proposer.propose(&Command::Checksum { replica: self.proposer.me, checksum }).await.map(drop)
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
        if elapsed.is_none() {
            self.hearing_since = Some(now);
        }
        let still = self.hears_not_all_yet(now);
        let elapsed_us = if still { 0 } else { elapsed.unwrap_or_default().as_micros() as u64 };
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

    /// Whether log time must stand still: this replica leads so lately that members without a word from them may be well.
    fn hears_not_all_yet(&mut self, now: Instant) -> bool {
        let Some(since) = self.hearing_since else { return false };
        let cluster = self.proposer.cluster.read();
        let mut members = cluster.nodes().filter(|node| node.state.alive());
        let unheard = members
            .any(|node| self.proposer.nodes.seen(now, &node.name, node.epoch).is_none_or(|seen| seen.silent > RENEW_INTERVAL));
        let still = unheard && now.saturating_duration_since(since) < HEARING_WAIT_MAX;
        if !still {
            self.hearing_since = None;
        }
        still
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
