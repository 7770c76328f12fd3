//! A window as the fault service sees it: steps that never wait, and steps that do.
//!
//! The service's thread reads pages that are in the page cache, and shows them. For any other
//! page, it has the kernel read it, parks the fault, and tries again once the page has arrived. A
//! helper does everything that waits: for dirty pages to be written before they are evicted, for
//! files that do not tell what is in the page cache, and for stderr.
//!
//! While a fault is parked, or a helper has it, its pages count as being read. Other faults on
//! them start no read, and are woken when it ends. A call that changes one of the pages makes the
//! read out of date: it then ends without content, and threads that still wait fault again.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::serve::{loads, nothing_to_bring, Attempt, Begun, Layout, Waiter};
use super::{PagedFrames, Tracking};
use crate::engine::cached::{
    offset_of, Cleaner, FrameStack, IsolatedFrames, SharedWindow, State, Userfault,
};
use crate::error::{self, Error, Interrupt, Uninterruptible};
use crate::scatter;
use crate::store::{Now, Place, Unread};
use crate::sys::lock::lock;
use crate::sys::mm::{Access, Region};
use crate::sys::span::Span;
use crate::sys::uffd::{Fault, Uffd};
use crate::units::{FilePage, Prot, Run, WindowPage};

/// How often a fault waits for pages to be written until it goes beyond the budget.
const MOST_WAITS: u32 = 32;
/// How often a page is waited for that has left the page cache again before it was read.
const MOST_ARRIVALS: u8 = 3;

/// A fault whose serving has begun, or pages that are read ahead.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket {
    attempt: Attempt,
    /// How many of its pages are still to be shown.
    count: u64,
    /// The fault; none for pages that are read ahead.
    fault: Option<Fault>,
    /// How often it was parked.
    arrivals: u8,
    /// Why its page cannot be shown.
    unread: Option<Unread>,
}

impl Ticket {
    fn new(attempt: Attempt, fault: Option<Fault>) -> Self {
        Self { attempt, count: attempt.run.count, fault, arrivals: 0, unread: None }
    }

    fn waiter(&self) -> Waiter {
        self.fault.map_or(Waiter::Nobody, |fault| Waiter::of(fault.stores))
    }
}

/// What has become of a fault, or of reading ahead.
#[derive(Debug)]
pub(super) enum Served {
    /// It is over, or comes again by itself.
    Done,
    /// It has to begin later, when others of the window have ended.
    Later,
    /// It goes on when a byte of a file is in the page cache.
    Parked {
        /// What goes on then.
        ticket: Ticket,
        /// The file,
        file: Arc<OwnedFd>,
        /// and the byte.
        offset_bytes: u64,
    },
    /// It goes on in a thread that may wait.
    Waits(Ticket),
}

/// Whether there is room in the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BudgetRoom {
    Enough,
    /// Nothing may leave.
    None,
    /// What may leave has to be written first.
    AfterWrites,
}

/// How far the reading of a ticket's pages has come.
enum Loaded {
    /// They are shown, as many as could be, and do not count as being read any more.
    Shown,
    /// A call has changed one of them.
    Changed,
    /// They cannot all be read together.
    Partly,
    /// They are not in the page cache: read once this place is.
    Absent(Place),
    /// Only by waiting.
    Waits,
    /// One page that cannot be read, as the service's thread has found,
    Unread(Unread),
    /// and as a helper has.
    Failed(Error),
}

/// The file pages of a read.
enum FilePages {
    /// They follow one another.
    Run(Run<FilePage>),
    /// Any.
    List(Vec<FilePage>),
}

