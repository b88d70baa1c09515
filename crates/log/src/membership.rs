//! When the members may change, and what follows for this replica: the driver's part that knows about members.
//!
//! The leader proposes a change only when no other is under way, it has committed an entry of its own term, and enough of
//! the voters that will decide are alive; a learner becomes a voter only when it answers and lacks at most
//! [`CAUGHT_UP_ENTRIES_MAX`] committed entries. A replica that is no member any more goes on voting for a while, because the
//! others may not know yet that its removal is committed, and then stops.

use std::collections::BTreeSet;
use std::sync::Arc;

use raft::eraftpb::{Entry, EntryType};
use raft::{INVALID_ID, StateRole};

use super::clients::Reply;
use super::driver::Driver;
use super::members::{Change, Members, Step};
use super::{CAUGHT_UP_ENTRIES_MAX, ChangeError, PeerProgress, ProposeError, RaftFailure, StateMachine};

/// A removed replica stops after so many election time-outs.
const LINGER_TIMEOUTS: u64 = 4;

/// What speaks against this replica's membership.
#[derive(Default)]
pub(super) struct Removal {
    /// Tick at which it stops, because its own log says so.
    due: Option<u64>,
    /// Members that say so, and what the last of them said.
    told_by: BTreeSet<u64>,
    why: String,
}

impl<M: StateMachine> Driver<M> {
    /// Proposes a change of the members, or says why not.
    pub(super) fn propose_change(&mut self, change: Change, seen: u64, command: &[u8], reply: Reply<Vec<u8>>) {
        if self.node.raft.state != StateRole::Leader {
            let leader = self.leader();
            return self.clients.refuse(reply, ProposeError::NotLeader { leader });
        }
        if let Err(error) = self.may_change(change, seen) {
            return self.clients.refuse(reply, error);
        }
        let (seq, context) = self.clients.wait_for_commit(reply);
        let mut entry = Entry { data: Step::Change(change).encode(command).into(), context: context.into(), ..Default::default() };
        entry.set_entry_type(EntryType::EntryConfChangeV2);
        let mut message = raft::eraftpb::Message::default();
        message.set_msg_type(raft::eraftpb::MessageType::MsgPropose);
        message.set_entries(vec![entry].into());
        if self.node.raft.step(message).is_err() {
            self.clients.refuse_proposal(seq, ProposeError::Dropped);
        }
    }

    fn may_change(&self, change: Change, seen: u64) -> Result<(), ProposeError> {
        // A new leader must know where its log stands before it changes who decides about it.
        if !self.node.raft.commit_to_current_term() {
            return Err(ProposeError::Dropped);
        }
        if self.node.raft.has_pending_conf() || self.members.is_joint() {
            return Err(ChangeError::Pending.into());
        }
        if seen != self.members_index {
            return Err(ChangeError::Outdated.into());
        }
        let next = self.members.after(&Step::Change(change))?;
        match change {
            Change::Remove(id) | Change::Replace { old: id, .. } if id == self.config.id => {
                return Err(ChangeError::Leads(id).into());
            }
            Change::Promote(id) | Change::Replace { new: id, .. } => self.caught_up(id)?,
            _ => {}
        }
        Ok(self.enough_alive(&next)?)
    }

    fn caught_up(&self, id: u64) -> Result<(), ChangeError> {
        if !self.alive(id) {
            return Err(ChangeError::Silent(id));
        }
        let matched = self.node.raft.prs().get(id).map_or(0, |progress| progress.matched);
        let entries = self.node.raft.raft_log.committed.saturating_sub(matched);
        if matched == 0 || entries > CAUGHT_UP_ENTRIES_MAX {
            return Err(ChangeError::Behind { id, entries });
        }
        Ok(())
    }

    fn enough_alive(&self, next: &Members) -> Result<(), ChangeError> {
        let (voters, alive) = (next.voters.len(), next.voters.iter().filter(|id| self.alive(**id)).count());
        // A cluster that has lost a majority of what it had must still be able to add: only changes of voters are at stake.
        if next.voters != self.members.voters && alive * 2 <= voters {
            return Err(ChangeError::QuorumAtRisk { alive, voters });
        }
        Ok(())
    }

    /// Whether a member was heard within the last election time-out.
    fn alive(&self, id: u64) -> bool {
        let recent = |heard: &u64| heard + self.config.election_ticks as u64 >= self.ticks;
        id == self.config.id || self.heard.get(&id).is_some_and(recent)
    }

