//! What the index promises: prefixes against a plain walk, deltas once and in order, the bound, clones as points in time, hostile bytes.

use super::*;
use crate::ids::Epoch;
use crate::message::BlockOp;
use alloc::vec;

fn block(i: u32) -> BlockHash {
    let mut name = [0; 16];
    name[..4].copy_from_slice(&i.to_le_bytes());
    name[8..12].copy_from_slice(&i.wrapping_mul(0x9e37_79b1).to_le_bytes());
    BlockHash(name)
}

fn chain(blocks: u32) -> Vec<BlockHash> {
    (0..blocks).map(block).collect()
}

fn stored(holders: &mut Holders, node: u16, blocks: core::ops::Range<u32>) {
    blocks.for_each(|i| holders.store(NodeId(node), &block(i)));
    holders.validate().unwrap();
}

fn with_nodes(n: u16) -> Holders {
    let mut holders = Holders::with_max(1000);
    (1..=n).for_each(|node| holders.begin(NodeId(node)));
    holders
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// The definition: walk until the first block that is not there.
fn walked(holders: &Holders, blocks: &[BlockHash], tier: impl Fn(Tier) -> bool) -> Vec<(NodeId, u32)> {
    let holds = |block: &BlockHash, node| holders.tiers_of(block).iter().any(|(n, t)| *n == node && tier(*t));
    let first = blocks.first().map(|block| holders.of(block)).unwrap_or_default();
    first.into_iter().map(|node| (node, blocks.iter().take_while(|block| holds(block, node)).count() as u32)).collect()
}

#[test]
fn searched_prefixes_are_those_of_a_walk_when_blocks_are_chains() {
    for seed in 0..400 {
        let mut rng = Rng(seed);
        let length = 1 + rng.below(if seed % 2 == 0 { 9 } else { 200 }) as u32;
        let nodes = 1 + rng.below(20) as u16;
        let (mut holders, chain) = (with_nodes(nodes), chain(length));
        holders.locations_max = BLOCKS_MAX;
        for node in 1..=nodes {
            let held = if rng.below(4) == 0 { length } else { rng.below(u64::from(length) + 1) as u32 };
            let on_device = rng.below(u64::from(held) + 1) as u32;
            stored(&mut holders, node, 0..held);
            if rng.below(3) == 0 {
                (on_device..held).for_each(|i| holders.set(NodeId(node), &block(i), Some(Tier::Host)));
            }
            if rng.below(6) == 0 {
                holders.drop_node(NodeId(node));
            }
        }
        holders.validate().unwrap();
        assert_eq!(holders.prefix_lengths(&chain), walked(&holders, &chain, |_| true), "seed {seed}");
        let device: Vec<_> = holders.prefixes(&chain).iter().map(|p| (p.node, p.device_blocks)).collect();
        assert_eq!(device, walked(&holders, &chain, |tier| tier == Tier::Device), "seed {seed}");
    }
}

#[test]
fn without_chains_a_prefix_still_ends_where_a_block_is_missing() {
    for seed in 0..400 {
        let mut rng = Rng(seed);
        let (mut holders, chain) = (with_nodes(9), chain(1 + rng.below(60) as u32));
        for block in &chain {
            (1..=9).filter(|_| rng.below(4) > 0).for_each(|node| holders.store(NodeId(node), block));
        }
        let prefixes = holders.prefix_lengths(&chain);
        assert_eq!(prefixes.iter().map(|p| p.0).collect::<Vec<_>>(), holders.of(&chain[0]));
        for (node, length) in prefixes {
            let holds = |i: u32| chain.get(i as usize).is_some_and(|block| holders.of(block).contains(&node));
            assert!(length >= 1 && holds(length - 1) && !holds(length), "seed {seed}: node {node} and {length}");
        }
    }
}

#[test]
fn prefix_runs_end_at_each_nodes_first_gap() {
    let mut holders = with_nodes(9);
    stored(&mut holders, 1, 0..4);
    stored(&mut holders, 2, 0..5);
    stored(&mut holders, 3, 1..9); // lacks the first: worth nothing
    (4..=9).for_each(|node| stored(&mut holders, node, 0..2)); // eight holders of block 0: a list
    let chain = chain(20);
    let expected: Vec<_> = [(1, 4), (2, 5)].into_iter().chain((4..=9).map(|n| (n, 2))).map(|(n, k)| (NodeId(n), k)).collect();
    assert_eq!(holders.prefix_lengths(&chain), expected);
    assert_eq!(holders.prefix_lengths(&chain[..1]).len(), 8);
    assert_eq!(holders.prefix_lengths(&[]), vec![]);
    assert_eq!(holders.prefix_lengths(&[block(99)]), vec![]);
}

#[test]
fn a_delta_applies_once_and_only_on_what_it_builds_on() {
    let mut holders = with_nodes(1);
    let delta = |base_seq, seq, ops| Delta { node: NodeId(1), epoch: Epoch(1), base_seq, seq, ops };
    let first = delta(0, 2, vec![BlockOp::Stored(block(1)), BlockOp::Stored(block(2)), BlockOp::Evicted(block(1))]);
    assert_eq!(holders.apply(&first), DeltaVerdict::Applied { seq: 2 });
    assert_eq!(holders.apply(&first), DeltaVerdict::AlreadyApplied { seq: 2 });
    assert_eq!(holders.apply(&delta(3, 4, vec![BlockOp::Stored(block(3))])), DeltaVerdict::Gap { last_seq: 2 });
    assert_eq!(holders.apply(&delta(1, 4, vec![BlockOp::Stored(block(3))])), DeltaVerdict::Gap { last_seq: 2 });
    assert_eq!(holders.blocks_of(NodeId(1)), vec![block(2)]);
    assert_eq!(holders.tally(NodeId(1)).unwrap().digest, toggle(0, &block(2)));
    holders.validate().unwrap();
}

#[test]
fn a_block_moves_between_tiers_and_stays_one_block() {
    let mut holders = with_nodes(1);
    let ops = vec![BlockOp::Stored(block(1)), BlockOp::ToHost(block(1)), BlockOp::ToDisk(block(2)), BlockOp::ToHost(block(3))];
    holders.apply(&Delta { node: NodeId(1), epoch: Epoch(1), base_seq: 0, seq: 1, ops });
    let ops = vec![BlockOp::Stored(block(3)), BlockOp::Evicted(block(2)), BlockOp::Evicted(block(9))];
    holders.apply(&Delta { node: NodeId(1), epoch: Epoch(1), base_seq: 1, seq: 2, ops });
    holders.validate().unwrap();
    assert_eq!(holders.tiers_of(&block(1)), vec![(NodeId(1), Tier::Host)]);
    assert_eq!(holders.tiers_of(&block(3)), vec![(NodeId(1), Tier::Device)]);
    let tally = holders.tally(NodeId(1)).unwrap();
    assert_eq!((tally.blocks, tally.digest), (2, toggle(toggle(0, &block(1)), &block(3))));
}

#[test]
fn at_the_bound_blocks_are_refused_and_counted_until_there_is_room() {
    let mut holders = Holders::with_max(3);
    holders.begin(NodeId(1));
    holders.begin(NodeId(2));
    stored(&mut holders, 1, 0..2);
    stored(&mut holders, 2, 0..5);
    assert_eq!(holders.tally(NodeId(2)).unwrap(), Tally { seq: 0, blocks: 1, digest: toggle(0, &block(0)), refused: 4 });
    stored(&mut holders, 2, 0..1); // held already: not refused
    assert_eq!(holders.tally(NodeId(2)).unwrap().refused, 4);
    holders.drop_node(NodeId(1));
    stored(&mut holders, 2, 1..3);
    assert_eq!((holders.locations(), holders.blocks()), (3, 3), "what a dead node held takes no room");
}

#[test]
fn a_snapshot_replaces_everything() {
    let mut holders = with_nodes(2);
    stored(&mut holders, 1, 0..5);
    stored(&mut holders, 2, 3..6);
    holders.replace_node(NodeId(1), 9, &[block(7), block(3), block(7)]);
    holders.validate().unwrap();
    assert_eq!(holders.blocks_of(NodeId(1)), vec![block(3), block(7)]);
    assert_eq!(holders.tally(NodeId(1)).unwrap().seq, 9);
    assert_eq!(holders.of(&block(3)), &[NodeId(1), NodeId(2)]);
    assert_eq!(holders.of(&block(0)), &[]);
}

#[test]
fn the_dead_are_gone_at_once_and_swept_later() {
    let mut holders = with_nodes(3);
    holders.locations_max = BLOCKS_MAX;
    stored(&mut holders, 1, 0..50);
    stored(&mut holders, 2, 25..75);
    holders.drop_node(NodeId(1));
    holders.begin(NodeId(1));
    holders.validate().unwrap();
    assert_eq!((holders.locations(), holders.blocks()), (50, 75));
    assert_eq!((holders.of(&block(0)), holders.of(&block(30))), (vec![], vec![NodeId(2)]));
    stored(&mut holders, 1, 40..60);
    for step in 0..SHARDS {
        holders.sweep();
        if step == 7 {
            holders.drop_node(NodeId(2)); // dies while a sweep is under way
            holders.begin(NodeId(2));
        }
        holders.validate().unwrap();
    }
    assert_eq!((holders.locations(), holders.blocks()), (20, 20));
    assert_eq!(holders.incarnations.dead_locations(), 0);
}

#[test]
fn incarnations_do_not_run_out() {
    let mut holders = with_nodes(2);
    stored(&mut holders, 2, 0..1);
    for life in 0..3 * place::INCARNATIONS_MAX as u32 {
        holders.begin(NodeId(1));
        holders.store(NodeId(1), &block(life % 7));
    }
    holders.validate().unwrap();
    assert_eq!((holders.locations(), holders.of(&block(0))), (2, vec![NodeId(2)]));
}

/// Random changes against a plain model, with clones that must not change, and bytes that give the same index again.
#[test]
fn any_changes_agree_with_a_plain_model() {
    use alloc::collections::BTreeMap;
    for seed in 0..60 {
        let mut rng = Rng(seed);
        let mut holders = with_nodes(12);
        let mut model: BTreeMap<(u32, u16), Tier> = BTreeMap::new();
        let mut kept: Option<(Holders, Vec<Vec<u8>>)> = None;
        for _ in 0..400 {
            let (node, i) = (1 + rng.below(12) as u16, rng.below(20) as u32);
            match rng.below(24) {
                0 => {
                    holders.begin(NodeId(node));
                    model.retain(|(_, n), _| *n != node);
                }
                1..8 => {
                    holders.evict(NodeId(node), &block(i));
                    model.remove(&(i, node));
                }
                8 => holders.sweep_all(),
                9 => holders.sweep(),
                10 => kept = Some((holders.clone(), holders.pieces().collect())),
                n => {
                    let tier = [Tier::Device, Tier::Host, Tier::Disk][(n % 3) as usize];
                    holders.set(NodeId(node), &block(i), Some(tier));
                    model.insert((i, node), tier);
                }
            }
        }
        holders.validate().unwrap();
        for i in 0..20 {
            let expected: Vec<_> = model.range((i, 0)..(i + 1, 0)).map(|((_, n), tier)| (NodeId(*n), *tier)).collect();
            assert_eq!(holders.tiers_of(&block(i)), expected, "seed {seed} block {i}");
        }
        let bytes: Vec<u8> = holders.pieces().flatten().collect();
        let mut read = Holders::default();
        read.read((Drift::default(), &holders.held()), &bytes).unwrap();
        read.validate().unwrap();
        assert_eq!((read.pieces().flatten().collect::<Vec<u8>>(), read.held()), (bytes, holders.held()));
        if let Some((clone, pieces)) = kept {
            assert_eq!(clone.pieces().collect::<Vec<_>>(), pieces, "seed {seed}: a clone changed");
            clone.validate().unwrap();
        }
    }
}

#[test]
fn bytes_that_no_index_writes_are_refused() {
    let mut holders = with_nodes(2);
    stored(&mut holders, 1, 0..3);
    stored(&mut holders, 2, 0..1);
    let (held, bytes) = (holders.held(), holders.pieces().flatten().collect::<Vec<u8>>());
    let read = |bytes: &[u8]| Holders::with_max(4).read((Drift::default(), &held), bytes);
    assert_eq!(read(&bytes), Ok(()));
    assert_eq!(Holders::with_max(3).read((Drift::default(), &held), &bytes), Err(HoldersError::TooMany));
    assert_eq!(read(&bytes[..bytes.len() - 1]), Err(HoldersError::Truncated));
    assert_eq!(read(&bytes[..bytes.len() - 20]), Err(HoldersError::Digest(NodeId(1))));
    let changed = |at: usize, to: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = to;
        read(&bytes)
    };
    assert_eq!(changed(18, 2), Err(HoldersError::Order), "a holder twice");
    assert_eq!(changed(18, 0), Err(HoldersError::Holder));
    assert_eq!(changed(19, 0xc0), Err(HoldersError::Holder), "no such tier");
    assert_eq!(changed(0, 0xff), Err(HoldersError::Order));
    let line = |node| Held { node: NodeId(node), seq: 0, refused: 0, blocks: 0, digest: 0, drifted: false };
    let crowd: Vec<_> = (1..=5000).map(line).collect();
    assert_eq!(Holders::default().read((Drift::default(), &crowd), &[]), Err(HoldersError::TooMany));
    assert_eq!(changed(bytes.len() - 5, 1), Err(HoldersError::Digest(NodeId(1))));
}

