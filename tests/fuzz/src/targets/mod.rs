//! The parsers, and what each promises. One file for each kind: `wire` between processes, `state` the replicated state and its files,
//! `model` model files, `log` the replicated log,
//! `http` what clients send, `gateway` a whole replica at its doors, `files` what operators write.

mod files;
mod gateway;
mod http;
mod log;
mod model;
mod state;
mod wire;

use crate::mutate::{self, Random};

/// A parser that is open for inputs: whether it took one for valid, or how it broke its word. A panic is noticed outside.
pub type Parser = Box<dyn FnMut(&[u8]) -> Result<bool, String>>;

/// How examples are spoiled: in place, with another example to take pieces from.
pub type Spoil = fn(&mut Vec<u8>, &[u8], &mut Random);

/// Something that reads bytes which others wrote.
pub struct Target {
    /// Its name: also that of its folder in the corpus.
    pub name: &'static str,
    /// What it reads, and from whom.
    pub what: &'static str,
    /// Valid inputs.
    pub examples: fn() -> Vec<Vec<u8>>,
    /// How they are spoiled.
    pub spoil: Spoil,
    /// Opens the parser.
    pub open: fn() -> Parser,
    /// Most memory that an input of so many bytes may take, in bytes.
    pub memory_max: fn(usize) -> usize,
    /// Parts of the messages of panics that we catch by design, because a library has them.
    pub caught: &'static [&'static str],
    /// Inputs in the run that is part of the tests.
    pub short_runs: u64,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    wire::MESSAGE,
    wire::CELLS,
    wire::CERTIFICATE,
    wire::LOAD,
    state::COMMAND,
    state::ANSWER,
    state::SNAPSHOT,
    state::SAVED,
    log::FRAME,
    log::SEGMENT,
    log::STATE,
    model::GGUF,
    model::SAFETENSORS,
    model::CONFIG,
    model::TOKENIZER,
    model::TEMPLATE,
    http::CHAT,
    http::COMPLETION,
    http::STOPS,
    http::HEADERS,
    gateway::DOOR,
    gateway::QUERY,
    gateway::LINK,
    files::PLAN,
    files::TRACE,
    files::EVENTS,
    files::CLUSTER,
    files::SETTINGS,
];

/// A target by its name.
#[must_use]
pub fn named(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// Memory that a parser may take beside its input, whatever it is: errors, tables, a small state.
const BASE_BYTES: usize = 256 << 10;

/// The usual promise: a few times what came in.
const fn times<const N: usize>(len: usize) -> usize {
    BASE_BYTES + N * len
}

/// What is not kept is a broken word.
fn same<T: PartialEq>(what: &str, one: &T, other: &T) -> Result<(), String> {
    if one == other { Ok(()) } else { Err(format!("{what} is not what it was after a round trip")) }
}
