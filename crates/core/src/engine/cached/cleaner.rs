//! The cleaner: a thread that writes dirty pages of all windows back before they have to be
//! evicted. While it is stuck in a slow file, a few more threads serve the other windows.
//!
//! A fault never waits for a write to a file. The kernel may hold the file's lock while it faults
//! (`preadv` past the page cache into the window), so such a wait would never end. So a fault
//! evicts only clean pages, and the cleaner writes pages back ahead of it, in place and without
//! holding them. If the cleaner is too slow, a fault waits for it at most [`PATIENCE`], and then
//! the window exceeds its budget by a page.

use std::fmt;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::frames::Frames;
use super::SharedWindow;
use crate::error::{Result, Uninterruptible};
use crate::sys::lock::lock;
use crate::sys::per_process::PerProcess;
use crate::sys::process;
use crate::sys::stderr_line::stderr_line;
use crate::sys::thread::spawn_without_signals;
use crate::units::WindowPage;

/// How long a fault waits for a page to become clean: pages come no faster than one in that
/// time while nothing can be written.
const PATIENCE: Duration = Duration::from_millis(2);
/// Pages that are written together, and bytes of them.
const ROUND_PAGES: usize = 128;
const ROUND_BYTES: u64 = 4 << 20;
/// The most threads that write: if a window waits while all are busy, one more is started.
const MOST_THREADS: usize = 4;
/// How long such a thread waits for something to write before it ends.
const IDLE: Duration = Duration::from_secs(1);
/// How long a window is left alone after a write that failed, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What a round has done.
#[derive(Clone, Copy, Debug)]
struct Round {
    /// Pages that are clean by it.
    pages: usize,
    wants_more: bool,
}

/// A window whose pages are written.
trait Clean: fmt::Debug + Send + Sync {
    /// Writes up to `most` of the pages that leave next and were changed.
    fn clean_ahead(&self, most: usize) -> Result<Round>;
}

/// What one window asks of the thread, and how far it is.
#[derive(Debug)]
struct CleanedWindow {
    name: u64,
    window: Arc<dyn Clean>,
    wanted: bool,
    /// The thread is at it.
    busy: bool,
    /// Rounds after which pages were clean that a fault may evict.
    rounds: u64,
    /// How long the window was left alone the last time, and until when.
    pause: Option<Duration>,
    not_before: Option<Instant>,
}

#[derive(Debug, Default)]
struct Board {
    windows: Vec<CleanedWindow>,
    next: u64,
    /// Threads that were started besides.
    more: usize,
    ends: bool,
}

impl CleanedWindow {
    /// Whether a thread may begin with it.
    fn is_due(&self, now: Instant) -> bool {
        self.wanted && !self.busy && self.not_before.is_none_or(|instant| instant <= now)
    }
}

impl Board {
    fn find(&mut self, name: u64) -> Option<&mut CleanedWindow> {
        self.windows.iter_mut().find(|cleaned| cleaned.name == name)
    }
}

#[derive(Debug, Default)]
struct Signal {
    board: Mutex<Board>,
    changed: Condvar,
}

/// The running thread; dropped, it ends.
#[derive(Debug)]
struct CleaningThread {
    signal: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
    owner: u32,
}

static THREAD: PerProcess<CleaningThread> = PerProcess::new();

/// A window's part in the thread; dropped, its pages are not written any more.
#[derive(Debug)]
pub struct Cleaner {
    thread: Option<Arc<CleaningThread>>,
    name: u64,
}

impl Cleaner {
    /// Has a window's pages written when it asks for that.
    pub fn start<F: Frames>(window: Arc<SharedWindow<F>>) -> Result<Self, Errno> {
        Ok(Self::of(THREAD.get(CleaningThread::start)?, window))
    }

    fn of(thread: Arc<CleaningThread>, window: Arc<dyn Clean>) -> Self {
        let mut board = lock(&thread.signal.board);
        let name = board.next;
        board.next += 1;
        board.windows.push(CleanedWindow {
            name,
            window,
            wanted: false,
            busy: false,
            rounds: 0,
            pause: None,
            not_before: None,
        });
        drop(board);
        Self { thread: Some(thread), name }
    }

