//! Which pages of a read are copied from the source map, and which are read.

use std::ops::Range;

use super::pace::Pace;
use crate::error::Result;
use crate::store::source::{key, page_of, position_of, Query, SourceMap, CHUNK_BYTES, PIECE_PAGES};
use crate::store::Store;
use crate::units::FilePage;

/// What matters more where both ways are open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Preference {
    /// What is not in a populated part of the source map is read by requests.
    Speed,
    /// Whatever is in the page cache is copied from the map: a read of a cached
    /// page may make the kernel read ahead, a copy never does.
    NoDevice,
}

/// The plan for a stretch of requests.
#[derive(Default)]
pub(super) struct Plan {
    requests: Range<usize>,
    copied: Vec<bool>,
    /// Requests that will be read by system calls.
    pub(super) read_count: usize,
    keys: Vec<u64>,
    asked: Vec<u64>,
    query: Query,
}

impl Plan {
    /// The requests that the plan is for.
    pub(super) fn requests(&self) -> Range<usize> {
        self.requests.clone()
    }

    /// Whether a request is copied from the source map.
    pub(super) fn is_copied(&self, request: usize) -> bool {
        self.copied[request - self.requests.start]
    }

    /// Whether the requests that are read are pages of the file in a row, in that
    /// order, and no more than `max` of them: one system call reads them all.
    pub(super) fn is_one_run(&self, pages: &[FilePage], max: usize) -> bool {
        let mut read = self.requests().filter(|&request| !self.is_copied(request));
        let follows = |one: usize, next: usize| pages[one].0 + 1 == pages[next].0;
        self.read_count <= max
            && read.next().is_none_or(|first| {
                read.try_fold(first, |one, next| follows(one, next).then_some(next)).is_some()
            })
    }

    /// Plans for `requests` of `pages`. Without a map all of them are read.
    pub(super) fn make(
        &mut self,
        store: &Store,
        map: Option<&SourceMap>,
        pages: &[FilePage],
        requests: Range<usize>,
        preference: Preference,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        self.copied.clear();
        self.copied.resize(requests.len(), false);
        self.read_count = requests.len();
        self.requests = requests.clone();
        let Some(map) = map else { return Ok(()) };
        for start in requests.clone().step_by(PIECE_PAGES) {
            let end = requests.end.min(start + PIECE_PAGES);
            self.ask(store, map, &pages[start..end], start, preference, pace)?;
        }
        self.read_count = self.copied.iter().filter(|&&copied| !copied).count();
        Ok(())
    }

    fn ask(
        &mut self,
        store: &Store,
        map: &SourceMap,
        pages: &[FilePage],
        start: usize,
        preference: Preference,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let page_size = store.page_size();
        // A last page that is not whole is read, so that its end is zeros
        // whatever others left in memory there.
        let whole_pages = page_size.index_of(map.size_bytes());
        let wanted = pages.iter().enumerate().filter(|(_, page)| page.0 < whole_pages);
        self.keys.clear();
        self.keys.extend(wanted.map(|(position, page)| key(page.0, position)));
        if !self.keys.is_sorted() {
            self.keys.sort_unstable();
        }
        let copied = &mut self.copied[start - self.requests.start..];
        self.asked.clear();
        let chunk_of = |key: u64| (page_size.bytes_of(page_of(key)) / CHUNK_BYTES as u64) as usize;
        for group in self.keys.chunk_by(|&one, &other| chunk_of(one) == chunk_of(other)) {
            let chunk = chunk_of(group[0]);
            if map.is_populated(chunk) {
                self.asked.extend_from_slice(group);
                continue;
            }
            pace.check(0)?;
            let fits = map.mapped_bytes() + CHUNK_BYTES as u64 <= store.source_limit_bytes();
            if map.note_reads(chunk, group.len())
                && fits
                && map
                    .populate_around(page_size.bytes_of(page_of(group[0])), &mut self.query)
                    .is_some()
            {
                for &key in group {
                    copied[position_of(key)] = true;
                }
            } else if preference == Preference::NoDevice {
                self.asked.extend_from_slice(group);
            }
        }
        let answer = |position: usize, resident: bool| copied[position] |= resident;
        // What the kernel does not answer is read.
        let answered = map.residency(&self.asked, page_size, &mut self.query, answer).is_ok();
        for group in self.asked.chunk_by(|&one, &other| chunk_of(one) == chunk_of(other)) {
            if answered && !group.iter().any(|&key| copied[position_of(key)]) {
                map.note_absent(chunk_of(group[0]));
            }
        }
        Ok(())
    }
}
