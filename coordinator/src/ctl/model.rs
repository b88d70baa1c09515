//! `millctl model`: what a model on this machine is made of, and what its KV takes. Asks nobody; reads headers only.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use millrace_checkpoint::{AttentionKind, Checkpoint, ModelConfig, Positions};
use millrace_core::layout::KvDtype;
use serde::{Deserialize, Serialize};

use super::output::{Answer, Shape};
use super::table::{Column, Page, cell, column, wide};

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Model {
    /// Show a model's description, and the bytes of its KV for a token, a block and a context
    ///
    /// Beside the model's own kind of attention stand those that it could have had with the same heads: MHA (each head has keys and values of its
    /// own), MQA (all share one), GQA (groups share one), MLA (all are made of one latent).
    #[command(after_help = "Example:\n  millctl model show model.gguf --context 4096")]
    Show(ShowArgs),
}

/// What to show.
#[derive(Args, Clone, Debug)]
pub struct ShowArgs {
    /// The model: a directory or a GGUF file
    model: PathBuf,
    /// Tokens of one block, as nodes have it
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    block_tokens: u16,
    /// Tokens of a context; the model's longest if absent
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Type of cached KV
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: Dtype,
    #[command(flatten)]
    shape: Shape,
}

/// A type on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// 32-bit float.
    F32,
}

/// Runs one.
///
/// # Errors
/// The model cannot be read.
pub fn run(command: Model) -> Result<()> {
    let Model::Show(args) = command;
    if !args.block_tokens.is_power_of_two() {
        bail!("--block-tokens {} is not a power of two", args.block_tokens);
    }
    let checkpoint = Checkpoint::open(&args.model)?;
    args.shape.print(&Shown::of(&checkpoint, &args))
}

/// A model.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Shown {
    name: String,
    architecture: String,
    parameters: u64,
    layers: usize,
    hidden_size: usize,
    vocab_size: usize,
    context_tokens: usize,
    attention: String,
    heads: usize,
    positions: String,
    /// Tokens that a layer with a window sees, and layers that have one.
    window_tokens: Option<usize>,
    windowed_layers: usize,
    experts: Option<Mixture>,
    dtype: String,
    block_tokens: u16,
    shown_context_tokens: usize,
    kv: Vec<Kv>,
}

/// A mixture of experts.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Mixture {
    experts: usize,
    chosen: usize,
    first_layer: usize,
}

/// What KV takes with one kind of attention.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Kv {
    kind: String,
    /// Whether it is the model's own.
    own: bool,
    /// Numbers that a token takes in a layer.
    numbers: usize,
    token_bytes: u64,
    block_bytes: u64,
    context_bytes: u64,
}

impl Shown {
    fn of(checkpoint: &Checkpoint, args: &ShowArgs) -> Self {
        let config = &checkpoint.config;
        let (dtype, dtype_name) = match args.dtype {
            Dtype::Bf16 => (KvDtype::Bf16, "bf16"),
            Dtype::F32 => (KvDtype::F32, "f32"),
        };
        let context = args.context.map_or(config.max_positions, |tokens| tokens as usize);
        let layout = checkpoint.kv_layout(dtype, args.block_tokens);
        let own = layout.token_bytes() / dtype.bytes();
        let kv = |(kind, numbers): (&str, usize)| {
            let token_bytes = (numbers * dtype.bytes() * config.layers) as u64;
            let block_bytes = token_bytes * u64::from(args.block_tokens);
            let context_bytes = block_bytes * layout.blocks(context) as u64;
            let own = kind == config.attention.letters();
            Kv { kind: kind.into(), own, numbers, token_bytes, block_bytes, context_bytes }
        };
        let windows = config.attention.windows.iter().flatten();
        Self {
            name: config.name.clone(),
            architecture: config.architecture.to_string(),
            parameters: config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum(),
            layers: config.layers,
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
            context_tokens: config.max_positions,
            attention: config.attention.letters().into(),
            heads: config.attention.heads,
            positions: if config.positions == Positions::Learned { "learned" } else { "rotary" }.into(),
            window_tokens: windows.clone().min().copied(),
            windowed_layers: windows.count(),
            experts: config.experts.as_ref().map(|experts| Mixture {
                experts: experts.count,
                chosen: experts.chosen,
                first_layer: experts.first_layer,
            }),
            dtype: dtype_name.into(),
            block_tokens: args.block_tokens,
            shown_context_tokens: context,
            kv: kinds(config, own).into_iter().map(kv).collect(),
        }
    }