/// What was read of pages, to be shown.
enum Content<'a> {
    /// To be copied.
    Copied(Span<'a>),
    /// The last so many bytes of frames that can be moved.
    Frames(&'a mut FrameStack, usize),
}

/// What the service works with.
#[derive(Debug)]
pub(super) struct Server {
    shared: Arc<SharedWindow<PagedFrames>>,
    /// Memory for a cluster of pages. A helper keeps it while it reads.
    buffer: Mutex<Region>,
    cluster_pages: u64,
    /// Where pages are taken out to that make room.
    isolated: Mutex<IsolatedFrames>,
    /// Writes changed pages before they have to leave, in a window that is written and has a
    /// budget.
    cleaner: Option<Cleaner>,
    /// The window is about to be closed.
    leaving: AtomicBool,
}

impl Interrupt for Server {
    fn check(&self) -> error::Result<()> {
        if self.leaving.load(Ordering::Relaxed) {
            return Err(Error::Interrupted { completed: 0 });
        }
        Ok(())
    }
}

impl Server {
    /// `evicts`: the window has a budget.
    pub(super) fn new(
        shared: Arc<SharedWindow<PagedFrames>>,
        cluster_pages: u64,
        evicts: bool,
    ) -> Result<Self, Errno> {
        let bytes = shared.page().bytes_of(cluster_pages) as usize;
        let mut buffer = Region::anonymous(bytes, 1, Access::Write)?;
        buffer.keep_from_children()?;
        let frames = &shared.frames;
        let isolated = match frames.tracking {
            None if evicts && frames.uffd.features().swap() => {
                IsolatedFrames::of_runs(frames, shared.page(), cluster_pages)?
            }
            Some(Tracking::Kernel) if evicts => IsolatedFrames::of_pages(frames, shared.page())?,
            _ => IsolatedFrames::default(),
        };
        let (buffer, isolated) = (Mutex::new(buffer), Mutex::new(isolated));
        let cleans = evicts && shared.frames.tracking.is_some();
        let cleaner = cleans.then(|| Cleaner::start(Arc::clone(&shared))).transpose()?;
        let leaving = AtomicBool::new(false);
        Ok(Self { shared, buffer, cluster_pages, isolated, cleaner, leaving })
    }

    /// Begins to serve a fault. Ends it if its page is present or shows nothing that can be loaded.
    fn begin_fault(&self, fault: Fault, attempt: Attempt) -> Served {
        let shared = &self.shared;
        let Attempt { entry, .. } = attempt;
        let ticket = Ticket::new(attempt, Some(fault));
        if entry.present() {
            if !shared.recheck(fault.address) {
                SharedWindow::note_lost(&mut shared.state.lock(), &attempt);
            }
            // Who waits goes on, or faults once more.
            return self.end(&ticket);
        }
        if entry.prot() == Prot::None || entry.unreadable() {
            // Forbidden since, or a call that failed has left it open.
            shared.forbid(&attempt, entry);
            return self.end(&ticket);
        }
        if entry.shown().file_page().is_none() {
            // Says why, which may take long.
            return Served::Waits(ticket);
        }
        self.load_or_park(ticket, &mut Vec::new())
    }

    /// Evicts and loads for a ticket if that needs no waiting. Otherwise says what to wait for
    /// (`Parked`), or that a helper has to wait (`Waits`).
    fn load_or_park(&self, mut ticket: Ticket, waiting: &mut Vec<Fault>) -> Served {
        match self.room_for(&ticket) {
            BudgetRoom::Enough => {}
            BudgetRoom::AfterWrites if ticket.fault.is_some() => return Served::Waits(ticket),
            _ if ticket.fault.is_none() => return self.end_ahead(&ticket),
            // A fault cannot be refused: where nothing may leave, or a changed page cannot be
            // written, the window is larger than its budget by one page for a while.
            _ => ticket.count = 1,
        }
        loop {
            let loaded = match self.buffer.try_lock() {
                Ok(buffer) => self.load_now(&ticket, &buffer, waiting),
                // A helper reads into it.
                Err(_) => Loaded::Waits,
            };
            match loaded {
                Loaded::Shown => return Served::Done,
                Loaded::Changed => return self.end(&ticket),
                Loaded::Absent(Place { file, offset_bytes }) if ticket.arrivals < MOST_ARRIVALS => {
                    ticket.arrivals += 1;
                    return Served::Parked { ticket, file, offset_bytes };
                }
                Loaded::Partly | Loaded::Unread(_) | Loaded::Failed(_)
                    if ticket.fault.is_none() =>
                {
                    // What cannot be read is said when it is touched.
                    return self.end_ahead(&ticket);
                }
                Loaded::Absent(_) | Loaded::Waits | Loaded::Failed(_) => {
                    return Served::Waits(ticket)
                }
                Loaded::Partly => ticket.count = 1,
                Loaded::Unread(_) if ticket.count > 1 => ticket.count = 1,
                Loaded::Unread(unread) => {
                    ticket.unread = Some(unread);
                    return Served::Waits(ticket);
                }
            }
        }
    }

    /// Ends a ticket whose pages were not shown: they do not count as being read any more, and
    /// who waits for one looks again.
    fn end(&self, ticket: &Ticket) -> Served {
        self.shared.state.lock().reads.end(ticket.attempt.read);
        self.wake(ticket.attempt.run);
        Served::Done
    }

    /// The same for pages that are read ahead; read-ahead ends.
    fn end_ahead(&self, ticket: &Ticket) -> Served {
        self.shared.state.lock().reads.stop_ahead();
        self.end(ticket)
    }

    fn wake(&self, run: Run<WindowPage>) {
        let page = self.shared.page();
        let range = (offset_of(page, run.first), page.bytes_of(run.count) as usize);
        self.shared.frames.wake(&[range]);
    }

    /// Whether the pages of a ticket fit into the budget, now that others have left for them.
    fn room_for(&self, ticket: &Ticket) -> BudgetRoom {
        let mut isolated = lock(&self.isolated);
        let Some(cleaner) = &self.cleaner else {
            let made = self.shared.make_room("fault", ticket.count, None, &mut isolated);
            return if made.is_ok() { BudgetRoom::Enough } else { BudgetRoom::None };
        };
        match self.shared.make_clean_room(ticket.count, &mut isolated, cleaner) {
            Ok(true) => BudgetRoom::Enough,
            Ok(false) => BudgetRoom::AfterWrites,
            Err(_) => BudgetRoom::None,
        }
    }

    /// The same, after waiting for pages to be written: not forever, as what is written can be
    /// changed again at once.
    fn wait_for_room(&self, ticket: &Ticket) -> bool {
        for _ in 0..MOST_WAITS {
            match self.room_for(ticket) {
                BudgetRoom::Enough => return true,
                BudgetRoom::None => return false,
                BudgetRoom::AfterWrites => {}
            }
            if ticket.fault.is_none() || !self.cleaner.as_ref().is_some_and(Cleaner::wait) {
                return false;
            }
        }
        false
    }

    /// What a ticket's pages show; None when a call has changed them. Allocates nothing where
    /// that is one run.
    fn file_pages(&self, ticket: &Ticket) -> Option<FilePages> {
        let state = self.shared.state.lock();
        if !state.reads.is_current(ticket.attempt.read) {
            return None;
        }
        let pages = || ticket.attempt.run.pages().take(ticket.count as usize);
        let shown = |page| state.get(page).shown().file_page();
        let run = Run { first: shown(ticket.attempt.run.first)?, count: ticket.count };
        // Processes are asked for pages by their numbers.
        if !self.shared.store.is_provided() && pages().map(shown).eq(run.pages().map(Some)) {
            return Some(FilePages::Run(run));
        }
        pages().map(shown).collect::<Option<Vec<_>>>().map(FilePages::List)
    }

    /// Reads the pages of a ticket that are in the page cache and shows them.
    fn load_now(&self, ticket: &Ticket, buffer: &Region, waiting: &mut Vec<Fault>) -> Loaded {
        let shared = &self.shared;
        let Some(files) = self.file_pages(ticket) else { return Loaded::Changed };
        // Pages anywhere in the file may have to be waited for after all: not with this locked.
        let mut isolated = matches!(files, FilePages::Run(_)).then(|| lock(&self.isolated));
        let mut free = isolated.as_deref_mut().and_then(IsolatedFrames::made);
        let len = shared.page().bytes_of(ticket.count) as usize;
        let frames = free.as_ref().and_then(|free| free.memory_for_run(len));
        let content = frames.unwrap_or_else(|| buffer.span(0, len));
        let size_bytes = shared.store.size_bytes();
        let read = match &files {
            // Content that was just read through the caches is copied sooner.
            FilePages::Run(run) => shared.store.read_run_now(*run, content),
            FilePages::List(files) => match shared.store.absent_now(files) {
                Now::Read => {
                    let read = scatter::read_into(&shared.store, files, content, &Uninterruptible);
                    read.map(|()| Now::Read).map_err(|_| Unread::Ended)
                }
                other => Ok(other),
            },
        };
        match read {
            Ok(Now::Read) => {}
            Ok(Now::Absent(place)) => return Loaded::Absent(place),
            Ok(Now::Unknown) => return Loaded::Waits,
            Err(_) if ticket.count > 1 => return Loaded::Partly,
            Err(unread) => return Loaded::Unread(unread),
        }
        let moved = frames.is_some();
        let content = match free.take() {
            Some(free) if moved => Content::Frames(free, len),
            _ => Content::Copied(buffer.span(0, len)),
        };
        self.show_unless_changed(ticket, content, size_bytes, waiting)
    }

    /// Reads the pages of a ticket, waiting for the device, and shows them. While they arrive in
    /// the page cache others may be read.
    fn wait_and_load(&self, ticket: &Ticket, waiting: &mut Vec<Fault>) -> Loaded {
        let shared = &self.shared;
        for _ in 0..MOST_ARRIVALS {
            let loaded = match self.buffer.try_lock() {
                Ok(buffer) => self.load_now(ticket, &buffer, waiting),
                // Another helper reads into it, which may take long.
                Err(_) => break,
            };
            match loaded {
                Loaded::Absent(place) => place.wait(),
                Loaded::Waits => break,
                loaded => return loaded,
            }
        }
        let Some(files) = self.file_pages(ticket) else { return Loaded::Changed };
        let len = shared.page().bytes_of(ticket.count) as usize;
        // Helpers read single pages together, each into memory of its own where there is some.
        let own =
            if ticket.count == 1 { Region::anonymous(len, 1, Access::Write).ok() } else { None };
        let common = own.is_none().then(|| lock(&self.buffer));
        let Some(buffer) = own.as_ref().or(common.as_deref()) else { return Loaded::Waits };
        let content = buffer.span(0, len);
        let size_bytes = shared.store.size_bytes();
        let read = match &files {
            FilePages::Run(run) if run.count == 1 => shared.store.read_page(run.first, content),
            FilePages::Run(run) if shared.store.read_run(*run, content).is_ok() => Ok(()),
            FilePages::Run(_) => return Loaded::Partly,
            FilePages::List(files) => scatter::read_into(&shared.store, files, content, self),
        };
        match read {
            Ok(()) => {
                self.show_unless_changed(ticket, Content::Copied(content), size_bytes, waiting)
            }
            Err(Error::Interrupted { .. }) => Loaded::Changed,
            Err(_) if ticket.count > 1 => Loaded::Partly,
            Err(error) => Loaded::Failed(error),
        }
    }

    /// Shows what was read of a ticket's pages, unless a call has changed them.
    fn show_unless_changed(
        &self,
        ticket: &Ticket,
        content: Content<'_>,
        size_bytes: u64,
        waiting: &mut Vec<Fault>,
    ) -> Loaded {
        let shared = &self.shared;
        let all = ticket.attempt.run;
        let run = Run { count: ticket.count, ..all };
        let attempt = Attempt { run, ..ticket.attempt };
        let mut state = shared.state.lock();
        if !state.reads.is_current(attempt.read) {
            return Loaded::Changed;
        }
        let shown = match content {
            Content::Frames(free, len) => {
                let put = free.put(&shared.frames, offset_of(shared.page(), run.first), len);
                let put = put.map(|_| ());
                shared.note_shown(&mut state, &attempt, put, size_bytes, ticket.waiter())
            }
            Content::Copied(content) => {
                shared.show(&mut state, &attempt, (content, size_bytes), ticket.waiter())
            }
        };
        // Now, and not later: who touches a page that was dropped since is served again.
        state.reads.end(attempt.read);
        if ticket.fault.is_none() {
            state.reads.advance(run.count);
            self.take_waiting(&state, run, waiting);
        } else {
            // A call that comes behind the showing ends what is planned here.
            let page_count = shared.page().index_of(shared.frames.region.len() as u64);
            state.reads.plan_ahead(run, self.cluster_pages, page_count);
        }
        let whole = shown.is_ok() && run == all && state.get(WindowPage(run.end().0 - 1)).present();
        drop(state);
        if !whole {
            // Who waits for what was not shown faults once more.
            self.wake(all);
        }
        Loaded::Shown
    }

    /// Takes the faults that wait, but for those of pages of a run that are shown by
    /// now. They are over: served later, they would bring back what a call has evicted.
    fn take_waiting(&self, state: &State, run: Run<WindowPage>, waiting: &mut Vec<Fault>) {
        let shared = &self.shared;
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
            self.wake(run);
        }
    }

    /// Why the page of a ticket could not be read.
    fn error_of(&self, ticket: &Ticket, unread: Unread) -> Error {
        let page = ticket.attempt.entry.shown().file_page();
        match (unread, page) {
            (Unread::Failed(errno), page) => self.shared.store.io_error("read", page, errno),
            (Unread::Ended | Unread::Provided, page) => {
                self.shared.store.truncated("read", page.unwrap_or(FilePage(0)))
            }
        }
    }
}

