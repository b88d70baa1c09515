//! The frame decoder believes nothing: whatever the bytes, an error or a message, never a panic, never memory for what has not come.
#![allow(clippy::unwrap_used, reason = "a test may stop at what it did not expect")]

mod common;

use bytes::Bytes;
use millrace_core::identity::TenantKey;
use millrace_core::ids::{AttemptId, BlockHash, Epoch, Generation, NodeId, ReplicaId, RequestId};
use millrace_core::message::*;
use millrace_core::sampling::{Sampling, mix};
use millrace_node::frame::{Assembler, FRAME_MAX, FrameError, FrameKind, PREAMBLE_BYTES, encode, encode_cells_header};

fn attempt() -> AttemptId {
    AttemptId { request: RequestId(0x1234), attempt: 1 }
}

fn ticket(tokens: usize) -> Ticket {
    let sampling = Sampling { temperature: 0.7, top_p: 0.9, top_k: 0, seed: 3, max_new: 64, eos: vec![2, 3], ignore_eos: false };
    let decode = Peer { node: NodeId(2), epoch: Epoch(5), name: "d1".into(), address: "127.0.0.1:4000".into() };
    Ticket {
        attempt: attempt(),
        gateway: ReplicaId(1),
        decode: Some(decode),
        tokens: (0..tokens as u32).collect(),
        prompt_tokens: tokens as u32,
        sampling,
        tenant_key: TenantKey([9; 32]),
        cache_salt: b"salt".to_vec(),
        budget_us: 1_000_000,
        trace: [4; 25],
    }
}

/// One of each shape that archives differently.
fn messages() -> Vec<Message> {
    let hello = Hello {
        cluster: "demo".into(),
        name: "a rather long name, not kept inline".into(),
        instance: 1 << 100,
        node: NodeId(1),
        epoch: Epoch(2),
        model: Some(common::model()),
    };
    let ops = vec![BlockOp::Stored(BlockHash([1; 16])), BlockOp::Evicted(BlockHash([2; 16]))];
    vec![
        Message::Hello(hello),
        Message::Refuse("model: layers differs".into()),
        Message::Raft(vec![7; 300]),
        Message::Forwarded { id: 4, result: Err("no leader".into()) },
        Message::Delta(Delta { node: NodeId(1), epoch: Epoch(2), base_seq: 3, seq: 5, ops }),
        Message::Assign(ticket(100)),
        Message::Token(TokenOut {
            attempt: attempt(),
            index: 1,
            token: 2,
            logprob: -0.5,
            prefill: Some(PrefillStats { node: "p1".into(), ..Default::default() }),
            finish: Some(Finish::Stop),
        }),
        Message::Cancel(attempt()),
        Message::Answer { id: 1, result: Ok("{}".into()) },
    ]
}

fn decode(bytes: &[u8]) -> Result<Option<Message>, FrameError> {
    let (mut assembler, mut input) = (Assembler::new(FrameKind::Message), Bytes::copy_from_slice(bytes));
    if assembler.feed(&mut input)? { assembler.take_message().map(Some) } else { Ok(None) }
}

#[test]
fn every_message_comes_back_from_pieces_of_any_size() {
    let expected = messages();
    let wire: Vec<u8> = expected.iter().flat_map(|m| encode(m).unwrap()).collect();
    for size in [1, 2, 15, 16, 17, 100, 1 << 20] {
        let mut assembler = Assembler::new(FrameKind::Message);
        let mut got = Vec::new();
        for piece in wire.chunks(size) {
            let mut piece = Bytes::copy_from_slice(piece);
            loop {
                if assembler.feed(&mut piece).unwrap() {
                    got.push(assembler.take_message().unwrap());
                } else if piece.is_empty() {
                    break;
                }
            }
        }
        assert_eq!(got, expected, "pieces of {size}");
        assert!(!assembler.is_partial());
    }
}

