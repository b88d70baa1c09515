//! A local cluster's folder: what is in it, who may use it, and that a nameless one is gone afterwards.
//!
//! `lock`, `cluster.json`, `certs/` (authority; one folder for each process, `admin` among them), `logs/NAME.log`, `NAME/` (a
//! replica's log). A second start in the same folder finds all of it, and the replicas that were taken in and out since.

use std::fs::{self, File};
use std::iter;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use millrace_core::message::Role;
use millrace_node::pki::Authority;

use super::{Kind, UpArgs, names};
use crate::ctl::cluster_file::{ClusterFile, CoordinatorEntry, FILE, NodeEntry, VERSION};
use crate::ctl::exit::Exit;
use crate::ctl::{certs, running};

/// Time that processes of a former start in this folder have to end, once that start has ended.
const ORPHANS_WAIT_MAX: Duration = Duration::from_secs(15);
/// Where coordinators listen: below the ports that systems give to sockets which ask for any (Linux: from 32,768 on), so that none of those is given a
/// coordinator's before it listens.
const QUIET_PORTS: Range<u16> = 16_384..32_768;
/// Ports of those that are tried before the system is asked for any.
const DRAWN_PORTS_MAX: usize = 32;
/// The operator's name in its certificate.
const ADMIN: &str = "admin";

/// A replica that the cluster names as a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its number.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Where its QUIC endpoint listens.
    pub address: SocketAddr,
}

/// What is different from what the folder knew.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Replicas to be started.
    pub came: Vec<CoordinatorEntry>,
    /// Names of replicas that are none any more.
    pub went: Vec<String>,
}

/// The folder of a running cluster.
#[derive(Debug)]
pub struct Place {
    /// The folder, absolute.
    pub dir: PathBuf,
    /// What is known of the cluster.
    pub file: ClusterFile,
    temporary: bool,
    _lock: File,
    _note: Option<running::Note>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.temporary {
            let _ = fs::remove_dir_all(&self.dir);
        } else {
            (self.file.http, self.file.pid) = (None, None);
            let _ = self.file.save(&self.dir);
        }
    }
}

impl Place {
    /// Opens the folder that `args` names, or makes a temporary one; with certificates and ports for every process.
    /// `http` is where clients will be served.
    ///
    /// # Errors
    /// [`Exit::Conflict`] when another cluster runs there or one of another shape was made there; what the system says.
    pub async fn open(args: &UpArgs, http: SocketAddr) -> Result<Self> {
        let (dir, temporary) = match &args.dir {
            Some(dir) => (dir.clone(), false),
            None => (std::env::temp_dir().join(format!("millrace-{:016x}", rand::random::<u64>())), true),
        };
        fs::create_dir_all(dir.join("logs")).with_context(|| dir.display().to_string())?;
        let dir = dir.canonicalize().with_context(|| dir.display().to_string())?;
        let lock = running::lock(&dir)?;
        let former = dir.join(FILE).exists().then(|| ClusterFile::load(&dir)).transpose()?;
        if let Some(former) = &former {
            wait_for_orphans(&dir, former).await?;
        }
        let file = describe(args, &dir, former, http)?;
        make_certs(&dir, &file)?;
        file.save(&dir)?;
        let note = running::state_dir().and_then(|state| running::note(&state, &dir).ok());
        Ok(Self { dir, file, temporary, _lock: lock, _note: note })
    }

    /// Where the output of a process goes.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        log(&self.dir, name)
    }

    /// Takes note of who the members are; `members` is empty where that is not known. A new one is ours when it listens on this machine
    /// alone; one that listens elsewhere is somebody else's to start.
    pub fn follow(&mut self, members: &[Seen]) -> Changes {
        let mut changes = Changes::default();
        if members.is_empty() {
            return changes;
        }
        for entry in self.file.coordinators.iter_mut().filter(|entry| !entry.removed) {
            if members.iter().all(|seen| seen.id != entry.id) {
                entry.removed = true;
                changes.went.push(entry.name.clone());
            }
        }
        for Seen { id, name, address } in members.iter().filter(|seen| seen.address.ip().is_loopback()) {
            if self.file.coordinators.iter().all(|entry| entry.id != *id) {
                let (name, quic) = (name.clone(), *address);
                let entry = CoordinatorEntry { id: *id, name, quic, http: None, pid: None, joined: true, removed: false };
                self.file.coordinators.push(entry.clone());
                changes.came.push(entry);
            }
        }
        changes
    }

    /// Gives a replica its certificate.
    ///
    /// # Errors
    /// The authority cannot be read, or a file not be written.
    pub fn issue(&self, entry: &CoordinatorEntry) -> Result<()> {
        let certs = self.dir.join("certs");
        certs::issue(&Authority::load(&certs)?, &certs, Role::Coordinator, &entry.name).map(drop)
    }
}

