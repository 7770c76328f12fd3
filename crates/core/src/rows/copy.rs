//! The rows that are copied from maps, and what is mapped for the next ones.

use std::cell::{Cell, OnceCell};
use std::ops::Range;
use std::sync::Arc;

use super::files::Shard;
use super::{count, Rows, Wanted};
use crate::error::Result;
use crate::store::last_change::Unchanged;
use crate::store::source::{Query, SourceMap, CHUNK_BYTES};
use crate::store::Pace;
use crate::sys::copy::{Recovery, RowCopies};
use crate::sys::mm::system_page_bytes;
use crate::sys::span::Span;
use crate::sys::thread::major_faults;
use crate::units::{Pages, Row};

/// Rows that are copied before the thread's major faults are looked at: few at first, as
/// each may be one, then twice as many each time.
const FIRST_ROWS: usize = 8;
const MOST_ROWS: usize = 512;
/// Bytes that are copied before, unless a row is larger.
const MOST_BYTES: usize = 1 << 20;
/// A row of up to so many bytes is copied for nothing rather than that copies end.
const MOST_FILLER_BYTES: usize = 512;
/// Rows that are asked about one by one once a row was not in the page cache.
const ASKED_ROWS: usize = 1024;

/// A map that a take has found, since when its file has not changed, and whether it was
/// copied from.
struct Found {
    map: Arc<SourceMap>,
    since: Unchanged,
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
        let wanted = positions.len();
        match ids {
            Pages::List(list) => {
                let list = &list[positions.clone()];
                copier.all(wanted, |position| list[position].0, pace)?;
            }
            Pages::Range(range) => {
                let first = range.start + positions.start as u64;
                copier.all(wanted, |position| first + position as u64, pace)?;
            }
        }
        let Copier { mut rest, touched, recovery, .. } = copier;
        drop(recovery);
        self.recheck(&touched, ids, positions, &mut rest);
        count(&self.counters.rows_copied, (wanted - rest.len()) as u64);
        Ok(rest)
    }

    /// Adds rows to the `rest` that were copied from files which have changed meanwhile:
    /// reading them says what is wrong, if something is.
    fn recheck(
        &self,
        touched: &[(u32, Unchanged)],
        ids: &Pages<Row>,
        positions: Range<usize>,
        rest: &mut Vec<Wanted>,
    ) {
        let changed: Vec<u32> = touched
            .iter()
            .filter(|&&(shard, since)| !self.files.after_copies(shard, since))
            .map(|&(shard, _)| shard)
            .collect();
        if changed.is_empty() {
            return;
        }
        let known = std::mem::take(rest);
        for (position, index) in (0_u32..).zip(positions) {
            let (shard, offset) = self.locate(ids.at(index).0);
            let wanted = known.binary_search_by_key(&position, |row| row.position).is_ok();
            if wanted || changed.contains(&shard) {
                rest.push(Wanted { shard, offset, position });
            }
        }
    }
}

/// The shard that the last row was in, as rows that follow are often in the same.
struct Current<'c> {
    number: u32,
    shard: &'c Shard,
    found: Option<&'c Found>,
}

/// The copies of one piece of a take.
struct Copier<'c> {
    rows: &'c Rows,
    maps: &'c Maps,
    into: Span<'c>,
    recovery: Option<Recovery>,
    current: Current<'c>,
    /// Rows that go one after another to `begin` and the places behind it. In the place of
    /// one that is to be read is the one before it, as that costs less than an end.
    copies: RowCopies<'c>,
    begin: usize,
    /// Rows that are copied together.
    limit: usize,
    /// The thread's major faults so far.
    faults: u64,
    /// Rows that are still to be asked about.
    asked: usize,
    query: Query,
    /// Rows that are to be read, by position.
    rest: Vec<Wanted>,
    /// Shards that were copied from.
    touched: Vec<(u32, Unchanged)>,
    /// Unmappings that had ended when the rows that are copied next were begun to be added.
    unmapped: u64,
}

