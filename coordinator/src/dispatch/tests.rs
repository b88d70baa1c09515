//! The dispatcher over an applied state and fake nodes at the other end of a channel.

use std::time::Duration;

use millrace_core::cluster::{Answer, Command, Limits, PolicyCommand};
use millrace_core::identity::TenantKey;
use millrace_core::ids::{AttemptId, Epoch};
use millrace_core::layout::{KvDtype, KvLayout, KvParts};
use millrace_core::message::{Finish, Join, Load, Message, PrefillStats, Role, Ticket};
use millrace_core::sampling::Sampling;

use super::decisions::Outcome;
use super::*;
use crate::nodes::{LinkId, Outbox};

/// A node whose process is the test.
struct Fake {
    who: (NodeId, Epoch),
    name: String,
    instance: u128,
    link: LinkId,
    sent: mpsc::UnboundedReceiver<Message>,
}

struct World {
    cluster: SharedCluster,
    nodes: Arc<Nodes>,
    dispatcher: Dispatcher,
    _raft: watch::Sender<RaftStatus>,
    applied: u64,
}

fn model() -> ModelIdentity {
    let layout =
        KvLayout { layers: 2, parts: KvParts::KeysValues, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype: KvDtype::F32 };
    ModelIdentity { name: "m".into(), weights: [1; 32], tokenizer: [2; 32], layout }
}

fn status() -> RaftStatus {
    RaftStatus {
        id: 1,
        term: 1,
        role: millrace_log::Role::Leader,
        leader: Some(1),
        applied: 0,
        committed: 0,
        last_index: 0,
        first_index: 1,
        snapshot_index: 0,
        members: Arc::default(),
        members_index: 0,
        peers: Arc::default(),
        log: 0,
        frames_refused: 0,
        sends_dropped: 0,
        disk_full: false,
        failure: None,
    }
}

impl World {
    fn new() -> Self {
        let (cluster, nodes) = (SharedCluster::default(), Arc::new(Nodes::default()));
        let (raft, watched) = watch::channel(status());
        let dispatcher = Dispatcher::new(ReplicaId(1), model(), cluster.clone(), nodes.clone(), watched);
        let mut world = Self { cluster, nodes, dispatcher, _raft: raft, applied: 0 };
        world.apply(&Command::PutTenant { name: DEFAULT_TENANT.into(), key: TenantKey([5; 32]) });
        world
    }

    fn apply(&mut self, command: &Command) -> Answer {
        self.applied += 1;
        self.cluster.write().apply(self.applied, command)
    }

    fn join(&mut self, name: &str, role: Role, instance: u128) -> Fake {
        let address = "127.0.0.1:9".into();
        let join = Join { name: name.into(), role, address, instance, pid: 1, model: model(), slots: 100 };
        let Answer::Joined { node, epoch } = self.apply(&Command::Join(join)) else { panic!("joined") };
        let (sender, sent) = mpsc::unbounded_channel();
        let outbox: Outbox = Arc::new(move |m| sender.send(m).is_ok());
        let link = self.link(name, instance, (node, epoch), outbox);
        Fake { who: (node, epoch), name: name.into(), instance, link, sent }
    }

    fn link(&self, name: &str, instance: u128, who: (NodeId, Epoch), outbox: Outbox) -> LinkId {
        let link = self.nodes.attach(Instant::now(), name, instance, outbox);
        let load = Load { free_blocks: 100, total_blocks: 100, ..Load::default() };
        self.nodes.heartbeat(Instant::now(), name, link, who, load);
        // Heard from in an hour: no pause of the test makes it silent.
        self.nodes.heard(Instant::now() + Duration::from_secs(3600), name, link);
        self.nodes.answered(Instant::now() + Duration::from_secs(3600), name, link);
        link
    }

    /// The node's process has another link.
    fn relink(&self, fake: &mut Fake, outbox: Outbox) {
        fake.link = self.link(&fake.name, fake.instance, fake.who, outbox);
    }
}

impl Fake {
    async fn ticket(&mut self) -> Ticket {
        match self.sent.recv().await {
            Some(Message::Assign(ticket)) => ticket,
            other => panic!("{other:?}"),
        }
    }
}

