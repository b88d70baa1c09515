//! A sender and a receiver joined by a network that delays, reorders and breaks, over many seeds: a hand-over either ends whole
//! and equal on both sides, or both sides know that it failed; nothing hangs past the deadline. A link that is cut and made anew costs
//! what was on its way, and no more.

use millrace_core::ids::{BlockHash, Generation, Slot, SlotRef, Time};
use millrace_core::message::FailKind;
use millrace_core::sampling::mix;
use millrace_core::transfer::gate::{Gate, Place};
use millrace_core::transfer::recv::{self, Receiver};
use millrace_core::transfer::send::{self, Sender};
use millrace_core::transfer::{Grid, Span};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

#[derive(Clone, Debug)]
enum Wire {
    Open,
    Granted,
    Resume(Generation),
    Resumed(Vec<u64>),
    Cells(Span),
    Fin(send::Output),
    Credit(u64),
    Complete,
    AbortToReceiver(FailKind),
    AbortToSender(FailKind),
}

#[derive(Debug, PartialEq)]
enum End {
    Whole,
    Failed(FailKind),
}

struct Pair {
    random: Random,
    now: Time,
    sender: Sender,
    receiver: Receiver,
    gate: Gate,
    grid: Grid,
    generation: Generation,
    have: u32,
    wire: Vec<Wire>,
    /// Cells that the sender has put on streams, and those of them that a cut lost.
    sent_cells: u64,
    lost_cells: u64,
    sender_end: Option<End>,
    receiver_end: Option<End>,
}

fn digest(layer: u16, block: u32) -> u64 {
    mix(u64::from(layer) << 32 | u64::from(block))
}

/// Block `i` is in slot `i`.
fn gate(grid: Grid, have: u32, generation: Generation) -> Gate {
    let table = (0..grid.blocks).map(|block| SlotRef { slot: Slot(block), generation: Generation(0) }).collect();
    Gate::new(grid, have, generation, table, vec![BlockHash::default(); grid.blocks as usize])
}

impl Pair {
    fn new(seed: u64) -> (Self, Grid) {
        let mut random = Random(seed);
        let grid = Grid {
            layers: 1 + random.below(40) as u16,
            blocks: 1 + random.below(60) as u32,
            cell_bytes: 1 << (8 + random.below(12)),
        };
        let have = random.below(u64::from(grid.blocks) + 1) as u32;
        let cached = random.below(u64::from(grid.blocks)) as u32;
        let generation = Generation(1 + random.below(9) as u32);
        let deadline = Time(100_000);
        let mut pair = Self {
            random,
            now: Time(0),
            sender: Sender::new(grid, cached, deadline),
            receiver: Receiver::new(grid, have, generation, deadline),
            gate: gate(grid, have, generation),
            grid,
            generation,
            have,
            wire: vec![],
            sent_cells: 0,
            lost_cells: 0,
            sender_end: None,
            receiver_end: None,
        };
        pair.sender.handle(Time(0), send::Input::Linked);
        (pair, grid)
    }

    fn drain(&mut self) {
        while let Some(out) = self.sender.poll() {
            match out {
                send::Output::Open => self.wire.push(Wire::Open),
                send::Output::Resume(generation) => self.wire.push(Wire::Resume(generation)),
                send::Output::Cells { span, generation } => {
                    assert_eq!(generation, self.generation);
                    self.sent_cells += span.cells();
                    self.wire.push(Wire::Cells(span));
                    let digest_sum = span.iter().fold(0u64, |sum, (l, b)| sum.wrapping_add(digest(l, b)));
                    self.sender.handle(self.now, send::Input::Sent { span, digest_sum });
                }
                fin @ send::Output::Fin { .. } => self.wire.push(Wire::Fin(fin)),
                send::Output::Abort(kind, _) => self.wire.push(Wire::AbortToReceiver(kind)),
                send::Output::Done { .. } => self.sender_end = Some(End::Whole),
                send::Output::Failed(kind, _) => self.sender_end = Some(End::Failed(kind)),
            }
        }
        while let Some(out) = self.receiver.poll() {
            match out {
                recv::Output::Granted => self.wire.push(Wire::Granted),
                recv::Output::Resumed => self.wire.push(Wire::Resumed(self.gate.stands().words().to_vec())),
                recv::Output::Credit(bytes) => self.wire.push(Wire::Credit(bytes)),
                recv::Output::Complete { .. } => {
                    self.receiver_end = Some(End::Whole);
                    self.wire.push(Wire::Complete);
                }
                recv::Output::Abort(kind, _) => self.wire.push(Wire::AbortToSender(kind)),
                recv::Output::Failed(kind, _) => self.receiver_end = Some(End::Failed(kind)),
            }
        }
        self.sender.check();
        self.receiver.check();
    }

