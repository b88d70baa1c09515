//! One end of one path, as a process of its own, driven by lines.
//!
//! The receiver prints `ready ADDRESS`, and `done DIGEST_S` after each round; after the first it compares every cell with what was sent.
//! The sender prints `ready`, and for each `go` on its standard input moves the bytes of a round, until the receiver has placed them all,
//! and prints `done BYTES ELAPSED_S DIGEST_S`.

use std::io::BufRead;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use millrace_core::identity::cell_digest;
use millrace_core::ids::BlockHash;
use millrace_core::message::Role;
use millrace_kernels::KvSlab;
use millrace_node::endpoint::{Endpoint, EndpointConfig};
use millrace_node::pki::Identity;

use super::{ours, quic, tcp};

/// Bytes of each end's KV memory: more than a processor's own caches hold.
pub(super) const MEMORY_BYTES: usize = 128 << 20;

/// How bytes move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// As between nodes.
    Ours,
    /// QUIC with the settings of nodes; arriving bytes are dropped.
    Quinn,
    /// Mutual TLS 1.3 over TCP, with the same certificates and cipher.
    Tls,
    /// TCP.
    Tcp,
}

/// What both ends must know.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// How bytes move.
    pub kind: Kind,
    /// Bytes of a cell.
    pub cell_bytes: usize,
    /// Bytes of a round.
    pub bytes: usize,
    /// UDP payload of the largest datagram.
    pub datagram_max: u16,
    /// Whether cells are digested at both ends.
    pub digests: bool,
}

impl Setup {
    /// The command line of one end.
    ///
    /// # Errors
    /// The folder's name is no text.
    pub fn to_words(self, role: Role, dir: &Path, address: &str) -> Result<Vec<String>> {
        let kind = self.kind.to_possible_value().context("every kind has a name")?;
        let numbers = [self.cell_bytes, self.bytes, usize::from(self.datagram_max), usize::from(self.digests)];
        let mut words = vec![kind.get_name().to_owned()];
        words.extend(numbers.map(|number| number.to_string()));
        words.extend([role.as_str(), dir.to_str().context("a folder's name")?].map(str::to_owned));
        words.extend((!address.is_empty()).then(|| address.to_owned()));
        Ok(words)
    }

    /// Cells of each end's memory.
    #[must_use]
    pub fn cells(&self) -> usize {
        MEMORY_BYTES / self.cell_bytes
    }

    /// Cells of a round: whole turns around the memory.
    #[must_use]
    pub fn round_cells(&self) -> usize {
        self.bytes.div_ceil(self.cells() * self.cell_bytes) * self.cells()
    }
}

/// The command line of one end, as [`Setup::to_words`] writes it.
#[derive(Parser)]
#[command(no_binary_name = true)]
struct Arguments {
    kind: Kind,
    cell_bytes: usize,
    bytes: usize,
    datagram_max: u16,
    digests: u8,
    role: String,
    dir: PathBuf,
    peer: Option<SocketAddr>,
}

/// One end's memory, certificates and figures.
pub(super) struct Bench {
    pub(super) setup: Setup,
    pub(super) slab: Arc<KvSlab>,
    dir: PathBuf,
    digest_ns: AtomicU64,
}

