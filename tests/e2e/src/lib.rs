//! The harness of the end-to-end tests: starts a whole cluster as real processes, talks to it as clients and operators do, and
//! breaks it on purpose. The tests are in `tests/`; nothing here decides what is right.
//!
//! The binaries are those that lie beside the test executable, so build the workspace first: `make test` does. Tests of one file
//! take turns, because a cluster needs the whole machine.

pub mod cluster;
pub mod golden;
pub mod http;
pub mod matrix;
pub mod parts;
pub mod process;
pub mod relay;
pub mod stream;

use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest wait for anything: a hang is a failure, a slow machine is none.
pub const WAIT_MAX: Duration = Duration::from_secs(120);
/// Pause between two looks at something that is awaited.
const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// Looks again and again until there is what is awaited, and panics with the last reason why not after `wait_max`.
pub async fn eventually<T>(what: &str, wait_max: Duration, mut look: impl AsyncFnMut() -> Result<T, String>) -> T {
    let started = tokio::time::Instant::now();
    loop {
        let reason = match look().await {
            Ok(found) => return found,
            Err(reason) => reason,
        };
        assert!(started.elapsed() < wait_max, "{what}: not within {} s: {reason}", wait_max.as_secs());
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

/// The root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the package lies in the repository")
}

/// A model of 300 tokens and three layers, without a tokenizer.
#[must_use]
pub fn tiny_model() -> PathBuf {
    repository().join("tests/data/tiny-llama-gqa-tied")
}

/// The demo's model: `MILLRACE_MODEL`, else where `make setup` puts it.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn real_model() -> PathBuf {
    let named = std::env::var_os("MILLRACE_MODEL").filter(|path| !path.is_empty()).map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set"));
    let path = named.unwrap_or_else(|| home().join(".cache/millrace/models/smollm2-135m-instruct.gguf"));
    assert!(path.exists(), "{} is not there; `make setup` fetches it", path.display());
    path
}

/// Whether the long form of the tests was asked for: `MILLRACE_E2E=full`.
#[must_use]
pub fn full() -> bool {
    std::env::var("MILLRACE_E2E").is_ok_and(|form| form == "full")
}