fn prompt(tokens: u32) -> Prompt {
    Prompt {
        tokens: (0..tokens).collect(),
        sampling: Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 1, max_new: 4, eos: vec![], ignore_eos: false },
        tenant: DEFAULT_TENANT.into(),
        cache_salt: vec![],
        answer: None,
        budget: Duration::from_secs(60),
        ttft_max: None,
        trace: [0; 25],
    }
}

fn out(attempt: AttemptId, index: u32, last: bool) -> TokenOut {
    let finish = last.then_some(Finish::Length);
    TokenOut { attempt, index, token: 50 + index, logprob: 0.0, prefill: None, finish }
}

async fn tokens(running: &mut Running) -> Vec<u32> {
    let mut indices = Vec::new();
    while let Some(event) = running.next().await {
        match event {
            Event::Token { index, token, .. } => {
                assert_eq!(token, 50 + index);
                indices.push(index);
            }
            Event::Prefilled(_) => assert!(indices.is_empty(), "what the prompt took is known before the first token"),
            Event::Finished { .. } => return indices,
            Event::Failed { kind, detail } => panic!("{kind:?}: {detail}"),
        }
    }
    panic!("no end")
}

#[tokio::test]
async fn an_answer_flows_and_leaves_nothing_behind() {
    let mut world = World::new();
    assert!(world.dispatcher.ready().is_err());
    assert!(matches!(world.dispatcher.submit(prompt(20)), Err(SubmitError::NoNodes { .. })));
    let mut node = world.join("decode-0", Role::Decode, 1);
    world.dispatcher.ready().unwrap();
    let mut running = world.dispatcher.submit(prompt(20)).unwrap();
    let ticket = node.ticket().await;
    assert_eq!((ticket.prompt_tokens, ticket.tokens.len(), ticket.delivered()), (20, 20, 0));
    assert_eq!((ticket.attempt.request, ticket.decode), (running.id(), None));
    for index in 0..4 {
        world.dispatcher.token(node.who.0, out(ticket.attempt, index, index == 3));
    }
    assert_eq!(tokens(&mut running).await, [0, 1, 2, 3]);
    assert_eq!(running.next().await, None);
    assert_eq!(world.dispatcher.running(), 0);
    assert!(node.sent.try_recv().is_err(), "an answer that is whole needs no cancel");
}

#[tokio::test]
async fn a_lost_link_moves_the_request_to_another_node() {
    let mut world = World::new();
    let mut fakes = [world.join("decode-0", Role::Decode, 1), world.join("decode-1", Role::Decode, 2)];
    let mut running = world.dispatcher.submit(prompt(20)).unwrap();
    let first = fakes.iter_mut().position(|f| matches!(f.sent.try_recv(), Ok(Message::Assign(_)))).unwrap();
    let (lost, other) = (fakes[first].name.clone(), 1 - first);
    let attempt = AttemptId { request: running.id(), attempt: 0 };
    world.dispatcher.token(fakes[first].who.0, out(attempt, 0, false));
    world.dispatcher.token(fakes[first].who.0, out(attempt, 1, false));
    assert!(matches!(running.next().await, Some(Event::Token { index: 0, .. })));
    assert!(matches!(running.next().await, Some(Event::Token { index: 1, .. })));
    world.nodes.detach(&lost, fakes[first].link);
    let ticket = fakes[other].ticket().await;
    assert_eq!((ticket.attempt.attempt, ticket.delivered()), (1, 2));
    assert_eq!(ticket.tokens[20..], [50, 51]);
    for index in 2..4 {
        world.dispatcher.token(fakes[other].who.0, out(ticket.attempt, index, index == 3));
    }
    assert_eq!(tokens(&mut running).await, [2, 3]);
}

