//! `millctl certs`: a cluster's authority in a folder, and each process's certificate in a folder of its own below it.
//!
//! Running processes look at their files every few seconds and use new certificates for new connections; `rotate --wait` sees that
//! they do by shaking hands with each ([`rotate`]).

mod rotate;

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use millrace_core::message::Role;
use millrace_node::pki::{Authority, Identity, Leaf};
use serde::{Deserialize, Serialize};

use super::dates::{days_left, rfc3339};
use super::exit::Exit;
use super::output::{Answer, Shape, Wait};
use super::table::{Column, Page, Tone, cell, column, maybe, wide};

/// Days before its end at which a certificate should be renewed.
pub const RENEW_DAYS: i64 = 30;

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Certs {
    /// Make a new authority
    #[command(after_help = "Example:\n  millctl certs init --dir certs --cluster prod")]
    Init {
        /// Folder of the authority; created if absent
        #[arg(long)]
        dir: PathBuf,
        /// The cluster's name
        #[arg(long, default_value = "millrace")]
        cluster: String,
    },
    /// Issue, or renew, the certificate of one process, in DIR/NAME
    #[command(after_help = "Example:\n  millctl certs issue --dir certs --role decode --name decode-1")]
    Issue {
        /// Folder of the authority
        #[arg(long)]
        dir: PathBuf,
        /// What the process is
        #[arg(long)]
        role: RoleWord,
        /// Its name, unique in the cluster; a coordinator's ends in "-" and its number
        #[arg(long)]
        name: String,
    },
    /// List the certificates under DIR, each checked as a peer would, and until when they last
    #[command(after_help = "Example:\n  millctl certs show --dir certs -o wide")]
    Show(ShowArgs),
    /// Issue new certificates to the processes that have one under DIR; running processes take them without a restart
    #[command(after_help = "Example:\n  millctl certs rotate --dir certs --wait --context prod")]
    Rotate(RotateArgs),
}

/// What to show.
#[derive(Args, Clone, Debug)]
pub struct ShowArgs {
    /// Folder of the authority, or of one certificate
    #[arg(long)]
    dir: PathBuf,
    #[command(flatten)]
    shape: Shape,
}

/// What to renew.
#[derive(Args, Clone, Debug)]
pub struct RotateArgs {
    /// Whose; everybody's if absent
    names: Vec<String>,
    /// Folder of the authority
    #[arg(long)]
    dir: PathBuf,
    /// Only those that end within so many days
    #[arg(long, value_name = "DAYS")]
    within: Option<i64>,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// The cluster whose processes --wait asks; if absent the local one whose certificates these are
    #[arg(long)]
    context: Option<String>,
    #[command(flatten)]
    wait: Wait,
    #[command(flatten)]
    shape: Shape,
}

/// A role on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum RoleWord {
    /// A replica of the coordinator.
    Coordinator,
    /// A prefill node.
    Prefill,
    /// A decode node.
    Decode,
    /// An operator.
    Admin,
}

impl From<RoleWord> for Role {
    fn from(word: RoleWord) -> Self {
        match word {
            RoleWord::Coordinator => Self::Coordinator,
            RoleWord::Prefill => Self::Prefill,
            RoleWord::Decode => Self::Decode,
            RoleWord::Admin => Self::Admin,
        }
    }
}

/// Runs one.
///
/// # Errors
/// What could not be made, read or believed.
pub async fn run(command: Certs) -> Result<()> {
    match command {
        Certs::Init { dir, cluster } => init(&dir, &cluster),
        Certs::Issue { dir, role, name } => {
            let leaf = issue(&Authority::load(&dir)?, &dir, role.into(), &name)?;
            println!("certificate of {} {name} in {}", Role::from(role).as_str(), leaf.display());
            Ok(())
        }
        Certs::Show(ShowArgs { dir, shape }) => show(&dir, shape),
        Certs::Rotate(args) => rotate::run(&args).await,
    }
}

fn init(dir: &Path, cluster: &str) -> Result<()> {
    if dir.join("ca.key").exists() {
        return Err(Exit::Conflict.error(format!("{} holds an authority already", dir.display())));
    }
    Authority::create(dir, cluster)?;
    println!("authority of cluster {cluster} in {}", dir.display());
    Ok(())
}

/// Issues the certificate of a process into its folder below the authority's; gives the folder.
///
/// # Errors
/// When the name is not one, or a file cannot be written.
pub fn issue(authority: &Authority, dir: &Path, role: Role, name: &str) -> Result<PathBuf> {
    let leaf = dir.join(name);
    authority.issue(role, name, &leaf)?;
    Ok(leaf)
}

