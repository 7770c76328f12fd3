//! The memory budget of a window: what counts, and what is evicted when it is full.
//!
//! The budget counts present pages, the window's page tables, staging memory, isolated frames,
//! and what the store's source map has mapped. A fault that finds the budget full evicts a batch
//! of pages before it loads its own. A call evicts pages for each chunk, but none that it has
//! loaded itself. A fault cannot be refused, and never waits for a write to a file
//! (`cleaner.rs`). If it can evict nothing, because all pages are pinned, or dirty and not yet
//! written, the window exceeds its budget.

use std::collections::{HashSet, VecDeque};

use super::frame_pool;
use super::frames::Tracking;
use super::page_tables::block_bytes;
use super::State;
use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::memory::Reservation;
use crate::plan::Members;
use crate::room::no_room;
use crate::store::{SourceLimit, Store};
use crate::sys::mm::system_page_bytes;
use crate::table::{Entry, Shown, Table};
use crate::units::{FilePage, PageSize, WindowPage};

/// Pages that one step evicts at most.
const MAX_VICTIMS: u64 = 512;
/// The part of a budget that the source map of the store may have mapped.
const SOURCE_PART: u64 = 32;
/// The part of a budget that a chunk of staging memory may take.
const CHUNK_PART: u64 = 64;
/// The largest chunk of a window with a budget: small pages, which can leave one by one.
const MAX_CHUNK_BYTES: u64 = 1 << 20;
/// The most that is read at once for faults that run forwards.
const CLUSTER_BYTES: u64 = 256 << 10;
/// Pages for which a budget must have room: one batch of victims.
const LEAST_PAGES: u64 = 64;

/// Pages that are kept clean for faults, at most and at least.
const MOST_CLEANED: u64 = 1024;
const LEAST_CLEANED: u64 = 64;
/// The part of a budget's pages that are kept clean.
const CLEANED_PART: u64 = 8;

/// How the cache notes a page.
type Insert = fn(&mut Cache, WindowPage, FilePage);

/// What keeps a window within its budget.
#[derive(Debug)]
pub struct Budget {
    reservation: Reservation,
    /// What the store's source map may have of it.
    _source_limit: SourceLimit,
    division: Division,
    cache: Cache,
    /// Pages that were written lately, so that a fault can evict them; the oldest first.
    cleaned: VecDeque<WindowPage>,
    /// A fault has found no clean page, and none was written since.
    all_changed: bool,
    /// A page came in when there was no memory to note it in the cache, where it is to be.
    has_strays: bool,
}

/// Pages that are read at once for faults that run forwards, at most.
pub fn cluster_pages(page: PageSize, page_count: u64) -> u64 {
    page.index_of(CLUSTER_BYTES).clamp(1, page_count)
}

/// The dimensions of a window, by which its budget is divided.
#[derive(Clone, Copy, Debug)]
pub struct Dimensions {
    /// Its pages.
    pub page_count: u64,
    /// Their size.
    pub page: PageSize,
    /// Pages of a chunk of staging memory, at most.
    pub chunk_pages: u64,
    /// How writes are noticed.
    pub tracking: Option<Tracking>,
}

/// How a budget is divided.
#[derive(Clone, Copy, Debug)]
pub struct Division {
    dimensions: Dimensions,
    /// Pages of a chunk of staging memory.
    pub chunk_pages: u64,
    /// Pages that are read at once for faults that run forwards, at most.
    pub cluster_pages: u64,
    /// Bytes that are taken whatever is in the window.
    fixed_bytes: u64,
}

impl Dimensions {
    /// What the window takes if all of its pages are present: it never needs more.
    pub fn whole_bytes(self) -> u64 {
        let Self { page_count, page, chunk_pages, tracking } = self;
        let tables = page.bytes_of(page_count).div_ceil(block_bytes()) * system_page_bytes() as u64;
        let cluster_pages = cluster_pages(page, page_count);
        let frames = frame_pool::most_bytes(page, chunk_pages, cluster_pages, tracking);
        page.bytes_of(page_count) + tables + frames
    }

