//! A replica of the coordinator, without its gateway: the real driver of the log with the real state machine over a disk that behaves badly,
//! and round it what `coordinator` does with tasks: links and loads of nodes, joins, reports folded into entries, commands passed to the
//! leader, leases. It is stepped in virtual time like a node: events go in, acts come out.

mod applied;
mod calls;
mod reports;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use millrace_core::cluster::{Cluster, Command, NodeState};
use millrace_core::ids::{Epoch, NodeId, ReplicaId, Time};
use millrace_core::message::{Hello, Join, Load, Message};
use millrace_log::testing::simdisk::SimDisk;
use millrace_log::{LogLimits, RaftConfig, RaftFailure, RaftStartError, RaftStatus, Role, Stepped, Stop};

pub use applied::Ledger;
use applied::{Applied, Shared};
pub use calls::{Asked, Outcome};
use calls::{Asker, Calls};
use reports::{Report, Reports, must_join_again};

#[cfg(millrace_planted)]
use millrace_core::planted::{Bug, planted};
#[cfg(millrace_planted)]
use millrace_log::Planted;

use crate::callers::{TENANTS, tenant_key};
use crate::event::{Act, LinkNo, ReplicaEvent};
use crate::invariants::check_report;

/// A node that was silent for so long gets nothing new, microseconds.
const FRESH_US: u64 = 1_000_000;
/// A node that was silent for so long is lost, microseconds.
const SILENT_MAX_US: u64 = 5_000_000;
/// Between two looks at what a replica does unasked, microseconds.
const LOOK_US: u64 = 250_000;
/// Between two renewals of leases, microseconds.
const RENEW_US: u64 = 1_000_000;

/// A node's link, and what was said on it.
#[derive(Debug)]
pub struct Linked {
    name: String,
    instance: u128,
    who: Option<(NodeId, Epoch)>,
    /// When it came up.
    since: Time,
    heard: Time,
    /// How busy the node is.
    pub load: Load,
}

/// What a replica's process is started with.
pub struct Setup {
    /// Which.
    pub id: ReplicaId,
    /// How many founded the cluster.
    pub replicas: u64,
    /// Outlives the process.
    pub disk: SimDisk,
    /// What [`Time`] 0 is.
    pub base: Instant,
    /// Decides election timeouts.
    pub seed: u64,
    /// When the log is compacted.
    pub entries_max: u64,
    /// What the log has said so far, on any replica.
    pub ledger: Ledger,
}

/// Opens the log, with the bug of its own that is planted, if one is.
fn opened(
    disk: Arc<SimDisk>,
    config: RaftConfig,
    machine: Applied,
    now: Instant,
    seed: u64,
) -> Result<Stepped<Applied>, RaftStartError> {
    #[allow(unused_mut, reason = "only a planted bug changes it")]
    let mut raft = Stepped::open(disk, config, machine, now, seed)?;
    #[cfg(millrace_planted)]
    raft.plant(match () {
        () if planted(Bug::StaleRead) => Planted::StaleRead,
        () if planted(Bug::EarlyAck) => Planted::EarlyAck,
        () => Planted::Nothing,
    });
    Ok(raft)
}

/// One process of a replica.
pub struct Replica {
    id: ReplicaId,
    base: Instant,
    raft: Stepped<Applied>,
    cluster: Shared,
    now: Time,
    nodes: BTreeMap<LinkNo, Linked>,
    /// Links to other replicas; the newest is written to.
    others: BTreeMap<ReplicaId, Vec<LinkNo>>,
    calls: Calls,
    reports: Reports,
    renewed: Option<Time>,
    next_look: Time,
    inbox: VecDeque<ReplicaEvent>,
    acts: Vec<Act>,
}

impl Replica {
    /// Opens the log; time begins at `now`.
    ///
    /// # Errors
    /// The disk has no room, or holds what it should not.
    pub fn start(setup: Setup, now: Time) -> Result<Self, RaftStartError> {
        let Setup { id, replicas, disk, base, seed, entries_max, ledger } = setup;
        let cluster = Shared::default();
        let machine = Applied::new(Arc::clone(&cluster), ledger);
        let founders = (1..=replicas).collect();
        let log = LogLimits { entries_max, entries_kept: 8, ..LogLimits::default() };
        let config = RaftConfig { log, reserve_bytes: 1 << 16, ..RaftConfig::new(id.0, founders, "/raft".into(), "sim") };
        let raft = opened(Arc::new(disk), config, machine, base + Duration::from_micros(now.0), seed)?;
        Ok(Self {
            id,
            base,
            raft,
            cluster,
            now,
            nodes: BTreeMap::new(),
            others: BTreeMap::new(),
            calls: Calls::default(),
            reports: Reports::default(),
            renewed: None,
            next_look: now,
            inbox: VecDeque::new(),
            acts: Vec::new(),
        })
    }

