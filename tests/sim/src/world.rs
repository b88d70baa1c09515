//! The world: virtual time, a queue of events, and what each event does to nodes, coordinator and gateway. Between two events nothing
//! happens; every machine that an event touched has asserted its invariants before the next.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use millrace_core::holders::Drift;
use millrace_core::ids::{BlockHash, RequestId, Time, TokenId};
use millrace_core::message::{BlockOp, Delta, Join, Message, Role};
use millrace_core::sampling::Sampling;
use xxhash_rust::xxh3::Xxh3;

use crate::aborts::Aborts;
use crate::coordinator::Coordinator;
use crate::event::{Act, Event, Host, Life, LinkNo, NodeEvent, RequestEvent, StreamNo};
use crate::gateway::{self, End, Gateway};
use crate::invariants::{Watch, check_report};
use crate::memory::{RESERVED_TOKENS, undisturbed};
use crate::net::{Link, Stream};
use crate::node::Node;
use crate::plan::{NODES_PER_ROLE, Plan};
use crate::random::Random;

/// Between two renewals of leases, microseconds.
const RENEW_US: u64 = 1_000_000;
/// How long the coordinator gathers reports, microseconds.
const FOLD_US: u64 = 10_000;
/// An entry's way through the log, microseconds.
const COMMIT_US: (u64, u64) = (500, 15_000);
/// A look through a cache is due at once, as often as there are slots; whoever is due more often would spin.
const SPINS_MAX: u32 = 100;
/// How long a busy drive loop lets an event wait, microseconds.
const TURN_US: (u64, u64) = (0, 150);

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Decides everything.
    pub seed: u64,
    /// Events before faults and clients stop.
    pub steps: u64,
    /// Print every event.
    pub trace: bool,
}

/// How a run went; it went wrong when there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// Hash of every event's text and of the final state: equal for equal histories.
    pub trace: u64,
    /// Events.
    pub events: u64,
    /// Virtual time, microseconds.
    pub elapsed_us: u64,
    /// Requests that ended with their whole answer, at their deadline, after too many attempts, by their client.
    pub ends: [u64; 4],
    /// Tickets that named two nodes.
    pub split: u64,
    /// Broken attempts, by reason.
    pub broken: BTreeMap<String, u64>,
    /// Reports that were changed on their way.
    pub drift_planted: u64,
    /// Caches that the index was found to disagree with, and those mended by a snapshot.
    pub drift: Drift,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [whole, deadline, attempts, left] = self.ends;
        write!(f, "seed {} trace {:016x}: {} events, {:.1} s; ", self.seed, self.trace, self.events, self.elapsed_us as f64 / 1e6)?;
        write!(f, "{whole} whole, {deadline} too late, {attempts} given up, {left} left; {} handed over; broken", self.split)?;
        if self.drift_planted > 0 {
            write!(
                f,
                " ({} reports changed, {} drifts found, {} mended)",
                self.drift_planted, self.drift.found, self.drift.repaired
            )?;
        }
        if self.broken.is_empty() {
            return f.write_str(" none");
        }
        self.broken.iter().try_for_each(|(why, count)| write!(f, " {count} {why},"))
    }
}

/// The text of the history, hashed and perhaps printed.
struct Trace {
    hash: Xxh3,
    line: String,
    print: bool,
}

/// A place where processes of one node run, one after another.
pub(crate) struct HostState {
    pub name: String,
    pub role: Role,
    pub life: Life,
    /// What its clock showed when the world began.
    pub offset_us: u64,
    pub node: Option<Node>,
    turn: Option<Time>,
    /// Turns in a row after which the next was due at once though nothing had happened.
    spins: u32,
}

