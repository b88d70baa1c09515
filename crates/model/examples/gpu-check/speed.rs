//! How fast the device computes: prefill and decode of a random model of Llama-3-8B's shape, beside what the device could do.
//!
//! Prefill is measured by its arithmetic (model FLOP utilisation: products of the layers and of attention below the diagonal, nothing else), decode
//! by its bytes (memory-bandwidth utilisation: weights once, KV of all contexts once). The times are of whole steps, from tokens to logits here,
//! with the cells copied to this side.

use std::time::Instant;

use millrace_checkpoint::{
    Architecture, Attention, AttentionKind, Grouped, Mlp, MlpKind, ModelConfig, Norm, NormKind, Positions, Rope, Scaling,
};
use millrace_core::engine::{EngineError, Row, Step};
use millrace_core::ids::{AttemptId, RequestId, Slot, TokenId};
use millrace_core::layout::{KvDtype, KvLayout};
use millrace_model::tensor::Settings;
use millrace_model::{Compute, Dtype, TensorEngine};
use tch::{Cuda, Device, Kind, Tensor};

use crate::support::greedy;

const PROMPTS: [usize; 3] = [512, 2048, 8192];
const BATCHES: [usize; 3] = [1, 8, 32];
const CONTEXTS: [usize; 2] = [512, 4096];
const BLOCK_TOKENS: usize = 16;
/// Tokens of one step while contexts are made.
const STEP_TOKENS: usize = 8192;
/// Timed runs, after as many that are not timed as [`WARM_UPS`]; the median counts.
const RUNS: usize = 9;
const WARM_UPS: usize = 3;
/// Side of the product that is measured as a limit.
const PRODUCT_SIDE: i64 = 8192;
/// Bytes that are copied to measure memory.
const COPY_BYTES: i64 = 2 << 30;

/// Dense bf16 TFLOP/s and TB/s by the vendor's datasheets, and a part of the driver's name; the first that fits.
const PEAKS: [(&str, f64, f64); 8] = [
    ("B200", 2250.0, 8.0),
    ("H200", 989.0, 4.8),
    ("H100 PCIe", 756.0, 2.0),
    ("H100", 989.0, 3.35),
    ("A100-SXM4-80GB", 312.0, 2.039),
    ("A100", 312.0, 1.555),
    ("L40S", 362.0, 0.864),
    ("L4", 121.0, 0.3),
];

/// What a device could do: operations and bytes a second.
struct Peak {
    flops: f64,
    bytes: f64,
}

/// Measures all and prints it.
pub fn measure(ordinal: usize, layers: usize) -> Result<(), Box<dyn std::error::Error>> {
    let _no_grad = tch::no_grad_guard();
    let (device, name) = (Device::Cuda(ordinal), millrace_kernels::cuda::device_name(ordinal)?);
    let measured = Peak { flops: product_flops(device), bytes: copied_bytes(device) };
    println!("measured: a bf16 product {:.0} TFLOP/s, a copy {:.2} TB/s", measured.flops / 1e12, measured.bytes / 1e12);
    let peak = PEAKS.iter().find(|(part, ..)| name.contains(part));
    let peak = match peak {
        Some((_, tflops, tbytes)) => Peak { flops: tflops * 1e12, bytes: tbytes * 1e12 },
        None => measured,
    };
    println!("taken as the peak: {:.0} TFLOP/s, {:.2} TB/s", peak.flops / 1e12, peak.bytes / 1e12);
    let (config, layout) = llama_8b(layers);
    let slots = (BATCHES[2] * (CONTEXTS[1] / BLOCK_TOKENS + 4)).max(PROMPTS[2] / BLOCK_TOKENS);
    let compute = Compute { threads: std::thread::available_parallelism()?.get(), ..Compute::default() };
    let settings = Settings { device, dtype: Dtype::Bf16, slots, block_tokens: BLOCK_TOKENS as u16, compute };
    let begin = Instant::now();
    let (mut engine, ..) = TensorEngine::random(&config, layout, settings)?;
    println!("a random model of {:.1} GB made in {:.1} s", engine.weight_bytes() as f64 / 1e9, begin.elapsed().as_secs_f64());
    for tokens in PROMPTS {
        let time = median(|| prefill(&mut engine, tokens))?;
        let flops = prefill_flops(&config, &engine, tokens);
        let share = flops / time / peak.flops;
        println!("prefill {tokens:5} tokens: {:8.0} tokens/s, {:5.1} % of the FLOP/s", tokens as f64 / time, 100.0 * share);
    }
    for context in CONTEXTS {
        for batch in BATCHES {
            let time = decode(&mut engine, batch, context)?;
            let bytes = engine.weight_bytes() + batch * context * layout.token_bytes() * usize::from(layout.layers);
            let share = bytes as f64 / time / peak.bytes;
            let rate = batch as f64 / time;
            println!("decode batch {batch:2}, context {context:4}: {rate:8.0} tokens/s, {:5.1} % of the bytes/s", 100.0 * share);
        }
    }
    Ok(())
}