#[tokio::test]
async fn tickets_that_cannot_be_sent_are_no_failed_attempts() {
    let mut world = World::new();
    let mut fakes: Vec<Fake> = (0..8).map(|n| world.join(&format!("decode-{n}"), Role::Decode, n)).collect();
    // A replica that stood still: its nodes have ended their links, and it has not read that yet.
    fakes.iter_mut().for_each(|fake| world.relink(fake, Arc::new(|_| false)));
    let mut running = world.dispatcher.submit(prompt(20)).unwrap();
    let linked = |world: &World, fake: &Fake| world.nodes.seen(Instant::now(), &fake.name, fake.who.1).unwrap().linked;
    while fakes.iter().filter(|fake| linked(&world, fake)).count() > 1 {
        world.dispatcher.submit(prompt(20)).unwrap();
    }
    assert!(matches!(world.dispatcher.submit(prompt(20)), Err(SubmitError::NoNodes { .. })), "that was the last");
    let (sender, sent) = mpsc::unbounded_channel();
    fakes[0].sent = sent;
    world.relink(&mut fakes[0], Arc::new(move |m| sender.send(m).is_ok()));
    let attempt = AttemptId { request: running.id(), attempt: 0 };
    while fakes[0].ticket().await.attempt != attempt {}
    (0..4).for_each(|index| world.dispatcher.token(fakes[0].who.0, out(attempt, index, index == 3)));
    assert_eq!(tokens(&mut running).await, [0, 1, 2, 3]);
}

#[tokio::test]
async fn a_new_incarnation_is_another_node() {
    let mut world = World::new();
    let mut old = world.join("decode-0", Role::Decode, 1);
    let _running = world.dispatcher.submit(prompt(20)).unwrap();
    old.ticket().await;
    let mut new = world.join("decode-0", Role::Decode, 2);
    assert_eq!(new.ticket().await.attempt.attempt, 1);
    assert!(matches!(old.sent.recv().await, Some(Message::Cancel(_))));
}

#[tokio::test]
async fn a_client_that_leaves_cancels() {
    let mut world = World::new();
    let mut node = world.join("decode-0", Role::Decode, 1);
    let running = world.dispatcher.submit(prompt(20)).unwrap();
    let ticket = node.ticket().await;
    drop(running);
    assert_eq!(node.sent.recv().await, Some(Message::Cancel(ticket.attempt)));
}

#[tokio::test]
async fn a_stopping_replica_ends_its_requests() {
    let mut world = World::new();
    let _node = world.join("decode-0", Role::Decode, 1);
    let mut running = world.dispatcher.submit(prompt(20)).unwrap();
    world.dispatcher.stop();
    assert!(matches!(running.next().await, Some(Event::Failed { kind: FailureKind::Stopping, .. })));
    assert!(matches!(world.dispatcher.submit(prompt(20)), Err(SubmitError::NotReady(_))));
}

#[tokio::test]
async fn senseless_requests_are_refused() {
    let mut world = World::new();
    let _node = world.join("decode-0", Role::Decode, 1);
    let submit = |change: fn(&mut Prompt)| {
        let mut prompt = prompt(20);
        change(&mut prompt);
        world.dispatcher.submit(prompt).map(|_| ()).unwrap_err()
    };
    assert!(matches!(submit(|p| p.tokens.clear()), SubmitError::Invalid(_)));
    assert!(matches!(submit(|p| p.sampling.max_new = 0), SubmitError::Invalid(_)));
    assert!(matches!(submit(|p| p.cache_salt = vec![0; 257]), SubmitError::Invalid(_)));
    assert!(matches!(submit(|p| p.sampling.max_new = u32::MAX), SubmitError::TooLong { .. }));
    assert_eq!(submit(|p| p.tokens = vec![1; 1600]), SubmitError::TooLong { tokens: 1604, max: 1600 });
    assert!(matches!(submit(|p| p.tenant = "nobody".into()), SubmitError::NotReady(_)));
    assert_eq!(world.dispatcher.running(), 0);
}

#[tokio::test]
async fn what_is_in_flight_counts_before_a_heartbeat_shows_it() {
    let mut world = World::new();
    let mut fakes = [world.join("decode-0", Role::Decode, 1), world.join("decode-1", Role::Decode, 2)];
    let running: Vec<Running> = (0..8).map(|_| world.dispatcher.submit(prompt(64)).unwrap()).collect();
    let counts = fakes.each_mut().map(|f| std::iter::from_fn(|| f.sent.try_recv().ok()).count());
    assert_eq!(counts, [4, 4], "{} requests spread evenly", running.len());
}

