//! What a tenant may have at a time: requests running, and prompt tokens in a minute. Counted by each gateway for itself, so the whole
//! cluster gives at most the number of gateways times as much; counting together would put the log on every request's way.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use axum::http::{HeaderMap, HeaderValue, StatusCode};
use millrace_core::cluster::Limits;
use millrace_core::ids::Time;
use millrace_core::quota::{Bucket, Short};
use parking_lot::Mutex;

use super::auth::Caller;
use super::error::ApiError;

/// Tenants that are remembered while nothing of theirs runs; at more, those whose bucket is full again are forgotten.
const IDLE_TENANTS_MAX: usize = 1024;

#[derive(Default)]
struct Used {
    running: u32,
    bucket: Bucket,
    per_minute: u64,
}

/// The counts of one gateway.
pub struct Limiter {
    tenants: Mutex<HashMap<String, Used>>,
    started: Instant,
}

impl Default for Limiter {
    fn default() -> Self {
        Self { tenants: Mutex::default(), started: Instant::now() }
    }
}

/// A place among the requests of a tenant; given back when dropped.
pub struct Permit {
    limiter: Arc<Limiter>,
    tenant: String,
    requests: u32,
    /// How the tenant's tokens stand.
    pub tokens: Option<TokensLeft>,
}

/// How a tenant's prompt tokens stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokensLeft {
    /// In a minute.
    pub limit: u64,
    /// Now.
    pub left: u64,
    /// Until all are there again, milliseconds.
    pub reset_ms: u64,
}

impl TokensLeft {
    /// As OpenAI's headers.
    pub fn write(&self, headers: &mut HeaderMap) {
        let seconds = format!("{}.{:03}s", self.reset_ms / 1000, self.reset_ms % 1000);
        headers.insert("x-ratelimit-limit-tokens", HeaderValue::from(self.limit));
        headers.insert("x-ratelimit-remaining-tokens", HeaderValue::from(self.left));
        if let Ok(value) = HeaderValue::from_str(&seconds) {
            headers.insert("x-ratelimit-reset-tokens", value);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(used) = self.limiter.tenants.lock().get_mut(&self.tenant) {
            used.running = used.running.saturating_sub(self.requests);
        }
    }
}

impl Limiter {
    /// Takes a place for `requests` requests with `prompt_tokens` tokens together.
    ///
    /// # Errors
    /// 429 with `Retry-After` when a limit is reached; without, when the limit is too small for the request at any time.
    pub fn admit(self: &Arc<Self>, caller: &Caller, requests: u32, prompt_tokens: u64) -> Result<Permit, ApiError> {
        let now = Time(self.started.elapsed().as_micros() as u64);
        self.admit_at(now, caller, requests, prompt_tokens)
    }

    fn admit_at(self: &Arc<Self>, now: Time, caller: &Caller, requests: u32, prompt_tokens: u64) -> Result<Permit, ApiError> {
        let Limits { running_max, prompt_tokens_per_minute: per_minute, .. } = caller.limits;
        let mut tenants = self.tenants.lock();
        if tenants.len() >= IDLE_TENANTS_MAX && !tenants.contains_key(&caller.tenant) {
            tenants.retain(|_, used| used.running > 0 || used.bucket.full_in_us(now, used.per_minute) > 0);
        }
        let used = tenants.entry(caller.tenant.clone()).or_default();
        if running_max > 0 && used.running.saturating_add(requests) > running_max {
            let never = requests > running_max;
            let message = format!("{} requests of {} run already; the limit is {running_max}", used.running, caller.tenant);
            return Err(limited(message, (!never).then_some(1)));
        }
        used.per_minute = per_minute;
        let mut tokens = None;
        if per_minute > 0 {
            used.bucket.take(now, per_minute, prompt_tokens).map_err(|short| out_of_tokens(caller, prompt_tokens, short))?;
            let (left, reset_ms) = (used.bucket.left(now, per_minute), used.bucket.full_in_us(now, per_minute).div_ceil(1000));
            tokens = Some(TokensLeft { limit: per_minute, left, reset_ms });
        }
        used.running += requests;
        Ok(Permit { limiter: self.clone(), tenant: caller.tenant.clone(), requests, tokens })
    }
}

fn out_of_tokens(caller: &Caller, tokens: u64, short: Short) -> ApiError {
    let (limit, tenant) = (caller.limits.prompt_tokens_per_minute, &caller.tenant);
    match short {
        Short::Never => limited(format!("{tokens} prompt tokens are over the limit of {tenant}, {limit} a minute"), None),
        Short::Wait(us) => {
            let seconds = us.div_ceil(1_000_000).max(1) as u32;
            limited(
                format!("Rate limit reached for {tenant}: {limit} prompt tokens a minute; try again in {seconds} s"),
                Some(seconds),
            )
        }
    }
}

fn limited(message: String, retry_after_s: Option<u32>) -> ApiError {
    ApiError { retry_after_s, ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", message) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(running_max: u32, prompt_tokens_per_minute: u64) -> Caller {
        Caller { tenant: "acme".into(), limits: Limits { running_max, prompt_tokens_per_minute, answer_tokens_max: 0 } }
    }

    #[test]
    fn requests_beyond_the_limit_wait_until_one_ends() {
        let (limiter, caller) = (Arc::new(Limiter::default()), caller(2, 0));
        let first = limiter.admit(&caller, 1, 10).unwrap();
        let _second = limiter.admit(&caller, 1, 10).unwrap();
        let refused = limiter.admit(&caller, 1, 10).err().unwrap();
        assert_eq!((refused.status, refused.retry_after_s), (StatusCode::TOO_MANY_REQUESTS, Some(1)));
        assert_eq!(refused.body()["error"]["code"], "rate_limit_exceeded");
        let other = Caller { tenant: "other".into(), ..caller.clone() };
        limiter.admit(&other, 1, 10).expect("tenants do not share a limit");
        drop(first);
        limiter.admit(&caller, 1, 10).unwrap();
        assert_eq!(limiter.admit(&caller, 3, 10).err().unwrap().retry_after_s, None, "three at a time never fit");
    }

    #[test]
    fn tokens_beyond_the_minutes_share_wait_for_their_time() {
        let (limiter, caller) = (Arc::new(Limiter::default()), caller(0, 600));
        let t = |s: u64| Time(s * 1_000_000);
        let permit = limiter.admit_at(t(0), &caller, 1, 500).unwrap();
        assert_eq!(permit.tokens, Some(TokensLeft { limit: 600, left: 100, reset_ms: 50_000 }));
        let refused = limiter.admit_at(t(0), &caller, 1, 200).err().unwrap();
        assert_eq!((refused.status, refused.retry_after_s), (StatusCode::TOO_MANY_REQUESTS, Some(10)));
        limiter.admit_at(t(10), &caller, 1, 200).unwrap();
        assert_eq!(limiter.admit_at(t(99), &caller, 1, 601).err().unwrap().retry_after_s, None);
    }

    #[test]
    fn tenants_without_use_are_forgotten() {
        let limiter = Arc::new(Limiter::default());
        for i in 0..3 * IDLE_TENANTS_MAX {
            let caller = Caller { tenant: format!("t{i}"), ..caller(1, 0) };
            limiter.admit(&caller, 1, 1).unwrap();
        }
        assert!(limiter.tenants.lock().len() <= IDLE_TENANTS_MAX);
    }
}