    /// Divides a budget, if the window does not fit into it whole.
    pub fn divide(self, budget_bytes: u64) -> Result<Option<Division>> {
        if self.whole_bytes() <= budget_bytes {
            return Ok(None);
        }
        let least = LEAST_PAGES * (self.page.bytes_of(1) + system_page_bytes() as u64);
        let wanted = self.least_budget(budget_bytes, least, 0);
        if wanted > budget_bytes {
            return Err(Error::Budget {
                operation: "Window",
                wanted,
                budget: budget_bytes,
                why: "it must hold one batch of pages and the memory for reads",
            });
        }
        Ok(Some(self.division(budget_bytes)))
    }

    fn division(self, budget_bytes: u64) -> Division {
        let Self { page_count, page, chunk_pages, tracking } = self;
        let chunk_bytes = (budget_bytes / CHUNK_PART).min(MAX_CHUNK_BYTES);
        let chunk_pages = page.index_of(chunk_bytes).clamp(1, chunk_pages);
        let cluster_pages = chunk_pages.min(cluster_pages(page, page_count));
        let fixed_bytes = frame_pool::most_bytes(page, chunk_pages, cluster_pages, tracking);
        Division { dimensions: self, chunk_pages, cluster_pages, fixed_bytes }
    }

    /// The least budget from `budget_bytes` on that has room for `content_bytes`, when the source
    /// map has `source_bytes`.
    fn least_budget(self, budget_bytes: u64, content_bytes: u64, source_bytes: u64) -> u64 {
        let mut least = budget_bytes;
        loop {
            // A larger budget has larger chunks, which take a part of what it has more.
            let fixed_bytes = self.division(least).fixed_bytes;
            let needed = fixed_bytes + content_bytes + source_bytes.max(least / SOURCE_PART);
            if needed <= least {
                return least;
            }
            if needed >= self.whole_bytes() {
                return self.whole_bytes();
            }
            least = needed;
        }
    }
}

impl Division {
    /// Pages that a budget has room for beside what is there whatever is in the window.
    fn most_pages(&self, budget_bytes: u64) -> u64 {
        let Dimensions { page, page_count, .. } = self.dimensions;
        page.index_of(budget_bytes.saturating_sub(self.fixed_bytes)).min(page_count)
    }
}

impl Budget {
    pub(super) fn new(reservation: Reservation, division: Division, store: &Store) -> Result<Self> {
        let source_limit = store.limit_source_map(reservation.bytes() / SOURCE_PART);
        let pages = division.most_pages(reservation.bytes());
        let cache = Cache::new(pages);
        let cache = cache.map_err(|_| no_room::<[u32; 3]>("Window", pages as usize))?;
        Ok(Self {
            reservation,
            _source_limit: source_limit,
            division,
            cache,
            cleaned: VecDeque::with_capacity(MOST_CLEANED as usize),
            all_changed: false,
            has_strays: false,
        })
    }

    pub(super) fn reservation(&self) -> &Reservation {
        &self.reservation
    }

    pub(super) fn whole_bytes(&self) -> u64 {
        self.division.dimensions.whole_bytes()
    }

    pub(super) fn budget_bytes(&self) -> u64 {
        self.reservation.bytes()
    }

    /// Adapts to a budget that has changed, as shares of "auto" budgets do.
    fn follow(&mut self) {
        let pages = self.division.most_pages(self.budget_bytes());
        if pages != self.cache.capacity() {
            // Where there is no memory to do so it is tried again: as many pages leave anyway.
            let _later = self.cache.resize(pages);
        }
    }

    /// A page is in that may leave, noted by `insert` ([`Cache::inserted`], [`Cache::stayed`]).
    /// No fault is refused for lack of memory to note it: then it is a stray until there is some.
    fn insert(&mut self, page: WindowPage, file_page: FilePage, insert: Insert) {
        self.cache.removed(page);
        // Beyond the budget if need be.
        match self.cache.reserve(1) {
            Ok(()) => insert(&mut self.cache, page, file_page),
            Err(_) => self.has_strays = true,
        }
    }

