//! What kind of world a seed makes: sizes, speeds and how much goes wrong. Each seed draws its own, some without any faults of a
//! kind, because bugs hide where two things are rare together (swarm testing, Groce and others, 2012).

use millrace_core::batch::BatchConfig;
use millrace_core::ids::TokenId;
use millrace_core::layout::{KvDtype, KvLayout, KvParts};
use millrace_core::message::ModelIdentity;
use millrace_core::transfer::pace::ON_THE_WAY_MAX;

use crate::random::Random;

/// Nodes of each role.
pub const NODES_PER_ROLE: usize = 2;
/// One world in so many has QUIC for its network; the others have a light one, which is several times faster and keeps QUIC's promises.
const QUIC_ONE_IN: u64 = 4;
/// Computing that all open requests may need, on one node, microseconds.
const WORK_MAX_US: u64 = 2_000_000;
/// How long all their hand-overs may take, over one link and with the slots of one pool, microseconds: mostly there are more.
const HANDOVERS_MAX_US: u64 = 6_000_000;
/// Replicas of the coordinator.
pub const REPLICAS: usize = 3;

/// Chances of faults, in thousandths of the occasions unless the name says otherwise.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Mean time between two faults of processes, links and disks, microseconds; 0 for none.
    pub gap_us: u64,
    /// The longest time that a process which crashed is missing, microseconds: in some worlds longer than a lease.
    pub down_max_us: u64,
    /// A client that goes away before its answer is whole.
    pub client_leaves: u64,
    /// A control message that comes a second time, late.
    pub repeated: u64,
    /// A KV stream that is damaged on its way.
    pub damaged: u64,
    /// A step that the engine cannot compute.
    pub engine: u64,
    /// A report of a node's cache that the coordinator loses.
    pub report_lost: u64,
    /// A report that the coordinator forgets after it has said that it is applied.
    pub forgotten: u64,
    /// A report that comes with an operation less or more than the node sent: what no sequence number shows.
    pub drift: u64,
    /// A datagram that is lost, one that comes twice, one that is late. QUIC only.
    pub lost: u64,
    /// See `lost`.
    pub twice: u64,
    /// See `lost`.
    pub late: u64,
}

impl Faults {
    /// Nothing goes wrong.
    pub const NONE: Self = Self {
        gap_us: 0,
        down_max_us: 3_000_000,
        client_leaves: 0,
        repeated: 0,
        damaged: 0,
        engine: 0,
        report_lost: 0,
        forgotten: 0,
        drift: 0,
        lost: 0,
        twice: 0,
        late: 0,
    };
}

/// One world.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What is served.
    pub model: ModelIdentity,
    /// Slots of each node's pool.
    pub slots: u32,
    /// Bounds of each node's batch.
    pub batch: BatchConfig,
    /// One way over a link, microseconds.
    pub delay_us: (u64, u64),
    /// Until the task of a KV stream runs, microseconds: long where the processor is busy.
    pub task_us: (u64, u64),
    /// How long the loop of a busy node lets an event wait, microseconds: much comes in one turn then, in whatever order.
    pub turn_us: (u64, u64),
    /// One layer of one step, microseconds.
    pub layer_us: (u64, u64),
    /// Between two requests, microseconds.
    pub request_gap_us: (u64, u64),
    /// Requests that are open at a time at most: what the nodes finish within a few seconds, so that nobody starves when all is well.
    pub live_max: usize,
    /// Time that a request has, microseconds.
    pub budget_us: (u64, u64),
    /// Tokens of a prompt.
    pub prompt_tokens: (u64, u64),
    /// Tokens of an answer at most.
    pub answer_tokens: (u64, u64),
    /// Token ids are below this.
    pub vocab: u32,
    /// Tokens that end an answer.
    pub eos: Vec<TokenId>,
    /// Prompt tokens by which decode nodes look busier to the router than they are, so that prompts are handed over.
    pub split_bias: u64,
    /// How many requests prefill nodes do whole, in thousandths: where decoding sequences grow beside prompts that are being sent.
    pub whole: u64,
    /// How many prompts begin like an earlier one, in thousandths.
    pub shared: u64,
    /// How many answers are sampled, in thousandths.
    pub sampled: u64,
    /// A client that leaves does so within this, microseconds.
    pub leaves_us: u64,
    /// Mean time between two orders about caches, microseconds; 0 for none.
    pub orders_us: u64,
    /// A sync of a replica's disk, microseconds.
    pub sync_us: (u64, u64),
    /// By how many millionths clocks run fast or slow, at most.
    pub skew_ppm: u64,
    /// Entries after which a replica's log is compacted.
    pub entries_max: u64,
    /// Between two questions of operators, microseconds.
    pub operator_gap_us: (u64, u64),
    /// Whether QUIC is the network, and then how many bytes a stream may have unread.
    pub quic: Option<u32>,
    /// What goes wrong.
    pub faults: Faults,
}

