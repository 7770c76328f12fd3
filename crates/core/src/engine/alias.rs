//! Engine `alias`: shows the file itself, with one kernel mapping for each linear run.
//!
//! `mmap(MAP_FIXED)` replaces what is shown; a reader sees the old mapping or the new. The window
//! is coherent: every process that maps the file sees a write at once. Each run that does not
//! continue its neighbour costs one of the `vm.max_map_count` mappings of the process. A call
//! that would come too close to that limit fails before any change.

use std::ops::Deref;
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::call_lock::CallLock;
use super::mappings;
mod explain;
mod mapped;
mod remapping;

use self::mapped::{access, one_file_each, AliasMapping};
use self::remapping::Remapping;
use super::{
    alignment, content_of, memory_hint, placed_bytes, room_for, Engine, Fill, RemapOptions,
};
use crate::error::{Error, Interrupt, Result};
use crate::plan::{self, Changes, LinearRun};
use crate::room::collected;
use crate::stats::{Counters, Stats};
use crate::store::Store;
use crate::sys::fault_ranges::{Explain, Explaining};
use crate::sys::lock::lock;
use crate::sys::mm::{system_page_bytes, Access, Advice, Region, Sharing};
use crate::sys::pagemap::PageMap;
use crate::table::{Entry, Shown, Table};
use crate::trim::{Limit, ReadAhead, Registration, Trimmed};
use crate::units::{FilePage, PageIndex, Pages, Prot, Run, WindowPage};

/// Pages whose reads are started before the first of them is waited for.
const POPULATE_PAGES: usize = 16_384;

/// How often a page that can be read, but was not faulted in, is tried again.
const MAX_POPULATE_RETRIES: u32 = 16;
/// Bytes that are mapped between two questions whether to stop.
const POPULATE_STEP_BYTES: u64 = 16 << 20;
/// Runs that are mapped between two questions whether to stop.
const INTERRUPT_RUNS: usize = 1024;
/// Pages that are evicted between two questions whether to stop.
const EVICTED_PAGES: usize = 4096;
/// System pages that the kernel is asked about between two questions whether to stop.
const PRESENT_PAGES: usize = 1 << 18;
/// Words that are told of between two questions whether to stop.
const ENTRIES_STEP: usize = 1 << 18;

/// Smaller windows do not have their read-ahead follow how they are touched.
const LEAST_ADAPTED_BYTES: usize = 32 << 20;

/// A window that shows the file itself.
#[derive(Debug)]
pub struct Alias {
    /// Ends before what it is for, as the next.
    trimming: Option<Registration>,
    _explaining: Explaining,
    mapped: Arc<AliasMapping>,
    /// Held for a whole call: one call at a time changes the window.
    calls: CallLock<()>,
    counters: Counters,
}

impl Deref for Alias {
    type Target = AliasMapping;

    fn deref(&self) -> &AliasMapping {
        &self.mapped
    }
}

/// How to make a window of this engine.
#[derive(Debug)]
pub struct AliasOptions {
    /// Keep every page in memory.
    pub locked: bool,
    /// Whether other mappings see what is written to it.
    pub sharing: Sharing,
    /// What it may have mapped.
    pub limit: Option<Arc<Limit>>,
    /// How the kernel reads ahead; None if that is to follow how the window is touched.
    pub advice: Option<ReadAhead>,
    /// Where to put it; else where the kernel finds room.
    pub region: Option<Region>,
}

