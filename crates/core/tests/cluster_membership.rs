//! Joins, leases, fencing and snapshots of the replicated state, one rule a test.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use millrace_core::cluster::{
    Answer, Cluster, CodecError, Command, DeltaVerdict, LEASE_US, NodeState, SnapshotVerdict, decode, encode,
};
use millrace_core::ids::{BlockHash, Epoch, NodeId};
use millrace_core::layout::{KvDtype, KvLayout, KvParts};
use millrace_core::message::{BlockOp, DELTA_OPS_MAX, Delta, Join, ModelIdentity, Role, SnapshotPage};

/// A cluster and the next index of its log.
struct Log(Cluster, u64);

impl Log {
    fn new() -> Self {
        Self(Cluster::new(), 1)
    }

    fn apply(&mut self, command: Command) -> Answer {
        let answer = self.0.apply(self.1, &command);
        self.1 += 1;
        self.0.check();
        answer
    }

    fn join(&mut self, name: &str, instance: u128) -> (NodeId, Epoch) {
        match self.apply(Command::Join(join(name, instance))) {
            Answer::Joined { node, epoch } => (node, epoch),
            other => panic!("{other:?}"),
        }
    }

    fn refusal(&mut self, command: Command) -> String {
        let before = self.0.clone();
        match self.apply(command) {
            Answer::Refused(reason) => {
                assert_eq!(self.0.nodes().collect::<Vec<_>>(), before.nodes().collect::<Vec<_>>());
                reason
            }
            other => panic!("{other:?}"),
        }
    }

    fn stored(&mut self, (node, epoch): (NodeId, Epoch), base_seq: u64, block: u8) -> DeltaVerdict {
        let delta = Delta { node, epoch, base_seq, seq: base_seq + 1, ops: vec![BlockOp::Stored(BlockHash([block; 16]))] };
        match self.apply(Command::Deltas(vec![delta])) {
            Answer::Deltas(verdicts) => verdicts[0].1,
            other => panic!("{other:?}"),
        }
    }

    fn page(&mut self, (node, epoch): (NodeId, Epoch), seq: u64, page: u32, pages: u32, blocks: &[u8]) -> SnapshotVerdict {
        let blocks = blocks.iter().map(|b| BlockHash([*b; 16])).collect();
        match self.apply(Command::Snapshot(SnapshotPage { node, epoch, seq, page, pages, blocks })) {
            Answer::Snapshot(verdict) => verdict,
            other => panic!("{other:?}"),
        }
    }

    fn renew(&mut self, elapsed_us: u64, nodes: &[(NodeId, Epoch)]) -> (Vec<NodeId>, Vec<NodeId>) {
        match self.apply(Command::Renew { elapsed_us, nodes: nodes.to_vec() }) {
            Answer::Renewed { expired, stale } => (expired, stale),
            other => panic!("{other:?}"),
        }
    }

    fn blocks(&self, node: NodeId) -> u64 {
        self.0.holders().tally(node).map_or(0, |tally| tally.blocks)
    }
}

fn join(name: &str, instance: u128) -> Join {
    let layout =
        KvLayout { layers: 2, parts: KvParts::KeysValues, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype: KvDtype::F32 };
    let model = ModelIdentity { name: "tiny".into(), weights: [1; 32], tokenizer: [2; 32], layout };
    Join { name: name.into(), role: Role::Prefill, address: "127.0.0.1:9".into(), instance, pid: 1, model, slots: 8 }
}

#[test]
fn a_new_incarnation_fences_the_old_one_and_a_repeat_does_not() {
    let mut log = Log::new();
    let old = log.join("p1", 10);
    assert_eq!(log.stored(old, 0, 1), DeltaVerdict::Applied { seq: 1 });
    assert_eq!(log.join("p1", 10), old, "the answer was lost: same incarnation");
    assert_eq!(log.blocks(old.0), 1);
    let new = log.join("p1", 11);
    assert_eq!(new.0, old.0, "the number stays with the name");
    assert!(new.1 > old.1);
    assert_eq!(log.blocks(new.0), 0, "the old incarnation's blocks are gone");
    assert_eq!(log.stored(old, 1, 2), DeltaVerdict::StaleEpoch);
    assert_eq!(log.stored(new, 0, 2), DeltaVerdict::Applied { seq: 1 });
    assert!(log.refusal(Command::Leave { node: old.0, epoch: old.1 }).contains("not current"));
    assert!(log.refusal(Command::MarkDead { node: old.0, epoch: old.1 }).contains("not current"));
    assert_eq!(log.apply(Command::Leave { node: new.0, epoch: new.1 }), Answer::Done);
    assert_eq!(log.apply(Command::MarkDead { node: new.0, epoch: new.1 }), Answer::Done);
    assert_eq!(log.0.node(new.0).unwrap().state, NodeState::Left, "the first reason stands");
    let again = log.join("p1", 11);
    assert!(again.1 > new.1, "the same process, after it left, is a new incarnation");
}

