//! Moments as people and programs read them: UTC, to the second.

use std::time::{SystemTime, UNIX_EPOCH};

const DAY_S: i64 = 86_400;

/// RFC 3339, such as `2026-11-22T01:02:03Z`.
#[must_use]
pub fn rfc3339(at: SystemTime) -> String {
    let seconds = seconds(at);
    let (year, month, day) = civil(seconds.div_euclid(DAY_S));
    let of_day = seconds.rem_euclid(DAY_S);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

/// Whole days from `now` to `at`; negative when it is over.
#[must_use]
pub fn days_left(at: SystemTime, now: SystemTime) -> i64 {
    (seconds(at) - seconds(now)).div_euclid(DAY_S)
}

fn seconds(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// Year, month and day of a count of days since 1970-01-01. Howard Hinnant, "chrono-compatible low-level date algorithms": years begin
/// in March, so that the leap day is the last.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn moments_read_as_dates() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let known = [(0, "1970-01-01T00:00:00Z"), (951_782_400, "2000-02-29T00:00:00Z"), (1_795_309_323, "2026-11-22T01:02:03Z")];
        for (seconds, text) in known {
            assert_eq!(rfc3339(at(seconds)), text);
        }
        assert_eq!((days_left(at(86_400), at(0)), days_left(at(86_399), at(0)), days_left(at(0), at(1))), (1, 0, -1));
    }
}
