//! The load harness against its own scripted server, whose clock is the same: what the client notes must enclose what the server did. Nothing
//! here depends on how fast the machine is.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use clap::Parser;
use millrace_load::millload::client::body::{Api, Writer};
use millrace_load::millload::client::pool::{IDLE_MAX, Target};
use millrace_load::millload::live::Live;
use millrace_load::millload::plan::Plan;
use millrace_load::millload::record::{Outcome, Record};
use millrace_load::millload::report::Results;
use millrace_load::millload::run::{Options, Ran, Stop, run};
use millrace_load::millload::server::{MODEL, Script, Server};
use millrace_load::millload::workload::Workload;
use tokio::net::TcpListener;
use tokio::sync::watch;

#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    workload: Workload,
}

fn plan(line: &str) -> Arc<Plan> {
    Arc::new(Line::try_parse_from(format!("plan {line}").split_whitespace()).unwrap().workload.plan().unwrap())
}

/// A server on a thread of its own, until the process ends.
fn serve(script: Script) -> (Arc<Server>, String) {
    let server = Server::new(script, true);
    let (serving, (told, address)) = (server.clone(), std::sync::mpsc::channel());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            told.send(listener.local_addr().unwrap()).unwrap();
            serving.serve(listener).await.unwrap();
        });
    });
    (server, format!("http://{}", address.recv().unwrap()))
}

fn options(url: &str) -> Options {
    let writer = Writer {
        target: Target::parse(url).unwrap(),
        api: Api::Completions,
        model: MODEL.into(),
        key: None,
        headers: vec![],
        extensions: true,
    };
    let (timeout, idle_max) = (Duration::from_secs(120), IDLE_MAX);
    Options { writer, threads: 1, part: (0, 1), speed: 1.0, timeout, in_flight_max: 1000, idle_max, begin: None }
}

fn ran(plan: &Arc<Plan>, options: &Options) -> Ran {
    let (_stopper, stop) = watch::channel(Stop::No);
    run(plan, options, &Arc::new(Live::default()), &stop, &Arc::new(OnceLock::new())).unwrap()
}

fn outcomes(records: &[Record]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    records.iter().for_each(|record| *counts.entry(record.outcome.word()).or_insert(0) += 1);
    counts
}

#[test]
fn what_the_client_notes_encloses_what_the_server_did() {
    let (server, url) = serve(Script { ttft_ms: 20.0, itl_ms: 2.0, cached_share: 0.25, ..Script::default() });
    let plan = plan("random --requests 40 --prompt 64 --output 6 --rate 100");
    let ran = ran(&plan, &options(&url));
    let served = server.served();
    assert_eq!((ran.records.len(), served.len()), (40, 40));
    let at = |ns: u64| ran.started + Duration::from_nanos(ns);
    for record in &ran.records {
        let truth = served[&u64::from(record.i)];
        assert_eq!(record.outcome, Outcome::Ok);
        assert_eq!((record.prompt_tokens, record.output_tokens, record.cached_tokens, record.chunks), (64, 6, Some(16), 6));
        assert!(record.due_ns == plan.requests[record.i as usize].due_ns && record.due_ns <= record.sent_ns, "never early");
        assert!(at(record.sent_ns) <= truth.arrived && truth.first <= at(record.first_ns), "the first token");
        assert!(truth.last <= at(record.last_ns) && record.last_ns <= record.end_ns, "the last token");
        let gaps_ns: u64 = record.gaps_us.iter().map(|gap| u64::from(*gap) * 1000).sum();
        assert!(record.last_ns - record.first_ns - gaps_ns < 5 * 1000, "gaps, cut to microseconds, add up");
        assert!(record.ttft_ms().unwrap() >= 20.0 && record.e2e_ms() >= 30.0, "no faster than the truth");
        assert_eq!(record.server.as_ref().unwrap().compute_us, 20_000);
    }
}

