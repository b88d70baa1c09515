//! Traces in Mooncake's form: each request is a time, two lengths and the ids of its blocks, where an id names the block and all before
//! it. Every id becomes `block_tokens` tokens, so a trace of 512-token blocks fits a small model with its sharing exactly as it was.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Deserialize;

use super::plan::{Class, Plan, Planned, Role, Slo};
use super::workload::{Common, Maker, file_name};

/// Which trace, and how it is made smaller.
#[derive(Args, Clone, Debug)]
pub struct TraceArgs {
    /// JSON lines with timestamp (ms), input_length, output_length, hash_ids
    pub file: PathBuf,
    /// Tokens that an id stands for in the trace
    #[arg(long, default_value_t = 512)]
    pub trace_block: u32,
    /// Answers are so many times as long as recorded; as the blocks when absent
    #[arg(long)]
    pub output_scale: Option<f64>,
    /// Turns of a session wait for the answer before them and its recorded delay, instead of their recorded time
    #[arg(long)]
    pub by_session: bool,
    /// What holds for every workload
    #[command(flatten)]
    pub common: Common,
}

/// A line of a trace.
#[derive(Clone, Debug, Deserialize)]
pub struct TraceRow {
    /// Milliseconds from the start.
    pub timestamp: f64,
    /// Tokens of the prompt.
    pub input_length: u64,
    /// Tokens of the answer.
    pub output_length: u64,
    /// Its blocks.
    pub hash_ids: Vec<u64>,
    /// Its session.
    pub session: Option<u32>,
    /// Its place in the session.
    #[serde(default)]
    pub turn: u32,
    /// Milliseconds since the answer before.
    #[serde(default)]
    pub delay_ms: f64,
    /// Its kind.
    pub cls: Option<String>,
}

/// Reads a trace, at most `rows_max` rows of it.
///
/// # Errors
/// Names the line that is wrong.
pub fn read(path: &Path, rows_max: usize) -> Result<Vec<TraceRow>> {
    let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    let lines = BufReader::new(file).lines().take(rows_max).enumerate();
    lines.map(|(at, line)| serde_json::from_str(&line?).with_context(|| format!("{}: line {}", path.display(), at + 1))).collect()
}

/// Tokens of a row's prompt at `block_tokens` for each id: every block whole but the last, which keeps its share.
#[must_use]
pub fn scaled_tokens(row: &TraceRow, trace_block: u32, block_tokens: u32) -> u64 {
    (row.input_length * u64::from(block_tokens)).div_ceil(u64::from(trace_block)).max(1)
}

/// Makes the plan of a trace.
///
/// # Errors
/// A row whose ids do not fit its length; what [`read`] finds.
pub fn plan(args: &TraceArgs) -> Result<Plan> {
    let common = &args.common;
    let mut rows = read(&args.file, common.requests.unwrap_or(usize::MAX))?;
    ensure!(!rows.is_empty(), "{}: no rows", args.file.display());
    rows.sort_by(|a, b| a.timestamp.total_cmp(&b.timestamp));
    let what = format!("trace {}, {} tokens for each block of {}", file_name(&args.file), common.block_tokens, args.trace_block);
    let mut maker = Maker::new(common, what)?;
    let classes = classes(&mut maker.header.classes, common, &rows);
    let output_scale = args.output_scale.unwrap_or(f64::from(common.block_tokens) / f64::from(args.trace_block));
    let mut requests: Vec<(usize, Planned)> = Vec::with_capacity(rows.len());
    // Of each session: its arrival, its last turn, and how long after the arrival that is due.
    let mut sessions: HashMap<u32, (usize, u32, u64)> = HashMap::new();
    let mut first_times = Vec::new();
    for (at, row) in rows.iter().enumerate() {
        let prompt = prompt(&mut maker, args, row).with_context(|| format!("{}: row {}", args.file.display(), at + 1))?;
        let out = ((row.output_length as f64 * output_scale).round() as u32).clamp(1, common.output_max.max(1));
        let class = row.cls.as_ref().and_then(|cls| classes.get(cls)).copied().unwrap_or(0);
        let mut planned = Planned { i: 0, due_ns: 0, prompt, out, class, session: None, turn: 0, after_ms: 0 };
        let mut arrival = first_times.len();
        if let (true, Some(session)) = (args.by_session, row.session) {
            planned.session = Some(session);
            if let Some((first, turn, due_ns)) = sessions.get_mut(&session) {
                *turn += 1;
                planned.after_ms = (row.delay_ms / common.speed) as u32;
                *due_ns = due_ns.saturating_add(u64::from(planned.after_ms) * 1_000_000);
                (arrival, planned.turn, planned.due_ns) = (*first, *turn, *due_ns);
            } else {
                sessions.insert(session, (arrival, 0, 0));
            }
        }
        if arrival == first_times.len() {
            first_times.push((row.timestamp * 1e6) as u64);
        }
        requests.push((arrival, planned));
    }
    let firsts = first_times.len();
    let arrivals = maker.arrivals(Some(first_times))?;
    maker.finish(&arrivals, firsts, requests)
}

