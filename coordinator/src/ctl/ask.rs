//! Asks a cluster: any replica that answers, over QUIC with the operator's certificate. What is asked is the callers'.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use millrace_core::ids::{Epoch, NodeId};
use millrace_core::message::{Hello, Message};
use millrace_node::endpoint::{Endpoint, EndpointConfig};
use millrace_node::link::{Link, LinkError, LinkReceiver};
use millrace_node::pki::Identity;
use serde_json::Value;

use super::cluster_file::ClusterFile;
use super::context::{Door, Reach};
use super::exit::Exit;

/// Time for an answer.
pub const ANSWER_WAIT_MAX: Duration = Duration::from_secs(10);
/// Time for a handshake with one replica.
pub const CONNECT_WAIT_MAX: Duration = Duration::from_millis(1500);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No replica can be talked to; says why for each.
    #[error("no coordinator of the cluster answers: {0}")]
    Unavailable(String),
    /// Every replica that could be reached refuses us.
    #[error("the cluster refuses this certificate: {0}")]
    Denied(String),
    /// A replica answered with an error.
    #[error("{0}")]
    Refused(String),
}

/// Why one replica cannot be talked to.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Its host name has no address.
    #[error("{0}")]
    Resolve(std::io::Error),
    /// It does not take the link.
    #[error(transparent)]
    Link(#[from] LinkError),
}

impl AskError {
    /// The exit code that fits.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Unavailable(_) => Exit::Unavailable,
            Self::Denied(_) => Exit::Denied,
            Self::Refused(reason) => Exit::of_refusal(reason),
        }
    }
}

/// A line to a cluster.
pub struct Asker {
    endpoint: Endpoint,
    hello: Hello,
    doors: Vec<Door>,
    link: Option<(Link, LinkReceiver)>,
    asked: u64,
}

impl Asker {
    /// Prepares to ask the cluster of `file`; relative folders in it are below `dir`. Connects to nobody yet.
    ///
    /// # Errors
    /// The operator's certificate cannot be used.
    pub fn new(dir: &Path, file: &ClusterFile) -> Result<Self> {
        Self::to(&Reach::local(dir, file))
    }

    /// Prepares to ask a cluster. Connects to nobody yet.
    ///
    /// # Errors
    /// The operator's certificate cannot be used.
    pub fn to(reach: &Reach) -> Result<Self> {
        let certs = &reach.certs;
        let identity = Identity::load(certs).with_context(|| format!("certificates in {}", certs.display()))?;
        let hello = Hello {
            cluster: identity.me.cluster.clone(),
            name: identity.me.name.clone(),
            instance: rand::random(),
            node: NodeId::default(),
            epoch: Epoch::default(),
            model: None,
        };
        let near = reach.doors.iter().all(Door::is_near);
        let from = if near { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
        let config = EndpointConfig { connect_timeout: CONNECT_WAIT_MAX, ..EndpointConfig::default() };
        let endpoint = Endpoint::bind(SocketAddr::new(IpAddr::V4(from), 0), identity, config)?;
        Ok(Self { endpoint, hello, doors: reach.doors.clone(), link: None, asked: 0 })
    }

    /// Asks, over the link there is or a new one to whichever replica answers first. A replica that is lost meanwhile is
    /// replaced once: queries may be repeated.
    ///
    /// # Errors
    /// [`AskError`].
    pub async fn ask(&mut self, query: &Value) -> Result<Value, AskError> {
        let mut lost = String::new();
        for _ in 0..2 {
            if self.link.as_ref().is_none_or(|(link, _)| link.is_closed().is_some()) {
                self.link = Some(self.connect().await?);
            }
            match self.ask_once(query).await {
                Some(Ok(text)) => {
                    return serde_json::from_str(&text).map_err(|e| AskError::Refused(format!("the answer is no JSON: {e}")));
                }
                Some(Err(reason)) => return Err(AskError::Refused(reason)),
                None => lost = self.link.take().map(|(link, _)| format!("{} fell silent", link.peer())).unwrap_or_default(),
            }
        }
        Err(AskError::Unavailable(lost))
    }

    async fn ask_once(&mut self, query: &Value) -> Option<Result<String, String>> {
        self.asked += 1;
        let asked = self.asked;
        let (link, receiver) = self.link.as_mut()?;
        link.send(&Message::Query { id: asked, json: query.to_string() }).ok()?;
        let answer = async {
            loop {
                if let Message::Answer { id, result } = receiver.recv().await?
                    && id == asked
                {
                    return Some(result);
                }
            }
        };
        tokio::time::timeout(ANSWER_WAIT_MAX, answer).await.ok().flatten()
    }

    /// Dials all at once and takes the first: a dead replica on the way costs no time.
    async fn connect(&self) -> Result<(Link, LinkReceiver), AskError> {
        let dial = |door: &Door| {
            let door = door.clone();
            async move { self.dial(&door).await.map_err(|error| (door, error)) }
        };
        let mut dials: FuturesUnordered<_> = self.doors.iter().map(dial).collect();
        let (mut reasons, mut denied) = (Vec::new(), !self.doors.is_empty());
        while let Some(done) = dials.next().await {
            match done {
                Ok(pair) => return Ok(pair),
                Err((door, error)) => {
                    denied &= matches!(error, DialError::Link(LinkError::Refused { .. }));
                    reasons.push(format!("{door}: {error}"));
                }
            }
        }
        reasons.sort();
        let reasons = reasons.join("; ");
        Err(if denied { AskError::Denied(reasons) } else { AskError::Unavailable(reasons) })
    }

    async fn dial(&self, door: &Door) -> Result<(Link, LinkReceiver), DialError> {
        let target = door.target().await.map_err(DialError::Resolve)?;
        Ok(Link::dial(&self.endpoint, &target, &self.hello).await?)
    }

    /// The replica that the next question goes to, when a link is up.
    #[must_use]
    pub fn linked_to(&self) -> Option<&str> {
        self.link.as_ref().map(|(link, _)| link.peer().name.as_str())
    }

    /// Drops the link: its replica is known to be dead, which would take the transport a few seconds to find out.
    pub fn hang_up(&mut self) {
        self.link = None;
    }

    /// Says goodbye.
    pub async fn close(self) {
        drop(self.link);
        self.endpoint.close("asked and answered").await;
    }
}

#[cfg(test)]
mod tests {
    use millrace_core::message::Role;
    use millrace_node::pki::Authority;
    use serde_json::json;

