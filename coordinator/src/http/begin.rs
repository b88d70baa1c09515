//! Starts the choices of a request, or goes on with those that another gateway began.

use std::time::Duration;

use bytes::Bytes;
use millrace_core::ids::TokenId;

use super::answer::{Choice, Transcript};
use super::error::ApiError;
use super::front::{Given, Order, Resume};
use super::limits::Permit;
use super::metrics::TenantMeter;
use super::request::{REQUEST_BUDGET, Wanted};
use super::respond::{Choices, Envelope, add};
use crate::App;
use crate::dispatch::{Delivered, Prompt, Usage};

/// A request that is about to run.
pub(super) struct Begin {
    wanted: Wanted,
    order: Option<Order>,
    resumed: bool,
    /// One for each prompt: its transcript so far, and what the client has of it.
    parts: Vec<(Transcript, Given)>,
}

/// Whose request it is, and what comes with it beside its body.
pub(super) struct Context<'a> {
    pub tenant: &'a str,
    pub ttft_max: Option<Duration>,
    pub trace: [u8; 25],
    pub meter: TenantMeter,
    pub permit: Permit,
}

/// Takes what a front hands over off the beginning of `body`.
///
/// # Errors
/// It is not what a front writes.
pub(super) fn resume(order: Option<Order>, body: &mut Bytes) -> Result<Option<Resume>, ApiError> {
    let length = order.map_or(0, |order| order.resume_bytes);
    if length == 0 {
        return Ok(None);
    }
    let malformed = |why: &dyn std::fmt::Display| ApiError::invalid(None, format!("what is to be resumed: {why}"));
    if length > body.len() {
        return Err(malformed(&"the body is too short"));
    }
    serde_json::from_slice(&body.split_to(length)).map(Some).map_err(|e| malformed(&e))
}

impl Begin {
    /// Goes over what the client has already. O(its tokens).
    ///
    /// # Errors
    /// The client cannot have what `resume` says.
    pub(super) fn new(app: &App, mut wanted: Wanted, order: Option<Order>, resume: Option<Resume>) -> Result<Self, ApiError> {
        if let Some(order) = order.filter(|_| !wanted.seeded) {
            wanted.sampling.seed = order.seed;
        }
        let resumed = resume.is_some();
        let mut given = resume.unwrap_or_default().choices;
        check(app, &wanted, resumed, &given)?;
        given.resize_with(wanted.prompts.len(), Given::default);
        let part = |(prompt, given): (&Vec<TokenId>, Given)| {
            let mut transcript = Transcript::new(&app.checkpoint, &wanted.shape, prompt.len(), wanted.sampling.ignore_eos);
            if !given.tokens.is_empty() {
                transcript.replay(&given, &wanted.sampling);
            }
            (transcript, given)
        };
        let parts = wanted.prompts.iter().zip(given).map(part).collect();
        Ok(Self { wanted, order, resumed, parts })
    }

    /// Requests, and tokens of their prompts together.
    pub(super) fn size(&self) -> (u32, u64) {
        let prompts = &self.wanted.prompts;
        (prompts.len() as u32, prompts.iter().map(Vec::len).sum::<usize>() as u64)
    }

    /// Submits what is not over yet.
    ///
    /// # Errors
    /// The first choice that is refused; nothing runs then.
    pub(super) fn start(self, app: &App, context: Context) -> Result<(Envelope, Choices), ApiError> {
        let Wanted { prompts, sampling, cache_salt, shape, .. } = self.wanted;
        let Context { tenant, ttft_max, trace, meter, permit } = context;
        // The first token of what is resumed came long ago.
        let ttft_max = ttft_max.filter(|_| !self.resumed);
        let mut choices = Choices { resumed: self.resumed, ..Choices::default() };
        let answer = self.order.as_ref().map(|order| order.id);
        let mut first = None;
        for (index, (tokens, (transcript, given))) in prompts.into_iter().zip(self.parts).enumerate() {
            if given.ended {
                add(&mut choices.ended, &took(&tokens, &given));
                continue;
            }
            let mut running = None;
            if !transcript.is_over() {
                let (sampling, tenant, cache_salt) = (sampling.clone(), tenant.to_owned(), cache_salt.clone());
                let prompt = Prompt { tokens, sampling, tenant, cache_salt, budget: REQUEST_BUDGET, ttft_max, answer, trace };
                let delivered = Delivered { tokens: given.tokens, cached_tokens: given.cached_tokens };
                let submitted = app.dispatcher.resume(prompt, delivered)?;
                first.get_or_insert(submitted.id().0);
                running = Some(submitted);
            }
            choices.open.push((index, Choice::new(running, transcript)));
        }
        let model = &app.model.name;
        let envelope = match &self.order {
            Some(order) => Envelope::carried(order, model, shape, meter, permit),
            None => Envelope::new(first.unwrap_or_default(), model, shape, meter, permit),
        };
        Ok((envelope, choices))
    }
}

/// What a choice took that is over.
fn took(prompt: &[TokenId], given: &Given) -> Usage {
    let (prompt_tokens, completion_tokens) = (prompt.len() as u32, given.tokens.len() as u32);
    Usage { prompt_tokens, completion_tokens, cached_tokens: given.cached_tokens, ..Usage::default() }
}

/// A sender can only spoil its own answer; what is checked here is what the code behind relies on.
fn check(app: &App, wanted: &Wanted, resumed: bool, given: &[Given]) -> Result<(), ApiError> {
    let refuse = |why: &str| Err(ApiError::invalid(None, format!("what is to be resumed: {why}")));
    let vocab = app.checkpoint.config.vocab_size;
    if resumed && !wanted.shape.stream {
        return refuse("only a stream can be");
    }
    if given.len() > wanted.prompts.len() {
        return refuse("more choices than prompts");
    }
    if given.iter().any(|given| given.tokens.len() > wanted.sampling.max_new as usize) {
        return refuse("more tokens than were asked for");
    }
    if given.iter().flat_map(|given| &given.tokens).any(|token| *token as usize >= vocab) {
        return refuse("no token ids");
    }
    let cached = |(prompt, given): (&Vec<TokenId>, &Given)| given.cached_tokens as usize > prompt.len();
    if wanted.prompts.iter().zip(given).any(cached) {
        return refuse("more cached tokens than the prompt has");
    }
    Ok(())
}