impl Alias {
    /// A window that shows what `table` says.
    pub fn new(store: Arc<Store>, table: Table, options: AliasOptions) -> Result<Self> {
        let page = store.page_size();
        let AliasOptions { locked, sharing, limit, advice, region } = options;
        let bytes = page.bytes_of(table.page_count()) as usize;
        let runs = one_file_each(&store, "Window", plan::linear_runs(&table)?)?;
        mappings::reserve("Window", runs.len() as u64)?;
        let fail = |errno| Error::system_with_hint("Window", errno, memory_hint(locked));
        let region = match region {
            Some(region) if region.len() != bytes => {
                return Err(Error::Argument(format!(
                    "Window: memory of {} bytes cannot show {bytes}; give as many bytes as the \
                     pages have",
                    region.len()
                )))
            }
            Some(region) => region,
            None => Region::anonymous(bytes, alignment(bytes, page), Access::None).map_err(fail)?,
        };
        let table = Mutex::new(table);
        // Before the first page is mapped, so that every mapping gets it.
        let read_ahead = AtomicU8::new(advice.unwrap_or(ReadAhead::Normal) as u8);
        let mapped =
            AliasMapping { store, page, region, locked, sharing, table, advice: read_ahead };
        let mapped = Arc::new(mapped);
        {
            let table = lock(&mapped.table);
            for run in runs {
                mapped.map(table.get(run.window.first), run.window).map_err(fail)?;
            }
        }
        if locked {
            mapped.region.lock_on_fault(0, bytes).map_err(fail)?;
        }
        let target: Arc<dyn Trimmed> = Arc::clone(&mapped) as _;
        // What is in memory anyway, or fits into what the kernel reads at once, has none to fit.
        let adapts = advice.is_none()
            && !locked
            && bytes >= LEAST_ADAPTED_BYTES
            && !mapped.store.memory_backed();
        let trimming = if adapts || limit.is_some() {
            Some(Registration::new(target, limit, adapts)?)
        } else {
            None
        };
        let explainer: Arc<dyn Explain> = Arc::clone(&mapped) as _;
        let explaining = mapped.region.explained_by(explainer).map_err(fail)?;
        Ok(Self {
            trimming,
            _explaining: explaining,
            mapped,
            calls: CallLock::new(()),
            counters: Counters::default(),
        })
    }

    /// Locks pages of a locked window again: `MAP_FIXED` drops the lock with the mapping.
    fn lock_again(&self, run: Run<WindowPage>) -> Result<(), Errno> {
        let (offset, len) = self.bytes(run);
        if self.locked {
            self.region.lock_on_fault(offset, len)
        } else {
            Ok(())
        }
    }

    /// Has the kernel change `run`, which is told the new word of its first page, and the table
    /// follow. The table is locked, so nobody sees it lag; where the kernel refuses it stays.
    fn change(
        table: &mut Table,
        run: Run<WindowPage>,
        entry_of: impl Fn(u64, Entry) -> Entry,
        kernel: impl FnOnce(Entry) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        kernel(entry_of(0, table.get(run.first)))?;
        for (page, index) in run.pages().zip(0..) {
            table.update(page, |entry| entry_of(index, entry));
        }
        Ok(())
    }

    fn show(&self, table: &mut Table, run: LinearRun, prot: Option<Prot>) -> Result<(), Errno> {
        let entry_of = |index, old: Entry| {
            let shown = Shown::File(run.file.offset(index));
            Entry::new(shown, prot.unwrap_or(old.prot()))
        };
        Self::change(table, run.window, entry_of, |entry| self.map(entry, run.window))?;
        // Where this fails the run shows what the table says, and is rolled back.
        self.lock_again(run.window)
    }

    /// Makes the chosen positions present: starts their reads, then maps them.
    /// Fails with how many of them, from the front, are present.
    fn bring(
        &self,
        pages: &Pages<WindowPage>,
        entries: &[Entry],
        positions: &[usize],
        interrupt: &dyn Interrupt,
    ) -> Result<(), (usize, Error)> {
        for (piece, batch) in positions.chunks(POPULATE_PAGES).enumerate() {
            let mut done = piece * POPULATE_PAGES;
            interrupt.check().map_err(|error| (done, error))?;
            if batch.len() > 1 {
                let files = batch.iter().filter_map(|&at| entries[at].shown().file_page());
                self.start_reads(files.collect()).map_err(|error| (done, error))?;
            }
            for run in plan::runs(batch.iter().map(|&position| pages.at(position))) {
                let entry_of = |index: usize| entries[positions[done + index]];
                self.fault_in(run, entry_of, interrupt)
                    .map_err(|(count, error)| (done + count, error))?;
                done += run.count as usize;
            }
        }
        Ok(())
    }

