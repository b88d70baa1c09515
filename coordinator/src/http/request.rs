//! What clients may ask: the OpenAI request bodies, checked field by field into one value that the dispatcher can run.

use std::time::Duration;

use millrace_checkpoint::Checkpoint;
use millrace_core::ids::TokenId;
use millrace_core::sampling::Sampling;
use serde::Deserialize;
use serde_json::Value;

use super::error::ApiError;
use crate::dispatch::CACHE_SALT_BYTES_MAX;

/// Prompts in one completions request.
pub const PROMPTS_MAX: usize = 32;
/// Stop strings of one request, as OpenAI allows.
pub const STOPS_MAX: usize = 4;
/// Bytes of one stop string.
pub const STOP_BYTES_MAX: usize = 512;
/// Tokens of an answer when a completions request names none, as OpenAI has it.
pub const COMPLETION_TOKENS_DEFAULT: u32 = 16;
/// Time for a whole request.
pub const REQUEST_BUDGET: Duration = Duration::from_secs(600);

/// Fields that both kinds of request have.
#[derive(Debug, Deserialize)]
pub struct Common {
    model: Option<String>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    seed: Option<i64>,
    max_tokens: Option<i64>,
    stop: Option<Stop>,
    #[serde(default)]
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<i64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    logit_bias: Option<Value>,
    logprobs: Option<Value>,
    ignore_eos: Option<bool>,
    return_token_ids: Option<bool>,
    cache_salt: Option<String>,
    millrace_timings: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Many(Vec<String>),
}

/// `POST /v1/completions`.
#[derive(Debug, Deserialize)]
pub struct CompletionBody {
    #[serde(flatten)]
    common: Common,
    prompt: Option<Value>,
    echo: Option<bool>,
    suffix: Option<String>,
    best_of: Option<i64>,
}

/// `POST /v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub struct ChatBody {
    #[serde(flatten)]
    common: Common,
    messages: Option<Value>,
    max_completion_tokens: Option<i64>,
    tools: Option<Value>,
    response_format: Option<Value>,
    top_logprobs: Option<i64>,
}

/// How the answer is written.
#[derive(Clone, Debug)]
pub struct Shape {
    /// The kind of response.
    pub chat: bool,
    /// Server-sent events, or one body.
    pub stream: bool,
    /// A last chunk with the usage.
    pub include_usage: bool,
    /// Token ids beside the text.
    pub return_token_ids: bool,
    /// Where the time went, beside the usage.
    pub timings: bool,
    /// Strings that end the answer.
    pub stops: Vec<String>,
}

/// What requests are checked against.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    /// Tokenizer, context, end tokens.
    pub checkpoint: &'a Checkpoint,
    /// The public name of what is served.
    pub model: &'a str,
    /// Tokens of an answer that the caller may ask for; 0 for no limit.
    pub answer_max: u32,
}

/// A request that can be run.
#[derive(Debug)]
pub struct Wanted {
    /// One for each choice.
    pub prompts: Vec<Vec<TokenId>>,
    /// How to draw.
    pub sampling: Sampling,
    /// The client chose the seed.
    pub seeded: bool,
    /// Narrows the sharing of cached blocks.
    pub cache_salt: Vec<u8>,
    /// How the answer is written.
    pub shape: Shape,
}

impl CompletionBody {
    /// Checks everything.
    ///
    /// # Errors
    /// Names the field.
    pub fn check(self, rules: &Rules) -> Result<Wanted, ApiError> {
        refuse_if("echo", self.echo.unwrap_or(false))?;
        refuse_if("suffix", self.suffix.is_some_and(|suffix| !suffix.is_empty()))?;
        refuse_if("best_of", self.best_of.is_some_and(|n| n != 1))?;
        let prompt = self.prompt.ok_or_else(|| ApiError::invalid("prompt", "prompt is required"))?;
        self.common.check_model(rules.model)?;
        let prompts = prompts(rules.checkpoint, prompt)?;
        let max = self.common.max_tokens.map(|n| (n, "max_tokens"));
        self.common.finish(rules, prompts, max, Some(COMPLETION_TOKENS_DEFAULT), false)
    }
}

