//! Every state of a hand-over's two halves, and everything that can happen in it, and then anything else: each half ends once and says nothing
//! after that; with nothing but time from any point on it ends by its request's deadline; and every exit is taken at once.

use millrace_core::ids::{Generation, Time};
use millrace_core::message::FailKind;
use millrace_core::transfer::gate::Standing;
use millrace_core::transfer::recv::{self, Receiver};
use millrace_core::transfer::send::{self, Sender};
use millrace_core::transfer::{Cells, Grid, RESUME_KEEP_US, RESUME_WAIT_US, Span};

const DEADLINE: Time = Time(10_000_000);
const GRID: Grid = Grid { layers: 2, blocks: 3, cell_bytes: 1 << 20 };
const GENERATION: Generation = Generation(7);
const OLD: Generation = Generation(6);
const ALL_BYTES: u64 = 6 * GRID.cell_bytes;

/// What a half has said in the end, if it has.
#[derive(Debug, Default)]
struct Said {
    ends: usize,
    told_peer: bool,
    failed: Option<FailKind>,
    whole: bool,
}

// --- the sending half --------------------------------------------------------------------------------------------------

mod sending {
    use super::*;
    use send::Input::{self, *};

    fn granted(have_blocks: u32, credit_bytes: u64) -> Input {
        Granted { have_blocks, generation: GENERATION, credit_bytes }
    }

    fn computed() -> Input {
        Computed { first_token: 9, finished: false }
    }

    fn resumed(generation: Generation, stands: Vec<u64>) -> Input {
        Resumed { generation, credit_bytes: ALL_BYTES, stands }
    }

    /// Two cells of a layer are 8 MiB, a span.
    fn span(layer: u16, block: u32, blocks: u32) -> Span {
        Span { layer, layers: 1, block, blocks }
    }

    fn sent(span: Span) -> Input {
        Sent { span, digest_sum: 5 }
    }

    fn all_sent() -> Vec<Input> {
        [span(0, 0, 2), span(0, 2, 1), span(1, 0, 2), span(1, 2, 1)].map(sent).into()
    }

    /// Each state, by the way to it.
    pub(super) fn states() -> Vec<(&'static str, Vec<Input>)> {
        let streaming = vec![Linked, granted(0, ALL_BYTES)];
        let finishing = [streaming.clone(), vec![computed()], all_sent()].concat();
        let lost = [streaming.clone(), vec![Ready { layer: 0, blocks: 3 }, LinkLost]].concat();
        vec![
            ("unlinked", vec![]),
            ("asking", vec![Linked]),
            ("asking, computed", vec![Linked, computed()]),
            ("asking, link lost", vec![Linked, LinkLost]),
            ("streaming, nothing ready", streaming.clone()),
            ("streaming, spans out", [streaming.clone(), vec![Ready { layer: 0, blocks: 2 }]].concat()),
            ("streaming, no credit", vec![Linked, computed(), granted(0, 0)]),
            ("streaming, last span out", finishing[..finishing.len() - 1].to_vec()),
            ("streaming, a span refused", [streaming.clone(), vec![Ready { layer: 0, blocks: 2 }, SpanLost("no".into())]].concat()),
            ("lost while streaming", lost.clone()),
            ("resuming", [lost.clone(), vec![Linked]].concat()),
            ("resumed", [lost, vec![Linked, resumed(GENERATION, vec![0b11])]].concat()),
            ("finishing", finishing.clone()),
            ("lost while finishing", [finishing.clone(), vec![LinkLost]].concat()),
            ("full hit", vec![Linked, granted(3, 0), computed()]),
            ("over, well", [finishing, vec![Received]].concat()),
            ("over, badly", vec![Linked, PeerLost("gone".into())]),
        ]
    }