#[test]
fn waiting_for_a_place_at_the_server_counts() {
    let (_, url) = serve(Script { ttft_ms: 20.0, slots: Some(1), ..Script::default() });
    let ran = ran(&plan("random --requests 20 --output 1 --arrivals constant --rate 1000000"), &options(&url));
    let mut ttft: Vec<f64> = ran.records.iter().map(|record| record.ttft_ms().unwrap()).collect();
    ttft.sort_by(f64::total_cmp);
    // All are due at once and served one after the other: the n-th waits for n - 1 others.
    for (n, ttft) in (1..).zip(&ttft) {
        assert!(*ttft >= f64::from(n) * 20.0 - 0.1, "{n}: {ttft} ms");
    }
    let queue_us = ran.records.iter().map(|record| record.server.as_ref().unwrap().queue_us).max().unwrap();
    assert!(queue_us >= 19 * 20_000 - 1000, "the server says so too: {queue_us}");
}

#[test]
fn failures_have_their_kinds_and_the_right_number() {
    let script = Script { refuse_every: Some(4), cut_every: Some(5), error_every: Some(7), ..Script::default() };
    let (_, url) = serve(script);
    let ran = ran(&plan("random --requests 140 --output 5 --rate 2000"), &options(&url));
    // Of 140: 35 refused; of the 105 others every fifth (21) is cut; of the 84 others every seventh (12) has an error.
    let want = [("closed", 21), ("error planted", 12), ("http 429", 35), ("ok", 72)];
    assert_eq!(outcomes(&ran.records), want.map(|(kind, n)| (kind.to_owned(), n)).into());
}

#[test]
fn a_server_that_is_silent_or_absent_is_named() {
    let (_, url) = serve(Script { ttft_ms: 60_000.0, ..Script::default() });
    let plan = plan("random --requests 3 --rate 1000");
    let slow = ran(&plan, &Options { timeout: Duration::from_millis(50), ..options(&url) });
    assert_eq!(outcomes(&slow.records), [("timeout".to_owned(), 3)].into());
    let capped = ran(&plan, &Options { timeout: Duration::from_secs(2), in_flight_max: 1, ..options(&url) });
    assert_eq!(outcomes(&capped.records), [("dropped here".to_owned(), 2), ("timeout".to_owned(), 1)].into());
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(outcomes(&ran(&plan, &options(&format!("http://{free}"))).records), [("connect".to_owned(), 3)].into());
}

#[test]
fn parts_and_threads_give_the_same_requests() {
    let (_, url) = serve(Script::default());
    let plan = plan("sessions --requests 60 --rate 500 --think-ms 1 --system 40");
    let answers = |options: Options| -> Vec<(u32, u64, u32)> {
        ran(&plan, &options).records.iter().map(|r| (r.i, r.answer.unwrap(), r.prompt_tokens)).collect()
    };
    let whole = answers(options(&url));
    assert_eq!(whole.len(), 60);
    for record in &whole {
        let request = &plan.requests[record.0 as usize];
        assert_eq!(u64::from(record.2), request.prompt_tokens(), "real answers have the planned length");
    }
    assert_eq!(answers(Options { threads: 3, ..options(&url) }), whole);
    let mut parts: Vec<_> = (0..2).flat_map(|part| answers(Options { part: (part, 2), ..options(&url) })).collect();
    parts.sort_unstable();
    assert_eq!(parts, whole);
}

#[test]
fn closed_loops_have_no_more_under_way_than_users() {
    let (server, url) = serve(Script { ttft_ms: 5.0, slots: Some(3), ..Script::default() });
    let ran = ran(&plan("random --requests 30 --output 2 --arrivals closed --users 3"), &options(&url));
    assert_eq!((ran.records.len(), server.served().len()), (30, 30));
    let mut events: Vec<(u64, i32)> = ran.records.iter().flat_map(|r| [(r.sent_ns, 1), (r.end_ns, -1)]).collect();
    events.sort_unstable();
    let mut under_way = 0;
    let most = events.iter().map(|(_, change)| (under_way += change, under_way).1).max();
    assert_eq!(most, Some(3));
}

