//! `millctl model`: what a model on this machine is made of, and what its KV takes. Asks nobody; reads headers only.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
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
    /// What keys and values are cached as: bf16, int8 or f32
    #[arg(long, alias = "dtype", value_name = "TYPE", default_value = "bf16")]
    kv_dtype: KvDtype,
    #[command(flatten)]
    shape: Shape,
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
        let dtype = args.kv_dtype;
        let context = args.context.map_or(config.max_positions, |tokens| tokens as usize);
        let blocks = context.div_ceil(args.block_tokens.into()) as u64;
        let kv = |kind: Kind| {
            let token_bytes = (kind.cached(|numbers| dtype.vector_bytes(numbers)) * config.layers) as u64;
            let block_bytes = token_bytes * u64::from(args.block_tokens);
            let own = kind.letters == config.attention.letters();
            let numbers = kind.cached(|numbers| numbers);
            Kv { kind: kind.letters.into(), own, numbers, token_bytes, block_bytes, context_bytes: block_bytes * blocks }
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
            dtype: dtype.as_str().into(),
            block_tokens: args.block_tokens,
            shown_context_tokens: context,
            kv: kinds(config).into_iter().map(kv).collect(),
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

/// A kind of attention, and what it caches of a token in a layer.
struct Kind {
    letters: &'static str,
    /// Heads that cache.
    heads: usize,
    /// Numbers of each vector of such a head.
    vectors: Vec<usize>,
}

impl Kind {
    /// The sum of `of` over the vectors of a token in a layer.
    fn cached(&self, of: impl Fn(usize) -> usize) -> usize {
        self.heads * self.vectors.iter().map(|&numbers| of(numbers)).sum::<usize>()
    }
}

/// Kinds of attention over the same heads.
fn kinds(config: &ModelConfig) -> Vec<Kind> {
    let attention = &config.attention;
    let of = |letters, heads| Kind { letters, heads, vectors: vec![attention.query_dim(), attention.value_dim()] };
    let mut kinds = vec![of("MHA", attention.heads)];
    match &attention.kind {
        AttentionKind::Grouped(grouped) if attention.letters() == "GQA" => kinds.push(of("GQA", grouped.kv_heads)),
        AttentionKind::Grouped(_) => {}
        AttentionKind::Latent(_) => kinds.push(Kind { letters: "MLA", heads: 1, vectors: vec![attention.cached().2] }),
    }
    if attention.heads > 1 {
        kinds.push(of("MQA", 1));
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
    fn shown_as(name: &str, kv_dtype: KvDtype) -> Option<Shown> {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let beside = repository.join("../shared/golden/tiny").join(name);
        let path = if beside.is_dir() { beside } else { repository.join("tests/data").join(name) };
        let checkpoint = Checkpoint::open(&path).ok()?;
        let args = ShowArgs { model: path, block_tokens: 16, context: Some(100), kv_dtype, shape: Shape::default() };
        let shown = Shown::of(&checkpoint, &args);
        assert_eq!(own(&shown).block_bytes, checkpoint.kv_layout(kv_dtype, 16).block_bytes() as u64, "as nodes have it");
        Some(shown)
    }

    fn shown(name: &str) -> Option<Shown> {
        shown_as(name, KvDtype::F32)
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
    fn bytes_of_eight_bits_and_their_scales() {
        let shown = shown_as("tiny-llama-gqa-tied", KvDtype::Int8).unwrap();
        // 3 layers, 2 KV heads, K and V, 16 bytes and one scale.
        assert_eq!(own(&shown).token_bytes, 3 * 2 * 2 * (16 + 2));
        assert!(shown.page().render(false, false).contains("KV in int8"));
        if let Some(latent) = shown_as("tiny-deepseek-v3", KvDtype::Int8) {
            assert_eq!(own(&latent).token_bytes, 3 * (40 + 2 * 2), "two groups");
        }
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
