//! Engine `paged`: one anonymous mapping under userfaultfd, a cache of the store.
//!
//! Pages are swapped in by `UFFDIO_MOVE` (6.8): the old frames to spare memory, the new ones from
//! staging memory. So frames are recycled and never faulted in twice. Chunks of whole blocks of 2
//! MiB are huge pages where the kernel provides them: such a chunk takes one fault to read into,
//! and one page-table entry to move. A block that is moved in part is split, and stays split.
//! Where the kernel has no `UFFDIO_MOVE`, or a page is pinned, `UFFDIO_COPY` fills the page.
//! Between the two steps the page is absent, and a thread that touches it waits. So it sees the
//! old content or the new, never zeros.
//!
//! The fault service serves touches of absent pages (`server.rs`), or the thread that touches the
//! page does (`signal.rs`); the latter is also how children of `fork` see the store. A page that
//! must not be touched, or cannot be read, is poisoned (`UFFDIO_POISON`, 6.6: SIGBUS). On older
//! kernels it is set to `PROT_NONE` (SIGSEGV, and one mapping for each).

mod serve;
mod server;
mod service;
mod signal;

use std::sync::Arc;

use rustix::io::Errno;

use super::cached::{
    cluster_pages, Before, Cached, Dimensions, Filled, Frames, Serving, Tracking, Userfault,
};
use super::{advise_ranges, alignment, mappings, memory_hint, FaultMode};
use crate::calibrate::Calibration;
use crate::error::{Error, Result};
use crate::memory;
use crate::store::Store;
use crate::sys::mm::{
    is_present, system_page_bytes, Access, Advice, OwnProcess, Region, HUGE_PAGE_BYTES,
};
use crate::sys::pagemap::PageMap;
use crate::sys::per_process::PerProcess;
use crate::sys::probe;
use crate::sys::span::Span;
use crate::sys::stderr_line::stderr_line;
use crate::sys::uffd::{Delivery, FaultScope, Partial, Stores, Uffd};
use crate::table::Table;
use crate::units::PageSize;
use server::Server;
use service::{ServedWindow, Service};
use signal::Responder;

/// How often a page that is pinned is tried again before it is copied.
const MAX_PINNED_WAITS: u32 = 256;

/// Serves the faults of all windows.
static SERVICE: PerProcess<Service> = PerProcess::new();

/// The window's memory and its userfaultfd.
#[derive(Debug)]
pub struct PagedFrames {
    region: Region,
    uffd: Uffd,
    process: Option<Arc<OwnProcess>>,
    locked: bool,
    tracking: Option<Tracking>,
    /// Where `/proc` is mounted.
    page_map: Option<Arc<PageMap>>,
    /// It has a budget, and the kernel gives page tables back.
    reclaims: bool,
}

impl PagedFrames {
    fn new(
        bytes: usize,
        page: PageSize,
        locked: bool,
        tracking: Option<Tracking>,
        fault: FaultMode,
        small_pages: bool,
    ) -> Result<Self, Errno> {
        let noted = tracking == Some(Tracking::Kernel);
        let stores = if noted { Stores::AreNoted } else { Stores::Fault };
        // A system call that writes to a page that is only to be read has to fail: nothing
        // but the end of the process would end its fault.
        let (delivery, widest) = match fault {
            FaultMode::Signal => (Delivery::Signal, FaultScope::UserOnly),
            FaultMode::Thread if tracking == Some(Tracking::Faults) => {
                (Delivery::Message, FaultScope::UserOnly)
            }
            FaultMode::Thread => (Delivery::Message, FaultScope::UserAndKernel),
        };
        let uffd = Uffd::open(stores, delivery, widest)?;
        let page_map = match PageMap::of_process() {
            Err(errno) if noted => return Err(errno),
            opened => opened.ok(),
        };
        let align = alignment(bytes, page);
        // A read-only window is writable memory too: MOVE wants that. What is
        // handed out of it is read-only.
        let mut region = Region::anonymous(bytes, align, Access::Write)?;
        region.keep_from_children()?;
        if locked {
            region.lock_on_fault(0, bytes)?;
        }
        if tracking.is_some() || small_pages {
            // Writes are noticed by small pages, and small pages leave one by one.
            advise_if_built(&region, Advice::NoHugePage)?;
        }
        if tracking.is_some() {
            uffd.register_missing_and_protected(region.whole())?;
        } else {
            uffd.register_missing(region.whole())?;
        }
        let process = OwnProcess::of_process();
        let reclaims = small_pages && probe::reclaims_page_tables();
        Ok(Self { region, uffd, process, locked, tracking, page_map, reclaims })
    }

