//! The thread that writes changed pages before they have to leave.
//!
//! A fault never waits for a write to a file: the kernel may have the file locked while it
//! faults (`preadv` past the page cache into the window), and would wait for itself. So a fault
//! evicts clean pages alone, and this thread makes pages clean ahead of it, in their place
//! and held by nobody. Where writing falls behind, a fault waits at most [`PATIENCE`] for it,
//! then the window goes a page beyond its budget.

use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;

use super::frames::Frames;
use super::Shared;
use crate::engine::lock;
use crate::error::{Interrupt, Result, Uninterruptible};
use crate::sys::stderr_line::stderr_line;
use crate::sys::thread::spawn_without_signals;
use crate::units::WindowPage;

/// How long a fault waits for a page to become clean: pages come no faster than one in that
/// time while nothing can be written.
const PATIENCE: Duration = Duration::from_millis(2);
/// Pages that are written together.
const ROUND_PAGES: usize = 128;
/// How long the thread waits after a write that failed, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What the thread is asked for, and how far it is.
#[derive(Debug, Default)]
struct Asked {
    wanted: bool,
    ends: bool,
    /// Rounds after which pages were clean that a fault may evict.
    rounds: u64,
}

#[derive(Debug, Default)]
struct Signal {
    asked: Mutex<Asked>,
    changed: Condvar,
}

/// A running thread; dropped, it ends.
#[derive(Debug)]
pub struct Cleaner {
    signal: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
    owner: u32,
}

impl Cleaner {
    /// Starts the thread, which sleeps until it is asked.
    ///
    /// # Errors
    /// EAGAIN at the limit of threads.
    pub fn start<F: Frames>(shared: Arc<Shared<F>>) -> Result<Self, Errno> {
        let signal = Arc::new(Signal::default());
        let listener = Arc::clone(&signal);
        let thread = spawn_without_signals("fremap-clean", move || run(&shared, &listener))?;
        Ok(Self { signal, thread: Some(thread), owner: crate::sys::process::id() })
    }

    /// Has changed pages be written.
    pub fn ask(&self) {
        lock(&self.signal.asked).wanted = true;
        self.signal.changed.notify_all();
    }

    /// Asks, and waits a moment until something was written; says whether it was.
    #[must_use]
    pub fn wait(&self) -> bool {
        let mut asked = lock(&self.signal.asked);
        let before = asked.rounds;
        asked.wanted = true;
        self.signal.changed.notify_all();
        let waiting = |asked: &mut Asked| asked.rounds == before;
        let waited = self.signal.changed.wait_timeout_while(asked, PATIENCE, waiting);
        waited.is_ok_and(|(asked, _)| asked.rounds != before)
    }
}

impl Drop for Cleaner {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if self.owner != crate::sys::process::id() {
            // A child of fork has no such thread: there is nothing to join.
            std::mem::forget(thread);
            return;
        }
        lock(&self.signal.asked).ends = true;
        self.signal.changed.notify_all();
        if thread.join().is_err() {
            stderr_line(format_args!("the thread that writes a window's pages had panicked"));
        }
    }
}

/// What a round has done.
struct Round {
    /// Pages that are clean by it.
    pages: usize,
    wants_more: bool,
}

/// Waits until the thread is wanted, or for `pause`; false at its end.
fn wait(signal: &Signal, pause: Option<Duration>) -> bool {
    let mut asked = lock(&signal.asked);
    if let Some(pause) = pause {
        let running = |asked: &mut Asked| !asked.ends;
        match signal.changed.wait_timeout_while(asked, pause, running) {
            Ok((guard, _)) => asked = guard,
            Err(_) => return false,
        }
    }
    while !asked.wanted && !asked.ends {
        match signal.changed.wait(asked) {
            Ok(guard) => asked = guard,
            Err(_) => return false,
        }
    }
    asked.wanted = false;
    !asked.ends
}

fn run<F: Frames>(shared: &Shared<F>, signal: &Signal) {
    let mut pause = None;
    while wait(signal, pause) {
        // More than one round, until enough pages are clean.
        loop {
            let round = shared.clean_ahead(ROUND_PAGES);
            pause = match &round {
                Ok(_) => None,
                // The pages are changed as before, and whoever flushes them is told why.
                Err(_) => {
                    Some(pause.map_or(FIRST_PAUSE, |pause: Duration| 2 * pause).min(LONGEST_PAUSE))
                }
            };
            let ends = {
                let mut asked = lock(&signal.asked);
                asked.rounds += u64::from(round.as_ref().is_ok_and(|done| done.pages > 0));
                asked.ends
            };
            signal.changed.notify_all();
            if ends || !round.is_ok_and(|done| done.wants_more) {
                break;
            }
        }
    }
}

impl<F: Frames> Shared<F> {
    /// Writes those of the pages that leave next which were changed, at most `most` at once.
    /// Nobody holds them meanwhile: what is stored to one then makes it a changed page again.
    ///
    /// # Errors
    /// I/O: the pages are changed as before.
    fn clean_ahead(&self, most: usize) -> Result<Round> {
        let mut pages: Vec<WindowPage> = {
            let mut state = self.state.lock();
            state.leaving_next(most)
        };
        if pages.is_empty() {
            return Ok(Round { pages: 0, wants_more: false });
        }
        pages.sort_unstable();
        self.clean("evict", &pages, &Uninterruptible)?;
        let mut state = self.state.lock();
        Ok(Round { pages: pages.len(), wants_more: state.note_cleaned(&pages) })
    }

    /// Writes what was stored to `pages` (sorted, each named once), which nobody holds and
    /// which stay where they are.
    ///
    /// # Errors
    /// I/O, or an interrupt: the pages are changed as before.
    pub(super) fn clean(
        &self,
        operation: &'static str,
        pages: &[WindowPage],
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let writing = self.begin_writing(operation, pages, interrupt)?;
        if writing.is_empty() {
            return Ok(());
        }
        self.state.lock().unsynced = true;
        self.store.note_passing();
        let written = self.write_pages(operation, &writing, interrupt);
        self.store.note_passing();
        self.end_writing(&writing, written.is_ok());
        written
    }
}
