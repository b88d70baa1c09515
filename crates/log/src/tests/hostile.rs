//! Frames that no correct replica would send, from a peer with a valid certificate.

use raft::eraftpb::{ConfState, Entry, EntryType, Message, MessageType};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::members::Step;
use crate::message::{decode, encode};

use MessageType::*;

const FRAMES: usize = 10_000;
const SEED: u64 = 0x5eed;

/// Every type that means something to a follower or a leader, local ones too.
const KINDS: [MessageType; 17] = [
    MsgHup,
    MsgBeat,
    MsgPropose,
    MsgAppend,
    MsgAppendResponse,
    MsgRequestVote,
    MsgRequestVoteResponse,
    MsgHeartbeat,
    MsgHeartbeatResponse,
    MsgUnreachable,
    MsgCheckQuorum,
    MsgTransferLeader,
    MsgTimeoutNow,
    MsgReadIndex,
    MsgReadIndexResp,
    MsgRequestPreVote,
    MsgRequestPreVoteResponse,
];

/// Changes a message as a program that knows the format would: one to three fields, to values near and far.
fn mutate(rng: &mut StdRng, message: &mut Message) {
    for _ in 0..rng.random_range(1..=3) {
        let near = rng.random_range(0..200);
        let far = [0, 1, u64::MAX, u64::MAX - 1, 1 << 61, 1 << 40, 1 << 32, 1 << 23, near][rng.random_range(0..9)];
        let value = if rng.random() { near } else { far };
        match rng.random_range(0..14) {
            0 => message.term = value,
            1 => message.index = value,
            2 => message.log_term = value,
            3 => message.commit = value,
            4 => message.commit_term = value,
            5 => message.reject_hint = value,
            6 => message.reject = !message.reject,
            7 => message.context = vec![value as u8; rng.random_range(0..40)].into(),
            8 => message.set_msg_type(KINDS[rng.random_range(0..KINDS.len())]),
            9 => message.to = value % 5,
            10 => message.from = value % 5,
            11 => message.set_entries(strange_entries(rng, message).into()),
            12 => strange_snapshot(rng, message, value),
            _ => message.term = message.term.wrapping_add(value % 3),
        }
    }
}

fn strange_entries(rng: &mut StdRng, message: &Message) -> Vec<Entry> {
    let first = message.index.wrapping_add(rng.random_range(0..2));
    let term = message.term.wrapping_sub(rng.random_range(0..2));
    let length = [0, 1, 24, 500][rng.random_range(0..4)];
    let context = [0, 24, 25][rng.random_range(0..3)];
    let entry = |i: u64| Entry {
        index: first.wrapping_add(i),
        term,
        data: vec![3; length].into(),
        context: vec![4; context].into(),
        ..Default::default()
    };
    let mut entries: Vec<Entry> = (0..rng.random_range(0..4)).map(entry).collect();
    if let Some(last) = entries.last_mut().filter(|_| rng.random()) {
        last.set_entry_type(EntryType::EntryConfChangeV2);
        last.data = strange_step(rng).into();
    }
    entries
}

/// Changes of the members, most of them impossible, and bytes that are none. None takes an honest replica out: a liar that leads
/// may do that within the rules.
fn strange_step(rng: &mut StdRng) -> Vec<u8> {
    let (member, stranger, old) = (rng.random_range(0..=4), rng.random_range(4..8), rng.random_range(4..8));
    let change =
        [Change::AddLearner(member), Change::Promote(stranger), Change::Remove(stranger), Change::Replace { old, new: member }];
    let steps = change.map(Step::Change).into_iter().chain([Step::Leave, Step::Found(vec![1, 2]), Step::Found(vec![])]);
    let steps: Vec<Vec<u8>> = steps.map(|step| step.encode(b"command")).collect();
    let mut bytes = steps[rng.random_range(0..steps.len())].clone();
    if rng.random_range(0..4) == 0 && !bytes.is_empty() {
        let at = rng.random_range(0..bytes.len());
        bytes[at] ^= 1 << rng.random_range(0..8);
    }
    bytes
}

fn strange_snapshot(rng: &mut StdRng, message: &mut Message, index: u64) {
    message.set_msg_type(MessageType::MsgSnapshot);
    let (term, honest) = (message.term, rng.random::<bool>());
    let snapshot = message.mut_snapshot();
    let meta = snapshot.mut_metadata();
    (meta.index, meta.term) = (index, term);
    let mut state = ConfState::from((if honest { vec![1, 2, 3] } else { vec![9] }, Vec::new()));
    match rng.random_range(0..6) {
        0 => state.voters_outgoing = vec![1, 2, 4],
        1 => state.learners = vec![4, 5],
        2 => state.learners = vec![1],
        3 => state.voters = vec![3, 3, 0],
        _ => {}
    }
    meta.set_conf_state(state);
}

