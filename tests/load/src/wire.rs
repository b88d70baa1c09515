//! The wire alone, ours beside others: the same cells from the KV memory of one process to that of another over loopback, every path in turn,
//! round after round, so that what else the machine does meets all of them. Ratios are taken within a round.
//!
//! Each end is a process of its own ([`end`]); this one starts them, says when, and reads from `/proc` what they cost. Mooncake's transfer
//! engine takes part when its Python package is there.

pub mod end;
mod ours;
mod quic;
mod tcp;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use millrace_core::message::Role;
use millrace_node::pki::Authority;

use crate::machine::cpu_s_of;
use crate::report::{Row, median};
use end::{Kind, Setup};

/// Names the Python interpreter that has Mooncake's package (`make bench PEERS=1`).
pub const PEERS_PYTHON: &str = "MILLRACE_PEERS_PYTHON";
/// Mooncake's two ends.
const MOONCAKE: &str = include_str!("wire/mooncake.py");
/// UDP payload of the largest datagram: a 9,000-byte Ethernet frame, a 1,500-byte one, and all that loopback carries.
const JUMBO: u16 = 8952;
const ETHERNET: u16 = 1452;
const LOOPBACK: u16 = 65_488;
/// A cell of a model of 8 billion parameters, and one of SmolLM2-135M, both in bf16.
const CELL_BYTES: usize = 64 << 10;
const SMALL_CELL_BYTES: usize = 12 << 10;

/// One way of moving cells: two processes that wait.
struct Pair {
    name: String,
    receiver: End,
    sender: End,
    rounds: Vec<Round>,
}

/// What one round was.
struct Round {
    gb_per_s: f64,
    cpu_s_per_gb: f64,
    /// Seconds in digests over seconds in all, of the end where that is more.
    digest_share: f64,
}

struct End {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl End {
    fn start(mut command: Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("starting an end")?;
        let stdin = child.stdin.take().context("stdin is a pipe")?;
        let stdout = BufReader::new(child.stdout.take().context("stdout is a pipe")?);
        Ok(Self { child, stdin, stdout })
    }

    /// The words of its next line after `word`.
    fn hear(&mut self, word: &str) -> Result<Vec<String>> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        let mut words = line.split_whitespace().map(str::to_owned);
        ensure!(words.next().as_deref() == Some(word), "waited for {word:?}, heard {line:?}");
        Ok(words.collect())
    }

