//! Waits for an instant more exactly than the runtime's timers, which are a millisecond coarse.

use std::time::{Duration, Instant};

/// Before the instant, the clock is asked instead of a timer for so long.
pub const SPIN: Duration = Duration::from_millis(2);

/// Waits until `at`, letting other tasks run.
pub async fn until(at: Instant) {
    if let Some(early) = at.checked_sub(SPIN).filter(|early| *early > Instant::now()) {
        tokio::time::sleep_until(early.into()).await;
    }
    while Instant::now() < at {
        tokio::task::yield_now().await;
    }
}
