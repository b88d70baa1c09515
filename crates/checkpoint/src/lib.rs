//! Reads a model's files: a Hugging Face directory or a GGUF file, mapped into memory, checked before use.
//!
//! Gives the configuration, the tensors under Hugging Face's names, the tokenizer with its chat template, and a fingerprint that says whether two
//! machines hold the same model. Does not compute: dequantising a tensor into numbers is as far as it goes. Has no sockets and no
//! LibTorch, so the gateway uses it too. All bytes are untrusted: a wrong file is refused with the name of what is wrong.
//!
//! Replace a model's files by new ones; never edit them in place while a process serves them, because they are mapped.
//!
//! Code map: `gguf` and `safetensors` read containers; `gguf_model`, `gguf_text`, `directory`, `directory_families`, `names` give them meaning; all
//! end in [`ModelConfig`] (a description made of `parts`, from which `shapes` and `digest` follow), `weights` and [`TextCodec`].

mod config;
mod digest;
mod directory;
mod directory_config;
mod directory_families;
mod error;
mod gguf;
mod gguf_model;
mod gguf_text;
mod identity;
mod json_file;
mod mapping;
mod names;
mod parts;
mod rope;
mod safetensors;
mod shapes;
mod stream;
mod strftime;
mod template;
mod tensor;
mod text;
mod weights;

pub use config::{
    Architecture, EOS_MAX, HEAD_DIM_MAX, HEADS_MAX, HIDDEN_MAX, INTERMEDIATE_MAX, LAYERS_MAX, ModelConfig, POSITIONS_MAX, VOCAB_MAX,
};
pub use error::{CheckpointError, TextError};
pub use gguf::{GGUF_ALIGNMENT_MAX, GGUF_KEYS_MAX, GGUF_NAME_BYTES_MAX, GGUF_TENSORS_MAX};
pub use parts::{
    Attention, AttentionKind, EXPERTS_MAX, EXPERTS_TOTAL_MAX, Experts, Grouped, Groups, LATENT_MAX, LATENT_NORM_EPS, Latent, Mlp,
    MlpKind, Norm, NormKind, Positions, Router, Score,
};
pub use rope::{Llama3Scaling, ROPE_THETA_MAX, Rope, Scaling, Yarn};
pub use safetensors::SAFETENSORS_HEADER_BYTES_MAX;
pub use stream::DecodeStream;
pub use template::{CHAT_FUEL, CHAT_TEXT_BYTES_MAX, MESSAGES_MAX};
pub use tensor::{QUANT_BLOCK, TensorType, TensorView};
pub use text::{TEXT_BYTES_MAX, TextCodec};

use mapping::MappedFile;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use weights::Weights;

/// A model's files, open and checked: every tensor that the configuration asks for is there with its shape.
pub struct Checkpoint {
    /// The model's shape.
    pub config: ModelConfig,
    /// Text to tokens and back; `None` if the files hold no tokenizer that can be used (see [`Self::text_absent`]).
    pub text: Option<TextCodec>,
    path: PathBuf,
    text_absent: Option<String>,
    weights: Weights,
    tokenizer_digest: [u8; 32],
    weights_digest: OnceLock<[u8; 32]>,
}

/// What the two readers hand over.
struct Parts {
    config: ModelConfig,
    /// The codec, or why there is none.
    text: Result<TextCodec, String>,
    weights: Weights,
    tokenizer_digest: [u8; 32],
}

impl Checkpoint {
    /// Opens a Hugging Face directory or a `.gguf` file. Reads headers and the tokenizer; weights are mapped and not touched, so the
    /// gateway may call it as well as the engines.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let metadata = std::fs::metadata(path).map_err(|e| CheckpointError::io(path, e))?;
        let parts = if metadata.is_dir() { directory::open(path)? } else { open_gguf(path)? };
        parts.weights.check(path, &parts.config)?;
        let (text, text_absent) = match parts.text {
            Ok(codec) => (Some(codec), None),
            Err(reason) => (None, Some(reason)),
        };
        Ok(Self {
            config: parts.config,
            text,
            path: path.into(),
            text_absent,
            weights: parts.weights,
            tokenizer_digest: parts.tokenizer_digest,
            weights_digest: OnceLock::new(),
        })
    }

    /// Where the model was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Why `text` is `None`, for the log and for the answer to a text prompt.
    pub fn text_absent(&self) -> Option<&str> {
        self.text_absent.as_deref()
    }

    /// The tensor of a canonical name such as `model.layers.0.self_attn.q_proj.weight`. Borrows from the mapped file, except where
    /// numbers have to be put in order (a copy): GPT-2's linear layers, and what is turned in GGUF's Llama and in DeepSeek.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, CheckpointError> {
        let missing = || CheckpointError::MissingTensor { file: self.path.clone(), tensor: name.into(), expected: Vec::new() };
        self.weights.view(name).ok_or_else(missing)
    }

    /// Names of all tensors in the files, sorted; more than [`ModelConfig::tensors`] if the files hold extra ones.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.weights.names()
    }

    /// Digest of the weights and of what says where they lie. The first call reads every byte of them.
    pub fn weights_digest(&self) -> [u8; 32] {
        *self.weights_digest.get_or_init(|| self.weights.digest())
    }

    /// Digest of the tokenizer and chat template as they are in the files.
    pub fn tokenizer_digest(&self) -> [u8; 32] {
        self.tokenizer_digest
    }

    /// Digest of the configuration: [`ModelConfig::digest`].
    pub fn config_digest(&self) -> [u8; 32] {
        self.config.digest()
    }

    /// Names the model: equal on two machines exactly if weights, configuration and tokenizer are. The first call reads all weights.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("millrace 2026 model fingerprint v1");
        for part in [self.weights_digest(), self.config_digest(), self.tokenizer_digest()] {
            hasher.update(&part);
        }
        *hasher.finalize().as_bytes()
    }
}

fn open_gguf(path: &Path) -> Result<Parts, CheckpointError> {
    let mapped = MappedFile::open(path)?;
    if !mapped.bytes().starts_with(b"GGUF") {
        let reason = "neither a directory with config.json nor a file that begins with GGUF".to_owned();
        return Err(CheckpointError::NotAModel { file: path.into(), reason });
    }
    let mut weights = Weights::default();
    let gguf = gguf::Gguf::parse(path, mapped.bytes())?;
    let config = gguf_model::config(&gguf, mapped.bytes(), model_name(path))?;
    gguf_model::fill(&gguf, &config, &mut weights)?;
    let text = gguf_text::codec(&gguf, &config)?;
    let tokenizer_digest = gguf_text::digest(&gguf);
    weights.digested.push(gguf.weights_start..mapped.bytes().len());
    weights.files.push(mapped);
    Ok(Parts { config, text, weights, tokenizer_digest })
}

/// The last part of the path without a `.gguf` ending.
fn model_name(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.into());
    let name = full.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
    name.strip_suffix(".gguf").map(str::to_owned).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    /// Gateways and engines share one open model between threads.
    #[test]
    fn an_open_model_can_be_shared() {
        fn shared<T: Send + Sync + 'static>() {}
        shared::<super::Checkpoint>();
        shared::<super::TextCodec>();
        shared::<super::DecodeStream>();
    }
}
