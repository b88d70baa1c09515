//! Rows of measured figures, as markdown.

use std::fmt;

/// One figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What was measured, with its unit.
    pub what: String,
    /// One value for each run.
    pub values: Vec<f64>,
}

impl Row {
    /// A figure and its runs.
    #[must_use]
    pub fn new(what: impl Into<String>, values: Vec<f64>) -> Self {
        Self { what: what.into(), values }
    }
}

/// The middle value; of an even number, the mean of the two in the middle. NaN when there is none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[half],
        _ => (sorted[half - 1] + sorted[half]) / 2.0,
    }
}

/// Three significant digits.
#[must_use]
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The head of a table of rows.
pub const HEAD: &str = "| what | median | min..max | runs |\n|---|---:|---:|---:|";

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let least = self.values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (what, runs) = (&self.what, self.values.len());
        write!(f, "| {what} | {} | {}..{} | {runs} |", short(median(&self.values)), short(least), short(most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_the_median_with_its_range() {
        let row = Row::new("x, us", vec![3.0, 1000.4, 12.34]);
        assert_eq!(row.to_string(), "| x, us | 12.3 | 3.00..1000 | 3 |");
        assert_eq!(median(&[4.0, 1.0]), 2.5);
    }
}
