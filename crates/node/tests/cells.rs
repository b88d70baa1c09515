//! KV streams over loopback: every byte at its place, and no half taken for a whole.
#![allow(clippy::unwrap_used, reason = "a test may stop at what it did not expect")]

mod common;

use bytes::Bytes;
use common::{Nodes, noise};
use millrace_core::identity::cell_digest;
use millrace_core::ids::{AttemptId, BlockHash, Generation};
use millrace_core::message::{CellsHeader, STREAM_CELLS_MAX};
use millrace_node::cells::{CellsError, CellsReader, send_cells};
use millrace_node::frame::encode_cells_header;

const CELL_BYTES: usize = 16 << 10;

fn header(layer: u16, layers: u16, block: u32, blocks: u32) -> CellsHeader {
    let digests = (0..u64::from(layers) * u64::from(blocks)).collect();
    CellsHeader { attempt: AttemptId::default(), generation: Generation(3), layer, layers, block, blocks, digests }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_mebibytes_arrive_byte_equal() {
    let nodes = Nodes::new().await;
    let (lane, receiver) = (nodes.lane(), &nodes.receiver);
    let (streams, layers, blocks) = (4u16, 8u16, 128u32);
    let slab: Bytes = noise(1, usize::from(streams * layers) * blocks as usize * CELL_BYTES).into();
    assert_eq!(slab.len(), 64 << 20);
    let name = |block: u32| BlockHash([block as u8; 16]);
    let cell = |slab: &Bytes, layer: u16, block: u32| {
        let at = (usize::from(layer) * blocks as usize + block as usize) * CELL_BYTES;
        slab.slice(at..at + CELL_BYTES)
    };
    let send = async {
        for stream in 0..streams {
            let mut header = header(stream * layers, layers, 0, blocks);
            let places = || (0..layers).flat_map(|l| (0..blocks).map(move |b| (stream * layers + l, b)));
            header.digests = places().map(|(l, b)| cell_digest(&name(b), l, &cell(&slab, l, b))).collect();
            let payload = places().map(|(l, b)| cell(&slab, l, b));
            assert_eq!(send_cells(&lane, &header, payload, 0).await.unwrap(), 16 << 20);
        }
    };
    let receive = async {
        let mut received = vec![0; slab.len()];
        for _ in 0..streams {
            let mut reader = CellsReader::open(receiver.accept_cells().await.unwrap().stream, CELL_BYTES).await.unwrap();
            while let Some(cell) = reader.next_cell().await.unwrap() {
                let at = (usize::from(cell.layer) * blocks as usize + cell.block as usize) * CELL_BYTES;
                let place = &mut received[at..at + CELL_BYTES];
                cell.copy_to(place);
                assert_eq!(cell_digest(&name(cell.block), cell.layer, place), cell.digest);
            }
        }
        received
    };
    let ((), received) = tokio::join!(send, receive);
    assert!(received == slab, "bytes differ");
    // Were super-packets too large for the kernel, most would be lost and only repeats would get through.
    let path = lane.stats().path;
    assert!(path.lost_packets * 4 < path.sent_packets, "lost {} of {} packets", path.lost_packets, path.sent_packets);
}

#[tokio::test]
async fn headers_that_make_no_sense_are_neither_sent_nor_taken() {
    let nodes = Nodes::new().await;
    let (lane, receiver) = (nodes.lane(), &nodes.receiver);
    let too_many = header(0, 2, 0, STREAM_CELLS_MAX as u32 / 2 + 1);
    let mut short = header(0, 2, 0, 2);
    short.digests.pop();
    for bad in [header(0, 0, 0, 4), header(0, 1, 0, 0), header(u16::MAX, 1, 0, 1), header(0, 1, u32::MAX, 1), short, too_many] {
        let unsent = send_cells(&lane, &bad, std::iter::empty(), 0).await.unwrap_err();
        let mut stream = lane.open_uni().await.unwrap();
        // The largest header still fits its frame, so it is the numbers that are refused.
        stream.write_chunk(encode_cells_header(&bad).unwrap()).await.unwrap();
        let untaken = CellsReader::open(receiver.accept_cells().await.unwrap().stream, CELL_BYTES).await.err().unwrap();
        for error in [unsent, untaken] {
            assert!(matches!(error, CellsError::Shape { .. } | CellsError::Digests { .. }), "{error}");
        }
    }
}

#[tokio::test]
async fn a_stream_that_is_given_up_is_not_a_whole_one() {
    let nodes = Nodes::new().await;
    let (lane, receiver) = (nodes.lane(), &nodes.receiver);
    let header = header(0, 1, 0, 200);
    let cells = std::iter::repeat_n(Bytes::from(vec![1; CELL_BYTES]), 150);
    let error = send_cells(&lane, &header, cells, 0).await.unwrap_err();
    assert!(matches!(error, CellsError::Count { got: 150, want: 200 }));
    let stream = receiver.accept_cells().await.unwrap().stream;
    let outcome = async {
        let mut reader = CellsReader::open(stream, CELL_BYTES).await?;
        while reader.next_cell().await?.is_some() {}
        Ok(())
    };
    let error: CellsError = outcome.await.unwrap_err();
    assert!(error.to_string().contains("reset"), "{error}");
}

#[tokio::test]
async fn early_ends_and_extra_bytes_are_errors() {
    let nodes = Nodes::new().await;
    let (lane, receiver) = (nodes.lane(), &nodes.receiver);
    for extra in [-1isize, 0, 1] {
        let mut stream = lane.open_uni().await.unwrap();
        stream.write_chunk(encode_cells_header(&header(0, 1, 5, 2)).unwrap()).await.unwrap();
        stream.write_all(&vec![7; (2 * CELL_BYTES).strict_add_signed(extra)]).await.unwrap();
        stream.finish().unwrap();
        let mut reader = CellsReader::open(receiver.accept_cells().await.unwrap().stream, CELL_BYTES).await.unwrap();
        assert_eq!(reader.next_cell().await.unwrap().unwrap().block, 5);
        let second = reader.next_cell().await.map(|cell| cell.is_some());
        match extra {
            -1 => assert!(matches!(second, Err(CellsError::Count { got: 1, want: 2 }))),
            0 => assert!(second.unwrap() && reader.next_cell().await.unwrap().is_none()),
            _ => assert!(second.unwrap() && matches!(reader.next_cell().await, Err(CellsError::Trailing))),
        }
    }
}

#[tokio::test]
async fn a_receiver_that_gives_up_stops_the_sender() {
    let nodes = Nodes::new().await;
    let (lane, receiver) = (nodes.lane(), &nodes.receiver);
    let header = header(0, 64, 0, 128);
    let cells = std::iter::repeat_n(Bytes::from(vec![1; CELL_BYTES]), 64 * 128);
    let give_up = async { drop(CellsReader::open(receiver.accept_cells().await.unwrap().stream, CELL_BYTES).await.unwrap()) };
    let (sent, ()) = tokio::join!(send_cells(&lane, &header, cells, 0), give_up);
    assert!(matches!(sent, Err(CellsError::Write(quinn::WriteError::Stopped(_)))));
}
