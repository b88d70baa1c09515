//! Tokens to text one token at a time: never half a character, and the pieces add up to the text of all tokens.
//!
//! A byte-level tokenizer (GPT-2, Llama 3, Qwen, SmolLM) is decoded byte by byte: exact, constant work a token. Any other is decoded by
//! the difference of two short decodings (the way of vLLM's `detokenizer_utils.py`), exact as long as the model writes valid UTF-8.

use crate::text::guarded;
use std::sync::{Arc, LazyLock};
use tokenizers::{DecoderWrapper, Tokenizer};

/// Tokens that may wait for the rest of a character where decoding is by difference. A character takes at most 4 bytes, so 4
/// tokens; more can only be a model that writes broken text, which is then let through as U+FFFD.
const PENDING_TOKENS_MAX: usize = 8;

/// An incremental decoder; see the module's header.
pub struct DecodeStream {
    tokenizer: Arc<Tokenizer>,
    state: State,
}

enum State {
    /// Bytes of a character that is not whole yet: at most 3 between pushes.
    Bytes(Vec<u8>),
    /// `ids[..settled]` have been given out and are kept as context, the rest is waiting.
    Window { ids: Vec<u32>, settled: usize },
}

impl DecodeStream {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>) -> Self {
        let byte_level = matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let state = if byte_level { State::Bytes(Vec::new()) } else { State::Window { ids: Vec::new(), settled: 0 } };
        Self { tokenizer, state }
    }

    /// Takes the next token; gives the text that is now certain, if there is any. Special and unknown tokens give nothing.
    pub fn push(&mut self, token: u32) -> Option<String> {
        match &mut self.state {
            State::Bytes(pending) => {
                let text = visible_token(&self.tokenizer, token)?;
                append_bytes(&text, pending);
                non_empty(take_whole_characters(pending))
            }
            State::Window { ids, settled } => {
                visible_token(&self.tokenizer, token)?;
                ids.push(token);
                step(&self.tokenizer, ids, settled, ids_waiting_too_long(ids.len() - *settled))
            }
        }
    }

    /// Ends the stream: gives what was held back, as U+FFFD where it is not a whole character.
    pub fn flush(&mut self) -> Option<String> {
        match &mut self.state {
            State::Bytes(pending) => non_empty(String::from_utf8_lossy(&std::mem::take(pending)).into_owned()),
            State::Window { ids, settled } => step(&self.tokenizer, ids, settled, true),
        }
    }
}

fn ids_waiting_too_long(waiting: usize) -> bool {
    waiting >= PENDING_TOKENS_MAX
}

fn non_empty(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn visible_token(tokenizer: &Tokenizer, id: u32) -> Option<String> {
    tokenizer.id_to_token(id).filter(|token| !tokenizer.get_added_vocabulary().is_special_token(token))
}

/// Gives the difference that the waiting tokens make to the text of those before them.
fn step(tokenizer: &Tokenizer, ids: &mut Vec<u32>, settled: &mut usize, give_all: bool) -> Option<String> {
    let before = guarded(|| tokenizer.decode(&ids[..*settled], true)).ok()?;
    let all = guarded(|| tokenizer.decode(ids, true)).ok()?;
    if all.ends_with(char::REPLACEMENT_CHARACTER) && !give_all {
        return None;
    }
    let piece = non_empty(all.strip_prefix(before.as_str())?.to_owned())?;
    ids.drain(..*settled);
    *settled = ids.len();
    Some(piece)
}

/// The bytes of a byte-level token; one with any character outside the alphabet (an added token) stands for itself.
fn append_bytes(token: &str, out: &mut Vec<u8>) {
    let bytes: Option<Vec<u8>> = token.chars().map(|c| *BYTE_OF_CHAR.get(c as usize)?).collect();
    match bytes {
        Some(bytes) => out.extend(bytes),
        None => out.extend(token.as_bytes()),
    }
}

/// Takes all but a beginning of a character at the very end. What can never become one turns into U+FFFD, exactly as it does when the
/// whole text is decoded at once.
fn take_whole_characters(pending: &mut Vec<u8>) -> String {
    let mut whole = 0;
    for chunk in pending.utf8_chunks() {
        whole += chunk.valid().len();
        let rest = chunk.invalid();
        let begins_character = std::str::from_utf8(rest).is_err_and(|e| e.error_len().is_none());
        if !(begins_character && whole + rest.len() == pending.len()) {
            whole += rest.len();
        }
    }
    let text = String::from_utf8_lossy(&pending[..whole]).into_owned();
    pending.drain(..whole);
    text
}

/// GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and on, in order.
static BYTE_OF_CHAR: LazyLock<Vec<Option<u8>>> = LazyLock::new(|| {
    let mut table = vec![None; 0x100 + 68];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let place = if printable { usize::from(byte) } else { next };
        next += usize::from(!printable);
        table[place] = Some(byte);
    }
    table
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_is_that_of_the_library() {
        let known = BYTE_OF_CHAR.iter().flatten().count();
        assert_eq!(known, 256);
        let theirs = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        assert!(theirs.iter().all(|c| BYTE_OF_CHAR[*c as usize].is_some()) && theirs.len() == 256);
        assert_eq!(BYTE_OF_CHAR['Ġ' as usize], Some(b' '));
        assert_eq!(BYTE_OF_CHAR['Ċ' as usize], Some(b'\n'));
    }

    /// Any bytes, cut anywhere, give what the whole gives.
    #[test]
    fn pieces_equal_the_whole_for_every_cut() {
        let samples: [&[u8]; 6] =
            ["né 😀 中".as_bytes(), b"\xe4\xbd", b"\xf0\x9f\x98a\xff\xc3", b"\xed\xa0\x80\xe4\xbd\xa0", b"\xc3\xc3\xa9\x80", b""];
        for bytes in samples {
            let mut pending = Vec::new();
            let mut text = String::new();
            for &byte in bytes {
                pending.push(byte);
                let piece = take_whole_characters(&mut pending);
                assert!(pending.len() <= 3);
                text.push_str(&piece);
            }
            text.push_str(&String::from_utf8_lossy(&pending));
            assert_eq!(text, String::from_utf8_lossy(bytes));
        }
    }
}