impl Bench {
    /// The name of the block in a slot.
    fn name(slot: usize) -> BlockHash {
        BlockHash((slot as u128).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_0C5D_1234_5677).to_le_bytes())
    }

    /// A cell's digest; 0 when this run has none. The time is counted.
    pub(super) fn digest(&self, slot: usize, bytes: &[u8]) -> u64 {
        if !self.setup.digests {
            return 0;
        }
        let begin = Instant::now();
        let digest = cell_digest(&Self::name(slot), 0, bytes);
        self.digest_ns.fetch_add(begin.elapsed().as_nanos() as u64, Relaxed);
        digest
    }

    /// Slots of a round, in the order in which they go.
    pub(super) fn round(&self) -> impl Iterator<Item = usize> + use<> {
        let cells = self.setup.cells();
        (0..self.setup.round_cells()).map(move |at| at % cells)
    }

    pub(super) fn identity(&self) -> Result<Identity> {
        Ok(Identity::load(&self.dir)?)
    }

    /// An endpoint as nodes have it. Must be called on a tokio runtime.
    pub(super) fn endpoint(&self) -> Result<Endpoint> {
        let config = EndpointConfig { datagram_max: self.setup.datagram_max, ..EndpointConfig::default() };
        Ok(Endpoint::bind(([127, 0, 0, 1], 0).into(), self.identity()?, config)?)
    }

    fn digest_s(&self) -> f64 {
        self.digest_ns.swap(0, Relaxed) as f64 / 1e9
    }

    fn fill(&self) {
        for slot in 0..self.setup.cells() {
            let mut cell = self.slab.write(slot, 0);
            let words = cell.as_chunks_mut::<8>().0.iter_mut();
            words.zip(words_of(slot)).for_each(|(place, word)| *place = word);
        }
    }

    fn check(&self) -> Result<()> {
        for slot in 0..self.setup.cells() {
            let cell = self.slab.read(slot, 0);
            let same = cell.as_chunks::<8>().0.iter().zip(words_of(slot)).all(|(here, word)| *here == word);
            ensure!(same, "cell {slot} is another than was sent");
        }
        Ok(())
    }
}

/// What stands in a cell, eight bytes at a time.
fn words_of(slot: usize) -> impl Iterator<Item = [u8; 8]> {
    let next = |word: &u64| Some(word.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F));
    std::iter::successors(Some(slot as u64), next).map(u64::to_le_bytes)
}

/// What moves, or takes, the bytes of one round. Blocks.
pub(super) type RoundFn = Box<dyn FnMut() -> Result<()>>;

/// Runs the end that the words describe until its peer or its parent is gone.
///
/// # Errors
/// The path failed, or other cells arrived than were sent.
pub fn run(words: &[String]) -> Result<()> {
    let Arguments { kind, cell_bytes, bytes, datagram_max, digests, role, dir, peer } = Arguments::try_parse_from(words)?;
    let setup = Setup { kind, cell_bytes, bytes, datagram_max, digests: digests != 0 };
    let slab = KvSlab::new(cell_bytes, 1, setup.cells())?;
    let bench = Arc::new(Bench { setup, slab, dir: dir.join(role), digest_ns: AtomicU64::new(0) });
    match peer {
        Some(peer) => send(&bench, peer),
        None => receive(&bench),
    }
}

fn send(bench: &Arc<Bench>, peer: SocketAddr) -> Result<()> {
    bench.fill();
    let mut round = match bench.setup.kind {
        Kind::Ours => ours::sender(bench, peer)?,
        Kind::Quinn => quic::sender(bench, peer)?,
        Kind::Tls => tcp::tls_sender(bench, peer)?,
        Kind::Tcp => tcp::sender(bench, peer)?,
    };
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        ensure!(line? == "go", "not a word for a sender");
        let begin = Instant::now();
        round()?;
        let elapsed_s = begin.elapsed().as_secs_f64();
        let bytes = bench.setup.round_cells() * bench.setup.cell_bytes;
        println!("done {bytes} {elapsed_s} {}", bench.digest_s());
    }
    Ok(())
}

fn receive(bench: &Arc<Bench>) -> Result<()> {
    let announce = |address: SocketAddr| println!("ready {address}");
    let mut round = match bench.setup.kind {
        Kind::Ours => ours::receiver(bench, &announce)?,
        Kind::Quinn => quic::receiver(bench, &announce)?,
        Kind::Tls => tcp::tls_receiver(bench, &announce)?,
        Kind::Tcp => tcp::receiver(bench, &announce)?,
    };
    let mut compared = bench.setup.kind == Kind::Quinn;
    loop {
        round()?;
        if !compared {
            bench.check()?;
            compared = true;
        }
        println!("done {}", bench.digest_s());
    }
}
