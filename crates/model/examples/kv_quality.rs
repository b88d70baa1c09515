//! What cached keys and values of fewer bits cost and give: the same text read with f32, bf16 and int8 KV, and the time of decoding and of prompts.
//!
//! Quality: of each window of a text the first tokens are computed as one prompt, and each of the next is told the right one before it (one step of
//! single-token rows, as decoding is). Two engines that differ in nothing but the KV give logits for the same contexts: how much less likely the
//! right tokens are (ratio of perplexities), how often both would write the same token, the mean divergence, and the largest difference of a logit.
//!
//! ```text
//! cargo run --release -p millrace-model --example kv_quality -- --model model.gguf README.md docs/*.md
//! cargo run --release -p millrace-model --example kv_quality -- --model model.gguf --speed
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use millrace_checkpoint::Checkpoint;
use millrace_core::engine::{Engine, Row, Step};
use millrace_core::ids::{AttemptId, RequestId, Slot, TokenId};
use millrace_core::sampling::Sampling;
use millrace_kernels::KvSlab;
use millrace_model::{Compute, Dtype, KvDtype, ModelEngine, Switch};

type Failure = Box<dyn std::error::Error>;

const BLOCK_TOKENS: u16 = 16;
/// Tokens before those that are scored.
const CONTEXTS: [usize; 3] = [512, 1024, 2048];
/// Tokens of a window that are scored.
const SCORED: usize = 128;
/// Sequences that decode together.
const BATCHES: [usize; 3] = [1, 8, 32];
/// Contexts of decoding, and tokens of prompts, that are timed.
const TIMED: [usize; 2] = [256, 2048];

/// Compares types of cached keys and values.
#[derive(Parser)]
struct Args {
    /// Model directory or GGUF file
    #[arg(long)]
    model: PathBuf,
    /// Texts to read, joined
    text: Vec<PathBuf>,
    /// Type of weights and activations
    #[arg(long, default_value = "bf16")]
    dtype: Dtype,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Windows of the text for each context
    #[arg(long, default_value_t = 16)]
    windows: usize,
    /// Time int8 beside bf16 instead, with as many steps in each of as many rounds
    #[arg(long)]
    speed: bool,
    #[arg(long, default_value_t = 8)]
    steps: usize,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

fn main() -> Result<(), Failure> {
    let args = Args::parse();
    if args.speed { speed(&args) } else { quality(&args) }
}

/// An engine with its KV memory.
struct Reader {
    engine: ModelEngine,
    slab: Arc<KvSlab>,
}

impl Reader {
    fn open(args: &Args, kv_dtype: KvDtype, tokens: usize) -> Result<Self, Failure> {
        let compute = Compute { switch: Switch::Never, kv_dtype: Some(kv_dtype), ..Compute::fixed(args.threads) };
        let slots = tokens.div_ceil(BLOCK_TOKENS.into());
        let (engine, slab, _) = ModelEngine::load(&Checkpoint::open(&args.model)?, args.dtype, slots, BLOCK_TOKENS, compute)?;
        Ok(Self { engine, slab })
    }
}

/// `tokens` from position `start` on of the sequence that has the slots from `first` on.
fn row(tokens: &[TokenId], start: usize, first: usize) -> Row {
    let blocks = (start + tokens.len()).div_ceil(BLOCK_TOKENS.into());
    let sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, max_new: 1, eos: vec![], ignore_eos: true };
    Row {
        attempt: AttemptId { request: RequestId(first as u128), attempt: 0 },
        tokens: tokens.to_vec(),
        start: start as u32,
        table: (first..first + blocks).map(|slot| Slot(slot as u32)).collect(),
        sample: Some(sampling),
    }
}

/// What one type of KV gives beside another.
#[derive(Default)]
struct Beside {
    tokens: usize,
    /// Sums of the negative logarithms of the right tokens' probabilities: the other's, and its own.
    surprise: [f64; 2],
    agree: usize,
    divergence: f64,
    largest: f32,
}

impl Beside {
    /// Logits of both for one context, and the token that is right.
    fn add(&mut self, other: &[f32], own: &[f32], right: TokenId) {
        let (p, q) = (log_softmax(other), log_softmax(own));
        self.tokens += 1;
        self.surprise[0] -= p[right as usize];
        self.surprise[1] -= q[right as usize];
        self.agree += usize::from(likeliest(other) == likeliest(own));
        self.divergence += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        self.largest = other.iter().zip(own).fold(self.largest, |largest, (a, b)| largest.max((a - b).abs()));
    }