/// Everything.
pub struct World {
    pub(crate) plan: Plan,
    pub(crate) random: Random,
    pub(crate) now: Time,
    queue: BTreeMap<(Time, u64), Event>,
    serial: u64,
    /// The last number that a link or stream was given.
    pub(crate) numbers: u64,
    events: u64,
    pub(crate) hosts: Vec<HostState>,
    pub(crate) links: BTreeMap<LinkNo, Link>,
    pub(crate) streams: BTreeMap<StreamNo, Stream>,
    /// Until when an end (or the coordinator, `None`) cannot be reached by a host.
    pub(crate) outages: BTreeMap<(Host, Option<Host>), Time>,
    pub(crate) coordinator: Coordinator,
    pub(crate) gateway: Gateway,
    /// Digest of every whole block that was ever sent: the same name must always mean the same KV.
    pub(crate) truth: BTreeMap<(BlockHash, u16), u64>,
    committing: bool,
    pub(crate) watch: Watch,
    pub(crate) aborts: Aborts,
    /// Orders that operators gave.
    pub(crate) orders: u64,
    pub(crate) calm: bool,
    pub(crate) writes_while_lent: u64,
    drift_planted: u64,
    trace: Trace,
}

/// Says how to repeat a run that ends badly.
struct Repeat(Options);

impl Drop for Repeat {
    fn drop(&mut self) {
        if std::thread::panicking() && !cfg!(millrace_planted) {
            let Options { seed, steps, .. } = self.0;
            eprintln!("\nrepeat with: cargo run --release -p millrace-sim -- --seed {seed} --steps {steps} --trace");
        }
    }
}

/// Runs one world to its end.
///
/// # Panics
/// When an invariant does not hold, or the world does not come to rest.
#[must_use]
pub fn run(options: Options) -> Outcome {
    let _repeat = Repeat(options);
    let mut world = World::new(options);
    world.run_to_rest(options.steps);
    world.outcome(options.seed)
}

impl World {
    pub(crate) fn new(options: Options) -> Self {
        let mut random = Random::new(options.seed);
        let plan = Plan::draw(&mut random);
        let host = |role: Role, number: usize| HostState {
            name: format!("{}-{number}", role.as_str()),
            role,
            life: 0,
            offset_us: 0,
            node: None,
            turn: None,
            spins: 0,
        };
        let hosts = [Role::Prefill, Role::Decode].into_iter().flat_map(|role| (0..NODES_PER_ROLE).map(move |n| host(role, n)));
        let mut world = Self {
            hosts: hosts.collect(),
            plan,
            random,
            now: Time(0),
            queue: BTreeMap::new(),
            serial: 0,
            numbers: 0,
            events: 0,
            links: BTreeMap::new(),
            streams: BTreeMap::new(),
            outages: BTreeMap::new(),
            coordinator: Coordinator::new(),
            gateway: Gateway::default(),
            truth: BTreeMap::new(),
            committing: false,
            watch: Watch::default(),
            aborts: Aborts::default(),
            orders: 0,
            calm: false,
            writes_while_lent: 0,
            drift_planted: 0,
            trace: Trace { hash: Xxh3::new(), line: String::new(), print: options.trace },
        };
        (0..world.hosts.len()).for_each(|host| world.schedule(0, Event::Start(host)));
        world.schedule(0, Event::Renew);
        world.schedule(100_000, Event::Client);
        world.schedule(1_000_000, Event::Fault);
        world.schedule(1_000_000, Event::Order);
        if options.trace {
            eprintln!("{:#?}", world.plan);
        }
        world
    }

    /// So many events with faults and clients, then rest.
    pub(crate) fn run_to_rest(&mut self, steps: u64) {
        while self.events < steps {
            self.step();
        }
        self.become_calm();
    }

    pub(crate) fn schedule(&mut self, after_us: u64, event: Event) {
        self.serial += 1;
        self.queue.insert((self.now.after(after_us), self.serial), event);
    }