    /// Has changed pages be written.
    pub fn ask(&self) {
        let Some(thread) = &self.thread else { return };
        if let Some(cleaned) = lock(&thread.signal.board).find(self.name) {
            cleaned.wanted = true;
        }
        thread.signal.changed.notify_all();
    }

    /// Asks, and waits a moment until something was written; says whether it was.
    pub fn wait(&self) -> bool {
        let Some(thread) = &self.thread else { return false };
        let mut board = lock(&thread.signal.board);
        let Some(cleaned) = board.find(self.name) else { return false };
        cleaned.wanted = true;
        let before = cleaned.rounds;
        thread.signal.changed.notify_all();
        let rounds = |board: &mut Board| board.find(self.name).map_or(before, |now| now.rounds);
        let waiting = |board: &mut Board| rounds(board) == before;
        let waited = thread.signal.changed.wait_timeout_while(board, PATIENCE, waiting);
        let Ok((mut board, _)) = waited else { return false };
        let written = rounds(&mut board) != before;
        if !written && board.find(self.name).is_some_and(|cleaned| cleaned.is_due(Instant::now())) {
            // All threads are at other windows.
            thread.start_one_more(board);
        }
        written
    }
}

impl Drop for Cleaner {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if thread.owner != process::id() {
            // A child of fork has no such thread, and its parent's lock may be taken.
            std::mem::forget(thread);
            return;
        }
        let mut board = lock(&thread.signal.board);
        while board.find(self.name).is_some_and(|cleaned| cleaned.busy) {
            board = thread.signal.changed.wait(board).unwrap_or_else(PoisonError::into_inner);
        }
        let gone = board.windows.iter().position(|cleaned| cleaned.name == self.name);
        let gone = gone.map(|index| board.windows.remove(index));
        drop(board);
        drop(gone);
    }
}

impl CleaningThread {
    fn start() -> Result<Self, Errno> {
        let signal = Arc::new(Signal::default());
        let listener = Arc::clone(&signal);
        let thread = spawn_without_signals("fremap-clean", move || run(&listener, None))?;
        Ok(Self { signal, thread: Some(thread), owner: process::id() })
    }

    /// Starts a thread that ends when there is nothing to do; none beyond the limit.
    fn start_one_more(&self, mut board: MutexGuard<'_, Board>) {
        if board.more + 1 >= MOST_THREADS {
            return;
        }
        board.more += 1;
        drop(board);
        let signal = Arc::clone(&self.signal);
        let body = move || {
            run(&signal, Some(IDLE));
            lock(&signal.board).more -= 1;
            signal.changed.notify_all();
        };
        if spawn_without_signals("fremap-clean", body).is_err() {
            lock(&self.signal.board).more -= 1;
        }
    }
}

impl Drop for CleaningThread {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if self.owner != process::id() {
            // A child of fork has no such thread: there is nothing to join.
            std::mem::forget(thread);
            return;
        }
        let mut board = lock(&self.signal.board);
        board.ends = true;
        self.signal.changed.notify_all();
        while board.more > 0 {
            board = self.signal.changed.wait(board).unwrap_or_else(PoisonError::into_inner);
        }
        drop(board);
        if thread.join().is_err() {
            stderr_line(format_args!("the thread that writes the pages of windows had panicked"));
        }
    }
}

/// Waits until a window wants something; None at the end, or where nothing came within `idle`.
/// Each gets its turn.
fn next(signal: &Signal, after: u64, idle: Option<Duration>) -> Option<(u64, Arc<dyn Clean>)> {
    let mut board = lock(&signal.board);
    let ends = idle.map(|idle| Instant::now() + idle);
    loop {
        if board.ends {
            return None;
        }
        let now = Instant::now();
        let due = |cleaned: &&mut CleanedWindow| cleaned.is_due(now);
        let turn = |cleaned: &&mut CleanedWindow| (cleaned.name <= after, cleaned.name);
        if let Some(cleaned) = board.windows.iter_mut().filter(due).min_by_key(turn) {
            (cleaned.wanted, cleaned.busy) = (false, true);
            return Some((cleaned.name, Arc::clone(&cleaned.window)));
        }
        if ends.is_some_and(|ends| ends <= now) {
            return None;
        }
        let wanted = board.windows.iter().filter(|cleaned| cleaned.wanted && !cleaned.busy);
        let until = wanted.filter_map(|cleaned| cleaned.not_before).chain(ends).min();
        board = match until {
            None => signal.changed.wait(board).ok()?,
            Some(until) => signal.changed.wait_timeout(board, until - now).ok()?.0,
        };
    }
}

