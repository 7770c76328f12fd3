//! Rows of fixed size, in one file or in thousands, taken in any order.
//!
//! A take copies rows that are known to be in the page cache from maps of the files. It reads the
//! rest by system calls that are all in flight together. What it knows, it knows by chunks of 2
//! MiB: a chunk that was read often enough, and that `mincore` finds completely in the page
//! cache, is mapped, and then copied from without asking again. Every few hundred rows, the take
//! checks this by the thread's count of major faults. Once that rises, it asks `mincore` row by
//! row, and unmaps chunks with a hole. It never touches anything through a map that was not once
//! found in the page cache.
//!
//! No lock is held while bytes are read or copied from maps, so any number of threads can take
//! rows at once. A row that is kept in memory is copied under the lock of its part.

mod blocks;
mod budget;
mod cache;
mod copy;
mod files;
mod keep;
mod look;
mod maps;
mod provided;
mod ranges;
mod read;
mod runs;
mod submit;
mod wanted;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use crate::error::{Error, Interrupt, Result};
use crate::io::{Pace, Quota, Segment};
use crate::memory::{self, Ask, Reservation};
use crate::room::no_room;
use crate::store::source::CHUNK_BYTES;
use crate::store::Store;
use crate::sys::mm::system_page_bytes;
use crate::sys::span::Span;
use crate::units::{self, PageIndex, Pages, Row, Selection};

use budget::MapBudget;
use cache::{RowCache, ROW_OVERHEAD};
use files::Files;
use ranges::MAX_FETCHED_BYTES;

pub use look::{look, Front};
pub use runs::{RowsOrRuns, Runs};
pub use submit::{Memory, Pending};

/// Rows that are copied, and then read, together: what a take needs to remember of each
/// is bounded by that.
const PIECE_ROWS: usize = 1 << 16;

/// Where rows lie in a file.
#[derive(Debug)]
pub struct ShardPlace {
    /// The file.
    pub file: ShardFile,
    /// Where its first row begins.
    pub data_offset: u64,
    /// How many rows it has.
    pub row_count: u64,
}

/// A file with rows.
#[derive(Debug)]
pub enum ShardFile {
    /// Opened when it is needed, and closed when others are.
    Path {
        /// Where it is.
        path: PathBuf,
        /// Device and number of the file that was looked at.
        identity: (u64, u64),
        /// When it was made; 0 where that is not told.
        born_ns: u64,
        /// Its size then.
        size_bytes: u64,
    },
    /// One that stays open.
    Store(Arc<Store>),
}

impl ShardFile {
    fn is_direct(&self) -> bool {
        matches!(self, Self::Store(store) if store.direct())
    }

    fn path(&self) -> Option<&Path> {
        match self {
            Self::Path { path, .. } => Some(path),
            Self::Store(_) => None,
        }
    }
}

/// What takes have done so far. `rows_copied` are those from maps of the page cache; `rows_read`
/// those by system calls, which brought `bytes_read`, also between rows, by `reads` requests.
#[derive(Debug, Default)]
struct Counters {
    takes: AtomicU64,
    rows_copied: AtomicU64,
    rows_read: AtomicU64,
    bytes_read: AtomicU64,
    reads: AtomicU64,
    major_faults: AtomicU64,
    cache_hits: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Rows of `row_bytes` bytes each, numbered through all shards.
#[derive(Debug)]
pub struct Rows {
    row_bytes: usize,
    row_count: u64,
    files: Files,
    budget: MapBudget,
    /// Rows that are kept in memory.
    cache: Option<RowCache>,
    /// Rows are read past the page cache.
    direct: bool,
    counters: Counters,
    /// Reads that takes may have in flight together where each keeps one of too many files open.
    in_flight: Quota,
    closed: AtomicBool,
}

impl Rows {
    /// Rows in shards, whose maps are kept within a budget, or that are read past the page
    /// cache; of those taken as a list `cache_bytes` are kept. Opens nothing.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shard whose rows do not fit into its file,
    /// [`Error::Budget`] for a budget in which nothing can be mapped, [`Error::Unsupported`]
    /// where the file system does not do `direct`.
    pub fn new(
        shards: Vec<ShardPlace>,
        row_bytes: usize,
        budget: Option<Ask>,
        direct: bool,
        cache_bytes: u64,
    ) -> Result<Self> {
        let direct = direct || shards.iter().any(|place| place.file.is_direct());
        if direct {
            // One tells of the others, which are in the same place as a rule.
            let mut paths = shards.iter().filter_map(|place| place.file.path());
            paths.next().map_or(Ok(()), files::check_direct)?;
        }
        let files = files::shards_of(shards, row_bytes, direct)?;
        // No more than all rows take.
        let most = (row_bytes as u64 + ROW_OVERHEAD as u64).saturating_mul(files.row_count());
        let cache = RowCache::new(cache_bytes.min(most), row_bytes);
        let cache =
            cache.map_err(|_errno| no_room::<u8>("rows", cache_bytes.min(most) as usize))?;
        // Direct reads map nothing.
        let budget = budget.filter(|_| !direct).map(|ask| reserve(ask, &files)).transpose()?;
        Ok(Self {
            row_bytes,
            row_count: files.row_count(),
            in_flight: Quota::new(files.open_limit() / 2),
            files,
            budget: MapBudget::new(budget),
            cache,
            direct,
            counters: Counters::default(),
            closed: AtomicBool::new(false),
        })
    }

