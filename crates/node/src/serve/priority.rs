//! What an engine's threads leave to others where threads share processors. Decides the order of who goes first, nothing else (decision 79).
//!
//! Links, lanes and gateways go first: they need little, and an engine waits for them. Prompts go before tokens: a decode engine computes whatever it has,
//! however few sequences that are, and with equal shares prompts would wait for it and its batches stay small.

use millrace_core::message::Role;

/// How much nicer than its process an engine is, in the system's steps: each makes its share of a contested processor 1.25 times as small, so where prompts and
/// tokens meet, tokens have a sixth.
fn nicer(role: Role) -> i32 {
    if role == Role::Prefill { 3 } else { 10 }
}

/// Makes this thread, and those that it starts, go after others. Where the system has no such thing for a single thread, nothing happens.
pub(super) fn lower(role: Role) {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::nice(nicer(role)) {
        tracing::warn!(%error, "the engine's threads go no later than others");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = nicer(role);
}

/// What `work` gives, done by a thread whose priority is [`lower`], as is that of the threads that it starts.
///
/// # Errors
/// The system gives no thread.
pub(super) fn lowered<T: Send>(role: Role, work: impl FnOnce() -> T + Send) -> std::io::Result<T> {
    let work = || {
        lower(role);
        work()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("engine".into()).spawn_scoped(scope, work)?;
        thread.join().map_or_else(|panic| std::panic::resume_unwind(panic), Ok)
    })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use rustix::process::nice;

    use super::*;

    #[test]
    fn only_the_thread_and_those_it_starts_go_later() {
        let here = || nice(0).unwrap();
        let before = here();
        for role in [Role::Prefill, Role::Decode] {
            let (own, started) = lowered(role, || (here(), std::thread::spawn(here).join().unwrap())).unwrap();
            let expected = (before + nicer(role)).min(19);
            assert_eq!((own, started, here()), (expected, expected, before));
        }
    }
}
