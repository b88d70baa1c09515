//! Is B better than A? Both runs have the same plan, so requests are paired, and what differs between requests drops out. The interval comes
//! from resampling pairs (bootstrap); a verdict is given only where it leaves no doubt at 95 %.

use std::collections::HashMap;

use serde::Serialize;

use super::record::Record;
use super::rng::{Draws, Stream};
use super::summary::{About, good};

/// Resamples.
const RESAMPLES: u64 = 2000;
/// Pairs below which no verdict is given.
pub const PAIRS_MIN: usize = 10;

/// What a comparison says of one figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// B is better.
    Better,
    /// B is worse.
    Worse,
    /// The interval holds 0, or less than the tolerance is lost.
    NoDifference,
    /// There are too few pairs.
    TooFew,
}

/// One figure of both runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// Its name.
    pub name: &'static str,
    /// Pairs.
    pub pairs: usize,
    /// Mean of A.
    pub a: f64,
    /// Mean of B.
    pub b: f64,
    /// (B - A) / A, or B - A for shares.
    pub change: f64,
    /// Its 95 % interval.
    pub interval: (f64, f64),
    /// The verdict.
    pub verdict: Better,
}

/// Whether a figure is better when it is less, and whether it is a share: differences then, not ratios.
#[derive(Clone, Copy)]
enum Kind {
    Time,
    Share,
}

/// Compares request by request. `tolerance` is the change that does not matter, as a share.
#[must_use]
pub fn compare(about: &About, a: &[Record], b: &[Record], tolerance: f64) -> Vec<Line> {
    let counts = |records: &'_ [Record]| -> Vec<Record> { records.iter().filter(|r| about.counts(r)).cloned().collect() };
    let (a, b) = (counts(a), counts(b));
    let of_b: HashMap<u32, &Record> = b.iter().map(|record| (record.i, record)).collect();
    let pairs: Vec<(&Record, &Record)> = a.iter().filter_map(|record| Some((record, *of_b.get(&record.i)?))).collect();
    let whole: Vec<_> = pairs.iter().copied().filter(|(a, b)| a.ok() && b.ok()).collect();
    let time = |name, each: &dyn Fn(&Record) -> Option<f64>| {
        let values: Vec<(f64, f64)> = whole.iter().filter_map(|(a, b)| Some((each(a)?, each(b)?))).collect();
        line(name, &values, Kind::Time, tolerance)
    };
    let share = |name, pairs: &[(&Record, &Record)], each: &dyn Fn(&Record) -> Option<f64>| {
        let values: Vec<(f64, f64)> = pairs.iter().filter_map(|(a, b)| Some((each(a)?, each(b)?))).collect();
        line(name, &values, Kind::Share, tolerance)
    };
    let cached = |r: &Record| (r.prompt_tokens > 0).then_some(f64::from(r.cached_tokens?) / f64::from(r.prompt_tokens.max(1)));
    vec![
        time("ttft_ms", &Record::ttft_ms),
        time("tpot_ms", &Record::tpot_ms),
        time("e2e_ms", &|record| Some(record.e2e_ms())),
        share("good", &pairs, &|record| Some(f64::from(u8::from(good(record, &about.slo(record.class)))))),
        share("cached_share", &whole, &cached),
    ]
}

fn line(name: &'static str, values: &[(f64, f64)], kind: Kind, tolerance: f64) -> Line {
    let n = values.len();
    let means = |pick: &mut dyn FnMut() -> usize| {
        let (mut a, mut b) = (0.0, 0.0);
        for _ in 0..n {
            let (x, y) = values[pick()];
            (a, b) = (a + x, b + y);
        }
        (a / n as f64, b / n as f64)
    };
    if n == 0 {
        let interval = (f64::NAN, f64::NAN);
        return Line { name, pairs: 0, a: f64::NAN, b: f64::NAN, change: f64::NAN, interval, verdict: Better::TooFew };
    }
    let change = |(a, b): (f64, f64)| match kind {
        Kind::Time if a > 0.0 => (b - a) / a,
        Kind::Time | Kind::Share => b - a,
    };
    let mut next = 0..n;
    let all = means(&mut || next.next().unwrap_or(0));
    let mut resampled: Vec<f64> = (0..RESAMPLES)
        .map(|round| {
            let mut draws = Draws::new(1, Stream::Bootstrap, round);
            change(means(&mut || draws.below(n as u64) as usize))
        })
        .collect();
    resampled.sort_by(f64::total_cmp);
    let at = |thousandths: usize| resampled[(resampled.len() * thousandths / 1000).min(resampled.len() - 1)];
    let interval = (at(25), at(975));
    let verdict = judge(interval, kind, n, tolerance);
    Line { name, pairs: n, a: all.0, b: all.1, change: change(all), interval, verdict }
}

fn judge((low, high): (f64, f64), kind: Kind, pairs: usize, tolerance: f64) -> Better {
    if pairs < PAIRS_MIN {
        return Better::TooFew;
    }
    let (up, down) = (low > tolerance, high < -tolerance);
    match (kind, up, down) {
        (Kind::Time, true, _) | (Kind::Share, _, true) => Better::Worse,
        (Kind::Time, _, true) | (Kind::Share, true, _) => Better::Better,
        _ => Better::NoDifference,
    }
}

#[cfg(test)]
mod tests {
    use super::super::summary::tests::known;
    use super::*;

    fn shifted(by: impl Fn(u32) -> i64) -> Vec<Line> {
        let (about, _, a) = known(200);
        let mut b = a.clone();
        for record in &mut b {
            record.first_ns = record.first_ns.checked_add_signed(by(record.i)).unwrap();
        }
        compare(&about, &a, &b, 0.0)
    }

    #[test]
    fn a_shift_is_seen_and_noise_is_not() {
        let slower = shifted(|_| 10_000_000);
        assert_eq!((slower[0].name, slower[0].verdict, slower[0].pairs), ("ttft_ms", Better::Worse, 200));
        assert!((slower[0].b - slower[0].a - 10.0).abs() < 1e-9 && slower[0].interval.0 > 0.03 && slower[0].interval.1 < 0.08);
        assert_eq!(shifted(|_| -10_000_000)[0].verdict, Better::Better);
        assert_eq!(shifted(|i| if i % 2 == 0 { 9_000_000 } else { -9_000_000 })[0].verdict, Better::NoDifference);
    }

    #[test]
    fn a_tolerance_forgives_and_few_pairs_say_nothing() {
        let (about, _, a) = known(200);
        let mut b = a.clone();
        b.iter_mut().for_each(|record| record.first_ns += 1_000_000);
        assert_eq!(compare(&about, &a, &b, 0.0)[0].verdict, Better::Worse);
        assert_eq!(compare(&about, &a, &b, 0.02)[0].verdict, Better::NoDifference);
        assert_eq!(compare(&about, &a[..5], &b, 0.0)[0].verdict, Better::TooFew);
    }

    #[test]
    fn failures_make_it_worse() {
        let (about, _, a) = known(100);
        let mut b = a.clone();
        b.iter_mut().take(20).for_each(|record| record.outcome = super::super::record::Outcome::Closed);
        let lines = compare(&about, &a, &b, 0.0);
        assert_eq!((lines[3].name, lines[3].verdict, lines[3].pairs), ("good", Better::Worse, 100));
        assert_eq!(lines[0].pairs, 80, "times only where both are whole");
    }
}