    /// How many rows there are.
    #[must_use]
    pub fn row_count(&self) -> u64 {
        self.row_count
    }

    /// Whether [`close`](Self::close) was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Refuses later takes. Those under way end as they would have.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.files.forget();
        if let Some(cache) = &self.cache {
            cache.close();
        }
    }

    /// Forgets the rows that are kept in memory.
    pub fn refresh(&self) {
        if let Some(cache) = &self.cache {
            cache.clear();
        }
    }

    /// # Errors
    /// [`Error::Closed`] after [`close`](Self::close).
    pub fn check_open(&self, operation: &'static str) -> Result<()> {
        if self.is_closed() {
            return Err(Error::Closed { operation, what: "file of rows" });
        }
        Ok(())
    }

    /// What `selection` means. Negative numbers count from the end.
    ///
    /// # Errors
    /// [`Error::PageRange`] naming the first row outside.
    pub fn resolve(&self, operation: &'static str, selection: Selection) -> Result<Pages<Row>> {
        let limit = self.row_count;
        let Selection::List(list) = selection else {
            return selection.resolve(operation, limit);
        };
        let row_of = |index: i64| units::resolve_index(index, limit);
        if let Some(&index) = list.iter().find(|&&index| row_of(index).is_none()) {
            return Err(units::outside(operation, Row::COORDINATE, index, limit));
        }
        Ok(Pages::List(list.into_iter().filter_map(row_of).map(Row).collect()))
    }

    /// Copies rows into `into`, one after another.
    ///
    /// # Errors
    /// [`Error::Row`] naming the row, or its run, and its file; [`Error::Interrupted`]. What of
    /// `into` was written by then is not said.
    pub fn take(
        &self,
        asked: &RowsOrRuns,
        into: Span<'_>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        self.check_take(asked, into)?;
        self.take_all(asked, into, interrupt)
    }

    /// Fails where a take cannot begin.
    fn check_take(&self, asked: &RowsOrRuns, into: Span<'_>) -> Result<()> {
        self.check_open("take")?;
        let rows = asked.row_count();
        if rows.and_then(|rows| rows.checked_mul(self.row_bytes)) != Some(into.len()) {
            return Err(Error::Argument(format!(
                "take: {} rows of {} bytes do not fill {} bytes",
                rows.unwrap_or(usize::MAX),
                self.row_bytes,
                into.len()
            )));
        }
        Ok(())
    }

    /// A take that was begun while the rows were open, and ends as it would have then.
    fn take_all(
        &self,
        asked: &RowsOrRuns,
        into: Span<'_>,
        interrupt: &dyn Interrupt,
    ) -> Result<()> {
        count(&self.counters.takes, 1);
        if into.is_empty() {
            return Ok(());
        }
        let outcome = self.take_pieces(asked, into, &mut Pace::new(interrupt));
        if self.is_closed() {
            // What this take has opened since.
            self.files.forget();
        }
        outcome.map_err(|error| asked.name(error))
    }