    fn inputs() -> Vec<Input> {
        let own = |f: fn(FailKind, String) -> Input| f(FailKind::Stopping, "x".into());
        vec![
            Linked,
            LinkLost,
            granted(0, ALL_BYTES),
            granted(3, 0),
            granted(4, 0),
            Granted { have_blocks: 1, generation: OLD, credit_bytes: 1 },
            resumed(GENERATION, vec![0]),
            resumed(GENERATION, vec![0b11_1111]),
            resumed(GENERATION, vec![0b100_0000]),
            resumed(GENERATION, vec![]),
            resumed(OLD, vec![0]),
            own(Declined),
            Ready { layer: 1, blocks: 3 },
            computed(),
            Credit(1),
            Credit(u64::MAX),
            sent(span(0, 0, 2)),
            sent(span(1, 1, 1)),
            Received,
            own(Aborted),
            SpanLost("x".into()),
            PeerLost("x".into()),
            own(Cancel),
            Tick,
        ]
    }

    fn feed(sender: &mut Sender, now: Time, input: Input, said: &mut Said) {
        sender.handle(now, input);
        sender.check();
        while let Some(output) = sender.poll() {
            assert_eq!(said.ends, 0, "{output:?} after the end");
            match output {
                send::Output::Abort(..) => said.told_peer = true,
                send::Output::Done { bytes, .. } => {
                    (said.ends, said.whole) = (1, true);
                    assert!(bytes == ALL_BYTES || bytes == 0);
                }
                send::Output::Failed(kind, _) => (said.ends, said.failed) = (1, Some(kind)),
                _ => {}
            }
        }
        assert_eq!(sender.is_over(), said.ends == 1);
    }

    pub(super) fn reach(way: &[Input]) -> (Sender, Said) {
        let (mut sender, mut said) = (Sender::new(GRID, 0, DEADLINE), Said::default());
        way.iter().for_each(|input| feed(&mut sender, Time(1), input.clone(), &mut said));
        (sender, said)
    }

    #[test]
    fn whatever_happens_it_ends_once_and_in_time() {
        for (state, way) in states() {
            for first in inputs() {
                for second in inputs() {
                    let (mut sender, mut said) = reach(&way);
                    feed(&mut sender, Time(2), first.clone(), &mut said);
                    feed(&mut sender, Time(3), second.clone(), &mut said);
                    for _ in 0..3 {
                        let Some(deadline) = sender.deadline() else { break };
                        assert!(deadline <= DEADLINE);
                        feed(&mut sender, deadline, Tick, &mut said);
                    }
                    assert_eq!(said.ends, 1, "{state}, {first:?}, {second:?}: {sender:?}");
                }
            }
        }
    }

    #[test]
    fn every_exit_is_taken_at_once() {
        let exits = [
            (Aborted(FailKind::Integrity, "x".into()), FailKind::Integrity, false),
            (Declined(FailKind::NoRoom, "x".into()), FailKind::NoRoom, false),
            (PeerLost("x".into()), FailKind::PeerLost, false),
            (Cancel(FailKind::Engine, "x".into()), FailKind::Engine, true),
        ];
        for (state, way) in states().into_iter().filter(|(state, _)| !state.starts_with("over")) {
            for (exit, kind, told_peer) in exits.clone() {
                let (mut sender, mut said) = reach(&way);
                feed(&mut sender, Time(2), exit, &mut said);
                assert_eq!((said.failed, said.told_peer), (Some(kind), told_peer), "{state}");
            }
            let (mut sender, mut said) = reach(&way);
            feed(&mut sender, DEADLINE, Tick, &mut said);
            assert!(said.failed.is_some(), "{state} outlives its deadline");
        }
    }

    #[test]
    fn a_lost_link_is_waited_for_and_a_refused_stream_too() {
        for state in ["asking, link lost", "lost while streaming", "resuming", "lost while finishing", "streaming, a span refused"]
        {
            let way = states().into_iter().find(|(name, _)| *name == state).unwrap().1;
            let (mut sender, mut said) = reach(&way);
            let until = Time(1).after(RESUME_WAIT_US);
            assert_eq!(sender.deadline(), Some(until), "{state}");
            feed(&mut sender, Time(until.0 - 1), Tick, &mut said);
            assert_eq!(said.ends, 0);
            feed(&mut sender, until, Tick, &mut said);
            assert_eq!(said.failed, Some(FailKind::PeerLost), "{state}");
        }
    }