/// A node that has measured a millisecond a token, with so many tokens queued.
fn loaded(world: &World, fake: &Fake, queued_tokens: u64) {
    let load = Load { free_blocks: 100, total_blocks: 100, queued_tokens, prefill_ns_per_token: 1_000_000, ..Load::default() };
    world.nodes.heartbeat(Instant::now() + Duration::from_secs(3600), &fake.name, fake.link, fake.who, load);
}

#[tokio::test]
async fn a_decision_is_kept_with_what_came_of_it_and_corrects_the_next() {
    let mut world = World::new();
    let mut node = world.join("decode-0", Role::Decode, 1);
    loaded(&world, &node, 0);
    let mut running = world.dispatcher.submit(prompt(64)).unwrap();
    let attempt = node.ticket().await.attempt;
    let made = world.dispatcher.decisions().list(0, 9, None);
    let decision = made[0].placed.as_ref().unwrap();
    assert_eq!((made.len(), made[0].attempt, made[0].tokens, made[0].observed.outcome), (1, attempt, 64, None));
    assert_eq!((decision.prefill, decision.cost.prefill_us), (node.who.0, 64_000));
    let stats = PrefillStats { node: "decode-0".into(), cached_tokens: 16, queue_us: 5, compute_us: 144_000 };
    world.dispatcher.token(NodeId(77), TokenOut { prefill: Some(stats.clone()), ..out(attempt, 0, false) }); // a stranger's word
    world.dispatcher.token(node.who.0, TokenOut { prefill: Some(stats), ..out(attempt, 0, false) });
    (1..4).for_each(|index| world.dispatcher.token(node.who.0, out(attempt, index, index == 3)));
    assert_eq!(tokens(&mut running).await, [0, 1, 2, 3]);
    let seen = world.dispatcher.decisions().list(0, 9, Some(running.id()))[0].observed;
    assert_eq!((seen.outcome, seen.cached_tokens, seen.compute_us, seen.tokens), (Some(Outcome::Done), Some(16), Some(144_000), 4));
    let counts = world.dispatcher.beliefs();
    assert_eq!((counts.prefill_belief, counts.prefill_found, counts.decode_belief), (0, 1, 0));
    // 48 tokens were to take 48 ms and took three times as long: the next prediction is higher by an eighth of that.
    let correction = world.dispatcher.correction(node.who.0, node.who.1).prefill.in_1024ths();
    assert!((1200..1350).contains(&correction), "{correction}");
    let explained = world.dispatcher.explain(DEFAULT_TENANT, &[1; 64], 4).unwrap();
    assert!(explained.decision.unwrap().cost.prefill_us > 75_000);
}

#[tokio::test]
async fn an_attempt_that_moves_or_is_dropped_says_so() {
    let mut world = World::new();
    let mut old = world.join("decode-0", Role::Decode, 1);
    let running = world.dispatcher.submit(prompt(20)).unwrap();
    old.ticket().await;
    let mut new = world.join("decode-0", Role::Decode, 2);
    new.ticket().await;
    let id = running.id();
    let outcomes = || -> Vec<_> { world.dispatcher.decisions().list(0, 9, Some(id)).iter().map(|r| r.observed.outcome).collect() };
    assert_eq!(outcomes(), [Some(Outcome::Moved), None]);
    drop(running);
    assert!(matches!(new.sent.recv().await, Some(Message::Cancel(_))));
    while world.dispatcher.running() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(outcomes(), [Some(Outcome::Moved), Some(Outcome::Dropped)]);
}

#[tokio::test]
async fn a_miss_of_the_objective_is_refused_in_time_and_with_the_time_to_wait() {
    let mut world = World::new();
    let node = world.join("decode-0", Role::Decode, 1);
    loaded(&world, &node, 3_400);
    let wish = |ms| Prompt { ttft_max: Some(Duration::from_millis(ms)), ..prompt(100) };
    let refused = world.dispatcher.submit(wish(500)).unwrap_err();
    assert_eq!(refused, SubmitError::TooLate { ttft_us: 3_500_000, tpot_us: 21_000, retry_after_s: 3 });
    assert!(world.dispatcher.submit(wish(3_500)).is_ok());
    assert!(world.dispatcher.submit(wish(50)).is_ok(), "no idle node could do it: to wait would not help");
    let record = &world.dispatcher.decisions().list(0, 9, None)[0];
    assert!(matches!(record.placed, Err(NoPlace::Overloaded { .. })), "a refusal is a decision too");
    let set = vec![("slo.ttft_ms".to_owned(), Some(1_000))];
    world.apply(&Command::Policy(PolicyCommand::SetConfig { if_version: None, set }));
    assert!(matches!(world.dispatcher.submit(prompt(100)), Err(SubmitError::TooLate { .. })), "the cluster's objective");
    assert!(world.dispatcher.submit(wish(5_000)).is_ok(), "the client's own counts before it");
}

