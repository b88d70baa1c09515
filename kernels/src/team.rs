//! The threads that share one kernel call. Decides who does which part and when all are done; knows nothing of what is done.
//!
//! A call takes a few microseconds and there are hundreds in a step, so members spin for a moment before they park, and a call allocates nothing.

#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// Most threads of a team.
pub const TEAM_MAX: usize = 256;
/// How long a thread looks for what it waits for before it parks: longer than what lies between two calls of a step, and than the last item of a product, for
/// which the others wait. Who wakes comes some ten microseconds late, so one that parks within a step costs the next call, too (decision 85).
const SPIN: Duration = Duration::from_micros(200);
/// Looks between two looks at the clock. A look takes 25 to 50 ns, the processor's pause.
const LOOKS: u32 = 32;

/// Most shares that the items of a call are cut in; members of larger teams have one together.
const SHARES_MAX: usize = 16;

/// The items of one call, cut in shares.
struct Shares {
    items: usize,
    members: usize,
    /// How many of `next` are in use.
    count: usize,
    /// Of each share the first item that nobody has taken.
    next: [Apart; SHARES_MAX],
}

/// A counter on lines of its own: processors fetch them in pairs.
#[repr(align(128))]
struct Apart(AtomicUsize);

impl Shares {
    fn new(items: usize, members: usize) -> Self {
        let count = members.min(SHARES_MAX);
        Self { items, members, count, next: std::array::from_fn(|share| Apart(AtomicUsize::new(items * share / count))) }
    }

    /// What `member` does: items of its own share, then of the next ones, each of which nobody else does.
    fn of(&self, member: usize) -> impl Iterator<Item = usize> {
        let own = member * self.count / self.members;
        let shares = (own..self.count).chain(0..own);
        shares.flat_map(move |share| {
            let end = self.items * (share + 1) / self.count;
            let take = move || self.next[share].0.fetch_add(1, Ordering::Relaxed);
            std::iter::repeat_with(take).take_while(move |&item| item < end)
        })
    }
}

/// A persistent set of threads; the caller is member 0. Stops with its owner.
pub struct Team {
    shared: Arc<Shared>,
    members: Vec<JoinHandle<()>>,
    /// Held during a call.
    busy: Mutex<()>,
}

/// What caller and members see.
struct Shared {
    /// Counts calls; a member that sees a new number does its part.
    call: AtomicU32,
    /// Members that have not done their part of this call.
    left: AtomicUsize,
    job: UnsafeCell<Job>,
    failed: AtomicBool,
    stop: AtomicBool,
}

/// The work of one call, its lifetime erased.
struct Job {
    work: *const (dyn Fn(usize) + Sync),
    caller: Thread,
    /// The processor that the caller runs on.
    processor: Option<usize>,
}

// SAFETY: `job` is written by the caller while no member reads it (`left` is 0) and read by members only between the increase of `call` and
// their decrease of `left`; both orders are release and acquire. The work itself is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Team {
    /// A team of `threads` members, the caller of [`Self::run`] included; at least 1, at most [`TEAM_MAX`]. Where the system gives no
    /// more threads the team is smaller.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let job = UnsafeCell::new(Job { work: &|_| (), caller: thread::current(), processor: None });
        let (call, left) = (AtomicU32::new(0), AtomicUsize::new(0));
        let shared = Arc::new(Shared { call, left, job, failed: AtomicBool::new(false), stop: AtomicBool::new(false) });
        let start = |member: usize| {
            let shared = shared.clone();
            thread::Builder::new().name(format!("kernel {member}")).spawn(move || shared.serve(member)).ok()
        };
        let members = (1..threads.min(TEAM_MAX)).map_while(start).collect();
        Self { shared, members, busy: Mutex::new(()) }
    }

    /// Members, the caller included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.members.len() + 1
    }

    /// Calls `work` once with each member's number, each on its own thread, and returns when all are done. A call inside a call, or from
    /// a second thread at the same time, is done by its caller alone.
    ///
    /// # Panics
    /// When `work` does, on any member, after all are done.
    pub fn run(&self, work: &(dyn Fn(usize) + Sync)) {
        let guard = if self.members.is_empty() { None } else { self.busy.try_lock().ok() };
        if guard.is_none() {
            return (0..self.threads()).for_each(work);
        }
        // SAFETY: members use the pointer only until they decrease `left`, and this function does not return before `left` is 0, whatever
        // panics; so the erased lifetime is not outlived.
        let work_ptr = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(work) };
        // SAFETY: `busy` is held and `left` is 0, so nobody else reads or writes the job.
        unsafe { *self.shared.job.get() = Job { work: work_ptr, caller: thread::current(), processor: processor() } };
        self.shared.left.store(self.members.len(), Ordering::Relaxed);
        self.shared.call.fetch_add(1, Ordering::Release);
        self.members.iter().for_each(|member| member.thread().unpark());
        let own = catch_unwind(AssertUnwindSafe(|| work(0)));
        wait(|| self.shared.left.load(Ordering::Acquire) == 0);
        let failed = self.shared.failed.swap(false, Ordering::Relaxed);
        drop(guard);
        match own {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => assert!(!failed, "a member of a team panicked"),
        }
    }

    /// Calls `work` for every item below `items`, on the caller's thread alone where there are no more than `alone`. Each member goes through a share of
    /// neighbouring items, the same in every call of as many items, then helps others with what is left of theirs. So what a member has written it mostly
    /// reads itself, and who is held up holds nobody up.
    pub fn each(&self, items: usize, alone: usize, work: impl Fn(usize) + Sync) {
        if items <= alone.max(1) {
            return (0..items).for_each(work);
        }
        let shares = Shares::new(items, self.threads());
        self.run(&|member| shares.of(member).for_each(&work));
    }

    /// Calls `work` for every chunk of `data` of `size` elements (the last may be shorter) with its number; `alone` as in [`Self::each`].
    ///
    /// # Panics
    /// When `size` is 0.
    pub fn chunks<T: Send>(&self, data: &mut [T], size: usize, alone: usize, work: impl Fn(usize, &mut [T]) + Sync) {
        let (len, count) = (data.len(), data.len().div_ceil(size));
        let parts = Parts::new(data);
        // SAFETY: each number comes once, and the ranges of different numbers do not overlap.
        self.each(count, alone, |index| work(index, unsafe { parts.part(index * size..len.min((index + 1) * size)) }));
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.call.fetch_add(1, Ordering::Release);
        for member in self.members.drain(..) {
            member.thread().unpark();
            let _ = member.join(); // it cannot have panicked: `serve` catches
        }
    }
}

