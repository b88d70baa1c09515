//! Two whole node machines, a prefill and a decode node, and the plainest shell there can be: one action at a time, in order. At every point of
//! a request's life, in turn: its client goes away, or the link between the nodes is lost, or a cell arrives damaged.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use millrace_core::batch::{BatchConfig, ROOM_WAIT_MAX_US};
use millrace_core::engine::{Sampled, Step};
use millrace_core::identity::TenantKey;
use millrace_core::ids::{AttemptId, Epoch, NodeId, ReplicaId, RequestId, Time, TokenId};
use millrace_core::layout::{KvDtype, KvLayout, KvParts};
use millrace_core::message::{FailKind, Join, Message, ModelIdentity, Peer, Role, Ticket};
use millrace_core::node::{Effect, Input, LinkNo, Node, SpanJob};
use millrace_core::sampling::Sampling;
use millrace_core::transfer::gate::{Gate, Place};

const PREFILL: usize = 0;
const DECODE: usize = 1;
const UPLINK: LinkNo = LinkNo(1);
const ATTEMPT: AttemptId = AttemptId { request: RequestId(1), attempt: 0 };
/// Virtual time of one action.
const ACTION_US: u64 = 100;
/// After a cancel, everything is free within this.
const FREE_MAX_US: u64 = 200_000;
const PROMPT: usize = 11;
const ANSWER: u32 = 5;

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a few live at a time")]
enum Action {
    Say(usize, LinkNo, Message),
    Layer(usize, u16),
    Stepped(usize),
    Sent(SpanJob),
    Arrives(SpanJob),
    Drained(SpanJob, Option<String>),
    Dialed(Peer),
}

/// What becomes of a dial.
#[derive(Clone, Copy, PartialEq)]
enum Dials {
    Answered,
    Refused,
    Silent,
}

struct World {
    now: Time,
    nodes: [Node; 2],
    steps: [Option<Step>; 2],
    gates: BTreeMap<AttemptId, (LinkNo, Gate)>,
    queue: VecDeque<Action>,
    link: LinkNo,
    dials: Dials,
    dialed: u32,
    /// Streams whose cells are read, now.
    under_way: u32,
    stopped: BTreeSet<AttemptId>,
    damage: bool,
    /// Cells that were copied, and those that stood already when they came.
    written: u64,
    passed: u64,
    tokens: BTreeMap<u32, TokenId>,
    failures: Vec<FailKind>,
    /// Whether each node asked to be drained, and when it said goodbye first.
    drains: [bool; 2],
    left: [Option<Time>; 2],
}

/// Heads with which a cell is 16 MiB: more than may be on its way at a time.
const WIDE: u16 = 512;

fn node(name: &str, role: Role, kv_heads: u16) -> Node {
    let head_dim = if kv_heads == WIDE { 1024 } else { 8 };
    let layout = KvLayout { layers: 3, parts: KvParts::KeysValues, kv_heads, head_dim, block_tokens: 4, dtype: KvDtype::F32 };
    let model = ModelIdentity { name: "m".into(), weights: [1; 32], tokenizer: [2; 32], layout };
    let batch = BatchConfig {
        block_tokens: 4,
        slots: 12,
        step_tokens_max: 4,
        prompt_step_us: 0,
        rows_max: 4,
        context_max: 40,
        headroom_blocks: 1,
        waiting_max: 4,
        fingerprint: model.fingerprint(),
    };
    Node::new(Join { name: name.into(), role, address: name.into(), instance: 1, pid: 1, model, slots: 12 }, batch)
}

fn ticket() -> Ticket {
    let sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 1, max_new: ANSWER, eos: vec![], ignore_eos: false };
    Ticket {
        attempt: ATTEMPT,
        gateway: ReplicaId(1),
        decode: Some(Peer { node: NodeId(DECODE as u16), epoch: Epoch(2), name: "d".into(), address: "d".into() }),
        tokens: (0..PROMPT as u32).collect(),
        prompt_tokens: PROMPT as u32,
        sampling,
        tenant_key: TenantKey([1; 32]),
        cache_salt: vec![],
        budget_us: 60_000_000,
        trace: [0; 25],
    }
}

