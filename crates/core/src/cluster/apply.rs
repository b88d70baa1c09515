//! The state machine's transitions: one function for each command. Every rule of membership, leases and block locations is here.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::{
    ASSEMBLED_BLOCKS_MAX, Answer, Assembly, Cluster, Command, DeltaVerdict, DigestVerdict, LEASE_US, NAME_BYTES_MAX, NODES_MAX,
    Node, NodeState, RENEW_STEP_MAX_US, REPLICAS_MAX, ReplicaInfo, SnapshotVerdict,
};
use crate::ids::{Epoch, NodeId, ReplicaId};
use crate::message::{CacheDigest, Delta, Join, Role, SnapshotPage};
use crate::planted::{Bug, planted};

impl Cluster {
    /// Applies the entry at `index` of the log. One command an entry, indexes strictly growing (gaps are fine: the consensus
    /// layer has entries of its own). An index that was applied before changes nothing, so a log may be replayed over a snapshot.
    pub fn apply(&mut self, index: u64, command: &Command) -> Answer {
        if index <= self.applied {
            return Answer::Refused(format!("entry {index} is applied already"));
        }
        self.applied = index;
        self.holders.sweep();
        match command {
            Command::Join(join) => self.join(join),
            Command::Leave { node, epoch } => self.end(*node, *epoch, NodeState::Left),
            Command::MarkDead { node, epoch } => self.end(*node, *epoch, NodeState::Dead),
            Command::Renew { elapsed_us, nodes } => self.renew(*elapsed_us, nodes),
            Command::SetState { node, state } => self.set_state(*node, *state),
            Command::Deltas(deltas) => Answer::Deltas(deltas.iter().map(|d| (d.node, self.delta(d))).collect()),
            Command::Snapshot(page) => Answer::Snapshot(self.page(page)),
            Command::PutTenant { name, key } => self.policy.put_tenant(name, key),
            Command::Announce { replica, info } => self.announce(*replica, info),
            Command::Policy(command) => self.policy.apply(self.now_us, self.smallest_pool(), command),
            Command::Digests(digests) => Answer::Digests(digests.iter().map(|digest| self.compare(digest)).collect()),
            Command::Checksum { replica, checksum } => {
                self.audit.hear(*replica, *checksum, self.replicas.len());
                Answer::Done
            }
            Command::Members(change) => self.change_members(change),
            Command::Enroll { replica, member } => self.enroll(*replica, member),
        }
    }

    fn join(&mut self, join: &Join) -> Answer {
        if let Err(reason) = self.may_join(join) {
            return Answer::Refused(reason);
        }
        let lease_until_us = self.now_us.saturating_add(LEASE_US);
        let known = self.names.get(&join.name).and_then(|id| self.nodes.get_mut(id));
        let (id, cordoned) = match known {
            Some(node) if node.state.alive() && (node.instance == join.instance || planted(Bug::RestartKeepsEpoch)) => {
                node.lease_until_us = lease_until_us;
                return Answer::Joined { node: node.node, epoch: node.epoch };
            }
            Some(node) => (node.node, node.cordoned),
            None => (NodeId(self.nodes.len() as u16 + 1), false), // 0 means "not joined"; NODES_MAX fits
        };
        self.last_epoch.0 += 1;
        let node = Node {
            node: id,
            name: join.name.clone(),
            role: join.role,
            address: join.address.clone(),
            instance: join.instance,
            pid: join.pid,
            model: join.model.clone(),
            slots: join.slots,
            epoch: self.last_epoch,
            state: if cordoned { NodeState::Cordoned } else { NodeState::Up },
            cordoned,
            lease_until_us,
        };
        if !self.nodes.values().any(|n| n.node != id && n.state.alive()) {
            self.model = Some(join.model.clone());
        }
        self.names.insert(node.name.clone(), id);
        self.nodes.insert(id, node);
        self.assemblies.remove(&id);
        self.holders.begin(id);
        Answer::Joined { node: id, epoch: self.last_epoch }
    }

    /// The cluster serves one model for as long as any node of it is alive: that of the first to join.
    fn may_join(&self, join: &Join) -> Result<(), String> {
        text("name", &join.name)?;
        text("address", &join.address)?;
        text("model name", &join.model.name)?;
        if !matches!(join.role, Role::Prefill | Role::Decode) {
            return Err(format!("a {} does not join as a node", join.role.as_str()));
        }
        match self.node_named(&join.name) {
            Some(known) if known.role != join.role => {
                return Err(format!("the name {:?} belongs to a {} node", join.name, known.role.as_str()));
            }
            None if self.nodes.len() >= NODES_MAX => return Err(format!("the cluster knows {NODES_MAX} nodes already")),
            _ => {}
        }
        let others = self.nodes.values().any(|n| n.state.alive() && n.name != join.name);
        match self.model.as_ref().filter(|_| others) {
            Some(model) => model.differs(&join.model).map_or(Ok(()), |field| {
                Err(format!("the cluster serves {:?}, and {field} of this node's {:?} differs", model.name, join.model.name))
            }),
            None => Ok(()),
        }
    }

    fn end(&mut self, node: NodeId, epoch: Epoch, state: NodeState) -> Answer {
        match self.nodes.get(&node) {
            None => return unknown(node),
            Some(n) if n.epoch != epoch => {
                return Answer::Refused(format!("epoch {epoch} of node {node} is not current, {} is", n.epoch));
            }
            Some(n) if !n.state.alive() => {} // over already: the first reason stands
            Some(_) => self.bury(node, state),
        }
        Answer::Done
    }

