//! What nodes say about their caches, on its way into the log: deltas that come within a few milliseconds become one entry.
//!
//! One entry for each block event is the known mistake; so is losing their order. One batch is in flight at a time and is tried
//! until the log has it, so a node's deltas keep their order; what does not fit the queue meanwhile is dropped, and the index
//! notices the gap and asks the node for a snapshot.

use std::collections::VecDeque;
use std::time::Duration;

use millrace_core::cluster::{Answer, Command, DELTAS_OPS_MAX, DeltaVerdict, DigestVerdict, NODES_MAX, SnapshotVerdict};
use millrace_core::ids::{Epoch, NodeId};
use millrace_core::message::{CacheDigest, Delta, Message, SnapshotPage};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::nodes::Outbox;
use crate::propose::Proposer;

/// How long the first report of a batch waits for others.
pub const FOLD_WAIT: Duration = Duration::from_millis(10);
/// Block operations in one batch: some 20 bytes each, so that an entry stays below raft's 1 MiB.
pub const BATCH_OPS_MAX: usize = DELTAS_OPS_MAX / 2;
/// Deltas in one batch.
pub const BATCH_DELTAS_MAX: usize = 1024;
/// Reports that wait; a further one is dropped.
pub const REPORTS_MAX: usize = 4096;
/// Pause before a batch that was not committed is proposed again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// What a node says about its cache.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// What changed.
    Delta(Delta),
    /// A page of all.
    Page(SnapshotPage),
    /// All in short.
    Digest(CacheDigest),
}

/// A report and the way back to its node.
pub struct Reported {
    /// What.
    pub report: Report,
    /// Takes the answer.
    pub reply: Outbox,
}

/// One entry to be, and who waits for its answer.
struct Batch {
    command: Command,
    waiting: Vec<(Epoch, Outbox)>,
}

/// Takes reports off `inbox` until it closes, and puts them into the log.
pub async fn run(proposer: Proposer, mut inbox: mpsc::Receiver<Reported>) {
    let mut queue = VecDeque::new();
    loop {
        if queue.is_empty() {
            let Some(first) = inbox.recv().await else { return };
            queue.push_back(first);
            sleep(FOLD_WAIT).await;
        }
        while queue.len() < REPORTS_MAX
            && let Ok(reported) = inbox.try_recv()
        {
            queue.push_back(reported);
        }
        if let Some(batch) = next_batch(&mut queue) {
            commit(&proposer, batch).await;
        }
    }
}

/// The longest run of deltas at the front of the queue that one entry takes, or of digests, or one page. A digest lets the deltas of
/// other nodes pass.
fn next_batch(queue: &mut VecDeque<Reported>) -> Option<Batch> {
    if matches!(queue.front()?.report, Report::Digest(_)) {
        return Some(digests(queue));
    }
    let (mut deltas, mut waiting, mut ops) = (Vec::new(), Vec::new(), 0);
    let mut passed: Vec<Reported> = Vec::new();
    while let Some(Reported { report, reply }) = queue.pop_front() {
        match report {
            Report::Digest(_) => passed.push(Reported { report, reply }),
            Report::Delta(delta) if passed.iter().any(|p| matches!(p.report, Report::Digest(d) if d.node == delta.node)) => {
                queue.push_front(Reported { report: Report::Delta(delta), reply });
                break;
            }
            Report::Page(page) if deltas.is_empty() => {
                let waiting = vec![(page.epoch, reply)];
                return Some(Batch { command: Command::Snapshot(page), waiting });
            }
            Report::Delta(delta)
                if deltas.is_empty() || (ops + delta.ops.len() <= BATCH_OPS_MAX && deltas.len() < BATCH_DELTAS_MAX) =>
            {
                ops += delta.ops.len();
                waiting.push((delta.epoch, reply));
                deltas.push(delta);
            }
            report => {
                queue.push_front(Reported { report, reply });
                break;
            }
        }
    }
    passed.into_iter().rev().for_each(|digest| queue.push_front(digest));
    (!deltas.is_empty()).then(|| Batch { command: Command::Deltas(deltas), waiting })
}