impl ChatBody {
    /// Checks everything.
    ///
    /// # Errors
    /// Names the field.
    pub fn check(self, rules: &Rules) -> Result<Wanted, ApiError> {
        refuse_if("tools", self.tools.as_ref().is_some_and(|t| t.as_array().is_none_or(|tools| !tools.is_empty())))?;
        let text_only = |f: &Value| f.is_null() || f["type"] == "text";
        refuse_if("response_format", self.response_format.as_ref().is_some_and(|f| !text_only(f)))?;
        refuse_if("top_logprobs", self.top_logprobs.is_some_and(|n| n != 0))?;
        let messages = self.messages.ok_or_else(|| ApiError::invalid("messages", "messages is required"))?;
        self.common.check_model(rules.model)?;
        let text = rules.checkpoint.text.as_ref().ok_or_else(|| no_tokenizer(rules.checkpoint, "messages"))?;
        let (_, tokens) = text.encode_chat(&messages)?;
        let newer = self.max_completion_tokens.map(|n| (n, "max_completion_tokens"));
        let max = newer.or(self.common.max_tokens.map(|n| (n, "max_tokens")));
        self.common.finish(rules, vec![tokens], max, None, true)
    }
}

impl Common {
    fn check_model(&self, served: &str) -> Result<(), ApiError> {
        let asked = self.model.as_deref().ok_or_else(|| ApiError::invalid("model", "model is required"))?;
        if asked == served { Ok(()) } else { Err(ApiError::no_model(asked, served)) }
    }

    fn finish(
        self,
        rules: &Rules,
        prompts: Vec<Vec<TokenId>>,
        max: Option<(i64, &'static str)>,
        default_max: Option<u32>,
        chat: bool,
    ) -> Result<Wanted, ApiError> {
        refuse_if("n", self.n.is_some_and(|n| n != 1))?;
        refuse_if("presence_penalty", self.presence_penalty.is_some_and(|p| p != 0.0))?;
        refuse_if("frequency_penalty", self.frequency_penalty.is_some_and(|p| p != 0.0))?;
        refuse_if("logit_bias", self.logit_bias.as_ref().is_some_and(|b| b.as_object().is_none_or(|b| !b.is_empty())))?;
        refuse_if("logprobs", self.logprobs.as_ref().is_some_and(|l| !l.is_null() && *l != Value::Bool(false)))?;
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let max_new = max_new(rules, longest, max, default_max)?;
        let (sampling, seeded) = (self.sampling(rules.checkpoint, max_new)?, self.seed.is_some());
        let shape = self.shape(chat)?;
        let cache_salt = self.cache_salt.unwrap_or_default().into_bytes();
        if cache_salt.len() > CACHE_SALT_BYTES_MAX {
            return Err(ApiError::invalid("cache_salt", format!("cache_salt is over {CACHE_SALT_BYTES_MAX} bytes")));
        }
        Ok(Wanted { prompts, sampling, seeded, cache_salt, shape })
    }

    fn sampling(&self, checkpoint: &Checkpoint, max_new: u32) -> Result<Sampling, ApiError> {
        let temperature = within("temperature", self.temperature, 1.0, 0.0..=2.0)?;
        let top_p = within("top_p", self.top_p, 1.0, 0.0..=1.0)?;
        // -1 is vLLM's word for "all", 0 ours.
        let top_k = match self.top_k.unwrap_or(0) {
            -1 => 0,
            k @ 0..=1_000_000 => k as u32,
            _ => return Err(ApiError::invalid("top_k", "top_k must be -1, 0 or between 1 and 1000000")),
        };
        let seed = self.seed.map_or_else(rand::random, |seed| seed as u64);
        let ignore_eos = self.ignore_eos.unwrap_or(false);
        Ok(Sampling { temperature, top_p, top_k, seed, max_new, eos: checkpoint.config.eos.clone(), ignore_eos })
    }

    fn shape(&self, chat: bool) -> Result<Shape, ApiError> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop.clone()],
            Some(Stop::Many(stops)) => stops.clone(),
        };
        if stops.len() > STOPS_MAX || stops.iter().any(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX) {
            let message = format!("stop takes up to {STOPS_MAX} strings of 1 to {STOP_BYTES_MAX} bytes");
            return Err(ApiError::invalid("stop", message));
        }
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(ApiError::invalid("stream_options", "stream_options is only allowed with stream: true"));
        }
        let include_usage = self.stream_options.as_ref().and_then(|o| o.include_usage).unwrap_or(false);
        let (return_token_ids, timings) = (self.return_token_ids.unwrap_or(false), self.millrace_timings.unwrap_or(false));
        Ok(Shape { chat, stream, include_usage, return_token_ids, timings, stops })
    }
}