/// Llama-3-8B's shape.
fn llama_8b(layers: usize) -> (ModelConfig, KvLayout) {
    let grouped = Grouped { kv_heads: 8, head_dim: 128, joined: false, norms: false };
    let attention = Attention {
        heads: 32,
        kind: AttentionKind::Grouped(grouped),
        qkv_bias: false,
        output_bias: false,
        scale: 1.0 / 128f64.sqrt(),
        windows: vec![None; layers],
    };
    let config = ModelConfig {
        name: "random-8b".into(),
        architecture: Architecture::Llama,
        vocab_size: 128_256,
        hidden_size: 4096,
        layers,
        norm: Norm { kind: NormKind::Rms, eps: 1e-5 },
        positions: Positions::Rotary(Rope { theta: 5e5, scaling: Scaling::Plain }),
        attention,
        mlp: Mlp { width: 14_336, kind: MlpKind::SwiGlu },
        experts: None,
        max_positions: 16_384,
        tie_word_embeddings: false,
        bos: None,
        eos: vec![],
    };
    let (parts, kv_heads, head_dim) = config.attention.cached();
    let (kv_heads, head_dim, block_tokens) = (kv_heads as u16, head_dim as u16, BLOCK_TOKENS as u16);
    (config, KvLayout { layers: layers as u16, parts, kv_heads, head_dim, block_tokens, dtype: KvDtype::Bf16 })
}

/// `tokens` tokens of sequence `index` from position `start` on; sequences have `blocks` slots each.
fn row(index: usize, start: usize, tokens: usize, blocks: usize) -> Row {
    Row {
        attempt: AttemptId { request: RequestId(index as u128), attempt: 0 },
        tokens: (start..start + tokens).map(|at| ((at * 7919 + index * 104_729 + 11) % 100_000) as TokenId).collect(),
        start: start as u32,
        table: (index * blocks..(index + 1) * blocks).map(|slot| Slot(slot as u32)).collect(),
        sample: Some(greedy()),
    }
}

/// Seconds of one step.
fn timed(engine: &mut TensorEngine, rows: Vec<Row>) -> Result<f64, EngineError> {
    let begin = Instant::now();
    engine.logits(&Step { rows }, &mut |_| ())?;
    Ok(begin.elapsed().as_secs_f64())
}

fn prefill(engine: &mut TensorEngine, tokens: usize) -> Result<f64, EngineError> {
    timed(engine, vec![row(0, 0, tokens, tokens / BLOCK_TOKENS)])
}

/// Seconds of a decode step of `batch` sequences with `context` tokens behind them.
fn decode(engine: &mut TensorEngine, batch: usize, context: usize) -> Result<f64, EngineError> {
    let blocks = context / BLOCK_TOKENS + 4;
    let sequences: Vec<usize> = (0..batch).collect();
    for together in sequences.chunks(STEP_TOKENS / context) {
        timed(engine, together.iter().map(|&index| row(index, 0, context, blocks)).collect())?;
    }
    let mut position = context;
    median(|| {
        position += 1;
        timed(engine, (0..batch).map(|index| row(index, position - 1, 1, blocks)).collect())
    })
}

fn median(mut run: impl FnMut() -> Result<f64, EngineError>) -> Result<f64, EngineError> {
    for _ in 0..WARM_UPS {
        run()?;
    }
    let mut times = (0..RUNS).map(|_| run()).collect::<Result<Vec<_>, _>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[RUNS / 2])
}

/// Operations of a prompt: two for each weight of the layers and token, the head once, and attention to what is before. The last layer counts as nothing: only
/// keys, values and queries of it are computed for all tokens.
fn prefill_flops(config: &ModelConfig, engine: &TensorEngine, tokens: usize) -> f64 {
    let head = config.vocab_size * config.hidden_size;
    let computed = config.layers - 1;
    let layers = (engine.weight_bytes() / size_of::<half::bf16>() - head) / config.layers * computed;
    let pairs = tokens as f64 * (tokens + 1) as f64 / 2.0;
    let attention = 4.0 * pairs * (config.attention.heads * config.attention.query_dim() * computed) as f64;
    2.0 * layers as f64 * tokens as f64 + 2.0 * head as f64 + attention
}

/// Operations a second of LibTorch's own product.
fn product_flops(device: Device) -> f64 {
    let sides = [PRODUCT_SIDE, PRODUCT_SIDE];
    let (a, b) = (Tensor::randn(sides, (Kind::BFloat16, device)), Tensor::randn(sides, (Kind::BFloat16, device)));
    2.0 * (PRODUCT_SIDE as f64).powi(3) / repeated(device, || drop(a.matmul(&b)))
}

/// Bytes a second, read and written, of a copy within the device.
fn copied_bytes(device: Device) -> f64 {
    let from = Tensor::zeros([COPY_BYTES], (Kind::Uint8, device));
    let mut to = from.zeros_like();
    2.0 * COPY_BYTES as f64 / repeated(device, || to.copy_(&from))
}

/// Seconds of one of many runs that follow one another.
fn repeated(device: Device, mut run: impl FnMut()) -> f64 {
    let Device::Cuda(ordinal) = device else { return f64::NAN };
    (0..WARM_UPS).for_each(|_| run());
    Cuda::synchronize(ordinal as i64);
    let begin = Instant::now();
    (0..RUNS).for_each(|_| run());
    Cuda::synchronize(ordinal as i64);
    begin.elapsed().as_secs_f64() / RUNS as f64
}