impl Shared {
    /// A member's life.
    fn serve(&self, member: usize) {
        let mut seen = 0;
        loop {
            let parked = wait(|| self.call.load(Ordering::Acquire) != seen);
            seen = seen.wrapping_add(1);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            // SAFETY: the call counter has moved and this member has not decreased `left`: the job stands still.
            let job = unsafe { &*self.job.get() };
            let caller = job.caller.clone();
            if parked && let Some(callers) = job.processor {
                leave(callers);
            }
            // SAFETY: the caller waits for `left` to be 0 before the work goes away.
            if catch_unwind(AssertUnwindSafe(|| unsafe { (*job.work)(member) })).is_err() {
                self.failed.store(true, Ordering::Relaxed);
            }
            if self.left.fetch_sub(1, Ordering::Release) == 1 {
                caller.unpark();
            }
        }
    }
}

/// Spins, then parks, until `done`. Whoever makes it true unparks this thread. Gives whether it parked.
fn wait(done: impl Fn() -> bool) -> bool {
    let begin = Instant::now();
    loop {
        for _ in 0..LOOKS {
            if done() {
                return false;
            }
            std::hint::spin_loop();
        }
        if begin.elapsed() >= SPIN {
            break;
        }
    }
    while !done() {
        thread::park();
    }
    true
}

/// The processor that this thread runs on.
#[cfg(target_os = "linux")]
fn processor() -> Option<usize> {
    Some(rustix::thread::sched_getcpu())
}

/// Has this thread go on elsewhere if it runs on `processor`, and come back there only if the system wants. In a virtual machine Linux may wake a thread
/// on its waker's processor though another is idle (decision 76): caller and member would take turns there, half as fast as one
/// alone, until the system balances its load some ten milliseconds later.
#[cfg(target_os = "linux")]
fn leave(processor: usize) {
    use rustix::thread::{sched_getaffinity, sched_getcpu, sched_setaffinity};
    if sched_getcpu() != processor {
        return;
    }
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let mut others = allowed;
    others.unset(processor);
    // Where there are no others the system refuses.
    if sched_setaffinity(None, &others).is_ok() {
        let _ = sched_setaffinity(None, &allowed); // what it was before
    }
}

/// Elsewhere nobody asks.
#[cfg(not(target_os = "linux"))]
fn processor() -> Option<usize> {
    None
}

#[cfg(not(target_os = "linux"))]
fn leave(_processor: usize) {}

