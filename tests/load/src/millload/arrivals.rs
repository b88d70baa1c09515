//! When requests are due: constant, Poisson, gamma, the windows of a ServeGen client, or the times of a trace. All in nanoseconds from
//! the start, ascending, and each gap drawn by its own index.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::rng::{Draws, Stream};

/// How requests arrive.
#[derive(Clone, Debug, PartialEq)]
pub enum Arrivals {
    /// At equal distances.
    Constant {
        /// Requests a second.
        rate: f64,
    },
    /// Independently of each other.
    Poisson {
        /// Requests a second.
        rate: f64,
    },
    /// With gaps of this coefficient of variation: above 1 in bursts, below 1 more evenly than Poisson.
    Gamma {
        /// Requests a second.
        rate: f64,
        /// Standard deviation of the gaps over their mean.
        cv: f64,
    },
    /// As one client of ServeGen: a family of gaps for each window of time, repeated when they end.
    Windows {
        /// The windows, in order.
        windows: Vec<Window>,
        /// How many times faster than recorded.
        speed: f64,
    },
    /// At recorded times, repeated when they end.
    Times {
        /// Nanoseconds from the first, ascending; at least one.
        at_ns: Vec<u64>,
        /// How many times faster than recorded.
        speed: f64,
    },
    /// Each of so many users sends when the answer before is there.
    Closed {
        /// How many.
        users: u32,
    },
}

/// A window of a ServeGen client.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// When it begins, seconds.
    pub start_s: f64,
    /// The family of its gaps.
    pub family: Family,
    /// The family's shape.
    pub shape: f64,
    /// The family's scale, seconds.
    pub scale_s: f64,
}

/// A family of distributions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Gamma.
    Gamma,
    /// Weibull.
    Weibull,
}

impl Arrivals {
    /// In words, for the plan.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Constant { rate } => format!("constant, {rate}/s"),
            Self::Poisson { rate } => format!("Poisson, {rate}/s"),
            Self::Gamma { rate, cv } => format!("gamma, {rate}/s, CV {cv}"),
            Self::Windows { windows, speed } => format!("{} windows, speed {speed}", windows.len()),
            Self::Times { at_ns, speed } => format!("{} recorded times, speed {speed}", at_ns.len()),
            Self::Closed { users } => format!("closed loop of {users} users"),
        }
    }

    /// Due times of `count` arrivals.
    ///
    /// # Errors
    /// A rate, shape or speed that is not positive.
    pub fn due_ns(&self, seed: u64, count: usize) -> Result<Vec<u64>> {
        let gap = |index: usize| Draws::new(seed, Stream::Arrivals, index as u64);
        match self {
            Self::Constant { rate } => {
                positive("rate", *rate)?;
                Ok((0..count).map(|i| (i as f64 / rate * 1e9) as u64).collect())
            }
            Self::Poisson { rate } => {
                positive("rate", *rate)?;
                Ok(cumulate(count, |i| gap(i).exponential() / rate))
            }
            Self::Gamma { rate, cv } => {
                positive("rate", *rate)?;
                positive("CV", *cv)?;
                let shape = 1.0 / (cv * cv);
                Ok(cumulate(count, |i| gap(i).gamma(shape) / shape / rate))
            }
            Self::Windows { windows, speed } => window_times(windows, *speed, seed, count),
            Self::Times { at_ns, speed } => repeat_times(at_ns, *speed, count),
            Self::Closed { .. } => Ok(vec![0; count]),
        }
    }
}

fn positive(what: &str, value: f64) -> Result<()> {
    ensure!(value.is_finite() && value > 0.0, "{what} must be above 0, is {value}");
    Ok(())
}

fn cumulate(count: usize, gap_s: impl Fn(usize) -> f64) -> Vec<u64> {
    let mut at_s = 0.0;
    let mut next = |index| {
        let due = at_s;
        at_s += gap_s(index);
        (due * 1e9) as u64
    };
    (0..count).map(&mut next).collect()
}

fn window_times(windows: &[Window], speed: f64, seed: u64, count: usize) -> Result<Vec<u64>> {
    positive("speed", speed)?;
    ensure!(!windows.is_empty(), "no windows");
    windows
        .iter()
        .try_for_each(|w| positive("a window's shape", w.shape).and_then(|()| positive("a window's scale", w.scale_s)))?;
    let spacing = windows.get(1).map_or(600.0, |second| second.start_s - windows[0].start_s);
    let span_s = windows[windows.len() - 1].start_s - windows[0].start_s + spacing;
    let (mut at_s, mut due) = (0.0, Vec::with_capacity(count));
    for index in 0..count {
        due.push((at_s / speed * 1e9) as u64);
        let place = windows[0].start_s + at_s % span_s;
        let window = &windows[windows.partition_point(|w| w.start_s <= place).saturating_sub(1)];
        let mut draws = Draws::new(seed, Stream::Arrivals, index as u64);
        at_s += window.scale_s
            * match window.family {
                Family::Gamma => draws.gamma(window.shape),
                Family::Weibull => draws.weibull(window.shape),
            };
    }
    Ok(due)
}

