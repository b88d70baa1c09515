//! Operators write settings and read them back, through any replica. A setting is a register of the log, so what they see must be
//! linearizable (I6): the history is judged when the world is at rest.

use std::collections::BTreeMap;

use millrace_core::cluster::{SETTINGS, Setting};
use millrace_log::testing::linear::{Kind, Op, check};

use crate::event::Event;
use crate::plan::REPLICAS;
use crate::replica::{Asked, Outcome};
use crate::world::World;

/// The registers.
const REGISTERS: [Setting; 3] = [Setting::SloTtft, Setting::SloTpot, Setting::HandoverUs];
/// Questions in flight; one more waits for its turn.
const ASKED_MAX: usize = 16;

/// All questions and answers.
#[derive(Debug, Default)]
pub struct Operators {
    /// The last number that a call or a return was given, and the last value that was written.
    clock: u64,
    value: u64,
    /// In flight: the operation, and the host of the replica that was asked.
    open: BTreeMap<u64, (Op, usize)>,
    /// What ended.
    history: Vec<Op>,
}

impl Operators {
    /// Whether somebody waits.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.open.len()
    }

    /// Operations that had an answer.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.history.iter().filter(|op| op.ret.is_some()).count() as u64
    }

    fn ask(&mut self, host: usize, register: usize, write: bool) -> (u64, Asked) {
        self.clock += 1;
        let setting = REGISTERS[register];
        let (kind, asked) = match write {
            true => {
                self.value += 1;
                (Kind::Write(self.value), Asked::Write(setting, self.value))
            }
            false => (Kind::Read(None), Asked::Read(setting)),
        };
        let no = self.clock;
        self.open.insert(no, (Op { key: register as u8, kind, call: no, ret: None }, host));
        (no, asked)
    }

    /// An answer.
    pub fn answered_with(&mut self, no: u64, outcome: Outcome) {
        let Some((mut op, _)) = self.open.remove(&no) else { return };
        self.clock += 1;
        match outcome {
            Outcome::Nothing => return,
            Outcome::Unknown => {}
            Outcome::Done(read) => {
                if let Kind::Read(value) = &mut op.kind {
                    let default = SETTINGS[REGISTERS[usize::from(op.key)] as usize].default;
                    *value = read.filter(|value| *value != default);
                }
                op.ret = Some(self.clock);
            }
        }
        self.note(op);
    }

    fn note(&mut self, op: Op) {
        // A read without an answer says nothing.
        if op.ret.is_some() || matches!(op.kind, Kind::Write(_)) {
            self.history.push(op);
        }
    }

    /// The replica on a host is gone, with what it was asked.
    pub fn lose(&mut self, host: usize) {
        let lost: Vec<u64> = self.open.iter().filter(|(_, (_, at))| *at == host).map(|(no, _)| *no).collect();
        lost.into_iter().for_each(|no| self.answered_with(no, Outcome::Unknown));
    }

    /// Stops the run when there is no order in which all that happened makes sense.
    ///
    /// # Panics
    /// Then.
    pub fn check(&self) {
        if let Err(run) = check(&self.history) {
            panic!("I6: what operators saw is not linearizable: {run:#?}");
        }
    }
}

impl World {
    /// An operator asks something, and when the next one does.
    pub(crate) fn operator(&mut self) {
        if self.calm {
            return;
        }
        let after_us = self.random.between(self.plan.operator_gap_us);
        self.schedule(after_us, Event::Operator);
        let host = self.random.below(REPLICAS as u64) as usize;
        let (register, write) = (self.random.below(REGISTERS.len() as u64) as usize, self.random.chance(500));
        if self.hosts[host].replica().is_none() || self.operators.waiting() >= ASKED_MAX {
            return;
        }
        let (no, asked) = self.operators.ask(host, register, write);
        self.tell_replica(host, crate::event::ReplicaEvent::Operator(no, asked));
    }
}
