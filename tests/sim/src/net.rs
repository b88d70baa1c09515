//! Links and KV streams. A link keeps the order of its control messages, each way; streams keep none, among themselves or with
//! messages. A link that is cut loses what is on its way, and its ends notice at different times. Nothing is lost or damaged on a
//! live link, as QUIC promises, but for what a plan damages on purpose.

use millrace_core::ids::AttemptId;
use millrace_core::message::{Message, Peer};

use crate::event::{Event, Host, Life, LinkNo, NodeEvent, Said, SpanJob, StreamEvent, StreamNo};
use crate::memory::digest;
use crate::node::Cell;
use crate::plan::REPLICAS;
use crate::process::Process;
use crate::world::World;

/// Cells of a stream that arrive at a time.
const PIECE_CELLS: (u64, u64) = (1, 12);
/// How long an end takes to notice that a link is cut, microseconds.
const NOTICE_US: [u64; 4] = [0, 1_000, 100_000, 2_000_000];
/// How long a process waits before it dials a replica again, microseconds.
const REDIAL_US: (u64, u64) = (50_000, 500_000);

/// A link.
#[derive(Debug)]
pub struct Link {
    /// Who dialled it.
    pub dialler: (Host, Life),
    /// The other end.
    pub acceptor: (Host, Life),
    open: bool,
    /// When the last message to the dialler, and to the other end, arrives.
    last: [u64; 2],
}

/// A KV stream.
#[derive(Debug)]
pub struct Stream {
    job: SpanJob,
    host: Host,
    life: Life,
    cells: Vec<Cell>,
    arrived: usize,
    lent: bool,
    sent: bool,
    stopped: bool,
}

impl Stream {
    /// What is sent.
    pub fn job(&self) -> &SpanJob {
        &self.job
    }

    /// Its cells, once they are lent.
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// Whose cells it reads.
    pub fn sender(&self) -> Host {
        self.host
    }
}

impl Link {
    fn end(&self, dialler: bool) -> (Host, Life) {
        if dialler { self.dialler } else { self.acceptor }
    }

    fn joins(&self, a: Host, b: Host) -> bool {
        [(a, b), (b, a)].contains(&(self.dialler.0, self.acceptor.0))
    }

    fn ends_at(&self, host: Host) -> bool {
        self.dialler.0 == host || self.acceptor.0 == host
    }
}

impl World {
    fn delay(&mut self) -> u64 {
        self.random.between(self.plan.delay_us)
    }

    fn new_link(&mut self, dialler: (Host, Life), acceptor: (Host, Life)) -> LinkNo {
        let no = self.next_no();
        self.links.insert(no, Link { dialler, acceptor, open: true, last: [0; 2] });
        no
    }