fn repeat_times(at_ns: &[u64], speed: f64, count: usize) -> Result<Vec<u64>> {
    positive("speed", speed)?;
    let (Some(first), Some(last)) = (at_ns.first(), at_ns.last()) else { anyhow::bail!("no recorded times") };
    // A round ends one mean gap after its last time, so that the next does not begin on top of it.
    let whole = u128::from(last - first);
    let span = whole + whole / (at_ns.len() as u128).max(2) + 1;
    let at = |i: usize| (u128::from(at_ns[i % at_ns.len()] - first) + (i / at_ns.len()) as u128 * span) as f64 / speed;
    Ok((0..count).map(|i| at(i) as u64).collect())
}

/// Spreads times that were recorded in coarse steps evenly over their step: n requests at the same time get n equal shares of the way to
/// the next time.
pub fn spread(at_ns: &mut [u64]) {
    let mut start = 0;
    let mut step = 0;
    while start < at_ns.len() {
        let end = start + at_ns[start..].partition_point(|at| *at == at_ns[start]);
        step = at_ns.get(end).map_or(step, |next| next - at_ns[start]);
        let (from, n) = (at_ns[start], (end - start) as u64);
        at_ns[start..end].iter_mut().enumerate().for_each(|(i, at)| *at = from + step * i as u64 / n);
        start = end;
    }
}

/// Reads the windows of a ServeGen client: start, requests a second, CV, family, shape, scale; no header.
///
/// # Errors
/// Names the line that is wrong.
pub fn read_windows(path: &Path) -> Result<Vec<Window>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let [start, _, _, family, shape, scale] = fields[..] else { return None };
        let family = match family {
            "Gamma" => Family::Gamma,
            "Weibull" => Family::Weibull,
            _ => return None,
        };
        Some(Window { start_s: start.parse().ok()?, family, shape: shape.parse().ok()?, scale_s: scale.parse().ok()? })
    };
    // Windows without traffic have no family.
    let busy = text.lines().enumerate().filter(|(_, line)| line.contains("Gamma") || line.contains("Weibull"));
    let windows = busy.map(|(at, line)| parse(line).with_context(|| format!("{}: line {}: {line}", path.display(), at + 1)));
    let windows: Vec<Window> = windows.collect::<Result<_>>()?;
    ensure!(!windows.is_empty(), "{}: no windows (start,rate,CV,Gamma|Weibull,shape,scale)", path.display());
    ensure!(windows.is_sorted_by(|a, b| a.start_s < b.start_s), "{}: windows are not in order", path.display());
    Ok(windows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate_and_cv(due: &[u64]) -> (f64, f64) {
        let gaps: Vec<f64> = due.windows(2).map(|pair| (pair[1] - pair[0]) as f64 / 1e9).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        (1.0 / mean, variance.sqrt() / mean)
    }

    #[test]
    fn arrivals_have_their_rate_and_burstiness() {
        let window = |family, shape, scale_s| Arrivals::Windows {
            windows: vec![Window { start_s: 0.0, family, shape, scale_s }],
            speed: 1.0,
        };
        let cases = [
            (Arrivals::Constant { rate: 8.0 }, 8.0, 0.0),
            (Arrivals::Poisson { rate: 50.0 }, 50.0, 1.0),
            (Arrivals::Gamma { rate: 50.0, cv: 2.0 }, 50.0, 2.0),
            (Arrivals::Gamma { rate: 50.0, cv: 0.5 }, 50.0, 0.5),
            // Figures of one ServeGen client's window: 62.8 a second with CV 1.03, and 25.4 with 1.69.
            (window(Family::Gamma, 0.938_607, 0.016_954), 62.83, 1.032),
            (window(Family::Weibull, 0.640_366, 0.029_361), 24.5, 1.62),
        ];
        for (arrivals, rate, cv) in cases {
            let (got_rate, got_cv) = rate_and_cv(&arrivals.due_ns(3, 40_000).unwrap());
            assert!((got_rate / rate - 1.0).abs() < 0.03, "{}: {got_rate}/s", arrivals.describe());
            assert!((got_cv - cv).abs() < 0.06, "{}: CV {got_cv}", arrivals.describe());
        }
        assert!(Arrivals::Poisson { rate: 0.0 }.due_ns(1, 1).is_err());
    }

    #[test]
    fn a_longer_plan_begins_like_a_shorter_one() {
        let poisson = Arrivals::Poisson { rate: 3.0 };
        assert_eq!(poisson.due_ns(1, 10).unwrap(), poisson.due_ns(1, 20).unwrap()[..10]);
    }

    #[test]
    fn recorded_times_are_scaled_repeated_and_spread() {
        let mut at = vec![0, 0, 0, 3000, 3000, 6000];
        let times = Arrivals::Times { at_ns: at.clone(), speed: 2.0 };
        assert_eq!(times.due_ns(1, 8).unwrap(), [0, 0, 0, 1500, 1500, 3000, 3500, 3500]);
        spread(&mut at);
        assert_eq!(at, [0, 1000, 2000, 3000, 4500, 6000]);
    }
}
