//! Which way of placing requests is better? Every rule runs the same plan on a cluster of its own that nobody used before, in rounds, so that
//! what the machine does meanwhile harms all alike. Figures are medians over the rounds; verdicts pair every request of every round.

use std::fmt::Write;

use super::compare::{Better, Line, compare};
use super::record::Record;
use super::report::text::{ms, percent};
use super::summary::{About, Summary};
use crate::report::median;

/// All rounds of one rule on one plan.
#[derive(Clone, Debug)]
pub struct Ran {
    /// The rule.
    pub rule: String,
    /// One for each round.
    pub summaries: Vec<Summary>,
    /// Requests of all rounds; numbers go on from round to round.
    pub records: Vec<Record>,
}

/// A column of the table: its head, how it is read from a round, and how it is shown.
type Column = (&'static str, fn(&Summary) -> f64, fn(f64) -> String);

fn mean(summary: &Summary, time: &str) -> f64 {
    summary.times.get(time).map_or(f64::NAN, |dist| dist.mean)
}

fn good_share(summary: &Summary) -> f64 {
    let (good, n) = summary.goodput.iter().fold((0, 0), |(good, n), g| (good + g.good, n + g.n));
    good as f64 / n.max(1) as f64
}

const COLUMNS: [Column; 9] = [
    ("reused", |s| s.reuse.as_ref().map_or(f64::NAN, |reuse| reuse.measured), percent),
    ("of possible", |s| s.reuse.as_ref().map_or(f64::NAN, |reuse| reuse.infinite), percent),
    ("TTFT mean, ms", |s| mean(s, "ttft"), ms),
    ("TTFT p50, ms", |s| s.times.get("ttft").and_then(super::figures::Dist::p50).unwrap_or(f64::NAN), ms),
    ("TPOT mean, ms", |s| mean(s, "tpot"), ms),
    ("E2E mean, ms", |s| mean(s, "e2e"), ms),
    ("good", good_share, percent),
    ("goodput/s", |s| s.goodput.iter().map(|g| g.per_s).sum(), ms),
    ("not whole", |s| (s.counted - s.ok) as f64, |n| n.to_string()),
];

impl Ran {
    /// Of a rule that did not run yet.
    #[must_use]
    pub fn new(rule: &str) -> Self {
        Self { rule: rule.to_owned(), summaries: Vec::new(), records: Vec::new() }
    }

    /// Adds a round of a plan of so many requests.
    pub fn add(&mut self, summary: Summary, records: Vec<Record>, planned: u32) {
        let first = planned * self.summaries.len() as u32;
        self.records.extend(records.into_iter().map(|record| Record { i: first + record.i, ..record }));
        self.summaries.push(summary);
    }

    fn value(&self, (_, read, _): &Column) -> f64 {
        let values: Vec<f64> = self.summaries.iter().map(read).filter(|value| value.is_finite()).collect();
        median(&values)
    }
}

/// A markdown table: one row for each rule, medians over its rounds.
#[must_use]
pub fn table(plan: &str, ran: &[Ran]) -> String {
    let heads = COLUMNS.map(|(head, ..)| head).join(" | ");
    let mut out = format!("| {plan}, placed by | {heads} |\n|---|{}", "---:|".repeat(COLUMNS.len()));
    for ran in ran {
        let _ = write!(out, "\n| {} |", ran.rule);
        for column in &COLUMNS {
            let value = ran.value(column);
            let _ = write!(out, " {} |", if value.is_finite() { column.2(value) } else { "–".into() });
        }
    }
    out + "\n"
}

/// What is judged: what users wait for, and whether it was in time.
const JUDGED: [&str; 3] = ["ttft_ms", "e2e_ms", "good"];

/// One rule against another, over all rounds.
#[must_use]
pub fn against(about: &About, other: &Ran, judged: &Ran, tolerance: f64) -> Vec<Line> {
    let lines = compare(about, &other.records, &judged.records, tolerance);
    lines.into_iter().filter(|line| JUDGED.contains(&line.name) && line.pairs > 0).collect()
}

/// A comparison in a line, and whether `judged` is worse in anything.
#[must_use]
pub fn verdict(judged: &str, other: &str, lines: &[Line]) -> (String, bool) {
    let signed = |share: f64| format!("{:+.1} %", share * 100.0);
    let part = |line: &Line| {
        let word = if line.verdict == Better::Worse { " WORSE" } else { "" };
        let (low, high) = line.interval;
        format!("{} {} ({} .. {}){word}", line.name.trim_end_matches("_ms"), signed(line.change), signed(low), signed(high))
    };
    let parts: Vec<String> = lines.iter().map(part).collect();
    let worse = lines.iter().any(|line| line.verdict == Better::Worse);
    (format!("{judged} against {other}: {}", parts.join(", ")), worse)
}

#[cfg(test)]
mod tests {
    use super::super::summary::summarise;
    use super::super::summary::tests::known;
    use super::*;

    /// Two rounds of 40 requests, each `late_ms` later than the truth.
    fn ran(rule: &str, late_ms: u64) -> (About, Ran) {
        let mut ran = Ran::new(rule);
        let (about, plan, records) = known(40);
        for _ in 0..2 {
            let mut records = records.clone();
            for record in &mut records {
                let late_ns = late_ms * 1_000_000;
                (record.first_ns, record.last_ns, record.end_ns) =
                    (record.first_ns + late_ns, record.last_ns + late_ns, record.end_ns + late_ns);
            }
            ran.add(summarise(about.clone(), &plan, &records), records, 40);
        }
        (about, ran)
    }

    #[test]
    fn a_rule_that_is_later_is_worse_and_one_within_the_tolerance_is_not() {
        let ((about, a), (_, b)) = (ran("split", 0), ran("auto", 6));
        assert_eq!(b.records.iter().map(|record| record.i).collect::<Vec<_>>(), (0..80).collect::<Vec<_>>());
        // 6 ms of 119.5 are 5 %, and of 200.5 are 3 %.
        let lines = against(&about, &a, &b, 0.02);
        let (text, worse) = verdict("auto", "split", &lines);
        assert!(worse && text.contains("ttft +5.0 %") && text.contains("e2e +3.0 %") && text.contains("WORSE"), "{text}");
        assert!(!verdict("auto", "split", &against(&about, &a, &b, 0.06)).1);
        assert!(!verdict("split", "auto", &against(&about, &b, &a, 0.0)).1, "earlier is not worse");
    }

    #[test]
    fn the_table_has_a_row_for_each_rule() {
        let text = table("p", &[ran("auto", 0).1, ran("split", 10).1]);
        let rows: Vec<&str> = text.lines().collect();
        assert!(rows.len() == 4 && rows.iter().all(|row| row.matches('|').count() == COLUMNS.len() + 2), "{text}");
        assert!(rows[3].starts_with("| split |") && rows[3].contains("129.5"), "{text}");
    }
}