    /// The applied state.
    pub fn cluster(&self) -> MutexGuard<'_, Cluster> {
        applied::lock(&self.cluster)
    }

    /// How the log is.
    #[must_use]
    pub fn status(&self) -> RaftStatus {
        self.raft.handle().status()
    }

    /// Puts an event in the queue.
    pub fn push(&mut self, event: ReplicaEvent) {
        self.inbox.push_back(event);
    }

    /// Handles what has come, does what is due, lets the log get on. Gives what is to be done.
    ///
    /// # Panics
    /// When the log breaks down by itself: a defect.
    pub fn turn(&mut self, now: Time) -> Vec<Act> {
        self.now = now;
        while let Some(event) = self.inbox.pop_front() {
            self.on_event(event);
        }
        self.duties();
        self.send_reports();
        match self.raft.step(self.base + Duration::from_micros(now.0)) {
            Ok(()) => {}
            Err(Stop::Failed(RaftFailure::Disk(_))) => self.acts.push(Act::Exit),
            Err(stop) => panic!("replica {} broke: {stop:?}", self.id),
        }
        // A drain is seen at once, or most answers would be over before.
        if self.cluster().nodes().any(|node| node.state == NodeState::Draining) {
            self.acts.push(Act::Look);
        }
        while let Some((to, frame)) = self.raft.next_frame() {
            self.tell_replica(ReplicaId(to), Message::Raft(frame));
        }
        self.settle_calls();
        std::mem::take(&mut self.acts)
    }

    /// When the next turn is due, if nothing happens before.
    #[must_use]
    pub fn deadline(&self) -> Time {
        if !self.inbox.is_empty() || self.calls.fresh() {
            return self.now;
        }
        let tick = Time(self.raft.next_tick().saturating_duration_since(self.base).as_micros() as u64);
        [Some(tick), Some(self.next_look), self.calls.deadline(), self.reports.deadline()]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(tick)
    }

    /// Events that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.inbox.len()
    }

    /// What is still under way; `None` at rest.
    #[must_use]
    pub fn unrest(&self) -> Option<String> {
        let busy = !self.reports.is_idle() || !self.inbox.is_empty();
        busy.then(|| format!("replica {} has reports to put into the log", self.id))
    }

    // --- what is known of nodes ------------------------------------------------------------------------------------

    /// The link of an incarnation; the newest if there are several.
    #[must_use]
    pub fn link_of(&self, node: NodeId, epoch: Epoch) -> Option<(LinkNo, &Linked)> {
        let mine = self.nodes.iter().rev().find(|(_, linked)| linked.who == Some((node, epoch)));
        mine.map(|(link, linked)| (*link, linked))
    }

    /// Whether new requests may go to an incarnation.
    #[must_use]
    pub fn usable(&self, now: Time, node: NodeId, epoch: Epoch) -> bool {
        let up = self.cluster().current(node, epoch).is_some_and(|n| n.state.usable());
        up && self.link_of(node, epoch).is_some_and(|(_, linked)| now.since(linked.heard) <= FRESH_US)
    }

    /// Whether an attempt on an incarnation that was placed then is lost.
    #[must_use]
    pub fn lost(&self, now: Time, (node, epoch): (NodeId, Epoch), placed: Time) -> bool {
        // A node whose link ended has cancelled what came over it, or never got it.
        let lost = |linked: &Linked| now.since(linked.heard) > SILENT_MAX_US || linked.since > placed;
        let silent = self.link_of(node, epoch).is_none_or(|(_, linked)| lost(linked));
        silent || self.cluster().current(node, epoch).is_none()
    }

    // --- events ----------------------------------------------------------------------------------------------------

    fn on_event(&mut self, event: ReplicaEvent) {
        match event {
            ReplicaEvent::ReplicaUp(id, link) => self.others.entry(id).or_default().push(link),
            ReplicaEvent::NodeUp(link, hello) => self.node_up(link, &hello),
            ReplicaEvent::Down(link) => self.down(link),
            ReplicaEvent::Message(link, message) => match self.replica_on(link) {
                Some(id) => self.on_replica(id, link, *message),
                None => self.on_node(link, *message),
            },
            ReplicaEvent::Operator(no, asked) => self.operate(no, asked),
            ReplicaEvent::SetState(node, state) => self.propose(Command::SetState { node, state }, Asker::Nobody),
        }
    }

    fn node_up(&mut self, link: LinkNo, hello: &Hello) {
        let who = (hello.epoch != Epoch(0)).then_some((hello.node, hello.epoch));
        // A later link of the same process replaces its former one.
        self.nodes.retain(|_, linked| linked.instance != hello.instance);
        let (name, instance, load) = (hello.name.clone(), hello.instance, Load::default());
        let linked = Linked { name, instance, who, since: self.now, heard: self.now, load };
        self.nodes.insert(link, linked);
    }

    fn down(&mut self, link: LinkNo) {
        self.others.values_mut().for_each(|links| links.retain(|other| *other != link));
        self.calls.lose(link);
        if self.nodes.remove(&link).is_some() {
            self.acts.push(Act::Look);
        }
    }

    fn replica_on(&self, link: LinkNo) -> Option<ReplicaId> {
        self.others.iter().find(|(_, links)| links.contains(&link)).map(|(id, _)| *id)
    }

    fn tell_replica(&mut self, to: ReplicaId, message: Message) -> bool {
        let link = self.others.get(&to).and_then(|links| links.last()).copied();
        self.acts.extend(link.map(|link| Act::Send(link, message)));
        link.is_some()
    }

    fn on_replica(&mut self, from: ReplicaId, link: LinkNo, message: Message) {
        match message {
            Message::Raft(frame) => self.raft.handle().step(from.0, &frame),
            Message::Forward { id, command } => self.forwarded(link, id, command),
            Message::Forwarded { id, result } => self.calls.answered(link, id, result),
            other => panic!("a replica got {other:?} from another"),
        }
    }

    fn on_node(&mut self, link: LinkNo, message: Message) {
        let Some(linked) = self.nodes.get_mut(&link) else { return };
        linked.heard = self.now;
        let who = linked.who;
        match message {
            Message::Heartbeat { node, epoch, load } => (linked.who, linked.load) = (Some((node, epoch)), load),
            Message::Join(join) => self.on_join(link, join),
            Message::Delta(delta) => self.reports.push(self.now, link, Report::Delta(delta)),
            Message::CacheDigest(digest) => self.reports.push(self.now, link, Report::Digest(digest)),
            Message::Snapshot(page) => self.reports.push(self.now, link, Report::Page(page)),
            Message::Leave { node, epoch } => self.propose(Command::Leave { node, epoch }, Asker::Nobody),
            Message::Drain { node, epoch } => {
                if self.cluster().current(node, epoch).is_some() {
                    self.propose(Command::SetState { node, state: NodeState::Draining }, Asker::Nobody);
                }
            }
            Message::Token(_) | Message::Failed(_) | Message::Handover(_) => {
                self.acts.extend(who.map(|(node, _)| Act::Gateway(node, message)));
            }
            Message::CacheReport(report) => check_report(&report),
            other => panic!("a replica got {other:?} from a node"),
        }
    }

    fn on_join(&mut self, link: LinkNo, join: Join) {
        match self.name_is_held(&join) {
            Some(reason) => self.acts.push(Act::Send(link, Message::JoinRefused { reason, retry: true })),
            None => self.propose(Command::Join(join), Asker::Join(link)),
        }
    }

    /// Whether another live process has the name: then the log is not asked, because it would take the name from that one.
    fn name_is_held(&self, join: &Join) -> Option<String> {
        let fresh = |l: &&Linked| l.name == join.name && l.instance != join.instance && self.now.since(l.heard) <= FRESH_US;
        self.nodes.values().find(fresh).map(|_| "the name is held by a live process".to_owned())
    }

    // --- what a replica does unasked -------------------------------------------------------------------------------

    fn duties(&mut self) {
        if self.now < self.next_look {
            return;
        }
        self.next_look = self.now.after(LOOK_US);
        self.acts.push(Act::Look);
        if self.status().role != Role::Leader {
            self.renewed = None;
            return;
        }
        for (number, name) in TENANTS.into_iter().enumerate() {
            if self.cluster().tenant(name).is_none() {
                self.propose(Command::PutTenant { name: name.into(), key: tenant_key(number) }, Asker::Nobody);
            }
        }
        self.renew();
    }

    /// Renews the leases of nodes that were heard lately. The first renewal of a term adds no time.
    fn renew(&mut self) {
        let elapsed_us = self.renewed.map(|then| self.now.since(then));
        if elapsed_us.is_some_and(|elapsed| elapsed < RENEW_US) {
            return;
        }
        let window_us = elapsed_us.unwrap_or(RENEW_US);
        let fresh = self.nodes.values().filter(|l| self.now.since(l.heard) <= window_us);
        let nodes: Vec<_> = fresh.filter_map(|l| l.who).collect();
        self.renewed = Some(self.now);
        let asker = Asker::Renew(nodes.clone());
        self.propose(Command::Renew { elapsed_us: elapsed_us.unwrap_or(0), nodes }, asker);
    }

    /// Nodes that are heard though the log has done with their incarnation must join again.
    fn tell_stale(&mut self, heard: &[(NodeId, Epoch)], stale: &[NodeId]) {
        for &(node, epoch) in heard.iter().filter(|(node, _)| stale.contains(node)) {
            let gone = self.cluster().current(node, epoch).is_none();
            let link = self.link_of(node, epoch).map(|(link, _)| link);
            self.acts.extend(link.filter(|_| gone).map(|link| Act::Send(link, must_join_again(epoch))));
        }
    }
}
