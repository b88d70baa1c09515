//! `millctl doctor`: looks at each replica by itself, without a quorum too, and says what is wrong and what cures it.
//!
//! Here is the looking: every replica is asked over a link of its own, every gateway over HTTP, every process for its certificate. What the
//! findings mean is decided in [`checks`], which looks at nothing.

mod checks;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use bytes::Bytes;
use clap::Args;
use futures_util::future::join_all;
use http_body_util::Full;
use millrace_core::message::Role;
use millrace_node::endpoint::Target;
use millrace_node::pki::{Identity, Leaf};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::timeout;

use self::checks::{Check, Verdict, diagnose};
use super::ask::Asker;
use super::cluster::{Member, Status};
use super::context::{Door, Reach, Which};
use super::exit::Exit;
use super::front::{HttpClient, http_client};
use super::output::{Answer, Shape};
use super::table::{Page, Tone, cell};

/// Time for one answer of one process.
const LOOK_WAIT_MAX: Duration = Duration::from_secs(4);
/// Processes that are looked at; more are not.
const LOOKS_MAX: usize = 1024;

/// Whom to look at.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Example:\n  millctl doctor\n  millctl doctor -o json | jq '.checks[] | select(.verdict != \"ok\")'")]
pub struct DoctorArgs {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    shape: Shape,
}

/// What was seen of one replica.
#[derive(Clone, Debug)]
struct Replica {
    name: String,
    address: String,
    /// What it says of itself, or why it says nothing.
    member: Result<Member, String>,
    /// What it says of the cluster.
    status: Option<Status>,
    /// The certificate that it showed.
    leaf: Option<Leaf>,
    /// Its wall clock less ours, milliseconds, and how far that may be wrong.
    skew_ms: Option<(i64, i64)>,
    /// Whether its gateway is ready, or why not.
    http: Option<Result<(), String>>,
}

/// Everything that was seen.
#[derive(Clone, Debug)]
struct Findings {
    now: SystemTime,
    /// Our own certificate.
    own: Leaf,
    replicas: Vec<Replica>,
    /// The best view of the cluster: one with a quorum if there is any.
    status: Option<Status>,
    /// What that view's replica says of its index.
    cache: Option<Value>,
    /// The certificate of each node that should be alive, or why it showed none.
    nodes: BTreeMap<String, Result<Leaf, String>>,
    /// A local cluster's door: where, and whether it is open.
    front: Option<(SocketAddr, Result<(), String>)>,
}

/// The whole report.
#[derive(Serialize, Deserialize, Debug)]
struct Report {
    /// `ok`, `degraded` or `no_quorum`.
    verdict: String,
    quorum: bool,
    checks: Vec<Check>,
    /// What could not be found out.
    unknown: Vec<String>,
}

impl Answer for Report {
    fn page(&self) -> Page {
        let mut page = Page::new();
        for check in &self.checks {
            let mark = match check.verdict {
                Verdict::Ok => cell("[ok]").tone(Tone::Good),
                Verdict::Warn => cell("[!!]").tone(Tone::Warn),
                Verdict::Bad => cell("[XX]").tone(Tone::Bad),
                Verdict::Unknown => cell("[??]").tone(Tone::Warn),
            };
            page = page.cells([mark, cell(format_args!("{:<12} {}", check.name, check.detail))]);
            if let Some(cure) = &check.cure {
                page = page.line(format_args!("       {:<12} cure: {cure}", ""));
            }
        }
        self.unknown.iter().fold(page, |page, what| page.cells([cell(format_args!("unknown: {what}")).tone(Tone::Warn)]))
    }

    fn names(&self) -> Vec<String> {
        let sick = self.checks.iter().filter(|check| check.verdict != Verdict::Ok);
        sick.map(|check| format!("check/{}", check.name)).collect()
    }
}

/// Looks at everything.
///
/// # Errors
/// [`Exit::Degraded`] when something is wrong, [`Exit::Unavailable`] without a quorum; the report is printed before.
pub async fn run(args: DoctorArgs) -> Result<()> {
    let reach = args.which.resolve()?;
    let findings = look(&reach).await?;
    let checks = diagnose(&findings);
    let quorum = findings.status.as_ref().is_some_and(|status| status.quorum);
    let sick = checks.iter().filter(|check| check.verdict != Verdict::Ok).count();
    let verdict = if !quorum {
        "no_quorum"
    } else if sick > 0 {
        "degraded"
    } else {
        "ok"
    };
    let nobody = || vec!["everything about the cluster: no replica answers".to_owned()];
    let unknown = findings.status.as_ref().map_or_else(nobody, |status| status.unknown.clone());
    args.shape.print(&Report { verdict: verdict.into(), quorum, checks, unknown })?;
    match (quorum, sick) {
        (false, _) => Err(Exit::Unavailable.error("there is no quorum")),
        (true, 0) => Ok(()),
        (true, sick) => Err(Exit::Degraded.error(format!("{sick} things are not as they should be"))),
    }
}

