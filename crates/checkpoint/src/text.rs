//! Text to token ids and back: the tokenizer of a model with its chat template.
//!
//! Follows transformers: `tokenizer(text)` for a raw prompt, `apply_chat_template` and then `add_special_tokens=False` for a chat.

use crate::template::ChatTemplate;
use crate::{DecodeStream, TextError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use tokenizers::Tokenizer;

/// Longest text that is tokenized, in bytes: far above any context length that is served.
pub const TEXT_BYTES_MAX: usize = 32 << 20;

/// Lets the tokenizer library do something. It indexes past its tables on some tokenizers that contradict themselves, when it reads them and
/// when it uses them: its panic is the file's fault, not ours.
pub(crate) fn guarded<T, E: ToString>(run: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    let outcome = catch_unwind(AssertUnwindSafe(run));
    outcome.map_or_else(|_| Err(CONTRADICTION.into()), |outcome| outcome.map_err(|error| error.to_string()))
}

/// What [`guarded`] says of a panic.
pub(crate) const CONTRADICTION: &str = "the tokenizer contradicts itself";

/// The tokenizer and chat template of a model. Cheap to clone, can be shared by threads.
#[derive(Clone)]
pub struct TextCodec {
    tokenizer: Arc<Tokenizer>,
    /// Put before a raw prompt by this codec; `None` where the tokenizer does it itself or nothing is put there.
    opening: Option<u32>,
    chat: Arc<Result<ChatTemplate, String>>,
}

impl TextCodec {
    pub(crate) fn new(tokenizer: Tokenizer, opening: Option<u32>, chat: Result<ChatTemplate, String>) -> Self {
        Self { tokenizer: Arc::new(tokenizer), opening, chat: Arc::new(chat) }
    }

    /// Tokens of a raw prompt. Special tokens in the text are parsed as such; an opening token is added only if the model's tokenizer adds
    /// one. The empty text gives no tokens or the opening token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let mut ids: Vec<u32> = self.opening.into_iter().collect();
        ids.extend(self.run(text, true)?);
        Ok(ids)
    }

    /// Tokens of a text that holds all its special tokens already.
    pub fn encode_bare(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.run(text, false)
    }

    /// Renders the OpenAI `messages` array with the model's template, the start of the assistant's turn appended, and tokenizes the result.
    /// Content given as a list of text parts is joined by line feeds. Returns the rendered prompt too.
    pub fn encode_chat(&self, messages: &serde_json::Value) -> Result<(String, Vec<u32>), TextError> {
        let template = self.chat.as_ref().as_ref().map_err(|reason| TextError::NoTemplate { reason: reason.clone() })?;
        let prompt = template.render(messages)?;
        let ids = self.run(&prompt, false)?;
        Ok((prompt, ids))
    }

    /// Why chats cannot be rendered, or `None` if they can.
    pub fn chat_problem(&self) -> Option<&str> {
        self.chat.as_ref().as_ref().err().map(String::as_str)
    }

    /// Text of tokens. Ids that the tokenizer does not know give nothing; bytes that are not UTF-8 give U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        guarded(|| self.tokenizer.decode(ids, skip_special)).map_err(|reason| TextError::Tokenizer { reason })
    }

    /// A decoder for tokens that come one at a time. It leaves out special tokens. Owns what it needs.
    pub fn decode_stream(&self) -> DecodeStream {
        DecodeStream::new(Arc::clone(&self.tokenizer))
    }

    /// The id of a token by its exact text, special tokens included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    fn run(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(TextError::TooLong { bytes: text.len(), max: TEXT_BYTES_MAX });
        }
        let encoding = guarded(|| self.tokenizer.encode_fast(text, add_special));
        encoding.map(|e| e.get_ids().to_vec()).map_err(|reason| TextError::Tokenizer { reason })
    }
}
