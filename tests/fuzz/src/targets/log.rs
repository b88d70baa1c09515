//! The replicated log: frames between replicas, and its two files, which a replica reads when it starts.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::{Duration, Instant};

use millrace_log::disk::{Disk, DiskFile};
use millrace_log::testing::simdisk::SimDisk;
use millrace_log::{LogLimits, RaftConfig, RaftFailure, RaftStartError, RestoreError, Role, StateMachine, Stepped, Stop};
use tokio::runtime::Runtime;

use super::{Parser, Target, mutate};
use crate::mutate::Random;

pub(super) const FRAME: Target = Target {
    name: "raft",
    what: "frames of raft and of shipments, from any replica",
    examples: frames,
    spoil: archived,
    open: hear,
    // A cluster of its own is made anew now and then, with disks in memory that forget nothing.
    memory_max: |len| (512 << 20) + 64 * len,
    caught: &[],
    short_runs: 1_200,
};

pub(super) const SEGMENT: Target = Target {
    name: "segment",
    what: "a segment of the log, at start",
    examples: || vec![kept().segment.clone()],
    spoil: segment,
    open: || {
        let (segment, snapshot) = files();
        Box::new(move |bytes| start(&[(segment.as_path(), bytes), (snapshot.as_path(), kept().snapshot.as_slice())]))
    },
    memory_max: |len| (48 << 20) + 64 * len,
    caught: &[],
    short_runs: 500,
};

pub(super) const STATE: Target = Target {
    name: "log-snapshot",
    what: "the snapshot beside the log, at start",
    examples: || vec![kept().snapshot.clone()],
    spoil: snapshot,
    open: || {
        let (segment, snapshot) = files();
        Box::new(move |bytes| start(&[(segment.as_path(), kept().segment.as_slice()), (snapshot.as_path(), bytes)]))
    },
    memory_max: |len| (48 << 20) + 64 * len,
    caught: &[],
    short_runs: 500,
};

/// Where the log is, on a disk in memory.
const DIR: &str = "/log";
/// Inputs that one replica hears before another takes its place: after that many lies it may know nothing but lies.
const HEARD_MAX: u32 = 300;
/// Steps of a cluster from which examples are taken.
const STEPS: u64 = 400;

/// A state that is the list of its commands, as a digest.
#[derive(Default)]
struct Sum(Vec<u8>);

impl StateMachine for Sum {
    type State = Vec<u8>;

    fn apply(&mut self, index: u64, command: &[u8]) -> Vec<u8> {
        self.0 = [&index.to_le_bytes()[..], &crc32fast::hash(command).to_le_bytes()].concat();
        self.0.clone()
    }

    fn view(&self) -> Vec<u8> {
        self.0.clone()
    }

    fn encode(state: &Vec<u8>) -> Vec<u8> {
        state.clone()
    }

    fn decode(bytes: &[u8]) -> Result<Vec<u8>, RestoreError> {
        if bytes.len() <= 12 { Ok(bytes.to_vec()) } else { Err(RestoreError("too long".into())) }
    }

    fn install(&mut self, state: Vec<u8>) {
        self.0 = state;
    }
}

/// Replicas of one log: a third comes too late for what the others have compacted.
struct Trio {
    now: Instant,
    replicas: Vec<Option<Stepped<Sum>>>,
    disks: Vec<SimDisk>,
    /// Frames that were sent, with the sender.
    sent: Vec<(u64, Vec<u8>)>,
}

fn config(id: u64) -> RaftConfig {
    let log = LogLimits { entries_max: 20, bytes_max: 1 << 20, entries_kept: 2 };
    RaftConfig { log, reserve_bytes: 0, ..RaftConfig::new(id, vec![1, 2, 3], DIR.into(), "fuzz") }
}

fn open(disk: &SimDisk, id: u64, now: Instant) -> Result<Stepped<Sum>, RaftStartError> {
    Stepped::open(Arc::new(disk.clone()), config(id), Sum::default(), now, 5)
}

impl Trio {
    fn new() -> Self {
        let (now, disks) = (Instant::now(), [(); 3].map(|()| SimDisk::default()).to_vec());
        let replicas = (0..3).map(|at| Some(open(&disks[at], at as u64 + 1, now).expect("an empty disk"))).collect();
        Self { now, replicas, disks, sent: Vec::new() }
    }

    /// Lets time pass and frames arrive. `deaf` hears nothing.
    fn step(&mut self, deaf: Option<u64>) {
        self.now += Duration::from_millis(20);
        for at in 0..self.replicas.len() {
            let Some(replica) = &mut self.replicas[at] else { continue };
            replica.step(self.now).expect("an honest replica goes on");
            let from = at as u64 + 1;
            while let Some((to, frame)) = self.replicas[at].as_mut().and_then(Stepped::next_frame) {
                let peer = self.replicas.get(to as usize - 1).and_then(Option::as_ref);
                if let Some(peer) = peer.filter(|_| Some(to) != deaf && Some(from) != deaf) {
                    peer.handle().step(from, &frame);
                }
                self.sent.push((from, frame));
            }
        }
    }

