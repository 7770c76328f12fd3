//! Faults that are resolved in the thread that has them: in windows with `fault="signal"`, and in
//! all windows in children of `fork`.
//!
//! All of this runs in a signal handler that has every signal blocked. It allocates nothing,
//! takes only the state's lock, and waits for other threads that read or change the same page. No
//! thread that has this lock, or holds a page, waits for a thread that faults.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::serve::{nothing_to_bring, Attempt, Begun, FaultOutcome, Layout, Waiter, HANDLER_READS};
use super::PagedFrames;
use crate::engine::cached::{offset_of, SharedWindow, State, Tracking};
use crate::engine::{tell_why, FaultMode};
use crate::error::{Error, Result};
use crate::stats::Counters;
use crate::store::Unread;
use crate::sys::fault_ranges::{Resolve, Touch, Touched};
use crate::sys::lock::Guard;
use crate::sys::mm::{system_page_bytes, Access, Region};
use crate::sys::span::Span;
use crate::sys::uffd::copy_in_child;
use crate::table::{Entry, Shown};
use crate::units::{Prot, Run, WindowPage};

/// How long a fork waits for a call to let go of the pages that it is changing.
const FORK_PATIENCE: Duration = Duration::from_secs(2);
/// How long one such wait lasts.
const FORK_WAIT: Duration = Duration::from_millis(10);

/// Resolves the faults of a window in the threads that have them.
#[derive(Debug)]
pub(super) struct Responder {
    shared: Arc<SharedWindow<PagedFrames>>,
    /// Memory for as many reads as may be under way; None where a thread serves faults.
    buffers: Option<Region>,
    cluster_pages: u64,
}

/// Fails for a window whose faults signal handlers cannot resolve.
pub(super) fn check(has_budget: bool) -> Result<()> {
    if has_budget {
        return Err(Error::unsupported(
            "Window",
            "paged",
            "with fault=\"signal\" has no budget: a signal handler cannot evict or write pages; \
             use fault=\"thread\", or budget=None",
        ));
    }
    Ok(())
}

impl Responder {
    pub(super) fn new(
        shared: Arc<SharedWindow<PagedFrames>>,
        fault: FaultMode,
        cluster_pages: u64,
    ) -> Result<Self, Errno> {
        let buffers = match fault {
            FaultMode::Thread => None,
            FaultMode::Signal => {
                shared.state.lock().allocate_ahead();
                let bytes = shared.page().bytes_of(HANDLER_READS as u64 * cluster_pages) as usize;
                let mut buffers = Region::anonymous(bytes, system_page_bytes(), Access::Write)?;
                buffers.keep_from_children()?;
                Some(buffers)
            }
        };
        Ok(Self { shared, buffers, cluster_pages })
    }