    fn say(&mut self, word: &str) -> Result<()> {
        writeln!(self.stdin, "{word}").context("an end has died")
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Pair {
    fn start(name: &str, command: impl Fn(Role, &str) -> Result<Command>) -> Result<Self> {
        let mut receiver = End::start(command(Role::Decode, "")?)?;
        let address = receiver.hear("ready").with_context(|| name.to_owned())?.concat();
        let mut sender = End::start(command(Role::Prefill, &address)?)?;
        sender.hear("ready").with_context(|| name.to_owned())?;
        let mut pair = Self { name: name.to_owned(), receiver, sender, rounds: Vec::new() };
        pair.round()?; // memory is taken, windows grow, and the receiver compares what arrived
        pair.rounds.clear();
        Ok(pair)
    }

    fn cpu_s(&self) -> f64 {
        cpu_s_of(self.receiver.child.id()) + cpu_s_of(self.sender.child.id())
    }

    fn round(&mut self) -> Result<()> {
        let before = self.cpu_s();
        self.sender.say("go")?;
        let numbers = |words: Vec<String>| words.iter().map(|word| Ok(word.parse::<f64>()?)).collect::<Result<Vec<f64>>>();
        let sent = numbers(self.sender.hear("done").with_context(|| self.name.clone())?)?;
        self.receiver.say("done?")?; // only Mooncake's end must be asked
        let received = numbers(self.receiver.hear("done").with_context(|| self.name.clone())?)?;
        let ([bytes, elapsed_s, sender_digest_s], [receiver_digest_s]) = (sent.as_slice(), received.as_slice()) else {
            bail!("{}: other figures than expected", self.name);
        };
        let gigabytes = bytes / 1e9;
        self.rounds.push(Round {
            gb_per_s: gigabytes / elapsed_s,
            cpu_s_per_gb: (self.cpu_s() - before) / gigabytes,
            digest_share: sender_digest_s.max(*receiver_digest_s) / elapsed_s,
        });
        Ok(())
    }

    fn values(&self, figure: impl Fn(&Round) -> f64) -> Vec<f64> {
        self.rounds.iter().map(figure).collect()
    }

    fn rows(&self) -> Vec<Row> {
        vec![
            Row::new(format!("wire, {}, GB/s", self.name), self.values(|r| r.gb_per_s)),
            Row::new(format!("wire, {}, CPU s a GB, both ends", self.name), self.values(|r| r.cpu_s_per_gb)),
        ]
    }

    /// Each round's figure over that of `other` in the same round.
    fn ratio(&self, other: &Pair, what: &str, figure: impl Fn(&Round) -> f64) -> Row {
        let values = self.rounds.iter().zip(&other.rounds).map(|(own, its)| figure(own) / figure(its)).collect();
        Row::new(format!("wire, {} / {}, {what}", self.name, other.name), values)
    }
}

/// Moves `mib` MiB in each of `runs` rounds over every path.
///
/// # Errors
/// An end could not be started, a path failed, or bytes arrived that were not sent.
pub fn measure(runs: usize, mib: usize, out: &dyn Fn(Row)) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let authority = Authority::create(dir.path(), "bench")?;
    for role in [Role::Prefill, Role::Decode] {
        authority.issue(role, "x", &dir.path().join(role.as_str()))?;
    }
    let bytes = mib << 20;
    let ours = Setup { kind: Kind::Ours, cell_bytes: CELL_BYTES, bytes, datagram_max: JUMBO, digests: true };
    let mut pairs = vec![
        own(dir.path(), "ours, datagrams of 8952", ours)?,
        own(dir.path(), "TLS over TCP", Setup { kind: Kind::Tls, ..ours })?,
        own(dir.path(), "TCP", Setup { kind: Kind::Tcp, ..ours })?,
        own(dir.path(), "ours, no digests", Setup { digests: false, ..ours })?,
        own(dir.path(), "quinn alone, bytes dropped, datagrams of 8952", Setup { kind: Kind::Quinn, ..ours })?,
        own(dir.path(), "ours, cells of 12 KiB", Setup { cell_bytes: SMALL_CELL_BYTES, ..ours })?,
        own(dir.path(), "ours, datagrams of 1452", Setup { datagram_max: ETHERNET, ..ours })?,
        own(dir.path(), "ours, datagrams of 65488", Setup { datagram_max: LOOPBACK, ..ours })?,
    ];
    match std::env::var_os(PEERS_PYTHON) {
        Some(python) => pairs.push(mooncake(Path::new(&python), bytes)?),
        None => eprintln!("Mooncake is left out: `make bench PEERS=1` installs it"),
    }
    for _ in 0..runs {
        pairs.iter_mut().try_for_each(Pair::round)?;
    }
    report(&pairs, out);
    Ok(())
}

fn report(pairs: &[Pair], out: &dyn Fn(Row)) {
    pairs.iter().flat_map(Pair::rows).for_each(out);
    let [ours, tls, tcp, bare, ..] = pairs else { return };
    let others = [tls, tcp].into_iter().chain(pairs.iter().skip(4).filter(|pair| !pair.name.starts_with("ours")));
    for other in others {
        out(ours.ratio(other, "GB/s", |r| r.gb_per_s));
        out(ours.ratio(other, "CPU s a GB", |r| r.cpu_s_per_gb));
    }
    out(Row::new("wire, ours, seconds in digests of the busier end / seconds in all", ours.values(|r| r.digest_share)));
    out(ours.ratio(bare, "CPU s a GB", |r| r.cpu_s_per_gb));
    let median_of = |pair: &Pair| median(&pair.values(|r| r.cpu_s_per_gb));
    out(Row::new("wire, ours, CPU s a GB that digests add", vec![median_of(ours) - median_of(bare)]));
}

fn own(dir: &Path, name: &str, setup: Setup) -> Result<Pair> {
    let program = std::env::current_exe()?;
    Pair::start(name, |role, address| {
        let mut command = Command::new(&program);
        command.arg("--wire-end").args(setup.to_words(role, dir, address)?);
        Ok(command)
    })
}

fn mooncake(python: &Path, bytes: usize) -> Result<Pair> {
    Pair::start("Mooncake over TCP", |role, address| {
        let mut command = Command::new(python);
        let cells = end::MEMORY_BYTES / CELL_BYTES;
        command.args(["-c", MOONCAKE, role.as_str(), &CELL_BYTES.to_string(), &cells.to_string(), &bytes.to_string(), address]);
        command.stderr(Stdio::null());
        Ok(command)
    })
}
