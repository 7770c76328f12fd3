//! Serving faults: what both the fault thread and signal handlers do, and the thread's part.

use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::PagedFrames;
use crate::engine::cached::{
    offset_of, Cleaner, Frames, FreeFrames, Isolation, ReadIndex, Shared, State, Userfault,
};
use crate::engine::lock;
use crate::error::{self, Uninterruptible};
use crate::fault::Serve;
use crate::scatter;
use crate::stats::Counters;
use crate::sys::fault_ranges::Touched;
use crate::sys::mm::{system_page_bytes, Access, Region};
use crate::sys::span::Span;
use crate::sys::stderr_line::stderr_line;
use crate::sys::thread::send_segv;
use crate::sys::uffd::{Fault, Partial, Uffd};
use crate::table::{Entry, Shown};
use crate::units::{FilePage, PageIndex, PageSize, Prot, Run, WindowPage};

/// How often a fault waits for pages to be written until it goes beyond the budget.
const MOST_WAITS: u32 = 32;

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

/// How the pages that are read for one fault may lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// Anywhere.
    Scattered,
    /// One behind the other.
    Contiguous,
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
fn loads(entry: Entry) -> bool {
    entry.loadable() && !entry.held() && entry.shown().file_page().is_some()
}

/// Why a touch of an absent page that shows no file page is a signal.
pub(super) fn nothing_to_bring(entry: Entry) -> &'static str {
    if entry.shown() == Shown::Placed {
        "its content was dropped from memory, as by madvise(2), and only place() can bring it again"
    } else {
        "nothing is mapped there"
    }
}

/// Says why a touch of a page is a signal.
pub(super) fn tell_why(
    page: WindowPage,
    entry: Entry,
    signal: &str,
    reason: std::fmt::Arguments<'_>,
) {
    let page = page.0;
    match entry.shown() {
        Shown::File(file) => stderr_line(format_args!(
            "window page {page} (file page {}): {reason}; the touch is {signal}",
            file.0
        )),
        Shown::Nothing => {
            stderr_line(format_args!(
                "window page {page} (no file page): {reason}; the touch is {signal}"
            ));
        }
        Shown::Placed => stderr_line(format_args!(
            "window page {page} (placed content): {reason}; the touch is {signal}"
        )),
    }
}

impl Shared<PagedFrames> {
    pub(super) fn page(&self) -> PageSize {
        self.store.page_size()
    }

    /// The window page at an address; None for one outside the window.
    pub(super) fn page_at(&self, address: u64) -> Option<WindowPage> {
        let offset = address.checked_sub(self.frames.region.start() as u64)?;
        let within = offset < self.frames.region.len() as u64;
        within.then(|| WindowPage(self.page().index_of(offset)))
    }

