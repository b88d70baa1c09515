//! The replicated state under random logs: every invariant after every entry, and replicas that are equal to the byte however
//! they came to be (from the first entry, or from a snapshot at any point).

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use millrace_core::cluster::{
    Answer, ApiKeyDigest, Cluster, Command, Limits, Member, MemberChange, NodeState, PolicyCommand, ReplicaInfo, decode,
    decode_answer, encode, encode_answer,
};
use millrace_core::identity::TenantKey;
use millrace_core::ids::{BlockHash, Epoch, NodeId, ReplicaId};
use millrace_core::layout::{KvDtype, KvLayout, KvParts};
use millrace_core::message::{BlockOp, Delta, Join, ModelIdentity, Role, SnapshotPage};

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn block(&mut self) -> BlockHash {
        let mut name = [0; 16];
        name[5] = self.below(40) as u8;
        BlockHash(name)
    }
}

fn model(weights: u8) -> ModelIdentity {
    let layout =
        KvLayout { layers: 2, parts: KvParts::KeysValues, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype: KvDtype::F32 };
    ModelIdentity { name: "tiny".into(), weights: [weights; 32], tokenizer: [0; 32], layout }
}

fn random_policy(rng: &mut Rng) -> PolicyCommand {
    let name = format!("t{}", rng.below(4));
    let api_key = ApiKeyDigest([rng.below(9) as u8; 32]);
    let key = TenantKey([rng.below(256) as u8; 32]);
    match rng.below(7) {
        0 => PolicyCommand::SetConfig {
            if_version: Some(rng.below(5)).filter(|v| *v > 2),
            set: vec![(["slo.ttft_ms", "auth.required", "x"][rng.below(3) as usize].into(), Some(rng.below(4)))],
        },
        1 => PolicyCommand::CreateTenant { name, key, api_key: Some(api_key), limits: Limits::default() },
        2 => PolicyCommand::RotateKey { name, api_key, keep: rng.below(2) == 0 },
        3 => PolicyCommand::DeleteTenant { name },
        4 => PolicyCommand::Unpin { pin: rng.below(6) },
        _ => {
            let names = (0..rng.below(4)).map(|_| rng.block()).collect();
            let ttl_us = Some(rng.below(3) * 1_000_000).filter(|ttl| *ttl > 0);
            PolicyCommand::Pin { tenant: name, label: String::new(), names, ttl_us }
        }
    }
}

/// Mostly sensible commands, with stale epochs, gaps, other models and nonsense among them.
fn random_command(rng: &mut Rng, cluster: &Cluster) -> Command {
    let node = NodeId(rng.below(7) as u16);
    let epoch = match cluster.node(node) {
        Some(known) if rng.below(8) > 0 => known.epoch,
        _ => Epoch(rng.below(6)),
    };
    let seq = cluster.holders().tally(node).map_or(0, |tally| tally.seq);
    match rng.below(24) {
        0..4 => Command::Join(Join {
            name: ["a", "b", "c", "d", "e", ""][rng.below(6) as usize].into(),
            role: [Role::Prefill, Role::Decode, Role::Decode, Role::Admin][rng.below(4) as usize],
            address: "127.0.0.1:1".into(),
            instance: u128::from(rng.below(3)),
            pid: 1,
            model: model(u8::from(rng.below(10) == 0)),
            slots: 10,
        }),
        4 => Command::Leave { node, epoch },
        5 => Command::MarkDead { node, epoch },
        6..9 => Command::Renew {
            elapsed_us: [0, 1_000_000, u64::MAX][rng.below(3) as usize],
            nodes: cluster.nodes().filter(|_| rng.below(3) > 0).map(|n| (n.node, n.epoch)).collect(),
        },
        9 => {
            let states = [NodeState::Up, NodeState::Cordoned, NodeState::Draining, NodeState::Dead];
            Command::SetState { node, state: states[rng.below(4) as usize] }
        }
        10..15 => {
            let base_seq = if rng.below(6) == 0 { rng.below(5) } else { seq };
            let op = |rng: &mut Rng| if rng.below(3) > 0 { BlockOp::Stored(rng.block()) } else { BlockOp::Evicted(rng.block()) };
            let ops = (0..rng.below(12)).map(|_| op(rng)).collect();
            let delta = Delta { node, epoch, base_seq, seq: base_seq + rng.below(4), ops };
            Command::Deltas(vec![delta.clone(), delta])
        }
        15..18 => {
            let pages = rng.below(4) as u32;
            let blocks = (0..rng.below(9)).map(|_| rng.block()).collect();
            let seq = (seq + rng.below(3)).saturating_sub(rng.below(2));
            Command::Snapshot(SnapshotPage { node, epoch, seq, page: rng.below(3) as u32, pages, blocks })
        }
        22..26 => Command::Policy(random_policy(rng)),
        18 => Command::PutTenant { name: format!("t{}", rng.below(4)), key: TenantKey([rng.below(256) as u8; 32]) },
        19..21 => {
            let (replica, new) = (ReplicaId(rng.below(5)), ReplicaId(rng.below(5)));
            let (name, address) = (["r-1", "r-2", ""][rng.below(3) as usize].into(), "q:3".into());
            Command::Members(match rng.below(4) {
                0 | 1 => MemberChange::Add { replica, name, address },
                2 => MemberChange::Replace { old: replica, new },
                _ => MemberChange::Remove { replica },
            })
        }
        21 => {
            let log = Some(u128::from(rng.below(2)));
            Command::Enroll { replica: ReplicaId(rng.below(5)), member: Member { name: "r".into(), address: "q:4".into(), log } }
        }
        _ => Command::Announce {
            replica: ReplicaId(rng.below(4)),
            info: ReplicaInfo { http_address: "h:1".into(), quic_address: "q:2".into(), pid: 7, instance: 9 },
        },
    }
}

