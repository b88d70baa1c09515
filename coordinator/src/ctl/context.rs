//! Which cluster a command is about, and `millctl context`, which gives clusters names.
//!
//! In this order: `--dir`, `--context`, `MILLRACE_DIR`, `MILLCTL_CONTEXT`, the context in use, the newest local cluster that runs. A context
//! is where a cluster's replicas listen and the operator's certificate for it; all of them are in one file below
//! `$XDG_CONFIG_HOME`. Keys stay where they are: the file holds paths.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, ensure};
use clap::{Args, Subcommand};
use millrace_core::message::Role;
use millrace_node::endpoint::Target;
use millrace_node::pki::Identity;
use serde::{Deserialize, Serialize};

use super::cluster_file::ClusterFile;
use super::exit::Exit;
use super::output::{Answer, Shape};
use super::running;
use super::table::{Column, Page, cell, column, maybe};

/// The version of the file's shape; another is refused.
const VERSION: u32 = 1;
/// The name that means the newest local cluster that runs.
const LOCAL: &str = "local";
/// Contexts of one user; a further one is refused.
const CONTEXTS_MAX: usize = 1024;

/// The flags that say which cluster is meant.
#[derive(Args, Clone, Debug, Default)]
pub struct Which {
    /// The folder of a local cluster; else MILLRACE_DIR
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// The name of a cluster; else MILLCTL_CONTEXT, else the one in use, else the newest local cluster that runs
    #[arg(long, conflicts_with = "dir")]
    pub context: Option<String>,
}

/// Where one replica listens: `NAME=HOST:PORT`, or `HOST:PORT` when any name will do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Door {
    /// The name that its certificate must give.
    pub name: Option<String>,
    /// `HOST:PORT`; resolved whenever it is dialed, because hosts move.
    pub address: String,
}

impl Door {
    /// Whether it is on this machine.
    #[must_use]
    pub fn is_near(&self) -> bool {
        self.address.parse::<SocketAddr>().is_ok_and(|addr| addr.ip().is_loopback())
    }

    /// Whom to dial.
    ///
    /// # Errors
    /// The host has no address.
    pub async fn target(&self) -> std::io::Result<Target> {
        let none = || std::io::Error::new(std::io::ErrorKind::NotFound, format!("{} has no address", self.address));
        let mut all = tokio::net::lookup_host(&self.address).await?.collect::<Vec<_>>();
        // The endpoint of this tool has an IPv4 address.
        all.sort_by_key(|addr| !matches!(addr.ip(), IpAddr::V4(_)));
        let addr = all.into_iter().next().ok_or_else(none)?;
        Ok(Target { addr, role: Role::Coordinator, name: self.name.clone() })
    }
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name.as_ref().unwrap_or(&self.address))
    }
}

impl FromStr for Door {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, address) = match text.split_once('=') {
            Some((name, address)) => (Some(name.trim().to_owned()), address.trim()),
            None => (None, text.trim()),
        };
        let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port);
        port.and_then(|port| port.parse::<u16>().ok()).ok_or_else(|| format!("{text:?}: expected NAME=HOST:PORT or HOST:PORT"))?;
        Ok(Self { name, address: address.to_owned() })
    }
}

/// How a cluster is reached.
#[derive(Clone, Debug)]
pub struct Reach {
    /// What it is called here.
    pub name: String,
    /// Folder of the operator's certificate.
    pub certs: PathBuf,
    /// Its replicas.
    pub doors: Vec<Door>,
    /// A local cluster: its folder and what it wrote down.
    pub local: Option<(PathBuf, ClusterFile)>,
}

impl Reach {
    /// The local cluster of `file` in `dir`.
    #[must_use]
    pub fn local(dir: &Path, file: &ClusterFile) -> Self {
        let door = |c: &super::cluster_file::CoordinatorEntry| Door { name: Some(c.name.clone()), address: c.quic.to_string() };
        Self {
            name: LOCAL.into(),
            certs: dir.join(&file.admin_certs),
            doors: file.coordinators.iter().filter(|c| !c.removed).map(door).collect(),
            local: Some((dir.to_owned(), file.clone())),
        }
    }

