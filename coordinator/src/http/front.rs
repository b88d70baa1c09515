//! What a front and a gateway say to each other so that an answer outlives its gateway: the header with which a front carries a
//! request, the notes with which a gateway marks each event, and what a front hands to the next gateway. Both ends are here, so that
//! they agree; a front's use of it is `ctl::front`'s, a gateway's is `respond`'s.
//!
//! A gateway believes the header from whoever sends a request: it says how the sender's own answer is written and which part of it
//! the sender has already, and a sender may put any tokens into its own prompt anyway. The id in it names the answer on paper only;
//! inside the cluster a request is named by the gateway that runs it.

use std::fmt;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use millrace_core::ids::TokenId;
use serde::{Deserialize, Serialize};

use super::error::ApiError;

/// The header of a carried request, and of an answer with notes, where it has the value [`NOTED`].
pub const HEADER: HeaderName = HeaderName::from_static("x-millrace-front");
/// See [`HEADER`].
pub const NOTED: HeaderValue = HeaderValue::from_static("noted");
/// Tokens of all choices that a front keeps of one answer; an answer that grows longer cannot be resumed.
pub const KEPT_TOKENS_MAX: usize = 1 << 17;
/// Bytes of what a front hands over, as JSON: [`KEPT_TOKENS_MAX`] numbers of ten digits, with room.
pub const RESUME_BYTES_MAX: usize = 2 << 20;

/// How a request is carried: the value of [`HEADER`], `id=<32 hex digits> created=<s> seed=<number> resume=<bytes>`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Order {
    /// Names the answer, whichever gateway writes it.
    pub id: u128,
    /// When it was asked for, seconds since 1970.
    pub created_s: u64,
    /// How to draw when the body does not say.
    pub seed: u64,
    /// So many bytes before the body are a [`Resume`]; 0 for none.
    pub resume_bytes: usize,
}

/// What the client has of an answer: a choice after the last one named has nothing yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// By the choices' order.
    pub choices: Vec<Given>,
}

/// What the client has of one choice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// Its tokens.
    pub tokens: Vec<TokenId>,
    /// Tokens of the prompt that the first gateway's attempt found cached.
    pub cached_tokens: u32,
    /// It has its finish reason.
    pub ended: bool,
}

/// A comment line before an event's data, for the front alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// The event carries this token: `: t <choice> <token> <cached tokens>`.
    Token {
        /// Of which choice.
        choice: usize,
        /// The token.
        token: TokenId,
        /// As in [`Given`].
        cached_tokens: u32,
    },
    /// The event ends this choice: `: e <choice>`, or `: e <choice> timed`.
    End {
        /// Which.
        choice: usize,
        /// It says where the time went, and the front adds its own.
        timed: bool,
    },
    /// The event has the usage; only the end mark follows: `: c`.
    Close,
    /// The event is an error that another gateway may not have: `: elsewhere`.
    Elsewhere,
}

impl Order {
    /// The header's value.
    ///
    /// # Panics
    /// Never: digits and letters are a header's value.
    #[must_use]
    pub fn value(&self) -> HeaderValue {
        let Self { id, created_s, seed, resume_bytes } = self;
        let text = format!("id={id:032x} created={created_s} seed={seed} resume={resume_bytes}");
        HeaderValue::try_from(text).expect("digits and letters")
    }

    /// The order of a carried request; `None` for any other.
    ///
    /// # Errors
    /// A header that is none of ours.
    pub fn of(headers: &HeaderMap) -> Result<Option<Self>, ApiError> {
        let Some(value) = headers.get(&HEADER) else { return Ok(None) };
        let order = value.to_str().ok().and_then(Self::parse).filter(|order| order.resume_bytes <= RESUME_BYTES_MAX);
        order.map(Some).ok_or_else(|| ApiError::invalid(None, format!("{HEADER} is malformed")))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut order = Self::default();
        for word in text.split(' ') {
            match word.split_once('=')? {
                ("id", hex) => order.id = u128::from_str_radix(hex, 16).ok()?,
                ("created", seconds) => order.created_s = seconds.parse().ok()?,
                ("seed", seed) => order.seed = seed.parse().ok()?,
                ("resume", bytes) => order.resume_bytes = bytes.parse().ok()?,
                _ => return None,
            }
        }
        Some(order)
    }
}