    /// Begins to serve a fault on `page`, with a read of up to `most` pages. None while
    /// somebody holds the page or reads for it, or as many reads as may be are under way.
    pub(super) fn begin(
        &self,
        state: &mut State,
        page: WindowPage,
        most: u64,
        layout: Layout,
    ) -> Option<Attempt> {
        let entry = state.get(page);
        if entry.held() || state.reads.reads(page) {
            return None;
        }
        let wanted = if loads(entry) { state.reads.length(page, most) } else { 1 };
        let run = self.run_from(state, page, wanted, layout, |state, page| {
            let entry = state.get(page);
            loads(entry) && !entry.stale() && !state.reads.reads(page)
        });
        let read = state.reads.begin(run)?;
        Some(Attempt { page, entry, run, read })
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
    fn give_up(&self, attempt: &Attempt, reason: &str) -> FaultOutcome {
        if !self.state.lock().reads.is_current(attempt.read) {
            return FaultOutcome::Changed;
        }
        let signal = if self.frames.uffd.features().poison() { "SIGBUS" } else { "SIGSEGV" };
        // Before the signal, which may end the process, and outside the lock,
        // as whoever reads the pipe behind stderr may be slow.
        tell_why(attempt.page, attempt.entry, signal, format_args!("{reason}"));
        self.forbid(attempt, attempt.entry.fail_load())
    }

    /// Makes a touch of a page a signal, if the page still is as it was.
    fn forbid(&self, attempt: &Attempt, forbidden: Entry) -> FaultOutcome {
        let Attempt { page, entry, read, .. } = *attempt;
        let mut state = self.state.lock();
        if !state.reads.is_current(read) {
            return FaultOutcome::Changed;
        }
        let denied = self.frames.deny(&[self.range_of(page)]);
        if denied.is_ok() {
            state.mark(page, forbidden);
        }
        drop(state);
        if let Err(errno) = denied {
            // The fault comes back and is served again.
            stderr_line(format_args!(
                "window page {}: no signal could be set up ({errno})",
                page.0
            ));
        } else if forbidden != entry {
            Counters::add(&self.counters.pages_unreadable, 1);
        }
        self.wake(page);
        FaultOutcome::Resolved
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

    /// Lets a store to a page that is protected from it through and notes it; false where
    /// the page may not be stored to, or is not there.
    pub(super) fn allow_store(&self, state: &mut State, page: WindowPage) -> bool {
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

    /// A store to a page that is protected from it: lets it through and notes it, or makes
    /// it a signal where the page is only to be read.
    fn serve_store(&self, page: WindowPage, fault: Fault) {
        let mut state = self.state.lock();
        let entry = state.get(page);
        if entry.held() || self.allow_store(&mut state, page) {
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
                    "window page {}: a store to a page that is only to be read cannot be made a \
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

    /// Whether the first page of an attempt is dirty from the start, so that who is about to
    /// store to it need not fault a second time.
    fn dirties(&self, attempt: &Attempt, waiter: Waiter) -> bool {
        let tracked = self.frames.tracking.is_some();
        tracked && waiter == Waiter::Writer && attempt.entry.prot() == Prot::Write
    }

    /// Notes that the pages of an attempt are present, or those in front of where their
    /// putting in stopped.
    fn note_shown(
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

/// What the fault thread works with.
#[derive(Debug)]
pub(super) struct Server {
    shared: Arc<Shared<PagedFrames>>,
    /// Memory for a cluster of pages.
    buffer: Mutex<Region>,
    cluster_pages: u64,
    /// Where pages are taken out to that make room, in a window that is written,
    isolated: Mutex<Isolation>,
    /// and in one that is read.
    free: Mutex<Option<FreeFrames>>,
    /// Writes changed pages before they have to leave, in a window that is written and has a
    /// budget.
    cleaner: Option<Cleaner>,
}

impl Server {
    /// `evicts`: the window has a budget.
    pub(super) fn new(
        shared: Arc<Shared<PagedFrames>>,
        cluster_pages: u64,
        evicts: bool,
    ) -> Result<Self, Errno> {
        let bytes = shared.page().bytes_of(cluster_pages) as usize;
        let mut buffer = Region::anonymous(bytes, 1, Access::Write)?;
        buffer.keep_from_children()?;
        let frames = &shared.frames;
        let recycles = evicts && frames.tracking.is_none() && frames.uffd.features().swap();
        let free =
            recycles.then(|| FreeFrames::new(frames, shared.page(), cluster_pages)).transpose()?;
        let (buffer, isolated, free) = (Mutex::new(buffer), Mutex::default(), Mutex::new(free));
        let cleans = evicts && shared.frames.tracking.is_some();
        let cleaner = cleans.then(|| Cleaner::start(Arc::clone(&shared))).transpose()?;
        Ok(Self { shared, buffer, cluster_pages, isolated, free, cleaner })
    }

    fn attempt(&self, attempt: &Attempt, fault: Fault) -> FaultOutcome {
        let shared = &self.shared;
        let Attempt { entry, page, .. } = *attempt;
        if entry.present() {
            if shared.recheck(fault.address) {
                shared.wake(page);
                return FaultOutcome::Resolved;
            }
            Shared::note_lost(&mut shared.state.lock(), attempt);
            return FaultOutcome::Changed;
        }
        if entry.prot() == Prot::None || entry.unreadable() {
            // Forbidden since, or a call that failed has left it open.
            return shared.forbid(attempt, entry);
        }
        if entry.shown().file_page().is_none() {
            return shared.give_up(attempt, nothing_to_bring(entry));
        }
        // A fault cannot be refused: where nothing may leave, or a changed page cannot be
        // written, the window is larger than its budget by one page for a while.
        let mut attempt = *attempt;
        if !self.has_room(&attempt, true) {
            attempt.run.count = 1;
        }
        let page_count = shared.page().index_of(shared.frames.region.len() as u64);
        // A call that comes behind the showing ends what is planned here.
        let plan = |state: &mut State| {
            state.reads.plan_ahead(attempt.run, self.cluster_pages, page_count);
        };
        match self.load(&attempt, Waiter::of(fault.stores), plan) {
            Ok(outcome) => outcome,
            Err(_) if attempt.run.count > 1 => FaultOutcome::Partial,
            Err(error) => shared.give_up(&attempt, &error.to_string()),
        }
    }

    /// Whether the pages of an attempt fit into the budget, now that others have left for them.
    /// `waits`: a moment, where others have to be written first.
    fn has_room(&self, attempt: &Attempt, waits: bool) -> bool {
        let (mut isolated, mut free) = (lock(&self.isolated), lock(&self.free));
        let count = attempt.run.count;
        let Some(cleaner) = &self.cleaner else {
            return self
                .shared
                .make_room("fault", count, None, &mut isolated, free.as_mut())
                .is_ok();
        };
        // While pages are written the fault waits for them: not for ever, as what is written
        // can be changed again at once.
        for _ in 0..if waits { MOST_WAITS } else { 1 } {
            match self.shared.make_clean_room(count, &mut isolated, cleaner) {
                Ok(true) => return true,
                Ok(false) if waits && cleaner.wait() => {}
                Ok(false) | Err(_) => return false,
            }
        }
        false
    }

    /// Takes the faults that wait, but for those of pages of an attempt that are shown by
    /// now. They are over: served later, they would bring back what a call has evicted.
    fn take_waiting(&self, state: &State, attempt: &Attempt, waiting: &mut Vec<Fault>) {
        let shared = &self.shared;
        let run = attempt.run;
        while shared.frames.uffd.faults(waiting).is_ok() {}
        let before = waiting.len();
        waiting.retain(|fault| {
            let page = shared.page_at(fault.address);
            let shown = page.is_some_and(|page| {
                run.first <= page && page < run.end() && state.get(page).present()
            });
            fault.protected || !shown
        });
        if waiting.len() < before {
            // Who waits nevertheless, as somebody has dropped the page, faults once more.
            let page = shared.page();
            shared.frames.wake(&[(offset_of(page, run.first), page.bytes_of(run.count) as usize)]);
        }
    }

    /// Reads the pages of an attempt and shows them, `then` does something before a call can
    /// change them.
    fn load(
        &self,
        attempt: &Attempt,
        waiter: Waiter,
        then: impl FnOnce(&mut State),
    ) -> error::Result<FaultOutcome> {
        let shared = &self.shared;
        let files: Vec<FilePage> = {
            let state = shared.state.lock();
            let pages = attempt.run.pages();
            pages.map_while(|page| state.get(page).shown().file_page()).collect()
        };
        if files.len() as u64 != attempt.run.count {
            // A call has changed them.
            return Ok(FaultOutcome::Changed);
        }
        let (buffer, mut free) = (lock(&self.buffer), lock(&self.free));
        let len = files.len() * shared.page().bytes();
        let frames = free.as_ref().and_then(|free| free.last(len));
        let content = frames.unwrap_or_else(|| buffer.span(0, len));
        let size_bytes = shared.store.size_bytes();
        let contiguous = files.windows(2).all(|pair| pair[0].offset(1) == pair[1]);
        match &files[..] {
            [only] => shared.store.read_page(*only, content)?,
            // Content that was just read through the caches is copied sooner.
            [first, ..] if contiguous && !shared.store.is_provided() => {
                let run = Run { first: *first, count: files.len() as u64 };
                if shared.store.read_run(run, content).is_err() {
                    return Ok(FaultOutcome::Partial);
                }
            }
            _ => scatter::read_into(&shared.store, &files, content, &Uninterruptible)?,
        }
        let mut state = shared.state.lock();
        if !state.reads.is_current(attempt.read) {
            return Ok(FaultOutcome::Changed);
        }
        let moved = frames.is_some();
        let shown = if let Some(free) = free.as_mut().filter(|_| moved) {
            let offset = offset_of(shared.page(), attempt.run.first);
            let put = free.put(&shared.frames, offset, len);
            shared.note_shown(&mut state, attempt, put, size_bytes, waiter)
        } else {
            let content = (buffer.span(0, len), size_bytes);
            shared.show(&mut state, attempt, content, waiter)
        };
        then(&mut state);
        drop(state);
        if shown.is_err() {
            // The waiter tries again, and is served again.
            shared.wake(attempt.page);
        }
        Ok(FaultOutcome::Resolved)
    }
}

impl Serve for Server {
    fn uffd(&self) -> &Uffd {
        &self.shared.frames.uffd
    }

    fn serve(&self, fault: Fault) {
        let shared = &self.shared;
        let Some(page) = shared.page_at(fault.address) else { return };
        if fault.protected {
            shared.serve_store(page, fault);
            return;
        }
        let mut most = self.cluster_pages;
        loop {
            let begun = shared.begin(&mut shared.state.lock(), page, most, Layout::Scattered);
            // Whoever holds the page wakes the thread.
            let Some(attempt) = begun else { return };
            let outcome = self.attempt(&attempt, fault);
            shared.state.lock().reads.end(attempt.read);
            match outcome {
                // The kernel delivers the signal that this thread has set up.
                FaultOutcome::Resolved | FaultOutcome::Fatal(_) => return,
                FaultOutcome::Changed => {}
                FaultOutcome::Partial => most = 1,
            }
        }
    }

    fn plans_ahead(&self) -> bool {
        self.shared.state.lock().reads.ahead().is_some()
    }

    fn read_ahead(&self, waiting: &mut Vec<Fault>) {
        let shared = &self.shared;
        let begun = {
            let mut state = shared.state.lock();
            let Some(Run { first, count }) = state.reads.ahead() else { return };
            let most = count.min(self.cluster_pages);
            let loads = loads(state.get(first)) && !state.get(first).stale();
            loads.then(|| shared.begin(&mut state, first, most, Layout::Scattered)).flatten()
        };
        let read = begun.is_some_and(|attempt| {
            // What cannot be read is said when it is touched.
            let then = |state: &mut State| self.take_waiting(state, &attempt, waiting);
            let loaded = self.has_room(&attempt, false)
                && matches!(self.load(&attempt, Waiter::Nobody, then), Ok(FaultOutcome::Resolved));
            let mut state = shared.state.lock();
            state.reads.end(attempt.read);
            state.reads.advance(attempt.run.count);
            loaded
        });
        if !read {
            shared.state.lock().reads.stop_ahead();
        }
    }
}