impl World {
    /// Two members, and a ticket for both.
    fn new() -> Self {
        Self::with(1)
    }

    fn with(kv_heads: u16) -> Self {
        let mut world = Self {
            now: Time(0),
            nodes: [node("p", Role::Prefill, kv_heads), node("d", Role::Decode, kv_heads)],
            dialed: 0,
            under_way: 0,
            steps: [None, None],
            gates: BTreeMap::new(),
            queue: VecDeque::new(),
            link: UPLINK,
            dials: Dials::Answered,
            stopped: BTreeSet::new(),
            damage: false,
            written: 0,
            passed: 0,
            tokens: BTreeMap::new(),
            failures: Vec::new(),
            drains: [false; 2],
            left: [None; 2],
        };
        for at in [PREFILL, DECODE] {
            world.tell(at, Input::UplinkUp(ReplicaId(1), UPLINK));
            let joined = Message::Joined { node: NodeId(at as u16), epoch: Epoch(1 + at as u64) };
            world.tell(at, Input::Message(UPLINK, joined.into()));
        }
        world.queue.push_back(Action::Say(PREFILL, UPLINK, Message::Assign(ticket())));
        world
    }

    fn tell(&mut self, at: usize, input: Input) {
        self.nodes[at].handle(self.now, input);
        while let Some(effect) = self.nodes[at].poll() {
            self.act(at, effect);
        }
        self.nodes[at].check();
    }

    fn act(&mut self, at: usize, effect: Effect) {
        match effect {
            Effect::Send(UPLINK, message) => match message {
                Message::Token(token) if token.attempt.request == ATTEMPT.request => {
                    self.tokens.insert(token.index, token.token);
                }
                Message::Failed(failed) => self.failures.push(failed.kind),
                Message::Drain { .. } => self.drains[at] = true,
                Message::Leave { .. } => _ = self.left[at].get_or_insert(self.now),
                _ => {}
            },
            Effect::Send(link, message) if link == self.link => self.queue.push_back(Action::Say(1 - at, link, message)),
            Effect::Dial(peer) => {
                self.dialed += 1;
                self.queue.push_back(Action::Dialed(peer));
            }
            Effect::Step(step) => {
                (0..3).for_each(|layer| self.queue.push_back(Action::Layer(at, layer)));
                self.queue.push_back(Action::Stepped(at));
                self.steps[at] = Some(step);
            }
            Effect::Span(job) => {
                self.under_way += 1;
                self.queue.push_back(Action::Sent(job));
            }
            Effect::StopSpans(attempt) => drop(self.stopped.insert(attempt)),
            Effect::OpenGate(attempt, link, gate) => drop(self.gates.insert(attempt, (link, *gate))),
            Effect::MoveGate(attempt, link) => self.gates.get_mut(&attempt).expect("an open gate is moved").0 = link,
            Effect::ReadGate(attempt) => {
                let stands = self.gates[&attempt].1.stands().clone();
                self.nodes[at].handle(self.now, Input::Stands(attempt, stands));
            }
            Effect::CloseGate(attempt) => drop(self.gates.remove(&attempt)),
            _ => {}
        }
    }

