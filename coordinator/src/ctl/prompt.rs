//! A prompt on the command line, in one of three forms, and the question about it.

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};

use super::exit::Exit;
use super::output::Ask;

/// A prompt in one of three forms.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct PromptForm {
    /// Text; @FILE reads it from a file
    #[arg(long)]
    prompt: Option<String>,
    /// Token ids: 1,2,3
    #[arg(long, value_delimiter = ',')]
    tokens: Option<Vec<u32>>,
    /// A chat: a JSON array of messages; @FILE reads it from a file
    #[arg(long)]
    messages: Option<String>,
}

/// A question about a prompt.
#[derive(Args, Clone, Debug)]
pub struct Prompt {
    #[command(flatten)]
    form: PromptForm,
    /// Whose cache; the default tenant's if absent
    #[arg(long)]
    tenant: Option<String>,
    #[command(flatten)]
    pub(super) ask: Ask,
}

impl Prompt {
    /// The question `q` about this prompt.
    ///
    /// # Errors
    /// A file cannot be read; [`Exit::Usage`] when the messages are no JSON.
    pub fn query(&self, q: &str) -> Result<Value> {
        let mut query = json!({"q": q});
        if let Some(text) = &self.form.prompt {
            query["text"] = json!(at_file(text)?);
        }
        if let Some(tokens) = &self.form.tokens {
            query["tokens"] = json!(tokens);
        }
        if let Some(messages) = &self.form.messages {
            let wrong = |error| Exit::Usage.error(format!("--messages: {error}"));
            query["messages"] = serde_json::from_str(&at_file(messages)?).map_err(wrong)?;
        }
        if let Some(tenant) = &self.tenant {
            query["tenant"] = json!(tenant);
        }
        Ok(query)
    }
}

fn at_file(text: &str) -> Result<String> {
    match text.strip_prefix('@') {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.to_owned()),
        None => Ok(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        prompt: Prompt,
    }

    #[test]
    fn a_prompt_may_be_text_tokens_a_chat_or_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        std::fs::write(&path, "from a file").unwrap();
        let query = |flag: &str, value: &str| Line::parse_from(["x", flag, value]).prompt.query("cache_lookup");
        let file = query("--prompt", &format!("@{}", path.display())).unwrap();
        assert_eq!(file, json!({"q": "cache_lookup", "text": "from a file"}));
        assert_eq!(query("--tokens", "1,2").unwrap()["tokens"], json!([1, 2]));
        assert_eq!(query("--messages", "[{\"role\":\"user\"}]").unwrap()["messages"][0]["role"], "user");
        assert_eq!(Exit::of(&query("--messages", "nonsense").unwrap_err()), Exit::Usage);
        assert!(Line::try_parse_from(["x"]).is_err() && Line::try_parse_from(["x", "--prompt", "a", "--tokens", "1"]).is_err());
    }
}
