//! How every command asks, prints, waits and changes things. A command file holds its questions, its answers' types and columns, and
//! nothing of this.
//!
//! A question is three things: flags with [`Ask`] flattened into them, a typed [`Answer`], and one call:
//! ```ignore
//! #[derive(Serialize, Deserialize)] #[serde(default)] struct Members { members: Vec<Member> }
//! const COLUMNS: &[Column<Member>] = &[column("ID", |m| cell(m.id)), column("NAME", |m| cell(&m.name)), wide("PID", |m| maybe(m.pid))];
//! impl Answer for Members {
//!     fn page(&self) -> Page { Page::new().table(COLUMNS, &self.members) }
//!     fn names(&self) -> Vec<String> { self.members.iter().map(|m| format!("member/{}", m.name)).collect() }
//! }
//! Members::List(ask) => ask.show::<Members>(json!({"q": "members"})).await.map(drop),
//! ```
//! `show` asks any replica, prints as `-o` says, and with `-w` goes on for ever. JSON and YAML show the answer *as it came*, with
//! `apiVersion` before it, so a field that the type does not name is not lost; the type is for tables and names.
//!
//! A change has [`Change`] flattened: `change.apply::<Done>("cordon decode-1", query)` says the plan and sends nothing under `--dry-run`.
//! What takes time has [`Wait`] flattened: `wait.until("drained", async || Ok(None or Some(done)))` looks again until done or
//! `--timeout` (exit 7). [`Line`] is for commands that ask several things; [`Shape`] for those that ask nobody.
//!
//! Exit codes: a refusal's first word decides (`not found:`, `conflict:`, `unavailable:`, `denied:`, `usage:`; see
//! [`Exit::of_refusal`]); everything else is 1. Admin handlers give such words.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::ask::Asker;
use super::context::{Reach, Which};
use super::exit::Exit;
use super::table::Page;

/// The version of the JSON and YAML that is printed.
pub const API_VERSION: &str = "admin/v1";
/// Time between two looks of `--wait`.
const LOOK_PAUSE: Duration = Duration::from_millis(200);
/// Homes the cursor and clears the screen below it.
const REDRAW: &str = "\x1b[H\x1b[2J";

/// How an answer is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For people with wide screens.
    Wide,
    /// For programs.
    Json,
    /// For programs and people.
    Yaml,
    /// KIND/NAME of each object, one a line, for scripts.
    Name,
}

/// What can be printed.
pub trait Answer: Serialize + DeserializeOwned {
    /// What people see.
    fn page(&self) -> Page;

    /// `KIND/NAME` of each object in it.
    fn names(&self) -> Vec<String> {
        Vec::new()
    }
}

/// The flag of a command that asks nobody.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Shape {
    /// How the answer is printed
    #[arg(short, long, value_enum, default_value = "table")]
    pub output: Format,
}

/// The flags of a question.
#[derive(Args, Clone, Debug)]
pub struct Ask {
    #[command(flatten)]
    pub(super) which: Which,
    #[command(flatten)]
    pub(super) shape: Shape,
    /// Only an answer that a quorum vouches for: nothing acknowledged before is missing in it
    #[arg(long)]
    pub fresh: bool,
    /// Ask again and again and print what changes
    #[arg(short, long)]
    pub watch: bool,
    /// Seconds between two questions of --watch
    #[arg(long, default_value_t = 2.0, value_name = "SECONDS", requires = "watch", value_parser = seconds)]
    pub interval: f64,
}

/// The flags of a change.
#[derive(Args, Clone, Debug)]
pub struct Change {
    #[command(flatten)]
    pub(super) which: Which,
    #[command(flatten)]
    pub(super) shape: Shape,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// The flags of what takes time.
#[derive(Args, Clone, Copy, Debug)]
pub struct Wait {
    /// Wait until it is done
    #[arg(long)]
    pub wait: bool,
    /// Seconds that --wait waits at most
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: f64,
}

pub(super) fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|e| format!("{e}"))?;
    // A year is beyond anybody's patience, and far below what a duration holds.
    if (0.05..=31_536_000.0).contains(&seconds) { Ok(seconds) } else { Err("expected 0.05 seconds to a year".into()) }
}

/// A cluster, and a line to it.
pub struct Line {
    /// Which one it is.
    pub reach: Reach,
    asker: Asker,
    /// What is asked must be vouched for by a quorum.
    fresh: bool,
}

impl Line {
    /// Finds the cluster. Connects to nobody yet.
    ///
    /// # Errors
    /// [`Exit::NotFound`] when there is none; the certificate cannot be used.
    pub fn open(which: &Which) -> Result<Self> {
        let reach = which.resolve()?;
        let asker = Asker::to(&reach)?;
        Ok(Self { reach, asker, fresh: false })
    }

