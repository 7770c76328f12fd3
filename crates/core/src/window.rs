//! A window: checks the arguments, then calls its engine.

mod choice;
mod extents;
mod first;
mod pin;
mod settings;
mod together;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use rustix::io::Errno;

use crate::calibrate::Calibration;
use crate::engine::alias::{Alias, AliasOptions};
use crate::engine::{eager, paged, Engine, Fill};
use crate::error::{Error, Interrupt, Result, Uninterruptible};
use crate::plan::{self, Changes};
use crate::room::{mask, room_for};
use crate::stats::Stats;
use crate::store::Store;
use crate::sys::mm::Sharing;
use crate::sys::pagemap;
use crate::sys::span::Span;
use crate::sys::stderr_line::stderr_line;
use crate::table::{Entry, Table};
use crate::units::{self, FilePage, PageSize, Pages, Prot, Selection, WindowPage};

pub use crate::engine::cached::Tracking;
pub use crate::engine::{EngineKind, FaultMode};
pub use crate::trim::ReadAhead;
pub use choice::choose_engine;
pub use pin::Pin;
pub use settings::{Budget, MappingOptions};
pub use together::ANY_ENGINE;

/// What a window shows before anything is remapped.
#[derive(Clone, Debug)]
pub enum Mapping {
    /// Window page i shows file page `first_page + i`.
    Linear,
    /// No page shows anything.
    None,
    /// The file page of each window page; -1 for none.
    List(Vec<i64>),
}

/// How to make a window.
#[derive(Clone, Debug)]
pub struct WindowOptions {
    /// Pages of the window; by default those of the mapping or the store.
    pub page_count: Option<u64>,
    /// The file page that window page 0 of a linear window shows.
    pub first_page: i64,
    /// What it shows first.
    pub mapping: Mapping,
    /// What may be done with its pages.
    pub prot: Prot,
    /// Whether it has to see other mappings' writes at once, and they its own.
    pub coherent: Option<bool>,
    /// The engine, or the best that does what is asked.
    pub engine: Option<EngineKind>,
    /// Make every page present.
    pub populate: bool,
    /// Make those pages present that are in the page cache, and no others.
    pub nonblock: bool,
    /// Keep every page in memory.
    pub lock: bool,
    /// Memory that it may take.
    pub budget: Budget,
    /// How writes to the pages are noticed, where there is a choice.
    pub tracking: Option<Tracking>,
    /// Who resolves its faults.
    pub fault: FaultMode,
    /// Numbers of this machine.
    pub calibration: Calibration,
}

/// `at=` of a remap.
#[derive(Clone, Debug)]
pub enum Target {
    /// The first window page; the others follow it.
    From(i64),
    /// A window page for each file page.
    List(Vec<i64>),
}

/// How to remap.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::struct_excessive_bools)] // the settings of the call, as users name them
pub struct RemapOptions {
    /// New protection of the changed pages.
    pub prot: Option<Prot>,
    /// Bring just what is in the page cache.
    pub nonblock: bool,
    /// Bring content at all.
    pub populate: bool,
    /// Placed pages may be lost.
    pub discard: bool,
    /// Nobody reads the pages meanwhile, so present ones may be overwritten where they lie.
    pub in_place: bool,
}

/// One contiguous window of memory whose pages show any pages of a store.
#[derive(Debug)]
pub struct Window {
    engine: Box<dyn Engine>,
    kind: EngineKind,
    store: Arc<Store>,
    page_count: u64,
    prot: Prot,
    locked: bool,
    tracking: Option<Tracking>,
    sharing: Sharing,
    fault: FaultMode,
    owner: u32,
    /// What was stored and not written is not wanted.
    given_up: AtomicBool,
}

impl Window {
    /// Makes a window.
    ///
    /// # Errors
    /// Arguments that cannot be right, what no engine here does, limits, and I/O
    /// where it is populated.
    pub fn new(
        store: Arc<Store>,
        options: &WindowOptions,
        interrupt: &dyn Interrupt,
    ) -> Result<Self> {
        Self::with_mapping(store, options, MappingOptions::default(), interrupt)
    }