    fn print(&self, what: &str) {
        let tokens = self.tokens as f64;
        let [other, own] = self.surprise.map(|sum| (sum / tokens).exp());
        println!(
            "{what} | {} | {other:.3} | {:.5} | {:.2} % | {:.6} | {:.3}",
            self.tokens,
            own / other,
            self.agree as f64 / tokens * 100.0,
            self.divergence / tokens,
            self.largest
        );
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total = logits.iter().map(|x| (f64::from(*x) - largest).exp()).sum::<f64>().ln();
    logits.iter().map(|x| f64::from(*x) - largest - total).collect()
}

fn likeliest(logits: &[f32]) -> usize {
    logits.iter().enumerate().fold(0, |best, (at, x)| if *x > logits[best] { at } else { best })
}

/// Reads the text with each type of KV.
fn quality(args: &Args) -> Result<(), Failure> {
    let tokens = tokens(&args.model, &args.text)?;
    let most = CONTEXTS[CONTEXTS.len() - 1] + SCORED;
    let mut readers = [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8].map(|kv_dtype| Reader::open(args, kv_dtype, most));
    println!("{} tokens of text, {} windows for each context, activations {}", tokens.len(), args.windows, args.dtype.as_str());
    println!(
        "context, KV | tokens | perplexity of the second | ratio | same next token | mean divergence | largest difference of a logit"
    );
    for context in CONTEXTS {
        let (mut rounded, mut eight) = (Beside::default(), Beside::default());
        let last = tokens.len().checked_sub(context + SCORED + 1).ok_or("the text is too short")?;
        for window in 0..args.windows {
            let window = &tokens[last * window / args.windows..][..=context + SCORED];
            let mut logits = Vec::new();
            for reader in &mut readers {
                let engine = &mut reader.as_mut().map_err(|error| error.to_string())?.engine;
                engine.step(&Step { rows: vec![row(&window[..context], 0, 0)] }, &mut |_| ())?;
                let rows = (context..context + SCORED).map(|at| row(&window[at..=at], at, 0)).collect();
                logits.push(engine.logits(&Step { rows }, &mut |_| ())?);
            }
            for (index, &right) in window[context + 1..].iter().enumerate() {
                rounded.add(&logits[0][index], &logits[1][index], right);
                eight.add(&logits[1][index], &logits[2][index], right);
            }
        }
        rounded.print(&format!("{context}, bf16 beside f32"));
        eight.print(&format!("{context}, int8 beside bf16"));
    }
    Ok(())
}

fn tokens(model: &Path, texts: &[PathBuf]) -> Result<Vec<TokenId>, Failure> {
    let texts = texts.iter().map(std::fs::read_to_string).collect::<Result<Vec<_>, _>>()?;
    let codec = Checkpoint::open(model)?.text.ok_or("the model has no tokenizer")?;
    Ok(codec.encode_bare(&texts.concat())?)
}

/// Times decoding and prompts with int8 beside bf16, both in each round.
fn speed(args: &Args) -> Result<(), Failure> {
    let most = BATCHES[2] * (TIMED[1] + args.steps + usize::from(BLOCK_TOKENS));
    let mut readers = [Reader::open(args, KvDtype::Bf16, most)?, Reader::open(args, KvDtype::Int8, most)?];
    println!("what | bf16, tokens/s | int8, tokens/s | int8 / bf16, median (least..greatest) of {}", args.rounds);
    for tokens in TIMED {
        compare(args, &format!("prompt of {tokens}"), |which| prompt_rate(&mut readers[which], tokens))?;
    }
    for context in TIMED {
        for batch in BATCHES {
            let what = format!("decode, batch {batch}, context {context}");
            compare(args, &what, |which| decode_rate(&mut readers[which], (batch, context), args.steps))?;
        }
    }
    Ok(())
}

/// Prints the rates of both by turns, after a round that does not count.
fn compare(args: &Args, what: &str, mut rate: impl FnMut(usize) -> Result<f64, Failure>) -> Result<(), Failure> {
    let mut rounds = Vec::new();
    for _ in 0..=args.rounds {
        rounds.push([rate(0)?, rate(1)?]);
    }
    let sorted = |of: fn(&[f64; 2]) -> f64| {
        let mut values: Vec<f64> = rounds[1..].iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let (bf16, int8, ratio) = (sorted(|[a, _]| *a), sorted(|[_, b]| *b), sorted(|[a, b]| b / a));
    let (middle, last) = (ratio.len() / 2, ratio.len() - 1);
    println!("{what} | {:.1} | {:.1} | {:.3} ({:.3}..{:.3})", bf16[middle], int8[middle], ratio[middle], ratio[0], ratio[last]);
    Ok(())
}

fn made_up(tokens: usize, vocab: usize) -> Vec<TokenId> {
    (0..tokens).map(|i| ((i * 7919 + 11) % vocab) as TokenId).collect()
}

fn prompt_rate(reader: &mut Reader, tokens: usize) -> Result<f64, Failure> {
    let step = Step { rows: vec![row(&made_up(tokens, reader.engine.vocab()), 0, 0)] };
    let begin = Instant::now();
    reader.engine.step(&step, &mut |_| ())?;
    Ok(tokens as f64 / begin.elapsed().as_secs_f64())
}

/// Tokens a second of `batch` sequences of `context` tokens each. Their KV is that of one prompt, copied, in slots of their own.
fn decode_rate(reader: &mut Reader, (batch, context): (usize, usize), steps: usize) -> Result<f64, Failure> {
    let Reader { engine, slab } = reader;
    let tokens = made_up(context + steps, engine.vocab());
    let blocks = engine.layout().blocks(context + steps);
    engine.step(&Step { rows: vec![row(&tokens[..context], 0, 0)] }, &mut |_| ())?;
    for slot in blocks..batch * blocks {
        for layer in 0..slab.layers() {
            slab.write(slot, layer).copy_from_slice(&slab.read(slot % blocks, layer));
        }
    }
    let mut begin = Instant::now();
    for (index, at) in (context..context + steps).enumerate() {
        if index == 1 {
            begin = Instant::now();
        }
        let rows = (0..batch).map(|sequence| row(&tokens[at..=at], at, sequence * blocks)).collect();
        engine.step(&Step { rows }, &mut |_| ())?;
    }
    Ok((batch * (steps - 1)) as f64 / begin.elapsed().as_secs_f64())
}
