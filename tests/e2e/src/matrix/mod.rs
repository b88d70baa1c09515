//! The failure matrix: whoever of a request's four parties is lost, in whichever way, in whichever state of the request, the client
//! gets the tokens of an undisturbed answer (or one typed error in time), and nothing stays behind.
//!
//! A state is hit exactly, not by luck. Packets between prefill and decode nodes take [`WIRE`], so that every word of a hand-over is on its way
//! long enough to be caught; nodes log each step; at the wanted step the relays hold all those packets until the fault has been
//! proven, and let them go then. `case` runs one case, `migrate` the losses of decode nodes token by token, `client` is the client's
//! process.

mod case;
pub mod client;
pub mod migrate;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub use self::case::{Outcome, Went};
use self::client::Client;
use crate::WAIT_MAX;
use crate::golden::Row;
use crate::parts::{Parts, Plan};
use crate::relay::{HANDOVER_WAYS, Way};

/// How long a packet between a prefill node and a decode node takes.
pub const WIRE: Duration = Duration::from_millis(100);
/// Engine time of a token on prefill nodes and on decode nodes, microseconds: a prompt takes six tenths of a second, an answer four.
const TOKEN_US: (u64, u64) = (1500, 6000);
/// Several times [`STEP_TOKENS`], so that the first cells of a prompt arrive while its last are still to be computed.
const PROMPT_TOKENS: usize = 420;
const ANSWER_TOKENS: usize = 64;
/// Tokens of a prompt that one step computes.
const STEP_TOKENS: u32 = 64;
/// Different requests.
const BODIES: usize = 4;

/// How far a request has come, in the words of the nodes' logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The ticket is on its way to the prefill node.
    Assigned,
    /// The prefill node computes; it has no link to the decode node yet.
    Dialing,
    /// The question for slots is on its way.
    Asked,
    /// The decode node has reserved slots; its word is on its way.
    Granted,
    /// Cells have arrived, others are still to be computed.
    Streaming,
    /// The first token is drawn, the manifest and the last cells are on their way.
    Finishing,
    /// All is there and verified, decoding begins; the decode node's word is on its way.
    Verified,
    /// Tokens come from the decode node.
    Decoding,
}

/// Who is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The request's gateway, or in every other round the leader of the replicas.
    Coordinator,
    /// The node that computes the prompt.
    Prefill,
    /// The node that decodes.
    Decode,
    /// Who asked.
    Client,
}

/// In which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Stop,
    /// No packet comes or goes, until later.
    Cut,
}

/// One case of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// When.
    pub state: State,
    /// Who.
    pub victim: Victim,
    /// How.
    pub fault: Fault,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = format!("{:?}-{:?}-{:?}", self.fault, self.victim, self.state).to_lowercase();
        f.pad(&text)
    }
}

/// All 96 cases.
#[must_use]
pub fn cases() -> Vec<Case> {
    use State::{Asked, Assigned, Decoding, Dialing, Finishing, Granted, Streaming, Verified};
    let states = [Assigned, Dialing, Asked, Granted, Streaming, Finishing, Verified, Decoding];
    let victims = [Victim::Coordinator, Victim::Prefill, Victim::Decode, Victim::Client];
    let faults = [Fault::Kill, Fault::Stop, Fault::Cut];
    let pairs = states.into_iter().flat_map(|state| victims.map(|victim| (state, victim)));
    pairs.flat_map(|(state, victim)| faults.map(|fault| Case { state, victim, fault })).collect()
}

/// A request and its undisturbed answer.
#[derive(Clone, Debug)]
pub struct Asked {
    /// What is asked, but for the salt.
    pub body: Value,
    /// The tokens.
    pub ids: Vec<u32>,
    /// How long it took.
    pub took: Duration,
    /// The reference that knows its near ties; none with the checksum engine, where every bit counts.
    pub reference: Option<Row>,
}

