//! The links to the other replicas, and questions asked over them: commands passed to the leader, operators' queries.
//!
//! It correlates answers and bounds how many are awaited. What is asked is its callers' business.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use millrace_core::ids::ReplicaId;
use millrace_core::message::Message;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::nodes::Outbox;

/// Questions in flight to all replicas; one more is refused with [`CallError::Busy`].
pub const CALLS_MAX: usize = 1024;

/// Links to one replica that are kept; the oldest is forgotten. Two arise when both ends dial.
pub const LINKS_MAX: usize = 4;

/// Why a question has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// There is no link to that replica, or it broke.
    #[error("replica {0} cannot be reached")]
    Unreachable(ReplicaId),
    /// No answer in time.
    #[error("replica {0} did not answer in time")]
    Timeout(ReplicaId),
    /// [`CALLS_MAX`] are in flight.
    #[error("too many questions to other replicas are in flight")]
    Busy,
    /// The other replica answered with an error.
    #[error("{0}")]
    Refused(String),
}

/// An answer's bytes: an encoded answer of the state machine, or JSON.
type Reply = Result<Vec<u8>, String>;

#[derive(Default)]
struct Inner {
    /// The newest last: it is the one that is written to.
    links: BTreeMap<ReplicaId, Vec<(u64, Outbox)>>,
    calls: HashMap<u64, (ReplicaId, oneshot::Sender<Reply>)>,
    made: u64,
}

/// Links to the other replicas.
#[derive(Default)]
pub struct Replicas {
    inner: Mutex<Inner>,
}

impl Replicas {
    /// A link to `id` is up, and is written to from now on. The number names this link for [`Replicas::detach`].
    pub fn attach(&self, id: ReplicaId, outbox: Outbox) -> u64 {
        let mut inner = self.inner.lock();
        inner.made += 1;
        let link = inner.made;
        let links = inner.links.entry(id).or_default();
        if links.len() >= LINKS_MAX {
            links.remove(0);
        }
        links.push((link, outbox));
        link
    }

    /// A link is gone; what was asked over it will not be answered.
    pub fn detach(&self, id: ReplicaId, link: u64) {
        let mut inner = self.inner.lock();
        let Some(links) = inner.links.get_mut(&id) else { return };
        let current = links.last().is_some_and(|(newest, _)| *newest == link);
        links.retain(|(other, _)| *other != link);
        if links.is_empty() {
            inner.links.remove(&id);
        }
        if current {
            inner.calls.retain(|_, (to, _)| *to != id);
        }
    }

    /// Whether `link` to `id` is still one of those that count.
    #[must_use]
    pub fn holds(&self, id: ReplicaId, link: u64) -> bool {
        self.inner.lock().links.get(&id).is_some_and(|links| links.iter().any(|(other, _)| *other == link))
    }

    /// Uses the links to `id` no more; what was asked over it will not be answered.
    pub fn forget(&self, id: ReplicaId) {
        let mut inner = self.inner.lock();
        inner.links.remove(&id);
        inner.calls.retain(|_, (to, _)| *to != id);
    }

    /// The replicas to which links are up.
    #[must_use]
    pub fn linked_ids(&self) -> Vec<ReplicaId> {
        self.inner.lock().links.keys().copied().collect()
    }

    /// Whether a link to `id` is up.
    #[must_use]
    pub fn linked(&self, id: ReplicaId) -> bool {
        self.inner.lock().links.contains_key(&id)
    }

    /// Sends without waiting; `false` when there is no link or its queue is full.
    pub fn send(&self, id: ReplicaId, message: Message) -> bool {
        let outbox = self.inner.lock().links.get(&id).and_then(|links| links.last()).map(|(_, outbox)| outbox.clone());
        outbox.is_some_and(|outbox| outbox(message))
    }

    /// Passes an encoded command to `id` and waits for the state machine's answer.
    ///
    /// # Errors
    /// See [`CallError`]; after a timeout the command may still take effect.
    pub async fn forward(&self, to: ReplicaId, command: Vec<u8>, wait: Duration) -> Result<Vec<u8>, CallError> {
        self.call(to, wait, |id| Message::Forward { id, command }).await
    }

