//! Rows that are copied from maps, and which chunks to map for the next ones.

use std::ops::Range;

use super::files::Shard;
use super::maps::{chunks_of, Found, Maps};
use super::Rows;
use crate::error::Result;
use crate::io::{Pace, Segment};
use crate::room;
use crate::store::source::{Query, SourceMap, CHUNK_BYTES};
use crate::sys::copy::{Recovery, RowCopies};
use crate::sys::mm::system_page_bytes;
use crate::sys::span::Span;
use crate::sys::thread::major_faults;
use crate::units::Row;

/// Rows that are copied before the thread's major faults are looked at: few at first, as
/// each may be one, then twice as many each time.
const FIRST_ROWS: usize = 8;
const MOST_ROWS: usize = 512;
/// Bytes that are copied before that, unless a row is larger.
const MOST_BYTES: usize = 1 << 20;
/// Up to this size, copying a filler row is cheaper than ending the batch.
const MOST_FILLER_BYTES: usize = 512;
/// Rows to ask about one by one after a row was not in the page cache.
const ASKED_ROWS: usize = 1024;

impl Rows {
    /// Copies the rows at `positions` that are mapped into `into`, and adds the others to `rest`.
    pub(super) fn copy(
        &self,
        ids: &[Row],
        into: Span<'_>,
        rest: &mut Vec<Segment>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        if self.files.len() == 1 {
            // Mapped at once, if that are enough.
            self.files.note_reads(0, ids.len());
        }
        let maps = Maps::of(self, ids.len())?;
        let mut copier = Copier::new(self, &maps, into, rest);
        copier.all(ids, pace)?;
        let Copier { touched, recovery, .. } = copier;
        drop(recovery);
        self.recheck(&touched, ids, rest);
        Ok(())
    }

    /// Adds rows to the `rest` that were copied from files which have changed meanwhile:
    /// reading them says what is wrong, if something is.
    fn recheck(&self, touched: &[&Found], ids: &[Row], rest: &mut Vec<Segment>) {
        let changed = self.changed(touched);
        if changed.is_empty() {
            return;
        }
        let known = std::mem::take(rest);
        for (position, row) in ids.iter().enumerate() {
            let wanted = self.row_at(row.0, position);
            let read = known.binary_search_by_key(&wanted.place, |row| row.place).is_ok();
            if read || changed.contains(&self.files.shard(wanted.file).file_number()) {
                rest.push(wanted);
            }
        }
    }

    /// A row of a take.
    fn row_at(&self, row: u64, position: usize) -> Segment {
        let (shard, offset) = self.locate(row);
        let len = self.row_bytes as u32;
        Segment { file: shard, offset, place: position * self.row_bytes, len }
    }
}

/// The shard that the last row was in, as rows that follow are often in the same.
struct Current<'c> {
    number: u32,
    shard: &'c Shard,
    found: Option<&'c Found>,
}

/// The copies of one piece of a take.
struct Copier<'c, 'r> {
    rows: &'c Rows,
    maps: &'c Maps,
    into: Span<'c>,
    /// Had once there is something to copy from.
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
    rest: &'r mut Vec<Segment>,
    /// Maps that were copied from.
    touched: Vec<&'c Found>,
    /// Unmappings that had ended when the rows that are copied next were begun to be added.
    unmapped: u64,
}

impl<'c, 'r> Copier<'c, 'r> {
    fn new(rows: &'c Rows, maps: &'c Maps, into: Span<'c>, rest: &'r mut Vec<Segment>) -> Self {
        Self {
            rows,
            maps,
            into,
            recovery: None,
            current: Current { number: 0, shard: rows.files.shard(0), found: None },
            copies: RowCopies::new(rows.row_bytes),
            begin: 0,
            limit: FIRST_ROWS,
            faults: 0,
            asked: 0,
            query: Query::default(),
            rest,
            touched: Vec::new(),
            unmapped: rows.budget.ended(),
        }
    }

    /// Copies rows to their places in `into`, save those that are left in `rest`.
    fn all(&mut self, ids: &[Row], pace: &mut Pace<'_>) -> Result<()> {
        let count = ids.len();
        let most_rows = (MOST_BYTES / self.rows.row_bytes).max(1);
        if count > self.limit.min(most_rows) {
            self.faults = major_faults();
        }
        self.turn_to(self.rows.files.shard_of(ids[0].0));
        let mut position = 0;
        while position < count {
            let end = count.min(self.begin + self.limit.min(most_rows));
            position = self.add_ready(position..end, ids);
            if position < end {
                self.add(position, ids)?;
                position += 1;
            }
            if position >= end {
                let added = self.flush(ids);
                if position < count {
                    self.note_faults();
                    pace.check(added)?;
                }
            }
        }
        Ok(())
    }

    #[inline]
    fn turn_to(&mut self, number: u32) {
        let found = self.maps.find(self.rows, number);
        if found.is_some() && self.recovery.is_none() {
            self.recovery = Recovery::begin().ok();
        }
        let found = found.filter(|_| self.recovery.is_some());
        self.current = Current { number, shard: self.rows.files.shard(number), found };
    }

