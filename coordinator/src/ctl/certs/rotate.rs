//! New certificates for processes that have one, from the same authority; with `--wait`, until every running one shows its new one.
//!
//! Certificates are replaced on the disk that this runs on. Where processes run elsewhere, their folders must be carried there; `--wait`
//! then ends when that is done.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use futures_util::future::join_all;
use millrace_core::message::Role;
use millrace_node::endpoint::Target;
use millrace_node::pki::{Authority, Leaf};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Certificate, RotateArgs, folders};
use crate::ctl::ask::Asker;
use crate::ctl::cluster::Status;
use crate::ctl::cluster_file::{ClusterFile, FILE};
use crate::ctl::context::{Reach, Which};
use crate::ctl::dates::days_left;
use crate::ctl::exit::Exit;
use crate::ctl::output::Answer;
use crate::ctl::table::{Column, Page, Tone, cell, column, maybe};

/// Time for one handshake.
const LOOK_WAIT_MAX: Duration = Duration::from_secs(3);

/// What became of one.
#[derive(Serialize, Deserialize, Clone, Debug)]
struct Rotated {
    name: String,
    role: String,
    /// `would be issued`, `issued`, `in use` or `not running`.
    state: String,
    valid_until: Option<String>,
    serial: Option<String>,
}

#[derive(Serialize, Deserialize, Debug)]
struct Report {
    rotated: Vec<Rotated>,
}

const COLUMNS: &[Column<Rotated>] = &[
    column("NAME", |r| cell(&r.name)),
    column("ROLE", |r| cell(&r.role)),
    column("VALID UNTIL", |r| maybe(r.valid_until.as_ref())),
    column("STATE", |r| cell(&r.state).tone(if r.state == "in use" { Tone::Good } else { Tone::Plain })),
];

impl Answer for Report {
    fn page(&self) -> Page {
        Page::new().table(COLUMNS, &self.rotated)
    }

    fn names(&self) -> Vec<String> {
        self.rotated.iter().map(|r| format!("certificate/{}", r.name)).collect()
    }
}

/// Rotates.
///
/// # Errors
/// No such certificate, a file cannot be written, or [`Exit::Timeout`] when a process does not show its new one.
pub(super) async fn run(args: &RotateArgs) -> Result<()> {
    let authority = Authority::load(&args.dir).context("only the authority can issue")?;
    let chosen = choose(args)?;
    if args.dry_run {
        let state = |(who, _): &(Certificate, Role)| rotated(who, "would be issued");
        return args.shape.print(&Report { rotated: chosen.iter().map(state).collect() });
    }
    // Found before anything changes: a wait that cannot begin should not leave half of the work done.
    let reach = args.wait.wait.then(|| reach(args)).transpose()?;
    let mut done = Vec::new();
    for (who, role) in &chosen {
        let name = who.name.as_deref().unwrap_or_default();
        authority.issue(*role, name, &who.folder)?;
        done.push(rotated(&Certificate::load(&who.folder), "issued"));
    }
    if let Some(reach) = reach {
        wait_for(&reach, args, &mut done).await?;
    }
    args.shape.print(&Report { rotated: done })
}

fn rotated(who: &Certificate, state: &str) -> Rotated {
    let (valid_until, serial) = (who.valid_until.clone(), who.serial.clone());
    Rotated { name: who.name.clone().unwrap_or_default(), role: who.role.clone(), state: state.into(), valid_until, serial }
}

/// The certificates that are meant, valid or not, and their roles.
fn choose(args: &RotateArgs) -> Result<Vec<(Certificate, Role)>> {
    let mut chosen = Vec::new();
    for folder in folders(&args.dir)?.iter().filter(|folder| **folder != args.dir) {
        let Ok((who, leaf)) = Leaf::load(folder) else { continue };
        let named = args.names.is_empty() || args.names.contains(&who.name);
        let soon = args.within.is_none_or(|days| days_left(leaf.valid_until, SystemTime::now()) < days);
        if named && soon {
            chosen.push((Certificate::load(folder), who.role));
        }
    }
    let found = |name: &&String| chosen.iter().any(|(who, _)| who.name.as_ref() == Some(name));
    match args.names.iter().find(|name| !found(name)) {
        Some(name) if args.within.is_none() => {
            let hint = "`millctl certs show` lists them; `millctl certs issue` makes a first one";
            Err(Exit::NotFound.hinted(format!("no certificate of {name:?} under {}", args.dir.display()), hint))
        }
        _ => Ok(chosen),
    }
}

