//! One choice of an answer: tokens in, text out, until its end. Knows nothing of HTTP.

use millrace_checkpoint::{Checkpoint, DecodeStream};
use millrace_core::ids::TokenId;
use millrace_core::message::{Finish, PrefillStats};

use super::error::ApiError;
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

/// A running choice. Dropping it cancels its request.
pub struct Choice {
    running: Option<Running>,
    text: Option<DecodeStream>,
    stops: StopFilter,
    usage: Usage,
    stopped: bool,
    ignore_eos: bool,
    eos: Vec<TokenId>,
}

impl Choice {
    /// The choice of a submitted request.
    #[must_use]
    pub fn new(running: Running, checkpoint: &Checkpoint, shape: &Shape, prompt_tokens: usize, ignore_eos: bool) -> Self {
        Self {
            running: Some(running),
            text: checkpoint.text.as_ref().map(millrace_checkpoint::TextCodec::decode_stream),
            stops: StopFilter::new(shape.stops.clone()),
            usage: Usage { prompt_tokens: prompt_tokens as u32, ..Usage::default() },
            stopped: false,
            ignore_eos,
            eos: checkpoint.config.eos.clone(),
        }
    }

    /// What comes next; `None` after the end. Cancel-safe.
    pub async fn next(&mut self) -> Option<Piece> {
        if self.stopped {
            self.stopped = false;
            self.running = None;
            let usage = Box::new(std::mem::take(&mut self.usage));
            return Some(Piece::End { text: String::new(), reason: "stop", usage });
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
                self.prefilled(*stats);
                None
            }
            Event::Token { token, .. } => Some(self.token(token)),
            Event::Finished { finish, usage } => {
                self.running = None;
                let reason = match finish {
                    Finish::Stop => "stop",
                    Finish::Length => "length",
                };
                Some(Piece::End { text: self.flush(), reason, usage })
            }
            Event::Failed { kind, detail } => {
                self.running = None;
                Some(Piece::Failed(ApiError::failed(kind, &detail)))
            }
        }
    }

    fn prefilled(&mut self, stats: PrefillStats) {
        self.usage.cached_tokens = stats.cached_tokens;
        self.usage.timings.prefill = Some(stats);
        self.usage.timings.attempts = 1;
    }

    fn token(&mut self, token: TokenId) -> Piece {
        self.usage.completion_tokens += 1;
        let ends = !self.ignore_eos && self.eos.contains(&token);
        let decoded = if ends { None } else { self.text.as_mut().and_then(|text| text.push(token)) };
        let passed = self.stops.push(&decoded.unwrap_or_default());
        self.stopped = passed.stopped;
        Piece::Token { token, text: passed.text }
    }

    fn flush(&mut self) -> String {
        let rest = self.text.as_mut().and_then(DecodeStream::flush).unwrap_or_default();
        let passed = self.stops.push(&rest);
        if passed.stopped { passed.text } else { passed.text + &self.stops.flush() }
    }
}
