//! Corruptions of KV on its way, against the code that a node verifies with: the digests of `millrace-core`, the sending and the receiving
//! machine, and the slab of `millrace-kernels`. Each hand-over is damaged once and must end without being decoded; undamaged ones must
//! all arrive. What stands in the slots of a hand-over that is said to be whole is compared byte by byte with what was computed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use millrace_core::identity::{Chain, Fingerprint, TenantKey, block_names, cell_digest};
use millrace_core::ids::{BlockHash, Generation, Time, TokenId};
use millrace_core::transfer::send::{self, Sender};
use millrace_core::transfer::{Grid, Span};
use millrace_kernels::slab::KvSlab;

use crate::random::Random;
use crate::reception::{Arrival, Reception};

/// A hand-over's time; nothing here takes any.
const DEADLINE: Time = Time(1_000_000);
/// The reservation that hand-overs name.
const GENERATION: Generation = Generation(7);
/// Tokens of a block.
const BLOCK_TOKENS: usize = 16;
const TENANT: TenantKey = TenantKey([1; 32]);
const FOREIGN: TenantKey = TenantKey([2; 32]);

/// How a hand-over is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Corruption {
    /// One bit of a cell.
    BitFlip,
    /// The bytes of two cells change places; their digests do not.
    Swapped,
    /// Two cells change places, digests and all.
    SwappedWithDigests,
    /// A cell is all zeroes.
    Zeroed,
    /// What the sender's slot held before this sequence got it, with the digest that it had then.
    Stale,
    /// The block of another tenant for the same tokens, with its digest.
    ForeignTenant,
    /// The block that follows the same tokens elsewhere in the sequence, with its digest.
    OtherPosition,
    /// The block at this place of another prompt, with its digest.
    OtherChain,
    /// A layer does not come, and the manifest does not count it.
    MissingLayer,
    /// A cell does not come, and the manifest counts another one in its place.
    CountedTwice,
    /// The digests of the manifest are those of other bytes.
    WrongManifest,
    /// A stream that names an older reservation brings other bytes.
    OldGeneration,
}

/// All of them.
pub const CORRUPTIONS: [Corruption; 12] = [
    Corruption::BitFlip,
    Corruption::Swapped,
    Corruption::SwappedWithDigests,
    Corruption::Zeroed,
    Corruption::Stale,
    Corruption::ForeignTenant,
    Corruption::OtherPosition,
    Corruption::OtherChain,
    Corruption::MissingLayer,
    Corruption::CountedTwice,
    Corruption::WrongManifest,
    Corruption::OldGeneration,
];

/// What became of the damaged hand-overs of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Damaged.
    pub injected: u64,
    /// Ended without being decoded; of an old reservation: without effect, and the hand-over arrived whole.
    pub found: u64,
    /// Said to be whole, with other bytes than were computed.
    pub served: u64,
}

/// What became of all.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// By kind.
    pub by_kind: BTreeMap<Corruption, Tally>,
    /// Blocks that were handed over undamaged.
    pub clean_blocks: u64,
    /// Undamaged hand-overs that did not arrive.
    pub false_alarms: u64,
}

impl Report {
    /// Whether every corruption was found, none served, and nothing undamaged refused.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.false_alarms == 0 && self.by_kind.values().all(|tally| tally.found == tally.injected && tally.served == 0)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<20} {:>9} {:>9} {:>7}", "corruption", "injected", "found", "served")?;
        let mut all = Tally::default();
        for (kind, tally) in &self.by_kind {
            writeln!(f, "{:<20} {:>9} {:>9} {:>7}", format!("{kind:?}"), tally.injected, tally.found, tally.served)?;
            all.injected += tally.injected;
            all.found += tally.found;
            all.served += tally.served;
        }
        writeln!(f, "{:<20} {:>9} {:>9} {:>7}", "all", all.injected, all.found, all.served)?;
        write!(f, "{} clean blocks, {} false alarms", self.clean_blocks, self.false_alarms)
    }
}

/// Damages `corruptions` hand-overs, and hands `clean_blocks` blocks over undamaged. One seed, one report.
#[must_use]
pub fn run(seed: u64, corruptions: u64, clean_blocks: u64) -> Report {
    let (mut random, mut report) = (Random::new(seed), Report::default());
    for i in 0..corruptions {
        let kind = CORRUPTIONS[(i % CORRUPTIONS.len() as u64) as usize];
        let mut handover = Handover::draw(&mut random);
        let arrival = handover.run(Some(kind), &mut random);
        let tally = report.by_kind.entry(kind).or_default();
        let right = handover.stands_right();
        tally.injected += 1;
        tally.served += u64::from(arrival == Arrival::Whole && !right);
        tally.found += u64::from(match kind {
            Corruption::OldGeneration => arrival == Arrival::Whole && right,
            _ => arrival == Arrival::Failed,
        });
    }
    while report.clean_blocks < clean_blocks {
        let mut handover = Handover::draw(&mut random);
        let arrival = handover.run(None, &mut random);
        report.clean_blocks += u64::from(handover.grid.blocks - handover.have_blocks);
        report.false_alarms += u64::from(arrival != Arrival::Whole || !handover.stands_right());
    }
    report
}

