//! The demo's client of the OpenAI API: asks, and reads the answer event by event. An answer that does not reach `[DONE]` is an error.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde_json::{Value, json};

use crate::ctl::front::{HttpClient, http_client};

/// Bytes of one event.
const EVENT_BYTES_MAX: usize = 1 << 20;
/// Characters of an error's body that are shown.
const ERROR_CHARS_MAX: usize = 400;

/// A client of one cluster.
pub struct Talk {
    client: HttpClient,
    base: String,
    model: String,
}

/// A whole answer.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// OpenAI's `usage`.
    pub usage: Value,
    /// Millrace's own figures.
    pub timings: Value,
    /// Time from the question to the first token, as the client saw it.
    pub ttft: Duration,
    /// Time from the first token to the last.
    pub generation: Duration,
}

impl Talk {
    /// A client of the cluster served at `http`; asks what it serves.
    ///
    /// # Errors
    /// It serves nothing.
    pub async fn new(http: SocketAddr) -> Result<Self> {
        let (client, base) = (http_client(), format!("http://{http}"));
        let request = hyper::Request::get(format!("{base}/v1/models")).body(Full::default()).context("a request")?;
        let body = client.request(request).await?.into_body().collect().await?.to_bytes();
        let models: Value = serde_json::from_slice(&body).context("the list of models")?;
        let model = models["data"][0]["id"].as_str().context("no model is served")?.to_owned();
        Ok(Self { client, base, model })
    }

    /// Asks; the answer is streamed. `body` has the messages and limits; the rest is added.
    ///
    /// # Errors
    /// The cluster refuses.
    pub async fn ask(&self, mut body: Value) -> Result<Running> {
        let ours = json!({"model": self.model, "temperature": 0, "stream": true,
            "stream_options": {"include_usage": true}, "millrace_timings": true});
        if let (Some(body), Value::Object(ours)) = (body.as_object_mut(), ours) {
            body.extend(ours);
        }
        let request = hyper::Request::post(format!("{}/v1/chat/completions", self.base))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .context("a request")?;
        let asked = Instant::now();
        let response = self.client.request(request).await?;
        let status = response.status();
        if !status.is_success() {
            let text = response.into_body().collect().await?.to_bytes();
            let text: String = String::from_utf8_lossy(&text).chars().take(ERROR_CHARS_MAX).collect();
            bail!("the cluster answers {status}: {text}");
        }
        Ok(Running { body: response.into_body(), parser: Parser::default(), asked, first: None, last: asked })
    }

    /// Asks and waits for the whole answer.
    ///
    /// # Errors
    /// As [`Talk::ask`] and [`Running::next`].
    pub async fn ask_whole(&self, body: Value) -> Result<Answer> {
        let mut running = self.ask(body).await?;
        while running.next().await?.is_some() {}
        Ok(running.answer())
    }
}

/// An answer on its way.
pub struct Running {
    body: Incoming,
    parser: Parser,
    asked: Instant,
    first: Option<Instant>,
    last: Instant,
}

impl Running {
    /// The next piece of text, which may be empty; `None` after the end.
    ///
    /// # Errors
    /// The stream ends without `[DONE]`, or with an error event.
    pub async fn next(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(event) = self.parser.event()? {
                let text = self.parser.read(&event)?;
                if self.parser.done {
                    return Ok(None);
                }
                if let Some(text) = text {
                    self.last = Instant::now();
                    self.first.get_or_insert(self.last);
                    return Ok(Some(text));
                }
                continue;
            }
            let frame = self.body.frame().await.context("the stream ended without [DONE]")?.context("the stream broke")?;
            self.parser.pending.extend_from_slice(&frame.into_data().unwrap_or_default());
        }
    }

    /// Tokens so far.
    #[must_use]
    pub fn tokens(&self) -> u32 {
        self.parser.tokens
    }

    /// All that was said.
    #[must_use]
    pub fn answer(self) -> Answer {
        let first = self.first.unwrap_or(self.last);
        let mut answer = self.parser.answer;
        (answer.ttft, answer.generation) = (first - self.asked, self.last - first);
        answer
    }
}

