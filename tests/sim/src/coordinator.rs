//! The coordinator's side of nodes: one ordered log applied to a real `Cluster`, links and loads of nodes, leases, reports folded
//! into entries. The log is a queue that loses nothing; who leads and how it is replicated is not modelled.

use std::collections::{BTreeMap, VecDeque};

use millrace_core::cluster::{Answer, Cluster, Command, DeltaVerdict, DigestVerdict, NodeState, SnapshotVerdict, decode, encode};
use millrace_core::ids::{Epoch, NodeId, Time};
use millrace_core::message::{Delta, Join, Load, Message};

use crate::callers::{TENANTS, tenant_key};
use crate::event::{Host, LinkNo};
use crate::invariants::{applied, follows};

/// A node that was silent for so long gets nothing new, microseconds.
const FRESH_US: u64 = 1_000_000;
/// A node that was silent for so long is lost, microseconds.
const SILENT_MAX_US: u64 = 5_000_000;

/// A node's link, and what was said on it.
#[derive(Debug)]
pub struct Linked {
    /// The link.
    pub link: LinkNo,
    /// Which host is at its end.
    pub host: Host,
    instance: u128,
    heard: Time,
    /// How busy the node is.
    pub load: Load,
}

/// An entry of the log and who waits for its answer.
#[derive(Debug)]
pub struct Proposal {
    command: Command,
    waiting: Vec<(LinkNo, Epoch)>,
}

/// The coordinator, without its gateway.
pub struct Coordinator {
    /// The replicated state.
    pub cluster: Cluster,
    index: u64,
    log: VecDeque<Proposal>,
    deltas: Vec<(LinkNo, Delta)>,
    /// By node name.
    links: BTreeMap<String, Linked>,
    who: BTreeMap<LinkNo, (NodeId, Epoch)>,
    renewed: Option<Time>,
    /// Reports that did not build on what the index had.
    pub gaps: u64,
}

impl Coordinator {
    /// A cluster without nodes.
    #[must_use]
    pub fn new() -> Self {
        let put = |(tenant, name): (usize, &&str)| Command::PutTenant { name: (*name).into(), key: tenant_key(tenant) };
        let puts = TENANTS.iter().enumerate().map(put).map(|command| Proposal { command, waiting: Vec::new() });
        Self {
            cluster: Cluster::new(),
            index: 0,
            log: puts.collect(),
            deltas: Vec::new(),
            links: BTreeMap::new(),
            who: BTreeMap::new(),
            renewed: None,
            gaps: 0,
        }
    }

    /// A node's link is up; `who` it says it is, when it has joined before.
    pub fn up(&mut self, now: Time, (host, name): (Host, String), link: LinkNo, instance: u128, who: Option<(NodeId, Epoch)>) {
        self.links.insert(name, Linked { link, host, instance, heard: now, load: Load::default() });
        self.who.extend(who.map(|who| (link, who)));
    }

    /// A node's link is gone.
    pub fn down(&mut self, link: LinkNo) {
        self.links.retain(|_, linked| linked.link != link);
        self.who.remove(&link);
    }

    /// The link of a live incarnation.
    #[must_use]
    pub fn link_of(&self, node: NodeId, epoch: Epoch) -> Option<&Linked> {
        let name = &self.cluster.current(node, epoch)?.name;
        self.links.get(name).filter(|linked| self.who.get(&linked.link) == Some(&(node, epoch)))
    }

    /// Whether new requests may go to an incarnation.
    #[must_use]
    pub fn usable(&self, now: Time, node: NodeId, epoch: Epoch) -> bool {
        let up = self.cluster.current(node, epoch).is_some_and(|n| n.state.usable());
        up && self.link_of(node, epoch).is_some_and(|linked| now.since(linked.heard) <= FRESH_US)
    }