    /// Makes a window that is, with engine `alias`, mapped so.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_mapping(
        store: Arc<Store>,
        options: &WindowOptions,
        mapping: MappingOptions,
        interrupt: &dyn Interrupt,
    ) -> Result<Self> {
        store.check_open("Window")?;
        options.calibration.check()?;
        let engines = together::engines(options, mapping.advice)?;
        let engines = choice::for_store(&store, engines, options)?;
        choice::check_prot(options)?;
        let kind = choose_engine(&engines, options.prot)?;
        let sharing = mapping.sharing;
        if options.prot == Prot::Write && !store.writable() && sharing == Sharing::Shared {
            let hint = "; the store is open for reading: open it with mode \"r+\"";
            let refused = Error::system_with_hint("Window", Errno::ACCESS, hint);
            return Err(refused.of_file(store.read_only_path()));
        }
        let table = first::first_table(&store, options, kind)?;
        let page_count = table.page_count();
        let tracking = match kind {
            EngineKind::Paged => choice::chosen_tracking(options)?,
            EngineKind::Eager if options.prot == Prot::Write => Some(Tracking::Content),
            EngineKind::Alias | EngineKind::Eager => None,
        };
        choice::check_fault(options.fault, kind)?;
        choice::check_budget(options, kind, store.page_size().bytes_of(page_count))?;
        let engine = Self::make_engine(kind, &store, table, tracking, options, mapping)?;
        let window = Self {
            engine,
            kind,
            store,
            page_count,
            prot: options.prot,
            locked: options.lock,
            tracking,
            sharing,
            fault: options.fault,
            owner: crate::sys::process::id(),
            given_up: false.into(),
        };
        if options.populate || options.lock {
            window.populate(&Selection::All, options.nonblock, interrupt)?;
        }
        Ok(window)
    }

    fn make_engine(
        kind: EngineKind,
        store: &Arc<Store>,
        table: Table,
        tracking: Option<Tracking>,
        options: &WindowOptions,
        mapping: MappingOptions,
    ) -> Result<Box<dyn Engine>> {
        let store = Arc::clone(store);
        Ok(match kind {
            EngineKind::Alias => {
                Self::check_alias_pages(&store)?;
                let options = AliasOptions {
                    locked: options.lock,
                    sharing: mapping.sharing,
                    limit: choice::limit(options)?,
                    advice: mapping.advice,
                    region: mapping.region,
                };
                Box::new(Alias::new(store, table, options)?)
            }
            EngineKind::Paged => {
                let options = paged::PagedOptions {
                    locked: options.lock,
                    tracking,
                    fault: options.fault,
                    budget: choice::budget(options),
                    calibration: &options.calibration,
                };
                Box::new(paged::open(store, table, options)?)
            }
            EngineKind::Eager => {
                let writable = options.prot == Prot::Write;
                Box::new(eager::open(store, table, options.lock, writable, &options.calibration)?)
            }
        })
    }

    /// Whether a file page is the last and the file ends within it.
    fn is_cut(&self, page: FilePage) -> bool {
        self.page_size().bytes_of(page.0 + 1) > self.store.size_bytes()
    }

    /// The kernel maps a file's last page up to the system page, not to ours.
    fn check_alias_pages(store: &Store) -> Result<()> {
        let page_bytes = store.page_size().bytes() as u64;
        let system = crate::sys::mm::system_page_bytes() as u64;
        if page_bytes > system && !store.size_bytes().is_multiple_of(page_bytes) {
            return Err(Error::Unsupported {
                operation: "Window",
                reason: format!(
                    "engine \"alias\" cannot show the last page of this store, which is not \
                     whole: {} bytes are not a multiple of page_bytes = {page_bytes}; use \
                     page_bytes = {system}, or engine=\"paged\"",
                    store.size_bytes()
                ),
            });
        }
        Ok(())
    }

    /// Bytes of a page.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.store.page_size()
    }

    /// Pages of the window.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.page_count
    }

    /// The engine.
    #[must_use]
    pub fn engine(&self) -> EngineKind {
        self.kind
    }

    /// Whether others' writes are seen at once, and its own by them.
    #[must_use]
    pub fn coherent(&self) -> bool {
        self.kind == EngineKind::Alias && self.sharing == Sharing::Shared
    }

    /// How the kernel reads ahead where pages are touched; None if fremap brings them.
    #[must_use]
    pub fn read_ahead(&self) -> Option<ReadAhead> {
        self.engine.read_ahead()
    }

    /// Leaves a part of the budget to others that show the same file (engine `alias`).
    ///
    /// # Errors
    /// [`Error::Fork`] in a child; the limit of threads.
    pub fn lower_budget(&self, bytes: u64) -> Result<()> {
        self.check_process("Window")?;
        self.engine.lower_budget(bytes)
    }

    /// Bytes that it would take with all of its pages, where the budget is less.
    #[must_use]
    pub fn whole_bytes(&self) -> Option<u64> {
        self.engine.whole_bytes()
    }

    /// Whether its memory may be written.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.prot == Prot::Write
    }

    /// Whether its pages are kept in memory.
    #[must_use]
    pub fn locked(&self) -> bool {
        self.locked
    }

    /// How writes to it are noticed; None if it is coherent or only read.
    #[must_use]
    pub fn tracking(&self) -> Option<Tracking> {
        self.tracking
    }

    /// Where it gets its pages.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The window's memory.
    #[must_use]
    pub fn memory(&self) -> Span<'_> {
        let region = self.engine.region();
        region.span(0, region.len())
    }

    /// Kernel mappings that the window consists of.
    ///
    /// # Errors
    /// Where `/proc` is not mounted.
    pub fn vma_count(&self) -> Result<u64> {
        self.check_process("vma_count")?;
        pagemap::region_mapping_count(self.engine.region())
            .map_err(|errno| Error::system("vma_count", errno))
    }

    /// Who resolves its faults.
    #[must_use]
    pub fn fault(&self) -> FaultMode {
        self.fault
    }

    /// Whether this process made the window; a child of fork did not.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.owner == crate::sys::process::id()
    }

    fn check_process(&self, operation: &'static str) -> Result<()> {
        if self.is_own() {
            Ok(())
        } else {
            Err(Error::Fork { operation, what: "window", owner: self.owner })
        }
    }

    /// Makes sure that the window's faults are resolved in this thread, which a handler of
    /// somebody's may have changed since the last call.
    fn check_faults(&self, operation: &'static str) -> Result<()> {
        // In a child of fork they are signals, whoever resolves them in its parent.
        let signals = self.fault == FaultMode::Signal || !self.is_own();
        if signals && self.kind == EngineKind::Paged {
            choice::check_handler(operation)?;
        }
        Ok(())
    }

    /// What a new view shows: the memory, and whether it may be written.
    ///
    /// # Errors
    /// [`Error::Fork`] in a child that could not be given the store to read.
    pub fn view(&self) -> Result<(Span<'_>, bool)> {
        self.check_faults("buffer")?;
        if !self.is_own() && !self.engine.region().is_here() {
            self.check_process("buffer")?;
        }
        // What a child writes to a copy would be lost.
        let kept = self.is_own() || self.kind == EngineKind::Alias;
        let writable = self.writable() && kept;
        Ok((self.memory(), writable))
    }

    fn select(&self, operation: &'static str, pages: &Selection) -> Result<Pages<WindowPage>> {
        self.check_process(operation)?;
        pages.resolve(operation, self.page_count)
    }

    fn target(&self, at: &Target, count: usize) -> Result<Pages<WindowPage>> {
        match at {
            Target::List(list) => units::resolve_list("remap", list, self.page_count),
            Target::From(first) if count == 0 => {
                let at_end = u64::try_from(*first).is_ok_and(|first| first == self.page_count);
                if !at_end {
                    Selection::List(vec![*first])
                        .resolve::<WindowPage>("remap", self.page_count)?;
                }
                Ok(Pages::Range(0..0))
            }
            Target::From(first) => {
                let end = first.saturating_add(i64::try_from(count).unwrap_or(i64::MAX));
                Selection::Range(*first, end).resolve("remap", self.page_count)
            }
        }
    }

    fn check_prot(&self, operation: &'static str, prot: Prot) -> Result<()> {
        match prot {
            Prot::Write if self.prot != Prot::Write => Err(Error::Argument(format!(
                "{operation}: prot is WRITE, but the window was made with prot=READ; make it with \
                 prot=WRITE"
            ))),
            Prot::Read if self.kind == EngineKind::Eager && self.prot == Prot::Write => {
                Err(Error::unsupported(operation, self.kind, "supports no protection but NONE"))
            }
            Prot::Read if self.tracking == Some(Tracking::Kernel) => Err(Error::unsupported(
                operation,
                self.kind,
                "cannot make pages read-only with tracking=\"async\", where the kernel only notes \
                 writes; make the window with tracking=\"sync\"",
            )),
            _ => Ok(()),
        }
    }

    fn check_unlocked(&self, operation: &'static str, what: &str) -> Result<()> {
        if self.locked {
            return Err(Error::Unsupported {
                operation,
                reason: format!(
                    "the window was made with lock=True, which keeps every page in memory, so \
                     {what}; make it without lock"
                ),
            });
        }
        Ok(())
    }

    fn fill(&self, operation: &'static str, nonblock: bool, populate: bool) -> Result<Fill> {
        if nonblock {
            self.check_unlocked(operation, "nonblock=True cannot skip any")?;
            Ok(Fill::Resident)
        } else if populate {
            Ok(Fill::All)
        } else {
            self.check_unlocked(operation, "populate=False cannot leave any out")?;
            Ok(Fill::Nothing)
        }
    }

    /// Changes what window pages show. Returns which of them are present.
    ///
    /// # Errors
    /// Before any change: pages outside, a window page named twice, a placed page
    /// without `discard`, the mapping limit. On the way: I/O.
    pub fn remap(
        &self,
        file_pages: &Selection,
        at: &Target,
        options: RemapOptions,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<bool>> {
        self.check_process("remap")?;
        self.check_faults("remap")?;
        let file_pages: Pages<FilePage> =
            file_pages.resolve("remap", self.store.page_count().min(Entry::MAX_FILE_PAGES))?;
        if self.kind == EngineKind::Alias && file_pages.iter().any(|page| self.is_cut(page)) {
            Self::check_alias_pages(&self.store)?;
        }
        let at = self.target(at, file_pages.len())?;
        let changes = Changes::new(at, file_pages)?;
        if let Some(prot) = options.prot {
            self.check_prot("remap", prot)?;
        }
        if options.nonblock && !options.populate {
            return Err(Error::Argument(
                "remap: nonblock=True loads pages that are in the page cache, and populate=False \
                 loads none; leave one of them out"
                    .to_owned(),
            ));
        }
        let options = crate::engine::RemapOptions {
            prot: options.prot,
            fill: self.fill("remap", options.nonblock, options.populate)?,
            discard: options.discard,
            in_place: options.in_place,
        };
        self.engine.remap(&changes, options, interrupt)
    }

    /// Makes pages present. Returns which of them are.
    ///
    /// # Errors
    /// Pages outside; I/O.
    pub fn populate(
        &self,
        pages: &Selection,
        nonblock: bool,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<bool>> {
        let pages = self.select("populate", pages)?;
        self.check_faults("populate")?;
        self.engine.populate(&pages, self.fill("populate", nonblock, true)?, interrupt)
    }

    /// Drops pages from the window; the next touch brings them back.
    ///
    /// # Errors
    /// Pages outside; a placed page without `discard`; a locked window.
    pub fn evict(&self, pages: &Selection, discard: bool, interrupt: &dyn Interrupt) -> Result<()> {
        let pages = self.select("evict", pages)?;
        self.check_faults("evict")?;
        self.check_unlocked("evict", "none can be dropped")?;
        self.engine.evict(&pages, discard, interrupt)
    }

    /// Changes what may be done with pages, and keeps their content.
    ///
    /// # Errors
    /// Pages outside; protection that the window does not have.
    pub fn protect(&self, pages: &Selection, prot: Prot, interrupt: &dyn Interrupt) -> Result<()> {
        let pages = self.select("protect", pages)?;
        self.check_faults("protect")?;
        self.check_prot("protect", prot)?;
        self.engine.protect(&pages, prot, interrupt)
    }

    /// Gives pages content of their own, with no file behind it.
    ///
    /// # Errors
    /// Pages outside; data of another size; a page that shows nothing.
    pub fn place(
        &self,
        pages: &Selection,
        data: Option<&[u8]>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        let pages = self.select("place", pages)?;
        self.check_faults("place")?;
        plan::check_named_once("place", &pages)?;
        let page_bytes = self.page_size().bytes();
        if let Some(data) = data {
            if data.len() != page_bytes && data.len() != pages.len() * page_bytes {
                return Err(Error::Argument(format!(
                    "place: {} bytes for {} pages of {page_bytes} bytes; give one page for all, \
                     or every page its own",
                    data.len(),
                    pages.len()
                )));
            }
        }
        self.engine.place(&pages, data, interrupt)
    }

    /// Writes changed pages to the store and makes them durable.
    ///
    /// # Errors
    /// Pages outside; I/O.
    pub fn flush(&self, pages: &Selection, interrupt: &dyn Interrupt) -> Result<()> {
        let pages = self.select("flush", pages)?;
        if self.prot == Prot::Write {
            self.engine.flush(&pages, interrupt)
        } else {
            Ok(())
        }
    }

    /// Takes in what the store has grown by since it had `had_bytes`, in pages within which it
    /// ended when they were loaded. The window of another process is left alone.
    ///
    /// # Errors
    /// I/O.
    pub fn reload_grown(&self, had_bytes: u64, interrupt: &dyn Interrupt) -> Result<()> {
        if self.prot == Prot::Write && self.is_own() {
            self.check_faults("refresh")?;
            self.engine.reload_grown(had_bytes, interrupt)
        } else {
            Ok(())
        }
    }

    /// The file page that each of `pages` shows; -1 for none, -2 for a placed page.
    ///
    /// # Errors
    /// Pages outside; [`Error::Fork`] in a child that does not show the same.
    pub fn mapping(&self, pages: &Selection, interrupt: &dyn Interrupt) -> Result<Vec<i64>> {
        if self.kind != EngineKind::Paged {
            self.check_process("mapping")?;
        }
        self.of_entries("mapping", pages, |entry| entry.shown().number(), interrupt)
    }

    /// What may be done with each of `pages`.
    ///
    /// # Errors
    /// Pages outside; [`Error::Fork`] in a child.
    pub fn protection(&self, pages: &Selection, interrupt: &dyn Interrupt) -> Result<Vec<Prot>> {
        self.check_process("protection")?;
        self.of_entries("protection", pages, Entry::prot, interrupt)
    }

    /// Which of `pages` are pinned.
    ///
    /// # Errors
    /// Pages outside; [`Error::Fork`] in a child.
    pub fn pinned(&self, pages: &Selection, interrupt: &dyn Interrupt) -> Result<Vec<bool>> {
        self.check_process("pinned")?;
        self.of_entries("pinned", pages, Entry::pinned, interrupt)
    }

    fn of_entries<T>(
        &self,
        operation: &'static str,
        pages: &Selection,
        of: impl Fn(Entry) -> T,
        interrupt: &dyn Interrupt,
    ) -> Result<Vec<T>> {
        let pages = pages.resolve(operation, self.page_count)?;
        let mut result = room_for(operation, pages.len())?;
        self.engine.entries(&pages, interrupt, &mut |entry| result.push(of(entry)))?;
        Ok(result)
    }

    /// Which of `pages` can be touched without a fault.
    ///
    /// # Errors
    /// Pages outside; where the kernel does not tell.
    pub fn present(&self, pages: &Selection, interrupt: &dyn Interrupt) -> Result<Vec<bool>> {
        let pages = self.select("present", pages)?;
        self.engine.present(&pages, interrupt)
    }

    /// Which of `pages` have changes that the store does not have.
    ///
    /// # Errors
    /// Pages outside; a writable coherent window has none of its own to tell.
    pub fn dirty(&self, pages: &Selection, interrupt: &dyn Interrupt) -> Result<Vec<bool>> {
        let pages = self.select("dirty", pages)?;
        if self.prot == Prot::Write {
            return self.engine.dirty(&pages, interrupt);
        }
        mask("dirty", pages.len(), interrupt)
    }

    /// What was stored and not flushed is not written when the window goes.
    pub fn give_up_changes(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// Counters and state.
    ///
    /// # Errors
    /// [`Error::Fork`] in a child.
    pub fn stats(&self) -> Result<Stats> {
        self.check_process("stats")?;
        Ok(self.engine.stats())
    }
}

impl Drop for Window {
    /// Writes what was written to the window and not flushed. Nobody is left to be told of
    /// a failure but stderr.
    fn drop(&mut self) {
        let writes = self.prot == Prot::Write && !self.coherent();
        if !writes || !self.is_own() || self.given_up.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = self.flush(&Selection::All, &Uninterruptible) {
            let pages = self.engine.stats().dirty_pages;
            stderr_line(format_args!(
                "{pages} changed pages of a window on {} were not written: {error}",
                self.store.describe()
            ));
        }
    }
}