impl<'c> Copier<'c> {
    fn new(rows: &'c Rows, maps: &'c Maps, into: Span<'c>, recovery: Option<Recovery>) -> Self {
        let mut copier = Self {
            rows,
            maps,
            into,
            recovery,
            current: Current { number: 0, shard: rows.files.shard(0), found: None },
            copies: RowCopies::new(rows.row_bytes),
            begin: 0,
            limit: FIRST_ROWS,
            faults: 0,
            asked: 0,
            query: Query::default(),
            rest: Vec::new(),
            touched: Vec::new(),
            unmapped: rows.budget.ended(),
        };
        copier.turn_to(0);
        copier
    }

    /// Copies `count` rows to their places in `into`, save those that are left in `rest`.
    fn all(
        &mut self,
        count: usize,
        row_at: impl Fn(usize) -> u64,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let most_rows = (MOST_BYTES / self.rows.row_bytes).max(1);
        if count > self.limit.min(most_rows) {
            self.faults = major_faults();
        }
        let mut position = 0;
        while position < count {
            let end = count.min(self.begin + self.limit.min(most_rows));
            position = self.add_ready(position..end, &row_at);
            if position < end {
                self.add(row_at(position), position, &row_at);
                position += 1;
            }
            if position >= end {
                let added = self.flush(&row_at);
                if position < count {
                    self.note_faults();
                    pace.check(added)?;
                }
            }
        }
        Ok(())
    }

    fn turn_to(&mut self, number: u32) {
        let find = || {
            let map = self.rows.files.map(number)?;
            let since = self.rows.files.before_copies(number)?;
            Some(Found { map, since, touched: Cell::new(false) })
        };
        let found = match self.recovery {
            Some(_) => self.maps[number as usize].get_or_init(find).as_ref(),
            None => None,
        };
        self.current = Current { number, shard: self.rows.files.shard(number), found };
    }

    /// Adds rows of the current shard that are known to be mapped, up to the first that is
    /// not, whose position it returns.
    fn add_ready(&mut self, positions: Range<usize>, row_at: &impl Fn(usize) -> u64) -> usize {
        let Some(found) = self.current.found.filter(|_| self.asked == 0) else {
            return positions.start;
        };
        let (map, shard, row_bytes) = (&*found.map, self.current.shard, self.rows.row_bytes);
        let whole = map.whole();
        let mut position = positions.start;
        while position < positions.end {
            let row = row_at(position);
            if !shard.has(row) {
                break;
            }
            let offset = shard.offset_of(row, row_bytes) as usize;
            let last = offset + row_bytes - 1;
            let (first_chunk, last_chunk) = (offset / CHUNK_BYTES, last / CHUNK_BYTES);
            if !map.is_in_use(first_chunk)
                || (last_chunk != first_chunk
                    && !(first_chunk + 1..=last_chunk).all(|chunk| map.is_in_use(chunk)))
            {
                break;
            }
            self.copies.push(whole.part(offset, row_bytes));
            position += 1;
        }
        if position > positions.start {
            self.touch(found);
        }
        position
    }

    fn touch(&mut self, found: &Found) {
        if !found.touched.replace(true) {
            self.touched.push((self.current.number, found.since));
        }
    }

    fn wanted(&self, row: u64, position: usize) -> Wanted {
        let (shard, offset) = self.rows.locate(row);
        Wanted { shard, offset, position: position as u32 }
    }

    /// Adds any row to the copies, or to the rest.
    fn add(&mut self, row: u64, position: usize, row_at: &impl Fn(usize) -> u64) {
        let wanted = self.wanted(row, position);
        if wanted.shard != self.current.number {
            self.turn_to(wanted.shard);
        }
        if let Some(from) = self.source_of(&wanted) {
            self.copies.push(from);
            return;
        }
        if self.rows.row_bytes > MOST_FILLER_BYTES {
            self.flush(row_at);
        }
        self.rest.push(wanted);
        if self.copies.is_empty() {
            self.begin = position + 1;
        } else {
            self.copies.push_last_again();
        }
    }