/// Where the output of a process goes.
#[must_use]
pub fn log(dir: &Path, name: &str) -> PathBuf {
    dir.join("logs").join(format!("{name}.log"))
}

/// What the file will say; ports of a former start are kept where they are free.
fn describe(args: &UpArgs, dir: &Path, former: Option<ClusterFile>, http: SocketAddr) -> Result<ClusterFile> {
    let founders = names(Kind::Coordinator, args.coordinators);
    let known = former.iter().flat_map(|file| file.coordinators.clone());
    let (later, known): (Vec<_>, Vec<_>) = known.partition(|entry| entry.joined);
    if former.is_some() && known.len() != founders.len() {
        let (was, is) = (known.len(), founders.len());
        return Err(
            Exit::Conflict.error(format!("{} holds a cluster of {was} coordinators, not {is}; take another folder", dir.display()))
        );
    }
    let fresh = founders.into_iter().zip(1..).skip(known.len());
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
    let fresh =
        fresh.map(|(name, id)| CoordinatorEntry { id, name, quic: nowhere, http: None, pid: None, joined: false, removed: false });
    let mut coordinators: Vec<CoordinatorEntry> = known.into_iter().chain(fresh).chain(later).collect();
    let ports = free_ports(&coordinators.iter().map(|entry| entry.quic).collect::<Vec<_>>())?;
    for (entry, port) in coordinators.iter_mut().zip(ports) {
        (entry.quic, entry.http, entry.pid) = (port, None, None);
    }
    let node = |kind: Kind, count| {
        names(kind, count).into_iter().map(move |name| NodeEntry { name, kind: kind.as_str().into(), pid: None })
    };
    let certs = dir.join("certs");
    Ok(ClusterFile {
        version: VERSION,
        cluster: former.map_or_else(|| "local".into(), |file| file.cluster),
        model: args.model.clone(),
        http: Some(http),
        admin_certs: certs.join(ADMIN),
        certs,
        pid: Some(std::process::id()),
        coordinators,
        nodes: node(Kind::Prefill, args.prefill).chain(node(Kind::Decode, args.decode)).collect(),
    })
}

/// Free UDP ports on loopback: the `wanted` ones where they are free. All are held until all are found, so that they differ.
fn free_ports(wanted: &[SocketAddr]) -> Result<Vec<SocketAddr>> {
    let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let bind = |wanted: &SocketAddr| {
        let kept = Some(*wanted).filter(|wanted| wanted.port() != 0);
        let drawn = iter::repeat_with(|| local(rand::random_range(QUIET_PORTS))).take(DRAWN_PORTS_MAX);
        // The first that is free is taken.
        UdpSocket::bind(&*kept.into_iter().chain(drawn).chain([local(0)]).collect::<Vec<_>>())
    };
    let held = wanted.iter().map(bind).collect::<Result<Vec<_>, _>>().context("finding free UDP ports")?;
    held.iter().map(|socket| socket.local_addr().context("a socket's own address")).collect()
}

/// The authority is made once; certificates are issued anew at each start, so that they do not expire.
fn make_certs(dir: &Path, file: &ClusterFile) -> Result<()> {
    let certs = dir.join("certs");
    let authority =
        if certs.join("ca.key").exists() { Authority::load(&certs)? } else { Authority::create(&certs, &file.cluster)? };
    certs::issue(&authority, &certs, Role::Admin, ADMIN)?;
    for coordinator in file.coordinators.iter().filter(|entry| !entry.removed) {
        certs::issue(&authority, &certs, Role::Coordinator, &coordinator.name)?;
    }
    for node in &file.nodes {
        let role = if node.kind == Kind::Prefill.as_str() { Role::Prefill } else { Role::Decode };
        certs::issue(&authority, &certs, role, &node.name)?;
    }
    Ok(())
}

