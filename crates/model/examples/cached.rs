//! The experiment of the lectures on KV caches: GPT-2 writes the same tokens with and without a cache, and the time is plotted.
//!
//! Without a cache every token computes all tokens before it anew: the time for n tokens grows with the square of n. With one it computes itself
//! alone, and reads: the time grows with n. Without `--model` a model of GPT-2's shape (124 million parameters) is made on the spot, with random
//! weights: the time is the same, and so is the test that both ways write the same tokens.
//!
//! ```text
//! cargo run --release -p millrace-model --example cached -- --tokens 256 --svg cached.svg
//! ```

use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use millrace_checkpoint::Checkpoint;
use millrace_core::engine::{Engine, Row, Step};
use millrace_core::ids::{AttemptId, Slot, TokenId};
use millrace_core::sampling::{Sampling, mix};
use millrace_model::{Compute, Dtype, ModelEngine, Switch};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

/// Tokens that a model reads before it writes.
const PROMPT: [TokenId; 4] = [11, 7, 5, 3];
const BLOCK_TOKENS: u16 = 16;
/// Rows of the table that is printed.
const LINES: usize = 8;

/// GPT-2 with and without a KV cache.
#[derive(Parser)]
struct Args {
    /// A model; if absent one of GPT-2's shape is made, with random weights
    #[arg(long)]
    model: Option<PathBuf>,
    /// Tokens to write
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Where to put the plot
    #[arg(long)]
    svg: Option<PathBuf>,
}

fn main() -> Result<(), Failure> {
    let args = Args::parse();
    let made = std::env::temp_dir().join(format!("millrace-gpt2-{}", std::process::id()));
    let ran = match &args.model {
        Some(model) => compare(&args, model),
        None => make(&made).and_then(|()| compare(&args, &made)),
    };
    if made.exists() {
        std::fs::remove_dir_all(&made)?;
    }
    ran
}

/// Runs both ways, prints the times, and plots them.
fn compare(args: &Args, model: &Path) -> Result<(), Failure> {
    let checkpoint = Checkpoint::open(model)?;
    let longest = checkpoint.config.max_positions - PROMPT.len();
    let tokens = args.tokens.clamp(LINES, longest);
    let slots = (PROMPT.len() + tokens).div_ceil(BLOCK_TOKENS.into());
    let compute = Compute { switch: Switch::Never, ..Compute::fixed(args.threads) };
    let (mut engine, _, _) = ModelEngine::load(&checkpoint, Dtype::F32, slots, BLOCK_TOKENS, compute)?;
    let (cached_ids, cached) = write(&mut engine, tokens, true)?;
    let (ids, without) = write(&mut engine, tokens, false)?;
    if ids != cached_ids {
        return Err("both ways must write the same tokens".into());
    }
    println!("tokens  without cache, s  with cache, s  ratio");
    for line in 1..=LINES {
        let at = tokens * line / LINES;
        let (slow, fast) = (without[at - 1], cached[at - 1]);
        println!("{at:>6}  {slow:>16.2}  {fast:>13.2}  {:>5.1}", slow / fast);
    }
    println!("the time grows with n to the power of {:.2} without, {:.2} with", power(&without), power(&cached));
    if let Some(path) = &args.svg {
        std::fs::write(path, plot(&without, &cached))?;
        println!("plotted in {}", path.display());
    }
    Ok(())
}

/// Writes `tokens` tokens; gives them, and the seconds since the begin at which each was there.
fn write(engine: &mut ModelEngine, tokens: usize, cached: bool) -> Result<(Vec<TokenId>, Vec<f64>), Failure> {
    let sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, max_new: 1, eos: vec![], ignore_eos: true };
    let table: Vec<Slot> = (0..engine.slots() as u32).map(Slot).collect();
    let (mut all, mut seconds, mut computed) = (PROMPT.to_vec(), Vec::new(), 0);
    let begin = Instant::now();
    while seconds.len() < tokens {
        let start = if cached { computed } else { 0 };
        let row = Row {
            attempt: AttemptId::default(),
            tokens: all[start..].to_vec(),
            start: start as u32,
            table: table.clone(),
            sample: Some(sampling.clone()),
        };
        computed = all.len();
        let sampled = engine.step(&Step { rows: vec![row] }, &mut |_| ())?;
        all.extend(sampled.first().map(|sampled| sampled.token));
        seconds.push(begin.elapsed().as_secs_f64());
    }
    Ok((all.split_off(PROMPT.len()), seconds))
}