    /// Empties a range: moves its pages to spare memory if possible, or drops them.
    fn take_out(&self, to: Span<'_>, offset: usize, spare: Option<Span<'_>>) -> Result<(), Errno> {
        if let Some(spare) = spare {
            if self.uffd.move_present_pages(spare, to).is_ok() {
                return Ok(());
            }
            // A page is pinned, or spare memory is not empty: drop the rest.
        }
        self.region.drop_pages(offset, to.len(), self.locked)
    }

    /// Moves staged pages in. A page that stays pinned is copied; where the kernel
    /// refuses for another reason, the rest is.
    fn move_in(&self, offset: usize, to: Span<'_>, from: Span<'_>) -> Result<Filled, Partial> {
        let len = from.len();
        let (mut done, mut waits, mut filled) = (0, 0, Filled::Moved);
        while done < len {
            let rest = to.part(done, len - done);
            let Err(stop) = self.uffd.move_pages(rest, from.part(done, len - done)) else { break };
            done += stop.done_bytes;
            if stop.errno == Errno::BUSY && waits < MAX_PINNED_WAITS {
                // A direct read is told to be complete before its page is unpinned.
                waits += 1;
                std::thread::yield_now();
                continue;
            }
            let busy = stop.errno == Errno::BUSY;
            let copied = if busy { system_page_bytes() } else { len - done };
            self.copy_staged(offset + done, from.part(done, copied)).map_err(|p| p.after(done))?;
            (done, waits, filled) = (done + copied, 0, Filled::Copied);
        }
        Ok(filled)
    }

