//! How long prompts and answers are: a range, a log-normal spread around a median, or the rows of a recorded file.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::rng::Draws;

/// A distribution of token counts.
#[derive(Clone, Debug, PartialEq)]
pub enum Lengths {
    /// Evenly between two values, both included.
    Range(u32, u32),
    /// Around a median, with this standard deviation of the logarithm.
    LogNormal {
        /// Half are shorter.
        median: f64,
        /// 0 is constant, 1 is wide.
        sigma: f64,
    },
}

impl std::str::FromStr for Lengths {
    type Err = String;

    /// `128`, `64..512`, or `~300:0.8` for a median and a spread.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?}: expected N, N..M or ~MEDIAN:SIGMA");
        if let Some(rest) = text.strip_prefix('~') {
            let (median, sigma) = rest.split_once(':').unwrap_or((rest, "0.5"));
            let (median, sigma): (f64, f64) = (median.parse().map_err(|_| wrong())?, sigma.parse().map_err(|_| wrong())?);
            let fine = median >= 1.0 && median.is_finite() && (0.0..=5.0).contains(&sigma);
            return if fine { Ok(Self::LogNormal { median, sigma }) } else { Err(wrong()) };
        }
        let (low, high) = text.split_once("..").unwrap_or((text, text));
        let (low, high): (u32, u32) = (low.parse().map_err(|_| wrong())?, high.parse().map_err(|_| wrong())?);
        if low >= 1 && low <= high { Ok(Self::Range(low, high)) } else { Err(wrong()) }
    }
}

impl Lengths {
    /// One length, at least 1.
    pub fn draw(&self, draws: &mut Draws) -> u32 {
        match self {
            Self::Range(low, high) => low + draws.below(u64::from(high - low) + 1) as u32,
            Self::LogNormal { median, sigma } => (median * (sigma * draws.normal()).exp()).round().clamp(1.0, 1e6) as u32,
        }
    }
}

/// A row of a recorded file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// Nanoseconds from the first; `None` in files of lengths only.
    pub at_ns: Option<u64>,
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Tokens of the answer.
    pub answer: u32,
}

/// Names of the columns that are looked for, of Azure, BurstGPT and Vidur files: time, prompt, answer.
const COLUMNS: [[&str; 3]; 3] = [
    ["TIMESTAMP", "ContextTokens", "GeneratedTokens"],
    ["Timestamp", "Request tokens", "Response tokens"],
    ["", "num_prefill_tokens", "num_decode_tokens"],
];

/// Reads times and lengths from a CSV file of Azure's, BurstGPT's or Vidur's shape. Rows without an answer (failed requests of BurstGPT)
/// are left out; times are sorted and counted from the first.
///
/// # Errors
/// Names the line that is wrong.
pub fn read_csv(path: &Path) -> Result<Vec<Row>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut lines = text.lines();
    let names: Vec<&str> = lines.next().unwrap_or_default().trim_start_matches('\u{feff}').split(',').map(str::trim).collect();
    let place = |name: &str| names.iter().position(|other| *other == name);
    let known = COLUMNS.iter().find_map(|[time, prompt, answer]| Some((place(time), place(prompt)?, place(answer)?)));
    let Some((time, prompt, answer)) = known else {
        bail!("{}: columns of Azure, BurstGPT or Vidur expected, found {names:?}", path.display());
    };
    let mut rows = Vec::new();
    for (at, line) in lines.enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let number = |column: usize| fields.get(column).and_then(|f| f.parse::<f64>().ok()).map(|n| n as u32);
        let read = || {
            let at_s = time.map(|column| fields.get(column).copied().and_then(seconds));
            Some((at_s.map_or(Some(None), |at| at.map(Some))?, number(prompt)?, number(answer)?))
        };
        let (at_s, prompt, answer) = read().with_context(|| format!("{}: line {}: {line}", path.display(), at + 2))?;
        if prompt > 0 && answer > 0 {
            rows.push((at_s, prompt, answer));
        }
    }
    ensure!(!rows.is_empty(), "{}: no rows", path.display());
    rows.sort_by(|a, b| a.0.unwrap_or(0.0).total_cmp(&b.0.unwrap_or(0.0)));
    let first = rows[0].0.unwrap_or(0.0);
    let row =
        |(at_s, prompt, answer): (Option<f64>, u32, u32)| Row { at_ns: at_s.map(|at| ((at - first) * 1e9) as u64), prompt, answer };
    Ok(rows.into_iter().map(row).collect())
}

/// Seconds, or a date and time of day as `2023-11-16 18:15:46.6805900`.
fn seconds(text: &str) -> Option<f64> {
    if let Ok(seconds) = text.parse() {
        return Some(seconds);
    }
    let (date, time) = text.split_once([' ', 'T'])?;
    let date: Vec<i64> = date.split('-').map(str::parse).collect::<Result<_, _>>().ok()?;
    let [year, month, day] = date[..] else { return None };
    let mut parts = time.trim_end_matches('Z').splitn(3, ':');
    let (hours, minutes, seconds): (f64, f64, f64) =
        (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    // Days since an epoch, of the proleptic Gregorian calendar (Hinnant, "chrono-compatible low-level date algorithms").
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (153 * m + 2) / 5 + day;
    Some(days as f64 * 86_400.0 + hours * 3600.0 + minutes * 60.0 + seconds)
}

#[cfg(test)]
mod tests {
    use super::super::rng::Stream;
    use super::*;

    #[test]
    fn lengths_are_read_and_drawn() {
        assert_eq!("7".parse::<Lengths>().unwrap().draw(&mut Draws::new(1, Stream::Prompts, 0)), 7);
        let range: Lengths = "3..5".parse().unwrap();
        let mut drawn: Vec<u32> = (0..100).map(|i| range.draw(&mut Draws::new(1, Stream::Prompts, i))).collect();
        drawn.sort_unstable();
        drawn.dedup();
        assert_eq!(drawn, [3, 4, 5]);
        let wide: Lengths = "~300:0.8".parse().unwrap();
        let mut drawn: Vec<u32> = (0..9999).map(|i| wide.draw(&mut Draws::new(1, Stream::Prompts, i))).collect();
        drawn.sort_unstable();
        assert!((280..320).contains(&drawn[5000]), "median {}", drawn[5000]);
        for bad in ["0", "5..3", "~x", "", "~10:9"] {
            assert!(bad.parse::<Lengths>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn files_of_three_shapes_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let read = |text: &str| {
            let path = dir.path().join("x.csv");
            std::fs::write(&path, text).unwrap();
            read_csv(&path)
        };
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-30 23:59:59.5,374,44\n2023-12-01 00:00:01.0000000,396,109\n";
        let rows = read(azure).unwrap();
        assert_eq!((rows[1].at_ns, rows[1].prompt, rows[0].answer), (Some(1_500_000_000), 396, 44));
        let burst = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,x\n45,GPT-4,10,0,10,x\n7,ChatGPT,1,2,3,x\n";
        let rows = read(burst).unwrap();
        assert_eq!(
            rows.iter().map(|row| row.at_ns).collect::<Vec<_>>(),
            [Some(0), Some(2_000_000_000)],
            "the failed one is left out"
        );
        assert_eq!(
            read("num_prefill_tokens,num_decode_tokens\n3772,54\n").unwrap()[0],
            Row { at_ns: None, prompt: 3772, answer: 54 }
        );
        assert!(read("a,b\n1,2\n").is_err());
        assert!(format!("{:#}", read("TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,1,2\n").unwrap_err()).contains("line 2"));
    }
}
