//! A local cluster for the time of a measurement: `millctl local up`, as an operator starts it, in a folder that goes away with it.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// A cluster that runs; it ends when this is dropped, too, but nobody waits for it then.
pub struct Local {
    millctl: Child,
    url: String,
    folder: tempfile::TempDir,
}

impl Local {
    /// Starts `millctl local up` with these arguments beside its folder and its door, and waits until it serves. The `millctl` is the one beside
    /// this program.
    ///
    /// # Errors
    /// It does not serve; what it said is in the error.
    pub async fn start(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Self> {
        let bin = std::env::current_exe()?.with_file_name("millctl");
        let folder = tempfile::tempdir()?;
        let log = folder.path().join("log");
        let mut millctl = Command::new(&bin)
            .args(["local", "up", "--http", "127.0.0.1:0", "--exit-with-parent"])
            .args(arguments)
            .arg("--dir")
            .arg(folder.path().join("cluster"))
            // A cluster notes that it runs: keep that away from the user's own.
            .env("XDG_STATE_HOME", folder.path().join("state"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log)?)
            .spawn()
            .with_context(|| format!("starting {}; build it: cargo build --release", bin.display()))?;
        let stdout = millctl.stdout.take().context("stdout is a pipe")?;
        let line = BufReader::new(stdout).lines().next_line().await?;
        let Some(url) = line.as_deref().and_then(|line| line.strip_prefix("ready ")) else {
            bail!("the cluster does not serve: {}", std::fs::read_to_string(&log)?);
        };
        let url = url.to_owned();
        Ok(Self { millctl, url, folder })
    }

    /// Where it serves.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its folder, with `cluster.json`.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("cluster")
    }

    /// Stops it and waits until nothing of it is left.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub async fn stop(mut self) -> Result<()> {
        drop(self.millctl.stdin.take());
        self.millctl.wait().await?;
        Ok(())
    }
}