    /// Delivers one message; control messages of one direction keep their order, streams do not.
    fn deliver(&mut self, corrupt: bool) {
        let at = self.random.below(self.wire.len() as u64) as usize;
        let is_cells = matches!(self.wire[at], Wire::Cells(_));
        let at = if is_cells { at } else { self.wire.iter().position(|w| !matches!(w, Wire::Cells(_))).expect("it is there") };
        match self.wire.remove(at) {
            Wire::Open => self.receiver.handle(self.now, recv::Input::Reopened),
            Wire::Resume(generation) => self.receiver.handle(self.now, recv::Input::Resume(generation)),
            Wire::Resumed(stands) => {
                let (generation, credit_bytes) = (self.generation, self.receiver.credit_bytes());
                self.sender.handle(self.now, send::Input::Resumed { generation, credit_bytes, stands });
            }
            Wire::Granted => {
                let (have_blocks, generation, credit_bytes) = (self.have, self.generation, self.receiver.credit_bytes());
                self.sender.handle(self.now, send::Input::Granted { have_blocks, generation, credit_bytes });
            }
            Wire::Cells(span) => self.deliver_cells(span, corrupt),
            Wire::Fin(fin) => {
                let send::Output::Fin { generation, cells, digest_sum, first_token, finished } = fin else { unreachable!() };
                self.receiver.handle(self.now, recv::Input::Fin { generation, cells, digest_sum, first_token, finished });
            }
            Wire::Credit(bytes) => self.sender.handle(self.now, send::Input::Credit(bytes)),
            Wire::Complete => self.sender.handle(self.now, send::Input::Received),
            Wire::AbortToReceiver(kind) => self.receiver.handle(self.now, recv::Input::Aborted(kind, String::new())),
            Wire::AbortToSender(kind) => self.sender.handle(self.now, send::Input::Aborted(kind, String::new())),
        }
    }

    fn deliver_cells(&mut self, span: Span, corrupt: bool) {
        if self.gate.admit(self.generation, &span) {
            for (layer, block) in span.iter() {
                match self.gate.place(self.generation, layer, block) {
                    Place::Write(slot, _) => {
                        assert_eq!(slot, Slot(block));
                        let expected = digest(layer, block);
                        self.gate.placed(layer, block, expected ^ u64::from(corrupt), expected);
                    }
                    Place::Stands => {}
                    Place::Closed => break,
                }
            }
        }
        self.gate.check();
        self.receiver.handle(self.now, recv::Input::Standing(self.gate.standing().clone()));
    }
}

impl Pair {
    /// Cuts the link and makes another; the ends notice in this order. What is on its way is lost, but that a receiver which has
    /// everything says so again, as a node does.
    fn cut(&mut self) {
        let cells = |wire: &Wire| if let Wire::Cells(span) = wire { span.cells() } else { 0 };
        self.lost_cells += self.wire.iter().map(cells).sum::<u64>();
        self.wire.clear();
        self.sender.handle(self.now, send::Input::LinkLost);
        self.receiver.handle(self.now, recv::Input::LinkLost);
        self.sender.handle(self.now, send::Input::Linked);
        self.drain();
        if self.receiver_end == Some(End::Whole) && self.wire.iter().any(|wire| matches!(wire, Wire::Resume(_))) {
            self.wire = vec![Wire::Complete];
        }
    }
}