    /// One event, and what the gateway and the log want done after it.
    pub(crate) fn step(&mut self) {
        let ((time, _), event) = self.queue.pop_first().expect("leases are renewed for ever");
        self.now = time;
        self.events += 1;
        self.trace.record(time, &event);
        self.handle(event);
        for act in std::mem::take(&mut self.gateway.acts) {
            match act {
                gateway::Act::Send(link, message) => {
                    if let (Message::Assign(ticket), Some(prefill)) = (&message, self.coordinator.speaker(link)) {
                        self.watch.assigned(prefill, ticket);
                    }
                    if let Message::Cancel(attempt) = &message {
                        self.count_abort(*attempt);
                    }
                    self.send(link, false, message);
                }
                gateway::Act::PlaceIn(after_us, id) => self.schedule(after_us, Event::Request(id, RequestEvent::Place)),
            }
        }
        if self.coordinator.has_proposals() && !self.committing {
            self.committing = true;
            let after_us = self.random.between(COMMIT_US);
            self.schedule(after_us, Event::Commit);
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Node(host, life, event) => self.tell_node(host, life, event),
            Event::Turn(host, life) => self.turn(host, life),
            Event::Layer(host, life, layer) => self.compute(host, life, layer),
            Event::Arrives { link, to_dialler, message } => self.arrives(link, to_dialler, message),
            Event::Notices { link, dialler } => self.notices(link, dialler),
            Event::DialUp(host, life) => self.dial_up(host, life),
            Event::DialPeer(host, life, peer) => self.dial_peer(host, life, &peer),
            Event::Stream(no, event) => self.stream(no, event),
            Event::Commit => {
                self.committing = false;
                for (link, message) in self.coordinator.commit() {
                    self.send(link, false, message);
                }
                self.gateway.sweep(self.now, &self.coordinator);
            }
            Event::Fold => self.coordinator.fold(),
            Event::Renew => {
                self.coordinator.renew(self.now);
                self.gateway.sweep(self.now, &self.coordinator);
                self.look();
                self.schedule(RENEW_US, Event::Renew);
            }
            Event::Client => self.client(),
            Event::Request(id, event) => self.request(id, event),
            Event::Fault => self.fault(),
            Event::Order => self.order(),
            Event::Start(host) => self.start(host),
        }
    }

    // --- nodes -----------------------------------------------------------------------------------------------------

    /// The process on a host, if it still is the one that is meant.
    pub(crate) fn node(&mut self, host: Host, life: Life) -> Option<&mut Node> {
        let state = &mut self.hosts[host];
        state.node.as_mut().filter(|_| state.life == life)
    }

    pub(crate) fn tell_node(&mut self, host: Host, life: Life, event: NodeEvent) {
        let after_us = self.random.between(TURN_US);
        if let Some(node) = self.node(host, life) {
            node.push(event);
            self.wake(host, after_us);
        }
    }

    /// Lets the drive loop of a host have a turn after so long, or earlier.
    pub(crate) fn wake(&mut self, host: Host, after_us: u64) {
        let (at, state) = (self.now.after(after_us), &mut self.hosts[host]);
        if state.turn.is_none_or(|turn| at < turn) {
            state.turn = Some(at);
            let life = state.life;
            self.schedule(after_us, Event::Turn(host, life));
        }
    }

    fn turn(&mut self, host: Host, life: Life) {
        let (now, state) = (self.now, &mut self.hosts[host]);
        if state.life != life || state.turn != Some(now) {
            return;
        }
        state.turn = None;
        let time = now.after(state.offset_us);
        let Some(node) = &mut state.node else { return };
        let acts = node.turn(time);
        state.spins = if node.deadline() > time || node.has_events() { 0 } else { state.spins + 1 };
        assert!(state.spins <= SPINS_MAX, "I7: {} is due again at once, again and again", state.name);
        std::mem::take(&mut node.ended).into_iter().for_each(|attempt| self.watch.cancelled((host, life), attempt));
        let after_us = node.deadline().since(time).max(1_000);
        for act in acts {
            self.act(host, life, act);
        }
        self.wake(host, after_us);
    }

    fn act(&mut self, host: Host, life: Life, act: Act) {
        match act {
            Act::Send(link, message) => {
                let node = self.hosts[host].node.as_ref();
                let who = node.and_then(|node| node.joined());
                let preempts = node.is_some_and(|node| node.batch().stats().preemptions > 0);
                self.watch.says((host, life), who, preempts, &message);
                let from_dialler = self.links.get(&link).is_some_and(|l| l.dialler.0 == host);
                self.send(link, from_dialler, message);
            }
            Act::Dial(peer) => {
                let after_us = self.random.between(self.plan.delay_us);
                self.schedule(after_us, Event::DialPeer(host, life, Box::new(peer)));
            }
            Act::Close(link) => self.cut(link),
            Act::Span(job) => {
                let layout = &self.plan.model.layout;
                self.watch.sends((host, life), &job, (layout.block_tokens, layout.cell_bytes()));
                self.start_stream(host, life, job);
            }
            Act::StopSpans(attempt) => self.stop_streams(host, attempt),
            Act::Step => {
                let step = self.hosts[host].node.as_ref().and_then(Node::step);
                step.into_iter().for_each(|step| self.watch.computes((host, life), step));
                self.next_layer(host, life, 0);
            }
            Act::Exit => self.crash(host),
        }
    }