#[tokio::test]
async fn a_moved_request_is_not_refused_for_the_objective() {
    let mut world = World::new();
    let mut fakes = [world.join("decode-0", Role::Decode, 1), world.join("decode-1", Role::Decode, 2)];
    fakes.iter().for_each(|fake| loaded(&world, fake, 0));
    let _running = world.dispatcher.submit(Prompt { ttft_max: Some(Duration::from_millis(500)), ..prompt(100) }).unwrap();
    let first = fakes.iter_mut().position(|f| matches!(f.sent.try_recv(), Ok(Message::Assign(_)))).unwrap();
    fakes.iter().for_each(|fake| loaded(&world, fake, 50_000));
    world.nodes.detach(&fakes[first].name, fakes[first].link);
    assert_eq!(fakes[1 - first].ticket().await.attempt.attempt, 1);
}

#[test]
fn a_mostly_cached_prompt_is_explained_as_computed_where_it_is_decoded() {
    use millrace_core::identity::{Chain, block_names};
    use millrace_core::message::{BlockOp, Delta};
    let mut world = World::new();
    let [prefill, decode] = [world.join("prefill-0", Role::Prefill, 1), world.join("decode-0", Role::Decode, 2)];
    loaded(&world, &prefill, 0);
    loaded(&world, &decode, 0);
    let tokens: Vec<u32> = (0..400).collect();
    let place = |world: &World| {
        let decision = world.dispatcher.explain(DEFAULT_TENANT, &tokens, 64).unwrap().decision.unwrap();
        (decision.prefill, decision.decode)
    };
    assert_eq!(place(&world), (prefill.who.0, Some(decode.who.0)));
    let chain = Chain::new(TenantKey([5; 32]), &model().fingerprint(), b"");
    let ops = block_names(&chain, &tokens[..384], 16).into_iter().map(BlockOp::Stored).collect();
    world.apply(&Command::Deltas(vec![Delta { node: decode.who.0, epoch: decode.who.1, base_seq: 0, seq: 1, ops }]));
    assert_eq!(place(&world), (decode.who.0, None));
}

#[test]
fn a_prefix_shows_in_the_explanation() {
    use millrace_core::identity::{Chain, block_names};
    use millrace_core::message::{BlockOp, Delta};
    let mut world = World::new();
    let node = world.join("decode-0", Role::Decode, 1);
    let tokens: Vec<u32> = (0..40).collect();
    let chain = Chain::new(TenantKey([5; 32]), &model().fingerprint(), b"");
    let ops = block_names(&chain, &tokens[..32], 16).into_iter().map(BlockOp::Stored).collect();
    world.apply(&Command::Deltas(vec![Delta { node: node.who.0, epoch: node.who.1, base_seq: 0, seq: 1, ops }]));
    let explained = world.dispatcher.explain(DEFAULT_TENANT, &tokens, 4).unwrap();
    assert_eq!((explained.blocks, explained.nodes[0].cached_blocks), (2, 2));
    assert_eq!(explained.decision.unwrap().prefill, node.who.0);
}

#[tokio::test]
async fn a_draining_replica_finishes_what_runs_and_takes_nothing_new() {
    let mut world = World::new();
    let mut node = world.join("decode-0", Role::Decode, 1);
    let mut running = world.dispatcher.submit(prompt(20)).unwrap();
    let ticket = node.ticket().await;
    world.dispatcher.drain();
    assert!(matches!(world.dispatcher.submit(prompt(20)), Err(SubmitError::NotReady(_))));
    assert!(world.dispatcher.ready().is_err());
    for index in 0..4 {
        world.dispatcher.token(node.who.0, out(ticket.attempt, index, index == 3));
    }
    assert_eq!(tokens(&mut running).await, [0, 1, 2, 3]);
}

