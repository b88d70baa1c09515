//! Who waits for an answer from this replica: proposals until they are applied here, reads until their read index is.
//!
//! Entries and reads carry `(replica, incarnation, sequence)`, so that an answer finds its waiter and an entry of an
//! earlier life of this replica, replayed after a restart, finds none. Answers are collected and given only after the
//! status that they imply is published. A waiter that is dropped unanswered learns that the replica stopped.

use std::collections::{HashMap, VecDeque};

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::ProposeError;
use super::codec::{Reader, put_u64};
use super::message::CONTEXT_BYTES;

/// Where an answer goes; holds one place of the bounded queue until it is given.
pub(super) struct Reply<T> {
    pub to: oneshot::Sender<Result<T, ProposeError>>,
    pub _slot: OwnedSemaphorePermit,
}

/// Reads that share one round trip to the quorum.
struct ReadBatch {
    seq: u64,
    /// Tick at which it is given up.
    expires: u64,
    /// Known when the leader's quorum has confirmed it.
    index: Option<u64>,
    replies: Vec<Reply<u64>>,
}

enum Answer {
    Proposal(Reply<Vec<u8>>, Result<Vec<u8>, ProposeError>),
    Read(Reply<u64>, Result<u64, ProposeError>),
}

/// All waiters of one replica.
pub(super) struct Clients {
    id: u64,
    incarnation: u64,
    next_seq: u64,
    proposals: HashMap<u64, Reply<Vec<u8>>>,
    fresh_reads: Vec<Reply<u64>>,
    reads: VecDeque<ReadBatch>,
    answers: Vec<Answer>,
}

impl Clients {
    /// Waiters of replica `id`; `incarnation` is a random number of this life of it.
    pub fn new(id: u64, incarnation: u64) -> Self {
        Self {
            id,
            incarnation,
            next_seq: 0,
            proposals: HashMap::new(),
            fresh_reads: Vec::new(),
            reads: VecDeque::new(),
            answers: Vec::new(),
        }
    }

    fn next_context(&mut self) -> (u64, Vec<u8>) {
        self.next_seq += 1;
        let mut context = Vec::with_capacity(CONTEXT_BYTES);
        for value in [self.id, self.incarnation, self.next_seq] {
            put_u64(&mut context, value);
        }
        (self.next_seq, context)
    }

    /// The sequence number of a context that this life of this replica made.
    fn own_seq(&self, context: &[u8]) -> Option<u64> {
        let mut reader = Reader(context);
        let own = reader.u64()? == self.id && reader.u64()? == self.incarnation;
        reader.u64().filter(|_| own)
    }

    /// Lets a proposal wait; the context goes into its entry.
    pub fn wait_for_commit(&mut self, reply: Reply<Vec<u8>>) -> (u64, Vec<u8>) {
        let (seq, context) = self.next_context();
        self.proposals.insert(seq, reply);
        (seq, context)
    }

    /// A proposal that raft did not take up.
    pub fn refuse_proposal(&mut self, seq: u64, error: ProposeError) {
        if let Some(reply) = self.proposals.remove(&seq) {
            self.answers.push(Answer::Proposal(reply, Err(error)));
        }
    }

    /// A proposal that never got as far as raft.
    pub fn refuse(&mut self, reply: Reply<Vec<u8>>, error: ProposeError) {
        self.answers.push(Answer::Proposal(reply, Err(error)));
    }

    /// An entry was applied; if its proposer waits here, this is its answer.
    pub fn applied(&mut self, context: &[u8], answer: Vec<u8>) {
        if let Some(reply) = self.own_seq(context).and_then(|seq| self.proposals.remove(&seq)) {
            self.answers.push(Answer::Proposal(reply, Ok(answer)));
        }
    }

    /// An entry was applied without effect; if its proposer waits here, this is why.
    pub fn applied_in_vain(&mut self, context: &[u8], error: ProposeError) {
        if let Some(seq) = self.own_seq(context) {
            self.refuse_proposal(seq, error);
        }
    }

    /// Leadership is gone: entries in flight may be committed by the next leader, or not.
    pub fn lose_proposals(&mut self) {
        let lost = self.proposals.drain().map(|(_, reply)| Answer::Proposal(reply, Err(ProposeError::Lost)));
        self.answers.extend(lost);
    }

    /// A read that wants the next read index.
    pub fn wait_for_read(&mut self, reply: Reply<u64>) {
        self.fresh_reads.push(reply);
    }

    /// Starts one round trip for all reads that came since the last; its context, if there are any.
    pub fn begin_reads(&mut self, expires: u64) -> Option<Vec<u8>> {
        if self.fresh_reads.is_empty() {
            return None;
        }
        let (seq, context) = self.next_context();
        let replies = std::mem::take(&mut self.fresh_reads);
        self.reads.push_back(ReadBatch { seq, expires, index: None, replies });
        Some(context)
    }

    /// Refuses the reads that have not begun.
    pub fn refuse_reads(&mut self, error: &ProposeError) {
        let refused = self.fresh_reads.drain(..).map(|reply| Answer::Read(reply, Err(error.clone())));
        self.answers.extend(refused);
    }

    /// The quorum has confirmed a read: it may be answered once `index` is applied.
    pub fn confirm_read(&mut self, context: &[u8], index: u64) {
        let seq = self.own_seq(context);
        if let Some(batch) = self.reads.iter_mut().find(|batch| Some(batch.seq) == seq) {
            batch.index = Some(index);
        }
    }

    /// Answers the reads whose index is applied and gives up those that found no quorum in time, or for which
    /// this replica lags too far behind.
    pub fn settle_reads(&mut self, applied: u64, tick: u64) {
        let answers = &mut self.answers;
        self.reads.retain_mut(|batch| {
            let answer = match batch.index {
                Some(index) if index <= applied => Ok(applied),
                _ if batch.expires <= tick => Err(ProposeError::Dropped),
                _ => return true,
            };
            answers.extend(batch.replies.drain(..).map(|reply| Answer::Read(reply, answer.clone())));
            false
        });
    }

    /// Gives all collected answers. A waiter that has gone away does not mind.
    pub fn answer(&mut self) {
        for answer in self.answers.drain(..) {
            match answer {
                Answer::Proposal(reply, answer) => drop(reply.to.send(answer)),
                Answer::Read(reply, answer) => drop(reply.to.send(answer)),
            }
        }
    }
}
