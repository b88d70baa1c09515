//! Threads for KV: each runs a tokio runtime of its own, on which lanes live and their streams are written and read.
//!
//! A lane's packets pass the socket's task, the connection's and the stream's. On a runtime of several threads these three wake each other
//! across processors, and every byte changes caches on its way; here it stays where it arrived (decision 74). Nothing else runs on these
//! threads: what would block one for longer than a span's digest belongs elsewhere.

use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinHandle;

/// The threads of one port. They end some time after this is dropped, and what runs on them with them.
#[derive(Debug)]
pub(crate) struct LaneThreads {
    runtimes: Vec<Runtime>,
    /// Whose turn it is.
    next: AtomicUsize,
}

/// One of them.
#[derive(Clone, Debug)]
pub(crate) struct LaneThread(Handle);

impl LaneThread {
    /// The thread that this is called on.
    pub(crate) fn current() -> Self {
        Self(Handle::current())
    }

    /// Runs `task` there.
    pub(crate) fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.0.spawn(task)
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.0
    }
}

impl LaneThreads {
    /// Starts `count` threads, one at least.
    ///
    /// # Errors
    /// The system gives no further thread or descriptor.
    pub(crate) fn start(count: usize) -> io::Result<Self> {
        // Tokio's runtime for one thread would do, but has no slot for the task that was woken last: by its turn the bytes it was woken for are
        // colder. That is 4 % of the processor time.
        let runtime = |no| Builder::new_multi_thread().worker_threads(1).thread_name(format!("lane-{no}")).enable_all().build();
        let runtimes = (0..count.max(1)).map(runtime).collect::<io::Result<_>>()?;
        Ok(Self { runtimes, next: AtomicUsize::new(0) })
    }

    /// The thread of a port's socket.
    pub(crate) fn first(&self) -> LaneThread {
        LaneThread(self.runtimes[0].handle().clone())
    }

    /// The thread for the next lane, by turns.
    pub(crate) fn next(&self) -> LaneThread {
        let turn = self.next.fetch_add(1, Relaxed) % self.runtimes.len();
        LaneThread(self.runtimes[turn].handle().clone())
    }
}

impl Drop for LaneThreads {
    /// Waits for nothing: whoever drops the port may run on a runtime, which must not block.
    fn drop(&mut self) {
        self.runtimes.drain(..).for_each(Runtime::shutdown_background);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn lanes_take_turns_and_threads_end_with_their_port() {
        let threads = LaneThreads::start(2).unwrap();
        let name_of = |thread: LaneThread| thread.spawn(async { std::thread::current().name().map(str::to_owned) });
        let mut names = Vec::new();
        for _ in 0..3 {
            names.push(name_of(threads.next()).await.unwrap().unwrap());
        }
        assert_eq!(names, ["lane-0", "lane-1", "lane-0"]);

        let (held, gone) = oneshot::channel::<()>();
        threads.first().spawn(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        drop(threads);
        let ended = tokio::time::timeout(Duration::from_secs(30), gone).await.expect("the thread has ended");
        assert!(ended.is_err(), "its task was dropped with it");
    }

    #[test]
    fn a_port_has_one_thread_at_least() {
        let threads = LaneThreads::start(0).unwrap();
        assert_eq!(threads.runtimes.len(), 1);
    }
}
