//! Cuts in one direction, in a network namespace of our own: a routing rule drops every UDP packet from, or to, one port. Other
//! processes of the machine are not touched, and clients, who come over TCP, still reach the replica that its peers do not.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Set for the run inside.
const MARK: &str = "MILLRACE_NETWORK_NAMESPACE";
/// The rule that drops comes before the one that finds local addresses.
const CUT_PREFERENCE: &str = "10";

/// Which packets of a replica are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Those that it sends.
    From,
    /// Those that are sent to it.
    To,
}

/// Whether this process runs in a namespace of its own.
#[must_use]
pub fn inside() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Runs this very command line again in a namespace; `None` when none can be had, else whether it went well.
///
/// # Errors
/// The program cannot be started.
pub fn run_inside(arguments: &[&str]) -> Result<Option<bool>> {
    let setup = "ip link set lo up && ip rule add pref 100 lookup local && ip rule del pref 0";
    let namespace = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["-rn", "sh", "-c", script]);
        command
    };
    let possible = namespace(setup).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !possible.is_ok_and(|status| status.success()) {
        return Ok(None);
    }
    let program = std::env::current_exe()?;
    let mut command = namespace(&format!("{setup} && exec \"$0\" \"$@\""));
    let status = command.arg(program).args(arguments).env(MARK, "1").status().context("starting in a network namespace")?;
    Ok(Some(status.success()))
}

/// Drops every UDP packet of one direction at `port`.
///
/// # Errors
/// The rule was refused.
pub fn cut(direction: Direction, port: u16) -> Result<()> {
    let end = match direction {
        Direction::From => "sport",
        Direction::To => "dport",
    };
    rule(&["add", "pref", CUT_PREFERENCE, "ipproto", "udp", end, &port.to_string(), "blackhole"])
}

/// Undoes the cut.
///
/// # Errors
/// There is none.
pub fn heal() -> Result<()> {
    rule(&["del", "pref", CUT_PREFERENCE])
}

fn rule(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").arg("rule").args(arguments).status().context("running ip")?;
    ensure!(status.success(), "ip rule {} failed", arguments.join(" "));
    Ok(())
}
