//! `millctl demo`: runs a cluster, holds a conversation with it, kills the leader of its coordinator in the middle of an answer, and
//! stops everything. Every step is checked and has a deadline; the first that fails ends the show with a message and exit code 1.

mod screen;
mod script;
mod talk;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use millrace_core::layout::{Dtype, KvDtype};
use millrace_node::shutdown::Shutdown;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use self::screen::Screen;
use self::script::first_paragraph;
use self::talk::{Answer, Talk};
use super::local::{Local, Say, State, UpArgs, View};

/// Time for the cluster to serve.
const START_WAIT_MAX: Duration = Duration::from_secs(180);
/// Time for one answer.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(90);
/// Time for the others to agree on a new leader.
const ELECTION_WAIT_MAX: Duration = Duration::from_secs(20);
/// Tokens of an answer in the conversation.
const TURN_TOKENS: u32 = 60;
/// Tokens of the answer that survives.
const LONG_TOKENS: u32 = 120;
/// After so many tokens of it the leader dies.
const KILL_AT: u32 = 20;

/// What to show.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Example:\n  millctl demo --model model.gguf")]
pub struct DemoArgs {
    /// Model directory or GGUF file: an instruct model
    #[arg(long)]
    model: PathBuf,
    /// Element type of weights and activations, bf16 or f32
    #[arg(long, default_value = "bf16")]
    dtype: Dtype,
    /// What keys and values are cached as, bf16, int8 or f32; as --dtype says if absent
    #[arg(long, value_name = "TYPE")]
    kv_dtype: Option<KvDtype>,
    /// Threads of each node's engine; 0 takes all processors
    #[arg(long, default_value_t = 0)]
    threads: u16,
}

/// Shows it.
///
/// # Errors
/// The first step that failed.
pub async fn run(args: DemoArgs) -> Result<()> {
    let shutdown = Shutdown::new();
    shutdown.on_signals().context("signal handlers")?;
    let screen = Screen::new();
    let began = Instant::now();
    screen.title(&args.model, args.dtype);
    let progress = screen.clone();
    let say: Say = Arc::new(move |line| progress.dim(line));
    let up = UpArgs {
        model: args.model,
        coordinators: 3,
        prefill: 2,
        decode: 2,
        http: ([127, 0, 0, 1], 0).into(),
        dtype: args.dtype,
        kv_dtype: args.kv_dtype,
        dir: None,
        kv_blocks: None,
        kv_populate: false,
        threads: args.threads,
        no_restart: false,
        wait: START_WAIT_MAX.as_secs(),
        exit_with_parent: false,
        checksum_engine: None,
        hand_over_after_prefill: false,
        route: "auto".into(),
    };
    let mut local = Local::launch(&up, say).await?;
    let shown = tokio::select! {
        shown = show(&mut local, &screen) => shown,
        reason = shutdown.wait() => Err(anyhow::anyhow!("{reason}: stopped before the end")),
    };
    screen.section("Stopping");
    let (dir, states) = (local.dir().to_owned(), local.states());
    local.stop().await;
    let seen = shown?;
    nothing_left(&dir, &states)?;
    screen.summary(&seen, began.elapsed());
    Ok(())
}

/// What the end says was shown.
#[derive(Clone, Debug, Default)]
struct Seen {
    turns: usize,
    prompt_tokens: u64,
    cached_tokens: u64,
    moved_bytes: u64,
    killed: String,
    leader: String,
    election: Duration,
    survived_tokens: u64,
}

async fn show(local: &mut Local, screen: &Screen) -> Result<Seen> {
    local.ready(START_WAIT_MAX).await.context("starting the cluster")?;
    let talk = Talk::new(local.http()).await.context("asking for the model's name")?;
    let leader = local.view().borrow().leader.clone().unwrap_or_default();
    screen.picture(&local.states(), &leader, local.http());
    let mut seen = Seen::default();
    converse(&talk, screen, &mut seen).await?;
    survive(local, &talk, screen, &mut seen).await?;
    Ok(seen)
}

/// Three turns over one system prompt; each carries the conversation so far.
async fn converse(talk: &Talk, screen: &Screen, seen: &mut Seen) -> Result<()> {
    let mut messages = vec![json!({"role": "system", "content": script::SYSTEM})];
    for (i, question) in script::QUESTIONS.iter().enumerate() {
        screen.section(&format!("Turn {} of {}", i + 1, script::QUESTIONS.len()));
        screen.question(question);
        messages.push(json!({"role": "user", "content": question}));
        let body = json!({"messages": messages, "max_tokens": TURN_TOKENS});
        let answer = spoken(talk, screen, body).await.with_context(|| format!("turn {}", i + 1))?;
        ensure!(answer.usage["completion_tokens"].as_u64() > Some(0), "turn {}: the answer is empty", i + 1);
        let cached = answer.usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or_default();
        screen.figures(&answer);
        seen.turns += 1;
        seen.prompt_tokens += answer.usage["prompt_tokens"].as_u64().unwrap_or_default();
        seen.cached_tokens += cached;
        seen.moved_bytes += answer.timings["handover"]["bytes"].as_u64().unwrap_or_default();
        messages.push(json!({"role": "assistant", "content": first_paragraph(&answer.text)}));
    }
    // One turn may go where nothing is cached, when that is predicted to be sooner; not all of them.
    ensure!(seen.cached_tokens > 0, "nothing of the conversation was ever cached");
    Ok(())
}