#[test]
fn refusals_name_the_reason() {
    let mut log = Log::new();
    log.join("p1", 1);
    let with = |change: &dyn Fn(&mut Join)| {
        let mut join = join("p2", 2);
        change(&mut join);
        Command::Join(join)
    };
    assert!(log.refusal(with(&|j| j.model.weights[0] = 9)).contains("weights"));
    assert!(log.refusal(with(&|j| j.model.layout.block_tokens = 32)).contains("block_tokens"));
    assert!(log.refusal(with(&|j| j.role = Role::Coordinator)).contains("coordinator"));
    assert!(log.refusal(with(&|j| j.name.clear())).contains("name is empty"));
    assert!(log.refusal(with(&|j| j.address = "x".repeat(300))).contains("300 bytes"));
    let mut other_role = join("p1", 3);
    other_role.role = Role::Decode;
    assert!(log.refusal(Command::Join(other_role)).contains("belongs to a prefill node"));
    assert!(log.refusal(Command::MarkDead { node: NodeId(9), epoch: Epoch(1) }).contains("no node 9"));
}

#[test]
fn the_last_node_may_come_back_with_another_model() {
    let mut log = Log::new();
    log.join("p1", 1);
    let mut other = join("p1", 2);
    other.model.weights = [7; 32];
    assert!(matches!(log.apply(Command::Join(other.clone())), Answer::Joined { .. }));
    assert_eq!(log.0.model().unwrap().weights, [7; 32]);
    assert!(log.refusal(Command::Join(join("p2", 3))).contains("weights"));
}

#[test]
fn leases_end_by_log_time_only_and_never_in_one_leap() {
    let mut log = Log::new();
    let (a, b) = (log.join("a", 1), log.join("b", 2));
    log.stored(b, 0, 1);
    assert_eq!(log.renew(u64::MAX, &[]), (vec![], vec![]), "one entry adds a third of a lease at most");
    assert_eq!(log.0.now_us(), LEASE_US / 3);
    assert_eq!(log.renew(LEASE_US / 3, &[a]).0, vec![]);
    assert_eq!(log.renew(LEASE_US / 3 - 1, &[a, (NodeId(7), Epoch(1))]), (vec![], vec![NodeId(7)]));
    assert_eq!(log.blocks(b.0), 1);
    assert_eq!(log.renew(1, &[]), (vec![b.0], vec![]));
    assert_eq!(log.0.node(b.0).unwrap().state, NodeState::Dead);
    assert_eq!(log.0.node(a.0).unwrap().state, NodeState::Up);
    assert_eq!(log.blocks(b.0), 0);
    assert!(log.0.holders().of(&BlockHash([1; 16])).is_empty());
    assert_eq!(log.renew(0, &[b]).1, vec![b.0], "dead is dead: it must join again");
    assert_eq!(log.stored(b, 1, 2), DeltaVerdict::StaleEpoch);
    assert!(log.0.peer(b.0).is_none() && log.0.current(b.0, b.1).is_none());
}

#[test]
fn a_cordon_survives_the_process_and_a_drain_does_not() {
    let mut log = Log::new();
    let (node, epoch) = log.join("a", 1);
    let set = |state| Command::SetState { node, state };
    log.apply(set(NodeState::Draining));
    assert!(!log.0.node(node).unwrap().state.usable());
    log.join("a", 2);
    assert_eq!(log.0.node(node).unwrap().state, NodeState::Up);
    log.apply(set(NodeState::Cordoned));
    let (_, epoch) = log.join("a", epoch.0.into());
    assert_eq!(log.0.node(node).unwrap().state, NodeState::Cordoned);
    assert!(log.refusal(set(NodeState::Dead)).contains("nobody"));
    assert_eq!(log.apply(set(NodeState::Up)), Answer::Done);
    log.apply(Command::MarkDead { node, epoch });
    assert!(log.refusal(set(NodeState::Up)).contains("dead"));
    log.join("a", 4);
    assert_eq!(log.0.node(node).unwrap().state, NodeState::Up);
}

