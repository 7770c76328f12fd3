//! The rows that are copied from maps, and what is mapped for the next ones.

use std::cell::{Cell, OnceCell};
use std::ops::Range;
use std::sync::Arc;

use super::{count, Rows, Wanted};
use crate::error::{Result, RowLoss};
use crate::scatter::Pace;
use crate::store::source::{Query, SourceMap, CHUNK_BYTES};
use crate::sys::copy::{Recovery, RowCopies};
use crate::sys::mm::system_page_bytes;
use crate::sys::span::Span;
use crate::sys::thread::major_faults;
use crate::units::{Pages, Row};

/// Rows that are copied before the thread's major faults are looked at: few at first, as
/// each may be one, then twice as many each time.
const FIRST_ROWS: usize = 8;
const MOST_ROWS: usize = 256;
/// Bytes that are copied before, unless a row is larger.
const MOST_BYTES: usize = 1 << 20;
/// Rows that are asked about one by one once a row was not in the page cache.
const ASKED_ROWS: usize = 1024;

/// A map that a take has found, and whether it was copied from.
struct Found {
    map: Arc<SourceMap>,
    touched: Cell<bool>,
}

type Maps = [OnceCell<Option<Found>>];

impl Rows {
    /// Copies the rows at `positions` that are mapped into `into`, and returns the others.
    pub(super) fn copy(
        &self,
        ids: &Pages<Row>,
        positions: Range<usize>,
        into: Span<'_>,
        pace: &mut Pace<'_>,
    ) -> Result<Vec<Wanted>> {
        if let 1 = self.files.len() {
            self.files.note_reads(0, positions.len());
        }
        let recovery = Recovery::begin().ok();
        let maps: Vec<OnceCell<Option<Found>>> =
            std::iter::repeat_with(OnceCell::new).take(self.files.len()).collect();
        let mut copier = Copier::new(self, &maps, into, recovery);
        for (place, position) in positions.clone().enumerate() {
            let (shard, offset) = self.locate(ids.at(position));
            copier.add(Wanted { shard, offset, position: place as u32 });
            if copier.is_full() {
                pace.check(copier.flush())?;
            }
        }
        copier.flush();
        let Copier { rest, touched, recovery, .. } = copier;
        drop(recovery);
        self.recheck(&touched, ids, positions)?;
        Ok(rest)
    }

    /// A file that was cut within a page shows zeros behind its end, without a fault. The
    /// kernel shortens the size before it clears the page, so the size now tells.
    fn recheck(&self, touched: &[u32], ids: &Pages<Row>, positions: Range<usize>) -> Result<()> {
        for &shard in touched {
            let size_now = self.files.size_now(shard);
            let whole = self.files.mapped_size(shard);
            if size_now.as_ref().is_ok_and(|&size_bytes| size_bytes >= whole) {
                continue;
            }
            let end = size_now.as_ref().map_or(0, |&size_bytes| size_bytes);
            let loss =
                size_now.map_or_else(|loss| loss, |size_bytes| RowLoss::Truncated { size_bytes });
            let mut places = positions.clone().map(|position| self.locate(ids.at(position)));
            let first = places
                .find(|(other, offset)| *other == shard && offset + self.row_bytes as u64 > end);
            if let Some((_, offset)) = first {
                return Err(self.files.shard(shard).loss(offset, self.row_bytes, loss));
            }
        }
        Ok(())
    }
}

/// The copies of one piece of a take.
struct Copier<'c> {
    rows: &'c Rows,
    maps: &'c Maps,
    into: Span<'c>,
    recovery: Option<Recovery>,
    copies: RowCopies<'c>,
    /// The rows that `copies` is of.
    block: Vec<Wanted>,
    /// Rows that are copied together.
    limit: usize,
    /// The thread's major faults so far.
    faults: u64,
    /// Rows that are still to be asked about.
    asked: usize,
    query: Query,
    /// Rows that are not copied.
    rest: Vec<Wanted>,
    /// Shards that were copied from.
    touched: Vec<u32>,
}

impl<'c> Copier<'c> {
    fn new(rows: &'c Rows, maps: &'c Maps, into: Span<'c>, recovery: Option<Recovery>) -> Self {
        Self {
            rows,
            maps,
            into,
            recovery,
            copies: RowCopies::new(rows.row_bytes),
            block: Vec::with_capacity(MOST_ROWS),
            limit: FIRST_ROWS,
            faults: major_faults(),
            asked: 0,
            query: Query::default(),
            rest: Vec::new(),
            touched: Vec::new(),
        }
    }