    /// Applies an entry about members; one that is impossible has no effect, here as everywhere.
    pub(super) fn apply_step(&mut self, entry: &Entry) {
        let after = Step::decode(&entry.data).ok_or(ChangeError::Impossible("no change of members"));
        let after = after.and_then(|(step, command)| Ok((self.members.after(&step)?, step, command)));
        let (next, step, command) = match after {
            Ok(after) => after,
            Err(error) => {
                tracing::warn!(id = self.config.id, index = entry.index, %error, "a change of the members has no effect");
                return self.clients.applied_in_vain(&entry.context, error.into());
            }
        };
        for change in step.conf_changes() {
            self.node.apply_conf_change(&change).expect("raft takes what was checked");
        }
        self.note_members(entry.index);
        assert_eq!(*self.members, next, "raft and we agree on what a change means");
        tracing::info!(id = self.config.id, index = entry.index, ?step, members = ?self.members, "the members have changed");
        let answer = if command.is_empty() { Vec::new() } else { self.machine.apply(entry.index, command) };
        self.clients.applied(&entry.context, answer);
    }

    /// Takes over raft's view of the members after entry `index`.
    pub(super) fn note_members(&mut self, index: u64) {
        let me = self.config.id;
        let was_member = self.members.contains(me);
        self.members = Arc::new(Members::of(&self.node.raft.prs().conf().to_conf_state()));
        self.members_index = index;
        let members = Arc::clone(&self.members);
        self.heard.retain(|id, _| members.contains(*id));
        if members.contains(me) {
            self.removal.due = None;
        } else if was_member {
            self.removal.due = Some(self.ticks + LINGER_TIMEOUTS * self.config.election_ticks as u64);
            self.removal.why = format!("removed by entry {index} of the log");
            if self.node.raft.state == StateRole::Leader {
                // raft-rs leaves a removed leader in office, where it would stumble over its own absence.
                let term = self.node.raft.term;
                self.node.raft.become_follower(term, INVALID_ID);
            }
        }
    }

    /// A peer says that this replica is no member.
    pub(super) fn told_removed(&mut self, by: u64, why: String) {
        if by != self.config.id && (self.members.is_voter(by) || self.knows_nothing()) {
            tracing::warn!(id = self.config.id, by, why, "a peer does not take this replica for a member");
            self.removal.told_by.insert(by);
            self.removal.why = why;
        }
    }

    /// Whether the log holds nothing but its beginning: such a replica has nothing to lose and believes anybody.
    fn knows_nothing(&self) -> bool {
        self.node.raft.raft_log.last_index() <= 1
    }

    /// Ends a replica that is no member: by its own log, or as more than half of the other voters say.
    pub(super) fn stop_if_removed(&mut self) -> Result<(), RaftFailure> {
        let others = self.members.voters.iter().filter(|id| **id != self.config.id);
        let say = others.clone().filter(|id| self.removal.told_by.contains(id)).count();
        let told = if self.knows_nothing() { !self.removal.told_by.is_empty() } else { say * 2 > others.count() };
        let due = self.removal.due.is_some_and(|due| due <= self.ticks);
        if due || told { Err(RaftFailure::Removed(self.removal.why.clone())) } else { Ok(()) }
    }

    /// Hands leadership to `to`, or to the living voter that has most of the log.
    pub(super) fn transfer(&mut self, to: Option<u64>) {
        if self.node.raft.state != StateRole::Leader {
            return;
        }
        let matched = |id: u64| self.node.raft.prs().get(id).map_or(0, |progress| progress.matched);
        let voters = self.members.voters.iter().copied();
        let heir = voters.filter(|id| *id != self.config.id && self.alive(*id)).max_by_key(|id| matched(*id));
        if let Some(heir) = to.or(heir) {
            tracing::info!(id = self.config.id, heir, "raft leadership is handed over");
            self.node.transfer_leader(heir);
        }
    }

    /// What a leader knows of the others.
    pub(super) fn peers(&self) -> Arc<[PeerProgress]> {
        if self.node.raft.state != StateRole::Leader {
            return Arc::default();
        }
        let others = self.node.raft.prs().iter().filter(|(id, _)| **id != self.config.id);
        let mut peers: Vec<_> =
            others.map(|(&id, progress)| PeerProgress { id, matched: progress.matched, alive: self.alive(id) }).collect();
        peers.sort_unstable_by_key(|peer| peer.id);
        peers.into()
    }
}
