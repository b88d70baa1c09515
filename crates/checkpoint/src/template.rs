//! Chat templates: OpenAI messages in, one prompt out, as transformers' `apply_chat_template` renders it.
//!
//! A template is a program that came with the model, so it runs with a budget of steps and of output. It sees the messages, the two special
//! tokens and the date; no files, no environment. Memory between steps has no budget (the engine offers none): a template written to
//! double a string for ever ends the process, so a template is trusted as far as that. Settings: transformers `chat_template_utils.py`.

use crate::{TextError, strftime};
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, context};
use serde::Serialize;
use serde_json::Value as Json;
use std::io;

/// Steps that one rendering may take; a message takes some 30.
pub const CHAT_FUEL: u64 = 4_000_000;
/// Longest rendered prompt, in bytes.
pub const CHAT_TEXT_BYTES_MAX: usize = crate::TEXT_BYTES_MAX;
/// Most messages of one chat.
pub const MESSAGES_MAX: usize = 1 << 14;
/// Widest indentation that `tojson` gives.
const INDENT_MAX: usize = 16;
const NAME: &str = "chat_template";

/// A compiled template with the special tokens it may name.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    bos: Option<String>,
    eos: Option<String>,
}

impl ChatTemplate {
    /// Compiles `source`, or says why it cannot be.
    pub(crate) fn compile(source: &str, bos: Option<String>, eos: Option<String>) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(CHAT_FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(write_as_python);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("strftime_now", |format: &str| strftime::now(format));
        environment.add_function("raise_exception", |message: &str| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
        });
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(|e| describe(&e))?;
        Ok(Self { environment, bos, eos })
    }

    /// The prompt, with the opening of the assistant's turn at its end.
    pub(crate) fn render(&self, messages: &Json) -> Result<String, TextError> {
        let messages = checked_messages(messages)?;
        let failed = |e: &Error| TextError::Template { reason: describe(e) };
        let template = self.environment.get_template(NAME).map_err(|e| failed(&e))?;
        // A token that the model lacks stays undefined, as templates test for it.
        let token = |name: &Option<String>| name.as_ref().map_or(Value::UNDEFINED, Value::from);
        let values = context! {
            messages => messages,
            add_generation_prompt => true,
            tools => Value::from(()),
            documents => Value::from(()),
            bos_token => token(&self.bos),
            eos_token => token(&self.eos),
        };
        let mut out = Bounded(Vec::new());
        template.render_captured_to(values, &mut out).map_err(|e| failed(&e))?;
        String::from_utf8(out.0).map_err(|e| TextError::Template { reason: e.to_string() })
    }
}

/// Checks the shape that every template relies on, and joins lists of text parts.
fn checked_messages(messages: &Json) -> Result<Vec<Json>, TextError> {
    let wrong = |field: String, reason: &str| Err(TextError::Messages { field, reason: reason.into() });
    let Json::Array(list) = messages else { return wrong("messages".into(), "is not an array") };
    if list.is_empty() || list.len() > MESSAGES_MAX {
        return wrong("messages".into(), &format!("has {} elements, expected 1 to {MESSAGES_MAX}", list.len()));
    }
    let mut checked = list.clone();
    for (index, message) in checked.iter_mut().enumerate() {
        if !message.get("role").is_some_and(Json::is_string) {
            return wrong(format!("messages[{index}].role"), "is not a string");
        }
        match message.get_mut("content") {
            Some(content @ Json::Array(_)) => *content = Json::String(joined_parts(index, content)?),
            None | Some(Json::String(_) | Json::Null) => {}
            Some(_) => return wrong(format!("messages[{index}].content"), "is neither a string nor a list of parts"),
        }
    }
    Ok(checked)
}

fn joined_parts(message: usize, parts: &Json) -> Result<String, TextError> {
    let texts = parts.as_array().into_iter().flatten().enumerate().map(|(index, part)| {
        let text = part.get("text").and_then(Json::as_str).filter(|_| part.get("type").and_then(Json::as_str) == Some("text"));
        let field = format!("messages[{message}].content[{index}]");
        text.ok_or(TextError::Messages { field, reason: "is not a part of type text".into() })
    });
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
}

