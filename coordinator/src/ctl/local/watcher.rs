//! Knows how a local cluster is: asks each gateway whether it is ready and the cluster about itself, a few times a second; keeps
//! `cluster.json` and the list of gateways for the front up to date. Of processes it decides one thing: a replica that an operator has taken
//! in at an address of this machine is started, and one that was taken out is not started again.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::Full;
use millrace_node::shutdown::Shutdown;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::timeout;

use super::crew::Crew;
use super::place::Seen;
use super::{Kind, Place, State};
use crate::ctl::ask::Asker;
use crate::ctl::front::{Gateway, HttpClient, http_client};

/// Time between two looks while something is missing.
const LOOK_SOON: Duration = Duration::from_millis(150);
/// Time between two looks while all is well.
const LOOK_LATER: Duration = Duration::from_millis(600);
/// Time for one answer.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);

/// What the cluster says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The leader's name, when a quorum follows one.
    pub leader: Option<String>,
    /// The highest term seen.
    pub term: u64,
    /// Gateways that say that they are ready, with the process that said so.
    pub gateways: BTreeMap<String, u32>,
    /// Nodes that the cluster can use, with the process that joined.
    pub nodes: BTreeMap<String, u32>,
    /// The replicas that are members; nobody where no quorum says so.
    pub members: Vec<Seen>,
}

impl View {
    /// Whether the process, in its present life, does its part.
    #[must_use]
    pub fn has(&self, state: &State) -> bool {
        let seen = if state.kind == Kind::Coordinator { &self.gateways } else { &self.nodes };
        state.serves && state.pid.is_some() && seen.get(&state.name).copied() == state.pid
    }
}

/// The names of processes that do not do their part yet; `leader` when there is none.
#[must_use]
pub fn missing(states: &[State], view: &View) -> Vec<String> {
    let needed = states.iter().filter(|state| !state.dismissed);
    let mut names: Vec<String> = needed.filter(|state| !view.has(state)).map(|state| state.name.clone()).collect();
    if view.leader.is_none() {
        names.push("leader".into());
    }
    names
}

/// Looks at a cluster until stopped.
pub struct Watcher {
    place: Place,
    /// Gone when the cluster is dropped without being stopped.
    crew: Weak<Crew>,
    board: watch::Receiver<Vec<State>>,
    view: watch::Sender<View>,
    gateways: watch::Sender<Vec<Gateway>>,
    asker: Asker,
    /// The process at the other end of the asker's link.
    linked: Option<u32>,
    client: HttpClient,
}

impl Watcher {
    /// A watcher for the cluster of `place`, whose processes `crew` keeps; what it sees, and the gateways for the front.
    ///
    /// # Errors
    /// The operator's certificate cannot be used.
    pub fn new(place: Place, crew: &Arc<Crew>) -> Result<(Self, watch::Receiver<View>, watch::Receiver<Vec<Gateway>>)> {
        let asker = Asker::new(&place.dir, &place.file)?;
        let (view, seen) = watch::channel(View::default());
        let (gateways, listed) = watch::channel(Vec::new());
        let (board, crew) = (crew.board().subscribe(), Arc::downgrade(crew));
        Ok((Self { place, crew, board, view, gateways, asker, linked: None, client: http_client() }, seen, listed))
    }

    /// Runs until `stop`; gives the folder back, so that it is let go last.
    pub async fn run(mut self, stop: Shutdown) -> Place {
        loop {
            let states = self.board.borrow_and_update().clone();
            self.publish(&states);
            let now = linked(&self.asker, &states);
            if now.is_none() || now != self.linked {
                self.asker.hang_up();
            }
            let pause = if missing(&states, &self.view.borrow()).is_empty() { LOOK_LATER } else { LOOK_SOON };
            tokio::select! {
                _ = stop.wait() => break,
                changed = self.board.changed() => if changed.is_err() { break },
                view = async {
                    tokio::time::sleep(pause).await;
                    look(&mut self.asker, &self.client, &states).await
                } => {
                    self.linked = linked(&self.asker, &states);
                    self.follow(&view.members).await;
                    self.view.send_if_modified(|old| std::mem::replace(old, view.clone()) != view);
                }
            }
        }
        self.asker.close().await;
        self.place
    }

    /// Starts replicas that were taken in, lets go of those that were taken out.
    async fn follow(&mut self, members: &[Seen]) {
        let Some(crew) = self.crew.upgrade() else { return };
        let changes = self.place.follow(members);
        for entry in &changes.came {
            match self.place.issue(entry) {
                Ok(()) => crew.start_replica(&self.place, entry),
                Err(error) => eprintln!("{} was taken in and cannot be started: {error:#}", entry.name),
            }
        }
        for name in &changes.went {
            crew.dismiss(name).await;
        }
    }

    /// Tells the front and the file what is known.
    fn publish(&mut self, states: &[State]) {
        let view = self.view.borrow();
        let gateway = |state: &State| {
            let leader = view.leader.as_ref() == Some(&state.name);
            state.http.map(|address| Gateway { name: state.name.clone(), address, ready: view.has(state), leader })
        };
        let gateways: Vec<Gateway> = states.iter().filter_map(gateway).collect();
        self.gateways.send_if_modified(|old| std::mem::replace(old, gateways.clone()) != gateways);
        let former = self.place.file.clone();
        let of = |name: &str| states.iter().find(|state| state.name == name);
        for entry in &mut self.place.file.coordinators {
            (entry.pid, entry.http) = of(&entry.name).map_or((None, None), |state| (state.pid, state.http));
        }
        for entry in &mut self.place.file.nodes {
            entry.pid = of(&entry.name).and_then(|state| state.pid);
        }
        if self.place.file != former {
            // A full disk must not stop a cluster that serves; the next change tries again.
            let _ = self.place.file.save(&self.place.dir);
        }
    }
}

