//! What the terminal shows while a run lasts: a few lines that are drawn over, or one line now and then where there is no terminal.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::live::{Live, Recent};
use super::report::text::{ms, percent};

/// Between two drawings on a terminal.
const REDRAW: Duration = Duration::from_millis(250);
/// Between two lines elsewhere.
const TELL: Duration = Duration::from_secs(10);
/// Cells of the progress bar and of the spark line.
const CELLS: usize = 40;
const SPARKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Shows `live` until dropped.
pub async fn show(live: &Live, started: Instant) {
    let (terminal, mut drawn) = (std::io::stderr().is_terminal(), 0);
    loop {
        tokio::time::sleep(if terminal { REDRAW } else { TELL }).await;
        let elapsed = started.elapsed();
        let mut err = std::io::stderr();
        if terminal {
            let lines = lines(live, elapsed);
            let up = if drawn > 0 { format!("\x1b[{drawn}A") } else { String::new() };
            let text: String = lines.iter().map(|line| format!("\x1b[2K{line}\n")).collect();
            let _ = err.write_all((up + &text).as_bytes());
            drawn = lines.len();
        } else {
            let _ = writeln!(err, "{}", line(live, elapsed));
        }
    }
}

fn middle(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// One line for logs.
fn line(live: &Live, elapsed: Duration) -> String {
    let (planned, ended, failed) = (live.planned.load(Relaxed), live.ended.load(Relaxed), live.failed.load(Relaxed));
    let ttft = middle(live.recent().iter().filter_map(|r| r.ttft_ms)).map_or("–".into(), ms);
    format!(
        "{:>6.0} s  {ended}/{planned} ended, {} under way, {failed} not whole, recent TTFT {ttft} ms",
        elapsed.as_secs_f64(),
        live.in_flight()
    )
}

/// The lines of the screen.
fn lines(live: &Live, elapsed: Duration) -> Vec<String> {
    let (planned, ended) = (live.planned.load(Relaxed), live.ended.load(Relaxed));
    let (seconds, recent) = (elapsed.as_secs_f64().max(1e-3), live.recent());
    let filled = (ended as usize * CELLS).checked_div(planned as usize).unwrap_or(0).min(CELLS);
    let lately = |r: &&Recent| r.end_ns as f64 / 1e9 > seconds - 10.0;
    let now = || recent.iter().filter(lately);
    let show = |value: Option<f64>| value.map_or("–".to_owned(), ms);
    let worst = |values: &mut dyn Iterator<Item = f64>| show(values.reduce(f64::max));
    let (prompt, cached) = (live.prompt_tokens.load(Relaxed), live.cached_tokens.load(Relaxed));
    vec![
        format!("{}{}  {ended}/{planned}  {seconds:.0} s", "█".repeat(filled), "░".repeat(CELLS - filled)),
        format!(
            "{:.1} requests/s, {:.0} tokens/s, {} under way, {} not whole, reused {}",
            ended as f64 / seconds,
            live.output_tokens.load(Relaxed) as f64 / seconds,
            live.in_flight(),
            live.failed.load(Relaxed),
            percent(cached as f64 / prompt as f64)
        ),
        format!(
            "last 10 s: TTFT {} ms (worst {}), TPOT {} ms, own lag {} ms",
            show(middle(now().filter_map(|r| r.ttft_ms))),
            worst(&mut now().filter_map(|r| r.ttft_ms)),
            show(middle(now().filter_map(|r| r.tpot_ms))),
            worst(&mut now().map(|r| r.lag_ms))
        ),
        format!("TTFT {}", spark(&recent)),
    ]
}

fn spark(recent: &[Recent]) -> String {
    let values: Vec<f64> = recent.iter().filter_map(|r| r.ttft_ms).collect();
    let last = &values[values.len().saturating_sub(CELLS)..];
    let most = last.iter().copied().fold(1e-9, f64::max);
    last.iter().fold(String::new(), |mut out, value| {
        let _ = write!(out, "{}", SPARKS[((value / most * 7.0).round() as usize).min(7)]);
        out
    })
}

/// The counters as Prometheus text.
#[must_use]
pub fn prometheus(live: &Live) -> String {
    let counters = [
        ("millload_requests_sent_total", &live.sent),
        ("millload_requests_ended_total", &live.ended),
        ("millload_requests_failed_total", &live.failed),
        ("millload_output_tokens_total", &live.output_tokens),
        ("millload_prompt_tokens_total", &live.prompt_tokens),
        ("millload_cached_tokens_total", &live.cached_tokens),
    ];
    let mut out = String::new();
    for (name, value) in counters {
        let _ = writeln!(out, "# TYPE {name} counter\n{name} {}", value.load(Relaxed));
    }
    let _ = writeln!(out, "# TYPE millload_requests_in_flight gauge\nmillload_requests_in_flight {}", live.in_flight());
    let recent = live.recent();
    let times = [
        ("ttft", middle(recent.iter().filter_map(|r| r.ttft_ms))),
        ("tpot", middle(recent.iter().filter_map(|r| r.tpot_ms))),
        ("lag", middle(recent.iter().map(|r| r.lag_ms))),
    ];
    let _ = writeln!(out, "# TYPE millload_recent_median_seconds gauge");
    for (name, value) in times.iter().filter_map(|(name, value)| Some((name, (*value)?))) {
        let _ = writeln!(out, "millload_recent_median_seconds{{time=\"{name}\"}} {}", value / 1e3);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::summary::tests::known;
    use super::*;

    #[test]
    fn a_run_is_shown_from_its_first_moment() {
        let live = Live::default();
        assert_eq!(lines(&live, Duration::ZERO).len(), 4);
        live.planned.store(60, Relaxed);
        for record in known(30).2 {
            live.began();
            live.ended(&record);
        }
        live.began();
        let shown = lines(&live, Duration::from_secs(3));
        assert!(shown[0].contains("30/60") && shown[1].contains("1 under way"), "{shown:?}");
        assert!(line(&live, Duration::from_secs(3)).contains("30/60 ended, 1 under way"));
        let text = prometheus(&live);
        assert!(text.contains("millload_requests_sent_total 31\n") && text.contains("{time=\"lag\"} 0.001"), "{text}");
    }
}