/// A cell on its way.
#[derive(Clone)]
struct Cell {
    layer: u16,
    block: u32,
    bytes: Vec<u8>,
    digest: u64,
}

/// One hand-over between two slabs.
struct Handover {
    grid: Grid,
    have_blocks: u32,
    tokens: Vec<TokenId>,
    names: Vec<BlockHash>,
    /// Slot of each block, at the sender and at the receiver.
    from: Vec<usize>,
    to: Vec<usize>,
    sender: Arc<KvSlab>,
    receiver: Arc<KvSlab>,
}

impl Handover {
    /// Of any small shape; at least two layers and two blocks move. Slots are shuffled and hold something else at the receiver.
    fn draw(random: &mut Random) -> Self {
        let cell_bytes = random.pick(&[96, 256, 1000]);
        let grid = Grid { layers: random.between((2, 4)) as u16, blocks: random.between((3, 8)) as u32, cell_bytes };
        let have_blocks = random.below(u64::from(grid.blocks) - 1) as u32;
        let unfinished = random.below(BLOCK_TOKENS as u64) as usize;
        let tokens = tokens(random, grid.blocks as usize * BLOCK_TOKENS - unfinished);
        let names = names(TENANT, &tokens);
        let slab = || KvSlab::new(cell_bytes as usize, grid.layers.into(), grid.blocks as usize).expect("a small slab fits");
        let (sender, receiver) = (slab(), slab());
        let (from, to) = (shuffled(random, grid.blocks), shuffled(random, grid.blocks));
        let handover = Self { grid, have_blocks, tokens, names, from, to, sender, receiver };
        for layer in 0..grid.layers {
            for block in 0..grid.blocks {
                random_bytes(random, &mut handover.sender.write(handover.from[block as usize], layer.into()));
                let mut there = handover.receiver.write(handover.to[block as usize], layer.into());
                match block < have_blocks {
                    true => there.copy_from_slice(&handover.sender.read(handover.from[block as usize], layer.into())),
                    false => random_bytes(random, &mut there),
                }
            }
        }
        handover
    }

    /// Sends everything, damaged once, and says how it ended at the receiver.
    fn run(&mut self, damage: Option<Corruption>, random: &mut Random) -> Arrival {
        let mut reception = Reception::new((self.grid, self.have_blocks, GENERATION, DEADLINE), &self.to, &self.names);
        let mut sender = Sender::new(self.grid, 0, DEADLINE);
        let credit_bytes = reception.credit_bytes();
        let (have_blocks, generation) = (self.have_blocks, GENERATION);
        sender.handle(Time(0), send::Input::Linked);
        sender.handle(Time(0), send::Input::Granted { have_blocks, generation, credit_bytes });
        let mut cells = Vec::new();
        for layer in 0..self.grid.layers {
            sender.handle(Time(1), send::Input::Ready { layer, blocks: self.grid.blocks });
            self.lend(&mut sender, &mut cells);
        }
        sender.handle(Time(2), send::Input::Computed { first_token: 1, finished: false });
        let manifest = self.lend(&mut sender, &mut cells).expect("all is computed and sent");
        let manifest = damage.map_or(manifest, |damage| self.damage(damage, &mut cells, manifest, random));
        if damage == Some(Corruption::OldGeneration) {
            let mut late = cells[random.below(cells.len() as u64) as usize].clone();
            random_bytes(random, &mut late.bytes);
            late.digest = cell_digest(&self.names[late.block as usize], late.layer, &late.bytes);
            self.arrive(&mut reception, Generation(GENERATION.0 - 1), &late);
        }
        let before_manifest = random.below(cells.len() as u64 + 1) as usize;
        for (at, cell) in cells.iter().enumerate() {
            if at == before_manifest {
                reception.manifest(GENERATION, manifest);
            }
            self.arrive(&mut reception, GENERATION, cell);
        }
        if before_manifest >= cells.len() {
            reception.manifest(GENERATION, manifest);
        }
        reception.end(DEADLINE)
    }

    /// Takes from the sending machine all that it lets go, as its streams would; the manifest, if it is that far.
    fn lend(&self, sender: &mut Sender, cells: &mut Vec<Cell>) -> Option<(u64, u64)> {
        let mut manifest = None;
        while let Some(output) = sender.poll() {
            match output {
                send::Output::Cells { span, .. } => {
                    let sent: Vec<Cell> = span.iter().map(|(layer, block)| self.cell(layer, block)).collect();
                    let digest_sum = sent.iter().fold(0u64, |sum, cell| sum.wrapping_add(cell.digest));
                    cells.extend(sent);
                    sender.handle(Time(1), send::Input::Sent { span, digest_sum });
                }
                send::Output::Open => {}
                send::Output::Fin { cells, digest_sum, .. } => manifest = Some((cells, digest_sum)),
                other => panic!("a hand-over that nobody disturbs gives {other:?}"),
            }
        }
        manifest
    }

