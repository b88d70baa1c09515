//! One token for "please end": set by a signal, by the end of a parent, or by the program; seen by every task.

use std::io::{self, Read};
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Whether the process is to end, and why. Clones share it.
#[derive(Clone, Debug)]
pub struct Shutdown(Arc<watch::Sender<Option<String>>>);

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// A token that nobody has set.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }

    /// Sets it; the first reason stands.
    pub fn begin(&self, reason: &str) {
        self.0.send_if_modified(|state| {
            let first = state.is_none();
            state.get_or_insert_with(|| reason.to_owned());
            first
        });
    }

    /// Whether it is set.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// Waits until it is set; gives the reason. Cancel-safe.
    pub async fn wait(&self) -> String {
        let mut state = self.0.subscribe();
        let reason = state.wait_for(Option::is_some).await.expect("we hold a sender").clone();
        reason.unwrap_or_default()
    }

    /// Sets it on SIGINT or SIGTERM; a second signal ends the process at once. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When the system refuses the signal handlers.
    pub fn on_signals(&self) -> io::Result<()> {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let token = self.clone();
        tokio::spawn(async move {
            // Only signals count: a terminal's Ctrl-C comes with the end of the parent, and is one wish.
            let mut signalled = false;
            loop {
                let (name, code) = tokio::select! {
                    _ = interrupt.recv() => ("SIGINT", 130),
                    _ = terminate.recv() => ("SIGTERM", 143),
                };
                if std::mem::replace(&mut signalled, true) {
                    std::process::exit(code);
                }
                token.begin(name);
            }
        });
        Ok(())
    }

    /// Sets it when standard input ends: a parent that holds the other end of the pipe has gone (`--exit-with-parent`).
    /// The thread is not joined; it ends with the process.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn on_stdin_end(&self) -> io::Result<()> {
        let token = self.clone();
        let watch = move || {
            let mut buffer = [0; 1024];
            while matches!(io::stdin().lock().read(&mut buffer), Ok(n) if n > 0) {}
            token.begin("standard input ended");
        };
        std::thread::Builder::new().name("parent".into()).spawn(watch).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_waiter_gets_the_first_reason() {
        let token = Shutdown::new();
        let early = tokio::spawn({
            let token = token.clone();
            async move { token.wait().await }
        });
        assert!(!token.has_begun());
        token.begin("first");
        token.begin("second");
        assert_eq!(early.await.unwrap(), "first");
        assert_eq!(token.wait().await, "first");
        assert!(token.has_begun());
    }
}
