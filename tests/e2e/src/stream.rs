//! Answers that come as server-sent events, and what they add up to.

use std::net::SocketAddr;

use serde_json::Value;

use crate::http::{self, Response};

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A JSON chunk.
    Chunk(Value),
    /// `[DONE]`.
    Done,
}

/// An answer on its way. Dropping it is a client that goes away.
#[derive(Debug)]
pub struct Events {
    response: Response,
    buffer: String,
}

/// How an answer ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum End {
    /// Not yet.
    #[default]
    Open,
    /// With a finish reason and `[DONE]`.
    Whole,
    /// With one error of OpenAI's shape: its `error` object.
    Error(Value),
    /// In a way that no client can understand.
    Broken(String),
}

/// What an answer added up to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Every chunk, in order.
    pub chunks: Vec<Value>,
    /// Token ids, if they were asked for.
    pub ids: Vec<u32>,
    /// Text.
    pub text: String,
    /// The finish reason.
    pub finish: Option<String>,
    /// The usage, if it was asked for.
    pub usage: Value,
    /// Where the time went, if that was asked for.
    pub timings: Value,
    /// How it ended.
    pub end: End,
}

impl Events {
    /// Asks for a stream.
    ///
    /// # Errors
    /// No stream comes: why, with status and body.
    pub async fn open(at: SocketAddr, path: &str, body: &Value) -> Result<Self, String> {
        Self::open_as(at, path, body, None).await
    }

    /// [`Events::open`], with an API key if there is one.
    ///
    /// # Errors
    /// As [`Events::open`].
    pub async fn open_as(at: SocketAddr, path: &str, body: &Value, key: Option<&str>) -> Result<Self, String> {
        let mut response = http::open_as(at, "POST", path, body.to_string(), key).await?;
        let kind = response.headers.get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if response.status == 200 && kind.starts_with("text/event-stream") {
            return Ok(Self { response, buffer: String::new() });
        }
        let mut text = String::new();
        while let Some(piece) = response.piece().await? {
            text.push_str(&String::from_utf8_lossy(&piece));
        }
        Err(format!("no stream: {} {text}", response.status))
    }

    /// The next event, `None` at the end of the body.
    ///
    /// # Errors
    /// The stream broke, or is no stream of events.
    pub async fn next(&mut self) -> Result<Option<Event>, String> {
        loop {
            if let Some((event, rest)) = self.buffer.split_once("\n\n") {
                let (event, rest) = (event.to_owned(), rest.to_owned());
                self.buffer = rest;
                if let Some(event) = parse(&event)? {
                    return Ok(Some(event));
                }
            } else if let Some(piece) = self.response.piece().await? {
                self.buffer.push_str(std::str::from_utf8(&piece).map_err(|e| e.to_string())?);
            } else if self.buffer.trim().is_empty() {
                return Ok(None);
            } else {
                return Err(format!("half an event at the end: {:?}", self.buffer));
            }
        }
    }

    /// Everything that still comes, added to what came.
    pub async fn collect(mut self, mut answer: Answer) -> Answer {
        loop {
            let reason = match self.next().await {
                Ok(Some(event)) => {
                    answer.add(event);
                    continue;
                }
                Ok(None) => "the stream ended without a word".into(),
                Err(reason) => reason,
            };
            if answer.end == End::Open {
                answer.end = End::Broken(reason);
            }
            return answer;
        }
    }
}

fn parse(event: &str) -> Result<Option<Event>, String> {
    if event.lines().all(|line| line.starts_with(':') || line.is_empty()) {
        return Ok(None);
    }
    match event.strip_prefix("data: ") {
        Some("[DONE]") => Ok(Some(Event::Done)),
        Some(data) => serde_json::from_str(data).map(|chunk| Some(Event::Chunk(chunk))).map_err(|e| format!("{e}: {data:?}")),
        None => Err(format!("no event: {event:?}")),
    }
}

impl Answer {
    /// Takes the next event in.
    pub fn add(&mut self, event: Event) {
        self.end = match (&self.end, event) {
            (End::Open, Event::Chunk(chunk)) => {
                let end = self.chunk(&chunk);
                self.chunks.push(chunk);
                end
            }
            (End::Open, Event::Done) if self.finish.is_some() => End::Whole,
            (End::Open, Event::Done) => End::Broken("[DONE] before a finish reason".into()),
            (end, event) => End::Broken(format!("{event:?} came after {end:?}")),
        };
    }

    fn chunk(&mut self, chunk: &Value) -> End {
        if chunk.get("error").is_some() {
            return http::error_shape(chunk).map_or_else(End::Broken, End::Error);
        }
        let choice = &chunk["choices"][0];
        let text = choice["text"].as_str().or(choice["delta"]["content"].as_str());
        self.text.push_str(text.unwrap_or_default());
        let ids = choice["token_ids"].as_array().into_iter().flatten();
        self.ids.extend(ids.filter_map(Value::as_u64).map(|id| id as u32));
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.finish = Some(reason.to_owned());
        }
        for (kept, key) in [(&mut self.usage, "usage"), (&mut self.timings, "millrace")] {
            if !chunk[key].is_null() {
                kept.clone_from(&chunk[key]);
            }
        }
        End::Open
    }
}

/// Streams an answer from its beginning to its end.
pub async fn complete(at: SocketAddr, path: &str, body: &Value) -> Answer {
    match Events::open(at, path, body).await {
        Ok(events) => events.collect(Answer::default()).await,
        Err(reason) => Answer { end: End::Broken(reason), ..Answer::default() },
    }
}