/// Runs one seed: compute goes layer by layer in chunks while the wire delivers in random order.
/// `fault` ends it at that step; `cut` cuts the link three times, so many steps apart; 0 is never.
fn run(seed: u64, fault: u64, cut: u64) -> Pair {
    let (mut pair, grid) = Pair::new(seed);
    let chunk = 1 + pair.random.below(u64::from(grid.blocks)) as u32;
    let mut work: Vec<(u16, u32)> = (0..grid.blocks.div_ceil(chunk))
        .flat_map(|c| (0..grid.layers).map(move |l| (l, ((c + 1) * chunk).min(grid.blocks))))
        .rev()
        .collect();
    let mut computed = false;
    for step in 0..100_000u64 {
        pair.now = Time(step);
        pair.drain();
        if pair.sender_end.is_some() && pair.receiver_end.is_some() {
            break;
        }
        if cut > 0 && step % cut == 0 && step / cut <= 3 {
            pair.cut();
        }
        if fault > 0 && step == fault {
            match fault % 3 {
                0 => pair.sender.handle(pair.now, send::Input::Cancel(FailKind::Stopping, String::new())),
                1 => pair.receiver.handle(pair.now, recv::Input::Cancel(FailKind::Stopping, String::new())),
                _ => {
                    pair.wire.clear();
                    pair.sender.handle(pair.now, send::Input::PeerLost(String::new()));
                    pair.receiver.handle(pair.now, recv::Input::LinkLost);
                }
            }
            continue;
        }
        if pair.random.below(2) == 0 && !pair.wire.is_empty() {
            pair.deliver(false);
        } else if let Some((layer, blocks)) = work.pop() {
            pair.sender.handle(pair.now, send::Input::Ready { layer, blocks });
        } else if !computed {
            computed = true;
            pair.sender.handle(pair.now, send::Input::Computed { first_token: 7, finished: false });
        } else {
            pair.sender.handle(pair.now, send::Input::Tick);
            pair.receiver.handle(pair.now, recv::Input::Tick);
        }
    }
    pair.now = Time(100_001);
    pair.sender.handle(pair.now, send::Input::Tick);
    pair.receiver.handle(pair.now, recv::Input::Tick);
    pair.drain();
    pair
}

#[test]
fn undisturbed_hand_overs_are_whole() {
    for seed in 0..500 {
        let pair = run(seed, 0, 0);
        assert_eq!((&pair.sender_end, &pair.receiver_end), (&Some(End::Whole), &Some(End::Whole)), "seed {seed}");
    }
}

#[test]
fn a_fault_at_any_step_ends_both_sides() {
    for seed in 0..500 {
        let pair = run(seed, 1 + seed % 90, 0);
        assert!(pair.sender_end.is_some() && pair.receiver_end.is_some(), "seed {seed}");
        let whole_at_sender = pair.sender_end == Some(End::Whole);
        assert!(!whole_at_sender || pair.receiver_end == Some(End::Whole), "seed {seed}: sender believes what is not so");
    }
}

#[test]
fn a_cut_link_costs_what_was_on_its_way() {
    for seed in 0..500 {
        let pair = run(seed, 0, 1 + seed % 50);
        assert_eq!((&pair.sender_end, &pair.receiver_end), (&Some(End::Whole), &Some(End::Whole)), "seed {seed}");
        let moved = u64::from(pair.grid.layers) * u64::from(pair.grid.blocks - pair.have);
        assert_eq!(pair.sent_cells, moved + pair.lost_cells, "seed {seed}: more was sent than was missing");
        assert_eq!((pair.gate.standing().cells, pair.sender.stale_frames()), (moved, 0), "seed {seed}");
    }
}

#[test]
fn silence_ends_at_the_deadline() {
    let grid = Grid { layers: 2, blocks: 3, cell_bytes: 64 };
    let mut sender = Sender::new(grid, 0, Time(10));
    sender.handle(Time(10), send::Input::Tick);
    assert!(matches!(sender.poll(), Some(send::Output::Abort(FailKind::Deadline, _))));
    assert!(matches!(sender.poll(), Some(send::Output::Failed(FailKind::Deadline, _))));
    assert!(sender.is_over() && sender.deadline().is_none());
}