    fn next_layer(&mut self, host: Host, life: Life, layer: u16) {
        let tokens = self.node(host, life).map_or(0, |node| node.step_tokens()) as u64;
        let after_us = self.random.between(self.plan.layer_us) * (1 + tokens / 4);
        self.schedule(after_us, Event::Layer(host, life, layer));
    }

    fn compute(&mut self, host: Host, life: Life, layer: u16) {
        let breaks = self.random.chance(self.plan.faults.engine);
        let Some(node) = self.node(host, life) else { return };
        let result = node.compute(layer);
        node.push(NodeEvent::Layer(layer));
        match result {
            None => self.next_layer(host, life, layer + 1),
            Some(sampled) => {
                let result = if breaks { Err("it broke".to_owned()) } else { Ok(sampled) };
                node.push(NodeEvent::Stepped(result));
            }
        }
        let after_us = self.random.between(TURN_US);
        self.wake(host, after_us);
    }

    fn start(&mut self, host: Host) {
        let (instance, offset_us) = (self.random.word().into(), self.random.below(1 << 40));
        let state = &mut self.hosts[host];
        if state.node.is_some() {
            return;
        }
        state.life += 1;
        (state.offset_us, state.turn) = (offset_us, None);
        let join = Join {
            name: state.name.clone(),
            role: state.role,
            address: format!("host-{host}"),
            instance,
            pid: state.life,
            model: self.plan.model.clone(),
            slots: self.plan.slots,
        };
        state.node = Some(Node::new(&self.plan, join));
        let life = state.life;
        self.schedule(0, Event::DialUp(host, life));
        self.wake(host, 0);
    }

    // --- coordinator and clients -----------------------------------------------------------------------------------

    pub(crate) fn tell_coordinator(&mut self, link: LinkNo, message: Message) {
        let from = self.coordinator.speaker(link);
        match (message, from) {
            (Message::Token(token), Some(from)) => self.gateway.token(from, token, &self.coordinator),
            (Message::Failed(failed), Some(from)) => self.gateway.failed(from, failed, &self.coordinator),
            (Message::Handover(stats), Some(_)) => self.gateway.handed_over(stats.attempt),
            (Message::Token(_) | Message::Failed(_) | Message::Handover(_), None) => {}
            (Message::CacheReport(report), _) => check_report(&report),
            (Message::Delta(_) | Message::Snapshot(_), _) if self.random.chance(self.plan.faults.report_lost) => {}
            (mut message, _) => {
                if let Message::Delta(delta) = &mut message {
                    if self.random.chance(self.plan.faults.forgotten) {
                        self.watch.forgotten += 1;
                        return self.send(link, false, Message::DeltaApplied { epoch: delta.epoch, seq: delta.seq });
                    }
                    self.plant_drift(delta);
                }
                let (reply, fold) = self.coordinator.on_message(self.now, link, message);
                if let Some(reply) = reply {
                    self.send(link, false, reply);
                }
                if fold {
                    self.schedule(FOLD_US, Event::Fold);
                }
            }
        }
    }

    /// A defect on the way of a report, now and then: an operation is lost, or one is there that nobody sent.
    fn plant_drift(&mut self, delta: &mut Delta) {
        if !self.random.chance(self.plan.faults.drift) {
            return;
        }
        self.drift_planted += 1;
        if self.random.chance(500) {
            delta.ops.pop();
        } else {
            let name = u128::from(self.random.below(1 << 60)) << 64 | u128::from(self.random.below(1 << 60));
            delta.ops.push(BlockOp::Stored(BlockHash(name.to_le_bytes())));
        }
    }