/// The digests at the front of the queue.
fn digests(queue: &mut VecDeque<Reported>) -> Batch {
    let (mut digests, mut waiting) = (Vec::new(), Vec::new());
    while digests.len() < NODES_MAX
        && let Some(&Reported { report: Report::Digest(digest), .. }) = queue.front()
        && let Some(Reported { reply, .. }) = queue.pop_front()
    {
        waiting.push((digest.epoch, reply));
        digests.push(digest);
    }
    Batch { command: Command::Digests(digests), waiting }
}

/// Proposes until there is an answer. A repeat is harmless: the index knows what it has.
async fn commit(proposer: &Proposer, batch: Batch) {
    loop {
        match proposer.propose(&batch.command).await {
            Ok(answer) => return tell(&answer, &batch.waiting),
            Err(error) => {
                debug!(%error, "cache changes wait");
                sleep(RETRY_PAUSE).await;
            }
        }
    }
}

fn tell(answer: &Answer, waiting: &[(Epoch, Outbox)]) {
    let replies: Vec<Option<Message>> = match answer {
        Answer::Deltas(verdicts) if verdicts.len() == waiting.len() => {
            verdicts.iter().zip(waiting).map(|((node, verdict), (epoch, _))| delta_reply(*node, *epoch, *verdict)).collect()
        }
        Answer::Digests(verdicts) if verdicts.len() == waiting.len() => {
            verdicts.iter().zip(waiting).map(|(verdict, (epoch, _))| digest_reply(*epoch, *verdict)).collect()
        }
        Answer::Snapshot(verdict) => waiting.iter().map(|(epoch, _)| page_reply(*epoch, *verdict)).collect(),
        other => return warn!(?other, "unexpected answer to cache changes"),
    };
    for (reply, (_, outbox)) in replies.into_iter().zip(waiting) {
        if let Some(message) = reply {
            // A link that is gone misses it; the node reports to another replica then.
            outbox(message);
        }
    }
}

fn delta_reply(node: NodeId, epoch: Epoch, verdict: DeltaVerdict) -> Option<Message> {
    match verdict {
        DeltaVerdict::Applied { seq } | DeltaVerdict::AlreadyApplied { seq } => Some(Message::DeltaApplied { epoch, seq }),
        DeltaVerdict::Gap { last_seq } => {
            debug!(%node, last_seq, "cache index has a gap; asking for a snapshot");
            Some(Message::WantSnapshot { epoch })
        }
        DeltaVerdict::StaleEpoch => Some(must_join_again(epoch)),
    }
}