    /// Whether attempts on an incarnation are lost.
    #[must_use]
    pub fn lost(&self, now: Time, node: NodeId, epoch: Epoch) -> bool {
        self.link_of(node, epoch).is_none_or(|linked| now.since(linked.heard) > SILENT_MAX_US)
    }

    /// Who speaks on a link.
    #[must_use]
    pub fn speaker(&self, link: LinkNo) -> Option<NodeId> {
        self.who.get(&link).map(|(node, _)| *node)
    }

    /// A node's message that is not the gateway's; an answer when there is one at once. True when reports are to be folded soon.
    pub fn on_message(&mut self, now: Time, link: LinkNo, message: Message) -> (Option<Message>, bool) {
        let Some(linked) = self.links.values_mut().find(|linked| linked.link == link) else { return (None, false) };
        linked.heard = now;
        match message {
            Message::Heartbeat { node, epoch, load } => {
                linked.load = load;
                self.who.insert(link, (node, epoch));
            }
            Message::Join(join) => return (self.on_join(now, link, join), false),
            Message::Delta(delta) => {
                self.deltas.push((link, delta));
                return (None, self.deltas.len() == 1);
            }
            Message::CacheDigest(digest) => {
                let waiting = vec![(link, digest.epoch)];
                self.fold();
                self.log.push_back(Proposal { command: Command::Digests(vec![digest]), waiting });
            }
            Message::Snapshot(page) => {
                let waiting = vec![(link, page.epoch)];
                self.fold();
                self.log.push_back(Proposal { command: Command::Snapshot(page), waiting });
            }
            Message::Leave { node, epoch } => self.propose(Command::Leave { node, epoch }),
            other => panic!("the coordinator got {other:?}"),
        }
        (None, false)
    }

    fn on_join(&mut self, now: Time, link: LinkNo, join: Join) -> Option<Message> {
        let held = self.cluster.node_named(&join.name).filter(|n| n.state.alive() && n.instance != join.instance);
        let alive = |l: &&Linked| l.instance != join.instance && now.since(l.heard) <= FRESH_US;
        if held.is_some() && self.links.get(&join.name).filter(alive).is_some() {
            return Some(Message::JoinRefused { reason: "the name is held".into(), retry: true });
        }
        self.log.push_back(Proposal { command: Command::Join(join), waiting: vec![(link, Epoch(0))] });
        None
    }

    fn propose(&mut self, command: Command) {
        self.log.push_back(Proposal { command, waiting: Vec::new() });
    }

    /// An operator wants a node in this state.
    pub fn set_state(&mut self, node: NodeId, state: NodeState) {
        self.propose(Command::SetState { node, state });
    }

    /// Turns all reports of changes into one entry.
    pub fn fold(&mut self) {
        if self.deltas.is_empty() {
            return;
        }
        let (links, deltas): (Vec<_>, Vec<_>) = std::mem::take(&mut self.deltas).into_iter().unzip();
        let waiting = links.into_iter().zip(deltas.iter().map(|delta| delta.epoch)).collect();
        self.log.push_back(Proposal { command: Command::Deltas(deltas), waiting });
    }

    /// Renews the leases of nodes that were heard lately.
    pub fn renew(&mut self, now: Time) {
        let fresh = self.links.values().filter(|l| now.since(l.heard) <= FRESH_US);
        let nodes: Vec<_> = fresh.filter_map(|l| self.who.get(&l.link).copied()).collect();
        let elapsed_us = self.renewed.replace(now).map_or(0, |then| now.since(then));
        self.propose(Command::Renew { elapsed_us, nodes });
    }

    /// Whether an entry waits to be committed.
    #[must_use]
    pub fn has_proposals(&self) -> bool {
        !self.log.is_empty()
    }

    /// Applies the next entry, as every replica would: from its bytes. Gives the answers for the links that wait.
    pub fn commit(&mut self) -> Vec<(LinkNo, Message)> {
        let Some(Proposal { command, waiting }) = self.log.pop_front() else { return Vec::new() };
        let command = decode(&encode(&command)).expect("what was encoded can be decoded");
        self.index += 1;
        let before = applied(&self.cluster);
        let answer = self.cluster.apply(self.index, &command);
        self.cluster.check();
        self.gaps += follows(&before, &self.cluster, &command, &answer);
        self.replies(answer, &waiting)
    }

