//! Serving faults: what the fault service and signal handlers have in common.

use rustix::io::Errno;

use super::PagedFrames;
use crate::engine::cached::{
    offset_of, Frames, ReadIndex, SharedWindow, State, Userfault, MAX_READS,
};
use crate::engine::tell_why;
use crate::stats::Counters;
use crate::sys::fault_ranges::Touched;
use crate::sys::mm::system_page_bytes;
use crate::sys::span::Span;
use crate::sys::stderr_line::stderr_line;
use crate::sys::thread::send_segv;
use crate::sys::uffd::{Fault, Partial};
use crate::table::{Entry, Shown};
use crate::units::{PageIndex, PageSize, Prot, Run, WindowPage};

/// Reads that signal handlers have under way at once.
pub(super) const HANDLER_READS: usize = 8;

/// A fault that is being served.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempt {
    pub(super) page: WindowPage,
    /// What it was when its serving began.
    pub(super) entry: Entry,
    /// The pages that are read for it, of which it is the first.
    pub(super) run: Run<WindowPage>,
    pub(super) read: ReadIndex,
}

/// How the pages that are read for one fault may lie in the file, and how many such reads may
/// be under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// Anywhere.
    Scattered,
    /// One behind the other: for signal handlers, which have memory for [`HANDLER_READS`].
    Contiguous,
}

impl Layout {
    fn most_reads(self) -> usize {
        match self {
            Self::Scattered => MAX_READS,
            Self::Contiguous => HANDLER_READS,
        }
    }
}

/// Whether a fault can be served now.
#[derive(Clone, Copy, Debug)]
pub(super) enum Begun {
    /// It is.
    Attempt(Attempt),
    /// Somebody holds the page, or reads for it, and wakes the threads that wait.
    Busy,
    /// As many reads as may be are under way.
    Full,
}

/// The thread that waits for the first page of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiter {
    /// It reads the page.
    Reader,
    /// It is about to write to it.
    Writer,
    /// There is none: the pages are read ahead.
    Nobody,
}

impl Waiter {
    pub(super) fn of(writes: bool) -> Self {
        if writes {
            Self::Writer
        } else {
            Self::Reader
        }
    }
}

/// What has become of an attempt to resolve a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FaultOutcome {
    /// The fault is over, or comes again by itself.
    Resolved,
    /// A call has changed the page: it needs another attempt.
    Changed,
    /// The pages cannot all be read: the first needs an attempt alone.
    Partial,
    /// The touch is this signal, in a thread that resolves its own faults.
    Fatal(Touched),
}

/// Whether a touch brings the page's content.
pub(super) fn loads(entry: Entry) -> bool {
    entry.loadable() && !entry.held() && entry.shown().file_page().is_some()
}

/// Why a touch of an absent page that shows no file page is a signal.
pub(super) fn nothing_to_bring(entry: Entry) -> &'static str {
    if entry.shown() == Shown::Placed {
        "its content was dropped from memory, as by madvise(2), and only place() can restore it"
    } else {
        "nothing is mapped there"
    }
}

impl SharedWindow<PagedFrames> {
    pub(super) fn page(&self) -> PageSize {
        self.store.page_size()
    }

    /// The window page at an address; None for one outside the window.
    pub(super) fn page_at(&self, address: u64) -> Option<WindowPage> {
        let offset = address.checked_sub(self.frames.region.start() as u64)?;
        let within = offset < self.frames.region.len() as u64;
        within.then(|| WindowPage(self.page().index_of(offset)))
    }

    /// Notes that a fault on `page` is being served, with a read of up to `most` pages.
    pub(super) fn begin(
        &self,
        state: &mut State,
        page: WindowPage,
        most: u64,
        layout: Layout,
    ) -> Begun {
        let entry = state.get(page);
        if entry.held() || state.reads.reads(page) {
            return Begun::Busy;
        }
        let wanted = if loads(entry) { state.reads.length(page, most) } else { 1 };
        let run = self.run_from(state, page, wanted, layout, |state, page| {
            let entry = state.get(page);
            loads(entry) && !entry.stale() && !state.reads.reads(page)
        });
        match state.reads.begin(run, layout.most_reads()) {
            Some(read) => Begun::Attempt(Attempt { page, entry, run, read }),
            None => Begun::Full,
        }
    }

