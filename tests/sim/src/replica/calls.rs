//! Commands on their way through the log: proposed here by the leader, passed to the leader by a follower, and who waits for the answer.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use millrace_core::cluster::{self, Answer, Command, PolicyCommand, Setting, Spec};
use millrace_core::ids::{Epoch, NodeId, ReplicaId, Time};
use millrace_core::message::Message;
use millrace_log::ProposeError;

use super::Replica;
use super::reports::Batch;
use crate::event::{Act, LinkNo};

/// How long a command may take to be applied, and how long a follower waits for the leader's word, microseconds.
const COMMIT_WAIT_US: u64 = 3_000_000;
const FORWARD_WAIT_US: u64 = 4_000_000;

/// What an operator wants of a setting, which is a register of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Its value now: what was acknowledged anywhere before must show.
    Read(Setting),
    /// Another value.
    Write(Setting, u64),
}

/// What an operator gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done; the value that was read.
    Done(Option<u64>),
    /// Nothing happened.
    Nothing,
    /// It may have happened, or may happen yet.
    Unknown,
}

/// Who waits for an answer of the state machine.
#[derive(Clone, Debug)]
pub(super) enum Asker {
    Nobody,
    Join(LinkNo),
    Reports(Batch),
    Renew(Vec<(NodeId, Epoch)>),
    /// Another replica, for its own asker.
    Replica(LinkNo, u64),
    /// An operator, with the number of the question.
    Operator(u64),
}

/// Why there is no answer, and whether nothing happened.
#[derive(Debug)]
pub(super) struct NoAnswer {
    pub reason: String,
    pub certain: bool,
}

type Answered = Result<Vec<u8>, NoAnswer>;
type Waiting<T> = Pin<Box<dyn Future<Output = Result<T, ProposeError>>>>;

enum Way {
    Here(Waiting<Vec<u8>>),
    There(LinkNo),
}

struct Call {
    way: Way,
    until: Time,
    asker: Asker,
}

/// All commands and reads that wait.
#[derive(Default)]
pub(super) struct Calls {
    made: u64,
    /// Made since the log was last stepped.
    fresh: bool,
    waiting: BTreeMap<u64, Call>,
    reads: BTreeMap<u64, (Waiting<u64>, Setting, Time)>,
    done: Vec<(Asker, Answered)>,
}

impl Calls {
    /// Whether the log has something to do for a call.
    pub fn fresh(&self) -> bool {
        self.fresh
    }

    /// When the first is given up.
    pub fn deadline(&self) -> Option<Time> {
        let reads = self.reads.values().map(|(_, _, until)| *until);
        self.waiting.values().map(|call| call.until).chain(reads).min()
    }

    fn fail(&mut self, asker: Asker, reason: &str, certain: bool) {
        self.fresh = true;
        self.done.push((asker, Err(NoAnswer { reason: reason.into(), certain })));
    }

    /// A link is gone: what was asked over it is not answered.
    pub fn lose(&mut self, link: LinkNo) {
        let lost = self.waiting.extract_if(.., |_, call| matches!(call.way, Way::There(over) if over == link));
        for (_, call) in lost.collect::<Vec<_>>() {
            self.fail(call.asker, "the leader cannot be reached", false);
        }
    }

    /// The leader's word.
    pub fn answered(&mut self, link: LinkNo, id: u64, result: Result<Vec<u8>, String>) {
        if !matches!(self.waiting.get(&id), Some(Call { way: Way::There(over), .. }) if *over == link) {
            return;
        }
        if let Some(call) = self.waiting.remove(&id) {
            self.done.push((call.asker, result.map_err(|reason| NoAnswer { reason, certain: false })));
        }
    }

    /// Looks who has an answer now, and who waited long enough.
    fn settle(&mut self, now: Time) {
        let mut context = Context::from_waker(Waker::noop());
        self.fresh = false;
        for (id, mut call) in std::mem::take(&mut self.waiting) {
            let polled = match &mut call.way {
                Way::Here(future) => future.as_mut().poll(&mut context),
                Way::There(_) => Poll::Pending,
            };
            match polled {
                Poll::Ready(answer) => self.done.push((call.asker, answer.map_err(no_answer))),
                Poll::Pending if now >= call.until => self.fail(call.asker, "not committed in time", false),
                Poll::Pending => drop(self.waiting.insert(id, call)),
            }
        }
    }
}

fn no_answer(error: ProposeError) -> NoAnswer {
    let certain = !matches!(error, ProposeError::Lost | ProposeError::Stopped);
    NoAnswer { reason: error.to_string(), certain }
}

impl Replica {
    /// Puts a command on its way.
    pub(super) fn propose(&mut self, command: Command, asker: Asker) {
        self.submit(cluster::encode(&command), asker, true);
    }

    /// Another replica passes a command on, because it takes this one for the leader.
    pub(super) fn forwarded(&mut self, link: LinkNo, id: u64, bytes: Vec<u8>) {
        let asker = Asker::Replica(link, id);
        if let Ok(Command::Join(join)) = cluster::decode(&bytes)
            && let Some(reason) = self.name_is_held(&join)
        {
            return self.calls.fail(asker, &reason, true);
        }
        self.submit(bytes, asker, false);
    }