    fn leader(&self) -> Option<&Stepped<Sum>> {
        self.replicas.iter().flatten().find(|replica| replica.handle().status().role == Role::Leader)
    }

    /// Hands a command to whoever leads; what becomes of it is nobody's business.
    fn propose(&self, runtime: &Runtime, command: Vec<u8>) {
        let Some(leader) = self.leader() else { return };
        let mut asked = pin!(leader.handle().propose(command));
        // It is taken up when it is first polled; the answer does not come before the next step.
        runtime.block_on(std::future::poll_fn(|context| {
            let _ = asked.as_mut().poll(context);
            Poll::Ready(())
        }));
    }
}

/// A cluster that has done something of everything: an election, entries, a snapshot that was sent.
fn busy() -> Trio {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let mut trio = Trio::new();
    for step in 0..STEPS {
        let deaf = (60..260).contains(&step).then_some(3);
        trio.step(deaf);
        if step % 3 == 0 {
            trio.propose(&runtime, vec![step as u8; 30]);
        }
    }
    trio
}

/// The sender goes before the frame, as one byte.
fn frames() -> Vec<Vec<u8>> {
    let sent = busy().sent;
    // The same kinds again and again: one of each length is enough.
    let mut by_length = std::collections::BTreeMap::new();
    for (from, frame) in sent.into_iter().filter(|(from, _)| *from != 1) {
        by_length.entry((frame.first_chunk::<8>().copied(), frame.len())).or_insert((from, frame));
    }
    by_length.into_values().map(|(from, frame)| [&[from as u8][..], &frame].concat()).collect()
}

/// Spoils what is behind the sender and the preamble, mostly.
fn archived(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if random.once_in(8) {
        return mutate::bytes(bytes, other, random);
    }
    let mut archive = bytes.split_off(9.min(bytes.len()));
    mutate::bytes(&mut archive, other.get(9..).unwrap_or_default(), random);
    bytes.append(&mut archive);
}

fn hear() -> Parser {
    let (mut trio, mut heard) = (busy(), 0);
    Box::new(move |bytes| {
        if heard == HEARD_MAX {
            (trio, heard) = (busy(), 0);
        }
        heard += 1;
        let Some((from, frame)) = bytes.split_first() else { return Ok(false) };
        trio.now += Duration::from_millis(20);
        let now = trio.now;
        let Some(replica) = &mut trio.replicas[0] else { return Ok(false) };
        let refused = replica.handle().status().frames_refused;
        replica.handle().step(u64::from(*from) % 4, frame);
        for _ in 0..2 {
            match replica.step(now) {
                Ok(()) => {}
                // A liar that leads may take it out, within the rules.
                Err(Stop::Failed(RaftFailure::Removed(_))) => {
                    heard = HEARD_MAX;
                    return Ok(true);
                }
                Err(stop) => return Err(format!("the replica ends: {stop:?}")),
            }
        }
        while replica.next_frame().is_some() {}
        Ok(replica.handle().status().frames_refused == refused)
    })
}

/// A segment and a snapshot that belong together.
struct Files {
    segment_name: String,
    segment: Vec<u8>,
    snapshot: Vec<u8>,
}

fn kept() -> &'static Files {
    static FILES: OnceLock<Files> = OnceLock::new();
    FILES.get_or_init(|| {
        let disk = busy().disks.swap_remove(0);
        let segment_name = disk.names().into_iter().find(|name| name.starts_with("wal-")).expect("there is a segment");
        let read = |name: &str| {
            let file = disk.open(&Path::new(DIR).join(name)).expect("a file that is listed");
            let mut bytes = vec![0; file.size().expect("a file") as usize];
            file.read_at(&mut bytes, 0).expect("a file");
            bytes
        };
        let mut segment = read(&segment_name);
        // Zeros are written ahead; two pages of them say as much.
        let used = segment.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1);
        segment.truncate((used + 8192).min(segment.len()));
        Files { segment, snapshot: read("snapshot.bin"), segment_name }
    })
}

/// Paths of the two files.
fn files() -> (PathBuf, PathBuf) {
    (Path::new(DIR).join(&kept().segment_name), Path::new(DIR).join("snapshot.bin"))
}

