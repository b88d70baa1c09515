//! `millctl certs`: a cluster's authority in a folder, and each process's certificate in a folder of its own below it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Subcommand, ValueEnum};
use millrace_core::message::Role;
use millrace_node::pki::{Authority, Identity};

use super::exit::Exit;
use super::table;

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
    /// List the certificates under DIR, each checked as a peer would
    #[command(after_help = "Example:\n  millctl certs show --dir certs")]
    Show {
        /// Folder of the authority, or of one certificate
        #[arg(long)]
        dir: PathBuf,
    },
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
pub fn run(command: &Certs) -> Result<()> {
    match command {
        Certs::Init { dir, cluster } => {
            if dir.join("ca.key").exists() {
                return Err(Exit::Conflict.error(format!("{} holds an authority already", dir.display())));
            }
            Authority::create(dir, cluster)?;
            println!("authority of cluster {cluster} in {}", dir.display());
        }
        Certs::Issue { dir, role, name } => {
            let leaf = issue(&Authority::load(dir)?, dir, (*role).into(), name)?;
            println!("certificate of {} {name} in {}", Role::from(*role).as_str(), leaf.display());
        }
        Certs::Show { dir } => return show(dir),
    }
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

fn show(dir: &Path) -> Result<()> {
    let mut folders = vec![dir.to_owned()];
    let entries = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    folders.extend(entries.filter_map(|entry| entry.ok()).map(|entry| entry.path()).filter(|path| path.is_dir()));
    folders.sort();
    let mut rows = Vec::new();
    let mut bad = 0;
    for folder in folders.iter().filter(|folder| folder.join("cert.pem").exists()) {
        let path = folder.display().to_string();
        match Identity::load(folder) {
            Ok(identity) => {
                rows.push(vec![identity.me.name, identity.me.role.as_str().into(), identity.me.cluster, "valid".into(), path])
            }
            Err(error) => {
                bad += 1;
                rows.push(vec!["-".into(), "-".into(), "-".into(), error.to_string(), path]);
            }
        }
    }
    if let Ok(authority) = Authority::load(dir) {
        rows.insert(0, vec!["-".into(), "authority".into(), authority.cluster().into(), "valid".into(), dir.display().to_string()]);
    }
    if rows.is_empty() {
        return Err(Exit::NotFound.error(format!("{}: no certificates", dir.display())));
    }
    let columns: &[table::Column<Vec<String>>] = &[
        table::column("NAME", |row| table::cell(&row[0])),
        table::column("ROLE", |row| table::cell(&row[1])),
        table::column("CLUSTER", |row| table::cell(&row[2])),
        table::column("STATE", |row| table::cell(&row[3])),
        table::column("FOLDER", |row| table::cell(&row[4])),
    ];
    print!("{}", table::Page::new().table(columns, &rows).render(false, false));
    if bad > 0 { Err(Exit::Degraded.error(format!("{bad} certificates are not valid"))) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_issues_and_shows_and_is_not_replaced() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("ca");
        assert!(show(scratch.path()).is_err_and(|e| Exit::of(&e) == Exit::NotFound));
        let init = || run(&Certs::Init { dir: dir.clone(), cluster: "x".into() });
        init().unwrap();
        assert_eq!(Exit::of(&init().unwrap_err()), Exit::Conflict);
        run(&Certs::Issue { dir: dir.clone(), role: RoleWord::Admin, name: "op".into() }).unwrap();
        let me = Identity::load(&dir.join("op")).unwrap().me;
        assert_eq!((me.role, me.name.as_str(), me.cluster.as_str()), (Role::Admin, "op", "x"));
        show(&dir).unwrap();
        std::fs::write(dir.join("op/cert.pem"), "nonsense").unwrap();
        assert_eq!(Exit::of(&show(&dir).unwrap_err()), Exit::Degraded);
    }
}