/// A third bytes of no meaning, a third valid frames with bits flipped, a third well-formed lies.
fn hostile_frame(rng: &mut StdRng, valid: &[Vec<u8>]) -> Vec<u8> {
    let mut frame = valid[rng.random_range(0..valid.len())].clone();
    match rng.random_range(0..3) {
        0 => {
            let keep = [0, 8][rng.random_range(0..2)];
            frame.truncate(keep);
            frame.extend((0..rng.random_range(0..300)).map(|_| rng.random::<u8>()));
        }
        1 => {
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(0..frame.len());
                frame[at] ^= 1 << rng.random_range(0..8);
            }
            frame.truncate(rng.random_range(frame.len() / 2..=frame.len()));
        }
        _ => {
            let mut message = decode(&frame).unwrap();
            mutate(rng, &mut message);
            frame = encode(&message);
        }
    }
    frame
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_frames_crash_nobody_and_the_others_go_on() {
    let cluster = Cluster::start();
    *cluster.faults.tapped.lock().unwrap() = Some(Vec::new());
    cluster.commit_many(0..40).await;
    for _ in 0..20 {
        // Reads put their own kinds of messages on the wire; whether each finds a quorum does not matter.
        let _ = cluster.handle(2).read_index().await;
        let _ = cluster.handle(3).read_index().await;
    }
    let valid = cluster.faults.tapped.lock().unwrap().take().unwrap();
    assert!(valid.iter().all(|frame| decode(frame).is_ok()));
    let mut rng = StdRng::seed_from_u64(SEED);
    for i in 0..FRAMES {
        let frame = hostile_frame(&mut rng, &valid);
        // Replica 3 is the liar; half of its well-formed lies are addressed rightly and speak of the present.
        for to in [1, 2] {
            let lie = decode(&frame).map(|message| in_the_present(&mut rng, message, &cluster.handle(to).status()));
            let lie = lie.ok().filter(|_| rng.random()).map(|message| encode(&message));
            cluster.handle(to).step(3, lie.as_deref().unwrap_or(&frame));
        }
        if i % 20 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    cluster.commit(b"still here").await;
    for handle in cluster.running() {
        let status = handle.status();
        assert_eq!(status.failure, None, "replica {}, seed {SEED:#x}", status.id);
        let refused = status.frames_refused;
        assert!(status.id == 3 || refused > FRAMES as u64 / 3, "only {refused} refused");
    }
}

/// The same lie, told as if its sender had followed the log so far: raft ignores most of what is stale.
fn in_the_present(rng: &mut StdRng, mut message: Message, now: &RaftStatus) -> Message {
    (message.from, message.to) = (3, now.id);
    if message.term > 0 {
        message.term = now.term + rng.random_range(0..2);
    }
    if rng.random() {
        message.index = (now.last_index + rng.random_range(0..3)).saturating_sub(1);
        message.log_term = now.term;
    }
    if rng.random() {
        message.commit = (now.committed + rng.random_range(0..4)).saturating_sub(1);
    }
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_panic_raft_are_refused() {
    let cluster = Cluster::start();
    cluster.commit_many(0..5).await;
    let leader = cluster.leader_of(&[1, 2, 3]).await.status();
    let victim = cluster.handle(leader.id % REPLICAS + 1);
    let base = Message { from: leader.id, to: victim.status().id, term: leader.term, ..Default::default() };
    let with = |kind, change: fn(&mut Message)| {
        let mut message = base.clone();
        message.set_msg_type(kind);
        change(&mut message);
        encode(&message)
    };
    let lethal = [
        with(MessageType::MsgHeartbeat, |m| m.commit = 1 << 40),
        with(MessageType::MsgRequestVote, |m| m.term = 0),
        with(MessageType::MsgReadIndex, |m| m.term = 0),
        with(MessageType::MsgHeartbeat, |m| m.term = (1 << 62) - 1),
        with(MessageType::MsgAppend, |m| m.index = u64::MAX),
        with(MessageType::MsgPropose, |m| m.term = 0),
        with(MessageType::MsgSnapshot, |m| strange_snapshot(&mut StdRng::seed_from_u64(1), m, 1 << 40)),
    ];
    let before = victim.status().frames_refused;
    for frame in &lethal {
        victim.step(leader.id, frame);
    }
    until("all are refused", || (victim.status().frames_refused >= before + lethal.len() as u64).then_some(())).await;
    cluster.agree_on(&[]).await;
    assert_eq!(victim.status().failure, None);
}