    #[test]
    fn a_refused_stream_on_a_lost_link_is_sent_again() {
        let (mut sender, mut said) = reach(&[Linked, granted(0, ALL_BYTES), Ready { layer: 0, blocks: 2 }, SpanLost("x".into())]);
        feed(&mut sender, Time(2), LinkLost, &mut said);
        feed(&mut sender, Time(3), Linked, &mut said);
        sender.handle(Time(4), resumed(GENERATION, vec![0]));
        assert_eq!(sender.poll(), Some(send::Output::Cells { span: span(0, 0, 2), generation: GENERATION }));
        assert_eq!((sender.poll(), sender.deadline(), sender.resumes()), (None, Some(DEADLINE), 1));
    }

    #[test]
    fn an_old_generation_is_counted_and_has_no_effect() {
        let (mut sender, mut said) = reach(&[Linked, granted(0, ALL_BYTES), LinkLost, Linked]);
        feed(&mut sender, Time(2), resumed(OLD, vec![0]), &mut said);
        feed(&mut sender, Time(2), Granted { have_blocks: 0, generation: OLD, credit_bytes: 1 }, &mut said);
        assert_eq!((sender.stale_frames(), sender.resumes(), said.ends), (2, 0, 0));
    }
}

// --- the receiving half ------------------------------------------------------------------------------------------------

mod receiving {
    use super::*;
    use recv::Input::{self, *};

    fn standing(cells: u64) -> Input {
        Standing(super::Standing { generation: GENERATION, cells, digest_sum: cells * 5, fault: None })
    }

    fn fin(generation: Generation, cells: u64, digest_sum: u64) -> Input {
        Fin { generation, cells, digest_sum, first_token: 3, finished: false }
    }

    fn states() -> Vec<(&'static str, Vec<Input>)> {
        vec![
            ("granted", vec![]),
            ("some stand", vec![standing(2)]),
            ("all stand", vec![standing(6)]),
            ("manifest first", vec![fin(GENERATION, 6, 30)]),
            ("manifest and some", vec![fin(GENERATION, 6, 30), standing(2)]),
            ("link lost", vec![standing(2), LinkLost]),
            ("resumed", vec![standing(2), LinkLost, Resume(GENERATION)]),
            ("reopened", vec![LinkLost, Reopened]),
            ("over, well", vec![standing(6), fin(GENERATION, 6, 30)]),
            ("over, badly", vec![Aborted(FailKind::Stopping, "x".into())]),
        ]
    }

    fn inputs() -> Vec<Input> {
        let fault = super::Standing { generation: GENERATION, cells: 1, digest_sum: 5, fault: Some("a wrong byte".into()) };
        let old = super::Standing { generation: OLD, cells: 6, digest_sum: 30, fault: None };
        vec![
            standing(6),
            Standing(fault),
            Standing(old),
            fin(GENERATION, 6, 30),
            fin(GENERATION, 6, 31),
            fin(GENERATION, 5, 30),
            fin(GENERATION, u64::MAX, 30),
            fin(OLD, 6, 30),
            LinkLost,
            Reopened,
            Resume(GENERATION),
            Resume(OLD),
            Aborted(FailKind::Stopping, "x".into()),
            Cancel(FailKind::Stopping, "x".into()),
            Tick,
        ]
    }

    fn feed(receiver: &mut Receiver, now: Time, input: Input, said: &mut Said) {
        receiver.handle(now, input);
        receiver.check();
        while let Some(output) = receiver.poll() {
            assert_eq!(said.ends, 0, "{output:?} after the end");
            match output {
                recv::Output::Abort(..) => said.told_peer = true,
                recv::Output::Complete { .. } => (said.ends, said.whole) = (1, true),
                recv::Output::Failed(kind, _) => (said.ends, said.failed) = (1, Some(kind)),
                recv::Output::Credit(bytes) => assert!(bytes <= ALL_BYTES),
                recv::Output::Granted | recv::Output::Resumed => {}
            }
        }
        assert_eq!(receiver.is_over(), said.ends == 1);
    }