    fn folder(dir: &Path) -> Result<Self> {
        Ok(Self::local(dir, &ClusterFile::load(dir)?))
    }

    /// Where clients of a local cluster are served.
    #[must_use]
    pub fn http(&self) -> Option<SocketAddr> {
        self.local.as_ref().and_then(|(_, file)| file.http)
    }
}

impl Which {
    /// Finds the cluster.
    ///
    /// # Errors
    /// [`Exit::NotFound`] when there is none, or none of that name.
    pub fn resolve(&self) -> Result<Reach> {
        let env = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        if let Some(dir) = &self.dir {
            return Reach::folder(dir);
        }
        if let Some(name) = &self.context {
            return named(name);
        }
        if let Some(dir) = env("MILLRACE_DIR") {
            return Reach::folder(Path::new(&dir));
        }
        if let Some(name) = env("MILLCTL_CONTEXT") {
            return named(&name.to_string_lossy());
        }
        let used = config_file().map(|path| Contexts::load(&path)).transpose()?.and_then(|contexts| contexts.current);
        named(used.as_deref().unwrap_or(LOCAL))
    }
}

fn named(name: &str) -> Result<Reach> {
    if name == LOCAL {
        let dir = running::newest().ok_or_else(|| {
            Exit::NotFound.hinted("no local cluster runs", "start one with `millctl local up`, or name one with --dir or --context")
        })?;
        return Reach::folder(&dir);
    }
    let contexts = Contexts::load(&must_config_file()?)?;
    let context = contexts.get(name)?;
    let doors = context.coordinators.iter().map(|door| door.parse()).collect::<Result<_, String>>();
    let doors = doors.map_err(|error| Exit::Usage.error(format!("context {name}: {error}")))?;
    Ok(Reach { name: name.to_owned(), certs: context.certs.clone(), doors, local: None })
}

/// `millctl context`.
#[derive(Subcommand, Debug)]
pub enum ContextCommand {
    /// All named clusters; `*` marks the one in use
    #[command(after_help = "Example:\n  millctl context list -o wide")]
    List(Shape),
    /// Use a cluster from now on; `local` means the newest local cluster that runs
    #[command(after_help = "Example:\n  millctl context use prod")]
    Use {
        /// Its name
        name: String,
    },
    /// Name a cluster, or change what a name means
    #[command(
        after_help = "Example:\n  millctl context add prod --certs certs/admin \\\n    --coordinators coordinator-1=10.0.0.1:7000,coordinator-2=10.0.0.2:7000,coordinator-3=10.0.0.3:7000"
    )]
    Add {
        /// Its name
        name: String,
        /// Where its replicas listen: NAME=HOST:PORT, or HOST:PORT
        #[arg(long, required = true, value_delimiter = ',', value_parser = Door::from_str)]
        coordinators: Vec<Door>,
        /// Folder of the operator's certificate
        #[arg(long)]
        certs: PathBuf,
        /// Use it from now on
        #[arg(long = "use")]
        use_it: bool,
    },
    /// One named cluster
    #[command(after_help = "Example:\n  millctl context show prod -o yaml")]
    Show(Shown),
    /// Forget a name; the cluster and its certificates stay
    #[command(after_help = "Example:\n  millctl context delete prod")]
    Delete {
        /// Its name
        name: String,
    },
}

/// Which context to show.
#[derive(Args, Clone, Debug)]
pub struct Shown {
    /// Its name; the one in use if absent
    name: Option<String>,
    #[command(flatten)]
    shape: Shape,
}

/// A named cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Context {
    /// Where its replicas listen, as on the command line.
    coordinators: Vec<String>,
    /// Folder of the operator's certificate.
    certs: PathBuf,
}