fn refuse_if(param: &'static str, used: bool) -> Result<(), ApiError> {
    if used { Err(ApiError::unsupported(param)) } else { Ok(()) }
}

fn within(param: &'static str, value: Option<f64>, default: f64, range: std::ops::RangeInclusive<f64>) -> Result<f32, ApiError> {
    let value = value.unwrap_or(default);
    if range.contains(&value) {
        return Ok(value as f32);
    }
    Err(ApiError::invalid(param, format!("{param} must be between {} and {}, got {value}", range.start(), range.end())))
}

/// Tokens to generate: what was asked, never past the context or the caller's limit.
fn max_new(rules: &Rules, prompt: usize, asked: Option<(i64, &'static str)>, default: Option<u32>) -> Result<u32, ApiError> {
    let context = rules.checkpoint.config.max_positions;
    let own_max = if rules.answer_max == 0 { u32::MAX } else { rules.answer_max };
    if prompt >= context {
        let message = format!("This model's maximum context length is {context} tokens; the prompt has {prompt} tokens");
        return Err(ApiError { code: "context_length_exceeded", ..ApiError::invalid("prompt", message) });
    }
    let room = context - prompt;
    match asked {
        None => Ok(default.map_or(room, |n| room.min(n as usize)).min(own_max as usize) as u32),
        Some((n, param)) if n < 1 => Err(ApiError::invalid(param, format!("{param} must be at least 1, got {n}"))),
        Some((n, param)) if rules.answer_max > 0 && n as u64 > u64::from(own_max) => {
            Err(ApiError::invalid(param, format!("{n} tokens were asked for, the limit of this API key's tenant is {own_max}")))
        }
        Some((n, _)) if n as u64 <= room as u64 => Ok(n as u32),
        Some((n, param)) => {
            let message = format!(
                "This model's maximum context length is {context} tokens; {n} were asked for beside {prompt} of the prompt"
            );
            Err(ApiError { code: "context_length_exceeded", ..ApiError::invalid(param, message) })
        }
    }
}

fn no_tokenizer(checkpoint: &Checkpoint, param: &'static str) -> ApiError {
    let reason = checkpoint.text_absent().unwrap_or("none was found");
    let message = format!("this model has no tokenizer ({reason}): send `prompt` as a list of token ids to /v1/completions");
    ApiError { code: "no_tokenizer", ..ApiError::invalid(param, message) }
}

/// The four forms of `prompt`: text, token ids, a list of texts, a list of lists of token ids.
fn prompts(checkpoint: &Checkpoint, prompt: Value) -> Result<Vec<Vec<TokenId>>, ApiError> {
    let many = match prompt {
        Value::Array(items) if items.iter().any(|item| item.is_string() || item.is_array()) => items,
        one => vec![one],
    };
    if many.len() > PROMPTS_MAX {
        return Err(ApiError::invalid("prompt", format!("{} prompts in one request, the limit is {PROMPTS_MAX}", many.len())));
    }
    many.into_iter().map(|prompt| one_prompt(checkpoint, prompt)).collect()
}

fn one_prompt(checkpoint: &Checkpoint, prompt: Value) -> Result<Vec<TokenId>, ApiError> {
    let tokens = match prompt {
        Value::String(text) => {
            let codec = checkpoint.text.as_ref().ok_or_else(|| no_tokenizer(checkpoint, "prompt"))?;
            codec.encode(&text)?
        }
        Value::Array(ids) => ids.iter().map(|id| token_id(checkpoint, id)).collect::<Result<_, _>>()?,
        _ => return Err(ApiError::invalid("prompt", "prompt must be a string, a list of token ids, or a list of either")),
    };
    if tokens.is_empty() {
        return Err(ApiError::invalid("prompt", "the prompt is empty"));
    }
    Ok(tokens)
}

fn token_id(checkpoint: &Checkpoint, id: &Value) -> Result<TokenId, ApiError> {
    let vocab = checkpoint.config.vocab_size;
    let valid = id.as_u64().filter(|id| *id < vocab as u64);
    valid.map(|id| id as TokenId).ok_or_else(|| ApiError::invalid("prompt", format!("{id} is not a token id below {vocab}")))
}