    /// The memory for an attempt's pages.
    fn buffer<'b>(&self, buffers: &'b Region, attempt: &Attempt) -> Span<'b> {
        let page = self.shared.page();
        let start = page.bytes_of(attempt.read.0 as u64 * self.cluster_pages) as usize;
        buffers.span(start, page.bytes_of(attempt.run.count) as usize)
    }

    /// A touch of a page that the table calls present.
    fn resolve_present(&self, state: &mut State, attempt: &Attempt, touch: Touch) -> FaultOutcome {
        let shared = &self.shared;
        if !state.reads.is_current(attempt.read) {
            // A call holds the page, or has changed it: a write would be lost with it.
            return FaultOutcome::Resolved;
        }
        if !shared.recheck(touch.address as u64) {
            SharedWindow::note_lost(state, attempt);
            return FaultOutcome::Resolved;
        }
        let protected = touch.stores && shared.frames.tracking == Some(Tracking::Faults);
        if !protected || attempt.entry.prot() == Prot::Write {
            // It has come since, or is to be written to, which may have been allowed since.
            if protected {
                shared.allow_write(state, attempt.page);
            }
            return FaultOutcome::Resolved;
        }
        FaultOutcome::Fatal(Touched::Segv)
    }

    fn attempt(&self, buffers: &Region, attempt: &Attempt, touch: Touch) -> FaultOutcome {
        let shared = &self.shared;
        let entry = attempt.entry;
        if entry.present() {
            let mut state = shared.state.lock_in_handler();
            return self.resolve_present(&mut state, attempt, touch);
        }
        if entry.prot() == Prot::None || entry.unreadable() {
            return FaultOutcome::Fatal(Touched::Bus);
        }
        let Shown::File(first) = entry.shown() else {
            let reason = nothing_to_bring(entry);
            tell_why(attempt.page, entry, "SIGBUS", format_args!("{reason}"));
            return FaultOutcome::Fatal(Touched::Bus);
        };
        let content = self.buffer(buffers, attempt);
        let size_bytes = shared.store.size_bytes();
        let read = shared.store.read_run(Run { first, count: attempt.run.count }, content);
        let mut state = shared.state.lock_in_handler();
        if !state.reads.is_current(attempt.read) {
            return FaultOutcome::Changed;
        }
        let unread = match read {
            Ok(()) if state.has_room_for_cut() => {
                // Should it fail the touch comes again.
                let waiter = Waiter::of(touch.stores);
                let _shown = shared.show(&mut state, attempt, (content, size_bytes), waiter);
                return FaultOutcome::Resolved;
            }
            Ok(()) => Unread::Failed(Errno::NOMEM),
            Err(_) if attempt.run.count > 1 => return FaultOutcome::Partial,
            Err(unread) => {
                state.mark(attempt.page, entry.fail_load());
                unread
            }
        };
        drop(state);
        Counters::add(&shared.counters.pages_unreadable, 1);
        tell_why(attempt.page, entry, "SIGBUS", format_args!("{unread}"));
        FaultOutcome::Fatal(Touched::Bus)
    }

    /// Reads a page of the store, and as many behind it as run forwards, into a child.
    fn load_in_child(&self, uffd: RawFd, run: Run<WindowPage>, entry: Entry) -> Result<(), Unread> {
        let shared = &self.shared;
        let Shown::File(first) = entry.shown() else { return Err(Unread::Ended) };
        let bytes = shared.page().bytes_of(run.count) as usize;
        // The child has none of its parent's buffers.
        let buffer = Region::anonymous(bytes, system_page_bytes(), Access::Write);
        let buffer = buffer.map_err(Unread::Failed)?;
        let content = buffer.span(0, bytes);
        shared.store.read_run(Run { first, count: run.count }, content)?;
        let to = shared.frames.region.span(offset_of(shared.page(), run.first), bytes);
        // Where the kernel cannot now the touch comes again.
        match copy_in_child(uffd, to, content) {
            Ok(()) | Err(Errno::AGAIN) => Ok(()),
            Err(errno) => Err(Unread::Failed(errno)),
        }
    }
}

/// Why a child of fork cannot have what the parent has on a page; None if it can.
fn parents_own(entry: Entry, tracking: Option<Tracking>) -> Option<&'static str> {
    // What a call was changing at the fork may have been written to.
    let changing = entry.held() && tracking == Some(Tracking::Kernel);
    match entry.shown() {
        Shown::Nothing => Some("nothing is mapped there"),
        Shown::Placed => Some("place() gave it its content in the process that forked this one"),
        Shown::File(_) if !entry.clean() || changing => Some(
            "it was changed in the process that forked this one, and the store does not have it; \
             flush() before the fork",
        ),
        Shown::File(_) => None,
    }
}

impl Resolve for Responder {
    fn resolve(&self, touch: Touch) -> Touched {
        let shared = &self.shared;
        let Some(buffers) = &self.buffers else { return Touched::Bus };
        let Some(page) = shared.page_at(touch.address as u64) else { return Touched::Bus };
        let mut most = self.cluster_pages;
        loop {
            let mut state = shared.state.lock_in_handler();
            let attempt = loop {
                match shared.begin(&mut state, page, most, Layout::Contiguous) {
                    Begun::Attempt(attempt) => break attempt,
                    Begun::Busy | Begun::Full => state = shared.state.wait(state, None),
                }
            };
            drop(state);
            let outcome = self.attempt(buffers, &attempt, touch);
            shared.state.lock_in_handler().reads.end(attempt.read);
            // Who waits for the page, or for a read to begin, looks again.
            shared.state.notify_all();
            match outcome {
                FaultOutcome::Resolved => return Touched::Again,
                FaultOutcome::Changed => most = self.cluster_pages,
                FaultOutcome::Partial => most = 1,
                FaultOutcome::Fatal(touched) => return touched,
            }
        }
    }

