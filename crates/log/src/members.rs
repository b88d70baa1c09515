//! Who the members are, and what may change about it.
//!
//! A [`Members`] is raft-rs's `ConfState` within our bounds: sorted, disjoint, and left automatically while it is joint. A change
//! is one log entry. It holds what changes and the command that the state machine applies with it, in our own encoding; raft-rs's
//! protobuf structures are built from it when it is applied, so no byte of a peer reaches the protobuf parser. Every
//! replica checks a change again when it applies it: one that is impossible then has no effect, whoever wrote it.
//!
//! Not decided here: whether now is the time for a change (`membership`), and what members are called (the state machine).

use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState};

use super::codec::{Reader, put_u64};
use super::{ChangeError, LEARNERS_MAX, VOTERS_MAX};

/// Bytes of the command that goes with a change.
pub(super) const CHANGE_COMMAND_BYTES_MAX: usize = 4096;
/// raft-rs looks with protobuf at what it is asked to propose. These bytes and a length before our encoding make it a
/// `ConfChangeV2` of one empty change (field 2) whose context (field 3) is ours.
const HEAD: [u8; 3] = [0x12, 0x00, 0x1a];

/// The members of a cluster. Each list is sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    /// They elect and commit; 1 to [`VOTERS_MAX`], none in a log that has not joined yet.
    pub voters: Vec<u64>,
    /// While voters are being exchanged: the former ones, a majority of whom must agree too.
    pub outgoing: Vec<u64>,
    /// They follow the log and do not vote; at most [`LEARNERS_MAX`].
    pub learners: Vec<u64>,
}

/// A change of the members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A new member that follows the log.
    AddLearner(u64),
    /// A learner becomes a voter.
    Promote(u64),
    /// A member is none any more.
    Remove(u64),
    /// A learner takes a voter's place, in one step that a majority of the old and of the new voters agree to.
    Replace {
        /// The voter that goes.
        old: u64,
        /// The learner that comes.
        new: u64,
    },
}

/// What an entry about members says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The first entry of every founder's log: the first voters.
    Found(Vec<u64>),
    /// What somebody asked for.
    Change(Change),
    /// The former voters have no say any more; raft-rs proposes it by itself, as an entry without bytes.
    Leave,
}

impl Members {
    /// As raft-rs has them.
    pub(super) fn of(state: &ConfState) -> Self {
        let sorted = |ids: &[u64]| {
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            ids
        };
        let [voters, outgoing, learners] = [&state.voters, &state.voters_outgoing, &state.learners].map(|ids| sorted(ids));
        Self { voters, outgoing, learners }
    }

    /// As raft-rs wants them.
    pub(super) fn conf_state(&self) -> ConfState {
        let mut state = ConfState::from((self.voters.clone(), self.learners.clone()));
        state.voters_outgoing = self.outgoing.clone();
        state.auto_leave = self.is_joint();
        state
    }