    fn submit(&mut self, bytes: Vec<u8>, asker: Asker, may_forward: bool) {
        self.calls.made += 1;
        let id = self.calls.made;
        let (way, wait_us) = match self.status().leader.map(ReplicaId) {
            Some(leader) if leader != self.id && may_forward => {
                let Some(link) = self.others.get(&leader).and_then(|links| links.last()).copied() else {
                    return self.calls.fail(asker, "the leader cannot be reached", true);
                };
                self.acts.push(Act::Send(link, Message::Forward { id, command: bytes }));
                (Way::There(link), FORWARD_WAIT_US)
            }
            None if may_forward => return self.calls.fail(asker, "there is no leader", true),
            _ => {
                let handle = self.raft.handle().clone();
                let mut future: Waiting<Vec<u8>> = Box::pin(async move { handle.propose(bytes).await });
                // The first look hands it to the log.
                if let Poll::Ready(answer) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                    return self.calls.done.push((asker, answer.map_err(no_answer)));
                }
                self.calls.fresh = true;
                (Way::Here(future), COMMIT_WAIT_US)
            }
        };
        self.calls.waiting.insert(id, Call { way, until: self.now.after(wait_us), asker });
    }

    /// An operator asks this replica.
    pub(super) fn operate(&mut self, no: u64, asked: Asked) {
        match asked {
            Asked::Write(setting, value) => {
                let key = millrace_core::cluster::SETTINGS[setting as usize].key;
                debug_assert_eq!(Spec::of(key).map(|spec| spec.setting), Some(setting), "the order of the table");
                let set = vec![(key.to_owned(), Some(value))];
                self.propose(Command::Policy(PolicyCommand::SetConfig { if_version: None, set }), Asker::Operator(no));
            }
            Asked::Read(setting) => {
                let handle = self.raft.handle().clone();
                let mut future: Waiting<u64> = Box::pin(async move { handle.read_index().await });
                let _ = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                self.calls.fresh = true;
                self.calls.reads.insert(no, (future, setting, self.now.after(COMMIT_WAIT_US)));
            }
        }
    }

    /// Gives answers to those who wait.
    pub(super) fn settle_calls(&mut self) {
        self.calls.settle(self.now);
        self.settle_reads();
        for (asker, answered) in std::mem::take(&mut self.calls.done) {
            self.on_answer(asker, answered);
        }
    }

    fn settle_reads(&mut self) {
        let mut context = Context::from_waker(Waker::noop());
        for (no, (mut future, setting, until)) in std::mem::take(&mut self.calls.reads) {
            match future.as_mut().poll(&mut context) {
                Poll::Ready(Ok(_)) => {
                    let value = self.cluster().config().get(setting);
                    self.acts.push(Act::Operated(no, Outcome::Done(Some(value))));
                }
                Poll::Ready(Err(_)) => self.acts.push(Act::Operated(no, Outcome::Nothing)),
                Poll::Pending if self.now >= until => self.acts.push(Act::Operated(no, Outcome::Nothing)),
                Poll::Pending => drop(self.calls.reads.insert(no, (future, setting, until))),
            }
        }
    }

    fn on_answer(&mut self, asker: Asker, answered: Answered) {
        if let Asker::Replica(link, id) = asker {
            let result = answered.map_err(|no| no.reason);
            return self.acts.push(Act::Send(link, Message::Forwarded { id, result }));
        }
        let answer = answered.map(|bytes| cluster::decode_answer(&bytes).expect("a replica of this program answers"));
        match (asker, answer) {
            (Asker::Operator(no), answer) => {
                let outcome = match answer {
                    Ok(Answer::Policy(_)) => Outcome::Done(None),
                    Ok(other) => panic!("a setting got {other:?}"),
                    Err(no) if no.certain => Outcome::Nothing,
                    Err(_) => Outcome::Unknown,
                };
                self.acts.push(Act::Operated(no, outcome));
            }
            (Asker::Reports(batch), answer) => self.reports_answered(batch, answer.ok()),
            (Asker::Join(link), Ok(Answer::Joined { node, epoch })) => {
                if let Some(linked) = self.nodes.get_mut(&link) {
                    linked.who = Some((node, epoch));
                    self.acts.push(Act::Send(link, Message::Joined { node, epoch }));
                }
            }
            (Asker::Join(link), Err(no)) => {
                self.acts.push(Act::Send(link, Message::JoinRefused { reason: no.reason, retry: true }));
            }
            (Asker::Renew(heard), Ok(Answer::Renewed { stale, .. })) => self.tell_stale(&heard, &stale),
            (Asker::Join(_) | Asker::Renew(_), Ok(other)) => panic!("an entry is answered {other:?}"),
            (Asker::Nobody | Asker::Renew(_) | Asker::Replica(..), _) => {}
        }
    }
}