/// Runs the program.
fn millload(args: &[&str]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_millload")).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), text)
}

#[test]
fn an_interrupted_run_leaves_a_valid_partial_report() {
    let (server, url) = serve(Script { ttft_ms: 1.0, itl_ms: 600_000.0, ..Script::default() });
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    plan("random --requests 500 --output 2 --rate 20").save(&dir.path().join("plan")).unwrap();
    let mut running = Command::new(env!("CARGO_BIN_EXE_millload"))
        .args(["run", &path("plan"), "-o", &path("out"), "--url", &url, "--quiet", "--grace", "0.1"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while server.served().len() < 3 {
        assert!(Instant::now() < deadline, "nothing was sent");
        std::thread::yield_now();
    }
    Command::new("sh").args(["-c", &format!("kill -INT {}", running.id())]).status().unwrap();
    running.wait().unwrap();
    let results = Results::load(&dir.path().join("out")).unwrap();
    let (summary, sent) = (&results.summary, results.records.len());
    assert!(summary.about.partial && (3..500).contains(&sent), "{sent} sent");
    assert_eq!(outcomes(&results.records), [("unfinished".to_owned(), sent)].into());
    assert!(std::fs::read_to_string(dir.path().join("out/report.html")).unwrap().contains("PARTIAL"));
}

#[test]
fn the_program_plans_runs_reports_and_compares() {
    let (_, fast) = serve(Script { ttft_ms: 1.0, ..Script::default() });
    let (_, slow) = serve(Script { ttft_ms: 300.0, ..Script::default() });
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (plan, a, b, joined) = (path("plan"), path("a"), path("b"), path("joined"));
    let made = millload(&["plan", "-o", &plan, "prefix", "--requests", "40", "--groups", "3", "--output", "4", "--rate", "400"]);
    assert_eq!(made.0, 0, "{}", made.1);
    let (code, text) = millload(&["plan", "verify", &plan, "--cache-blocks", "8"]);
    assert!(code == 0 && text.contains("0 wrong of 780 pairs"), "{text}");
    for (url, out) in [(&fast, &a), (&slow, &b)] {
        let (code, text) = millload(&["run", &plan, "-o", out, "--url", url, "--quiet", "--allow-lag", "--slo", "ttft=250ms"]);
        assert!(code == 0 && text.contains("40 whole"), "{text}");
    }
    let (code, text) = millload(&["compare", &a, &b]);
    assert!(code == 1 && text.contains("WORSE"), "{text}");
    assert_eq!(millload(&["compare", &a, &a]).0, 0);
    let golden = millload(&["run", &plan, "-o", &path("c"), "--url", &fast, "--quiet", "--allow-lag", "--golden", &b]);
    assert!(golden.0 == 0 && golden.1.contains("40 equal, 0 different"), "{}", golden.1);
    for part in ["1/2", "2/2"] {
        let out = path(&format!("part{}", &part[..1]));
        assert_eq!(millload(&["run", &plan, "-o", &out, "--url", &fast, "--quiet", "--allow-lag", "--part", part]).0, 0);
    }
    let (code, text) = millload(&["report", &path("part1"), &path("part2"), "--plan", &plan, "-o", &joined]);
    assert!(code == 0 && text.contains("40 planned, 40 sent"), "{text}");
    let (code, text) = millload(&["report", &a, &joined, "--plan", &plan, "-o", &path("x")]);
    assert!(code == 2 && text.contains("two of the results"), "{text}");
    let other = path("other");
    assert_eq!(millload(&["plan", "-o", &other, "random", "--requests", "3"]).0, 0);
    assert_eq!(millload(&["report", &a, "--plan", &other, "-o", &path("x")]).0, 2, "results of another plan");
}
