//! The dispatcher over an applied state and fake nodes at the other end of a channel.

use std::time::Duration;

use millrace_core::cluster::{Answer, Command};
use millrace_core::identity::TenantKey;
use millrace_core::ids::{AttemptId, Epoch};
use millrace_core::layout::{KvDtype, KvLayout};
use millrace_core::message::{Finish, Join, Load, Message, Role, Ticket};
use millrace_core::sampling::Sampling;

use super::*;
use crate::nodes::LinkId;

/// A node whose process is the test.
struct Fake {
    who: (NodeId, Epoch),
    name: String,
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
    let layout = KvLayout { layers: 2, kv_heads: 1, head_dim: 8, block_tokens: 16, dtype: KvDtype::F32 };
    ModelIdentity { name: "m".into(), weights: [1; 32], tokenizer: [2; 32], layout }
}

fn status() -> RaftStatus {
    RaftStatus {
        id: 1,
        term: 1,
        role: crate::raft::Role::Leader,
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
        let link = self.nodes.attach(Instant::now(), name, instance, Arc::new(move |m| sender.send(m).is_ok()));
        let load = Load { free_blocks: 100, total_blocks: 100, ..Load::default() };
        self.nodes.heartbeat(Instant::now(), name, link, (node, epoch), load);
        // Heard from in an hour: no pause of the test makes it silent.
        self.nodes.heard(Instant::now() + Duration::from_secs(3600), name, link);
        Fake { who: (node, epoch), name: name.into(), link, sent }
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
        budget: Duration::from_secs(60),
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
