//! Server-sent events out of a byte stream, and OpenAI chunks out of events. Bounded: an event is at most [`EVENT_BYTES_MAX`].

use serde::Deserialize;

use crate::millload::record::ServerTimes;

/// Bytes of one event; a longer one is malformed.
pub const EVENT_BYTES_MAX: usize = 1 << 20;

/// The stream is no stream of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream is malformed")]
pub struct Malformed;

/// Cuts a byte stream into the data of its events.
#[derive(Debug, Default)]
pub struct Events {
    line: Vec<u8>,
    data: Vec<u8>,
}

impl Events {
    /// Takes bytes and hands on the data of each event that they complete.
    ///
    /// # Errors
    /// An event is too long, or what `each` says.
    pub fn push(&mut self, mut bytes: &[u8], mut each: impl FnMut(&[u8]) -> Result<(), Malformed>) -> Result<(), Malformed> {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.line.extend_from_slice(&bytes[..end]);
            bytes = &bytes[end + 1..];
            self.end_line(&mut each)?;
        }
        self.line.extend_from_slice(bytes);
        if self.line.len() + self.data.len() > EVENT_BYTES_MAX { Err(Malformed) } else { Ok(()) }
    }

    fn end_line(&mut self, each: &mut impl FnMut(&[u8]) -> Result<(), Malformed>) -> Result<(), Malformed> {
        let line = self.line.strip_suffix(b"\r").unwrap_or(&self.line);
        if line.is_empty() {
            let result = if self.data.is_empty() { Ok(()) } else { each(&self.data) };
            self.data.clear();
            self.line.clear();
            return result;
        }
        if let Some(rest) = line.strip_prefix(b"data:") {
            if !self.data.is_empty() {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(rest.strip_prefix(b" ").unwrap_or(rest));
        }
        let too_long = self.data.len() > EVENT_BYTES_MAX;
        self.line.clear();
        if too_long { Err(Malformed) } else { Ok(()) }
    }
}

/// What is read of a chunk; everything else is left alone.
#[derive(Debug, Default, Deserialize)]
pub struct Chunk {
    /// One choice, or none in the chunk with the usage.
    #[serde(default)]
    pub choices: Vec<Choice>,
    /// The counts, in the last chunk.
    pub usage: Option<Usage>,
    /// The answer failed.
    pub error: Option<Failure>,
    /// Where the server's time went.
    pub millrace: Option<Timings>,
    /// The same of a front before it.
    pub millrace_front: Option<Front>,
}

/// A choice of a chunk.
#[derive(Debug, Default, Deserialize)]
pub struct Choice {
    /// Of a completion.
    pub text: Option<String>,
    /// Of a chat.
    pub delta: Option<Delta>,
    /// The tokens of the text, if asked for.
    pub token_ids: Option<Vec<u32>>,
    /// Why it ended.
    pub finish_reason: Option<String>,
}

/// A chat's piece.
#[derive(Debug, Default, Deserialize)]
pub struct Delta {
    /// Its text.
    pub content: Option<String>,
}

/// Counts.
#[derive(Debug, Default, Deserialize)]
pub struct Usage {
    /// Of the prompt.
    #[serde(default)]
    pub prompt_tokens: u32,
    /// Of the answer.
    #[serde(default)]
    pub completion_tokens: u32,
    /// More about the prompt.
    pub prompt_tokens_details: Option<Details>,
}

/// More about the prompt.
#[derive(Debug, Default, Deserialize)]
pub struct Details {
    /// What was in the cache.
    pub cached_tokens: Option<u32>,
}

/// An error in the stream.
#[derive(Debug, Default, Deserialize)]
pub struct Failure {
    /// A word for programs; some servers send a number.
    #[serde(default)]
    pub code: serde_json::Value,
}

/// The `millrace` object.
#[derive(Debug, Default, Deserialize)]
pub struct Timings {
    prefill: Option<Prefill>,
    handover: Option<Handover>,
    gateway: Option<Gateway>,
    decode_node: Option<String>,
    #[serde(default)]
    attempts: u16,
    #[serde(default)]
    ttft_us: u64,
    #[serde(default)]
    total_us: u64,
}

#[derive(Debug, Default, Deserialize)]
struct Prefill {
    #[serde(default)]
    node: String,
    #[serde(default)]
    queue_us: u64,
    #[serde(default)]
    compute_us: u64,
}

