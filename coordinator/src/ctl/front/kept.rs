//! What the front keeps of an answer, so that another gateway can go on with it: the request, and the tokens that went through.
//!
//! It takes the gateway's notes out of the events and remembers them. All answers together may keep [`KEPT_BYTES_MAX`]; one that
//! finds no room, or grows past its own bound, is carried all the same, but ends with its gateway. Where a gateway says what time it
//! took, the front's own is added.

use std::fmt::Write;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::http::front::{Note, Resume};
use crate::http::request::PROMPTS_MAX;

/// Bytes that are kept for all answers on their way.
pub const KEPT_BYTES_MAX: usize = 256 << 20;
/// Bytes of one event that are held back until it is whole; a longer one is passed on in pieces.
pub const EVENT_BYTES_MAX: usize = 1 << 20;
/// Room for tokens is taken in pieces of so many.
const TOKENS_STEP: usize = 1024;

/// The room for all answers.
#[derive(Clone, Debug)]
pub struct Room(Arc<Semaphore>);

impl Default for Room {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(KEPT_BYTES_MAX)))
    }
}

/// One answer's part of the room, given back when dropped.
#[derive(Debug)]
pub struct Kept {
    room: Room,
    taken: OwnedSemaphorePermit,
    tokens_max: usize,
    given: Resume,
    stage: Stage,
    arrived: Instant,
    /// From then to the first token.
    first_us: Option<u128>,
}

/// How far the client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It has nothing.
    Nothing,
    /// It has a part.
    Begun,
    /// It has all but the end mark.
    Closed,
    /// It has the end mark, or an error.
    Over,
}

/// What a piece of a stream comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// For the client; may be empty.
    Pass(Bytes),
    /// For the client, and nothing can be resumed from here on.
    PassAndForget(Bytes),
    /// For the client; after it the gateway gives up, and another may not.
    Elsewhere(Bytes),
}

impl Kept {
    /// Room for a request of so many bytes that `arrived` then; `None` when there is none.
    #[must_use]
    pub fn new(room: &Room, bytes: usize, arrived: Instant) -> Option<Self> {
        let taken = room.0.clone().try_acquire_many_owned(u32::try_from(bytes).ok()?).ok()?;
        let (given, stage) = (Resume::default(), Stage::Nothing);
        Some(Self { room: room.clone(), taken, tokens_max: 0, given, stage, arrived, first_us: None })
    }

    /// How far the client is.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// What the client has; `None` when that is nothing.
    #[must_use]
    pub fn given(&self) -> Option<&Resume> {
        (self.stage > Stage::Nothing).then_some(&self.given)
    }

    /// Takes whole events: what is for the client, without the notes.
    pub fn take(&mut self, events: &[u8]) -> Taken {
        if !events.ends_with(b"\n\n") {
            return Taken::PassAndForget(Bytes::copy_from_slice(events));
        }
        let (mut out, mut kept) = (BytesMut::with_capacity(events.len()), true);
        for event in whole_events(events) {
            let mut lines = event.split(|byte| *byte == b'\n');
            let first = lines.next().unwrap_or_default();
            let note = std::str::from_utf8(first).ok().and_then(Note::parse);
            self.stage = self.stage.max(Stage::after(note, event));
            match note {
                None => out.extend_from_slice(event),
                Some(Note::Elsewhere) => return Taken::Elsewhere(out.freeze()),
                Some(note) => {
                    self.write(note, &event[first.len() + 1..], &mut out);
                    kept &= self.note(note);
                }
            }
            out.extend_from_slice(b"\n\n");
        }
        if kept { Taken::Pass(out.freeze()) } else { Taken::PassAndForget(out.freeze()) }
    }

    /// The event's data, and what the front took until the first token.
    fn write(&mut self, note: Note, data: &[u8], out: &mut BytesMut) {
        let first_us = *self.first_us.get_or_insert_with(|| self.arrived.elapsed().as_micros());
        match (note, data.strip_suffix(b"}")) {
            (Note::End { timed: true, .. }, Some(open)) => {
                out.extend_from_slice(open);
                // Writing to memory cannot fail.
                let _ = write!(out, r#","millrace_front":{{"ttft_us":{first_us}}}}}"#);
            }
            _ => out.extend_from_slice(data),
        }
    }

    fn note(&mut self, note: Note) -> bool {
        self.given.note(note, PROMPTS_MAX) && (self.given.tokens() <= self.tokens_max || self.grow())
    }

    fn grow(&mut self) -> bool {
        let more = (TOKENS_STEP * size_of::<u32>()) as u32;
        let Ok(more) = self.room.0.clone().try_acquire_many_owned(more) else { return false };
        self.taken.merge(more);
        self.tokens_max += TOKENS_STEP;
        true
    }
}

impl Stage {
    /// How far a client is after this event.
    fn after(note: Option<Note>, event: &[u8]) -> Self {
        let last = event == b"data: [DONE]" || event.starts_with(b"data: {\"error\":");
        match note {
            Some(Note::Elsewhere) => Self::Nothing,
            Some(Note::Close) => Self::Closed,
            None if last => Self::Over,
            _ => Self::Begun,
        }
    }
}

/// The events of a piece that ends with one, each without its empty line.
fn whole_events(mut piece: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let at = piece.windows(2).position(|pair| pair == b"\n\n")?;
        let (event, rest) = (&piece[..at], &piece[at + 2..]);
        piece = rest;
        Some(event)
    })
}