    fn take_pieces(&self, asked: &RowsOrRuns, into: Span<'_>, pace: &mut Pace<'_>) -> Result<()> {
        let ids = match asked {
            RowsOrRuns::Rows(Pages::List(ids)) => ids,
            RowsOrRuns::Rows(Pages::Range(range)) => {
                return self.take_ranges(std::iter::once(range.clone()), into, pace);
            }
            RowsOrRuns::Runs(runs) => return self.take_ranges(runs.ranges(), into, pace),
        };
        let mut wanted = Vec::new();
        for (number, piece) in ids.chunks(self.piece_rows()).enumerate() {
            let start = number * self.piece_rows() * self.row_bytes;
            let part = into.part(start, piece.len() * self.row_bytes);
            match &self.cache {
                Some(cache) => self.take_kept(cache, piece, part, &mut wanted, pace)?,
                None => self.take_piece_of_list(piece, part, &mut wanted, pace)?,
            }
        }
        Ok(())
    }

    fn take_piece_of_list(
        &self,
        ids: &[Row],
        into: Span<'_>,
        wanted: &mut Vec<Segment>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        if self.direct || self.row_bytes > MAX_FETCHED_BYTES {
            self.copy_long(ids, into, wanted, pace)?;
        } else {
            self.copy(ids, into, wanted, pace)?;
        }
        self.read_rest(ids.len(), wanted, into, pace)
    }

    /// Reads what of `rows` rows was not copied, and counts both.
    fn read_rest(
        &self,
        rows: usize,
        wanted: &mut Vec<Segment>,
        into: Span<'_>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let bytes: usize = wanted.iter().map(|part| part.len as usize).sum();
        let read = bytes.div_ceil(self.row_bytes).min(rows);
        count(&self.counters.rows_copied, (rows - read) as u64);
        count(&self.counters.rows_read, read as u64);
        self.read(wanted, into, pace)?;
        wanted.clear();
        Ok(())
    }

    /// What is held now, and what was done so far, by name.
    #[must_use]
    pub fn stats(&self) -> [(&'static str, u64); 12] {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mapped = self.files.mapped();
        [
            ("takes", read(&self.counters.takes)),
            ("rows_copied", read(&self.counters.rows_copied)),
            ("rows_read", read(&self.counters.rows_read)),
            ("bytes_read", read(&self.counters.bytes_read)),
            ("reads", read(&self.counters.reads)),
            ("major_faults", read(&self.counters.major_faults)),
            ("mapped_bytes", mapped.bytes()),
            ("page_table_bytes", mapped.table_bytes()),
            ("budget_bytes", self.budget.limit_bytes().unwrap_or(0)),
            ("open_files", self.files.open_count()),
            ("cache_hits", read(&self.counters.cache_hits)),
            ("cached_bytes", self.cache.as_ref().map_or(0, RowCache::held_bytes)),
        ]
    }

    /// The shard that a row is in, and where its bytes begin there.
    fn locate(&self, row: u64) -> (u32, u64) {
        let number = self.files.shard_of(row);
        (number, self.files.shard(number).offset_of(row, self.row_bytes))
    }
}

/// Reserves what the maps of some files may take.
fn reserve(ask: Ask, files: &Files) -> Result<Reservation> {
    let page = system_page_bytes() as u64;
    let chunk = CHUNK_BYTES as u64;
    let mapped = |size_bytes: u64| size_bytes.div_ceil(chunk).saturating_mul(chunk + page);
    let need = files.sizes().map(mapped).fold(0, u64::saturating_add);
    let budget = memory::reserve(ask.with_need(need)).map_err(|e| Error::system("rows", e))?;
    let least = chunk + page;
    let file_bytes = files.sizes().fold(0, u64::saturating_add);
    if budget.bytes() < file_bytes.min(least) {
        return Err(Error::Budget {
            operation: "rows",
            wanted: least,
            budget: budget.bytes(),
            why: "the smallest part of a file that can be mapped is 2 MiB and its page table",
        });
    }
    Ok(budget)
}
