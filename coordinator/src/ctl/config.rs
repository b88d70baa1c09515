//! `millctl config`: the cluster's settings.
//!
//! A change is made only to the settings that were looked at: `set` reads their version first and the log compares it, so that of two
//! operators at a time the second is told (exit 6).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::exit::Exit;
use super::output::{Answer, Ask, Change, Line};
use super::table::{Column, Page, Tone, cell, column, wide};

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Config {
    /// All settings, or one
    #[command(after_help = "Example:\n  millctl config get slo.ttft_ms -o wide")]
    Get(Get),
    /// Change settings, all or none; an empty value is the default
    #[command(after_help = "Example:\n  millctl config set slo.ttft_ms=500 slo.tpot_ms=50 --dry-run")]
    Set(Set),
    /// What differs from the defaults, or from a file
    #[command(after_help = "Example:\n  millctl config diff -f settings.conf")]
    Diff(Diff),
}

/// Which settings.
#[derive(Args, Clone, Debug)]
pub struct Get {
    /// The setting; all if absent
    key: Option<String>,
    #[command(flatten)]
    ask: Ask,
}

/// Settings to change.
#[derive(Args, Clone, Debug)]
pub struct Set {
    /// KEY=VALUE; without a value its default
    #[arg(value_name = "KEY=VALUE", required_unless_present = "file")]
    values: Vec<String>,
    /// A file of KEY = VALUE lines; # begins a comment
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// Only if the settings have this version; the one that is found if absent
    #[arg(long)]
    if_version: Option<u64>,
    #[command(flatten)]
    change: Change,
}

/// What to compare with.
#[derive(Args, Clone, Debug)]
pub struct Diff {
    /// A file of KEY = VALUE lines; the defaults if absent
    #[arg(short, long)]
    file: Option<PathBuf>,
    #[command(flatten)]
    ask: Ask,
}

/// Runs one.
///
/// # Errors
/// The cluster does not answer, or refuses; [`Exit::Conflict`] when somebody else changed the settings meanwhile.
pub async fn run(command: Config) -> Result<()> {
    match command {
        Config::Get(Get { key, ask }) => ask.show::<Settings>(json!({"q": "config", "op": "get", "key": key})).await.map(drop),
        Config::Set(set) => change(set).await,
        Config::Diff(Diff { file, ask }) => {
            let file = file.as_deref().map(read).transpose()?;
            let question = async |line: &mut Line| {
                let settings: Settings = line.get(&json!({"q": "config", "op": "get"})).await?;
                Ok(serde_json::to_value(difference(&settings, file.as_ref()))?)
            };
            ask.show_of::<Changes>(question).await.map(drop)
        }
    }
}

async fn change(set: Set) -> Result<()> {
    let mut wanted = set.file.as_deref().map(read).transpose()?.unwrap_or_default();
    for pair in &set.values {
        let (key, value) = parse(pair).map_err(|reason| Exit::Usage.error(reason))?;
        wanted.insert(key, value);
    }
    let mut line = Line::open(&set.change.which)?;
    let done = apply(&mut line, &set, &wanted).await;
    line.close().await;
    set.change.shape.print(&done?)
}

async fn apply(line: &mut Line, set: &Set, wanted: &Wanted) -> Result<Changes> {
    let if_version = match set.if_version {
        Some(version) => version,
        None => line.get::<Settings>(&json!({"q": "config", "op": "get"})).await?.version,
    };
    let dry_run = set.change.dry_run;
    line.get(&json!({"q": "config", "op": "set", "set": wanted, "if_version": if_version, "dry_run": dry_run})).await
}

/// Each key and its value; `None` for its default.
pub type Wanted = BTreeMap<String, Option<String>>;

fn parse(pair: &str) -> Result<(String, Option<String>), String> {
    let (key, value) = pair.split_once('=').ok_or_else(|| format!("{pair:?} is not KEY=VALUE"))?;
    let (key, value) = (key.trim(), value.trim());
    if key.is_empty() { Err(format!("{pair:?} names no key")) } else { Ok((key.into(), (!value.is_empty()).then(|| value.into()))) }
}

/// Settings of a file: `KEY = VALUE` lines; `#` begins a comment.
///
/// # Errors
/// Names the line that is wrong.
pub fn read(path: &Path) -> Result<Wanted> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut wanted = Wanted::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let (key, value) = parse(line).map_err(|e| Exit::Usage.error(format!("{}:{}: {e}", path.display(), i + 1)))?;
        if wanted.insert(key.clone(), value).is_some() {
            return Err(Exit::Usage.error(format!("{}:{}: {key} is set twice", path.display(), i + 1)));
        }
    }
    Ok(wanted)
}