    /// Notes the strays, as far as there is memory by now.
    fn insert_strays(&mut self, table: &Table) {
        let count = table.counts().present.saturating_sub(self.cache.len());
        if !self.has_strays || self.cache.reserve(count).is_err() {
            return;
        }
        let mut present = Vec::with_capacity(MAX_VICTIMS as usize);
        let mut from = Some(WindowPage(0));
        while let Some(start) = from {
            present.clear();
            from = table.present_pages(start, &mut present);
            for &page in &present {
                match may_leave(table.get(page)) {
                    Some(file_page) if !self.cache.contains(page) => {
                        self.cache.inserted(page, file_page);
                    }
                    _ => {}
                }
            }
        }
        self.has_strays = false;
    }

    /// Pages that are to be clean, so that faults find some to evict.
    fn wanted_clean(&self) -> u64 {
        (self.cache.capacity() / CLEANED_PART).clamp(LEAST_CLEANED, MOST_CLEANED / 2)
    }

    /// A page's word changes from `old` to `new`.
    fn note(&mut self, page: WindowPage, old: Entry, new: Entry) {
        match (may_leave(old), may_leave(new)) {
            (was, Some(file_page)) if was != Some(file_page) => {
                self.insert(page, file_page, Cache::inserted);
            }
            (Some(_), None) => {
                self.cache.removed(page);
            }
            _ => {}
        }
    }
}

/// The file page of a page that is present and may leave the window.
pub(super) fn may_leave(entry: Entry) -> Option<FilePage> {
    match entry.shown() {
        Shown::File(page) if entry.present() && !entry.pinned() => Some(page),
        _ => None,
    }
}

impl State {
    /// Notes that a page's word changes, before it does.
    pub(super) fn note_change(&mut self, page: WindowPage, new: Entry) {
        let old = self.table.get(page);
        if new.present() != old.present() {
            self.page_tables.note(page, new.present());
        }
        if let Some(budget) = &mut self.budget {
            budget.note(page, old, new);
        }
    }

    /// Budget and the pages that it allows, if there is one.
    pub(super) fn allowed(&self, source_bytes: u64) -> Option<(u64, u64)> {
        let budget = self.budget.as_ref()?;
        // The source map's part is its own, so that it can grow while a call lasts.
        let budget_bytes = budget.budget_bytes();
        let source_bytes = source_bytes.max(budget_bytes / SOURCE_PART);
        let taken = budget.division.fixed_bytes + self.page_tables.bytes() + source_bytes;
        let page = self.page_tables.page_size();
        Some((budget_bytes, page.index_of(budget_bytes.saturating_sub(taken))))
    }

    /// The error of what needs `pages` to be present at once, which the budget does not allow.
    pub(super) fn over_budget(
        &self,
        operation: &'static str,
        pages: u64,
        source_bytes: u64,
        why: &'static str,
    ) -> Option<Error> {
        let Budget { reservation, division, .. } = self.budget.as_ref()?;
        let (budget, dimensions) = (reservation.bytes(), division.dimensions);
        let content_bytes = self.page_tables.bytes() + dimensions.page.bytes_of(pages);
        let wanted = dimensions.least_budget(budget, content_bytes, source_bytes);
        Some(Error::Budget { operation, wanted, budget, why })
    }

    /// How many pages have to leave for `coming` more; None if all fit.
    pub(super) fn excess(&self, coming: u64, source_bytes: u64) -> Option<u64> {
        let (_, allowed) = self.allowed(source_bytes)?;
        let excess = (self.table.counts().present + coming).saturating_sub(allowed);
        (excess > 0).then_some(excess)
    }