    /// Asks any replica.
    ///
    /// # Errors
    /// Nobody answers, or a replica refuses.
    pub async fn ask(&mut self, query: &Value) -> Result<Value> {
        if !self.fresh {
            return Ok(self.asker.ask(query).await?);
        }
        let mut query = query.clone();
        query["fresh"] = json!(true);
        Ok(self.asker.ask(&query).await?)
    }

    /// Asks, and reads the answer.
    ///
    /// # Errors
    /// As [`Line::ask`], and an answer of another shape.
    pub async fn get<A: DeserializeOwned>(&mut self, query: &Value) -> Result<A> {
        read(&self.ask(query).await?)
    }

    /// Says goodbye.
    pub async fn close(self) {
        self.asker.close().await;
    }
}

fn read<A: DeserializeOwned>(value: &Value) -> Result<A> {
    A::deserialize(value).context("the answer has another shape than this millctl knows; are the versions the same?")
}

impl Ask {
    /// Asks one question and prints the answer, once or for ever. Gives the answer.
    ///
    /// # Errors
    /// As [`Line::ask`], unless `--watch` goes on in spite of it.
    pub async fn show<A: Answer>(&self, query: Value) -> Result<A> {
        self.show_of(async |line: &mut Line| line.ask(&query).await).await
    }

    /// [`Ask::show`] of what `question` makes of one or several answers.
    ///
    /// # Errors
    /// As [`Ask::show`].
    pub async fn show_of<A: Answer>(&self, mut question: impl AsyncFnMut(&mut Line) -> Result<Value>) -> Result<A> {
        let mut line = Line { fresh: self.fresh, ..Line::open(&self.which)? };
        let first = question(&mut line).await;
        let mut printer = Printer::new(self.shape.output, self.watch);
        let mut print = |value: Value| -> Result<(A, bool)> {
            let answer: A = read(&value)?;
            let read_on = printer.print(&value, &answer)?;
            Ok((answer, read_on))
        };
        if !self.watch {
            line.close().await;
            return Ok(print(first?)?.0);
        }
        print(first?)?;
        loop {
            tokio::time::sleep(Duration::from_secs_f64(self.interval)).await;
            match question(&mut line).await.and_then(&mut print) {
                Ok((_, true)) => {}
                Ok((answer, false)) => return Ok(answer),
                Err(error) => eprintln!("millctl: {error:#}; asking again"),
            }
        }
    }
}

impl Change {
    /// Does what `plan` says by asking `query`, and prints the answer; or says the plan only.
    ///
    /// # Errors
    /// As [`Line::ask`].
    pub async fn apply<A: Answer>(&self, plan: &str, query: Value) -> Result<Option<A>> {
        if self.dry_run {
            return self.plan(plan).map(|()| None);
        }
        let mut line = Line::open(&self.which)?;
        let answer = line.ask(&query).await;
        line.close().await;
        let value = answer?;
        let answer: A = read(&value)?;
        Printer::new(self.shape.output, false).print(&value, &answer)?;
        Ok(Some(answer))
    }

    /// Prints what would be done.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn plan(&self, plan: &str) -> Result<()> {
        self.shape.print(&Plan { dry_run: true, plan: plan.to_owned() })
    }
}

/// What `--dry-run` prints.
#[derive(Serialize, serde::Deserialize)]
struct Plan {
    dry_run: bool,
    plan: String,
}

impl Answer for Plan {
    fn page(&self) -> Page {
        Page::new().line(format_args!("would {}", self.plan))
    }
}

impl Wait {
    /// Looks until there is an answer; says on standard error what is awaited whenever that changes. `look` gives what is still
    /// missing as `Err(reason)` inside of `Ok`.
    ///
    /// # Errors
    /// [`Exit::Timeout`] with the last reason; what `look` fails with.
    pub async fn until<T>(&self, what: &str, mut look: impl AsyncFnMut() -> Result<Result<T, String>>) -> Result<T> {
        let until = Instant::now() + Duration::from_secs_f64(self.timeout);
        let mut told = String::new();
        loop {
            let missing = match look().await? {
                Ok(done) => return Ok(done),
                Err(missing) => missing,
            };
            if Instant::now() >= until {
                return Err(Exit::Timeout.error(format!("{what}: not within {} s: {missing}", self.timeout)));
            }
            if missing != told {
                eprintln!("waiting: {missing}");
                told = missing;
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }
}

impl Shape {
    /// Prints an answer that was made here.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn print<A: Answer>(self, answer: &A) -> Result<()> {
        let value = serde_json::to_value(answer).context("writing JSON")?;
        Printer::new(self.output, false).print(&value, answer).map(drop)
    }
}

/// Prints answers one after the other.
pub struct Printer {
    format: Format,
    watch: bool,
    terminal: bool,
    colour: bool,
    last: Option<String>,
}

impl Printer {
    /// A printer to standard output.
    #[must_use]
    pub fn new(format: Format, watch: bool) -> Self {
        let terminal = std::io::stdout().is_terminal();
        Self { format, watch, terminal, colour: terminal && colours_wanted(), last: None }
    }

