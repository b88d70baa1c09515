//! What each replica says about who leads, asked every few milliseconds over a link of its own.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use coordinator::ctl::ask::Asker;
use coordinator::ctl::cluster_file::ClusterFile;
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Pause between two questions: what a time is exact to.
const PAUSE: Duration = Duration::from_millis(5);
/// Time for one answer; then the link is made anew.
const ANSWER_WAIT_MAX: Duration = Duration::from_millis(250);
/// An answer that is older says nothing about now.
const FRESH: Duration = Duration::from_millis(200);

/// What a replica said last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Said {
    at: Instant,
    /// When it first said this of term and leader.
    since: Instant,
    term: u64,
    leader: Option<u64>,
}

/// A leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leader {
    pub id: u64,
    pub term: u64,
}

/// Watches all replicas.
pub(super) struct Watch {
    said: watch::Receiver<BTreeMap<u64, Said>>,
    replicas: Vec<u64>,
    _asking: JoinSet<()>,
}

impl Watch {
    pub(super) fn start(dir: &Path, file: &ClusterFile) -> Result<Self> {
        let (sender, said) = watch::channel(BTreeMap::new());
        let mut asking = JoinSet::new();
        for replica in &file.coordinators {
            let alone = ClusterFile { coordinators: vec![replica.clone()], ..file.clone() };
            asking.spawn(ask(Asker::new(dir, &alone)?, replica.id, sender.clone()));
        }
        Ok(Self { said, replicas: file.coordinators.iter().map(|replica| replica.id).collect(), _asking: asking })
    }

    /// Whom all that were heard lately follow.
    pub(super) fn leader(&self) -> Option<Leader> {
        let said = self.said.borrow();
        let fresh: Vec<&Said> = said.values().filter(|said| said.at.elapsed() < FRESH).collect();
        agreed(&fresh)
    }

    /// When every replica but the lost leader names the same new one; each must have said so after `since`.
    pub(super) async fn successor(&self, lost: &Leader, since: Instant) -> Instant {
        let survivors: Vec<u64> = self.replicas.iter().copied().filter(|id| *id != lost.id).collect();
        self.until(|said| {
            let words: Vec<&Said> = survivors.iter().filter_map(|id| said.get(id)).filter(|said| said.at > since).collect();
            let new = agreed(&words).is_some_and(|leader| leader.term > lost.term);
            (new && words.len() == survivors.len()).then(|| words.iter().map(|said| said.since).max()).flatten()
        })
        .await
    }

    /// Until all replicas follow one leader; its term.
    pub(super) async fn agree(&self) -> u64 {
        self.until(|said| {
            let fresh: Vec<&Said> = said.values().filter(|said| said.at.elapsed() < FRESH).collect();
            agreed(&fresh).filter(|_| fresh.len() == self.replicas.len()).map(|leader| leader.term)
        })
        .await
    }

    /// Until a replica has not answered for a while that began after `since`.
    pub(super) async fn falls_silent(&self, id: u64, since: Instant) {
        while self.said.borrow().get(&id).is_some_and(|said| said.at.elapsed() < FRESH || said.at > since + FRESH) {
            sleep(PAUSE).await;
        }
    }

    async fn until<T>(&self, find: impl Fn(&BTreeMap<u64, Said>) -> Option<T>) -> T {
        let mut said = self.said.clone();
        loop {
            let found = find(&said.borrow_and_update());
            if let Some(found) = found {
                return found;
            }
            if said.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// The leader that all of these name, in one term.
fn agreed(said: &[&Said]) -> Option<Leader> {
    let (first, rest) = said.split_first()?;
    let leader = Leader { id: first.leader?, term: first.term };
    rest.iter().all(|other| (other.leader, other.term) == (Some(leader.id), leader.term)).then_some(leader)
}

async fn ask(mut asker: Asker, id: u64, said: watch::Sender<BTreeMap<u64, Said>>) {
    loop {
        match timeout(ANSWER_WAIT_MAX, asker.ask(&json!({"q": "member"}))).await {
            Ok(Ok(member)) => {
                let term = member["term"].as_u64().unwrap_or_default();
                let (now, leader) = (Instant::now(), member["leader"].as_u64());
                said.send_modify(|said| {
                    let same = said.get(&id).filter(|former| (former.term, former.leader) == (term, leader));
                    let since = same.map_or(now, |former| former.since);
                    said.insert(id, Said { at: now, since, term, leader });
                });
            }
            _ => asker.hang_up(),
        }
        sleep(PAUSE).await;
    }
}