/// A slice that several members write, each its own parts.
pub(crate) struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]` whose parts go to different threads, which `T: Send` allows.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), borrow: PhantomData }
    }

    /// One part.
    ///
    /// # Safety
    /// No other part that overlaps `range` is in use at the same time.
    ///
    /// # Panics
    /// When `range` is not inside the slice.
    #[allow(clippy::mut_from_ref, reason = "that parts do not overlap is the caller's promise")]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: the range is inside the borrowed slice, and the caller promises that nobody else uses it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_more(count: &AtomicUsize) {
        count.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn every_member_is_called_once_for_each_call() {
        for threads in [0, 1, 2, 5] {
            let team = Team::new(threads);
            let counts: Vec<AtomicUsize> = (0..team.threads()).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..1000 {
                team.run(&|member| one_more(&counts[member]));
            }
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1000));
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn who_leaves_a_processor_runs_on_another_and_may_come_back() {
        use rustix::thread::{sched_getaffinity, sched_getcpu, sched_setaffinity};
        let allowed = sched_getaffinity(None).unwrap();
        let here = sched_getcpu();
        let mut only = allowed;
        only.clear();
        only.set(here);
        sched_setaffinity(None, &only).unwrap();
        leave(here);
        assert_eq!(sched_getcpu(), here, "there is no other");
        assert!(sched_getaffinity(None).unwrap() == only);
        sched_setaffinity(None, &allowed).unwrap();
        if allowed.count() > 1 {
            // Only who is there leaves; the system may move this thread at any time, but not a hundred times in a row.
            let left = (0..100).any(|_| {
                let before = sched_getcpu();
                leave(before);
                sched_getcpu() != before
            });
            assert!(left);
        }
        assert!(sched_getaffinity(None).unwrap() == allowed);
    }

    #[test]
    fn every_item_and_chunk_comes_once() {
        let team = Team::new(3);
        for (items, alone) in [(0, 0), (1, 0), (7, 2), (7, 7), (1000, 2)] {
            let mut marks = vec![0u32; items];
            team.chunks(&mut marks, 3, alone, |index, chunk| {
                chunk.iter_mut().enumerate().for_each(|(i, x)| *x += (index * 3 + i) as u32 + 1)
            });
            assert!(marks.iter().enumerate().all(|(i, x)| *x == i as u32 + 1));
        }
    }

    #[test]
    fn shares_cover_every_item_once_whoever_comes_first() {
        for members in [1, 2, 3, 16, 17, 40] {
            for items in [0, 1, 5, 16, 100] {
                let shares = Shares::new(items, members);
                let mut order: Vec<Vec<usize>> = (0..members).rev().map(|member| shares.of(member).collect()).collect();
                assert_eq!(order[0].len(), items, "the first finds all of it, its own share first");
                let mut all = order.concat();
                all.sort_unstable();
                assert!(all.into_iter().eq(0..items), "{items} items of {members} members");
                assert!(order.split_off(1).concat().is_empty());
            }
        }
    }

    #[test]
    fn members_that_all_work_keep_to_their_shares() {
        for (items, members) in [(9, 2), (100, 3), (33, 16)] {
            let shares = Shares::new(items, members);
            let mut ways: Vec<_> = (0..members).map(|member| shares.of(member)).collect();
            for turn in 0..items / members {
                for (member, way) in ways.iter_mut().enumerate() {
                    assert_eq!(way.next(), Some(items * member / members + turn));
                }
            }
        }
    }

    #[test]
    fn what_a_member_is_held_up_from_others_do() {
        let (team, done) = (Team::new(2), AtomicUsize::new(0));
        let held = AtomicUsize::new(usize::MAX);
        team.each(100, 1, |item| {
            // Who has the first item of the second share waits in it until all others are done.
            if item == 50 {
                held.store(item, Ordering::Relaxed);
                while done.load(Ordering::Relaxed) != 99 {
                    thread::yield_now();
                }
            }
            one_more(&done);
        });
        assert_eq!((held.into_inner(), done.into_inner()), (50, 100));
    }

    #[test]
    fn parked_members_wake() {
        let team = Team::new(2);
        for _ in 0..3 {
            let started = std::time::Instant::now();
            while started.elapsed().as_millis() < 3 {
                thread::yield_now(); // longer than a member spins
            }
            let count = AtomicUsize::new(0);
            team.run(&|_| one_more(&count));
            assert_eq!(count.into_inner(), 2);
        }
    }

    #[test]
    fn a_call_inside_a_call_is_done_by_its_caller() {
        let team = Team::new(2);
        let count = AtomicUsize::new(0);
        team.run(&|_| team.each(10, 1, |_| one_more(&count)));
        assert_eq!(count.into_inner(), 20);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_lives_on() {
        let team = Team::new(2);
        for who in [0, 1] {
            let call = || team.run(&|member| assert!(member != who, "on purpose"));
            assert!(catch_unwind(AssertUnwindSafe(call)).is_err());
        }
        let count = AtomicUsize::new(0);
        team.run(&|_| one_more(&count));
        assert_eq!(count.into_inner(), 2);
    }
}
