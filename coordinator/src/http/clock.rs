//! When a request passed the stations of this gateway: which part of the time to its first token was the gateway's own. From the request's
//! head to the first token handed to HTTP; what lies before and after (the kernel, the way) no gateway can see.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::dispatch::Timings;

/// The times of one request, from the arrival of its head.
#[derive(Debug)]
pub struct Clock {
    arrived: Instant,
    read: Duration,
    parsed: Duration,
    first: OnceLock<Duration>,
}

impl Clock {
    /// The head is there.
    #[must_use]
    pub fn start() -> Self {
        Self { arrived: Instant::now(), read: Duration::ZERO, parsed: Duration::ZERO, first: OnceLock::new() }
    }

    /// The whole body is there.
    pub fn read(&mut self) {
        self.read = self.arrived.elapsed();
    }

    /// It is checked, and the prompt is tokens.
    pub fn parsed(&mut self) {
        self.parsed = self.arrived.elapsed();
    }

    /// A token is on its way to the client; only the first one counts.
    pub fn token(&self) {
        self.first.get_or_init(|| self.arrived.elapsed());
    }

    /// The `gateway` object of a response's times, in microseconds. What only a streamed answer has is null in others.
    #[must_use]
    pub fn json(&self, timings: &Timings) -> Value {
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let first = self.first.get().copied();
        // Admission, which comes before submission, is some microseconds and counts here too.
        let write = first.map(|first| us(first.saturating_sub(self.parsed)).saturating_sub(timings.ttft_us));
        json!({
            "read_us": us(self.read), "parse_us": us(self.parsed.saturating_sub(self.read)), "route_us": timings.route_us,
            "write_us": write, "ttft_us": first.map(us),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_add_up_to_the_whole() {
        let mut clock = Clock::start();
        clock.read();
        clock.parsed();
        let ms = Duration::from_millis;
        (clock.read, clock.parsed) = (ms(2), ms(5));
        let timings = Timings { route_us: 700, ttft_us: 40_000, ..Timings::default() };
        assert_eq!(clock.json(&timings)["ttft_us"], Value::Null, "there is no token");
        clock.first.set(ms(46)).unwrap();
        clock.token();
        let json = clock.json(&timings);
        let want = json!({"read_us": 2000, "parse_us": 3000, "route_us": 700, "write_us": 1000, "ttft_us": 46_000});
        assert_eq!(json, want, "a second token changes nothing");
    }
}