    /// `page` and those behind it that may be read with it, up to `wanted`.
    pub(super) fn run_from(
        &self,
        state: &State,
        page: WindowPage,
        wanted: u64,
        layout: Layout,
        may: impl Fn(&State, WindowPage) -> bool,
    ) -> Run<WindowPage> {
        let file_page = |page: WindowPage| state.get(page).shown().file_page();
        let first = file_page(page);
        let end = self.page().index_of(self.frames.region.len() as u64);
        let follows = |run: Run<WindowPage>| {
            layout == Layout::Scattered
                || first.map(|first| first.offset(run.count)) == file_page(run.end())
        };
        let mut run = Run { first: page, count: 1 };
        while run.count < wanted && run.end().0 < end && may(state, run.end()) && follows(run) {
            run.count += 1;
        }
        run
    }

    /// Makes a touch of a page a signal, after saying why, if the page still
    /// shows what could not be read.
    pub(super) fn give_up(&self, attempt: &Attempt, reason: &str) {
        if !self.state.lock().reads.is_current(attempt.read) {
            return;
        }
        let signal = if self.frames.uffd.features().poison() { "SIGBUS" } else { "SIGSEGV" };
        // Before the signal, which may end the process, and outside the lock,
        // as whoever reads the pipe behind stderr may be slow.
        tell_why(attempt.page, attempt.entry, signal, format_args!("{reason}"));
        self.forbid(attempt, attempt.entry.fail_load());
    }

    /// Makes a touch of a page a signal, if the page still is as it was.
    pub(super) fn forbid(&self, attempt: &Attempt, forbidden: Entry) {
        let Attempt { page, entry, read, .. } = *attempt;
        let mut state = self.state.lock();
        if !state.reads.is_current(read) {
            return;
        }
        let denied = self.frames.deny(&[self.range_of(page)]);
        if denied.is_ok() {
            state.mark(page, forbidden);
        }
        drop(state);
        if let Err(errno) = denied {
            // The fault comes back and is served again.
            stderr_line(format_args!(
                "window page {}: the kernel refused to make its touch a signal ({errno})",
                page.0
            ));
        } else if forbidden != entry {
            Counters::add(&self.counters.pages_unreadable, 1);
        }
    }

    /// Whether the kernel has a page that the table calls present. Where it has lost it
    /// (somebody called `madvise` on the window), the page is absent from now on.
    pub(super) fn recheck(&self, address: u64) -> bool {
        let offset = address - self.frames.region.start() as u64;
        let offset = offset as usize & !(system_page_bytes() - 1);
        let asked = self.frames.has(self.frames.region.span(offset, system_page_bytes()));
        asked != Ok(false)
    }

    /// The kernel has lost a page that the table called present.
    pub(super) fn note_lost(state: &mut State, attempt: &Attempt) {
        if state.reads.is_current(attempt.read) {
            state.mark(attempt.page, attempt.entry.finish_drop());
        }
    }

    fn wake(&self, page: WindowPage) {
        self.frames.wake(&[self.range_of(page)]);
    }

    fn range_of(&self, page: WindowPage) -> (usize, usize) {
        (offset_of(self.page(), page), self.page().bytes())
    }

    /// Lets a write to a page that is protected from it through and notes it; false where
    /// the page may not be written to, or is not there.
    pub(super) fn allow_write(&self, state: &mut State, page: WindowPage) -> bool {
        let entry = state.get(page);
        if !entry.present() || entry.prot() != Prot::Write {
            return false;
        }
        if entry.shown() != Shown::Placed {
            state.mark(page, entry.note_write());
        }
        let (at, len) = self.range_of(page);
        // Wakes the thread. Should it fail the store is a fault once more.
        self.frames.uffd.write_protect(self.frames.region.span(at, len), false).is_ok()
    }