    /// Starts the reads of what is not in the page cache.
    fn start_reads(&self, files: Vec<FilePage>) -> Result<()> {
        let files = Pages::List(files);
        match self.store.resident(&files) {
            Ok(resident) => {
                let absent = files.iter().zip(resident).filter(|(_, here)| !here);
                self.store.prefetch(&Pages::List(absent.map(|(page, _)| page).collect()))
            }
            // Where the kernel does not tell, asking for all of it is right too.
            Err(Error::Unsupported { .. }) => self.store.prefetch(&files),
            Err(error) => Err(error),
        }
    }

    /// `MADV_POPULATE_READ` of a run of window pages that show file pages.
    fn fault_in(
        &self,
        run: Run<WindowPage>,
        entry_of: impl Fn(usize) -> Entry,
        interrupt: &dyn Interrupt,
    ) -> Result<(), (usize, Error)> {
        let mut done = 0;
        while done < run.count {
            interrupt.check().map_err(|error| (done as usize, error))?;
            let step = self.page.index_of(POPULATE_STEP_BYTES).max(1);
            let count = step.min(run.count - done);
            let first = run.first.offset(done);
            let (offset, len) = self.bytes(Run { first, count });
            if self.region.advise(offset, len, Advice::PopulateRead).is_err() {
                // The kernel does not say where it stopped: ask page by page.
                for page in done..done + count {
                    let one = Run { first: run.first.offset(page), count: 1 };
                    let (offset, len) = self.bytes(one);
                    let populate = || self.region.advise(offset, len, Advice::PopulateRead);
                    self.or_why_unreadable(populate, entry_of(page as usize))
                        .map_err(|error| (page as usize, error))?;
                }
            }
            Counters::add(&self.counters.pages_loaded, count);
            done += count;
        }
        Ok(())
    }

    /// The kernel says EFAULT for every page that cannot be faulted in; reading
    /// the page tells why. Where it can be read (the file was cut and has grown
    /// again), the kernel is asked again.
    fn or_why_unreadable(
        &self,
        populate: impl Fn() -> Result<(), Errno>,
        entry: Entry,
    ) -> Result<()> {
        let mut refused = populate();
        for _ in 0..MAX_POPULATE_RETRIES {
            let (Err(_), Some(file_page)) = (refused, entry.shown().file_page()) else { break };
            content_of(&self.store, "populate", file_page)?;
            refused = populate();
        }
        let file_page = entry.shown().file_page();
        refused.map_err(|errno| self.store.unmappable("populate", file_page, errno))
    }

    /// Positions of the pages that may be touched and show a file page; if only
    /// what is in the page cache is wanted, those.
    fn wanted(&self, operation: &'static str, entries: &[Entry], fill: Fill) -> Result<Vec<usize>> {
        if fill == Fill::Nothing {
            return Ok(Vec::new());
        }
        let mut positions = room_for(operation, entries.len())?;
        let mut files = room_for(operation, entries.len())?;
        for (position, entry) in entries.iter().enumerate() {
            if let (Shown::File(file), false) = (entry.shown(), entry.prot() == Prot::None) {
                positions.push(position);
                files.push(file);
            }
        }
        if fill == Fill::Resident {
            let mut resident = self.store.resident(&Pages::List(files))?.into_iter();
            positions.retain(|_| resident.next().unwrap_or(false));
        }
        Ok(positions)
    }

    /// Which pages are there once the wanted ones were brought.
    fn mask(operation: &'static str, entries: &[Entry], wanted: &[usize]) -> Result<Vec<bool>> {
        let placed = |entry: &Entry| entry.shown() == Shown::Placed && entry.prot() != Prot::None;
        let mut mask: Vec<bool> = collected(operation, entries.iter().map(placed))?;
        for &position in wanted {
            mask[position] = true;
        }
        Ok(mask)
    }