    /// Moves all pages of `from` to `to`, page by page where the kernel's answer leaves
    /// open which of them it has moved. Pages that are at `to` already stay.
    fn relocate(&self, to: Span<'_>, from: Span<'_>) -> Result<(), Errno> {
        if self.uffd.move_pages(to, from).is_ok() {
            return Ok(());
        }
        let page = system_page_bytes();
        for at in (0..to.len()).step_by(page) {
            let (to, from) = (to.part(at, page), from.part(at, page));
            let mut waits = 0;
            while !self.has(to)? {
                let Err(stop) = self.uffd.move_pages(to, from) else { break };
                if waits == MAX_PINNED_WAITS || !matches!(stop.errno, Errno::BUSY | Errno::EXIST) {
                    return Err(stop.errno);
                }
                waits += 1;
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// Copies staged pages in after the kernel refused to move them. A page that
    /// is not there would be copied as zeros: it was moved already, and then nobody was
    /// woken, or is missing.
    fn copy_staged(&self, offset: usize, from: Span<'_>) -> Result<(), Partial> {
        let page = system_page_bytes();
        for done in (0..from.len()).step_by(page) {
            let stopped = |errno| Partial { done_bytes: done, errno };
            let source = from.part(done, page);
            if self.has(source).map_err(stopped)? {
                self.copy_in(offset + done, source, false).map_err(|p| p.after(done))?;
            } else if self.has(self.region.span(offset + done, page)).map_err(stopped)? {
                self.wake(&[(offset + done, page)]);
            } else {
                return Err(stopped(Errno::NOENT));
            }
        }
        Ok(())
    }

    /// Copies pages in. `protect`: a write to them is noticed.
    fn copy_in(&self, offset: usize, from: Span<'_>, protect: bool) -> Result<(), Partial> {
        let to = self.region.span(offset, from.len());
        let copy = |to, from| {
            if protect {
                self.uffd.copy_protected(to, from)
            } else {
                self.uffd.copy(to, from)
            }
        };
        let Err(first) = copy(to, from) else { return Ok(()) };
        if first.errno != Errno::EXIST {
            return Err(first);
        }
        // The kernel has a page that the table calls absent.
        let done = first.done_bytes;
        let rest = from.len() - done;
        let stopped = |errno| Partial { done_bytes: done, errno };
        self.region.drop_pages(offset + done, rest, self.locked).map_err(stopped)?;
        copy(to.part(done, rest), from.part(done, rest))
            .map_err(|second| Partial { done_bytes: done + second.done_bytes, errno: second.errno })
    }
}

/// Advice on huge pages; a kernel built without them says EINVAL.
fn advise_if_built(region: &Region, advice: Advice) -> Result<(), Errno> {
    match region.advise(0, region.len(), advice) {
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(errno) => Err(errno),
    }
}

impl Frames for PagedFrames {
    fn region(&self) -> &Region {
        &self.region
    }

    fn locked(&self) -> bool {
        self.locked
    }

    fn tracking(&self) -> Option<Tracking> {
        self.tracking
    }

    fn userfault(&self) -> Option<&dyn Userfault> {
        Some(self)
    }

    fn fill(
        &self,
        offset: usize,
        from: Span<'_>,
        spare: Option<Span<'_>>,
        before: Before,
        track: bool,
    ) -> Result<Filled, Partial> {
        let to = self.region.span(offset, from.len());
        let stopped = |errno| Partial { done_bytes: 0, errno };
        if before.unreadable {
            self.allow(&[(offset, from.len())]).map_err(stopped)?;
        } else if before.present {
            self.take_out(to, offset, spare).map_err(stopped)?;
        }
        match spare {
            Some(_) => self.move_in(offset, to, from),
            None => self.copy_in(offset, from, track).map(|()| Filled::Copied),
        }
    }

    fn drop_pages(&self, ranges: &[(usize, usize)]) -> Result<(), Errno> {
        let advice = if self.locked { Advice::DontNeedLocked } else { Advice::DontNeed };
        let each = |offset, len| self.region.drop_pages(offset, len, self.locked);
        advise_ranges(self.process.as_deref(), &self.region, ranges, advice, each)
    }

    fn deny(&self, ranges: &[(usize, usize)]) -> Result<(), Errno> {
        let poisons = self.uffd.features().poison();
        if !poisons {
            // Each range can become a mapping of its own, and split another.
            mappings::reserve("protect", 2 * ranges.len() as u64).map_err(|_| Errno::NOMEM)?;
        }
        // First: what is absent may be touched, as the fault service serves it by the table.
        self.drop_pages(ranges)?;
        let forbid = |&(at, len): &(usize, usize)| {
            if poisons {
                self.uffd.poison(self.region.span(at, len))
            } else {
                self.region.protect(at, len, Access::None)
            }
        };
        for (done, range) in ranges.iter().enumerate() {
            if let Err(errno) = forbid(range) {
                // All or none: what is forbidden already is absent again. A range that
                // was poisoned in part is as well.
                let _undone = self.allow(&ranges[..done + usize::from(poisons)]);
                return Err(errno);
            }
        }
        Ok(())
    }

    fn allow(&self, ranges: &[(usize, usize)]) -> Result<(), Errno> {
        if self.uffd.features().poison() {
            // Dropping a poisoned page takes the poison away.
            return self.drop_pages(ranges);
        }
        ranges.iter().try_for_each(|&(at, len)| self.region.protect(at, len, Access::Write))
    }
}

impl Userfault for PagedFrames {
    fn adopt_staging(&self, staging: &mut Region, chunk_bytes: usize) -> Result<bool, Errno> {
        // Pages shared with a child cannot be moved.
        staging.keep_from_children()?;
        // What is moved arrives unprotected: a write to it would go unnoticed.
        let moves = self.uffd.features().swap() && self.tracking.is_none();
        let huge = chunk_bytes.is_multiple_of(HUGE_PAGE_BYTES);
        advise_if_built(staging, if huge { Advice::HugePage } else { Advice::NoHugePage })?;
        if self.locked {
            staging.lock_on_fault(0, staging.len())?;
        }
        if !moves {
            return Ok(false);
        }
        self.uffd.register_move_target(staging.whole())?;
        Ok(true)
    }

    fn adopt_isolated(&self, isolated: &mut Region) -> Result<(), Errno> {
        isolated.keep_from_children()?;
        advise_if_built(isolated, Advice::NoHugePage)?;
        if self.locked {
            isolated.lock_on_fault(0, isolated.len())?;
        }
        self.uffd.register_move_target(isolated.whole())
    }

    fn reuses(&self) -> bool {
        self.tracking.is_some() && !self.locked && self.uffd.features().swap()
    }

    fn move_frames(&self, offset: usize, from: Span<'_>) -> Result<Filled, Partial> {
        self.move_in(offset, self.region.span(offset, from.len()), from)
    }

    fn move_out(&self, offset: usize, to: Span<'_>) -> Result<(), Errno> {
        self.relocate(to, self.region.span(offset, to.len()))
    }

    fn move_back(&self, offset: usize, from: Span<'_>) -> Result<(), Errno> {
        self.relocate(self.region.span(offset, from.len()), from)
    }

    fn shift(&self, to: Span<'_>, from: Span<'_>) -> bool {
        self.uffd.move_present_pages(to, from).is_ok()
    }

    fn has(&self, memory: Span<'_>) -> Result<bool, Errno> {
        match &self.page_map {
            Some(map) => map.has(memory),
            None => (0..memory.len())
                .step_by(system_page_bytes())
                .try_fold(true, |all, at| Ok(all && is_present(memory.part(at, 1))?)),
        }
    }

    fn notice_writes(&self, ranges: &[(usize, usize)]) -> Result<(), Errno> {
        let protect =
            |&(at, len): &(usize, usize)| self.uffd.write_protect(self.region.span(at, len), true);
        ranges.iter().try_for_each(protect)
    }

    fn written(
        &self,
        offset: usize,
        len: usize,
        protect: bool,
        written: &mut Vec<(usize, usize)>,
    ) -> Result<(), Errno> {
        match &self.page_map {
            Some(map) if self.tracking == Some(Tracking::Kernel) => {
                map.stores(self.region.span(offset, len), protect, written)
            }
            _ => Ok(()),
        }
    }

    fn wake(&self, ranges: &[(usize, usize)]) {
        for &(at, len) in ranges {
            if let Err(errno) = self.uffd.wake(self.region.span(at, len)) {
                stderr_line(format_args!("waking those who wait for a page failed ({errno})"));
            }
        }
    }

    fn reclaims_page_tables(&self) -> bool {
        self.reclaims
    }
}

/// What a paged window is made of.
#[derive(Clone, Copy, Debug)]
pub struct PagedOptions<'c> {
    /// Its memory is locked.
    pub locked: bool,
    /// How writes are noticed; None where nobody may write.
    pub tracking: Option<Tracking>,
    /// How its faults are resolved.
    pub fault: FaultMode,
    /// The memory that it may take; None without a limit.
    pub budget: Option<memory::Ask>,
    /// Numbers of this machine.
    pub calibration: &'c Calibration,
}

/// Makes a window that shows what `table` says, and starts to serve its faults.
pub fn open(
    store: Arc<Store>,
    table: Table,
    options: PagedOptions<'_>,
) -> Result<Cached<PagedFrames>> {
    let PagedOptions { locked, tracking, fault, budget, calibration } = options;
    let page = store.page_size();
    let page_count = table.page_count();
    let budget = match budget {
        Some(ask) => {
            let chunk_pages =
                Cached::<PagedFrames>::chunk_pages(page, &table, tracking, calibration);
            let dimensions = Dimensions { page_count, page, chunk_pages, tracking };
            let budget = memory::reserve(ask.with_need(dimensions.whole_bytes()))
                .map_err(|errno| Error::system("Window", errno))?;
            let division = dimensions.divide(budget.bytes())?;
            Some((budget, division))
        }
        None => None,
    };
    let division = budget.as_ref().and_then(|(_, division)| *division);
    if fault == FaultMode::Signal {
        signal::check(division.is_some())?;
    }
    let cluster =
        division.map_or_else(|| cluster_pages(page, page_count), |division| division.cluster_pages);
    let bytes = page.bytes_of(table.page_count()) as usize;
    let fail = |errno| Error::system_with_hint("Window", errno, memory_hint(locked));
    let not_served = |errno| match errno {
        Errno::AGAIN => {
            let instead = "use engine=\"alias\" or \"eager\", which need none";
            Error::NoThread { operation: "Window", instead, errno }
        }
        errno => fail(errno),
    };
    let evicts = division.is_some();
    let frames = PagedFrames::new(bytes, page, locked, tracking, fault, evicts).map_err(fail)?;
    let cached = Cached::new(store, frames, table, budget, fault, calibration)?;
    let shared = cached.shared();
    let responder = Responder::new(Arc::clone(shared), fault, cluster).map_err(fail)?;
    let resolving = shared.frames.region.resolved_by(Arc::new(responder));
    let serving: Option<Serving> = match fault {
        FaultMode::Signal => None,
        FaultMode::Thread => {
            let server = Server::new(Arc::clone(shared), cluster, evicts);
            let server = server.map_err(not_served)?;
            let window = ServedWindow::start(&SERVICE, Arc::new(server));
            Some(Box::new(window.map_err(not_served)?))
        }
    };
    Ok(cached.served_by(serving, resolving))
}