/// What must change for the settings to be those of the file, or of the defaults to be these.
fn difference(settings: &Settings, file: Option<&Wanted>) -> Changes {
    let change = |setting: &Setting| {
        let (old, new) = match file {
            None => (setting.default.clone(), setting.value.clone()),
            Some(wanted) => {
                let new = wanted.get(&setting.key)?.as_ref();
                let new =
                    new.map_or_else(|| setting.default.clone(), |text| serde_json::from_str(text).unwrap_or_else(|_| json!(text)));
                (setting.value.clone(), new)
            }
        };
        (old != new).then(|| Changed { key: setting.key.clone(), old, new })
    };
    let mut changes: Vec<Changed> = settings.settings.iter().filter_map(change).collect();
    let known = |key: &String| settings.settings.iter().any(|setting| setting.key == *key);
    for (key, value) in file.into_iter().flatten().filter(|(key, _)| !known(key)) {
        changes.push(Changed { key: key.clone(), old: Value::Null, new: json!(value) });
    }
    Changes { version: settings.version, dry_run: false, changes }
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Settings {
    version: u64,
    settings: Vec<Setting>,
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Setting {
    key: String,
    value: Value,
    default: Value,
    changed: bool,
    min: u64,
    max: u64,
    unit: String,
    doc: String,
}

const SETTINGS: &[Column<Setting>] = &[
    column("KEY", |s| cell(&s.key)),
    column("VALUE", |s| cell(&s.value).tone(if s.changed { Tone::Warn } else { Tone::Plain })),
    column("UNIT", |s| cell(&s.unit)),
    column("DEFAULT", |s| cell(&s.default)),
    wide("MIN", |s| cell(s.min)),
    wide("MAX", |s| cell(s.max)),
    column("MEANING", |s| cell(&s.doc)),
];

impl Answer for Settings {
    fn page(&self) -> Page {
        Page::new().line(format_args!("version {}", self.version)).table(SETTINGS, &self.settings)
    }

    fn names(&self) -> Vec<String> {
        self.settings.iter().map(|s| format!("setting/{}", s.key)).collect()
    }
}

#[derive(Serialize, Deserialize, Debug, Default)]
#[serde(default)]
struct Changes {
    version: u64,
    dry_run: bool,
    changes: Vec<Changed>,
}

#[derive(Serialize, Deserialize, Debug, Default, PartialEq)]
#[serde(default)]
struct Changed {
    key: String,
    old: Value,
    new: Value,
}

const CHANGES: &[Column<Changed>] =
    &[column("KEY", |c| cell(&c.key)), column("OLD", |c| cell(&c.old)), column("NEW", |c| cell(&c.new))];

impl Answer for Changes {
    fn page(&self) -> Page {
        let what = match (self.changes.is_empty(), self.dry_run) {
            (true, _) => "no difference",
            (false, true) => "would change",
            (false, false) => "changed",
        };
        let page = Page::new().line(format_args!("version {}   {what}", self.version));
        if self.changes.is_empty() { page } else { page.table(CHANGES, &self.changes) }
    }

    fn names(&self) -> Vec<String> {
        self.changes.iter().map(|c| format!("setting/{}", c.key)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_and_files_are_read() {
        assert_eq!(parse("a.b = 3"), Ok(("a.b".into(), Some("3".into()))));
        assert_eq!(parse("a="), Ok(("a".into(), None)));
        assert!(parse("a").is_err() && parse("=3").is_err());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "# all\nslo.ttft_ms = 5 # fast\n\nauth.required=true\n").unwrap();
        assert_eq!(read(&path).unwrap().len(), 2);
        for wrong in ["x\n", "a=1\na=2\n"] {
            std::fs::write(&path, wrong).unwrap();
            assert_eq!(Exit::of(&read(&path).unwrap_err()), Exit::Usage);
        }
    }

    #[test]
    fn a_difference_is_to_the_defaults_or_to_a_file() {
        let setting =
            |key: &str, value: u64| Setting { key: key.into(), value: json!(value), default: json!(1), ..Setting::default() };
        let settings = Settings { version: 3, settings: vec![setting("a", 1), setting("b", 2)] };
        let changed = |key: &str, old: Value, new: Value| Changed { key: key.into(), old, new };
        assert_eq!(difference(&settings, None).changes, [changed("b", json!(1), json!(2))]);
        let file = Wanted::from([("a".into(), Some("7".into())), ("b".into(), Some("2".into())), ("c".into(), Some("x".into()))]);
        let differences = difference(&settings, Some(&file)).changes;
        assert_eq!(differences, [changed("a", json!(1), json!(7)), changed("c", Value::Null, json!("x"))]);
    }
}
