//! Randomness by address: each draw comes from (seed, stream, index), never from how many draws were made before. So request 7 is the
//! same request whether one generator makes the plan or eight, and a new stream changes no old one.
//!
//! SplitMix64 (Steele, Lea, Flood 2014) is enough: nothing here is a secret.

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a draw is for. The number is part of every plan: append, never reorder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Stream {
    /// Gaps between arrivals.
    Arrivals = 1,
    /// Lengths of prompts.
    Prompts = 2,
    /// Lengths of answers.
    Answers = 3,
    /// Which group, class or system prompt.
    Groups = 4,
    /// Turns and thinking time of sessions.
    Sessions = 5,
    /// Resampling.
    Bootstrap = 6,
    /// Names of pieces of prompts.
    Pieces = 7,
}

/// SplitMix64's finaliser: one well mixed number from another.
#[must_use]
pub const fn mix(seed: u64) -> u64 {
    let seed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let seed = (seed ^ (seed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    seed ^ (seed >> 31)
}

/// A number that belongs to (seed, a, b).
#[must_use]
pub const fn prf(seed: u64, a: u64, b: u64) -> u64 {
    let first = mix(seed.wrapping_add(GOLDEN) ^ mix(a.wrapping_mul(GOLDEN)));
    mix(first.wrapping_add(b.wrapping_add(1).wrapping_mul(GOLDEN)))
}

/// A sequence of draws for one purpose and one index.
#[derive(Clone, Debug)]
pub struct Draws(u64);

impl Draws {
    /// The draws of `index` in `stream`.
    #[must_use]
    pub fn new(seed: u64, stream: Stream, index: u64) -> Self {
        Self(prf(seed, stream as u64, index))
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// In (0, 1), never either end.
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }

    /// Exponential with mean 1.
    pub fn exponential(&mut self) -> f64 {
        -self.unit().ln()
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Gamma with this shape and scale 1 (Marsaglia and Tsang 2000).
    pub fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let boost = self.unit().powf(1.0 / shape);
            return self.gamma(shape + 1.0) * boost;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.unit().ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }

    /// Weibull with this shape and scale 1.
    pub fn weibull(&mut self, shape: f64) -> f64 {
        self.exponential().powf(1.0 / shape)
    }
}

/// Draws ranks 0, 1, … with weight (rank + 1)^-exponent.
#[derive(Clone, Debug)]
pub struct Zipf(Vec<f64>);

impl Zipf {
    /// Over `n` ranks, at least one; exponent 0 is uniform.
    #[must_use]
    pub fn new(n: u32, exponent: f64) -> Self {
        let mut sum = 0.0;
        let mut weight = |rank: u32| {
            sum += f64::from(rank + 1).powf(-exponent);
            sum
        };
        Self((0..n.max(1)).map(&mut weight).collect())
    }

    /// One rank. O(log n).
    pub fn draw(&self, draws: &mut Draws) -> u32 {
        let at = draws.unit() * self.0.last().copied().unwrap_or(1.0);
        self.0.partition_point(|sum| *sum < at) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(mut draw: impl FnMut(&mut Draws) -> f64) -> (f64, f64) {
        let n = 40_000u32;
        let values: Vec<f64> = (0..n).map(|i| draw(&mut Draws::new(7, Stream::Arrivals, u64::from(i)))).collect();
        let mean = values.iter().sum::<f64>() / f64::from(n);
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / f64::from(n);
        (mean, variance)
    }

    #[test]
    fn distributions_have_their_moments() {
        let near = |(mean, variance): (f64, f64), want: (f64, f64), what: &str| {
            assert!((mean - want.0).abs() < 0.03 * want.0.max(0.5), "{what}: mean {mean}");
            assert!((variance - want.1).abs() < 0.08 * want.1, "{what}: variance {variance}");
        };
        near(moments(Draws::exponential), (1.0, 1.0), "exponential");
        near(moments(|d| d.gamma(4.0)), (4.0, 4.0), "gamma 4");
        near(moments(|d| d.gamma(0.25)), (0.25, 0.25), "gamma 0.25");
        near(moments(|d| d.weibull(2.0)), (0.886_227, 0.214_602), "weibull 2");
        near(moments(|d| d.normal() + 3.0), (3.0, 1.0), "normal");
    }

    #[test]
    fn zipf_favours_the_first() {
        let zipf = Zipf::new(4, 1.0);
        let mut counts = [0u32; 4];
        (0..20_000).for_each(|i| counts[zipf.draw(&mut Draws::new(1, Stream::Groups, i)) as usize] += 1);
        let share = |rank: usize| f64::from(counts[rank]) / 20_000.0;
        assert!((share(0) - 0.48).abs() < 0.02 && (share(3) - 0.12).abs() < 0.02, "{counts:?}");
    }

    #[test]
    fn draws_belong_to_their_address() {
        let one = Draws::new(1, Stream::Prompts, 5).bits();
        assert_eq!(one, Draws::new(1, Stream::Prompts, 5).bits());
        assert_ne!(one, Draws::new(1, Stream::Answers, 5).bits());
        assert_ne!(one, Draws::new(2, Stream::Prompts, 5).bits());
    }
}