/// The classes of the rows, by name; those that the command line does not name have no objective of their own.
fn classes(known: &mut Vec<Class>, common: &Common, rows: &[TraceRow]) -> HashMap<String, u16> {
    if rows.iter().any(|row| row.cls.is_some()) && common.classes.is_empty() {
        known.clear();
    }
    for name in rows.iter().filter_map(|row| row.cls.as_ref()) {
        if !known.iter().any(|class| class.name == *name) {
            known.push(Class { name: name.clone(), slo: Slo::default() });
        }
    }
    known.iter().zip(0..).map(|(class, at)| (class.name.clone(), at)).collect()
}

fn prompt(maker: &mut Maker, args: &TraceArgs, row: &TraceRow) -> Result<Vec<super::plan::Piece>> {
    let (block, blocks) = (args.common.block_tokens, row.hash_ids.len() as u64);
    let recorded = row.input_length.div_ceil(u64::from(args.trace_block));
    ensure!(recorded == blocks, "{} tokens are {recorded} blocks of {}, not {blocks}", row.input_length, args.trace_block);
    let mut left = scaled_tokens(row, args.trace_block, block).min(u64::from(args.common.prompt_max));
    let (mut pieces, mut before) = (Vec::with_capacity(row.hash_ids.len()), 0);
    for id in &row.hash_ids {
        let tokens = left.min(u64::from(block)) as u32;
        if tokens == 0 {
            break;
        }
        let piece = maker.piece(before, *id, tokens, Role::User);
        (left, before) = (left - u64::from(tokens), piece.key);
        pieces.push(piece);
    }
    Ok(pieces)
}

