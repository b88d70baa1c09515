//! From records to figures. Percentiles are exact (nearest rank over every value) and absent where fewer than ten values lie beyond them.

use serde::{Deserialize, Serialize};

/// Values that must lie beyond a percentile for it to be said.
pub const BEYOND_MIN: u64 = 10;
/// The percentiles that are said, in thousandths.
pub const PERCENTILES: [(&str, u64); 4] = [("p50", 500), ("p90", 900), ("p99", 990), ("p99.9", 999)];

/// A set of values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Dist {
    /// How many.
    pub n: u64,
    /// Their mean.
    pub mean: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// [`PERCENTILES`]; `None` of too few values.
    pub percentiles: [Option<f64>; 4],
}

impl Dist {
    /// Of these values; `None` of none. O(n log n).
    #[must_use]
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let percentiles = PERCENTILES.map(|(_, thousandths)| percentile(&values, thousandths));
        Some(Self { n: values.len() as u64, mean: values.iter().sum::<f64>() / values.len() as f64, min, max, percentiles })
    }

    /// The median, if there are enough values.
    #[must_use]
    pub fn p50(&self) -> Option<f64> {
        self.percentiles[0]
    }

    /// The 99th percentile, if there are enough values.
    #[must_use]
    pub fn p99(&self) -> Option<f64> {
        self.percentiles[2]
    }
}

/// The value at a percentile of sorted values, in thousandths, by nearest rank; `None` when fewer than [`BEYOND_MIN`] lie beyond it.
#[must_use]
pub fn percentile(sorted: &[f64], thousandths: u64) -> Option<f64> {
    let n = sorted.len() as u64;
    let enough = n * (1000 - thousandths) >= BEYOND_MIN * 1000;
    enough.then(|| sorted[(n * thousandths).div_ceil(1000).max(1) as usize - 1])
}

/// The 95 % interval of a share, by Wilson's score: it stays within 0 and 1 and is honest about few samples.
#[must_use]
pub fn wilson(good: u64, n: u64) -> (f64, f64) {
    if n == 0 {
        return (0.0, 1.0);
    }
    let (n, z) = (n as f64, 1.959_964);
    let share = good as f64 / n;
    let centre = share + z * z / (2.0 * n);
    let half = z * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + z * z / n;
    (((centre - half) / scale).max(0.0), ((centre + half) / scale).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_exact_and_silent_when_they_must_be() {
        let dist = Dist::of((1..=1000).rev().map(f64::from)).unwrap();
        assert_eq!(dist.percentiles, [Some(500.0), Some(900.0), Some(990.0), None]);
        assert_eq!((dist.n, dist.mean, dist.min, dist.max), (1000, 500.5, 1.0, 1000.0));
        assert_eq!(Dist::of((1..=999).map(f64::from)).unwrap().p99(), None, "999 values have 9.99 beyond");
        assert_eq!(Dist::of((1..=20).map(f64::from)).unwrap().p50(), Some(10.0));
        assert_eq!(Dist::of((1..=19).map(f64::from)).unwrap().p50(), None);
        assert_eq!(Dist::of([]), None);
    }

    #[test]
    fn intervals_are_wilsons() {
        let (low, high) = wilson(90, 100);
        assert!((low - 0.8256).abs() < 1e-3 && (high - 0.9448).abs() < 1e-3, "{low} {high}");
        assert_eq!(wilson(0, 0), (0.0, 1.0));
        assert!(wilson(10, 10).1 > 1.0 - 1e-9 && wilson(0, 10).0 < 1e-9);
    }
}
