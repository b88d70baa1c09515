//! `cluster.json`: what a local cluster writes down about itself, for its next start and for operators.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::exit::Exit;

/// The file's name in a cluster's folder.
pub const FILE: &str = "cluster.json";
/// The version of its shape; another is refused.
pub const VERSION: u32 = 1;

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterFile {
    /// [`VERSION`].
    pub version: u32,
    /// The cluster's name.
    pub cluster: String,
    /// The model served.
    pub model: PathBuf,
    /// Where the OpenAI API is served for clients, `HOST:PORT`; `None` when the cluster does not run.
    pub http: Option<SocketAddr>,
    /// Folder of the authority; each process's certificate is in a folder of its name.
    pub certs: PathBuf,
    /// Folder of the operator's certificate.
    pub admin_certs: PathBuf,
    /// The process that runs the cluster; `None` when it does not run.
    pub pid: Option<u32>,
    /// The replicas, by number.
    pub coordinators: Vec<CoordinatorEntry>,
    /// The nodes.
    pub nodes: Vec<NodeEntry>,
}

/// A replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoordinatorEntry {
    /// Its number.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Where its QUIC endpoint listens; the same over restarts.
    pub quic: SocketAddr,
    /// Where its own gateway listens; `None` while it does not serve.
    pub http: Option<SocketAddr>,
    /// Its process; `None` while there is none.
    pub pid: Option<u32>,
    /// It was taken in later: the first voters do not know of it.
    #[serde(default)]
    pub joined: bool,
    /// It was taken out, and is not started again.
    #[serde(default)]
    pub removed: bool,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeEntry {
    /// Its name.
    pub name: String,
    /// `prefill` or `decode`.
    pub kind: String,
    /// Its process; `None` while there is none.
    pub pid: Option<u32>,
}

impl ClusterFile {
    /// Reads the file of a cluster's folder.
    ///
    /// # Errors
    /// [`Exit::NotFound`] when there is none; what is wrong with it.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        if !path.exists() {
            return Err(Exit::NotFound.error(format!("{}: no cluster here ({FILE} is missing)", dir.display())));
        }
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let file: Self = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        ensure!(file.version == VERSION, "{}: version {}, this millctl knows {VERSION}", path.display(), file.version);
        Ok(file)
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// What the system says.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let (path, draft) = (dir.join(FILE), dir.join("cluster.json.new"));
        let text = serde_json::to_string_pretty(self).context("writing JSON")? + "\n";
        fs::write(&draft, text).and_then(|()| fs::rename(&draft, &path)).with_context(|| path.display().to_string())
    }

    /// The processes that may still run.
    pub fn pids(&self) -> impl Iterator<Item = u32> {
        let coordinators = self.coordinators.iter().filter_map(|c| c.pid);
        coordinators.chain(self.nodes.iter().filter_map(|n| n.pid))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::ctl) fn sample() -> ClusterFile {
        let coordinator = |id: u64, pid| CoordinatorEntry {
            id,
            name: format!("coordinator-{id}"),
            quic: SocketAddr::from(([127, 0, 0, 1], 7000 + id as u16)),
            http: None,
            pid,
            joined: false,
            removed: false,
        };
        ClusterFile {
            version: VERSION,
            cluster: "x".into(),
            model: "m.gguf".into(),
            http: Some(SocketAddr::from(([127, 0, 0, 1], 8080))),
            certs: "certs".into(),
            admin_certs: "certs/admin".into(),
            pid: Some(1),
            coordinators: vec![coordinator(1, Some(2)), coordinator(2, None)],
            nodes: vec![NodeEntry { name: "prefill-1".into(), kind: "prefill".into(), pid: Some(3) }],
        }
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let file = sample();
        file.save(dir.path()).unwrap();
        assert_eq!(ClusterFile::load(dir.path()).unwrap(), file);
        assert_eq!(file.pids().collect::<Vec<_>>(), [2, 3]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no draft is left");
    }

    #[test]
    fn a_missing_broken_or_newer_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Exit::of(&ClusterFile::load(dir.path()).unwrap_err()), Exit::NotFound);
        ClusterFile { version: 2, ..sample() }.save(dir.path()).unwrap();
        assert!(ClusterFile::load(dir.path()).unwrap_err().to_string().contains("version 2"));
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert_eq!(Exit::of(&ClusterFile::load(dir.path()).unwrap_err()), Exit::Failed);
    }
}