/// Holds back the beginning of an event until its end (an empty line) has come.
#[derive(Debug, Default)]
pub struct Boundary(BytesMut);

impl Boundary {
    /// Takes bytes; gives all that is whole.
    pub fn push(&mut self, data: &[u8]) -> Bytes {
        // The empty line may begin with the last byte that is held already.
        let from = self.0.len().saturating_sub(1);
        self.0.extend_from_slice(data);
        match self.0[from..].windows(2).rposition(|pair| pair == b"\n\n") {
            Some(at) => self.0.split_to(from + at + 2).freeze(),
            None if self.0.len() > EVENT_BYTES_MAX => self.rest(),
            None => Bytes::new(),
        }
    }

    /// What is held back.
    pub fn rest(&mut self) -> Bytes {
        self.0.split().freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> Kept {
        Kept::new(&Room::default(), 10, Instant::now()).unwrap()
    }

    #[test]
    fn notes_are_remembered_and_do_not_reach_the_client() {
        let mut kept = kept();
        assert_eq!(kept.given(), None);
        assert_eq!(kept.take(b"data: hello\n\n"), Taken::Pass("data: hello\n\n".into()));
        assert_eq!(kept.given(), Some(&Resume::default()), "the client has the beginning");
        let events = b": t 0 7 16\ndata: a\n\n: t 0 8 16\ndata: b\n\n: e 0\ndata: c\n\ndata: [DONE]\n\n";
        assert_eq!(kept.take(events), Taken::Pass("data: a\n\ndata: b\n\ndata: c\n\ndata: [DONE]\n\n".into()));
        let given = kept.given().unwrap();
        assert_eq!((given.choices[0].tokens.as_slice(), given.choices[0].ended), (&[7, 8][..], true));
        assert_eq!(kept.stage(), Stage::Over);
    }

    #[test]
    fn the_time_to_the_first_token_is_added_where_the_gateway_says_its_own() {
        let mut kept = kept();
        kept.arrived -= std::time::Duration::from_millis(40);
        assert_eq!(kept.take(b": t 0 7 16\ndata: {\"a\":{}}\n\n"), Taken::Pass("data: {\"a\":{}}\n\n".into()));
        kept.arrived -= std::time::Duration::from_secs(1000);
        let Taken::Pass(out) = kept.take(b": e 0 timed\ndata: {\"a\":{}}\n\n") else { panic!("it is kept") };
        let value: serde_json::Value = serde_json::from_slice(out.strip_prefix(b"data: ").unwrap()).unwrap();
        let us = value["millrace_front"]["ttft_us"].as_u64().unwrap();
        assert!((40_000..1_000_000_000).contains(&us) && value["a"].is_object(), "{us}");
        assert!(kept.given().unwrap().choices[0].ended);
    }

    #[test]
    fn what_must_not_come_twice_is_known() {
        let stage = |events: &[u8]| {
            let mut kept = kept();
            kept.take(events);
            kept.stage()
        };
        assert_eq!(stage(b""), Stage::Nothing);
        assert_eq!(stage(b": t 0 1 0\ndata: {\"choices\":[]}\n\n"), Stage::Begun);
        assert_eq!(stage(b": c\ndata: {}\n\n"), Stage::Closed);
        assert_eq!(stage(b": c\ndata: {}\n\ndata: [DONE]\n\n"), Stage::Over);
        assert_eq!(stage(b"data: {\"error\":{}}\n\n"), Stage::Over);
    }

    #[test]
    fn an_error_that_another_gateway_may_not_have_is_not_passed_on() {
        let taken = kept().take(b": t 0 7 0\ndata: a\n\n: elsewhere\ndata: {}\n\n: t 0 8 0\ndata: b\n\n");
        assert_eq!(taken, Taken::Elsewhere("data: a\n\n".into()));
    }

    #[test]
    fn the_room_is_bounded_and_given_back() {
        let room = Room::default();
        let new = |bytes| Kept::new(&room, bytes, Instant::now());
        let all = new(KEPT_BYTES_MAX - 5000).unwrap();
        assert!(new(6000).is_none());
        let mut small = new(1).unwrap();
        let event = b": t 0 1 0\ndata: x\n\n";
        assert!((0..TOKENS_STEP).all(|_| matches!(small.take(event), Taken::Pass(_))));
        assert_eq!(small.take(event), Taken::PassAndForget("data: x\n\n".into()), "there is no room for a second piece");
        drop((all, small));
        assert_eq!(room.0.available_permits(), KEPT_BYTES_MAX);
    }

    #[test]
    fn an_event_leaves_when_its_empty_line_has_come_wherever_it_is_cut() {
        let text = b"data: 1\n\ndata: 2\n\ndata: 3";
        for cut in 0..text.len() {
            let mut boundary = Boundary::default();
            let mut passed = boundary.push(&text[..cut]).to_vec();
            assert!(passed.is_empty() || passed.ends_with(b"\n\n"));
            passed.extend_from_slice(&boundary.push(&text[cut..]));
            assert_eq!(passed, b"data: 1\n\ndata: 2\n\n", "cut at {cut}");
            assert_eq!(boundary.rest(), b"data: 3"[..]);
        }
        let mut boundary = Boundary::default();
        assert_eq!(boundary.push(&vec![b'x'; EVENT_BYTES_MAX + 1]).len(), EVENT_BYTES_MAX + 1, "nothing is held for ever");
    }
}