/// The file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Contexts {
    version: u32,
    current: Option<String>,
    contexts: BTreeMap<String, Context>,
}

fn config_file() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")));
    base.map(|base| base.join("millrace/contexts.json"))
}

fn must_config_file() -> Result<PathBuf> {
    config_file().ok_or_else(|| Exit::Failed.hinted("there is no place for contexts", "set HOME or XDG_CONFIG_HOME"))
}

impl Contexts {
    fn load(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Ok(Self { version: VERSION, ..Self::default() });
        }
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let contexts: Self = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        ensure!(contexts.version == VERSION, "{}: version {}, this millctl knows {VERSION}", path.display(), contexts.version);
        Ok(contexts)
    }

    fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("writing JSON")? + "\n";
        let draft = path.with_extension("new");
        let folder = path.parent().unwrap_or(Path::new("."));
        let written = fs::create_dir_all(folder).and_then(|()| fs::write(&draft, text)).and_then(|()| fs::rename(&draft, path));
        written.with_context(|| path.display().to_string())
    }

    fn get(&self, name: &str) -> Result<&Context> {
        self.contexts.get(name).ok_or_else(|| {
            Exit::NotFound
                .hinted(format!("no context {name:?}"), "`millctl context list` shows them; `millctl context add` makes one")
        })
    }

    fn put(&mut self, name: &str, coordinators: &[Door], certs: &Path) -> Result<()> {
        let plain = !name.is_empty() && name.len() <= 64 && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        if !plain || name == LOCAL {
            return Err(Exit::Usage.error(format!("{name:?}: 1 to 64 of letters, digits, '-', '_' and '.'; not {LOCAL:?}")));
        }
        if self.contexts.len() >= CONTEXTS_MAX && !self.contexts.contains_key(name) {
            return Err(Exit::Conflict.error(format!("there are {CONTEXTS_MAX} contexts already")));
        }
        let as_typed = |door: &Door| door.name.iter().map(|name| format!("{name}=")).collect::<String>() + &door.address;
        let coordinators = coordinators.iter().map(as_typed).collect();
        self.contexts.insert(name.to_owned(), Context { coordinators, certs: certs.to_owned() });
        Ok(())
    }

    fn delete(&mut self, name: &str) -> Result<()> {
        self.get(name)?;
        self.contexts.remove(name);
        if self.current.as_deref() == Some(name) {
            self.current = None;
        }
        Ok(())
    }

    fn rows(&self) -> List {
        let row = |(name, context): (&String, &Context)| Row {
            name: name.clone(),
            current: self.current.as_ref() == Some(name),
            coordinators: context.coordinators.clone(),
            certs: Some(context.certs.clone()),
        };
        let local = Row { name: LOCAL.into(), current: self.current.is_none(), coordinators: Vec::new(), certs: None };
        List { contexts: std::iter::once(local).chain(self.contexts.iter().map(row)).collect() }
    }
}

/// Runs a `millctl context` command.
///
/// # Errors
/// No such context, or the file cannot be used.
pub fn run(command: ContextCommand) -> Result<()> {
    let path = must_config_file()?;
    let mut contexts = Contexts::load(&path)?;
    match command {
        ContextCommand::List(shape) => return shape.print(&contexts.rows()),
        ContextCommand::Show(Shown { name, shape }) => {
            let name = name.or_else(|| contexts.current.clone()).unwrap_or_else(|| LOCAL.into());
            let mut list = contexts.rows();
            list.contexts.retain(|row| row.name == name);
            if list.contexts.is_empty() {
                contexts.get(&name)?;
            }
            return shape.print(&list);
        }
        ContextCommand::Use { name } => {
            contexts.current = if name == LOCAL { None } else { contexts.get(&name).map(|_| Some(name.clone()))? };
            println!("using {name}");
        }
        ContextCommand::Add { name, coordinators, certs, use_it } => {
            let certs = certs.canonicalize().with_context(|| format!("--certs {}", certs.display()))?;
            let me = Identity::load(&certs).context("--certs")?.me;
            contexts.put(&name, &coordinators, &certs)?;
            if use_it {
                contexts.current = Some(name.clone());
            }
            println!("{name} is cluster {}, as {me}", me.cluster);
        }
        ContextCommand::Delete { name } => {
            contexts.delete(&name)?;
            println!("{name} is forgotten");
        }
    }
    contexts.save(&path)
}