    pub(super) fn bury(&mut self, id: NodeId, state: NodeState) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.state = state;
        }
        self.assemblies.remove(&id);
        self.holders.drop_node(id);
    }

    fn renew(&mut self, elapsed_us: u64, heard: &[(NodeId, Epoch)]) -> Answer {
        self.now_us = self.now_us.saturating_add(elapsed_us.min(RENEW_STEP_MAX_US));
        let lease_until_us = self.now_us.saturating_add(LEASE_US);
        let mut stale = Vec::new();
        for (id, epoch) in heard {
            match self.nodes.get_mut(id) {
                Some(node) if node.epoch == *epoch && node.state.alive() => node.lease_until_us = lease_until_us,
                _ => stale.push(*id),
            }
        }
        let over = |n: &&Node| n.state.alive() && n.lease_until_us <= self.now_us && !planted(Bug::LeaseEndless);
        let expired: Vec<_> = self.nodes.values().filter(over).map(|n| n.node).collect();
        expired.iter().for_each(|id| self.bury(*id, NodeState::Dead));
        self.policy.expire(self.now_us);
        self.audit.note(self.checksum());
        Answer::Renewed { expired, stale }
    }

    fn set_state(&mut self, id: NodeId, state: NodeState) -> Answer {
        let Some(node) = self.nodes.get_mut(&id) else { return unknown(id) };
        if !state.alive() {
            return Answer::Refused(format!("nobody can set a node {}", state.as_str()));
        }
        if !node.state.alive() {
            return Answer::Refused(format!("node {id} is {}", node.state.as_str()));
        }
        node.state = state;
        node.cordoned = match state {
            NodeState::Up => false,
            NodeState::Cordoned => true,
            _ => node.cordoned, // a drain ends with the process; a cordon before it stays
        };
        Answer::Done
    }

    fn delta(&mut self, delta: &Delta) -> DeltaVerdict {
        match self.current(delta.node, delta.epoch) {
            Some(_) => self.holders.apply(delta),
            None => DeltaVerdict::StaleEpoch,
        }
    }

    fn compare(&mut self, digest: &CacheDigest) -> DigestVerdict {
        match self.current(digest.node, digest.epoch) {
            Some(_) => self.holders.compare(digest),
            None => DigestVerdict::StaleEpoch,
        }
    }

    fn page(&mut self, page: &SnapshotPage) -> SnapshotVerdict {
        if self.current(page.node, page.epoch).is_none() {
            return SnapshotVerdict::StaleEpoch;
        }
        let seq = self.holders.tally(page.node).map_or(0, |tally| tally.seq);
        if page.seq < seq && !planted(Bug::StaleSnapshot) {
            self.assemblies.remove(&page.node); // deltas overtook it
            return SnapshotVerdict::Applied { seq };
        }
        let Some(mut assembly) = self.assembly_for(page) else { return SnapshotVerdict::Restart };
        if page.page + 1 == assembly.next_page {
            let wanted = SnapshotVerdict::Wanted { page: assembly.next_page }; // a repeat: its answer was lost
            self.assemblies.insert(page.node, assembly);
            return wanted;
        }
        assembly.blocks.extend_from_slice(&page.blocks);
        assembly.next_page = page.page + 1;
        if assembly.next_page == assembly.pages {
            self.holders.replace_node(page.node, page.seq, &assembly.blocks);
            return SnapshotVerdict::Applied { seq: page.seq };
        }
        let wanted = SnapshotVerdict::Wanted { page: assembly.next_page };
        self.assemblies.insert(page.node, assembly);
        wanted
    }

    /// Takes out the assembly that `page` continues, repeats or (page 0) begins; `None`, with the old one dropped, when it does neither.
    fn assembly_for(&mut self, page: &SnapshotPage) -> Option<Assembly> {
        let old = self.assemblies.remove(&page.node);
        let waiting: usize = self.assemblies.values().chain(&old).map(|a| a.blocks.len()).sum();
        if page.page >= page.pages || waiting + page.blocks.len() > ASSEMBLED_BLOCKS_MAX {
            return None;
        }
        if page.page == 0 {
            return Some(Assembly { node: page.node, seq: page.seq, pages: page.pages, next_page: 0, blocks: Vec::new() });
        }
        old.filter(|a| a.seq == page.seq && a.pages == page.pages && (a.next_page == page.page || a.next_page == page.page + 1))
    }

    fn announce(&mut self, replica: ReplicaId, info: &ReplicaInfo) -> Answer {
        let fits = text("HTTP address", &info.http_address).and_then(|()| text("QUIC address", &info.quic_address));
        if let Err(reason) = fits {
            return Answer::Refused(reason);
        }
        if self.was_removed(replica) {
            return Answer::Refused(format!("replica {replica} is not a member"));
        }
        if self.replicas.len() >= REPLICAS_MAX && !self.replicas.contains_key(&replica) {
            return Answer::Refused(format!("there are {REPLICAS_MAX} replicas already"));
        }
        self.replicas.insert(replica, info.clone());
        Answer::Done
    }
}

pub(super) fn text(what: &str, text: &str) -> Result<(), String> {
    match text.len() {
        0 => Err(format!("the {what} is empty")),
        len if len > NAME_BYTES_MAX => Err(format!("the {what} has {len} bytes, {NAME_BYTES_MAX} are allowed")),
        _ => Ok(()),
    }
}

fn unknown(node: NodeId) -> Answer {
    Answer::Refused(format!("there is no node {node}"))
}
