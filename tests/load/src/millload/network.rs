//! Cuts a process of a local cluster off from its peers: routing rules drop every UDP packet from, or to, the ports it has. Clients come
//! over TCP and still reach it. And slows loopback down to the speed of a network. Both belong to a network namespace, so this is only done in
//! one made for the run ([`RECIPE`]).

use std::collections::BTreeSet;
use std::fs;
use std::process::{Output, Stdio};

use anyhow::{Context, Result, bail, ensure};
use tokio::process::Command;

/// How to come into a namespace where cuts are possible.
pub const RECIPE: &str =
    "unshare -rn sh -c 'ip link set lo up; ip rule add pref 100 lookup local; ip rule del pref 0; exec \"$@\"' - COMMAND";
/// Set for a run that [`run_inside`] started.
const MARK: &str = "MILLRACE_NETWORK_NAMESPACE";
/// The rules that drop come before the one that finds local addresses.
const CUT_PREFERENCE: &str = "10";

/// Which packets of a process are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Those that it sends.
    Mute,
    /// Those that are sent to it.
    Deafen,
    /// All.
    Partition,
}

impl Cut {
    const fn ends(self) -> &'static [&'static str] {
        match self {
            Self::Mute => &["sport"],
            Self::Deafen => &["dport"],
            Self::Partition => &["sport", "dport"],
        }
    }
}

/// Whether this process was started by [`run_inside`].
#[must_use]
pub fn inside() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Runs this very program in a namespace of its own; `None` when none can be had, else whether it went well.
///
/// # Errors
/// The program cannot be started.
pub fn run_inside(arguments: &[String]) -> Result<Option<bool>> {
    let setup = "ip link set lo up && ip rule add pref 100 lookup local && ip rule del pref 0";
    let namespace = |script: &str| {
        let mut command = std::process::Command::new("unshare");
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

/// Drops packets of process `pid`.
///
/// # Errors
/// This is not the process's namespace or not one where rules may be made; the process has no UDP port.
pub async fn cut(pid: u64, how: Cut) -> Result<()> {
    let ours = fs::read_link("/proc/self/ns/net")?;
    let theirs = fs::read_link(format!("/proc/{pid}/ns/net")).with_context(|| format!("no process {pid}"))?;
    ensure!(ours == theirs, "the process lives in another network namespace");
    let rules = ip(&["rule", "list"]).await?;
    let rules = String::from_utf8_lossy(&rules.stdout);
    ensure!(!rules.lines().any(|rule| rule.starts_with("0:")), "cuts need a network namespace of the cluster's own: {RECIPE}");
    let ports = udp_ports(pid)?;
    ensure!(!ports.is_empty(), "process {pid} has no UDP port");
    for port in ports {
        for end in how.ends() {
            ip(&["rule", "add", "pref", CUT_PREFERENCE, "ipproto", "udp", end, &port.to_string(), "blackhole"]).await?;
        }
    }
    Ok(())
}

/// Undoes all cuts of this namespace.
///
/// # Errors
/// There was none.
pub async fn heal() -> Result<()> {
    ip(&["rule", "del", "pref", CUT_PREFERENCE]).await.context("nothing is cut")?;
    // One rule goes at a time.
    while ip(&["rule", "del", "pref", CUT_PREFERENCE]).await.is_ok() {}
    Ok(())
}

/// Slows the namespace's loopback down to `gbit` Gb/s, all that goes over it in both directions taken together. At most 20 ms wait in it.
///
/// # Errors
/// This is not a namespace of [`run_inside`], or the kernel has no token bucket.
pub async fn shape(gbit: u32) -> Result<()> {
    ensure!(inside(), "links are slowed down only in a network namespace of one's own: {RECIPE}");
    let rate = format!("{gbit}gbit");
    let bucket = ["qdisc", "replace", "dev", "lo", "root", "tbf", "rate", &rate, "burst", "256kb", "latency", "20ms"];
    run("tc", &bucket).await.map(drop)
}

async fn ip(arguments: &[&str]) -> Result<Output> {
    run("ip", arguments).await
}

async fn run(program: &str, arguments: &[&str]) -> Result<Output> {
    let output =
        Command::new(program).args(arguments).kill_on_drop(true).output().await.with_context(|| format!("running {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output)
}

/// The UDP ports that a process has bound.
fn udp_ports(pid: u64) -> Result<BTreeSet<u16>> {
    let sockets: BTreeSet<String> = fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let tables = ["udp", "udp6"].map(|table| fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default());
    Ok(tables.iter().flat_map(|table| bound(table, &sockets)).collect())
}

/// The ports of a `/proc/net/udp` table whose sockets are among `sockets`.
fn bound(table: &str, sockets: &BTreeSet<String>) -> Vec<u16> {
    let port = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        sockets.contains(*fields.get(9)?).then_some(())?;
        u16::from_str_radix(fields.get(1)?.rsplit_once(':')?.1, 16).ok()
    };
    table.lines().skip(1).filter_map(port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ports_of_a_process_are_found() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        assert!(udp_ports(u64::from(std::process::id())).unwrap().contains(&port));
        drop(socket);
        assert!(!udp_ports(u64::from(std::process::id())).unwrap().contains(&port));
    }

    #[test]
    fn nothing_is_cut_where_other_programs_would_feel_it() {
        let _socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let rules = std::process::Command::new("ip").args(["rule", "list"]).output();
        if rules.is_ok_and(|rules| String::from_utf8_lossy(&rules.stdout).lines().any(|rule| rule.starts_with("0:"))) {
            let refused = runtime.block_on(cut(u64::from(std::process::id()), Cut::Partition)).unwrap_err();
            assert!(refused.to_string().contains("unshare"), "{refused}");
        }
        assert!(runtime.block_on(cut(u64::MAX, Cut::Mute)).is_err(), "there is no such process");
    }
}