    /// A number that no link or stream had.
    pub(crate) fn next_no(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Puts a message on a link, if it is open.
    pub(crate) fn send(&mut self, link: LinkNo, from_dialler: bool, message: Message) {
        let (delay_us, again) = (self.delay(), self.random.chance(self.plan.faults.repeated));
        if self.quic.is_some() {
            (again && may_come_twice(&message)).then(|| self.quic_say(link, &message));
            return self.quic_say(link, &message);
        }
        let Some(state) = self.links.get_mut(&link).filter(|l| l.open) else { return };
        let last = &mut state.last[usize::from(from_dialler)];
        let at = (self.now.0 + delay_us).max(*last + 1);
        *last = at;
        let arrives = |message| Event::Arrives { link, to_dialler: !from_dialler, message: Said(Box::new(message)) };
        let after_us = at - self.now.0;
        if again && may_come_twice(&message) {
            let late_us = after_us + self.random.below(1 + 20 * delay_us);
            self.schedule(late_us, arrives(message.clone()));
        }
        self.schedule(after_us, arrives(message));
    }

    pub(crate) fn arrives(&mut self, link: LinkNo, to_dialler: bool, message: Box<Message>) {
        let Some(state) = self.links.get(&link).filter(|l| l.open) else { return };
        self.end_message(state.end(to_dialler), link, message);
    }

    /// Cuts a link: nothing arrives any more, and the ends notice sooner or later.
    pub(crate) fn cut(&mut self, link: LinkNo) {
        if self.quic.is_some() {
            return self.quic_close(link);
        }
        let Some(state) = self.links.get_mut(&link).filter(|l| l.open) else { return };
        state.open = false;
        for dialler in [true, false] {
            let after_us = self.random.pick(&NOTICE_US);
            self.schedule(after_us, Event::Notices { link, dialler });
        }
    }

    pub(crate) fn notices(&mut self, link: LinkNo, dialler: bool) {
        let Some(state) = self.links.get(&link) else { return };
        let ((host, life), (to, _)) = (state.end(dialler), state.end(!dialler));
        self.end_down((host, life), link);
        let cut: Vec<_> = self.streams.iter().filter(|(_, s)| s.job.link == link && s.host == host).map(|(no, _)| *no).collect();
        for no in cut {
            self.end_stream(no, Some("the connection is lost"));
        }
        if dialler && to < REPLICAS {
            self.dial_again(host, life, to);
        }
    }

    pub(crate) fn dial_again(&mut self, host: Host, life: Life, to: Host) {
        let after_us = self.random.between(REDIAL_US);
        self.schedule(after_us, Event::Dial(host, life, to));
    }

    /// Links need both directions.
    fn unreachable(&self, from: Host, to: Host) -> bool {
        let until = |key| self.outages.get(&key).is_some_and(|until| self.now < *until);
        until((from, to)) || until((to, from))
    }

    /// Makes a link, if the other end can be reached; false if not.
    fn connect(&mut self, dialler: (Host, Life), to: Host) -> bool {
        let there = (to, self.hosts[to].life);
        if !self.lives(there) || self.unreachable(dialler.0, to) || self.now < self.hosts[to].paused {
            return false;
        }
        let link = self.new_link(dialler, there);
        let (ours, theirs) = (self.hosts[dialler.0].hello(&self.plan.model), self.hosts[to].hello(&self.plan.model));
        self.end_up(there, link, ours);
        self.end_up(dialler, link, theirs);
        true
    }

    /// A process tries to reach a replica.
    pub(crate) fn dial(&mut self, host: Host, life: Life, to: Host) {
        if !self.lives((host, life)) {
            return;
        }
        if self.quic.is_some() {
            self.quic_dial(host, to);
        } else if !self.connect((host, life), to) {
            self.dial_again(host, life, to);
        }
    }

    /// A node tries to reach another.
    pub(crate) fn dial_peer(&mut self, host: Host, life: Life, peer: &Peer) {
        let to = self.host_named(&peer.name);
        if !self.lives((host, life)) {
            return;
        }
        if self.quic.is_some() {
            self.quic_dial(host, to);
        } else if !self.connect((host, life), to) {
            let after_us = self.delay();
            self.schedule(after_us, Event::Node(host, life, NodeEvent::DialFailed(peer.name.clone())));
        }
    }

    /// Cuts all links between two hosts.
    pub(crate) fn cut_between(&mut self, a: Host, b: Host) {
        let links: Vec<_> = self.links.iter().filter(|(_, l)| l.joins(a, b)).map(|(no, _)| *no).collect();
        links.into_iter().for_each(|link| self.cut(link));
    }

    // --- KV streams ------------------------------------------------------------------------------------------------

    pub(crate) fn start_stream(&mut self, host: Host, life: Life, job: SpanJob) {
        let no = self.next_no();
        let (cells, arrived) = (Vec::new(), 0);
        self.streams.insert(no, Stream { job, host, life, cells, arrived, lent: false, sent: false, stopped: false });
        let after_us = self.random.between(self.plan.task_us);
        self.schedule(after_us, Event::Stream(no, StreamEvent::Lend));
    }

    /// Gives up the streams of an attempt that are not sent yet.
    pub(crate) fn stop_streams(&mut self, host: Host, attempt: AttemptId) {
        let mine = self.streams.iter_mut().filter(|(_, s)| s.host == host && s.job.attempt == attempt && !s.sent);
        let stopped: Vec<_> = mine.map(|(no, s)| (s.stopped = true, *no).1).collect();
        for no in stopped {
            let after_us = self.random.below(50);
            self.schedule(after_us, Event::Stream(no, StreamEvent::Stopped));
        }
    }

    pub(crate) fn stream(&mut self, no: StreamNo, event: StreamEvent) {
        let Some(stream) = self.streams.get(&no) else { return };
        let (sent, open) = (stream.sent, self.links.get(&stream.job.link).is_some_and(|l| l.open));
        match event {
            StreamEvent::Lend => self.lend(no),
            StreamEvent::Stopped if self.quic.is_some() => {
                if !sent {
                    self.quic_cells_stop(stream.job.link, no);
                }
            }
            StreamEvent::Sent if open => self.sent(no),
            StreamEvent::Sent => self.end_stream(no, Some("the connection is lost")),
            // A task that has not begun may still send before it sees that it should not.
            StreamEvent::Stopped if !sent && self.random.chance(500) => self.end_stream(no, Some("the hand-over is over")),
            StreamEvent::Stopped => {}
            StreamEvent::Opens if open => self.opens(no),
            StreamEvent::Piece if open => self.piece(no),
            StreamEvent::Opens | StreamEvent::Piece => {}
            StreamEvent::Drained => self.end_stream(no, (!sent).then_some("the receiver refused the stream")),
        }
    }

    fn lend(&mut self, no: StreamNo) {
        let (sent_us, opens_us) = (self.delay(), self.delay());
        let Some(stream) = self.streams.get_mut(&no) else { return };
        let state = &mut self.hosts[stream.host];
        let alive = state.life == stream.life;
        let Some(Process::Node(node)) = state.process.as_mut().filter(|_| alive) else { return };
        for (layer, block, slot, name) in &stream.job.cells {
            let words = node.memory.lend(slot.slot, *layer);
            let digest = digest(name, *layer, &words);
            let whole = (*block + 1) * u32::from(self.plan.model.layout.block_tokens) <= stream.job.tokens;
            if whole && !stream.stopped {
                let first = *self.truth.entry((*name, *layer)).or_insert(digest);
                assert_eq!(digest, first, "I2: {}: block {block} of layer {layer} is sent with another's KV", stream.job.attempt);
            }
            stream.cells.push(Cell { layer: *layer, block: *block, words, digest });
        }
        stream.lent = true;
        let link = stream.job.link;
        if self.quic.is_some() {
            return self.quic_cells(link, no);
        }
        self.schedule(sent_us, Event::Stream(no, StreamEvent::Sent));
        self.schedule(opens_us, Event::Stream(no, StreamEvent::Opens));
    }

    /// The transport has all of a stream.
    pub(crate) fn sent(&mut self, no: StreamNo) {
        let Some(stream) = self.streams.get_mut(&no) else { return };
        stream.sent = true;
        let digest_sum = stream.cells.iter().fold(0u64, |sum, cell| sum.wrapping_add(cell.digest));
        let event = NodeEvent::SpanSent(stream.job.attempt, stream.job.span, digest_sum);
        let (host, life) = (stream.host, stream.life);
        self.tell_node(host, life, event);
    }

    /// The receiving end of a stream, if it lives.
    fn receiver(&self, stream: &Stream) -> Option<(Host, Life)> {
        let link = self.links.get(&stream.job.link)?;
        let end = link.end(link.dialler.0 != stream.host);
        self.lives(end).then_some(end)
    }

    /// The process at the other end of an open link, if it lives. Where QUIC is the network each end has a number of its own.
    pub(crate) fn other_end(&self, link: LinkNo, (host, _): (Host, Life)) -> Option<(Host, Life)> {
        let link = self.links.get(&link).filter(|link| link.open)?;
        let end = link.end(link.dialler.0 != host);
        self.lives(end).then_some(end)
    }

    /// The host that a stream goes to.
    pub(crate) fn receiving(&self, stream: &Stream) -> Option<Host> {
        self.receiver(stream).map(|(host, _)| host)
    }

    fn opens(&mut self, no: StreamNo) {
        let Some(stream) = self.streams.get(&no) else { return };
        let Some((host, life)) = self.receiver(stream) else { return };
        let SpanJob { attempt, link, span, generation, .. } = stream.job;
        let admitted = self.node(host, life).is_some_and(|node| node.stream_opens(link, attempt, generation, &span));
        self.wake(host, 0);
        let after_us = self.delay();
        self.schedule(after_us, Event::Stream(no, if admitted { StreamEvent::Piece } else { StreamEvent::Drained }));
    }

    fn piece(&mut self, no: StreamNo) {
        let (count, after_us) = (self.random.between(PIECE_CELLS) as usize, self.random.below(200));
        let (damage, swap) = (self.random.chance(self.plan.faults.damaged), self.random.chance(500));
        let Some(stream) = self.streams.get(&no) else { return };
        let Some((host, life)) = self.receiver(stream) else { return };
        let (attempt, generation) = (stream.job.attempt, stream.job.generation);
        // The last cell cannot be there before the sender's transport has it.
        let limit = if stream.sent { stream.cells.len() } else { stream.cells.len() - 1 };
        let mut cells: Vec<_> = stream.cells[stream.arrived..limit.min(stream.arrived + count).max(stream.arrived)].to_vec();
        let damaged = damage && damage_one(&mut cells, &stream.cells, swap);
        if damaged {
            self.gateway.damaged.insert(attempt);
        }
        let Some(node) = self.node(host, life) else { return };
        let taken = cells.iter().take_while(|cell| node.cell_arrives(attempt, generation, cell)).count();
        assert!(!damaged || taken == 0 || !node.is_receiving(attempt), "I2: {attempt}: a damaged cell counts as arrived");
        self.wake(host, 0);
        let Some(stream) = self.streams.get_mut(&no) else { return };
        stream.arrived += taken;
        let over = taken < cells.len() || stream.arrived == stream.cells.len();
        self.schedule(after_us, Event::Stream(no, if over { StreamEvent::Drained } else { StreamEvent::Piece }));
    }

    /// A stream reads its cells no more.
    pub(crate) fn end_stream(&mut self, no: StreamNo, error: Option<&'static str>) {
        let Some(stream) = self.streams.remove(&no) else { return };
        let (host, life) = (stream.host, stream.life);
        if let Some(node) = self.node(host, life).filter(|_| stream.lent) {
            stream.job.cells.iter().for_each(|(layer, _, slot, _)| node.memory.give_back(slot.slot, *layer));
        }
        let SpanJob { attempt, link, span, .. } = stream.job;
        let drained = NodeEvent::SpanDrained(attempt, link, span, error.filter(|_| !stream.sent));
        self.tell_node(host, life, drained);
    }

    /// All links and streams of a process end with it.
    pub(crate) fn lose_links(&mut self, host: Host) {
        self.streams.retain(|_, stream| stream.host != host);
        if self.quic.is_some() {
            return self.quic_lose(host);
        }
        let links: Vec<_> = self.links.iter().filter(|(_, l)| l.open && l.ends_at(host)).map(|(no, _)| *no).collect();
        links.into_iter().for_each(|link| self.cut(link));
    }
}

/// Damages the first of the cells that arrive: a bit, or all of it is another cell of the stream, digest and all.
fn damage_one(cells: &mut [Cell], stream: &[Cell], swap: bool) -> bool {
    let Some(cell) = cells.first_mut() else { return false };
    match stream.iter().find(|other| swap && other.words != cell.words) {
        Some(other) => (cell.words, cell.digest) = (other.words.clone(), other.digest),
        None => cell.words[0] ^= 1 << 7,
    }
    true
}

/// Messages that have no effect the second time, by design: they name what is past.
fn may_come_twice(message: &Message) -> bool {
    !matches!(message, Message::Assign(_) | Message::Open(_) | Message::Join(_) | Message::Leave { .. } | Message::Forward { .. })
}