    fn cell(&self, layer: u16, block: u32) -> Cell {
        let shared = self.sender.share(self.from[block as usize], layer.into());
        let digest = cell_digest(&self.names[block as usize], layer, shared.as_ref());
        Cell { layer, block, bytes: shared.as_ref().to_vec(), digest }
    }

    fn arrive(&self, reception: &mut Reception, generation: Generation, cell: &Cell) {
        let span = Span { layer: cell.layer, layers: 1, block: cell.block, blocks: 1 };
        reception.cell(&self.receiver, (generation, span), &cell.bytes, cell.digest);
    }

    /// Damages what is on its way, or the manifest.
    fn damage(&self, how: Corruption, cells: &mut Vec<Cell>, manifest: (u64, u64), random: &mut Random) -> (u64, u64) {
        let at = random.below(cells.len() as u64) as usize;
        let other = (at + 1 + random.below(cells.len() as u64 - 1) as usize) % cells.len();
        let sum = |cells: &[Cell]| cells.iter().fold(0u64, |sum, cell| sum.wrapping_add(cell.digest));
        let (layer, block) = (cells[at].layer, cells[at].block as usize);
        match how {
            Corruption::BitFlip => {
                let bit = random.below(cells[at].bytes.len() as u64 * 8) as usize;
                cells[at].bytes[bit / 8] ^= 1 << (bit % 8);
            }
            Corruption::Swapped | Corruption::SwappedWithDigests => {
                let (one, two) = (cells[at].clone(), cells[other].clone());
                (cells[at].bytes, cells[other].bytes) = (two.bytes, one.bytes);
                if how == Corruption::SwappedWithDigests {
                    (cells[at].digest, cells[other].digest) = (two.digest, one.digest);
                }
            }
            Corruption::Zeroed => cells[at].bytes.fill(0),
            Corruption::Stale => {
                let before = tokens(random, self.tokens.len());
                random_bytes(random, &mut cells[at].bytes);
                cells[at].digest = cell_digest(&names(TENANT, &before)[block], layer, &cells[at].bytes);
            }
            Corruption::ForeignTenant => {
                cells[at].digest = cell_digest(&names(FOREIGN, &self.tokens)[block], layer, &cells[at].bytes);
            }
            Corruption::OtherPosition => {
                let elsewhere = self.names[(block + 1) % self.names.len()];
                cells[at].digest = cell_digest(&elsewhere, layer, &cells[at].bytes);
            }
            Corruption::OtherChain => {
                let mut prompt = self.tokens.clone();
                prompt[0] ^= 1;
                cells[at].digest = cell_digest(&names(TENANT, &prompt)[block], layer, &cells[at].bytes);
            }
            Corruption::MissingLayer => {
                cells.retain(|cell| cell.layer != layer);
                return (cells.len() as u64, sum(cells));
            }
            Corruption::CountedTwice => {
                cells[at] = cells[other].clone();
                return (cells.len() as u64, sum(cells));
            }
            Corruption::WrongManifest => return (manifest.0, manifest.1.wrapping_add(1 + random.below(u64::MAX - 1))),
            Corruption::OldGeneration => return manifest,
        }
        // A sender that believes what it sends: its manifest agrees with the digests on the wire.
        (manifest.0, sum(cells))
    }

    /// Whether the receiver's slots hold what was computed.
    fn stands_right(&self) -> bool {
        let cells = (0..self.grid.layers).flat_map(|layer| (0..self.grid.blocks as usize).map(move |block| (layer, block)));
        cells.into_iter().all(|(layer, block)| {
            *self.receiver.read(self.to[block], layer.into()) == *self.sender.read(self.from[block], layer.into())
        })
    }
}

fn tokens(random: &mut Random, count: usize) -> Vec<TokenId> {
    (0..count).map(|_| random.below(50_000) as TokenId).collect()
}

fn names(key: TenantKey, tokens: &[TokenId]) -> Vec<BlockHash> {
    block_names(&Chain::new(key, &Fingerprint([7; 32]), b""), tokens, BLOCK_TOKENS)
}

fn random_bytes(random: &mut Random, bytes: &mut [u8]) {
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&random.word().to_le_bytes()[..chunk.len()]);
    }
}

fn shuffled(random: &mut Random, blocks: u32) -> Vec<usize> {
    let mut slots: Vec<usize> = (0..blocks as usize).collect();
    for at in (1..slots.len()).rev() {
        slots.swap(at, random.below(at as u64 + 1) as usize);
    }
    slots
}