#[test]
fn a_wrong_byte_is_never_decoded() {
    let (mut pair, grid) = Pair::new(3);
    pair.have = 0;
    pair.receiver = Receiver::new(grid, 0, pair.generation, Time(100));
    pair.gate = gate(grid, 0, pair.generation);
    let span = Span { layer: 0, layers: grid.layers, block: 0, blocks: grid.blocks };
    pair.deliver_cells(span, true);
    pair.drain();
    assert_eq!(pair.receiver_end, Some(End::Failed(FailKind::Integrity)));
    assert_eq!(pair.gate.place(pair.generation, 0, 0), Place::Closed);
}

#[test]
fn an_old_generation_has_no_effect() {
    let grid = Grid { layers: 1, blocks: 1, cell_bytes: 64 };
    let mut receiver = Receiver::new(grid, 0, Generation(2), Time(100));
    let span = Span { layer: 0, layers: 1, block: 0, blocks: 1 };
    let mut gate = gate(grid, 0, Generation(2));
    assert!(!gate.admit(Generation(1), &span));
    assert_eq!(gate.place(Generation(1), 0, 0), Place::Closed);
    assert_eq!(gate.standing().fault, None, "it is late, and no fault");
    receiver
        .handle(Time(1), recv::Input::Fin { generation: Generation(1), cells: 1, digest_sum: 0, first_token: 1, finished: false });
    assert_eq!((receiver.poll(), receiver.is_over(), receiver.stale_frames()), (None, false, 1));
}

#[test]
fn full_prefix_hit_sends_nothing_and_completes() {
    let grid = Grid { layers: 4, blocks: 2, cell_bytes: 64 };
    let mut sender = Sender::new(grid, 2, Time(100));
    let mut receiver = Receiver::new(grid, 2, Generation(1), Time(100));
    sender.handle(Time(1), send::Input::Linked);
    assert_eq!(sender.poll(), Some(send::Output::Open));
    sender
        .handle(Time(1), send::Input::Granted { have_blocks: 2, generation: Generation(1), credit_bytes: receiver.credit_bytes() });
    sender.handle(Time(2), send::Input::Computed { first_token: 9, finished: true });
    let Some(send::Output::Fin { generation, cells, digest_sum, first_token, finished }) = sender.poll() else {
        panic!("the manifest of nothing is due")
    };
    assert_eq!(cells, 0);
    receiver.handle(Time(3), recv::Input::Fin { generation, cells, digest_sum, first_token, finished });
    assert_eq!(receiver.poll(), Some(recv::Output::Complete { first_token: 9, finished: true }));
}

#[test]
fn a_cell_sent_twice_is_written_once() {
    let grid = Grid { layers: 1, blocks: 2, cell_bytes: 64 };
    let mut gate = gate(grid, 0, Generation(1));
    assert!(matches!(gate.place(Generation(1), 0, 0), Place::Write(Slot(0), _)));
    gate.placed(0, 0, 1, 1);
    assert_eq!(gate.place(Generation(1), 0, 0), Place::Stands);
    assert!(matches!(gate.place(Generation(1), 0, 1), Place::Write(Slot(1), _)));
    gate.close();
    assert_eq!(gate.place(Generation(1), 0, 1), Place::Closed);
}

/// Layers of each span of a prompt whose layers are 256 KiB, when `told` of its layers are told of before it is computed.
fn groups(told: u16) -> Vec<u16> {
    let grid = Grid { layers: 30, blocks: 64, cell_bytes: 4 << 10 };
    let mut sender = Sender::new(grid, 0, Time(100));
    sender.handle(Time(1), send::Input::Linked);
    sender.handle(Time(1), send::Input::Granted { have_blocks: 0, generation: Generation(1), credit_bytes: 1 << 30 });
    (0..told).for_each(|layer| sender.handle(Time(2), send::Input::Ready { layer, blocks: grid.blocks }));
    sender.handle(Time(3), send::Input::Computed { first_token: 9, finished: false });
    let spans = std::iter::from_fn(|| sender.poll()).filter_map(|output| match output {
        send::Output::Cells { span, .. } => Some(span.layers),
        _ => None,
    });
    spans.collect()
}

#[test]
fn the_last_layers_leave_in_smaller_groups_than_those_that_compute_hides() {
    assert_eq!(groups(30), [4, 4, 4, 4, 4, 4, 3, 2, 1]);
    assert_eq!(groups(0), [4, 4, 4, 4, 4, 4, 4, 2], "what is ready at once");
}