    fn is_full(&self) -> bool {
        let rows = self.block.len();
        rows >= self.limit || rows * self.rows.row_bytes >= MOST_BYTES
    }

    /// Adds a row to the copies, or to the rest.
    fn add(&mut self, wanted: Wanted) {
        match self.source_of(&wanted) {
            Some(from) => {
                self.copies.push(from, wanted.place(self.into, self.rows.row_bytes));
                self.block.push(wanted);
            }
            None => self.rest.push(wanted),
        }
    }

    /// Where a row is mapped, if all of it is, and is in the page cache as far as is known.
    fn source_of(&mut self, wanted: &Wanted) -> Option<Span<'c>> {
        self.recovery.as_ref()?;
        let Some(found) = self.found(wanted.shard) else {
            self.rows.files.note_reads(wanted.shard, 1);
            return None;
        };
        let map = &*found.map;
        let bytes = wanted.bytes(self.rows.row_bytes);
        let chunks = chunks_of(&bytes);
        let mapped = chunks.clone().all(|chunk| map.note_use(chunk))
            || chunks.clone().all(|chunk| self.populate(map, chunk, &bytes));
        if !mapped || (self.asked > 0 && !self.ask(map, wanted, chunks)) {
            return None;
        }
        if !found.touched.replace(true) {
            self.touched.push(wanted.shard);
        }
        map.bytes(wanted.offset, self.rows.row_bytes)
    }

    fn found(&self, shard: u32) -> Option<&'c Found> {
        let find = || {
            let map = self.rows.files.map(shard)?;
            Some(Found { map, touched: Cell::new(false) })
        };
        self.maps[shard as usize].get_or_init(find).as_ref()
    }

    /// Notes reads from a chunk, and maps it if it was read often enough and all of it
    /// is in the page cache.
    fn populate(&mut self, map: &SourceMap, chunk: usize, bytes: &Range<u64>) -> bool {
        if map.note_use(chunk) {
            return true;
        }
        let pages = self.rows.row_bytes / system_page_bytes();
        let budget = &self.rows.budget;
        if !map.note_reads(chunk, pages.max(1)) || !budget.claim(&self.rows.files) {
            return false;
        }
        let from = bytes.start.max((chunk * CHUNK_BYTES) as u64);
        let populated = map.populate_around(from, &mut self.query);
        if populated != Some(true) {
            budget.give_back();
        }
        populated.is_some()
    }

    /// Asks whether a row is in the page cache; the chunks of one that is not are unmapped.
    fn ask(&mut self, map: &SourceMap, wanted: &Wanted, chunks: Range<usize>) -> bool {
        let start = wanted.offset as usize & !(system_page_bytes() - 1);
        let end = wanted.offset as usize + self.rows.row_bytes;
        if map.is_resident(start, end - start, &mut self.query).is_ok_and(|here| here) {
            self.asked -= 1;
            return true;
        }
        self.asked = ASKED_ROWS;
        for chunk in chunks {
            if self.rows.files.unmap(wanted.shard as usize, map, chunk) {
                self.rows.budget.give_back();
            }
        }
        false
    }

    /// Copies what was added; says how many rows that were.
    fn flush(&mut self) -> usize {
        let rows = self.block.len();
        let (Some(recovery), true) = (&self.recovery, rows > 0) else { return 0 };
        // What was lost is read, which says why.
        let copied = recovery.copy_rows(&mut self.copies).err().unwrap_or(rows);
        self.rest.extend_from_slice(&self.block[copied..]);
        self.copies.clear();
        self.block.clear();
        count(&self.rows.counters.rows_copied, copied as u64);
        let faults = major_faults();
        if faults > self.faults {
            count(&self.rows.counters.major_faults, faults - self.faults);
            self.faults = faults;
            self.asked = ASKED_ROWS;
            self.limit = FIRST_ROWS;
        } else {
            self.limit = (self.limit * 2).min(MOST_ROWS);
        }
        rows
    }
}

fn chunks_of(bytes: &Range<u64>) -> Range<usize> {
    let first = bytes.start as usize / CHUNK_BYTES;
    first..(bytes.end as usize - 1) / CHUNK_BYTES + 1
}