#[test]
fn any_log_keeps_the_invariants_and_replicas_equal() {
    for seed in 0..150 {
        let mut rng = Rng(seed);
        let (mut first, mut late) = (Cluster::new(), Cluster::new());
        for step in 1..=120 {
            let command = random_command(&mut rng, &first);
            let bytes = encode(&command);
            assert_eq!(decode(&bytes).unwrap(), command);
            let index = first.applied() + 1 + rng.below(2);
            let answer = first.apply(index, &command);
            first.check();
            assert_eq!(decode_answer(&encode_answer(&answer)).unwrap(), answer);
            assert_eq!(late.apply(index, &decode(&bytes).unwrap()), answer, "seed {seed} step {step}: {command:?}");
            if rng.below(10) == 0 {
                late = Cluster::restore(&late.snapshot()).unwrap();
            }
            assert!(late.snapshot() == first.snapshot(), "seed {seed} step {step}: states differ after {command:?}");
        }
    }
}

#[test]
fn an_entry_applies_once() {
    let mut cluster = Cluster::new();
    let put = |key| Command::PutTenant { name: "t".into(), key: TenantKey([key; 32]) };
    assert_eq!(cluster.apply(5, &put(1)), Answer::Tenant(TenantKey([1; 32])));
    let before = cluster.snapshot();
    assert!(matches!(cluster.apply(5, &put(2)), Answer::Refused(_)));
    assert!(matches!(cluster.apply(4, &put(2)), Answer::Refused(_)));
    assert_eq!(cluster.snapshot(), before);
    assert_eq!(cluster.apply(6, &put(2)), Answer::Tenant(TenantKey([1; 32])), "the first key counts");
}

/// Bytes with a few of them changed, cut or repeated.
fn damage(rng: &mut Rng, bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=rng.below(3) {
        if bytes.is_empty() {
            break;
        }
        let at = rng.below(bytes.len() as u64) as usize;
        match rng.below(5) {
            0 => bytes.truncate(at),
            1 => bytes.extend_from_within(at..),
            2 => bytes[at] = 0xff,
            _ => bytes[at] ^= 1 << rng.below(8),
        }
    }
    bytes
}

#[test]
fn hostile_bytes_are_errors_or_sound_states() {
    let mut rng = Rng(99);
    let mut cluster = Cluster::new();
    let mut commands = Vec::new();
    for _ in 0..120 {
        let command = random_command(&mut rng, &cluster);
        cluster.apply(cluster.applied() + 1, &command);
        commands.push(encode(&command));
    }
    let snapshot = cluster.snapshot();
    let (mut refused, mut taken) = (0, 0);
    for round in 0..30_000 {
        let _ = decode(&damage(&mut rng, &commands[round % commands.len()]));
        match Cluster::restore(&damage(&mut rng, &snapshot)) {
            Err(_) => refused += 1,
            Ok(mut other) => {
                taken += 1;
                other.check();
                let command = random_command(&mut rng, &other);
                other.apply(other.applied().saturating_add(1), &command);
                other.check();
            }
        }
    }
    assert!(refused > 1000 && taken > 100, "the damage is too small or too big to say anything: {refused} {taken}");
    for len in 0..64 {
        let noise: Vec<u8> = [1].into_iter().chain((0..len).map(|_| rng.next() as u8)).collect();
        let _ = (decode(&noise), decode_answer(&noise), Cluster::restore(&noise));
    }
}