impl Asked {
    /// Whether `ids` are the undisturbed tokens, or a beginning of them, up to a near tie.
    ///
    /// # Errors
    /// They are not.
    pub fn check(&self, ids: &[u32]) -> Result<(), String> {
        let differs = ids.iter().zip(&self.ids).position(|(got, right)| got != right);
        let tie = |at: usize| self.reference.as_ref().is_some_and(|row| row.near_tie(at));
        match differs {
            Some(at) if !tie(at) => Err(format!("token {at} is wrong: {ids:?} instead of {:?}", self.ids)),
            _ if ids.len() > self.ids.len() => Err(format!("{} tokens instead of {}", ids.len(), self.ids.len())),
            _ => Ok(()),
        }
    }
}

/// A cluster, and what is asked of it.
pub struct Matrix {
    /// The cluster.
    pub parts: Parts,
    /// Requests of the cases.
    pub asked: Vec<Asked>,
    salts: u64,
}

impl Matrix {
    /// Starts a cluster with the checksum engine and asks everything once, undisturbed.
    ///
    /// # Errors
    /// It does not serve.
    pub async fn start() -> Result<Self, String> {
        let mut matrix =
            Self::of(&Plan { model: crate::tiny_model(), checksum_us: Some(TOKEN_US), kv_blocks: 256, step_tokens: STEP_TOKENS })
                .await?;
        matrix.parts.relays.set(|weather| weather.delay = HANDOVER_WAYS.map(|way| (way, WIRE)).into());
        for number in 0..BODIES {
            let body = matrix.body(number, PROMPT_TOKENS, ANSWER_TOKENS);
            let asked = matrix.undisturbed(body).await?;
            matrix.asked.push(asked);
        }
        Ok(matrix)
    }

    /// Starts a cluster and asks nothing.
    ///
    /// # Errors
    /// It does not serve.
    pub async fn of(plan: &Plan) -> Result<Self, String> {
        Ok(Self { parts: Parts::start(plan).await?, asked: Vec::new(), salts: 0 })
    }

    /// A request: greedy ones and ones that are sampled with a seed.
    #[must_use]
    pub fn body(&self, number: usize, prompt_tokens: usize, answer_tokens: usize) -> Value {
        let prompt: Vec<u32> = (0..prompt_tokens).map(|i| 3 + (i * 7 + number * 11) as u32 % 290).collect();
        let mut body = self.greedy(&prompt, answer_tokens);
        match number % 2 {
            0 => {}
            _ => (body["temperature"], body["seed"]) = (json!(1.0), json!(number)),
        }
        body
    }

    fn greedy(&self, prompt: &[u32], answer_tokens: usize) -> Value {
        json!({
            "model": self.parts.model, "prompt": prompt, "max_tokens": answer_tokens, "ignore_eos": true, "return_token_ids": true,
            "temperature": 0, "stream": true, "stream_options": {"include_usage": true}, "millrace_timings": true,
        })
    }

    /// Asks once, in calm weather.
    ///
    /// # Errors
    /// The answer is not whole.
    pub async fn undisturbed(&mut self, body: Value) -> Result<Asked, String> {
        let begun = Instant::now();
        let mut client = self.ask(&body).await?;
        client.read(usize::MAX, WAIT_MAX).await?;
        match client.end {
            Some(end) if !end["whole"].is_null() => Ok(Asked { body, ids: client.ids, took: begun.elapsed(), reference: None }),
            end => Err(format!("an undisturbed answer ends with {end:?}")),
        }
    }

    /// A client that asks `body`, with a salt of its own: what is cached of other rounds is not found.
    ///
    /// # Errors
    /// It cannot be started.
    pub async fn ask(&mut self, body: &Value) -> Result<Client, String> {
        self.salts += 1;
        let mut body = body.clone();
        body["cache_salt"] = json!(self.salts.to_string());
        Client::start(self.parts.http, &body).await
    }

    fn hold(&self, held: &[Way]) {
        self.parts.relays.set(|weather| weather.held = held.to_vec());
    }
}