    /// The next victims, if `coming` more pages are too many.
    pub(super) fn choose_victims(
        &mut self,
        coming: u64,
        source_bytes: u64,
        keep: Option<&Members>,
    ) -> Option<Vec<WindowPage>> {
        let excess = self.excess(coming, source_bytes)?;
        let budget = self.budget.as_mut()?;
        budget.follow();
        budget.insert_strays(&self.table);
        let count = excess.max(budget.cache.batch_pages() as u64).min(MAX_VICTIMS) as usize;
        let (table, staying) = (&self.table, self.staying.as_ref());
        let mut victims = Vec::with_capacity(count);
        let shows = |page: WindowPage| {
            let entry = table.get(page);
            let kept = |all: &Members| all.contains(page);
            let stays = entry.held() || entry.writing();
            let stays = stays || keep.is_some_and(kept) || staying.is_some_and(kept);
            may_leave(entry).filter(|_| !stays)
        };
        budget.cache.victims(count, shows, &mut victims);
        victims.sort_unstable();
        Some(victims)
    }

    /// Up to `excess` victims, or a batch, that were not changed as far as the table knows:
    /// first of all those that were written lately. `few` is set where more should be written.
    pub(super) fn choose_clean(&mut self, excess: u64, few: &mut bool) -> Vec<WindowPage> {
        let (table, staying) = (&self.table, self.staying.as_ref());
        let Some(budget) = &mut self.budget else { return Vec::new() };
        budget.insert_strays(table);
        let count = excess.max(budget.cache.batch_pages() as u64).min(MAX_VICTIMS) as usize;
        let mut victims = Vec::with_capacity(count);
        let shows = |page: WindowPage| {
            let entry = table.get(page);
            let stays = entry.held() || !entry.clean();
            let stays = stays || staying.is_some_and(|all| all.contains(page));
            may_leave(entry).filter(|_| !stays)
        };
        let wrote = !budget.cleaned.is_empty();
        while victims.len() < count {
            let Some(page) = budget.cleaned.pop_front() else { break };
            if shows(page).is_some_and(|file_page| budget.cache.left(page, file_page)) {
                victims.push(page);
            }
        }
        *few = wrote && (budget.cleaned.len() as u64) < LEAST_CLEANED;
        if victims.is_empty() && !budget.all_changed {
            budget.cache.victims(count, shows, &mut victims);
            budget.all_changed = victims.is_empty();
        }
        victims.sort_unstable();
        victims
    }

    /// Up to `most` of the pages that leave next, to be written if they were changed.
    pub(super) fn leaving_next(&mut self, most: usize) -> Vec<WindowPage> {
        let table = &self.table;
        let Some(budget) = &mut self.budget else { return Vec::new() };
        let mut pages = Vec::with_capacity(most);
        let cleaned: HashSet<WindowPage> = budget.cleaned.iter().copied().collect();
        let wanted = |page: WindowPage| {
            let entry = table.get(page);
            let busy = entry.held() || entry.writing();
            !busy && may_leave(entry).is_some() && !cleaned.contains(&page)
        };
        if (budget.cleaned.len() as u64) < budget.wanted_clean() {
            budget.cache.next(most, wanted, &mut pages);
        }
        pages
    }

    /// Notes that pages were written; says whether more should be.
    pub(super) fn note_cleaned(&mut self, pages: &[WindowPage]) -> bool {
        let Some(budget) = &mut self.budget else { return false };
        budget.cleaned.extend(pages);
        budget.all_changed = false;
        (budget.cleaned.len() as u64) < budget.wanted_clean()
    }

    /// Victims that could not leave are candidates again.
    pub(super) fn take_back(&mut self, victims: &[WindowPage]) {
        self.insert_again(victims, Cache::inserted);
    }

    /// Victims that were changed stay, and are not looked at again soon.
    pub(super) fn keep_changed(&mut self, victims: &[WindowPage]) {
        self.insert_again(victims, Cache::stayed);
    }

    fn insert_again(&mut self, victims: &[WindowPage], insert: Insert) {
        let Some(budget) = &mut self.budget else { return };
        for &page in victims {
            if let Some(file_page) = may_leave(self.table.get(page)) {
                budget.insert(page, file_page, insert);
            }
        }
    }
}
