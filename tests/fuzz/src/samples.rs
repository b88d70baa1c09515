//! One valid example of each message, command and answer. A test reads the enums' source and names what is missing here.

use millrace_core::cluster::{
    Answer, ApiKeyDigest, Checksum, Cluster, Command, DeltaVerdict, DigestVerdict, Limits, Member, MemberChange, NodeState,
    PolicyCommand, ReplicaInfo, SnapshotVerdict,
};
use millrace_core::identity::{Owner, TenantKey};
use millrace_core::ids::{AttemptId, BlockHash, Epoch, Generation, NodeId, ReplicaId, RequestId};
use millrace_core::layout::{KvDtype, KvLayout, KvParts};
use millrace_core::message::*;
use millrace_core::sampling::Sampling;

fn attempt() -> AttemptId {
    AttemptId { request: RequestId(0x1234 << 64), attempt: 1 }
}

pub fn block(byte: u8) -> BlockHash {
    BlockHash([byte; 16])
}

pub fn model() -> ModelIdentity {
    let layout =
        KvLayout { layers: 4, parts: KvParts::KeysValues, kv_heads: 2, head_dim: 64, block_tokens: 16, dtype: KvDtype::F32 };
    ModelIdentity { name: "a model with a longer name".into(), weights: [1; 32], tokenizer: [2; 32], layout }
}

fn ticket() -> Ticket {
    let sampling = Sampling { temperature: 0.7, top_p: 0.9, top_k: 0, seed: 3, max_new: 64, eos: vec![2, 3], ignore_eos: false };
    let decode = Peer { node: NodeId(2), epoch: Epoch(5), name: "decode-1".into(), address: "127.0.0.1:4000".into() };
    Ticket {
        attempt: attempt(),
        gateway: ReplicaId(1),
        decode: Some(decode),
        tokens: (0..40).collect(),
        prompt_tokens: 33,
        sampling,
        tenant_key: TenantKey([9; 32]),
        cache_salt: b"salt".to_vec(),
        budget_us: 1_000_000,
        trace: [4; 25],
    }
}

pub fn join(name: &str, role: Role) -> Join {
    Join { name: name.into(), role, address: "127.0.0.1:4001".into(), instance: 7, pid: 8, model: model(), slots: 100 }
}

fn load() -> Load {
    Load { queued_tokens: 5, running: 2, free_blocks: 60, evictable_blocks: 30, total_blocks: 100, ..Load::default() }
}

fn delta() -> Delta {
    let ops = vec![BlockOp::Stored(block(1)), BlockOp::ToHost(block(2)), BlockOp::ToDisk(block(3)), BlockOp::Evicted(block(4))];
    Delta { node: NodeId(1), epoch: Epoch(1), base_seq: 0, seq: 4, ops }
}

fn page() -> SnapshotPage {
    SnapshotPage { node: NodeId(2), epoch: Epoch(2), seq: 9, page: 0, pages: 2, blocks: vec![block(5), block(6)] }
}

fn digest() -> CacheDigest {
    CacheDigest { node: NodeId(1), epoch: Epoch(1), seq: 4, blocks: 3, digest: 77 }
}

fn report(result: CacheResult) -> Message {
    Message::CacheReport(CacheReport { id: 3, node: NodeId(1), epoch: Epoch(1), result })
}

fn order(task: CacheTask) -> Message {
    Message::CacheOrder(CacheOrder { id: 3, epoch: Epoch(1), task })
}

fn token() -> TokenOut {
    let prefill = Some(PrefillStats { node: "prefill-1".into(), ..Default::default() });
    TokenOut { attempt: attempt(), index: 1, token: 2, logprob: -0.5, prefill, finish: Some(Finish::Stop) }
}