fn digest_reply(epoch: Epoch, verdict: DigestVerdict) -> Option<Message> {
    match verdict {
        DigestVerdict::Same | DigestVerdict::Skipped => None,
        DigestVerdict::Drifted => {
            warn!(%epoch, "a node's cache and the index differ; asking for a snapshot");
            Some(Message::WantSnapshot { epoch })
        }
        DigestVerdict::Lacking => {
            info!(%epoch, "the index has room again for a node's blocks; asking for a snapshot");
            Some(Message::WantSnapshot { epoch })
        }
        DigestVerdict::StaleEpoch => Some(must_join_again(epoch)),
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
#[must_use]
pub fn must_join_again(epoch: Epoch) -> Message {
    Message::JoinRefused { reason: format!("epoch {epoch} is not current: join again"), retry: true }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use millrace_core::ids::BlockHash;
    use millrace_core::message::{BlockOp, DELTA_OPS_MAX};
    use parking_lot::Mutex;

    use super::*;

    const EPOCH: Epoch = Epoch(4);

    fn delta(seq: u64, ops: usize) -> Report {
        let ops = vec![BlockOp::Stored(BlockHash([1; 16])); ops];
        Report::Delta(Delta { node: NodeId(1), epoch: EPOCH, base_seq: seq - 1, seq, ops })
    }

    fn page() -> Report {
        Report::Page(SnapshotPage { node: NodeId(1), epoch: EPOCH, seq: 9, page: 0, pages: 1, blocks: vec![] })
    }

    fn queue(reports: Vec<Report>) -> VecDeque<Reported> {
        reports.into_iter().map(|report| Reported { report, reply: Arc::new(|_| true) }).collect()
    }

    fn seqs(batch: &Batch) -> Vec<u64> {
        match &batch.command {
            Command::Deltas(deltas) => deltas.iter().map(|d| d.seq).collect(),
            _ => vec![],
        }
    }

    #[test]
    fn deltas_fold_in_order_and_pages_stand_alone() {
        let mut queue = queue(vec![delta(1, 1), delta(2, 1), page(), delta(10, 1)]);
        assert_eq!(seqs(&next_batch(&mut queue).unwrap()), [1, 2]);
        assert!(matches!(next_batch(&mut queue).unwrap().command, Command::Snapshot(_)));
        assert_eq!(seqs(&next_batch(&mut queue).unwrap()), [10]);
        assert!(next_batch(&mut queue).is_none());
    }

    #[test]
    fn digests_keep_their_place_among_the_deltas_of_their_node() {
        let digest = |node, seq| Report::Digest(CacheDigest { node: NodeId(node), epoch: EPOCH, seq, blocks: 0, digest: 0 });
        let mut queue = queue(vec![delta(1, 1), digest(2, 7), digest(1, 1), digest(3, 3), delta(2, 1), page()]);
        assert_eq!(seqs(&next_batch(&mut queue).unwrap()), [1], "what follows a digest waits for it");
        let Command::Digests(digests) = next_batch(&mut queue).unwrap().command else { panic!("the digests are next") };
        assert_eq!(digests.iter().map(|d| d.seq).collect::<Vec<_>>(), [7, 1, 3]);
        assert_eq!(seqs(&next_batch(&mut queue).unwrap()), [2]);
        assert!(matches!(next_batch(&mut queue).unwrap().command, Command::Snapshot(_)));
        let mut queue = self::queue(vec![delta(1, 1), digest(2, 7), delta(2, 1)]);
        assert_eq!(seqs(&next_batch(&mut queue).unwrap()), [1, 2], "another node's deltas pass");
        assert!(matches!(next_batch(&mut queue).unwrap().command, Command::Digests(_)));
    }

    #[test]
    fn a_batch_fits_an_entry() {
        let mut queue = queue((1..=40).map(|seq| delta(seq, DELTA_OPS_MAX)).collect());
        let batch = next_batch(&mut queue).unwrap();
        assert_eq!(seqs(&batch).len(), BATCH_OPS_MAX / DELTA_OPS_MAX);
        assert!(millrace_core::cluster::encode(&batch.command).len() <= millrace_log::COMMAND_BYTES_MAX);
        assert_eq!(queue.len(), 40 - BATCH_OPS_MAX / DELTA_OPS_MAX);
    }

    #[test]
    fn each_node_gets_its_own_verdict() {
        let said = Arc::new(Mutex::new(Vec::new()));
        let waiting: Vec<(Epoch, Outbox)> = (0..3)
            .map(|_| {
                let said = said.clone();
                (
                    EPOCH,
                    Arc::new(move |message| {
                        said.lock().push(message);
                        true
                    }) as Outbox,
                )
            })
            .collect();
        let verdicts = [DeltaVerdict::Applied { seq: 3 }, DeltaVerdict::Gap { last_seq: 1 }, DeltaVerdict::StaleEpoch];
        tell(&Answer::Deltas(verdicts.map(|v| (NodeId(1), v)).to_vec()), &waiting);
        let want = [Message::DeltaApplied { epoch: EPOCH, seq: 3 }, Message::WantSnapshot { epoch: EPOCH }, must_join_again(EPOCH)];
        assert_eq!(*said.lock(), want);
    }
}