    /// Whether there could be such members: bounds, order, nobody in two roles.
    ///
    /// # Errors
    /// What is wrong.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let lists = [(&self.voters, VOTERS_MAX), (&self.outgoing, VOTERS_MAX), (&self.learners, LEARNERS_MAX)];
        for (ids, most) in lists {
            if ids.len() > most {
                return Err("too many members");
            }
            if ids.first() == Some(&0) || !ids.is_sorted_by(|a, b| a < b) {
                return Err("members must be non-zero and ascending");
            }
        }
        if self.voters.is_empty() && !(self.outgoing.is_empty() && self.learners.is_empty()) {
            return Err("members without a voter");
        }
        if self.learners.iter().any(|id| self.is_voter(*id)) {
            return Err("a member cannot be voter and learner");
        }
        Ok(())
    }

    /// Whether voters are being exchanged.
    #[must_use]
    pub fn is_joint(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether `id` is a member in any role.
    #[must_use]
    pub fn contains(&self, id: u64) -> bool {
        self.is_voter(id) || self.is_learner(id)
    }

    /// Whether `id` votes, be it on its way out.
    #[must_use]
    pub fn is_voter(&self, id: u64) -> bool {
        self.voters.binary_search(&id).is_ok() || self.outgoing.binary_search(&id).is_ok()
    }

    /// Whether `id` is a learner.
    #[must_use]
    pub fn is_learner(&self, id: u64) -> bool {
        self.learners.binary_search(&id).is_ok()
    }

    /// All members, ascending.
    #[must_use]
    pub fn ids(&self) -> Vec<u64> {
        let mut all = [&self.voters[..], &self.outgoing, &self.learners].concat();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The members after `step`, if it is possible.
    pub(super) fn after(&self, step: &Step) -> Result<Self, ChangeError> {
        let mut next = self.clone();
        match step {
            Step::Found(voters) if *self == Self::default() => next.voters.clone_from(voters),
            Step::Leave if self.is_joint() => next.outgoing.clear(),
            Step::Found(_) | Step::Leave => return Err(ChangeError::Impossible("the members are not in that state")),
            Step::Change(_) if self.is_joint() => return Err(ChangeError::Pending),
            Step::Change(change) => next.make(*change)?,
        }
        next.check().map_err(ChangeError::Impossible)?;
        Ok(next)
    }

    fn make(&mut self, change: Change) -> Result<(), ChangeError> {
        match change {
            Change::AddLearner(id) if self.contains(id) => return Err(ChangeError::Member(id)),
            Change::AddLearner(id) => insert(&mut self.learners, id),
            Change::Promote(id) => {
                self.take_learner(id)?;
                insert(&mut self.voters, id);
            }
            Change::Remove(id) if !self.contains(id) => return Err(ChangeError::NoMember(id)),
            Change::Remove(id) if self.voters == [id] => return Err(ChangeError::LastVoter(id)),
            Change::Remove(id) => {
                self.voters.retain(|other| *other != id);
                self.learners.retain(|other| *other != id);
            }
            Change::Replace { old, new } => {
                if !self.is_voter(old) {
                    return Err(if self.is_learner(old) { ChangeError::NoVoter(old) } else { ChangeError::NoMember(old) });
                }
                self.take_learner(new)?;
                self.outgoing.clone_from(&self.voters);
                self.voters.retain(|other| *other != old);
                insert(&mut self.voters, new);
            }
        }
        Ok(())
    }

    fn take_learner(&mut self, id: u64) -> Result<(), ChangeError> {
        let at = self.learners.binary_search(&id).map_err(|_| match self.contains(id) {
            true => ChangeError::NoLearner(id),
            false => ChangeError::NoMember(id),
        })?;
        self.learners.remove(at);
        Ok(())
    }

    /// Appends them to a file.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        for ids in [&self.voters, &self.outgoing, &self.learners] {
            put_ids(out, ids);
        }
    }

    /// Reads what [`Members::put`] wrote.
    pub(super) fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let members = Self { voters: read_ids(reader)?, outgoing: read_ids(reader)?, learners: read_ids(reader)? };
        members.check().is_ok().then_some(members)
    }
}

fn insert(ids: &mut Vec<u64>, id: u64) {
    if let Err(at) = ids.binary_search(&id) {
        ids.insert(at, id);
    }
}

fn put_ids(out: &mut Vec<u8>, ids: &[u64]) {
    out.push(u8::try_from(ids.len()).expect("members are bounded far below 256"));
    ids.iter().for_each(|id| put_u64(out, *id));
}

fn read_ids(reader: &mut Reader<'_>) -> Option<Vec<u64>> {
    let count = reader.u8()?;
    (0..count).map(|_| reader.u64()).collect()
}

impl Change {
    /// The members whom it is about.
    #[must_use]
    pub fn ids(self) -> Vec<u64> {
        match self {
            Self::AddLearner(id) | Self::Promote(id) | Self::Remove(id) => vec![id],
            Self::Replace { old, new } => vec![old, new],
        }
    }
}