fn linked(asker: &Asker, states: &[State]) -> Option<u32> {
    let name = asker.linked_to()?;
    states.iter().find(|state| state.name == name)?.pid
}

async fn look(asker: &mut Asker, client: &HttpClient, states: &[State]) -> View {
    let lives = states.iter().any(|state| state.kind == Kind::Coordinator && state.serves);
    let asked = async {
        if !lives {
            return None;
        }
        timeout(ANSWER_WAIT_MAX, asker.ask(&json!({"q": "status"}))).await.ok()?.ok()
    };
    let ready = join_all(
        states
            .iter()
            .filter_map(|state| Some((state, state.http?, state.pid?)))
            .map(|(state, http, pid)| async move { is_ready(client, http).await.then(|| (state.name.clone(), pid)) }),
    );
    let (status, ready) = tokio::join!(asked, ready);
    let gateways = ready.into_iter().flatten().collect();
    let status = status.unwrap_or_default();
    View { leader: leader(&status), term: term(&status), gateways, nodes: usable(&status), members: members(&status) }
}

async fn is_ready(client: &HttpClient, http: SocketAddr) -> bool {
    let Ok(request) = hyper::Request::get(format!("http://{http}/readyz")).body(Full::<Bytes>::default()) else { return false };
    let answer = timeout(ANSWER_WAIT_MAX, client.request(request)).await;
    matches!(answer, Ok(Ok(answer)) if answer.status().is_success())
}

fn leader(status: &Value) -> Option<String> {
    status["leader"].as_str().filter(|_| status["quorum"] == true).map(str::to_owned)
}

fn term(status: &Value) -> u64 {
    let members = status["members"].as_array().into_iter().flatten();
    members.filter_map(|member| member["term"].as_u64()).max().unwrap_or_default()
}

fn members(status: &Value) -> Vec<Seen> {
    let vouched = status["quorum"] == true && status["stale"] == false;
    let all = status["members"].as_array().into_iter().flatten().filter(|_| vouched);
    let seen = |member: &Value| {
        let (name, address) = (member["name"].as_str()?.to_owned(), member["address"].as_str()?.parse().ok()?);
        Some(Seen { id: member["id"].as_u64()?, name, address })
    };
    // One that cannot be read makes the others no fewer: nobody is taken for gone then.
    all.map(seen).collect::<Option<_>>().unwrap_or_default()
}

fn usable(status: &Value) -> BTreeMap<String, u32> {
    let nodes = status["nodes"].as_array().into_iter().flatten().filter(|node| node["usable"] == true);
    let entry = |node: &Value| Some((node["name"].as_str()?.to_owned(), u32::try_from(node["pid"].as_u64()?).ok()?));
    nodes.filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_counts_in_its_present_life_only() {
        let state = |name: &str, kind, pid| State {
            name: name.into(),
            kind,
            pid,
            serves: true,
            http: None,
            starts: 1,
            failed: None,
            dismissed: false,
        };
        let states = [state("coordinator-1", Kind::Coordinator, Some(1)), state("decode-1", Kind::Decode, Some(2))];
        let status = json!({
            "leader": "coordinator-1", "quorum": true, "members": [{"term": 3}, {"term": null}],
            "nodes": [{"name": "decode-1", "pid": 2, "usable": true}, {"name": "decode-2", "pid": 9, "usable": false}],
        });
        let gateways = BTreeMap::from([("coordinator-1".to_owned(), 1)]);
        let view =
            View { leader: leader(&status), term: term(&status), gateways, nodes: usable(&status), members: members(&status) };
        assert_eq!((view.term, view.nodes.len()), (3, 1));
        assert!(missing(&states, &view).is_empty());
        let reborn = [states[0].clone(), State { pid: Some(77), ..states[1].clone() }];
        assert_eq!(missing(&reborn, &view), ["decode-1"]);
        let let_go = [states[0].clone(), State { pid: None, dismissed: true, ..states[1].clone() }];
        assert!(missing(&let_go, &view).is_empty(), "one that is needed no more is not missed");
        assert_eq!(missing(&states, &View { leader: None, ..view }), ["leader"]);
        assert_eq!(leader(&json!({"leader": "x", "quorum": false})), None, "a leader that nobody follows is none");
    }

    #[test]
    fn members_are_believed_when_a_quorum_vouches_for_all_of_them() {
        let member = |id: u64, address: Value| json!({"id": id, "name": format!("coordinator-{id}"), "address": address});
        let status = |quorum: bool, stale: bool, second: Value| json!({"quorum": quorum, "stale": stale, "members": [member(1, json!("127.0.0.1:7001")), member(2, second)]});
        let seen = members(&status(true, false, json!("127.0.0.1:7002")));
        assert_eq!(seen.iter().map(|seen| (seen.id, seen.address.port())).collect::<Vec<_>>(), [(1, 7001), (2, 7002)]);
        assert_eq!(members(&status(false, false, json!("127.0.0.1:7002"))), []);
        assert_eq!(members(&status(true, true, json!("127.0.0.1:7002"))), []);
        assert_eq!(members(&status(true, false, Value::Null)), []);
    }
}