/// The cluster whose certificates these are.
fn reach(args: &RotateArgs) -> Result<Reach> {
    if args.context.is_some() {
        return Which { dir: None, context: args.context.clone() }.resolve();
    }
    let dir = args.dir.canonicalize().with_context(|| args.dir.display().to_string())?;
    match dir.parent().filter(|parent| parent.join(FILE).exists()) {
        Some(parent) => Ok(Reach::local(parent, &ClusterFile::load(parent)?)),
        None => Which::default().resolve(),
    }
}

/// Whom to shake hands with, by name.
async fn targets(asker: &mut Asker, reach: &Reach) -> BTreeMap<String, Target> {
    let mut targets = BTreeMap::new();
    for door in &reach.doors {
        if let (Some(name), Ok(target)) = (&door.name, door.target().await) {
            targets.insert(name.clone(), target);
        }
    }
    // Without an answer only the replicas that we know are looked at.
    let status = asker.ask(&json!({"q": "status"})).await.ok().and_then(|status| serde_json::from_value::<Status>(status).ok());
    for node in status.iter().flat_map(|status| &status.nodes).filter(|node| !matches!(node.state.as_str(), "dead" | "left")) {
        if let (Ok(addr), Some(role)) = (node.address.parse(), Role::parse(&node.kind)) {
            targets.insert(node.name.clone(), Target { addr, role, name: Some(node.name.clone()) });
        }
    }
    targets
}

async fn wait_for(reach: &Reach, args: &RotateArgs, done: &mut [Rotated]) -> Result<()> {
    let mut asker = Asker::to(reach)?;
    let targets = targets(&mut asker, reach).await;
    for one in done.iter_mut() {
        one.state = if targets.contains_key(&one.name) { "issued" } else { "not running" }.into();
    }
    let result = args.wait.until("not every process shows its new certificate", async || {
        let looks = done.iter_mut().filter(|one| one.state == "issued").map(|one| look(&asker, &targets, one));
        let missing: Vec<String> = join_all(looks).await.into_iter().flatten().collect();
        Ok(if missing.is_empty() { Ok(()) } else { Err(missing.join("; ")) })
    });
    let result = result.await;
    asker.close().await;
    result
}

/// Looks at what a process shows; says what is missing.
async fn look(asker: &Asker, targets: &BTreeMap<String, Target>, one: &mut Rotated) -> Option<String> {
    let target = targets.get(&one.name)?;
    match tokio::time::timeout(LOOK_WAIT_MAX, asker.handshake(target)).await {
        Ok(Ok(leaf)) if Some(&leaf.serial) == one.serial.as_ref() => {
            one.state = "in use".into();
            None
        }
        Ok(Ok(_)) => Some(format!("{} still shows its former one", one.name)),
        Ok(Err(error)) => Some(format!("{}: {error}", one.name)),
        Err(_) => Some(format!("{} does not answer", one.name)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{init, issue};
    use super::*;
    use crate::ctl::output::{Shape, Wait};

    fn args(dir: &Path, names: &[&str]) -> RotateArgs {
        RotateArgs {
            names: names.iter().map(ToString::to_string).collect(),
            dir: dir.to_owned(),
            within: None,
            dry_run: false,
            context: None,
            wait: Wait { wait: false, timeout: 1.0 },
            shape: Shape::default(),
        }
    }

    #[tokio::test]
    async fn those_that_are_named_get_new_ones_with_the_same_identity() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        init(dir, "x").unwrap();
        let authority = Authority::load(dir).unwrap();
        for (role, name) in [(Role::Decode, "d1"), (Role::Admin, "op")] {
            issue(&authority, dir, role, name).unwrap();
        }
        let serial = |name: &str| Leaf::load(&dir.join(name)).unwrap();
        let before = (serial("d1"), serial("op"));
        run(&RotateArgs { dry_run: true, ..args(dir, &[]) }).await.unwrap();
        run(&RotateArgs { within: Some(5), ..args(dir, &[]) }).await.unwrap();
        assert_eq!((serial("d1"), serial("op")), before, "neither changes anything");
        run(&args(dir, &["d1"])).await.unwrap();
        assert_eq!((serial("d1").0, serial("op")), (before.0.0, before.1));
        assert_ne!(serial("d1").1.serial, before.0.1.serial);
        assert_eq!(Exit::of(&run(&args(dir, &["nobody"])).await.unwrap_err()), Exit::NotFound);
        // An expired one is what rotation is for.
        let long_ago = SystemTime::now() - Duration::from_secs(10 * 86_400);
        authority.issue_at(Role::Decode, "d1", &dir.join("d1"), long_ago, Duration::from_secs(86_400)).unwrap();
        run(&RotateArgs { within: Some(5), ..args(dir, &[]) }).await.unwrap();
        assert_eq!(Certificate::load(&dir.join("d1")).state, "valid");
    }
}
