//! Which messages of peers may reach raft-rs.
//!
//! raft-rs trusts its peers: a commit index past the end of the log, or a vote of term 0, is a panic there. Replicas
//! hold certificates, but one bad replica must not take the others down, so what no correct peer could send in
//! the present state is dropped here. This guards against crashes and runaway counters; against a member that lies within
//! the rules (say, acknowledges entries it does not hold) Raft has no defence, and neither has this.

use raft::eraftpb::{Message, MessageType};
use raft::{INVALID_ID, RawNode};

use super::message::CONTEXT_BYTES;
use super::storage::Store;

/// A message may be at most this many terms ahead: half a year of one election a second, while the counter cannot be
/// driven to its end.
const TERM_LEAP_MAX: u64 = 1 << 24;
/// Reads of one follower round trip that wait for a quorum on the leader.
const READS_MAX: usize = 4096;

/// Whether a decoded message that `peer` sent is one that a correct replica could have sent.
pub(super) fn admits(node: &RawNode<Store>, peer: u64, message: &Message) -> bool {
    let addressed = message.from == peer && message.to == node.raft.id && peer != node.raft.id;
    if !addressed || peer == INVALID_ID || message.term > node.raft.term + TERM_LEAP_MAX {
        return false;
    }
    if node.raft.prs().get(peer).is_none() && !may_be_a_stranger(message.get_msg_type()) {
        return false;
    }
    let last = node.raft.raft_log.last_index();
    match message.get_msg_type() {
        MessageType::MsgAppend => one_leader(node, message),
        MessageType::MsgHeartbeat => one_leader(node, message) && (message.term < node.raft.term || message.commit <= last),
        MessageType::MsgSnapshot => one_leader(node, message) && snapshot_is_ours(node, message),
        MessageType::MsgAppendResponse => message.index <= last && message.reject_hint <= last || !leads(node, message),
        MessageType::MsgTimeoutNow | MessageType::MsgReadIndexResp => {
            message.term == node.raft.term && message.from == node.raft.leader_id
        }
        MessageType::MsgReadIndex => {
            let context = &message.entries[0].data;
            debug_assert_eq!(context.len(), CONTEXT_BYTES, "decode checked it");
            node.raft.state == raft::StateRole::Leader
                && node.raft.pending_read_count() < READS_MAX
                && context.starts_with(&peer.to_le_bytes())
        }
        _ => true,
    }
}

/// A member may have been taken in by an entry that this replica has not seen: whoever leads or campaigns is heard. That it is a
/// replica of this cluster and was not taken out is proven by its certificate and looked up before.
const fn may_be_a_stranger(kind: MessageType) -> bool {
    use MessageType::{MsgAppend, MsgHeartbeat, MsgRequestPreVote, MsgRequestVote, MsgSnapshot, MsgTimeoutNow};
    matches!(kind, MsgAppend | MsgHeartbeat | MsgSnapshot | MsgRequestVote | MsgRequestPreVote | MsgTimeoutNow)
}

/// A term has one leader: nobody else may speak as leader of the present term.
fn one_leader(node: &RawNode<Store>, message: &Message) -> bool {
    message.term != node.raft.term || [INVALID_ID, message.from].contains(&node.raft.leader_id)
}

fn leads(node: &RawNode<Store>, message: &Message) -> bool {
    node.raft.state == raft::StateRole::Leader && message.term == node.raft.term
}

/// Only a member gets a snapshot. What is committed here has one term, so a snapshot that ends at the commit index names it. The
/// data was read before the message came here; that the members in it are possible was checked in `message`.
fn snapshot_is_ours(node: &RawNode<Store>, message: &Message) -> bool {
    let (meta, log) = (message.get_snapshot().get_metadata(), &node.raft.raft_log);
    let point_is_ours = meta.index != log.committed || log.match_term(meta.index, meta.term);
    let state = meta.get_conf_state();
    let mut members = state.voters.iter().chain(&state.voters_outgoing).chain(&state.learners);
    members.any(|id| *id == node.raft.id) && (message.term < node.raft.term || point_is_ours)
}