    /// The first lines.
    fn lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!("{}: {}, {:.1} million parameters", self.name, self.architecture, self.parameters as f64 / 1e6),
            format!(
                "layers {}   hidden {}   vocabulary {}   context {}",
                self.layers, self.hidden_size, self.vocab_size, self.context_tokens
            ),
            format!("attention {}   heads {}   positions {}", self.attention, self.heads, self.positions),
        ];
        if let Some(window) = self.window_tokens {
            lines.push(format!("{} layers see the last {window} tokens only; the KV of all is kept", self.windowed_layers));
        }
        if let Some(Mixture { experts, chosen, first_layer }) = &self.experts {
            lines.push(format!("{chosen} of {experts} experts for each token, from layer {first_layer} on"));
        }
        lines
    }
}

/// Kinds of attention over the same heads, and the numbers that each caches of a token in a layer. `own`: the model's.
fn kinds(config: &ModelConfig, own: usize) -> Vec<(&'static str, usize)> {
    let attention = &config.attention;
    let head = attention.query_dim() + attention.value_dim();
    let mut kinds = vec![("MHA", attention.heads * head)];
    match &attention.kind {
        AttentionKind::Grouped(_) if attention.letters() == "GQA" => kinds.push(("GQA", own)),
        AttentionKind::Grouped(_) => {}
        AttentionKind::Latent(_) => kinds.push(("MLA", own)),
    }
    if attention.heads > 1 {
        kinds.push(("MQA", head));
    }
    kinds
}

const COLUMNS: &[Column<Kv>] = &[
    column("KIND", |kv| cell(format!("{}{}", kv.kind, if kv.own { " *" } else { "" }))),
    wide("NUMBERS", |kv| cell(kv.numbers)),
    column("TOKEN BYTES", |kv| cell(kv.token_bytes)),
    column("BLOCK BYTES", |kv| cell(kv.block_bytes)),
    column("CONTEXT BYTES", |kv| cell(kv.context_bytes)),
    column("CONTEXT MIB", |kv| cell(format!("{:.1}", kv.context_bytes as f64 / f64::from(1 << 20)))),
];

impl Answer for Shown {
    fn page(&self) -> Page {
        let page = self.lines().into_iter().fold(Page::new(), Page::line);
        let context = self.shown_context_tokens;
        let page = page
            .line(format!("KV in {}, blocks of {} tokens, a context of {context}; * is this model", self.dtype, self.block_tokens));
        page.table(COLUMNS, &self.kv)
    }

    fn names(&self) -> Vec<String> {
        vec![format!("model/{}", self.name)]
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// The repository's own model, and the reference models where this machine has them.
    fn shown(name: &str) -> Option<Shown> {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let beside = repository.join("../shared/golden/tiny").join(name);
        let path = if beside.is_dir() { beside } else { repository.join("tests/data").join(name) };
        let checkpoint = Checkpoint::open(&path).ok()?;
        let (context, dtype) = (Some(100), Dtype::F32);
        let args = ShowArgs { model: path, block_tokens: 16, context, dtype, shape: Shape::default() };
        Some(Shown::of(&checkpoint, &args))
    }

    fn own(shown: &Shown) -> &Kv {
        shown.kv.iter().find(|kv| kv.own).unwrap()
    }

    #[test]
    fn bytes_of_grouped_queries() {
        let shown = shown("tiny-llama-gqa-tied").unwrap();
        // 3 layers, 2 KV heads of 16, K and V, 4 bytes; 100 tokens are 7 blocks.
        let token = 3 * 2 * 16 * 2 * 4;
        let want = Kv {
            kind: "GQA".into(),
            own: true,
            numbers: 64,
            token_bytes: token,
            block_bytes: 16 * token,
            context_bytes: 112 * token,
        };
        assert_eq!(own(&shown), &want);
        assert_eq!(shown.kv.iter().map(|kv| kv.numbers).collect::<Vec<_>>(), [128, 64, 32]);
        let text = shown.page().render(false, false);
        assert!(text.contains("GQA *") && text.contains("1536") && text.contains("attention GQA   heads 4"), "{text}");
    }

    #[test]
    fn bytes_of_every_kind() {
        let kinds = [
            ("tiny-llama-mha", "MHA", 128),
            ("tiny-llama-mqa", "MQA", 32),
            ("tiny-deepseek-v3", "MLA", 40),
            ("tiny-gpt2", "MHA", 128),
        ];
        for (name, kind, numbers) in kinds {
            let Some(shown) = shown(name) else { continue };
            assert_eq!((own(&shown).kind.as_str(), own(&shown).numbers), (kind, numbers), "{name}");
            assert_eq!(shown.kv.iter().filter(|kv| kv.own).count(), 1, "{name}");
            assert_eq!(own(&shown).token_bytes, numbers as u64 * 3 * 4);
        }
    }
}
