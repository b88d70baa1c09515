//! How the demo looks: colours on a terminal, plain text elsewhere (or with `NO_COLOR`).

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use millrace_core::layout::Dtype;
use serde_json::Value;

use super::Seen;
use super::talk::Answer;
use crate::ctl::local::{Kind, State};

/// Columns of an answer.
const WIDTH: usize = 92;
/// Columns before an answer's lines.
const INDENT: &str = "    ";

const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "1;31";
const GREEN: &str = "32";
const YELLOW: &str = "33";
const CYAN: &str = "36";

/// The terminal. Clones share the place in the line.
#[derive(Clone)]
pub struct Screen {
    colours: bool,
    column: Arc<AtomicUsize>,
}

impl Screen {
    /// Standard output.
    #[must_use]
    pub fn new() -> Self {
        let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { colours, column: Arc::default() }
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn line(&self, text: &str) {
        self.write(&format!("{text}\n"));
    }

    /// Whoever reads may have gone; the show is checked all the same.
    fn write(&self, text: &str) {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }

    /// The first lines.
    pub fn title(&self, model: &Path, dtype: Dtype) {
        let model = model.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        self.line(&format!("\n{}", self.paint(BOLD, "Millrace: prefill here, decode there, nothing lost on the way")));
        self.line(&self.paint(DIM, &format!("{model}, {}, seven processes on this machine\n", dtype.as_str())));
    }

    /// A line of progress.
    pub fn dim(&self, text: &str) {
        self.end_speech();
        self.line(&self.paint(DIM, &format!("  {text}")));
    }

    /// A heading.
    pub fn section(&self, title: &str) {
        let rule = "─".repeat(WIDTH.saturating_sub(title.chars().count() + 4));
        self.line(&format!("\n{} {} {}", self.paint(DIM, "──"), self.paint(BOLD, title), self.paint(DIM, &rule)));
    }

    /// The cluster: who there is and how the hops go.
    pub fn picture(&self, states: &[State], leader: &str, http: SocketAddr) {
        let row = |kind: Kind, colour: &str| {
            let one = |state: &State| {
                let role = if state.name == leader { " (leader)" } else { "" };
                let pid = state.pid.map_or_else(String::new, |pid| pid.to_string());
                format!("{}{role} {}", self.paint(colour, &format!("● {}", state.name)), self.paint(DIM, &pid))
            };
            let all: Vec<String> = states.iter().filter(|state| state.kind == kind).map(one).collect();
            all.join("   ")
        };
        let dim = |text: &str| self.paint(DIM, text);
        self.line("");
        self.line(&format!("   you        {}", self.paint(BOLD, &format!("http://{http}"))));
        self.line(&dim("    │  prompt                                   ▲ tokens"));
        self.line(&format!("   gateways   {}   {}", row(Kind::Coordinator, CYAN), dim("Raft")));
        self.line(&dim("    │  ticket                                   │"));
        self.line(&format!("   prefill    {}", row(Kind::Prefill, YELLOW)));
        self.line(&dim("    │  KV, layer by layer, QUIC with mutual TLS │"));
        self.line(&format!("   decode     {}", row(Kind::Decode, GREEN)));
        self.line(&dim("    └───────────────────────────────────────────┘"));
    }

    /// What the user asks.
    pub fn question(&self, text: &str) {
        self.line(&format!("\n  {} {}\n", self.paint(CYAN, ">"), self.paint(BOLD, text)));
    }

    /// A piece of an answer, wrapped at spaces as far as pieces allow.
    pub fn speak(&self, text: &str) {
        let mut column = self.column.load(Relaxed);
        let out = wrap(text, &mut column);
        self.column.store(column, Relaxed);
        self.write(&out);
    }

    /// Ends the line of an answer, if one is open.
    pub fn end_speech(&self) {
        if self.column.swap(0, Relaxed) > 0 {
            self.write("\n");
        }
    }

    /// What happens in the middle of an answer.
    pub fn aside(&self, text: &str) {
        self.end_speech();
        self.line(&format!("\n  {} {}\n", self.paint(RED, "✗"), self.paint(RED, text)));
    }

    /// What ends well in the middle of an answer.
    pub fn good_news(&self, text: &str) {
        self.end_speech();
        self.line(&format!("\n  {} {}\n", self.paint(GREEN, "✓"), self.paint(GREEN, text)));
    }

    /// What the show says.
    pub fn note(&self, text: &str) {
        self.line(&format!("\n  {} {text}", self.paint(GREEN, "✓")));
    }

    /// The figures of an answer.
    pub fn figures(&self, answer: &Answer) {
        self.line("");
        for line in figures(answer) {
            self.line(&self.paint(DIM, &format!("  {line}")));
        }
    }

    /// The last lines.
    pub fn summary(&self, seen: &Seen, took: Duration) {
        self.section("Shown");
        let reused = 100 * seen.cached_tokens / seen.prompt_tokens.max(1);
        let lines = [
            format!(
                "{} turns: {} of {} prompt tokens ({reused} %) came from the cache",
                seen.turns, seen.cached_tokens, seen.prompt_tokens
            ),
            format!("{} of KV moved from prefill to decode, checked block by block", bytes(seen.moved_bytes)),
            format!(
                "{} was killed in the middle of an answer; all {} tokens came, the right ones",
                seen.killed, seen.survived_tokens
            ),
            format!("{} was seen to lead {:.1} s after the kill", seen.leader, seen.election.as_secs_f64()),
            "every process has stopped and nothing is left behind".to_owned(),
        ];
        for line in lines {
            self.line(&format!("  {} {line}", self.paint(GREEN, "✓")));
        }
        self.line(&format!("\n  {}\n", self.paint(DIM, &format!("{:.1} s in all", took.as_secs_f64()))));
    }
}

/// Text with line breaks so that it stays within [`WIDTH`]; `column` is where the line stands, 0 for an empty one.
fn wrap(text: &str, column: &mut usize) -> String {
    let mut out = String::new();
    for piece in text.split_inclusive([' ', '\n']) {
        let word = piece.trim_end_matches('\n');
        if *column + word.trim_end().chars().count() > WIDTH && *column > 0 && (word.starts_with(' ') || out.ends_with(' ')) {
            out.push('\n');
            *column = 0;
        }
        let word = if *column == 0 { word.trim_start() } else { word };
        if *column == 0 && !word.is_empty() {
            out.push_str(INDENT);
            *column = INDENT.len();
        }
        out.push_str(word);
        *column += word.chars().count();
        if piece.ends_with('\n') && *column > 0 {
            out.push('\n');
            *column = 0;
        }
    }
    out
}

fn figures(answer: &Answer) -> [String; 2] {
    let (usage, timings) = (&answer.usage, &answer.timings);
    let (prefill, handover) = (&timings["prefill"], &timings["handover"]);
    let count = |value: &Value| value.as_u64().unwrap_or_default();
    let cached = count(&usage["prompt_tokens_details"]["cached_tokens"]);
    let name = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let place = if cached == 0 { "nothing cached".to_owned() } else { format!("{cached} cached on {}", name(&prefill["node"])) };
    let compute = count(&prefill["compute_us"]) as f64 / 1e3;
    let first = format!(
        "prompt {} tokens, {place}; prefill {compute:.0} ms on {}; first token after {:.0} ms; {}",
        count(&usage["prompt_tokens"]),
        name(&prefill["node"]),
        answer.ttft.as_secs_f64() * 1e3,
        rate(count(&usage["completion_tokens"]), answer.generation),
    );
    [first, moved(handover)]
}

fn rate(tokens: u64, generation: Duration) -> String {
    // The first token is not part of the time that the others took.
    let seconds = generation.as_secs_f64();
    if tokens > 1 && seconds > 0.0 { format!("{:.0} tokens/s", (tokens - 1) as f64 / seconds) } else { "one token".to_owned() }
}

/// What moved from prefill to decode, and how much of that time compute hid.
fn moved(handover: &Value) -> String {
    let count = |name: &str| handover[name].as_u64().unwrap_or_default();
    if handover.is_null() {
        return "nothing to move: the prompt was prefilled where it decodes".to_owned();
    }
    let had = match count("blocks_had") {
        0 => String::new(),
        had => format!(", which had {had} blocks already"),
    };
    let (transfer, exposed) = (count("transfer_us"), count("exposed_us"));
    let hidden = match transfer {
        0 => String::new(),
        _ => {
            format!("; {:.0} % of the move hidden behind compute", 100.0 * (1.0 - exposed.min(transfer) as f64 / transfer as f64))
        }
    };
    let node = handover["node"].as_str().unwrap_or("?");
    format!("moved {} of KV ({} blocks) to {node}{had}{hidden}", bytes(count("bytes")), count("blocks_sent"))
}

fn bytes(count: u64) -> String {
    match count {
        0..1_000 => format!("{count} bytes"),
        1_000..1_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        _ => format!("{:.1} MB", count as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn figures_tell_what_was_cached_moved_and_hidden() {
        let answer = Answer {
            usage: json!({"prompt_tokens": 400, "completion_tokens": 11, "prompt_tokens_details": {"cached_tokens": 384}}),
            timings: json!({
                "prefill": {"node": "prefill-2", "compute_us": 20_400},
                "handover": {"node": "decode-1", "bytes": 2_500_000, "blocks_sent": 3, "blocks_had": 22, "transfer_us": 10_000, "exposed_us": 1000},
            }),
            ttft: Duration::from_millis(45),
            generation: Duration::from_millis(500),
            ..Answer::default()
        };
        let lines = figures(&answer);
        assert_eq!(
            lines[0],
            "prompt 400 tokens, 384 cached on prefill-2; prefill 20 ms on prefill-2; first token after 45 ms; 20 tokens/s"
        );
        assert_eq!(
            lines[1],
            "moved 2.5 MB of KV (3 blocks) to decode-1, which had 22 blocks already; 90 % of the move hidden behind compute"
        );
        assert!(moved(&Value::Null).starts_with("nothing to move"));
    }

    #[test]
    fn an_answer_is_wrapped_however_it_is_cut() {
        let text = "word ".repeat(60) + "end\n\nnext";
        for size in [1, 3, 7, 400] {
            let (mut column, mut out) = (0, String::new());
            for piece in text.as_bytes().chunks(size) {
                out.push_str(&wrap(std::str::from_utf8(piece).unwrap(), &mut column));
            }
            assert!(out.lines().all(|line| line.chars().count() <= WIDTH + size + 5), "{size}:\n{out}");
            assert_eq!(out.split_whitespace().collect::<Vec<_>>(), text.split_whitespace().collect::<Vec<_>>(), "{size}:\n{out}");
        }
    }
}