    /// Adds rows that are known to be mapped, up to the first that is not, whose position it
    /// returns.
    fn add_ready(&mut self, positions: Range<usize>, ids: &[Row]) -> usize {
        if self.asked > 0 {
            return positions.start;
        }
        let row_bytes = self.rows.row_bytes;
        let mut position = positions.start;
        while position < positions.end {
            if !self.current.shard.has(ids[position].0) {
                self.turn_to(self.rows.files.shard_of(ids[position].0));
            }
            let Some(found) = self.current.found else { return position };
            let (map, shard) = (&*found.map, self.current.shard);
            let whole = map.whole();
            let first = position;
            while let Some(row) = ids[..positions.end].get(position).filter(|row| shard.has(row.0))
            {
                let offset = shard.offset_of(row.0, row_bytes) as usize;
                let last = offset + row_bytes - 1;
                let (first_chunk, last_chunk) = (offset / CHUNK_BYTES, last / CHUNK_BYTES);
                // A row of up to `MAX_FETCHED_BYTES` is in two chunks at most.
                if !map.is_in_use(first_chunk)
                    || (last_chunk != first_chunk && !map.is_in_use(last_chunk))
                {
                    if position > first {
                        self.touch(found);
                    }
                    return position;
                }
                self.copies.push(whole.part(offset, row_bytes));
                position += 1;
            }
            self.touch(found);
        }
        position
    }

    fn touch(&mut self, found: &'c Found) {
        if !found.touched.replace(true) {
            self.touched.push(found);
        }
    }

    /// Adds any row to the copies, or to the rest.
    fn add(&mut self, position: usize, ids: &[Row]) -> Result<()> {
        let wanted = self.rows.row_at(ids[position].0, position);
        if wanted.file != self.current.number {
            self.turn_to(wanted.file);
        }
        if let Some(from) = self.source_of(&wanted) {
            self.copies.push(from);
            return Ok(());
        }
        if self.rows.row_bytes > MOST_FILLER_BYTES {
            self.flush(ids);
        }
        room::push("take", self.rest, wanted)?;
        if self.copies.is_empty() {
            self.begin = position + 1;
        } else {
            self.copies.push_last_again();
        }
        Ok(())
    }

    /// Where a row is mapped, if all of it is, and is in the page cache as far as is known.
    fn source_of(&mut self, wanted: &Segment) -> Option<Span<'c>> {
        let Some(found) = self.current.found else {
            self.rows.files.note_reads(wanted.file, 1);
            return None;
        };
        let map = &*found.map;
        let bytes = wanted.offset..wanted.end();
        let chunks = chunks_of(&bytes);
        let mapped = chunks.clone().all(|chunk| map.note_use(chunk))
            || chunks.clone().all(|chunk| self.rows.populate(map, chunk, &bytes, &mut self.query));
        if !mapped || (self.asked > 0 && !self.ask(map, wanted, chunks)) {
            return None;
        }
        self.touch(found);
        map.bytes(wanted.offset, self.rows.row_bytes)
    }

    /// Asks whether a row is in the page cache; the chunks of one that is not are unmapped.
    #[cold]
    fn ask(&mut self, map: &SourceMap, wanted: &Segment, chunks: Range<usize>) -> bool {
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
    fn flush(&mut self, ids: &[Row]) -> usize {
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
            let before = self.rest.partition_point(|row| row.place < first * row_bytes);
            self.rest.truncate(before);
            let lost = (first..positions.end).map(|at| self.rows.row_at(ids[at].0, at));
            self.rest.extend(lost);
        }
        if self.rows.budget.begun() != self.unmapped {
            self.unmap_strays(positions, ids);
        }
        self.unmapped = self.rows.budget.ended();
        count_added
    }

    /// Unmaps chunks again that were unmapped while these rows were copied from them: what the
    /// copies have mapped again counts for nobody.
    #[cold]
    fn unmap_strays(&self, positions: Range<usize>, ids: &[Row]) {
        let mut strays: Vec<(u32, usize)> = Vec::new();
        for position in positions {
            let row = self.rows.row_at(ids[position].0, position);
            let read = self.rest.binary_search_by_key(&row.place, |row| row.place);
            if read.is_ok() {
                continue;
            }
            let Some(found) = self.maps.find(self.rows, row.file) else { continue };
            let chunks = chunks_of(&(row.offset..row.end()));
            let absent = chunks.filter(|&chunk| !found.map.is_populated(chunk));
            strays.extend(absent.map(|chunk| (row.file, chunk)));
        }
        strays.sort_unstable();
        strays.dedup();
        for (shard, chunk) in strays {
            if let Some(found) = self.maps.find(self.rows, shard) {
                self.rows.budget.unmap(&found.map, chunk);
            }
        }
    }

    /// Looks at the thread's major faults: after one, rows are asked about.
    fn note_faults(&mut self) {
        if self.rows.note_major_faults(&mut self.faults) {
            self.asked = ASKED_ROWS;
            self.limit = FIRST_ROWS;
        } else {
            self.limit = (self.limit * 2).min(MOST_ROWS);
        }
    }
}