/// Events out of bytes, and an answer out of events.
#[derive(Default)]
struct Parser {
    pending: BytesMut,
    answer: Answer,
    tokens: u32,
    done: bool,
}

impl Parser {
    /// The data of the next whole event.
    fn event(&mut self) -> Result<Option<String>> {
        let Some(end) = self.pending.windows(2).position(|pair| pair == b"\n\n") else {
            ensure!(self.pending.len() <= EVENT_BYTES_MAX, "an event has more than {EVENT_BYTES_MAX} bytes");
            return Ok(None);
        };
        let event = self.pending.split_to(end + 2);
        let text = std::str::from_utf8(&event).context("an event is no text")?;
        Ok(Some(text.trim_end().strip_prefix("data: ").unwrap_or_default().to_owned()))
    }

    /// Takes an event; gives the text of a token.
    fn read(&mut self, data: &str) -> Result<Option<String>> {
        if data == "[DONE]" {
            self.done = true;
            return Ok(None);
        }
        let value: Value = serde_json::from_str(data).with_context(|| format!("an event is no JSON: {data:?}"))?;
        if let Some(error) = value.get("error") {
            bail!("the stream ended with an error: {}", error["message"].as_str().unwrap_or("of no name"));
        }
        for (field, place) in [("usage", &mut self.answer.usage), ("millrace", &mut self.answer.timings)] {
            if let Some(figures) = value.get(field).filter(|figures| figures.is_object()) {
                *place = figures.clone();
            }
        }
        let Some(choice) = value["choices"].get(0) else { return Ok(None) };
        let text = choice["delta"]["content"].as_str().unwrap_or_default();
        self.answer.text.push_str(text);
        // The first chunk says who speaks and the last why it ended; neither is a token.
        let token = choice["delta"].get("role").is_none() && choice["finish_reason"].is_null();
        self.tokens += u32::from(token);
        Ok((token || !text.is_empty()).then(|| text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(parser: &mut Parser, bytes: &[u8]) -> Result<Vec<String>> {
        parser.pending.extend_from_slice(bytes);
        let mut texts = Vec::new();
        while let Some(event) = parser.event()? {
            texts.extend(parser.read(&event)?);
        }
        Ok(texts)
    }

    #[test]
    fn an_answer_is_read_wherever_its_bytes_are_cut() {
        let stream = concat!(
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"Grüß\"},\"finish_reason\":null}],\"usage\":null}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"\"},\"finish_reason\":null}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"!\"},\"finish_reason\":\"stop\"}],\"millrace\":{\"attempts\":1}}\n\n",
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7}}\n\n",
            "data: [DONE]\n\n",
        )
        .as_bytes();
        for cut in 0..stream.len() {
            let mut parser = Parser::default();
            let mut texts = feed(&mut parser, &stream[..cut]).unwrap();
            texts.extend(feed(&mut parser, &stream[cut..]).unwrap());
            assert_eq!(texts, ["Grüß", "", "!"]);
            assert_eq!((parser.answer.text.as_str(), parser.tokens, parser.done), ("Grüß!", 2, true));
            assert_eq!((&parser.answer.usage["prompt_tokens"], &parser.answer.timings["attempts"]), (&json!(7), &json!(1)));
        }
    }

    #[test]
    fn an_error_event_and_nonsense_are_errors() {
        let error = feed(&mut Parser::default(), b"data: {\"error\":{\"message\":\"gone\"}}\n\n").unwrap_err();
        assert!(error.to_string().contains("gone"));
        assert!(feed(&mut Parser::default(), b"data: {\n\n").is_err());
        assert!(feed(&mut Parser::default(), &vec![b'x'; EVENT_BYTES_MAX + 1]).is_err());
    }
}