    use super::super::cluster_file::tests::sample;
    use super::*;

    #[test]
    fn each_reason_has_its_exit_code() {
        assert_eq!(AskError::Refused("not found: node \"x\"".into()).exit(), Exit::NotFound);
        assert_eq!(AskError::Refused("else".into()).exit(), Exit::Failed);
        assert_eq!(AskError::Denied(String::new()).exit(), Exit::Denied);
        let error = anyhow::Error::from(AskError::Unavailable("c-1: gone".into()));
        assert_eq!((Exit::of(&error), error.to_string().contains("c-1: gone")), (Exit::Unavailable, true));
    }

    #[tokio::test]
    async fn the_first_replica_that_answers_is_asked_and_a_lost_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(dir.path(), "x").unwrap();
        for (role, name) in [(Role::Admin, "admin"), (Role::Coordinator, "coordinator-2")] {
            authority.issue(role, name, &dir.path().join(name)).unwrap();
        }
        let identity = Identity::load(&dir.path().join("coordinator-2")).unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let replica = Endpoint::bind(any, identity, EndpointConfig::default()).unwrap();
        let silent = std::net::UdpSocket::bind(any).unwrap();
        let mut file = sample();
        file.admin_certs = "admin".into();
        file.coordinators[0].quic = silent.local_addr().unwrap();
        file.coordinators[1].quic = replica.local_addr().unwrap();
        let mut asker = Asker::new(dir.path(), &file).unwrap();
        let served = replica.clone();
        let serving = tokio::spawn(async move {
            for answer in ["{\"n\":1}", "{\"n\":2}"] {
                let connection = served.accept().await.unwrap().finish().await.unwrap();
                let hello = Hello {
                    cluster: "x".into(),
                    name: "coordinator-2".into(),
                    instance: 1,
                    node: NodeId(0),
                    epoch: Epoch(0),
                    model: None,
                };
                let (link, mut receiver) = Link::accept(connection, &hello).await.unwrap();
                let Some(Message::Query { id, .. }) = receiver.recv().await else { panic!("a query") };
                // An answer to nothing that was asked is passed over.
                link.send(&Message::Answer { id: id + 7, result: Ok("{}".into()) }).unwrap();
                link.send(&Message::Answer { id, result: Ok(answer.into()) }).unwrap();
                link.drain(Duration::from_secs(5), "enough").await;
            }
        });
        assert_eq!(asker.ask(&json!({"q": "status"})).await.unwrap(), json!({"n": 1}));
        assert_eq!(asker.ask(&json!({"q": "status"})).await.unwrap(), json!({"n": 2}));
        serving.await.unwrap();
        replica.close("gone").await;
        drop(replica);
        let error = asker.ask(&json!({"q": "status"})).await.unwrap_err();
        assert_eq!(error.exit(), Exit::Unavailable, "{error}");
    }
}