    /// Where a row is mapped, if all of it is, and is in the page cache as far as is known.
    fn source_of(&mut self, wanted: &Wanted) -> Option<Span<'c>> {
        let Some(found) = self.current.found else {
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
        self.touch(found);
        map.bytes(wanted.offset, self.rows.row_bytes)
    }

    /// Notes reads from a chunk, and maps it if it was read often enough and all of it
    /// is in the page cache.
    #[cold]
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
    #[cold]
    fn ask(&mut self, map: &SourceMap, wanted: &Wanted, chunks: Range<usize>) -> bool {
        let start = wanted.offset as usize & !(system_page_bytes() - 1);
        let end = wanted.offset as usize + self.rows.row_bytes;
        if map.is_resident(start, end - start, &mut self.query).is_ok_and(|here| here) {
            self.asked -= 1;
            return true;
        }
        self.asked = ASKED_ROWS;
        for chunk in chunks {
            self.rows.budget.unmap(map, chunk);
        }
        false
    }

    /// Copies what was added; says how many rows that were.
    fn flush(&mut self, row_at: &impl Fn(usize) -> u64) -> usize {
        let count_added = self.copies.len();
        let positions = self.begin..self.begin + count_added;
        self.begin = positions.end;
        let (Some(recovery), true) = (&self.recovery, count_added > 0) else { return 0 };
        let row_bytes = self.rows.row_bytes;
        let into = self.into.part(positions.start * row_bytes, count_added * row_bytes);
        let outcome = recovery.copy_rows(&mut self.copies, into);
        self.copies.clear();
        if let Err(copied) = outcome {
            // What was lost is read, which says why.
            let first = positions.start + copied;
            let before = self.rest.partition_point(|row| (row.position as usize) < first);
            self.rest.truncate(before);
            for position in first..positions.end {
                self.rest.push(self.wanted(row_at(position), position));
            }
        }
        if self.rows.budget.begun() != self.unmapped {
            self.unmap_strays(positions, row_at);
        }
        self.unmapped = self.rows.budget.ended();
        count_added
    }

    /// Unmaps chunks anew that were unmapped while these rows were copied from them: what the
    /// copies have mapped again counts for nobody.
    #[cold]
    fn unmap_strays(&self, positions: Range<usize>, row_at: &impl Fn(usize) -> u64) {
        let mut strays: Vec<(u32, usize)> = Vec::new();
        for position in positions {
            let read = self.rest.binary_search_by_key(&position, |row| row.position as usize);
            if read.is_ok() {
                continue;
            }
            let row = self.wanted(row_at(position), position);
            let Some(Some(found)) = self.maps[row.shard as usize].get() else { continue };
            let chunks = chunks_of(&row.bytes(self.rows.row_bytes));
            let absent = chunks.filter(|&chunk| !found.map.is_populated(chunk));
            strays.extend(absent.map(|chunk| (row.shard, chunk)));
        }
        strays.sort_unstable();
        strays.dedup();
        for (shard, chunk) in strays {
            if let Some(Some(found)) = self.maps[shard as usize].get() {
                self.rows.budget.unmap(&found.map, chunk);
            }
        }
    }

    /// Looks at the thread's major faults: after one, rows are asked about.
    fn note_faults(&mut self) {
        let faults = major_faults();
        if faults > self.faults {
            count(&self.rows.counters.major_faults, faults - self.faults);
            self.faults = faults;
            self.asked = ASKED_ROWS;
            self.limit = FIRST_ROWS;
        } else {
            self.limit = (self.limit * 2).min(MOST_ROWS);
        }
    }
}

fn chunks_of(bytes: &Range<u64>) -> Range<usize> {
    let first = bytes.start as usize / CHUNK_BYTES;
    first..(bytes.end as usize - 1) / CHUNK_BYTES + 1
}