    /// The words of pages.
    fn entries_of(
        &self,
        operation: &'static str,
        pages: &Pages<WindowPage>,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<Entry>> {
        let mut entries = room_for(operation, pages.len())?;
        self.entries(pages, interrupt, &mut |entry| entries.push(entry))?;
        Ok(entries)
    }

    /// Puts private memory with `content` in place of a window page, in one step.
    fn put(&self, table: &mut Table, page: WindowPage, content: &[u8]) -> Result<(), Errno> {
        let own = Region::anonymous(self.page.bytes(), system_page_bytes(), Access::Write)?;
        if self.locked {
            own.lock_on_fault(0, own.len())?;
        }
        own.span(0, own.len()).copy_from(content);
        let prot = table.get(page).prot();
        let placed = Entry::new(Shown::Placed, prot);
        own.protect(0, own.len(), access(placed))?;
        let run = Run { first: page, count: 1 };
        let (offset, _) = self.bytes(run);
        Self::change(table, run, |_, _| placed, |_| self.region.move_in(offset, own))
    }
}

impl Engine for Alias {
    fn region(&self) -> &Region {
        &self.region
    }

    fn read_ahead(&self) -> Option<ReadAhead> {
        Some(AliasMapping::read_ahead(self))
    }

    fn lower_budget(&self, bytes: u64) -> Result<()> {
        self.trimming.as_ref().map_or(Ok(()), |trimming| trimming.lower_limit(bytes))
    }