    /// One action; false when there is none.
    fn go_on(&mut self) -> bool {
        self.now = self.now.after(ACTION_US);
        let action = self.queue.pop_front();
        let idle = action.is_none();
        match action {
            Some(Action::Say(to, link, message)) => self.tell(to, Input::Message(link, message.into())),
            Some(Action::Layer(at, layer)) => self.tell(at, Input::Layer(layer)),
            Some(Action::Stepped(at)) => {
                let step = self.steps[at].take().expect("a step was begun");
                let drawn = step.rows.iter().filter(|row| row.sample.is_some());
                let sampled = drawn.map(|row| Sampled { attempt: row.attempt, token: 100 + row.end(), logprob: 0.0 }).collect();
                self.tell(at, Input::Stepped { result: Ok(sampled), elapsed_us: 1 });
            }
            Some(Action::Sent(job)) => self.sent(job),
            Some(Action::Arrives(job)) => self.arrives(job),
            Some(Action::Drained(job, error)) => {
                self.under_way -= 1;
                self.tell(
                    PREFILL,
                    Input::SpanDrained { attempt: job.attempt, link: job.link, span: job.span, elapsed_us: 1, error },
                );
            }
            Some(Action::Dialed(_)) if self.dials == Dials::Silent => {}
            Some(Action::Dialed(peer)) if self.dials == Dials::Refused => {
                self.tell(PREFILL, Input::DialFailed { name: peer.name, reason: "refused".into() });
            }
            Some(Action::Dialed(peer)) => {
                self.link = LinkNo(self.link.0 + 1);
                assert_eq!(peer.name, "d");
                self.tell(PREFILL, Input::PeerUp(self.link, "d".into(), Epoch(2)));
                self.tell(DECODE, Input::PeerUp(self.link, "p".into(), Epoch(1)));
            }
            None => {}
        }
        [PREFILL, DECODE].into_iter().for_each(|at| self.tell(at, Input::Turn));
        !idle
    }

    /// So many actions.
    fn run(&mut self, actions: usize) {
        for _ in 0..actions {
            self.go_on();
        }
    }

    fn sent(&mut self, job: SpanJob) {
        if self.stopped.contains(&job.attempt) || job.link != self.link {
            return self.queue.push_back(Action::Drained(job, Some("stopped".into())));
        }
        self.tell(PREFILL, Input::SpanSent { attempt: job.attempt, span: job.span, digest_sum: job.span.cells() * 5 });
        self.queue.push_back(Action::Arrives(job));
    }

    fn arrives(&mut self, job: SpanJob) {
        let gate = self.gates.get_mut(&job.attempt).filter(|(link, _)| *link == job.link);
        let Some((_, gate)) = gate else {
            self.tell(DECODE, Input::StreamRefused);
            return self.queue.push_back(Action::Drained(job, None));
        };
        assert!(gate.admit(job.generation, &job.span));
        for (layer, block) in job.span.iter() {
            match gate.place(job.generation, layer, block) {
                Place::Write(_, name) => {
                    let named = job.cells.iter().any(|(l, b, _, n)| (*l, *b, *n) == (layer, block, name));
                    assert!(named, "both sides call the block by another name");
                    gate.placed(layer, block, if std::mem::take(&mut self.damage) { 6 } else { 5 }, 5);
                    self.written += 1;
                }
                Place::Stands => self.passed += 1,
                Place::Closed => break,
            }
        }
        let standing = gate.standing().clone();
        self.tell(DECODE, Input::Standing(job.attempt, standing));
        self.queue.push_back(Action::Drained(job, None));
    }

    /// The link between the nodes is lost with all that is on its way.
    fn cut(&mut self) {
        let lost = self.link;
        if lost == UPLINK {
            return;
        }
        self.link = LinkNo(lost.0 + 1);
        for action in std::mem::take(&mut self.queue) {
            match action {
                Action::Say(_, link, _) if link == lost => {}
                Action::Sent(job) | Action::Arrives(job) => {
                    self.queue.push_back(Action::Drained(job, Some("the connection is lost".into())));
                }
                other => self.queue.push_back(other),
            }
        }
        self.tell(DECODE, Input::Down(lost));
        self.tell(PREFILL, Input::Down(lost));
    }

    fn kept(&self) -> Vec<(usize, &'static str, usize)> {
        let of = |at: usize| self.nodes[at].kept().into_iter().map(move |(what, count)| (at, what, count));
        [PREFILL, DECODE].into_iter().flat_map(of).filter(|(.., count)| *count > 0).collect()
    }

    fn kept_by(&self, at: usize) -> Vec<(usize, &'static str, usize)> {
        self.kept().into_iter().filter(|(of, ..)| *of == at).collect()
    }

