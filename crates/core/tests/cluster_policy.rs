//! Settings, tenants and pins as the log changes them: who may speak for whom, what bounds hold, and that nothing is lost in a snapshot.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use millrace_core::cluster::{
    API_KEYS_MAX, Answer, ApiKeyDigest, Cluster, Command, Limits, PIN_BLOCKS_MAX, PINS_MAX, PolicyAnswer, PolicyCommand,
    PolicyError,
};
use millrace_core::identity::TenantKey;
use millrace_core::ids::BlockHash;
use millrace_core::layout::{KvDtype, KvLayout, KvParts};
use millrace_core::message::{Join, ModelIdentity, Role};

struct Log {
    cluster: Cluster,
    index: u64,
}

impl Log {
    fn new() -> Self {
        let mut log = Self { cluster: Cluster::new(), index: 0 };
        log.entry(&Command::PutTenant { name: "default".into(), key: TenantKey([1; 32]) });
        log
    }

    fn entry(&mut self, command: &Command) -> Answer {
        self.index += 1;
        let answer = self.cluster.apply(self.index, command);
        self.cluster.check();
        let copy = Cluster::restore(&self.cluster.snapshot()).unwrap();
        assert_eq!(copy.snapshot(), self.cluster.snapshot());
        assert_eq!(copy.policy().pins_version(), self.cluster.policy().pins_version());
        answer
    }

    fn policy(&mut self, command: PolicyCommand) -> Result<PolicyAnswer, PolicyError> {
        match self.entry(&Command::Policy(command)) {
            Answer::Policy(PolicyAnswer::Refused(error)) => Err(error),
            Answer::Policy(answer) => Ok(answer),
            other => panic!("{other:?}"),
        }
    }

    fn create(&mut self, name: &str, api_key: &str) -> Result<PolicyAnswer, PolicyError> {
        let (key, api_key) = (TenantKey([self.index as u8; 32]), Some(ApiKeyDigest::of(api_key)));
        self.policy(PolicyCommand::CreateTenant { name: name.into(), key, api_key, limits: Limits::default() })
    }

    fn rotate(&mut self, name: &str, api_key: &str, keep: bool) -> Result<PolicyAnswer, PolicyError> {
        self.policy(PolicyCommand::RotateKey { name: name.into(), api_key: ApiKeyDigest::of(api_key), keep })
    }

    fn whose(&self, api_key: &str) -> Option<String> {
        self.cluster.policy().tenant_of(&ApiKeyDigest::of(api_key)).map(|(name, _)| name.to_owned())
    }

    fn pin(&mut self, tenant: &str, first: u32, blocks: usize, ttl_us: Option<u64>) -> Result<u64, PolicyError> {
        let names = (first..).take(blocks).map(block).collect();
        match self.policy(PolicyCommand::Pin { tenant: tenant.into(), label: "l".into(), names, ttl_us })? {
            PolicyAnswer::Pinned { pin } => Ok(pin),
            other => panic!("{other:?}"),
        }
    }

    fn join(&mut self, name: &str, slots: u32) {
        let layout =
            KvLayout { layers: 1, parts: KvParts::KeysValues, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype: KvDtype::F32 };
        let model = ModelIdentity { name: "m".into(), weights: [0; 32], tokenizer: [0; 32], layout };
        let (role, address) = (Role::Decode, "a".into());
        let join = Join { name: name.into(), role, address, instance: 1, pid: 1, model, slots };
        assert!(matches!(self.entry(&Command::Join(join)), Answer::Joined { .. }));
    }
}

fn block(n: u32) -> BlockHash {
    let mut name = [0; 16];
    name[..4].copy_from_slice(&n.to_le_bytes());
    BlockHash(name)
}

#[test]
fn keys_speak_for_their_tenant_until_they_are_rotated_or_it_is_deleted() {
    let mut log = Log::new();
    log.create("acme", "k1").unwrap();
    assert_eq!((log.whose("k1").as_deref(), log.whose("k2")), (Some("acme"), None));
    log.create("acme", "k1").expect("the same again is a repeat whose answer was lost");
    assert!(matches!(log.create("acme", "k2"), Err(PolicyError::Conflict(_))));
    assert!(matches!(log.create("other", "k1"), Err(PolicyError::Conflict(_))), "a key speaks for one tenant");
    log.rotate("acme", "k2", true).unwrap();
    log.rotate("acme", "k2", false).expect("a repeat");
    assert_eq!((log.whose("k1").as_deref(), log.whose("k2").as_deref()), (Some("acme"), Some("acme")));
    log.rotate("acme", "k3", false).unwrap();
    assert_eq!((log.whose("k1"), log.whose("k2"), log.whose("k3").as_deref()), (None, None, Some("acme")));
    (0..2 * API_KEYS_MAX).for_each(|i| drop(log.rotate("acme", &format!("n{i}"), true).unwrap()));
    let valid = (0..2 * API_KEYS_MAX).filter(|i| log.whose(&format!("n{i}")).is_some()).count();
    assert_eq!((valid, log.whose("n7").as_deref(), log.whose("k3")), (API_KEYS_MAX, Some("acme"), None));
    let key = *log.cluster.tenant("acme").unwrap();
    log.policy(PolicyCommand::DeleteTenant { name: "acme".into() }).unwrap();
    assert_eq!((log.whose("n7"), log.cluster.tenant("acme")), (None, None));
    log.create("acme", "k1").unwrap();
    assert!(*log.cluster.tenant("acme").unwrap() != key, "a new tenant of an old name names other blocks");
}

