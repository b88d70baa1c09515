//! What happened to one request, as the client saw it and as the server says. All times in nanoseconds of the generator's monotonic clock
//! from the start of the run.

use serde::{Deserialize, Serialize};

/// How a request ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The whole answer came.
    Ok,
    /// No connection could be made.
    Connect,
    /// The server answered with this status.
    Status(u16),
    /// The stream carried an error with this code.
    Event(String),
    /// The connection ended before the answer did.
    Closed,
    /// What came is no stream of completions.
    Malformed,
    /// The answer ended with fewer tokens than the plan asked for.
    Short,
    /// It took longer than it may.
    Timeout,
    /// The generator had too many in flight; it was never sent.
    Dropped,
    /// The run was stopped first. No error of the server's.
    #[default]
    Unfinished,
}

impl Outcome {
    /// A word for tables.
    #[must_use]
    pub fn word(&self) -> String {
        match self {
            Self::Ok => "ok".into(),
            Self::Connect => "connect".into(),
            Self::Status(status) => format!("http {status}"),
            Self::Event(code) => format!("error {code}"),
            Self::Closed => "closed".into(),
            Self::Malformed => "malformed".into(),
            Self::Short => "short answer".into(),
            Self::Timeout => "timeout".into(),
            Self::Dropped => "dropped here".into(),
            Self::Unfinished => "unfinished".into(),
        }
    }
}

/// Where the server says the time went; from the response's `millrace` object.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ServerTimes {
    /// Waiting at the prefill node, microseconds.
    pub queue_us: u64,
    /// From its first step to the first token, microseconds.
    pub compute_us: u64,
    /// From submission in the gateway to the first token there, microseconds.
    pub ttft_us: u64,
    /// Reading the request's body, in the gateway, microseconds.
    #[serde(default)]
    pub read_us: u64,
    /// Checking and tokenizing it, microseconds.
    #[serde(default)]
    pub parse_us: u64,
    /// From submission until the ticket left, microseconds.
    #[serde(default)]
    pub route_us: u64,
    /// From the first token's arrival in the gateway until it was handed to HTTP, and admission, microseconds.
    #[serde(default)]
    pub write_us: u64,
    /// From the request's head to the first token handed to HTTP, in the gateway, microseconds; `ttft_us` where it does not say.
    #[serde(default)]
    pub gateway_us: u64,
    /// The same in the front before it, microseconds; 0 without one.
    #[serde(default)]
    pub front_us: u64,
    /// From submission to the end, microseconds.
    pub total_us: u64,
    /// The hand-over's time that computing did not hide, microseconds.
    pub exposed_us: u64,
    /// KV bytes moved.
    pub moved_bytes: u64,
    /// Tickets made.
    pub attempts: u16,
    /// Who computed the prompt.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub prefill: String,
    /// Who decoded.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub decode: String,
}

impl ServerTimes {
    /// From the ticket's leaving to the first token's arrival in the gateway, without what the node did: the ways there and back, and the
    /// waits at their ends. Two clocks, each of which measured its own part.
    #[must_use]
    pub fn links_us(&self) -> u64 {
        self.ttft_us.saturating_sub(self.route_us + self.queue_us + self.compute_us)
    }

    /// All of the time to the first token that the server measured.
    #[must_use]
    pub fn known_us(&self) -> u64 {
        self.gateway_us.max(self.front_us)
    }
}

/// One request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its number in the plan.
    pub i: u32,
    /// Its class.
    pub class: u16,
    /// When it was due.
    pub due_ns: u64,
    /// When the generator took it up; connecting, if it must, comes after.
    pub sent_ns: u64,
    /// When it had a connection; 0 without one.
    #[serde(default)]
    pub connected_ns: u64,
    /// When the first token was there; 0 without one.
    #[serde(default)]
    pub first_ns: u64,
    /// When the last token was there.
    #[serde(default)]
    pub last_ns: u64,
    /// When the answer, or its failure, was complete.
    pub end_ns: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Tokens of the prompt, as the server counts.
    pub prompt_tokens: u32,
    /// Tokens of the answer, as the server counts.
    pub output_tokens: u32,
    /// Tokens of the prompt that the server had; `None` when it does not say.
    pub cached_tokens: Option<u32>,
    /// Between each two chunks with content, microseconds; empty also when there are too many to keep.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gaps_us: Vec<u32>,
    /// The longest of them, microseconds.
    #[serde(default)]
    pub gap_max_us: u32,
    /// Chunks with content.
    pub chunks: u32,
    /// Digest of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<u64>,
    /// What the server says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<ServerTimes>,
}

const MILLION: f64 = 1e6;

impl Record {
    /// Whether the whole answer came.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.outcome == Outcome::Ok
    }

    /// Whether it was sent late, milliseconds.
    #[must_use]
    pub fn lag_ms(&self) -> f64 {
        self.sent_ns.saturating_sub(self.due_ns) as f64 / MILLION
    }

    /// From the due time to the first token, milliseconds.
    #[must_use]
    pub fn ttft_ms(&self) -> Option<f64> {
        (self.first_ns > 0).then(|| self.first_ns.saturating_sub(self.due_ns) as f64 / MILLION)
    }

    /// From sending to the first token, milliseconds.
    #[must_use]
    pub fn ttft_sent_ms(&self) -> Option<f64> {
        (self.first_ns > 0).then(|| self.first_ns.saturating_sub(self.sent_ns) as f64 / MILLION)
    }

    /// From the due time to the end, milliseconds.
    #[must_use]
    pub fn e2e_ms(&self) -> f64 {
        self.end_ns.saturating_sub(self.due_ns) as f64 / MILLION
    }

    /// From sending to the end, milliseconds.
    #[must_use]
    pub fn e2e_sent_ms(&self) -> f64 {
        self.end_ns.saturating_sub(self.sent_ns) as f64 / MILLION
    }

    /// Time for each token after the first, by the server's count, milliseconds; `None` of fewer than two.
    #[must_use]
    pub fn tpot_ms(&self) -> Option<f64> {
        let span = self.last_ns.saturating_sub(self.first_ns) as f64 / MILLION;
        (self.output_tokens > 1 && self.first_ns > 0).then(|| span / f64::from(self.output_tokens - 1))
    }

    /// From sending to a connection, milliseconds.
    #[must_use]
    pub fn connect_ms(&self) -> f64 {
        self.connected_ns.saturating_sub(self.sent_ns) as f64 / MILLION
    }
}

/// The digest of an answer: of its token ids if the server gave them, else of its text.
#[derive(Debug, Default)]
pub struct Digest(blake3::Hasher);

impl Digest {
    /// Adds tokens.
    pub fn tokens(&mut self, tokens: &[u32]) {
        for token in tokens {
            self.0.update(&token.to_le_bytes());
        }
    }

    /// Adds text.
    pub fn text(&mut self, text: &str) {
        self.0.update(text.as_bytes());
    }

    /// The first 53 bits: a number that JSON carries whole.
    #[must_use]
    pub fn value(&self) -> u64 {
        let bytes = *self.0.finalize().as_bytes();
        u64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], 0]) & ((1 << 53) - 1)
    }
}