/// A start that was killed leaves processes that are about to end: their pipe has broken. Two sets must not share a folder.
async fn wait_for_orphans(dir: &Path, former: &ClusterFile) -> Result<()> {
    let until = Instant::now() + ORPHANS_WAIT_MAX;
    // A number may have gone to somebody else since; only a process that was told of this folder is meant.
    let lives = |pid: &u32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&words).contains(&*dir.to_string_lossy())
    };
    while let Some(pid) = former.pids().find(lives) {
        if Instant::now() > until {
            return Err(Exit::Conflict.error(format!("process {pid} of a former start in {} still runs", dir.display())));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use millrace_node::pki::Identity;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        up: UpArgs,
    }

    fn args(extra: &str) -> UpArgs {
        Line::parse_from("x --model m --http 127.0.0.1:1".split(' ').chain(extra.split_whitespace())).up
    }

    fn http() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 8080))
    }

    #[tokio::test]
    async fn a_folder_is_kept_with_its_ports_and_used_by_one_at_a_time() {
        let scratch = tempfile::tempdir().unwrap();
        let named = args(&format!("--dir {}", scratch.path().join("c").display()));
        let first = Place::open(&named, http()).await.unwrap();
        let (dir, ports) = (first.dir.clone(), first.file.coordinators.iter().map(|c| c.quic).collect::<Vec<_>>());
        assert_eq!(ports.len(), 3);
        assert!(ports.iter().all(|address| QUIET_PORTS.contains(&address.port())), "{ports:?}");
        for name in ["admin", "coordinator-3", "prefill-2", "decode-1"] {
            assert_eq!(Identity::load(&dir.join("certs").join(name)).unwrap().me.name, name);
        }
        assert_eq!(Exit::of(&Place::open(&named, http()).await.unwrap_err()), Exit::Conflict);
        drop(first);
        assert_eq!(ClusterFile::load(&dir).unwrap().pid, None, "it does not run");
        let again = Place::open(&named, http()).await.unwrap();
        assert_eq!(again.file.coordinators.iter().map(|c| c.quic).collect::<Vec<_>>(), ports);
        drop(again);
        let other = UpArgs { coordinators: 1, ..named };
        assert!(Place::open(&other, http()).await.unwrap_err().to_string().contains("3 coordinators"));
    }

    #[tokio::test]
    async fn a_nameless_folder_is_gone_afterwards() {
        let place = Place::open(&args(""), http()).await.unwrap();
        let dir = place.dir.clone();
        assert!(dir.join(FILE).exists());
        drop(place);
        assert!(!dir.exists());
    }

    #[tokio::test]
    async fn replicas_that_came_and_went_are_remembered() {
        let scratch = tempfile::tempdir().unwrap();
        let named = args(&format!("--dir {}", scratch.path().join("c").display()));
        let mut place = Place::open(&named, http()).await.unwrap();
        let seen = |place: &Place, ids: &[u64]| -> Vec<Seen> {
            let known = place.file.coordinators.iter().filter(|entry| ids.contains(&entry.id));
            known.map(|entry| Seen { id: entry.id, name: entry.name.clone(), address: entry.quic }).collect()
        };
        assert_eq!(place.follow(&[]), Changes::default(), "nothing is known");
        let founders = seen(&place, &[1, 2, 3]);
        assert_eq!(place.follow(&founders), Changes::default(), "nothing is new");
        let own = free_ports(&[SocketAddr::from(([127, 0, 0, 1], 0))]).unwrap()[0];
        let new = |id: u64, address| Seen { id, name: format!("coordinator-{id}"), address };
        let elsewhere = new(5, SocketAddr::from(([10, 0, 0, 5], 7000)));
        let changes = place.follow(&[founders, vec![new(4, own), elsewhere]].concat());
        assert_eq!((changes.came.len(), changes.came[0].id, changes.went.len()), (1, 4, 0), "another machine's is not ours");
        place.issue(&changes.came[0]).unwrap();
        assert!(Identity::load(&place.dir.join("certs/coordinator-4")).is_ok());
        let rest = seen(&place, &[1, 3, 4]);
        assert_eq!(place.follow(&rest).went, ["coordinator-2"]);
        assert_eq!(place.follow(&rest), Changes::default(), "once");
        drop(place);
        let again = Place::open(&named, http()).await.unwrap();
        let all = again.file.coordinators.iter().map(|entry| (entry.id, entry.joined, entry.removed));
        assert_eq!(all.collect::<Vec<_>>(), [(1, false, false), (2, false, true), (3, false, false), (4, true, false)]);
        assert_eq!(again.file.coordinators[3].quic, own, "where the log says that it listens");
    }
}
