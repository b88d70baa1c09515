//! Sends one request and listens to its answer. `body` writes requests, `pool` keeps connections, `sse` reads events.

pub mod body;
pub mod pool;
pub mod sse;

use std::time::Instant;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, StatusCode};

use self::pool::Pool;
use self::sse::{Chunk, Events, Malformed};
use super::record::{Digest, Outcome, Record, ServerTimes};

/// What a session needs of an answer, and its digest.
#[derive(Debug, Default)]
pub struct Answer {
    /// Its tokens, if the server gave them.
    pub tokens: Vec<u32>,
    /// Its text.
    pub text: String,
}

/// How to listen.
#[derive(Clone, Copy, Debug)]
pub struct Listening {
    /// The beginning of all times.
    pub started: Instant,
    /// Whether every gap between chunks is kept.
    pub keep_gaps: bool,
    /// Tokens that the answer must have.
    pub tokens: u32,
}

impl Listening {
    /// Nanoseconds since the start, at least 1.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        (self.started.elapsed().as_nanos() as u64).max(1)
    }
}

/// Sends `request` and fills in `record` and `answer` as the answer comes, so that what came is there also when this future is dropped.
pub async fn exchange(
    pool: &Pool,
    request: Request<Full<Bytes>>,
    how: Listening,
    record: &mut Record,
    answer: &mut Answer,
) -> Outcome {
    let Ok(mut sender) = pool.take().await else { return Outcome::Connect };
    record.connected_ns = how.now_ns();
    let response = match sender.try_send_request(request).await {
        Ok(response) => response,
        // A kept connection that the server closed meanwhile gives the request back: it was not sent.
        Err(mut error) => match error.take_message() {
            Some(request) => match pool.connect().await {
                Ok(fresh) => {
                    sender = fresh;
                    record.connected_ns = how.now_ns();
                    match sender.send_request(request).await {
                        Ok(response) => response,
                        Err(_) => return Outcome::Closed,
                    }
                }
                Err(_) => return Outcome::Connect,
            },
            None => return Outcome::Closed,
        },
    };
    if response.status() != StatusCode::OK {
        return Outcome::Status(response.status().as_u16());
    }
    let mut listener = Listener { how, record, answer, digest: Digest::default(), error: None, done: false, counted: 0 };
    let result = listener.listen(response).await;
    let outcome = listener.conclude(result);
    if outcome != Outcome::Closed {
        pool.give(sender);
    }
    outcome
}

struct Listener<'a> {
    how: Listening,
    record: &'a mut Record,
    answer: &'a mut Answer,
    digest: Digest,
    error: Option<String>,
    done: bool,
    counted: u32,
}

impl Listener<'_> {
    async fn listen(&mut self, response: Response<hyper::body::Incoming>) -> Result<(), Outcome> {
        let (mut body, mut events) = (response.into_body(), Events::default());
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| Outcome::Closed)?;
            let now_ns = self.how.now_ns();
            if let Some(bytes) = frame.data_ref() {
                events.push(bytes, |data| self.event(data, now_ns)).map_err(|Malformed| Outcome::Malformed)?;
            }
        }
        Ok(())
    }

    fn event(&mut self, data: &[u8], now_ns: u64) -> Result<(), Malformed> {
        if data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_slice(data).map_err(|_| Malformed)?;
        if let Some(error) = chunk.error {
            self.error = Some(error.code.as_str().map_or_else(|| error.code.to_string(), str::to_owned));
        }
        if let Some(usage) = chunk.usage {
            self.record.prompt_tokens = usage.prompt_tokens;
            self.record.output_tokens = usage.completion_tokens;
            self.record.cached_tokens = usage.prompt_tokens_details.and_then(|details| details.cached_tokens);
        }
        if let Some(timings) = chunk.millrace {
            let front_us = chunk.millrace_front.map_or(0, |front| front.ttft_us);
            self.record.server = Some(ServerTimes { front_us, ..timings.into() });
        }
        for choice in chunk.choices {
            let text = choice.text.or(choice.delta.and_then(|delta| delta.content)).unwrap_or_default();
            let tokens = choice.token_ids.unwrap_or_default();
            if !text.is_empty() || !tokens.is_empty() {
                self.content(&text, &tokens, now_ns);
            }
            self.done |= choice.finish_reason.is_some();
        }
        Ok(())
    }

    fn content(&mut self, text: &str, tokens: &[u32], now_ns: u64) {
        let record = &mut *self.record;
        if record.first_ns == 0 {
            record.first_ns = now_ns;
        } else {
            let gap_us = u32::try_from((now_ns - record.last_ns) / 1000).unwrap_or(u32::MAX);
            record.gap_max_us = record.gap_max_us.max(gap_us);
            if self.how.keep_gaps {
                record.gaps_us.push(gap_us);
            }
        }
        record.last_ns = now_ns;
        record.chunks += 1;
        self.counted += (tokens.len() as u32).max(1);
        // Ids where the server gives them, else text: never both, so that the digest says one thing.
        if tokens.is_empty() {
            self.digest.text(text)
        } else {
            self.digest.tokens(tokens)
        }
        self.answer.tokens.extend_from_slice(tokens);
        self.answer.text.push_str(text);
    }

    fn conclude(&mut self, result: Result<(), Outcome>) -> Outcome {
        if self.record.output_tokens == 0 {
            self.record.output_tokens = self.counted;
        }
        self.record.answer = (self.counted > 0).then(|| self.digest.value());
        match (result, self.error.take()) {
            (Err(outcome), _) => outcome,
            (_, Some(code)) => Outcome::Event(code),
            _ if !self.done => Outcome::Closed,
            _ if self.record.output_tokens < self.how.tokens => Outcome::Short,
            _ => Outcome::Ok,
        }
    }
}
