//! Cuts a process of a local cluster off from its peers: routing rules drop every UDP packet from, or to, the ports it has. Clients come
//! over TCP and still reach it. The rules belong to a network namespace, so this is only done in one made for the run ([`RECIPE`]).

use std::collections::BTreeSet;
use std::fs;
use std::process::Output;

use anyhow::{Context, Result, bail, ensure};
use tokio::process::Command;

/// How to come into a namespace where cuts are possible.
pub const RECIPE: &str =
    "unshare -rn sh -c 'ip link set lo up; ip rule add pref 100 lookup local; ip rule del pref 0; exec \"$@\"' - COMMAND";
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

async fn ip(arguments: &[&str]) -> Result<Output> {
    let output = Command::new("ip").args(arguments).kill_on_drop(true).output().await.context("running ip")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
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
