//! Nodes that could not be reached: what becomes of those who ask for one, and when it is dialed again.
//!
//! To learn that nobody answers takes seconds, so it is learned once and remembered: while a node is in doubt, hand-overs to it are refused at once, with
//! the reason, and their gateway places them elsewhere. Meanwhile it is dialed again and again, after a wait that doubles and
//! that nodes do not have in common. Doubt ends when it answers, when a newer incarnation of it is asked for, or when nobody has asked for so
//! long that it does not matter.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::ids::Time;
use crate::message::Peer;
use crate::planted::{Bug, planted};

/// The first wait before a node in doubt is dialed again, and the longest. Each is shortened by up to half.
const AGAIN_US: (u64, u64) = (250_000, 4_000_000);
/// A node in doubt for which nobody has asked for so long is forgotten.
const ASKED_WITHIN_US: u64 = 60_000_000;
/// Nodes in doubt. At one more, the one for which nobody has asked for longest is forgotten: the next who asks waits for a dial.
const DOUBTS_MAX: usize = 256;

#[derive(Debug)]
struct Doubt {
    peer: Peer,
    reason: String,
    failures: u32,
    /// When it is to be dialed again; while it is being dialed, never.
    again: Option<Time>,
    asked: Time,
}

/// All nodes in doubt.
#[derive(Debug, Default)]
pub(super) struct Doubts {
    by_name: BTreeMap<String, Doubt>,
}

impl Doubts {
    /// A dial of `peer` by the node `own` has failed.
    pub(super) fn failed(&mut self, now: Time, own: &str, peer: Peer, reason: &str) {
        let (asked, failures) = self.by_name.get(&peer.name).map_or((now, 1), |doubt| (doubt.asked, doubt.failures + 1));
        if self.by_name.len() >= DOUBTS_MAX && !self.by_name.contains_key(&peer.name) {
            let oldest = self.by_name.iter().min_by_key(|(_, doubt)| doubt.asked).map(|(name, _)| name.clone());
            oldest.into_iter().for_each(|name| drop(self.by_name.remove(&name)));
        }
        let again = Some(now.after(wait_us(own, &peer.name, failures)));
        self.by_name.insert(peer.name.clone(), Doubt { peer, reason: reason.into(), failures, again, asked });
    }

    /// Why nobody is sent to this incarnation of a node now; `None` when it is not in doubt.
    pub(super) fn about(&mut self, now: Time, peer: &Peer) -> Option<String> {
        let doubt = self.by_name.get_mut(&peer.name)?;
        if doubt.peer.epoch < peer.epoch {
            self.by_name.remove(&peer.name);
            return None;
        }
        doubt.asked = now;
        Some(format!("{} could not be reached, and is dialed again: {}", peer.name, doubt.reason))
    }

    /// A node has answered.
    pub(super) fn dispel(&mut self, name: &str) {
        if !planted(Bug::DoubtForGood) {
            self.by_name.remove(name);
        }
    }

    /// Those that are to be dialed now.
    pub(super) fn due(&mut self, now: Time) -> Vec<Peer> {
        self.by_name.retain(|_, doubt| doubt.again.is_none() || now.since(doubt.asked) < ASKED_WITHIN_US);
        let due = self.by_name.values_mut().filter(|doubt| doubt.again.is_some_and(|again| again <= now));
        due.map(|doubt| (doubt.again = None, doubt.peer.clone()).1).collect()
    }

    /// When [`Self::due`] is to be asked again.
    pub(super) fn deadline(&self) -> Option<Time> {
        self.by_name.values().filter_map(|doubt| doubt.again).min()
    }

    pub(super) fn len(&self) -> usize {
        self.by_name.len()
    }
}

/// How long `own` waits after so many failures in a row. Half of it is drawn from the names, so that not all dial at once a node that comes back.
fn wait_us(own: &str, peer: &str, failures: u32) -> u64 {
    let longest = (AGAIN_US.0 << (failures - 1).min(16)).min(AGAIN_US.1);
    let digest = blake3::hash(format!("{own} {peer} {failures}").as_bytes());
    let part = u64::from(digest.as_bytes()[0]);
    longest / 2 + longest / 2 * part / 255
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;
    use crate::ids::{Epoch, NodeId};

    fn peer(name: &str, epoch: u64) -> Peer {
        Peer { node: NodeId(1), epoch: Epoch(epoch), name: name.into(), address: "a".into() }
    }

    #[test]
    fn one_that_fails_is_refused_by_name_and_dialed_ever_more_seldom() {
        let (mut doubts, mut now, mut waits) = (Doubts::default(), Time(0), Vec::new());
        assert_eq!(doubts.about(now, &peer("d", 1)), None);
        for _ in 0..8 {
            doubts.failed(now, "p", peer("d", 1), "silence");
            let again = doubts.deadline().expect("it is dialed again");
            assert!(doubts.due(Time(again.0 - 1)).is_empty());
            waits.push(again.since(now));
            now = again;
            let said = doubts.about(now, &peer("d", 1)).expect("in doubt");
            assert!(said.contains("d could not be reached") && said.contains("silence"), "{said}");
            assert_eq!(doubts.due(now), [peer("d", 1)]);
            assert_eq!((doubts.due(now), doubts.deadline()), (Vec::new(), None), "it is being dialed");
        }
        assert!((AGAIN_US.0 / 2..=AGAIN_US.0).contains(&waits[0]), "{waits:?}");
        assert!((AGAIN_US.1 / 2..=AGAIN_US.1).contains(&waits[7]), "{waits:?}");
        let others: Vec<_> = (0..20).map(|node| wait_us(&node.to_string(), "d", 1)).collect();
        assert!(others.iter().any(|wait| *wait != others[0]), "all dial at once");
    }

    #[test]
    fn doubt_ends_with_an_answer_a_newer_incarnation_or_when_nobody_asks() {
        let mut doubts = Doubts::default();
        let fail = |doubts: &mut Doubts| doubts.failed(Time(0), "p", peer("d", 1), "silence");
        fail(&mut doubts);
        assert!(doubts.about(Time(1), &peer("e", 1)).is_none(), "another node");
        doubts.dispel("d");
        assert!(doubts.about(Time(1), &peer("d", 1)).is_none());
        fail(&mut doubts);
        assert!(doubts.about(Time(1), &peer("d", 2)).is_none());
        assert_eq!(doubts.len(), 0);
        fail(&mut doubts);
        assert!(doubts.due(Time(ASKED_WITHIN_US)).is_empty());
        assert_eq!((doubts.len(), doubts.deadline()), (0, None));
    }

    #[test]
    fn of_too_many_the_one_least_asked_for_is_forgotten() {
        let mut doubts = Doubts::default();
        (0..=DOUBTS_MAX).for_each(|i| doubts.failed(Time(i as u64), "p", peer(&i.to_string(), 1), "silence"));
        assert_eq!(doubts.len(), DOUBTS_MAX);
        assert!(doubts.about(Time(999), &peer("0", 1)).is_none());
        assert!(doubts.about(Time(999), &peer("1", 1)).is_some());
    }
}
