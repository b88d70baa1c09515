//! What nodes say about their caches, on its way into the log: folded, in order, one batch at a time, again until the log has it.

use std::collections::VecDeque;

use millrace_core::cluster::{Answer, Command, DeltaVerdict, DigestVerdict, SnapshotVerdict};
use millrace_core::ids::{Epoch, NodeId, Time};
use millrace_core::message::{CacheDigest, Delta, Message, SnapshotPage};

use super::Replica;
use super::calls::Asker;
use crate::event::{Act, LinkNo};

/// How long the first report of a batch waits for others, microseconds.
const FOLD_US: u64 = 10_000;
/// Pause before a batch that was not committed is proposed again, microseconds.
const RETRY_US: u64 = 200_000;
/// Reports that wait; a further one is dropped.
const REPORTS_MAX: usize = 4096;

/// What a node says about its cache.
#[derive(Clone, Debug)]
pub(super) enum Report {
    Delta(Delta),
    Page(SnapshotPage),
    Digest(CacheDigest),
}

/// One entry to be, and who waits for its answer.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    command: Command,
    waiting: Vec<(LinkNo, Epoch)>,
}

/// Reports that wait, and the batch that is on its way.
#[derive(Default)]
pub(super) struct Reports {
    queue: VecDeque<(LinkNo, Report)>,
    /// When the next batch may be made.
    due: Option<Time>,
    flying: bool,
    again: Option<(Time, Batch)>,
}

impl Reports {
    pub fn push(&mut self, now: Time, link: LinkNo, report: Report) {
        if self.queue.len() < REPORTS_MAX {
            self.queue.push_back((link, report));
            self.due.get_or_insert(now.after(FOLD_US));
        }
    }

    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.flying && self.again.is_none()
    }

    pub fn deadline(&self) -> Option<Time> {
        match &self.again {
            Some((time, _)) => Some(*time),
            None => self.due.filter(|_| !self.flying),
        }
    }

    fn next(&mut self, now: Time) -> Option<Batch> {
        if let Some((_, batch)) = self.again.take_if(|(time, _)| *time <= now) {
            return Some(batch);
        }
        if self.flying || self.again.is_some() || self.due.is_none_or(|due| now < due) {
            return None;
        }
        let batch = self.fold();
        self.due = (!self.queue.is_empty()).then_some(now);
        batch
    }

    /// The run of deltas at the front of the queue, or one page, or one digest.
    fn fold(&mut self) -> Option<Batch> {
        let (mut deltas, mut waiting) = (Vec::new(), Vec::new());
        while let Some((link, report)) = self.queue.pop_front() {
            match report {
                Report::Delta(delta) => {
                    waiting.push((link, delta.epoch));
                    deltas.push(delta);
                }
                report if !deltas.is_empty() => {
                    self.queue.push_front((link, report));
                    break;
                }
                Report::Page(page) => {
                    let waiting = vec![(link, page.epoch)];
                    return Some(Batch { command: Command::Snapshot(page), waiting });
                }
                Report::Digest(digest) => {
                    let waiting = vec![(link, digest.epoch)];
                    return Some(Batch { command: Command::Digests(vec![digest]), waiting });
                }
            }
        }
        (!deltas.is_empty()).then_some(Batch { command: Command::Deltas(deltas), waiting })
    }
}

impl Replica {
    /// Puts the next batch on its way, if its time has come.
    pub(super) fn send_reports(&mut self) {
        if let Some(batch) = self.reports.next(self.now) {
            self.reports.flying = true;
            self.propose(batch.command.clone(), Asker::Reports(batch));
        }
    }

    /// The log has a batch, or nobody knows. A repeat is harmless: the index knows what it has.
    pub(super) fn reports_answered(&mut self, batch: Batch, answer: Option<Answer>) {
        self.reports.flying = false;
        let Some(answer) = answer else {
            self.reports.again = Some((self.now.after(RETRY_US), batch));
            return;
        };
        let replies: Vec<Option<Message>> = match answer {
            Answer::Deltas(verdicts) => {
                let reply = |((_, verdict), (_, epoch)): (&(NodeId, DeltaVerdict), &(LinkNo, Epoch))| delta_reply(*epoch, *verdict);
                verdicts.iter().zip(&batch.waiting).map(reply).collect()
            }
            Answer::Digests(verdicts) => {
                verdicts.iter().zip(&batch.waiting).map(|(verdict, (_, epoch))| digest_reply(*epoch, *verdict)).collect()
            }
            Answer::Snapshot(verdict) => batch.waiting.iter().map(|(_, epoch)| page_reply(*epoch, verdict)).collect(),
            other => panic!("reports are answered {other:?}"),
        };
        for (reply, (link, _)) in replies.into_iter().zip(batch.waiting) {
            self.acts.extend(reply.map(|message| Act::Send(link, message)));
        }
    }
}

fn delta_reply(epoch: Epoch, verdict: DeltaVerdict) -> Option<Message> {
    Some(match verdict {
        DeltaVerdict::Applied { seq } | DeltaVerdict::AlreadyApplied { seq } => Message::DeltaApplied { epoch, seq },
        DeltaVerdict::Gap { .. } => Message::WantSnapshot { epoch },
        DeltaVerdict::StaleEpoch => must_join_again(epoch),
    })
}

fn digest_reply(epoch: Epoch, verdict: DigestVerdict) -> Option<Message> {
    match verdict {
        DigestVerdict::Drifted | DigestVerdict::Lacking => Some(Message::WantSnapshot { epoch }),
        DigestVerdict::StaleEpoch => Some(must_join_again(epoch)),
        DigestVerdict::Same | DigestVerdict::Skipped => None,
    }
}

fn page_reply(epoch: Epoch, verdict: SnapshotVerdict) -> Option<Message> {
    match verdict {
        SnapshotVerdict::Wanted { .. } => None,
        SnapshotVerdict::Applied { seq } => Some(Message::DeltaApplied { epoch, seq }),
        SnapshotVerdict::Restart => Some(Message::WantSnapshot { epoch }),
        SnapshotVerdict::StaleEpoch => Some(must_join_again(epoch)),
    }
}

/// Tells a node that its incarnation does not count any more.
pub(super) fn must_join_again(epoch: Epoch) -> Message {
    Message::JoinRefused { reason: format!("epoch {epoch} is not current: join again"), retry: true }
}