#[test]
fn a_gap_is_healed_by_a_snapshot_in_pages() {
    let mut log = Log::new();
    let a = log.join("a", 1);
    assert_eq!(log.stored(a, 0, 1), DeltaVerdict::Applied { seq: 1 });
    assert_eq!(log.stored(a, 5, 2), DeltaVerdict::Gap { last_seq: 1 });
    assert_eq!(log.page(a, 6, 0, 3, &[1, 2]), SnapshotVerdict::Wanted { page: 1 });
    assert_eq!(log.page(a, 6, 1, 3, &[3]), SnapshotVerdict::Wanted { page: 2 });
    assert_eq!(log.page(a, 6, 1, 3, &[3]), SnapshotVerdict::Wanted { page: 2 }, "a repeat changes nothing");
    assert_eq!(log.blocks(a.0), 1, "not before the last page");
    assert_eq!(log.page(a, 6, 2, 3, &[4, 1]), SnapshotVerdict::Applied { seq: 6 });
    assert_eq!(log.blocks(a.0), 4);
    assert_eq!(log.stored(a, 6, 9), DeltaVerdict::Applied { seq: 7 });
    assert_eq!(log.page(a, 6, 0, 1, &[]), SnapshotVerdict::Applied { seq: 7 }, "a delta overtook it");
    assert_eq!(log.blocks(a.0), 5);
}

#[test]
fn pages_out_of_order_start_again() {
    let mut log = Log::new();
    let a = log.join("a", 1);
    assert_eq!(log.page(a, 3, 1, 3, &[1]), SnapshotVerdict::Restart);
    assert_eq!(log.page(a, 3, 0, 3, &[1]), SnapshotVerdict::Wanted { page: 1 });
    assert_eq!(log.page(a, 3, 2, 3, &[2]), SnapshotVerdict::Restart);
    assert_eq!(log.page(a, 3, 1, 3, &[2]), SnapshotVerdict::Restart, "what was assembled is dropped");
    assert_eq!(log.page(a, 3, 0, 2, &[1]), SnapshotVerdict::Wanted { page: 1 });
    assert_eq!(log.page(a, 4, 1, 2, &[2]), SnapshotVerdict::Restart, "a page of another snapshot");
    assert_eq!(log.page(a, 4, 0, 2, &[1]), SnapshotVerdict::Wanted { page: 1 });
    assert_eq!(log.page(a, 4, 0, 1, &[5]), SnapshotVerdict::Applied { seq: 4 }, "page 0 always begins anew");
    assert_eq!(log.blocks(a.0), 1);
    assert_eq!(log.page((a.0, Epoch(99)), 5, 0, 1, &[]), SnapshotVerdict::StaleEpoch);
    assert_eq!(log.page(a, 5, 0, 0, &[]), SnapshotVerdict::Restart);
}

#[test]
fn no_snapshot_is_assembled_from_two_incarnations() {
    let mut log = Log::new();
    let old = log.join("a", 1);
    assert_eq!(log.page(old, 3, 0, 2, &[1]), SnapshotVerdict::Wanted { page: 1 });
    let new = log.join("a", 2);
    assert_eq!(log.page(old, 3, 1, 2, &[2]), SnapshotVerdict::StaleEpoch);
    assert_eq!(log.page(new, 3, 1, 2, &[2]), SnapshotVerdict::Restart);
    assert_eq!(log.blocks(new.0), 0);
}

#[test]
fn oversized_commands_are_refused_by_name() {
    let ops = vec![BlockOp::Stored(BlockHash([1; 16])); DELTA_OPS_MAX + 1];
    let delta = |ops| Delta { node: NodeId(1), epoch: Epoch(1), base_seq: 0, seq: 1, ops };
    let too_many = decode(&encode(&Command::Deltas(vec![delta(ops)])));
    assert!(matches!(too_many, Err(CodecError::TooMany { what: "operations in a delta", .. })));
    let full = delta(vec![BlockOp::Stored(BlockHash([1; 16])); DELTA_OPS_MAX]);
    assert!(decode(&encode(&Command::Deltas(vec![full.clone(); 16]))).is_ok());
    let too_many = decode(&encode(&Command::Deltas(vec![full; 17])));
    assert!(matches!(too_many, Err(CodecError::TooMany { what: "operations", .. })));
    assert_eq!(decode(&[]), Err(CodecError::Version { got: None }));
    assert_eq!(decode(&[9, 0, 0]), Err(CodecError::Version { got: Some(9) }));
}
