//! What comes from another process of the cluster, with a valid certificate: frames, headers of KV streams, the certificate itself, and how
//! busy a node says it is.

use bytes::Bytes;
use millrace_core::ids;
use millrace_core::ids::{AttemptId, BlockHash, Epoch, Generation, NodeId, Slot, SlotRef};
use millrace_core::message::{CellsHeader, Load, Role};
use millrace_core::route::correct::Correction;
use millrace_core::route::{Ask, CostModel, NodeView, Slo, View, cost, place};
use millrace_core::transfer::gate::{Gate, Place};
use millrace_core::transfer::recv::{Input, Receiver};
use millrace_core::transfer::{Grid, Span};
use millrace_node::frame::{Assembler, FrameKind, PREAMBLE_BYTES, encode, encode_cells_header};
use millrace_node::pki::{Authority, Leaf, PeerIdentity};

use super::{Target, mutate, times};
use crate::mutate::Random;
use crate::samples;

pub(super) const MESSAGE: Target = Target {
    name: "message",
    what: "a frame on a link, from any peer",
    examples: || samples::messages().iter().map(|message| encode(message).expect("a valid message").to_vec()).collect(),
    spoil: frame,
    open: || Box::new(message),
    // A list of short texts is 8 bytes each in the archive, and an allocation each in memory.
    memory_max: times::<12>,
    caught: &[],
    short_runs: 60_000,
};

pub(super) const CELLS: Target = Target {
    name: "cells",
    what: "the header of a KV stream, and what its cells do to a hand-over, from a prefill node",
    examples: || [(0, 3, 0, 4), (1, 1, 2, 2), (2, 1, 0, 1)].map(cells_header).to_vec(),
    spoil: frame,
    open: || Box::new(cells),
    memory_max: times::<6>,
    caught: &[],
    short_runs: 60_000,
};

pub(super) const CERTIFICATE: Target = Target {
    name: "certificate",
    what: "a certificate, from any peer (before it is believed, in part)",
    examples: certificates,
    spoil: mutate::bytes,
    open: || Box::new(certificate),
    memory_max: times::<64>,
    caught: &[],
    short_runs: 60_000,
};

pub(super) const LOAD: Target = Target {
    name: "load",
    what: "how busy nodes say they are, and where prompts go then",
    examples: || [[0; LOADS_BYTES], [1; LOADS_BYTES], [0xff; LOADS_BYTES]].map(|bytes| bytes.to_vec()).to_vec(),
    spoil: mutate::bytes,
    open: || Box::new(loads),
    memory_max: times::<64>,
    caught: &[],
    short_runs: 40_000,
};

/// Spoils what is behind the preamble, mostly, and makes the preamble say how long it is.
pub(super) fn frame(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if random.once_in(8) {
        return mutate::bytes(bytes, other, random);
    }
    let mut archive = bytes.split_off(PREAMBLE_BYTES.min(bytes.len()));
    mutate::bytes(&mut archive, other.get(PREAMBLE_BYTES..).unwrap_or_default(), random);
    if let Some(length) = bytes.get_mut(8..12) {
        length.copy_from_slice(&(archive.len() as u32).to_le_bytes());
    }
    bytes.append(&mut archive);
}

/// Gives a frame to an assembler in two pieces; whether it is whole.
fn assemble(kind: FrameKind, bytes: &[u8]) -> Option<Assembler> {
    let (one, two) = bytes.split_at(bytes.len() / 3);
    let mut assembler = Assembler::new(kind);
    let whole = assembler.feed(&mut Bytes::copy_from_slice(one)).ok()?;
    (whole || assembler.feed(&mut Bytes::copy_from_slice(two)).ok()?).then_some(assembler)
}

fn message(bytes: &[u8]) -> Result<bool, String> {
    let taken = assemble(FrameKind::Message, bytes).and_then(|mut assembler| assembler.take_message().ok());
    let Some(message) = taken else { return Ok(false) };
    for role in [Role::Coordinator, Role::Prefill, Role::Decode, Role::Admin] {
        let _ = message.may_send(role);
    }
    // Compared as bytes: a number that is none differs from itself.
    let frame = encode(&message).map_err(|error| format!("a message that was taken cannot be sent: {error}"))?;
    let again = assemble(FrameKind::Message, &frame).and_then(|mut assembler| assembler.take_message().ok());
    let again = again.ok_or("a message that was sent is not taken")?;
    super::same("a message", &encode(&again).ok(), &Some(frame))?;
    Ok(true)
}

fn cells_header((layer, layers, block, blocks): (u16, u16, u32, u32)) -> Vec<u8> {
    let digests = (0..u64::from(layers) * u64::from(blocks)).collect();
    let attempt = AttemptId { request: ids::RequestId(3), attempt: 0 };
    let header = CellsHeader { attempt, generation: Generation(1), layer, layers, block, blocks, digests };
    encode_cells_header(&header).expect("a valid header").to_vec()
}