impl Step {
    /// The bytes of an entry: this step and the command that is applied with it.
    pub(super) fn encode(&self, command: &[u8]) -> Vec<u8> {
        assert!(command.len() <= CHANGE_COMMAND_BYTES_MAX, "commands of changes are bounded");
        let (kind, ids) = match self {
            Self::Leave => return Vec::new(),
            Self::Found(voters) => (0, voters.clone()),
            Self::Change(change) => {
                let kind = match change {
                    Change::AddLearner(_) => 1,
                    Change::Promote(_) => 2,
                    Change::Remove(_) => 3,
                    Change::Replace { .. } => 4,
                };
                (kind, change.ids())
            }
        };
        let mut body = vec![kind];
        put_ids(&mut body, &ids);
        body.extend_from_slice(command);
        // A varint of two bytes.
        let length = [0x80 | (body.len() & 0x7f) as u8, (body.len() >> 7) as u8];
        [&HEAD[..], &length, &body].concat()
    }

    /// What [`Step::encode`] wrote, from bytes that anybody may have sent.
    pub(super) fn decode(data: &[u8]) -> Option<(Self, &[u8])> {
        if data.is_empty() {
            return Some((Self::Leave, &[]));
        }
        let (length, body) = data.strip_prefix(&HEAD)?.split_at_checked(2)?;
        if length[0] < 0x80 || usize::from(length[0] & 0x7f) | usize::from(length[1]) << 7 != body.len() {
            return None;
        }
        let mut reader = Reader(body);
        let (kind, ids) = (reader.u8()?, read_ids(&mut reader)?);
        let step = match (kind, &ids[..]) {
            (0, voters) if !voters.is_empty() && voters.len() <= VOTERS_MAX && voters.is_sorted_by(|a, b| a < b) => {
                Self::Found(ids.clone())
            }
            (1, &[id]) => Self::Change(Change::AddLearner(id)),
            (2, &[id]) => Self::Change(Change::Promote(id)),
            (3, &[id]) => Self::Change(Change::Remove(id)),
            (4, &[old, new]) if old != new => Self::Change(Change::Replace { old, new }),
            _ => return None,
        };
        (!ids.contains(&0) && reader.0.len() <= CHANGE_COMMAND_BYTES_MAX).then_some((step, reader.0))
    }

    /// What raft-rs is told when it is applied: each in turn.
    pub(super) fn conf_changes(&self) -> Vec<ConfChangeV2> {
        use ConfChangeType::{AddLearnerNode, AddNode, RemoveNode};
        match self {
            Self::Leave => vec![ConfChangeV2::default()],
            Self::Found(voters) => voters.iter().map(|id| conf_change(&[(AddNode, *id)])).collect(),
            Self::Change(Change::AddLearner(id)) => vec![conf_change(&[(AddLearnerNode, *id)])],
            Self::Change(Change::Promote(id)) => vec![conf_change(&[(AddNode, *id)])],
            Self::Change(Change::Remove(id)) => vec![conf_change(&[(RemoveNode, *id)])],
            Self::Change(Change::Replace { old, new }) => vec![conf_change(&[(AddNode, *new), (RemoveNode, *old)])],
        }
    }
}