#[derive(Serialize, Deserialize)]
struct Row {
    name: String,
    current: bool,
    coordinators: Vec<String>,
    certs: Option<PathBuf>,
}

#[derive(Serialize, Deserialize)]
struct List {
    contexts: Vec<Row>,
}

const COLUMNS: &[Column<Row>] = &[
    column("", |row| cell(if row.current { "*" } else { "" })),
    column("NAME", |row| cell(&row.name)),
    column("COORDINATORS", |row| maybe((!row.coordinators.is_empty()).then(|| row.coordinators.join(",")))),
    column("CERTS", |row| maybe(row.certs.as_ref().map(|certs| certs.display()))),
];

impl Answer for List {
    fn page(&self) -> Page {
        Page::new().table(COLUMNS, &self.contexts)
    }

    fn names(&self) -> Vec<String> {
        self.contexts.iter().map(|row| format!("context/{}", row.name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::cluster_file::tests::sample;
    use super::*;

    #[test]
    fn a_door_has_a_port_and_perhaps_a_name() {
        let door: Door = "c-1=host.example:7000".parse().unwrap();
        assert_eq!((door.name.as_deref(), door.address.as_str()), (Some("c-1"), "host.example:7000"));
        assert_eq!("127.0.0.1:1".parse::<Door>().unwrap().name, None);
        for bad in ["", "c-1=host", "host:99999", ":1", "c-1="] {
            assert!(bad.parse::<Door>().is_err(), "{bad}");
        }
    }

    #[test]
    fn contexts_are_kept_used_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/contexts.json");
        let mut contexts = Contexts::load(&path).unwrap();
        assert_eq!(Exit::of(&contexts.get("prod").unwrap_err()), Exit::NotFound);
        contexts.put("prod", &["c-1=h:1".parse().unwrap(), "h:2".parse().unwrap()], Path::new("/certs")).unwrap();
        contexts.current = Some("prod".into());
        contexts.save(&path).unwrap();
        let mut again = Contexts::load(&path).unwrap();
        assert_eq!(again, contexts);
        assert_eq!(again.get("prod").unwrap().coordinators, ["c-1=h:1", "h:2"]);
        again.delete("prod").unwrap();
        assert_eq!(again.current, None, "what is forgotten is not in use");
        assert_eq!(Exit::of(&again.delete("prod").unwrap_err()), Exit::NotFound);
        for bad in ["", LOCAL, "a/b"] {
            assert_eq!(Exit::of(&again.put(bad, &[], Path::new("x")).unwrap_err()), Exit::Usage, "{bad:?}");
        }
        fs::write(&path, r#"{"version": 2, "current": null, "contexts": {}}"#).unwrap();
        assert!(Contexts::load(&path).unwrap_err().to_string().contains("version 2"));
    }

    #[test]
    fn a_named_folder_is_a_cluster_if_it_holds_one() {
        let dir = tempfile::tempdir().unwrap();
        let which = Which { dir: Some(dir.path().to_owned()), context: None };
        assert_eq!(Exit::of(&which.resolve().unwrap_err()), Exit::NotFound);
        sample().save(dir.path()).unwrap();
        let reach = which.resolve().unwrap();
        assert_eq!((reach.certs, reach.doors.len()), (dir.path().join("certs/admin"), 2));
        assert!(reach.doors[0].is_near() && reach.doors[0].to_string() == "coordinator-1");
    }
}