    /// Asks `id` an admin query.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn query(&self, to: ReplicaId, json: String, wait: Duration) -> Result<String, CallError> {
        let answer = self.call(to, wait, |id| Message::Query { id, json }).await?;
        String::from_utf8(answer).map_err(|e| CallError::Refused(e.to_string()))
    }

    async fn call(&self, to: ReplicaId, wait: Duration, message: impl FnOnce(u64) -> Message) -> Result<Vec<u8>, CallError> {
        let (id, receiver) = self.open_call(to)?;
        let reply = match self.send(to, message(id)) {
            true => tokio::time::timeout(wait, receiver).await,
            false => return Err(self.close_call(id, CallError::Unreachable(to))),
        };
        match reply {
            Ok(Ok(reply)) => reply.map_err(CallError::Refused),
            Ok(Err(_)) => Err(CallError::Unreachable(to)),
            Err(_) => Err(self.close_call(id, CallError::Timeout(to))),
        }
    }

    fn open_call(&self, to: ReplicaId) -> Result<(u64, oneshot::Receiver<Reply>), CallError> {
        let mut inner = self.inner.lock();
        if inner.calls.len() >= CALLS_MAX {
            return Err(CallError::Busy);
        }
        inner.made += 1;
        let id = inner.made;
        let (sender, receiver) = oneshot::channel();
        inner.calls.insert(id, (to, sender));
        Ok((id, receiver))
    }

    fn close_call(&self, id: u64, why: CallError) -> CallError {
        self.inner.lock().calls.remove(&id);
        why
    }

    /// `from` answered question `id`. An answer nobody waits for, or from another replica than was asked, is dropped.
    pub fn answered(&self, from: ReplicaId, id: u64, reply: Reply) {
        let call = {
            let mut inner = self.inner.lock();
            let asked = inner.calls.get(&id).is_some_and(|(to, _)| *to == from);
            asked.then(|| inner.calls.remove(&id)).flatten()
        };
        if let Some((_, sender)) = call {
            // The asker may have stopped waiting; then nobody misses the answer.
            let _ = sender.send(reply);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::mpsc;

    use super::*;

    const TWO: ReplicaId = ReplicaId(2);

    fn linked() -> (Arc<Replicas>, u64, mpsc::UnboundedReceiver<Message>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let replicas = Arc::new(Replicas::default());
        let link = replicas.attach(TWO, Arc::new(move |message| sender.send(message).is_ok()));
        (replicas, link, receiver)
    }

    #[tokio::test]
    async fn an_answer_reaches_its_question_only_from_whom_was_asked() {
        let (replicas, _, mut sent) = linked();
        let asking = replicas.clone();
        let answer = tokio::spawn(async move { asking.forward(TWO, vec![1], Duration::from_secs(60)).await });
        let Some(Message::Forward { id, command }) = sent.recv().await else { panic!("a forward") };
        assert_eq!(command, [1]);
        replicas.answered(ReplicaId(3), id, Ok(vec![9]));
        replicas.answered(TWO, id + 1, Ok(vec![8]));
        replicas.answered(TWO, id, Ok(vec![7]));
        assert_eq!(answer.await.unwrap(), Ok(vec![7]));
        assert!(replicas.inner.lock().calls.is_empty());
    }

    #[tokio::test]
    async fn a_broken_link_ends_its_questions() {
        let (replicas, link, mut sent) = linked();
        let asking = replicas.clone();
        let answer = tokio::spawn(async move { asking.query(TWO, "{}".into(), Duration::from_secs(60)).await });
        sent.recv().await.unwrap();
        let older = replicas.attach(TWO, Arc::new(|_| true));
        replicas.detach(TWO, older);
        replicas.detach(TWO, link + 100);
        assert!(replicas.holds(TWO, link), "another link's end is no news");
        replicas.detach(TWO, link);
        assert_eq!(answer.await.unwrap(), Err(CallError::Unreachable(TWO)));
        assert_eq!(replicas.forward(TWO, vec![], Duration::from_secs(60)).await, Err(CallError::Unreachable(TWO)));
    }
}
