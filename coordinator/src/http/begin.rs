//! Starts the choices of a request, or goes on with those that another gateway began.

use std::time::Duration;

use bytes::Bytes;
use millrace_checkpoint::Checkpoint;
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
    pub(super) fn new(
        checkpoint: &Checkpoint,
        mut wanted: Wanted,
        order: Option<Order>,
        resume: Option<Resume>,
    ) -> Result<Self, ApiError> {
        if let Some(order) = order.filter(|_| !wanted.seeded) {
            wanted.sampling.seed = order.seed;
        }
        let resumed = resume.is_some();
        let mut given = resume.unwrap_or_default().choices;
        check(checkpoint.config.vocab_size, &wanted, resumed, &given)?;
        given.resize_with(wanted.prompts.len(), Given::default);
        let part = |(prompt, given): (&Vec<TokenId>, Given)| {
            let mut transcript = Transcript::new(checkpoint, &wanted.shape, prompt.len(), wanted.sampling.ignore_eos);
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
fn check(vocab: usize, wanted: &Wanted, resumed: bool, given: &[Given]) -> Result<(), ApiError> {
    let refuse = |why: &str| Err(ApiError::invalid(None, format!("what is to be resumed: {why}")));
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use millrace_core::sampling::Sampling;

    use super::*;
    use crate::http::request::Shape;

    /// A model of 300 tokens without a tokenizer; 2 ends an answer.
    fn checkpoint() -> Checkpoint {
        Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tiny-llama-gqa-tied")).unwrap()
    }

    /// Two prompts of three and two tokens, answers of up to four.
    fn wanted() -> Wanted {
        let sampling = Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed: 5, max_new: 4, eos: vec![2], ignore_eos: false };
        let shape =
            Shape { chat: false, stream: true, include_usage: true, return_token_ids: true, timings: false, stops: Vec::new() };
        Wanted { prompts: vec![vec![7, 8, 9], vec![7, 8]], sampling, seeded: false, cache_salt: Vec::new(), shape }
    }

    fn given(tokens: &[TokenId]) -> Given {
        Given { tokens: tokens.to_vec(), cached_tokens: 2, ended: false }
    }

    fn begun(wanted: Wanted, order: Option<Order>, choices: Option<Vec<Given>>) -> Result<Begin, String> {
        let resume = choices.map(|choices| Resume { choices });
        Begin::new(&checkpoint(), wanted, order, resume).map_err(|error| error.message)
    }

    #[test]
    fn what_a_front_hands_over_is_taken_off_the_body() {
        let handed = serde_json::to_vec(&Resume { choices: vec![given(&[5, 6])] }).unwrap();
        let order = |bytes| Some(Order { resume_bytes: bytes, ..Order::default() });
        let mut body = Bytes::from([&handed[..], b"{}"].concat());
        assert_eq!(resume(None, &mut body).unwrap(), None);
        assert_eq!(resume(order(0), &mut body).unwrap(), None);
        let whole = body.clone();
        let taken = resume(order(handed.len()), &mut body).unwrap().unwrap();
        assert_eq!((taken.choices, &body[..]), (vec![given(&[5, 6])], &b"{}"[..]));
        for wrong in [handed.len() - 1, handed.len() + 1, whole.len() + 1] {
            let error = resume(order(wrong), &mut whole.clone()).unwrap_err();
            assert!(error.message.starts_with("what is to be resumed"), "{}", error.message);
        }
    }

    #[test]
    fn the_fronts_seed_counts_where_the_client_named_none() {
        let order = Some(Order { seed: 99, ..Order::default() });
        let seed = |wanted, order| begun(wanted, order, None).unwrap().wanted.sampling.seed;
        assert_eq!(seed(wanted(), order), 99);
        assert_eq!(seed(Wanted { seeded: true, ..wanted() }, order), 5);
        assert_eq!(seed(wanted(), None), 5);
    }

    #[test]
    fn a_fresh_request_has_a_part_for_each_prompt_and_nothing_in_it() {
        let begin = begun(wanted(), None, None).unwrap();
        assert_eq!((begin.size(), begin.resumed), ((2, 5), false));
        assert!(begin.parts.iter().all(|(transcript, given)| !transcript.is_over() && *given == Given::default()));
    }

    #[test]
    fn a_choice_that_has_all_its_tokens_is_over_and_one_behind_the_last_named_has_none() {
        let over = |tokens: &[TokenId]| {
            let begin = begun(wanted(), None, Some(vec![given(tokens)])).unwrap();
            assert!(begin.resumed && !begin.parts[1].0.is_over() && begin.parts[1].1 == Given::default());
            begin.parts[0].0.is_over()
        };
        assert!(!over(&[]) && !over(&[5, 6, 7]));
        assert!(over(&[5, 6, 7, 8]), "as many as were asked for");
        assert!(over(&[5, 2]), "it ended by itself");
    }

    #[test]
    fn what_a_client_cannot_have_is_refused() {
        let refused = |wanted: Wanted, choices: Vec<Given>, word: &str| {
            let reason = begun(wanted, None, Some(choices)).err().expect("refused");
            assert!(reason.contains(word), "{word:?} not in {reason:?}");
        };
        let mut whole = wanted();
        whole.shape.stream = false;
        refused(whole, vec![], "only a stream");
        refused(wanted(), vec![Given::default(); 3], "more choices");
        refused(wanted(), vec![given(&[5; 5])], "more tokens");
        refused(wanted(), vec![given(&[300])], "no token ids");
        refused(wanted(), vec![Given { cached_tokens: 4, ..Given::default() }], "more cached tokens");
        begun(wanted(), None, Some(vec![Given { cached_tokens: 3, ..Given::default() }])).expect("all of it was cached");
    }

    #[test]
    fn what_is_over_is_counted_as_it_was() {
        let usage = took(&[7, 8, 9], &given(&[5, 6]));
        assert_eq!((usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens), (3, 2, 2));
    }
}