    fn finish(&mut self) {
        let until = self.now.after(5_000_000);
        while (self.go_on() || !self.kept().is_empty()) && self.now < until {}
        assert_eq!((self.kept(), self.gates.len()), (vec![], 0), "something is left");
    }
}

/// Actions of a request that nothing disturbs.
fn undisturbed() -> usize {
    let mut world = World::new();
    let mut actions = 0;
    while world.go_on() {
        actions += 1;
    }
    world.finish();
    let answer: Vec<_> = (0..ANSWER).map(|i| 100 + PROMPT as u32 + i).collect();
    assert_eq!(world.tokens.values().copied().collect::<Vec<_>>(), answer);
    assert_eq!((world.failures, world.written, world.passed), (vec![], 9, 0));
    assert!(actions > 30, "{actions} actions");
    actions
}

#[test]
fn a_client_that_goes_away_leaves_nothing_on_either_node() {
    for at in 0..undisturbed() {
        for order in [[PREFILL, DECODE], [DECODE, PREFILL]] {
            let mut world = World::new();
            world.run(at);
            order.into_iter().for_each(|node| world.queue.push_back(Action::Say(node, UPLINK, Message::Cancel(ATTEMPT))));
            let until = world.now.after(FREE_MAX_US);
            while world.now < until {
                world.go_on();
            }
            assert_eq!((world.kept(), world.gates.len()), (vec![], 0), "cancelled after {at} actions");
        }
    }
}

#[test]
fn a_link_lost_at_any_point_costs_what_was_on_its_way() {
    let mut resumes = 0;
    for at in 0..undisturbed() {
        let mut world = World::new();
        world.run(at);
        world.cut();
        world.finish();
        let answer: Vec<_> = (0..ANSWER).map(|i| 100 + PROMPT as u32 + i).collect();
        assert_eq!(world.tokens.values().copied().collect::<Vec<_>>(), answer, "cut after {at} actions: {:?}", world.failures);
        assert_eq!((world.failures, world.written, world.passed), (vec![], 9, 0), "cut after {at} actions");
        resumes += world.nodes[PREFILL].counts().resumes;
    }
    assert!(resumes > 5, "{resumes} hand-overs went on");
}

#[test]
fn spans_that_wait_for_their_turn_are_sent_over_the_next_link() {
    for at in 0..2 * undisturbed() {
        let mut world = World::with(WIDE);
        for _ in 0..at {
            world.go_on();
            assert!(world.under_way <= 1, "more is on its way than may be");
        }
        world.cut();
        world.finish();
        let answer: Vec<_> = (0..ANSWER).map(|i| 100 + PROMPT as u32 + i).collect();
        assert_eq!(world.tokens.values().copied().collect::<Vec<_>>(), answer, "cut after {at} actions: {:?}", world.failures);
        assert_eq!((world.failures, world.written, world.passed), (vec![], 9, 0), "cut after {at} actions");
    }
}

#[test]
fn a_node_that_does_not_answer_is_waited_for_once_and_refused_by_name_until_it_does() {
    let mut world = World::new();
    let assign = |world: &mut World, attempt| {
        let mut next = ticket();
        next.attempt.attempt = attempt;
        world.tell(PREFILL, Input::Message(UPLINK, Message::Assign(next).into()));
        world.go_on();
    };
    world.dials = Dials::Refused;
    world.finish();
    assert_eq!((world.failures.len(), world.dialed), (1, 1));
    assign(&mut world, 1);
    assert_eq!((&world.failures[..], world.dialed), (&[FailKind::PeerLost; 2][..], 1), "refused without a dial");
    let patience = world.now.after(5_000_000);
    while world.dialed == 1 && world.now < patience {
        world.go_on();
    }
    assert_eq!((world.dialed, world.nodes[PREFILL].doubted()), (2, 1), "dialed again, though nobody asks");
    world.dials = Dials::Answered;
    while world.nodes[PREFILL].doubted() > 0 && world.now < patience {
        world.go_on();
    }
    assign(&mut world, 2);
    world.finish();
    assert_eq!((world.failures.len(), world.tokens.len(), world.dialed), (2, ANSWER as usize, 2));
}

