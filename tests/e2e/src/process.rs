//! Processes: where the binaries are, how one is run to its end, and signals.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

/// How a program that ran to its end went.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Ended {
    /// Panics unless it failed and named all of `words` in its complaint.
    pub fn assert_refused(&self, words: &[&str]) {
        assert!(self.code.is_some_and(|code| code != 0), "it should refuse to start: {self:?}");
        let last = self.stderr.lines().last().unwrap_or_default();
        for word in words {
            assert!(last.contains(word), "the reason should name {word:?}: {}", self.stderr);
        }
    }
}

/// A binary of the workspace, beside this program or the folder of the test executables.
///
/// # Panics
/// When it was not built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let program = std::env::current_exe().expect("a program has a file");
    let folder = program.parent().expect("a file is in a folder");
    let folder = if folder.ends_with("deps") { folder.parent().expect("`deps` is in a folder") } else { folder };
    let path = folder.join(name);
    assert!(path.exists(), "{} is not there; build the workspace first: cargo build --release --workspace", path.display());
    path
}

/// Runs a binary of the workspace to its end. It is killed when that takes longer than `wait_max`.
///
/// # Panics
/// When it does not end.
pub async fn run(name: &str, args: &[&str], wait_max: Duration) -> Ended {
    run_as(&[], name, args, wait_max).await
}

/// [`run`] with environment variables.
///
/// # Panics
/// When it does not end.
pub async fn run_as(env: &[(String, String)], name: &str, args: &[&str], wait_max: Duration) -> Ended {
    let mut command = tokio::process::Command::new(binary(name));
    command.envs(env.iter().map(|(name, value)| (name, value)));
    let child = command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn();
    let ended = child.unwrap_or_else(|e| panic!("{name}: {e}")).wait_with_output();
    let output = tokio::time::timeout(wait_max, ended).await;
    let output = output.unwrap_or_else(|_| panic!("{name} {args:?} did not end within {} s", wait_max.as_secs()));
    let output = output.unwrap_or_else(|e| panic!("{name}: {e}"));
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ended { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Sends a signal (`KILL`, `STOP`, `CONT`, `TERM`); whether there was a process to take it. The shell's own `kill`: the program
/// of that name is a package of its own, which a fresh machine need not have.
#[must_use]
pub fn signal(name: &str, pid: u32) -> bool {
    let mut kill = Command::new("sh");
    let kill = kill.args(["-c", r#"kill -s "$0" "$1""#, name]).arg(pid.to_string());
    let status = kill.stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Whether a process lives. A process that ended and was not waited for does not.
#[must_use]
pub fn lives(pid: u32) -> bool {
    state(pid).is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// The state of a process as `/proc` has it: `T` for one that was stopped; `None` when there is no such process.
#[must_use]
pub fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}