async fn look(reach: &Reach) -> Result<Findings> {
    // Without a certificate of ours nobody can be asked, so this one is an error and not a finding.
    let own = Identity::load(&reach.certs)?.leaf()?;
    let client = http_client();
    let mut replicas = join_all(reach.doors.iter().map(|door| look_at(reach, door.clone(), &client))).await;
    let known = best(&replicas);
    let missed = known.iter().flat_map(|status| &status.members).filter_map(|member| {
        let seen = replicas.iter().any(|replica| replica.name == member.name);
        let door = Door { name: Some(member.name.clone()), address: member.address.clone()? };
        (!seen).then_some(door)
    });
    let missed: Vec<Door> = missed.take(LOOKS_MAX).collect();
    replicas.extend(join_all(missed.into_iter().map(|door| look_at(reach, door, &client))).await);
    let status = best(&replicas);
    let front = match reach.http() {
        Some(http) => Some((http, is_ready(&client, &http.to_string()).await)),
        None => None,
    };
    let mut asker = Asker::to(reach)?;
    let cache = timeout(LOOK_WAIT_MAX, asker.ask(&json!({"q": "cache_stat"}))).await.ok().and_then(Result::ok);
    let nodes = node_leaves(&asker, status.as_ref()).await;
    asker.close().await;
    Ok(Findings { now: SystemTime::now(), own, replicas, status, cache, nodes, front })
}

/// The view of a replica with a quorum, else of the one that has applied most.
fn best(replicas: &[Replica]) -> Option<Status> {
    let applied = |replica: &Replica| replica.member.as_ref().ok().and_then(|member| member.applied);
    let rank = |replica: &&Replica| (replica.status.as_ref().is_some_and(|status| status.quorum), applied(replica));
    replicas.iter().filter(|replica| replica.status.is_some()).max_by_key(rank)?.status.clone()
}

async fn look_at(reach: &Reach, door: Door, client: &HttpClient) -> Replica {
    let (name, address) = (door.to_string(), door.address.clone());
    let member = Err("does not answer in time".into());
    let mut replica = Replica { name, address, member, status: None, leaf: None, skew_ms: None, http: None };
    let only = Reach { doors: vec![door], ..reach.clone() };
    let mut asker = match Asker::to(&only) {
        Ok(asker) => asker,
        Err(error) => return Replica { member: Err(format!("{error:#}")), ..replica },
    };
    let _ = timeout(LOOK_WAIT_MAX, ask_all(&mut asker, &mut replica)).await;
    replica.leaf = asker.peer_leaf();
    asker.close().await;
    let http = replica.member.as_ref().ok().and_then(|member| member.http.clone());
    if let Some(http) = http {
        replica.http = Some(is_ready(client, &http).await);
    }
    replica
}

/// Fills in what is learnt before the time is up.
async fn ask_all(asker: &mut Asker, replica: &mut Replica) {
    // The first question pays for the handshake; the second one's time is the network's.
    let asked = match asker.ask(&json!({"q": "member"})).await {
        Ok(_) => {
            let began = (Instant::now(), SystemTime::now());
            asker.ask(&json!({"q": "member"})).await.map(|value| (value, began))
        }
        Err(error) => Err(error),
    };
    replica.member = asked.map_err(|error| error.to_string()).and_then(|(value, (began, wall))| {
        let member: Member = serde_json::from_value(value).map_err(|e| format!("its answer has another shape: {e}"))?;
        let half_ms = began.elapsed().as_millis() as i64 / 2;
        let ours_ms = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as i64 + half_ms;
        replica.skew_ms = member.wall_ms.map(|theirs| (theirs as i64 - ours_ms, half_ms + 1));
        Ok(member)
    });
    if let Ok(member) = &replica.member {
        replica.name.clone_from(&member.name);
        replica.status = asker.ask(&json!({"q": "status"})).await.ok().and_then(|status| serde_json::from_value(status).ok());
    }
}

async fn node_leaves(asker: &Asker, status: Option<&Status>) -> BTreeMap<String, Result<Leaf, String>> {
    let alive = status.iter().flat_map(|status| &status.nodes).filter(|node| !matches!(node.state.as_str(), "dead" | "left"));
    let looks = alive.take(LOOKS_MAX).map(async |node| {
        let target = node.address.parse().ok().zip(Role::parse(&node.kind));
        let target = target.map(|(addr, role)| Target { addr, role, name: Some(node.name.clone()) });
        let leaf = match target {
            None => Err(format!("{:?} is no address", node.address)),
            Some(target) => match timeout(LOOK_WAIT_MAX, asker.handshake(&target)).await {
                Ok(leaf) => leaf.map_err(|error| error.to_string()),
                Err(_) => Err("no answer in time".into()),
            },
        };
        (node.name.clone(), leaf)
    });
    join_all(looks).await.into_iter().collect()
}

async fn is_ready(client: &HttpClient, http: &str) -> Result<(), String> {
    let request = hyper::Request::get(format!("http://{http}/readyz")).body(Full::<Bytes>::default());
    let request = request.map_err(|error| format!("{http:?}: {error}"))?;
    match timeout(LOOK_WAIT_MAX, client.request(request)).await {
        Ok(Ok(answer)) if answer.status().is_success() => Ok(()),
        Ok(Ok(answer)) => Err(format!("answers {}", answer.status())),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("does not answer in time".into()),
    }
}