    fn client(&mut self) {
        if self.calm {
            return;
        }
        let after_us = self.random.between(self.plan.request_gap_us);
        self.schedule(after_us, Event::Client);
        let budget_us = self.random.between(self.plan.budget_us);
        let id = self.ask(budget_us);
        if self.random.chance(self.plan.faults.client_leaves) {
            let after_us = self.random.below(budget_us.min(self.plan.leaves_us));
            self.schedule(after_us, Event::Request(id, RequestEvent::ClientLeaves));
        }
    }

    /// A client sends a request.
    pub(crate) fn ask(&mut self, budget_us: u64) -> RequestId {
        let id = RequestId(self.gateway.requests.len() as u128 + 1);
        let prompt = self.prompt();
        let sampling = Sampling {
            temperature: if self.random.chance(self.plan.sampled) { 0.7 } else { 0.0 },
            top_p: 1.0,
            top_k: 0,
            seed: self.random.word(),
            max_new: self.random.between(self.plan.answer_tokens) as u32,
            eos: self.plan.eos.clone(),
            ignore_eos: self.random.chance(100),
        };
        let expected = undisturbed(id, &prompt, &sampling, (self.plan.model.layout.layers, self.plan.vocab));
        self.gateway.open(id, prompt, sampling, expected, self.now.after(budget_us));
        self.schedule(budget_us, Event::Request(id, RequestEvent::Deadline));
        id
    }

    /// A new prompt; often one that begins like an earlier one.
    fn prompt(&mut self) -> Vec<TokenId> {
        let length = self.random.between(self.plan.prompt_tokens) as usize;
        let earlier = self.gateway.requests.len() as u64;
        let mut prompt = Vec::new();
        if earlier > 0 && self.random.chance(self.plan.shared) {
            let id = RequestId(u128::from(self.random.below(earlier) + 1));
            let model = self.gateway.requests[&id].prompt();
            let take = self.random.below(model.len() as u64 + 1) as usize;
            prompt.extend_from_slice(&model[..take.min(length)]);
        }
        let fresh = u64::from(self.plan.vocab - RESERVED_TOKENS);
        prompt.resize_with(length, || RESERVED_TOKENS + self.random.below(fresh) as TokenId);
        prompt
    }

    fn request(&mut self, id: RequestId, event: RequestEvent) {
        match event {
            RequestEvent::Place => self.gateway.place(self.now, id, &self.coordinator, &self.plan),
            RequestEvent::ClientLeaves => self.gateway.end(id, End::ClientLeft, &self.coordinator),
            RequestEvent::Deadline => self.gateway.end(id, End::Deadline, &self.coordinator),
        }
    }

    fn outcome(mut self, seed: u64) -> Outcome {
        self.trace.hash.update(&self.coordinator.cluster.snapshot());
        let count = |end| self.gateway.requests.values().filter(|r| r.end == Some(end)).count() as u64;
        let drift = self.coordinator.cluster.holders().drift();
        let (forgotten, gaps) = (self.watch.forgotten, self.coordinator.gaps);
        assert!(gaps == 0 || forgotten > 0, "I6: {gaps} reports do not build on what the index has, and none was lost");
        assert!(
            drift.found == 0 || self.drift_planted + forgotten > 0,
            "I6: {} caches differ from the index by themselves",
            drift.found
        );
        let writes = self.writes_while_lent
            + self.hosts.iter().filter_map(|h| h.node.as_ref()).map(|n| n.memory.writes_while_lent).sum::<u64>();
        assert_eq!(writes, 0, "I5: writes into cells that streams read");
        Outcome {
            drift_planted: self.drift_planted,
            drift,
            seed,
            trace: self.trace.hash.digest(),
            events: self.events,
            elapsed_us: self.now.0,
            ends: [End::Whole, End::Deadline, End::Attempts, End::ClientLeft].map(count),
            split: self.gateway.split,
            broken: self.gateway.broken,
        }
    }
}

impl Trace {
    fn record(&mut self, time: Time, event: &Event) {
        self.line.clear();
        writeln!(self.line, "{time} {event:?}").expect("a string takes all");
        self.hash.update(self.line.as_bytes());
        if self.print {
            eprint!("{}", self.line);
        }
    }
}