#[test]
fn a_dial_that_finds_a_node_before_it_has_joined_does_not_cost_the_ticket_that_came_meanwhile() {
    let mut world = World::new();
    world.queue.clear();
    let assign = |world: &mut World, attempt, epoch| {
        let mut next = ticket();
        next.attempt.attempt = attempt;
        next.decode.as_mut().expect("a ticket for both").epoch = epoch;
        world.tell(PREFILL, Input::Message(UPLINK, Message::Assign(next).into()));
    };
    world.dials = Dials::Silent;
    assign(&mut world, 0, Epoch(1));
    world.go_on();
    assign(&mut world, 1, Epoch(2));
    world.go_on();
    assert_eq!((world.failures.len(), world.dialed), (0, 1), "one dial at a time");
    world.dials = Dials::Answered;
    let early = LinkNo(99);
    world.tell(PREFILL, Input::PeerUp(early, "d".into(), Epoch(0)));
    world.finish();
    assert_eq!(
        (&world.failures[..], world.dialed),
        (&[FailKind::PeerLost][..], 2),
        "the life before is over, the present one is dialed"
    );
    assert_eq!(world.tokens.len(), ANSWER as usize);
}

/// A world whose decode node has a long sequence of its own, so that the ticket's hand-over waits for room there; and that sequence.
fn crowded() -> (World, AttemptId) {
    let mut world = World::new();
    let attempt = AttemptId { request: RequestId(2), attempt: 0 };
    let mut own = Ticket { attempt, decode: None, tokens: (50..79).collect(), prompt_tokens: 29, ..ticket() };
    own.sampling.max_new = 11;
    world.tell(DECODE, Input::Message(UPLINK, Message::Assign(own).into()));
    let patience = world.now.after(100 * ACTION_US);
    while world.nodes[DECODE].batch().stats().waiting == 0 {
        assert!(world.go_on() && world.now < patience, "who asks for slots waits");
    }
    assert_eq!((world.nodes[DECODE].batch().stats().running, world.failures.len()), (1, 0));
    (world, attempt)
}

#[test]
fn a_hand_over_that_finds_no_room_waits_for_it() {
    for cancels in [false, true] {
        let (mut world, own) = crowded();
        world.queue.extend(cancels.then_some(Action::Say(DECODE, UPLINK, Message::Cancel(own))));
        world.finish();
        assert_eq!((&world.failures[..], world.tokens.len()), (&[][..], ANSWER as usize));
    }
}

#[test]
fn a_hand_over_that_waits_for_room_ends_with_its_gateway_its_link_or_its_patience() {
    let declined = |world: &World, kind| assert_eq!((world.kept_by(PREFILL), &world.failures[..]), (vec![], &[kind][..]));
    let (mut world, _) = crowded();
    world.tell(DECODE, Input::Down(UPLINK));
    world.run(2 * undisturbed());
    declined(&world, FailKind::PeerLost);

    let (mut world, _) = crowded();
    world.dials = Dials::Refused;
    world.cut();
    assert_eq!(world.nodes[DECODE].batch().stats().waiting, 0);
    world.run(2 * undisturbed());
    declined(&world, FailKind::PeerLost);

    let (mut world, _) = crowded();
    world.now = world.now.after(ROOM_WAIT_MAX_US);
    world.run(2 * undisturbed());
    declined(&world, FailKind::NoRoom);
}

#[test]
fn a_link_that_does_not_come_back_ends_the_hand_over() {
    for at in 0..undisturbed() {
        for dials in [Dials::Refused, Dials::Silent] {
            let mut world = World::new();
            world.run(at);
            if dials == Dials::Silent && world.link == UPLINK {
                continue; // the first dial always has an answer in time: it is the transport's to give one
            }
            world.cut();
            world.dials = dials;
            world.finish();
            let whole = world.tokens.len() == ANSWER as usize;
            assert!(whole || world.failures.contains(&FailKind::PeerLost), "cut after {at} actions: {:?}", world.failures);
        }
    }
}

