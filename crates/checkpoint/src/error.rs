//! What can be wrong with a model's files, and with text given to its codec.
//!
//! Every variant names the file and the field, key or tensor, because the reader of the message has the file and not the code.

use std::io;
use std::path::{Path, PathBuf};

/// Why a model was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system would not give the file.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file or directory.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The path holds neither a Hugging Face directory nor a GGUF file.
    #[error("{}: not a model: {reason}", file.display())]
    NotAModel {
        /// The path that was given.
        file: PathBuf,
        /// What was looked for.
        reason: String,
    },
    /// A well-formed model of an architecture that is not served.
    #[error("{}: architecture {architecture:?} is not supported (supported: {})", file.display(), crate::Architecture::ALL.map(|a| a.name()).join(", "))]
    Architecture {
        /// The file that names it.
        file: PathBuf,
        /// The name it gives.
        architecture: String,
    },
    /// A well-formed model that needs something not built.
    #[error("{}: {field} = {value} is not supported", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The field, key or tensor.
        field: String,
        /// Its value.
        value: String,
    },
    /// Bytes or values that no correct writer produces.
    #[error("{}: {field}: {reason}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// The field, key or tensor.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A number above a named limit.
    #[error("{}: {field} is {found}, the limit is {max}", file.display())]
    Limit {
        /// The file.
        file: PathBuf,
        /// The field, key or tensor.
        field: String,
        /// What the file says.
        found: u64,
        /// The most that is accepted.
        max: u64,
    },
    /// A tensor that the architecture needs is not there.
    #[error("{}: tensor {tensor} is missing (expected shape {expected:?})", file.display())]
    MissingTensor {
        /// The file.
        file: PathBuf,
        /// Its canonical name.
        tensor: String,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A tensor's shape does not follow from the configuration.
    #[error("{}: tensor {tensor} has shape {found:?}, expected {expected:?}", file.display())]
    TensorShape {
        /// The file.
        file: PathBuf,
        /// Its canonical name.
        tensor: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor is stored in a form that cannot be read.
    #[error("{}: tensor {tensor} has type {found}, which is not supported (supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1)", file.display())]
    TensorType {
        /// The file.
        file: PathBuf,
        /// Its name in the file.
        tensor: String,
        /// The type in the file.
        found: String,
    },
}

/// Short constructors: the parsers name a field in every second line.
impl CheckpointError {
    pub(crate) fn io(file: &Path, source: io::Error) -> Self {
        Self::Io { file: file.into(), source }
    }

    pub(crate) fn malformed(file: &Path, field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Malformed { file: file.into(), field: field.into(), reason: reason.into() }
    }

    pub(crate) fn unsupported(file: &Path, field: impl Into<String>, value: impl ToString) -> Self {
        Self::Unsupported { file: file.into(), field: field.into(), value: value.to_string() }
    }

    pub(crate) fn limit(file: &Path, field: impl Into<String>, found: u64, max: u64) -> Self {
        Self::Limit { file: file.into(), field: field.into(), found, max }
    }
}

/// Why a text or a list of messages could not be turned into tokens.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TextError {
    /// Longer than [`crate::TEXT_BYTES_MAX`].
    #[error("the text has {bytes} bytes, the limit is {max}")]
    TooLong {
        /// Length of the text.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The messages are not what the OpenAI API describes.
    #[error("{field}: {reason}")]
    Messages {
        /// The place, such as `messages[2].content`.
        field: String,
        /// What is wrong there.
        reason: String,
    },
    /// The model has no usable chat template.
    #[error("the model has no usable chat template: {reason}")]
    NoTemplate {
        /// Absent, or how it fails to parse.
        reason: String,
    },
    /// The chat template refused the messages, ran out of its budget or failed.
    #[error("chat template: {reason}")]
    Template {
        /// What the template engine said, or the template itself by `raise_exception`.
        reason: String,
    },
    /// The tokenizer failed.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What it said.
        reason: String,
    },
}