/// The folders with a certificate: `dir` itself and those below it, by name.
fn folders(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    let below = entries.filter_map(|entry| entry.ok()).map(|entry| entry.path()).filter(|path| path.is_dir());
    let mut folders: Vec<PathBuf> = std::iter::once(dir.to_owned()).chain(below).collect();
    folders.retain(|folder| folder.join("cert.pem").exists());
    folders.sort();
    Ok(folders)
}

/// A certificate in a folder.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
struct Certificate {
    name: Option<String>,
    role: String,
    cluster: Option<String>,
    /// `valid`, or what is wrong with it.
    state: String,
    valid_until: Option<String>,
    days_left: Option<i64>,
    serial: Option<String>,
    folder: PathBuf,
}

#[derive(Serialize, Deserialize, Debug, Default)]
struct Shown {
    certificates: Vec<Certificate>,
}

const COLUMNS: &[Column<Certificate>] = &[
    column("NAME", |c| maybe(c.name.as_ref())),
    column("ROLE", |c| cell(&c.role)),
    column("CLUSTER", |c| maybe(c.cluster.as_ref())),
    column("VALID UNTIL", |c| maybe(c.valid_until.as_ref())),
    column("DAYS", |c| {
        let soon = c.days_left.is_some_and(|days| days < RENEW_DAYS);
        maybe(c.days_left).tone(if soon { Tone::Warn } else { Tone::Plain })
    }),
    column("STATE", |c| cell(&c.state).tone(if c.state == "valid" { Tone::Good } else { Tone::Bad })),
    wide("SERIAL", |c| maybe(c.serial.as_ref())),
    column("FOLDER", |c| cell(c.folder.display())),
];

impl Answer for Shown {
    fn page(&self) -> Page {
        Page::new().table(COLUMNS, &self.certificates)
    }

    fn names(&self) -> Vec<String> {
        self.certificates.iter().filter_map(|c| Some(format!("certificate/{}", c.name.as_ref()?))).collect()
    }
}

impl Certificate {
    fn until(self, leaf: &Leaf) -> Self {
        let days_left = Some(days_left(leaf.valid_until, SystemTime::now()));
        Self { valid_until: Some(rfc3339(leaf.valid_until)), days_left, serial: Some(leaf.serial.clone()), ..self }
    }

    /// The certificate in a folder, checked as a peer would.
    fn load(folder: &Path) -> Self {
        let state = Identity::load(folder).err().map_or_else(|| "valid".into(), |error| error.to_string());
        let blank = Self { role: "-".into(), state, folder: folder.to_owned(), ..Self::default() };
        match Leaf::load(folder) {
            Ok((who, leaf)) => {
                Self { name: Some(who.name), role: who.role.as_str().into(), cluster: Some(who.cluster), ..blank }.until(&leaf)
            }
            Err(_) => blank,
        }
    }
}

fn show(dir: &Path, shape: Shape) -> Result<()> {
    let mut certificates: Vec<Certificate> = folders(dir)?.iter().map(|folder| Certificate::load(folder)).collect();
    if let Ok(authority) = Authority::load(dir) {
        let (role, cluster) = ("authority".into(), Some(authority.cluster().to_owned()));
        let blank = Certificate { role, cluster, state: "valid".into(), folder: dir.to_owned(), ..Certificate::default() };
        certificates.insert(0, blank.until(&authority.leaf()?));
    }
    if certificates.is_empty() {
        return Err(Exit::NotFound.error(format!("{}: no certificates", dir.display())));
    }
    let bad = certificates.iter().filter(|c| c.state != "valid").count();
    shape.print(&Shown { certificates })?;
    if bad > 0 {
        return Err(Exit::Degraded.hinted(format!("{bad} certificates are not valid"), "`millctl certs rotate` issues new ones"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_authority_issues_and_shows_and_is_not_replaced() {
        let scratch = tempfile::tempdir().unwrap();
        let (dir, shape) = (scratch.path().join("ca"), Shape::default());
        assert!(show(scratch.path(), shape).is_err_and(|e| Exit::of(&e) == Exit::NotFound));
        init(&dir, "x").unwrap();
        assert_eq!(Exit::of(&init(&dir, "x").unwrap_err()), Exit::Conflict);
        run(Certs::Issue { dir: dir.clone(), role: RoleWord::Admin, name: "op".into() }).await.unwrap();
        let me = Identity::load(&dir.join("op")).unwrap().me;
        assert_eq!((me.role, me.name.as_str(), me.cluster.as_str()), (Role::Admin, "op", "x"));
        show(&dir, shape).unwrap();
        let op = Certificate::load(&dir.join("op"));
        // A certificate's life is in whole seconds, so the year may have lost part of one.
        assert!(matches!(op.days_left, Some(364 | 365)) && op.state == "valid", "{op:?}");
        std::fs::write(dir.join("op/cert.pem"), "nonsense").unwrap();
        assert_eq!(Exit::of(&show(&dir, shape).unwrap_err()), Exit::Degraded);
    }
}
