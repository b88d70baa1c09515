//! What is known while a run lasts: counters, and the last requests that ended. One lock for a moment at the end of a request, none before.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use super::record::Record;

/// Requests that the window of [`Live::recent`] holds.
pub const RECENT_MAX: usize = 512;

/// A run as it goes.
#[derive(Debug, Default)]
pub struct Live {
    /// Requests of the plan that this generator has.
    pub planned: AtomicU64,
    /// Taken up.
    pub sent: AtomicU64,
    /// Ended, however.
    pub ended: AtomicU64,
    /// Ended without the whole answer.
    pub failed: AtomicU64,
    /// Tokens of answers.
    pub output_tokens: AtomicU64,
    /// Tokens of prompts.
    pub prompt_tokens: AtomicU64,
    /// Of these, cached.
    pub cached_tokens: AtomicU64,
    recent: Mutex<VecDeque<Recent>>,
}

/// A request that ended.
#[derive(Clone, Copy, Debug)]
pub struct Recent {
    /// When, nanoseconds from the start.
    pub end_ns: u64,
    /// From the due time, milliseconds.
    pub ttft_ms: Option<f64>,
    /// Milliseconds.
    pub tpot_ms: Option<f64>,
    /// Milliseconds.
    pub lag_ms: f64,
}

impl Live {
    /// A request was taken up.
    pub fn began(&self) {
        self.sent.fetch_add(1, Relaxed);
    }

    /// A request ended.
    pub fn ended(&self, record: &Record) {
        self.ended.fetch_add(1, Relaxed);
        self.failed.fetch_add(u64::from(!record.ok()), Relaxed);
        self.output_tokens.fetch_add(u64::from(record.output_tokens), Relaxed);
        self.prompt_tokens.fetch_add(u64::from(record.prompt_tokens), Relaxed);
        self.cached_tokens.fetch_add(u64::from(record.cached_tokens.unwrap_or(0)), Relaxed);
        let entry = Recent { end_ns: record.end_ns, ttft_ms: record.ttft_ms(), tpot_ms: record.tpot_ms(), lag_ms: record.lag_ms() };
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.len() == RECENT_MAX {
            recent.pop_front();
        }
        recent.push_back(entry);
    }

    /// Requests under way.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.sent.load(Relaxed).saturating_sub(self.ended.load(Relaxed))
    }

    /// The last requests that ended, oldest first.
    #[must_use]
    pub fn recent(&self) -> Vec<Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }
}