/// The exponent of n in the time for n tokens, from the last half to the whole.
fn power(seconds: &[f64]) -> f64 {
    let (half, all) = (seconds[seconds.len() / 2 - 1], seconds[seconds.len() - 1]);
    (all / half).log2() / (seconds.len() as f64 / (seconds.len() / 2) as f64).log2()
}

/// Both curves over the number of tokens.
fn plot(without: &[f64], cached: &[f64]) -> String {
    let (width, height, left, top) = (640.0, 400.0, 60.0, 30.0);
    let most = without.iter().chain(cached).copied().fold(0.0, f64::max);
    let x = |index: usize| left + (width - left - 20.0) * (index + 1) as f64 / without.len() as f64;
    let y = |seconds: f64| height - 50.0 - (height - 50.0 - top) * seconds / most;
    let mut svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' font-family='sans-serif' font-size='13'>\n"
    );
    let mut add = |line: String| writeln!(svg, "{line}").expect("a string takes all");
    add("<rect width='100%' height='100%' fill='white'/>".into());
    for line in 0..=4 {
        let (share, at) = (f64::from(line) / 4.0, y(most * f64::from(line) / 4.0));
        add(format!("<line x1='{left}' x2='{:.0}' y1='{at:.0}' y2='{at:.0}' stroke='#ddd'/>", width - 20.0));
        add(format!("<text x='{:.0}' y='{:.0}' text-anchor='end'>{:.1} s</text>", left - 6.0, at + 4.0, most * share));
        let tokens = (without.len() as f64 * share).round();
        let across = left + (width - left - 20.0) * share;
        add(format!("<text x='{across:.0}' y='{:.0}' text-anchor='middle'>{tokens}</text>", height - 30.0));
    }
    add(format!("<text x='{:.0}' y='{:.0}' text-anchor='middle'>tokens written</text>", width / 2.0, height - 8.0));
    for (name, seconds, colour, row) in
        [("without a KV cache", without, "#c0392b", 0.0), ("with a KV cache", cached, "#2471a3", 20.0)]
    {
        let points: Vec<String> = seconds.iter().enumerate().map(|(i, &s)| format!("{:.1},{:.1}", x(i), y(s))).collect();
        add(format!("<polyline fill='none' stroke='{colour}' stroke-width='2' points='{}'/>", points.join(" ")));
        add(format!("<text x='{:.0}' y='{:.0}' fill='{colour}'>{name}</text>", left + 20.0, top + 15.0 + row));
    }
    svg + "</svg>\n"
}

/// A directory with a model of GPT-2's shape, in bfloat16.
fn make(directory: &Path) -> Result<(), Failure> {
    const WIDTH: usize = 768;
    let config =
        json!({"model_type": "gpt2", "vocab_size": 50257, "n_embd": WIDTH, "n_head": 12, "n_layer": 12, "n_positions": 1024});
    std::fs::create_dir_all(directory)?;
    std::fs::write(directory.join("config.json"), config.to_string())?;
    let mut tensors: Vec<(String, Vec<usize>)> =
        vec![("wte.weight".into(), vec![50257, WIDTH]), ("wpe.weight".into(), vec![1024, WIDTH])];
    let mut pair = |name: String, weight: Vec<usize>| {
        let bias = vec![*weight.last().expect("a weight has sides")];
        tensors.extend([(format!("{name}.weight"), weight), (format!("{name}.bias"), bias)]);
    };
    for layer in 0..12 {
        let sides = [
            ("attn.c_attn", [WIDTH, 3 * WIDTH]),
            ("attn.c_proj", [WIDTH; 2]),
            ("mlp.c_fc", [WIDTH, 4 * WIDTH]),
            ("mlp.c_proj", [4 * WIDTH, WIDTH]),
        ];
        ["ln_1", "ln_2"].iter().for_each(|norm| pair(format!("h.{layer}.{norm}"), vec![WIDTH]));
        sides.iter().for_each(|(part, sides)| pair(format!("h.{layer}.{part}"), sides.to_vec()));
    }
    pair("ln_f".into(), vec![WIDTH]);
    let (mut header, mut offset) = (serde_json::Map::new(), 0);
    for (name, shape) in &tensors {
        let end = offset + 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let header = Value::Object(header).to_string();
    let mut file = std::io::BufWriter::new(std::fs::File::create(directory.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut counter = 0u64;
    for (name, shape) in tensors {
        let middle = if name.contains("ln_") && name.ends_with("weight") { 1.0 } else { 0.0 };
        for _ in 0..shape.iter().product() {
            counter += 1;
            let uniform = (mix(counter) >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            file.write_all(&half::bf16::from_f32(middle + 0.07 * uniform).to_le_bytes())?;
        }
    }
    Ok(file.flush()?)
}
