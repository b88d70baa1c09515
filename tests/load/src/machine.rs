//! Where figures were taken, and what this process costs: from `/proc` and git.

use std::process::Command;

/// Ticks of a second in `/proc/PID/stat`: `USER_HZ`, 100 on every Linux of today.
const TICKS_PER_S: f64 = 100.0;
/// Bytes of a page in `/proc/self/statm`.
const PAGE_BYTES: f64 = 4096.0;

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Lines that say what the figures are of: command, commit, processor, load.
#[must_use]
pub fn describe() -> String {
    let git = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]).output();
    let commit = git.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned()).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("unknown", |(_, name)| name);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let command: Vec<_> = std::env::args().skip(1).collect();
    let load = read("/proc/loadavg").split(' ').take(2).collect::<Vec<_>>().join(", ");
    format!(
        "command `make bench BENCH_ARGS=\"{}\"`, commit {commit}, {model}, {cores} cores, load average at the start {load}",
        command.join(" ")
    )
}

/// Seconds of processor time that this process has used.
#[must_use]
pub fn cpu_s() -> f64 {
    cpu_s_of(std::process::id())
}

/// Seconds of processor time that a process has used; 0 when it is gone.
#[must_use]
pub fn cpu_s_of(pid: u32) -> f64 {
    let stat = read(&format!("/proc/{pid}/stat"));
    let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks: f64 = after_name.split(' ').skip(11).take(2).filter_map(|n| n.parse::<f64>().ok()).sum();
    ticks / TICKS_PER_S
}

/// Bytes of memory that this process has in use.
#[must_use]
pub fn resident_bytes() -> f64 {
    read("/proc/self/statm").split(' ').nth(1).and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0) * PAGE_BYTES
}