    fn reach(way: &[Input]) -> (Receiver, Said) {
        let (mut receiver, mut said) = (Receiver::new(GRID, 0, GENERATION, DEADLINE), Said::default());
        way.iter().for_each(|input| feed(&mut receiver, Time(1), input.clone(), &mut said));
        (receiver, said)
    }

    #[test]
    fn whatever_happens_it_ends_once_in_time_and_decodes_only_what_stands() {
        for (state, way) in states() {
            for first in inputs() {
                for second in inputs() {
                    let (mut receiver, mut said) = reach(&way);
                    feed(&mut receiver, Time(2), first.clone(), &mut said);
                    feed(&mut receiver, Time(3), second.clone(), &mut said);
                    let told: Vec<_> = way.iter().chain([&first, &second]).collect();
                    let all = told.contains(&&standing(6)) && told.contains(&&fin(GENERATION, 6, 30));
                    assert!(all || !said.whole, "{state}, {first:?}, {second:?}: decoded too early");
                    for _ in 0..3 {
                        let Some(deadline) = receiver.deadline() else { break };
                        assert!(deadline <= DEADLINE);
                        feed(&mut receiver, deadline, Tick, &mut said);
                    }
                    assert_eq!(said.ends, 1, "{state}, {first:?}, {second:?}: {receiver:?}");
                }
            }
        }
    }

    #[test]
    fn every_exit_is_taken_at_once() {
        let fault = super::Standing { generation: GENERATION, cells: 6, digest_sum: 5, fault: Some("a wrong byte".into()) };
        let exits = [
            (Aborted(FailKind::Engine, "x".into()), FailKind::Engine, false),
            (Cancel(FailKind::Stopping, "x".into()), FailKind::Stopping, true),
            (Standing(fault), FailKind::Integrity, true),
            (fin(GENERATION, 7, 30), FailKind::Integrity, true),
        ];
        for (state, way) in states().into_iter().filter(|(state, _)| !state.starts_with("over")) {
            for (exit, kind, told_peer) in exits.clone() {
                let (mut receiver, mut said) = reach(&way);
                feed(&mut receiver, Time(2), exit, &mut said);
                assert_eq!((said.failed, said.told_peer), (Some(kind), told_peer), "{state}");
            }
            let (mut receiver, mut said) = reach(&way);
            feed(&mut receiver, DEADLINE, Tick, &mut said);
            assert!(said.failed.is_some(), "{state} outlives its deadline");
        }
    }

    #[test]
    fn what_stands_is_kept_for_a_while_after_the_link_is_lost() {
        let (mut receiver, mut said) = reach(&[standing(2), LinkLost]);
        let until = Time(1).after(RESUME_KEEP_US);
        assert_eq!(receiver.deadline(), Some(until));
        feed(&mut receiver, Time(until.0 - 1), Resume(OLD), &mut said);
        assert_eq!((receiver.stale_frames(), receiver.deadline()), (1, Some(until)), "another reservation has no effect");
        feed(&mut receiver, until, Tick, &mut said);
        assert_eq!(said.failed, Some(FailKind::PeerLost));
    }
}

#[test]
fn a_set_of_cells_that_a_peer_tells_is_of_this_grid_or_none() {
    assert_eq!(Cells::parse(GRID, 1, vec![0b1111]).map(|cells| cells.count()), Some(4));
    assert!(Cells::parse(GRID, 1, vec![0b1_0000]).is_none() && Cells::parse(GRID, 1, vec![0, 0]).is_none());
    assert!(Cells::parse(GRID, 3, vec![]).is_some() && Cells::parse(GRID, 3, vec![0]).is_none());
    let full = Grid { layers: 64, blocks: 1, cell_bytes: 1 };
    assert_eq!(Cells::parse(full, 0, vec![u64::MAX]).map(|cells| cells.count()), Some(64));
}