#[test]
fn senseless_changes_of_tenants_are_refused() {
    let mut log = Log::new();
    let mut refused = |command| log.policy(command).unwrap_err();
    let create = |name: &str| PolicyCommand::CreateTenant {
        name: name.into(),
        key: TenantKey([0; 32]),
        api_key: None,
        limits: Limits::default(),
    };
    for name in ["", "Acme", "a b", "a/b", &"x".repeat(64)] {
        assert!(matches!(refused(create(name)), PolicyError::Invalid(_)), "{name:?}");
    }
    assert!(matches!(refused(create("default")), PolicyError::Conflict(_)));
    assert!(matches!(refused(PolicyCommand::DeleteTenant { name: "default".into() }), PolicyError::Invalid(_)));
    let limits = Limits { running_max: 1, ..Limits::default() };
    assert!(matches!(refused(PolicyCommand::SetLimits { name: "x".into(), limits }), PolicyError::NotFound(_)));
    log.policy(PolicyCommand::SetLimits { name: "default".into(), limits }).unwrap();
    assert_eq!(log.cluster.policy().tenant("default").unwrap().limits, limits);
}

#[test]
fn settings_are_replicated_with_their_version() {
    let mut log = Log::new();
    let set = |if_version, value| PolicyCommand::SetConfig { if_version, set: vec![("slo.ttft_ms".into(), Some(value))] };
    let PolicyAnswer::Config { version, changes } = log.policy(set(Some(0), 700)).unwrap() else { panic!("settings") };
    assert_eq!((version, changes[0].old, changes[0].new), (1, 0, 700));
    assert!(matches!(log.policy(set(Some(0), 800)), Err(PolicyError::Conflict(_))));
    assert!(matches!(log.policy(set(None, 1 << 40)), Err(PolicyError::Invalid(_))));
    assert_eq!(log.cluster.config().slo().unwrap().ttft_us, 700_000);
    let copy = Cluster::restore(&log.cluster.snapshot()).unwrap();
    assert_eq!(copy.config(), log.cluster.config());
}

#[test]
fn pins_are_bounded_by_the_smallest_pool_and_end_with_their_time_and_their_tenant() {
    let mut log = Log::new();
    log.join("large", 1000);
    log.join("small", 20);
    assert!(matches!(log.pin("default", 0, 11, None), Err(PolicyError::Full(_))), "half of 20 slots");
    let first = log.pin("default", 0, 6, None).unwrap();
    assert!(matches!(log.pin("default", 100, 5, None), Err(PolicyError::Full(_))));
    let longer = log.pin("default", 0, 10, None).unwrap();
    assert_eq!(log.cluster.policy().pinned_names(), (0..10).map(block).collect::<Vec<_>>(), "shared blocks count once");
    let version = log.cluster.policy().pins_version();
    assert_eq!(log.pin("default", 0, 6, None).unwrap(), first, "the same blocks are the same pin");
    assert_eq!(log.cluster.policy().pins_version(), version);
    log.policy(PolicyCommand::Unpin { pin: longer }).unwrap();
    assert!(matches!(log.policy(PolicyCommand::Unpin { pin: longer }), Err(PolicyError::NotFound(_))));
    log.create("acme", "k").unwrap();
    log.pin("acme", 50, 2, None).unwrap();
    log.pin("default", 60, 2, Some(1_500_000)).unwrap();
    let nodes: Vec<_> = log.cluster.nodes().map(|n| (n.node, n.epoch)).collect();
    log.entry(&Command::Renew { elapsed_us: 1_000_000, nodes: nodes.clone() });
    assert_eq!(log.cluster.policy().pinned_names().len(), 10);
    log.entry(&Command::Renew { elapsed_us: 500_000, nodes });
    assert_eq!(log.cluster.policy().pinned_names().len(), 8, "its time is over");
    log.policy(PolicyCommand::DeleteTenant { name: "acme".into() }).unwrap();
    assert_eq!(log.cluster.policy().pinned_names(), (0..6).map(block).collect::<Vec<_>>());
}

#[test]
fn pins_without_sense_or_over_a_bound_are_refused() {
    let mut log = Log::new();
    assert!(matches!(log.pin("nobody", 0, 1, None), Err(PolicyError::NotFound(_))));
    assert!(matches!(log.pin("default", 0, 0, None), Err(PolicyError::Invalid(_))));
    assert!(matches!(log.pin("default", 0, PIN_BLOCKS_MAX + 1, None), Err(PolicyError::Full(_))));
    let mut cluster = Cluster::new();
    cluster.apply(1, &Command::PutTenant { name: "default".into(), key: TenantKey([1; 32]) });
    for i in 0..=PINS_MAX as u32 {
        let pin = PolicyCommand::Pin { tenant: "default".into(), label: String::new(), names: vec![block(i)], ttl_us: None };
        let answer = cluster.apply(u64::from(i) + 2, &Command::Policy(pin));
        let full = matches!(answer, Answer::Policy(PolicyAnswer::Refused(PolicyError::Full(_))));
        assert_eq!(full, i == PINS_MAX as u32);
    }
    cluster.check();
}
