//! One choice of an answer: tokens in, text out, until its end. Knows nothing of HTTP.
//!
//! A choice that another gateway began is gone over again first: the same tokens bring the decoder and the stop strings into the
//! same state, so that the text goes on where the client has it.

use millrace_checkpoint::{Checkpoint, DecodeStream};
use millrace_core::ids::TokenId;
use millrace_core::message::{Finish, PrefillStats};
use millrace_core::sampling::Sampling;

use super::error::ApiError;
use super::front::Given;
use super::request::Shape;
use super::stop::StopFilter;
use crate::dispatch::{Event, Running, Usage};

/// What a choice has to say next.
#[derive(Debug)]
pub enum Piece {
    /// One token, and the text that is certain now; may be empty.
    Token {
        /// The token.
        token: TokenId,
        /// The text.
        text: String,
    },
    /// The end.
    End {
        /// Text that was held back.
        text: String,
        /// OpenAI's word for why.
        reason: &'static str,
        /// What it took.
        usage: Box<Usage>,
    },
    /// The end, badly.
    Failed(ApiError),
}

/// Why a choice is over before the dispatcher has said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    /// A stop string was found; what follows it is not wanted.
    StopString,
    /// The client has every token already; this is OpenAI's word for why the answer ends.
    Whole(&'static str),
}

/// Turns the tokens of a choice into text.
pub struct Transcript {
    text: Option<DecodeStream>,
    stops: StopFilter,
    usage: Usage,
    over: Option<Over>,
    ignore_eos: bool,
    eos: Vec<TokenId>,
}

impl Transcript {
    /// The transcript of a choice that begins.
    #[must_use]
    pub fn new(checkpoint: &Checkpoint, shape: &Shape, prompt_tokens: usize, ignore_eos: bool) -> Self {
        Self {
            text: checkpoint.text.as_ref().map(millrace_checkpoint::TextCodec::decode_stream),
            stops: StopFilter::new(shape.stops.clone()),
            usage: Usage { prompt_tokens: prompt_tokens as u32, ..Usage::default() },
            over: None,
            ignore_eos,
            eos: checkpoint.config.eos.clone(),
        }
    }

    /// Goes over what the client has already. O(tokens).
    pub fn replay(&mut self, given: &Given, sampling: &Sampling) {
        for token in &given.tokens {
            self.token(*token);
        }
        let ends = given.tokens.last().is_some_and(|token| sampling.is_end(*token));
        let full = given.tokens.len() >= sampling.max_new as usize;
        let whole = if ends { Some(Over::Whole("stop")) } else { full.then_some(Over::Whole("length")) };
        self.over = self.over.or(whole);
        self.usage.cached_tokens = given.cached_tokens;
        self.usage.timings.attempts = 1;
    }

    /// Whether no further token is wanted.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over.is_some()
    }

    fn prefilled(&mut self, stats: PrefillStats) {
        if self.usage.completion_tokens == 0 {
            self.usage.cached_tokens = stats.cached_tokens;
        }
        self.usage.timings.prefill = Some(stats);
        self.usage.timings.attempts += 1;
    }

    fn token(&mut self, token: TokenId) -> Piece {
        self.usage.completion_tokens += 1;
        let ends = !self.ignore_eos && self.eos.contains(&token);
        let decoded = if ends { None } else { self.text.as_mut().and_then(|text| text.push(token)) };
        let passed = self.stops.push(&decoded.unwrap_or_default());
        if passed.stopped {
            self.over = Some(Over::StopString);
        }
        Piece::Token { token, text: passed.text }
    }

    fn flush(&mut self) -> String {
        let rest = self.text.as_mut().and_then(DecodeStream::flush).unwrap_or_default();
        let passed = self.stops.push(&rest);
        if passed.stopped { passed.text } else { passed.text + &self.stops.flush() }
    }

    fn end(&mut self, over: Over) -> Piece {
        let usage = Box::new(std::mem::take(&mut self.usage));
        match over {
            Over::StopString => Piece::End { text: String::new(), reason: "stop", usage },
            Over::Whole(reason) => Piece::End { text: self.flush(), reason, usage },
        }
    }
}

/// A choice on its way. Dropping it cancels its request.
pub struct Choice {
    running: Option<Running>,
    transcript: Transcript,
}

impl Choice {
    /// The choice of a submitted request; `None` for one whose transcript is over.
    #[must_use]
    pub fn new(running: Option<Running>, transcript: Transcript) -> Self {
        Self { running, transcript }
    }

    /// Tokens of the prompt that the first attempt found cached, as far as is known.
    #[must_use]
    pub fn cached_tokens(&self) -> u32 {
        self.transcript.usage.cached_tokens
    }

    /// What comes next; `None` after the end. Cancel-safe.
    pub async fn next(&mut self) -> Option<Piece> {
        if let Some(over) = self.transcript.over.take() {
            self.running = None;
            return Some(self.transcript.end(over));
        }
        loop {
            let Some(event) = self.running.as_mut()?.next().await else {
                self.running = None;
                let detail = "the request ended without a word";
                return Some(Piece::Failed(ApiError::failed(crate::dispatch::FailureKind::Stopping, detail)));
            };
            if let Some(piece) = self.take(event) {
                return Some(piece);
            }
        }
    }

    fn take(&mut self, event: Event) -> Option<Piece> {
        match event {
            Event::Prefilled(stats) => {
                self.transcript.prefilled(*stats);
                None
            }
            Event::Token { token, .. } => Some(self.transcript.token(token)),
            Event::Finished { finish, usage } => {
                self.running = None;
                let reason = match finish {
                    Finish::Stop => "stop",
                    Finish::Length => "length",
                };
                Some(Piece::End { text: self.transcript.flush(), reason, usage })
            }
            Event::Failed { kind, detail } => {
                self.running = None;
                Some(Piece::Failed(ApiError::failed(kind, &detail)))
            }
        }
    }
}