fn run(signal: &Signal, idle: Option<Duration>) {
    let mut last = 0;
    while let Some((name, window)) = next(signal, last, idle) {
        last = name;
        let round = catch_unwind(AssertUnwindSafe(|| window.clean_ahead(ROUND_PAGES)));
        let round = round.unwrap_or_else(|_| {
            // Whoever closes the window, or waits for it, must not wait forever.
            stderr_line(format_args!("writing the pages of a window panicked, which is a bug"));
            Ok(Round { pages: 0, wants_more: false })
        });
        drop(window);
        if let Some(cleaned) = lock(&signal.board).find(name) {
            cleaned.busy = false;
            // After an error the pages are changed as before, and whoever flushes them is told why.
            let longer = cleaned.pause.map_or(FIRST_PAUSE, |pause| 2 * pause).min(LONGEST_PAUSE);
            cleaned.pause = round.is_err().then_some(longer);
            cleaned.not_before = cleaned.pause.map(|pause| Instant::now() + pause);
            cleaned.rounds += u64::from(round.as_ref().is_ok_and(|done| done.pages > 0));
            // More than one round, until enough pages are clean.
            cleaned.wanted |= round.is_ok_and(|done| done.wants_more);
        }
        signal.changed.notify_all();
    }
}

impl<F: Frames> Clean for SharedWindow<F> {
    /// Nobody holds the pages meanwhile: what is written to one then makes it a changed page again.
    fn clean_ahead(&self, most: usize) -> Result<Round> {
        let mut pages: Vec<WindowPage> = {
            let mut state = self.state.lock();
            let most_bytes = self.store.page_size().index_of(ROUND_BYTES).max(1);
            state.leaving_next(most.min(most_bytes as usize))
        };
        if pages.is_empty() {
            return Ok(Round { pages: 0, wants_more: false });
        }
        pages.sort_unstable();
        self.clean("evict", &pages, &Uninterruptible)?;
        let mut state = self.state.lock();
        Ok(Round { pages: pages.len(), wants_more: state.note_cleaned(&pages) })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A window whose rounds take until the gate is open.
    #[derive(Debug, Default)]
    struct Gated {
        open: Mutex<bool>,
        opened: Condvar,
        rounds: AtomicUsize,
    }

    impl Clean for Gated {
        fn clean_ahead(&self, _most: usize) -> Result<Round> {
            self.rounds.fetch_add(1, Ordering::SeqCst);
            let open = self.opened.wait_while(lock(&self.open), |open| !*open);
            drop(open);
            Ok(Round { pages: 1, wants_more: false })
        }
    }

    impl Gated {
        fn open(&self) {
            *lock(&self.open) = true;
            self.opened.notify_all();
        }
    }

    #[test]
    fn a_window_does_not_wait_for_a_slow_file_of_another() {
        let thread = Arc::new(CleaningThread::start().expect("a thread"));
        let slow: Vec<Arc<Gated>> = (0..MOST_THREADS - 1).map(|_| Arc::default()).collect();
        let of_slow: Vec<Cleaner> = slow
            .iter()
            .map(|window| Cleaner::of(Arc::clone(&thread), Arc::clone(window) as _))
            .collect();
        for (cleaner, window) in of_slow.iter().zip(&slow) {
            while window.rounds.load(Ordering::SeqCst) == 0 {
                assert!(!cleaner.wait(), "the gate is closed");
            }
        }
        let fast = Arc::new(Gated::default());
        fast.open();
        let cleaner = Cleaner::of(Arc::clone(&thread), Arc::clone(&fast) as _);
        assert!((0..5000).any(|_| cleaner.wait()), "nobody cleans it");
        assert!(lock(&thread.signal.board).more < MOST_THREADS);
        for window in &slow {
            assert_eq!(window.rounds.load(Ordering::SeqCst), 1, "one thread at a window");
            window.open();
        }
        drop((cleaner, of_slow));
        drop(Arc::into_inner(thread).expect("nobody else has it"));
    }
}