    fn resolve_in_child(&self, touch: Touch, uffd: RawFd) -> Touched {
        let shared = &self.shared;
        let tracking = shared.frames.tracking;
        let Some(page) = shared.page_at(touch.address as u64) else { return Touched::Bus };
        let mut state = shared.state.lock_in_handler();
        let entry = state.get(page);
        if entry.prot() == Prot::None {
            return Touched::Bus;
        }
        if let Some(reason) = parents_own(entry, tracking) {
            drop(state);
            tell_why(page, entry, "SIGBUS", format_args!("{reason}"));
            return Touched::Bus;
        }
        let wanted = state.reads.length(page, self.cluster_pages);
        let run = shared.run_from(&state, page, wanted, Layout::Contiguous, |state, page| {
            let entry = state.get(page);
            entry.prot() != Prot::None && parents_own(entry, tracking).is_none()
        });
        state.reads.note(run);
        drop(state);
        let alone = Run { count: 1, ..run };
        let loaded = self.load_in_child(uffd, run, entry);
        match loaded.or_else(|_| self.load_in_child(uffd, alone, entry)) {
            Ok(()) => Touched::Again,
            Err(unread) => {
                tell_why(page, entry, "SIGBUS", format_args!("{unread}"));
                Touched::Bus
            }
        }
    }

    fn before_fork(&self) {
        let shared = &self.shared;
        let mut state: Guard<'_, State> = shared.state.lock_in_handler();
        // The page map of a child of fork is its parent's, and nobody writes to its window.
        let stores = shared.frames.tracking == Some(Tracking::Kernel);
        if stores && shared.frames.region.is_own() {
            let begin = Instant::now();
            while state.held_pages() > 0 && begin.elapsed() < FORK_PATIENCE {
                state = shared.state.wait(state, Some(FORK_WAIT));
            }
            shared.note_all_writes(&mut state);
        }
        state.leave();
    }

    fn after_fork(&self) {
        drop(self.shared.state.resume());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::Calibration;
    use crate::engine::paged::{open, PagedOptions};
    use crate::engine::{Engine, Fill};
    use crate::error::Uninterruptible;
    use crate::store::Store;
    use crate::table::{Origin, Table};
    use crate::units::{FilePage, Pages};

    const PAGES: u64 = 4;

    /// A call that comes between the beginning of a fault's serving and its end: what the
    /// fault found is not what it acts upon.
    #[test]
    fn a_page_that_a_call_has_changed_is_looked_at_anew() {
        let store = Arc::new(Store::memory(PAGES * 4096, Some(4096)).expect("a memfd"));
        let table = Table::new(PAGES, Origin::Linear(FilePage(0)), Prot::Write).unwrap();
        let options = PagedOptions {
            locked: false,
            tracking: Some(Tracking::Faults),
            fault: FaultMode::Signal,
            budget: None,
            calibration: &Calibration::default(),
        };
        let Ok(cached) = open(store, table.with_appearances().unwrap(), options) else {
            let features = crate::sys::uffd::Uffd::supported();
            assert!(!features.is_ok_and(|has| has.signals() && has.write_protect()));
            return;
        };
        let first = Pages::List(vec![WindowPage(0)]);
        cached.populate(&first, Fill::All, &Uninterruptible).expect("room");
        cached.protect(&first, Prot::Read, &Uninterruptible).expect("a sync window");
        let shared = Arc::clone(cached.shared());
        let responder = Responder::new(Arc::clone(&shared), FaultMode::Signal, 1).expect("memory");
        let touch = Touch { address: shared.frames.region.start() as usize, stores: true };
        let begin = || {
            let mut state = shared.state.lock();
            match shared.begin(&mut state, WindowPage(0), 1, Layout::Contiguous) {
                Begun::Attempt(attempt) => attempt,
                other => panic!("{other:?}"),
            }
        };
        let end = |attempt: &Attempt| {
            let mut state = shared.state.lock();
            let outcome = responder.resolve_present(&mut state, attempt, touch);
            state.reads.end(attempt.read);
            outcome
        };
        let unchanged = begin();
        assert_eq!(end(&unchanged), FaultOutcome::Fatal(Touched::Segv));
        let changed = begin();
        cached.protect(&first, Prot::Write, &Uninterruptible).expect("a sync window");
        assert_eq!(end(&changed), FaultOutcome::Resolved);
        assert!(!shared.state.lock().get(WindowPage(0)).dirty(), "nothing was let through");
        let anew = begin();
        assert_eq!(end(&anew), FaultOutcome::Resolved);
        assert!(shared.state.lock().get(WindowPage(0)).dirty());
    }
}