fn cells(bytes: &[u8]) -> Result<bool, String> {
    let taken = assemble(FrameKind::Cells, bytes).and_then(|mut assembler| assembler.take_cells_header().ok());
    let Some(header) = taken else { return Ok(false) };
    let frame = encode_cells_header(&header).map_err(|error| error.to_string())?;
    let again = assemble(FrameKind::Cells, &frame).and_then(|mut assembler| assembler.take_cells_header().ok());
    super::same("a header", &again.as_ref(), &Some(&header))?;
    let grid = Grid { layers: 3, blocks: 5, cell_bytes: 64 };
    let slots = (0..grid.blocks).map(|slot| SlotRef { slot: Slot(slot), generation: Generation(1) }).collect();
    let names = (0..grid.blocks).map(|block| BlockHash([block as u8; 16])).collect();
    let mut gate = Gate::new(grid, 1, Generation(1), slots, names);
    let mut receiver = Receiver::new(grid, 1, Generation(1), ids::Time(1000));
    let CellsHeader { generation, layer, layers, block, blocks, .. } = header;
    let span = Span { layer, layers, block, blocks };
    if gate.admit(generation, &span) {
        for ((layer, block), digest) in span.iter().zip(header.digests) {
            if let Place::Write(..) = gate.place(generation, layer, block) {
                gate.placed(layer, block, digest, digest);
            }
        }
    }
    if let Place::Write(..) = gate.place(generation, layer, block) {
        gate.placed(layer, block, 1, u64::from(layers));
    }
    gate.check();
    receiver.handle(ids::Time(1), Input::Standing(gate.standing().clone()));
    let cells = u64::from(layers) * u64::from(blocks);
    receiver.handle(ids::Time(3), Input::Fin { generation, cells, digest_sum: 0, first_token: 1, finished: false });
    while receiver.poll().is_some() {}
    receiver.check();
    Ok(true)
}

fn certificates() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let authority = Authority::create(&dir.path().join("ca"), "fuzz").expect("an authority");
    let roles = [Role::Coordinator, Role::Prefill, Role::Decode, Role::Admin];
    let der = |role: Role| {
        let to = dir.path().join(role.as_str());
        authority.issue(role, "some-name", &to).expect("a certificate");
        let pem = std::fs::read_to_string(to.join("cert.pem")).expect("a certificate");
        from_base64(&pem.lines().filter(|line| !line.starts_with('-')).collect::<String>())
    };
    roles.map(der).to_vec()
}

/// Base64 without its checks: the text is our own.
fn from_base64(text: &str) -> Vec<u8> {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut out, mut bits, mut held) = (Vec::new(), 0u32, 0);
    for value in text.bytes().filter_map(|byte| LETTERS.iter().position(|letter| *letter == byte)) {
        (bits, held) = (bits << 6 | value as u32, held + 6);
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    out
}

fn certificate(bytes: &[u8]) -> Result<bool, String> {
    let leaf = Leaf::of(bytes);
    let peer = PeerIdentity::from_certificate(bytes);
    if let Ok(peer) = &peer {
        let named = peer.to_string();
        if !named.contains(&peer.name) {
            return Err(format!("{named:?} does not name {:?}", peer.name));
        }
    }
    Ok(leaf.is_ok() && peer.is_ok())
}

/// Nodes of a view.
const NODES: usize = 4;
/// Words of one node, of eight bytes.
const NODE_WORDS: usize = 12;
/// Bytes of all nodes and of what is asked.
const LOADS_BYTES: usize = 8 * (NODES * NODE_WORDS + 6);

fn loads(bytes: &[u8]) -> Result<bool, String> {
    let mut words = bytes.chunks(8).map(|chunk| chunk.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte)));
    let mut word = || words.next().unwrap_or(0);
    let nodes: Vec<NodeView> = (1..=NODES as u16).map(|number| node(number, [(); NODE_WORDS].map(|()| word()))).collect();
    let (tokens, max_new, layers) = (word() as u32, word() as u32, word() as u16);
    let slo = Some(Slo { ttft_us: word(), tpot_us: word() }).filter(|slo| slo.ttft_us % 3 != 0);
    let (block_tokens, block_bytes, exclude, seed) = (16, word(), [NodeId(1)], tokens.into());
    let ask = Ask { tokens, max_new, block_tokens, block_bytes, layers, seed, exclude: &exclude, slo, hot: None, copying: &[] };
    let view = View { nodes: &nodes, costs: CostModel::default() };
    let placed = place(&view, &ask);
    if let Ok(decision) = &placed {
        let again = cost(&view, &ask, decision.prefill, decision.decode).ok_or("a plan with a node that there is not")?;
        if !decision.exclusion_ignored {
            super::same("the cost of a plan", &again, &decision.cost)?;
        }
    }
    Ok(placed.is_ok())
}

fn node(number: u16, words: [u64; NODE_WORDS]) -> NodeView {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = words;
    let load = Load {
        queued_tokens: a,
        running: b as u32,
        waiting: (b >> 32) as u32,
        free_blocks: c as u32,
        evictable_blocks: (c >> 32) as u32,
        pinned_blocks: d as u32,
        total_blocks: (d >> 32) as u32,
        prefill_ns_per_token: e,
        decode_step_us: f,
        send_bytes_per_s: g,
        queued_pairs: h,
        prefill_ps_per_pair: i,
        stale_frames: 0,
        resumes: 0,
    };
    NodeView {
        node: NodeId(number),
        role: if number.is_multiple_of(2) { Role::Decode } else { Role::Prefill },
        usable: true,
        epoch: Epoch(1),
        load,
        prefix_blocks: j as u32,
        inflight_tokens: k,
        inflight_pairs: l,
        inflight_sequences: (j >> 32) as u32,
        correction: Correction::default(),
    }
}