    /// Prints an answer, unless it is what was printed last; `false` when nobody reads any more.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn print<A: Answer>(&mut self, value: &Value, answer: &A) -> Result<bool> {
        let text = self.text(value, answer)?;
        if self.last.as_ref() == Some(&text) {
            return Ok(true);
        }
        let redraw = self.watch && self.terminal && matches!(self.format, Format::Table | Format::Wide);
        let written = write_out(if redraw { REDRAW } else { "" }, &text);
        self.last = Some(text);
        written
    }

    fn text<A: Answer>(&self, value: &Value, answer: &A) -> Result<String> {
        let versioned = Versioned { version: API_VERSION, fields: value };
        Ok(match self.format {
            Format::Table => answer.page().render(false, self.colour),
            Format::Wide => answer.page().render(true, self.colour),
            // One document a line, so that a program can read them as they come.
            Format::Json if self.watch => serde_json::to_string(&versioned).context("writing JSON")? + "\n",
            Format::Json => serde_json::to_string_pretty(&versioned).context("writing JSON")? + "\n",
            Format::Yaml => {
                let start = if self.watch { "---\n" } else { "" };
                start.to_owned() + &yaml_serde::to_string(&versioned).context("writing YAML")?
            }
            Format::Name => answer.names().into_iter().map(|name| name + "\n").collect(),
        })
    }
}

/// An object with the version before its own fields.
#[derive(Serialize)]
struct Versioned<'a> {
    #[serde(rename = "apiVersion")]
    version: &'static str,
    #[serde(flatten)]
    fields: &'a Value,
}

/// Whether the user wants colours: <https://no-color.org>.
#[must_use]
pub fn colours_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

fn write_out(before: &str, text: &str) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(before.as_bytes()).and_then(|()| out.write_all(text.as_bytes())).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        // A reader such as `head` may have enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("standard output"),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::super::table::{Column, cell, column, wide};
    use super::*;

    #[derive(Serialize, Deserialize)]
    #[serde(default)]
    struct One {
        name: String,
        pid: u32,
    }

    impl Default for One {
        fn default() -> Self {
            Self { name: "a".into(), pid: 7 }
        }
    }

    const COLUMNS: &[Column<One>] = &[column("NAME", |one| cell(&one.name)), wide("PID", |one| cell(one.pid))];

    impl Answer for One {
        fn page(&self) -> Page {
            Page::new().table(COLUMNS, [self])
        }

        fn names(&self) -> Vec<String> {
            vec![format!("one/{}", self.name)]
        }
    }

    fn text(format: Format, watch: bool) -> String {
        let printer = Printer { format, watch, terminal: false, colour: false, last: None };
        let value = json!({"name": "a", "pid": 7, "unknown to the type": true});
        printer.text(&value, &read::<One>(&value).unwrap()).unwrap()
    }

    #[test]
    fn an_answer_has_five_forms() {
        assert_eq!(text(Format::Table, false), "NAME\na\n");
        assert_eq!(text(Format::Wide, false), "NAME  PID\na       7\n");
        assert_eq!(text(Format::Name, false), "one/a\n");
        let json: Value = serde_json::from_str(&text(Format::Json, false)).unwrap();
        assert_eq!((&json["apiVersion"], &json["unknown to the type"]), (&json!(API_VERSION), &json!(true)));
        assert_eq!(text(Format::Json, true).lines().count(), 1);
        let yaml: Value = yaml_serde::from_str(&text(Format::Yaml, false)).unwrap();
        assert_eq!(yaml, json, "both say the same");
        assert!(text(Format::Yaml, false).starts_with("apiVersion: admin/v1\n"), "the version is first");
        assert!(text(Format::Yaml, true).starts_with("---\n"));
    }

    #[tokio::test]
    async fn waiting_ends_with_the_answer_or_with_the_time() {
        let wait = Wait { wait: true, timeout: 0.5 };
        let mut looks = 0;
        let done = wait.until("it", async || {
            looks += 1;
            Ok(if looks < 3 { Err("not yet".to_owned()) } else { Ok(looks) })
        });
        assert_eq!(done.await.unwrap(), 3);
        let never = Wait { wait: true, timeout: 0.05 };
        let error = never.until("drained", async || Ok(Err::<(), _>("3 requests".into()))).await.unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Timeout);
        assert!(error.to_string().contains("drained: not within 0.05 s: 3 requests"), "{error}");
        let broken = wait.until("it", async || -> Result<Result<(), String>> { Err(Exit::NotFound.error("gone")) }).await;
        assert_eq!(Exit::of(&broken.unwrap_err()), Exit::NotFound);
    }

    #[test]
    fn seconds_are_bounded() {
        assert_eq!(seconds("0.5"), Ok(0.5));
        for bad in ["0", "-1", "nan", "inf", "1e300", "x"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
