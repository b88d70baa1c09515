//! What the gateway asks of the dispatcher and what it gets back.

use std::time::Duration;

use millrace_core::ids::TokenId;
use millrace_core::message::{Finish, HandoverStats, PrefillStats};
use millrace_core::sampling::Sampling;

/// Requests that one replica runs at a time; one more gets [`SubmitError::NoCapacity`].
pub const REQUESTS_MAX: usize = 4096;
/// Failed attempts of one request before it fails; a refusal for lack of room does not count, it costs time.
pub const ATTEMPTS_MAX: u16 = 4;
/// Bytes of a request's cache salt.
pub const CACHE_SALT_BYTES_MAX: usize = 256;
/// The tenant that requests without a key belong to; it exists once a leader was elected.
pub const DEFAULT_TENANT: &str = "default";

/// A request, tokenised and validated.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// The prompt; not empty, and with `sampling.max_new` at most [`millrace_core::message::TOKENS_MAX`].
    pub tokens: Vec<TokenId>,
    /// How to draw.
    pub sampling: Sampling,
    /// Whose request, from the authenticated caller; see [`DEFAULT_TENANT`].
    pub tenant: String,
    /// Narrows sharing of cached blocks; at most [`CACHE_SALT_BYTES_MAX`].
    pub cache_salt: Vec<u8>,
    /// Time for the whole request.
    pub budget: Duration,
    /// The client's own objective for the time to the first token: refused when it is predicted to be missed.
    pub ttft_max: Option<Duration>,
    /// The answer's id, when a front has chosen one; else it is the request's.
    pub answer: Option<u128>,
    /// W3C trace context: 16 bytes trace id, 8 bytes span id, flags; zeros for none.
    pub trace: [u8; 25],
}

/// What a client has of an answer that another gateway began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delivered {
    /// The answer's first tokens; fewer than are asked for.
    pub tokens: Vec<TokenId>,
    /// Tokens of the prompt that the first attempt found cached.
    pub cached_tokens: u32,
}

/// What happens to a running request, in order. `Finished` or `Failed` is the last.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The prompt of the first attempt is computed; comes once, before the first token.
    Prefilled(Box<PrefillStats>),
    /// The next token of the answer; indices count from 0 without a gap. An end-of-text token is delivered too, as the last.
    Token {
        /// Its place in the answer.
        index: u32,
        /// The token.
        token: TokenId,
        /// Natural log of its probability.
        logprob: f32,
    },
    /// The answer is whole.
    Finished {
        /// Why it ends.
        finish: Finish,
        /// What it took.
        usage: Box<Usage>,
    },
    /// The answer ends unfinished.
    Failed {
        /// Why.
        kind: FailureKind,
        /// For the client.
        detail: String,
    },
}

/// Why a request that was accepted has no whole answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// Its time is used up (504).
    Deadline,
    /// No node could take it over in time (503).
    NoNodes,
    /// Every node that could is full (429).
    NoCapacity,
    /// Too many attempts failed (502).
    Attempts,
    /// A node refused it as senseless, for example too long for its context (400).
    Rejected,
    /// The client reads too slowly; its connection is of no use any more.
    SlowClient,
    /// This replica is stopping (503).
    Stopping,
    /// The tenant was deleted (401).
    TenantGone,
}

/// What a request took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub completion_tokens: u32,
    /// Tokens of the prompt whose KV was reused by the first attempt's prefill.
    pub cached_tokens: u32,
    /// Where the time went.
    pub timings: Timings,
}

/// Where the time of a request went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timings {
    /// The first attempt's prompt.
    pub prefill: Option<PrefillStats>,
    /// The last hand-over; `None` when one node did both halves.
    pub handover: Option<HandoverStats>,
    /// The node that decoded last.
    pub decode_node: Option<String>,
    /// Tickets made; more than 1 after a migration.
    pub attempts: u16,
    /// Tokens of later tickets whose KV was nowhere to be had and was computed again.
    pub recomputed_tokens: u32,
    /// From submission to the first token, microseconds; 0 without one.
    pub ttft_us: u64,
    /// From submission to the end, microseconds.
    pub total_us: u64,
}

/// Why a request was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The cluster is full (429).
    #[error("the cluster is at capacity; try again in {retry_after_s} s")]
    NoCapacity {
        /// For `Retry-After`, seconds.
        retry_after_s: u32,
    },
    /// The objective would be missed, by what is predicted (429).
    #[error(
        "the first token would take {} ms and each further one {} ms, over the objective; try again in {retry_after_s} s",
        ttft_us.div_ceil(1000), tpot_us.div_ceil(1000)
    )]
    TooLate {
        /// Predicted time to the first token, microseconds.
        ttft_us: u64,
        /// Predicted time between tokens, microseconds.
        tpot_us: u64,
        /// For `Retry-After`, seconds.
        retry_after_s: u32,
    },
    /// No node can serve it now (503).
    #[error("no node can serve the request: {detail}")]
    NoNodes {
        /// Which kind is missing.
        detail: String,
    },
    /// Prompt and answer together are over a limit (400).
    #[error("{tokens} tokens of prompt and answer are over the limit of {max}")]
    TooLong {
        /// Asked for.
        tokens: usize,
        /// Allowed.
        max: usize,
    },
    /// The request makes no sense (400).
    #[error("{0}")]
    Invalid(String),
    /// This replica cannot serve yet (503), and why.
    #[error("not ready: {0}")]
    NotReady(String),
}