#[test]
fn a_lost_and_an_extra_operation_are_found_by_the_digest_and_counted_once() {
    let digest = |blocks: &[u32], seq| CacheDigest {
        node: NodeId(1),
        epoch: Epoch(1),
        seq,
        blocks: blocks.len() as u64,
        digest: blocks.iter().fold(0, |digest, i| toggle(digest, &block(*i))),
    };
    for held in [vec![1, 2, 3], vec![1]] {
        let mut holders = with_nodes(1);
        stored(&mut holders, 1, 1..3); // the node has one more, or one less
        assert_eq!(holders.compare(&digest(&[1, 2], 0)), DigestVerdict::Same);
        assert_eq!(holders.compare(&digest(&held, 0)), DigestVerdict::Drifted);
        assert_eq!(holders.compare(&digest(&held, 0)), DigestVerdict::Drifted, "until it is mended");
        assert_eq!(holders.drift(), Drift { found: 1, repaired: 0 });
        holders.replace_node(NodeId(1), 5, &held.iter().map(|i| block(*i)).collect::<Vec<_>>());
        assert_eq!(holders.drift(), Drift { found: 1, repaired: 1 });
        assert_eq!(holders.compare(&digest(&held, 5)), DigestVerdict::Same);
        assert_eq!(holders.compare(&digest(&[1, 2], 4)), DigestVerdict::Skipped, "of the past");
        assert_eq!(holders.compare(&digest(&held, 6)), DigestVerdict::Drifted, "deltas that the log has lost");
    }
}

#[test]
fn what_was_refused_is_asked_for_when_there_is_room_and_is_no_drift() {
    let mut holders = Holders::with_max(6);
    (1..=2).for_each(|node| holders.begin(NodeId(node)));
    stored(&mut holders, 1, 0..4);
    stored(&mut holders, 2, 10..14);
    let digest = (10..14).fold(0, |digest, i| toggle(digest, &block(i)));
    let said = CacheDigest { node: NodeId(2), epoch: Epoch(1), seq: 0, blocks: 4, digest };
    assert_eq!(holders.compare(&said), DigestVerdict::Skipped);
    holders.drop_node(NodeId(1));
    assert_eq!(holders.compare(&said), DigestVerdict::Skipped, "not for the last place");
    stored(&mut holders, 2, 12..13);
    assert_eq!(holders.compare(&said), DigestVerdict::Lacking);
    assert_eq!(holders.drift(), Drift::default());
}
