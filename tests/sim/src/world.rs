//! The world: virtual time, a queue of events, and whom each event concerns. Between two events nothing
//! happens; every machine that an event touched has asserted its invariants before the next.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::Instant;

use millrace_core::holders::Drift;
use millrace_core::ids::{BlockHash, Time};
use millrace_core::message::{Message, Role};
use xxhash_rust::xxh3::Xxh3;

use crate::aborts::Aborts;
use crate::audit::Audit;
use crate::event::{Event, Host, Later, LinkNo, StreamEvent, StreamNo};
use crate::gateway::{self, End, Gateway};
use crate::invariants::Watch;
use crate::net::{Link, Stream};
use crate::operators::Operators;
use crate::plan::{NODES_PER_ROLE, Plan, REPLICAS};
use crate::process::HostState;
use crate::quic::Quic;
use crate::random::Random;
use crate::replica::Ledger;

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
    /// Requests that went on at another gateway, because theirs was lost.
    pub moved: u64,
    /// Terms in which a replica was seen to lead, and questions of operators that were answered.
    pub leaders: u64,
    /// See `leaders`.
    pub answered: u64,
    /// Datagrams of QUIC, where that was the network, and how many were lost.
    pub datagrams: (u64, u64),
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
        write!(
            f,
            "{whole} whole, {deadline} too late, {attempts} given up, {left} left; {} handed over, {} moved; ",
            self.split, self.moved
        )?;
        write!(f, "{} terms, {} asked; ", self.leaders, self.answered)?;
        if self.datagrams.0 > 0 {
            write!(f, "{} datagrams, {} lost; ", self.datagrams.0, self.datagrams.1)?;
        }
        f.write_str("broken")?;
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

/// Everything.
pub struct World {
    pub(crate) plan: Plan,
    pub(crate) random: Random,
    pub(crate) now: Time,
    queue: BTreeMap<(Time, u64), Event>,
    serial: u64,
    /// The last number that a link or stream was given.
    pub(crate) numbers: u64,
    pub(crate) events: u64,
    pub(crate) hosts: Vec<HostState>,
    pub(crate) links: BTreeMap<LinkNo, Link>,
    pub(crate) streams: BTreeMap<StreamNo, Stream>,
    /// Until when nothing gets from one host to another.
    pub(crate) outages: BTreeMap<(Host, Host), Time>,
    /// The network, where it is not the light one.
    pub(crate) quic: Option<Quic>,
    pub(crate) gateway: Gateway,
    pub(crate) operators: Operators,
    pub(crate) audit: Audit,
    pub(crate) watch: Watch,
    pub(crate) aborts: Aborts,
    /// Orders about caches that operators gave.
    pub(crate) orders: u64,
    pub(crate) ledger: Ledger,
    /// What [`Time`] 0 is.
    pub(crate) base: Instant,
    /// Digest of every whole block that was ever sent: the same name must always mean the same KV.
    pub(crate) truth: BTreeMap<(BlockHash, u16), u64>,
    pub(crate) calm: bool,
    pub(crate) writes_while_lent: u64,
    pub(crate) drift_planted: u64,
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
        let host = |role: Role, number: usize| HostState::new(format!("{}-{number}", role.as_str()), role);
        let kinds = [(Role::Coordinator, REPLICAS), (Role::Prefill, NODES_PER_ROLE), (Role::Decode, NODES_PER_ROLE)];
        let hosts = kinds.into_iter().flat_map(|(role, count)| (0..count).map(move |n| host(role, n)));
        let hosts: Vec<_> = hosts.collect();
        let quic = plan.quic.map(|window| Quic::new(hosts.len(), window));
        let mut world = Self {
            quic,
            hosts,
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
            gateway: Gateway::default(),
            operators: Operators::default(),
            audit: Audit::default(),
            watch: Watch::default(),
            aborts: Aborts::default(),
            orders: 0,
            ledger: Ledger::default(),
            base: Instant::now(),
            truth: BTreeMap::new(),
            calm: false,
            writes_while_lent: 0,
            drift_planted: 0,
            trace: Trace { hash: Xxh3::new(), line: String::new(), print: options.trace },
        };
        (0..world.hosts.len()).for_each(|host| world.schedule(0, Event::Start(host)));
        world.schedule(700_000, Event::Client);
        world.schedule(700_000, Event::Operator);
        world.schedule(2_000_000, Event::Fault);
        world.schedule(2_000_000, Event::Order);
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

