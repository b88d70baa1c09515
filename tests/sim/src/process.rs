//! Processes and the hosts that they run on: starts and crashes, clocks, turns of their loops, and what they want done.

use millrace_core::ids::{ReplicaId, Time};
use millrace_core::message::{BlockOp, Delta, Hello, Join, Message, Role};
use millrace_log::RaftStartError;
use millrace_log::testing::simdisk::SimDisk;

use crate::event::{Act, Event, Host, Later, Life, LinkNo, NodeEvent, ReplicaEvent};
use crate::gateway::Desk;
use crate::node::Node;
use crate::plan::REPLICAS;
use crate::replica::{Replica, Setup};
use crate::world::World;

/// How long a busy loop lets an event wait, microseconds.
const TURN_US: (u64, u64) = (0, 150);
/// A replica whose disk had no room starts again after so long, microseconds.
const START_AGAIN_US: u64 = 300_000;
/// A look through a cache is due at once, as often as there are slots; whoever is due more often would spin.
const SPINS_MAX: u32 = 100;
/// The longest time that a process which crashed is missing, microseconds.
const DOWN_MAX_US: u64 = 3_000_000;

/// What runs on a host.
pub(crate) enum Process {
    Node(Box<Node>),
    Replica(Box<Replica>),
}

/// A place where processes run, one after another.
pub(crate) struct HostState {
    pub name: String,
    pub role: Role,
    pub life: Life,
    instance: u128,
    /// What its clock showed when the world began, and by how many millionths it runs fast.
    offset_us: u64,
    skew_ppm: i64,
    pub process: Option<Process>,
    turn: Option<Time>,
    /// Turns in a row after which the next was due at once though nothing had happened.
    spins: u32,
    /// Until then nothing in the process runs.
    pub paused: Time,
    /// Until then the process waits for its disk.
    busy: Time,
    pub disk: SimDisk,
}

impl HostState {
    /// A host without a process.
    pub fn new(name: String, role: Role) -> Self {
        Self {
            name,
            role,
            life: 0,
            instance: 0,
            offset_us: 0,
            skew_ppm: 0,
            process: None,
            turn: None,
            spins: 0,
            paused: Time(0),
            busy: Time(0),
            disk: SimDisk::default(),
        }
    }

    /// What the clock of this host shows.
    pub fn local(&self, now: Time) -> Time {
        let skew_us = (now.0 as i64) / 1_000 * self.skew_ppm / 1_000;
        Time(self.offset_us.saturating_add_signed(now.0 as i64 + skew_us))
    }

    /// World time until this clock shows `then`.
    pub fn until(&self, now: Time, then: Time) -> u64 {
        let local_us = then.since(self.local(now)) as i64;
        (local_us - local_us / 1_000 * self.skew_ppm / 1_000).max(0) as u64
    }

    /// Events that wait for the process here.
    pub fn waiting(&self) -> usize {
        match &self.process {
            Some(Process::Node(node)) => node.waiting(),
            Some(Process::Replica(replica)) => replica.waiting(),
            None => 0,
        }
    }

    /// The node that runs here.
    pub fn node(&self) -> Option<&Node> {
        match &self.process {
            Some(Process::Node(node)) => Some(node),
            _ => None,
        }
    }

    /// The replica that runs here.
    pub fn replica(&self) -> Option<&Replica> {
        match &self.process {
            Some(Process::Replica(replica)) => Some(replica),
            _ => None,
        }
    }

    /// The first words of the process that runs here.
    pub fn hello(&self, model: &millrace_core::message::ModelIdentity) -> Hello {
        let (node, epoch) = self.node().and_then(|node| node.joined()).unwrap_or_default();
        Hello { cluster: "sim".into(), name: self.name.clone(), instance: self.instance, node, epoch, model: Some(model.clone()) }
    }
}

impl World {
    /// The node on a host, if it still is the one that is meant.
    pub(crate) fn node(&mut self, host: Host, life: Life) -> Option<&mut Node> {
        let state = &mut self.hosts[host];
        match &mut state.process {
            Some(Process::Node(node)) if state.life == life => Some(node),
            _ => None,
        }
    }

    /// Whether a process still runs.
    pub(crate) fn lives(&self, (host, life): (Host, Life)) -> bool {
        self.hosts[host].life == life && self.hosts[host].process.is_some()
    }

    /// The host of a name.
    pub(crate) fn host_named(&self, name: &str) -> Host {
        self.hosts.iter().position(|host| host.name == name).expect("names are those of this world's hosts")
    }