#[test]
fn bad_preambles_have_names() {
    let good = encode(&Message::Cancel(attempt())).unwrap().to_vec();
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        decode(&bytes).unwrap_err()
    };
    assert!(matches!(with(0, b'X'), FrameError::BadMagic(_)));
    assert!(matches!(with(4, 9), FrameError::Version { got: 9, want: 1 }));
    assert!(matches!(with(5, 2), FrameError::Kind { got: 2, want: FrameKind::Message }));
    assert!(matches!(with(6, 1), FrameError::Reserved));
    assert!(matches!(with(15, 1), FrameError::Reserved));
    assert!(matches!(with(11, 0xff), FrameError::TooLong { max: FRAME_MAX, .. }));
    assert!(matches!(with(8, 0), FrameError::Archive(_)));
    assert!(decode(&good).unwrap().is_some());
}

#[test]
fn what_breaks_the_protocols_bounds_is_neither_sent_nor_taken() {
    assert!(matches!(encode(&Message::Raft(vec![0; FRAME_MAX + 1])), Err(FrameError::TooLong { .. })));
    let too_many = Message::Assign(ticket(TOKENS_MAX + 1));
    assert!(matches!(encode(&too_many), Err(FrameError::Bound { field: "tokens", .. })));
    assert!(encode(&Message::Assign(ticket(TOKENS_MAX))).is_ok());
    let archive = rkyv::to_bytes::<rkyv::rancor::Error>(&too_many).unwrap();
    let mut frame = encode(&Message::Cancel(attempt())).unwrap()[..PREAMBLE_BYTES].to_vec();
    frame[8..12].copy_from_slice(&(archive.len() as u32).to_le_bytes());
    frame.extend_from_slice(&archive);
    assert!(matches!(decode(&frame), Err(FrameError::Bound { field: "tokens", .. })));
}

#[test]
fn a_claimed_length_takes_no_memory() {
    let mut frame = encode(&Message::Raft(vec![1; 1000])).unwrap().to_vec();
    frame[8..12].copy_from_slice(&(FRAME_MAX as u32).to_le_bytes());
    let mut assembler = Assembler::new(FrameKind::Message);
    assert!(!assembler.feed(&mut Bytes::from(frame)).unwrap());
    assert!(assembler.capacity() < 8192, "{} bytes for 1,000", assembler.capacity());
}

#[test]
fn hostile_frames_never_panic() {
    let digests = (0..12).collect();
    let header = CellsHeader { attempt: attempt(), generation: Generation(1), layer: 0, layers: 3, block: 0, blocks: 4, digests };
    let seeds: Vec<Vec<u8>> = messages().iter().map(|m| encode(m).unwrap().to_vec()).collect();
    let cells = encode_cells_header(&header).unwrap().to_vec();
    let (mut refused, mut taken) = (0, 0);
    for seed in 0..10_000u64 {
        let mut state = mix(seed);
        let mut draw = |below: usize| {
            state = mix(state.wrapping_add(0x9e37_79b9_7f4a_7c15));
            (state % below as u64) as usize
        };
        let of_cells = draw(5) == 0;
        let mut bytes = if of_cells { cells.clone() } else { seeds[draw(seeds.len())].clone() };
        // Mostly behind the preamble, where the archive's own checks are all there is.
        let from = if draw(8) == 0 { 0 } else { PREAMBLE_BYTES };
        for _ in 0..=draw(6) {
            let at = from + draw(bytes.len() - from);
            bytes[at] = if draw(2) == 0 { draw(256) as u8 } else { bytes[at] ^ (1 << draw(8)) };
        }
        if draw(6) == 0 {
            let len = draw(bytes.len() - PREAMBLE_BYTES);
            bytes.truncate(PREAMBLE_BYTES + len);
            bytes[8..12].copy_from_slice(&(len as u32).to_le_bytes());
        }
        let kind = if of_cells { FrameKind::Cells } else { FrameKind::Message };
        let (mut assembler, arrived) = (Assembler::new(kind), bytes.len());
        let outcome = assembler.feed(&mut Bytes::from(bytes)).and_then(|whole| match kind {
            _ if !whole => Ok(()),
            FrameKind::Message => assembler.take_message().map(drop),
            FrameKind::Cells => assembler.take_cells_header().map(drop),
        });
        assert!(assembler.capacity() <= 2 * arrived + 4096);
        *(if outcome.is_ok() { &mut taken } else { &mut refused }) += 1;
    }
    // Both must occur, or the mutations do not reach what they are for.
    assert!(refused > 1000 && taken > 1000, "refused {refused}, taken {taken}");
}
