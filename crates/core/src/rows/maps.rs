//! The maps from which a take copies: finding them, and checking that the copies are good.

use std::cell::{Cell, OnceCell};
use std::ops::Range;
use std::sync::Arc;

use super::{count, Rows};
use crate::error::Result;
use crate::room::collected;
use crate::store::last_change::Unchanged;
use crate::store::source::{Query, SourceMap, CHUNK_BYTES, POPULATE_READS};
use crate::sys::mm::system_page_bytes;
use crate::sys::thread::major_faults;

/// A map that a take has found, since when its file has not changed, and whether it was
/// copied from.
pub(super) struct Found {
    /// Of the file.
    number: u32,
    pub(super) map: Arc<SourceMap>,
    pub(super) since: Unchanged,
    pub(super) touched: Cell<bool>,
}

/// The maps of the files that a take comes by, each looked for once. As large as the take:
/// of ten thousand files a few rows want a few maps.
pub(super) struct Maps {
    /// A table whose size is a power of two, twice as many places as there can be files.
    places: Vec<OnceCell<(u32, Option<Found>)>>,
}

impl Maps {
    /// For a take of so many rows.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::error::Error::Memory).
    pub(super) fn of(rows: &Rows, row_count: usize) -> Result<Self> {
        let files = row_count.min(rows.files.len());
        let places = (2 * files).next_power_of_two();
        let places = std::iter::repeat_with(OnceCell::new).take(places);
        Ok(Self { places: collected("take", places)? })
    }

    /// The map of a shard's file, if it has one and may be copied from.
    #[inline]
    pub(super) fn find(&self, rows: &Rows, shard: u32) -> Option<&Found> {
        let number = rows.files.shard(shard).file_number();
        let mask = self.places.len() - 1;
        let mut place = number as usize & mask;
        loop {
            let (found_number, found) =
                self.places[place].get_or_init(|| (number, Found::look(rows, number)));
            if *found_number == number {
                return found.as_ref();
            }
            place = (place + 1) & mask;
        }
    }
}

impl Found {
    #[cold]
    fn look(rows: &Rows, number: u32) -> Option<Self> {
        let map = rows.files.map(number)?;
        let since = rows.files.before_copies(number)?;
        Some(Self { number, map, since, touched: Cell::new(false) })
    }
}

impl Rows {
    /// The files, of those copied from, that have changed meanwhile.
    pub(super) fn changed(&self, touched: &[&Found]) -> Vec<u32> {
        touched
            .iter()
            .filter(|found| !self.files.after_copies(found.number, found.since))
            .map(|found| found.number)
            .collect()
    }

    /// Notes reads from a chunk, and maps it if it was read often enough and all of it
    /// is in the page cache.
    #[cold]
    pub(super) fn populate(
        &self,
        map: &SourceMap,
        chunk: usize,
        bytes: &Range<u64>,
        query: &mut Query,
    ) -> bool {
        if map.note_use(chunk) {
            return true;
        }
        let from = bytes.start.max((chunk * CHUNK_BYTES) as u64);
        let end = bytes.end.min(((chunk + 1) * CHUNK_BYTES) as u64);
        let whole = from == (chunk * CHUNK_BYTES) as u64
            && end == map.size_bytes().min(((chunk + 1) * CHUNK_BYTES) as u64);
        let pages = (end - from) as usize / system_page_bytes();
        // All of a chunk is much of it, also where that is the short one at the file's end.
        let reads = if whole { pages.max(POPULATE_READS) } else { pages.max(1) };
        if !map.note_reads(chunk, reads) || !self.budget.claim(&self.files) {
            return false;
        }
        let populated = map.populate_around(from, query);
        if populated != Some(true) {
            self.budget.give_back();
        }
        populated.is_some()
    }

    /// Counts the thread's major faults since there were `before`; whether there were any.
    pub(super) fn note_major_faults(&self, before: &mut u64) -> bool {
        let now = major_faults();
        let more = now > *before;
        if more {
            count(&self.counters.major_faults, now - *before);
            *before = now;
        }
        more
    }
}

pub(super) fn chunks_of(bytes: &Range<u64>) -> Range<usize> {
    let first = bytes.start as usize / CHUNK_BYTES;
    first..(bytes.end as usize - 1) / CHUNK_BYTES + 1
}