/// At least one of each message.
pub fn messages() -> Vec<Message> {
    let (attempt, epoch, node, detail) = (attempt(), Epoch(1), NodeId(1), String::from("because of something"));
    let hello = Hello { cluster: "fuzz".into(), name: "prefill-1".into(), instance: 1 << 100, node, epoch, model: Some(model()) };
    let generation = Generation(3);
    let mut all = vec![
        Message::Hello(hello),
        Message::Refuse("model: layers differs".into()),
        Message::Raft(vec![7; 90]),
        Message::Forward { id: 4, command: vec![2; 40] },
        Message::Forwarded { id: 4, result: Ok(vec![2; 20]) },
        Message::Forwarded { id: 4, result: Err(detail.clone()) },
        Message::Join(join("prefill-1", Role::Prefill)),
        Message::Joined { node, epoch },
        Message::JoinRefused { reason: detail.clone(), retry: true },
        Message::Heartbeat { node, epoch, load: load() },
        Message::Delta(delta()),
        Message::DeltaApplied { epoch, seq: 5 },
        Message::WantSnapshot { epoch },
        Message::Snapshot(page()),
        Message::Assign(ticket()),
        Message::Cancel(attempt),
        Message::Token(token()),
        Message::Failed(AttemptFailed { attempt, kind: FailKind::Engine, detail: detail.clone() }),
        Message::Handover(HandoverStats {
            attempt,
            node: "d".into(),
            bytes: 9,
            blocks_sent: 2,
            blocks_had: 1,
            transfer_us: 5,
            exposed_us: 1,
        }),
        Message::Open(Open { ticket: ticket() }),
        Message::Granted(Granted { attempt, have_blocks: 1, generation, credit_bytes: 1 << 20 }),
        Message::Declined { attempt, kind: FailKind::NoRoom, detail: detail.clone() },
        Message::Credit { attempt, bytes: 1 << 21 },
        Message::Fin(Fin { attempt, generation, cells: 12, digest_sum: 99, first_token: 5, finished: false }),
        Message::Received { attempt },
        Message::Resume { attempt, generation },
        Message::Resumed(Resumed { attempt, generation, credit_bytes: 1 << 20, stands: vec![7, 0, u64::MAX] }),
        Message::Lanes { port: 7302 },
        Message::Abort { attempt, kind: FailKind::PeerLost, detail: detail.clone() },
        Message::Leave { node, epoch },
        Message::Drain { node, epoch },
        Message::Query { id: 1, json: r#"{"q":"status"}"#.into() },
        Message::Answer { id: 1, result: Ok("{}".into()) },
        Message::CacheDigest(digest()),
        Message::Ping,
        Message::Log(1 << 90),
        Message::NoMember(detail),
        Message::Replicas(vec![ReplicaAddress { replica: ReplicaId(1), address: "127.0.0.1:7000".into() }; 3]),
    ];
    all.extend([
        order(CacheTask::Pin { version: 2, names: vec![block(1), block(2)] }),
        order(CacheTask::Evict { what: Evict::Prompt(vec![block(1)]), dry_run: true }),
        order(CacheTask::Evict { what: Evict::Owner(Owner(5)), dry_run: false }),
        order(CacheTask::Verify),
        report(CacheResult::Pinned { version: 2, pins: PinCount { held: 1, absent: 2, over: 0 } }),
        report(CacheResult::Evicted(EvictCount::default())),
        report(CacheResult::Verified(Verified { settled_seq: Some(4), damaged_names: vec![block(9)], ..Verified::default() })),
        report(CacheResult::Refused),
    ]);
    all
}

/// At least one of each command; in this order they build a state that has something of everything.
pub fn commands() -> Vec<Command> {
    let (tenant, api_key) = (String::from("acme"), ApiKeyDigest([7; 32]));
    let add = |id: u64| {
        let (name, address) = (format!("coordinator-{id}"), format!("127.0.0.1:{}", 7000 + id));
        Command::Members(MemberChange::Add { replica: ReplicaId(id), name, address })
    };
    let info = ReplicaInfo { http_address: "127.0.0.1:80".into(), quic_address: "127.0.0.1:81".into(), pid: 3, instance: 4 };
    let member = Member { name: "coordinator-1".into(), address: "127.0.0.1:7001".into(), log: Some(5) };
    let checksum = Checksum { method: 1, index: 3, sum: 9 };
    let pin =
        PolicyCommand::Pin { tenant: tenant.clone(), label: "p".into(), names: vec![block(1), block(2)], ttl_us: Some(1 << 30) };
    vec![
        Command::PutTenant { name: "default".into(), key: TenantKey([1; 32]) },
        Command::Join(join("prefill-1", Role::Prefill)),
        Command::Join(join("decode-1", Role::Decode)),
        Command::Join(join("decode-2", Role::Decode)),
        Command::Renew { elapsed_us: 500_000, nodes: vec![(NodeId(1), Epoch(1)), (NodeId(2), Epoch(2))] },
        Command::Deltas(vec![delta(), Delta { node: NodeId(2), epoch: Epoch(2), ..delta() }]),
        Command::Snapshot(page()),
        Command::Digests(vec![digest()]),
        Command::SetState { node: NodeId(2), state: NodeState::Cordoned },
        add(1),
        add(2),
        Command::Members(MemberChange::Promote { replica: ReplicaId(1) }),
        Command::Enroll { replica: ReplicaId(1), member },
        Command::Announce { replica: ReplicaId(1), info },
        Command::Checksum { replica: ReplicaId(1), checksum },
        Command::Members(MemberChange::Remove { replica: ReplicaId(2) }),
        Command::Policy(PolicyCommand::CreateTenant {
            name: tenant.clone(),
            key: TenantKey([2; 32]),
            api_key: Some(api_key),
            limits: Limits { running_max: 3, ..Limits::default() },
        }),
        Command::Policy(PolicyCommand::SetConfig { if_version: None, set: vec![("slo.ttft_ms".into(), Some(500))] }),
        Command::Policy(PolicyCommand::SetLimits { name: tenant.clone(), limits: Limits::default() }),
        Command::Policy(PolicyCommand::RotateKey { name: tenant.clone(), api_key: ApiKeyDigest([8; 32]), keep: true }),
        Command::Policy(pin),
        Command::Policy(PolicyCommand::Unpin { pin: 9 }),
        Command::Policy(PolicyCommand::DeleteTenant { name: "nobody".into() }),
        Command::MarkDead { node: NodeId(3), epoch: Epoch(3) },
        Command::Leave { node: NodeId(3), epoch: Epoch(3) },
    ]
}

/// The state after all of [`commands`].
pub fn cluster() -> Cluster {
    let mut cluster = Cluster::new();
    for command in commands() {
        cluster.apply(cluster.applied() + 1, &command);
    }
    cluster
}

/// Answers of each kind.
pub fn answers() -> Vec<Answer> {
    let mut cluster = Cluster::new();
    let mut all: Vec<Answer> = commands().iter().map(|command| cluster.apply(cluster.applied() + 1, command)).collect();
    all.extend([
        Answer::Refused("not so".into()),
        Answer::Renewed { expired: vec![NodeId(1)], stale: vec![NodeId(2)] },
        Answer::Deltas(vec![(NodeId(1), DeltaVerdict::Gap { last_seq: 4 }), (NodeId(2), DeltaVerdict::StaleEpoch)]),
        Answer::Snapshot(SnapshotVerdict::Restart),
        Answer::Digests(vec![DigestVerdict::Drifted, DigestVerdict::Same]),
    ]);
    all
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fmt::Debug;
    use std::path::Path;

    use super::*;

    /// The names of an enum's variants, out of its source.
    fn variants(file: &str, name: &str) -> BTreeSet<String> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/core/src").join(file);
        let source = std::fs::read_to_string(path).unwrap();
        let body = source.split(&format!("pub enum {name} {{\n")).nth(1).unwrap().split("\n}").next().unwrap();
        let own = body.lines().filter(|line| line.starts_with("    ") && line[4..].starts_with(char::is_uppercase));
        own.map(|line| first_word(line.trim())).collect()
    }

    fn first_word(text: &str) -> String {
        text.chars().take_while(|letter| letter.is_alphanumeric()).collect()
    }

    fn lacking(examples: &[impl Debug], file: &str, name: &str) -> Vec<String> {
        let there: BTreeSet<String> = examples.iter().map(|example| first_word(&format!("{example:?}"))).collect();
        let wanted = variants(file, name);
        assert!(wanted.len() > 3, "{name}: only {wanted:?} found");
        wanted.difference(&there).cloned().collect()
    }

    #[test]
    fn there_is_an_example_of_everything() {
        assert_eq!(lacking(&messages(), "message.rs", "Message"), Vec::<String>::new(), "add examples to `messages`");
        assert_eq!(lacking(&commands(), "cluster/command.rs", "Command"), Vec::<String>::new(), "add examples to `commands`");
        assert_eq!(lacking(&answers(), "cluster/command.rs", "Answer"), Vec::<String>::new(), "add examples to `answers`");
    }

    #[test]
    fn the_state_has_something_of_everything() {
        let cluster = cluster();
        cluster.check();
        assert_eq!((cluster.nodes().count(), cluster.members().count(), cluster.replicas().count()), (3, 1, 1));
        assert!(cluster.holders().blocks() > 0 && cluster.policy().pins().count() == 1 && cluster.policy().tenants().count() == 2);
    }
}