/// Compares a plan with the trace that it was made from, row by row: as many tokens, and one key for each id all over the file. Together
/// with [`super::verify::verify`] this proves that the plan shares exactly what the trace shared.
///
/// # Errors
/// The first row that differs.
pub fn agrees(plan: &Plan, rows: &[TraceRow], trace_block: u32) -> Result<()> {
    ensure!(plan.requests.len() == rows.len(), "{} requests, {} rows", plan.requests.len(), rows.len());
    // The plan is in the order of due times, and later turns of sessions may have moved: rows are found by what they are.
    let mut rows: Vec<&TraceRow> = rows.iter().collect();
    rows.sort_by(|a, b| a.timestamp.total_cmp(&b.timestamp));
    let (mut by_id, mut by_key) = (HashMap::new(), HashMap::new());
    for (request, row) in plan.requests.iter().zip(rows) {
        let i = request.i;
        let tokens = scaled_tokens(row, trace_block, plan.header.block_tokens);
        ensure!(request.prompt_tokens() == tokens, "request {i}: {} tokens, the trace says {tokens}", request.prompt_tokens());
        ensure!(request.prompt.len() == row.hash_ids.len(), "request {i}: another number of blocks");
        for (piece, id) in request.prompt.iter().zip(&row.hash_ids) {
            let (key, name) = (*by_id.entry(*id).or_insert(piece.key), *by_key.entry(piece.key).or_insert(*id));
            ensure!(key == piece.key && name == *id, "request {i}: block {id} has two keys, or a key two blocks");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::verify::verify;
    use super::super::workload::Workload;
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        workload: Workload,
    }

    const ROWS: &str = r#"{"timestamp": 0, "input_length": 1500, "output_length": 320, "hash_ids": [0, 1, 2], "cls": "chat"}
{"timestamp": 0, "input_length": 1024, "output_length": 5, "hash_ids": [0, 3], "cls": "tool", "session": 4}
{"timestamp": 3000, "input_length": 1537, "output_length": 64, "hash_ids": [0, 3, 5, 6], "cls": "tool", "session": 4, "turn": 1, "delay_ms": 250}
{"timestamp": 6000, "input_length": 1500, "output_length": 64, "hash_ids": [0, 1, 2], "cls": "chat"}
"#;

    fn made(rows: &str, options: &str) -> Result<(Plan, Vec<TraceRow>)> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("t.jsonl");
        std::fs::write(&path, rows)?;
        let line = format!("plan trace {} {options}", path.display());
        Ok((Line::try_parse_from(line.split_whitespace())?.workload.plan()?, read(&path, usize::MAX)?))
    }

    #[test]
    fn blocks_scale_and_sharing_stays() {
        let (plan, rows) = made(ROWS, "--speed 2 --class tool:1:ttft=1s").unwrap();
        let tokens: Vec<u64> = plan.requests.iter().map(Planned::prompt_tokens).collect();
        assert_eq!(tokens, [47, 32, 49, 47], "ceil(length x 16 / 512)");
        assert_eq!(plan.requests.iter().map(|r| r.out).collect::<Vec<_>>(), [10, 1, 2, 2]);
        assert_eq!(plan.requests.iter().map(|r| r.due_ns / 1_000_000).collect::<Vec<_>>(), [0, 0, 1500, 3000]);
        let class = |at: usize| &plan.header.classes[usize::from(plan.requests[at].class)];
        assert_eq!((class(0).name.as_str(), class(1).slo.ttft_ms), ("chat", Some(1000.0)));
        assert_eq!(verify(&plan).unwrap().wrong, 0);
        agrees(&plan, &rows, 512).unwrap();
        let common = |a: usize, b: usize| {
            let (a, b) = (plan.prompt(&plan.requests[a], &[]), plan.prompt(&plan.requests[b], &[]));
            a.iter().zip(&b).take_while(|(a, b)| a == b).count()
        };
        assert_eq!((common(0, 1), common(1, 2), common(0, 3)), (16, 32, 47));
    }

    #[test]
    fn a_plan_of_another_trace_is_found() {
        let (plan, mut rows) = made(ROWS, "").unwrap();
        rows[2].hash_ids[1] = 9;
        assert!(agrees(&plan, &rows, 512).is_err());
        let broken = ROWS.replace("1537", "2500");
        assert!(format!("{:#}", made(&broken, "").unwrap_err()).contains("row 3"));
    }

    #[test]
    fn sessions_wait_for_their_answers_when_asked_to() {
        let (plan, _) = made(ROWS, "--by-session --prompt-max 40").unwrap();
        let turns: Vec<_> = plan.requests.iter().filter(|r| r.session == Some(4)).map(|r| (r.turn, r.after_ms)).collect();
        assert_eq!(turns, [(0, 0), (1, 250)]);
        assert!(plan.requests.iter().all(|request| request.prompt_tokens() <= 40));
    }
}