impl Resume {
    /// Takes a note; `false` when the answer has grown past what can be kept, or the note is nonsense.
    #[must_use]
    pub fn note(&mut self, note: Note, choices_max: usize) -> bool {
        let choice = match note {
            Note::Token { choice, .. } | Note::End { choice, .. } => choice,
            Note::Close | Note::Elsewhere => return true,
        };
        if choice >= choices_max {
            return false;
        }
        if self.choices.len() <= choice {
            self.choices.resize_with(choice + 1, Given::default);
        }
        let given = &mut self.choices[choice];
        match note {
            Note::Token { token, cached_tokens, .. } => {
                given.tokens.push(token);
                given.cached_tokens = cached_tokens;
            }
            _ => given.ended = true,
        }
        self.tokens() <= KEPT_TOKENS_MAX
    }

    /// Tokens of all choices. O(choices).
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.choices.iter().map(|given| given.tokens.len()).sum()
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token { choice, token, cached_tokens } => write!(f, ": t {choice} {token} {cached_tokens}"),
            Self::End { choice, timed: false } => write!(f, ": e {choice}"),
            Self::End { choice, timed: true } => write!(f, ": e {choice} timed"),
            Self::Close => write!(f, ": c"),
            Self::Elsewhere => write!(f, ": elsewhere"),
        }
    }
}

impl Note {
    /// The note of a comment line; `None` for any other comment.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.strip_prefix(": ")?.split(' ').collect();
        match words[..] {
            ["t", choice, token, cached] => {
                let (choice, token) = (choice.parse().ok()?, token.parse().ok()?);
                Some(Self::Token { choice, token, cached_tokens: cached.parse().ok()? })
            }
            ["e", choice] => Some(Self::End { choice: choice.parse().ok()?, timed: false }),
            ["e", choice, "timed"] => Some(Self::End { choice: choice.parse().ok()?, timed: true }),
            ["c"] => Some(Self::Close),
            ["elsewhere"] => Some(Self::Elsewhere),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_end_writes_the_other_reads() {
        let order = Order { id: 7 << 100, created_s: 3, seed: u64::MAX, resume_bytes: 12 };
        let mut headers = HeaderMap::new();
        assert_eq!(Order::of(&headers).unwrap(), None);
        headers.insert(HEADER, order.value());
        assert_eq!(Order::of(&headers).unwrap(), Some(order));
        let ends = [false, true].map(|timed| Note::End { choice: 0, timed });
        for note in [Note::Token { choice: 31, token: 9, cached_tokens: 4 }, ends[0], ends[1], Note::Close, Note::Elsewhere] {
            assert_eq!(Note::parse(&note.to_string()), Some(note));
        }
        assert_eq!((Note::parse(": ping"), Note::parse("data: t 0 1 2"), Note::parse(": t 0 -1 2")), (None, None, None));
    }

    #[test]
    fn a_header_that_is_none_of_ours_is_refused() {
        let much = format!("resume={}", RESUME_BYTES_MAX + 1);
        for text in ["", "id", "id=xyz", "seed=-1", "id=1  seed=2", "else=1", &much] {
            let headers = HeaderMap::from_iter([(HEADER, HeaderValue::from_str(text).unwrap())]);
            assert!(Order::of(&headers).is_err(), "{text:?}");
        }
    }

    #[test]
    fn notes_add_up_within_their_bounds() {
        let token = |choice, token| Note::Token { choice, token, cached_tokens: 16 };
        let mut resume = Resume::default();
        for note in [token(1, 5), token(1, 6), Note::End { choice: 1, timed: false }, Note::Elsewhere] {
            assert!(resume.note(note, 2));
        }
        let second = Given { tokens: vec![5, 6], cached_tokens: 16, ended: true };
        assert_eq!(resume.choices, [Given::default(), second]);
        assert!(!resume.note(token(2, 5), 2), "a choice that nobody asked for");
        let mut long = Resume::default();
        assert!((0..KEPT_TOKENS_MAX).all(|_| long.note(token(0, TokenId::MAX), 1)));
        assert!(serde_json::to_vec(&long).unwrap().len() <= RESUME_BYTES_MAX);
        assert!(!long.note(token(0, 1), 1));
    }
}