    fn remap(
        &self,
        changes: &Changes,
        options: RemapOptions,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<bool>> {
        let _turn = self.calls.take(interrupt)?;
        let pages = changes.window_pages();
        let fail = |errno| Error::system("remap", errno);
        plan::check_placed(&lock(&self.table), "remap", pages, options.discard)?;
        let plan = self.plan(changes, options, interrupt)?;
        let Remapping { entries, runs, mut replaced } = plan;
        let windows = runs.iter().map(|run| run.window);
        let needed = plan::mappings_added(&lock(&self.table), windows);
        mappings::reserve("remap", needed)?;
        // What the kernel may refuse to tell is asked before anything changes.
        let wanted = self.wanted("remap", &entries, options.fill)?;
        let mask = Self::mask("remap", &entries, &wanted)?;
        for batch in runs.chunks(INTERRUPT_RUNS) {
            // Not with the table locked. What was changed stays so: to take it back can take as
            // long as to go on.
            interrupt.check()?;
            let mut table = lock(&self.table);
            let shown = batch.iter().try_for_each(|run| {
                self.show(&mut table, *run, options.prot).map_err(|errno| match errno {
                    Errno::NOMEM => mappings::refused("remap", needed),
                    errno => fail(errno),
                })
            });
            if let Err(error) = shown {
                self.roll_back(&mut table, &mut replaced);
                return Err(error);
            }
        }
        match self.bring(pages, &entries, &wanted, interrupt) {
            Ok(()) => Ok(mask),
            // The pages are shown, and those that are absent come when they are touched.
            Err((_, error @ Error::Interrupted { .. })) => Err(error),
            Err((count, error)) => {
                let done = wanted[count];
                self.roll_back(&mut lock(&self.table), &mut replaced[done..]);
                Err(error.with_completed(done))
            }
        }
    }

    fn populate(
        &self,
        pages: &Pages<WindowPage>,
        fill: Fill,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<bool>> {
        let _turn = self.calls.take(interrupt)?;
        let entries = self.entries_of("populate", pages, interrupt)?;
        let wanted = self.wanted("populate", &entries, fill)?;
        let mask = Self::mask("populate", &entries, &wanted)?;
        self.bring(pages, &entries, &wanted, interrupt)
            .map_err(|(count, error)| error.with_completed(wanted[count]))?;
        Ok(mask)
    }

    fn evict(
        &self,
        pages: &Pages<WindowPage>,
        discard: bool,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let _turn = self.calls.take(interrupt)?;
        plan::check_placed(&lock(&self.table), "evict", pages, discard)?;
        let fail = |errno| Error::system("evict", errno);
        let pages = plan::distinct("evict", pages)?;
        for piece in plan::pieces(pages.len(), EVICTED_PAGES) {
            interrupt.check()?;
            let mut table = lock(&self.table);
            let shown = |table: &Table, position| table.get(pages.at(position)).shown();
            for position in piece.clone() {
                if shown(&table, position) != Shown::Placed {
                    continue;
                }
                let run = Run { first: pages.at(position), count: 1 };
                let entry_of = |_, old: Entry| Entry::new(Shown::Nothing, old.prot());
                Self::change(&mut table, run, entry_of, |entry| self.map(entry, run))
                    .map_err(fail)?;
            }
            let of_file = piece.filter(|&at| shown(&table, at).file_page().is_some());
            for run in plan::runs(of_file.map(|position| pages.at(position))) {
                let (offset, len) = self.bytes(run);
                let dropped = match self.region.drop_pages(offset, len, false) {
                    // Under mlockall(MCL_FUTURE) what is mapped is locked unasked.
                    Err(Errno::INVAL) => self.region.drop_pages(offset, len, true),
                    answer => answer,
                };
                dropped.map_err(fail)?;
                Counters::add(&self.counters.pages_evicted, run.count);
            }
        }
        Ok(())
    }

    fn protect(
        &self,
        pages: &Pages<WindowPage>,
        prot: Prot,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let _turn = self.calls.take(interrupt)?;
        let pages = plan::distinct("protect", pages)?;
        let mut table = lock(&self.table);
        let differs = |table: &Table, page| table.get(page).prot() != prot;
        let shows_some = |table: &Table, page| table.get(page).shown() != Shown::Nothing;
        let changed = |page: &WindowPage| differs(&table, *page) && shows_some(&table, *page);
        let runs: Vec<Run<WindowPage>> =
            collected("protect", plan::runs(pages.iter().filter(changed)))?;
        mappings::reserve("protect", plan::mappings_added(&table, runs.iter().copied()))?;
        for page in pages.iter() {
            // What shows nothing has no access; its protection counts from the next remap.
            if !shows_some(&table, page) {
                table.update(page, |entry| entry.with_prot(prot));
            }
        }
        drop(table);
        for batch in runs.chunks(INTERRUPT_RUNS) {
            interrupt.check()?;
            let mut table = lock(&self.table);
            for &run in batch {
                let (offset, len) = self.bytes(run);
                let access = access(Entry::new(Shown::Placed, prot));
                let kernel = |_| self.region.protect(offset, len, access);
                Self::change(&mut table, run, |_, entry| entry.with_prot(prot), kernel)
                    .map_err(|errno| Error::system("protect", errno))?;
            }
        }
        if self.locked && prot != Prot::None {
            // Locked pages are present; without access they could not become so.
            let pages = collected("protect", runs.into_iter().flat_map(Run::pages))?;
            let pages = Pages::List(pages);
            let entries = self.entries_of("protect", &pages, interrupt)?;
            let wanted = self.wanted("protect", &entries, Fill::All)?;
            self.bring(&pages, &entries, &wanted, interrupt).map_err(|(_, error)| error)?;
        }
        Ok(())
    }

    fn place(
        &self,
        pages: &Pages<WindowPage>,
        data: Option<&[u8]>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let _turn = self.calls.take(interrupt)?;
        let table = lock(&self.table);
        if data.is_none() {
            plan::check_shown(&table, pages)?;
        }
        let alone = pages.iter().map(|page| Run { first: page, count: 1 });
        mappings::reserve("place", plan::mappings_added(&table, alone))?;
        drop(table);
        for (position, page) in pages.iter().enumerate() {
            interrupt.check().map_err(|error| error.with_completed(position))?;
            let mut table = lock(&self.table);
            let own;
            let content = match (data, table.get(page).shown()) {
                (Some(data), _) => placed_bytes(data, position, self.page.bytes()),
                (None, Shown::File(file_page)) => {
                    own = content_of(&self.store, "place", file_page)?;
                    &own
                }
                // What is placed is its own already.
                (None, _) => continue,
            };
            self.put(&mut table, page, content).map_err(|errno| Error::system("place", errno))?;
        }
        Ok(())
    }

    fn flush(&self, pages: &Pages<WindowPage>, interrupt: &dyn Interrupt) -> Result<()> {
        // A page that was written and then remapped away is the file's all the
        // same: the whole window is flushed by syncing the file.
        if self.sharing == Sharing::Private {
            return Ok(());
        }
        if self.page.bytes_of(pages.len() as u64) == self.region.len() as u64 {
            return self.store.sync().map_err(|error| error.with_operation("flush"));
        }
        // Not under the table's lock: writing can take long, and any mapping of
        // the range is as good.
        for run in plan::runs(pages.iter()) {
            interrupt.check()?;
            let (offset, len) = self.bytes(run);
            let synced = self.store.sync_mappings(|| self.region.sync(offset, len));
            synced.map_err(|error| error.with_operation("flush"))?;
        }
        Ok(())
    }

    fn dirty(&self, _pages: &Pages<WindowPage>, _interrupt: &dyn Interrupt) -> Result<Vec<bool>> {
        Err(Error::unsupported(
            "dirty",
            "alias",
            "shows the file itself: a write is in the page cache at once, and only the kernel \
             knows which pages are not on the disk yet; call flush()",
        ))
    }

    fn pin(&self, _pages: &Pages<WindowPage>, _interrupt: &dyn Interrupt) -> Result<()> {
        Err(Error::unsupported(
            "pin",
            "alias",
            "shows the kernel's page cache, which the kernel may reclaim at any time; make the \
             window with lock=True, or use engine=\"paged\"",
        ))
    }

    fn unpin(&self, _pages: &Pages<WindowPage>) {}

    fn present(&self, pages: &Pages<WindowPage>, interrupt: &dyn Interrupt) -> Result<Vec<bool>> {
        let mut present = room_for("present", pages.len())?;
        let fail = |errno| Error::system("present", errno);
        let pagemap = PageMap::open().map_err(fail)?;
        let system_pages = self.page.bytes() / system_page_bytes();
        let step = (PRESENT_PAGES / system_pages).max(1);
        let mut here = room_for("present", step.min(pages.len()) * system_pages)?;
        let mut look = |run: Run<WindowPage>| {
            interrupt.check()?;
            let table = lock(&self.table);
            let (offset, len) = self.bytes(run);
            here.clear();
            pagemap.add_present(self.region.span(offset, len), &mut here).map_err(fail)?;
            let whole_pages = here.chunks(system_pages).map(|pages| pages.iter().all(|&here| here));
            let accessible = run.pages().map(|page| access(table.get(page)) != Access::None);
            present.extend(whole_pages.zip(accessible).map(|(here, allowed)| here && allowed));
            Ok(())
        };
        for piece in plan::pieces(pages.len(), step) {
            plan::runs(piece.map(|position| pages.at(position))).try_for_each(&mut look)?;
        }
        Ok(present)
    }

    fn entries(
        &self,
        pages: &Pages<WindowPage>,
        interrupt: &dyn Interrupt,
        tell: &mut dyn FnMut(Entry),
    ) -> Result<()> {
        for piece in plan::pieces(pages.len(), ENTRIES_STEP) {
            interrupt.check()?;
            let table = lock(&self.table);
            piece.for_each(|position| tell(table.get(pages.at(position))));
        }
        Ok(())
    }

    fn stats(&self) -> Stats {
        let (counts, table_bytes) = {
            let table = lock(&self.table);
            (table.counts(), table.bytes())
        };
        // Where the kernel does not tell, nothing is known to be there.
        let (file_pages, tables) = self.resident().unwrap_or((0, 0));
        let trimming = self.trimming.as_ref();
        Stats {
            present_pages: file_pages / (self.page.bytes() / system_page_bytes()) as u64
                + counts.placed,
            placed_pages: counts.placed,
            denied_pages: counts.denied,
            page_table_bytes: tables,
            budget_bytes: trimming.and_then(Registration::limit).map_or(0, Limit::bytes),
            table_bytes,
            blocks_trimmed: trimming.map_or(0, Registration::blocks_trimmed),
            ..Stats::of(&self.counters)
        }
    }
}