#[derive(Debug, Default, Deserialize)]
struct Gateway {
    #[serde(default)]
    read_us: u64,
    #[serde(default)]
    parse_us: u64,
    #[serde(default)]
    route_us: u64,
    write_us: Option<u64>,
    ttft_us: Option<u64>,
}

/// The `millrace_front` object.
#[derive(Debug, Default, Deserialize)]
pub struct Front {
    /// From the request's head to the first token.
    #[serde(default)]
    pub ttft_us: u64,
}

#[derive(Debug, Default, Deserialize)]
struct Handover {
    #[serde(default)]
    bytes: u64,
    #[serde(default)]
    exposed_us: u64,
}

impl From<Timings> for ServerTimes {
    fn from(timings: Timings) -> Self {
        let prefill = timings.prefill.unwrap_or_default();
        let handover = timings.handover.unwrap_or_default();
        let gateway = timings.gateway.unwrap_or_default();
        Self {
            read_us: gateway.read_us,
            parse_us: gateway.parse_us,
            route_us: gateway.route_us,
            write_us: gateway.write_us.unwrap_or(0),
            gateway_us: gateway.ttft_us.unwrap_or(timings.ttft_us),
            front_us: 0,
            queue_us: prefill.queue_us,
            compute_us: prefill.compute_us,
            ttft_us: timings.ttft_us,
            total_us: timings.total_us,
            exposed_us: handover.exposed_us,
            moved_bytes: handover.bytes,
            attempts: timings.attempts,
            prefill: prefill.node,
            decode: timings.decode_node.unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(pieces: &[&[u8]]) -> Result<Vec<String>, Malformed> {
        let (mut events, mut out) = (Events::default(), Vec::new());
        for piece in pieces {
            events.push(piece, |data| {
                out.push(String::from_utf8_lossy(data).into_owned());
                Ok(())
            })?;
        }
        Ok(out)
    }

    #[test]
    fn events_survive_any_cut() {
        let whole: &[u8] = b": hello\ndata: {\"a\":1}\r\n\r\nevent: x\ndata:two\ndata: lines\n\ndata: [DONE]\n\n";
        let want = ["{\"a\":1}", "two\nlines", "[DONE]"];
        for cut in 0..whole.len() {
            assert_eq!(all(&[&whole[..cut], &whole[cut..]]).unwrap(), want, "cut at {cut}");
        }
        let single: Vec<&[u8]> = whole.chunks(1).collect();
        assert_eq!(all(&single).unwrap(), want);
    }

    #[test]
    fn an_event_without_end_is_refused() {
        let long = vec![b'x'; EVENT_BYTES_MAX / 4];
        assert_eq!(all(&[long.as_slice(); 5]), Err(Malformed));
        let lines = vec![&b"data: 0123456789012345678901234567890123456789012345678901234567890123\n"[..]; EVENT_BYTES_MAX / 50];
        assert_eq!(all(&lines), Err(Malformed));
    }

    #[test]
    fn chunks_of_ours_and_of_others_are_read() {
        let ours = r#"{"choices":[{"index":0,"text":"a","token_ids":[5],"finish_reason":"length"}],"usage":null,
            "millrace":{"prefill":{"node":"p-1","queue_us":3,"compute_us":4,"cached_tokens":0},"handover":null,"gateway":{"read_us":1,"parse_us":2,"route_us":1,"write_us":1,"ttft_us":13},"decode_node":"d-1","attempts":1,"ttft_us":9,"total_us":20},"millrace_front":{"ttft_us":15}}"#;
        let chunk: Chunk = serde_json::from_str(ours).unwrap();
        assert_eq!(chunk.choices[0].token_ids.as_deref(), Some(&[5][..]));
        assert_eq!(chunk.millrace_front.unwrap().ttft_us, 15);
        let times = ServerTimes::from(chunk.millrace.unwrap());
        assert_eq!((times.gateway_us, times.links_us()), (13, 1));
        assert_eq!((times.queue_us, times.compute_us, times.ttft_us, times.prefill.as_str()), (3, 4, 9, "p-1"));
        let usage =
            r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":4}}}"#;
        let usage = serde_json::from_str::<Chunk>(usage).unwrap().usage.unwrap();
        assert_eq!((usage.prompt_tokens, usage.prompt_tokens_details.unwrap().cached_tokens), (7, Some(4)));
        let error: Chunk = serde_json::from_str(r#"{"error":{"message":"x","code":"capacity"}}"#).unwrap();
        assert_eq!(error.error.unwrap().code, "capacity");
    }
}