    /// One event, and what the gateways want done after it.
    pub(crate) fn step(&mut self) {
        let ((time, _), event) = self.queue.pop_first().expect("replicas have turns for ever");
        self.now = time;
        if let Some(until) = self.frozen(&event) {
            return self.schedule(until.since(time), event);
        }
        self.events += 1;
        self.trace.record(time, &event);
        self.handle(event);
        self.audit();
        for act in std::mem::take(&mut self.gateway.acts) {
            match act {
                gateway::Act::Send(link, message) => {
                    self.watch_gateway(&message);
                    self.send(link, false, message);
                }
                gateway::Act::PlaceIn(after_us, id) => {
                    self.schedule(after_us, Event::Request(id, crate::event::RequestEvent::Place))
                }
            }
        }
    }

    fn watch_gateway(&mut self, message: &Message) {
        match message {
            Message::Assign(ticket) => {
                let prefill = self.gateway.prefill_of(ticket.attempt);
                prefill.into_iter().for_each(|prefill| self.watch.assigned(prefill, ticket));
            }
            Message::Cancel(attempt) => self.count_abort(*attempt),
            _ => {}
        }
    }

    /// Puts something into the history that is not an event of its own.
    pub(crate) fn note(&mut self, what: &dyn fmt::Debug) {
        self.trace.record(self.now, what);
    }

    /// Until when an event has to wait, because the process that it concerns stands still.
    fn frozen(&self, event: &Event) -> Option<Time> {
        let host = match event {
            Event::Layer(host, ..)
            | Event::Acts(host, ..)
            | Event::Dial(host, ..)
            | Event::DialPeer(host, ..)
            | Event::Quic(host, ..) => Some(*host),
            Event::Stream(no, StreamEvent::Opens | StreamEvent::Piece) => {
                self.streams.get(no).and_then(|stream| self.receiving(stream))
            }
            Event::Stream(no, _) => self.streams.get(no).map(Stream::sender),
            _ => None,
        };
        host.map(|host| self.hosts[host].paused).filter(|until| self.now < *until)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Node(host, life, event) => self.tell_node(host, life, event),
            Event::Turn(host, life) => self.turn(host, life),
            Event::Acts(host, life, Later(acts)) => self.acts(host, life, acts),
            Event::Layer(host, life, layer) => self.compute(host, life, layer),
            Event::Arrives { link, to_dialler, message } => self.arrives(link, to_dialler, message.0),
            Event::Notices { link, dialler } => self.notices(link, dialler),
            Event::Dial(host, life, to) => self.dial(host, life, to),
            Event::DialPeer(host, life, peer) => self.dial_peer(host, life, &peer),
            Event::Stream(no, event) => self.stream(no, event),
            Event::Quic(host, life, event) => self.quic_event(host, life, event),
            Event::Client => self.client(),
            Event::Request(id, event) => self.request(id, event),
            Event::Operator => self.operator(),
            Event::Order => self.order(),
            Event::Fault => self.fault(),
            Event::Room(host) => self.hosts[host].disk.free(),
            Event::SetState(host, state) => self.set_state(host, state),
            Event::Start(host) => self.start(host),
        }
    }

    fn outcome(mut self, seed: u64) -> Outcome {
        let (state, drift) = {
            let replica = self.hosts[0].replica().expect("a world at rest has all its replicas");
            let cluster = replica.cluster();
            (cluster.snapshot(), cluster.holders().drift())
        };
        self.trace.hash.update(&state);
        let count = |end| self.gateway.requests.values().filter(|r| r.end == Some(end)).count() as u64;
        let (forgotten, gaps) = (self.watch.forgotten, self.ledger.gaps());
        assert!(gaps == 0 || forgotten > 0, "I6: {gaps} reports do not build on what the index has, and none was lost");
        let writes =
            self.writes_while_lent + self.hosts.iter().filter_map(HostState::node).map(|n| n.memory.writes_while_lent).sum::<u64>();
        assert_eq!(writes, 0, "I5: writes into cells that streams read");
        assert!(
            drift.found == 0 || self.drift_planted + forgotten > 0,
            "I6: {} caches differ from the index by themselves",
            drift.found
        );
        Outcome {
            drift_planted: self.drift_planted,
            drift,
            seed,
            trace: self.trace.hash.digest(),
            events: self.events,
            elapsed_us: self.now.0,
            ends: [End::Whole, End::Deadline, End::Attempts, End::ClientLeft].map(count),
            split: self.gateway.split,
            moved: self.gateway.moved,
            leaders: self.audit.terms(),
            answered: self.operators.answered(),
            datagrams: self.quic.as_ref().map_or((0, 0), |quic| (quic.sent, quic.lost)),
            broken: self.gateway.broken,
        }
    }
}

impl Trace {
    fn record(&mut self, time: Time, event: &dyn fmt::Debug) {
        self.line.clear();
        writeln!(self.line, "{time} {event:?}").expect("a string takes all");
        self.hash.update(self.line.as_bytes());
        if self.print {
            eprint!("{}", self.line);
        }
    }
}