#[tokio::test]
async fn a_resumed_request_sends_a_ticket_that_says_what_is_delivered() {
    let mut world = World::new();
    let mut node = world.join("decode-0", Role::Decode, 1);
    let delivered = Delivered { tokens: vec![50, 51], cached_tokens: 16 };
    let mut running = world.dispatcher.resume(prompt(20), delivered).unwrap();
    let ticket = node.ticket().await;
    assert_eq!((ticket.prompt_tokens, ticket.delivered(), &ticket.tokens[20..]), (20, 2, &[50, 51][..]));
    for index in 2..4 {
        world.dispatcher.token(node.who.0, out(ticket.attempt, index, index == 3));
    }
    assert_eq!(tokens(&mut running).await, [2, 3]);
    let all = Delivered { tokens: vec![50, 51, 52, 53], cached_tokens: 0 };
    assert!(matches!(world.dispatcher.resume(prompt(20), all), Err(SubmitError::Invalid(_))));
}

fn set(key: &str, value: u64) -> Command {
    Command::Policy(PolicyCommand::SetConfig { if_version: None, set: vec![(key.into(), Some(value))] })
}

#[tokio::test]
async fn settings_count_from_the_moment_that_they_are_applied() {
    let mut world = World::new();
    let node = world.join("decode-0", Role::Decode, 1);
    let _running = world.dispatcher.submit(prompt(20)).unwrap();
    world.apply(&set("request.running_max", 1));
    assert_eq!(world.dispatcher.submit(prompt(20)).unwrap_err(), SubmitError::NoCapacity { retry_after_s: 1 });
    world.apply(&set("request.running_max", 2));
    world.apply(&set("request.tokens_max", 23));
    assert_eq!(world.dispatcher.submit(prompt(20)).unwrap_err(), SubmitError::TooLong { tokens: 24, max: 23 });
    world.apply(&set("request.tokens_max", 24));
    world.dispatcher.submit(prompt(20)).unwrap();
    world.apply(&set("request.running_max", 4));
    world.apply(&set("request.tokens_max", 2000));
    loaded(&world, &node, 3_000);
    world.apply(&set("slo.ttft_ms", 2_500));
    let late = SubmitError::TooLate { ttft_us: 4_000_000, tpot_us: 21_000, retry_after_s: 2 };
    assert_eq!(world.dispatcher.submit(prompt(1000)).map(drop).unwrap_err(), late);
    world.apply(&set("slo.ttft_ms", 0));
    world.dispatcher.submit(prompt(1000)).unwrap();
}

#[tokio::test]
async fn a_deleted_tenants_requests_end() {
    let mut world = World::new();
    let mut node = world.join("decode-0", Role::Decode, 1);
    let (name, key) = ("acme".to_owned(), TenantKey([9; 32]));
    let create = PolicyCommand::CreateTenant { name: name.clone(), key, api_key: None, limits: Limits::default() };
    world.apply(&Command::Policy(create));
    let mut running = world.dispatcher.submit(Prompt { tenant: name.clone(), ..prompt(20) }).unwrap();
    let ticket = node.ticket().await;
    assert!(ticket.tenant_key == key);
    let mut other = world.dispatcher.submit(prompt(20)).unwrap();
    let others = node.ticket().await;
    world.apply(&Command::Policy(PolicyCommand::DeleteTenant { name }));
    assert!(matches!(running.next().await, Some(Event::Failed { kind: FailureKind::TenantGone, .. })));
    assert_eq!(node.sent.recv().await, Some(Message::Cancel(ticket.attempt)));
    for index in 0..4 {
        world.dispatcher.token(node.who.0, out(others.attempt, index, index == 3));
    }
    assert_eq!(tokens(&mut other).await, [0, 1, 2, 3], "others go on");
    let asked = world.dispatcher.asked(9);
    assert_eq!(asked.iter().map(|a| (a.tenant.as_str(), a.blocks)).collect::<Vec<_>>().len(), 2);
}