    /// The gateway on a host, if its process lives.
    pub(crate) fn desk(&self, host: Host) -> Option<Desk<'_>> {
        let state = &self.hosts[host];
        state.replica().map(|replica| Desk { host, replica, local: state.local(self.now) })
    }

    pub(crate) fn tell_node(&mut self, host: Host, life: Life, event: NodeEvent) {
        let after_us = self.random.between(TURN_US);
        if let Some(node) = self.node(host, life) {
            node.push(event);
            self.wake(host, after_us);
        }
    }

    pub(crate) fn tell_replica(&mut self, host: Host, event: ReplicaEvent) {
        let after_us = self.random.between(TURN_US);
        if let Some(Process::Replica(replica)) = &mut self.hosts[host].process {
            replica.push(event);
            self.wake(host, after_us);
        }
    }

    /// A link of a process is there: who is at its other end.
    pub(crate) fn end_up(&mut self, (host, life): (Host, Life), link: LinkNo, hello: Hello) {
        if !self.lives((host, life)) {
            return;
        }
        let peer = self.host_named(&hello.name);
        let replica = ReplicaId(peer as u64 + 1);
        match (host < REPLICAS, peer < REPLICAS) {
            (true, true) => self.tell_replica(host, ReplicaEvent::ReplicaUp(replica, link)),
            (true, false) => self.tell_replica(host, ReplicaEvent::NodeUp(link, Box::new(hello))),
            (false, true) => self.tell_node(host, life, NodeEvent::UplinkUp(replica, link)),
            (false, false) => self.tell_node(host, life, NodeEvent::PeerUp(link, hello.name, hello.epoch)),
        }
    }

    /// A link of a process is gone.
    pub(crate) fn end_down(&mut self, (host, life): (Host, Life), link: LinkNo) {
        match host < REPLICAS {
            true if self.hosts[host].life == life => self.tell_replica(host, ReplicaEvent::Down(link)),
            true => {}
            false => self.tell_node(host, life, NodeEvent::Down(link)),
        }
    }

    /// A message on a link of a process. What nodes report is lost or changed on its way, now and then.
    pub(crate) fn end_message(&mut self, (host, life): (Host, Life), link: LinkNo, mut message: Box<Message>) {
        if host >= REPLICAS {
            return self.tell_node(host, life, NodeEvent::Message(link, message));
        }
        let report = matches!(*message, Message::Delta(_) | Message::Snapshot(_));
        if self.hosts[host].life != life || report && self.random.chance(self.plan.faults.report_lost) {
            return;
        }
        if let Message::Delta(delta) = &mut *message {
            if self.random.chance(self.plan.faults.forgotten) {
                self.watch.forgotten += 1;
                return self.send(link, false, Message::DeltaApplied { epoch: delta.epoch, seq: delta.seq });
            }
            self.plant_drift(delta);
        }
        self.tell_replica(host, ReplicaEvent::Message(link, message));
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
            delta.ops.push(BlockOp::Stored(millrace_core::ids::BlockHash(name.to_le_bytes())));
        }
    }

    /// Lets the loop of a host have a turn after so long, or earlier.
    pub(crate) fn wake(&mut self, host: Host, after_us: u64) {
        let (at, state) = (self.now.after(after_us), &mut self.hosts[host]);
        if state.turn.is_none_or(|turn| at < turn) {
            state.turn = Some(at);
            let life = state.life;
            self.schedule(after_us, Event::Turn(host, life));
        }
    }

    /// One turn of a process's loop, unless it stands still or waits for its disk.
    pub(crate) fn turn(&mut self, host: Host, life: Life) {
        let (now, state) = (self.now, &mut self.hosts[host]);
        if state.life != life || state.turn != Some(now) {
            return;
        }
        state.turn = None;
        let free = state.paused.max(state.busy);
        if now < free {
            return self.wake(host, free.since(now));
        }
        let (local, syncs) = (state.local(now), state.disk.syncs());
        let (acts, deadline) = match &mut state.process {
            Some(Process::Node(node)) => (node.turn(local), node.deadline()),
            Some(Process::Replica(replica)) => (replica.turn(local), replica.deadline()),
            None => return,
        };
        state.spins = if deadline > local || state.waiting() > 0 { 0 } else { state.spins + 1 };
        assert!(state.spins <= SPINS_MAX, "I7: {} is due again at once, again and again", state.name);
        if let Some(Process::Node(node)) = &mut state.process {
            std::mem::take(&mut node.ended).into_iter().for_each(|attempt| self.watch.cancelled((host, life), attempt));
        }
        let after_us = state.until(now, deadline).max(1_000);
        let syncs = state.disk.syncs() - syncs;
        let waits_us: u64 = (0..syncs).map(|_| self.random.between(self.plan.sync_us)).sum();
        if waits_us == 0 {
            self.acts(host, life, acts);
        } else {
            self.hosts[host].busy = now.after(waits_us);
            self.schedule(waits_us, Event::Acts(host, life, Later(acts)));
        }
        self.wake(host, after_us.max(waits_us));
    }

    /// Does what a process wants done.
    pub(crate) fn acts(&mut self, host: Host, life: Life, acts: Vec<Act>) {
        for act in acts {
            if !self.lives((host, life)) {
                return;
            }
            self.act(host, life, act);
        }
    }

    /// Lets the watcher see what a node wants done.
    fn watch(&mut self, host: Host, life: Life, act: &Act) {
        let Some(node) = self.hosts[host].node() else { return };
        match act {
            Act::Send(_, message) => {
                self.watch.says((host, life), node.joined(), node.batch().stats().preemptions > 0, message);
            }
            Act::Span(job) => {
                let layout = &self.plan.model.layout;
                self.watch.sends((host, life), job, (layout.block_tokens, layout.cell_bytes()));
            }
            Act::Step => node.step().into_iter().for_each(|step| self.watch.computes((host, life), step)),
            _ => {}
        }
    }

    fn act(&mut self, host: Host, life: Life, act: Act) {
        self.watch(host, life, &act);
        match act {
            Act::Send(link, message) => {
                let from_dialler = self.links.get(&link).is_some_and(|l| l.dialler.0 == host);
                self.send(link, from_dialler, message);
            }
            Act::Dial(peer) => {
                let after_us = self.random.between(self.plan.delay_us);
                self.schedule(after_us, Event::DialPeer(host, life, Box::new(peer)));
            }
            Act::Close(link) => self.cut(link),
            Act::Span(job) => self.start_stream(host, life, job),
            Act::StopSpans(attempt) => self.stop_streams(host, attempt),
            Act::Step => self.next_layer(host, life, 0),
            Act::Exit => self.crash(host),
            Act::Gateway(from, message) => self.tell_gateway(host, from, message),
            Act::Look => self.sweep(host),
            Act::Operated(no, outcome) => self.operators.answered_with(no, outcome),
        }
    }

    fn next_layer(&mut self, host: Host, life: Life, layer: u16) {
        let tokens = self.node(host, life).map_or(0, |node| node.step_tokens()) as u64;
        let after_us = self.random.between(self.plan.layer_us) * (1 + tokens / 4);
        self.schedule(after_us, Event::Layer(host, life, layer));
    }

    /// The engine computes a layer.
    pub(crate) fn compute(&mut self, host: Host, life: Life, layer: u16) {
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

    /// Starts a process on a host that has none.
    pub(crate) fn start(&mut self, host: Host) {
        let (instance, offset_us) = (self.random.word().into(), self.random.below(1 << 40));
        let skew_ppm = self.random.below(2 * self.plan.skew_ppm + 1) as i64 - self.plan.skew_ppm as i64;
        let state = &mut self.hosts[host];
        if state.process.is_some() {
            return;
        }
        state.life += 1;
        (state.instance, state.offset_us, state.skew_ppm, state.turn) = (instance, offset_us, skew_ppm, None);
        (state.paused, state.busy) = (self.now, self.now);
        let life = state.life;
        if self.quic.is_some() {
            self.quic_start(host, life);
        }
        match host < REPLICAS {
            true => self.start_replica(host),
            false => self.start_node(host),
        }
    }

    fn start_node(&mut self, host: Host) {
        let state = &mut self.hosts[host];
        let join = Join {
            name: state.name.clone(),
            role: state.role,
            address: format!("host-{host}"),
            instance: state.instance,
            pid: state.life,
            model: self.plan.model.clone(),
            slots: self.plan.slots,
        };
        state.process = Some(Process::Node(Box::new(Node::new(&self.plan, join))));
        let life = state.life;
        (0..REPLICAS).for_each(|to| self.schedule(0, Event::Dial(host, life, to)));
        self.wake(host, 0);
    }

    fn start_replica(&mut self, host: Host) {
        let setup = Setup {
            id: ReplicaId(host as u64 + 1),
            replicas: REPLICAS as u64,
            disk: self.hosts[host].disk.clone(),
            base: self.base,
            seed: self.random.word(),
            entries_max: self.plan.entries_max,
            ledger: self.ledger.clone(),
        };
        match Replica::start(setup, self.hosts[host].local(self.now)) {
            Ok(replica) => {
                self.hosts[host].process = Some(Process::Replica(Box::new(replica)));
                let life = self.hosts[host].life;
                // Of each pair, the one with the higher number dials.
                (0..host).for_each(|to| self.schedule(0, Event::Dial(host, life, to)));
                self.wake(host, 0);
            }
            Err(RaftStartError::Disk(_)) => {
                self.lose_links(host);
                self.schedule(START_AGAIN_US, Event::Start(host));
            }
            Err(error) => panic!("replica {} does not start: {error}", host + 1),
        }
    }

    /// The process on a host is gone, and all its links and streams with it; of what its disk was not told to keep, any part.
    pub(crate) fn crash(&mut self, host: Host) {
        let Some(process) = self.hosts[host].process.take() else { return };
        if let Process::Node(node) = &process {
            self.writes_while_lent += node.memory.writes_while_lent;
        }
        drop(process);
        self.lose_links(host);
        if host < REPLICAS {
            let random = &mut self.random;
            self.hosts[host].disk.crash(&mut |bytes| random.below(bytes as u64 + 1) as usize);
            self.operators.lose(host);
            let random = &mut self.random;
            self.gateway.move_from(host, || random.below(REPLICAS as u64) as Host);
        }
        let after_us = self.random.below(DOWN_MAX_US);
        self.schedule(after_us, Event::Start(host));
    }
}