    /// A replica that starts from a snapshot must have the same state to the byte.
    pub fn restart(&mut self) {
        let bytes = self.cluster.snapshot();
        self.cluster = Cluster::restore(&bytes).expect("a snapshot can be restored");
        assert_eq!(self.cluster.snapshot(), bytes, "I6: a restored state differs");
    }

    fn replies(&mut self, answer: Answer, waiting: &[(LinkNo, Epoch)]) -> Vec<(LinkNo, Message)> {
        match answer {
            Answer::Joined { node, epoch } => {
                let link = waiting[0].0;
                self.who.insert(link, (node, epoch));
                vec![(link, Message::Joined { node, epoch })]
            }
            Answer::Deltas(verdicts) => {
                let reply = |((_, verdict), &(link, epoch)): (&(NodeId, DeltaVerdict), &(LinkNo, Epoch))| {
                    (link, delta_reply(epoch, *verdict))
                };
                verdicts.iter().zip(waiting).map(reply).collect()
            }
            Answer::Snapshot(verdict) => {
                waiting.iter().filter_map(|(link, epoch)| page_reply(*epoch, verdict).map(|m| (*link, m))).collect()
            }
            Answer::Digests(verdicts) => {
                let reply =
                    |(verdict, &(link, epoch)): (&DigestVerdict, &(LinkNo, Epoch))| Some((link, digest_reply(epoch, *verdict)?));
                verdicts.iter().zip(waiting).filter_map(reply).collect()
            }
            Answer::Renewed { stale, .. } => {
                let stale = |who: &&(NodeId, Epoch)| stale.contains(&who.0) && self.cluster.current(who.0, who.1).is_none();
                let links = self.who.iter().filter(|(_, who)| stale(who));
                links.map(|(link, (_, epoch))| (*link, must_join_again(*epoch))).collect()
            }
            Answer::Refused(reason) if !waiting.is_empty() => panic!("an entry is refused: {reason}"),
            Answer::Refused(_) | Answer::Done | Answer::Tenant(_) | Answer::Policy(_) => Vec::new(),
        }
    }
}

impl Default for Coordinator {
    fn default() -> Self {
        Self::new()
    }
}

fn delta_reply(epoch: Epoch, verdict: DeltaVerdict) -> Message {
    match verdict {
        DeltaVerdict::Applied { seq } | DeltaVerdict::AlreadyApplied { seq } => Message::DeltaApplied { epoch, seq },
        DeltaVerdict::Gap { .. } => Message::WantSnapshot { epoch },
        DeltaVerdict::StaleEpoch => must_join_again(epoch),
    }
}

fn digest_reply(epoch: Epoch, verdict: DigestVerdict) -> Option<Message> {
    match verdict {
        DigestVerdict::Drifted | DigestVerdict::Lacking => Some(Message::WantSnapshot { epoch }),
        DigestVerdict::StaleEpoch => Some(must_join_again(epoch)),
        DigestVerdict::Same | DigestVerdict::Skipped => None,
    }
}

fn page_reply(epoch: Epoch, verdict: SnapshotVerdict) -> Option<Message> {
    match verdict {
        SnapshotVerdict::Wanted { .. } => None,
        SnapshotVerdict::Applied { seq } => Some(Message::DeltaApplied { epoch, seq }),
        SnapshotVerdict::Restart => Some(Message::WantSnapshot { epoch }),
        SnapshotVerdict::StaleEpoch => Some(must_join_again(epoch)),
    }
}

fn must_join_again(epoch: Epoch) -> Message {
    Message::JoinRefused { reason: format!("epoch {epoch} is not current: join again"), retry: true }
}