    /// A write to a page that is protected from it: lets it through and notes it, or makes
    /// it a signal where the page is only to be read.
    pub(super) fn serve_write(&self, page: WindowPage, fault: Fault) {
        let mut state = self.state.lock();
        let entry = state.get(page);
        if entry.held() || self.allow_write(&mut state, page) {
            // Whoever holds the page wakes the thread.
            return;
        }
        if entry.stale() {
            // A call that failed has left it; it is dropped now, and served when touched again.
            let _dropped = self.frames.drop_pages(&[self.range_of(page)]);
        }
        drop(state);
        if entry.present() && entry.prot() != Prot::Write {
            if let Err(errno) = send_segv(fault.thread, fault.address) {
                stderr_line(format_args!(
                    "window page {}: a write to a read-only page cannot be made a \
                     signal ({errno})",
                    page.0
                ));
            }
        }
        self.wake(page);
    }

    /// Shows `content` on the pages of an attempt, which are still what they were when its
    /// reading began. Allocates nothing where all was [allocated ahead](State::allocate_ahead).
    pub(super) fn show(
        &self,
        state: &mut State,
        attempt: &Attempt,
        (content, size_bytes): (Span<'_>, u64),
        waiter: Waiter,
    ) -> Result<(), Errno> {
        let offset = offset_of(self.page(), attempt.run.first);
        let tracked = self.frames.tracking.is_some();
        let first = if self.dirties(attempt, waiter) { self.page().bytes() } else { 0 };
        let (left, right) = (content.part(0, first), content.part(first, content.len() - first));
        let copy = |offset, content: Span<'_>, protect| {
            if content.is_empty() {
                return Ok(());
            }
            self.frames.copy_in(offset, content, protect)
        };
        let copied = copy(offset, left, false).and_then(|()| {
            copy(offset + first, right, tracked).map_err(|partial: Partial| partial.after(first))
        });
        self.note_shown(state, attempt, copied, size_bytes, waiter)
    }

    /// Whether the first page of an attempt is dirty from the start, so that a thread that is
    /// about to write to it need not fault a second time.
    fn dirties(&self, attempt: &Attempt, waiter: Waiter) -> bool {
        let tracked = self.frames.tracking.is_some();
        tracked && waiter == Waiter::Writer && attempt.entry.prot() == Prot::Write
    }

    /// Notes that the pages of an attempt are present, or those in front of where their
    /// putting in stopped.
    pub(super) fn note_shown(
        &self,
        state: &mut State,
        attempt: &Attempt,
        put: Result<(), Partial>,
        size_bytes: u64,
        waiter: Waiter,
    ) -> Result<(), Errno> {
        let run = attempt.run;
        let tracked = self.frames.tracking.is_some();
        let dirty = self.dirties(attempt, waiter);
        let done_bytes = |partial: Partial| partial.done_bytes as u64;
        let done =
            put.map_or_else(|partial| self.page().index_of(done_bytes(partial)), |()| run.count);
        for (page, index) in run.pages().zip(0..done) {
            let entry = state.get(page);
            if let (true, Some(file_page)) = (tracked, entry.shown().file_page()) {
                let file_bytes = self.store.bytes_within(file_page, size_bytes);
                state.note_loaded(file_page, file_bytes, self.page());
            }
            let entry = entry.finish_load();
            state.mark(page, if dirty && index == 0 { entry.note_write() } else { entry });
        }
        // The kernel may have a part of a page behind them.
        for page in run.pages().skip(done as usize) {
            let entry = state.get(page);
            state.mark(page, entry.load_in_part());
        }
        if done == 0 {
            return put.map_err(|partial| partial.errno);
        }
        state.reads.note(Run { count: done, ..run });
        Counters::add(&self.counters.faults, u64::from(waiter != Waiter::Nobody));
        Counters::add(&self.counters.bytes_read, self.page().bytes_of(done));
        Ok(())
    }
}