/// What the service calls. Only [`Server::wait_and_serve`] waits for a device, or for another
/// thread's I/O. Faults that are found `waiting` are added to those that are to be served.
impl Server {
    /// Where faults are announced.
    pub(super) fn uffd(&self) -> &Uffd {
        &self.shared.frames.uffd
    }

    /// Serves a fault: with content, by letting the store through, or by making it a signal.
    pub(super) fn serve(&self, fault: Fault) -> Served {
        let shared = &self.shared;
        let Some(page) = shared.page_at(fault.address) else { return Served::Done };
        if fault.protected {
            shared.serve_write(page, fault);
            return Served::Done;
        }
        let most = self.cluster_pages;
        let begun = shared.begin(&mut shared.state.lock(), page, most, Layout::Scattered);
        match begun {
            Begun::Attempt(attempt) => self.begin_fault(fault, attempt),
            // Whoever has the page wakes the thread.
            Begun::Busy => Served::Done,
            Begun::Full => Served::Later,
        }
    }

    /// Goes on with what was parked.
    pub(super) fn resume(&self, ticket: Ticket, waiting: &mut Vec<Fault>) -> Served {
        self.load_or_park(ticket, waiting)
    }

    /// Ends what has to wait, by waiting.
    pub(super) fn wait_and_serve(&self, mut ticket: Ticket, waiting: &mut Vec<Fault>) {
        let shared = &self.shared;
        if ticket.attempt.entry.shown().file_page().is_none() {
            shared.give_up(&ticket.attempt, nothing_to_bring(ticket.attempt.entry));
            self.end(&ticket);
            return;
        }
        let ahead = ticket.fault.is_none();
        if ticket.unread.is_none() && !self.wait_for_room(&ticket) {
            if ahead {
                self.end_ahead(&ticket);
                return;
            }
            ticket.count = 1;
        }
        loop {
            let loaded = match ticket.unread {
                Some(unread) => Loaded::Failed(self.error_of(&ticket, unread)),
                None => self.wait_and_load(&ticket, waiting),
            };
            match loaded {
                Loaded::Shown => {}
                Loaded::Changed => _ = self.end(&ticket),
                _ if ahead => _ = self.end_ahead(&ticket),
                Loaded::Unread(unread) => {
                    ticket.unread = Some(unread);
                    continue;
                }
                Loaded::Failed(error) => {
                    shared.give_up(&ticket.attempt, &error.to_string());
                    self.end(&ticket);
                }
                Loaded::Partly | Loaded::Waits | Loaded::Absent(_) => {
                    ticket.count = 1;
                    continue;
                }
            }
            return;
        }
    }

    /// The window is about to be closed: what helpers wait for ends soon, if that can be.
    pub(super) fn leave(&self) {
        self.leaving.store(true, Ordering::Relaxed);
    }

    /// Whether there is something to [read ahead](Self::read_ahead) while no fault waits.
    pub(super) fn plans_ahead(&self) -> bool {
        let reads = &self.shared.state.lock().reads;
        reads.ahead().is_some_and(|run| !reads.reads(run.first))
    }

    /// Brings some of what is likely to be touched next.
    pub(super) fn read_ahead(&self, waiting: &mut Vec<Fault>) -> Served {
        let shared = &self.shared;
        let mut state = shared.state.lock();
        let Some(Run { first, count }) = state.reads.ahead() else { return Served::Done };
        let most = count.min(self.cluster_pages);
        let entry = state.get(first);
        let begun = if loads(entry) && !entry.stale() {
            shared.begin(&mut state, first, most, Layout::Scattered)
        } else {
            Begun::Busy
        };
        let Begun::Attempt(attempt) = begun else {
            state.reads.stop_ahead();
            return Served::Done;
        };
        drop(state);
        self.load_or_park(Ticket::new(attempt, None), waiting)
    }
}