/// More than one change makes it joint, to be left automatically.
fn conf_change(changes: &[(ConfChangeType, u64)]) -> ConfChangeV2 {
    let single = |&(kind, id): &(ConfChangeType, u64)| {
        let mut single = ConfChangeSingle::default();
        single.set_change_type(kind);
        single.node_id = id;
        single
    };
    let mut change = ConfChangeV2::default();
    change.set_transition(ConfChangeTransition::Auto);
    change.set_changes(changes.iter().map(single).collect::<Vec<_>>().into());
    change
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(voters: &[u64], outgoing: &[u64], learners: &[u64]) -> Members {
        Members { voters: voters.into(), outgoing: outgoing.into(), learners: learners.into() }
    }

    fn steps() -> Vec<Step> {
        let changes = [Change::AddLearner(4), Change::Promote(4), Change::Remove(3), Change::Replace { old: 3, new: 4 }];
        let mut steps = vec![Step::Found(vec![1, 2, 3])];
        steps.extend(changes.map(Step::Change));
        steps
    }

    #[test]
    fn steps_survive_their_bytes() {
        for step in steps() {
            for command in [&b""[..], b"what it is called", &[7; CHANGE_COMMAND_BYTES_MAX]] {
                let bytes = step.encode(command);
                assert_eq!(Step::decode(&bytes), Some((step.clone(), command)));
                let mut longer = bytes.clone();
                longer.push(0);
                assert_eq!(Step::decode(&longer), None);
                assert_eq!(Step::decode(&bytes[..bytes.len() - 1]), None);
            }
        }
        assert_eq!(Step::decode(&Step::Leave.encode(&[])), Some((Step::Leave, &[][..])));
    }

    #[test]
    fn impossible_steps_are_no_steps() {
        for (kind, ids) in
            [(0, vec![]), (0, vec![2, 1]), (0, vec![1; 10]), (1, vec![0]), (1, vec![1, 2]), (4, vec![3, 3]), (5, vec![1])]
        {
            let mut body = vec![kind];
            put_ids(&mut body, &ids);
            let bytes = [&HEAD[..], &[0x80 | body.len() as u8, 0], &body].concat();
            assert_eq!(Step::decode(&bytes), None, "{kind} {ids:?}");
        }
    }

    #[test]
    fn a_change_is_possible_or_says_why_not() {
        let now = members(&[1, 2, 3], &[], &[4]);
        let after = |change| now.after(&Step::Change(change));
        assert_eq!(after(Change::AddLearner(5)), Ok(members(&[1, 2, 3], &[], &[4, 5])));
        assert_eq!(after(Change::Promote(4)), Ok(members(&[1, 2, 3, 4], &[], &[])));
        assert_eq!(after(Change::Remove(2)), Ok(members(&[1, 3], &[], &[4])));
        assert_eq!(after(Change::Replace { old: 3, new: 4 }), Ok(members(&[1, 2, 4], &[1, 2, 3], &[])));
        assert_eq!(after(Change::AddLearner(1)), Err(ChangeError::Member(1)));
        assert_eq!(after(Change::Promote(1)), Err(ChangeError::NoLearner(1)));
        assert_eq!(after(Change::Promote(9)), Err(ChangeError::NoMember(9)));
        assert_eq!(after(Change::Replace { old: 4, new: 4 }), Err(ChangeError::NoVoter(4)));
        assert_eq!(members(&[1], &[], &[]).after(&Step::Change(Change::Remove(1))), Err(ChangeError::LastVoter(1)));
        let joint = members(&[1, 2, 4], &[1, 2, 3], &[]);
        assert_eq!(joint.after(&Step::Change(Change::Remove(1))), Err(ChangeError::Pending));
        assert_eq!(joint.after(&Step::Leave), Ok(members(&[1, 2, 4], &[], &[])));
        assert!(now.after(&Step::Leave).is_err() && now.after(&Step::Found(vec![1])).is_err());
        let full = members(&(1..=VOTERS_MAX as u64).collect::<Vec<_>>(), &[], &[20]);
        assert!(full.after(&Step::Change(Change::Promote(20))).is_err());
    }

    #[test]
    fn members_survive_their_bytes_and_lies_do_not() {
        let good = [Members::default(), members(&[1, 2, 4], &[1, 2, 3], &[7]), members(&[1], &[], &[])];
        for members in good {
            let mut bytes = Vec::new();
            members.put(&mut bytes);
            assert_eq!(Members::read(&mut Reader(&bytes)), Some(members.clone()));
            assert_eq!(Members::of(&members.conf_state()), members);
        }
        for bad in [
            members(&[0], &[], &[]),
            members(&[2, 1], &[], &[]),
            members(&[], &[], &[1]),
            members(&[1], &[], &[1]),
            members(&[2], &[1], &[1]),
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