/// That neither the folder nor a process is there any more.
fn nothing_left(dir: &Path, states: &[State]) -> Result<()> {
    ensure!(!dir.exists(), "{} is left behind", dir.display());
    let name = dir.to_string_lossy();
    for state in states {
        let Some(pid) = state.pid else { continue };
        // The number may be somebody else's by now; ours were told of the folder.
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        ensure!(!String::from_utf8_lossy(&words).contains(&*name), "{}, process {pid}, is left behind", state.name);
    }
    Ok(())
}

/// An answer's first paragraph, printed as it comes; the rest is read, for the figures at its end.
async fn spoken(talk: &Talk, screen: &Screen, body: Value) -> Result<Answer> {
    let mut running = talk.ask(body).await?;
    let speak = async {
        let (mut whole, mut shown) = (String::new(), 0);
        while let Some(text) = running.next().await? {
            whole.push_str(&text);
            let paragraph = first_paragraph(&whole);
            screen.speak(&paragraph[shown..]);
            shown = paragraph.len();
        }
        Ok::<_, anyhow::Error>(())
    };
    let spoken = timeout(ANSWER_WAIT_MAX, speak).await;
    screen.end_speech();
    spoken.with_context(|| format!("no end after {} s", ANSWER_WAIT_MAX.as_secs()))??;
    Ok(running.answer())
}

/// The leader dies in the middle of an answer; the answer, checked against an undisturbed one, does not.
async fn survive(local: &Local, talk: &Talk, screen: &Screen, seen: &mut Seen) -> Result<()> {
    screen.section("The leader dies");
    screen.question(script::LONG_QUESTION);
    // Each of the two computes its prompt afresh, so that both take the very same steps and may be compared to the letter.
    let body = |salt: &str| json!({"messages": [{"role": "user", "content": script::LONG_QUESTION}], "max_tokens": LONG_TOKENS, "cache_salt": salt});
    let mut running = talk.ask(body("disturbed")).await?;
    let mut killed = None;
    let speak = async {
        while let Some(text) = running.next().await? {
            screen.speak(&text);
            if running.tokens() >= KILL_AT && killed.is_none() {
                killed = Some(kill_leader(local, screen).await?);
            }
        }
        Ok::<_, anyhow::Error>(())
    };
    let spoken = timeout(ANSWER_WAIT_MAX, speak).await;
    screen.end_speech();
    spoken.with_context(|| format!("no end after {} s", ANSWER_WAIT_MAX.as_secs()))?.context("the answer did not survive")?;
    let Some((dead, election)) = killed else {
        bail!("the answer ended after {} tokens, before the leader died", running.tokens())
    };
    let disturbed = running.answer();
    (seen.leader, seen.election) = election.await.context("watching the election")??;
    screen.note("The answer reached its end.");
    screen.figures(&disturbed);
    let undisturbed = timeout(ANSWER_WAIT_MAX, talk.ask_whole(body("undisturbed"))).await.context("asking again")??;
    compare(&disturbed.text, &undisturbed.text)?;
    screen.note("Asked again without any trouble, the model says the same, to the letter.");
    seen.killed = dead;
    seen.survived_tokens = disturbed.usage["completion_tokens"].as_u64().unwrap_or_default();
    Ok(())
}

fn compare(disturbed: &str, undisturbed: &str) -> Result<()> {
    let same = disturbed.chars().zip(undisturbed.chars()).take_while(|(a, b)| a == b).count();
    ensure!(
        disturbed == undisturbed,
        "the disturbed answer differs from the undisturbed one after {same} characters:\n{undisturbed}"
    );
    Ok(())
}

/// Kills the leader; what is given waits for the next one.
async fn kill_leader(local: &Local, screen: &Screen) -> Result<(String, JoinHandle<Result<(String, Duration)>>)> {
    let view = local.view();
    let leader = view.borrow().leader.clone().context("nobody leads")?;
    let pid = local
        .states()
        .iter()
        .find(|state| state.name == leader)
        .and_then(|state| state.pid)
        .context("the leader has no process")?;
    local.kill(&leader).await?;
    screen.aside(&format!("kill -9 {pid}: {leader}, the leader, is dead"));
    Ok((leader.clone(), tokio::spawn(new_leader(view, leader, screen.clone()))))
}

/// Waits until another leads than `dead`, and says so in the middle of whatever is said.
async fn new_leader(mut view: watch::Receiver<View>, dead: String, screen: Screen) -> Result<(String, Duration)> {
    let killed = Instant::now();
    let found = view.wait_for(|view| view.leader.as_ref().is_some_and(|leader| *leader != dead));
    let found = timeout(ELECTION_WAIT_MAX, found)
        .await
        .with_context(|| format!("no new leader after {} s", ELECTION_WAIT_MAX.as_secs()))?;
    let View { leader, term, .. } = found.context("nobody watches the cluster")?.clone();
    let (leader, took) = (leader.unwrap_or_default(), killed.elapsed());
    screen.good_news(&format!("{leader} leads now, in term {term}: seen {:.1} s after the kill", took.as_secs_f64()));
    Ok((leader, took))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_different_answer_is_a_failure_that_says_where() {
        assert!(compare("the same", "the same").is_ok());
        let error = compare("the river", "the rivet").unwrap_err().to_string();
        assert!(error.contains("after 8 characters") && error.contains("the rivet"), "{error}");
        assert!(compare("a", "ab").is_err());
    }
}