#[test]
fn a_node_that_is_stopped_asks_to_be_drained_finishes_what_it_has_and_leaves_only_then() {
    let mut drains = 0;
    for at in 0..undisturbed() {
        for stopped in [PREFILL, DECODE] {
            let mut world = World::new();
            world.run(at);
            let had_work = !world.nodes[stopped].batch().is_idle();
            world.tell(stopped, Input::Stop);
            assert_eq!(world.drains[stopped], had_work, "after {at} actions");
            world.finish();
            let whole = world.tokens.len() == ANSWER as usize;
            // A decode node that had granted nothing yet takes nothing more.
            let declined = stopped == DECODE && !had_work && world.failures.contains(&FailKind::PeerLost);
            assert!(whole || declined, "node {stopped} stopped after {at} actions: {:?}", world.failures);
            let quiet = world.now.after(1_000_000);
            while world.left[stopped].is_none() && world.now < quiet {
                world.go_on();
            }
            assert!(world.left[stopped].is_some(), "node {stopped} stopped after {at} actions stays");
            drains += u32::from(had_work);
        }
    }
    assert!(drains > 20, "{drains} nodes had work when they were stopped");
}

#[test]
fn a_stopping_node_hands_over_what_a_gateway_moves_and_takes_nothing_else() {
    let mut world = World::new();
    while world.tokens.len() < 3 {
        world.go_on();
    }
    world.tell(DECODE, Input::Stop);
    world.tell(DECODE, Input::Message(UPLINK, Message::Cancel(ATTEMPT).into()));
    world.run(100);
    assert_eq!(world.left[DECODE], None, "the gateway that cancelled it may ask for its KV yet");
    let mut moved = ticket();
    moved.attempt.attempt = 1;
    moved.decode = Some(Peer { node: NodeId(7), epoch: Epoch(9), name: "e".into(), address: "e".into() });
    let mut whole = moved.clone();
    (whole.attempt.attempt, whole.decode) = (2, None);
    world.dials = Dials::Silent;
    world.tell(DECODE, Input::Message(UPLINK, Message::Assign(whole).into()));
    assert_eq!(world.failures, [FailKind::Stopping]);
    world.tell(DECODE, Input::Message(UPLINK, Message::Assign(moved.clone()).into()));
    world.run(100);
    assert_eq!((&world.failures[..], world.left[DECODE]), (&[FailKind::Stopping][..], None));
    assert!(world.nodes[DECODE].is_leaving(moved.attempt), "it waits for its receiver");
    world.tell(DECODE, Input::Message(UPLINK, Message::Cancel(moved.attempt).into()));
    let quiet = world.now.after(1_000_000);
    while world.left[DECODE].is_none() && world.now < quiet {
        world.go_on();
    }
    assert!(world.left[DECODE].is_some());
}

#[test]
fn a_damaged_cell_is_neither_decoded_nor_cached() {
    let mut damaged = 0;
    for at in 0..undisturbed() {
        let mut world = World::new();
        world.run(at);
        world.damage = true;
        world.finish();
        if world.damage {
            continue;
        }
        damaged += 1;
        assert!(world.failures.contains(&FailKind::Integrity), "{:?}", world.failures);
        assert!(world.tokens.len() <= 1, "only the prefill node draws a token");
        assert_eq!(world.nodes[DECODE].batch().cached_names().count(), 0, "an unverified block can be found");
    }
    assert!(damaged > 3, "{damaged} cells were damaged");
}

#[test]
fn blocks_are_cached_by_the_decode_node_only_when_all_of_them_stand() {
    let mut world = World::new();
    while world.go_on() {
        let whole = world.written == 9;
        assert!(whole || world.nodes[DECODE].batch().cached_names().count() == 0);
    }
    assert_eq!(world.nodes[DECODE].batch().cached_names().count(), 3, "two blocks of the prompt and one with its answer");
}
