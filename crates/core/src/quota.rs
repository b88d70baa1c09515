//! How many tokens somebody may still spend: a bucket that fills at a steady rate and holds one minute's worth.
//!
//! Pure: the caller says what time it is and how large the limit is now, which may change between two calls.

use crate::ids::Time;

/// The time in which an empty bucket fills, microseconds.
pub const WINDOW_US: u64 = 60_000_000;

/// A bucket. New ones are full.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket {
    /// What is spent and has not flown back yet, in tokens x microseconds of the window.
    debt: u128,
    at: Time,
}

/// Why tokens are not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Short {
    /// They will be there after this many microseconds, if nobody else takes them.
    Wait(u64),
    /// The bucket never holds so many.
    Never,
}

impl Bucket {
    /// Takes `tokens` of a bucket that holds `per_minute`, all or none.
    ///
    /// # Errors
    /// See [`Short`]; nothing is taken then.
    pub fn take(&mut self, now: Time, per_minute: u64, tokens: u64) -> Result<(), Short> {
        if tokens > per_minute {
            return Err(Short::Never);
        }
        self.flow(now, per_minute);
        let (size, want) = (u128::from(per_minute) * u128::from(WINDOW_US), u128::from(tokens) * u128::from(WINDOW_US));
        if self.debt + want > size {
            let lacks = self.debt + want - size;
            return Err(Short::Wait(lacks.div_ceil(u128::from(per_minute)).min(u128::from(WINDOW_US)) as u64));
        }
        self.debt += want;
        Ok(())
    }

    /// Tokens that can be taken now.
    #[must_use]
    pub fn left(&mut self, now: Time, per_minute: u64) -> u64 {
        self.flow(now, per_minute);
        let size = u128::from(per_minute) * u128::from(WINDOW_US);
        (size.saturating_sub(self.debt) / u128::from(WINDOW_US)) as u64
    }

    /// Microseconds until it is full again.
    #[must_use]
    pub fn full_in_us(&mut self, now: Time, per_minute: u64) -> u64 {
        self.flow(now, per_minute);
        self.debt.div_ceil(u128::from(per_minute.max(1))).min(u128::from(WINDOW_US)) as u64
    }

    /// What has flown back since the last call. A limit that shrank leaves at most an empty bucket.
    fn flow(&mut self, now: Time, per_minute: u64) {
        let back = u128::from(now.since(self.at)) * u128::from(per_minute);
        let size = u128::from(per_minute) * u128::from(WINDOW_US);
        (self.debt, self.at) = (self.debt.saturating_sub(back).min(size), now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_spent_comes_back_in_a_minute() {
        let (mut bucket, t) = (Bucket::default(), |s: u64| Time(s * 1_000_000));
        assert_eq!(bucket.take(t(9), 600, 600), Ok(()));
        assert_eq!(bucket.take(t(9), 600, 10), Err(Short::Wait(1_000_000)));
        assert_eq!(bucket.take(t(10), 600, 10), Ok(()));
        assert_eq!((bucket.left(t(40), 600), bucket.full_in_us(t(40), 600)), (300, 30_000_000));
        assert_eq!(bucket.take(t(40), 600, 601), Err(Short::Never));
        assert_eq!(bucket.left(t(40), 60), 0, "a smaller limit leaves an empty bucket, not a debt of hours");
        assert_eq!(bucket.take(t(41), 60, 1), Ok(()));
    }

    proptest! {
        #[test]
        fn never_more_than_the_limit_in_any_minute(
            per_minute in 1u64..500,
            asks in prop::collection::vec((0u64..4_000_000, 0u64..200), 1..200),
        ) {
            let (mut bucket, mut now) = (Bucket::default(), 0);
            let mut given: Vec<(u64, u64)> = Vec::new();
            for (pause, tokens) in asks {
                now += pause;
                match bucket.take(Time(now), per_minute, tokens) {
                    Ok(()) => given.push((now, tokens)),
                    // whoever waits as long as it says is served
                    Err(Short::Wait(us)) => prop_assert!(bucket.clone().take(Time(now + us), per_minute, tokens).is_ok()),
                    Err(Short::Never) => prop_assert!(tokens > per_minute),
                }
            }
            for (end, _) in &given {
                let spent: u64 = given.iter().filter(|(at, _)| at <= end && at + WINDOW_US > *end).map(|(_, tokens)| tokens).sum();
                // a full bucket, and what flows back within the minute
                prop_assert!(spent <= 2 * per_minute);
            }
        }
    }

    extern crate std;
    use std::vec::Vec;
}