/// Starts a replica on these files and lets it run for a moment.
fn start(files: &[(&Path, &[u8])]) -> Result<bool, String> {
    let disk = SimDisk::default();
    for (path, bytes) in files {
        let file: Box<dyn DiskFile> = disk.create(path).map_err(|error| error.to_string())?;
        file.write_at(bytes, 0).map_err(|error| error.to_string())?;
    }
    disk.sync_dir(Path::new(DIR)).map_err(|error| error.to_string())?;
    let now = Instant::now();
    let Ok(mut replica) = open(&disk, 1, now) else { return Ok(false) };
    for step in 1..40 {
        match replica.step(now + Duration::from_millis(20 * step)) {
            Ok(()) => {}
            Err(Stop::Failed(RaftFailure::Removed(_))) => return Ok(true),
            Err(stop) => return Err(format!("the replica ends: {stop:?}")),
        }
        while replica.next_frame().is_some() {}
    }
    Ok(true)
}

/// Bytes of a segment's header before its body: magic, version, length of the body.
const LEAD_BYTES: usize = 13;
/// Where the salt is in that body.
const SALT_AT: usize = 8;

/// The end of a file's head, if it says where that is: lead, body, checksum.
fn head_end(bytes: &[u8]) -> Option<usize> {
    let length: [u8; 4] = bytes.get(9..LEAD_BYTES)?.try_into().ok()?;
    let end = LEAD_BYTES + u32::from_le_bytes(length) as usize + 4;
    (end <= bytes.len()).then_some(end)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn seal(bytes: &mut [u8], at: usize, checksum: u32) {
    bytes[at..at + 4].copy_from_slice(&checksum.to_le_bytes());
}

fn seal_head(bytes: &mut [u8], end: usize) {
    let checksum = crc32fast::hash(&bytes[..end - 4]);
    seal(bytes, end - 4, checksum);
}

/// Spoils a record or the header, mostly, and makes the checksums right, so that what is behind them is reached.
fn segment(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let end = head_end(bytes).filter(|_| !random.once_in(8));
    let records = end.and_then(|end| records(bytes, end)).filter(|records| !records.is_empty());
    let (Some(end), Some(records)) = (end, records) else { return mutate::bytes(bytes, other, random) };
    if random.once_in(6) {
        let mut body = bytes[LEAD_BYTES..end - 4].to_vec();
        mutate::bytes(&mut body, &other[LEAD_BYTES..], random);
        body.resize(end - 4 - LEAD_BYTES, 0);
        // Another salt would only make all records strangers.
        body[SALT_AT..SALT_AT + 8].copy_from_slice(&bytes[LEAD_BYTES + SALT_AT..LEAD_BYTES + SALT_AT + 8]);
        bytes[LEAD_BYTES..end - 4].copy_from_slice(&body);
        return seal_head(bytes, end);
    }
    let salt = bytes[LEAD_BYTES + SALT_AT..LEAD_BYTES + SALT_AT + 8].to_vec();
    let mut bodies: Vec<Vec<u8>> = records.iter().map(|(at, len)| bytes[at + 12..at + 12 + len].to_vec()).collect();
    let (one, another) = (random.below(bodies.len()), random.below(bodies.len()));
    let donor = bodies[another].clone();
    mutate::bytes(&mut bodies[one], &donor, random);
    bytes.truncate(end);
    for body in bodies.iter().filter(|body| !body.is_empty()) {
        let (offset, len, crc) = (bytes.len() as u64, body.len() as u32, crc32fast::hash(body));
        let fields = [&salt[..], &offset.to_le_bytes(), &len.to_le_bytes(), &crc.to_le_bytes()].concat();
        bytes.extend([len, crc, crc32fast::hash(&fields)].into_iter().flat_map(u32::to_le_bytes));
        bytes.extend_from_slice(body);
    }
    bytes.resize(bytes.len() + 64, 0);
}

/// Offset and length of the body of each record.
fn records(bytes: &[u8], mut at: usize) -> Option<Vec<(usize, usize)>> {
    let mut all = Vec::new();
    while let Some(len) = word(bytes, at).map(|len| len as usize).filter(|len| *len > 0 && at + 12 + len <= bytes.len()) {
        all.push((at, len));
        at += 12 + len;
    }
    Some(all)
}

/// Spoils the head or the data, mostly, and makes both checksums right.
fn snapshot(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let Some(end) = head_end(bytes).filter(|_| !random.once_in(8)) else { return mutate::bytes(bytes, other, random) };
    let mut data = bytes.split_off(end);
    data.truncate(data.len().saturating_sub(4));
    let mut body = bytes[LEAD_BYTES..end - 4].to_vec();
    if random.once_in(4) {
        mutate::bytes(&mut data, other, random)
    } else {
        mutate::bytes(&mut body, &other[LEAD_BYTES..], random)
    }
    bytes.truncate(9);
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&body);
    bytes.extend_from_slice(&[0; 4]);
    let end = bytes.len();
    seal_head(bytes, end);
    bytes.extend_from_slice(&data);
    bytes.extend_from_slice(&crc32fast::hash(&data).to_le_bytes());
}