/// Jinja writes Python's `True`, `False` and `None`.
fn write_as_python(out: &mut Output<'_>, state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
        ValueKind::None => Ok(out.write_str("None")?),
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`: spaces after `,` and `:`, nothing escaped for HTML.
fn to_json(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let indent = indent.or(options.get("indent")?);
    let failed = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, "cannot be written as JSON").with_source(e);
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(INDENT_MAX));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty)).map_err(failed)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonJson)).map_err(failed)?,
    }
    Ok(Value::from(String::from_utf8_lossy(&out).into_owned()))
}

/// JSON with Python's separators.
struct PythonJson;

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

/// `{% generation %}` marks the assistant's text for training and writes nothing; the engine here does not know it.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let end = tag.find("%}").map_or(tag.len(), |at| at + 2);
        let (tag, after) = tag.split_at(end);
        out.push_str(before);
        match tag.trim_matches(|c: char| "{%}-+".contains(c) || c.is_whitespace()) {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out + rest
}

/// The message with its line; a message of `raise_exception` comes through whole.
fn describe(error: &Error) -> String {
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("takes more than {CHAT_FUEL} steps"),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    error.line().map_or(what.clone(), |line| format!("{what} (line {line})"))
}

/// Takes up to [`CHAT_TEXT_BYTES_MAX`] bytes and then fails.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > CHAT_TEXT_BYTES_MAX {
            return Err(io::Error::other(format!("the prompt is longer than {CHAT_TEXT_BYTES_MAX} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: &Json) -> Result<String, TextError> {
        ChatTemplate::compile(source, Some("<s>".into()), None).expect("compiles").render(messages)
    }

    fn hello() -> Json {
        json!([{"role": "user", "content": "<hi> & 'you'"}])
    }

    #[test]
    fn python_habits() {
        let source = "{% for m in messages %}\n  {% set t = m.content.strip() %}\n[{{ m['role'].upper() }}] {{ t }}\n{% endfor %}\n\
                      {{ bos_token }}{{ eos_token is defined }}{{ none }}{{ add_generation_prompt }}{{ 'a' + 'b' }}";
        assert_eq!(render(source, &hello()).unwrap(), "[USER] <hi> & 'you'\n<s>FalseNoneTrueab");
        assert_eq!(render("{{ messages[0] | tojson }}", &hello()).unwrap(), r#"{"content": "<hi> & 'you'", "role": "user"}"#);
        assert_eq!(render("{{ [1, {}] | tojson(indent=1) }}", &hello()).unwrap(), "[\n 1,\n {}\n]");
        assert_eq!(render("{%- generation -%} x {%- endgeneration %}", &hello()).unwrap(), "x");
        assert_eq!(render("{{ strftime_now('%%') }}", &hello()).unwrap(), "%");
    }

    #[test]
    fn failures_are_typed() {
        let reason = |source: &str| match render(source, &hello()) {
            Err(TextError::Template { reason }) => reason,
            other => panic!("{other:?}"),
        };
        assert!(reason("{{ raise_exception('roles must alternate') }}").contains("roles must alternate"));
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a %}{% endfor %}{% endfor %}";
        assert!(reason(endless).contains("steps"));
        assert!(reason("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").contains("line"));
        assert!(reason("{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}").len() > 3);
        assert!(reason("{{ messages[0].content + 1 }}").contains("line 1"));
        assert!(ChatTemplate::compile("{% for %}", None, None).is_err());
        assert!(ChatTemplate::compile(&"{% if a %}".repeat(100_000), None, None).is_err());
    }

    #[test]
    fn messages_are_checked_and_parts_joined() {
        let field = |messages: Json| match render("x", &messages) {
            Err(TextError::Messages { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(json!("hi")), "messages");
        assert_eq!(field(json!([])), "messages");
        assert_eq!(field(json!([{"role": "user", "content": "a"}, {"content": "b"}])), "messages[1].role");
        assert_eq!(field(json!([{"role": "user", "content": 7}])), "messages[0].content");
        let image = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]);
        assert_eq!(field(image), "messages[0].content[1]");
        let parts = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
        assert_eq!(render("{{ messages[0].content }}", &parts).unwrap(), "a\nb");
    }
}