impl Plan {
    /// The world of a seed.
    pub fn draw(random: &mut Random) -> Self {
        let layout = KvLayout {
            layers: random.between((1, 4)) as u16,
            parts: KvParts::KeysValues,
            kv_heads: random.pick(&[1, 32, 512]),
            head_dim: random.pick(&[64, 256, 1024]),
            block_tokens: random.pick(&[2, 4, 8]),
            dtype: KvDtype::F32,
        };
        let model = ModelIdentity { name: "checksum".into(), weights: [1; 32], tokenizer: [2; 32], layout };
        let (tight, roomy) = ((8, 16), (10, 60));
        let slots = random.pick(&[tight, roomy, roomy]);
        let slots = random.between(slots) as u32;
        let pool_tokens = u64::from(slots) * u64::from(layout.block_tokens);
        let answer_max = random.pick(&[1, 4, 12, 30]).min(pool_tokens / 2 - 1);
        let prompt_max = random.pick(&[8, 30, 90]).min(pool_tokens - answer_max - 1);
        let batch = Self::batch(random, &model, slots);
        let quic = random.chance(1000 / QUIC_ONE_IN).then(|| random.pick(&[16 << 10, 64 << 10, 1 << 20]));
        // Raft's heartbeats go behind its entries on one stream: over 100 ms a round trip and QUIC's slow start, a large entry costs an election.
        let slow = random.pick(if quic.is_some() { &[1, 1, 10, 10] } else { &[1, 1, 10, 100] });
        let layer_us = (10, random.pick(&[40, 400, 4000]));
        let turn_us = (0, random.pick(&[150, 150, 150, 10_000]));
        let vocab = random.pick(&[32, 1000]);
        let mut plan = Self {
            model,
            slots,
            batch,
            delay_us: (20 * slow, random.pick(&[50, 500]) * slow),
            task_us: (0, random.pick(&[100, 100, 30_000])),
            turn_us,
            layer_us,
            live_max: 0,
            request_gap_us: (0, random.pick(&[2_000, 20_000, 200_000])),
            budget_us: random.pick(&[(30_000, 500_000), (200_000, 5_000_000), (10_000_000, 20_000_000)]),
            prompt_tokens: (1, prompt_max),
            answer_tokens: (1, answer_max),
            vocab,
            eos: (3..3 + random.pick(&[0, 1, u64::from(vocab) / 4]) as TokenId).collect(),
            split_bias: random.pick(&[0, 1_000, 100_000]),
            whole: random.pick(&[0, 300, 600]),
            shared: random.pick(&[0, 300, 900]),
            sampled: random.pick(&[0, 500]),
            leaves_us: random.pick(&[10_000, 1_000_000]),
            orders_us: random.pick(&[0, 0, 50_000, 500_000]),
            sync_us: (100, random.pick(&[1_000, 10_000, 60_000])),
            skew_ppm: random.pick(&[0, 200, 20_000]),
            entries_max: random.pick(&[30, 200, 100_000]),
            operator_gap_us: (10_000, random.pick(&[200_000, 2_000_000])),
            quic,
            faults: Self::faults(random),
        };
        let crowd = (WORK_MAX_US / plan.compute_us()).min(HANDOVERS_MAX_US / plan.handover_us().max(1));
        plan.live_max = crowd.clamp(3, 100) as usize;
        plan
    }

    /// Time of the longest request's steps, with others like it beside it, microseconds.
    fn compute_us(&self) -> u64 {
        let (prompt, answer) = (self.prompt_tokens.1, self.answer_tokens.1);
        let step_us = u64::from(self.model.layout.layers) * self.layer_us.1 + self.turn_us.1;
        let chunk = u64::from(self.batch.step_tokens_max).min(prompt);
        let prompt_us = prompt.div_ceil(chunk) * step_us * (1 + chunk / 4);
        let answer_us = answer * step_us * (1 + u64::from(self.batch.rows_max) / 4);
        prompt_us + answer_us
    }

    /// What the longest request's hand-over takes of a link and of a pool that others use too, microseconds.
    fn handover_us(&self) -> u64 {
        let layout = &self.model.layout;
        let turn_us = 2 * (self.delay_us.1 + self.turn_us.1) + self.task_us.1;
        let (cell_bytes, blocks) = (layout.cell_bytes() as u64, layout.blocks(self.prompt_tokens.1 as usize) as u64);
        let turn_bytes = ON_THE_WAY_MAX.max(cell_bytes);
        let bytes = u64::from(layout.layers) * blocks * cell_bytes;
        let link_us = turn_us * bytes / turn_bytes;
        // The question, the manifest and what they are answered come beside the cells.
        let held_us = turn_us * (bytes.div_ceil(turn_bytes) + 2);
        let at_a_time = (u64::from(self.slots) / blocks).clamp(1, u64::from(self.batch.rows_max));
        link_us + held_us / at_a_time
    }

    fn batch(random: &mut Random, model: &ModelIdentity, slots: u32) -> BatchConfig {
        BatchConfig {
            block_tokens: model.layout.block_tokens,
            slots,
            step_tokens_max: random.between((1, 40)) as u32,
            prompt_step_us: [0, random.between((1, 2_000_000))][random.between((0, 1)) as usize],
            rows_max: random.between((1, 8)) as u32,
            context_max: u32::MAX,
            headroom_blocks: random.between((0, 3)) as u32,
            waiting_max: random.between((1, 12)) as u32,
            fingerprint: model.fingerprint(),
        }
    }

    fn faults(random: &mut Random) -> Faults {
        Faults {
            gap_us: random.pick(&[0, 100_000, 700_000, 3_000_000]),
            down_max_us: random.pick(&[3_000_000, 3_000_000, 15_000_000]),
            client_leaves: random.pick(&[0, 50, 300]),
            repeated: random.pick(&[0, 20, 200]),
            damaged: random.pick(&[0, 0, 20]),
            engine: random.pick(&[0, 0, 5]),
            report_lost: random.pick(&[0, 0, 50]),
            forgotten: random.pick(&[0, 0, 0, 50]),
            drift: random.pick(&[0, 0, 0, 300]),
            lost: random.pick(&[0, 10, 50, 200]),
            twice: random.pick(&[0, 10, 50]),
            late: random.pick(&[0, 50, 200]),
        }
    }
}
